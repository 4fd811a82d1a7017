//! Floor 5: from gradients to new values.
//!
//! [`groups`] sorts the parameters by weight decay and learning rate, [`clip`] limits the gradients, an [`Optimizer`] makes the update and
//! [`ema`] averages the values over the steps; [`schedule`] says how fast. All of them see names, shapes and flat ranges, never a layer.
//!
//! An update has two halves. [`Optimizer::prepare`] is the host's: it counts the update of each parameter and puts the numbers that change from step to step
//! where the kernels read them. [`Optimizer::apply`] is the device's and may be recorded. A training step that is recorded once is replayed as
//! prepare, replay, prepare, replay: what has a gradient must be the same each time, and is what has one when `prepare` is called. A replay
//! leaves no trace on the host, so whoever replays says what has a gradient by [`Params::assume_gradients`].

pub mod adamw;
pub mod clip;
pub mod ema;
pub mod groups;
pub mod lamb;
pub mod lars;
mod pieces;
pub mod schedule;
pub mod sgd;
pub mod state;

use crate::error::Result;
use crate::param::Params;
use groups::Group;
use state::State;

/// One update after another. Every group's learning rate is `lr * lr_scale`.
pub trait Optimizer {
    /// Counts an update of every parameter that has a gradient and works out the numbers it is made with. Not to be called inside recorded work.
    fn prepare(&mut self, params: &Params, lr: f64) -> Result<()>;

    /// Makes the update that was prepared; refused if other parameters have gradients than then. On a GPU it only hands over work, the same each time.
    fn apply(&mut self, params: &mut Params) -> Result<()>;

    /// Changes every parameter that has a gradient. One without a gradient keeps its value, its state and its number of updates.
    fn step(&mut self, params: &mut Params, lr: f64) -> Result<()> {
        self.prepare(params, lr)?;
        self.apply(params).inspect_err(|_| self.withdraw())
    }

    /// Says how long the whole gradient is where this rank has a part of it, for the next update; rules that look at each parameter alone need not know.
    fn whole_length(&mut self, _length: f64) {}

    /// Takes back what was prepared last: no update was made with it.
    fn withdraw(&mut self) {
        self.state_mut().withdraw();
    }

    /// What is remembered from step to step, for checkpoints.
    fn state(&self) -> &State;

    fn state_mut(&mut self) -> &mut State;

    fn groups(&self) -> &[Group] {
        self.state().groups()
    }
}
