//! MaskedKD: its golden losses, teachers on chosen patches, what the choice depends on, what a teacher costs, recorded steps.

use clap::Parser;
use masque::methods::maskedkd::{Distilling, LogitArgs, MaskedKd, MaskingArgs};
use masque::methods::selection::Selection;
use masque::methods::teacher::{Network, Teacher};
use masque::methods::{Batch, Method};
use masque::nn::Scope;
use masque::nn::cait::{Cait, CaitConfig};
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::flops;
use masque::nn::vit::{Position, VitConfig};
use masque::param::{Params, ParamsBuilder};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};

/// The flags of the method alone.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    logits: LogitArgs,
    #[command(flatten)]
    masking: MaskingArgs,
}

fn distilling(flags: &str, student: &VitConfig) -> Distilling {
    let flags = Flags::try_parse_from(std::iter::once("").chain(flags.split_whitespace())).unwrap();
    flags.masking.apply(flags.logits.config(student).unwrap().unwrap(), student).unwrap()
}

fn refused(flags: &str, student: &VitConfig) -> String {
    let flags = Flags::try_parse_from(std::iter::once("").chain(flags.split_whitespace())).unwrap();
    let applied = flags.logits.config(student).and_then(|logits| flags.masking.apply(logits.unwrap(), student));
    let error = applied.err().unwrap_or_else(|| panic!("it was accepted"));
    assert_eq!(error.exit_code(), 2);
    error.chain()
}

fn student() -> VitConfig {
    VitConfig { position: Position::Learned, ..VitConfig::new(32, 8, 24, 3, 3) }
}

fn distilled() -> VitConfig {
    VitConfig { distillation_token: true, ..student() }
}

const CLASSES: usize = 7;

/// Weights that are large enough for attention to be anything but flat.
fn filled(b: ParamsBuilder, dtype: Dtype, seed: u64) -> Params {
    let mut params = b.build(dtype, &Rng::new(seed)).unwrap();
    for id in params.ids() {
        let (name, shape) = (params.name(id).to_string(), params.value(id).shape().to_vec());
        let base = if name.contains("norm") && name.ends_with(".weight") { 1.0 } else { 0.0 };
        let numbers = Rng::new(seed).normal(&name, shape.iter().product());
        let numbers: Vec<f64> = numbers.into_iter().map(|z| base + 0.2 * f64::from(z)).collect();
        params.set_value(id, &Tensor::from_slice(&shape, &numbers).unwrap()).unwrap();
    }
    params
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Deit,
    Deit3,
    Cait,
}

fn teacher(kind: Kind, depth: usize, dtype: Dtype, device: &Device) -> Teacher {
    let mut b = ParamsBuilder::default();
    let vit = VitConfig::new(32, 8, 32, depth, 4);
    let network = match kind {
        Kind::Deit => {
            let vit = VitConfig { position: Position::Learned, ..vit };
            Network::Classifier(Classifier::new(&mut b, config(vit)).unwrap())
        }
        Kind::Deit3 => {
            let vit = VitConfig { position: Position::LearnedPatches, layer_scale: Some(0.1), ..vit };
            Network::Classifier(Classifier::new(&mut b, config(vit)).unwrap())
        }
        Kind::Cait => {
            let vit = VitConfig { position: Position::LearnedPatches, layer_scale: Some(0.1), ..vit };
            Network::Cait(Cait::new(&mut b, CaitConfig { vit, class_blocks: 2, classes: CLASSES }).unwrap())
        }
    };
    let mut params = filled(b, dtype, 11);
    params.move_to(device, dtype).unwrap();
    Teacher::new("a teacher", params, network)
}

fn config(vit: VitConfig) -> ClassifierConfig {
    ClassifierConfig { vit, classes: CLASSES, pool: Pool::ClassToken, probe: false }
}

