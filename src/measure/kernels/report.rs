//! The files of a run: rows as JSON and CSV, and a page with rooflines, bars and tables.

use super::roofline::{Dot, Roofline};
use super::row::{Ceilings, Row};
use super::time::Pass;
use super::{PARTS, Plan};
use crate::device::Precision;
use crate::error::{Context, Result};
use crate::formats;
use crate::measure::figure::Grouped;
use crate::measure::page::{Page, Table, machine};
use crate::tensor::Dtype;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// Ops of a kind, which share a colour and a figure.
const FAMILIES: [(&str, &[&str]); 7] = [
    ("products", &["linear", "linear_gelu", "bmm", "bmm_nt", "conv2d"]),
    ("attention", &["attention", "relation_kl"]),
    (
        "rows",
        &[
            "gelu",
            "add",
            "layernorm",
            "add_layernorm",
            "add_branch",
            "scale",
            "scale_channels",
            "drop_path",
            "l2_normalise",
            "softmax",
            "mix_heads",
            "batchnorm",
        ],
    ),
    (
        "moves",
        &[
            "gather",
            "gather_patches",
            "unshuffle",
            "unshuffle_with_positions",
            "prepend",
            "prepend_with_positions",
            "add_positions",
            "tokens",
            "mean_tokens",
            "take_heads",
            "merge_heads",
        ],
    ),
    ("losses", &["feature_loss", "masked_mse", "pixel_loss", "cross_entropy", "cross_entropy_soft", "bce", "distill_kl"]),
    ("filters and inputs", &["depthwise", "region_conv", "random_mask", "most_attended", "pixel_targets", "hog", "augment"]),
    ("updates", &["adamw", "lamb", "lars", "sgd", "clip", "ema"]),
];
/// Rows of the list of those that are far from their ceiling.
const FAR: usize = 10;

fn family(op: &str) -> usize {
    FAMILIES.iter().position(|(_, ops)| ops.contains(&op)).unwrap_or(FAMILIES.len() - 1)
}

pub struct Report<'a> {
    pub(super) plan: &'a Plan,
    pub device: &'a str,
    pub ceilings: Ceilings,
    pub rows: &'a [Row],
    pub notes: &'a [String],
}

const COLUMNS: [&str; 18] = [
    "model",
    "op",
    "shape",
    "direction",
    "dtype",
    "device",
    "version",
    "chosen",
    "us",
    "min_us",
    "max_us",
    "runs",
    "bytes",
    "flops",
    "gb_s",
    "tflop_s",
    "limit",
    "percent",
];

