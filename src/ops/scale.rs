//! Products with something smaller than the tensor.
//!
//!   scale           y = f x                              dx = f dy
//!   scale_channels  y[.., c] = x[.., c] g[c]             dx = dy g,  dg = sum_rows(dy x)       layer scale
//!   drop_path       y[b] = x[b] / (1 - p) if u[b] >= p, else 0                                 the same factor for dx
//!
//! u is one uniform number in [0, 1) an image.

use super::case::Case;
use super::linear::column_sums;
use crate::device::{parallel, simd::Real};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};

impl Var {
    pub fn scale(&self, factor: f64) -> Result<Var> {
        let dtype = self.dtype();
        let y = by_real!("scale", dtype, times_number(self.value().clone(), factor))?;
        Var::record("scale", [self], y, move |dy, _| Ok([Some(by_real!("scale", dtype, times_number(dy, factor))?)]))
    }

    pub fn scale_channels(&self, g: &Var) -> Result<Var> {
        let (x, gains) = (self.value().clone(), g.value().clone());
        ensure!(gains.shape() == [x.last()] && gains.dtype() == x.dtype(), "scale_channels: the gains are {gains:?} but x is {x:?}");
        let y = by_real!("scale_channels", x.dtype(), times_channels(&x, &gains))?;
        Var::record("scale_channels", [self, g], y, move |dy, need| {
            let dg = need.give(1, |dg| by_real!("scale_channels", x.dtype(), gain_gradient(&dy, &x, dg)))?;
            let wants = need.wants(0);
            let dx = if wants { Some(by_real!("scale_channels", x.dtype(), times_channels(&dy, &gains))?) } else { None };
            Ok([dx, dg])
        })
    }

    /// Stochastic depth on the first axis: images with u < p are dropped, the others grow by 1 / (1 - p).
    pub fn drop_path(&self, u: &[f32], p: f64) -> Result<Var> {
        let batch = self.shape().first().copied().unwrap_or(0);
        ensure!(u.len() == batch, "drop_path: {} numbers for {batch} images", u.len());
        ensure!((0.0..1.0).contains(&p), "drop_path: a rate of {p} is not in [0, 1)");
        // The rule is floor(keep + u) = 1, taken in f32 as PyTorch takes it.
        let keep = (1.0 - p) as f32;
        let factors: Vec<f64> = u.iter().map(|&u| if (keep + u).floor() >= 1.0 { 1.0 / (1.0 - p) } else { 0.0 }).collect();
        let dtype = self.dtype();
        let y = by_real!("drop_path", dtype, times_images(self.value().clone(), &factors))?;
        Var::record("drop_path", [self], y, move |dy, _| Ok([Some(by_real!("drop_path", dtype, times_images(dy, &factors))?)]))
    }
}

vectorised! {
    fn multiply<T: Real>(x: &mut [T], factor: T) {
        x.iter_mut().for_each(|x| *x *= factor);
    }
    fn multiply_rows<T: Real>(x: &[T], gains: &[T], y: &mut [T]) {
        for (x, y) in x.chunks_exact(gains.len()).zip(y.chunks_exact_mut(gains.len())) {
            y.iter_mut().zip(x).zip(gains).for_each(|((y, &x), &g)| *y = x * g);
        }
    }
    fn multiply_to<T: Real>(a: &[T], b: &[T], y: &mut [T]) {
        y.iter_mut().zip(a).zip(b).for_each(|((y, &a), &b)| *y = a * b);
    }
}

fn times_number<T: Real + Element>(x: Tensor, factor: f64) -> Result<Tensor> {
    let mut y = x.into_unique()?;
    parallel::rows(y.data_mut::<T>(), 1, |_, y| multiply(y, T::of(factor)));
    Ok(y)
}

fn times_images<T: Real + Element>(x: Tensor, factors: &[f64]) -> Result<Tensor> {
    let mut y = x.into_unique()?;
    let image = y.numel() / factors.len().max(1);
    parallel::rows(y.data_mut::<T>(), image, |first, y| {
        let images = y.chunks_exact_mut(image.max(1)).enumerate();
        images.for_each(|(i, y)| multiply(y, T::of(factors[first + i])));
    });
    Ok(y)
}

fn times_channels<T: Real + Element>(x: &Tensor, gains: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (c, x, gains) = (x.last(), x.data::<T>(), gains.data::<T>());
    parallel::rows(y.data_mut::<T>(), c, |first, y| multiply_rows(&x[first * c..first * c + y.len()], gains, y));
    Ok(y)
}

fn gain_gradient<T: Real + Element>(dy: &Tensor, x: &Tensor, dg: &mut Tensor) -> Result<()> {
    let mut products = Tensor::empty(x.shape(), x.dtype())?;
    let (dy, c, x) = (dy.data::<T>(), x.last(), x.data::<T>());
    parallel::rows(products.data_mut::<T>(), 1, |first, y| {
        multiply_to(&dy[first..first + y.len()], &x[first..first + y.len()], y);
    });
    column_sums(products.data::<T>(), c, dg.data_mut());
    Ok(())
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("scale: 3 x 5", &[&[3, 5]], |x| x[0].scale(-0.3)),
        Case::new("scale_channels: 2 x 3 rows, C = 37", &[&[2, 3, 37], &[37]], |x| x[0].scale_channels(&x[1])),
        Case::new("scale_channels: one row", &[&[1, 4], &[4]], |x| x[0].scale_channels(&x[1])),
        Case::new("drop_path: two of four images", &[&[4, 3, 5]], |x| x[0].drop_path(&[0.1, 0.9, 0.2, 0.3], 0.25)),
    ]
}
