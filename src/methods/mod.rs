//! Floor 6: one file a method, each reading like its paper's method section.

pub mod mae;

use crate::error::Result;
use crate::nn::vit::Vit;
use crate::param::Params;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// What a step of training sees: normalised images [B, C, H, W].
pub struct Batch {
    pub images: Tensor,
}

/// A loss and the named parts it is the sum of: numbers on the model's device, which nobody has to wait for.
pub struct Loss {
    pub total: Var,
    pub parts: Vec<(&'static str, Tensor)>,
}

impl Loss {
    pub fn single(name: &'static str, total: Var) -> Self {
        let parts = vec![(name, total.value().clone())];
        Self { total, parts }
    }
}

pub trait Method {
    /// What is trained; a teacher's parameters are not among them.
    fn params(&mut self) -> &mut Params;
    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss>;
    /// What fine-tuning keeps.
    fn encoder(&self) -> &Vit;
}
