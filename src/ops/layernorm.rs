//! Layer normalisation over the last axis, with the residual sum before it on request.
//!
//!   y  = n w + b,   n = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps), the variance biased, in two passes
//!   dx = rstd (dn - avg(dn) - n avg(dn n)),   dn = dy w
//!   dw = sum_rows(dy n),   db = sum_rows(dy)
//!
//! x [.., C]; w, b [C] or both absent. Saved for backward: x, w, mean [rows], rstd [rows].
//! GPU: kernels/layernorm.cu. There the sum and its norm are written in one pass, and dx is added to the gradient that x has already.

use super::beside;
use super::case::{Case, rounded};
use super::scale::Branch;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, Versions};
use crate::device::parallel;
use crate::device::simd::{LANES, Real, add, fold, sum_of};
use crate::error::Result;
use crate::tape::{Need, Var};
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

pub const VERSIONS: Versions = Versions { op: "layernorm", all: &["v1", "v2", "v3"], chosen: "v3" };

impl Var {
    pub fn layernorm(&self, w: &Var, b: &Var, eps: f64) -> Result<Var> {
        let (x, affine) = (self.value(), checked(self.value(), w, b)?);
        let (y, saved) = match x.gpu() {
            None => by_real!("layernorm", x.dtype(), forward(x, Some(affine), eps))?,
            Some(gpu) => forward_on(gpu, x, Some(affine), eps)?,
        };
        recorded(self, w, b, y, saved)
    }

    /// Without weight and bias.
    pub fn layernorm_plain(&self, eps: f64) -> Result<Var> {
        let x = self.value().clone();
        let (y, saved) = match x.gpu() {
            None => by_real!("layernorm", x.dtype(), forward(&x, None, eps))?,
            Some(gpu) => forward_on(gpu, &x, None, eps)?,
        };
        Var::record("layernorm", [self], y, move |dy, need| {
            let [dx, _, _] = gradients(dy, &x, None, &saved, need)?;
            Ok([dx])
        })
    }

    /// The residual sum of self and the branch, and its layer norm: [`Var::add_branch`] and [`Var::layernorm`], on a GPU in one pass.
    pub fn add_layernorm(&self, branch: &Branch, w: &Var, b: &Var, eps: f64) -> Result<(Var, Var)> {
        let Some(gpu) = self.value().gpu() else {
            let sum = self.add_branch(branch)?;
            let y = sum.layernorm(w, b, eps)?;
            return Ok((sum, y));
        };
        let (sum, y, saved) = sum_and_forward_on(gpu, self.value(), branch, checked(self.value(), w, b)?, eps)?;
        let sum = branch.recorded(self, sum)?;
        let y = recorded(&sum, w, b, y, saved)?;
        Ok((sum, y))
    }
}

/// Weight and bias, once they fit x.
fn checked<'a>(x: &Tensor, w: &'a Var, b: &'a Var) -> Result<(&'a Tensor, &'a Tensor)> {
    for (name, v) in [("weight", w.value()), ("bias", b.value())] {
        ensure!(v.shape() == [x.last()] && v.dtype() == beside(x.dtype()), "layernorm: {name} is {v:?} but x is {x:?}");
    }
    Ok((w.value(), b.value()))
}

fn recorded(x: &Var, w: &Var, b: &Var, y: Tensor, saved: Saved) -> Result<Var> {
    let (input, weight) = (x.value().clone(), w.value().clone());
    Var::record("layernorm", [x, w, b], y, move |dy, need| gradients(dy, &input, Some(&weight), &saved, need))
}

fn gradients(dy: Tensor, x: &Tensor, w: Option<&Tensor>, saved: &Saved, need: &mut Need) -> Result<[Option<Tensor>; 3]> {
    match x.gpu() {
        None => by_real!("layernorm", x.dtype(), backward(dy, x, w, saved, need)),
        Some(gpu) => backward_on(gpu, &dy, x, w, saved, need),
    }
}

/// Mean and 1/deviation of each row, interleaved.
struct Saved(Tensor);

