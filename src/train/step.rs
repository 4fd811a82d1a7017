//! One step of training: forward and backward of one or several micro-batches, clip, update.
//!
//! On the CPU each forward and backward is taken as it comes. On a GPU the first two are; the third is recorded, and from then on it is replayed: the host
//! only writes the batch and the random numbers. So a loss there must not ask for what only the device knows, its batches have one shape, and the same
//! parameters get gradients each time. Clip and update are a handful of launches and stay outside: between them and the backward pass the host looks at the
//! loss and at the length of the gradient, and leaves the update out where one of them is not finite.

use super::exchange::{self, Exchange, ExchangeOptions};
use crate::device::gpu::{Gpu, Graph};
use crate::device::ranks::Ranks;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::methods::{Batch, Loss, Method};
use crate::ops::batchnorm::Statistics;
use crate::optim::{Optimizer, clip};
use crate::param::ParamId;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::{Device, Tensor};
use crate::trace;
use std::borrow::Cow;

/// Passes before one is recorded: memory is allocated in the first, and the second shows that nothing more is asked for.
const WARM_UP: usize = 2;

#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// Longest gradient; None switches clipping off.
    pub clip: Option<f64>,
    /// Micro-batches of an update; the loss of each counts for its share.
    pub accumulate: usize,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self { clip: None, accumulate: 1 }
    }
}

/// What an update was made of.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// Of each micro-batch, over all ranks, and their mean.
    pub losses: Vec<f64>,
    pub loss: f64,
    /// What the loss is the sum of, where it is more than one thing.
    pub parts: Vec<(Cow<'static, str>, f64)>,
    /// Length of the gradient before it was clipped.
    pub norm: f64,
    /// False where loss or gradient were not finite: then no parameter has changed.
    pub taken: bool,
    /// What each rank told the others.
    pub told: Vec<f64>,
}

/// What a forward pass leaves behind: numbers on the device.
struct Seen {
    loss: Tensor,
    parts: Vec<(Cow<'static, str>, Tensor)>,
    statistics: Option<Statistics>,
}

pub struct Step {
    method: Box<dyn Method>,
    optimizer: Box<dyn Optimizer>,
    options: StepOptions,
    /// On a GPU: where each batch is put.
    place: Option<Batch>,
    passes: usize,
    /// Whether passes on a GPU are taken as they come, neither recorded nor replayed.
    eager: bool,
    /// What the last walk gave a gradient.
    reached: Vec<ParamId>,
    recorded: Option<(Graph, Seen)>,
    /// Of the micro-batches since the last update.
    losses: Vec<f64>,
    parts: Vec<(Cow<'static, str>, f64)>,
    /// With the other ranks, if there are any.
    exchange: Option<Exchange>,
}

impl Step {
    pub fn new(method: Box<dyn Method>, optimizer: Box<dyn Optimizer>, options: StepOptions) -> Self {
        let (place, passes, reached, recorded) = (None, 0, Vec::new(), None);
        let (losses, parts) = (Vec::new(), Vec::new());
        Self { method, optimizer, options, place, passes, eager: false, reached, recorded, losses, parts, exchange: None }
    }

    /// The step of one of several ranks, which all have the model of rank 0 from now on. Before the first update.
    pub fn with_ranks(mut self, ranks: &Ranks, options: ExchangeOptions) -> Result<Self> {
        if ranks.is_alone() {
            return Ok(self);
        }
        let exchange = Exchange::new(ranks.clone(), options, self.method.params())?;
        if exchange.is_sharded() {
            self.optimizer.state_mut().keep(|id| exchange.owns(id))?;
        }
        self.exchange = Some(exchange);
        Ok(self)
    }

    /// What joins it to the other ranks.
    pub fn exchange(&self) -> Option<&Exchange> {
        self.exchange.as_ref()
    }

    /// Tells the other ranks that this one ends, and why, before anything of it is taken down, which may take a while.
    pub fn fail(&self, error: &Error) {
        if let Some(exchange) = &self.exchange {
            exchange.ranks().fail(error);
            exchange.give_up(&error.chain());
        }
    }

