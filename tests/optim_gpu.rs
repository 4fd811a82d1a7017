//! Optimisers, clipping and the running average on the emulated device are those of the CPU, also when the update is recorded once and replayed.
#![cfg(feature = "emulated")]

use half::bf16;
use masque::device::emulated::{Copies, Order};
use masque::device::gpu::Gpu;
use masque::optim::groups::{self, Group, LayerDecay};
use masque::optim::{Optimizer, adamw::AdamW, clip, ema::Ema, lamb::Lamb, lars::Lars, sgd::Sgd};
use masque::param::{Init, Params, ParamsBuilder, Role};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Device, Dtype, Tensor};

/// Odd sizes in an odd order: more than one piece, less than a vector, frozen ones in between.
const ENTRIES: [(&str, &[usize], Role); 8] = [
    ("embed.pos", &[1, 5, 3], Role::Frozen),
    ("embed.weight", &[37, 3, 2, 2], Role::Trained),
    ("embed.bias", &[37], Role::Trained),
    ("block.weight", &[91, 101], Role::Trained),
    ("block.scale", &[1], Role::Trained),
    ("block.running_mean", &[19], Role::Buffer),
    ("head.weight", &[7, 13], Role::Trained),
    ("head.bias", &[7], Role::Trained),
];
const TRAINED: [&str; 6] = ["embed.weight", "embed.bias", "block.weight", "block.scale", "head.weight", "head.bias"];

fn params(device: &Device, precision: Dtype) -> Params {
    let mut builder = ParamsBuilder::default();
    for (name, shape, role) in ENTRIES {
        builder.add_as(name, shape, Init::Normal(0.5), role).unwrap();
    }
    let mut params = builder.build(Dtype::F32, &Rng::new(3)).unwrap();
    params.move_to(device, precision).unwrap();
    params
}

/// Made-up gradients for those named, by a backward walk.
fn give(params: &mut Params, names: &[&str], step: u64) {
    params.clear_gradients();
    for name in names {
        let id = params.find(name).unwrap();
        let shape = params.value(id).shape().to_vec();
        let numbers = Rng::new(100).at(step).normal(name, params.value(id).numel());
        let gradient = Tensor::from_slice(&shape, &numbers).unwrap().on(params.device()).unwrap();
        let tape = Tape::new();
        let var = params.var(&tape, id);
        tape.backward_from(&var, gradient, &mut [params]).unwrap();
    }
}

fn layers(params: &Params) -> Vec<Group> {
    let rule = LayerDecay { weight_decay: 0.1, decay: 0.65, last: 2, no_decay: &["head.weight"] };
    rule.groups(params, |name| Ok(["embed", "block", "head"].iter().position(|part| name.starts_with(part)).unwrap())).unwrap()
}

const OPTIMIZERS: [&str; 4] = ["adamw", "lamb", "lars", "sgd"];

fn optimizer(which: &str, params: &Params) -> Box<dyn Optimizer> {
    match which {
        "adamw" => Box::new(AdamW::new(layers(params), (0.9, 0.95), 1e-8).unwrap()),
        "lamb" => Box::new(Lamb::new(layers(params), (0.9, 0.95), 1e-8, 2.5).unwrap()),
        "lars" => Box::new(Lars::new(layers(params), 0.9, 0.001).unwrap()),
        _ => Box::new(Sgd::new(layers(params), 0.9).unwrap()),
    }
}

fn here(tensor: &Tensor) -> Vec<f32> {
    tensor.on(&Device::Cpu).unwrap().data::<f32>().to_vec()
}

fn values(params: &Params) -> Vec<Vec<f32>> {
    params.ids().map(|id| here(params.value(id))).collect()
}

fn bits(all: &[Vec<f32>]) -> Vec<u32> {
    all.iter().flatten().map(|x| x.to_bits()).collect()
}

/// max |a - b| / max |b - start|
fn error(a: &[f32], b: &[f32], start: &[f32]) -> f64 {
    let far = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0f64, |most, (a, b)| most.max((a - b).abs().into()));
    assert!(a.iter().all(|x| x.is_finite()));
    far(a, b) / far(b, start).max(1e-6)
}

/// Which have a gradient in which step: all, some, then others.
fn reached(step: u64) -> Vec<&'static str> {
    TRAINED.into_iter().enumerate().filter(|(i, _)| step == 0 || !(*i as u64 + step).is_multiple_of(3)).map(|(_, name)| name).collect()
}

