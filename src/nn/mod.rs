//! Floor 5: parts of a vision transformer.
//!
//! A part holds the positions of its parameters in a [`Params`]; its forward takes a [`Scope`], which says where the numbers are and whether they are
//! recorded. Parameter names are the official state-dict keys.

pub mod attention;
pub mod block;
pub mod cait;
pub mod classifier;
pub mod contents;
pub mod convit;
pub mod decoder;
pub mod flops;
pub mod linear;
pub mod names;
pub mod norm;
pub mod position;
pub mod presets;
pub mod stages;
pub mod vit;
pub mod weights;

use crate::param::{Init, ParamId, Params};
use crate::rng::Rng;
use crate::tape::{Tape, Var};

/// What a forward pass runs in.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    pub tape: &'a Tape,
    pub params: &'a Params,
    /// Where stochastic depth draws from; None switches it off (evaluation, teachers).
    pub noise: Option<&'a Rng>,
}

impl<'a> Scope<'a> {
    pub fn new(tape: &'a Tape, params: &'a Params) -> Self {
        Self { tape, params, noise: None }
    }

    /// The same with stochastic depth drawing from `rng`.
    pub fn with_noise(self, rng: &'a Rng) -> Self {
        Self { noise: Some(rng), ..self }
    }

    pub fn param(&self, id: ParamId) -> Var {
        self.params.var(self.tape, id)
    }

    /// The parameter as products take it: in bf16 where that is the precision.
    pub fn working(&self, id: ParamId) -> Var {
        self.params.working(self.tape, id)
    }
}

/// How the weights of a model start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Pre-training models: Xavier-uniform for every linear weight and the patch projection.
    Xavier,
    /// Classifiers: normal with deviation 0.02 for every linear weight, PyTorch's convolution default for the patch projection.
    Normal,
}

impl Start {
    pub fn linear(self, fan_in: usize, fan_out: usize) -> Init {
        match self {
            Start::Xavier => Init::xavier(fan_in, fan_out),
            Start::Normal => Init::Normal(0.02),
        }
    }

    pub fn patch_projection(self, fan_in: usize, fan_out: usize) -> Init {
        match self {
            Start::Xavier => Init::xavier(fan_in, fan_out),
            Start::Normal => Init::fan_in(fan_in),
        }
    }
}
