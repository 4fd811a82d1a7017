//! A pre-norm transformer block.
//!
//!   x = x + dp(g1 * attention(norm1(x)));   x = x + dp(g2 * mlp(norm2(x)))
//!
//! dp is stochastic depth, drawn for each branch; g1, g2 are the gains of layer scale, where there are any.

use super::attention::Attention;
use super::linear::Linear;
use super::norm::Norm;
use super::vit::Query;
use super::{Scope, Start};
use crate::error::Result;
use crate::ops::attention::Request;
use crate::ops::scale::Branch;
use crate::param::{Init, ParamId, ParamsBuilder};
use crate::tape::Var;
use crate::tensor::Tensor;

/// The sizes of one block.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    pub width: usize,
    pub heads: usize,
    pub hidden: usize,
    pub eps: f64,
    pub qkv_bias: bool,
    /// Starting value of layer scale, if there is one.
    pub layer_scale: Option<f32>,
    pub drop_path: f64,
}

/// How a branch joins the residual stream: layer scale, then stochastic depth.
pub(super) struct Residual {
    name: String,
    gains: Option<[ParamId; 2]>,
    drop_path: f64,
}

impl Residual {
    pub fn new(b: &mut ParamsBuilder, name: &str, c: &BlockConfig) -> Result<Self> {
        let gains = match c.layer_scale {
            Some(gain) => {
                let mut add = |key: &str| b.add(format!("{name}.{key}"), &[c.width], Init::Constant(gain));
                Some([add("gamma_1")?, add("gamma_2")?])
            }
            None => None,
        };
        Ok(Self { name: name.to_string(), gains, drop_path: c.drop_path })
    }

    /// The block's first (0) or second (1) branch as it joins the residual stream.
    fn branch(&self, s: &Scope, value: Var, which: usize) -> Result<Branch> {
        let drop = match s.noise {
            Some(rng) if self.drop_path > 0.0 => {
                let (name, batch) = (format!("{}.drop_path.{which}", self.name), value.shape()[0]);
                Some((Tensor::drawn(&value.value().device(), rng, &name, &[batch])?, self.drop_path))
            }
            _ => None,
        };
        Ok(Branch { value, gains: self.gains.map(|gains| s.param(gains[which])), drop })
    }
}

/// What follows the attention: norm2 and the two layers behind it.
pub(super) struct Mlp {
    norm: Norm,
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    pub fn new(b: &mut ParamsBuilder, name: &str, c: &BlockConfig, start: Start) -> Result<Self> {
        Ok(Self {
            norm: Norm::new(b, &format!("{name}.norm2"), c.width, c.eps)?,
            fc1: Linear::new(b, &format!("{name}.mlp.fc1"), c.width, c.hidden, start.linear(c.width, c.hidden))?,
            fc2: Linear::new(b, &format!("{name}.mlp.fc2"), c.hidden, c.width, start.linear(c.hidden, c.width))?,
        })
    }

    /// The same of convolutions of 1 x 1.
    pub fn pointwise(b: &mut ParamsBuilder, name: &str, c: &BlockConfig) -> Result<Self> {
        Ok(Self {
            norm: Norm::new(b, &format!("{name}.norm2"), c.width, c.eps)?,
            fc1: Linear::pointwise(b, &format!("{name}.mlp.fc1"), c.width, c.hidden)?,
            fc2: Linear::pointwise(b, &format!("{name}.mlp.fc2"), c.hidden, c.width)?,
        })
    }

    /// The branch alone, for the residual stream behind the attention.
    pub fn forward(&self, s: &Scope, x: &Var) -> Result<Var> {
        self.fc2.forward(s, &self.fc1.forward_gelu(s, &self.norm.forward(s, x)?)?)
    }

    /// x with both branches, the first of which is what the attention gave.
    pub fn finish(&self, s: &Scope, residual: &Residual, x: &Var, attended: Var) -> Result<Var> {
        let (x, y) = self.norm.forward_sum(s, x, &residual.branch(s, attended, 0)?)?;
        let y = self.fc2.forward(s, &self.fc1.forward_gelu(s, &y)?)?;
        x.add_branch(&residual.branch(s, y, 1)?)
    }
}

/// Everything that a block computes on its way.
pub struct Parts {
    /// Packed queries, keys and values, [B, N, 3 C].
    pub qkv: Var,
    /// The attention's branch, and the residual stream with it.
    pub attention: Var,
    pub attended: Var,
    /// The MLP's branch, and the residual stream with it: the block's output.
    pub mlp: Var,
    pub output: Var,
}

pub struct Block {
    residual: Residual,
    norm1: Norm,
    attention: Attention,
    mlp: Mlp,
}

impl Block {
    pub fn new(b: &mut ParamsBuilder, name: &str, c: &BlockConfig, start: Start) -> Result<Self> {
        Ok(Self {
            residual: Residual::new(b, name, c)?,
            norm1: Norm::new(b, &format!("{name}.norm1"), c.width, c.eps)?,
            attention: Attention::new(b, &format!("{name}.attn"), c.width, c.heads, c.qkv_bias, start)?,
            mlp: Mlp::new(b, name, c, start)?,
        })
    }

    pub fn forward(&self, s: &Scope, x: &Var) -> Result<Var> {
        Ok(self.forward_with(s, x, &Request::default())?.0)
    }

    /// The output, and what was requested of the attention.
    pub fn forward_with(&self, s: &Scope, x: &Var, request: &Request) -> Result<(Var, Option<Tensor>)> {
        let (y, class_rows) = self.attention.forward(s, &self.norm1.forward(s, x)?, request)?;
        Ok((self.mlp.finish(s, &self.residual, x, y)?, class_rows))
    }

    /// The output, and what a token in front attends to, [B, H, N]; of both tokens [B, 2 H, N].
    pub fn forward_looking(&self, s: &Scope, x: &Var, query: Query) -> Result<(Var, Tensor)> {
        let tokens = match query {
            Query::Class => {
                let (y, rows) = self.forward_with(s, x, &Request { class_rows: true, ..Request::default() })?;
                return Ok((y, rows.expect("class rows were requested")));
            }
            Query::Distillation => 1..2,
            Query::Both => 0..2,
        };
        let (y, rows) = self.attention.forward_rows(s, &self.norm1.forward(s, x)?, tokens)?;
        let &[batch, heads, queries, keys] = rows.shape() else { unreachable!("rows are [B, H, Q, N]") };
        Ok((self.mlp.finish(s, &self.residual, x, y)?, rows.reshape(&[batch, heads * queries, keys])?))
    }

    /// The output with everything before it.
    pub fn parts(&self, s: &Scope, x: &Var) -> Result<Parts> {
        let qkv = self.qkv(s, x)?;
        let attention = self.attention.attend(s, &qkv)?;
        let attended = x.add_branch(&self.residual.branch(s, attention.clone(), 0)?)?;
        let mlp = self.mlp.forward(s, &attended)?;
        let output = attended.add_branch(&self.residual.branch(s, mlp.clone(), 1)?)?;
        Ok(Parts { qkv, attention, attended, mlp, output })
    }

    /// Packed queries, keys and values that the block would attend with, [B, N, 3 C]; the rest of the block is not run.
    pub fn qkv(&self, s: &Scope, x: &Var) -> Result<Var> {
        self.attention.qkv(s, &self.norm1.forward(s, x)?)
    }
}
