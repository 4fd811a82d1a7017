//! What scaling costs: a step of one rank measured, what many ranks of it would cost by formulas, and on CPU ranks the prediction beside the measurement.
//!
//! | module | what it is |
//! |---|---|
//! | [`model`] | the formulas |
//! | [`alone`] | a step of one rank, and when its buckets of gradients are complete |
//! | [`together`] | ranks that are threads of this program, predicted and measured |
//! | [`report`] | tables, rows and the page |
//!
//! Every number is measured here, typed by whoever asks, or computed from those by the formulas of [`model`].

pub mod alone;
pub mod model;
pub mod report;
pub mod together;

use super::page::{machine, try_folder};
use super::subject::{Point, SubjectArgs};
use crate::device::Named;
use crate::device::ranks::Wire;
use crate::error::{Context, Error, Result};
use crate::formats;
use alone::Profile;
use clap::Args;
use model::{Cost, Form, Holds, Network, Ring, Work, cost};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use together::{Plan, Together};

/// What is measured, and what is taken to join the ranks.
#[derive(Clone, Debug, Args)]
pub struct ScalingArgs {
    /// Batch is that of a rank.
    #[command(flatten)]
    pub subject: SubjectArgs,
    #[command(flatten)]
    pub point: Point,
    /// Numbers of ranks that are computed; beyond a machine multiples of --gpus-per-node
    #[arg(long, value_delimiter = ',', default_values_t = [8, 64, 512], value_name = "N,..")]
    pub ranks: Vec<usize>,
    /// GPUs of a machine
    #[arg(long, default_value_t = 8, value_name = "G")]
    pub gpus_per_node: usize,
    /// Gigabytes a second of a GPU to the others of its machine, in one direction; that of an H100's NVLink
    #[arg(long, default_value_t = 450.0, allow_negative_numbers = true, value_name = "GB/S")]
    pub link_gbs: f64,
    /// Gigabytes a second of a GPU to other machines, in one direction; 400 Gb/s
    #[arg(long, default_value_t = 50.0, allow_negative_numbers = true, value_name = "GB/S")]
    pub network_gbs: f64,
    /// Microseconds that each step of an exchange takes whatever its size: an assumption
    #[arg(long, default_value_t = 5.0, allow_negative_numbers = true, value_name = "US")]
    pub latency_us: f64,
    /// Megabytes of gradients that are sent together
    #[arg(long, default_value_t = 25.0, allow_negative_numbers = true, value_name = "MB")]
    pub bucket_mb: f64,
    /// How gradients are sent [default: both are computed, f32 is measured]
    #[arg(long, value_name = "f32|bf16")]
    pub wire: Option<Wire>,
    /// Forward, backward and update of a step elsewhere, in the place of what is measured here: when each bucket is complete is still measured here
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "MS,MS,MS")]
    pub step_ms: Option<Vec<f64>>,
    /// So many times as fast as what is measured here
    #[arg(long, allow_negative_numbers = true, conflicts_with = "step_ms", value_name = "TIMES")]
    pub compute_scale: Option<f64>,
    /// Numbers of ranks that are measured, as threads on the CPU that share the cores; or none [default: 1,2 on the CPU, none elsewhere, with --step-ms or with --compute-scale]
    #[arg(long, value_name = "N,..|none")]
    pub measure_ranks: Option<Numbers>,
    /// Steps that are measured, and rounds of those of several ranks
    #[arg(long, default_value_t = 3)]
    pub steps: usize,
    /// Steps, and rounds, before them that are not
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Where scaling.csv, scaling.json and scaling.html are written [default: nowhere]
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Numbers, or none.
#[derive(Clone, Debug)]
pub struct Numbers(Vec<usize>);

impl std::str::FromStr for Numbers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let number =
            |part: &str| part.parse().map_err(|_| Error::usage(format!("{part:?} is no number of ranks; numbers as in 1,2, or none")));
        text.split(',').map(number).collect::<Result<_>>().map(Self)
    }
}

const MOST_RANKS: usize = 1 << 20;
/// Threads of this program, each with models of its own.
const MOST_MEASURED: usize = 64;
const MOST_NUMBERS: usize = 64;
/// With times from elsewhere, when buckets are complete is looked at with no more images.
const IMAGES: usize = 8;
/// Models that a rank which is measured has.
const MODELS: u128 = 4;

