//! Steps of one rank that exchanges nothing: the time of each part, and when each bucket of gradients is complete.
//!
//! On a GPU the parts are those of steps as they come, in which the host waits for the device at the end of each part and of each bucket; their times are then
//! shortened alike, so that their sum is the time of a step that is recorded and replayed, as training takes it.

use super::model::{Bucket, Holds, Work};
use crate::device::ranks::Ranks;
use crate::ensure;
use crate::error::Result;
use crate::measure::Times;
use crate::measure::subject::{Point, Subject, SubjectArgs};
use crate::methods::{Batch, Method};
use crate::optim::adamw::AdamW;
use crate::optim::{Optimizer, clip};
use crate::param::ParamId;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::{Device, Dtype};
use crate::train::exchange::{Exchange, ExchangeOptions, Way, deal};
use crate::train::step::{Step, StepOptions};
use std::collections::HashMap;
use std::time::Instant;

pub const LEARNING_RATE: f64 = 1e-4;

/// One rank's model, and what it trains on.
pub struct Alone {
    method: Box<dyn Method>,
    optimizer: AdamW,
    batch: Batch,
    device: Device,
    rng: Rng,
    steps: u64,
}

/// A step, in milliseconds.
pub struct Taken {
    pub forward: f64,
    pub backward: f64,
    pub update: f64,
    /// Of each bucket, as a part of the backward pass.
    pub ready: Vec<f64>,
}

impl Taken {
    pub fn step(&self) -> f64 {
        self.forward + self.backward + self.update
    }
}

/// Steps that were counted, and the model that took them.
pub struct Profile {
    /// Medians.
    pub work: Work,
    pub step: Times,
    pub forward: Times,
    pub backward: Times,
    pub update: Times,
    pub holds: Holds,
    /// Trained parameters and how many numbers each has.
    pub sizes: Vec<(ParamId, usize)>,
    pub device: String,
    /// Whether the sum of the parts is that of a recorded step.
    pub recorded: bool,
}

/// The share of the rank that has most of the trained numbers.
pub fn share(sizes: &[(ParamId, usize)], ranks: usize) -> f64 {
    let owners = deal(sizes, ranks);
    let mut held: HashMap<usize, usize> = HashMap::new();
    for (id, size) in sizes {
        *held.entry(owners[id]).or_default() += size;
    }
    let all: usize = sizes.iter().map(|(_, size)| size).sum();
    held.into_values().max().unwrap_or(0) as f64 / all.max(1) as f64
}

impl Alone {
    pub fn open(subject: &SubjectArgs, point: &Point) -> Result<Self> {
        let mut opened = subject.open(point)?;
        let optimizer = opened.optimizer()?;
        let Subject { method, batch, device, rng } = opened;
        Ok(Self { method, optimizer, batch, device, rng, steps: 0 })
    }

    /// What training sends together.
    pub fn buckets(&mut self, bytes: usize) -> Result<Vec<Vec<ParamId>>> {
        let options = ExchangeOptions { bucket: bytes, way: Way::Host, ..ExchangeOptions::default() };
        let ranks = Ranks::threads(1, options.patience).remove(0);
        let exchange = Exchange::new(ranks, options, self.method.params())?;
        Ok(exchange.buckets().map(<[ParamId]>::to_vec).collect())
    }

    pub fn sizes(&mut self) -> Vec<(ParamId, usize)> {
        let params = self.method.params();
        params.trained().map(|id| (id, params.value(id).numel())).collect()
    }

    fn holds(&mut self) -> Holds {
        let params = self.method.params();
        let all: usize = params.ids().map(|id| params.value(id).numel()).sum();
        let trained = params.count_trained();
        // On a GPU bf16 has a working copy of its own.
        let copy = if params.device().gpu().is_some() && params.precision() == Dtype::Bf16 { 2 * all } else { 0 };
        Holds { values: 4 * all + copy, gradients: 4 * trained, optimizer: 4 * trained * self.optimizer.state().names().len() }
    }

