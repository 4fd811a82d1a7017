//! Curves as inline SVG: axes with round numbers, a grid, and what the values are when the pointer rests on them. No script.
//!
//! A curve of many points is drawn through the means of at most 200 buckets, with a band from the least to the greatest value of each. Values that are not
//! finite leave a gap. If a few values lie far beyond the others, the axis ends before them and they are drawn at its edge.

use super::report::escaped;
use std::fmt::Write;

const SIZE: [f64; 2] = [400.0, 236.0];
const LEFT: f64 = 48.0;
const RIGHT: f64 = 388.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 196.0;
const BUCKETS: usize = 200;
const STRIPS: usize = 60;
/// Beyond this nothing is drawn: the axes are computed in f64.
const MOST: f64 = 1e30;

pub struct Series {
    pub name: String,
    pub points: Vec<(f64, Option<f64>)>,
    /// Each point also gets a dot.
    pub dots: bool,
}

pub struct Chart {
    pub title: String,
    /// What the horizontal axis counts.
    pub x: String,
    pub series: Vec<Series>,
    /// Whether the vertical axis begins at 0.
    pub from_zero: bool,
}

/// What is drawn for one bucket.
#[derive(Clone, Copy)]
struct Drawn {
    x: f64,
    mean: f64,
    least: f64,
    most: f64,
}

/// From numbers to places in the picture.
struct Scale {
    x: [f64; 2],
    y: [f64; 2],
}

impl Scale {
    fn x(&self, x: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (x - self.x[0]) / (self.x[1] - self.x[0])
    }

    fn y(&self, y: f64) -> f64 {
        BOTTOM - (BOTTOM - TOP) * ((y - self.y[0]) / (self.y[1] - self.y[0])).clamp(0.0, 1.0)
    }
}

impl Chart {
    /// What stands in the figure: its caption and the drawing; None if there is nothing to draw.
    pub fn figure(&self) -> Option<String> {
        let shown: Vec<Series> =
            self.series.iter().map(Series::usable).filter(|series| series.points.iter().any(|p| p.1.is_some())).collect();
        let values: Vec<f64> = shown.iter().flat_map(|series| series.points.iter().filter_map(|point| point.1)).collect();
        if values.is_empty() {
            return None;
        }
        let across = shown.iter().flat_map(|series| series.points.iter().map(|point| point.0));
        let scale = Scale { x: horizontal(limits(across)), y: self.vertical(values) };
        let mut out = format!("<figcaption>{}", escaped(&self.title));
        if shown.len() > 1 {
            for (series, class) in shown.iter().zip(CLASSES.iter().cycle()) {
                let _ = write!(out, "<span class=\"key {class}\">{}</span>", escaped(&series.name));
            }
        }
        let _ = write!(
            out,
            "</figcaption>\n<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n",
            SIZE[0],
            SIZE[1],
            escaped(&format!("{} over {}", self.title, self.x))
        );
        self.axes(&scale, &mut out);
        for (series, class) in shown.iter().zip(CLASSES.iter().cycle()) {
            series.draw(&scale, class, &mut out);
        }
        self.strips(&shown, &scale, &mut out);
        out.push_str("</svg>\n");
        Some(out)
    }

    fn vertical(&self, mut values: Vec<f64>) -> [f64; 2] {
        values.sort_by(f64::total_cmp);
        let (low, high) = (values[0], values[values.len() - 1]);
        let usual = values[(values.len() - 1) * 49 / 50];
        let high = if high - low > 3.0 * (usual - low) && usual > low { usual + 0.25 * (usual - low) } else { high };
        let low = if self.from_zero { low.min(0.0) } else { low };
        let [low, high] = apart([low, high]);
        let room = 0.04 * (high - low);
        [if self.from_zero && low >= 0.0 { low } else { low - room }, high + room]
    }