/// A cell that holds its text whatever is in it.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains(['"', ',', '\n']) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl Report<'_> {
    /// Writes the three files; their names.
    pub fn write(&self, folder: &Path) -> Result<String> {
        let text = |name: &str, text: String| {
            formats::write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()).context("writing its text"))
        };
        text("kernels.csv", self.csv())?;
        text("kernels.json", format!("{:#}\n", self.json()))?;
        self.page().write(&folder.join("kernels.html"))?;
        let names = ["csv", "json", "html"].map(|kind| folder.join(format!("kernels.{kind}")).display().to_string());
        Ok(names.join(", "))
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let precision = if self.plan.precision == Dtype::Bf16 { Precision::Bf16 } else { Precision::F32 };
        let mut facts = machine(self.plan.named, self.device, precision);
        facts.push(("Images", self.plan.images.to_string()));
        facts.push(("Rounds", format!("{} after {} that do not count; medians", self.plan.rounds.counted, self.plan.rounds.before)));
        facts
    }

    fn json(&self) -> Value {
        let facts = self.facts().into_iter().map(|(name, value)| (name.to_lowercase().replace(' ', "_"), json!(value)));
        let mut all: Map<String, Value> = facts.collect();
        let Ceilings { copy, product, side } = self.ceilings;
        all.insert("ceilings".into(), json!({ "copy_gb_s": copy / 1e9, "product_tflop_s": product / 1e12, "product_side": side }));
        all.insert("notes".into(), json!(self.notes));
        all.insert("rows".into(), self.rows.iter().map(|row| row.json(&self.ceilings)).collect());
        Value::Object(all)
    }

    fn csv(&self) -> String {
        let mut out = format!("{},vs_v1\n", COLUMNS.join(","));
        for row in self.rows {
            let mut json = row.json(&self.ceilings);
            json["shape"] = json!(row.shape());
            let cells: Vec<String> = COLUMNS.iter().chain(&["vs_v1"]).map(|name| cell(&json[*name])).collect();
            out += &format!("{}\n", cells.join(","));
        }
        out
    }

    fn page(&self) -> Page {
        let Ceilings { copy, product, side } = self.ceilings;
        let lead = "Every op at the shapes of a vision transformer of which a part of the patches is kept: its time, and how near that is to what the same \
                    machine copies and multiplies at most.";
        let mut page = Page::new("How near the kernels are to the machine's limits", lead);
        self.facts().into_iter().for_each(|(name, value)| page.fact(name, value));
        let rate = |flops: f64| if flops < 1e12 { format!("{:.0} GFLOP/s", flops / 1e9) } else { format!("{:.1} TFLOP/s", flops / 1e12) };
        page.tiles(&[
            ["Copy".into(), format!("{:.1} GB/s", copy / 1e9), "read and written, the best of the rounds".into()],
            ["Product".into(), rate(product), format!("{side} x {side} x {side}, the best of the rounds")],
            ["Both at".into(), format!("{:.1} FLOP/byte", product / copy), "below it bytes are the limit, above it operations".into()],
            ["Rows".into(), self.rows.len().to_string(), "of ops, shapes, directions and versions".into()],
        ]);
        self.plan.remarks().iter().chain(self.notes).for_each(|text| page.text(text));
        let drawn: Vec<String> = [self.roofline(), self.bandwidth()].into_iter().flatten().collect();
        page.heading("Rooflines");
        page.text("A dot is a row measured forward (losses with their gradient, and updates, too), a ring one measured backward; the line is the ceiling.");
        page.figures(&drawn);
        page.heading("Per cent of the ceiling");
        page.text("Of the version that runs, the median over the rounds with the range; the line is at 100 %.");
        page.figures(&self.bars());
        page.heading("Furthest from the ceiling");
        let mut far: Vec<&Row> = self.rows.iter().filter(|row| row.is_run()).collect();
        far.sort_by(|a, b| a.ceiling(&self.ceilings).1.total_cmp(&b.ceiling(&self.ceilings).1));
        page.table(&self.table(far.into_iter().take(FAR)));
        let mut models: Vec<&str> = Vec::new();
        self.rows.iter().for_each(|row| {
            if !models.contains(&row.model) {
                models.push(row.model)
            }
        });
        for model in models {
            page.heading(&format!("All rows: {model}"));
            page.table(&self.table(self.rows.iter().filter(|row| row.model == model)));
        }
        page
    }

    /// Rows that multiply.
    fn roofline(&self) -> Option<String> {
        let (copy, product) = (self.ceilings.copy, self.ceilings.product);
        let (unit, name) = if product < 5e12 { (1e9, "GFLOP/s") } else { (1e12, "TFLOP/s") };
        let dots =
            self.dots(|row| row.work.flops > 0, |row| [row.work.flops as f64 / row.bytes(), row.work.flops as f64 / row.seconds() / unit]);
        let roof = Box::new(move |x: f64| (copy * x).min(product) / unit);
        let axes = ["FLOP/byte".to_string(), name.to_string()];
        Roofline { title: "Operations".into(), axes, families: families(), roof, bend: Some(product / copy), dots }.figure()
    }

    /// Rows that only move numbers.
    fn bandwidth(&self) -> Option<String> {
        let copy = self.ceilings.copy / 1e9;
        let dots = self.dots(|row| row.work.flops == 0, |row| [row.bytes() / 1e6, row.bytes() / row.seconds() / 1e9]);
        let axes = ["MB that have to be moved".to_string(), "GB/s".to_string()];
        Roofline { title: "Bytes".into(), axes, families: families(), roof: Box::new(move |_| copy), bend: None, dots }.figure()
    }

    fn dots(&self, wanted: impl Fn(&Row) -> bool, at: impl Fn(&Row) -> [f64; 2]) -> Vec<Dot> {
        let rows = self.rows.iter().filter(|row| row.is_run() && wanted(row));
        let dot = |row: &Row| {
            let (limit, percent) = row.ceiling(&self.ceilings);
            let more = format!(
                "{} {}, {}\n{:.1} us ({:.1} to {:.1}), {}, {percent:.0} % of the ceiling by {limit}",
                row.model,
                row.shape(),
                row.pass.name(),
                1e3 * row.times.median,
                1e3 * row.times.min,
                1e3 * row.times.max,
                row.rate(&self.ceilings)
            );
            Dot { family: family(row.op), backward: row.pass == Pass::Backward, at: at(row), name: row.op.to_string(), more }
        };
        rows.map(dot).collect()
    }

    /// A figure for each family and model: forward and backward of an op at each of its shapes.
    fn bars(&self) -> Vec<String> {
        let mut figures = Vec::new();
        for (number, (name, _)) in FAMILIES.iter().enumerate() {
            let rows = || self.rows.iter().filter(|row| row.is_run() && family(row.op) == number);
            let several = self.plan.models.len() > 1;
            let mut bars: Vec<(String, Vec<Option<[f64; 3]>>)> = Vec::new();
            for row in rows() {
                let label = if several && row.model != PARTS { format!("{}: {}", row.model, bar_name(row)) } else { bar_name(row) };
                // The longest time is the least part of the ceiling.
                let percent = |ms: f64| self.ceilings_part(row, ms);
                let spread = [row.times.median, row.times.max, row.times.min].map(percent);
                let backward = usize::from(row.pass == Pass::Backward);
                let at = bars.iter().rposition(|(known, values)| *known == label && values[backward].is_none());
                let at = at.unwrap_or_else(|| {
                    bars.push((label, vec![None, None]));
                    bars.len() - 1
                });
                bars[at].1[backward] = Some(spread);
            }
            let names = vec!["forward".to_string(), "backward".to_string()];
            figures.extend(Grouped { title: name.to_string(), unit: "%".into(), names, rows: bars, mark: Some(100.0) }.figure());
        }
        figures
    }

    fn ceilings_part(&self, row: &Row, ms: f64) -> f64 {
        row.ceiling(&self.ceilings).1 * row.times.median / ms
    }

    fn table<'r>(&self, rows: impl Iterator<Item = &'r Row>) -> Table {
        let head = ["op", "shape", "direction", "version", "us", "least", "greatest", "rate", "of ceiling", "limit", "vs v1"];
        let line = |row: &Row| {
            let (limit, percent) = row.ceiling(&self.ceilings);
            let us = |ms: f64| format!("{:.1}", 1e3 * ms);
            let times = [row.times.median, row.times.min, row.times.max].map(us);
            let words = [row.op.to_string(), row.shape(), row.pass.name().to_string(), row.version()];
            let rest = [row.rate(&self.ceilings), format!("{percent:.0} %"), limit.to_string(), row.vs_first()];
            words.into_iter().chain(times).chain(rest).collect()
        };
        Table { head: head.map(String::from).to_vec(), rows: rows.map(line).collect() }
    }
}

