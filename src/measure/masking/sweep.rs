//! Steps of one system that look at more or less of each image, in turns.
//!
//! A round visits every point, the next one in reverse order, so that a machine that grows slower or faster favours none. At each visit one step is timed as
//! training takes it, on a GPU recorded and replayed, and another one with a record of its phases. A speed-up is that of the two steps of a round; shown are
//! the median over the rounds, the least and the greatest.

use super::look::{Macs, asked, look, macs};
use crate::device::memory::{IN_USE, IN_USE_ON_GPUS, InUse};
use crate::device::{Device, Named};
use crate::ensure;
use crate::error::{Error, Kind, Result};
use crate::measure::subject::{Point, Subject, SubjectArgs, System};
use crate::measure::{Times, timed};
use crate::methods::Batch;
use crate::rng::Rng;
use crate::trace;
use crate::train::step::{Step, StepOptions};

/// What is swept; a list that is not given is the system's own.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Lists {
    /// Parts of the patches that are hidden, of maskedkd from its teacher; 0 hides nothing [default: 0,0.25,0.5,0.75,0.9 for mae]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, conflicts_with = "keep", value_name = "RATIO,..")]
    pub mask_ratio: Option<Vec<f64>>,
    /// The same as numbers of patches that are kept [default: all, 3/4, 1/2 and 1/4 for maskedkd]
    #[arg(long, value_delimiter = ',', value_name = "K,..")]
    pub keep: Option<Vec<usize>>,
    /// Of dmjd: views of each image [default: 1,2,3]
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    pub views: Option<Vec<usize>>,
    /// Of dmae and tinymim: the teacher's blocks that are asked, from 1 [default: each quarter of it]
    #[arg(long, value_delimiter = ',', value_name = "BLOCK,..")]
    pub teacher_blocks: Option<Vec<usize>>,
}

impl Lists {
    pub fn is_empty(&self) -> bool {
        self.mask_ratio.is_none() && self.keep.is_none() && self.views.is_none() && self.teacher_blocks.is_none()
    }

    /// What everything else is measured against, and then the points; `asked` as [`asked`] has it.
    fn points(&self, system: System, patches: usize, asked: Option<(usize, usize)>) -> Vec<Point> {
        let ratios = |ratios: &[f64]| ratios.iter().map(|&ratio| Point { mask_ratio: Some(ratio), ..Point::default() }).collect::<Vec<_>>();
        let keeps = |keeps: &[usize]| keeps.iter().map(|&keep| Point { keep: Some(keep), ..Point::default() }).collect::<Vec<_>>();
        let typed = self.mask_ratio.as_deref().map(ratios).or(self.keep.as_deref().map(keeps));
        let (usual, depth) = asked.map_or((None, 0), |(block, depth)| (Some(block), depth));
        let at = |block: Option<usize>| move |point: &Point| Point { teacher_block: block, ..*point };
        let in_views = |views: usize| {
            // Where nothing is hidden there is one view.
            let whole = move |point: &Point| point.mask_ratio == Some(0.0) || point.keep == Some(patches);
            move |point: &Point| Point { views: Some(if whole(point) { 1 } else { views }), ..*point }
        };
        let whole = match system {
            System::Dmjd => Point { mask_ratio: Some(0.0), views: Some(1), ..Point::default() },
            System::MaskedKd => Point { keep: Some(patches), ..Point::default() },
            _ => Point { mask_ratio: Some(0.0), teacher_block: usual, ..Point::default() },
        };
        let mut points = vec![whole];
        match system {
            System::Mae => points.extend(typed.unwrap_or_else(|| ratios(&[0.0, 0.25, 0.5, 0.75, 0.9]))),
            System::MaskedKd => points.extend(typed.unwrap_or_else(|| keeps(&[patches, 3 * patches / 4, patches / 2, patches / 4]))),
            System::Dmae | System::TinyMim => {
                let often = if system == System::Dmae { 0.75 } else { 0.0 };
                let blocks = self.teacher_blocks.clone().unwrap_or_default();
                if blocks.is_empty() {
                    points.extend(typed.clone().unwrap_or_else(|| ratios(&[0.0, 0.5, 0.75])).iter().map(at(usual)));
                }
                let quarters: Vec<usize> =
                    if typed.is_none() { (1..=4).map(|part| (part * depth / 4).max(1)).collect() } else { Vec::new() };
                for block in if blocks.is_empty() { quarters } else { blocks } {
                    points.extend(typed.clone().unwrap_or_else(|| ratios(&[often])).iter().map(at(Some(block))));
                }
            }
            System::Dmjd => {
                let views = self.views.clone().unwrap_or(if typed.is_none() { vec![1, 2, 3] } else { vec![2] });
                for views in views {
                    points.extend(typed.clone().unwrap_or_else(|| ratios(&[0.75])).iter().map(in_views(views)));
                }
                if typed.is_none() && self.views.is_none() {
                    points.extend(ratios(&[0.5]).iter().map(in_views(2)));
                }
            }
        }
        let mut seen: Vec<Point> = Vec::new();
        points.retain(|point| {
            let new = !seen.contains(point);
            seen.push(*point);
            new
        });
        points
    }
}