    /// A step, of which each bucket says when it is complete.
    pub fn step(&mut self, buckets: &[Vec<ParamId>]) -> Result<Taken> {
        self.steps += 1;
        let gpu = self.device.gpu().cloned();
        let wait = || gpu.as_ref().map_or(Ok(()), |gpu| gpu.wait());
        let bucket_of: HashMap<ParamId, usize> =
            buckets.iter().enumerate().flat_map(|(at, ids)| ids.iter().map(move |&id| (id, at))).collect();
        let mut missing: Vec<usize> = buckets.iter().map(Vec::len).collect();
        let mut done: Vec<Option<f64>> = vec![None; buckets.len()];
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;

        self.method.params().clear_gradients();
        wait()?;
        let start = Instant::now();
        let tape = Tape::new();
        let loss = self.method.loss(&tape, &self.batch, &self.rng.at(self.steps))?.total;
        wait()?;
        let forward = ms(start);
        let start = Instant::now();
        tape.backward_telling(&loss, self.method.params(), &mut |_, id| {
            let Some(&at) = bucket_of.get(&id) else { return Ok(()) };
            missing[at] = missing[at].saturating_sub(1);
            if missing[at] == 0 {
                wait()?;
                done[at] = Some(ms(start));
            }
            Ok(())
        })?;
        wait()?;
        let backward = ms(start);
        let start = Instant::now();
        let loss = loss.value().read()?[0];
        let norm = clip::gradient_norm(self.method.params())?;
        ensure!(loss.is_finite() && norm.is_finite(), "the loss of a step is {loss} and its gradient's length {norm}; nothing was learned");
        self.optimizer.step(self.method.params(), LEARNING_RATE)?;
        wait()?;
        let update = ms(start);
        // What has no gradient is sent when the pass is over.
        let ready = done.into_iter().map(|at| at.map_or(1.0, |at| (at / backward).min(1.0))).collect();
        Ok(Taken { forward, backward, update, ready })
    }

    /// Milliseconds of a step that is recorded and replayed, on a GPU.
    fn replayed(self, steps: usize) -> Result<Vec<f64>> {
        let Self { method, optimizer, batch, device, rng, steps: before } = self;
        let Some(gpu) = device.gpu().cloned() else { return Ok(Vec::new()) };
        let mut step = Step::new(method, Box::new(optimizer), StepOptions::default());
        let mut number = before;
        let mut next = || {
            number += 1;
            rng.at(number)
        };
        while !step.is_recorded() {
            step.run(&batch, &next(), LEARNING_RATE)?;
        }
        (0..steps).map(|_| gpu.time(|| step.run(&batch, &next(), LEARNING_RATE).map(|_| ()))).collect()
    }
}

/// Some parts of steps as one: of each part the median.
pub fn medians<'a>(taken: impl Iterator<Item = &'a Taken> + Clone, sizes: &[usize]) -> Work {
    let of = |f: &dyn Fn(&Taken) -> f64| Times::of(taken.clone().map(f).collect()).median;
    let ready = |at: usize| of(&|taken| taken.ready[at]);
    let buckets = sizes.iter().enumerate().map(|(at, &numbers)| Bucket { ready: ready(at), numbers }).collect();
    Work { forward: of(&|taken| taken.forward), backward: of(&|taken| taken.backward), update: of(&|taken| taken.update), buckets }
}

/// How many numbers each bucket has.
pub fn numbers(buckets: &[Vec<ParamId>], sizes: &[(ParamId, usize)]) -> Vec<usize> {
    let size: HashMap<ParamId, usize> = sizes.iter().copied().collect();
    buckets.iter().map(|ids| ids.iter().filter_map(|id| size.get(id)).sum()).collect()
}

/// Measures steps after some that do not count.
pub fn profile(subject: &SubjectArgs, point: &Point, bucket: usize, steps: usize, warmup: usize) -> Result<Profile> {
    let mut alone = Alone::open(subject, point)?;
    let (buckets, sizes) = (alone.buckets(bucket)?, alone.sizes());
    for _ in 0..warmup {
        alone.step(&buckets)?;
    }
    let taken: Vec<Taken> = (0..steps).map(|_| alone.step(&buckets)).collect::<Result<_>>()?;
    let (holds, device) = (alone.holds(), alone.device.gpu().map_or_else(|| "CPU".to_string(), |gpu| gpu.name().to_string()));
    let recorded = alone.device.gpu().is_some();
    let replayed = alone.replayed(steps)?;
    let work = medians(taken.iter(), &numbers(&buckets, &sizes));
    let factor = if recorded { Times::of(replayed.clone()).median / work.step() } else { 1.0 };
    let times = |f: &dyn Fn(&Taken) -> f64| Times::of(taken.iter().map(|taken| factor * f(taken)).collect());
    Ok(Profile {
        work: work.taking([work.forward, work.backward, work.update].map(|part| factor * part)),
        step: if recorded { Times::of(replayed) } else { times(&Taken::step) },
        forward: times(&|taken| taken.forward),
        backward: times(&|taken| taken.backward),
        update: times(&|taken| taken.update),
        holds,
        sizes,
        device,
        recorded,
    })
}
