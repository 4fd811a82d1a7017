//! Time of a whole training step of one of the five systems: masks, a teacher's pass, forward, backward, AdamW.
//!
//! On the CPU the parts are timed one by one: what a teacher takes, the forward pass without it, backward, update. On a GPU a step is recorded once and
//! replayed, as in training, and the parts are one piece. FLOPs of a step are three forward passes of what is trained and one of the teacher, twice their
//! multiply-accumulates (see [`flops`](crate::nn::flops)); of MaskedKD's teacher as is published, with all patches projected.

use super::subject::{Point, Subject, SubjectArgs, System};
use super::{Times, page, timed};
use crate::device::gpu::Gpu;
use crate::device::{Named, memory, parallel};
use crate::ensure;
use crate::error::{Error, Result};
use crate::methods::dmjd::BaselineName;
use crate::methods::{Batch, Method};
use crate::methods::{dmae, tinymim};
use crate::nn::vit::VitConfig;
use crate::optim::Optimizer;
use crate::optim::adamw::AdamW;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::Device;
use crate::train::profile::ProfileArgs;
use crate::train::step::{Step, StepOptions};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What is trained and how often.
#[derive(Clone, Debug, clap::Args)]
pub struct StepArgs {
    #[command(flatten)]
    pub subject: SubjectArgs,
    #[command(flatten)]
    pub point: Point,
    /// All five systems one after the other, in the place of --method
    #[arg(long, conflicts_with_all = ["method", "profile"])]
    pub all: bool,
    /// Steps that are measured
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Steps before them that are not; on a GPU at least the three after which a step is recorded
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Of further steps, behind those that are measured.
    #[command(flatten)]
    pub profile: ProfileArgs,
}

/// Where the time of a step goes on the CPU.
struct Parts {
    /// None where there is no teacher.
    teacher: Option<Times>,
    forward: Times,
    backward: Times,
    update: Times,
}

pub struct Report {
    subject: SubjectArgs,
    /// With what the flags leave open filled in.
    point: Point,
    /// Student and teacher, and how many numbers each is made of.
    student: (VitConfig, usize),
    teacher: Option<(String, usize)>,
    /// Of a step: of what is trained, and of the teacher.
    flops: [f64; 2],
    steps: usize,
    /// Steps that were taken before those that are measured: more than asked for where a step is recorded only then.
    warmup: usize,
    total: Times,
    /// None where a step is recorded.
    parts: Option<Parts>,
    losses: Vec<f64>,
    /// Bytes of the memory pool, and how much more it took during the measured steps: requests to the system on the CPU, bytes of a GPU.
    memory: usize,
    more: usize,
    /// What is to be said of the profile.
    profile: Option<String>,
    profile_path: Option<PathBuf>,
}

/// No more steps than this are counted.
const MOST_STEPS: usize = 1_000_000;
const LEARNING_RATE: f64 = 1.5e-4;

/// Refuses what cannot be meant, and flags that would say nothing.
fn check(args: &StepArgs) -> Result<()> {
    for (flag, value, least) in [("--steps", args.steps, 1), ("--warmup", args.warmup, 0)] {
        if !(least..=MOST_STEPS).contains(&value) {
            return Err(Error::usage(format!("{flag} {value} is not from {least} to {MOST_STEPS}")));
        }
    }
    let s = &args.subject;
    if !args.all {
        s.check_read()?;
    }
    s.check(&args.point)?;
    s.check_point(&args.point)?;
    s.fits(&args.point)?;
    args.profile.check()?;
    args.profile.try_path()
}

/// One after the other, each handed out as soon as it is measured.
pub fn run_each(args: &StepArgs, mut tell: impl FnMut(Report)) -> Result<()> {
    if !args.all {
        return run(args).map(tell);
    }
    let each = System::ALL.map(|method| StepArgs { subject: SubjectArgs { method, ..args.subject.clone() }, ..args.clone() });
    each.iter().try_for_each(check)?;
    each.iter().try_for_each(|args| run(args).map(&mut tell))
}

