//! DMAE: the golden micro-model, the teacher that stops early and learns nothing, heads, targets, recorded steps.

use masque::methods::dmae::{Align, Dmae, DmaeConfig, Normalise, Projection, Target};
use masque::methods::mae::MaeConfig;
use masque::methods::masks::{KeepRounding, Masking, Masks};
use masque::methods::teacher::{Network, Teacher};
use masque::methods::{Batch, Method};
use masque::nn::decoder::{Decoder, DecoderConfig, DecoderTokens};
use masque::nn::vit::{Tokens, Vit, VitConfig};
use masque::nn::{Scope, Start};
use masque::ops::feature_loss::Distance;
use masque::param::{Params, ParamsBuilder};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Device, Dtype, Tensor};
use std::collections::BTreeMap;

/// All parameters are sines of this phase, norm weights around 1; the position tables keep their values.
fn fill(params: &mut Params, phase: f64) {
    for (j, id) in params.ids().enumerate() {
        let name = params.name(id).to_string();
        if name.ends_with("pos_embed") {
            continue;
        }
        let base = if name.contains("norm") && name.ends_with(".weight") { 1.0 } else { 0.0 };
        let shape = params.value(id).shape().to_vec();
        let sines = (0..shape.iter().product()).map(|i: usize| base + 0.1 * (0.37 * i as f64 + 1.3 * j as f64 + phase).sin());
        params.set_value(id, &Tensor::from_slice(&shape, &sines.collect::<Vec<f64>>()).unwrap()).unwrap();
    }
}

fn decoder() -> DecoderConfig {
    DecoderConfig { width: 8, depth: 1, heads: 2 }
}

/// 24 wide, 3 blocks.
fn teacher(device: &Device, dtype: Dtype) -> Teacher {
    let mut b = ParamsBuilder::default();
    let config = VitConfig::new(32, 8, 24, 3, 4);
    let tokens = Tokens::new(&mut b, &config).unwrap();
    let decoder_tokens = DecoderTokens::new(&mut b, &decoder(), &config).unwrap();
    let vit = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
    let decoder = Decoder::new(&mut b, &decoder(), &vit.config, decoder_tokens, Start::Xavier).unwrap();
    let mut params = b.build(dtype, &Rng::new(0)).unwrap();
    fill(&mut params, 0.5);
    params.move_to(device, dtype).unwrap();
    Teacher::new("micro", params, Network::Autoencoder(vit, decoder))
}

fn align() -> Align {
    Align {
        pairs: vec![(0, 1)],
        distance: Distance::L1,
        normalise: Normalise::L2,
        weight: 1.0,
        projection: Projection::Fc1Layer,
        target: Target::OriginalImg,
        sum: [0.5, 0.5],
        full_teacher: false,
    }
}

fn micro_on(device: &Device, dtype: Dtype, align: Align) -> Dmae {
    let mae = MaeConfig { encoder: VitConfig::new(32, 8, 16, 2, 4), decoder: decoder(), mask_ratio: 0.75, norm_pix: None };
    let mut dmae = Dmae::new(DmaeConfig { mae, align }, teacher(device, dtype), dtype, &Rng::new(0)).unwrap();
    fill(&mut dmae.mae.params, 0.0);
    dmae.mae.params.move_to(device, dtype).unwrap();
    dmae
}

fn micro(align: Align) -> Dmae {
    micro_on(&Device::Cpu, Dtype::F64, align)
}

fn images() -> Tensor {
    let pixel = |i: usize| (0.05 * (i % 3072) as f64 + (i / 3072) as f64).sin();
    Tensor::from_slice(&[2, 3, 32, 32], &(0..6144).map(pixel).collect::<Vec<f64>>()).unwrap()
}

fn noise() -> Rng {
    let noise = (1..=2).flat_map(|k| (1..=16).map(move |l| (0.6180339887 * f64::from(l * k)).fract() as f32));
    Rng::replaying(BTreeMap::from([("mask".to_string(), noise.collect())]))
}

fn near(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-7 * want.abs(), "{what}: {got} is not {want}");
}

/// The parts of the loss by name, and all gradients.
fn walked(dmae: &mut Dmae) -> (BTreeMap<String, f64>, Vec<Option<Vec<f64>>>) {
    let tape = Tape::new();
    let loss = dmae.loss(&tape, &Batch::of_images(images()), &noise()).unwrap();
    let mut parts: BTreeMap<String, f64> = loss.parts.iter().map(|(name, part)| (name.to_string(), part.item())).collect();
    parts.insert("total".into(), loss.total.value().item());
    let params = &mut dmae.mae.params;
    tape.backward(&loss.total, &mut [&mut *params]).unwrap();
    let gradients = params.ids().map(|id| params.gradient(id).map(|gradient| gradient.to_f64())).collect();
    (parts, gradients)
}