    /// Compares the parameters of all ranks after so many updates.
    pub fn check_sync(&mut self, update: u64) -> Result<()> {
        let _phase = trace::phase("compare");
        let Some(exchange) = &self.exchange else { return Ok(()) };
        exchange::compare(exchange.ranks(), self.method.params(), &format!("after update {update}"))
    }

    /// Between steps. A recorded pass works on the memory that the parameters have: they must stay on their device, and no others may be trained.
    pub fn method(&mut self) -> &mut dyn Method {
        &mut *self.method
    }

    pub fn optimizer(&mut self) -> &mut dyn Optimizer {
        &mut *self.optimizer
    }

    /// Both, for a checkpoint.
    pub fn method_and_optimizer(&mut self) -> (&mut dyn Method, &mut dyn Optimizer) {
        (&mut *self.method, &mut *self.optimizer)
    }

    pub fn options(&self) -> StepOptions {
        self.options
    }

    /// Whether passes are replayed by now.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// From now on a GPU's passes are taken as they come, as on the CPU, or no longer are: in recorded ones no part can be told from another. Those that come
    /// after a recorded one take memory of their own.
    pub fn set_eager(&mut self, on: bool) {
        self.eager = on;
    }

    /// Takes passes as they come again, and records a new one after them, for a method that has been changed.
    pub fn forget(&mut self) {
        (self.recorded, self.passes) = (None, 0);
        self.reached.clear();
    }

    /// A whole step of one micro-batch.
    pub fn run(&mut self, batch: &Batch, rng: &Rng, lr: f64) -> Result<Outcome> {
        self.add(batch, rng)?;
        self.finish(lr)
    }

    /// Forward and backward of a micro-batch: its gradient is added to what the others since the last update gave. Answers its loss.
    pub fn add(&mut self, batch: &Batch, rng: &Rng) -> Result<f64> {
        ensure!(
            self.losses.len() < self.options.accumulate,
            "a step takes {} micro-batches and then makes its update",
            self.options.accumulate
        );
        let seen = match self.method.params().device().gpu().cloned() {
            None => self.eager(batch, rng)?,
            Some(gpu) => {
                let phase = trace::phase("place");
                let placed = self.place(&gpu, batch)?;
                drop(phase);
                self.on_gpu(&gpu, &placed, rng)?
            }
        };
        let _phase = trace::phase("read");
        self.exchange.as_ref().map_or(Ok(()), Exchange::settle)?;
        let loss = seen.loss.read()?[0];
        if let Some(statistics) = seen.statistics.as_ref().filter(|_| loss.is_finite()) {
            self.method.learn(statistics, batch.images.shape()[0])?;
        }
        let first = self.losses.is_empty();
        self.losses.push(loss);
        if seen.parts.len() > 1 {
            let share = 1.0 / self.options.accumulate as f64;
            let parts = seen.parts.iter().map(|(name, part)| Ok((name.clone(), part.read()?[0] * share))).collect::<Result<Vec<_>>>()?;
            match first {
                true => self.parts = parts,
                false => self.parts.iter_mut().zip(parts).for_each(|(sum, part)| sum.1 += part.1),
            }
        }
        Ok(loss)
    }

    /// Clips what the micro-batches gave and makes the update, if loss and gradient are finite.
    pub fn finish(&mut self, lr: f64) -> Result<Outcome> {
        self.finish_telling(lr, 0.0)
    }

