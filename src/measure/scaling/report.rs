//! What was measured and computed: as text, as flat rows for JSON and CSV, and as a page.

use super::alone::Profile;
use super::model::{Cost, Fit, Form};
use super::together::{self, Together};
use super::{Row, Scaling};
use crate::device::ranks::Wire;
use crate::device::{Named, parallel};
use crate::measure::Times;
use crate::measure::figure::{Grouped, Stacked};
use crate::measure::page::{self, Page, Table};
use crate::measure::subject::System;
use crate::train::chart::short;
use serde_json::{Map, Value, json};

fn ms(value: f64) -> String {
    format!("{value:.*}", if value.abs() >= 100.0 { 0 } else { 2 - usize::from(value.abs() >= 10.0) })
}

fn range(times: &Times) -> String {
    format!("{}..{}", ms(times.min), ms(times.max))
}

fn mega(bytes: usize) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn texts<const N: usize>(head: [&str; N]) -> Vec<String> {
    head.map(String::from).to_vec()
}

/// A rate, or that there is none to be told.
fn rate(fit: &Fit) -> String {
    fit.rate().map_or_else(|| "-".to_string(), |rate| format!("{rate:.2}"))
}

fn ranks(count: usize) -> String {
    format!("{count} rank{}", if count == 1 { "" } else { "s" })
}

impl Scaling {
    /// What is trained, for the head of the text.
    pub fn title(&self) -> String {
        let s = &self.args.subject;
        let teacher = s.teacher().ok().flatten().map(|teacher| format!(" beside {teacher}")).unwrap_or_default();
        let decoder = if s.decodes() { format!(", decoder {} x {}", s.decoder_dim, s.decoder_depth) } else { String::new() };
        format!(
            "{}: {}{teacher}, images {} x {}{decoder}, batch {} a rank",
            s.method.name(),
            s.model(),
            s.image_size,
            s.image_size,
            s.batch
        )
    }

    fn numbers(&self) -> usize {
        self.work.numbers()
    }

    fn how(&self) -> String {
        let (a, s) = (&self.args, &self.args.subject);
        let device = if s.device == Named::Cpu { "the CPU".to_string() } else { format!("device {}", self.profile.device) };
        let images = if self.looked_at == s.batch { String::new() } else { format!(" with {} images", self.looked_at) };
        format!(
            "{} trained numbers: {} MB of gradients in f32, {} in bf16, in {} buckets of at most {} MB; {} steps{images} on {} threads, {}, {device}",
            self.numbers(),
            mega(4 * self.numbers()),
            mega(2 * self.numbers()),
            self.work.buckets.len(),
            a.bucket_mb,
            self.profile.step.runs,
            parallel::threads(),
            s.precision
        )
    }

    /// The times that are scaled, and where they are from.
    fn source(&self) -> String {
        let a = &self.args;
        match (&a.step_ms, a.compute_scale) {
            (Some(_), _) => "The times of a step are those of --step-ms; when each bucket is complete was measured here.".to_string(),
            (None, Some(times)) => format!("The times of a step are those of this machine divided by {times}, as --compute-scale has it."),
            (None, None) => match a.subject.device {
                Named::Cpu => "Computed on a CPU: an exchange hides behind a long step, and the efficiency of a GPU that is 100 times as fast is lower. \
                               --step-ms FORWARD,BACKWARD,UPDATE puts in the times of a GPU, --compute-scale 100 divides those of this machine."
                    .to_string(),
                Named::Emulated => "The emulated device runs kernels on the CPU: these times, and what follows from them, say nothing about a GPU.".to_string(),
                Named::Gpu(_) => "The times of a step are those of this GPU, recorded and replayed; its parts are those of steps as they come, shortened alike.".to_string(),
            },
        }
    }

    fn assumed(&self) -> String {
        let a = &self.args;
        format!(
            "Taken as given: machines of {} GPUs, {} GB/s of a GPU inside, {} GB/s of a GPU between them, {} us for each step round a ring. Not run on many GPUs: the rows for \
             many ranks are computed by the formulas of docs/many-gpus-scaling.md. ZeRO-1 sends values in f32 whatever the gradients are sent in, and its optimiser's memory is that \
             of the rank that has most: parameters are dealt out whole.",
            a.gpus_per_node, a.link_gbs, a.network_gbs, a.latency_us
        )
    }

