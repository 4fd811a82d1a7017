//! Softmax over the last axis.
//!
//!   y = e^(x - max) / sum e^(x - max),   dx = y (dy - y . dy)
//!
//! x [.., C]. Saved: y.

use super::case::Case;
use crate::device::parallel;
use crate::device::simd::{Real, lane_max, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};

impl Var {
    pub fn softmax(&self) -> Result<Var> {
        let x = self.value();
        ensure!(x.last() > 0, "softmax: x is {x:?}, its last axis is empty");
        let y = by_real!("softmax", x.dtype(), forward(x))?;
        let saved = y.clone();
        Var::record("softmax", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("softmax", saved.dtype(), backward(&dy, &saved, &mut dx));
            Ok([Some(dx)])
        })
    }
}

vectorised! {
    fn forward_rows<T: Real>(x: &[T], c: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
            let most = lane_max(c, |i| x[i]);
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - most).exp());
            let inverse = T::ONE / lane_sum(c, |i| y[i]);
            y.iter_mut().for_each(|y| *y *= inverse);
        }
    }
    fn backward_rows<T: Real>(dy: &[T], y: &[T], c: usize, dx: &mut [T]) {
        for ((dy, y), dx) in dy.chunks_exact(c).zip(y.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
            let dot = lane_sum(c, |i| y[i] * dy[i]);
            dx.iter_mut().zip(dy).zip(y).for_each(|((dx, &dy), &y)| *dx = y * (dy - dot));
        }
    }
}

fn forward<T: Real + Element>(x: &Tensor) -> Result<Tensor> {
    let c = x.last();
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let x = x.data::<T>();
    parallel::rows(y.data_mut::<T>(), c, |first, y| forward_rows(&x[first * c..first * c + y.len()], c, y));
    Ok(y)
}

fn backward<T: Real + Element>(dy: &Tensor, y: &Tensor, dx: &mut Tensor) {
    let c = y.last();
    let (dy, y) = (dy.data::<T>(), y.data::<T>());
    parallel::rows(dx.data_mut::<T>(), c, |first, dx| {
        let part = first * c..first * c + dx.len();
        backward_rows(&dy[part.clone()], &y[part], c, dx);
    });
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| Case::new(&format!("softmax: {name}"), &[shape], |x| x[0].softmax());
    vec![
        case("scores of 2 heads, 7 tokens", &[1, 2, 7, 7]),
        case("one row, C = 37", &[1, 37]),
        case("C = 1", &[3, 1]),
        case("saturated", &[4, 12]).with(0, |_, x| 30.0 * x),
        case("equal scores", &[2, 9]).with(0, |i, _| (i / 9) as f64),
        case("197 keys, many rows", &[300, 197]),
    ]
}
