//! Ranks that are threads of this program, each with its share of the cores: what their exchange costs, predicted and measured.
//!
//! First the collective by itself, at four sizes from a quarter of a bucket to all gradients, which gives the two numbers of a [`Fit`] for each of its calls, and for
//! copying numbers out and back, which a rank does before and after a call. Then steps in
//! turns, in reverse order every other round: one rank computing alone, all at once without an exchange, and with one in each form. A time of several ranks is that
//! of the slowest.
//!
//! The prediction is [`cost`] over the fitted calls, and the copies of all gradients (half as much again where values are gathered too) and one call without
//! numbers, for the losses, on top; from the parts of a step alone and of one taken while the others are busy. It takes the exchange to hide behind
//! the backward pass; where every core computes, summing takes its time from computing, and less is hidden than that.

use super::alone::{Alone, LEARNING_RATE, Taken, medians, numbers, share};
use super::model::{Bucket, Cost, Fit, Fits, Form, Work, cost};
use crate::device::parallel;
use crate::device::ranks::{Ranks, Wire};
use crate::ensure;
use crate::error::{Error, Result};
use crate::measure::subject::{Point, Subject, SubjectArgs};
use crate::measure::{Times, timed};
use crate::methods::Batch;
use crate::param::ParamId;
use crate::rng::Rng;
use crate::train::exchange::{ExchangeOptions, Way};
use crate::train::step::{Step, StepOptions};
use std::collections::BTreeSet;
use std::hint::black_box;
use std::ops::Range;
use std::time::Duration;

/// How ranks are measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub wire: Wire,
    /// Bytes of a bucket.
    pub bucket: usize,
    pub rounds: usize,
    pub warmup: usize,
}

/// A form of the exchange, beside what was predicted of it.
pub struct Row {
    pub form: Form,
    /// From a step that one rank takes while the others wait, and while they are busy.
    pub predicted: [Cost; 2],
    pub measured: Times,
    /// Beyond a step without an exchange in the same round.
    pub exposed: Times,
    /// Measured over the second prediction.
    pub ratio: Times,
}

pub struct Together {
    pub ranks: usize,
    /// Of each rank.
    pub threads: usize,
    /// All-reduce, reduce-scatter, all-gather.
    pub fits: Fits,
    /// Numbers that are copied out of where they lie, and back.
    pub copies: Fit,
    /// Bytes of all gradients as they are sent, and in how many buckets.
    pub bytes: usize,
    pub buckets: usize,
    /// Steps without an exchange: of one rank while the others wait, and of all at once.
    pub alone: Times,
    pub busy: Times,
    pub rows: Vec<Row>,
}

/// Steps of a round: no exchange twice, then the forms.
const FORMS: [(bool, bool); 3] = [(true, false), (false, false), SHARDED];
const SHARDED: (bool, bool) = (true, true);
/// How often each size is sent.
const SENDS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(600);
/// A bucket of everything.
const WHOLE: usize = usize::MAX;

/// Without overlap everything goes in one bucket, behind the pass.
fn options(plan: Plan, (overlap, shard): (bool, bool)) -> ExchangeOptions {
    let bucket = if overlap { plan.bucket } else { WHOLE };
    ExchangeOptions { wire: plan.wire, bucket, shard, way: Way::Host, patience: PATIENCE }
}

/// Measures so many ranks.
pub fn measure(subject: &SubjectArgs, point: &Point, ranks: usize, plan: Plan) -> Result<Together> {
    let threads = (parallel::threads() / ranks).max(1);
    let group = Ranks::threads(ranks, PATIENCE);
    let run = |own: Ranks| -> Result<Option<Together>> {
        let measured = parallel::on_threads(threads, || Rank::open(subject, point, own.clone(), plan, threads)?.measure()).flatten();
        // Whoever still waits for this rank is told why it does not come.
        measured.inspect_err(|error| own.fail(error))
    };
    let all: Vec<Result<Option<Together>>> = std::thread::scope(|scope| {
        let running: Vec<_> = group.into_iter().map(|own| scope.spawn(|| run(own))).collect();
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(Error::new("a rank of the measurement panicked")))).collect()
    });
    let first = all.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().next();
    first.ok_or_else(|| Error::new("no rank answered with a measurement"))
}

