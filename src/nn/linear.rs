//! A linear layer: weight [out, in], bias [out].

use super::Scope;
use crate::error::Result;
use crate::param::{Init, ParamId, ParamsBuilder};
use crate::tape::Var;

pub struct Linear {
    weight: ParamId,
    bias: Option<ParamId>,
}

impl Linear {
    /// Registers `name.weight` and `name.bias`, the bias starting at zero.
    pub fn new(b: &mut ParamsBuilder, name: &str, fan_in: usize, fan_out: usize, weight: Init) -> Result<Self> {
        Self::with_bias(b, name, &[fan_out, fan_in], weight, Some(Init::Constant(0.0)))
    }

    /// The same with a weight of any shape [out, ..] (a convolution over patches) and a chosen bias or none.
    pub fn with_bias(b: &mut ParamsBuilder, name: &str, shape: &[usize], weight: Init, bias: Option<Init>) -> Result<Self> {
        let weight = b.add(format!("{name}.weight"), shape, weight)?;
        let bias = bias.map(|bias| b.add(format!("{name}.bias"), &shape[..1], bias)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// A convolution of 1 x 1, weight [out, in, 1, 1], which starts as PyTorch's convolutions do.
    pub fn pointwise(b: &mut ParamsBuilder, name: &str, fan_in: usize, fan_out: usize) -> Result<Self> {
        Self::with_bias(b, name, &[fan_out, fan_in, 1, 1], Init::fan_in(fan_in), Some(Init::fan_in(fan_in)))
    }

    pub fn forward(&self, s: &Scope, x: &Var) -> Result<Var> {
        x.linear(&s.working(self.weight), self.bias.map(|bias| s.working(bias)).as_ref())
    }

    /// gelu(x W^T + b).
    pub fn forward_gelu(&self, s: &Scope, x: &Var) -> Result<Var> {
        x.linear_gelu(&s.working(self.weight), self.bias.map(|bias| s.working(bias)).as_ref())
    }
}
