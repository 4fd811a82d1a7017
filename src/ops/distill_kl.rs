//! Distillation from a teacher's logits.
//!
//!   soft  loss = T^2 sum_b,c p_t (ln p_t - ln p_s) / D,   dz = T (p_s - p_t) / D      p = softmax(z / T)
//!   hard  cross-entropy against the teacher's largest logit, the first of equal ones
//!
//! Student z_s [B, C], teacher z_t [B, C]. D is B (MaskedKD) or B C (DeiT). The logarithms are taken in f64 relative to each row's maximum, so
//! that a nearly one-hot row keeps what is left of its divergence. Saved: both logits; on a GPU the gradient, which its kernel (kernels/distill_kl.cu) makes
//! together with the loss, in f32.

use super::case::{Case, numbers};
use super::cross_entropy::{batch_and_classes, log_softmax};
use super::total::{Made, Parts, constant_for, sum_of_rows};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, ensure};

/// What the sum of the divergences is divided by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reduction {
    /// The number of images.
    Batch,
    /// The number of images times the number of classes.
    Elements,
}

impl Var {
    pub fn distill_kl(&self, teacher: &Tensor, temperature: f64, reduction: Reduction) -> Result<Var> {
        let z = self.value().clone();
        let (batch, classes) = batch_and_classes("distill_kl", &z)?;
        ensure!(teacher.shape() == z.shape(), "distill_kl: the teacher's logits are {teacher:?} but the student's are {z:?}");
        ensure!((f64::MIN_POSITIVE..).contains(&temperature), "distill_kl: the temperature is {temperature} but must be above 0");
        let share = match reduction {
            Reduction::Batch => 1.0 / batch as f64,
            Reduction::Elements => 1.0 / (batch * classes) as f64,
        };
        if let Some(gpu) = z.gpu() {
            let made = on_gpu(gpu, self, teacher, temperature, share)?;
            return Var::record("distill_kl", [self], made.loss.clone(), move |dy, _| made.backward(&dy));
        }
        let teacher = constant_for(&z, teacher)?;
        let sum = by_real!("distill_kl", z.dtype(), divergence(&z, &teacher, temperature));
        let loss = Tensor::scalar(temperature * temperature * share * sum, z.dtype())?;
        Var::record("distill_kl", [self], loss, move |dy, need| {
            let mut dz = need.out(0)?;
            by_real!("distill_kl", z.dtype(), gradient(&z, &teacher, temperature, temperature * share * dy.item(), &mut dz));
            Ok([Some(dz)])
        })
    }

    pub fn hard_distill(&self, teacher: &Tensor) -> Result<Var> {
        let z = self.value();
        batch_and_classes("hard_distill", z)?;
        ensure!(teacher.shape() == z.shape(), "hard_distill: the teacher's logits are {teacher:?} but the student's are {z:?}");
        if let Some(gpu) = z.gpu() {
            let (teacher, rows) = (constant_for(z, teacher)?, z.rows());
            let mut labels = Tensor::empty_on(&z.device(), &[rows], Dtype::U32)?;
            let args = Args::new().out(&mut labels).input(&teacher).int(rows).int(z.last());
            gpu.launch(&typed("first_largest", teacher.dtype()), Launch::new(rows.div_ceil(8), 256), args)?;
            return self.cross_entropy_at(&labels, 0.0);
        }
        let teacher = teacher.on(&Device::Cpu)?;
        let first_largest = |row: &[f64]| (0..row.len()).fold(0, |best, k| if row[k] > row[best] { k } else { best });
        let labels: Vec<u32> = teacher.to_f64().chunks_exact(z.last()).map(|row| first_largest(row) as u32).collect();
        self.cross_entropy(&labels, 0.0)
    }
}

