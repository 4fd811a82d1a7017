//! Binary cross-entropy of logits, mean over all elements.
//!
//!   loss = mean(max(z, 0) - z t + ln(1 + e^-|z|)),   dz = (sigmoid(z) - t) / (B C)
//!
//! z [B, C]; t [B, C], or [t > 0] on request. Taken in f64. Saved: z, t; on a GPU the gradient, which its kernel (kernels/bce.cu) makes together with
//! the loss, in f32 and with targets in f32.

use super::case::Case;
use super::cross_entropy::batch_and_classes;
use super::total::{Made, Parts, constant_for, sum_of_rows};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::Real;
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure};

impl Var {
    /// `binarise`: whatever is above 0 in the targets counts as 1.
    pub fn bce(&self, targets: &Tensor, binarise: bool) -> Result<Var> {
        let z = self.value().clone();
        batch_and_classes("bce", &z)?;
        ensure!(targets.shape() == z.shape(), "bce: the targets are {targets:?} but the logits are {z:?}");
        if let Some(gpu) = z.gpu() {
            let made = on_gpu(gpu, self, targets, binarise)?;
            return Var::record("bce", [self], made.loss.clone(), move |dy, _| made.backward(&dy));
        }
        let targets = constant_for(&z, targets)?;
        let share = 1.0 / z.numel() as f64;
        let sum = by_real!("bce", z.dtype(), sum(&z, &targets, binarise));
        Var::record("bce", [self], Tensor::scalar(share * sum, z.dtype())?, move |dy, need| {
            let mut dz = need.out(0)?;
            by_real!("bce", z.dtype(), gradient(&z, &targets, binarise, share * dy.item(), &mut dz));
            Ok([Some(dz)])
        })
    }
}

fn on_gpu(gpu: &Gpu, z: &Var, targets: &Tensor, binarise: bool) -> Result<Made> {
    let n = z.value().numel();
    let targets = constant_for(z.value(), targets)?.cast(Dtype::F32)?;
    let blocks = n.div_ceil(2048).min(1024);
    let mut parts = Parts::new(z, blocks)?;
    let args = Args::new().maybe_out(parts.gradient.as_mut()).out(&mut parts.partial).input(z.value()).input(&targets);
    gpu.launch(&typed("bce", z.dtype()), Launch::new(blocks, 256), args.int(n).flag(binarise).float(1.0 / n as f64))?;
    parts.finish(gpu)
}

fn target<T: Real>(t: T, binarise: bool) -> f64 {
    if binarise { if t > T::ZERO { 1.0 } else { 0.0 } } else { t.f64() }
}

fn sum<T: Real + Element>(z: &Tensor, targets: &Tensor, binarise: bool) -> f64 {
    let (rows, c) = (z.rows(), z.last());
    let (z, targets) = (z.data::<T>(), targets.data::<T>());
    sum_of_rows(rows, c, |first, losses| {
        for (j, loss) in losses.iter_mut().enumerate() {
            let row = (first + j) * c..(first + j + 1) * c;
            let losses = z[row.clone()].iter().zip(&targets[row]).map(|(z, &t)| {
                let z = z.f64();
                // Not f64::max, which would drop a NaN.
                let positive = if z < 0.0 { 0.0 } else { z };
                positive - z * target(t, binarise) + (-z.abs()).exp().ln_1p()
            });
            *loss = losses.sum();
        }
    })
}

fn gradient<T: Real + Element>(z: &Tensor, targets: &Tensor, binarise: bool, factor: f64, dz: &mut Tensor) {
    let (z, targets) = (z.data::<T>(), targets.data::<T>());
    parallel::rows(dz.data_mut::<T>(), 1, |first, dz| {
        let part = first..first + dz.len();
        for ((dz, z), &t) in dz.iter_mut().zip(&z[part.clone()]).zip(&targets[part]) {
            let z = z.f64();
            let e = (-z.abs()).exp();
            let probability = if z < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
            *dz = T::of(factor * (probability - target(t, binarise)));
        }
    });
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: [usize; 2], binarise: bool| {
        let targets: Vec<f64> = (0..shape[0] * shape[1]).map(|i| (i % 4) as f64 / 4.0).collect();
        let targets = Tensor::from_slice(&shape, &targets).expect("as many numbers");
        Case::loss(&format!("bce: {name}"), &shape, move |z| z.bce(&targets, binarise))
    };
    vec![
        case("4 images, 37 classes", [4, 37], false),
        case("one image, binary targets", [1, 10], true),
        case("many rows", [40, 1000], true),
        case("saturated", [3, 8], false).with(0, |_, x| 40.0 * x),
    ]
}