    /// The same, in which each rank tells the others a number.
    pub fn finish_telling(&mut self, lr: f64, mine: f64) -> Result<Outcome> {
        let mut losses = std::mem::take(&mut self.losses);
        ensure!(!losses.is_empty(), "an update needs a micro-batch before it");
        let mut parts = std::mem::take(&mut self.parts);
        let mut told = vec![mine];
        let _phase = trace::phase("update");
        let params = self.method.params();
        if let Some(exchange) = &mut self.exchange {
            let _phase = trace::phase("exchange");
            exchange.finish(params)?;
            exchange.share_statistics(params)?;
            told = mean_of_all(exchange, &mut losses, &mut parts, mine)?;
        }
        let phase = trace::phase("clip");
        let norm = match (self.options.clip, self.exchange.as_ref().filter(|exchange| exchange.is_sharded())) {
            (Some(most), None) => clip::clip(params, most)?,
            (None, None) => clip::gradient_norm(params)?,
            (most, Some(exchange)) => {
                let norm = exchange.whole_norm(clip::gradient_norm(params)?)?;
                most.map_or(Ok(()), |most| clip::limit(params, norm, most))?;
                self.optimizer.whole_length(most.map_or(norm, |most| norm * (most / (norm + 1e-6)).min(1.0)));
                norm
            }
        };
        drop(phase);
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        let taken = loss.is_finite() && norm.is_finite();
        if taken {
            let phase = trace::phase("optimizer");
            self.optimizer.step(params, lr)?;
            drop(phase);
            let _phase = trace::phase("exchange");
            self.exchange.as_ref().map_or(Ok(()), |exchange| exchange.share_values(params))?;
        }
        Ok(Outcome { losses, loss, parts, norm, taken, told })
    }

    /// The part of a loss of one micro-batch that counts in the gradient.
    fn share(&self) -> f64 {
        1.0 / (self.options.accumulate * self.exchange.as_ref().map_or(1, |exchange| exchange.ranks().world())) as f64
    }

    /// Whether this pass is the last before an update.
    fn is_last(&self) -> bool {
        self.losses.len() + 1 == self.options.accumulate
    }

    fn on_gpu(&mut self, gpu: &Gpu, batch: &Batch, rng: &Rng) -> Result<Seen> {
        if self.eager || (self.recorded.is_none() && self.passes < WARM_UP) {
            let seen = self.eager(batch, rng)?;
            self.passes += 1;
            return Ok(seen);
        }
        self.begin()?;
        let (share, micro_batches) = (self.share(), self.options.accumulate);
        let method = &mut *self.method;
        let mut exchange = self.exchange.as_mut().filter(|exchange| exchange.goes_beside(true, true, micro_batches));
        if self.recorded.is_none() {
            if let Some(exchange) = &mut exchange {
                exchange.prepare();
            }
            let recorded = gpu.capture(|| walk(method, batch, rng, share, exchange)).context("recording a step");
            if recorded.is_err() {
                // What could not be recorded begins anew.
                self.passes = 0;
            }
            self.recorded = Some(recorded?);
        }
        self.method.params().assume_gradients(&self.reached)?;
        if let Some(exchange) = &mut self.exchange {
            exchange.prepare();
            if exchange.goes_beside(true, true, micro_batches) {
                exchange.replayed();
            }
        }
        let (graph, seen) = self.recorded.as_ref().expect("recorded above");
        graph.replay(rng)?;
        let parts = seen.parts.clone();
        let statistics = seen.statistics.as_ref().map(|s| Statistics { mean: s.mean.clone(), variance: s.variance.clone() });
        Ok(Seen { loss: seen.loss.clone(), parts, statistics })
    }

    fn eager(&mut self, batch: &Batch, rng: &Rng) -> Result<Seen> {
        self.begin()?;
        let (share, last) = (self.share(), self.is_last());
        let on_gpu = self.method.params().device().gpu().is_some();
        let mut exchange = self.exchange.as_mut();
        if let Some(exchange) = &mut exchange {
            exchange.prepare();
        }
        let exchange = exchange.filter(|exchange| last && exchange.goes_beside(on_gpu, false, 1));
        let seen = walk(&mut *self.method, batch, rng, share, exchange)?;
        self.reached = self.method.params().reached();
        Ok(seen)
    }

    /// Gradients as the first micro-batch of an update finds them: none, so that it writes them; zeros where others are to be added by the same recorded work.
    fn begin(&mut self) -> Result<()> {
        if !self.losses.is_empty() {
            return Ok(());
        }
        let params = self.method.params();
        if self.options.accumulate > 1 && params.device().gpu().is_some() && !self.reached.is_empty() {
            return params.zero_gradients(&self.reached);
        }
        params.clear_gradients();
        Ok(())
    }