#[test]
fn the_micro_model_has_its_golden_numbers() {
    let dmae = micro(align());
    let mask = dmae.mae.training_mask(&images(), &noise()).unwrap();
    assert_eq!(mask.kept.data::<u32>(), [12, 4, 9, 1, 12, 8, 4, 0]);
    let taught = dmae.teach(&images(), &mask).unwrap();
    assert_eq!((taught.features[0].shape(), taught.prediction.is_none()), (&[2, 5, 24][..], true));
    let golden = [-0.0780237277986223, 0.4506668749134941, -0.28597116819628576];
    taught.features[0].to_f64().iter().zip(golden).for_each(|(&got, want)| near(got, want, "teacher"));
    let with = |distance, normalise| {
        let (parts, _) = walked(&mut micro(Align { distance, normalise, ..align() }));
        near(parts["pixels"], 0.5125649486173123, "reconstruction");
        near(parts["total"], parts["pixels"] + parts["align_block0"], "total");
        parts["align_block0"]
    };
    near(with(Distance::L1, Normalise::L2), 0.24839628256170368, "L1, normalised");
    near(with(Distance::L2, Normalise::L2), 0.09450516098738924, "L2, normalised");
    near(with(Distance::L1, Normalise::None), 0.6530375675263164, "L1");
    near(with(Distance::L2, Normalise::None), 0.7016959566046452, "L2");
}

#[test]
fn a_teacher_that_stops_at_its_block_teaches_what_a_whole_one_does() {
    let (early, whole) = (walked(&mut micro(align())), walked(&mut micro(Align { full_teacher: true, ..align() })));
    assert!(early == whole);
    let cost = |full| micro(Align { full_teacher: full, ..align() }).teacher_cost().unwrap().macs;
    assert!(cost(false) < cost(true));
    // Two blocks on 5 tokens, and 4 patches projected.
    let (n, d) = (5, 24);
    assert_eq!(cost(false), 4 * 192 * d + 2 * (12 * n * d * d + 2 * n * n * d));
}

#[test]
fn no_gradient_reaches_the_teacher_and_it_records_nothing() {
    let mut dmae = micro(align());
    let tape = Tape::new();
    let loss = dmae.loss(&tape, &Batch::of_images(images()), &noise()).unwrap();
    let recorded = tape.recorded();
    // Backward refuses parameters on the tape that it is not handed: the teacher's are not among them.
    tape.backward(&loss.total, &mut [&mut dmae.mae.params]).unwrap();
    let teacher = &dmae.teacher.params;
    assert!(teacher.ids().all(|id| teacher.gradient(id).is_none()));
    assert!(dmae.mae.params.trained().all(|id| dmae.mae.params.gradient(id).is_some()));
    // A deeper pass of the teacher puts nothing more on the tape.
    let tape = Tape::new();
    let whole = micro(Align { full_teacher: true, ..align() });
    whole.loss(&tape, &Batch::of_images(images()), &noise()).unwrap();
    assert_eq!(tape.recorded(), recorded);
    assert_eq!(whole.teacher_cost().unwrap().passes, 1);
}

#[test]
fn every_head_learns_and_starts_with_a_bias() {
    for (projection, tensors) in [(Projection::Fc1Layer, 2), (Projection::Mlp1Layer, 4), (Projection::Mlp2Layer, 8)] {
        let mut dmae = micro(Align { projection, ..align() });
        let (parts, _) = walked(&mut dmae);
        assert!(parts["align_block0"] > 0.0);
        let params = &dmae.mae.params;
        let heads: Vec<&str> = params.ids().map(|id| params.name(id)).filter(|name| name.starts_with("aligned")).collect();
        assert_eq!(heads.len(), tensors, "{heads:?}");
        assert_eq!(
            heads[0],
            ["weight", "fc1.weight", "0.fc1.weight"].map(|key| format!("aligned_feature_projection_heads.0.{key}"))
                [tensors.ilog2() as usize - 1]
        );
    }
    let mae = MaeConfig { encoder: VitConfig::new(32, 8, 16, 2, 4), decoder: decoder(), mask_ratio: 0.75, norm_pix: None };
    let fresh = Dmae::new(DmaeConfig { mae, align: align() }, teacher(&Device::Cpu, Dtype::F32), Dtype::F32, &Rng::new(0)).unwrap();
    let bias = fresh.mae.params.value(fresh.mae.params.find("aligned_feature_projection_heads.0.bias").unwrap()).to_f64();
    assert!(bias.iter().all(|x| x.abs() <= 0.25) && bias.iter().any(|x| x.abs() > 0.1), "{bias:?}");
}

