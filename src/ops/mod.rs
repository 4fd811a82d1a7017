//! Floor 4: one file an op: the math, the shape checks, the CPU code, the backward, the cases.
//!
//! In the order a newcomer should read them. Var in, Var out is differentiable; Tensor in, Tensor out is not. The CPU code is generic over f32
//! and f64 and is the definition of the op. A kernel is a faster way of saying it: an op asks its first input for its [`Tensor::gpu`] and, where there is
//! one, launches instead.
//!
//! On a GPU activations are f32 or bf16. Vectors (biases of norms, gains, tokens, tables of positions), statistics and losses are f32 in either case.

pub mod add;
pub mod attention;
pub mod batchnorm;
pub mod bce;
pub mod case;
pub mod conv;
pub mod cross_entropy;
pub mod depthwise;
pub mod distill_kl;
pub mod feature_loss;
pub mod gather;
pub mod gelu;
pub mod l2_normalise;
pub mod layernorm;
pub mod linear;
pub mod masked_mse;
pub mod matmul;
pub mod pixel_loss;
pub mod regions;
pub mod relation_kl;
pub mod scale;
pub mod scatter;
pub mod softmax;
pub mod tokens;
pub mod total;

use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, Versions, typed};
use crate::device::{parallel, simd::Real};
use crate::error::Result;
use crate::tensor::{Dtype, Element, Tensor};
use case::Case;

/// Every case of every op, for the gradient check, the comparison of devices and the timing.
pub fn cases() -> Vec<Case> {
    [
        add::cases(),
        scale::cases(),
        gelu::cases(),
        linear::cases(),
        layernorm::cases(),
        attention::cases(),
        gather::cases(),
        scatter::cases(),
        tokens::cases(),
        softmax::cases(),
        l2_normalise::cases(),
        matmul::cases(),
        conv::cases(),
        depthwise::cases(),
        regions::cases(),
        batchnorm::cases(),
        masked_mse::cases(),
        pixel_loss::cases(),
        feature_loss::cases(),
        cross_entropy::cases(),
        bce::cases(),
        distill_kl::cases(),
        relation_kl::cases(),
        total::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The versions of every op whose kernels have more than one.
pub fn versions() -> Vec<&'static Versions> {
    vec![
        &layernorm::VERSIONS,
        &attention::VERSIONS,
        &gather::VERSIONS,
        &softmax::VERSIONS,
        &depthwise::VERSIONS,
        &regions::VERSIONS,
        &pixel_loss::VERSIONS,
        &relation_kl::VERSIONS,
    ]
}

/// A gradient turned into another by `f(first row, rows)`: in place where nobody else holds it, otherwise on a copy made piece by piece.
pub(crate) fn overwrite<T: Real + Element>(gradient: Tensor, columns: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) -> Result<Tensor> {
    if gradient.is_unique() {
        let mut gradient = gradient;
        parallel::rows(gradient.data_mut::<T>(), columns, f);
        return Ok(gradient);
    }
    let mut copy = Tensor::empty(gradient.shape(), gradient.dtype())?;
    let source = gradient.data::<T>();
    parallel::rows(copy.data_mut::<T>(), columns, |first, rows| {
        rows.copy_from_slice(&source[first * columns..first * columns + rows.len()]);
        f(first, rows);
    });
    Ok(copy)
}

/// The dtype of vectors, statistics and losses beside activations of this one.
pub(crate) fn beside(activations: Dtype) -> Dtype {
    if activations == Dtype::Bf16 { Dtype::F32 } else { activations }
}

/// Second stage of a sum over rows on a GPU: `sum` [C] of parts [.., C] in f32, in a fixed order.
pub(crate) fn sum_of_parts(gpu: &Gpu, parts: &Tensor, sum: &mut Tensor) -> Result<()> {
    let columns = parts.last();
    gpu.launch("sum_columns_f32", Launch::new(columns.div_ceil(32), 1024), Args::new().out(sum).input(parts).int(parts.rows()).int(columns))
}

/// Both stages: `sum` [C] of the rows of x [.., C], f32 or bf16.
pub(crate) fn sum_of_rows_on(gpu: &Gpu, x: &Tensor, sum: &mut Tensor) -> Result<()> {
    let (rows, columns) = (x.rows(), x.last());
    let (shares, width) = (rows.div_ceil(32).clamp(1, 256), if columns.is_multiple_of(8) { 256 } else { 32 });
    let mut parts = x.alike(&[shares, columns], Dtype::F32)?;
    let args = Args::new().out(&mut parts).input(x).int(rows).int(columns);
    gpu.launch(&typed("sum_rows", x.dtype()), Launch::new(0, 256).grid(columns.div_ceil(width), shares, 1), args)?;
    sum_of_parts(gpu, &parts, sum)
}

/// A loss on a GPU from the partial sums of its blocks: factor * their sum, shape [].
pub(crate) fn loss_of(gpu: &Gpu, partial: &Tensor, factor: f64) -> Result<Tensor> {
    let mut loss = partial.alike(&[], Dtype::F32)?;
    gpu.launch("sum_f32", Launch::new(1, 1024), Args::new().out(&mut loss).input(partial).int(partial.numel()).float(factor))?;
    Ok(loss)
}

/// A gradient that was made together with its loss, times the loss's own gradient; nothing is moved where that is 1.
pub(crate) fn times_loss_gradient(gpu: &Gpu, gradient: Tensor, dy: &Tensor) -> Result<Tensor> {
    let mut gradient = gradient.into_unique()?;
    let (n, kernel) = (gradient.numel(), typed("times_scalar", gradient.dtype()));
    gpu.launch(&kernel, Launch::elements(n, 8), Args::new().out(&mut gradient).input(dy).long(n))?;
    Ok(gradient)
}