/// What the model says of so many ranks.
pub struct Row {
    pub ranks: usize,
    pub form: Form,
    pub cost: Cost,
    pub efficiency: f64,
    /// Of all ranks.
    pub images_per_second: f64,
    pub holds: Holds,
}

pub struct Scaling {
    pub args: ScalingArgs,
    pub profile: Profile,
    /// The step that is scaled: measured here, or typed.
    pub work: Work,
    /// Images of the step whose buckets were looked at.
    pub looked_at: usize,
    pub rows: Vec<Row>,
    pub together: Vec<Together>,
}

impl ScalingArgs {
    fn bucket(&self) -> usize {
        (self.bucket_mb * f64::from(1 << 20)) as usize
    }

    pub fn network(&self) -> Network {
        Network {
            per_node: self.gpus_per_node,
            link: 1e6 * self.link_gbs,
            network: 1e6 * self.network_gbs,
            latency: 1e-3 * self.latency_us,
        }
    }

    pub fn wires(&self) -> Vec<Wire> {
        self.wire.map_or_else(|| vec![Wire::F32, Wire::Bf16], |wire| vec![wire])
    }

    fn measured_ranks(&self) -> Vec<usize> {
        let usual = self.subject.device == Named::Cpu && self.step_ms.is_none() && self.compute_scale.is_none();
        match &self.measure_ranks {
            Some(numbers) => numbers.0.clone(),
            None if usual => vec![1, 2],
            None => Vec::new(),
        }
    }

    /// What takes the steps whose buckets are looked at.
    fn looked_at(&self) -> SubjectArgs {
        let most = if self.step_ms.is_some() { IMAGES } else { usize::MAX };
        SubjectArgs { batch: self.subject.batch.min(most), ..self.subject.clone() }
    }

    fn check(&self) -> Result<()> {
        let usage = |text: String| Err(Error::usage(text));
        for (flag, value, least, most) in [
            ("--steps", self.steps, 1, 1_000_000),
            ("--warmup", self.warmup, 0, 1_000_000),
            ("--gpus-per-node", self.gpus_per_node, 1, 1024),
        ] {
            if !(least..=most).contains(&value) {
                return usage(format!("{flag} {value} is not from {least} to {most}"));
            }
        }
        for (flag, value, least, most) in [
            ("--link-gbs", self.link_gbs, 1e-6, 1e9),
            ("--network-gbs", self.network_gbs, 1e-6, 1e9),
            ("--latency-us", self.latency_us, 0.0, 1e9),
            ("--bucket-mb", self.bucket_mb, 0.001, 4096.0),
            ("--compute-scale", self.compute_scale.unwrap_or(1.0), 1e-6, 1e6),
        ] {
            if !(least..=most).contains(&value) {
                return usage(format!("{flag} {value} is not from {least} to {most}"));
            }
        }
        if let Some(times) = &self.step_ms {
            let each = |ms: &f64| ms.is_finite() && (0.0..=1e9).contains(ms);
            if times.len() != 3 || !times.iter().all(each) || times.iter().sum::<f64>() <= 0.0 {
                let typed = times.iter().map(f64::to_string).collect::<Vec<_>>().join(",");
                return usage(format!(
                    "--step-ms {typed}: three times in milliseconds are wanted, forward, backward and update, as in 40,80,5"
                ));
            }
        }
        let measured = self.measured_ranks();
        for (flag, numbers, most) in [("--ranks", &self.ranks, MOST_RANKS), ("--measure-ranks", &measured, MOST_MEASURED)] {
            if let Some(number) = numbers.iter().find(|number| !(1..=most).contains(*number)) {
                return usage(format!("{flag} {number} is not from 1 to {most}"));
            }
            if numbers.len() > MOST_NUMBERS {
                return usage(format!("{flag}: {} numbers are more than {MOST_NUMBERS}", numbers.len()));
            }
        }
        let per_node = self.gpus_per_node;
        if let Some(ranks) = self.ranks.iter().find(|&&ranks| ranks > per_node && ranks % per_node != 0) {
            return usage(format!(
                "--ranks {ranks}: machines of {per_node} GPUs are not filled by them; take a multiple, or another --gpus-per-node"
            ));
        }
        if let (Some(ranks), false) = (measured.first(), self.subject.device == Named::Cpu) {
            return usage(format!(
                "--measure-ranks {ranks}: ranks are measured on the CPU alone, not on {}; leave it out",
                self.subject.device
            ));
        }
        self.subject.check_read()?;
        self.subject.check(&self.point)?;
        self.subject.check_point(&self.point)?;
        self.looked_at().fits(&self.point)?;
        let most = measured.iter().copied().max().unwrap_or(0);
        let (needed, there) =
            (self.subject.least_bytes(&self.point)?.saturating_mul(MODELS * most as u128), crate::device::memory::of_the_machine());
        if needed > u128::from(there) {
            return usage(format!(
                "--measure-ranks {most}: {MODELS} models a rank need at least {} GB of memory but the machine has {}; take fewer ranks, or none",
                needed / 1_000_000_000,
                there / 1_000_000_000
            ));
        }
        Ok(())
    }
}

