//! Keeping the gradients of all parameters together below a length. GPU: kernels/clip.cu.

use super::state::PIECE;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::simd::{Real, lane_sum};
use crate::error::{Error, Result};
use crate::param::Params;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, vectorised};
use rayon::prelude::*;

/// Length of all gradients that are present, taken as one vector.
pub fn gradient_norm(params: &mut Params) -> Result<f64> {
    match params.device().gpu().cloned() {
        None => by_real!("clipping", params.dtype(), norm(params)),
        Some(gpu) => Ok(norm_on(&gpu, params, f64::INFINITY)?.0.on(&Device::Cpu)?.item()),
    }
}

/// Multiplies every gradient by min(1, max_norm / (norm + 1e-6)) and answers the norm before. Where that is not finite, the gradients
/// are left as they are: whether the step is taken is the caller's decision.
pub fn clip(params: &mut Params, max_norm: f64) -> Result<f64> {
    check(max_norm)?;
    match params.device().gpu().cloned() {
        None => by_real!("clipping", params.dtype(), clip_all(params, max_norm)),
        Some(gpu) => Ok(clip_all_on(&gpu, params, max_norm)?.on(&Device::Cpu)?.item()),
    }
}

/// Multiplies every gradient by min(1, max_norm / (norm + 1e-6)) where the norm is known: gradients of this rank may be a part of it.
pub fn limit(params: &mut Params, norm: f64, max_norm: f64) -> Result<()> {
    check(max_norm)?;
    let factor = max_norm / (norm + 1e-6);
    if !norm.is_finite() || factor >= 1.0 {
        return Ok(());
    }
    match params.device().gpu().cloned() {
        None => by_real!("clipping", params.dtype(), multiply(params, factor)),
        Some(gpu) => {
            let factor = Tensor::full_on(params.device(), &[1], Dtype::F32, factor)?;
            let mut gradients = params.flat_gradients()?;
            let n = gradients.len;
            gpu.launch("times_scalar_f32", Launch::elements(n, 8), Args::new().out(&mut gradients).input(&factor).long(n))
        }
    }
}

/// The same with the norm as f32 [1] on the device of the parameters: on a GPU nothing waits for it, and it may be recorded.
pub fn clip_on_device(params: &mut Params, max_norm: f64) -> Result<Tensor> {
    check(max_norm)?;
    match params.device().gpu().cloned() {
        None => Tensor::from_slice(&[1], &[clip(params, max_norm)? as f32]),
        Some(gpu) => clip_all_on(&gpu, params, max_norm),
    }
}

fn check(max_norm: f64) -> Result<()> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::usage(format!(
            "gradients cannot be clipped to a norm of {max_norm}; leave the flag out to switch clipping off"
        )));
    }
    Ok(())
}

fn clip_all<T: Real + Element>(params: &mut Params, max_norm: f64) -> Result<f64> {
    let norm = norm::<T>(params)?;
    let factor = max_norm / (norm + 1e-6);
    if norm.is_finite() && factor < 1.0 {
        multiply::<T>(params, factor)?;
    }
    Ok(norm)
}

/// Sums of squares, f64, whose sum is the square of the norm. Absent gradients are zeros in the buffer.
pub(super) fn squares_on(gpu: &Gpu, params: &mut Params) -> Result<Tensor> {
    let (device, gradients) = (params.device().clone(), params.flat_gradients()?);
    let blocks = gradients.len.div_ceil(2048).clamp(1, 1024);
    let mut sums = Tensor::empty_on(&device, &[blocks], Dtype::F64)?;
    let args = Args::new().out(&mut sums).input(&gradients).long(gradients.len);
    gpu.launch("clip_squares_f32", Launch::new(blocks, 256), args)?;
    Ok(sums)
}

/// Norm and factor, each f32 [1].
fn norm_on(gpu: &Gpu, params: &mut Params, max_norm: f64) -> Result<(Tensor, Tensor)> {
    let device = params.device().clone();
    let sums = squares_on(gpu, params)?;
    let (mut norm, mut factor) = (Tensor::empty_on(&device, &[1], Dtype::F32)?, Tensor::empty_on(&device, &[1], Dtype::F32)?);
    let args = Args::new().out(&mut norm).out(&mut factor).input(&sums).int(sums.numel()).float(max_norm);
    gpu.launch("clip_norm_f32", Launch::new(1, 256), args)?;
    Ok((norm, factor))
}

fn clip_all_on(gpu: &Gpu, params: &mut Params, max_norm: f64) -> Result<Tensor> {
    let (norm, factor) = norm_on(gpu, params, max_norm)?;
    let mut gradients = params.flat_gradients()?;
    let n = gradients.len;
    gpu.launch("times_scalar_f32", Launch::elements(n, 8), Args::new().out(&mut gradients).input(&factor).long(n))?;
    Ok(norm)
}

pub(super) fn norm<T: Real + Element>(params: &Params) -> Result<f64> {
    let gradients = params.trained().filter_map(|id| params.gradient(id));
    let pieces: Vec<&[T]> = gradients.flat_map(|gradient| gradient.data::<T>().chunks(PIECE)).collect();
    let sums: Vec<f64> = pieces.into_par_iter().map(squares).collect();
    Ok(sums.into_iter().sum::<f64>().sqrt())
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
