//! Distance between features and constant ones.
//!
//!   loss = sum_r w[r] mean_C f(x[r] - t[r]) / sum(w),   dx[r] = w[r] f'(x[r] - t[r]) / (C sum(w))
//!   L1         f(d) = |d|,   f'(d) = sign(d), 0 at 0
//!   L2         f(d) = d^2
//!   smooth L1  f(d) = d^2 / (2 beta) where |d| < beta, else |d| - beta / 2
//!
//! x, t [.., C]; w [..], or all rows count alike: then it is the mean over all elements. Rows with w = 0 are not read and their gradient is 0.
//! Saved: x, t, w; on a GPU the gradient, which its kernel (kernels/feature_loss.cu) makes together with the loss. Weights that are on a GPU already
//! cannot be looked at: if they sum to 0, loss and gradient are 0.

use super::case::{Case, numbers};
use super::loss_of;
use super::total::{Made, Parts, constant_for, sum_of_rows};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Distance {
    L1,
    L2,
    SmoothL1 { beta: f64 },
}

impl Var {
    /// The mean over all elements.
    pub fn feature_loss(&self, target: &Tensor, distance: Distance) -> Result<Var> {
        self.distance(target, distance, None)
    }

    /// The mean over the rows with weight 1; in general the weighted mean of the rows.
    pub fn feature_loss_at(&self, target: &Tensor, distance: Distance, weights: &Tensor) -> Result<Var> {
        self.distance(target, distance, Some(weights))
    }

    fn distance(&self, target: &Tensor, distance: Distance, weights: Option<&Tensor>) -> Result<Var> {
        let x = self.value().clone();
        ensure!(target.shape() == x.shape() && x.numel() > 0, "feature_loss: the target is {target:?} but x is {x:?}");
        if let Distance::SmoothL1 { beta } = distance {
            ensure!((f64::MIN_POSITIVE..).contains(&beta), "feature_loss: beta is {beta} but must be above 0; L1 is the limit");
        }
        if let Some(weights) = weights {
            let rows = x.shape().split_last().map_or(&[][..], |(_, rows)| rows);
            ensure!(weights.shape() == rows, "feature_loss: the weights are {weights:?} but x is {x:?}");
        }
        let count = match weights {
            Some(weights) if weights.gpu().is_none() => weights.cast(super::beside(x.dtype()))?.to_f64().iter().sum(),
            _ => x.rows() as f64,
        };
        ensure!((f64::MIN_POSITIVE..).contains(&count), "feature_loss: the weights {weights:?} choose no row of x {x:?}");
        if let Some(gpu) = x.gpu() {
            let made = on_gpu(gpu, self, target, distance, weights)?;
            return Var::record("feature_loss", [self], made.loss.clone(), move |dy, _| made.backward(&dy));
        }
        let target = constant_for(&x, target)?;
        let weights = weights.map(|weights| constant_for(&x, weights)).transpose()?;
        let share = 1.0 / (count * x.last() as f64);
        let sum = by_real!("feature_loss", x.dtype(), sum(&x, &target, distance, weights.as_ref()));
        Var::record("feature_loss", [self], Tensor::scalar(share * sum, x.dtype())?, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("feature_loss", x.dtype(), gradient(&x, &target, distance, weights.as_ref(), share * dy.item(), &mut dx));
            Ok([Some(dx)])
        })
    }
}

/// The loss of x, which has been checked.
pub(super) fn on_gpu(gpu: &Gpu, x: &Var, target: &Tensor, distance: Distance, weights: Option<&Tensor>) -> Result<Made> {
    let (rows, columns) = (x.value().rows(), x.value().last());
    let target = constant_for(x.value(), target)?;
    let weights = weights.map(|weights| weights.cast(Dtype::F32)?.on(&x.value().device())).transpose()?;
    let count = weights.as_ref().map(|weights| loss_of(gpu, weights, 1.0)).transpose()?;
    let share = 1.0 / (columns * if count.is_some() { 1 } else { rows }) as f64;
    let (kind, beta) = match distance {
        Distance::L1 => (0, 0.0),
        Distance::L2 => (1, 0.0),
        Distance::SmoothL1 { beta } => (2, beta),
    };
    let blocks = rows.div_ceil(8).min(4096);
    let mut parts = Parts::new(x, blocks)?;
    let args = Args::new().maybe_out(parts.gradient.as_mut()).out(&mut parts.partial).input(x.value()).input(&target);
    let args = args.maybe(weights.as_ref()).maybe(count.as_ref()).int(rows).int(columns).int(kind).float(beta).float(share);
    gpu.launch(&typed(&typed("feature_loss", x.dtype()), target.dtype()), Launch::new(blocks, 256), args)?;
    parts.finish(gpu)
}

