//! Gradient descent with momentum.
//!
//!   d = g + wd p,   buffer = momentum buffer + d,   p = p - lr buffer
//!
//! The buffer starts at zero. State: "momentum_buffer".

use super::Optimizer;
use super::groups::Group;
use super::state::{Piece, State};
use crate::device::simd::Real;
use crate::error::Result;
use crate::param::Params;
use crate::tensor::Element;
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

pub struct Sgd {
    momentum: f64,
    state: State,
}

impl Sgd {
    pub fn new(groups: Vec<Group>, momentum: f64) -> Result<Self> {
        ensure!((0.0..1.0).contains(&momentum), "sgd: a momentum of {momentum} is not in [0, 1)");
        Ok(Self { momentum, state: State::new("sgd", &["momentum_buffer"], groups)? })
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, params: &mut Params, lr: f64) -> Result<()> {
        by_real!("sgd", params.dtype(), step(self, params, lr))
    }

    fn state(&self) -> &State {
        &self.state
    }

    fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

fn step<T: Real + Element>(sgd: &mut Sgd, params: &mut Params, lr: f64) -> Result<()> {
    let mut pieces = Vec::new();
    for update in sgd.state.lend::<1>(params, lr)? {
        *update.steps += 1;
        let rule = Rule { decay: T::of(update.weight_decay), trust: T::ONE, momentum: T::of(sgd.momentum), lr: T::of(update.lr) };
        update.cut::<T, _>(rule, &mut pieces);
    }
    move_all(pieces);
    Ok(())
}

/// buffer = momentum buffer + trust (g + decay p),   p = p - lr buffer
#[derive(Clone, Copy)]
pub(super) struct Rule<T> {
    pub decay: T,
    pub trust: T,
    pub momentum: T,
    pub lr: T,
}

pub(super) fn move_all<T: Real>(pieces: Vec<Piece<T, Rule<T>, 1>>) {
    pieces.into_par_iter().for_each(|Piece { rule, value, gradient, state: [buffer] }| move_piece(value, gradient, buffer, rule));
}

vectorised! {
    fn move_piece<T: Real>(p: &mut [T], g: &[T], buffer: &mut [T], rule: Rule<T>) {
        let n = p.len();
        let (g, buffer) = (&g[..n], &mut buffer[..n]);
        for i in 0..n {
            let d = rule.trust * rule.decay.mul_add(p[i], g[i]);
            buffer[i] = rule.momentum.mul_add(buffer[i], d);
            p[i] -= rule.lr * buffer[i];
        }
    }
}