vectorised! {
    fn forward_rows<T: Real>(x: &[T], affine: Option<(&[T], &[T])>, eps: T, y: &mut [T], saved: &mut [T], c: usize) {
        let scale = T::of(1.0 / c as f64);
        for ((x, y), saved) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(saved.chunks_exact_mut(2)) {
            let mean = sum_of(x, |x| x) * scale;
            let variance = sum_of(x, |x| (x - mean) * (x - mean)) * scale;
            let rstd = T::ONE / (variance + eps).sqrt();
            match affine {
                Some((w, b)) => {
                    y.iter_mut().zip(x).zip(w).zip(b).for_each(|(((y, &x), &w), &b)| *y = ((x - mean) * rstd).mul_add(w, b));
                }
                None => y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - mean) * rstd),
            }
            (saved[0], saved[1]) = (mean, rstd);
        }
    }

    /// dy becomes dx; dw and db grow.
    fn backward_rows<T: Real>(dy: &mut [T], x: &[T], w: &[T], saved: &[T], dw: &mut [T], db: &mut [T], c: usize) {
        let scale = T::of(1.0 / c as f64);
        for ((dy, x), saved) in dy.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(saved.chunks_exact(2)) {
            let (mean, rstd) = (saved[0], saved[1]);
            // One pass for all four sums: dw, db, and over the row dn and dn n.
            let (mut sums, mut products) = ([T::ZERO; LANES], [T::ZERO; LANES]);
            let ((dy16, dy_rest), (x16, x_rest), (w16, w_rest)) = (dy.as_chunks::<LANES>(), x.as_chunks::<LANES>(), w.as_chunks::<LANES>());
            let ((dw16, dw_rest), (db16, db_rest)) = (dw.as_chunks_mut::<LANES>(), db.as_chunks_mut::<LANES>());
            for ((((dy, x), w), dw), db) in dy16.iter().zip(x16).zip(w16).zip(dw16).zip(db16) {
                for l in 0..LANES {
                    let (n, dn) = ((x[l] - mean) * rstd, dy[l] * w[l]);
                    dw[l] += dy[l] * n;
                    db[l] += dy[l];
                    sums[l] += dn;
                    products[l] += dn * n;
                }
            }
            for (l, ((((&dy, &x), &w), dw), db)) in dy_rest.iter().zip(x_rest).zip(w_rest).zip(dw_rest).zip(db_rest).enumerate() {
                let (n, dn) = ((x - mean) * rstd, dy * w);
                *dw += dy * n;
                *db += dy;
                sums[l] += dn;
                products[l] += dn * n;
            }
            let average = fold(sums, |a, b| a + b) * scale;
            let projection = fold(products, |a, b| a + b) * scale;
            for ((dy, &x), &w) in dy.iter_mut().zip(x).zip(w) {
                *dy = rstd * (*dy * w - average - (x - mean) * rstd * projection);
            }
        }
    }
}

fn forward<T: Real + Element>(x: &Tensor, affine: Option<(&Tensor, &Tensor)>, eps: f64) -> Result<(Tensor, Saved)> {
    let c = x.last();
    ensure!(c > 0, "layernorm: x is {x:?}, its last axis is empty");
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let mut saved = Tensor::empty(&[x.rows(), 2], x.dtype())?;
    let (data, affine) = (x.data::<T>(), affine.map(|(w, b)| (w.data::<T>(), b.data::<T>())));
    parallel::rows2(y.data_mut::<T>(), c, saved.data_mut::<T>(), 2, |first, y, saved| {
        forward_rows(&data[first * c..first * c + y.len()], affine, T::of(eps), y, saved, c);
    });
    Ok((y, Saved(saved)))
}

/// Rows of one partial sum of dw and db.
const BLOCK: usize = 32;

fn backward<T: Real + Element>(dy: Tensor, x: &Tensor, w: Option<&Tensor>, saved: &Saved, need: &mut Need) -> Result<[Option<Tensor>; 3]> {
    let (c, rows) = (x.last(), x.rows());
    let ones = if w.is_some() { None } else { Some(vec![T::ONE; c]) };
    let weight = ones.as_deref().unwrap_or_else(|| w.expect("there are weights or ones").data::<T>());
    let blocks = rows.div_ceil(BLOCK).max(1);
    let mut partial = Tensor::zeros(&[blocks, 2, c], x.dtype())?;
    let (mut dx, source) = if dy.is_unique() { (dy, None) } else { (Tensor::empty(x.shape(), x.dtype())?, Some(dy)) };
    let (x, saved, source) = (x.data::<T>(), saved.0.data::<T>(), source.as_ref().map(|dy| dy.data::<T>()));
    let pieces = dx.data_mut::<T>().par_chunks_mut(BLOCK * c).zip(partial.data_mut::<T>().par_chunks_mut(2 * c));
    pieces.enumerate().for_each(|(i, (dx, partial))| {
        let (dw, db) = partial.split_at_mut(c);
        let (first, rows) = (i * BLOCK, dx.len() / c);
        let part = first * c..(first + rows) * c;
        if let Some(dy) = source {
            dx.copy_from_slice(&dy[part.clone()]);
        }
        backward_rows(dx, &x[part], weight, &saved[2 * first..2 * (first + rows)], dw, db, c);
    });
    let sums = |which: usize| {
        let partial = partial.data::<T>();
        move |out: &mut Tensor| {
            let out = out.data_mut::<T>();
            out.fill(T::ZERO);
            (0..blocks).for_each(|block| add(out, &partial[(2 * block + which) * c..][..c]));
            Ok(())
        }
    };
    let (dw, db) = if w.is_some() { (need.give(1, sums(0))?, need.give(2, sums(1))?) } else { (None, None) };
    Ok([need.wants(0).then_some(dx), dw, db])
}