/// How often each point is visited.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    pub counted: usize,
    /// Before them, and not counted.
    pub before: usize,
}

/// A part of the step by its time, beside nothing hidden.
#[derive(Clone, Copy, Debug)]
pub struct Saving {
    pub speed_up: Times,
    /// By multiply-accumulates.
    pub predicted: f64,
}

impl Saving {
    /// The part of what arithmetic promises that is measured: of the median, the least and the greatest.
    pub fn efficiency(&self) -> [f64; 3] {
        [self.speed_up.median, self.speed_up.min, self.speed_up.max].map(|speed_up| speed_up / self.predicted)
    }
}

/// The parts of a step that have times of their own.
pub const PARTS: [&str; 6] = ["encoder", "decoder", "teacher", "other forward", "backward", "update"];

pub struct Row {
    pub point: Point,
    /// Patches that each view keeps, of maskedkd the teacher's.
    pub kept: usize,
    pub macs: Macs,
    /// In the order of [`PARTS`], milliseconds.
    pub parts: [Times; 6],
    pub step: Times,
    /// Most bytes at once in a step, beyond those that are there between steps.
    pub peak: usize,
    pub whole: Saving,
    /// Where their arithmetic is not the same as with nothing hidden.
    pub encoder: Option<Saving>,
    pub teacher: Option<Saving>,
    pub loss: f64,
}

/// A system and what was measured of it.
pub struct Swept {
    pub subject: SubjectArgs,
    pub patches: usize,
    /// Trained numbers.
    pub parameters: usize,
    pub device: String,
    /// The first one hides nothing.
    pub rows: Vec<Row>,
    /// Points that cannot be meant, and why.
    pub notes: Vec<String>,
    /// Bytes that are there between steps: weights, gradients, moments, a teacher, the batch.
    pub at_rest: usize,
    /// A step with a record of its phases, to one without; None on a GPU, where they wait for the device.
    pub record: Option<f64>,
}

/// What one visit gives, in milliseconds.
struct Visit {
    step: f64,
    parts: [f64; 6],
    /// With a record.
    recorded: f64,
    peak: usize,
    loss: f64,
}

struct Bench {
    step: Step,
    batch: Batch,
    device: Device,
    rng: Rng,
    steps: u64,
}

const LEARNING_RATE: f64 = 1e-4;
/// Replays of a recorded step at a visit; their median counts.
const REPLAYS: usize = 3;

impl Bench {
    fn run(&mut self) -> Result<f64> {
        self.steps += 1;
        let outcome = self.step.run(&self.batch, &self.rng.at(self.steps), LEARNING_RATE)?;
        ensure!(outcome.taken, "the loss of a step is {} and its gradient's length {}; nothing was learned", outcome.loss, outcome.norm);
        Ok(outcome.loss)
    }

