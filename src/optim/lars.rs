//! LARS: momentum whose gradients are brought to the size of their weights, for linear probing.
//!
//!   d = q (g + wd p),   q = trust |p| / |g + wd p|, or 1 where either norm is 0
//!   mu = momentum mu + d,   p = p - lr mu
//!
//! Norms are over a whole tensor. Vectors (biases) are neither decayed nor scaled. State: "mu", which starts at zero. GPU: kernels/lars.cu for q, which
//! never leaves the device, and kernels/sgd.cu.

use super::Optimizer;
use super::groups::Group;
use super::sgd::{Rule, move_all, move_all_on};
use super::state::{PIECE, State};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::param::Params;
use crate::tensor::{Dtype, Element};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

pub struct Lars {
    momentum: f64,
    trust: f64,
    state: State,
}

impl Lars {
    pub fn new(groups: Vec<Group>, momentum: f64, trust: f64) -> Result<Self> {
        ensure!((0.0..1.0).contains(&momentum), "lars: a momentum of {momentum} is not in [0, 1)");
        ensure!(trust > 0.0 && trust.is_finite(), "lars: a trust coefficient of {trust} is not a positive number");
        Ok(Self { momentum, trust, state: State::new("lars", &["mu"], groups)? })
    }
}

impl Optimizer for Lars {
    fn prepare(&mut self, params: &Params, lr: f64) -> Result<()> {
        self.state.prepare(params, lr, |plan| match plan.vector {
            true => [0.0, plan.lr as f32, 0.0, 1.0],
            false => [plan.weight_decay as f32, plan.lr as f32, 1.0, 1.0],
        })
    }

    fn apply(&mut self, params: &mut Params) -> Result<()> {
        match params.device().gpu().cloned() {
            None => by_real!("lars", params.dtype(), apply(self, params)),
            Some(gpu) => apply_on(&gpu, self, params),
        }
    }

    fn state(&self) -> &State {
        &self.state
    }

    fn state_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

fn apply<T: Real + Element>(lars: &mut Lars, params: &mut Params) -> Result<()> {
    let mut pieces = Vec::new();
    for update in lars.state.lend::<1>(params)? {
        let plan = update.plan;
        let (decay, trust) = if plan.vector {
            (T::ZERO, T::ONE)
        } else {
            let decay = T::of(plan.weight_decay);
            let (weight, gradient) = norms(update.value.data::<T>(), update.gradient.data(), decay);
            let q = if weight > 0.0 && gradient > 0.0 { lars.trust * weight / gradient } else { 1.0 };
            (decay, T::of(q))
        };
        let rule = Rule { decay, trust, momentum: T::of(lars.momentum), lr: T::of(plan.lr) };
        update.cut::<T, _>(rule, &mut pieces);
    }
    move_all(pieces);
    Ok(())
}

fn apply_on(gpu: &Gpu, lars: &mut Lars, params: &mut Params) -> Result<()> {
    let Some(update) = lars.state.lend_flat(params)? else { return Ok(()) };
    let pieces = update.pieces;
    let mut sums = pieces.scalars.alike(&[pieces.count, 2], Dtype::F64)?;
    let args = Args::new().out(&mut sums).input(&update.values).input(&update.gradients).input(&pieces.table).input(&pieces.scalars);
    gpu.launch("lars_norms_f32", Launch::new(pieces.count, 256), args)?;
    let slots = pieces.scalars.shape()[0];
    let mut trust = pieces.scalars.alike(&[slots], Dtype::F32)?;
    let rest = lars.trust - f64::from(lars.trust as f32);
    let args = Args::new().out(&mut trust).input(&sums).input(&pieces.firsts).float(lars.trust).float(rest);
    gpu.launch("lars_trust_f32", Launch::new(slots, 256), args)?;
    move_all_on(gpu, update, lars.momentum, Some(&trust))
}

/// |p| and |g + decay p|.
fn norms<T: Real>(p: &[T], g: &[T], decay: T) -> (f64, f64) {
    let pieces = p.par_chunks(PIECE).zip(g.par_chunks(PIECE));
    let sums: Vec<(f64, f64)> = pieces.map(|(p, g)| squares(p, g, decay)).collect();
    let (p, g) = sums.into_iter().fold((0.0, 0.0), |sum, piece| (sum.0 + piece.0, sum.1 + piece.1));
    (p.sqrt(), g.sqrt())
}

vectorised! {
    fn squares<T: Real>(p: &[T], g: &[T], decay: T) -> (f64, f64) {
        let n = p.len();
        let g = &g[..n];
        let decayed = |i: usize| decay.mul_add(p[i], g[i]).f64();
        (lane_sum(n, |i| p[i].f64() * p[i].f64()), lane_sum(n, |i| decayed(i) * decayed(i)))
    }
}