fn images(dtype: Dtype) -> Tensor {
    let numbers = Rng::new(5).normal("images", 3 * 3 * 32 * 32);
    Tensor::from_slice(&[3, 3, 32, 32], &numbers).unwrap().cast(dtype).unwrap()
}

fn batch(dtype: Dtype) -> Batch {
    let targets: Vec<f32> = (0..3 * CLASSES).map(|i| if i % CLASSES == i / CLASSES { 0.7 } else { 0.05 }).collect();
    Batch { targets: Some(Tensor::from_slice(&[3, CLASSES], &targets).unwrap()), ..Batch::of_images(images(dtype)) }
}

fn made(flags: &str, vit: VitConfig, kind: Kind, depth: usize) -> MaskedKd {
    let taught = Some((teacher(kind, depth, Dtype::F64, &Device::Cpu), distilling(flags, &vit)));
    let mut kd = MaskedKd::new(config(vit.clone()), taught, false, Dtype::F64, &Rng::new(0)).unwrap();
    let mut b = ParamsBuilder::default();
    Classifier::new(&mut b, config(vit)).unwrap();
    let weights = filled(b, Dtype::F64, 3);
    weights.ids().for_each(|id| kd.params.set_value(id, weights.value(id)).unwrap());
    kd
}

/// Loss and all gradients.
fn walked(kd: &mut MaskedKd, batch: &Batch) -> (f64, Vec<Option<Vec<f64>>>) {
    let tape = Tape::new();
    let loss = kd.loss(&tape, batch, &Rng::new(2)).unwrap().total;
    kd.params.clear_gradients();
    tape.backward(&loss, &mut [&mut kd.params]).unwrap();
    let gradients = kd.params.ids().map(|id| kd.params.gradient(id).map(Tensor::to_f64)).collect();
    (loss.value().item(), gradients)
}

fn kept(kd: &MaskedKd, rng: &Rng) -> Vec<Vec<u32>> {
    let (tape, images) = (Tape::off(), images(Dtype::F64));
    let seen = kd.see(&Scope::new(&tape, &kd.params), &images, rng).unwrap();
    let kept = kd.choose(seen.rows.as_ref(), &images, rng).unwrap().expect("the teacher is masked");
    kept.data::<u32>().chunks_exact(kept.last()).map(<[u32]>::to_vec).collect()
}

#[test]
fn losses_and_gradients_are_the_golden_ones() {
    let z_s = Tensor::from_slice(&[2, 3], &[1.0, 2.0, 3.0, 0.5, -1.0, 0.0]).unwrap();
    let z_t = Tensor::from_slice(&[2, 3], &[2.0, 1.0, 0.5, 0.0, 0.0, 3.0]).unwrap();
    let y = Tensor::from_slice(&[2, 3], &[0.7, 0.2, 0.1, 0.1, 0.8, 0.1]).unwrap();
    let of = |flags: &str| {
        let c = distilling(flags, &student());
        let tape = Tape::new();
        let z = tape.leaf(z_s.clone());
        let (base, distilled) = (z.cross_entropy_soft(&y).unwrap(), c.loss(&z, &z_t).unwrap());
        let total = masque::methods::Loss::sum(c.terms(base.clone(), distilled.clone())).unwrap().total;
        (base.value().item(), distilled.value().item(), total.value().item(), {
            let gradients = tape.backward(&distilled, &mut []).unwrap();
            gradients.of(&z).unwrap().to_f64()
        })
    };
    let near = |got: f64, want: f64| assert!((got - want).abs() < 6e-7, "{got} is not {want}");
    for (flags, golden) in [
        ("", 0.875055),
        ("--distillation-tau 2", 1.054474),
        ("--distillation-tau 3", 1.077766),
        ("--kl-reduction elements", 0.291685),
        ("--kl-reduction elements --distillation-tau 2", 0.351491),
        ("--kl-reduction elements --distillation-tau 3", 0.359255),
        ("--distillation-type hard", 1.755868),
    ] {
        let (base, distilled, total, _) = of(flags);
        near(base, 1.930868);
        near(distilled, golden);
        near(total, 0.5 * (base + distilled));
    }
    let gradient = |flags: &str, golden: [f64; 6]| of(flags).3.into_iter().zip(golden).for_each(|(got, want)| near(got, want));
    gradient("", [-0.269251, 0.006752, 0.262498, 0.250635, 0.038337, -0.288972]);
    gradient("--distillation-tau 2", [-0.294701, 0.015440, 0.279261, 0.289933, 0.055551, -0.345484]);
    // The paper's form: lambda is alpha / (1 - alpha), and the sum is not halved.
    let (base, distilled, total, _) = of("--loss-form additive --distillation-alpha 0.75");
    near(total, base + 3.0 * distilled);
    let (base, distilled, total, _) = of("--distillation-alpha 0.75");
    near(total, 0.25 * base + 0.75 * distilled);
}