    fn step_table(&self) -> Table {
        let p: &Profile = &self.profile;
        let used = [self.work.forward, self.work.backward, self.work.update, self.work.step()];
        let parts = [("forward", &p.forward), ("backward", &p.backward), ("update", &p.update), ("step", &p.step)];
        let row = |((name, times), used): ((&str, &Times), f64)| vec![name.to_string(), ms(times.median), range(times), ms(used)];
        Table { head: texts(["milliseconds", "measured", "least..most", "scaled"]), rows: parts.into_iter().zip(used).map(row).collect() }
    }

    fn bucket_table(&self) -> Table {
        let row = |(at, bucket): (usize, &super::model::Bucket)| {
            vec![(at + 1).to_string(), mega(4 * bucket.numbers), format!("{:.1}", 100.0 * bucket.ready)]
        };
        let rows = self.work.buckets.iter().enumerate().map(row).collect();
        Table { head: texts(["bucket", "MB in f32", "complete at % of backward"]), rows }
    }

    fn model_table(&self, wire: Wire) -> Table {
        let head = [
            "ranks",
            "form",
            "exchange ms",
            "exposed ms",
            "step ms",
            "efficiency",
            "images/s",
            "values MB",
            "gradients MB",
            "optimiser MB",
        ];
        let row = |row: &Row| {
            let Cost { exchange, exposed, step } = row.cost;
            let mut cells = vec![row.ranks.to_string(), row.form.name().to_string(), ms(exchange), ms(exposed), ms(step)];
            cells.extend([format!("{:.3}", row.efficiency), short(row.images_per_second.round())]);
            cells.extend([row.holds.values, row.holds.gradients, row.holds.optimizer].map(mega));
            cells
        };
        Table { head: texts(head), rows: self.rows.iter().filter(|row| row.form.wire == wire).map(row).collect() }
    }

    fn calls_table(&self) -> Table {
        let head = [
            "ranks",
            "all-reduce us",
            "GB/s",
            "reduce-scatter us",
            "GB/s",
            "all-gather us",
            "GB/s",
            "copies us",
            "GB/s",
            "largest error %",
        ];
        let row = |t: &Together| {
            let mut cells = vec![t.ranks.to_string()];
            let fits = || t.fits.0.iter().chain([&t.copies]);
            cells.extend(fits().flat_map(|fit| [format!("{:.0}", 1e3 * fit.start), rate(fit)]));
            cells.push(format!("{:.0}", 100.0 * fits().map(|fit| fit.error).fold(0.0, f64::max)));
            cells
        };
        Table { head: texts(head), rows: self.together.iter().map(row).collect() }
    }

    fn measured_table(&self) -> Table {
        let head =
            ["ranks", "form", "predicted", "all busy", "measured", "least..most", "ratio", "least..most", "exposed: predicted", "measured"];
        let mut rows = Vec::new();
        for t in &self.together {
            for (name, times) in [("one alone", &t.alone), ("no exchange", &t.busy)] {
                let mut cells = vec![t.ranks.to_string(), name.to_string(), "-".into(), "-".into(), ms(times.median), range(times)];
                cells.extend(texts(["-", "-", "-", "-"]));
                rows.push(cells);
            }
            for row in &t.rows {
                let [alone, busy] = row.predicted;
                let mut cells = vec![t.ranks.to_string(), row.form.name().to_string(), ms(alone.step), ms(busy.step)];
                cells.extend([ms(row.measured.median), range(&row.measured)]);
                cells.extend([format!("{:.2}", row.ratio.median), format!("{:.2}..{:.2}", row.ratio.min, row.ratio.max)]);
                cells.extend([ms(busy.exposed), ms(row.exposed.median)]);
                rows.push(cells);
            }
        }
        Table { head: texts(head), rows }
    }

    /// What a person should know of the ranks that were measured.
    fn together_remarks(&self) -> Vec<String> {
        let threads = |t: &Together| format!("{} with {} thread{} each", ranks(t.ranks), t.threads, if t.threads == 1 { "" } else { "s" });
        let mut remarks = vec![
            format!(
                "Ranks are threads of this program, {}; gradients go in {}, through memory. Medians of {} rounds in turns; of several ranks the slowest counts.",
                self.together.iter().map(threads).collect::<Vec<_>>().join(", "),
                self.args.wire.unwrap_or_default(),
                self.together.first().map_or(0, |t| t.alone.runs)
            ),
            "Predicted from a step that one rank takes while the others wait, and from steps of all at once (all busy); ratio is measured over the second. The copies of gradients out and back, which a rank makes itself, count as exposed. Each sum is made by \
             the last rank to come, on the cores that compute: what the formulas hide behind the backward pass takes its time from it where no core is idle."
                .to_string(),
        ];
        if self.together.iter().any(|t| t.ranks > parallel::threads()) {
            remarks.push(format!("More ranks than the {} threads there are: they wait for each other's cores.", parallel::threads()));
        }
        remarks
    }

