//! What a sweep found: as text, as flat rows for JSON and CSV, and as a part of a page.

use super::sweep::{PARTS, Row, Saving, Swept};
use crate::device::{Named, parallel};
use crate::measure::Times;
use crate::measure::figure::{Grouped, Stacked};
use crate::measure::page::{self, Page, Table};
use crate::measure::subject::System;
use crate::train::chart::short;
use serde_json::{Map, Value, json};

/// The keys of [`PARTS`].
const KEYS: [&str; 6] = ["encoder", "decoder", "teacher", "other_forward", "backward", "update"];

fn ms(value: f64) -> String {
    format!("{value:.*}", if value >= 100.0 { 0 } else { 2 - usize::from(value >= 10.0) })
}

fn range(times: &Times) -> String {
    format!("{}..{}", ms(times.min), ms(times.max))
}

fn mega(bytes: usize) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn giga(macs: u64) -> f64 {
    2e-9 * macs as f64
}

impl Swept {
    pub fn name(&self) -> &'static str {
        self.subject.method.name()
    }

    /// How much is looked at, in few words.
    pub fn label(&self, row: &Row) -> String {
        let mut label = match row.point.mask_ratio {
            Some(0.0) => "nothing hidden".to_string(),
            Some(ratio) => format!("{ratio} hidden"),
            None => format!("{} kept", row.kept),
        };
        if let Some(views) = row.point.views {
            label += &format!(", {views} view{}", if views == 1 { "" } else { "s" });
        }
        match row.point.teacher_block {
            Some(block) => label + &format!(", block {block}"),
            None => label,
        }
    }

    /// What is trained, for the head of a table.
    pub fn title(&self) -> String {
        let s = &self.subject;
        let teacher = s.teacher().ok().flatten().map(|teacher| format!(" beside {teacher}")).unwrap_or_default();
        let decoder = match s.method {
            System::MaskedKd => format!(", {} classes", s.classes),
            System::TinyMim => String::new(),
            _ if self.rows.iter().all(|row| row.macs.decoder == 0) => String::new(),
            _ => format!(", decoder {} x {}", s.decoder_dim, s.decoder_depth),
        };
        format!("{}: {}{teacher}, images {} x {}, {} patches{decoder}", self.name(), s.model(), s.image_size, s.image_size, self.patches)
    }

    fn how(&self) -> String {
        let (s, rounds) = (&self.subject, self.rows.first().map_or(0, |row| row.step.runs));
        let device = if s.device == Named::Cpu { "the CPU".to_string() } else { format!("device {}", self.device) };
        format!(
            "batch {} on {} threads, {}, {device}; medians of {rounds} rounds in which all points take turns",
            s.batch,
            parallel::threads(),
            s.precision
        )
    }

    /// What the speed-ups are measured against, and what a person should know.
    pub fn remarks(&self) -> Vec<String> {
        let whole = match self.subject.method {
            System::Mae => "a step with nothing hidden, whose loss is over all patches",
            System::Dmae => "a step with nothing hidden from student and teacher, and the teacher's usual block",
            System::MaskedKd => "a step whose teacher sees all patches",
            System::Dmjd => "a step with one view of each image, in which nothing is hidden and all patches are predicted",
            System::TinyMim => "a step with nothing hidden from student and teacher, and the teacher's usual block",
        };
        let mut remarks =
            vec![format!("Speed-ups are over {whole}; efficiency is the measured one over the one that multiply-accumulates predict.")];
        if self.subject.device == Named::Emulated {
            remarks.push("The emulated device runs kernels on the CPU: these times say nothing about a GPU.".to_string());
        }
        if let Some(record) = self.record {
            remarks
                .push(format!("Whole steps are timed without a record of their phases; with one a step takes {record:.3} times as long."));
        }
        remarks.push(format!(
            "Memory is what a step takes at most beyond the {} MB that are there between steps (weights, gradients, moments, teacher, batch).",
            mega(self.at_rest)
        ));
        remarks.extend(self.notes.iter().map(|note| format!("Not measured: {note}.")));
        remarks
    }

    /// Parts that any row has.
    fn parts(&self) -> Vec<usize> {
        let there = |part: usize| match part {
            1 => self.rows.iter().any(|row| row.macs.decoder > 0),
            2 => self.rows.iter().any(|row| row.macs.teacher > 0),
            _ => true,
        };
        (0..PARTS.len()).filter(|&part| there(part)).collect()
    }

    pub fn times(&self) -> Table {
        let mut head = vec!["milliseconds".to_string()];
        head.extend(self.parts().iter().map(|&part| PARTS[part].to_string()));
        head.extend(["step", "least..most", "images/s", "MB"].map(String::from));
        let row = |row: &Row| {
            let mut cells = vec![self.label(row)];
            cells.extend(self.parts().iter().map(|&part| ms(row.parts[part].median)));
            let rate = self.subject.batch as f64 * 1e3 / row.step.median;
            cells.extend([ms(row.step.median), range(&row.step), short(rate), mega(row.peak)]);
            cells
        };
        Table { head, rows: self.rows.iter().map(row).collect() }
    }

    pub fn savings(&self) -> Table {
        let (encoder, teacher) = (self.rows.iter().any(|row| row.encoder.is_some()), self.rows.iter().any(|row| row.teacher.is_some()));
        let mut head: Vec<String> =
            ["speed-up", "kept", "GFLOP/image", "measured", "least..most", "predicted", "efficiency"].map(String::from).to_vec();
        for (part, there) in [("encoder", encoder), ("teacher", teacher)] {
            if there {
                head.extend([format!("{part}: measured"), "predicted".into(), "efficiency".into()]);
            }
        }
        let two = |x: f64| format!("{x:.2}");
        let row = |row: &Row| {
            let s = &row.whole.speed_up;
            let mut cells = vec![self.label(row), row.kept.to_string(), format!("{:.3}", giga(row.macs.step())), two(s.median)];
            cells.extend([format!("{:.2}..{:.2}", s.min, s.max), two(row.whole.predicted), two(row.whole.efficiency()[0])]);
            for (saving, there) in [(&row.encoder, encoder), (&row.teacher, teacher)] {
                let of = |saving: &Saving| [two(saving.speed_up.median), two(saving.predicted), two(saving.efficiency()[0])];
                if there {
                    cells.extend(saving.as_ref().map_or_else(|| ["1.00", "1.00", "-"].map(String::from), of));
                }
            }
            cells
        };
        Table { head, rows: self.rows.iter().map(row).collect() }
    }

    pub fn text(&self) -> String {
        let remarks = self.remarks().join("\n");
        format!("{}\n{}\n\n{}\n{}\n{remarks}\n", self.title(), self.how(), self.times().text(), self.savings().text())
    }

    /// A row as names and values: numbers of times are milliseconds.
    fn fields(&self, row: &Row) -> Map<String, Value> {
        let s = &self.subject;
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| {
            fields.insert(name.to_string(), value);
        };
        put("method", json!(self.name()));
        put("model", json!(s.model()));
        put("teacher", json!(s.teacher().ok().flatten()));
        put("image_size", json!(s.image_size));
        put("batch", json!(s.batch));
        put("precision", json!(s.precision.name()));
        put("device", json!(s.device.to_string()));
        put("threads", json!(parallel::threads()));
        put("rounds", json!(row.step.runs));
        put("mask_ratio", json!(1.0 - row.kept as f64 / self.patches as f64));
        put("asked_ratio", json!(row.point.mask_ratio));
        put("kept", json!(row.kept));
        put("patches", json!(self.patches));
        put("views", json!(row.point.views));
        put("teacher_block", json!(row.point.teacher_block));
        let mut times = |name: &str, times: &Times| {
            put(&format!("{name}_ms"), json!(times.median));
            put(&format!("{name}_min_ms"), json!(times.min));
            put(&format!("{name}_max_ms"), json!(times.max));
        };
        times("step", &row.step);
        KEYS.iter().zip(&row.parts).for_each(|(name, part)| times(name, part));
        put("images_per_s", json!(s.batch as f64 * 1e3 / row.step.median));
        put("gflop_per_image", json!(giga(row.macs.step())));
        for (name, macs) in
            [("encoder", row.macs.encoder), ("decoder", row.macs.decoder), ("other", row.macs.other), ("teacher", row.macs.teacher)]
        {
            put(&format!("{name}_forward_gflop"), json!(giga(macs)));
        }
        put("trained_forward_gflop", json!(giga(row.macs.trained)));
        put("peak_bytes", json!(row.peak));
        put("bytes_at_rest", json!(self.at_rest));
        for (prefix, saving) in [("", Some(&row.whole)), ("encoder_", row.encoder.as_ref()), ("teacher_", row.teacher.as_ref())] {
            let efficiency = saving.map(Saving::efficiency);
            put(&format!("{prefix}speed_up"), json!(saving.map(|saving| saving.speed_up.median)));
            put(&format!("{prefix}speed_up_min"), json!(saving.map(|saving| saving.speed_up.min)));
            put(&format!("{prefix}speed_up_max"), json!(saving.map(|saving| saving.speed_up.max)));
            put(&format!("{prefix}predicted_speed_up"), json!(saving.map(|saving| saving.predicted)));
            put(&format!("{prefix}efficiency"), json!(efficiency.map(|efficiency| efficiency[0])));
        }
        put("loss", json!(row.loss));
        fields
    }

    pub fn json(&self) -> Value {
        let s = &self.subject;
        json!({
            "what": "masking", "method": self.name(), "model": s.model(), "teacher": s.teacher().ok().flatten(), "image_size": s.image_size,
            "patches": self.patches, "batch": s.batch, "decoder_dim": s.decodes().then_some(s.decoder_dim), "decoder_depth": s.decodes().then_some(s.decoder_depth),
            "classes": (s.method == System::MaskedKd).then_some(s.classes),
            "precision": s.precision.name(), "device": s.device.to_string(), "threads": parallel::threads(), "parameters": self.parameters,
            "step_with_record": self.record, "rows": self.rows.iter().map(|row| self.fields(row)).collect::<Vec<_>>(), "notes": self.notes,
        })
    }

    /// Adds the system to a page.
    pub fn page(&self, page: &mut Page) {
        page.heading(&self.title());
        page.text(&format!("{}.", self.how()));
        let rows = || self.rows.iter().map(|row| (self.label(row), row));
        let stacked = Stacked {
            title: "Where the time goes".into(),
            unit: "ms a step".into(),
            parts: PARTS.map(String::from).to_vec(),
            rows: rows().map(|(label, row)| (label, row.parts.iter().map(|part| part.median).collect())).collect(),
        };
        let spread = |times: &Times| Some([times.median, times.min, times.max]);
        let speed_up = Grouped {
            title: "Speed-up over nothing hidden".into(),
            unit: String::new(),
            names: vec!["measured".into(), "predicted by FLOPs".into()],
            rows: rows().map(|(label, row)| (label, vec![spread(&row.whole.speed_up), Some([row.whole.predicted; 3])])).collect(),
            mark: Some(1.0),
        };
        let parts_there = [
            ("whole step", true),
            ("encoder alone", self.rows.iter().any(|row| row.encoder.is_some())),
            ("teacher alone", self.rows.iter().any(|row| row.teacher.is_some())),
        ];
        let savings = |row: &Row| {
            let all = [Some(row.whole), row.encoder, row.teacher].map(|saving| saving.map(|saving| saving.efficiency()));
            all.into_iter().zip(&parts_there).filter(|(_, (_, there))| *there).map(|(efficiency, _)| efficiency).collect()
        };
        let efficiency = Grouped {
            title: "Masking efficiency: measured over predicted".into(),
            unit: String::new(),
            names: parts_there.iter().filter(|(_, there)| *there).map(|(name, _)| name.to_string()).collect(),
            rows: rows().skip(1).map(|(label, row)| (label, savings(row))).collect(),
            mark: Some(1.0),
        };
        let memory = Grouped {
            title: "Memory of a step beyond what stays".into(),
            unit: "MB".into(),
            names: vec!["peak".into()],
            rows: rows().map(|(label, row)| (label, vec![Some([row.peak as f64 / 1e6; 3])])).collect(),
            mark: None,
        };
        page.figures(
            &[stacked.figure(), speed_up.figure(), efficiency.figure(), memory.figure()].into_iter().flatten().collect::<Vec<_>>(),
        );
        page.table(&self.times());
        page.table(&self.savings());
        self.remarks().iter().for_each(|remark| page.text(remark));
    }
}

/// All rows of all systems.
pub fn csv(all: &[Swept]) -> String {
    let rows: Vec<Map<String, Value>> = all.iter().flat_map(|swept| swept.rows.iter().map(|row| swept.fields(row))).collect();
    page::csv(&rows)
}
