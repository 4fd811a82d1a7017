//! Dots on two logarithmic axes, below a line that nothing should be above, as inline SVG.
//!
//! What was measured forward is a dot, what was measured backward a ring; each says what it is when the pointer rests on it, and of every name the lowest is
//! labelled where there is room.

use crate::train::chart::short;
use crate::train::report::escaped;
use std::fmt::Write;

const SIZE: [f64; 2] = [400.0, 300.0];
const LEFT: f64 = 48.0;
const RIGHT: f64 = 384.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 258.0;
/// What a letter of a label takes at most.
const LETTER: f64 = 5.6;
const LINE: f64 = 11.0;
const CLASSES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];

pub struct Dot {
    /// Which of the families.
    pub family: usize,
    pub backward: bool,
    pub at: [f64; 2],
    /// Its label, and what more is said of it.
    pub name: String,
    pub more: String,
}

pub struct Roofline {
    pub title: String,
    /// What the axes count.
    pub axes: [String; 2],
    pub families: Vec<String>,
    /// The line, from left to right within these corners and on to both edges.
    pub roof: Box<dyn Fn(f64) -> f64>,
    /// Where it bends.
    pub bend: Option<f64>,
    pub dots: Vec<Dot>,
}

/// Whole decades around some numbers.
#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let [low, high] = values.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], x| [low.min(x), high.max(x)]);
        let (low, high) = (low.log10().floor(), high.log10().ceil());
        Self { low, high: high.max(low + 1.0), from, to }
    }

    fn place(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * (value.log10() - self.low) / (self.high - self.low)
    }

    fn ends(&self) -> [f64; 2] {
        [self.low, self.high].map(|power| 10f64.powf(power))
    }

    /// Powers of ten; where there are few, also twice and five times those.
    fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = if self.high - self.low < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let decades = self.low as i32..=self.high as i32;
        let all = decades.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        all.filter(|value| *value <= self.ends()[1] * 1.0001).collect()
    }
}

type Area = [f64; 4];

fn overlap(a: &Area, b: &Area) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

impl Roofline {
    /// What stands in a figure; None if there is nothing to draw.
    pub fn figure(&self) -> Option<String> {
        let good = |dot: &&Dot| dot.at.iter().all(|x| x.is_finite() && *x > 0.0);
        let dots: Vec<&Dot> = self.dots.iter().filter(good).collect();
        if dots.is_empty() {
            return None;
        }
        let x = Axis::of(dots.iter().map(|dot| dot.at[0]).chain(self.bend), LEFT, RIGHT);
        let highest = x.ends().into_iter().chain(self.bend).map(|x| (self.roof)(x)).fold(0.0, f64::max);
        let y = Axis::of(dots.iter().map(|dot| dot.at[1]).chain([highest]), BOTTOM, TOP);

        let mut out = format!("<figcaption>{}", escaped(&self.title));
        for (at, (name, class)) in self.families.iter().zip(CLASSES.iter().cycle()).enumerate() {
            if dots.iter().any(|dot| dot.family == at) {
                let _ = write!(out, "<span class=\"key {class}\">{}</span>", escaped(name));
            }
        }
        let label = escaped(&format!("{}: {} over {}", self.title, self.axes[1], self.axes[0]));
        let _ = writeln!(out, "</figcaption>\n<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{label}\">", SIZE[0], SIZE[1]);
        self.grid(&x, &y, &mut out);
        let mut taken: Vec<Area> = Vec::new();
        self.draw_roof(&x, &y, &mut taken, &mut out);
        for dot in &dots {
            let (cx, cy, class) = (x.place(dot.at[0]), y.place(dot.at[1]), CLASSES[dot.family % CLASSES.len()]);
            let ring = if dot.backward { " style=\"fill:var(--card);stroke:currentColor;stroke-width:1.4\"" } else { "" };
            let _ = writeln!(
                out,
                "<g class=\"{class}\"><circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3\"{ring}><title>{}\n{}</title></circle></g>",
                escaped(&dot.name),
                escaped(&dot.more)
            );
            taken.push([cx - 3.0, cy - 3.0, cx + 3.0, cy + 3.0]);
        }
        labels(&dots, &x, &y, taken, &mut out);
        out.push_str("</svg>\n");
        Some(out)
    }

