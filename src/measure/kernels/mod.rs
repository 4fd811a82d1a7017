//! Every op and every version of its kernels, forward and backward, at the shapes of a ViT of which a part of the tokens is kept: time, bytes or operations a
//! second, and how near that is to what the same machine copies and multiplies at most.
//!
//! | module | what it is |
//! |---|---|
//! | [`bench`] | what is timed, and what an ideal kernel would have to do for it |
//! | [`tokens`], [`once`], [`updates`] | the ops by kept tokens, the others, and what follows the gradients |
//! | [`time`] | the comparison with the CPU, and the clock |
//! | [`row`] | the ceilings, and a line of the table |
//! | [`report`], [`roofline`] | the files: rows, the page, its drawings |
//!
//! The floor of a row is the larger of bytes / copy rate and operations / product rate, both measured in the same run. Operations are counted where
//! products and attentions make them; exponentials and the like are not, so a row may be limited by something that is no column here.

pub mod bench;
pub mod once;
pub mod report;
pub mod roofline;
pub mod row;
pub mod time;
pub mod tokens;
pub mod updates;

use crate::device::{Named, Precision, memory, parallel};
use crate::error::{Context, Error, Result};
use crate::tensor::{Device, Dtype};
use bench::Bench;
use row::{Ceilings, Row};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use time::{Outcome, Pass, Rounds};
use tokens::Sizes;
use updates::{Model, Rule};

/// What is timed and how.
#[derive(Clone, Debug, clap::Args)]
pub struct KernelsArgs {
    /// Where to compute
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    pub device: Named,
    /// Only these ops, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub only: Vec<String>,
    /// Size of the ViT: tiny, small, base, large, huge, or all of them
    #[arg(long, default_value = "base")]
    pub model: String,
    /// Parts of the patches that are kept, in per cent, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "PERCENT", default_values_t = [25, 50, 100])]
    pub tokens: Vec<usize>,
    /// Images of a batch [default: 256 on a GPU, 8 on the CPU, 1 on the emulated device]
    #[arg(long)]
    pub batch: Option<usize>,
    /// f32 or bf16 [default: bf16 on a GPU, else f32]
    #[arg(long, value_parser = dtype)]
    pub precision: Option<Dtype>,
    /// Rounds that count [default: 20 after 3 that do not on a GPU, 10 after 2 on the CPU, 3 on the emulated device]
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Where kernels.csv, kernels.json and kernels.html are written [default: nowhere]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// One JSON object a line instead of text
    #[arg(long)]
    pub json: bool,
}

fn dtype(name: &str) -> Result<Dtype> {
    match name.parse()? {
        Precision::Tf32 => Err(Error::usage("precision tf32 is one of products alone, which `measure step` has; use f32 or bf16")),
        precision => Ok(precision.dtype()),
    }
}

/// What `--model all` stands for.
const MODELS: [&str; 5] = ["tiny", "small", "base", "large", "huge"];
/// In place of a model's name.
const PARTS: &str = "cait, convmae";
/// No row is timed more often than this.
const MOST_ROUNDS: usize = 1_000_000;
/// A grid has no more rows of blocks.
const MOST_IMAGES: usize = 65_535;

/// The arguments, once they can be meant.
struct Plan {
    named: Named,
    images: usize,
    precision: Dtype,
    rounds: Rounds,
    models: Vec<&'static str>,
}

impl Plan {
    fn of(args: &KernelsArgs) -> Result<Self> {
        let usage = |ok: bool, message: String| if ok { Ok(()) } else { Err(Error::usage(message)) };
        let (images, precision, rounds, before) = match args.device {
            Named::Gpu(_) => (256, Dtype::Bf16, 20, 3),
            Named::Cpu => (8, Dtype::F32, 10, 2),
            Named::Emulated => (1, Dtype::F32, 3, 0),
        };
        let (images, precision) = (args.batch.unwrap_or(images), args.precision.unwrap_or(precision));
        let counted = args.rounds.unwrap_or(rounds);
        usage((1..=MOST_ROUNDS).contains(&counted), format!("--rounds {counted} is not from 1 to {MOST_ROUNDS}"))?;
        usage((1..=MOST_IMAGES).contains(&images), format!("--batch {images} is not from 1 to {MOST_IMAGES}"))?;
        for percent in &args.tokens {
            usage((1..=100).contains(percent), format!("--tokens {percent} is not from 1 to 100 per cent"))?;
        }
        let fits = args.device != Named::Cpu || precision == Dtype::F32;
        usage(
            fits,
            format!(
                "--precision {precision}: the operations of the CPU are f32; use --device gpu or emulated, or `masque measure ops --precision bf16` for its products"
            ),
        )?;
        let models = match args.model.as_str() {
            "all" => MODELS.to_vec(),
            name => MODELS.into_iter().filter(|model| *model == name).collect(),
        };
        usage(!models.is_empty(), format!("--model {} is unknown; there are {} and all", args.model, MODELS.join(", ")))?;
        Ok(Self { named: args.device, images, precision, rounds: Rounds { counted, before }, models })
    }

