//! The error-function GELU.
//!
//!   y  = x Phi(x)
//!   dx = dy (Phi(x) + x phi(x))
//!
//! Phi is the standard normal distribution, phi its density. Saved for backward: on the CPU the derivative Phi(x) + x phi(x), which comes with the
//! value; on a GPU x. GPU: kernels/gelu.cu, which also takes the bias of the layer before it.

use super::case::Case;
use super::sum_of_parts;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, multiply};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, vectorised};

impl Var {
    pub fn gelu(&self) -> Result<Var> {
        let dtype = self.dtype();
        if let Some(gpu) = self.value().gpu() {
            let (gpu, x) = (gpu.clone(), self.value().clone());
            let y = with_bias(&gpu, &x, None)?;
            return Var::record("gelu", [self], y, move |dy, _| Ok([Some(gradient_with_bias(&gpu, &dy, &x, None, None)?)]));
        }
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

/// How many groups of rows the blocks of a grid share.
const SHARES: usize = 256;

fn launch(x: &Tensor) -> Launch {
    Launch::new(0, 256).grid(x.last().div_ceil(256), x.rows().div_ceil(8).clamp(1, SHARES), 1)
}

/// gelu(x + bias) on a GPU.
pub(super) fn with_bias(gpu: &Gpu, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut y = x.alike(x.shape(), x.dtype())?;
    let args = Args::new().out(&mut y).input(x).maybe(bias).int(x.rows()).int(x.last());
    gpu.launch(&typed("gelu_fwd", x.dtype()), launch(x), args)?;
    Ok(y)
}

/// The gradient of x, and that of the bias into `dbias`.
pub(super) fn gradient_with_bias(gpu: &Gpu, dy: &Tensor, x: &Tensor, bias: Option<&Tensor>, dbias: Option<&mut Tensor>) -> Result<Tensor> {
    let (mut dx, launch) = (x.alike(x.shape(), x.dtype())?, launch(x));
    let mut partial = if dbias.is_some() { Some(x.alike(&[launch.grid[1], x.last()], Dtype::F32)?) } else { None };
    let args = Args::new().out(&mut dx).maybe_out(partial.as_mut()).input(dy).input(x).maybe(bias).int(x.rows()).int(x.last());
    gpu.launch(&typed("gelu_bwd", x.dtype()), launch, args)?;
    if let (Some(partial), Some(dbias)) = (partial, dbias) {
        sum_of_parts(gpu, &partial, dbias)?;
    }
    Ok(dx)
}

/// dy times the derivative.
pub(super) fn times<T: Real + Element>(dy: Tensor, slope: &Tensor) -> Result<Tensor> {
    let slope = slope.data::<T>();
    super::overwrite(dy, 1, |first, dy| multiply(dy, &slope[first..first + dy.len()]))
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("gelu: 4 rows of 37", &[&[4, 37]], |x| x[0].gelu()),
        Case::new("gelu: rows of vectors", &[&[19, 264]], |x| x[0].gelu()),
        Case::new("gelu: saturated on both sides", &[&[3, 5]], |x| x[0].gelu()).with(0, |_, x| 6.0 * x),
    ]
}
