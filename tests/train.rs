//! A whole training step of MAE on the emulated device is the CPU's: two steps as they come, then recorded once and replayed.
#![cfg(feature = "emulated")]

use masque::device::Named;
use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::{Batch, Method};
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::{DropPath, VitConfig};
use masque::optim::{Optimizer, adamw::AdamW, clip, groups};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Device, Dtype, Tensor};
use masque::train::step::{Step, StepOptions};

/// Two steps as they come, then replays.
const STEPS: u64 = 5;

fn mae(device: &Device, precision: Dtype) -> Mae {
    let encoder = VitConfig { drop_path: DropPath::Linear(0.3), layer_scale: Some(0.5), ..VitConfig::new(48, 8, 48, 2, 3) };
    let decoder = DecoderConfig { width: 32, depth: 2, heads: 2 };
    let config = MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix: Some(1e-6) };
    let mut mae = Mae::new(config, Dtype::F32, &Rng::new(1)).unwrap();
    mae.params.move_to(device, precision).unwrap();
    mae
}

fn batch(step: u64, size: usize) -> Batch {
    let images = Rng::new(2).at(step).normal("images", size * 3 * 48 * 48);
    Batch::of_images(Tensor::from_slice(&[size, 3, 48, 48], &images).unwrap())
}

struct Run {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// All parameters at the end.
    values: Vec<(String, Vec<f64>)>,
}

fn run(device: &Device, precision: Dtype) -> Run {
    let mae = mae(device, precision);
    let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    let mut step = Step::new(Box::new(mae), Box::new(optimizer), StepOptions { clip: Some(0.5), ..StepOptions::default() });
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for k in 0..STEPS {
        let loss = step.run(&batch(k, 3), &Rng::new(7).at(k), 1e-3 * (1.0 + k as f64)).unwrap();
        losses.push(loss.loss);
        norms.push(loss.norm);
    }
    assert_eq!(step.is_recorded(), device.gpu().is_some());
    let params = step.method().params();
    let values = params.ids().map(|id| (params.name(id).to_string(), params.value(id).read().unwrap())).collect();
    Run { losses, norms, values }
}

fn near(got: &[f64], want: &[f64], relative: f64, what: &str) {
    let scale = want.iter().fold(1e-6f64, |most, x| most.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= relative * scale, "{what} {i}: {got} is not {want}");
    }
}

#[test]
fn recorded_and_replayed_steps_are_the_cpus_in_f32() {
    let want = run(&Device::Cpu, Dtype::F32);
    let got = run(&Named::Emulated.open().unwrap(), Dtype::F32);
    near(&got.losses, &want.losses, 2e-5, "loss of step");
    near(&got.norms, &want.norms, 1e-4, "gradient norm of step");
    for ((name, got), (_, want)) in got.values.iter().zip(&want.values) {
        // Adam moves a weight by about the rate whatever its gradient: the key third of a qkv bias, whose gradient is rounding, is left out.
        let kept = if name.ends_with("attn.qkv.bias") { got.len() / 3 } else { got.len() };
        near(&got[..kept], &want[..kept], 2e-3, name);
    }
}

#[test]
fn steps_in_bf16_follow_those_in_f32() {
    let want = run(&Device::Cpu, Dtype::F32);
    let got = run(&Named::Emulated.open().unwrap(), Dtype::Bf16);
    near(&got.losses, &want.losses, 1e-2, "loss of step");
    near(&got.norms, &want.norms, 5e-2, "gradient norm of step");
    assert!(got.losses.iter().chain(&got.norms).all(|x| x.is_finite()));
}

#[test]
fn replayed_steps_are_those_of_a_step_without_recording() {
    let device = Named::Emulated.open().unwrap();
    let recorded = run(&device, Dtype::F32);
    let mut mae = mae(&device, Dtype::F32);
    let mut optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    let mut losses = Vec::new();
    for k in 0..STEPS {
        let tape = Tape::new();
        mae.params.clear_gradients();
        let loss = mae.loss(&tape, &batch(k, 3), &Rng::new(7).at(k)).unwrap().total;
        tape.backward(&loss, &mut [&mut mae.params]).unwrap();
        losses.push(loss.value().read().unwrap()[0]);
        drop(loss);
        clip::clip_on_device(&mut mae.params, 0.5).unwrap();
        optimizer.step(&mut mae.params, 1e-3 * (1.0 + k as f64)).unwrap();
    }
    assert_eq!(losses, recorded.losses);
    let values: Vec<Vec<f64>> = mae.params.ids().map(|id| mae.params.value(id).read().unwrap()).collect();
    assert!(values.iter().zip(&recorded.values).all(|(eager, (_, replayed))| eager == replayed));
}

#[test]
fn a_replayed_step_takes_no_memory() {
    let device = Named::Emulated.open().unwrap();
    let mae = mae(&device, Dtype::Bf16);
    let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    let mut step = Step::new(Box::new(mae), Box::new(optimizer), StepOptions { clip: Some(1.0), ..StepOptions::default() });
    let mut taken = Vec::new();
    for k in 0..5 {
        step.run(&batch(k, 2), &Rng::new(7).at(k), 1e-3).unwrap();
        taken.push(device.gpu().unwrap().memory().1);
    }
    assert_eq!(taken[2], taken[4], "{taken:?}");
}
