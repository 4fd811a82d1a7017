//! Residual sums and norms as a training step uses them: recorded once with fresh draws at each replay, and with their mistakes told in a sentence.
#![cfg(feature = "emulated")]

use masque::device::gpu::Gpu;
use masque::error::Result;
use masque::ops::case::numbers;
use masque::ops::scale::Branch;
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};

fn normal(device: &Device, name: &str, shape: &[usize], dtype: Dtype) -> Tensor {
    Tensor::from_slice(shape, &numbers(name, 0, shape)).unwrap().cast(dtype).unwrap().on(device).unwrap()
}

struct Inputs {
    x: Tensor,
    branch: Tensor,
    /// Gains, weight, bias, and given statistics.
    vectors: [Tensor; 5],
    upstream: Tensor,
}

impl Inputs {
    fn new(device: &Device, dtype: Dtype) -> Self {
        let vector = |name: &str| normal(device, name, &[24], Dtype::F32);
        let variance = Tensor::full_on(device, &[24], Dtype::F32, 0.5).unwrap();
        Self {
            x: normal(device, "x", &[6, 3, 24], dtype),
            branch: normal(device, "branch", &[6, 3, 24], dtype),
            vectors: [vector("gains"), vector("w"), vector("b"), vector("mean"), variance],
            upstream: normal(device, "upstream", &[6, 3, 24], dtype),
        }
    }

    /// Every op of the norms forward and backward: the result and the gradients of x, branch, gains, weight, bias.
    fn step(&self, rng: &Rng) -> Result<Vec<Tensor>> {
        let tape = Tape::new();
        let device = self.x.device();
        let [x, branch, gains, w, b] =
            [&self.x, &self.branch, &self.vectors[0], &self.vectors[1], &self.vectors[2]].map(|x| tape.leaf(x.clone()));
        let drawn = |name: &str| Ok(Some((Tensor::drawn(&device, rng, name, &[6])?, 0.4)));
        let first = Branch { value: branch.clone(), gains: Some(gains.clone()), drop: drawn("first")? };
        let (sum, y) = x.add_layernorm(&first, &w, &b, 1e-6)?;
        let second = Branch { value: y.softmax()?.scale_channels(&gains)?, gains: None, drop: drawn("second")? };
        let z = sum.add_branch(&second)?.l2_normalise(1e-12)?.layernorm_plain(1e-6)?.scale(0.5)?;
        let rows = z.reshape(&[18, 24])?.batchnorm(1e-3)?.0.batchnorm_given(&self.vectors[3], &self.vectors[4], 1e-3)?;
        let (u, p) = drawn("third")?.expect("just drawn");
        let out = rows.reshape(&[6, 3, 24])?.drop_path(&u, p)?;
        let gradients = tape.backward_from(&out, self.upstream.clone(), &mut [])?;
        let of = |leaf: &Var| gradients.of(leaf).expect("every input is used").clone();
        Ok(std::iter::once(out.value().clone()).chain([&x, &branch, &gains, &w, &b].map(of)).collect())
    }
}

#[test]
fn a_recorded_step_draws_afresh_and_gives_the_bits_of_a_direct_one() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let gpu = Gpu::emulated().unwrap();
        let (inputs, rng) = (Inputs::new(&Device::Gpu(gpu.clone()), dtype), Rng::new(3));
        let (graph, recorded) = gpu.capture(|| inputs.step(&rng)).unwrap();
        let mut seen = Vec::new();
        for step in 0..3 {
            graph.replay(&rng.at(step)).unwrap();
            let direct = inputs.step(&rng.at(step)).unwrap();
            for (i, (recorded, direct)) in recorded.iter().zip(&direct).enumerate() {
                assert_eq!(recorded.read().unwrap(), direct.read().unwrap(), "{dtype}, step {step}, tensor {i}");
            }
            seen.push(recorded[0].read().unwrap());
        }
        assert!(seen[0] != seen[1] && seen[1] != seen[2]);
    }
}

#[test]
fn the_devices_agree_on_a_whole_step() {
    let gpu = Device::Gpu(Gpu::emulated().unwrap());
    let [cpu, gpu] = [Device::Cpu, gpu].map(|device| Inputs::new(&device, Dtype::F32).step(&Rng::new(3)).unwrap());
    for (i, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
        let (cpu, gpu) = (cpu.read().unwrap(), gpu.read().unwrap());
        let scale = cpu.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
        assert!(cpu.iter().zip(&gpu).all(|(a, b)| (a - b).abs() <= 2e-5 * scale), "tensor {i}");
    }
}

#[test]
fn what_does_not_fit_is_a_sentence_on_either_device() {
    for device in [Device::Cpu, Device::Gpu(Gpu::emulated().unwrap())] {
        let var = |shape: &[usize]| Var::constant(Tensor::zeros_on(&device, shape, Dtype::F32).unwrap());
        let (x, w, other) = (var(&[2, 3, 8]), var(&[8]), var(&[9]));
        let u = Tensor::zeros_on(&device, &[3], Dtype::F32).unwrap();
        let errors = [
            x.layernorm(&w, &other, 1e-6).err(),
            x.layernorm(&other, &w, 1e-6).err(),
            x.scale_channels(&other).err(),
            x.drop_path(&u, 0.5).err(),
            x.drop_path(&Tensor::zeros_on(&device, &[2], Dtype::F32).unwrap(), 1.0).err(),
            x.add_branch(&Branch { value: var(&[2, 3, 9]), gains: None, drop: None }).err(),
        ];
        let parts = ["bias is f32 [9]", "weight is f32 [9]", "gains are f32 [9]", "numbers are f32 [3]", "a rate of 1", "[2, 3, 9]"];
        for (error, part) in errors.into_iter().zip(parts) {
            let error = error.expect(part).chain();
            assert!(error.contains(part), "{device}: {error} does not say {part}");
        }
    }
}