/// A rank's models: one that exchanges nothing, and one for each form.
struct Rank {
    ranks: Ranks,
    plan: Plan,
    threads: usize,
    alone: Alone,
    forms: Vec<Step>,
    batch: Batch,
    rng: Rng,
    steps: u64,
}

/// What a round gives: the parts of steps alone and of busy ones, and times of the forms.
struct Round {
    alone: Taken,
    busy: Taken,
    forms: [f64; FORMS.len()],
}

impl Rank {
    fn open(subject: &SubjectArgs, point: &Point, ranks: Ranks, plan: Plan, threads: usize) -> Result<Self> {
        let step = |form: (bool, bool)| -> Result<Step> {
            let mut opened = subject.open(point)?;
            let optimizer = opened.optimizer()?;
            Step::new(opened.method, Box::new(optimizer), StepOptions::default()).with_ranks(&ranks, options(plan, form))
        };
        let forms = FORMS.into_iter().map(step).collect::<Result<_>>()?;
        let Subject { batch, rng, .. } = subject.open(point)?;
        let alone = Alone::open(subject, point)?;
        Ok(Self { ranks, plan, threads, alone, forms, batch, rng, steps: 0 })
    }

    /// The greatest of all ranks' numbers.
    fn slowest(&self, ms: f64) -> Result<f64> {
        let all = self.ranks.gather_numbers("times", [ms])?;
        Ok(all.into_iter().map(|[ms]| ms).fold(0.0, f64::max))
    }

    /// The calls of an exchange by themselves.
    fn fits(&self, numbers: usize) -> Result<(Fits, Fit)> {
        let (world, wire) = (self.ranks.world(), self.plan.wire);
        let bucket = (self.plan.bucket / Wire::F32.bytes()).min(numbers);
        let sizes: BTreeSet<usize> = [bucket / 4, bucket, bucket.midpoint(numbers), numbers].map(|size| size.max(world)).into();
        let mut points: [Vec<(f64, f64)>; 4] = Default::default();
        for size in sizes {
            let parts: Vec<Range<usize>> = (0..world).map(|rank| size * rank / world..size * (rank + 1) / world).collect();
            let mut data = vec![1.0; size];
            for (call, points) in points.iter_mut().enumerate() {
                let mut times = Vec::new();
                for _ in 0..=SENDS {
                    self.ranks.barrier("a call that is timed")?;
                    let (ms, done) = timed(|| match call {
                        0 => self.ranks.sum("numbers", &mut data, wire),
                        1 => self.ranks.sum_parts("numbers", &mut data, &parts, wire),
                        2 => self.ranks.share_parts("numbers", &mut data, &parts),
                        _ => {
                            let out = black_box(data.to_vec());
                            data.copy_from_slice(&out);
                            Ok(())
                        }
                    });
                    done?;
                    times.push(self.slowest(ms)?);
                }
                let bytes = size * if call < 2 { wire.bytes() } else { Wire::F32.bytes() };
                points.push((bytes as f64, Times::of(times.split_off(1)).median));
            }
        }
        let [sum, parts, share, copies] = points.each_ref().map(|points| Fit::of(points));
        Ok((Fits([sum, parts, share]), copies))
    }

    /// A step without an exchange, of one rank or of all.
    fn unjoined(&mut self, all: bool, buckets: &[Vec<ParamId>]) -> Result<Taken> {
        self.ranks.barrier("a step without an exchange")?;
        let mut taken = match all || self.ranks.is_first() {
            true => self.alone.step(buckets)?,
            false => Taken { forward: 0.0, backward: 0.0, update: 0.0, ready: vec![0.0; buckets.len()] },
        };
        // The parts of the slowest: those of one rank, lengthened alike.
        let (own, slowest) = (taken.step(), self.slowest(taken.step())?);
        let factor = if own > 0.0 { slowest / own } else { 1.0 };
        [&mut taken.forward, &mut taken.backward, &mut taken.update].into_iter().for_each(|part| *part *= factor);
        Ok(taken)
    }

