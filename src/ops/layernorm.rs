//! Layer normalisation over the last axis.
//!
//!   y  = n w + b,   n = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps), the variance biased, in two passes
//!   dx = rstd (dn - avg(dn) - n avg(dn n)),   dn = dy w
//!   dw = sum_rows(dy n),   db = sum_rows(dy)
//!
//! x [.., C]; w, b [C] or both absent. Saved for backward: x, w, mean [rows], rstd [rows].

use super::case::Case;
use crate::device::parallel;
use crate::device::simd::{LANES, Real, add, fold, sum_of};
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
            by_real!("layernorm", x.dtype(), backward(dy, &x, Some(&weight), &saved, need))
        })
    }

    /// Without weight and bias.
    pub fn layernorm_plain(&self, eps: f64) -> Result<Var> {
        let x = self.value().clone();
        let (y, saved) = by_real!("layernorm", x.dtype(), forward(&x, None, eps))?;
        Var::record("layernorm", [self], y, move |dy, need| {
            let [dx, _, _] = by_real!("layernorm", x.dtype(), backward(dy, &x, None, &saved, need))?;
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
