//! Batch normalisation without weight and bias.
//!
//!   y  = n = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps), mean and biased variance of each column, in two passes
//!   dx = rstd (dy - avg(dy) - n avg(dy n)),   averages over the column
//!   with given statistics: dx = rstd dy
//!
//! x [B, C]; mean, variance [C], on a GPU f32. Column sums are taken in f64, from the first image to the last. Saved: y, rstd [C]; on a GPU x, mean and
//! variance. GPU: kernels/batchnorm.cu, where the sums are f32.

use super::beside;
use super::case::Case;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::{parallel, simd::Real};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

/// What a batch says about each column.
pub struct Statistics {
    pub mean: Tensor,
    /// Divided by B, as it is used for normalising; running statistics take it times B / (B - 1).
    pub variance: Tensor,
}

impl Var {
    /// The training form: normalised by the batch's own statistics.
    pub fn batchnorm(&self, eps: f64) -> Result<(Var, Statistics)> {
        let x = self.value();
        let &[batch, c] = x.shape() else { crate::bail!("batchnorm: x is {x:?} but [B, C] is needed") };
        ensure!(batch > 1 && c > 0, "batchnorm: x is {x:?} but training needs at least two images and one channel");
        if let Some(gpu) = x.gpu() {
            return batchnorm_on(gpu, self, eps);
        }
        let (mean, variance) = by_real!("batchnorm", x.dtype(), statistics(x))?;
        let (y, rstd) = by_real!("batchnorm", x.dtype(), normalised(x, &mean, &variance, eps))?;
        let saved = y.clone();
        let var = Var::record("batchnorm", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("batchnorm", dy.dtype(), backward(&dy, &saved, &rstd, &mut dx))?;
            Ok([Some(dx)])
        })?;
        Ok((var, Statistics { mean, variance }))
    }

    /// The evaluation form: normalised by given statistics.
    pub fn batchnorm_given(&self, mean: &Tensor, variance: &Tensor, eps: f64) -> Result<Var> {
        let x = self.value();
        let &[_, c] = x.shape() else { crate::bail!("batchnorm_given: x is {x:?} but [B, C] is needed") };
        for (name, given) in [("mean", mean), ("variance", variance)] {
            ensure!(given.shape() == [c] && c > 0, "batchnorm_given: the {name} is {given:?} but x is {x:?}");
        }
        let place = |given: &Tensor| given.cast(beside(x.dtype()))?.on(&x.device());
        let (mean, variance) = (place(mean)?, place(variance)?);
        if let Some(gpu) = x.gpu().cloned() {
            let y = given_on(&gpu, x, Some(&mean), &variance, eps)?;
            return Var::record("batchnorm_given", [self], y, move |dy, _| Ok([Some(given_on(&gpu, &dy, None, &variance, eps)?)]));
        }
        let (y, rstd) = by_real!("batchnorm_given", x.dtype(), normalised(x, &mean, &variance, eps))?;
        Var::record("batchnorm_given", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("batchnorm_given", dy.dtype(), scaled(&dy, &rstd, &mut dx));
            Ok([Some(dx)])
        })
    }
}

vectorised! {
    fn normalise<T: Real>(x: &[T], mean: &[T], rstd: &[T], y: &mut [T]) {
        for (x, y) in x.chunks_exact(mean.len()).zip(y.chunks_exact_mut(mean.len())) {
            y.iter_mut().zip(x).zip(mean.iter().zip(rstd)).for_each(|((y, &x), (&mean, &rstd))| *y = (x - mean) * rstd);
        }
    }
    fn multiply<T: Real>(dy: &[T], rstd: &[T], dx: &mut [T]) {
        for (dy, dx) in dy.chunks_exact(rstd.len()).zip(dx.chunks_exact_mut(rstd.len())) {
            dx.iter_mut().zip(dy).zip(rstd).for_each(|((dx, &dy), &rstd)| *dx = dy * rstd);
        }
    }
    fn input_gradient<T: Real>(dy: &[T], n: &[T], rstd: &[T], average: &[T], projection: &[T], dx: &mut [T]) {
        let c = rstd.len();
        for ((dy, n), dx) in dy.chunks_exact(c).zip(n.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
            for i in 0..c {
                dx[i] = rstd[i] * (dy[i] - average[i] - n[i] * projection[i]);
            }
        }
    }
}

/// Averages over the images of f(image, column), a few columns a piece.
fn averages<T: Real + Element>(batch: usize, c: usize, f: impl Fn(usize, usize) -> f64 + Sync + Send) -> Result<Tensor> {
    const STRIPE: usize = 64;
    let mut out = Tensor::empty(&[c], T::DTYPE)?;
    out.data_mut::<T>().par_chunks_mut(STRIPE).enumerate().for_each(|(stripe, out)| {
        let mut sums = [0.0; STRIPE];
        for image in 0..batch {
            sums[..out.len()].iter_mut().enumerate().for_each(|(i, sum)| *sum += f(image, stripe * STRIPE + i));
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = T::of(sum / batch as f64));
    });
    Ok(out)
}