vectorised! {
    fn row_sum<T: Real>(x: &[T], t: &[T], distance: Distance) -> T {
        let n = x.len();
        let t = &t[..n];
        match distance {
            Distance::L1 => lane_sum(n, |i| (x[i] - t[i]).abs()),
            Distance::L2 => lane_sum(n, |i| (x[i] - t[i]) * (x[i] - t[i])),
            Distance::SmoothL1 { beta } => {
                let (half, steep) = (T::of(0.5 * beta), T::of(0.5 / beta));
                lane_sum(n, |i| {
                    let d = (x[i] - t[i]).abs();
                    if d < T::of(beta) { d * d * steep } else { d - half }
                })
            }
        }
    }
    fn row_gradient<T: Real>(x: &[T], t: &[T], distance: Distance, factor: T, dx: &mut [T]) {
        let both = dx.iter_mut().zip(x.iter().zip(t));
        match distance {
            Distance::L1 => both.for_each(|(dx, (&x, &t))| *dx = factor * sign(x - t)),
            Distance::L2 => both.for_each(|(dx, (&x, &t))| *dx = T::of(2.0) * factor * (x - t)),
            Distance::SmoothL1 { beta } => {
                let slope = factor / T::of(beta);
                both.for_each(|(dx, (&x, &t))| {
                    let d = x - t;
                    *dx = if d.abs() < T::of(beta) { slope * d } else { factor * sign(d) };
                });
            }
        }
    }
}

#[inline(always)]
fn sign<T: Real>(d: T) -> T {
    if d > T::ZERO {
        T::ONE
    } else if d < T::ZERO {
        -T::ONE
    } else {
        d
    }
}

fn sum<T: Real + Element>(x: &Tensor, target: &Tensor, distance: Distance, weights: Option<&Tensor>) -> f64 {
    let (rows, c) = (x.rows(), x.last());
    let (x, target, weights) = (x.data::<T>(), target.data::<T>(), weights.map(|weights| weights.data::<T>()));
    sum_of_rows(rows, c, |first, sums| {
        for (j, sum) in sums.iter_mut().enumerate() {
            let weight = weights.map_or(1.0, |weights| weights[first + j].f64());
            let row = (first + j) * c..(first + j + 1) * c;
            *sum = if weight == 0.0 { 0.0 } else { weight * row_sum(&x[row.clone()], &target[row], distance).f64() };
        }
    })
}

fn gradient<T: Real + Element>(x: &Tensor, target: &Tensor, distance: Distance, weights: Option<&Tensor>, factor: f64, dx: &mut Tensor) {
    let c = x.last();
    let (x, target, weights) = (x.data::<T>(), target.data::<T>(), weights.map(|weights| weights.data::<T>()));
    parallel::rows(dx.data_mut::<T>(), c, |first, dx| {
        for (j, dx) in dx.chunks_exact_mut(c).enumerate() {
            let weight = weights.map_or(1.0, |weights| weights[first + j].f64());
            if weight == 0.0 {
                dx.fill(T::ZERO);
                continue;
            }
            let row = (first + j) * c..(first + j + 1) * c;
            row_gradient(&x[row.clone()], &target[row], distance, T::of(weight * factor), dx);
        }
    });
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], distance: Distance, weights: Option<&[f64]>| {
        let target = Tensor::from_slice(shape, &numbers("target", 0, shape)).expect("as many numbers");
        let rows = &shape[..shape.len() - 1];
        let weights = weights.map(|weights| Tensor::from_slice(rows, weights).expect("a number a row"));
        Case::loss(&format!("feature_loss: {name}"), shape, move |x| match &weights {
            None => x.feature_loss(&target, distance),
            Some(weights) => x.feature_loss_at(&target, distance, weights),
        })
    };
    let smooth = |beta: f64| Distance::SmoothL1 { beta };
    vec![
        case("L1, 2 x 5 tokens, C = 24", &[2, 5, 24], Distance::L1, None),
        case("L2, 2 x 5 tokens, C = 24", &[2, 5, 24], Distance::L2, None),
        case("smooth L1, beta 2, C = 37", &[2, 5, 37], smooth(2.0), None),
        case("smooth L1, all differences beyond beta", &[1, 16], smooth(0.5), None).with(0, |i, x| x + if i % 2 == 0 { 9.0 } else { -9.0 }),
        case("L1, one element", &[1], Distance::L1, None),
        case("L2, many rows", &[300, 96], Distance::L2, None),
        case("smooth L1 at chosen rows", &[2, 3, 12], smooth(2.0), Some(&[1.0, 0.0, 1.0, 0.0, 0.0, 1.0])),
        case("L1 with weights", &[3, 8], Distance::L1, Some(&[0.5, 2.0, 0.0])),
        case("smooth L1, rows of several pieces", &[9, 520], smooth(2.0), None),
        case("L2, long odd rows", &[2, 301], Distance::L2, None),
    ]
}
