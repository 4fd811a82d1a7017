//! Which part of a picture is seen: boxes and windows drawn at random, apart from the cutting, which is a function of what was drawn.
//!
//!   resized   up to ten tries of area = H W U(scale), aspect = exp(U(ln ratio)), w = round(sqrt(area aspect)), h = round(sqrt(area / aspect)), until both
//!             fit; then top and left uniform. After ten tries the largest box in the middle whose aspect lies within `ratio`.
//!   once      one try, each side cut to the picture's
//!   window    a square whose corner is uniform over the picture and `padding` pixels around it; what lies outside is the border
//!
//! Halves are rounded to even. A box is cut first and resized then, so that the filter sees nothing outside of it.

use super::{Picture, resize};
use crate::ensure;
use crate::error::Result;
use crate::rng::Stream;
use std::fmt;

/// Aspects from 3:4 to 4:3.
pub const ASPECTS: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];

/// Which part of a picture is seen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Crop {
    /// The whole picture, resized without regard to its aspect where it has another size.
    Whole,
    /// The short side resized to side / ratio, then the centre: evaluation.
    Centre { ratio: f64 },
    /// A box of random area and aspect, resized to the square: MAE, DeiT, fine-tuning.
    Resized { scale: [f64; 2], ratio: [f64; 2] },
    /// The same drawn once and cut to the picture: the linear probe.
    Once { scale: [f64; 2], ratio: [f64; 2] },
    /// A window of the picture as it is, with a black border of this many pixels: DeiT up to 32 pixels.
    Padded { padding: usize },
    /// The short side resized to the side, then a window of the side with four mirrored pixels around: DeiT-III's `--src`.
    Simple,
    /// The whole picture, shifted by up to this many pixels; the edge is repeated.
    Shift { most: usize },
}

/// What lies outside a picture.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Border {
    /// Black.
    Zero,
    /// The picture mirrored, its edge not repeated.
    Reflect,
    /// The edge.
    Replicate,
}

impl Crop {
    /// The square of this side that is seen of a picture, [side, side, C].
    pub fn cut(&self, picture: Picture, side: usize, draws: &mut Stream) -> Result<Vec<u8>> {
        let Picture { size, channels, .. } = picture;
        let to = [side, side];
        match *self {
            Crop::Whole => whole(picture, side),
            Crop::Centre { ratio } => {
                let short = resize::eval_short_side(side, ratio);
                resize::eval_transform(&picture.pixels, size, channels, short, side)
            }
            Crop::Resized { scale, ratio } => {
                let seen = resized(size, scale, ratio, draws);
                resize::crop_resize(&picture.pixels, size, channels, seen, to)
            }
            Crop::Once { scale, ratio } => {
                let seen = once(size, scale, ratio, draws);
                resize::crop_resize(&picture.pixels, size, channels, seen, to)
            }
            Crop::Padded { padding } => {
                let corner = corner(size, side, padding, draws)?;
                Ok(window(&picture.pixels, size, channels, corner, side, Border::Zero))
            }
            Crop::Simple => {
                const PADDING: usize = 4;
                ensure!(
                    side > PADDING,
                    "the simple random crop mirrors {PADDING} pixels and needs images of more than {PADDING}, not {side}"
                );
                let fitted = resize::short_side_size(size, side)?;
                let corner = corner(fitted, side, PADDING, draws)?;
                let pixels = if fitted == size { picture.pixels } else { resize::resize(&picture.pixels, size, channels, fitted)? };
                Ok(window(&pixels, fitted, channels, corner, side, Border::Reflect))
            }
            Crop::Shift { most } => {
                let pixels = whole(picture, side)?;
                let corner = corner(to, side, most, draws)?;
                Ok(if corner == [0, 0] { pixels } else { window(&pixels, to, channels, corner, side, Border::Replicate) })
            }
        }
    }
}

fn whole(picture: Picture, side: usize) -> Result<Vec<u8>> {
    let to = [side, side];
    if picture.size == to { Ok(picture.pixels) } else { resize::resize(&picture.pixels, picture.size, picture.channels, to) }
}

/// Height and width, unrounded, of a box of random area and aspect.
fn tried([h, w]: [usize; 2], scale: [f64; 2], ratio: [f64; 2], draws: &mut Stream) -> [usize; 2] {
    let area = h as f64 * w as f64 * draws.between(scale[0], scale[1]);
    let aspect = draws.between(ratio[0].ln(), ratio[1].ln()).exp();
    [(area / aspect).sqrt().round_ties_even() as usize, (area * aspect).sqrt().round_ties_even() as usize]
}

/// A box of this size anywhere in the picture.
fn somewhere([h, w]: [usize; 2], [height, width]: [usize; 2], draws: &mut Stream) -> resize::Crop {
    let top = draws.below(h - height + 1);
    resize::Crop { top, left: draws.below(w - width + 1), height, width }
}

