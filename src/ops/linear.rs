//! The linear layer, with the GELU that follows it on request.
//!
//!   y  = x W^T + b            or  y = gelu(x W^T + b)
//!   dx = dh W,   dW = dh^T x,   db = sum_rows(dh)        dh = dy, or dy gelu'(h) with h = x W^T + b
//!
//! x [.., K]; W [N, ..] with K numbers a row (a convolution's weight serves as it is); b [N]; y [.., N]. Saved for backward: x, W, and with GELU
//! its derivative, which takes the place of h. On a GPU the products are the library's; with GELU it saves x W^T and its kernel adds the bias.

use super::case::{Case, rounded};
use super::{gelu, sum_of_rows_on};
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::gpu::Gpu;
use crate::device::parallel::Panel;
use crate::device::product::{Factor, Product as GpuProduct, Target};
use crate::device::simd::Real;
use crate::error::Result;
use crate::tape::{Need, Var};
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};

impl Var {
    /// x W^T + b.
    pub fn linear(&self, w: &Var, b: Option<&Var>) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        if let Some(gpu) = x.gpu().cloned() {
            let h = product_on(&gpu, &x, &weight, b.map(Var::value))?;
            let none = Var::constant(h.clone());
            return Var::record("linear", [self, w, b.unwrap_or(&none)], h, move |dy, need| {
                let db = need.give(2, |db| sum_of_rows_on(&gpu, &dy, db))?;
                let [dx, dw] = gradients_on(&gpu, &dy, &x, &weight, need)?;
                Ok([dx, dw, db])
            });
        }
        let (h, _) = by_real!("linear", x.dtype(), forward(&x, &weight, b.map(Var::value), Gelu::No))?;
        let none = Var::constant(h.clone());
        Var::record("linear", [self, w, b.unwrap_or(&none)], h, move |dy, need| {
            by_real!("linear", x.dtype(), backward(&dy, &x, &weight, need))
        })
    }

    /// gelu(x W^T + b).
    pub fn linear_gelu(&self, w: &Var, b: Option<&Var>) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        if let Some(gpu) = x.gpu().cloned() {
            let bias = b.map(|b| b.value().clone());
            check(&x, &weight, bias.as_ref())?;
            let h = product_on(&gpu, &x, &weight, None)?;
            let y = gelu::with_bias(&gpu, &h, bias.as_ref())?;
            let none = Var::constant(y.clone());
            return Var::record("linear_gelu", [self, w, b.unwrap_or(&none)], y, move |dy, need| {
                let mut db = if need.wants(2) { Some(need.out(2)?) } else { None };
                let dh = gelu::gradient_with_bias(&gpu, &dy, &h, bias.as_ref(), db.as_mut())?;
                let [dx, dw] = gradients_on(&gpu, &dh, &x, &weight, need)?;
                Ok([dx, dw, db])
            });
        }
        let tracked = self.tracked() || w.tracked() || b.is_some_and(Var::tracked);
        let gelu = if tracked { Gelu::WithDerivative } else { Gelu::Alone };
        let (y, slope) = by_real!("linear", x.dtype(), forward(&x, &weight, b.map(Var::value), gelu))?;
        let none = Var::constant(y.clone());
        Var::record("linear_gelu", [self, w, b.unwrap_or(&none)], y, move |dy, need| {
            let dh = by_real!("linear", x.dtype(), super::gelu::times(dy, &slope))?;
            by_real!("linear", x.dtype(), backward(&dh, &x, &weight, need))
        })
    }
}

vectorised! {
    fn sum_rows<T: Real>(rows: &[T], columns: usize, first: usize, sum: &mut [T]) {
        sum.fill(T::ZERO);
        for row in rows.chunks_exact(columns) {
            sum.iter_mut().zip(&row[first..]).for_each(|(sum, &x)| *sum += x);
        }
    }
}

/// Rows and columns of the weight, once everything fits.
fn check(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<(usize, usize)> {
    let (k, n) = (x.last(), w.shape().first().copied().unwrap_or(1));
    ensure!(
        w.numel() == n * k && w.dtype() == x.dtype() && k > 0 && n > 0,
        "linear: weight is {w:?} but x is {x:?}; the weight needs as many numbers a row as x has"
    );
    if let Some(b) = b {
        ensure!(b.shape() == [n] && b.dtype() == x.dtype(), "linear: bias is {b:?} but weight is {w:?}");
    }
    Ok((n, k))
}

fn product_on(gpu: &Gpu, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (n, k) = check(x, w, b)?;
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("k > 0 means an axis") = n;
    let mut h = x.alike(&shape, x.dtype())?;
    let (left, right) = (Factor::rows(x, x.dtype(), k), Factor::rows(w, w.dtype(), k).turned());
    let target = Target::rows(&mut h, x.dtype(), n);
    gpu.product(GpuProduct::new([x.rows(), n, k], left, right, target).bias(b))?;
    Ok(h)
}

/// dx and dW; the latter in f32, whatever W is.
fn gradients_on(gpu: &Gpu, dh: &Tensor, x: &Tensor, w: &Tensor, need: &mut Need) -> Result<[Option<Tensor>; 2]> {
    let (rows, n, k, dtype) = (x.rows(), dh.last(), x.last(), x.dtype());
    let left = Factor::rows(dh, dtype, n);
    let dx = need.give(0, |dx| {
        let target = Target::rows(dx, dtype, k);
        gpu.product(GpuProduct::new([rows, k, n], left, Factor::rows(w, dtype, k), target))
    })?;
    let dw = need.give(1, |dw| {
        let kind = dw.dtype();
        let target = Target::rows(dw, kind, k);
        gpu.product(GpuProduct::new([n, k, rows], left.turned(), Factor::rows(x, dtype, k), target))
    })?;
    Ok([dx, dw])
}

/// What follows the product: nothing, a GELU whose derivative is kept, or one that no gradient will flow through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gelu {
    No,
    WithDerivative,
    Alone,
}