fn statistics<T: Real + Element>(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (batch, c, x) = (x.rows(), x.last(), x.data::<T>());
    let mean = averages::<T>(batch, c, |image, i| x[image * c + i].f64())?;
    let centre = mean.data::<T>();
    let variance = averages::<T>(batch, c, |image, i| {
        let d = x[image * c + i].f64() - centre[i].f64();
        d * d
    })?;
    Ok((mean, variance))
}

fn normalised<T: Real + Element>(x: &Tensor, mean: &Tensor, variance: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let c = x.last();
    let rstd: Vec<T> = variance.data::<T>().iter().map(|variance| T::of(1.0 / (variance.f64() + eps).sqrt())).collect();
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (x, mean) = (x.data::<T>(), mean.data::<T>());
    parallel::rows(y.data_mut::<T>(), c, |first, y| normalise(&x[first * c..first * c + y.len()], mean, &rstd, y));
    Ok((y, Tensor::from_slice(&[c], &rstd)?))
}

fn backward<T: Real + Element>(dy: &Tensor, n: &Tensor, rstd: &Tensor, dx: &mut Tensor) -> Result<()> {
    let (batch, c) = (dy.rows(), dy.last());
    let (dy, n, rstd) = (dy.data::<T>(), n.data::<T>(), rstd.data::<T>());
    let average = averages::<T>(batch, c, |image, i| dy[image * c + i].f64())?;
    let projection = averages::<T>(batch, c, |image, i| dy[image * c + i].f64() * n[image * c + i].f64())?;
    let (average, projection) = (average.data::<T>(), projection.data::<T>());
    parallel::rows(dx.data_mut::<T>(), c, |first, dx| {
        let part = first * c..first * c + dx.len();
        input_gradient(&dy[part.clone()], &n[part], rstd, average, projection, dx);
    });
    Ok(())
}

fn scaled<T: Real + Element>(dy: &Tensor, rstd: &Tensor, dx: &mut Tensor) {
    let (c, dy, rstd) = (dy.last(), dy.data::<T>(), rstd.data::<T>());
    parallel::rows(dx.data_mut::<T>(), c, |first, dx| multiply(&dy[first * c..first * c + dx.len()], rstd, dx));
}

fn batchnorm_on(gpu: &Gpu, x: &Var, eps: f64) -> Result<(Var, Statistics)> {
    let (gpu, input) = (gpu.clone(), x.value().clone());
    let (batch, c, dtype) = (input.rows(), input.last(), input.dtype());
    let launch = Launch::new(c.div_ceil(32), 1024);
    let [mut mean, mut variance] = [input.alike(&[c], Dtype::F32)?, input.alike(&[c], Dtype::F32)?];
    let mut y = input.alike(input.shape(), dtype)?;
    let args = Args::new().out(&mut y).out(&mut mean).out(&mut variance).input(&input).int(batch).int(c).float(eps);
    gpu.launch(&typed("batchnorm_fwd", dtype), launch, args)?;
    let statistics = Statistics { mean: mean.clone(), variance: variance.clone() };
    let var = Var::record("batchnorm", [x], y, move |dy, _| {
        let mut dx = input.alike(input.shape(), dtype)?;
        let args = Args::new().out(&mut dx).input(&dy).input(&input).input(&mean).input(&variance).int(batch).int(c).float(eps);
        gpu.launch(&typed("batchnorm_bwd", dtype), launch, args)?;
        Ok([Some(dx)])
    })?;
    Ok((var, statistics))
}

/// (x - mean) rstd, or x rstd, which is the gradient.
fn given_on(gpu: &Gpu, x: &Tensor, mean: Option<&Tensor>, variance: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, c) = (x.rows(), x.last());
    let mut y = x.alike(x.shape(), x.dtype())?;
    let args = Args::new().out(&mut y).input(x).maybe(mean).input(variance).int(rows).int(c).float(eps);
    let launch = Launch::new(0, 256).grid(c.div_ceil(32), rows.div_ceil(8).clamp(1, 256), 1);
    gpu.launch(&typed("batchnorm_given", x.dtype()), launch, args)?;
    Ok(y)
}

pub fn cases() -> Vec<Case> {
    let case =
        |name: &str, shape: &[usize], eps: f64| Case::new(&format!("batchnorm: {name}"), &[shape], move |x| Ok(x[0].batchnorm(eps)?.0));
    let mean = Tensor::from_slice(&[3], &[0.5, -1.0, 2.0]).expect("three numbers");
    let variance = Tensor::from_slice(&[3], &[1.0, 0.25, 0.0]).expect("three numbers");
    vec![
        case("8 images, C = 37", &[8, 37], 1e-6),
        case("two images", &[2, 5], 1e-2),
        case("many images, C = 130", &[200, 130], 1e-6),
        case("columns without variance", &[4, 6], 1e-2).with(0, |i, _| (i % 6) as f64),
        Case::new("batchnorm_given: 3 channels", &[&[40, 3]], move |x| x[0].batchnorm_given(&mean, &variance, 1e-2)),
    ]
}
