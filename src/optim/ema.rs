//! A running average of a model's values, for evaluation.
//!
//!   ema = d ema + (1 - d) w   for everything in the state dict, buffers too; it starts as a copy
//!
//! GPU: kernels/ema.cu.

use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::parallel;
use crate::device::simd::Real;
use crate::error::{Error, Result};
use crate::param::Params;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};

pub struct Ema {
    decay: f64,
    set: u64,
    /// Laid out like the values of the model.
    values: Vec<Tensor>,
}

impl Ema {
    pub fn new(params: &mut Params, decay: f64) -> Result<Self> {
        ensure!((0.0..=1.0).contains(&decay), "an average with a decay of {decay}: it must be in [0, 1]");
        let values = Tensor::slab(params.device(), params.ids().map(|id| params.value(id).shape()), params.dtype())?;
        let copied = values.into_iter().zip(params.ids()).map(|(own, id)| own.replace(params.value(id)));
        Ok(Self { decay, set: params.set(), values: copied.collect::<Result<_>>()? })
    }

    /// The averages, in the order of the parameters.
    pub fn values(&self) -> &[Tensor] {
        &self.values
    }

    /// Puts averages of an earlier time back.
    pub fn restore(&mut self, values: &[Tensor]) -> Result<()> {
        ensure!(values.len() == self.values.len(), "an average of {} tensors is given {}", self.values.len(), values.len());
        self.values.iter_mut().zip(values).try_for_each(|(own, value)| own.upload(value))
    }

    /// Takes in the values after a step.
    pub fn update(&mut self, params: &mut Params) -> Result<()> {
        let rest = 1.0 - self.decay;
        match params.device().gpu().cloned() {
            None => by_real!("average", params.dtype(), both(self, params, |ema, w| mix(ema, w, rest))),
            Some(gpu) => both_on(&gpu, "ema_f32", self, params, |args| args.float(rest)),
        }
    }

    /// Exchanges the average and the model's values; a second call puts them back.
    pub fn swap(&mut self, params: &mut Params) -> Result<()> {
        match params.device().gpu().cloned() {
            None => by_real!("average", params.dtype(), both(self, params, |ema, w| ema.swap_with_slice(w))),
            Some(gpu) => {
                both_on(&gpu, "ema_swap_f32", self, params, |args| args)?;
                params.refresh()
            }
        }
    }

    fn belongs_to(&self, params: &Params) -> Result<()> {
        let here = self.values.first().is_none_or(|own| own.device() == *params.device());
        ensure!(self.set == params.set() && here, "an average belongs to the model it was made from, on the device it was made on");
        Ok(())
    }
}

/// Launches a kernel over the average and the values; `more` gives what it takes behind their length.
fn both_on(gpu: &Gpu, kernel: &str, ema: &mut Ema, params: &mut Params, more: impl FnOnce(Args) -> Args) -> Result<()> {
    ema.belongs_to(params)?;
    let mut values = params.flat_values()?;
    let mut average = Tensor::flat(&mut ema.values).ok_or_else(|| Error::new("the average is empty"))?;
    let n = values.len;
    gpu.launch(kernel, Launch::elements(n, 8), more(Args::new().out(&mut average).out(&mut values).long(n)))
}

/// Gives `f` the average and the values, each as one slice.
fn both<T: Element>(ema: &mut Ema, params: &mut Params, f: impl FnOnce(&mut [T], &mut [T])) -> Result<()> {
    ema.belongs_to(params)?;
    let whole = params.with_flat_values(|w| Tensor::with_flat(&mut ema.values, |ema| f(ema, w)))?;
    whole.ok_or_else(|| Error::new("the average is empty"))
}

fn mix<T: Real>(ema: &mut [T], w: &[T], rest: f64) {
    vectorised! {
        fn approach<T: Real>(ema: &mut [T], w: &[T], rest: T) {
            // In this form a value that never changes is its own average to the last bit.
            ema.iter_mut().zip(w).for_each(|(ema, &w)| *ema = rest.mul_add(w - *ema, *ema));
        }
    }
    parallel::rows(ema, 1, |first, ema| approach(ema, &w[first..first + ema.len()], T::of(rest)));
}
