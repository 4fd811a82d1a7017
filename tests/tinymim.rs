//! TinyMIM: every target learns and stays apart from its teacher; what lies behind the relations is untouched; masks, chains of heads, recorded steps.

use masque::methods::masks::{KeepRounding, Masking, Masks};
use masque::methods::teacher::{Network, Teacher};
use masque::methods::tinymim::{Feature, Pair, Target, Tinymim, TinymimConfig};
use masque::methods::{Batch, Method};
use masque::nn::Start;
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::{DropPath, Tokens, Vit, VitConfig};
use masque::optim::{Optimizer, adamw::AdamW, groups};
use masque::param::ParamsBuilder;
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Device, Dtype, Tensor};

fn teacher(device: &Device, dtype: Dtype, drop_path: f64) -> Teacher {
    let mut b = ParamsBuilder::default();
    let config = VitConfig { drop_path: DropPath::Constant(drop_path), ..VitConfig::new(32, 8, 24, 4, 6) };
    let tokens = Tokens::new(&mut b, &config).unwrap();
    let vit = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
    let kept = if dtype == Dtype::F64 { dtype } else { Dtype::F32 };
    let mut params = b.build(kept, &Rng::new(8)).unwrap();
    params.move_to(device, dtype).unwrap();
    Teacher::new("a teacher", params, Network::Encoder(vit))
}

fn student() -> VitConfig {
    VitConfig { last_heads: Some(6), drop_path: DropPath::ButLast(0.0), ..VitConfig::new(32, 8, 12, 3, 2) }
}

fn config(target: Target, feature: Feature) -> TinymimConfig {
    TinymimConfig {
        student: student(),
        block: 2,
        heads: 6,
        target,
        relations: vec![Pair::Qk, Pair::Vv],
        softmax: true,
        feature,
        class_token_norm: true,
        masks: None,
        decoder: None,
    }
}

fn masked(kind: Masking) -> Option<Masks> {
    Some(Masks::new(kind, &student(), 0.5, KeepRounding::Floor).unwrap())
}

/// Every kind of target, with the number of terms of its loss.
fn every_target() -> Vec<(TinymimConfig, usize)> {
    let relations = config(Target::Relations, Feature::Output);
    let all = vec![Pair::Qq, Pair::Kk, Pair::Vv];
    let mut configs = vec![
        (relations, 2),
        (TinymimConfig { softmax: false, ..config(Target::Relations, Feature::Output) }, 2),
        (TinymimConfig { relations: all.clone(), ..config(Target::Relations, Feature::Output) }, 3),
        (TinymimConfig { relations: all, softmax: false, ..config(Target::Relations, Feature::Output) }, 3),
        (config(Target::ClassToken, Feature::Output), 1),
        (TinymimConfig { class_token_norm: false, ..config(Target::ClassToken, Feature::Output) }, 1),
        (TinymimConfig { masks: masked(Masking::Random), ..config(Target::Relations, Feature::Output) }, 2),
        (TinymimConfig { masks: masked(Masking::Block), ..config(Target::Features, Feature::Output) }, 1),
    ];
    let features = [Feature::Output, Feature::Ffn, Feature::FfnResidual, Feature::Attention, Feature::AttentionResidual];
    configs.extend(features.map(|feature| (config(Target::Features, feature), 1)));
    configs.push((config(Target::Features, Feature::Qkv), 3));
    let decoder = Some((DecoderConfig { width: 8, depth: 1, heads: 2 }, Some(1e-6)));
    configs.push((TinymimConfig { masks: masked(Masking::Saliency), decoder, ..config(Target::Relations, Feature::Output) }, 3));
    configs
}

fn images(seed: u64, dtype: Dtype) -> Tensor {
    Tensor::from_slice(&[3, 3, 32, 32], &Rng::new(seed).normal("images", 3 * 3 * 32 * 32)).unwrap().cast(dtype).unwrap()
}

fn batch(dtype: Dtype) -> Batch {
    Batch { teacher_images: Some(images(2, dtype)), ..Batch::of_images(images(1, dtype)) }
}