fn emulated() -> Device {
    Device::Gpu(Gpu::emulated().unwrap())
}

/// Values, moments and numbers of updates after three steps of which each has other gradients.
fn three_steps(which: &str, device: &Device, precision: Dtype) -> (Params, Box<dyn Optimizer>) {
    let mut params = params(device, precision);
    let mut optimizer = optimizer(which, &params);
    for step in 0..3 {
        give(&mut params, &reached(step), step);
        optimizer.step(&mut params, 0.05 / (step + 1) as f64).unwrap();
    }
    (params, optimizer)
}

#[test]
fn updates_are_those_of_the_cpu() {
    let start = values(&params(&Device::Cpu, Dtype::F32));
    for which in OPTIMIZERS {
        let (cpu, on_cpu) = three_steps(which, &Device::Cpu, Dtype::F32);
        for precision in [Dtype::F32, Dtype::Bf16] {
            let (gpu, on_gpu) = three_steps(which, &emulated(), precision);
            for (((id, got), want), start) in gpu.ids().zip(values(&gpu)).zip(values(&cpu)).zip(&start) {
                let error = error(&got, &want, start);
                assert!(error < 1e-6, "{which} {}: {error:e}", gpu.name(id));
                assert!(gpu.role(id) == Role::Trained || got == *start, "{which} {}", gpu.name(id));
            }
            assert_eq!(on_cpu.state().memories().count(), on_gpu.state().memories().count());
            for (got, want) in on_gpu.state().memories().zip(on_cpu.state().memories()) {
                assert_eq!((got.id, got.steps), (want.id, want.steps));
                for ((name, got), (_, want)) in got.tensors.iter().zip(&want.tensors) {
                    let want = here(want);
                    let error = error(&here(got), &want, &vec![0.0; want.len()]);
                    assert!(error < 1e-6, "{which} {name}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn the_working_copy_is_the_rounded_values() {
    for which in OPTIMIZERS {
        let (mut params, _) = three_steps(which, &emulated(), Dtype::Bf16);
        let mut ema = Ema::new(&mut params, 0.5).unwrap();
        for step in 3..5 {
            give(&mut params, &TRAINED, step);
            optimizer(which, &params).step(&mut params, 0.1).unwrap();
            ema.update(&mut params).unwrap();
            ema.swap(&mut params).unwrap();
            for id in params.ids() {
                let copy = params.working(&Tape::off(), id).value().on(&Device::Cpu).unwrap();
                let rounded: Vec<bf16> = here(params.value(id)).into_iter().map(bf16::from_f32).collect();
                assert!(copy.data::<bf16>() == rounded, "{which} {}", params.name(id));
            }
        }
    }
}

/// Norms, values and averages of a run with everything in it.
fn a_run(which: &str, device: &Device) -> (Vec<f64>, Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let mut params = params(device, Dtype::F32);
    let mut optimizer = optimizer(which, &params);
    let mut ema = Ema::new(&mut params, 0.75).unwrap();
    let mut norms = Vec::new();
    for step in 0..3 {
        give(&mut params, &reached(step), step);
        // Shortened, left alone, shortened.
        norms.push(clip::clip(&mut params, [0.5, 1e4, 2.0][step as usize]).unwrap());
        norms.push(clip::gradient_norm(&mut params).unwrap());
        optimizer.step(&mut params, 0.05).unwrap();
        ema.update(&mut params).unwrap();
    }
    let after = values(&params);
    ema.swap(&mut params).unwrap();
    let average = values(&params);
    ema.swap(&mut params).unwrap();
    assert!(bits(&after) == bits(&values(&params)));
    (norms, after, average)
}

#[test]
fn clipping_and_averages_are_those_of_the_cpu() {
    let start = values(&params(&Device::Cpu, Dtype::F32));
    for which in OPTIMIZERS {
        let (norms, after, average) = a_run(which, &Device::Cpu);
        let got = a_run(which, &emulated());
        for (got, want) in got.0.iter().zip(&norms) {
            assert!((got - want).abs() < 2e-7 * want, "{which}: {got} {want}");
        }
        for (what, got, want) in [("values", got.1, after), ("average", got.2, average)] {
            for (i, start) in start.iter().enumerate() {
                let error = error(&got[i], &want[i], start);
                assert!(error < 1e-6, "{which} {what} of {}: {error:e}", ENTRIES[i].0);
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_order_of_threads_and_blocks() {
    for which in OPTIMIZERS {
        let run = |seed| {
            let gpu = Gpu::emulated().unwrap();
            gpu.as_emulated().unwrap().order(Order { seed, copies: Copies::Early });
            let (norms, after, average) = a_run(which, &Device::Gpu(gpu));
            (norms, bits(&after), bits(&average))
        };
        let plain = run(0);
        assert!((1..=4).all(|seed| run(seed) == plain), "{which}");
    }
}

#[test]
fn gradients_that_are_not_finite_are_reported_and_not_scaled() {
    let mut params = params(&emulated(), Dtype::F32);
    for (bad, norm) in [(f32::INFINITY, f64::INFINITY), (f32::NAN, f64::NAN)] {
        give(&mut params, &TRAINED, 0);
        let id = params.find("head.bias").unwrap();
        let (tape, more) = (Tape::new(), [0.0, 0.0, bad, 0.0, 0.0, 0.0, 0.0]);
        let more = Tensor::from_slice(&[7], &more).unwrap().on(params.device()).unwrap();
        let var = params.var(&tape, id);
        tape.backward_from(&var, more, &mut [&mut params]).unwrap();
        let gradient = |params: &Params, name: &str| here(params.gradient(params.find(name).unwrap()).unwrap());
        let before = gradient(&params, "block.weight");
        let got = clip::clip(&mut params, 1.0).unwrap();
        assert!(got == norm || (got.is_nan() && norm.is_nan()), "{got}");
        assert!(gradient(&params, "block.weight") == before);
    }
}

/// Lets the gradients of a step be written, the length limited and the update made, over and over, from fixed tensors.
struct Recordable {
    params: Params,
    optimizer: Box<dyn Optimizer>,
    /// One a parameter, written before each step.
    sources: Vec<Tensor>,
}

impl Recordable {
    fn new(which: &str) -> Self {
        let params = params(&emulated(), Dtype::Bf16);
        let source = |name: &&str| Tensor::zeros_on(params.device(), params.value(params.find(name).unwrap()).shape(), Dtype::F32).unwrap();
        let sources = TRAINED[1..].iter().map(source).collect();
        Self { optimizer: optimizer(which, &params), params, sources }
    }

    fn write(&mut self, step: u64) {
        for (name, source) in TRAINED[1..].iter().zip(&mut self.sources) {
            let numbers = Rng::new(7).at(step).normal(name, source.numel());
            source.upload(&Tensor::from_slice(source.shape(), &numbers).unwrap()).unwrap();
        }
    }

    fn backward_and_clip(&mut self) -> Tensor {
        self.params.clear_gradients();
        for (name, source) in TRAINED[1..].iter().zip(&self.sources) {
            let tape = Tape::new();
            let var = self.params.var(&tape, self.params.find(name).unwrap());
            tape.backward_from(&var, source.copy().unwrap(), &mut [&mut self.params]).unwrap();
        }
        clip::clip_on_device(&mut self.params, 3.0).unwrap()
    }

    /// Bits of values and state, and numbers of updates.
    fn all(&self) -> (Vec<u32>, Vec<u64>) {
        let mut all = values(&self.params);
        all.extend(self.optimizer.state().memories().flat_map(|memory| memory.tensors).map(|(_, tensor)| here(tensor)));
        (bits(&all), self.optimizer.state().memories().map(|memory| memory.steps).collect())
    }
}

#[test]
fn a_recorded_update_that_is_replayed_is_the_plain_one_bit_for_bit() {
    for which in OPTIMIZERS {
        let lr = |step: u64| 0.1 / (step + 1) as f64;
        let mut plain = Recordable::new(which);
        let mut norms = Vec::new();
        for step in 0..4 {
            plain.write(step);
            norms.push(here(&plain.backward_and_clip())[0].to_bits());
            plain.optimizer.step(&mut plain.params, lr(step)).unwrap();
        }
        let mut recorded = Recordable::new(which);
        recorded.write(0);
        recorded.backward_and_clip();
        recorded.optimizer.step(&mut recorded.params, lr(0)).unwrap();
        let (gpu, reached) = (recorded.params.device().gpu().unwrap().clone(), recorded.params.reached());
        recorded.write(1);
        recorded.optimizer.prepare(&recorded.params, lr(1)).unwrap();
        let (graph, norm) = gpu
            .capture(|| {
                let norm = recorded.backward_and_clip();
                assert!(recorded.optimizer.prepare(&recorded.params, 0.1).is_err());
                recorded.optimizer.apply(&mut recorded.params).map(|()| norm)
            })
            .unwrap();
        for step in 1..4 {
            if step > 1 {
                recorded.write(step);
                recorded.params.clear_gradients();
                recorded.params.assume_gradients(&reached).unwrap();
                recorded.optimizer.prepare(&recorded.params, lr(step)).unwrap();
            }
            graph.replay(&Rng::new(0)).unwrap();
            assert_eq!(here(&norm)[0].to_bits(), norms[step as usize], "{which} step {step}");
        }
        assert!(recorded.all() == plain.all(), "{which}");
        assert!(recorded.all().1 == [4; 5]);
    }
}

#[test]
fn an_update_is_made_of_what_it_was_prepared_for() {
    for device in [Device::Cpu, emulated()] {
        let mut params = params(&device, Dtype::F32);
        let mut adamw = optimizer("adamw", &params);
        let before = values(&params);
        give(&mut params, &["head.bias"], 0);
        let refused = adamw.apply(&mut params).unwrap_err();
        assert_eq!(refused.chain(), "adamw: head.bias has a gradient, and the update was not prepared for that");
        adamw.prepare(&params, 0.1).unwrap();
        params.clear_gradients();
        let refused = adamw.apply(&mut params).unwrap_err();
        assert_eq!(refused.chain(), "adamw: head.bias has no gradient, and the update was not prepared for that");
        assert!(bits(&values(&params)) == bits(&before));
        // Nothing to do is no error.
        adamw.step(&mut params, 0.1).unwrap();
        assert!(bits(&values(&params)) == bits(&before));
        let forgotten = params.find("embed.weight").unwrap();
        params.train_only(|name| name.starts_with("head"));
        let refused = params.assume_gradients(&[forgotten]).unwrap_err();
        assert_eq!(refused.chain(), "the gradient of embed.weight has been forgotten since it was recorded");
        // The gradients lie elsewhere now.
        give(&mut params, &["head.weight"], 1);
        adamw.step(&mut params, 0.1).unwrap();
        let changed: Vec<bool> = values(&params).iter().zip(&before).map(|(after, before)| after != before).collect();
        assert_eq!(changed, [false, false, false, false, false, false, true, false]);
    }
}

#[test]
fn a_state_is_restored_on_a_gpu_and_follows_the_parameters_there() {
    for which in OPTIMIZERS {
        let (_, stopped) = three_steps(which, &emulated(), Dtype::F32);
        let resumed = |device: &Device, move_after: bool| {
            let mut own = params(if move_after { &Device::Cpu } else { device }, Dtype::F32);
            let mut optimizer = optimizer(which, &own);
            for memory in stopped.state().memories() {
                let here: Vec<_> = memory.tensors.iter().map(|(name, tensor)| (*name, tensor.on(&Device::Cpu).unwrap())).collect();
                let tensors: Vec<_> = here.iter().map(|(name, tensor)| (*name, tensor)).collect();
                optimizer.state_mut().restore(&own, memory.id, memory.steps, &tensors).unwrap();
            }
            if move_after {
                own.move_to(device, Dtype::F32).unwrap();
            }
            give(&mut own, &TRAINED, 5);
            optimizer.step(&mut own, 0.1).unwrap();
            values(&own)
        };
        let (cpu, gpu, moved) = (resumed(&Device::Cpu, false), resumed(&emulated(), false), resumed(&emulated(), true));
        assert!(bits(&gpu) == bits(&moved), "{which}");
        let start = values(&params(&Device::Cpu, Dtype::F32));
        assert!((0..start.len()).all(|i| error(&gpu[i], &cpu[i], &start[i]) < 1e-6), "{which}");
    }
}

#[test]
fn groups_of_one_kind_are_updated_too() {
    let run = |device: &Device| {
        let mut params = params(device, Dtype::F32);
        // The head alone: gradients and state are laid out differently.
        params.train_only(|name| name.starts_with("head") || name.starts_with("embed"));
        let mut group = groups::all(&params, 0.05);
        group[0].params.retain(|&id| params.name(id).starts_with("head"));
        let mut adamw = AdamW::new(group, (0.9, 0.999), 1e-8).unwrap();
        give(&mut params, &["head.weight", "head.bias"], 0);
        adamw.step(&mut params, 0.1).unwrap();
        give(&mut params, &["embed.bias"], 0);
        assert_eq!(adamw.step(&mut params, 0.1).unwrap_err().chain(), "adamw: embed.bias has a gradient but is in no group");
        values(&params)
    };
    assert!(bits(&run(&emulated())) == bits(&run(&Device::Cpu)));
}