    pub fn text(&self) -> String {
        let mut parts = vec![format!("{}\n{}\n", self.title(), self.how()), self.step_table().text(), self.bucket_table().text()];
        parts.push(format!("{}\n{}\n", self.source(), self.assumed()));
        for wire in self.args.wires() {
            parts.push(format!("gradients in {wire}, computed\n{}", self.model_table(wire).text()));
        }
        if !self.together.is_empty() {
            parts.push(format!("ranks on this CPU, measured: the calls by themselves\n{}", self.calls_table().text()));
            parts.push(format!("ranks on this CPU: milliseconds of a step\n{}", self.measured_table().text()));
            parts.push(self.together_remarks().join("\n") + "\n");
        }
        parts.join("\n")
    }

    /// All rows under the same names: what is computed of many ranks, and what is predicted and measured of those here.
    fn fields(&self) -> Vec<Map<String, Value>> {
        let fields = |what: &str, form: Form, count: usize, cost: Cost, own: &Either| {
            let mut fields = Map::new();
            let mut put = |name: &str, value: Value| {
                fields.insert(name.to_string(), value);
            };
            put("what", json!(what));
            put("ranks", json!(count));
            put("overlap", json!(form.overlap));
            put("sharded", json!(form.sharded));
            put("wire", json!(form.wire.to_string()));
            put("exchange_ms", json!(cost.exchange));
            put("exposed_ms", json!(cost.exposed));
            put("step_ms", json!(cost.step));
            put("efficiency", json!(own.computed.map(|row| row.efficiency)));
            put("images_per_s", json!(own.computed.map(|row| row.images_per_second)));
            put("values_bytes", json!(own.computed.map(|row| row.holds.values)));
            put("gradients_bytes", json!(own.computed.map(|row| row.holds.gradients)));
            put("optimizer_bytes", json!(own.computed.map(|row| row.holds.optimizer)));
            put("step_from_alone_ms", json!(own.measured.map(|row| row.predicted[0].step)));
            for (name, of) in [("measured", 0), ("measured_exposed", 1), ("measured_over_predicted", 2)] {
                let unit = if of == 2 { "" } else { "_ms" };
                let times = own.measured.map(|row| [row.measured, row.exposed, row.ratio][of]);
                put(&format!("{name}{unit}"), json!(times.map(|times| times.median)));
                put(&format!("{name}_min{unit}"), json!(times.map(|times| times.min)));
                put(&format!("{name}_max{unit}"), json!(times.map(|times| times.max)));
            }
            fields
        };
        let computed =
            self.rows.iter().map(|row| fields("computed", row.form, row.ranks, row.cost, &Either { computed: Some(row), measured: None }));
        let measured = self.together.iter().flat_map(|t| t.rows.iter().map(move |row| (t, row)));
        let measured = measured
            .map(|(t, row)| fields("measured", row.form, t.ranks, row.predicted[1], &Either { computed: None, measured: Some(row) }));
        computed.chain(measured).collect()
    }

    pub fn csv(&self) -> String {
        page::csv(&self.fields())
    }

    pub fn json(&self) -> Value {
        let (a, s, p) = (&self.args, &self.args.subject, &self.profile);
        let times = |times: &Times| json!({ "ms": times.median, "min_ms": times.min, "max_ms": times.max });
        let fit = |fit: &Fit| json!({ "start_ms": fit.start, "gb_per_s": fit.rate(), "largest_error": fit.error });
        let together = |t: &Together| {
            json!({
                "ranks": t.ranks, "threads": t.threads, "bytes": t.bytes, "buckets": t.buckets, "alone": times(&t.alone), "busy": times(&t.busy),
                "all_reduce": fit(&t.fits.0[0]), "reduce_scatter": fit(&t.fits.0[1]), "all_gather": fit(&t.fits.0[2]), "copies": fit(&t.copies),
            })
        };
        json!({
            "what": "scaling", "method": s.method.name(), "model": s.model(), "teacher": s.teacher().ok().flatten(), "image_size": s.image_size,
            "batch": s.batch, "decoder_dim": s.decodes().then_some(s.decoder_dim), "decoder_depth": s.decodes().then_some(s.decoder_depth),
            "classes": (s.method == System::MaskedKd).then_some(s.classes),
            "precision": s.precision.name(), "device": s.device.to_string(), "threads": parallel::threads(), "steps": p.step.runs,
            "parameters": self.numbers(), "bucket_mb": a.bucket_mb, "images_looked_at": self.looked_at,
            "buckets": self.work.buckets.iter().map(|b| json!({ "numbers": b.numbers, "ready": b.ready })).collect::<Vec<_>>(),
            "measured": { "forward": times(&p.forward), "backward": times(&p.backward), "update": times(&p.update), "step": times(&p.step), "recorded": p.recorded },
            "scaled": { "forward_ms": self.work.forward, "backward_ms": self.work.backward, "update_ms": self.work.update },
            "step_ms": a.step_ms, "compute_scale": a.compute_scale, "gpus_per_node": a.gpus_per_node, "link_gb_per_s": a.link_gbs,
            "network_gb_per_s": a.network_gbs, "latency_us": a.latency_us,
            "rows": self.fields(), "together": self.together.iter().map(together).collect::<Vec<_>>(),
            "notes": [self.source(), self.assumed()],
        })
    }

