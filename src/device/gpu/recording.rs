//! Recorded work: what it draws, what it uses, how it is done again.

use super::{Arena, Block, Gpu, Recorded, lock};
use crate::ensure;
use crate::error::{Context, Result};
use crate::rng::Rng;
use std::any::Any;
use std::sync::Arc;

/// A recording that ends with its scope, also when what is recorded panics.
pub(super) struct Recording<'a> {
    pub gpu: &'a Gpu,
    /// The arena of before; None once it is over.
    pub outer: Option<Arc<Arena>>,
}

impl Recording<'_> {
    pub fn end(mut self) -> (Result<Box<dyn Recorded>>, Notes) {
        self.over()
    }

    fn over(&mut self) -> (Result<Box<dyn Recorded>>, Notes) {
        let recorded = self.gpu.0.backend.end_recording();
        let mut state = lock(&self.gpu.0.state);
        if let Some(outer) = self.outer.take() {
            state.arena = outer;
        }
        (recorded, state.notes.take().unwrap_or_default())
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if self.outer.is_some() {
            drop(self.over());
        }
    }
}

/// Random numbers by their full name.
pub struct Draw {
    pub name: String,
    pub count: usize,
    /// For how many images of a batch they are; None: for the whole batch at once.
    pub rows: Option<usize>,
}

impl Draw {
    /// As `rng` gives them.
    pub fn numbers(&self, rng: &Rng) -> Result<Vec<f32>> {
        let rng = rng.within("");
        match self.rows {
            Some(rows) => rng.rows(&self.name, rows, self.count.checked_div(rows).unwrap_or(0)),
            None => rng.uniform(&self.name, self.count),
        }
    }
}

/// Numbers that each replay draws afresh.
pub(super) struct Drawn {
    pub draw: Draw,
    pub block: Arc<Block>,
}

/// What recorded work draws, and what it uses besides memory.
#[derive(Default)]
pub(super) struct Notes {
    pub draws: Vec<Drawn>,
    pub used: Vec<Arc<dyn Any + Send + Sync>>,
}

/// Recorded work, its memory, what it draws and uses. The work goes first.
pub struct Graph {
    pub(super) recorded: Box<dyn Recorded>,
    pub(super) gpu: Gpu,
    pub(super) notes: Notes,
    pub(super) _arena: Arc<Arena>,
}

impl Graph {
    /// Does the recorded work once more, with the numbers that `rng` gives for the recorded names.
    pub fn replay(&self, rng: &Rng) -> Result<()> {
        ensure!(!self.gpu.is_recording(), "{}: recorded work is not replayed inside a recording", self.gpu.name());
        for Drawn { draw, block } in &self.notes.draws {
            self.gpu.upload(block, 0, bytemuck::cast_slice(&draw.numbers(rng)?))?;
        }
        self.recorded.replay().context("replaying recorded work")
    }
}
