//! Floor 4: one file an op: the math, the shape checks, the CPU code, the backward, the cases.
//!
//! In the order a newcomer should read them. Var in, Var out is differentiable; Tensor in, Tensor out is not. The CPU code is generic over f32
//! and f64 and is the definition of the op.

pub mod add;
pub mod attention;
pub mod case;
pub mod gather;
pub mod gelu;
pub mod layernorm;
pub mod linear;
pub mod scale;
pub mod scatter;
pub mod tokens;

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
    ]
    .into_iter()
    .flatten()
    .collect()
}
