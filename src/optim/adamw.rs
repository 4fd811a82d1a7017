//! AdamW: Adam with decoupled weight decay.
//!
//!   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
//!   p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//!
//! t counts the updates of each parameter. State: m is "exp_avg", v is "exp_avg_sq". Memory is passed over once. GPU: kernels/adamw.cu.

use super::Optimizer;
use super::groups::Group;
use super::state::{FlatUpdate, Piece, Plan, State};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::simd::Real;
use crate::error::Result;
use crate::param::Params;
use crate::tensor::Element;
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

pub struct AdamW {
    betas: (f64, f64),
    eps: f64,
    state: State,
}

impl AdamW {
    pub fn new(groups: Vec<Group>, betas: (f64, f64), eps: f64) -> Result<Self> {
        let fraction = |beta| (0.0..1.0).contains(&beta);
        ensure!(fraction(betas.0) && fraction(betas.1), "adamw: the betas {betas:?} are not both in [0, 1)");
        ensure!(eps > 0.0 && eps.is_finite(), "adamw: an eps of {eps} is not a positive number");
        Ok(Self { betas, eps, state: State::new("adamw", &["exp_avg", "exp_avg_sq"], groups)? })
    }
}

impl Optimizer for AdamW {
    fn prepare(&mut self, params: &Params, lr: f64) -> Result<()> {
        let (betas, eps) = (self.betas, self.eps);
        self.state.prepare(params, lr, |plan| {
            let rule = Rule::<f32>::of(plan, betas, eps);
            [rule.decay, rule.rate, rule.root, 1.0]
        })
    }

    fn apply(&mut self, params: &mut Params) -> Result<()> {
        match params.device().gpu().cloned() {
            None => by_real!("adamw", params.dtype(), apply(self, params)),
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

/// The scalars of one parameter's update, each worked out in f64.
#[derive(Clone, Copy)]
struct Rule<T> {
    /// lr wd
    decay: T,
    /// lr / (1 - b1^t)
    rate: T,
    /// 1 / sqrt(1 - b2^t)
    root: T,
    betas: (T, T),
    /// 1 - b1, 1 - b2
    rests: (T, T),
    eps: T,
}

impl<T: Real> Rule<T> {
    fn of(plan: &Plan, (b1, b2): (f64, f64), eps: f64) -> Self {
        let t = plan.steps as f64;
        Self {
            decay: T::of(plan.lr * plan.weight_decay),
            rate: T::of(plan.lr / (1.0 - b1.powf(t))),
            root: T::of(1.0 / (1.0 - b2.powf(t)).sqrt()),
            betas: (T::of(b1), T::of(b2)),
            rests: (T::of(1.0 - b1), T::of(1.0 - b2)),
            eps: T::of(eps),
        }
    }
}

fn apply<T: Real + Element>(adamw: &mut AdamW, params: &mut Params) -> Result<()> {
    let mut pieces = Vec::new();
    for update in adamw.state.lend::<2>(params)? {
        let rule = Rule::<T>::of(&update.plan, adamw.betas, adamw.eps);
        update.cut(rule, &mut pieces);
    }
    pieces.into_par_iter().for_each(|Piece { rule, value, gradient, state: [m, v] }| move_piece(value, gradient, m, v, rule));
    Ok(())
}

fn apply_on(gpu: &Gpu, adamw: &mut AdamW, params: &mut Params) -> Result<()> {
    let ((b1, b2), eps) = (adamw.betas, adamw.eps);
    let Some(update) = adamw.state.lend_flat::<2>(params)? else { return Ok(()) };
    let FlatUpdate { mut values, mut working, gradients, state: [mut m, mut v], pieces } = update;
    let args = Args::new().out(&mut values).maybe_out(working.as_mut()).out(&mut m).out(&mut v).input(&gradients);
    let args = args.input(&pieces.table).input(&pieces.scalars).float(b1).float(b2).float(1.0 - b1).float(1.0 - b2).float(eps);
    gpu.launch("adamw_f32", Launch::new(pieces.count, 256), args)
}

vectorised! {
    fn move_piece<T: Real>(p: &mut [T], g: &[T], m: &mut [T], v: &mut [T], rule: Rule<T>) {
        let n = p.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            m[i] = rule.rests.0.mul_add(g[i], rule.betas.0 * m[i]);
            v[i] = (rule.rests.1 * g[i]).mul_add(g[i], rule.betas.1 * v[i]);
            let size = v[i].sqrt().mul_add(rule.root, rule.eps);
            // Decay and move are summed before they meet p: in f32, 1 - lr wd would lose most of a small lr wd.
            p[i] -= rule.decay.mul_add(p[i], rule.rate * m[i] / size);
        }
    }
}
