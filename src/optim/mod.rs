//! Floor 5: from gradients to new values.
//!
//! [`groups`] sorts the parameters by weight decay and learning rate, [`clip`] limits the gradients, an [`Optimizer`] makes the update and
//! [`ema`] averages the values over the steps; [`schedule`] says how fast. All of them see names, shapes and flat ranges, never a layer.

pub mod adamw;
pub mod clip;
pub mod ema;
pub mod groups;
pub mod lars;
pub mod schedule;
pub mod sgd;
pub mod state;

use crate::error::Result;
use crate::param::Params;
use groups::Group;
use state::State;

/// One update after another. Every group's learning rate is `lr * lr_scale`.
pub trait Optimizer {
    /// Changes every parameter that has a gradient. One without a gradient keeps its value, its state and its number of updates.
    fn step(&mut self, params: &mut Params, lr: f64) -> Result<()>;

    /// What is remembered from step to step, for checkpoints.
    fn state(&self) -> &State;

    fn state_mut(&mut self) -> &mut State;

    fn groups(&self) -> &[Group] {
        self.state().groups()
    }
}