    fn grid(&self, x: &Axis, y: &Axis, out: &mut String) {
        for value in y.ticks() {
            let at = y.place(value);
            let _ = writeln!(out, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
            let _ = writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", LEFT - 6.0, at + 4.0, tick(value));
        }
        for value in x.ticks() {
            let at = x.place(value);
            let _ = writeln!(out, "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{BOTTOM}\"/>");
            let _ = writeln!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>", BOTTOM + 16.0, tick(value));
        }
        let _ = writeln!(out, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{BOTTOM}\" y2=\"{BOTTOM}\"/>");
        let (middle, bottom) = ((LEFT + RIGHT) / 2.0, SIZE[1] - 6.0);
        let text = escaped(&format!("{} over {}", self.axes[1], self.axes[0]));
        let _ = writeln!(out, "<text x=\"{middle}\" y=\"{bottom}\" text-anchor=\"middle\">{text}</text>");
    }

    fn draw_roof(&self, x: &Axis, y: &Axis, taken: &mut Vec<Area>, out: &mut String) {
        let [mut first, last] = x.ends();
        // The line enters where it is above the lower edge.
        let lowest = y.ends()[0];
        if (self.roof)(first) < lowest {
            let bend = self.bend.unwrap_or(last);
            first = (first.ln() + (bend / first).ln() * (lowest / (self.roof)(first)).ln() / ((self.roof)(bend) / (self.roof)(first)).ln())
                .exp();
        }
        let corners: Vec<String> = std::iter::once(first)
            .chain(self.bend.filter(|bend| (first..last).contains(bend)))
            .chain([last])
            .map(|at| format!("{:.1},{:.1}", x.place(at), y.place((self.roof)(at))))
            .collect();
        let _ = writeln!(out, "<g style=\"color:var(--soft)\"><polyline points=\"{}\"/></g>", corners.join(" "));
        let top = y.place((self.roof)(last));
        taken.push([LEFT, top - 2.0, RIGHT, top + 2.0]);
    }
}

/// Short, also where there are many decades.
fn tick(value: f64) -> String {
    if (1e-3..1e5).contains(&value) { short(value) } else { format!("{value:.0e}") }
}

/// The lowest dot of each name has a label where nothing else is.
fn labels(dots: &[&Dot], x: &Axis, y: &Axis, mut taken: Vec<Area>, out: &mut String) {
    let mut named: Vec<&&Dot> = Vec::new();
    for dot in dots {
        match named.iter_mut().find(|other| other.name == dot.name) {
            Some(other) if dot.at[1] < other.at[1] => *other = dot,
            Some(_) => {}
            None => named.push(dot),
        }
    }
    for dot in named {
        let (cx, cy, width) = (x.place(dot.at[0]), y.place(dot.at[1]), dot.name.chars().count() as f64 * LETTER);
        let corners = [(cx + 6.0, cy + 3.5), (cx - 6.0 - width, cy + 3.5), (cx - width / 2.0, cy + 14.0), (cx - width / 2.0, cy - 6.0)];
        let area = |&(left, base): &(f64, f64)| [left, base - LINE + 2.0, left + width, base + 2.0];
        let inside = |area: &Area| area[0] >= LEFT && area[2] <= RIGHT && area[1] >= TOP && area[3] <= BOTTOM;
        let free = |corner: &(f64, f64)| inside(&area(corner)) && !taken.iter().any(|other| overlap(other, &area(corner)));
        if let Some(corner) = corners.iter().find(|corner| free(corner)).copied() {
            taken.push(area(&corner));
            let _ =
                writeln!(out, "<text x=\"{:.1}\" y=\"{:.1}\" style=\"font-size:85%\">{}</text>", corner.0, corner.1, escaped(&dot.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(name: &str, at: [f64; 2], backward: bool) -> Dot {
        Dot { family: 0, backward, at, name: name.into(), more: "<more>".into() }
    }

    fn roofline(dots: Vec<Dot>) -> Option<String> {
        let roof = Box::new(|x: f64| (10.0 * x).min(100.0));
        let axes = ["FLOP/byte", "GFLOP/s"].map(String::from);
        Roofline { title: "Roofline".into(), axes, families: vec!["products".into()], roof, bend: Some(10.0), dots }.figure()
    }

    #[test]
    fn dots_and_the_roof_stand_at_the_logarithms_of_their_numbers() {
        let figure = roofline(vec![dot("linear", [1.0, 1.0], false), dot("linear", [100.0, 100.0], true)]).unwrap();
        // Two decades each way: the roof begins at a half of the height and bends in the middle of the width.
        let middle = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
        assert!(figure.contains(&format!("points=\"{LEFT:.1},{:.1} {:.1},{TOP:.1} {RIGHT:.1},{TOP:.1}\"", middle.1, middle.0)), "{figure}");
        assert!(
            figure.contains(&format!("cx=\"{LEFT:.1}\" cy=\"{BOTTOM:.1}\""))
                && figure.contains(&format!("cx=\"{RIGHT:.1}\" cy=\"{TOP:.1}\""))
        );
        assert_eq!((figure.matches("fill:var(--card)").count(), figure.matches("<circle").count()), (1, 2));
        assert!(figure.contains("&lt;more&gt;") && figure.contains(">10<") && !figure.contains("NaN"), "{figure}");
    }

    #[test]
    fn what_cannot_be_placed_is_left_out_and_labels_do_not_lie_on_each_other() {
        assert!(roofline(vec![dot("none", [0.0, 1.0], false), dot("none", [f64::NAN, 1.0], false)]).is_none());
        let many = (0..60).map(|i| dot(&format!("operation {i}"), [2.0 + 0.01 * i as f64, 20.0], false)).collect();
        let figure = roofline(many).unwrap();
        let labels = figure.matches("font-size:85%").count();
        assert!((1..5).contains(&labels), "{labels} labels on one heap");
    }

    #[test]
    fn a_roof_enters_where_the_picture_begins() {
        // At 0.001 FLOP/byte the roof is at 0.01, two decades below everything.
        let figure = roofline(vec![dot("low", [0.001, 5.0], false), dot("high", [50.0, 50.0], false)]).unwrap();
        let points = figure.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let places: Vec<f64> = points.split([' ', ',']).map(|number| number.parse().unwrap()).collect();
        assert!(places.iter().all(|place| (0.0..=SIZE[0]).contains(place)) && (places[1] - BOTTOM).abs() < 0.1, "{points}");
    }
}
