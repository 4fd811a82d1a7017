//! Bars as inline SVG that say their values, so that nobody has to point at them.
//!
//! A row has its name to the left. [`Stacked`] puts parts one behind the other and their sum at the end; [`Grouped`] puts a bar for each name below the
//! other, with a line from the least to the greatest value where they differ.

use crate::train::chart::short;
use crate::train::report::escaped;
use std::fmt::Write as _;

const WIDTH: f64 = 400.0;
/// What a letter takes at most.
const LETTER: f64 = 6.8;
/// Room for a value behind a bar.
const VALUE: f64 = 46.0;
const CLASSES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];

/// Where the time of each row goes, as an example.
pub struct Stacked {
    pub title: String,
    pub unit: String,
    pub parts: Vec<String>,
    /// Name and one number a part.
    pub rows: Vec<(String, Vec<f64>)>,
}

/// Median, least and greatest.
pub type Spread = [f64; 3];

pub struct Grouped {
    pub title: String,
    pub unit: String,
    pub names: Vec<String>,
    /// Name and one value a name; None leaves room.
    pub rows: Vec<(String, Vec<Option<Spread>>)>,
    /// A line across all rows.
    pub mark: Option<f64>,
}

/// Where bars begin and how long one of 1 is.
struct Scale {
    left: f64,
    one: f64,
}

impl Scale {
    fn of<'a>(names: impl Iterator<Item = &'a String>, most: f64) -> Self {
        let longest = names.map(|name| name.chars().count()).max().unwrap_or(0);
        let left = (longest as f64 * LETTER + 10.0).min(0.45 * WIDTH);
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        Self { left, one: (WIDTH - VALUE - left) / most }
    }

    fn x(&self, value: f64) -> f64 {
        self.left + self.one * if value.is_finite() { value.max(0.0) } else { 0.0 }
    }
}

fn caption(title: &str, unit: &str, names: &[(&String, &str)]) -> String {
    let mut out = format!("<figcaption>{}", escaped(&if unit.is_empty() { title.to_string() } else { format!("{title}, {unit}") }));
    if names.len() > 1 {
        for (name, class) in names {
            let _ = write!(out, "<span class=\"key {class}\">{}</span>", escaped(name));
        }
    }
    out + "</figcaption>\n"
}

fn open(title: &str, height: f64) -> String {
    format!("<svg class=\"bars\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n", escaped(title))
}

fn name(out: &mut String, text: &str, left: f64, y: f64) {
    let _ = writeln!(out, "<text class=\"name\" x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", left - 6.0, escaped(text));
}

impl Stacked {
    /// What stands in a figure; None if there is nothing to draw.
    pub fn figure(&self) -> Option<String> {
        const ROW: f64 = 30.0;
        let sum = |parts: &[f64]| parts.iter().filter(|part| part.is_finite()).sum::<f64>();
        let most = self.rows.iter().map(|row| sum(&row.1)).fold(0.0, f64::max);
        if most <= 0.0 {
            return None;
        }
        // Parts that no row has are not explained; the others keep their colours.
        let used = |i: usize| self.rows.iter().any(|row| row.1.get(i).is_some_and(|x| *x > 0.0));
        let classes: Vec<&str> = CLASSES.iter().copied().cycle().take(self.parts.len()).collect();
        let names = self.parts.iter().zip(&classes).enumerate().filter(|(i, _)| used(*i)).map(|(_, (name, class))| (name, *class));
        let scale = Scale::of(self.rows.iter().map(|row| &row.0), most);
        let mut out = caption(&self.title, &self.unit, &names.collect::<Vec<_>>());
        out += &open(&self.title, self.rows.len() as f64 * ROW + 4.0);
        for (at, (row, parts)) in self.rows.iter().enumerate() {
            let (top, mut so_far) = (at as f64 * ROW + 4.0, 0.0);
            name(&mut out, row, scale.left, top + 16.0);
            for ((&part, of), class) in parts.iter().zip(&self.parts).zip(&classes) {
                let (x, width) = (scale.x(so_far), scale.x(so_far + part) - scale.x(so_far));
                if !(part.is_finite() && part > 0.0) {
                    continue;
                }
                let text = short(three(part));
                let _ = writeln!(
                    out,
                    "<g class=\"{class}\"><rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"22\"><title>{}: {}</title></rect></g>",
                    (width - 0.7).max(0.3),
                    escaped(of),
                    short(part)
                );
                if width > text.len() as f64 * LETTER + 4.0 {
                    let _ = writeln!(
                        out,
                        "<text class=\"in\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                        x + width / 2.0,
                        top + 15.5
                    );
                }
                so_far += part;
            }
            let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", scale.x(so_far) + 5.0, top + 16.0, short(three(so_far)));
        }
        Some(out + "</svg>\n")
    }
}