/// What the flags leave open, as the methods have it.
fn filled(args: &StepArgs, student: &VitConfig, teacher: Option<&VitConfig>) -> Point {
    let (point, method) = (&args.point, args.subject.method);
    let block = |teacher: &VitConfig| match method {
        System::Dmae => Some(dmae::three_quarters(teacher.depth) + 1),
        System::TinyMim => Some(tinymim::usual_block(teacher.depth)),
        _ => None,
    };
    let ratio = || match method {
        System::MaskedKd => None,
        System::TinyMim => Some(0.0),
        _ => Some(0.75),
    };
    Point {
        mask_ratio: point.mask_ratio.or_else(ratio),
        keep: point.keep.or_else(|| (method == System::MaskedKd).then(|| student.patches() / 2)),
        views: point.views.or_else(|| (method == System::Dmjd).then_some(2)),
        teacher_block: point.teacher_block.or_else(|| teacher.and_then(block)),
    }
}

pub fn run(args: &StepArgs) -> Result<Report> {
    check(args)?;
    let (student, teacher) = (args.subject.student()?, args.subject.taught_by()?);
    let mut subject = args.subject.open(&args.point)?;
    let optimizer = subject.optimizer()?;
    let [all, trained] = subject.method.macs();
    let taught = subject.method.teacher_cost().map_or(0, |cost| cost.macs);
    let of_a_step = |macs: u64| 2.0 * macs as f64 * args.subject.batch as f64;
    let numbers = |params: &crate::param::Params| params.ids().map(|id| params.value(id).numel()).sum();
    let named = subject.method.teacher().map(|teacher| (teacher.name.clone(), numbers(&teacher.params)));
    let parameters = subject.method.params().count_trained();
    let measured = match subject.device.gpu().cloned() {
        None => in_parts(args, subject, optimizer),
        Some(gpu) => recorded(args, &gpu, subject, optimizer),
    }?;
    Ok(Report {
        subject: args.subject.clone(),
        point: filled(args, &student, teacher.as_ref()),
        student: (student, parameters),
        teacher: named,
        flops: [of_a_step(all + 2 * trained), of_a_step(taught)],
        steps: args.steps,
        warmup: measured.warmup,
        total: measured.total,
        parts: measured.parts,
        losses: measured.losses,
        memory: measured.memory[0],
        more: measured.memory[1],
        profile: measured.profile,
        profile_path: args.profile.profile.clone(),
    })
}

struct Measured {
    warmup: usize,
    total: Times,
    parts: Option<Parts>,
    losses: Vec<f64>,
    memory: [usize; 2],
    profile: Option<String>,
}

/// A few more steps, taken as they come, whose record is written down.
fn profiled(args: &StepArgs, mut step: Step, batch: &Batch, rng: &Rng, device: &Device) -> Result<Option<String>> {
    let facts = [("command", json!(page::command())), ("threads", json!(parallel::threads()))];
    let facts = facts.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    let Some(mut profile) = args.profile.behind(1, args.profile.profile_updates, device, facts) else { return Ok(None) };
    step.forget();
    step.set_eager(true);
    let mut number = (args.warmup + args.steps) as u64;
    while !profile.is_over() {
        number += 1;
        profile.update(number, || step.run(batch, &rng.at(number), LEARNING_RATE))?;
    }
    profile.write().map(Some)
}

/// On the CPU: teacher, forward, backward and update each by itself.
fn in_parts(args: &StepArgs, subject: Subject, mut optimizer: AdamW) -> Result<Measured> {
    let Subject { mut method, batch, rng, device } = subject;
    let mut parts: [Vec<f64>; 5] = Default::default();
    let (mut losses, mut requests) = (Vec::new(), 0);
    let teaching = |method: &dyn Method| method.teacher_cost().map_or(0.0, |cost| cost.seconds * 1e3);
    for step in 0..args.warmup + args.steps {
        if step == args.warmup {
            requests = memory::taken_from_system().1;
        }
        let before = teaching(&*method);
        let tape = Tape::new();
        let (forward, seen) = timed(|| -> Result<_> {
            let loss = method.loss(&tape, &batch, &rng.at(step as u64))?.total;
            let value = loss.value().read()?[0];
            Ok((loss, value))
        });
        let (loss, value) = seen?;
        let teacher = teaching(&*method) - before;
        ensure!(value.is_finite(), "step {step}: the loss is {value}");
        let (backward, done) = timed(|| -> Result<()> {
            tape.backward(&loss, &mut [method.params()])?;
            drop((loss, tape));
            Ok(())
        });
        done?;
        let (update, done) = timed(|| -> Result<()> {
            optimizer.step(method.params(), LEARNING_RATE)?;
            method.params().clear_gradients();
            Ok(())
        });
        done?;
        losses.push(value);
        if step >= args.warmup {
            let taken = [forward + backward + update, teacher, forward - teacher, backward, update];
            parts.iter_mut().zip(taken).for_each(|(part, ms)| part.push(ms));
        }
    }
    let [total, teacher, forward, backward, update] = parts.map(Times::of);
    let teacher = method.teacher().map(|_| teacher);
    let (memory, after) = memory::taken_from_system();
    let parts = Some(Parts { teacher, forward, backward, update });
    let profile = profiled(args, Step::new(method, Box::new(optimizer), StepOptions::default()), &batch, &rng, &device)?;
    Ok(Measured { warmup: args.warmup, total, parts, losses, memory: [memory, after - requests], profile })
}

