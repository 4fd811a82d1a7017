//! Cross-entropy of logits, mean over the batch.
//!
//!   labels        loss[b] = (1 - s) (-ln p[y]) + s mean_k(-ln p[k]),   dz = (p - (1 - s) [k = y] - s / C) / B
//!   soft targets  loss[b] = -sum_k t[k] ln p[k],                       dz = (p sum(t) - t) / B
//!
//! z [B, C], p = softmax(z); y one label an image; t [B, C]. ln p is taken in f64, relative to the row's maximum. Saved: z and the targets;
//! on a GPU the gradient, which its kernel (kernels/cross_entropy.cu) makes together with the loss, in f32 and with soft targets in f32.

use super::case::Case;
use super::total::{Made, Parts, constant_for, sum_of_rows};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, ensure};

enum Targets {
    Labels { labels: Vec<u32>, smoothing: f64 },
    Soft(Tensor),
}

impl Var {
    pub fn cross_entropy(&self, labels: &[u32], smoothing: f64) -> Result<Var> {
        self.cross_entropy_at(&Tensor::from_slice(&[labels.len()], labels)?, smoothing)
    }

    /// Labels as a tensor [B] of u32. On a GPU they may be there already, as recorded work needs them; then the kernel looks whether there are such classes.
    pub fn cross_entropy_at(&self, labels: &Tensor, smoothing: f64) -> Result<Var> {
        let z = self.value();
        let (batch, classes) = batch_and_classes("cross_entropy", z)?;
        ensure!(
            labels.shape() == [batch] && labels.dtype() == Dtype::U32,
            "cross_entropy: there are labels of shape {:?} but the logits are {z:?}; a u32 an image is needed",
            labels.shape()
        );
        ensure!((0.0..=1.0).contains(&smoothing), "cross_entropy: a label smoothing of {smoothing} is not in [0, 1]");
        if labels.gpu().is_none() {
            for (image, &label) in labels.data::<u32>().iter().enumerate() {
                ensure!((label as usize) < classes, "cross_entropy: image {image} has label {label} but there are {classes} classes");
            }
        }
        if let Some(gpu) = z.gpu() {
            let made = with_labels_on(gpu, self, labels, smoothing)?;
            return Var::record("cross_entropy", [self], made.loss.clone(), move |dy, _| made.backward(&dy));
        }
        let labels = labels.on(&Device::Cpu)?.data::<u32>().to_vec();
        for (image, &label) in labels.iter().enumerate() {
            ensure!((label as usize) < classes, "cross_entropy: image {image} has label {label} but there are {classes} classes");
        }
        self.entropy(Targets::Labels { labels, smoothing })
    }

    pub fn cross_entropy_soft(&self, targets: &Tensor) -> Result<Var> {
        let z = self.value();
        batch_and_classes("cross_entropy", z)?;
        ensure!(targets.shape() == z.shape(), "cross_entropy: the targets are {targets:?} but the logits are {z:?}");
        if let Some(gpu) = z.gpu() {
            let made = with_targets_on(gpu, self, targets)?;
            return Var::record("cross_entropy", [self], made.loss.clone(), move |dy, _| made.backward(&dy));
        }
        self.entropy(Targets::Soft(constant_for(z, targets)?))
    }

    fn entropy(&self, targets: Targets) -> Result<Var> {
        let z = self.value().clone();
        let share = 1.0 / z.rows() as f64;
        let sum = by_real!("cross_entropy", z.dtype(), sum(&z, &targets));
        Var::record("cross_entropy", [self], Tensor::scalar(share * sum, z.dtype())?, move |dy, need| {
            let mut dz = need.out(0)?;
            by_real!("cross_entropy", z.dtype(), gradient(&z, &targets, share * dy.item(), &mut dz));
            Ok([Some(dz)])
        })
    }
}

fn with_labels_on(gpu: &Gpu, z: &Var, labels: &Tensor, smoothing: f64) -> Result<Made> {
    let (batch, classes) = (z.value().rows(), z.value().last());
    let labels = labels.on(&z.value().device())?;
    let mut parts = Parts::new(z, batch)?;
    let args = Args::new().maybe_out(parts.gradient.as_mut()).out(&mut parts.partial).input(z.value()).input(&labels);
    let args = args.int(classes).float(smoothing).float(1.0 / batch as f64).fault();
    gpu.launch(&typed("cross_entropy", z.dtype()), Launch::new(batch, 128), args)?;
    parts.finish(gpu)
}

fn with_targets_on(gpu: &Gpu, z: &Var, targets: &Tensor) -> Result<Made> {
    let (batch, classes) = (z.value().rows(), z.value().last());
    let targets = constant_for(z.value(), targets)?.cast(Dtype::F32)?;
    let mut parts = Parts::new(z, batch)?;
    let args = Args::new().maybe_out(parts.gradient.as_mut()).out(&mut parts.partial).input(z.value()).input(&targets);
    gpu.launch(&typed("cross_entropy_soft", z.dtype()), Launch::new(batch, 128), args.int(classes).float(1.0 / batch as f64))?;
    parts.finish(gpu)
}

/// The sizes of logits [B, C], neither of them 0.
pub(crate) fn batch_and_classes(op: &str, z: &Tensor) -> Result<(usize, usize)> {
    match *z.shape() {
        [batch, classes] if batch > 0 && classes > 0 => Ok((batch, classes)),
        _ => crate::bail!("{op}: the logits are {z:?} but [B, C] is needed"),
    }
}