    fn joined(&mut self, at: usize) -> Result<f64> {
        self.steps += 1;
        let rng = self.rng.at(self.steps);
        let step = &mut self.forms[at];
        self.ranks.barrier("a step with an exchange")?;
        let (ms, outcome) = timed(|| step.run(&self.batch, &rng, LEARNING_RATE));
        let outcome = outcome?;
        ensure!(outcome.taken, "the loss of a step is {} and its gradient's length {}; nothing was learned", outcome.loss, outcome.norm);
        self.slowest(ms)
    }

    fn round(&mut self, reverse: bool, buckets: &[Vec<ParamId>]) -> Result<Round> {
        let (mut alone, mut busy, mut forms) = (None, None, [0.0; FORMS.len()]);
        let mut order: Vec<usize> = (0..2 + FORMS.len()).collect();
        if reverse {
            order.reverse();
        }
        for at in order {
            match at {
                0 => alone = Some(self.unjoined(false, buckets)?),
                1 => busy = Some(self.unjoined(true, buckets)?),
                at => forms[at - 2] = self.joined(at - 2)?,
            }
        }
        let (alone, busy) = alone.zip(busy).ok_or_else(|| Error::new("a round left a step out"))?;
        Ok(Round { alone, busy, forms })
    }

    /// What rank 0 says of all of them.
    fn measure(mut self) -> Result<Option<Together>> {
        let (buckets, sizes) = (self.alone.buckets(self.plan.bucket)?, self.alone.sizes());
        let all: usize = sizes.iter().map(|(_, size)| size).sum();
        let (fits, copies) = self.fits(all)?;
        let mut rounds = Vec::new();
        for round in 0..self.plan.warmup + self.plan.rounds {
            let taken = self.round(round % 2 == 1, &buckets)?;
            if round >= self.plan.warmup {
                rounds.push(taken);
            }
        }
        if !self.ranks.is_first() {
            return Ok(None);
        }
        let times = |f: &dyn Fn(&Round) -> f64| Times::of(rounds.iter().map(f).collect());
        let sizes_of = numbers(&buckets, &sizes);
        let works =
            [medians(rounds.iter().map(|round| &round.alone), &sizes_of), medians(rounds.iter().map(|round| &round.busy), &sizes_of)];
        let share = share(&sizes, self.ranks.world());
        let row = |(at, &which): (usize, &(bool, bool))| {
            let form = Form { overlap: which.0, sharded: which.1, wire: self.plan.wire };
            let more = copies.at((all * Wire::F32.bytes()) as f64) * if form.sharded { 1.5 } else { 1.0 } + fits.0[0].start;
            let predicted = works.each_ref().map(|work| {
                let Cost { exchange, exposed, step } = cost(&as_sent(work, form), &fits, form, share);
                Cost { exchange: exchange + more, exposed: exposed + more, step: step + more }
            });
            Row {
                form,
                predicted,
                measured: times(&|round| round.forms[at]),
                exposed: times(&|round| round.forms[at] - round.busy.step()),
                ratio: times(&|round| round.forms[at] / predicted[1].step),
            }
        };
        Ok(Some(Together {
            ranks: self.ranks.world(),
            threads: self.threads,
            fits,
            copies,
            bytes: all * self.plan.wire.bytes(),
            buckets: buckets.len(),
            alone: times(&|round| round.alone.step()),
            busy: times(&|round| round.busy.step()),
            rows: FORMS.iter().enumerate().map(row).collect(),
        }))
    }
}

/// Without overlap everything goes in one bucket.
fn as_sent(work: &Work, form: Form) -> Work {
    let buckets = if form.overlap { work.buckets.clone() } else { vec![Bucket { ready: 1.0, numbers: work.numbers() }] };
    Work { buckets, ..work.clone() }
}
