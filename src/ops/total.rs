//! The weighted sum of losses.
//!
//!   y = w_1 l_1 + .. + w_n l_n,   dl_i = w_i dy
//!
//! Each l is one number, shape []. The sum is taken in f64, on a GPU in f32 (kernels/total.cu).

use super::case::Case;
use super::{loss_of, times_loss_gradient};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::parallel;
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Tensor};
use crate::{by_real, ensure};
use rayon::prelude::*;

impl Var {
    pub fn weighted_sum(terms: &[(f64, &Var)]) -> Result<Var> {
        ensure!(!terms.is_empty(), "weighted_sum: there are no losses to add");
        let first = terms[0].1.value();
        for (_, loss) in terms {
            let loss = loss.value();
            ensure!(
                loss.shape().is_empty() && loss.dtype() == first.dtype(),
                "weighted_sum: a loss is {loss:?} and the first is {first:?}"
            );
        }
        let dtype = first.dtype();
        if let Some(gpu) = first.gpu() {
            return weighted_sum_on(gpu, terms);
        }
        let y = Tensor::scalar(terms.iter().map(|(weight, loss)| weight * loss.value().item()).sum(), dtype)?;
        let losses: Vec<&Var> = terms.iter().map(|(_, loss)| *loss).collect();
        let weights: Vec<f64> = terms.iter().map(|(weight, _)| *weight).collect();
        Var::record_many("weighted_sum", &losses, y, move |dy, need| {
            let share = |(i, &weight): (usize, &f64)| need.give(i, |out| by_real!("weighted_sum", dtype, put(out, weight * dy.item())));
            weights.iter().enumerate().map(share).collect()
        })
    }
}

fn weighted_sum_on(gpu: &Gpu, terms: &[(f64, &Var)]) -> Result<Var> {
    let mut y = Tensor::zeros_on(&Device::Gpu(gpu.clone()), &[], Dtype::F32)?;
    for (weight, loss) in terms {
        gpu.launch("add_scaled_scalar", Launch::new(1, 1), Args::new().out(&mut y).input(loss.value()).float(*weight))?;
    }
    let losses: Vec<&Var> = terms.iter().map(|(_, loss)| *loss).collect();
    let weights: Vec<f64> = terms.iter().map(|(weight, _)| *weight).collect();
    let gpu = gpu.clone();
    Var::record_many("weighted_sum", &losses, y, move |dy, need| {
        let share = |(i, &weight): (usize, &f64)| {
            need.give(i, |out| {
                out.clear()?;
                gpu.launch("add_scaled_scalar", Launch::new(1, 1), Args::new().out(out).input(&dy).float(weight))
            })
        };
        weights.iter().enumerate().map(share).collect()
    })
}

fn put<T: crate::device::simd::Real + crate::tensor::Element>(out: &mut Tensor, value: f64) -> Result<()> {
    out.fill(T::of(value));
    Ok(())
}

/// The sum of the numbers that `f(first row, numbers)` writes, one a row of `columns` elements: rows in parallel, then in order.
pub(crate) fn sum_of_rows(rows: usize, columns: usize, f: impl Fn(usize, &mut [f64]) + Sync + Send) -> f64 {
    let mut sums = vec![0.0; rows];
    let piece = parallel::rows_per_piece(columns);
    sums.par_chunks_mut(piece).enumerate().for_each(|(i, sums)| f(i * piece, sums));
    sums.iter().sum()
}

/// What a loss compares x with, on x's device: f32, or bf16 where x is that too. On the CPU of x's own type.
pub(crate) fn constant_for(x: &Tensor, constant: &Tensor) -> Result<Tensor> {
    let dtype = match (x.gpu(), x.dtype(), constant.dtype()) {
        (None, dtype, _) => dtype,
        (Some(_), Dtype::Bf16, Dtype::Bf16) => Dtype::Bf16,
        (Some(_), ..) => Dtype::F32,
    };
    constant.cast(dtype)?.on(&x.device())
}

/// A loss on a GPU as its kernel makes it: partial sums of the loss, and the gradient of x for an upstream gradient of 1, if one will be wanted.
pub(crate) struct Parts {
    pub partial: Tensor,
    pub gradient: Option<Tensor>,
}

impl Parts {
    pub(crate) fn new(x: &Var, blocks: usize) -> Result<Self> {
        let value = x.value();
        let gradient = if x.tracked() { Some(value.alike(value.shape(), value.dtype())?) } else { None };
        Ok(Self { partial: value.alike(&[blocks], Dtype::F32)?, gradient })
    }

    pub(crate) fn finish(self, gpu: &Gpu) -> Result<Made> {
        Ok(Made { gpu: gpu.clone(), loss: loss_of(gpu, &self.partial, 1.0)?, gradient: self.gradient })
    }
}

/// A loss on a GPU, and the gradient that came with it.
pub(crate) struct Made {
    gpu: Gpu,
    pub loss: Tensor,
    gradient: Option<Tensor>,
}

impl Made {
    /// What the loss's backward answers.
    pub(crate) fn backward(self, dy: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([self.gradient.map(|gradient| times_loss_gradient(&self.gpu, gradient, dy)).transpose()?])
    }
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("weighted_sum: three losses", &[&[], &[], &[]], |x| Var::weighted_sum(&[(1.0, &x[0]), (-0.5, &x[1]), (0.0, &x[2])]))
            .vectors(&[0, 1, 2]),
        Case::new("weighted_sum: one loss twice", &[&[]], |x| Var::weighted_sum(&[(0.25, &x[0]), (2.0, &x[0])])).vectors(&[0]),
    ]
}
