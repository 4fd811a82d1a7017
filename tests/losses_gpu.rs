//! Losses on a GPU where their constants are on it already, as in recorded work: what the cases of the ops, whose constants come from the host, do not reach.
#![cfg(feature = "emulated")]

use masque::device::gpu::Gpu;
use masque::error::Result;
use masque::ops::{case::numbers, distill_kl::Reduction, feature_loss::Distance, relation_kl::Relation};
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};

fn normal(name: &str, shape: &[usize], dtype: Dtype) -> Tensor {
    Tensor::from_slice(shape, &numbers(name, 0, shape)).unwrap().cast(dtype).unwrap()
}

/// The loss and the gradient of x.
fn both(x: &Tensor, f: impl Fn(&Var) -> Result<Var>) -> (f64, Vec<f64>) {
    let tape = Tape::new();
    let x = tape.leaf(x.clone());
    let loss = f(&x).unwrap();
    let gradients = tape.backward(&loss, &mut []).unwrap();
    let here = |t: &Tensor| t.on(&Device::Cpu).unwrap().to_f64();
    (here(loss.value())[0], here(gradients.of(&x).unwrap()))
}

fn device() -> Device {
    Device::Gpu(Gpu::emulated().unwrap())
}

#[test]
fn a_teacher_in_bf16_gives_the_bits_of_the_same_numbers_in_f32() {
    let device = device();
    for columns in [24, 37] {
        let on = |t: Tensor| t.on(&device).unwrap();
        let x = on(normal("x", &[5, columns], Dtype::Bf16));
        let target = on(normal("target", &[5, columns], Dtype::Bf16));
        let same = target.cast(Dtype::F32).unwrap();
        let smooth = Distance::SmoothL1 { beta: 1.0 };
        assert_eq!(both(&x, |x| x.feature_loss(&target, smooth)), both(&x, |x| x.feature_loss(&same, smooth)));
        let soft = |t: &Tensor| both(&x, |x| x.distill_kl(t, 2.0, Reduction::Batch));
        assert_eq!(soft(&target), soft(&same));
        let hard = |t: &Tensor| both(&x, |x| x.hard_distill(t));
        assert_eq!(hard(&target), hard(&same));
        let binary = |t: &Tensor| both(&x, |x| x.bce(t, true));
        assert_eq!(binary(&target), binary(&same));
    }
}

#[test]
fn a_mask_on_the_device_that_hides_nothing_gives_zero() {
    let device = device();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let x = normal("x", &[2, 4, 12], dtype).on(&device).unwrap();
        let target = normal("target", &[2, 4, 12], Dtype::F32).on(&device).unwrap();
        let images = normal("images", &[2, 3, 4, 4], Dtype::F32).on(&device).unwrap();
        let none = Tensor::zeros_on(&device, &[2, 4], Dtype::F32).unwrap();
        let zero = (0.0, vec![0.0; 96]);
        assert_eq!(both(&x, |x| x.masked_mse(&target, &none)), zero);
        assert_eq!(both(&x, |x| x.feature_loss_at(&target, Distance::L1, &none)), zero);
        assert_eq!(both(&x, |x| x.pixel_loss(&images, 2, Some(1e-6), &none)), zero);
        let here = Tensor::zeros(&[2, 4], Dtype::F32).unwrap();
        let refused = Var::constant(x).pixel_loss(&images, 2, Some(1e-6), &here).err().unwrap().chain();
        assert!(refused.contains("pixel_loss: the mask f32 [2, 4] counts no patch"), "{refused}");
    }
}

#[test]
fn a_label_out_of_range_on_the_device_is_found_there() {
    let device = device();
    let z = Var::constant(normal("z", &[2, 5], Dtype::F32).on(&device).unwrap());
    let labels = Tensor::from_slice(&[2], &[4u32, 5]).unwrap();
    let refused = z.cross_entropy_at(&labels, 0.0).err().unwrap().chain();
    assert!(refused.contains("image 1 has label 5 but there are 5 classes"), "{refused}");
    let loss = z.cross_entropy_at(&labels.on(&device).unwrap(), 0.0);
    let refused = loss.and_then(|_| device.gpu().unwrap().wait()).err().unwrap().chain();
    assert!(refused.contains("index 5 is outside 0..5"), "{refused}");
}