impl Grouped {
    /// What stands in a figure; None if there is nothing to draw.
    pub fn figure(&self) -> Option<String> {
        const BAR: f64 = 16.0;
        let all = || self.rows.iter().flat_map(|row| row.1.iter().flatten());
        let most = all().map(|spread| spread[2].max(spread[0])).filter(|x| x.is_finite()).chain(self.mark).fold(0.0, f64::max);
        if all().next().is_none() || most <= 0.0 {
            return None;
        }
        let (scale, each) = (Scale::of(self.rows.iter().map(|row| &row.0), most), self.names.len() as f64 * BAR + 8.0);
        let height = self.rows.len() as f64 * each + 4.0;
        let names: Vec<(&String, &str)> = self.names.iter().zip(CLASSES.iter().copied().cycle()).collect();
        let mut out = caption(&self.title, &self.unit, &names) + &open(&self.title, height);
        if let Some(mark) = self.mark {
            let x = scale.x(mark);
            let _ = writeln!(out, "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{height}\"/>");
        }
        for (at, (row, values)) in self.rows.iter().enumerate() {
            let top = at as f64 * each + 4.0;
            name(&mut out, row, scale.left, top + values.len() as f64 * BAR / 2.0 + 3.5);
            for (i, ((value, of), class)) in values.iter().zip(&self.names).zip(CLASSES.iter().cycle()).enumerate() {
                let Some([median, least, greatest]) = *value else { continue };
                let (top, end) = (top + i as f64 * BAR, scale.x(median));
                let _ = writeln!(
                    out,
                    "<g class=\"{class}\"><rect x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{}\"><title>{}: {}</title></rect></g>",
                    scale.left,
                    (end - scale.left).max(0.3),
                    BAR - 3.0,
                    escaped(of),
                    short(median)
                );
                let spreads = greatest > least;
                if spreads {
                    let (y, x1, x2) = (top + (BAR - 3.0) / 2.0, scale.x(least), scale.x(greatest));
                    let _ = writeln!(out, "<line class=\"axis\" x1=\"{x1:.1}\" x2=\"{x2:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
                }
                let behind = if spreads { scale.x(greatest).max(end) } else { end };
                let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", behind + 5.0, top + 10.5, short(three(median)));
            }
        }
        Some(out + "</svg>\n")
    }
}

/// Three digits that matter.
fn three(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_say_their_values_and_begin_where_the_one_before_ends() {
        let rows = vec![("none <hidden>".to_string(), vec![60.0, 0.0, 40.0]), ("half".to_string(), vec![30.0, 0.0, 20.0])];
        let stacked =
            Stacked { title: "Time".into(), unit: "ms".into(), parts: ["encoder", "teacher", "backward"].map(String::from).to_vec(), rows };
        let figure = stacked.figure().unwrap();
        assert!(figure.contains(">100</text>") && figure.contains(">50</text>") && figure.contains(">60</text>"), "{figure}");
        assert!(figure.contains("none &lt;hidden&gt;") && !figure.contains("teacher"), "{figure}");
        let number = |part: &str, key: &str| -> f64 {
            let from = part.find(&format!(" {key}=\"")).unwrap() + key.len() + 3;
            part[from..].split('"').next().unwrap().parse().unwrap()
        };
        let rects: Vec<&str> = figure.lines().filter(|line| line.contains("<rect")).collect();
        let end = number(rects[0], "x") + number(rects[0], "width");
        assert!(rects.len() == 4 && (number(rects[1], "x") - end - 0.7).abs() < 0.15, "{figure}");
    }

    #[test]
    fn odd_values_draw_no_nonsense() {
        let grouped = |values: Vec<Option<Spread>>| Grouped {
            title: "Speed-up".into(),
            unit: String::new(),
            names: vec!["measured".into(), "predicted".into()],
            rows: vec![("0.75".into(), values)],
            mark: Some(1.0),
        };
        let figure = grouped(vec![Some([2.0, 1.5, 2.5]), None]).figure().unwrap();
        assert!(figure.contains(">2</text>") && figure.matches("<rect").count() == 1 && figure.matches("<line").count() == 2, "{figure}");
        assert!(grouped(vec![None, None]).figure().is_none());
        for odd in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            let figure = grouped(vec![Some([odd; 3]), Some([1.0; 3])]).figure().unwrap();
            assert!(!figure.contains("=\"NaN") && !figure.contains("=\"inf") && !figure.contains("=\"-"), "{figure}");
        }
        let nothing = Stacked { title: String::new(), unit: String::new(), parts: Vec::new(), rows: Vec::new() };
        assert!(nothing.figure().is_none());
    }
}