#[test]
fn a_teacher_on_all_patches_in_any_order_answers_as_if_it_were_not_masked() {
    for kind in [Kind::Deit, Kind::Deit3, Kind::Cait] {
        let teacher = teacher(kind, 2, Dtype::F64, &Device::Cpu);
        let images = images(Dtype::F64);
        let whole = teacher.logits(&images, None).unwrap().to_f64();
        let order: Vec<u32> = (0..3u32).flat_map(|image| (0..16u32).map(move |i| (5 * i + image) % 16)).collect();
        let all = teacher.logits(&images, Some(&Tensor::from_slice(&[3, 16], &order).unwrap())).unwrap().to_f64();
        let some = |kept: [u32; 5]| {
            let kept = Tensor::from_slice(&[3, 5], &kept.repeat(3)).unwrap();
            teacher.logits(&images, Some(&kept)).unwrap().to_f64()
        };
        let (few, turned) = (some([1, 4, 7, 8, 15]), some([8, 15, 4, 1, 7]));
        for (a, b) in whole.iter().zip(&all).chain(few.iter().zip(&turned)) {
            assert!((a - b).abs() < 1e-11, "{kind:?}: {a} is not {b}");
        }
        assert!(whole.iter().zip(&few).any(|(a, b)| (a - b).abs() > 1e-3), "{kind:?}");
    }
}

#[test]
fn pixels_of_patches_that_are_not_kept_change_no_bit_of_the_answer() {
    for kind in [Kind::Deit, Kind::Deit3, Kind::Cait] {
        let teacher = teacher(kind, 2, Dtype::F32, &Device::Cpu);
        let (mut images, kept) = (images(Dtype::F32), Tensor::from_slice(&[3, 2], &[0u32, 5, 0, 5, 0, 5]).unwrap());
        let before = teacher.logits(&images, Some(&kept)).unwrap();
        let pixels = images.data_mut::<f32>();
        for (i, pixel) in pixels.iter_mut().enumerate() {
            let patch = i / 32 % 32 / 8 * 4 + i % 32 / 8;
            if patch != 0 && patch != 5 {
                *pixel = 100.0 - *pixel;
            }
        }
        assert_eq!(before.data::<f32>(), teacher.logits(&images, Some(&kept)).unwrap().data::<f32>(), "{kind:?}");
        images.data_mut::<f32>()[0] += 1.0;
        assert_ne!(before.data::<f32>(), teacher.logits(&images, Some(&kept)).unwrap().data::<f32>(), "{kind:?}");
    }
}

#[test]
fn keeping_all_patches_is_plain_distillation() {
    let batch = batch(Dtype::F64);
    for kind in [Kind::Deit, Kind::Deit3, Kind::Cait] {
        let plain = walked(&mut made("", student(), kind, 2), &batch);
        for flags in ["--len-num-keep 16", "--len-num-keep 5 --maskedkd=false", "--len-num-keep 5 --selection none"] {
            assert!(walked(&mut made(flags, student(), kind, 2), &batch) == plain, "{kind:?} {flags}");
        }
        assert!(walked(&mut made("--len-num-keep 5", student(), kind, 2), &batch).0 != plain.0);
    }
}