#[test]
fn every_loss_can_be_recorded() {
    let device = device();
    let gpu = device.gpu().unwrap();
    let on = |t: Tensor| t.on(&device).unwrap();
    let target = on(normal("target", &[2, 4, 12], Dtype::F32));
    let (flat, qkv) = (target.reshape(&[8, 12]).unwrap(), target.clone());
    let mask = on(Tensor::from_slice(&[2, 4], &[1f32, 0., 1., 1., 0., 1., 1., 0.]).unwrap());
    let images = on(normal("images", &[2, 3, 4, 4], Dtype::F32));
    let labels = on(Tensor::from_slice(&[8], &[0u32, 11, 3, 2, 2, 7, 9, 1]).unwrap());
    type Loss<'a> = Box<dyn Fn(&Var) -> Result<Var> + 'a>;
    let z = |x: &Var| x.reshape(&[8, 12]);
    let losses: Vec<Loss> = vec![
        Box::new(|x| x.feature_loss_at(&target, Distance::L2, &mask)),
        Box::new(|x| x.masked_mse(&target, &mask)),
        Box::new(|x| x.pixel_loss(&images, 2, Some(1e-6), &mask)),
        Box::new(|x| z(x)?.cross_entropy_at(&labels, 0.1)),
        Box::new(|x| z(x)?.cross_entropy_soft(&flat)),
        Box::new(|x| z(x)?.bce(&flat, true)),
        Box::new(|x| z(x)?.distill_kl(&flat, 2.0, Reduction::Elements)),
        Box::new(|x| z(x)?.hard_distill(&flat)),
        Box::new(|x| Ok(x.relation_kl(&qkv, 2, &[Relation::Qk, Relation::Vv])?.0)),
    ];
    for (i, loss) in losses.iter().enumerate() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let x = on(normal("x", &[2, 4, 12], dtype));
            let want = both(&x, loss);
            let (graph, (y, gradient)) = gpu
                .capture(|| {
                    let tape = Tape::new();
                    let x = tape.leaf(x.clone());
                    let y = loss(&x)?;
                    let gradient = tape.backward(&y, &mut [])?.of(&x).cloned();
                    Ok((y.value().clone(), gradient.unwrap()))
                })
                .unwrap();
            graph.replay(&masque::rng::Rng::new(0)).unwrap();
            let here = |t: &Tensor| t.on(&Device::Cpu).unwrap().to_f64();
            assert_eq!((here(&y)[0], here(&gradient)), want, "loss {i} {dtype}");
        }
    }
}

#[test]
fn relations_on_a_gpu_have_the_divergences_of_the_cpu_and_touch_only_their_parts() {
    let device = device();
    let relations = [Relation::Qk, Relation::Qq];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (student, teacher) = (normal("student", &[2, 9, 48], dtype), normal("teacher", &[2, 9, 96], dtype));
        let exact = |t: &Tensor| t.cast(Dtype::F64).unwrap();
        let (_, want) = Var::constant(exact(&student)).relation_kl(&exact(&teacher), 2, &relations).unwrap();
        let (student, teacher) = (student.on(&device).unwrap(), teacher.on(&device).unwrap());
        let (untracked, parts) = Var::constant(student.clone()).relation_kl(&teacher, 2, &relations).unwrap();
        let parts = parts.on(&Device::Cpu).unwrap().to_f64();
        want.to_f64().iter().zip(parts).for_each(|(want, got)| approx::assert_relative_eq!(*want, got, max_relative = 1e-5));
        let (loss, gradient) = both(&student, |x| Ok(x.relation_kl(&teacher, 2, &relations)?.0));
        assert_eq!(untracked.value().on(&Device::Cpu).unwrap().item(), loss);
        for (i, g) in gradient.iter().enumerate() {
            assert_eq!(*g != 0.0, i % 48 < 32, "{dtype} at {i}");
        }
    }
}