/// On a GPU: the step as training takes it, recorded once and replayed, images written to the device each time.
fn recorded(args: &StepArgs, gpu: &Gpu, subject: Subject, optimizer: AdamW) -> Result<Measured> {
    let Subject { method, batch, rng, device } = subject;
    let mut step = Step::new(method, Box::new(optimizer), StepOptions::default());
    let (mut times, mut losses, mut before) = (Vec::new(), Vec::new(), 0);
    // Steps that are not recorded yet are not what is to be measured.
    let mut warm = 0;
    while warm < args.warmup || !step.is_recorded() {
        losses.push(step.run(&batch, &rng.at(warm as u64), LEARNING_RATE)?.loss);
        warm += 1;
    }
    for k in 0..args.steps {
        before = if k == 0 { gpu.memory().1 } else { before };
        let mut value = f64::NAN;
        times.push(gpu.time(|| {
            value = step.run(&batch, &rng.at((warm + k) as u64), LEARNING_RATE)?.loss;
            Ok(())
        })?);
        ensure!(value.is_finite(), "step {}: the loss is {value}", warm + k);
        losses.push(value);
    }
    let memory = gpu.memory().1;
    let memory = [memory, memory - before].map(|bytes| bytes as usize);
    let profile = profiled(args, step, &batch, &rng, &device)?;
    Ok(Measured { warmup: warm, total: Times::of(times), parts: None, losses, memory, profile })
}

impl Report {
    fn images_per_second(&self) -> f64 {
        self.subject.batch as f64 * 1e3 / self.total.median
    }

    /// 10^9 operations of a step.
    fn gflop(&self) -> f64 {
        self.flops.iter().sum::<f64>() / 1e9
    }

    fn gflop_per_second(&self) -> f64 {
        self.gflop() * 1e3 / self.total.median
    }

    pub fn json(&self) -> Value {
        let (a, p, (student, parameters)) = (&self.subject, &self.point, &self.student);
        let more = if self.parts.is_some() { "system_requests_in_steady_state" } else { "bytes_taken_in_steady_state" };
        let decoder = |value: usize| a.decodes().then_some(value);
        let parts = self.parts.as_ref().map(|parts| {
            let mut all = json!({ "forward": parts.forward.median, "backward": parts.backward.median, "update": parts.update.median });
            if let Some(teacher) = &parts.teacher {
                all["teacher"] = json!(teacher.median);
            }
            all
        });
        json!({
            "what": "step", "method": a.method.name(), "model": a.model(), "teacher": self.teacher.as_ref().map(|(name, _)| name),
            "image_size": a.image_size, "patch_size": student.patch, "batch": a.batch,
            "mask_ratio": p.mask_ratio, "keep": p.keep, "views": p.views, "teacher_block": p.teacher_block,
            "decoder_dim": decoder(a.decoder_dim), "decoder_depth": decoder(a.decoder_depth), "decoder_heads": decoder(a.decoder_heads),
            "norm_pix": a.norm_pix, "baseline": (a.method == System::Dmjd).then(|| baseline(a.baseline)),
            "classes": (a.method == System::MaskedKd).then_some(a.classes),
            "dtype": a.precision.name(), "device": a.device.to_string(), "threads": parallel::threads(), "steps": self.steps, "warmup": self.warmup,
            "parameters": parameters, "teacher_parameters": self.teacher.as_ref().map(|(_, numbers)| numbers),
            "ms_per_step": self.total.median, "min_ms": self.total.min, "max_ms": self.total.max,
            "images_per_s": self.images_per_second(), "parts": parts,
            "gflop_per_step": self.gflop(), "gflop_of_the_teacher": self.flops[1] / 1e9, "gflop_per_s": self.gflop_per_second(),
            "loss": self.losses.last(), "losses": self.losses, "pool_bytes": self.memory, more: self.more, "profile": self.profile_path,
        })
    }