#[test]
fn the_choice_is_a_constant_and_nothing_of_the_teacher_is_recorded() {
    let batch = batch(Dtype::F64);
    let mut kd = made("--len-num-keep 6", student(), Kind::Deit, 2);
    let masked = walked(&mut kd, &batch);
    let taught = &kd.taught.as_ref().unwrap().0.params;
    assert!(taught.ids().all(|id| taught.gradient(id).is_none()));
    assert!(masked.1.iter().all(Option::is_some));
    // The same answers, known beforehand, give the same gradients: none flows through the choice.
    let (teacher, _) = kd.taught.as_ref().unwrap();
    let rows = kept(&kd, &Rng::new(2));
    let ids = Tensor::from_slice(&[3, 6], &rows.concat()).unwrap();
    let answers = teacher.logits(&images(Dtype::F64), Some(&ids)).unwrap();
    let known = Batch { teacher_output: Some(answers), ..batch.clone() };
    assert!(walked(&mut made("", student(), Kind::Deit, 2), &known) == masked);
    // A deeper teacher puts nothing more on the tape; beside none there are the two ops of its loss.
    let nodes = |kd: &MaskedKd| {
        let tape = Tape::new();
        kd.loss(&tape, &batch, &Rng::new(2)).unwrap();
        tape.recorded()
    };
    let with = nodes(&kd);
    assert_eq!(nodes(&made("--len-num-keep 6", student(), Kind::Deit, 5)), with);
    assert_eq!(nodes(&made("", student(), Kind::Cait, 4)), with);
    kd.taught = None;
    assert_eq!(nodes(&kd) + 2, with);
}

