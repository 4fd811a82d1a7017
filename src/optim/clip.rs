//! Keeping the gradients of all parameters together below a length.

use super::state::PIECE;
use crate::device::simd::{Real, lane_sum};
use crate::error::{Error, Result};
use crate::param::Params;
use crate::tensor::{Dtype, Element};
use crate::{by_real, vectorised};
use rayon::prelude::*;

/// Length of all gradients that are present, taken as one vector.
pub fn gradient_norm(params: &Params) -> f64 {
    match params.dtype() {
        Dtype::F64 => norm::<f64>(params),
        _ => norm::<f32>(params),
    }
}

/// Multiplies every gradient by min(1, max_norm / (norm + 1e-6)) and answers the norm before. Where that is not finite, the gradients
/// are left as they are: whether the step is taken is the caller's decision.
pub fn clip(params: &mut Params, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::usage(format!(
            "gradients cannot be clipped to a norm of {max_norm}; leave the flag out to switch clipping off"
        )));
    }
    let norm = gradient_norm(params);
    let factor = max_norm / (norm + 1e-6);
    if norm.is_finite() && factor < 1.0 {
        by_real!("clipping", params.dtype(), multiply(params, factor))?;
    }
    Ok(norm)
}

fn norm<T: Real + Element>(params: &Params) -> f64 {
    let gradients = params.trained().filter_map(|id| params.gradient(id));
    let pieces: Vec<&[T]> = gradients.flat_map(|gradient| gradient.data::<T>().chunks(PIECE)).collect();
    let sums: Vec<f64> = pieces.into_par_iter().map(squares).collect();
    sums.into_iter().sum::<f64>().sqrt()
}

fn multiply<T: Real + Element>(params: &mut Params, factor: f64) -> Result<()> {
    let pieces: Vec<&mut [T]> = params.gradients_mut()?.flat_map(|gradient| gradient.data_mut::<T>().chunks_mut(PIECE)).collect();
    pieces.into_par_iter().for_each(|piece| scale(piece, T::of(factor)));
    Ok(())
}

/// Partial sums of a piece: so many that they stay a loop, which the compiler turns into vectors.
const SUMS: usize = 256;

vectorised! {
    fn squares<T: Real>(x: &[T]) -> f64 {
        let (whole, rest) = x.as_chunks::<SUMS>();
        let mut sums = [0.0; SUMS];
        for x in whole {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += x.f64() * x.f64();
            }
        }
        lane_sum(SUMS, |i| sums[i]) + lane_sum(rest.len(), |i| rest[i].f64() * rest[i].f64())
    }

    fn scale<T: Real>(x: &mut [T], factor: T) {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}
