//! Rows of length one.
//!
//!   y = x / max(|x|, eps),   dx = (dy - y (y . dy)) / |x|,  or dy / eps where |x| < eps
//!
//! x [.., C], |x| the Euclidean norm over the last axis. PyTorch's `normalize` has eps = 1e-12. Saved: y (on a GPU x), |x| [rows].
//! GPU: kernels/l2_normalise.cu.

use super::case::Case;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};

impl Var {
    pub fn l2_normalise(&self, eps: f64) -> Result<Var> {
        let x = self.value();
        ensure!(x.last() > 0, "l2_normalise: x is {x:?}, its last axis is empty");
        ensure!((f64::MIN_POSITIVE..).contains(&eps), "l2_normalise: eps is {eps} but must be above 0");
        if let Some(gpu) = x.gpu().cloned() {
            let (x, (y, norms)) = (x.clone(), forward_on(&gpu, x, eps)?);
            return Var::record("l2_normalise", [self], y, move |dy, _| Ok([Some(backward_on(&gpu, &dy, &x, &norms, eps)?)]));
        }
        let (y, norms) = by_real!("l2_normalise", x.dtype(), forward(x, eps))?;
        let saved = y.clone();
        Var::record("l2_normalise", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("l2_normalise", saved.dtype(), backward(&dy, &saved, &norms, eps, &mut dx));
            Ok([Some(dx)])
        })
    }
}

vectorised! {
    fn forward_rows<T: Real>(x: &[T], c: usize, eps: T, y: &mut [T], norms: &mut [T]) {
        for ((x, y), norm) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(norms) {
            *norm = lane_sum(c, |i| x[i] * x[i]).sqrt();
            let inverse = T::ONE / if *norm < eps { eps } else { *norm };
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * inverse);
        }
    }
    fn backward_rows<T: Real>(dy: &[T], y: &[T], c: usize, eps: T, norms: &[T], dx: &mut [T]) {
        for (((dy, y), dx), &norm) in dy.chunks_exact(c).zip(y.chunks_exact(c)).zip(dx.chunks_exact_mut(c)).zip(norms) {
            let (dot, divisor) = if norm < eps { (T::ZERO, eps) } else { (lane_sum(c, |i| y[i] * dy[i]), norm) };
            let inverse = T::ONE / divisor;
            dx.iter_mut().zip(dy).zip(y).for_each(|((dx, &dy), &y)| *dx = (dy - y * dot) * inverse);
        }
    }
}

fn forward<T: Real + Element>(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let c = x.last();
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let mut norms = Tensor::empty(&[x.rows()], x.dtype())?;
    let x = x.data::<T>();
    parallel::rows2(y.data_mut::<T>(), c, norms.data_mut::<T>(), 1, |first, y, norms| {
        forward_rows(&x[first * c..first * c + y.len()], c, T::of(eps), y, norms);
    });
    Ok((y, norms))
}

fn backward<T: Real + Element>(dy: &Tensor, y: &Tensor, norms: &Tensor, eps: f64, dx: &mut Tensor) {
    let c = y.last();
    let (dy, y, norms) = (dy.data::<T>(), y.data::<T>(), norms.data::<T>());
    parallel::rows(dx.data_mut::<T>(), c, |first, dx| {
        let part = first * c..first * c + dx.len();
        backward_rows(&dy[part.clone()], &y[part], c, T::of(eps), &norms[first..first + dx.len() / c], dx);
    });
}

fn forward_on(gpu: &Gpu, x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (mut y, mut norms) = (x.alike(x.shape(), x.dtype())?, x.alike(&[x.rows()], Dtype::F32)?);
    let args = Args::new().out(&mut y).out(&mut norms).input(x).int(x.rows()).int(x.last()).float(eps);
    gpu.launch(&typed("l2_normalise_fwd", x.dtype()), Launch::new(x.rows().div_ceil(8), 256), args)?;
    Ok((y, norms))
}

fn backward_on(gpu: &Gpu, dy: &Tensor, x: &Tensor, norms: &Tensor, eps: f64) -> Result<Tensor> {
    let mut dx = x.alike(x.shape(), x.dtype())?;
    let args = Args::new().out(&mut dx).input(dy).input(x).input(norms).int(x.rows()).int(x.last()).float(eps);
    gpu.launch(&typed("l2_normalise_bwd", x.dtype()), Launch::new(x.rows().div_ceil(8), 256), args)?;
    Ok(dx)
}

pub fn cases() -> Vec<Case> {
    let case =
        |name: &str, shape: &[usize], eps: f64| Case::new(&format!("l2_normalise: {name}"), &[shape], move |x| x[0].l2_normalise(eps));
    vec![
        case("2 x 5 tokens, C = 24", &[2, 5, 24], 1e-12),
        case("one row, C = 37", &[1, 37], 1e-12),
        case("C = 3, far from the origin", &[4, 3], 1e-12).with(0, |_, x| 100.0 + x),
        case("rows shorter than eps, one of them zero", &[3, 8], 0.5).with(0, |i, x| if i < 8 { 0.0 } else { 0.01 * x }),
        case("many rows", &[900, 40], 1e-12),
        case("C = 264", &[2, 264], 1e-12),
    ]
}
