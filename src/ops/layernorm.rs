//! Layer normalisation over the last axis.
//!
//!   y  = n w + b,   n = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps), the variance biased, in two passes
//!   dx = rstd (dn - avg(dn) - n avg(dn n)),   dn = dy w
//!   dw = sum_rows(dy n),   db = sum_rows(dy)
//!
//! x [.., C]; w, b [C] or both absent. Saved for backward: x, w, mean [rows], rstd [rows].

use super::case::Case;
use crate::device::parallel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::{Need, Var};
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

impl Var {
    pub fn layernorm(&self, w: &Var, b: &Var, eps: f64) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        for (name, v) in [("weight", w.value()), ("bias", b.value())] {
            ensure!(v.shape() == [x.last()] && v.dtype() == x.dtype(), "layernorm: {name} is {v:?} but x is {x:?}");
        }
        let (y, saved) = by_real!("layernorm", x.dtype(), forward(&x, Some((&weight, b.value())), eps))?;
        Var::record("layernorm", [self, w, b], y, move |dy, need| {
            by_real!("layernorm", x.dtype(), backward(&dy, &x, Some(&weight), &saved, need))
        })
    }

    /// Without weight and bias.
    pub fn layernorm_plain(&self, eps: f64) -> Result<Var> {
        let x = self.value().clone();
        let (y, saved) = by_real!("layernorm", x.dtype(), forward(&x, None, eps))?;
        Var::record("layernorm", [self], y, move |dy, need| {
            let [dx, _, _] = by_real!("layernorm", x.dtype(), backward(&dy, &x, None, &saved, need))?;
            Ok([dx])
        })
    }
}

/// Mean and 1/deviation of each row, interleaved.
struct Saved(Tensor);

vectorised! {
    fn forward_rows<T: Real>(x: &[T], affine: Option<(&[T], &[T])>, eps: T, y: &mut [T], saved: &mut [T], c: usize) {
        let scale = T::of(1.0 / c as f64);
        for ((x, y), saved) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(saved.chunks_exact_mut(2)) {
            let mean = lane_sum(c, |i| x[i]) * scale;
            let variance = lane_sum(c, |i| (x[i] - mean) * (x[i] - mean)) * scale;
            let rstd = T::ONE / (variance + eps).sqrt();
            match affine {
                Some((w, b)) => {
                    let (w, b) = (&w[..c], &b[..c]);
                    for i in 0..c {
                        y[i] = ((x[i] - mean) * rstd).mul_add(w[i], b[i]);
                    }
                }
                None => y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - mean) * rstd),
            }
            (saved[0], saved[1]) = (mean, rstd);
        }
    }

    fn backward_rows<T: Real>(dy: &[T], x: &[T], w: Option<&[T]>, saved: &[T], dx: &mut [T], dw: &mut [T], db: &mut [T], c: usize) {
        let scale = T::of(1.0 / c as f64);
        let (dw, db) = (&mut dw[..c], &mut db[..c]);
        for (((dy, x), dx), saved) in dy.chunks_exact(c).zip(x.chunks_exact(c)).zip(dx.chunks_exact_mut(c)).zip(saved.chunks_exact(2)) {
            let (mean, rstd) = (saved[0], saved[1]);
            for i in 0..c {
                let n = (x[i] - mean) * rstd;
                dw[i] += dy[i] * n;
                db[i] += dy[i];
                dx[i] = match w {
                    Some(w) => dy[i] * w[i],
                    None => dy[i],
                };
            }
            let average = lane_sum(c, |i| dx[i]) * scale;
            let projection = lane_sum(c, |i| dx[i] * ((x[i] - mean) * rstd)) * scale;
            for i in 0..c {
                let n = (x[i] - mean) * rstd;
                dx[i] = rstd * (dx[i] - average - n * projection);
            }
        }
    }

    fn add<T: Real>(sum: &mut [T], x: &[T]) {
        sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += x);
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
const BLOCK: usize = 64;

fn backward<T: Real + Element>(dy: &Tensor, x: &Tensor, w: Option<&Tensor>, saved: &Saved, need: &mut Need) -> Result<[Option<Tensor>; 3]> {
    let (c, rows) = (x.last(), x.rows());
    let mut dx = if need.wants(0) { need.out(0)? } else { Tensor::empty(x.shape(), x.dtype())? };
    let blocks = rows.div_ceil(BLOCK).max(1);
    let mut partial = Tensor::zeros(&[blocks, 2, c], x.dtype())?;
    let (dy, x, w, saved) = (dy.data::<T>(), x.data::<T>(), w.map(|w| w.data::<T>()), saved.0.data::<T>());
    let pieces = dx.data_mut::<T>().par_chunks_mut(BLOCK * c).zip(partial.data_mut::<T>().par_chunks_mut(2 * c));
    pieces.enumerate().for_each(|(i, (dx, partial))| {
        let (dw, db) = partial.split_at_mut(c);
        let (first, rows) = (i * BLOCK, dx.len() / c);
        let part = first * c..(first + rows) * c;
        backward_rows(&dy[part.clone()], &x[part], w, &saved[2 * first..2 * (first + rows)], dx, dw, db, c);
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

pub fn cases() -> Vec<Case> {
    let affine = |eps: f64| move |x: &[Var]| x[0].layernorm(&x[1], &x[2], eps);
    vec![
        Case::new("layernorm: 2 x 3 rows, C = 48", &[&[2, 3, 48], &[48], &[48]], affine(1e-6)),
        Case::new("layernorm: one row, C = 37", &[&[1, 37], &[37], &[37]], affine(1e-5)),
        Case::new("layernorm: C = 1", &[&[3, 1], &[1], &[1]], affine(1e-6)),
        Case::new("layernorm: several blocks of rows", &[&[150, 20], &[20], &[20]], affine(1e-6)),
        Case::new("layernorm: rows without variance", &[&[3, 16], &[16], &[16]], affine(1e-2)).with(0, |i, _| (i / 16) as f64),
        Case::new("layernorm: variance far below eps", &[&[2, 16], &[16], &[16]], affine(1e-2))
            .with(0, |_, x| 1.0 + 1e-4 * x)
            .ill_conditioned(),
        Case::new("layernorm: no weight, no bias", &[&[4, 37]], |x| x[0].layernorm_plain(1e-6)),
    ]
}
