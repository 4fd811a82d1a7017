//! The error-function GELU.
//!
//!   y  = x Phi(x)
//!   dx = dy (Phi(x) + x phi(x))
//!
//! Phi is the standard normal distribution, phi its density. Saved for backward: the derivative Phi(x) + x phi(x), which comes with the value.

use super::case::Case;
use crate::device::parallel;
use crate::device::simd::{Real, multiply};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, vectorised};

impl Var {
    pub fn gelu(&self) -> Result<Var> {
        let dtype = self.dtype();
        let (y, slope) = by_real!("gelu", dtype, forward(self.value(), self.tracked()))?;
        Var::record("gelu", [self], y, move |dy, _| Ok([Some(by_real!("gelu", dtype, times(dy, &slope))?)]))
    }
}

vectorised! {
    fn values<T: Real>(x: &[T], y: &mut [T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * x.normal().0);
    }
    fn values_and_slopes<T: Real>(x: &[T], y: &mut [T], slope: &mut [T]) {
        for ((y, slope), &x) in y.iter_mut().zip(slope).zip(x) {
            let (probability, density) = x.normal();
            *y = x * probability;
            *slope = x.mul_add(density, probability);
        }
    }
}

/// The value, and the derivative if it will be needed.
fn forward<T: Real + Element>(x: &Tensor, tracked: bool) -> Result<(Tensor, Tensor)> {
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let numbers = x.data::<T>();
    if !tracked {
        parallel::rows(y.data_mut::<T>(), 1, |first, y| values(&numbers[first..first + y.len()], y));
        return Ok((y.clone(), y));
    }
    let mut slope = Tensor::empty(x.shape(), x.dtype())?;
    parallel::rows2(y.data_mut::<T>(), 1, slope.data_mut::<T>(), 1, |first, y, slope| {
        values_and_slopes(&numbers[first..first + y.len()], y, slope);
    });
    Ok((y, slope))
}

/// dy times the derivative.
pub(super) fn times<T: Real + Element>(dy: Tensor, slope: &Tensor) -> Result<Tensor> {
    let slope = slope.data::<T>();
    super::overwrite(dy, 1, |first, dy| multiply(dy, &slope[first..first + dy.len()]))
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("gelu: 4 rows of 37", &[&[4, 37]], |x| x[0].gelu()),
        Case::new("gelu: saturated on both sides", &[&[3, 5]], |x| x[0].gelu()).with(0, |_, x| 6.0 * x),
    ]
}