#[test]
fn each_rule_keeps_what_it_says() {
    let score = |rows: &Tensor, extra: usize| -> Vec<Vec<f64>> {
        let (heads, width) = (rows.shape()[1], rows.last());
        let rows = rows.to_f64();
        let image = |image: &[f64]| (extra..width).map(|j| (0..heads).map(|h| image[h * width + j]).sum::<f64>()).collect();
        rows.chunks_exact(heads * width).map(image).collect()
    };
    let most = |scores: &[Vec<f64>], keep: usize, sign: f64| -> Vec<Vec<u32>> {
        let best = |scores: &Vec<f64>| {
            let mut order: Vec<u32> = (0..scores.len() as u32).collect();
            order.sort_by(|&a, &b| (sign * scores[b as usize]).partial_cmp(&(sign * scores[a as usize])).unwrap());
            order.truncate(keep);
            order.sort_unstable();
            order
        };
        scores.iter().map(best).collect()
    };
    let (tape, images) = (Tape::off(), images(Dtype::F64));
    let rng = Rng::new(9);
    let at = |kd: &MaskedKd, block: usize| {
        let (vit, s) = (&kd.student.vit, Scope::new(&tape, &kd.params));
        vit.blocks_with_rows(&s, &vit.embed(&s, &images, None).unwrap(), block, Default::default()).unwrap().1
    };
    for vit in [student(), distilled()] {
        let extra = vit.extra();
        let with = |flags: &str| made(&format!("--len-num-keep 5 {flags}"), vit.clone(), Kind::Deit, 2);
        let kd = with("");
        assert_eq!(kept(&kd, &rng), most(&score(&at(&kd, 2), extra), 5, 1.0));
        assert_eq!(kept(&with("--selection layer:0"), &rng), most(&score(&at(&kd, 0), extra), 5, 1.0));
        assert_eq!(kept(&with("--selection student-lowest"), &rng), most(&score(&at(&kd, 2), extra), 5, -1.0));
        let teacher = teacher(Kind::Deit, 2, Dtype::F64, &Device::Cpu);
        assert_eq!(kept(&with("--selection teacher"), &rng), most(&score(&teacher.looks(&images).unwrap(), 1), 5, 1.0));
        let random = kept(&with("--selection random"), &rng);
        assert!(random.iter().all(|row| row.len() == 5 && row.is_sorted_by(|a, b| a < b)) && random[0] != random[1], "{random:?}");
        assert_ne!(random, kept(&with("--selection random"), &rng.at(1)));
        let mixed = kept(&made("--selection top-plus-random:3,2", vit.clone(), Kind::Deit, 2), &rng);
        for (row, top) in mixed.iter().zip(most(&score(&at(&kd, 2), extra), 3, 1.0)) {
            assert!(row.len() == 5 && top.iter().all(|patch| row.contains(patch)), "{row:?} lacks one of {top:?}");
        }
        let blocks = kept(&made("--len-num-keep 8 --selection block", vit.clone(), Kind::Deit, 2), &rng);
        let unit = |patch: u32| patch / 8 * 2 + patch % 4 / 2;
        for row in blocks {
            let whole = |patch: &u32| row.iter().filter(|other| unit(**other) == unit(*patch)).count() == 4;
            assert!(row.len() == 8 && row.iter().all(whole), "{row:?}");
        }
        // The paper's softmax over patches alone: each head weighs as much as the others.
        let rows = at(&kd, 2);
        let (heads, width) = (rows.shape()[1], rows.last());
        let mut weighed = rows.to_f64();
        for row in weighed.chunks_exact_mut(width) {
            let patches: f64 = row[extra..].iter().sum();
            row.iter_mut().for_each(|p| *p /= patches);
        }
        let weighed = Tensor::from_slice(&[3, heads, width], &weighed).unwrap();
        assert_eq!(kept(&with("--saliency-softmax patch-keys"), &rng), most(&score(&weighed, extra), 5, 1.0));
    }
    // A student that is masked itself sees a few, in evaluation all.
    let kd = made("--len-num-keep 5 --selection mask-student", student(), Kind::Deit, 2);
    let seen = kd.see(&Scope::new(&tape, &kd.params), &images, &rng).unwrap();
    assert!(seen.rows.is_none() && kd.choose(None, &images, &rng).unwrap().is_none());
    assert!(kd.macs()[0] < made("", student(), Kind::Deit, 2).macs()[0]);
    assert_eq!(kd.teacher_cost().unwrap().macs, made("", student(), Kind::Deit, 2).teacher_cost().unwrap().macs);
}

#[test]
fn a_distillation_token_may_say_where_to_look_and_follows_the_teacher() {
    let (tape, images) = (Tape::off(), images(Dtype::F64));
    let kd = |flags: &str| made(&format!("--len-num-keep 5 {flags}"), distilled(), Kind::Deit, 2);
    let plain = kd("");
    let s = Scope::new(&tape, &plain.params);
    let vit = &plain.student.vit;
    let x = vit.first_blocks(&s, &vit.embed(&s, &images, None).unwrap(), 2).unwrap();
    let all = masque::nn::attention::rows(&vit.qkv(&s, &x, 2).unwrap(), 3, 0..18).unwrap(); // [B, H, T, T]
    assert_eq!(all.shape(), [3, 3, 18, 18]);
    let all = all.to_f64();
    let score = |image: usize, query: usize, j: usize| (0..3).map(|h| all[((image * 3 + h) * 18 + query) * 18 + 2 + j]).sum::<f64>();
    for (flag, weight) in [("cls", [1.0, 0.0]), ("dist", [0.0, 1.0]), ("mean", [0.5, 0.5])] {
        let kept = kept(&kd(&format!("--saliency-query {flag}")), &Rng::new(0));
        for (image, row) in kept.iter().enumerate() {
            let score = |j: usize| weight[0] * score(image, 0, j) + weight[1] * score(image, 1, j);
            let least = row.iter().map(|&j| score(j as usize)).fold(f64::INFINITY, f64::min);
            assert!((0..16).filter(|j| !row.contains(&(*j as u32))).all(|j| score(j) < least), "{flag}: {row:?}");
        }
    }
    // Labels reach the class head alone, the teacher the other.
    let only = |alpha: f64| walked(&mut kd(&format!("--distillation-alpha {alpha}")), &batch(Dtype::F64)).1;
    let zero = |gradients: &[Option<Vec<f64>>], name: &str| {
        let id = plain.params.ids().position(|id| plain.params.name(id) == name).unwrap();
        gradients[id].as_ref().is_none_or(|gradient| gradient.iter().all(|&x| x == 0.0))
    };
    let (labels, taught) = (only(0.0), only(1.0));
    assert!(zero(&labels, "head_dist.weight") && !zero(&labels, "head.weight"));
    assert!(zero(&taught, "head.weight") && !zero(&taught, "head_dist.weight"));
}

