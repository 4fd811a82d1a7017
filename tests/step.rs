//! A step of training: what it does is the same whether it is taken as it comes or recorded and replayed.
#![cfg(feature = "emulated")]

mod stand_in;

use masque::error::Result;
use masque::methods::{Batch, Loss, Method};
use masque::nn::vit::Vit;
use masque::optim::groups::LayerDecay;
use masque::optim::{Optimizer, adamw::AdamW, clip, lamb::Lamb, lars::Lars, sgd::Sgd};
use masque::param::{Init, ParamId, Params, ParamsBuilder, Role};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};
use masque::train::step::{Step, StepOptions};
use std::cell::Cell;
use std::rc::Rc;

const SIDE: usize = 4;
const PIXELS: usize = 3 * SIDE * SIDE;
const WIDTH: usize = 19;

/// The mean of gelu(x W^T + b) U^T with weights of chance for each image, and the same of a second head that a frozen weight makes.
struct Tiny {
    params: Params,
    ids: [ParamId; 5],
    /// Whether it asks for numbers of the device, which recorded work cannot have.
    reads: Rc<Cell<bool>>,
}

impl Tiny {
    fn new(device: &Device, precision: Dtype) -> Self {
        let mut builder = ParamsBuilder::default();
        let unused = builder.add("unused", &[7], Init::Normal(0.3)).unwrap();
        let hidden = builder.add("hidden.weight", &[WIDTH, PIXELS], Init::Normal(0.3)).unwrap();
        let bias = builder.add("hidden.bias", &[WIDTH], Init::Normal(0.3)).unwrap();
        let frozen = builder.add_as("frozen.weight", &[5, WIDTH], Init::Normal(0.3), Role::Frozen).unwrap();
        let head = builder.add("head.weight", &[5, WIDTH], Init::Normal(0.3)).unwrap();
        let mut params = builder.build(Dtype::F32, &Rng::new(1)).unwrap();
        params.move_to(device, precision).unwrap();
        Self { params, ids: [unused, hidden, bias, frozen, head], reads: Rc::default() }
    }

    /// The sum of all numbers of y times weights of chance.
    fn mixed(&self, y: &Var, name: &str, rng: &Rng) -> Result<Var> {
        let n = y.value().numel();
        let weights = Tensor::drawn(self.params.device(), rng, name, &[1, n])?.cast(y.dtype())?;
        let sum = y.reshape(&[1, n])?.linear(&Var::constant(weights), None)?.reshape(&[])?;
        // Losses are f32.
        let (narrow, wide) = (sum.dtype(), sum.value().cast(Dtype::F32)?);
        Var::record("widen", [&sum], wide, move |dy, _| Ok([Some(dy.cast(narrow)?)]))
    }
}

impl Method for Tiny {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let [_, hidden, bias, frozen, head] = self.ids.map(|id| self.params.working(tape, id));
        if self.reads.get() {
            batch.images.read()?;
        }
        let images = batch.images.cast(self.params.precision())?;
        let x = Var::constant(images.reshape(&[images.shape()[0], PIXELS])?);
        let y = x.linear_gelu(&hidden, Some(&bias))?;
        let (one, two) = (self.mixed(&y.linear(&head, None)?, "one", rng)?, self.mixed(&y.linear(&frozen, None)?.gelu()?, "two", rng)?);
        Ok(Loss { total: Var::weighted_sum(&[(0.5, &one), (-0.25, &two)])?, parts: Vec::new(), statistics: None })
    }

    fn encoder(&self) -> &Vit {
        unreachable!("training does not ask for it")
    }

    fn macs(&self) -> [u64; 2] {
        [0, 0]
    }
}

fn optimizer(which: &str, params: &Params) -> Box<dyn Optimizer> {
    let rule = LayerDecay { weight_decay: 0.1, decay: 0.7, last: 1, no_decay: &[] };
    let groups = rule.groups(params, |name| Ok(usize::from(name.starts_with("head")))).unwrap();
    match which {
        "adamw" => Box::new(AdamW::new(groups, (0.9, 0.95), 1e-8).unwrap()),
        "lamb" => Box::new(Lamb::new(groups, (0.9, 0.95), 1e-8, Lamb::MOST).unwrap()),
        "lars" => Box::new(Lars::new(groups, 0.9, 0.1).unwrap()),
        _ => Box::new(Sgd::new(groups, 0.9).unwrap()),
    }
}