    /// The batch where recorded work reads it, always in the same memory.
    fn place(&mut self, gpu: &Gpu, batch: &Batch) -> Result<Batch> {
        if self.place.is_none() {
            let empty = |like: &Tensor| Tensor::empty_on(&Device::Gpu(gpu.clone()), like.shape(), like.dtype());
            let maybe = |like: &Option<Tensor>| like.as_ref().map(empty).transpose();
            self.place = Some(Batch {
                bytes: maybe(&batch.bytes)?,
                teacher_images: maybe(&batch.teacher_images)?,
                teacher_output: maybe(&batch.teacher_output)?,
                targets: maybe(&batch.targets)?,
                ..Batch::of_images(empty(&batch.images)?)
            });
        }
        let own = self.place.as_mut().expect("made above");
        put(gpu, &mut own.images, &batch.images, "images")?;
        for (own, given, what) in [
            (&mut own.bytes, &batch.bytes, "bytes of images"),
            (&mut own.teacher_images, &batch.teacher_images, "images for a teacher"),
            (&mut own.teacher_output, &batch.teacher_output, "answers of a teacher"),
            (&mut own.targets, &batch.targets, "targets"),
        ] {
            match (own, given) {
                (Some(own), Some(given)) => put(gpu, own, given, what)?,
                (None, None) => {}
                _ => crate::bail!("a step on {} is recorded for batches with {what} or for batches without", gpu.name()),
            }
        }
        Ok(Batch { labels: batch.labels.clone(), keys: batch.keys.clone(), ..own.clone() })
    }
}

/// Losses and their parts become means over the ranks; answers what each rank tells.
fn mean_of_all(exchange: &Exchange, losses: &mut [f64], parts: &mut [(Cow<'static, str>, f64)], mine: f64) -> Result<Vec<f64>> {
    let own = losses.iter().copied().chain(parts.iter().map(|(_, part)| *part)).chain([mine]);
    let bytes: Vec<u8> = own.flat_map(f64::to_le_bytes).collect();
    let all = exchange.ranks().gather(&exchange.losses(), &bytes)?;
    let number = |bytes: &[u8], at: usize| bytes.as_chunks::<8>().0.get(at).map_or(f64::NAN, |word| f64::from_le_bytes(*word));
    let mean = |at: usize| all.iter().map(|bytes| number(bytes, at)).sum::<f64>() / all.len() as f64;
    let count = losses.len();
    losses.iter_mut().enumerate().for_each(|(i, loss)| *loss = mean(i));
    parts.iter_mut().enumerate().for_each(|(i, (_, part))| *part = mean(count + i));
    Ok(all.iter().map(|bytes| number(bytes, count + parts.len())).collect())
}

fn put(gpu: &Gpu, own: &mut Tensor, given: &Tensor, what: &str) -> Result<()> {
    ensure!(
        given.gpu().is_none_or(|of| of == gpu),
        "a step on {} cannot take {what} that are on another device, {}",
        gpu.name(),
        given.device()
    );
    ensure!(
        own.shape() == given.shape() && own.dtype() == given.dtype(),
        "a step on {} is recorded for one shape of batches: it takes {} {:?}, not {} {:?}",
        gpu.name(),
        own.dtype(),
        own.shape(),
        given.dtype(),
        given.shape()
    );
    if given.gpu().is_some() { own.copy_from(given) } else { own.upload(given) }
}

/// Forward and backward, the loss counting for its share; gradients go round as soon as they are complete where there is an exchange.
fn walk(method: &mut dyn Method, batch: &Batch, rng: &Rng, share: f64, exchange: Option<&mut Exchange>) -> Result<Seen> {
    let tape = Tape::new();
    let forward = trace::phase("forward");
    let Loss { total, parts, statistics } = method.loss(&tape, batch, rng)?;
    drop(forward);
    let loss = total.value().clone();
    let share = if share < 1.0 { total.scale(share)? } else { total };
    let _phase = trace::phase("backward");
    match exchange {
        None => tape.backward(&share, &mut [method.params()])?,
        Some(exchange) => {
            let gradients = tape.backward_telling(&share, method.params(), &mut |params, id| exchange.ready(params, id))?;
            exchange.end_pass(method.params())?;
            gradients
        }
    };
    Ok(Seen { loss, parts, statistics })
}