    /// What the model sees of an image.
    fn seen(&self) -> String {
        let (point, patches) = (&self.point, self.student.0.patches());
        match (point.mask_ratio, point.keep, point.views) {
            (_, Some(keep), _) => format!("the teacher sees {keep} of {patches} patches"),
            (Some(ratio), _, Some(views)) => format!("{views} views, {} % of each hidden", ratio * 100.0),
            (Some(0.0), ..) => "nothing hidden".to_string(),
            (ratio, ..) => format!("{} % hidden", ratio.unwrap_or(0.0) * 100.0),
        }
    }

    pub fn text(&self) -> String {
        let (a, (student, parameters)) = (&self.subject, &self.student);
        let mut head = format!("{} training step, {} ({parameters} trained parameters)", a.method.name(), a.model());
        if a.method == System::Dmjd {
            head += &format!(", baseline {}", baseline(a.baseline));
        }
        if let Some((name, numbers)) = &self.teacher {
            let block = self.point.teacher_block.map_or(String::new(), |block| format!(", its block {block}"));
            head += &format!(", teacher {name} ({numbers} parameters{block})");
        }
        if a.decodes() {
            head += &format!(", decoder {} x {}", a.decoder_dim, a.decoder_depth);
        }
        let row = |name: &str, times: &Times| format!("{name:<9} {:>9.1} ms   ({:.1} to {:.1})", times.median, times.min, times.max);
        let mut rows = vec![format!("{}   {:.2} images/s", row("step", &self.total), self.images_per_second())];
        match &self.parts {
            Some(parts) => {
                rows.extend(parts.teacher.as_ref().map(|teacher| row("  teacher", teacher)));
                let others = [("  forward", &parts.forward), ("  backward", &parts.backward), ("  update", &parts.update)];
                rows.extend(others.map(|(name, times)| row(name, times)));
            }
            None => rows.push("  recorded once and replayed: teacher, forward, backward and update are one piece".to_string()),
        }
        let [own, taught] = self.flops.map(|flops| flops / 1e9);
        let teacher = if self.teacher.is_some() { format!(" and {taught:.1} of the teacher") } else { String::new() };
        let losses = self.losses.first().zip(self.losses.last()).map_or(String::new(), |(first, last)| format!("{first:.4} -> {last:.4}"));
        let device = if a.device == Named::Cpu { "CPU".to_string() } else { format!("device {}", a.device) };
        format!(
            "{head}, images {} x {}, patches of {}, {}\n\
             batch {} on {} threads, {}, {device}, random images; median of {} steps after {} warm-up steps\n\n\
             {}\n\n\
             work: {:.1} GFLOP a step, {own:.1} of what is trained (three forward passes){teacher}; {:.1} GFLOP/s\n\
             loss over all steps: {losses}\n\
             memory of the pool: {:.0} MB, {} in the measured steps: {}{}",
            a.image_size,
            a.image_size,
            student.patch,
            self.seen(),
            a.batch,
            parallel::threads(),
            a.precision,
            self.steps,
            self.warmup,
            rows.join("\n"),
            self.gflop(),
            self.gflop_per_second(),
            self.memory as f64 / 1e6,
            if self.parts.is_some() { "requests to the system" } else { "bytes taken from the device" },
            self.more,
            self.profile.as_ref().map_or(String::new(), |profile| format!("\n\n{profile}"))
        )
    }
}

fn baseline(name: BaselineName) -> &'static str {
    match name {
        BaselineName::Mae => "mae",
        BaselineName::Maskfeat => "maskfeat",
        BaselineName::Convmae => "convmae",
    }
}
