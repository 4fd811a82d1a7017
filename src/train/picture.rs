//! Pictures with words: a canvas, an alphabet of its own, sheets of labelled panels, PNG.

use crate::data::Picture;
use crate::ensure;
use crate::error::{Context, Result};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

/// Least side of a panel: smaller pictures are enlarged by a whole factor.
const PANEL: usize = 192;
/// Most pixels of a canvas.
const MOST: usize = 200 << 20;
const GAP: usize = 8;
/// Letters are drawn at twice their size.
const LETTER: usize = 2;
const INK: [u8; 3] = [40, 40, 44];
const PAPER: [u8; 3] = [255, 255, 255];

/// Red, green and blue bytes, rows from the top.
#[derive(Clone, Debug, PartialEq)]
pub struct Canvas {
    pub width: usize,
    pub height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub fn new(width: usize, height: usize, colour: [u8; 3]) -> Result<Self> {
        let pixels = width.checked_mul(height).filter(|pixels| (1..=MOST).contains(pixels));
        ensure!(pixels.is_some(), "a picture of {width} x {height} pixels is too large to draw; ask for fewer images at a time");
        Ok(Self { width, height, pixels: colour.repeat(width * height) })
    }

    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = 3 * (y * self.width + x);
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    /// What lies outside is left out.
    fn set(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        if x < self.width && y < self.height {
            let at = 3 * (y * self.width + x);
            self.pixels[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// A picture with each of its pixels as `factor` x `factor`. Of more than three channels the first three are shown, of fewer the last one repeated.
    pub fn place(&mut self, picture: &Picture, left: usize, top: usize, factor: usize) {
        let [height, width] = picture.size;
        let channel = |c: usize| c.min(picture.channels - 1);
        for (y, x) in (0..height * factor).flat_map(|y| (0..width * factor).map(move |x| (y, x))) {
            let at = (y / factor * width + x / factor) * picture.channels;
            self.set(left + x, top + y, [0, 1, 2].map(|c| picture.pixels[at + channel(c)]));
        }
    }

    /// Text in letters of 5 x 7 dots, each `size` x `size` pixels, some two dots lower; what is not ASCII becomes a question mark.
    pub fn text(&mut self, text: &str, left: usize, top: usize, size: usize, colour: [u8; 3]) {
        for (i, c) in text.chars().enumerate() {
            let glyph = &GLYPHS[if (' '..='~').contains(&c) { c as usize - 32 } else { '?' as usize - 32 }];
            let below = if "gpqy".contains(c) { 2 * size } else { 0 };
            for (y, x) in (0..7 * size).flat_map(|y| (0..5 * size).map(move |x| (y, x))) {
                if glyph[y / size] >> (4 - x / size) & 1 == 1 {
                    self.set(left + 6 * size * i + x, top + below + y, colour);
                }
            }
        }
    }

    pub fn png(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
            .write_image(&self.pixels, self.width as u32, self.height as u32, ExtendedColorType::Rgb8)
            .context("encoding a picture as PNG")?;
        Ok(bytes)
    }
}

/// Columns that text of so many letters takes.
fn text_width(text: &str) -> usize {
    (6 * text.chars().count()).saturating_sub(1) * LETTER
}

/// Panels side by side, each with its title; a row whose titles are those of the row above does not repeat them.
#[derive(Clone, Debug)]
pub struct SheetRow {
    pub label: String,
    pub panels: Vec<(String, Picture)>,
}

/// Words in lines of at most so many pixels; a word that is longer has a line of its own.
fn lines(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut().filter(|line| text_width(line) + text_width(word) + 7 * LETTER <= most) {
            Some(line) => *line = format!("{line} {word}"),
            None => lines.push(word.to_string()),
        }
    }
    lines
}

/// From one line of text to the next.
const LINE: usize = 11 * LETTER;

/// A row with its measures taken.
struct Measured<'a> {
    row: &'a SheetRow,
    /// Lines of each title; none where the row above has the same titles.
    titles: Vec<Vec<String>>,
    height: usize,
}

impl Measured<'_> {
    fn titles_height(&self) -> usize {
        LINE * self.titles.iter().map(Vec::len).max().unwrap_or(0)
    }
}

fn factor(picture: &Picture) -> usize {
    PANEL.div_ceil(picture.size[0].max(picture.size[1])).max(1)
}

fn measured<'a>(row: &'a SheetRow, above: Option<&SheetRow>) -> Measured<'a> {
    let names = |row: &SheetRow| row.panels.iter().map(|(title, _)| title.clone()).collect::<Vec<_>>();
    let height = row.panels.iter().map(|(_, picture)| picture.size[0] * factor(picture)).max().unwrap_or(0);
    let titles = match above.is_some_and(|above| names(above) == names(row)) {
        true => Vec::new(),
        false => row.panels.iter().map(|(title, picture)| lines(title, picture.size[1] * factor(picture))).collect(),
    };
    Measured { row, titles, height }
}