    fn in_use(&self) -> &'static InUse {
        if self.device.gpu().is_some() { &IN_USE_ON_GPUS } else { &IN_USE }
    }

    /// A step whose phases are written down.
    fn phases(&mut self) -> Result<([f64; 6], f64)> {
        let gpu = self.device.gpu().cloned();
        trace::start(gpu.map(|gpu| -> trace::Wait {
            Box::new(move || {
                // What fails here shows at the next call.
                let _ = gpu.wait();
            })
        }));
        let (recorded, done) = timed(|| self.run());
        let events = trace::stop();
        done?;
        let of = |name: &str, inside: &[&str]| trace::milliseconds(&events, name, inside);
        let [encoder, decoder] = ["encoder", "decoder"].map(|name| of(name, &["teacher", name]));
        let teacher = of("teacher", &["teacher"]);
        let other = (of("forward", &[]) - encoder - decoder - teacher).max(0.0);
        Ok(([encoder, decoder, teacher, other, of("backward", &[]), of("update", &[])], recorded))
    }

    fn visit(&mut self, point: &Point) -> Result<Visit> {
        look(self.step.method(), point)?;
        self.step.forget();
        let at_rest = self.in_use().restart();
        let (mut step, loss) = timed(|| self.run());
        let mut loss = loss?;
        let peak = self.in_use().most().saturating_sub(at_rest);
        let (parts, recorded) = self.phases()?;
        if let Some(gpu) = self.device.gpu().cloned() {
            self.run()?;
            ensure!(self.step.is_recorded(), "the third step on {} was not recorded", gpu.name());
            let mut times = Vec::with_capacity(REPLAYS);
            for _ in 0..REPLAYS {
                times.push(gpu.time(|| {
                    loss = self.run()?;
                    Ok(())
                })?);
            }
            step = Times::of(times).median;
        }
        Ok(Visit { step, parts, recorded, peak, loss })
    }
}

/// Measures a system; `lists` say at which points.
pub fn sweep(subject: &SubjectArgs, lists: &Lists, rounds: Rounds) -> Result<Swept> {
    // Half of the patches can be hidden of every image that has two.
    let first = match subject.method {
        System::MaskedKd | System::TinyMim => Point::default(),
        _ => Point { mask_ratio: Some(0.5), ..Point::default() },
    };
    let mut opened = subject.open(&first)?;
    let optimizer = opened.optimizer()?;
    let Subject { mut method, batch, device, rng } = opened;
    let (patches, parameters) = (method.encoder().config.patches(), method.params().count_trained());
    let (mut points, mut notes): (Vec<(Point, usize, Macs)>, _) = (Vec::new(), Vec::new());
    let same = |a: &Point, b: &Point| (a.views, a.teacher_block) == (b.views, b.teacher_block);
    for point in lists.points(subject.method, patches, asked(&*method)) {
        let several = point.views.is_some_and(|views| views > 1) && !matches!(subject.device, Named::Gpu(_));
        let fits = if several { subject.fits(&point) } else { Ok(()) };
        match look(&mut *method, &point).and_then(|kept| fits.map(|()| kept)) {
            // A point that another flag has said already is measured once.
            Ok(kept) if points.iter().any(|(other, k, _)| same(other, &point) && *k == kept) => {}
            Ok(kept) => points.push((point, kept, macs(&*method))),
            Err(error) if error.kind() == Kind::Usage => notes.push(error.chain()),
            Err(error) => return Err(error),
        }
    }
    if points.len() == 1 && !notes.is_empty() {
        return Err(Error::usage(notes.join("; ")));
    }

    let step = Step::new(method, Box::new(optimizer), StepOptions::default());
    let mut bench = Bench { step, batch, device, rng, steps: 0 };
    let mut visits: Vec<Vec<Visit>> = points.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds.before + rounds.counted {
        let mut order: Vec<usize> = (0..points.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let visit = bench.visit(&points[at].0)?;
            if round >= rounds.before {
                visits[at].push(visit);
            }
        }
    }
    let at_rest = bench.in_use().restart();
    let records = visits.iter().flatten().map(|visit| visit.recorded / visit.step).collect();
    Ok(Swept {
        subject: subject.clone(),
        patches,
        parameters,
        device: bench.device.gpu().map_or_else(|| "CPU".to_string(), |gpu| gpu.name().to_string()),
        rows: (0..points.len()).map(|at| row(&points, &visits, at)).collect(),
        notes,
        at_rest,
        record: (subject.device == Named::Cpu).then(|| Times::of(records).median),
    })
}