#[test]
fn the_teachers_cost_is_that_of_the_patches_it_is_shown() {
    let cost = |flags: &str, kind| made(flags, student(), kind, 2).teacher_cost().unwrap().macs;
    let vit = VitConfig { position: Position::Learned, ..VitConfig::new(32, 8, 32, 2, 4) };
    for k in [1, 5, 16] {
        let (n, d) = (k + 1, 32u64);
        let by_hand = 2 * (12 * n * d * d + 2 * n * n * d) + 16 * 192 * d + d * CLASSES as u64;
        assert_eq!(cost(&format!("--len-num-keep {k}"), Kind::Deit), by_hand);
        assert_eq!(flops::masked_classifier_macs(&vit, k as usize, CLASSES), by_hand);
    }
    let own = |kind| cost("--len-num-keep 5 --selection teacher", kind) - cost("--len-num-keep 5", kind);
    assert_eq!(own(Kind::Deit), flops::vit_macs(&vit, 16));
    assert!(cost("--len-num-keep 5", Kind::Cait) < cost("", Kind::Cait));
    // Two passes are taken where the teacher is asked where it looks.
    let kd = made("--len-num-keep 5 --selection teacher", student(), Kind::Deit, 2);
    kd.loss(&Tape::off(), &batch(Dtype::F64), &Rng::new(0)).unwrap();
    assert_eq!(kd.teacher_cost().unwrap().passes, 2);
}

#[test]
fn flags_that_cannot_be_meant_are_refused() {
    for (flags, part) in [
        ("--len-num-keep 0", "--len-num-keep 0: the image has 16 patches"),
        ("--len-num-keep 17", "--len-num-keep 17: the image has 16 patches"),
        ("--selection top-plus-random:4,2 --len-num-keep 5", "keeps 6 patches and --len-num-keep says 5"),
        ("--selection top-plus-random:14,3", "17"),
        ("--selection layer:3 --len-num-keep 5", "blocks 0 to 2"),
        ("--selection block --len-num-keep 6", "--selection block"),
        ("--saliency-query dist", "no distillation token"),
        ("--distillation-alpha 1.5", "--distillation-alpha 1.5"),
        ("--distillation-tau 0", "--distillation-tau 0"),
        ("--loss-form additive --distillation-alpha 1", "--distillation-alpha 1"),
    ] {
        let said = refused(flags, &student());
        assert!(said.contains(part), "{flags}: {said}");
    }
    assert_eq!(distilling("--selection top-plus-random:4,2", &student()).keep, 6);
    assert_eq!(distilling("--len-num-keep 16 --selection random", &student()).selection, Selection::None);
}