/// Rows of panels below one another, their labels on the left in lines of a panel's width at most.
pub fn sheet(rows: &[SheetRow]) -> Result<Canvas> {
    ensure!(rows.iter().any(|row| !row.panels.is_empty()), "there are no pictures to show");
    let rows: Vec<Measured> = rows.iter().enumerate().map(|(i, row)| measured(row, i.checked_sub(1).map(|above| &rows[above]))).collect();
    let label = |row: &Measured| lines(&row.row.label, PANEL);
    let widest = rows.iter().flat_map(label).map(|line| text_width(&line)).max();
    let left = GAP + widest.map_or(0, |widest| widest + GAP);
    let across = |row: &Measured| row.row.panels.iter().map(|(_, picture)| picture.size[1] * factor(picture) + GAP).sum::<usize>();
    let height = rows.iter().map(|row| row.titles_height() + row.height + GAP).sum::<usize>();
    let mut canvas = Canvas::new(left + rows.iter().map(across).max().unwrap_or(0), GAP + height, PAPER)?;
    let mut top = GAP;
    for row in &rows {
        let (below, mut x) = (top + row.titles_height(), left);
        let label = label(row);
        let label_top = below + row.height.saturating_sub(LINE * label.len()) / 2;
        label.iter().enumerate().for_each(|(i, line)| canvas.text(line, GAP, label_top + i * LINE, LETTER, INK));
        for (panel, (_, picture)) in row.row.panels.iter().enumerate() {
            let title = row.titles.get(panel).map_or(&[][..], Vec::as_slice);
            let title_top = below - LINE * title.len();
            title.iter().enumerate().for_each(|(i, line)| canvas.text(line, x, title_top + i * LINE, LETTER, INK));
            canvas.place(picture, x, below, factor(picture));
            x += picture.size[1] * factor(picture) + GAP;
        }
        top = below + row.height + GAP;
    }
    Ok(canvas)
}