fn row(points: &[(Point, usize, Macs)], visits: &[Vec<Visit>], at: usize) -> Row {
    let ((point, kept, macs), (_, _, all), own) = (points[at], points[0], &visits[at]);
    let of = |f: &dyn Fn(&Visit) -> f64| Times::of(own.iter().map(f).collect());
    let saving = |f: &dyn Fn(&Visit) -> f64, by: fn(&Macs) -> u64| Saving {
        speed_up: Times::of(own.iter().zip(&visits[0]).map(|(own, all)| f(all) / f(own)).collect()),
        predicted: by(&all) as f64 / by(&macs) as f64,
    };
    let of_part = |part: usize, by: fn(&Macs) -> u64| (by(&macs) != by(&all)).then(|| saving(&move |visit| visit.parts[part], by));
    Row {
        point,
        kept,
        macs,
        parts: std::array::from_fn(|part| of(&move |visit| visit.parts[part])),
        step: of(&|visit| visit.step),
        peak: own.iter().map(|visit| visit.peak).max().unwrap_or(0),
        whole: saving(&|visit| visit.step, Macs::step),
        encoder: of_part(0, |macs| macs.encoder),
        teacher: of_part(2, |macs| macs.teacher),
        loss: own.last().map_or(f64::NAN, |visit| visit.loss),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(lists: &Lists, system: System, asked: Option<(usize, usize)>) -> Vec<String> {
        let number = |x: Option<usize>| x.map_or("-".to_string(), |x| x.to_string());
        let label = |p: &Point| {
            let shown = p.mask_ratio.map_or_else(|| format!("k{}", number(p.keep)), |ratio| ratio.to_string());
            format!("{shown} {} {}", number(p.views), number(p.teacher_block))
        };
        lists.points(system, 196, asked).iter().map(label).collect()
    }

    #[test]
    fn each_system_has_a_sweep_of_its_own_that_begins_with_everything() {
        let none = Lists::default();
        assert_eq!(labels(&none, System::Mae, None), ["0 - -", "0.25 - -", "0.5 - -", "0.75 - -", "0.9 - -"]);
        assert_eq!(labels(&none, System::MaskedKd, None), ["k196 - -", "k147 - -", "k98 - -", "k49 - -"]);
        let dmae = ["0 - 9", "0.5 - 9", "0.75 - 9", "0.75 - 3", "0.75 - 6", "0.75 - 12"];
        assert_eq!(labels(&none, System::Dmae, Some((9, 12))), dmae);
        assert_eq!(labels(&none, System::Dmjd, None), ["0 1 -", "0.75 1 -", "0.75 2 -", "0.75 3 -", "0.5 2 -"]);
        assert_eq!(labels(&none, System::TinyMim, Some((12, 12))), ["0 - 12", "0.5 - 12", "0.75 - 12", "0 - 3", "0 - 6", "0 - 9"]);
    }

    #[test]
    fn what_is_typed_is_swept_and_nothing_else_beside_everything() {
        let ratios = Lists { mask_ratio: Some(vec![0.6, 0.0]), ..Lists::default() };
        assert_eq!(labels(&ratios, System::Mae, None), ["0 - -", "0.6 - -"]);
        assert_eq!(labels(&ratios, System::Dmae, Some((9, 12))), ["0 - 9", "0.6 - 9"]);
        assert_eq!(labels(&ratios, System::Dmjd, None), ["0 1 -", "0.6 2 -"]);
        let both = Lists { keep: Some(vec![10, 20]), teacher_blocks: Some(vec![2, 4]), ..Lists::default() };
        assert_eq!(labels(&both, System::TinyMim, Some((12, 12))), ["0 - 12", "k10 - 2", "k20 - 2", "k10 - 4", "k20 - 4"]);
        let views = Lists { views: Some(vec![4]), ..Lists::default() };
        assert_eq!(labels(&views, System::Dmjd, None), ["0 1 -", "0.75 4 -"]);
    }
}
