//! Softmax over the last axis.
//!
//!   y = e^(x - max) / sum e^(x - max),   dx = y (dy - y . dy)
//!
//! x [.., C]. Saved: y. GPU: kernels/softmax.cu.

use super::case::{Case, rounded};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, Versions};
use crate::device::parallel;
use crate::device::simd::{Real, largest, sum_of, sum_of2};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};

pub const VERSIONS: Versions = Versions { op: "softmax", all: &["v1", "v2"], chosen: "v2" };

impl Var {
    pub fn softmax(&self) -> Result<Var> {
        let x = self.value();
        ensure!(x.last() > 0, "softmax: x is {x:?}, its last axis is empty");
        let y = match x.gpu() {
            None => by_real!("softmax", x.dtype(), forward(x))?,
            Some(gpu) => on_gpu(gpu, "fwd", &[x])?,
        };
        let saved = y.clone();
        Var::record("softmax", [self], y, move |dy, _| Ok([Some(gradient(dy, &saved)?)]))
    }
}

fn gradient(dy: Tensor, y: &Tensor) -> Result<Tensor> {
    match y.gpu() {
        None => by_real!("softmax", y.dtype(), backward(dy, y)),
        Some(gpu) => on_gpu(gpu, "bwd", &[&dy, y]),
    }
}

/// One pass of the chosen version over rows of these inputs.
fn on_gpu(gpu: &Gpu, pass: &str, inputs: &[&Tensor]) -> Result<Tensor> {
    let (x, version) = (inputs[0], gpu.version(&VERSIONS));
    let mut out = x.alike(x.shape(), x.dtype())?;
    let launch = if version == "v1" { Launch::new(x.rows().div_ceil(128), 128) } else { Launch::new(x.rows().div_ceil(8), 256) };
    let args = inputs.iter().fold(Args::new().out(&mut out), |args, input| args.input(*input));
    gpu.launch(&format!("softmax_{pass}_{version}_{}", x.dtype()), launch, args.int(x.rows()).int(x.last()))?;
    Ok(out)
}

vectorised! {
    fn forward_rows<T: Real>(x: &[T], c: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
            let most = largest(x);
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - most).exp());
            let inverse = T::ONE / sum_of(y, |y| y);
            y.iter_mut().for_each(|y| *y *= inverse);
        }
    }
    /// dy becomes dx.
    fn backward_rows<T: Real>(dy: &mut [T], y: &[T], c: usize) {
        for (dy, y) in dy.chunks_exact_mut(c).zip(y.chunks_exact(c)) {
            let dot = sum_of2(y, dy, |y, dy| y * dy);
            dy.iter_mut().zip(y).for_each(|(dy, &y)| *dy = y * (*dy - dot));
        }
    }
}

fn forward<T: Real + Element>(x: &Tensor) -> Result<Tensor> {
    let c = x.last();
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let x = x.data::<T>();
    parallel::rows(y.data_mut::<T>(), c, |first, y| forward_rows(&x[first * c..first * c + y.len()], c, y));
    Ok(y)
}

fn backward<T: Real + Element>(dy: Tensor, y: &Tensor) -> Result<Tensor> {
    let (c, y) = (y.last(), y.data::<T>());
    super::overwrite(dy, c, |first, dy| backward_rows(dy, &y[first * c..first * c + dy.len()], c))
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        // On a GPU the backward reads the rounded y.
        Case::new(&format!("softmax: {name}"), &[shape], |x| x[0].softmax()).rounded(|x| {
            let y = rounded(&x[0].detach().softmax()?)?.value().clone();
            let saved = y.clone();
            Var::record("rounded", [&x[0]], y, move |dy, _| Ok([Some(gradient(dy, &saved)?)]))
        })
    };
    vec![
        case("scores of 2 heads, 7 tokens", &[1, 2, 7, 7]),
        case("one row, C = 37", &[1, 37]),
        case("C = 1", &[3, 1]),
        case("saturated", &[4, 12]).with(0, |_, x| 30.0 * x),
        case("equal scores", &[2, 9]).with(0, |i, _| (i / 9) as f64),
        case("197 keys, many rows", &[300, 197]),
        case("rows of vectors", &[5, 264]),
    ]
}