    pub fn page(&self, facts: Vec<(&'static str, String)>) -> Page {
        let lead = "What many ranks would cost that each train on a batch of their own: the exchange of gradients, how much of it hides behind the backward pass, and how much of \
                    the speed of one rank is left.";
        let mut page = Page::new("What scaling costs", lead);
        facts.into_iter().for_each(|(name, value)| page.fact(name, value));
        page.heading(&self.title());
        page.text(&format!("{}.", self.how()));
        page.text(&self.source());
        page.text(&self.assumed());
        for wire in self.args.wires() {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.form.wire == wire).collect();
            let of = |count: usize| rows.iter().filter(move |row| row.ranks == count);
            let counts: Vec<usize> = self.args.ranks.clone();
            let efficiency = Grouped {
                title: format!("Efficiency, gradients in {wire}"),
                unit: String::new(),
                names: Form::all(wire).map(|form| form.name().to_string()).to_vec(),
                rows: counts
                    .iter()
                    .map(|&count| (ranks(count), of(count).map(|row| Some([row.efficiency; 3])).take(4).collect()))
                    .collect(),
                mark: Some(1.0),
            };
            let parts = |row: &&&Row| {
                let shared = row.cost.step - self.work.forward - self.work.backward - row.cost.exposed;
                (ranks(row.ranks), vec![self.work.forward, self.work.backward, row.cost.exposed, shared])
            };
            let time = Stacked {
                title: format!("A step with overlap, gradients in {wire}"),
                unit: "ms".into(),
                parts: ["forward", "backward", "exposed exchange", "update"].map(String::from).to_vec(),
                rows: rows.iter().filter(|row| row.form.overlap && !row.form.sharded).map(|row| parts(&row)).collect(),
            };
            page.figures(&[efficiency.figure(), time.figure()].into_iter().flatten().collect::<Vec<_>>());
            page.table(&self.model_table(wire));
        }
        page.heading("A step of one rank");
        page.table(&self.step_table());
        page.table(&self.bucket_table());
        if !self.together.is_empty() {
            page.heading("Predicted and measured on this CPU");
            let spread = |times: &Times| Some([times.median, times.min, times.max]);
            let figure = |title: &str, values: fn(&together::Row) -> (f64, &Times)| Grouped {
                title: title.into(),
                unit: "ms".into(),
                names: ["predicted", "measured"].map(String::from).to_vec(),
                rows: self
                    .together
                    .iter()
                    .flat_map(|t| t.rows.iter().map(move |row| (t.ranks, row)))
                    .map(|(count, row)| {
                        let (predicted, measured) = values(row);
                        (format!("{}, {}", ranks(count), row.form.name()), vec![Some([predicted; 3]), spread(measured)])
                    })
                    .collect(),
                mark: None,
            };
            let figures = [
                figure("A step of ranks on this CPU", |row| (row.predicted[1].step, &row.measured)).figure(),
                figure("Exposed exchange", |row| (row.predicted[1].exposed, &row.exposed)).figure(),
            ];
            page.figures(&figures.into_iter().flatten().collect::<Vec<_>>());
            page.table(&self.measured_table());
            page.table(&self.calls_table());
            self.together_remarks().iter().for_each(|remark| page.text(remark));
        }
        page
    }
}

/// A row of either kind.
struct Either<'a> {
    computed: Option<&'a Row>,
    measured: Option<&'a together::Row>,
}