#[test]
fn targets_are_the_image_the_teacher_or_both() {
    let part = |target, sum| walked(&mut micro(Align { target, sum, ..align() })).0.get("pixels").copied();
    let image = part(Target::OriginalImg, [0.5, 0.5]).unwrap();
    let predicted = part(Target::TeacherPrediction, [0.5, 0.5]).unwrap();
    near(part(Target::OriginalTeacherPredWeightedSum, [1.0, 0.0]).unwrap(), image, "the image alone");
    near(part(Target::OriginalTeacherPredWeightedSum, [0.0, 1.0]).unwrap(), predicted, "the prediction alone");
    near(
        part(Target::OriginalTeacherPredWeightedSum, [1.0, -1.0]).unwrap(),
        part(Target::Difference, [0.5, 0.5]).unwrap(),
        "the difference",
    );
    assert!(image != predicted);
    assert_eq!(part(Target::None, [0.5, 0.5]), None);
    // By hand: the mean over hidden patches of the squared distance to the teacher's decoder.
    let dmae = micro(Align { target: Target::TeacherPrediction, ..align() });
    let mask = dmae.mae.training_mask(&images(), &noise()).unwrap();
    let taught = dmae.teach(&images(), &mask).unwrap().prediction.unwrap().to_f64();
    let tape = Tape::off();
    let learned = dmae.learn_from(&Scope::new(&tape, &dmae.mae.params), &images(), &mask).unwrap().prediction.unwrap().value().to_f64();
    let hidden = mask.hidden.data::<f32>();
    let square = |i: usize| if hidden[i / 192] == 1.0 { (taught[i] - learned[i]).powi(2) } else { 0.0 };
    near(predicted, (0..taught.len()).map(square).sum::<f64>() / (24.0 * 192.0), "the mean");
}

#[test]
fn other_masks_show_both_the_same_patches() {
    for kind in [Masking::Block, Masking::Saliency] {
        let dmae = micro(align());
        let masks = Masks::new(kind, &dmae.mae.encoder.config, 0.75, KeepRounding::Floor).unwrap();
        let dmae = dmae.with_masks(masks);
        let loss = dmae.loss(&Tape::off(), &Batch::of_images(images()), &Rng::new(3)).unwrap();
        assert!(loss.total.value().item().is_finite());
        let mask = dmae.mae.training_mask(&images(), &Rng::new(3)).unwrap();
        assert_eq!(mask.kept.shape(), [2, 4]);
        if kind == Masking::Block {
            let kept = mask.kept.data::<u32>();
            assert!(kept.chunks(4).all(|unit| unit[1] == unit[0] + 1 && unit[2] == unit[0] + 4 && unit[3] == unit[0] + 5), "{kept:?}");
        }
    }
}

#[cfg(feature = "emulated")]
#[test]
fn a_recorded_step_gives_the_losses_of_the_cpu() {
    use masque::device::gpu::Gpu;
    use masque::optim::{adamw::AdamW, groups};
    use masque::train::step::{Step, StepOptions};
    let gpu = Device::Gpu(Gpu::emulated().unwrap());
    for kind in [Masking::Random, Masking::Block, Masking::Saliency] {
        for target in [Target::OriginalImg, Target::Difference] {
            let losses = |device: &Device| -> Vec<f64> {
                let dmae = micro_on(device, Dtype::F32, Align { target, ..align() });
                let masks = Masks::new(kind, &dmae.mae.encoder.config, 0.75, KeepRounding::Floor).unwrap();
                let mut dmae = dmae.with_masks(masks);
                let adamw = AdamW::new(groups::by_decay(dmae.params(), 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
                let mut step = Step::new(Box::new(dmae), Box::new(adamw), StepOptions::default());
                let batch = Batch::of_images(images().cast(Dtype::F32).unwrap());
                (0..5).map(|i| step.run(&batch, &Rng::new(5).at(i), 1e-3).unwrap().loss).collect()
            };
            let (cpu, emulated) = (losses(&Device::Cpu), losses(&gpu));
            for (cpu, emulated) in cpu.iter().zip(&emulated) {
                assert!((cpu - emulated).abs() <= 1e-4 * cpu, "{kind:?}, {target:?}: {emulated} is not {cpu}");
            }
        }
    }
}
