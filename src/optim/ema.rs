//! A running average of a model's values, for evaluation.
//!
//!   ema = d ema + (1 - d) w   for everything in the state dict, buffers too; it starts as a copy

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
        let mut ema = Self { decay, set: params.set(), values };
        by_real!("average", params.dtype(), both(&mut ema, params, |ema, w| ema.copy_from_slice(w)))?;
        Ok(ema)
    }

    /// Takes in the values after a step.
    pub fn update(&mut self, params: &mut Params) -> Result<()> {
        let rest = 1.0 - self.decay;
        by_real!("average", params.dtype(), both(self, params, |ema, w| mix(ema, w, rest)))
    }

    /// Exchanges the average and the model's values; a second call puts them back.
    pub fn swap(&mut self, params: &mut Params) -> Result<()> {
        by_real!("average", params.dtype(), both(self, params, |ema, w| ema.swap_with_slice(w)))
    }
}

/// Gives `f` the average and the values, each as one slice.
fn both<T: Element>(ema: &mut Ema, params: &mut Params, f: impl FnOnce(&mut [T], &mut [T])) -> Result<()> {
    ensure!(ema.set == params.set(), "an average belongs to the model it was made from");
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