#[test]
fn gradients_of_every_target_are_those_of_differences() {
    for (config, terms) in every_target() {
        let saliency = config.masks.as_ref().is_some_and(|masks| masks.kind() == Masking::Saliency);
        let what = format!("{:?} {:?} {:?} {}", config.target, config.feature, config.relations, config.softmax);
        let mut tinymim = Tinymim::new(config, teacher(&Device::Cpu, Dtype::F64, 0.0), Dtype::F64, &Rng::new(3)).unwrap();
        let rng = Rng::new(5);
        let value = |tinymim: &Tinymim| tinymim.loss(&Tape::off(), &batch(Dtype::F64), &rng).unwrap().total.value().item();
        let tape = Tape::new();
        let loss = tinymim.loss(&tape, &batch(Dtype::F64), &rng).unwrap();
        assert_eq!(loss.parts.len(), terms, "{what}");
        tape.backward(&loss.total, &mut [&mut tinymim.params]).unwrap();
        assert!(tinymim.teacher.params.ids().all(|id| tinymim.teacher.params.gradient(id).is_none()));
        let ids: Vec<_> = tinymim.params.trained().filter(|&id| tinymim.params.gradient(id).is_some()).collect();
        let mut compared = 0;
        for id in ids {
            // What is looked at by saliency jumps where another patch is kept: only what comes behind the choice is smooth.
            if saliency && !tinymim.params.name(id).starts_with("decoder") {
                continue;
            }
            let (start, gradient) = (tinymim.params.value(id).to_f64(), tinymim.params.gradient(id).unwrap().to_f64());
            let shape = tinymim.params.value(id).shape().to_vec();
            let at = (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
            let mut moved = |by: f64| {
                let mut values = start.clone();
                values[at] += by;
                tinymim.params.set_value(id, &Tensor::from_slice(&shape, &values).unwrap()).unwrap();
                let value = value(&tinymim);
                tinymim.params.set_value(id, &Tensor::from_slice(&shape, &start).unwrap()).unwrap();
                value
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let off = (slope - gradient[at]).abs();
            assert!(off <= 1e-5 * gradient[at].abs() + 1e-9, "{what}, {}: {} but {slope}", tinymim.params.name(id), gradient[at]);
            compared += 1;
        }
        assert!(compared >= if saliency { 10 } else { 30 }, "{what}: {compared}");
    }
}

#[test]
fn what_lies_behind_the_relations_stays_as_it_starts() {
    let mut tinymim =
        Tinymim::new(config(Target::Relations, Feature::Output), teacher(&Device::Cpu, Dtype::F32, 0.0), Dtype::F32, &Rng::new(3)).unwrap();
    let mut adamw = AdamW::new(groups::by_decay(&tinymim.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    let before: Vec<Vec<f64>> = tinymim.params.trained().map(|id| tinymim.params.value(id).to_f64()).collect();
    for i in 0..3 {
        let tape = Tape::new();
        let loss = tinymim.loss(&tape, &batch(Dtype::F32), &Rng::new(5).at(i)).unwrap();
        tinymim.params.clear_gradients();
        tape.backward(&loss.total, &mut [&mut tinymim.params]).unwrap();
        adamw.step(&mut tinymim.params, 1e-2).unwrap();
    }
    let behind = ["blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp", "norm."];
    for (id, before) in tinymim.params.trained().zip(&before) {
        let name = tinymim.params.name(id);
        let untouched = behind.iter().any(|start| name.starts_with(start));
        assert_eq!(&tinymim.params.value(id).to_f64() == before, untouched, "{name}");
    }
}

#[test]
fn stochastic_depth_is_the_same_in_all_blocks_but_the_last() {
    let config = VitConfig { drop_path: DropPath::ButLast(0.1), ..VitConfig::new(32, 8, 12, 12, 2) };
    let rates: Vec<f64> = (0..12).map(|i| config.block(i).drop_path).collect();
    assert_eq!((&rates[..11], rates[11]), (&[0.1; 11][..], 0.0));
    // The teacher's own draws numbers of its own, and is off in the default.
    let loss = |rate: f64, student: f64, step: u64| {
        let mut config = self::config(Target::Relations, Feature::Output);
        config.student.drop_path = DropPath::ButLast(student);
        let tinymim = Tinymim::new(config, teacher(&Device::Cpu, Dtype::F64, rate), Dtype::F64, &Rng::new(3)).unwrap();
        tinymim.loss(&Tape::off(), &batch(Dtype::F64), &Rng::new(5).at(step)).unwrap().total.value().item()
    };
    assert_eq!(loss(0.0, 0.0, 0), loss(0.0, 0.0, 1));
    assert_ne!(loss(0.5, 0.0, 0), loss(0.5, 0.0, 1));
    assert_ne!(loss(0.0, 0.5, 0), loss(0.0, 0.5, 1));
}

#[test]
fn nothing_is_dropped_in_evaluation() {
    let mut config = config(Target::Relations, Feature::Output);
    config.student.drop_path = DropPath::ButLast(0.5);
    let tinymim = Tinymim::new(config, teacher(&Device::Cpu, Dtype::F64, 0.5), Dtype::F64, &Rng::new(3)).unwrap();
    let score = |step: u64| tinymim.scores(&batch(Dtype::F64), &Rng::new(5).at(step)).unwrap().loss;
    assert_eq!(score(0), score(1));
}

#[test]
fn the_teacher_records_nothing() {
    for (config, _) in every_target().into_iter().filter(|(config, _)| config.masks.is_none()) {
        let tinymim = Tinymim::new(config, teacher(&Device::Cpu, Dtype::F64, 0.0), Dtype::F64, &Rng::new(3)).unwrap();
        let recorded = |batch: &Batch| {
            let tape = Tape::new();
            tinymim.loss(&tape, batch, &Rng::new(5)).unwrap();
            tape.recorded()
        };
        let known = tinymim.teach(&images(2, Dtype::F64), None, None).unwrap();
        assert_eq!(recorded(&batch(Dtype::F64)), recorded(&Batch { teacher_output: Some(known), ..batch(Dtype::F64) }));
    }
}

#[test]
fn a_teacher_costs_what_is_run_of_it_and_a_student_what_its_target_needs() {
    let (n, d) = (17, 24); // of 16 patches, with the class token
    let block = |n: u64, d: u64| 12 * n * d * d + 2 * n * n * d;
    let costs = |target, feature, decoder: bool| {
        let mut config = config(target, feature);
        if decoder {
            (config.masks, config.decoder) = (masked(Masking::Random), Some((DecoderConfig { width: 8, depth: 1, heads: 2 }, None)));
        }
        let tinymim = Tinymim::new(config, teacher(&Device::Cpu, Dtype::F32, 0.0), Dtype::F32, &Rng::new(3)).unwrap();
        (tinymim.macs(), tinymim.teacher_cost().unwrap().macs)
    };
    let (embed, student) = (16 * 192 * 12, |blocks: u64| blocks * block(n, 12));
    let teacher = 16 * 192 * d + 2 * block(n, d);
    // Two blocks, q, k and v of the third, two products.
    assert_eq!(
        costs(Target::Relations, Feature::Output, false),
        ([embed + student(2) + 3 * n * 144 + 2 * n * n * 12; 2], teacher + 3 * n * d * d)
    );
    assert_eq!(
        costs(Target::Features, Feature::Qkv, false),
        ([embed + student(2) + 3 * n * 144 + 3 * n * 12 * d; 2], teacher + 3 * n * d * d)
    );
    assert_eq!(costs(Target::Features, Feature::Ffn, false), ([embed + student(3) + n * 12 * d; 2], teacher + block(n, d)));
    assert_eq!(costs(Target::ClassToken, Feature::Output, false), ([embed + student(3) + 12 * d; 2], teacher + block(n, d)));
    // A decoder needs the whole last block; both see half of the patches.
    let k = 9;
    let decoder = k * 12 * 8 + block(n, 8) + n * 8 * 192;
    let student = 8 * 192 * 12 + 3 * block(k, 12) + 2 * k * k * 12 + decoder;
    assert_eq!(costs(Target::Relations, Feature::Output, true), ([student; 2], 8 * 192 * d + 2 * block(k, d) + 3 * k * d * d));
}

#[test]
fn a_teacher_sees_its_own_view_and_an_answer_that_is_known_is_not_asked_again() {
    for (config, _) in every_target().into_iter().filter(|(config, _)| config.masks.is_none()) {
        let asked = config.asked();
        let tinymim = Tinymim::new(config, teacher(&Device::Cpu, Dtype::F64, 0.0), Dtype::F64, &Rng::new(3)).unwrap();
        let value = |batch: &Batch| tinymim.loss(&Tape::off(), batch, &Rng::new(5)).unwrap().total.value().item();
        let both = value(&batch(Dtype::F64));
        assert_ne!(both, value(&Batch::of_images(images(1, Dtype::F64))), "{asked}");
        let passes = tinymim.teacher_cost().unwrap().passes;
        let known = tinymim.teach(&images(2, Dtype::F64), None, None).unwrap();
        let batch = Batch { teacher_output: Some(known), ..Batch::of_images(images(1, Dtype::F64)) };
        assert_eq!(both, value(&batch), "{asked}");
        assert_eq!(tinymim.teacher_cost().unwrap().passes, passes + 1);
    }
}

/// Steps of AdamW with much weight decay, and what came of each parameter: its name, how it started, how it is.
#[cfg(feature = "emulated")]
fn after_steps(device: &Device, precision: Dtype) -> Vec<(String, Vec<f64>, Vec<f64>)> {
    use masque::train::step::{Step, StepOptions};
    let config = config(Target::Relations, Feature::Output);
    let mut tinymim = Tinymim::new(config, teacher(device, precision, 0.0), Dtype::F32, &Rng::new(3)).unwrap();
    tinymim.params.move_to(device, precision).unwrap();
    let values = |params: &masque::param::Params| -> Vec<(String, Vec<f64>)> {
        params.trained().map(|id| (params.name(id).to_string(), params.value(id).read().unwrap())).collect()
    };
    let before = values(&tinymim.params);
    let adamw = AdamW::new(groups::by_decay(&tinymim.params, 0.5, &[]), (0.9, 0.95), 1e-8).unwrap();
    let options = StepOptions { accumulate: 2, clip: Some(1.0) };
    let mut step = Step::new(Box::new(tinymim), Box::new(adamw), options);
    for i in 0..5 {
        (0..2).for_each(|micro| _ = step.add(&batch(Dtype::F32), &Rng::new(5).at(2 * i + micro)).unwrap());
        step.finish(1e-2).unwrap();
    }
    assert_eq!(step.is_recorded(), device.gpu().is_some());
    let after = values(step.method().params());
    before.into_iter().zip(after).map(|((name, before), (_, after))| (name, before, after)).collect()
}

#[cfg(feature = "emulated")]
#[test]
fn recorded_steps_leave_alone_what_lies_behind_the_relations() {
    use masque::device::gpu::Gpu;
    let gpu = Device::Gpu(Gpu::emulated().unwrap());
    for (device, precision) in [(&Device::Cpu, Dtype::F32), (&gpu, Dtype::F32), (&gpu, Dtype::Bf16)] {
        for (name, before, after) in after_steps(device, precision) {
            let behind = ["blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp", "norm."].iter().any(|start| name.starts_with(start));
            assert_eq!(before == after, behind, "{name} on {device} in {precision}");
        }
    }
}

#[cfg(feature = "emulated")]
#[test]
fn a_recorded_step_gives_the_losses_of_the_cpu() {
    use masque::device::gpu::Gpu;
    use masque::train::step::{Step, StepOptions};
    let gpu = Device::Gpu(Gpu::emulated().unwrap());
    for number in 0..every_target().len() {
        let losses = |device: &Device| -> Vec<f64> {
            let (mut config, _) = every_target().swap_remove(number);
            config.student.drop_path = DropPath::ButLast(0.1);
            let mut tinymim = Tinymim::new(config, teacher(device, Dtype::F32, 0.1), Dtype::F32, &Rng::new(3)).unwrap();
            tinymim.params.move_to(device, Dtype::F32).unwrap();
            let adamw = AdamW::new(groups::by_decay(&tinymim.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
            let mut step = Step::new(Box::new(tinymim), Box::new(adamw), StepOptions::default());
            (0..5).map(|i| step.run(&batch(Dtype::F32), &Rng::new(5).at(i), 1e-3).unwrap().loss).collect()
        };
        let (cpu, emulated) = (losses(&Device::Cpu), losses(&gpu));
        for (cpu, emulated) in cpu.iter().zip(&emulated) {
            assert!((cpu - emulated).abs() <= 2e-4 * cpu, "target {number}: {emulated} is not {cpu}");
        }
    }
}
