//! The attention part of a block: qkv projection, heads, output projection.

use super::linear::Linear;
use super::{Scope, Start};
use crate::error::Result;
use crate::ops::attention::Request;
use crate::param::{Init, ParamsBuilder};
use crate::tape::Var;
use crate::tensor::{Dtype, Tensor};
use std::ops::Range;

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

    /// The output for packed queries, keys and values.
    pub fn attend(&self, s: &Scope, qkv: &Var) -> Result<Var> {
        self.proj.forward(s, &qkv.attention(self.heads)?)
    }

    /// The output, and the probabilities [B, H, Q, N] of the tokens `queries`.
    pub fn forward_rows(&self, s: &Scope, x: &Var, queries: Range<usize>) -> Result<(Var, Tensor)> {
        let qkv = self.qkv(s, x)?;
        let seen = rows(&qkv, self.heads, queries)?;
        Ok((self.attend(s, &qkv)?, seen))
    }

    /// The output, and the class token's probabilities [B, H, N] if requested.
    pub fn forward(&self, s: &Scope, x: &Var, request: &Request) -> Result<(Var, Option<Tensor>)> {
        let (y, class_rows) = self.qkv(s, x)?.attention_with(self.heads, request)?;
        Ok((self.proj.forward(s, &y)?, class_rows))
    }
}

/// What the tokens `queries` attend to, off the tape and never below f32: softmax(q k^T / sqrt D), [B, H, Q, N]; qkv is [B, N, 3 C].
pub fn rows(qkv: &Var, heads: usize, queries: Range<usize>) -> Result<Tensor> {
    let wide = if qkv.dtype() == Dtype::Bf16 { qkv.value().cast(Dtype::F32)? } else { qkv.value().clone() };
    let qkv = Var::constant(wide);
    let (q, k) = (qkv.tokens(queries)?.take_heads(0, 3, heads)?, qkv.take_heads(1, 3, heads)?);
    let scaled = q.scale(1.0 / (q.value().last() as f64).sqrt())?;
    Ok(scaled.bmm_nt(&k)?.softmax()?.value().clone())
}