/// A box of random area and aspect: ten tries, then the largest in the middle whose aspect lies within `ratio`.
pub fn resized(size: [usize; 2], scale: [f64; 2], ratio: [f64; 2], draws: &mut Stream) -> resize::Crop {
    for _ in 0..10 {
        let [height, width] = tried(size, scale, ratio, draws);
        if (1..=size[0]).contains(&height) && (1..=size[1]).contains(&width) {
            return somewhere(size, [height, width], draws);
        }
    }
    largest(size, ratio)
}

fn largest([h, w]: [usize; 2], ratio: [f64; 2]) -> resize::Crop {
    let aspect = w as f64 / h as f64;
    let round = |side: f64, most: usize| (side.round_ties_even() as usize).clamp(1, most);
    let [height, width] = if aspect < ratio[0] {
        [round(w as f64 / ratio[0], h), w]
    } else if aspect > ratio[1] {
        [h, round(h as f64 * ratio[1], w)]
    } else {
        [h, w]
    };
    resize::Crop { top: (h - height) / 2, left: (w - width) / 2, height, width }
}

/// A box of random area and aspect, drawn once and cut to the picture.
pub fn once(size: [usize; 2], scale: [f64; 2], ratio: [f64; 2], draws: &mut Stream) -> resize::Crop {
    let [height, width] = tried(size, scale, ratio, draws);
    somewhere(size, [height.clamp(1, size[0]), width.clamp(1, size[1])], draws)
}

/// The corner (top, left) of a window of this side anywhere in a picture with `padding` pixels around it.
pub fn corner(size: [usize; 2], side: usize, padding: usize, draws: &mut Stream) -> Result<[isize; 2]> {
    let [h, w] = size;
    ensure!(
        h + 2 * padding >= side && w + 2 * padding >= side,
        "an image of {h} x {w} with {padding} pixels around it holds no {side} x {side}; use a smaller --input-size"
    );
    let mut along = |len: usize| draws.below(len + 2 * padding - side + 1) as isize - padding as isize;
    let top = along(h);
    Ok([top, along(w)])
}

/// The square of this side with its corner at (top, left), outside the picture `border`. [side, side, C]
pub fn window(pixels: &[u8], size: [usize; 2], channels: usize, corner: [isize; 2], side: usize, border: Border) -> Vec<u8> {
    let columns: Vec<Option<usize>> = (0..side as isize).map(|x| border.source(corner[1] + x, size[1])).collect();
    // Columns that lie in the picture are one run of bytes.
    let run = |x: isize| (x - corner[1]).clamp(0, side as isize) as usize;
    let inside = run(0)..run(size[1] as isize).max(run(0));
    let mut out = vec![0; side * side * channels];
    for (y, to) in out.chunks_exact_mut(side * channels).enumerate() {
        let Some(row) = border.source(corner[0] + y as isize, size[0]) else { continue };
        let from = &pixels[row * size[1] * channels..][..size[1] * channels];
        if !inside.is_empty() {
            let first = (corner[1] + inside.start as isize) as usize;
            to[inside.start * channels..inside.end * channels].copy_from_slice(&from[first * channels..][..inside.len() * channels]);
        }
        for x in (0..inside.start).chain(inside.end..side) {
            if let Some(column) = columns[x] {
                to[x * channels..][..channels].copy_from_slice(&from[column * channels..][..channels]);
            }
        }
    }
    out
}

impl Border {
    /// Which of `len` samples stands at this place.
    fn source(self, at: isize, len: usize) -> Option<usize> {
        let last = len as isize - 1;
        if (0..=last).contains(&at) {
            return Some(at as usize);
        }
        match self {
            Border::Zero => None,
            Border::Replicate => Some(at.clamp(0, last) as usize),
            Border::Reflect if last == 0 => Some(0),
            Border::Reflect => {
                let at = at.rem_euclid(2 * last);
                Some(at.min(2 * last - at) as usize)
            }
        }
    }
}

