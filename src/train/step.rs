//! One step of training: forward, backward, clip, update.
//!
//! On the CPU each step is taken as it comes. On a GPU the first two are; the third is recorded, and from then on it is replayed: the host only writes the
//! images, the random numbers and the numbers of the update. So a step there must not ask for what only the device knows, its batches have one shape, and the
//! same parameters get gradients each time.

use crate::device::gpu::{Gpu, Graph};
use crate::ensure;
use crate::error::{Context, Result};
use crate::methods::{Batch, Method};
use crate::optim::{Optimizer, clip};
use crate::param::ParamId;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::{Device, Tensor};

/// Steps before one is recorded: memory is allocated in the first, and the second shows that nothing more is asked for.
const WARM_UP: usize = 2;

#[derive(Clone, Copy, Debug, Default)]
pub struct StepOptions {
    /// Longest gradient; None switches clipping off.
    pub clip: Option<f64>,
}

pub struct Step {
    method: Box<dyn Method>,
    optimizer: Box<dyn Optimizer>,
    options: StepOptions,
    /// On a GPU: where each batch is put.
    images: Option<Tensor>,
    taken: usize,
    /// What the last walk gave a gradient.
    reached: Vec<ParamId>,
    norm: Option<Tensor>,
    recorded: Option<(Graph, Tensor)>,
}

impl Step {
    pub fn new(method: Box<dyn Method>, optimizer: Box<dyn Optimizer>, options: StepOptions) -> Self {
        Self { method, optimizer, options, images: None, taken: 0, reached: Vec::new(), norm: None, recorded: None }
    }

    /// Between steps. A recorded step works on the memory that the parameters have: they must stay on their device, and no others may be trained.
    pub fn method(&mut self) -> &mut dyn Method {
        &mut *self.method
    }

    pub fn optimizer(&mut self) -> &mut dyn Optimizer {
        &mut *self.optimizer
    }

    /// Whether steps are replayed by now.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// Length of the last step's gradient before it was clipped, one number on the device; None without clipping. To be read before the next step.
    pub fn norm(&self) -> Option<&Tensor> {
        self.norm.as_ref()
    }

    /// Takes a step and answers the loss, one number on the device. To be read before the next step, which on a GPU writes the same memory.
    pub fn run(&mut self, batch: &Batch, rng: &Rng, lr: f64) -> Result<Tensor> {
        match self.method.params().device().gpu().cloned() {
            None => self.eager(batch, rng, lr),
            Some(gpu) => {
                let placed = self.place(&gpu, batch)?;
                self.run_on(&gpu, placed, rng, lr)
            }
        }
    }

    fn run_on(&mut self, gpu: &Gpu, batch: Batch, rng: &Rng, lr: f64) -> Result<Tensor> {
        if self.recorded.is_none() && self.taken < WARM_UP {
            let loss = self.eager(&batch, rng, lr)?;
            self.taken += 1;
            return Ok(loss);
        }
        // The host's half of the update comes first; what has a gradient is what had one after the last walk.
        let params = self.method.params();
        params.assume_gradients(&self.reached)?;
        self.optimizer.prepare(params, lr)?;
        let done = self.replay(gpu, &batch, rng);
        if done.is_err() {
            self.optimizer.withdraw();
            // What could not be recorded begins anew.
            self.taken = 0;
        }
        done
    }

    /// The update is prepared; records the step if it is not yet.
    fn replay(&mut self, gpu: &Gpu, batch: &Batch, rng: &Rng) -> Result<Tensor> {
        if self.recorded.is_none() {
            let (method, optimizer, options) = (&mut *self.method, &mut *self.optimizer, self.options);
            let (graph, (loss, norm)) = gpu
                .capture(|| {
                    let walked = walk(method, batch, rng, options)?;
                    optimizer.apply(method.params())?;
                    Ok(walked)
                })
                .context("recording a step")?;
            (self.recorded, self.norm) = (Some((graph, loss)), norm);
        }
        let (graph, loss) = self.recorded.as_ref().expect("recorded above");
        graph.replay(rng)?;
        Ok(loss.clone())
    }

    fn eager(&mut self, batch: &Batch, rng: &Rng, lr: f64) -> Result<Tensor> {
        let (loss, norm) = walk(&mut *self.method, batch, rng, self.options)?;
        let params = self.method.params();
        self.optimizer.step(params, lr)?;
        (self.reached, self.norm) = (params.reached(), norm);
        Ok(loss)
    }

    /// The batch where recorded work reads it, always in the same memory.
    fn place(&mut self, gpu: &Gpu, batch: &Batch) -> Result<Batch> {
        let images = &batch.images;
        ensure!(
            images.gpu().is_none_or(|of| of == gpu),
            "a step on {} cannot take images that are on another device, {}",
            gpu.name(),
            images.device()
        );
        let own = match &mut self.images {
            Some(own) => own,
            none => none.insert(Tensor::empty_on(&Device::Gpu(gpu.clone()), images.shape(), images.dtype())?),
        };
        ensure!(
            own.shape() == images.shape() && own.dtype() == images.dtype(),
            "a step on {} is recorded for one shape of batches: it takes {} {:?}, not {} {:?}",
            gpu.name(),
            own.dtype(),
            own.shape(),
            images.dtype(),
            images.shape()
        );
        if images.gpu().is_some() {
            own.copy_from(images)?
        } else {
            own.upload(images)?
        }
        Ok(Batch { images: own.clone() })
    }
}

/// Forward, backward and clip: the loss, and the length of the gradient where it is clipped.
fn walk(method: &mut dyn Method, batch: &Batch, rng: &Rng, options: StepOptions) -> Result<(Tensor, Option<Tensor>)> {
    method.params().clear_gradients();
    let tape = Tape::new();
    let loss = method.loss(&tape, batch, rng)?.total;
    let params = method.params();
    tape.backward(&loss, &mut [params])?;
    let norm = options.clip.map(|most| clip::clip_on_device(params, most)).transpose()?;
    Ok((loss.value().clone(), norm))
}
