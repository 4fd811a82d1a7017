//! The error-function GELU.
//!
//!   y  = x Phi(x)
//!   dx = dy (Phi(x) + x phi(x))
//!
//! Phi is the standard normal distribution, phi its density. Saved for backward: x.

use super::case::Case;
use crate::device::{parallel, simd::Real};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, vectorised};

impl Var {
    pub fn gelu(&self) -> Result<Var> {
        let x = self.value().clone();
        let y = by_real!("gelu", x.dtype(), forward(&x))?;
        Var::record("gelu", [self], y, move |dy, _| Ok([Some(by_real!("gelu", x.dtype(), backward(dy, &x))?)]))
    }
}

vectorised! {
    fn values<T: Real>(x: &[T], y: &mut [T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * x.normal().0);
    }
    fn gradients<T: Real>(x: &[T], dy: &mut [T]) {
        for (dy, &x) in dy.iter_mut().zip(x) {
            let (probability, density) = x.normal();
            *dy *= x.mul_add(density, probability);
        }
    }
}

fn forward<T: Real + Element>(x: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let x = x.data::<T>();
    parallel::rows(y.data_mut::<T>(), 1, |first, y| values(&x[first..first + y.len()], y));
    Ok(y)
}

fn backward<T: Real + Element>(dy: Tensor, x: &Tensor) -> Result<Tensor> {
    let mut dx = dy.into_unique()?;
    let x = x.data::<T>();
    parallel::rows(dx.data_mut::<T>(), 1, |first, dx| gradients(&x[first..first + dx.len()], dx));
    Ok(dx)
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("gelu: 4 rows of 37", &[&[4, 37]], |x| x[0].gelu()),
        Case::new("gelu: saturated on both sides", &[&[3, 5]], |x| x[0].gelu()).with(0, |_, x| 6.0 * x),
    ]
}