fn batch(step: u64, images: usize) -> Batch {
    let shape = [images, 3, SIDE, SIDE];
    Batch::of_images(Tensor::from_slice(&shape, &Rng::new(5).at(step).normal("images", shape.iter().product())).unwrap())
}

fn lr(step: u64) -> f64 {
    0.02 / (step + 1) as f64
}

fn emulated() -> Device {
    Device::Gpu(stand_in::gpu())
}

fn here(tensor: &Tensor) -> Vec<f32> {
    tensor.on(&Device::Cpu).unwrap().data::<f32>().to_vec()
}

/// Losses, norms, and in the end all values and the state with its numbers of updates.
#[derive(PartialEq, Debug)]
struct Trained {
    numbers: Vec<f32>,
    values: Vec<f32>,
    state: Vec<f32>,
    updates: Vec<u64>,
}

impl Trained {
    fn of(numbers: Vec<f32>, params: &Params, optimizer: &dyn Optimizer) -> Self {
        let memories = || optimizer.state().memories();
        Self {
            numbers,
            values: params.ids().flat_map(|id| here(params.value(id))).collect(),
            state: memories().flat_map(|memory| memory.tensors).flat_map(|(_, tensor)| here(tensor)).collect(),
            updates: memories().map(|memory| memory.steps).collect(),
        }
    }
}

const STEPS: u64 = 6;

/// By hand, one thing after the other.
fn by_hand(which: &str, device: &Device, precision: Dtype, most: Option<f64>) -> Trained {
    let mut tiny = Tiny::new(device, precision);
    let mut optimizer = optimizer(which, &tiny.params);
    let mut numbers = Vec::new();
    for step in 0..STEPS {
        let batch = Batch::of_images(batch(step, 6).images.on(device).unwrap());
        tiny.params.clear_gradients();
        let tape = Tape::new();
        let loss = tiny.loss(&tape, &batch, &Rng::new(9).at(step)).unwrap().total;
        tape.backward(&loss, &mut [&mut tiny.params]).unwrap();
        numbers.extend(here(loss.value()));
        numbers.extend(most.map(|most| clip::clip(&mut tiny.params, most).unwrap() as f32));
        optimizer.step(&mut tiny.params, lr(step)).unwrap();
    }
    Trained::of(numbers, &tiny.params, &*optimizer)
}

fn make(which: &str, device: &Device, precision: Dtype, clip: Option<f64>) -> Step {
    let tiny = Tiny::new(device, precision);
    let optimizer = optimizer(which, &tiny.params);
    Step::new(Box::new(tiny), optimizer, StepOptions { clip, ..StepOptions::default() })
}

fn by_steps(which: &str, device: &Device, precision: Dtype, clip: Option<f64>) -> Trained {
    let mut step = make(which, device, precision, clip);
    let mut numbers = Vec::new();
    for i in 0..STEPS {
        let mut batch = batch(i, 6);
        if i % 3 == 1 {
            batch.images = batch.images.on(device).unwrap();
        }
        let loss = step.run(&batch, &Rng::new(9).at(i), lr(i)).unwrap();
        assert_eq!(step.is_recorded(), device.gpu().is_some() && i >= 2);
        numbers.push(loss.loss as f32);
        numbers.extend(clip.map(|_| loss.norm as f32));
        // What is done between steps does not matter.
        step.method().params().clear_gradients();
    }
    let state = Trained::of(numbers, step.method().params(), &Sgd::new(Vec::new(), 0.0).unwrap());
    let values = state.values;
    Trained { values, ..Trained::of(state.numbers, &Tiny::new(&Device::Cpu, Dtype::F32).params, step.optimizer()) }
}