#[cfg(feature = "emulated")]
#[test]
fn recorded_steps_give_the_losses_of_the_cpu() {
    use masque::device::gpu::Gpu;
    use masque::optim::{adamw::AdamW, groups};
    use masque::train::step::{Step, StepOptions};
    let gpu = Device::Gpu(Gpu::emulated().unwrap());
    for (flags, vit, kind) in [
        ("--len-num-keep 6", student(), Kind::Deit),
        ("--len-num-keep 6 --distillation-type hard", student(), Kind::Deit3),
        ("--len-num-keep 1 --distillation-tau 2", student(), Kind::Cait),
        ("", student(), Kind::Cait),
        ("--len-num-keep 6 --saliency-query mean --saliency-softmax patch-keys", distilled(), Kind::Deit),
        ("--len-num-keep 6 --selection random", student(), Kind::Deit),
        ("--len-num-keep 8 --selection block", student(), Kind::Deit),
        ("--len-num-keep 6 --selection student-lowest", student(), Kind::Deit),
        ("--len-num-keep 6 --selection teacher", student(), Kind::Deit3),
        ("--len-num-keep 6 --selection layer:1", student(), Kind::Deit),
        ("--selection top-plus-random:3,3", student(), Kind::Deit),
        ("--len-num-keep 6 --selection mask-student", student(), Kind::Deit),
    ] {
        let losses = |device: &Device, precision: Dtype| -> Vec<f64> {
            let taught = Some((teacher(kind, 2, Dtype::F32, device), distilling(flags, &vit)));
            let mut kd = MaskedKd::new(config(vit.clone()), taught, false, Dtype::F32, &Rng::new(0)).unwrap();
            let mut b = ParamsBuilder::default();
            Classifier::new(&mut b, config(vit.clone())).unwrap();
            let weights = filled(b, Dtype::F32, 3);
            weights.ids().for_each(|id| kd.params.set_value(id, weights.value(id)).unwrap());
            kd.params.move_to(device, precision).unwrap();
            if let Some((teacher, _)) = &mut kd.taught {
                teacher.params.move_to(device, precision).unwrap();
            }
            let adamw = AdamW::new(groups::by_decay(kd.params(), 0.05, &["pos_embed", "cls_token"]), (0.9, 0.999), 1e-8).unwrap();
            let mut step = Step::new(Box::new(kd), Box::new(adamw), StepOptions::default());
            let losses = (0..5).map(|i| step.run(&batch(Dtype::F32), &Rng::new(5).at(i), 1e-3).unwrap().loss).collect();
            assert_eq!(step.is_recorded(), device.gpu().is_some());
            losses
        };
        let (cpu, emulated) = (losses(&Device::Cpu, Dtype::F32), losses(&gpu, Dtype::F32));
        for (cpu, emulated) in cpu.iter().zip(&emulated) {
            assert!((cpu - emulated).abs() <= 1e-4 * cpu, "{flags}: {emulated} is not {cpu}");
        }
        // In bf16 other patches may be chosen, and another class may be the first: only what is smooth stays near.
        let rounded = losses(&gpu, Dtype::Bf16);
        let (smooth, most) = (flags.is_empty(), if flags.is_empty() { 0.02 } else { 1.0 });
        for (cpu, rounded) in cpu.iter().zip(&rounded) {
            assert!((cpu - rounded).abs() <= most * cpu, "{flags} in bf16 (smooth: {smooth}): {rounded} is far from {cpu}");
        }
    }
}

#[test]
fn without_a_teacher_labels_are_all_there_is() {
    let mut kd = made("", student(), Kind::Deit, 2);
    kd.taught = None;
    let batch = batch(Dtype::F64);
    let (loss, _) = walked(&mut kd, &batch);
    let tape = Tape::off();
    let output = kd.student.forward(&Scope::new(&tape, &kd.params), &batch.images, None, false).unwrap();
    let labels: Var = output.logits.cross_entropy_soft(batch.targets.as_ref().unwrap()).unwrap();
    assert_eq!(loss, labels.value().item());
    assert!(kd.teacher_cost().is_none());
}