/// Every number of ranks in every form.
fn rows(args: &ScalingArgs, profile: &Profile, work: &Work) -> Vec<Row> {
    let alone = work.step();
    let mut rows = Vec::new();
    for &ranks in &args.ranks {
        let (ring, share) = (Ring { network: args.network(), ranks }, alone::share(&profile.sizes, ranks));
        for form in args.wires().into_iter().flat_map(Form::all) {
            let cost = cost(work, &ring, form, share);
            rows.push(Row {
                ranks,
                form,
                cost,
                efficiency: alone / cost.step,
                images_per_second: (ranks * args.subject.batch) as f64 * 1e3 / cost.step,
                holds: if form.sharded { profile.holds.sharded(share) } else { profile.holds },
            });
        }
    }
    rows
}

/// Measures, computes, prints, and writes files where that was asked for.
pub fn run(args: &ScalingArgs, print: &mut dyn FnMut(&str)) -> Result<()> {
    args.check()?;
    args.subject.device.open()?.compute_in(args.subject.precision)?;
    if let Some(folder) = &args.output_dir {
        try_folder(folder)?;
    }
    let subject = args.looked_at();
    let profile = alone::profile(&subject, &args.point, args.bucket(), args.steps, args.warmup)?;
    let work = match (args.step_ms.as_deref(), args.compute_scale) {
        (Some(&[forward, backward, update]), _) => profile.work.taking([forward, backward, update]),
        (_, Some(times)) => profile.work.taking([profile.work.forward, profile.work.backward, profile.work.update].map(|ms| ms / times)),
        _ => profile.work.clone(),
    };
    let rows = rows(args, &profile, &work);
    let plan = Plan { wire: args.wire.unwrap_or_default(), bucket: args.bucket(), rounds: args.steps, warmup: args.warmup };
    let together = args.measured_ranks().into_iter().map(|ranks| together::measure(&args.subject, &args.point, ranks, plan));
    let together = together.collect::<Result<Vec<_>>>()?;
    let scaling = Scaling { args: args.clone(), profile, work, looked_at: subject.batch, rows, together };
    print(&if args.json { scaling.json().to_string() } else { scaling.text() });
    if let Some(folder) = &args.output_dir {
        write(folder, &scaling)?;
        if !args.json {
            let paths = ["csv", "json", "html"].map(|kind| folder.join(format!("scaling.{kind}")).display().to_string());
            print(&format!("written: {}", paths.join(", ")));
        }
    }
    Ok(())
}

fn write(folder: &Path, scaling: &Scaling) -> Result<()> {
    let subject = &scaling.args.subject;
    let facts = machine(subject.device, &scaling.profile.device, subject.precision);
    let text = |name: &str, text: String| {
        formats::write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()).context("writing its text"))
    };
    text("scaling.csv", scaling.csv())?;
    let facts_of = |(name, value): &(&str, String)| (name.to_lowercase().replace(' ', "_"), json!(value));
    let mut whole: serde_json::Map<String, Value> = facts.iter().map(facts_of).collect();
    whole.insert("scaling".into(), scaling.json());
    text("scaling.json", format!("{:#}\n", Value::Object(whole)))?;
    scaling.page(facts).write(&folder.join("scaling.html"))
}
