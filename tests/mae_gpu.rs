//! A whole MAE on the emulated device: loss and gradients are those of the CPU, and a recorded step is the step taken as it comes.
#![cfg(feature = "emulated")]

mod stand_in;

use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::{Batch, Method};
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::VitConfig;
use masque::optim::{adamw::AdamW, groups};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Device, Dtype, Tensor};
use masque::train::step::{Step, StepOptions};

fn mae(device: &Device, precision: Dtype) -> Mae {
    let encoder = VitConfig::new(32, 8, 32, 2, 2);
    let decoder = DecoderConfig { width: 16, depth: 1, heads: 1 };
    let config = MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix: Some(1e-6) };
    let mut mae = Mae::new(config, Dtype::F32, &Rng::new(1)).unwrap();
    mae.params.move_to(device, precision).unwrap();
    mae
}

fn batch() -> Batch {
    Batch::of_images(Tensor::from_slice(&[3, 3, 32, 32], &Rng::new(2).normal("images", 3 * 3 * 32 * 32)).unwrap())
}

/// The loss and all gradients, one behind the other.
fn walked(mae: &mut Mae, rng: &Rng) -> (f64, Vec<(String, Vec<f64>)>) {
    let tape = Tape::new();
    let loss = mae.loss(&tape, &batch(), rng).unwrap();
    assert_eq!(loss.parts.len(), 1);
    mae.params.clear_gradients();
    tape.backward(&loss.total, &mut [&mut mae.params]).unwrap();
    let params = &mae.params;
    let of = |id| (params.name(id).to_string(), params.gradient(id).unwrap().on(&Device::Cpu).unwrap().to_f64());
    (loss.total.value().on(&Device::Cpu).unwrap().item(), params.trained().map(of).collect())
}

#[test]
fn a_whole_mae_runs_on_the_device() {
    let device = Device::Gpu(stand_in::gpu());
    let rng = Rng::new(7);
    let (loss, gradients) = walked(&mut mae(&Device::Cpu, Dtype::F32), &rng);
    for (precision, allowed) in [(Dtype::F32, 1e-4), (Dtype::Bf16, 0.05)] {
        let (got, got_gradients) = walked(&mut mae(&device, precision), &rng);
        assert!((got - loss).abs() <= allowed * loss, "{precision}: the loss is {got} and not {loss}");
        for ((name, got), (_, want)) in got_gradients.iter().zip(&gradients) {
            let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let (off, size) = (length(&mut got.iter().zip(want).map(|(a, b)| a - b)), length(&mut want.iter().copied()));
            assert!(off <= allowed * size + 1e-6, "{precision}: the gradient of {name} is off by {off} of {size}");
        }
    }
}

#[test]
fn a_recorded_mae_hides_other_patches_at_each_replay() {
    let gpu = stand_in::gpu();
    let device = Device::Gpu(gpu.clone());
    for precision in [Dtype::F32, Dtype::Bf16] {
        let (model, images) = (mae(&device, precision), Batch::of_images(batch().images.on(&device).unwrap()));
        let loss = |rng: &Rng| Ok(model.loss(&Tape::off(), &images, rng)?.total.value().clone());
        let (graph, recorded) = gpu.capture(|| loss(&Rng::new(0))).unwrap();
        let mut seen = Vec::new();
        for seed in [3, 4, 5] {
            graph.replay(&Rng::new(seed)).unwrap();
            let (replayed, direct) =
                (recorded.on(&Device::Cpu).unwrap().item(), loss(&Rng::new(seed)).unwrap().on(&Device::Cpu).unwrap().item());
            assert_eq!(replayed.to_bits(), direct.to_bits(), "{precision} seed {seed}");
            seen.push(replayed);
        }
        assert!(seen[0] != seen[1] && seen[1] != seen[2], "{seen:?}");
    }
}

#[test]
fn steps_of_a_recorded_mae_are_those_of_the_cpu() {
    let losses = |device: &Device| {
        let mae = mae(device, Dtype::F32);
        let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
        let mut step = Step::new(Box::new(mae), Box::new(optimizer), StepOptions { clip: Some(1.0), ..StepOptions::default() });
        let losses = (0..5).map(|i| step.run(&batch(), &Rng::new(7).at(i), 1e-3).unwrap().loss);
        let losses: Vec<f64> = losses.collect();
        (losses, step.is_recorded())
    };
    let ((want, on_cpu), (got, on_gpu)) = (losses(&Device::Cpu), losses(&Device::Gpu(stand_in::gpu())));
    assert!(!on_cpu && on_gpu);
    got.iter().zip(&want).for_each(|(got, want)| assert!((got - want).abs() <= 1e-4 * want, "{got} is not {want}"));
    assert!(got[4] < got[0], "{got:?}");
}

#[test]
fn the_code_for_cuda_does_the_same() {
    for test in [
        "a_whole_mae_runs_on_the_device",
        "a_recorded_mae_hides_other_patches_at_each_replay",
        "steps_of_a_recorded_mae_are_those_of_the_cpu",
    ] {
        stand_in::run(test, "", None);
    }
}