impl fmt::Display for Crop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let drawn =
            |scale: [f64; 2], ratio: [f64; 2]| format!("area {} to {}, aspect {:.2} to {:.2}", scale[0], scale[1], ratio[0], ratio[1]);
        match *self {
            Crop::Whole => write!(f, "whole image"),
            Crop::Centre { ratio } => write!(f, "centre crop of {ratio}"),
            Crop::Resized { scale, ratio } => write!(f, "random resized crop ({})", drawn(scale, ratio)),
            Crop::Once { scale, ratio } => write!(f, "random resized crop in one try ({})", drawn(scale, ratio)),
            Crop::Padded { padding } => write!(f, "random crop with {padding} black pixels around"),
            Crop::Simple => write!(f, "simple random crop"),
            Crop::Shift { most } => write!(f, "random shift by up to {most} pixels"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn stream() -> Stream {
        Rng::new(9).stream("crop", 0)
    }

    #[test]
    fn boxes_have_the_areas_and_aspects_that_were_asked_for() {
        let (mut draws, n, size) = (stream(), 40_000, [375, 500]);
        let (mut area, mut skew, mut middle) = (0.0, 0.0, [0.0; 2]);
        for _ in 0..n {
            let seen = resized(size, [0.08, 1.0], ASPECTS, &mut draws);
            assert!(seen.top + seen.height <= 375 && seen.left + seen.width <= 500 && seen.height * seen.width > 0);
            let aspect = seen.width as f64 / seen.height as f64;
            assert!((0.74..1.35).contains(&aspect), "{seen:?}");
            area += (seen.height * seen.width) as f64 / (375.0 * 500.0) / n as f64;
            skew += aspect.ln() / n as f64;
            middle[0] += (seen.top as f64 + seen.height as f64 / 2.0) / 375.0 / n as f64;
            middle[1] += (seen.left as f64 + seen.width as f64 / 2.0) / 500.0 / n as f64;
        }
        // From a simulation of two million draws in Python.
        assert!((area - MEAN_AREA).abs() < 0.005 && (skew - MEAN_SKEW).abs() < 0.004, "{area} {skew}");
        assert!(middle.iter().all(|at| (at - 0.5).abs() < 0.004), "{middle:?}");
    }
    const MEAN_AREA: f64 = 0.4328;
    const MEAN_SKEW: f64 = 0.0306;

    #[test]
    fn a_picture_that_no_box_fits_shows_its_middle() {
        let mut draws = stream();
        let seen = |size, draws: &mut Stream| resized(size, [0.9, 1.0], ASPECTS, draws);
        assert_eq!(seen([10, 100], &mut draws), resize::Crop { top: 0, left: 43, height: 10, width: 13 });
        assert_eq!(seen([100, 10], &mut draws), resize::Crop { top: 43, left: 0, height: 13, width: 10 });
        assert_eq!(largest([30, 31], ASPECTS), resize::Crop { top: 0, left: 0, height: 30, width: 31 });
        assert_eq!(seen([1, 1], &mut draws), resize::Crop { top: 0, left: 0, height: 1, width: 1 });
    }

    #[test]
    fn a_box_drawn_once_is_cut_to_the_picture() {
        let mut draws = stream();
        let boxes: Vec<_> = (0..500).map(|_| once([20, 60], [0.08, 1.0], ASPECTS, &mut draws)).collect();
        assert!(boxes.iter().all(|seen| seen.top + seen.height <= 20 && seen.left + seen.width <= 60));
        assert!(boxes.iter().filter(|seen| seen.height == 20).count() > 100);
        assert_eq!(once([1, 1], [0.08, 1.0], ASPECTS, &mut draws), resize::Crop { top: 0, left: 0, height: 1, width: 1 });
    }

    #[test]
    fn corners_reach_every_place_equally_often() {
        let mut draws = stream();
        let mut counts = [[0usize; 9]; 9];
        for _ in 0..81 * 200 {
            let [top, left] = corner([32, 32], 32, 4, &mut draws).unwrap();
            counts[(top + 4) as usize][(left + 4) as usize] += 1;
        }
        assert!(counts.iter().flatten().all(|count| (120..290).contains(count)), "{counts:?}");
        let message = corner([20, 40], 32, 4, &mut draws).unwrap_err().to_string();
        assert!(message.contains("20 x 40") && message.contains("--input-size"), "{message}");
    }

    #[test]
    fn a_window_far_outside_is_all_border() {
        let pixels = [1, 2, 3, 4, 5, 6]; // 2 x 3, one channel
        assert_eq!(window(&pixels, [2, 3], 1, [5, 0], 2, Border::Zero), [0; 4]);
        assert_eq!(window(&pixels, [2, 3], 1, [0, -7], 2, Border::Zero), [0; 4]);
        assert_eq!(window(&pixels, [2, 3], 1, [1, 2], 2, Border::Replicate), [6; 4]);
        assert_eq!(window(&pixels, [2, 3], 1, [-1, -2], 3, Border::Reflect), [6, 5, 4, 3, 2, 1, 6, 5, 4]);
        assert_eq!(window(&[7], [1, 1], 1, [-1, -1], 3, Border::Reflect), [7; 9]);
    }

    #[test]
    fn every_crop_gives_the_square_that_was_asked_for() {
        let pixels: Vec<u8> = (0..40 * 50 * 3).map(|i| (i % 251) as u8).collect();
        let (scale, ratio) = ([0.2, 1.0], ASPECTS);
        let crops = [
            Crop::Whole,
            Crop::Centre { ratio: 0.875 },
            Crop::Resized { scale, ratio },
            Crop::Once { scale, ratio },
            Crop::Padded { padding: 4 },
            Crop::Simple,
            Crop::Shift { most: 3 },
        ];
        for crop in crops {
            let picture = Picture::new([40, 50], 3, pixels.clone()).unwrap();
            let square = crop.cut(picture.clone(), 32, &mut stream()).unwrap();
            assert_eq!(square.len(), 32 * 32 * 3, "{crop}");
            assert_eq!(square, crop.cut(picture, 32, &mut stream()).unwrap(), "{crop}");
        }
        let tiny = Picture::new([1, 1], 3, vec![1, 2, 3]).unwrap();
        assert!(Crop::Simple.cut(tiny.clone(), 4, &mut stream()).is_err());
        assert!(Crop::Padded { padding: 4 }.cut(tiny, 32, &mut stream()).is_err());
    }
}
