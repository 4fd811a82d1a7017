//! Vision transformers and CaiT against numbers of the official code: f32 at its own noise, f64 at the fixture's rounding.

use masque::formats::{self, TensorFile};
use masque::nn::Scope;
use masque::nn::cait::{Cait, CaitConfig};
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::vit::{Position, VitConfig};
use masque::ops::attention::mean_over_heads;
use masque::param::{Params, ParamsBuilder};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Dtype, Tensor};
use std::collections::BTreeSet;

const LIMITS: [(Dtype, f64); 2] = [(Dtype::F32, 3e-6), (Dtype::F64, 1e-7)];

fn fixture(name: &str) -> TensorFile {
    let folder = if name.starts_with("maskedkd") { "parity" } else { "networks" };
    formats::open(format!("{}/tests/fixtures/{folder}/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn tensor(file: &TensorFile, name: &str) -> Tensor {
    let stored = file.get(name).unwrap();
    Tensor::from_slice(stored.shape(), &stored.to_f64().unwrap()).unwrap()
}

fn ids(file: &TensorFile) -> Tensor {
    let stored = file.get("out/keep_ids").unwrap();
    let ids: Vec<u32> = stored.to_i64().unwrap().into_iter().map(|id| id as u32).collect();
    Tensor::from_slice(stored.shape(), &ids).unwrap()
}

/// The parameters with the values that the file has under `prefix`; the names on both sides are the same.
fn loaded(b: ParamsBuilder, dtype: Dtype, file: &TensorFile, prefix: &str) -> Params {
    let mut params = b.build(dtype, &Rng::new(0)).unwrap();
    let stored: BTreeSet<&str> = file.names().filter_map(|name| name.strip_prefix(prefix)).collect();
    let own: BTreeSet<&str> = params.ids().map(|id| params.name(id)).collect();
    assert_eq!(own, stored);
    for id in params.ids() {
        let value = tensor(file, &format!("{prefix}{}", params.name(id)));
        params.set_value(id, &value).unwrap();
    }
    params
}

#[track_caller]
fn close(file: &TensorFile, name: &str, got: &Tensor, limit: f64) {
    let want = tensor(file, name);
    assert_eq!(got.shape(), want.shape(), "{name}");
    let (got, want) = (got.to_f64(), want.to_f64());
    assert!(got.iter().all(|x| x.is_finite()), "{name} has a number that is none");
    let scale = want.iter().fold(0f64, |most, x| most.max(x.abs()));
    let error = got.iter().zip(&want).fold(0f64, |most, (a, b)| most.max((a - b).abs()));
    assert!(error <= limit * scale, "{name}: off by {} of its scale, more than {limit}", error / scale);
}

/// The students of all distillation fixtures are 24 wide.
fn student() -> VitConfig {
    VitConfig { position: Position::Learned, ..VitConfig::new(32, 8, 24, 2, 3) }
}

fn deit_teacher() -> VitConfig {
    VitConfig { position: Position::Learned, ..VitConfig::new(32, 8, 32, 2, 4) }
}

fn classifier(vit: VitConfig, dtype: Dtype, file: &TensorFile, prefix: &str) -> (Classifier, Params) {
    let mut b = ParamsBuilder::default();
    let model = Classifier::new(&mut b, ClassifierConfig { vit, classes: 10, pool: Pool::ClassToken, probe: false }).unwrap();
    let params = loaded(b, dtype, file, prefix);
    (model, params)
}

fn teacher_logits_match(name: &str, vit: VitConfig, masked: bool) {
    let file = fixture(name);
    for (dtype, limit) in LIMITS {
        let (teacher, params) = classifier(vit.clone(), dtype, &file, "tw/");
        let kept = masked.then(|| ids(&file));
        let out = teacher.forward(&Scope::new(&Tape::off(), &params), &tensor(&file, "in/images"), kept.as_ref(), false).unwrap();
        close(&file, "out/teacher_logits", out.logits.value(), limit);
    }
}

/// Patch scores and logits of a student with one token in front.
fn student_matches(name: &str) {
    let file = fixture(name);
    for (dtype, limit) in LIMITS {
        let (model, params) = classifier(student(), dtype, &file, "w/");
        let (tape, images) = (Tape::off(), tensor(&file, "in/images"));
        let s = Scope::new(&tape, &params);
        let (x, rows) = model.vit.blocks_with_class_rows(&s, &model.vit.embed(&s, &images, None).unwrap()).unwrap();
        close(&file, "out/logits", model.head(&s, &x, false).unwrap().logits.value(), limit);

        let attention = tensor(&file, "out/attn"); // [B, H, T, T]
        let first_rows: Vec<f64> = attention.data::<f64>().chunks_exact(17).step_by(17).flatten().copied().collect();
        assert!(rows.to_f64().iter().all(|x| x.is_finite()));
        let scale = first_rows.iter().fold(0f64, |most, x| most.max(*x));
        let error = rows.to_f64().iter().zip(&first_rows).fold(0f64, |most, (a, b)| most.max((a - b).abs()));
        assert!(error <= limit * scale, "class rows: off by {}", error / scale);

        let mean = mean_over_heads(&rows).unwrap().to_f64();
        let scores: Vec<f64> = mean.chunks_exact(17).flat_map(|row| &row[1..]).copied().collect();
        close(&file, "out/scores", &Tensor::from_slice(&[2, 16], &scores).unwrap(), limit);
    }
}

#[test]
fn a_deit_teacher_on_kept_patches_has_the_official_logits() {
    teacher_logits_match("maskedkd_soft_keep8", deit_teacher(), true);
}

#[test]
fn a_deit3_teacher_on_kept_patches_has_the_official_logits() {
    let vit = VitConfig { position: Position::LearnedPatches, layer_scale: Some(1e-4), ..VitConfig::new(32, 8, 40, 2, 2) };
    teacher_logits_match("maskedkd_deit3_layerscale_soft", vit, true);
}

#[test]
fn a_deit_teacher_on_all_patches_has_the_official_logits() {
    teacher_logits_match("maskedkd_distilled_student_soft", deit_teacher(), false);
}

#[test]
fn students_have_the_official_logits_and_patch_scores() {
    for name in ["maskedkd_soft_keep8", "maskedkd_deit3_layerscale_soft", "maskedkd_cait_soft"] {
        student_matches(name);
    }
}

#[test]
fn a_student_with_two_tokens_has_the_official_logits_of_both_heads() {
    let file = fixture("maskedkd_distilled_student_soft");
    for (dtype, limit) in LIMITS {
        let (model, params) = classifier(VitConfig { distillation_token: true, ..student() }, dtype, &file, "w/");
        let out = model.forward(&Scope::new(&Tape::off(), &params), &tensor(&file, "in/images"), None, false).unwrap();
        close(&file, "out/logits", out.logits.value(), limit);
        close(&file, "out/logits_dist", out.distillation.as_ref().unwrap().value(), limit);
        close(&file, "out/eval_logits", out.evaluated().unwrap().value(), limit);
    }
}

fn cait(class_blocks: usize) -> (Cait, ParamsBuilder) {
    let vit = VitConfig { position: Position::LearnedPatches, layer_scale: Some(1e-5), ..VitConfig::new(32, 8, 32, 2, 4) };
    let mut b = ParamsBuilder::default();
    let model = Cait::new(&mut b, CaitConfig { vit, class_blocks, classes: 10 }).unwrap();
    (model, b)
}

#[test]
fn cait_on_kept_patches_has_the_official_logits() {
    let file = fixture("maskedkd_cait_soft");
    for (dtype, limit) in LIMITS {
        let (teacher, b) = cait(1);
        let params = loaded(b, dtype, &file, "tw/");
        let logits = teacher.forward(&Scope::new(&Tape::off(), &params), &tensor(&file, "in/images"), Some(&ids(&file))).unwrap();
        close(&file, "out/teacher_logits", logits.value(), limit);
    }
}

/// Two class blocks, all values far from zero.
fn lively_cait() -> (Cait, Params, Tensor) {
    let (model, b) = cait(2);
    let mut params = b.build(Dtype::F64, &Rng::new(1)).unwrap();
    for (j, id) in params.ids().enumerate() {
        let value = params.value_mut(id).unwrap().data_mut::<f64>();
        value.iter_mut().enumerate().for_each(|(i, v)| *v = *v * 3.0 + 0.2 * (0.7 * i as f64 + j as f64).sin());
    }
    let images = Tensor::from_slice(&[2, 3, 32, 32], &Rng::new(2).normal("images", 6144)).unwrap();
    (model, params, images)
}

fn cait_loss(model: &Cait, tape: &Tape, params: &Params, images: &Tensor, kept: Option<&Tensor>) -> Var {
    model.forward(&Scope::new(tape, params), images, kept).unwrap().cross_entropy(&[3, 7], 0.0).unwrap()
}

#[test]
fn cait_does_not_care_about_the_order_of_kept_patches_or_about_dropped_pixels() {
    let (model, params, images) = lively_cait();
    let kept = |ids: [u32; 6]| Tensor::from_slice(&[2, 3], &ids).unwrap();
    let of = |images: &Tensor, kept: Option<&Tensor>| cait_loss(&model, &Tape::off(), &params, images, kept).value().item();
    let value = of(&images, Some(&kept([1, 4, 9, 0, 2, 15])));
    approx::assert_relative_eq!(value, of(&images, Some(&kept([9, 1, 4, 15, 0, 2]))), max_relative = 1e-12);
    let mut changed = images.copy().unwrap();
    changed.data_mut::<f32>()[8..16].fill(5.0); // patch 1 of the first image is columns 8..16 of its first rows
    assert_ne!(value.to_bits(), of(&changed, Some(&kept([1, 4, 9, 0, 2, 15]))).to_bits());
    let mut dropped = images.copy().unwrap();
    dropped.data_mut::<f32>()[16..24].fill(5.0); // patch 2 of the first image
    assert_eq!(value.to_bits(), of(&dropped, Some(&kept([1, 4, 9, 0, 2, 15]))).to_bits());
    let all: Vec<u32> = (0..16).chain(0..16).collect();
    let all = Tensor::from_slice(&[2, 16], &all).unwrap();
    approx::assert_relative_eq!(of(&images, Some(&all)), of(&images, None), max_relative = 1e-12);
}

#[test]
fn every_gradient_of_cait_is_the_derivative() {
    let (model, mut params, images) = lively_cait();
    let kept = Tensor::from_slice(&[2, 3], &[1u32, 4, 9, 0, 2, 15]).unwrap();
    let tape = Tape::new();
    let loss = cait_loss(&model, &tape, &params, &images, Some(&kept));
    tape.backward(&loss, &mut [&mut params]).unwrap();
    drop(loss);
    for id in params.ids() {
        let name = params.name(id).to_string();
        let gradient = params.gradient(id).unwrap_or_else(|| panic!("{name} has no gradient")).to_f64();
        let direction: Vec<f64> = (0..gradient.len()).map(|i| (1.3 * i as f64 + 0.4).cos()).collect();
        let derivative: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let start = params.value(id).to_f64();
        let mut moved = |h: f64| {
            let values = params.value_mut(id).unwrap().data_mut::<f64>();
            values.iter_mut().zip(&start).zip(&direction).for_each(|((v, x), d)| *v = x + h * d);
            cait_loss(&model, &Tape::off(), &params, &images, Some(&kept)).value().item()
        };
        let mut difference = |h: f64| (moved(h) - moved(-h)) / (2.0 * h);
        let estimate = (4.0 * difference(1e-4) - difference(2e-4)) / 3.0;
        moved(0.0);
        let size = gradient.iter().map(|g| g.abs()).sum::<f64>().max(1e-2);
        assert!((derivative - estimate).abs() <= 1e-6 * size, "{name}: {derivative} but differences give {estimate}");
    }
}

#[test]
fn cait_refuses_what_it_is_not() {
    let mut b = ParamsBuilder::default();
    let config = CaitConfig { vit: student(), class_blocks: 1, classes: 10 };
    assert!(Cait::new(&mut b, config).is_err_and(|e| e.to_string().contains("positions")));
}