/// The version for x, and what the names of its kernels end with.
fn version(gpu: &Gpu, x: &Tensor) -> (&'static str, String) {
    let (c, dtype) = (x.last(), x.dtype());
    match gpu.version(&VERSIONS) {
        "v1" => ("v1", dtype.to_string()),
        "v3" if c.is_multiple_of(8) && c <= 1280 => ("v3", format!("{dtype}_c{}", c.next_multiple_of(256))),
        _ => ("v2", dtype.to_string()),
    }
}

fn forward_launch(version: &str, rows: usize) -> Launch {
    if version == "v1" { Launch::new(rows.div_ceil(128), 128) } else { Launch::new(rows.div_ceil(8), 256) }
}

fn forward_on(gpu: &Gpu, x: &Tensor, affine: Option<(&Tensor, &Tensor)>, eps: f64) -> Result<(Tensor, Saved)> {
    let (rows, c) = (x.rows(), x.last());
    ensure!(c > 0, "layernorm: x is {x:?}, its last axis is empty");
    let mut y = x.alike(x.shape(), x.dtype())?;
    let mut saved = x.alike(&[rows, 2], Dtype::F32)?;
    let (version, ending) = version(gpu, x);
    let args = Args::new().out(&mut y).out(&mut saved).input(x).maybe(affine.map(|(w, _)| w)).maybe(affine.map(|(_, b)| b));
    gpu.launch(&format!("layernorm_fwd_{version}_{ending}"), forward_launch(version, rows), args.int(rows).int(c).float(eps))?;
    Ok((y, Saved(saved)))
}

/// The residual sum and its norm.
fn sum_and_forward_on(gpu: &Gpu, x: &Tensor, branch: &Branch, (w, b): (&Tensor, &Tensor), eps: f64) -> Result<(Tensor, Tensor, Saved)> {
    ensure!(x.shape().len() > 1 && x.last() > 0, "layernorm: x is {x:?} but rows of channels are needed");
    let factors = branch.factors(x)?;
    let [mut sum, mut y] = [x.alike(x.shape(), x.dtype())?, x.alike(x.shape(), x.dtype())?];
    let mut saved = x.alike(&[x.rows(), 2], Dtype::F32)?;
    let (version, ending) = version(gpu, x);
    let args = factors.pointers(Args::new().out(&mut sum).out(&mut y).out(&mut saved).input(x).input(branch.value.value()));
    let args = factors.sizes(args.input(w).input(b)).float(eps);
    gpu.launch(&format!("add_layernorm_fwd_{version}_{ending}"), forward_launch(version, x.rows()), args)?;
    Ok((sum, y, Saved(saved)))
}

/// As many blocks as fit on an H100 or H200 twice: each leaves one share of dw and db behind.
const SHARES: usize = 264;

