//! LAMB: AdamW whose step on each parameter is brought to the size of its values, as NVIDIA's FusedLAMB makes it (DeiT-III).
//!
//!   g = g / max(1, |all g| / most)                              one length over all gradients
//!   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
//!   u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd p
//!   p = p - lr q u,   q = |p| / |u| where the group decays, and 1 where it does not or either norm is 0
//!
//! Norms are over a whole tensor, sums in f64. State: m is "exp_avg", v is "exp_avg_sq". Memory is passed over twice: the norm of u has to be known before
//! anything can move. GPU: kernels/lamb.cu.

use super::Optimizer;
use super::clip;
use super::groups::Group;
use super::state::{FlatUpdate, Piece, Plan, State};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::param::Params;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;
use std::ops::Range;

pub struct Lamb {
    betas: (f64, f64),
    eps: f64,
    /// Longest gradient that is taken as it is.
    most: f64,
    /// Length of the gradient, where a part of it is here.
    whole: Option<f64>,
    state: State,
}

impl Lamb {
    /// Longest gradient of FusedLAMB.
    pub const MOST: f64 = 1.0;

    pub fn new(groups: Vec<Group>, betas: (f64, f64), eps: f64, most: f64) -> Result<Self> {
        let fraction = |beta| (0.0..1.0).contains(&beta);
        ensure!(fraction(betas.0) && fraction(betas.1), "lamb: the betas {betas:?} are not both in [0, 1)");
        ensure!(eps > 0.0 && eps.is_finite(), "lamb: an eps of {eps} is not a positive number");
        ensure!(most > 0.0 && most.is_finite(), "lamb: gradients cannot be clipped to a length of {most}");
        Ok(Self { betas, eps, most, whole: None, state: State::new("lamb", &["exp_avg", "exp_avg_sq"], groups)? })
    }
}

impl Optimizer for Lamb {
    fn prepare(&mut self, params: &Params, lr: f64) -> Result<()> {
        let (betas, eps) = (self.betas, self.eps);
        self.state.prepare(params, lr, |plan| {
            let rule = Rule::<f32>::of(plan, betas, eps, 1.0);
            [rule.decay, rule.rate, rule.root, rule.lr]
        })
    }

    fn apply(&mut self, params: &mut Params) -> Result<()> {
        match params.device().gpu().cloned() {
            None => by_real!("lamb", params.dtype(), apply(self, params)),
            Some(gpu) => apply_on(&gpu, self, params),
        }
    }

    fn whole_length(&mut self, length: f64) {
        self.whole = Some(length);
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
    decay: T,
    /// 1 / (1 - b1^t)
    rate: T,
    /// 1 / sqrt(1 - b2^t)
    root: T,
    /// lr, and lr q once q is known.
    lr: T,
    /// By which gradients are shortened.
    scale: T,
    betas: (T, T),
    /// 1 - b1, 1 - b2
    rests: (T, T),
    eps: T,
}

impl<T: Real> Rule<T> {
    fn of(plan: &Plan, (b1, b2): (f64, f64), eps: f64, scale: f64) -> Self {
        let t = plan.steps as f64;
        Self {
            decay: T::of(plan.weight_decay),
            rate: T::of(1.0 / (1.0 - b1.powf(t))),
            root: T::of(1.0 / (1.0 - b2.powf(t)).sqrt()),
            lr: T::of(plan.lr),
            scale: T::of(scale),
            betas: (T::of(b1), T::of(b2)),
            rests: (T::of(1.0 - b1), T::of(1.0 - b2)),
            eps: T::of(eps),
        }
    }