fn families() -> Vec<String> {
    FAMILIES.iter().map(|(name, _)| name.to_string()).collect()
}

/// The op and the size that tells its rows apart, as short as that goes.
fn bar_name(row: &Row) -> String {
    let what = row.case.get("what").and_then(Value::as_str).map(|what| format!(" {what}")).unwrap_or_default();
    let size = ["n", "k", "side", "c"].into_iter().find_map(|name| Some((name, row.case.get(name)?)));
    let what = row.case.get("keys").map_or(what, |keys| format!(" to {keys} keys"));
    let op = row.op.replace("_with_positions", "+positions");
    format!("{op}{what}{}", size.map_or(String::new(), |(name, size)| format!(" {name} {size}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_op_has_a_family() {
        for name in super::super::names().unwrap() {
            assert!(FAMILIES.iter().any(|(_, ops)| ops.contains(&name)), "{name}");
        }
    }

    #[test]
    fn cells_hold_any_text() {
        assert_eq!(["plain", "a, b", "5\" x"].map(|text| cell(&json!(text))), ["plain", "\"a, b\"", "\"5\"\" x\""]);
        assert_eq!((cell(&Value::Null), cell(&json!(1.5)), cell(&json!(true))), (String::new(), "1.5".into(), "true".into()));
    }
}