    fn axes(&self, scale: &Scale, out: &mut String) {
        for (value, text) in ticks(scale.y, 5) {
            let y = scale.y(value);
            let _ = writeln!(out, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
            let _ = writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", LEFT - 6.0, y + 4.0);
        }
        for (value, text) in ticks(scale.x, 6) {
            let x = scale.x(value);
            let _ = writeln!(out, "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{BOTTOM}\"/>");
            let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>", BOTTOM + 17.0);
        }
        let _ = writeln!(out, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{BOTTOM}\" y2=\"{BOTTOM}\"/>");
        let middle = (LEFT + RIGHT) / 2.0;
        let _ = writeln!(out, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>", SIZE[1] - 5.0, escaped(&self.x));
    }

    /// Columns over the whole height that say what the curves are there.
    fn strips(&self, shown: &[Series], scale: &Scale, out: &mut String) {
        let points = shown.iter().map(|series| series.points.len()).max().unwrap_or(0);
        let count = points.clamp(1, STRIPS);
        let width = (RIGHT - LEFT) / count as f64;
        for strip in 0..count {
            let part = (strip as f64 + 0.5) / count as f64;
            let x = scale.x[0] + part * (scale.x[1] - scale.x[0]);
            let mut text = String::new();
            for series in shown {
                let near =
                    series.points.iter().filter(|point| point.1.is_some()).min_by(|a, b| (a.0 - x).abs().total_cmp(&(b.0 - x).abs()));
                if let Some(&(x, Some(y))) = near {
                    let _ =
                        write!(text, "{}{}: {} ({} {})", if text.is_empty() { "" } else { "\n" }, series.name, short(y), self.x, short(x));
                }
            }
            let left = LEFT + strip as f64 * width;
            let height = BOTTOM - TOP;
            let _ = writeln!(
                out,
                "<rect class=\"strip\" x=\"{left:.2}\" y=\"{TOP}\" width=\"{width:.2}\" height=\"{height}\"><title>{}</title></rect>",
                escaped(&text)
            );
        }
    }
}

const CLASSES: [&str; 4] = ["a", "b", "c", "d"];

impl Series {
    /// In order of x, without what cannot be placed.
    fn usable(&self) -> Series {
        let good = |value: f64| value.is_finite() && value.abs() <= MOST;
        let points = self.points.iter().filter(|point| good(point.0));
        let mut points: Vec<_> = points.map(|&(x, y)| (x, y.filter(|y| good(*y)))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Series { name: self.name.clone(), points, dots: self.dots }
    }

    /// Runs of buckets between gaps.
    fn runs(&self, scale: &Scale) -> Vec<Vec<Drawn>> {
        let bucket = |x: f64| ((x - scale.x[0]) / (scale.x[1] - scale.x[0]) * BUCKETS as f64) as usize;
        let same = |a: &(f64, Option<f64>), b: &(f64, Option<f64>)| self.points.len() > BUCKETS && bucket(a.0) == bucket(b.0);
        let mut runs = vec![Vec::new()];
        for points in self.points.chunk_by(same) {
            let values: Vec<f64> = points.iter().filter_map(|point| point.1).collect();
            if values.is_empty() {
                runs.push(Vec::new());
                continue;
            }
            let [least, most] = limits(values.iter().copied());
            let x = points.iter().map(|point| point.0).sum::<f64>() / points.len() as f64;
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            runs.last_mut().expect("there is a run").push(Drawn { x, mean, least, most });
        }
        runs.retain(|run| !run.is_empty());
        runs
    }

    fn draw(&self, scale: &Scale, class: &str, out: &mut String) {
        let place = |x: f64, y: f64| format!("{:.1},{:.1}", scale.x(x), scale.y(y));
        let _ = writeln!(out, "<g class=\"{class}\">");
        for run in self.runs(scale) {
            if run.iter().any(|drawn| drawn.most > drawn.least) {
                let there = run.iter().map(|drawn| place(drawn.x, drawn.most));
                let back = run.iter().rev().map(|drawn| place(drawn.x, drawn.least));
                let _ = writeln!(out, "<polygon class=\"band\" points=\"{}\"/>", there.chain(back).collect::<Vec<_>>().join(" "));
            }
            let line: Vec<String> = run.iter().map(|drawn| place(drawn.x, drawn.mean)).collect();
            if line.len() > 1 {
                let _ = writeln!(out, "<polyline points=\"{}\"/>", line.join(" "));
            }
            if run.len() == 1 || (self.dots && run.len() <= 60) {
                for drawn in &run {
                    let _ = writeln!(out, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\"/>", scale.x(drawn.x), scale.y(drawn.mean));
                }
            }
        }
        out.push_str("</g>\n");
    }
}

fn limits(values: impl Iterator<Item = f64>) -> [f64; 2] {
    values.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], value| [low.min(value), high.max(value)])
}

/// From 0 if the curves begin in the first half.
fn horizontal([low, high]: [f64; 2]) -> [f64; 2] {
    apart([if (0.0..=0.5 * high).contains(&low) { 0.0 } else { low }, high])
}

/// The same, or a little more if both are one number.
fn apart([low, high]: [f64; 2]) -> [f64; 2] {
    let least = 1e-9 * low.abs().max(high.abs());
    if high - low > least {
        return [low, high];
    }
    let room = if low == 0.0 && high == 0.0 { 0.5 } else { 0.1 * low.abs().max(high.abs()) };
    [low - room, high + room]
}

/// About `count` round numbers, and how they are written.
fn ticks([low, high]: [f64; 2], count: usize) -> Vec<(f64, String)> {
    let rough = (high - low) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|round| round * power).find(|step| *step >= 0.999 * rough).unwrap_or(10.0 * power);
    let first = (low / step).ceil();
    let largest = low.abs().max(high.abs());
    let text = |value: f64| {
        if value == 0.0 {
            "0".to_string()
        } else if !(2e-3..1e6).contains(&largest) {
            let mut written = (0..6).map(|places| format!("{value:.places$e}"));
            let close = |text: &String| text.parse::<f64>().is_ok_and(|read| (read - value).abs() < 0.01 * step);
            written.find(close).unwrap_or_else(|| format!("{value:.5e}"))
        } else {
            format!("{value:.*}", (-(step * 1.0001).log10().floor()).max(0.0) as usize)
        }
    };
    let numbers = (0..2 * count + 2).map(|i| (first + i as f64) * step).take_while(|value| *value <= high + 1e-9 * step);
    numbers.map(|value| (value, text(value))).collect()
}

