//! Softmax over the last axis.
//!
//!   y = e^(x - max) / sum e^(x - max),   dx = y (dy - y . dy)
//!
//! x [.., C]. Saved: y.

use super::case::Case;
use crate::device::parallel;
use crate::device::simd::{Real, largest, sum_of, sum_of2};
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
        Var::record("softmax", [self], y, move |dy, _| Ok([Some(by_real!("softmax", saved.dtype(), backward(dy, &saved))?)]))
    }
}

vectorised! {
    fn forward_rows<T: Real>(x: &[T], c: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
            let most = largest(x);
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - most).exp());
            let inverse = T::ONE / sum_of(y, |y| y);
            y.iter_mut().for_each(|y| *y *= inverse);
        }
    }
    /// dy becomes dx.
    fn backward_rows<T: Real>(dy: &mut [T], y: &[T], c: usize) {
        for (dy, y) in dy.chunks_exact_mut(c).zip(y.chunks_exact(c)) {
            let dot = sum_of2(y, dy, |y, dy| y * dy);
            dy.iter_mut().zip(y).for_each(|(dy, &y)| *dy = y * (*dy - dot));
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

fn backward<T: Real + Element>(dy: Tensor, y: &Tensor) -> Result<Tensor> {
    let (c, y) = (y.last(), y.data::<T>());
    super::overwrite(dy, c, |first, dy| backward_rows(dy, &y[first * c..first * c + dy.len()], c))
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