/// out = ln softmax(z / temperature) of one row.
pub(crate) fn log_softmax<T: Real>(z: &[T], temperature: f64, out: &mut [f64]) {
    let most = z.iter().fold(f64::NEG_INFINITY, |most, z| most.max(z.f64()));
    out.iter_mut().zip(z).for_each(|(out, z)| *out = (z.f64() - most) / temperature);
    let sum = lane_sum(out.len(), |k| out[k].exp()).ln();
    out.iter_mut().for_each(|out| *out -= sum);
}

impl Targets {
    /// The loss of row b with logarithms of probabilities `ln`.
    fn loss<T: Real + Element>(&self, b: usize, ln: &[f64]) -> f64 {
        let c = ln.len();
        match self {
            Targets::Labels { labels, smoothing: 0.0 } => -ln[labels[b] as usize],
            Targets::Labels { labels, smoothing } => {
                -(1.0 - smoothing) * ln[labels[b] as usize] - smoothing * lane_sum(c, |k| ln[k]) / c as f64
            }
            Targets::Soft(targets) => {
                let t = &targets.data::<T>()[b * c..][..c];
                -lane_sum(c, |k| t[k].f64() * ln[k])
            }
        }
    }

    /// dz = factor times the derivative of that loss.
    fn gradient<T: Real + Element>(&self, b: usize, ln: &[f64], factor: f64, dz: &mut [T]) {
        let c = ln.len();
        let p = dz.iter_mut().zip(ln).map(|(dz, ln)| (dz, ln.exp()));
        match self {
            Targets::Labels { labels, smoothing } => {
                let label = labels[b] as usize;
                let target = |k: usize| (if k == label { 1.0 - smoothing } else { 0.0 }) + smoothing / c as f64;
                p.enumerate().for_each(|(k, (dz, p))| *dz = T::of(factor * (p - target(k))));
            }
            Targets::Soft(targets) => {
                let t = &targets.data::<T>()[b * c..][..c];
                let mass = lane_sum(c, |k| t[k].f64());
                p.zip(t).for_each(|((dz, p), t)| *dz = T::of(factor * (p * mass - t.f64())));
            }
        }
    }
}

fn sum<T: Real + Element>(z: &Tensor, targets: &Targets) -> f64 {
    let c = z.last();
    let data = z.data::<T>();
    sum_of_rows(z.rows(), c, |first, losses| {
        let mut ln = vec![0.0; c];
        for (j, loss) in losses.iter_mut().enumerate() {
            log_softmax(&data[(first + j) * c..][..c], 1.0, &mut ln);
            *loss = targets.loss::<T>(first + j, &ln);
        }
    })
}

fn gradient<T: Real + Element>(z: &Tensor, targets: &Targets, factor: f64, dz: &mut Tensor) {
    let c = z.last();
    let z = z.data::<T>();
    parallel::rows(dz.data_mut::<T>(), c, |first, dz| {
        let mut ln = vec![0.0; c];
        for (j, dz) in dz.chunks_exact_mut(c).enumerate() {
            log_softmax(&z[(first + j) * c..][..c], 1.0, &mut ln);
            targets.gradient(first + j, &ln, factor, dz);
        }
    });
}

pub fn cases() -> Vec<Case> {
    let soft = |shape: [usize; 2]| {
        let targets: Vec<f64> = (0..shape[0] * shape[1]).map(|i| (i % 5) as f64 / 8.0).collect();
        Tensor::from_slice(&shape, &targets).expect("as many numbers")
    };
    let (several, one, many) = (soft([4, 37]), soft([1, 3]), soft([5, 1000]));
    let labels = Tensor::from_slice(&[3], &[2u32, 8, 0]).expect("as many numbers");
    vec![
        Case::loss("cross_entropy: 4 images, 37 classes", &[4, 37], |z| z.cross_entropy(&[0, 36, 7, 7], 0.0)),
        Case::loss("cross_entropy: 1000 classes, smoothing", &[20, 1000], |z| {
            z.cross_entropy(&(0..20).map(|i| i * 49).collect::<Vec<_>>(), 0.1)
        }),
        Case::loss("cross_entropy: one image, one class", &[1, 1], |z| z.cross_entropy(&[0], 0.1)),
        Case::loss("cross_entropy: saturated", &[3, 10], |z| z.cross_entropy(&[1, 5, 9], 0.1)).with(0, |_, x| 30.0 * x),
        Case::loss("cross_entropy: soft targets", &[4, 37], move |z| z.cross_entropy_soft(&several)),
        Case::loss("cross_entropy: soft targets, one image", &[1, 3], move |z| z.cross_entropy_soft(&one)),
        Case::loss("cross_entropy: soft targets, 1000 classes", &[5, 1000], move |z| z.cross_entropy_soft(&many)),
        Case::loss("cross_entropy: labels on the device of the logits", &[3, 9], move |z| {
            z.cross_entropy_at(&labels.on(&z.value().device())?, 0.1)
        }),
        Case::loss("cross_entropy: one row of several rounds", &[1, 2504], |z| z.cross_entropy(&[2503], 0.1)),
    ]
}