/// Four digits that matter.
pub fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_string(),
        size if (1e-3..1e6).contains(&size) => {
            let places = (3 - size.log10().floor() as i32).max(0) as usize;
            let text = format!("{value:.places$}");
            if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
        }
        _ => format!("{value:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, Option<f64>)>) -> Option<String> {
        let series = Series { name: "loss <1>".into(), points, dots: false };
        Chart { title: "Loss & more".into(), x: "epoch".into(), series: vec![series], from_zero: false }.figure()
    }

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        let texts = |low, high| ticks([low, high], 5).into_iter().map(|tick| tick.1).collect::<Vec<_>>();
        assert_eq!(texts(0.0, 40.0), ["0", "10", "20", "30", "40"]);
        assert_eq!(texts(0.33, 1.02), ["0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(0.0, 1.5e-4), ["0", "5e-5", "1e-4", "1.5e-4"]);
        assert_eq!(texts(880.0, 931.0), ["880", "900", "920"]);
        assert_eq!(texts(-1.0, 1.0), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
    }

    #[test]
    fn a_value_that_is_not_finite_leaves_a_gap() {
        let points = (0..10).map(|i| (i as f64, (i != 4).then_some(i as f64))).collect();
        assert_eq!(chart(points).unwrap().matches("<polyline").count(), 2);
        assert!(chart(vec![(0.0, None), (1.0, Some(f64::NAN)), (f64::NAN, Some(1.0))]).is_none());
        assert!(chart(Vec::new()).is_none());
    }

    #[test]
    fn one_point_and_flat_and_huge_curves_are_drawn_without_nonsense() {
        for points in [
            vec![(0.0, Some(0.0))],
            vec![(3.0, Some(2.5)), (4.0, Some(2.5))],
            vec![(0.0, Some(1e-300)), (1e-12, Some(0.0))],
            vec![(0.0, Some(-1e30)), (1.0, Some(1e30)), (2.0, Some(1e308))],
            (0..5000).map(|i| (i as f64 / 10.0, Some((i as f64).sin()))).collect(),
        ] {
            let figure = chart(points).unwrap();
            assert!(!figure.contains("NaN") && !figure.contains("inf"), "{figure}");
            assert!(figure.contains("<circle") || figure.contains("<polyline"));
            assert!(figure.len() < 60_000, "{}", figure.len());
        }
    }

    #[test]
    fn a_spike_does_not_flatten_the_curve() {
        let points: Vec<_> = (0..100).map(|i| (i as f64, Some(if i == 50 { 1e6 } else { 1.0 + i as f64 / 100.0 }))).collect();
        let values = points.iter().filter_map(|point| point.1).collect();
        let [low, high] = Chart { title: String::new(), x: String::new(), series: Vec::new(), from_zero: false }.vertical(values);
        assert!((0.9..1.0).contains(&low) && high < 2.5, "{low} {high}");
        assert!(chart(points).unwrap().contains("Loss &amp; more"));
    }

    #[test]
    fn names_are_escaped_where_they_are_shown() {
        let figure = chart(vec![(0.0, Some(1.0)), (1.0, Some(2.0))]).unwrap();
        assert!(figure.contains("loss &lt;1&gt;: 1 (epoch 0)") && !figure.contains("<1>"), "{figure}");
    }

    #[test]
    fn numbers_keep_four_digits() {
        assert_eq!(
            [0.0, 0.123456, 12.3456, 1234.56, 99999.6, 1.5e-5, -0.5].map(short),
            ["0", "0.1235", "12.35", "1235", "100000", "1.500e-5", "-0.5"]
        );
    }
}