fn on_gpu(gpu: &Gpu, z: &Var, teacher: &Tensor, temperature: f64, share: f64) -> Result<Made> {
    let (batch, classes) = (z.value().rows(), z.value().last());
    let teacher = constant_for(z.value(), teacher)?;
    let mut parts = Parts::new(z, batch)?;
    let args = Args::new().maybe_out(parts.gradient.as_mut()).out(&mut parts.partial).input(z.value()).input(&teacher);
    let args = args.int(classes).float(1.0 / temperature).float(temperature * temperature * share).float(temperature * share);
    gpu.launch(&typed(&typed("distill_kl", z.dtype()), teacher.dtype()), Launch::new(batch, 128), args)?;
    parts.finish(gpu)
}

fn divergence<T: Real + Element>(z: &Tensor, teacher: &Tensor, temperature: f64) -> f64 {
    let (rows, c) = (z.rows(), z.last());
    let (z, teacher) = (z.data::<T>(), teacher.data::<T>());
    sum_of_rows(rows, c, |first, sums| {
        let (mut s, mut t) = (vec![0.0; c], vec![0.0; c]);
        for (j, sum) in sums.iter_mut().enumerate() {
            log_softmax(&z[(first + j) * c..][..c], temperature, &mut s);
            log_softmax(&teacher[(first + j) * c..][..c], temperature, &mut t);
            *sum = lane_sum(c, |k| {
                let p = t[k].exp();
                if p == 0.0 { 0.0 } else { p * (t[k] - s[k]) }
            });
        }
    })
}

fn gradient<T: Real + Element>(z: &Tensor, teacher: &Tensor, temperature: f64, factor: f64, dz: &mut Tensor) {
    let c = z.last();
    let (z, teacher) = (z.data::<T>(), teacher.data::<T>());
    parallel::rows(dz.data_mut::<T>(), c, |first, dz| {
        let (mut s, mut t) = (vec![0.0; c], vec![0.0; c]);
        for (j, dz) in dz.chunks_exact_mut(c).enumerate() {
            log_softmax(&z[(first + j) * c..][..c], temperature, &mut s);
            log_softmax(&teacher[(first + j) * c..][..c], temperature, &mut t);
            dz.iter_mut().zip(&s).zip(&t).for_each(|((dz, s), t)| *dz = T::of(factor * (s.exp() - t.exp())));
        }
    });
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: [usize; 2], spread: f64, temperature: f64, reduction: Reduction| {
        let teacher: Vec<f64> = numbers("teacher", 0, &shape).into_iter().map(|x| spread * x).collect();
        let teacher = Tensor::from_slice(&shape, &teacher).expect("as many numbers");
        Case::loss(&format!("distill_kl: {name}"), &shape, move |z| z.distill_kl(&teacher, temperature, reduction))
    };
    // Halves, so that rows have equal ones; the first counts.
    let hard = |name: &str, shape: [usize; 2]| {
        let teacher: Vec<f64> = numbers("teacher", 0, &shape).into_iter().map(|x| (2.0 * x).round() / 2.0).collect();
        let teacher = Tensor::from_slice(&shape, &teacher).expect("as many numbers");
        Case::loss(&format!("hard_distill: {name}"), &shape, move |z| z.hard_distill(&teacher))
    };
    vec![
        case("4 images, 37 classes", [4, 37], 1.0, 1.0, Reduction::Batch),
        case("temperature 3, over all elements", [4, 37], 2.0, 3.0, Reduction::Elements),
        case("20 images, 1000 classes", [20, 1000], 3.0, 1.0, Reduction::Batch),
        case("one image, one class", [1, 1], 1.0, 1.0, Reduction::Batch),
        case("one-hot teacher", [3, 10], 100.0, 1.0, Reduction::Batch),
        case("one-hot student", [3, 10], 1.0, 1.0, Reduction::Batch).with(0, |_, x| 30.0 * x),
        case("one row of several rounds", [1, 2501], 1.0, 2.0, Reduction::Batch),
        hard("4 images, 37 classes", [4, 37]),
        hard("equal logits", [9, 8]),
    ]
}