    /// The benches of one model, or of the parts of other networks if that is None; each with so many images.
    fn benches(&self, model: Option<&str>, percents: &[usize], images: usize) -> Result<Vec<Bench>> {
        let Some(model) = model else { return Ok([once::cait(images), once::convmae(images)?].into_iter().flatten().collect()) };
        let by_tokens = percents.iter().map(|&percent| tokens::benches(&Sizes::of(model, percent, images, self.precision)?));
        let mut all: Vec<Bench> = by_tokens.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        all.extend(once::of_a_model(&Sizes::of(model, 100, images, self.precision)?)?);
        Ok(all)
    }

    /// How the numbers are to be read.
    fn remarks(&self) -> Vec<String> {
        let checked = match self.named {
            Named::Cpu => {
                "CPU rows: the CPU's code is the definition, so nothing is compared; its caches are not wiped, so a row may be above 100 %"
                    .to_string()
            }
            _ => format!(
                "each result is first compared with the CPU's in f64: it may be off by {:e} of its largest value",
                time::tolerance(self.precision)
            ),
        };
        let emulated = "EMULATED: the CPU runs the kernels one thread after the other; these times say nothing about a GPU";
        let ceiling = "of ceiling: the least time that the row's bytes or operations allow, over its time; *: the version that runs unless asked otherwise";
        [Some(checked), (self.named == Named::Emulated).then(|| emulated.to_string()), Some(ceiling.to_string())]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Refuses what the machine's own memory cannot hold; a GPU says so itself.
    fn room(&self, bench: &Bench) -> Result<()> {
        let (needed, there) = (bench.memory(self.precision) as u64, memory::of_the_machine());
        if needed <= there || matches!(self.named, Named::Gpu(_)) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "--batch {}: {} needs about {} GB of memory but the machine has {}; make it smaller",
            self.images,
            bench.op,
            needed / 1_000_000_000,
            there / 1_000_000_000
        )))
    }
}

/// The ops there are, in the order of the table.
pub fn names() -> Result<Vec<&'static str>> {
    let s = Sizes::of("tiny", 50, 1, Dtype::F32)?;
    let all = [tokens::benches(&s)?, once::of_a_model(&s)?, once::cait(1), once::convmae(1)?];
    let mut names: Vec<&str> = Vec::new();
    for name in all.iter().flatten().map(|bench| bench.op).chain(Rule::ALL.map(Rule::name)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Prints the ceilings and a row for each op, version and pass.
pub fn run(args: &KernelsArgs, print: &mut dyn FnMut(&str)) -> Result<()> {
    let plan = Plan::of(args)?;
    let names = names()?;
    if let Some(name) = args.only.iter().find(|name| !names.contains(&name.as_str())) {
        return Err(Error::usage(format!("--only {name}: there is no such op; there are {}", names.join(", "))));
    }
    let wanted = |op: &str| args.only.is_empty() || args.only.iter().any(|name| name == op);
    let models: Vec<Option<&'static str>> = plan.models.iter().copied().map(Some).chain([None]).collect();
    for model in &models {
        plan.benches(*model, &args.tokens, plan.images)?.iter().filter(|bench| wanted(bench.op)).try_for_each(|bench| plan.room(bench))?;
    }
    let device = plan.named.open()?;
    if let Some(folder) = &args.output_dir {
        super::page::try_folder(folder)?;
    }
    let name = match device.gpu().map(|gpu| gpu.as_real()) {
        None => format!("the CPU with {} threads", parallel::threads()),
        Some(None) => "the emulated device".to_string(),
        Some(Some(real)) => real.facts()?.name,
    };
    let ceilings = Ceilings::measure(&device, plan.named, plan.precision, plan.rounds)?;
    drop(device);
    let mut table = Table { plan: &plan, ceilings, json: args.json, print, rows: Vec::new(), notes: Vec::new() };
    table.head(&name);
    for model in models {
        // Memory goes back to the system only with the device.
        let device = plan.named.open()?;
        let benches = plan.benches(model, &args.tokens, plan.images)?;
        let single = plan.benches(model, &args.tokens, 1)?;
        for (bench, single) in benches.iter().zip(&single).filter(|(bench, _)| wanted(bench.op)) {
            table.bench(model, bench, single, &device).with_context(|| format!("measuring {}", bench.op))?;
        }
        let rules: Vec<Rule> = Rule::ALL.into_iter().filter(|rule| wanted(rule.name())).collect();
        if let (Some(model), false) = (model, rules.is_empty()) {
            table.updates(model, &rules, &device)?;
        }
        if let Some(real) = device.gpu().and_then(|gpu| gpu.as_real()) {
            table.refused(&real.without_cublas());
        }
    }
    let Some(folder) = &args.output_dir else { return Ok(()) };
    let report = report::Report { plan: &plan, device: &name, ceilings, rows: &table.rows, notes: &table.notes };
    let written = report.write(folder)?;
    if !args.json {
        table.say(&format!("\nwritten: {written}"));
    }
    Ok(())
}

struct Table<'a> {
    plan: &'a Plan,
    ceilings: Ceilings,
    json: bool,
    print: &'a mut dyn FnMut(&str),
    rows: Vec<Row>,
    /// What is to be said of all of it.
    notes: Vec<String>,
}

