//! Floor 4: one file an op: the math, the shape checks, the CPU code, the backward, the cases.
//!
//! In the order a newcomer should read them. Var in, Var out is differentiable; Tensor in, Tensor out is not. The CPU code is generic over f32
//! and f64 and is the definition of the op.

pub mod add;
pub mod attention;
pub mod batchnorm;
pub mod bce;
pub mod case;
pub mod conv;
pub mod cross_entropy;
pub mod distill_kl;
pub mod feature_loss;
pub mod gather;
pub mod gelu;
pub mod l2_normalise;
pub mod layernorm;
pub mod linear;
pub mod masked_mse;
pub mod matmul;
pub mod relation_kl;
pub mod scale;
pub mod scatter;
pub mod softmax;
pub mod tokens;
pub mod total;

use crate::device::{parallel, simd::Real};
use crate::error::Result;
use crate::tensor::{Element, Tensor};
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
        batchnorm::cases(),
        masked_mse::cases(),
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