#[test]
fn recorded_steps_are_plain_steps_bit_for_bit() {
    for which in ["adamw", "lamb", "lars", "sgd"] {
        for (precision, clip) in [(Dtype::F32, Some(2.0)), (Dtype::Bf16, None)] {
            let (plain, recorded) = (by_hand(which, &emulated(), precision, clip), by_steps(which, &emulated(), precision, clip));
            assert_eq!(plain.updates, [STEPS; 3]);
            assert!(plain.numbers.iter().all(|x| x.is_finite()));
            assert!(plain == recorded, "{which} {precision}: {:?} {:?}", plain.numbers, recorded.numbers);
        }
    }
}

#[test]
fn a_step_that_cannot_be_recorded_does_no_harm() {
    let device = emulated();
    let tiny = Tiny::new(&device, Dtype::F32);
    let (reads, optimizer) = (tiny.reads.clone(), optimizer("adamw", &tiny.params));
    let mut step = Step::new(Box::new(tiny), optimizer, StepOptions::default());
    let mut numbers = Vec::new();
    for i in 0..STEPS {
        if i == 2 {
            reads.set(true);
            let refused = step.run(&batch(i, 6), &Rng::new(9).at(i), lr(i)).unwrap_err().chain();
            assert_eq!(refused, "recording a step: emulated: recorded work has no numbers to read yet");
            reads.set(false);
        }
        numbers.push(step.run(&batch(i, 6), &Rng::new(9).at(i), lr(i)).unwrap().loss as f32);
    }
    assert!(step.is_recorded());
    assert!(step.optimizer().state().memories().all(|memory| memory.steps == STEPS));
    assert_eq!(numbers, by_hand("adamw", &device, Dtype::F32, None).numbers);
    // Nor does a batch that is elsewhere.
    let elsewhere = Batch::of_images(batch(0, 6).images.on(&emulated()).unwrap());
    assert_eq!(
        step.run(&elsewhere, &Rng::new(9), 0.01).unwrap_err().chain(),
        "a step on emulated cannot take images that are on another device, emulated"
    );
    assert!(step.run(&batch(0, 6), &Rng::new(9), 0.01).is_ok());
}

#[test]
fn steps_on_a_gpu_are_those_of_the_cpu() {
    for which in ["adamw", "lamb", "lars", "sgd"] {
        let (cpu, gpu) = (by_steps(which, &Device::Cpu, Dtype::F32, Some(2.0)), by_steps(which, &emulated(), Dtype::F32, Some(2.0)));
        assert!(cpu == by_hand(which, &Device::Cpu, Dtype::F32, Some(2.0)), "{which}");
        assert_eq!(cpu.updates, gpu.updates);
        for (what, cpu, gpu) in [("losses and norms", cpu.numbers, gpu.numbers), ("values", cpu.values, gpu.values)] {
            let largest = cpu.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(gpu.iter().all(|x| x.is_finite()), "{which} {what}");
            let worst = cpu.iter().zip(&gpu).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(worst <= 1e-5 * largest, "{which} {what}: {worst:e} at a scale of {largest:e}");
        }
    }
}

#[test]
fn a_batch_of_another_shape_is_refused_with_both() {
    let mut step = make("adamw", &emulated(), Dtype::F32, None);
    let run = |step: &mut Step, images: usize, lr: f64| step.run(&batch(0, images), &Rng::new(0), lr);
    for _ in 0..3 {
        run(&mut step, 6, 0.01).unwrap();
    }
    let refused = run(&mut step, 5, 0.01).unwrap_err();
    assert_eq!(refused.chain(), "a step on emulated is recorded for one shape of batches: it takes f32 [6, 3, 4, 4], not f32 [5, 3, 4, 4]");
    assert!(run(&mut step, 6, f64::NAN).is_err());
    // Neither did any harm.
    assert!(run(&mut step, 6, 0.01).unwrap().loss.is_finite());
    assert!(step.optimizer().state().memories().all(|memory| memory.steps == 4));
    step.method().params().train_only(|name| name == "head.weight");
    let refused = run(&mut step, 6, 0.01).unwrap_err();
    assert_eq!(refused.chain(), "the gradient of hidden.weight has been forgotten since it was recorded");
    // On the CPU nothing is recorded.
    let mut step = make("adamw", &Device::Cpu, Dtype::F32, None);
    assert!((1..5).all(|images| run(&mut step, images, 0.01).is_ok()));
}