/// Seven rows of five dots from ' ' to '~', the leftmost dot the highest of five bits; g, p, q and y stand two dots lower.
#[rustfmt::skip]
const GLYPHS: [[u8; 7]; 95] = [
    [0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00],
    [0x04, 0x04, 0x04, 0x04, 0x04, 0x00, 0x04],
    [0x0a, 0x0a, 0x0a, 0x00, 0x00, 0x00, 0x00],
    [0x0a, 0x0a, 0x1f, 0x0a, 0x1f, 0x0a, 0x0a],
    [0x04, 0x0f, 0x14, 0x0e, 0x05, 0x1e, 0x04],
    [0x18, 0x19, 0x02, 0x04, 0x08, 0x13, 0x03],
    [0x0c, 0x12, 0x14, 0x08, 0x15, 0x12, 0x0d],
    [0x04, 0x04, 0x08, 0x00, 0x00, 0x00, 0x00],
    [0x02, 0x04, 0x08, 0x08, 0x08, 0x04, 0x02],
    [0x08, 0x04, 0x02, 0x02, 0x02, 0x04, 0x08],
    [0x00, 0x04, 0x15, 0x0e, 0x15, 0x04, 0x00],
    [0x00, 0x04, 0x04, 0x1f, 0x04, 0x04, 0x00],
    [0x00, 0x00, 0x00, 0x00, 0x0c, 0x04, 0x08],
    [0x00, 0x00, 0x00, 0x1f, 0x00, 0x00, 0x00],
    [0x00, 0x00, 0x00, 0x00, 0x00, 0x0c, 0x0c],
    [0x00, 0x01, 0x02, 0x04, 0x08, 0x10, 0x00],
    [0x0e, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0e],
    [0x04, 0x0c, 0x04, 0x04, 0x04, 0x04, 0x0e],
    [0x0e, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1f],
    [0x1f, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0e],
    [0x02, 0x06, 0x0a, 0x12, 0x1f, 0x02, 0x02],
    [0x1f, 0x10, 0x1e, 0x01, 0x01, 0x11, 0x0e],
    [0x06, 0x08, 0x10, 0x1e, 0x11, 0x11, 0x0e],
    [0x1f, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08],
    [0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e],
    [0x0e, 0x11, 0x11, 0x0f, 0x01, 0x02, 0x0c],
    [0x00, 0x0c, 0x0c, 0x00, 0x0c, 0x0c, 0x00],
    [0x00, 0x0c, 0x0c, 0x00, 0x0c, 0x04, 0x08],
    [0x02, 0x04, 0x08, 0x10, 0x08, 0x04, 0x02],
    [0x00, 0x00, 0x1f, 0x00, 0x1f, 0x00, 0x00],
    [0x08, 0x04, 0x02, 0x01, 0x02, 0x04, 0x08],
    [0x0e, 0x11, 0x01, 0x02, 0x04, 0x00, 0x04],
    [0x0e, 0x11, 0x01, 0x0d, 0x15, 0x15, 0x0e],
    [0x0e, 0x11, 0x11, 0x11, 0x1f, 0x11, 0x11],
    [0x1e, 0x11, 0x11, 0x1e, 0x11, 0x11, 0x1e],
    [0x0e, 0x11, 0x10, 0x10, 0x10, 0x11, 0x0e],
    [0x1c, 0x12, 0x11, 0x11, 0x11, 0x12, 0x1c],
    [0x1f, 0x10, 0x10, 0x1e, 0x10, 0x10, 0x1f],
    [0x1f, 0x10, 0x10, 0x1e, 0x10, 0x10, 0x10],
    [0x0e, 0x11, 0x10, 0x17, 0x11, 0x11, 0x0f],
    [0x11, 0x11, 0x11, 0x1f, 0x11, 0x11, 0x11],
    [0x0e, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0e],
    [0x07, 0x02, 0x02, 0x02, 0x02, 0x12, 0x0c],
    [0x11, 0x12, 0x14, 0x18, 0x14, 0x12, 0x11],
    [0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x1f],
    [0x11, 0x1b, 0x15, 0x15, 0x11, 0x11, 0x11],
    [0x11, 0x11, 0x19, 0x15, 0x13, 0x11, 0x11],
    [0x0e, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e],
    [0x1e, 0x11, 0x11, 0x1e, 0x10, 0x10, 0x10],
    [0x0e, 0x11, 0x11, 0x11, 0x15, 0x12, 0x0d],
    [0x1e, 0x11, 0x11, 0x1e, 0x14, 0x12, 0x11],
    [0x0f, 0x10, 0x10, 0x0e, 0x01, 0x01, 0x1e],
    [0x1f, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04],
    [0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e],
    [0x11, 0x11, 0x11, 0x11, 0x11, 0x0a, 0x04],
    [0x11, 0x11, 0x11, 0x15, 0x15, 0x15, 0x0a],
    [0x11, 0x11, 0x0a, 0x04, 0x0a, 0x11, 0x11],
    [0x11, 0x11, 0x11, 0x0a, 0x04, 0x04, 0x04],
    [0x1f, 0x01, 0x02, 0x04, 0x08, 0x10, 0x1f],
    [0x0e, 0x08, 0x08, 0x08, 0x08, 0x08, 0x0e],
    [0x00, 0x10, 0x08, 0x04, 0x02, 0x01, 0x00],
    [0x0e, 0x02, 0x02, 0x02, 0x02, 0x02, 0x0e],
    [0x04, 0x0a, 0x11, 0x00, 0x00, 0x00, 0x00],
    [0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x1f],
    [0x08, 0x04, 0x02, 0x00, 0x00, 0x00, 0x00],
    [0x00, 0x00, 0x0e, 0x01, 0x0f, 0x11, 0x0f],
    [0x10, 0x10, 0x16, 0x19, 0x11, 0x11, 0x1e],
    [0x00, 0x00, 0x0e, 0x10, 0x10, 0x11, 0x0e],
    [0x01, 0x01, 0x0d, 0x13, 0x11, 0x11, 0x0f],
    [0x00, 0x00, 0x0e, 0x11, 0x1f, 0x10, 0x0e],
    [0x06, 0x09, 0x08, 0x1c, 0x08, 0x08, 0x08],
    [0x0f, 0x11, 0x11, 0x11, 0x0f, 0x01, 0x0e],
    [0x10, 0x10, 0x16, 0x19, 0x11, 0x11, 0x11],
    [0x04, 0x00, 0x0c, 0x04, 0x04, 0x04, 0x0e],
    [0x02, 0x00, 0x06, 0x02, 0x02, 0x12, 0x0c],
    [0x10, 0x10, 0x12, 0x14, 0x18, 0x14, 0x12],
    [0x0c, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0e],
    [0x00, 0x00, 0x1a, 0x15, 0x15, 0x11, 0x11],
    [0x00, 0x00, 0x16, 0x19, 0x11, 0x11, 0x11],
    [0x00, 0x00, 0x0e, 0x11, 0x11, 0x11, 0x0e],
    [0x1e, 0x11, 0x11, 0x11, 0x1e, 0x10, 0x10],
    [0x0f, 0x11, 0x11, 0x11, 0x0f, 0x01, 0x01],
    [0x00, 0x00, 0x16, 0x19, 0x10, 0x10, 0x10],
    [0x00, 0x00, 0x0e, 0x10, 0x0e, 0x01, 0x1e],
    [0x08, 0x08, 0x1c, 0x08, 0x08, 0x09, 0x06],
    [0x00, 0x00, 0x11, 0x11, 0x11, 0x13, 0x0d],
    [0x00, 0x00, 0x11, 0x11, 0x11, 0x0a, 0x04],
    [0x00, 0x00, 0x11, 0x11, 0x15, 0x15, 0x0a],
    [0x00, 0x00, 0x11, 0x0a, 0x04, 0x0a, 0x11],
    [0x11, 0x11, 0x11, 0x11, 0x0f, 0x01, 0x0e],
    [0x00, 0x00, 0x1f, 0x02, 0x04, 0x08, 0x1f],
    [0x02, 0x04, 0x04, 0x08, 0x04, 0x04, 0x02],
    [0x04, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04],
    [0x08, 0x04, 0x04, 0x02, 0x04, 0x04, 0x08],
    [0x00, 0x00, 0x08, 0x15, 0x02, 0x00, 0x00],
];

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(size: [usize; 2], channels: usize) -> Picture {
        Picture::new(size, channels, (0..size[0] * size[1] * channels).map(|i| i as u8).collect()).unwrap()
    }

    #[test]
    fn a_png_read_back_is_the_canvas() {
        let mut canvas = Canvas::new(40, 20, PAPER).unwrap();
        canvas.text("Ag~", 1, 2, 2, INK);
        canvas.place(&plain([3, 5], 3), 20, 10, 2);
        let read = image::load_from_memory(&canvas.png().unwrap()).unwrap().into_rgb8();
        assert_eq!((read.width(), read.height(), read.into_raw()), (40, 20, canvas.pixels));
    }

    #[test]
    fn pictures_are_enlarged_by_repeating_pixels() {
        let mut canvas = Canvas::new(12, 8, PAPER).unwrap();
        canvas.place(&plain([2, 2], 3), 1, 1, 3);
        assert_eq!(
            [canvas.pixel(1, 1), canvas.pixel(3, 3), canvas.pixel(4, 1), canvas.pixel(6, 6)],
            [[0, 1, 2], [0, 1, 2], [3, 4, 5], [9, 10, 11]]
        );
        assert_eq!([canvas.pixel(0, 0), canvas.pixel(7, 7)], [PAPER; 2]);
        canvas.place(&plain([1, 2], 1), 10, 7, 1);
        assert_eq!(canvas.pixel(11, 7), [1; 3]);
        canvas.place(&plain([1, 1], 5), 11, 7, 9);
        assert_eq!(canvas.pixel(11, 7), [0, 1, 2]);
    }

    #[test]
    fn every_letter_is_drawn_and_no_two_are_alike() {
        for (i, glyph) in GLYPHS.iter().enumerate() {
            assert!(glyph.iter().all(|row| *row < 32) && (i == 0 || glyph.iter().any(|row| *row > 0)), "{}", (i as u8 + 32) as char);
            assert!(!GLYPHS[..i].contains(glyph), "{}", (i as u8 + 32) as char);
        }
        let mut canvas = Canvas::new(6, 7, PAPER).unwrap();
        canvas.text("T", 0, 0, 1, INK);
        let dark = (0..7).flat_map(|y| (0..6).map(move |x| (x, y))).filter(|&(x, y)| canvas.pixel(x, y) == INK);
        assert_eq!(dark.collect::<Vec<_>>(), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6)]);
    }

    #[test]
    fn panels_of_a_sheet_are_large_enough_to_see_and_titles_stand_once() {
        let row = |label: &str| SheetRow {
            label: label.into(),
            panels: vec![("original".into(), plain([32, 32], 3)), ("masked".into(), plain([32, 32], 3))],
        };
        let one = sheet(&[row("")]).unwrap();
        assert_eq!((one.width, one.height), (2 * (192 + GAP) + GAP, GAP + LINE + 192 + GAP));
        let two = sheet(&[row("75 %"), row("90 %")]).unwrap();
        assert_eq!(two.height, one.height + 192 + GAP);
        assert_eq!(two.width, one.width + text_width("75 %") + GAP);
        assert_eq!(lines("reconstruction + visible", 192), ["reconstruction +", "visible"]);
        assert_eq!(lines("a-very-long-name-of-an-image.jpg 75 %", 192), ["a-very-long-name-of-an-image.jpg", "75 %"]);
        let wide = sheet(&[SheetRow { label: String::new(), panels: vec![(String::new(), plain([10, 300], 1))] }]).unwrap();
        assert_eq!((wide.width, wide.height), (300 + 2 * GAP, 10 + 2 * GAP));
        assert!(sheet(&[]).is_err() && Canvas::new(1 << 20, 1 << 20, PAPER).is_err() && Canvas::new(0, 3, PAPER).is_err());
    }
}