fn backward_on(gpu: &Gpu, dy: &Tensor, x: &Tensor, w: Option<&Tensor>, saved: &Saved, need: &mut Need) -> Result<[Option<Tensor>; 3]> {
    let (rows, c) = (x.rows(), x.last());
    let base = if need.wants(0) { need.so_far(0) } else { None };
    let mut dx = if need.wants(0) { Some(x.alike(x.shape(), x.dtype())?) } else { None };
    let wanted = |need: &Need, i: usize| w.is_some() && need.wants(i);
    let sums = wanted(need, 1) || wanted(need, 2);
    let (version, ending) = version(gpu, x);
    let (launch, parts) = match version {
        "v1" => (Launch::new(rows.div_ceil(32 * 128), 128), rows.div_ceil(32)),
        _ => {
            // A warp of version 2 has 2 C floats of shared memory.
            let warps = if version == "v2" && sums { ((48 << 10) / (8 * c)).clamp(1, 8) } else { 8 };
            let blocks = rows.div_ceil(warps).min(SHARES);
            (Launch::new(blocks, 32 * warps).shared(if version == "v2" && sums { warps * 8 * c } else { 0 }), blocks)
        }
    };
    let mut partial = if sums { Some(x.alike(&[parts, 2, c], Dtype::F32)?) } else { None };
    let args = Args::new().maybe_out(dx.as_mut()).maybe_out(partial.as_mut()).input(dy).input(x);
    let args = args.maybe(w).maybe(base.as_ref()).input(&saved.0).int(rows).int(c);
    gpu.launch(&format!("layernorm_bwd_{version}_{ending}"), launch, args)?;
    let Some(partial) = partial else { return Ok([dx, None, None]) };
    let mut dw = if need.wants(1) { Some(need.out(1)?) } else { None };
    let mut db = if need.wants(2) { Some(need.out(2)?) } else { None };
    let args = Args::new().maybe_out(dw.as_mut()).maybe_out(db.as_mut()).input(&partial).int(parts).int(c);
    gpu.launch("layernorm_bwd_sums_f32", Launch::new(0, 1024).grid(c.div_ceil(32), 2, 1), args)?;
    Ok([dx, dw, db])
}

pub fn cases() -> Vec<Case> {
    let affine = |eps: f64| move |x: &[Var]| x[0].layernorm(&x[1], &x[2], eps);
    let of = |name: &str, shape: &[usize], eps: f64| {
        let c = [shape[shape.len() - 1]];
        Case::new(&format!("layernorm: {name}"), &[shape, &c, &c], affine(eps)).vectors(&[1, 2])
    };
    // The sum takes the gradient of its norm on top of that of its own use.
    let summed = |name: &str, shape: &[usize], gains: bool, drop: bool| {
        let c = [shape[shape.len() - 1]];
        let u = Tensor::from_slice(&[4], &[0.1f32, 0.9, 0.2, 0.3]).expect("four numbers");
        let branch = move |x: &[Var]| Branch { value: x[1].clone(), gains: x.get(4).cloned(), drop: drop.then(|| (u.clone(), 0.25)) };
        let again = branch.clone();
        Case::new(&format!("layernorm: {name}"), &[shape, shape, &c, &c, &c][..4 + gains as usize], move |x| {
            let (sum, y) = x[0].add_layernorm(&branch(x), &x[2], &x[3], 1e-6)?;
            y.add(&sum)
        })
        .vectors(&[2, 3, 4][..2 + gains as usize])
        .rounded(move |x| {
            let sum = rounded(&x[0].add_branch(&again(x))?)?;
            rounded(&sum.layernorm(&x[2], &x[3], 1e-6)?)?.add(&sum)
        })
    };
    vec![
        of("2 x 3 rows, C = 48", &[2, 3, 48], 1e-6),
        of("one row, C = 37", &[1, 37], 1e-5),
        of("C = 1", &[3, 1], 1e-6),
        of("several blocks of rows", &[150, 20], 1e-6),
        of("more rows than the blocks have warps", &[2200, 8], 1e-6),
        of("C = 192", &[9, 192], 1e-6),
        of("C = 384", &[2, 384], 1e-6),
        of("C = 512", &[3, 512], 1e-6),
        of("C = 768", &[9, 768], 1e-6),
        of("C = 1024", &[2, 1024], 1e-6),
        of("C = 1280", &[5, 1280], 1e-6),
        of("a row too long for registers, C = 1288", &[2, 1288], 1e-6),
        of("rows without variance", &[3, 16], 1e-2).with(0, |i, _| (i / 16) as f64),
        of("variance far below eps", &[2, 16], 1e-2).with(0, |_, x| 1.0 + 1e-4 * x).ill_conditioned(),
        Case::new("layernorm: no weight, no bias", &[&[4, 37]], |x| x[0].layernorm_plain(1e-6)),
        Case::new("layernorm: no weight, no bias, C = 264", &[&[4, 264]], |x| x[0].layernorm_plain(1e-6)),
        summed("of a residual sum, C = 37", &[4, 2, 37], false, false),
        summed("of a residual sum, C = 264", &[4, 3, 264], false, false),
        summed("of a residual sum with gains, C = 48", &[4, 3, 48], true, false),
        summed("of a residual sum with gains and stochastic depth", &[4, 5, 520], true, true),
    ]
}
