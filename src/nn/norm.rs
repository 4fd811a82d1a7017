//! Layer normalisation with weight (starting at 1) and bias (starting at 0).

use super::Scope;
use crate::error::Result;
use crate::ops::scale::Branch;
use crate::param::{Init, ParamId, ParamsBuilder};
use crate::tape::Var;

pub struct Norm {
    weight: ParamId,
    bias: ParamId,
    eps: f64,
}

impl Norm {
    pub fn new(b: &mut ParamsBuilder, name: &str, width: usize, eps: f64) -> Result<Self> {
        let weight = b.add(format!("{name}.weight"), &[width], Init::Constant(1.0))?;
        let bias = b.add(format!("{name}.bias"), &[width], Init::Constant(0.0))?;
        Ok(Self { weight, bias, eps })
    }

    pub fn forward(&self, s: &Scope, x: &Var) -> Result<Var> {
        x.layernorm(&s.param(self.weight), &s.param(self.bias), self.eps)
    }

    /// The residual sum of x and a branch, and its norm.
    pub fn forward_sum(&self, s: &Scope, x: &Var, branch: &Branch) -> Result<(Var, Var)> {
        x.add_layernorm(branch, &s.param(self.weight), &s.param(self.bias), self.eps)
    }
}
