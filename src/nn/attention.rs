//! The attention part of a block: qkv projection, heads, output projection.

use super::linear::Linear;
use super::{Scope, Start};
use crate::error::Result;
use crate::ops::attention::Request;
use crate::param::{Init, ParamsBuilder};
use crate::tape::Var;
use crate::tensor::Tensor;

pub struct Attention {
    qkv: Linear,
    proj: Linear,
    heads: usize,
}

impl Attention {
    pub fn new(b: &mut ParamsBuilder, name: &str, width: usize, heads: usize, qkv_bias: bool, start: Start) -> Result<Self> {
        let bias = qkv_bias.then_some(Init::Constant(0.0));
        let shape = [3 * width, width];
        Ok(Self {
            qkv: Linear::with_bias(b, &format!("{name}.qkv"), &shape, start.linear(width, 3 * width), bias)?,
            proj: Linear::new(b, &format!("{name}.proj"), width, width, start.linear(width, width))?,
            heads,
        })
    }

    /// Packed queries, keys and values of x, [B, N, 3 C].
    pub fn qkv(&self, s: &Scope, x: &Var) -> Result<Var> {
        self.qkv.forward(s, x)
    }

    /// The output, and the class token's probabilities [B, H, N] if requested.
    pub fn forward(&self, s: &Scope, x: &Var, request: &Request) -> Result<(Var, Option<Tensor>)> {
        let (y, class_rows) = self.qkv(s, x)?.attention_with(self.heads, request)?;
        Ok((self.proj.forward(s, &y)?, class_rows))
    }
}