impl Table<'_> {
    fn say(&mut self, line: &str) {
        (self.print)(line);
    }

    fn head(&mut self, name: &str) {
        let Plan { named, images, precision, rounds, .. } = *self.plan;
        let Ceilings { copy, product, side } = self.ceilings;
        if self.json {
            let head = json!({
                "what": "ceilings", "device": named.to_string(), "name": name, "dtype": precision.name(), "batch": images,
                "threads": parallel::threads(), "copy_gb_s": copy / 1e9, "product_tflop_s": product / 1e12, "product_side": side,
            });
            return self.say(&head.to_string());
        }
        self.say(&format!("{named}: {name}, {precision}, {images} images; median of {} rounds after {}", rounds.counted, rounds.before));
        self.say(&format!(
            "ceilings, measured now: copy {:.1} GB/s, product of {side} x {side} x {side} {:.3} TFLOP/s",
            copy / 1e9,
            product / 1e12
        ));
        self.plan.remarks().iter().for_each(|remark| self.say(remark));
        self.say(&format!("\n{}", row::heading()));
    }

    fn row(&mut self, row: Row) {
        if !self.json && self.rows.last().is_none_or(|last| last.model != row.model) {
            self.say(&format!("\n{}", row.model));
        }
        let line = if self.json { row.json(&self.ceilings).to_string() } else { row.text(&self.ceilings) };
        self.say(&line);
        self.rows.push(row);
    }

    /// All versions and passes of an op. `single` is the same on one image.
    fn bench(&mut self, model: Option<&'static str>, bench: &Bench, single: &Bench, device: &Device) -> Result<()> {
        let Plan { precision, rounds, named, .. } = *self.plan;
        let row = |pass: Pass, times, version: Option<&'static str>, chosen, first| Row {
            model: model.unwrap_or(PARTS),
            op: bench.op,
            case: bench.case.clone(),
            pass,
            precision,
            device: named,
            version,
            chosen,
            times,
            work: if pass == Pass::Backward { bench.backward.unwrap_or_default() } else { bench.forward },
            first,
        };
        let inputs = bench.tensors(device, precision, precision)?;
        let Some(gpu) = device.gpu() else {
            for (pass, times) in time::on_cpu(bench, &inputs, rounds)? {
                self.row(row(pass, times, None, false, None));
            }
            return Ok(());
        };
        let exact = Outcome::exact(single, precision)?;
        let Some((versions, these)) = &bench.versions else {
            time::check(single, None, device, precision, &exact)?;
            for (pass, times) in time::on_gpu(gpu, bench, None, &inputs, rounds, &exact, precision)? {
                self.row(row(pass, times, None, false, None));
            }
            return Ok(());
        };
        let runs = if these.contains(&versions.chosen) { versions.chosen } else { these.last().copied().unwrap_or(versions.chosen) };
        let mut first: Vec<(Pass, f64)> = Vec::new();
        for &version in these {
            gpu.choose(versions, version)?;
            time::check(single, Some(version), device, precision, &exact)?;
            for (pass, times) in time::on_gpu(gpu, bench, Some(version), &inputs, rounds, &exact, precision)? {
                if version == "v1" {
                    first.push((pass, times.median));
                }
                let first = first.iter().find(|(other, _)| *other == pass).map(|(_, first)| *first);
                self.row(row(pass, times, Some(version), version == runs, first));
            }
        }
        gpu.choose(versions, versions.chosen)
    }

    fn updates(&mut self, name: &'static str, rules: &[Rule], device: &Device) -> Result<()> {
        let Plan { precision, rounds, named, .. } = *self.plan;
        let mut model = Model::vit(name, device, precision)?;
        let count = model.params.count_trained();
        let case: Map<String, Value> = [("parameters".to_string(), json!(count))].into_iter().collect();
        for &rule in rules {
            if device.gpu().is_some() {
                time::check_update(rule, device, precision)?;
            }
            let times = time::update(rule, &mut model, rounds).with_context(|| format!("measuring {}", rule.name()))?;
            let work = bench::Work::default().and_bytes(rule.bytes(precision) * count);
            let (pass, op) = (Pass::Update, rule.name());
            self.row(Row {
                model: name,
                op,
                case: case.clone(),
                pass,
                precision,
                device: named,
                version: None,
                chosen: false,
                times,
                work,
                first: None,
            });
        }
        Ok(())
    }

    /// Products that ran on the slow kernel.
    fn refused(&mut self, products: &[String]) {
        if products.is_empty() {
            return;
        }
        let text = format!("cuBLASLt did not take these products, and a slow kernel did: {}", products.join("; "));
        if !self.json {
            self.say(&text);
        }
        self.notes.push(text);
    }
}
