//! Mean squared error over hidden patches.
//!
//!   loss = sum_r m[r] mean_P (x[r] - t[r])^2 / sum(m),   dx[r] = 2 m[r] (x[r] - t[r]) / (P sum(m))
//!
//! x, t [B, L, P]; m [B, L], 1 where a patch counts. Rows with m = 0 are not read and their gradient is 0. Saved: x, t, m.
//! On a GPU it is the L2 of kernels/feature_loss.cu at weights m; a mask that is there already cannot be looked at: if it counts no patch, loss and
//! gradient are 0.

use super::case::{Case, numbers};
use super::feature_loss::{self, Distance};
use super::total::{constant_for, sum_of_rows};
use crate::device::parallel;
use crate::device::simd::{Real, sum_of2};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Element, Tensor};
use crate::{by_real, ensure, vectorised};

impl Var {
    pub fn masked_mse(&self, target: &Tensor, mask: &Tensor) -> Result<Var> {
        let x = self.value().clone();
        let &[batch, tokens, p] = x.shape() else { crate::bail!("masked_mse: x is {x:?} but [B, L, P] is needed") };
        ensure!(target.shape() == x.shape() && p > 0, "masked_mse: the target is {target:?} but x is {x:?}");
        ensure!(mask.shape() == [batch, tokens], "masked_mse: the mask is {mask:?} but x is {x:?}");
        let count = count_of("masked_mse", &x, mask)?;
        if let Some(gpu) = x.gpu() {
            let made = feature_loss::on_gpu(gpu, self, target, Distance::L2, Some(mask))?;
            return Var::record("masked_mse", [self], made.loss.clone(), move |dy, _| made.backward(&dy));
        }
        let (target, mask) = (constant_for(&x, target)?, constant_for(&x, mask)?);
        let share = 1.0 / (count * p as f64);
        let loss = Tensor::scalar(share * by_real!("masked_mse", x.dtype(), errors(&x, &target, &mask)), x.dtype())?;
        Var::record("masked_mse", [self], loss, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("masked_mse", x.dtype(), gradient(&x, &target, &mask, 2.0 * share * dy.item(), &mut dx));
            Ok([Some(dx)])
        })
    }
}

/// How many patches a mask counts: at least one, as far as it can be looked at.
pub(super) fn count_of(op: &str, x: &Tensor, mask: &Tensor) -> Result<f64> {
    if mask.gpu().is_some() && x.gpu().is_some() {
        return Ok(1.0);
    }
    let mask = mask.on(&Device::Cpu)?.cast(super::beside(x.dtype()))?;
    let count: f64 = mask.to_f64().iter().sum();
    ensure!((f64::MIN_POSITIVE..).contains(&count), "{op}: the mask {mask:?} counts no patch of x {x:?}; hide at least one");
    Ok(count)
}

vectorised! {
    fn row_errors<T: Real>(x: &[T], target: &[T], mask: &[T], p: usize, errors: &mut [f64]) {
        for ((error, &m), (x, t)) in errors.iter_mut().zip(mask).zip(x.chunks_exact(p).zip(target.chunks_exact(p))) {
            *error = if m == T::ZERO { 0.0 } else { m.f64() * sum_of2(&x[..p], &t[..p], |x, t| (x - t) * (x - t)).f64() };
        }
    }
    fn row_gradients<T: Real>(x: &[T], target: &[T], mask: &[T], p: usize, factor: T, dx: &mut [T]) {
        for (((dx, &m), x), t) in dx.chunks_exact_mut(p).zip(mask).zip(x.chunks_exact(p)).zip(target.chunks_exact(p)) {
            if m == T::ZERO {
                dx.fill(T::ZERO);
            } else {
                let factor = factor * m;
                dx.iter_mut().zip(x).zip(t).for_each(|((dx, &x), &t)| *dx = factor * (x - t));
            }
        }
    }
}

fn errors<T: Real + Element>(x: &Tensor, target: &Tensor, mask: &Tensor) -> f64 {
    let (rows, p) = (x.rows(), x.last());
    let (x, target, mask) = (x.data::<T>(), target.data::<T>(), mask.data::<T>());
    sum_of_rows(rows, p, |first, errors| {
        let (from, to) = (first * p, (first + errors.len()) * p);
        row_errors(&x[from..to], &target[from..to], &mask[first..first + errors.len()], p, errors);
    })
}

fn gradient<T: Real + Element>(x: &Tensor, target: &Tensor, mask: &Tensor, factor: f64, dx: &mut Tensor) {
    let p = x.last();
    let (x, target, mask) = (x.data::<T>(), target.data::<T>(), mask.data::<T>());
    parallel::rows(dx.data_mut::<T>(), p, |first, dx| {
        let part = first * p..first * p + dx.len();
        row_gradients(&x[part.clone()], &target[part], &mask[first..first + dx.len() / p], p, T::of(factor), dx);
    });
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: [usize; 3], hidden: fn(usize) -> f64| {
        let target = Tensor::from_slice(&shape, &numbers("target", 0, &shape)).expect("as many numbers");
        let mask: Vec<f64> = (0..shape[0] * shape[1]).map(hidden).collect();
        let mask = Tensor::from_slice(&shape[..2], &mask).expect("as many numbers");
        Case::loss(&format!("masked_mse: {name}"), &shape, move |x| x.masked_mse(&target, &mask))
    };
    vec![
        case("3 of 4 patches hidden, P = 48", [2, 16, 48], |i| if i % 4 == 1 { 0.0 } else { 1.0 }),
        case("one patch of 37", [1, 1, 37], |_| 1.0),
        case("one hidden patch among many rows", [3, 200, 64], |i| if i == 411 { 1.0 } else { 0.0 }),
        case("an image without hidden patches", [2, 3, 5], |i| if i < 3 { 0.0 } else { 1.0 }),
    ]
}
