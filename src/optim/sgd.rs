//! Gradient descent with momentum.
//!
//!   d = g + wd p,   buffer = momentum buffer + d,   p = p - lr buffer
//!
//! The buffer starts at zero. State: "momentum_buffer". GPU: kernels/sgd.cu.

use super::Optimizer;
use super::groups::Group;
use super::state::{FlatUpdate, Piece, State};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::simd::Real;
use crate::error::Result;
use crate::param::Params;
use crate::tensor::{Element, Tensor};
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
    fn prepare(&mut self, params: &Params, lr: f64) -> Result<()> {
        self.state.prepare(params, lr, |plan| [plan.weight_decay as f32, plan.lr as f32, 0.0, 1.0])
    }

    fn apply(&mut self, params: &mut Params) -> Result<()> {
        match params.device().gpu().cloned() {
            None => by_real!("sgd", params.dtype(), apply(self, params)),
            Some(gpu) => self.state.lend_flat(params)?.map_or(Ok(()), |update| move_all_on(&gpu, update, self.momentum, None)),
        }
    }

    fn state(&self) -> &State {
        &self.state
    }

    fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

fn apply<T: Real + Element>(sgd: &mut Sgd, params: &mut Params) -> Result<()> {
    let mut pieces = Vec::new();
    for update in sgd.state.lend::<1>(params)? {
        let plan = update.plan;
        let rule = Rule { decay: T::of(plan.weight_decay), trust: T::ONE, momentum: T::of(sgd.momentum), lr: T::of(plan.lr) };
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

/// `trust`: a factor for each slot.
pub(super) fn move_all_on(gpu: &Gpu, update: FlatUpdate<1>, momentum: f64, trust: Option<&Tensor>) -> Result<()> {
    let FlatUpdate { mut values, mut working, gradients, state: [mut buffer], pieces } = update;
    let args = Args::new().out(&mut values).maybe_out(working.as_mut()).out(&mut buffer).input(&gradients).maybe(trust);
    let args = args.input(&pieces.table).input(&pieces.scalars).float(momentum);
    gpu.launch("sgd_f32", Launch::new(pieces.count, 256), args)
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