#[test]
fn micro_batches_add_up_to_the_update_of_their_mean_loss() {
    for (device, precision) in [(Device::Cpu, Dtype::F32), (emulated(), Dtype::F32), (emulated(), Dtype::Bf16)] {
        let options = StepOptions { clip: Some(2.0), accumulate: 3 };
        let tiny = Tiny::new(&device, precision);
        let rule = optimizer("adamw", &tiny.params);
        let mut step = Step::new(Box::new(tiny), rule, options);
        let mut hand = Tiny::new(&device, precision);
        let mut by_hand = optimizer("adamw", &hand.params);
        for update in 0..4 {
            hand.params.clear_gradients();
            let mut losses = Vec::new();
            for k in 0..3 {
                let (at, rng) = (update * 3 + k, Rng::new(9).at(update * 3 + k));
                losses.push(step.add(&batch(at, 6), &rng).unwrap());
                let tape = Tape::new();
                let there = Batch::of_images(batch(at, 6).images.on(&device).unwrap());
                let loss = hand.loss(&tape, &there, &rng).unwrap().total;
                tape.backward(&loss.scale(1.0 / 3.0).unwrap(), &mut [&mut hand.params]).unwrap();
                assert_eq!(losses[k as usize] as f32, here(loss.value())[0]);
            }
            assert!(step.add(&batch(0, 6), &Rng::new(9)).unwrap_err().chain().contains("3 micro-batches"));
            let norm = clip::clip(&mut hand.params, 2.0).unwrap();
            by_hand.step(&mut hand.params, lr(update)).unwrap();
            let outcome = step.finish(lr(update)).unwrap();
            assert_eq!((outcome.norm as f32, outcome.taken), (norm as f32, true));
            assert!((outcome.loss - losses.iter().sum::<f64>() / 3.0).abs() < 1e-6);
        }
        assert_eq!(step.is_recorded(), device.gpu().is_some());
        let values = |params: &Params| params.ids().flat_map(|id| here(params.value(id))).collect::<Vec<_>>();
        assert_eq!(values(step.method().params()), values(&hand.params), "{device} {precision}");
    }
}

#[test]
fn an_update_that_is_not_finite_is_left_out() {
    for device in [Device::Cpu, emulated()] {
        let mut step = make("adamw", &device, Dtype::F32, None);
        for i in 0..3 {
            assert!(step.run(&batch(i, 6), &Rng::new(9).at(i), 0.01).unwrap().taken);
        }
        let values = |step: &mut Step| {
            let params = step.method().params();
            params.ids().flat_map(|id| here(params.value(id))).collect::<Vec<_>>()
        };
        let before = values(&mut step);
        let mut bad = batch(4, 6);
        let numbers: Vec<f32> = bad.images.data::<f32>().iter().enumerate().map(|(i, &x)| if i == 7 { f32::NAN } else { x }).collect();
        bad.images = Tensor::from_slice(bad.images.shape(), &numbers).unwrap();
        let outcome = step.run(&bad, &Rng::new(9), 0.01).unwrap();
        assert!(!outcome.taken && outcome.loss.is_nan());
        assert_eq!(values(&mut step), before);
        assert!(step.optimizer().state().memories().all(|memory| memory.steps == 3));
        assert!(step.run(&batch(5, 6), &Rng::new(9).at(5), 0.01).unwrap().taken);
        assert_ne!(values(&mut step), before);
    }
}

#[test]
fn the_code_for_cuda_does_the_same() {
    for test in [
        "recorded_steps_are_plain_steps_bit_for_bit",
        "steps_on_a_gpu_are_those_of_the_cpu",
        "micro_batches_add_up_to_the_update_of_their_mean_loss",
        "an_update_that_is_not_finite_is_left_out",
    ] {
        stand_in::run(test, "", None);
    }
}