    #[inline(always)]
    fn step(&self, p: T, m: T, v: T) -> T {
        self.decay.mul_add(p, self.rate * m / v.sqrt().mul_add(self.root, self.eps))
    }
}

fn apply<T: Real + Element>(lamb: &mut Lamb, params: &mut Params) -> Result<()> {
    let norm = lamb.whole.take().map_or_else(|| clip::norm::<T>(params), Ok)?;
    let scale = if norm > lamb.most { lamb.most / norm } else { 1.0 };
    let (mut pieces, mut tensors) = (Vec::new(), Vec::<(Plan, Range<usize>)>::new());
    for update in lamb.state.lend::<2>(params)? {
        let (plan, first) = (update.plan, pieces.len());
        update.cut(Rule::<T>::of(&plan, lamb.betas, lamb.eps, scale), &mut pieces);
        tensors.push((plan, first..pieces.len()));
    }
    let remembered = pieces.par_iter_mut().map(|Piece { rule, value, gradient, state: [m, v] }| remember(value, gradient, m, v, *rule));
    let sums: Vec<(f64, f64)> = remembered.collect();
    for (plan, range) in tensors {
        let (p, u) = sums[range.clone()].iter().fold((0.0, 0.0), |sum, piece| (sum.0 + piece.0, sum.1 + piece.1));
        let q = if plan.weight_decay > 0.0 && p > 0.0 && u > 0.0 { (p / u).sqrt() } else { 1.0 };
        pieces[range].iter_mut().for_each(|piece| piece.rule.lr *= T::of(q));
    }
    pieces.into_par_iter().for_each(|Piece { rule, value, state: [m, v], .. }| move_piece(value, m, v, rule));
    Ok(())
}

fn apply_on(gpu: &Gpu, lamb: &mut Lamb, params: &mut Params) -> Result<()> {
    let ((b1, b2), eps) = (lamb.betas, lamb.eps);
    let squares = match lamb.whole.take() {
        Some(length) => Tensor::from_slice(&[1], &[length * length])?.on(params.device())?,
        None => clip::squares_on(gpu, params)?,
    };
    let Some(update) = lamb.state.lend_flat::<2>(params)? else { return Ok(()) };
    let FlatUpdate { mut values, mut working, gradients, state: [mut m, mut v], pieces } = update;
    let mut scale = pieces.scalars.alike(&[1], Dtype::F32)?;
    let args = Args::new().out(&mut scale).input(&squares).int(squares.numel()).float(lamb.most);
    gpu.launch("lamb_scale_f32", Launch::new(1, 256), args)?;
    let mut sums = pieces.scalars.alike(&[pieces.count, 2], Dtype::F64)?;
    let args = Args::new().out(&mut m).out(&mut v).out(&mut sums).input(&values).input(&gradients).input(&scale);
    let args = args.input(&pieces.table).input(&pieces.scalars);
    let args = args.float(b1).float(b2).float(1.0 - b1).float(1.0 - b2).float(eps);
    gpu.launch("lamb_moments_f32", Launch::new(pieces.count, 256), args)?;
    let slots = pieces.scalars.shape()[0];
    let mut ratio = pieces.scalars.alike(&[slots], Dtype::F32)?;
    let args = Args::new().out(&mut ratio).input(&sums).input(&pieces.firsts).input(&pieces.scalars);
    gpu.launch("lamb_ratio_f32", Launch::new(slots, 256), args)?;
    let args = Args::new().out(&mut values).maybe_out(working.as_mut()).input(&m).input(&v).input(&ratio);
    let args = args.input(&pieces.table).input(&pieces.scalars).float(eps);
    gpu.launch("lamb_f32", Launch::new(pieces.count, 256), args)
}

vectorised! {
    /// Moves the moments; answers the sums of p^2 and u^2.
    fn remember<T: Real>(p: &[T], g: &[T], m: &mut [T], v: &mut [T], rule: Rule<T>) -> (f64, f64) {
        let n = p.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let g = g[i] * rule.scale;
            m[i] = rule.rests.0.mul_add(g, rule.betas.0 * m[i]);
            v[i] = (rule.rests.1 * g).mul_add(g, rule.betas.1 * v[i]);
        }
        let (m, v) = (&m[..n], &v[..n]);
        let step = |i: usize| rule.step(p[i], m[i], v[i]).f64();
        (lane_sum(n, |i| p[i].f64() * p[i].f64()), lane_sum(n, |i| step(i) * step(i)))
    }

    fn move_piece<T: Real>(p: &mut [T], m: &[T], v: &[T], rule: Rule<T>) {
        let n = p.len();
        let (m, v) = (&m[..n], &v[..n]);
        for i in 0..n {
            p[i] -= rule.lr * rule.step(p[i], m[i], v[i]);
        }
    }
}