/// (y, derivative of the GELU where it is kept, else y again).
fn forward<T: Product + Element>(x: &Tensor, w: &Tensor, b: Option<&Tensor>, gelu: Gelu) -> Result<(Tensor, Tensor)> {
    let (n, k) = check(x, w, b)?;
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("k > 0 means an axis") = n;
    let mut h = Tensor::empty(&shape, x.dtype())?;
    let mut y = if gelu == Gelu::WithDerivative { Some(Tensor::empty(&shape, x.dtype())?) } else { None };
    let becomes_gelu = gelu == Gelu::Alone;
    let finish = Finish { bias: b.map(|b| b.data()), gelu: y.as_mut().map(|y| y.data_mut()), becomes_gelu, ..Finish::replace() };
    let weight = View::rows(w.data::<T>(), k).transposed();
    gemm::parallel(&mut Panel::of(h.data_mut::<T>(), n), k, View::rows(x.data(), k), weight, finish);
    Ok((y.unwrap_or_else(|| h.clone()), h))
}

fn backward<T: Product + Element>(dh: &Tensor, x: &Tensor, w: &Tensor, need: &mut Need) -> Result<[Option<Tensor>; 3]> {
    let (k, n, rows) = (x.last(), dh.last(), x.rows());
    let dx = need.give(0, |dx| {
        gemm::parallel(&mut Panel::of(dx.data_mut::<T>(), k), n, View::rows(dh.data(), n), View::rows(w.data(), k), Finish::replace());
        Ok(())
    })?;
    let dw = need.give(1, |dw| {
        let dh = View::rows(dh.data::<T>(), n).transposed();
        gemm::parallel(&mut Panel::of(dw.data_mut::<T>(), k), rows, dh, View::rows(x.data(), k), Finish::replace());
        Ok(())
    })?;
    let db = need.give(2, |db| {
        column_sums(dh.data::<T>(), n, db.data_mut());
        Ok(())
    })?;
    Ok([dx, dw, db])
}

/// Sum over the rows of a matrix, each column from top to bottom.
pub(crate) fn column_sums<T: Real>(rows: &[T], columns: usize, sums: &mut [T]) {
    use rayon::prelude::*;
    const STRIPE: usize = 64;
    if rows.len() < 1 << 14 {
        return sum_rows(rows, columns, 0, sums);
    }
    sums.par_chunks_mut(STRIPE).enumerate().for_each(|(i, sums)| sum_rows(rows, columns, i * STRIPE, sums));
}

pub fn cases() -> Vec<Case> {
    let plain = |name: &str, shapes: &[&[usize]]| {
        let case = Case::new(&format!("linear: {name}"), shapes, |x| x[0].linear(&x[1], x.get(2)));
        case.weights(&[1, 2][..shapes.len() - 1])
    };
    let gelu = |name: &str, shapes: &[&[usize]]| {
        let case = Case::new(&format!("linear_gelu: {name}"), shapes, |x| x[0].linear_gelu(&x[1], x.get(2)));
        let case = case.weights(&[1, 2][..shapes.len() - 1]);
        case.rounded(|x| {
            let h = rounded(&x[0].linear(&x[1], None)?)?;
            let Some(bias) = x.get(2) else { return h.gelu() };
            // h + bias as a layer that leaves h as it is.
            let n = bias.shape()[0];
            let same: Vec<f64> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
            h.linear_gelu(&Var::constant(Tensor::from_slice(&[n, n], &same)?.cast(h.dtype())?), Some(bias))
        })
    };
    vec![
        plain("2 x 5 rows, 37 to 19", &[&[2, 5, 37], &[19, 37], &[19]]),
        plain("one row, no bias", &[&[1, 16], &[8, 16]]),
        plain("a convolution's weight", &[&[3, 12], &[5, 3, 2, 2], &[5]]),
        plain("enough rows for several pieces", &[&[300, 64], &[70, 64], &[70]]),
        plain("a bias of whole vectors", &[&[70, 8], &[264, 8], &[264]]),
        gelu("2 x 5 rows, 37 to 19", &[&[2, 5, 37], &[19, 37], &[19]]),
        gelu("no bias", &[&[4, 8], &[3, 8]]),
        gelu("rows of vectors", &[&[40, 16], &[264, 16], &[264]]),
    ]
}
