//! MAE: the golden micro-model, how models start, stochastic depth, shapes.

use approx::assert_relative_eq;
use masque::masking;
use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::{Batch, Method};
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::{DropPath, Position, Tokens, Vit, VitConfig};
use masque::nn::{Scope, Start};
use masque::param::{Params, ParamsBuilder};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::targets::pixels;
use masque::tensor::{Dtype, Tensor};
use std::collections::BTreeMap;

/// All parameters are sines, norm weights around 1; the position tables keep their values.
fn micro(dtype: Dtype, norm_pix: bool) -> Mae {
    let config = MaeConfig {
        encoder: VitConfig::new(32, 8, 16, 2, 4),
        decoder: DecoderConfig { width: 8, depth: 1, heads: 2 },
        mask_ratio: 0.75,
        norm_pix: norm_pix.then_some(1e-6),
    };
    let mut mae = Mae::new(config, dtype, &Rng::new(0)).unwrap();
    for (j, id) in mae.params.ids().enumerate() {
        let name = mae.params.name(id).to_string();
        if name.ends_with("pos_embed") {
            continue;
        }
        let base = if name.contains("norm") && name.ends_with(".weight") { 1.0 } else { 0.0 };
        let shape = mae.params.value(id).shape().to_vec();
        let sines = (0..shape.iter().product()).map(|i: usize| base + 0.1 * (0.37 * i as f64 + 1.3 * j as f64).sin());
        mae.params.set_value(id, &Tensor::from_slice(&shape, &sines.collect::<Vec<f64>>()).unwrap()).unwrap();
    }
    mae
}

fn micro_images() -> Tensor {
    let pixel = |i: usize| (0.05 * (i % 3072) as f64 + (i / 3072) as f64).sin();
    Tensor::from_slice(&[2, 3, 32, 32], &(0..6144).map(pixel).collect::<Vec<f64>>()).unwrap()
}

fn micro_noise() -> Rng {
    let noise = (1..=2).flat_map(|k| (1..=16).map(move |l| (0.6180339887 * f64::from(l * k)).fract() as f32));
    Rng::replaying(BTreeMap::from([("mask".to_string(), noise.collect())]))
}

fn near(got: f64, want: f64, relative: f64, what: &str) {
    assert!((got - want).abs() <= relative * want.abs(), "{what}: {got} is not {want}");
}

fn micro_model_matches(dtype: Dtype, relative: f64) {
    let (mae, images) = (micro(dtype, false), micro_images().cast(dtype).unwrap());
    let patches = pixels::patchify(&images, 8).unwrap().to_f64();
    let mask = mae.mask(2, &micro_noise()).unwrap();
    let hidden = [1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1];
    assert_eq!(mask.hidden.data::<f32>(), hidden.map(|h| h as f32));
    assert_eq!(mask.kept.data::<u32>(), [12, 4, 9, 1, 12, 8, 4, 0]);
    assert_eq!(mask.restore.data::<u32>()[..16], [9, 3, 13, 7, 1, 11, 5, 15, 8, 2, 12, 6, 0, 10, 4, 14]);
    assert_eq!(mask.restore.data::<u32>()[16..], [3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12]);

    let tape = Tape::off();
    let s = Scope::new(&tape, &mae.params);
    let latent = mae.encoder.forward(&s, &images, Some(&mask.kept)).unwrap();
    let pred = mae.decoder.forward(&s, &latent, &mask.restore).unwrap();
    assert_eq!((latent.shape(), pred.shape()), (&[2, 5, 16][..], &[2, 16, 192][..]));
    let (latent, pred) = (latent.value().to_f64(), pred.value().to_f64());
    let golden: [(&str, &[f64], &[f64]); 5] = [
        ("patch 5", &patches[5 * 192..], &[0.5920735147072245, 0.9999964903456066, 0.5963353984889087, 0.6316109877182386]),
        ("latent, first", &latent, &[-0.8889858695686802, 1.0729599043091025, 0.5355147865625419, -1.493776632483171]),
        ("latent, last", &latent[9 * 16..], &[-1.6831526406977684, 0.41644330939739105, -0.3342982795177972, -2.0364616882544286]),
        ("pred, first", &pred, &[0.1073728766682877, 0.05545588030394581, 0.14571041596087533, 0.040824713260335425]),
        ("pred, last", &pred[2 * 16 * 192 - 3..], &[0.04404882769217044, 0.14728578034850287, 0.005689112485269633]),
    ];
    for (what, got, want) in golden {
        got.iter().zip(want).for_each(|(&got, &want)| near(got, want, relative, what));
    }
}

fn micro_gradients_match(dtype: Dtype, norm_pix: bool, loss: f64, norms: &[(&str, f64)], total: f64, relative: f64) {
    let mut mae = micro(dtype, norm_pix);
    let tape = Tape::new();
    let got = mae.loss(&tape, &Batch::of_images(micro_images()), &micro_noise()).unwrap();
    near(got.total.value().item(), loss, relative, "loss");
    tape.backward(&got.total, &mut [&mut mae.params]).unwrap();
    let square = |id| mae.params.gradient(id).unwrap().to_f64().iter().map(|g| g * g).sum::<f64>();
    for (name, want) in norms {
        near(square(mae.params.find(name).unwrap()).sqrt(), *want, relative, name);
    }
    near(mae.params.trained().map(square).sum::<f64>().sqrt(), total, relative, "all gradients");
}

const RAW: [(&str, f64); 8] = [
    ("cls_token", 1.4905175875537524e-05),
    ("mask_token", 0.012937911339986827),
    ("patch_embed.proj.weight", 0.00018125416848840018),
    ("blocks.0.attn.qkv.weight", 5.6141644159958376e-05),
    ("blocks.1.mlp.fc2.bias", 5.2135045550655e-05),
    ("decoder_embed.weight", 0.0004202382969761978),
    ("decoder_blocks.0.norm1.weight", 8.440134130368489e-05),
    ("decoder_pred.bias", 0.07943231864963095),
];
const NORMALISED: [(&str, f64); 2] = [("mask_token", 0.012810814692757229), ("decoder_pred.bias", 0.1115385141982464)];

#[test]
fn the_micro_model_has_its_golden_outputs() {
    micro_model_matches(Dtype::F64, 1e-10);
    micro_model_matches(Dtype::F32, 3e-5);
}

#[test]
fn the_micro_model_has_its_golden_losses_and_gradients() {
    for (dtype, relative) in [(Dtype::F64, 1e-10), (Dtype::F32, 1e-3)] {
        micro_gradients_match(dtype, false, 0.5125649486173123, &RAW, 0.18690577743774228, relative);
        micro_gradients_match(dtype, true, 1.0056227797735364, &NORMALISED, 0.25950250193894425, relative);
    }
}

fn vit(config: VitConfig, dtype: Dtype) -> (Vit, Params) {
    let mut b = ParamsBuilder::default();
    let tokens = Tokens::new(&mut b, &config).unwrap();
    let model = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
    (model, b.build(dtype, &Rng::new(5)).unwrap())
}

fn images(shape: [usize; 4]) -> Tensor {
    Tensor::from_slice(&shape, &Rng::new(9).normal("images", shape.iter().product())).unwrap()
}

#[test]
fn gathering_before_the_projection_gives_the_tokens_of_gathering_after_it() {
    let kept = Tensor::from_slice(&[2, 5], &[7u32, 0, 15, 3, 9, 1, 2, 14, 8, 5]).unwrap();
    for (position, front) in [(Position::SinCos, 1), (Position::Learned, 1), (Position::LearnedPatches, 1), (Position::Learned, 2)] {
        let config = VitConfig { position, distillation_token: front == 2, ..VitConfig::new(32, 8, 32, 1, 4) };
        let (model, params) = vit(config, Dtype::F32);
        let tape = Tape::off();
        let (s, images) = (Scope::new(&tape, &params), images([2, 3, 32, 32]));
        let before = model.embed(&s, &images, Some(&kept)).unwrap();
        let all = model.embed(&s, &images, None).unwrap();
        let after = all.tokens(front..front + 16).unwrap().gather(&kept).unwrap();
        let patches = before.tokens(front..front + 5).unwrap();
        for (a, b) in patches.value().to_f64().iter().zip(after.value().to_f64()) {
            assert!((a - b).abs() <= 1e-6, "{position:?}: {a} and {b}");
        }
        assert_eq!(before.tokens(0..front).unwrap().value().to_f64(), all.tokens(0..front).unwrap().value().to_f64());
    }
}

/// Largest size, mean and deviation.
fn moments(values: &[f64]) -> (f64, f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (values.iter().fold(0.0, |most, x| x.abs().max(most)), mean, variance.sqrt())
}

fn is_uniform(name: &str, values: &[f64], bound: f64) {
    let (most, mean, deviation) = moments(values);
    let noise = 4.0 * bound / (values.len() as f64).sqrt();
    assert!(most <= bound * (1.0 + 1e-6) && most > bound * (1.0 - 20.0 / values.len() as f64), "{name}: {most}, bound {bound}");
    assert!(mean.abs() <= noise && (deviation - bound / 3f64.sqrt()).abs() <= noise, "{name}: mean {mean}, deviation {deviation}");
}

fn is_normal(name: &str, values: &[f64]) {
    let (most, mean, deviation) = moments(values);
    let noise = 4.0 * 0.02 / (values.len() as f64).sqrt();
    assert!(most < 0.2 && mean.abs() <= noise && (deviation - 0.02).abs() <= noise, "{name}: mean {mean}, deviation {deviation}");
}

fn is_constant(name: &str, values: &[f64]) {
    let want = if name.contains("norm") && name.ends_with(".weight") { 1.0 } else { 0.0 };
    assert!(values.iter().all(|&x| x == want), "{name} is not {want} throughout");
}

#[test]
fn a_pre_training_model_starts_as_published() {
    let (encoder, decoder) = (VitConfig::new(32, 8, 128, 2, 4), DecoderConfig { width: 64, depth: 1, heads: 4 });
    let mae = Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix: Some(1e-6) }, Dtype::F32, &Rng::new(1)).unwrap();
    for id in mae.params.trained() {
        let (name, value) = (mae.params.name(id), mae.params.value(id));
        let values = value.to_f64();
        match value.shape() {
            // [D, C, p, p] is one matrix [D, P], as qkv is one matrix [3 D, D].
            [out, rest @ ..] if rest.len() == 1 || rest.len() == 3 => {
                let fan_in: usize = rest.iter().product();
                is_uniform(name, &values, (6.0 / (out + fan_in) as f64).sqrt());
            }
            [1, 1, _] => is_normal(name, &values),
            _ if name == "patch_embed.proj.bias" => is_uniform(name, &values, (1.0 / 192f64).sqrt()),
            _ => is_constant(name, &values),
        }
    }
    let qkv = mae.params.value(mae.params.find("blocks.0.attn.qkv.weight").unwrap());
    assert_eq!(qkv.shape(), [3 * 128, 128]);
}

#[test]
fn a_classifier_starts_as_published() {
    let vit = VitConfig { position: Position::Learned, distillation_token: true, ..VitConfig::new(32, 8, 128, 2, 4) };
    let mut b = ParamsBuilder::default();
    Classifier::new(&mut b, ClassifierConfig { vit, classes: 10, pool: Pool::ClassToken, probe: false }).unwrap();
    let params = b.build(Dtype::F32, &Rng::new(1)).unwrap();
    for id in params.trained() {
        let (name, values) = (params.name(id), params.value(id).to_f64());
        match params.value(id).shape() {
            _ if name.starts_with("patch_embed") => is_uniform(name, &values, (1.0 / 192f64).sqrt()),
            [_] => is_constant(name, &values),
            _ => is_normal(name, &values),
        }
    }
}

#[test]
fn stochastic_depth_grows_linearly_or_stays_constant() {
    let linear = VitConfig { drop_path: DropPath::Linear(0.3), ..VitConfig::new(32, 8, 16, 4, 2) };
    for (i, rate) in [0.0, 0.1, 0.2, 0.3].into_iter().enumerate() {
        assert_relative_eq!(linear.block(i).drop_path, rate, max_relative = 1e-12);
    }
    let constant = VitConfig { drop_path: DropPath::Constant(0.3), ..linear };
    assert!((0..4).all(|i| constant.block(i).drop_path == 0.3));
}

#[test]
fn stochastic_depth_drops_images_below_the_rate_and_enlarges_the_others() {
    let config = VitConfig { drop_path: DropPath::Constant(0.5), ..VitConfig::new(16, 8, 16, 1, 2) };
    let (model, mut params) = vit(config, Dtype::F64);
    for name in ["blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias"] {
        let id = params.find(name).unwrap();
        params.value_mut(id).unwrap().fill(0.0f64);
    }
    let tape = Tape::off();
    let s = Scope::new(&tape, &params);
    let x = model.embed(&s, &images([3, 3, 16, 16]), None).unwrap();
    let plain = model.blocks(&s, &x).unwrap().value().to_f64();
    let draws = |key: &str, u: [f32; 3]| (format!("blocks.0.drop_path.{key}"), u.to_vec());
    let rng = Rng::replaying(BTreeMap::from([draws("0", [0.49, 0.5, 0.9]), draws("1", [0.1, 0.1, 0.9])]));
    let dropped = model.blocks(&s.with_noise(&rng), &x).unwrap().value().to_f64();
    let (x, image) = (x.value().to_f64(), 5 * 16);
    assert_eq!(dropped[..image], x[..image]);
    for i in image..3 * image {
        assert_relative_eq!(dropped[i] - x[i], 2.0 * (plain[i] - x[i]), epsilon = 1e-12);
    }
}

#[test]
fn without_noise_stochastic_depth_is_off() {
    let of = |drop_path| {
        let (model, params) = vit(VitConfig { drop_path, ..VitConfig::new(16, 8, 16, 3, 2) }, Dtype::F32);
        model.forward(&Scope::new(&Tape::off(), &params), &images([2, 3, 16, 16]), None).unwrap().value().to_f64()
    };
    assert_eq!(of(DropPath::Linear(0.5)), of(DropPath::Constant(0.0)));
}

#[test]
fn forwards_on_a_tape_that_is_off_record_nothing() {
    let mut mae = micro(Dtype::F32, true);
    let (tape, batch) = (Tape::off(), Batch::of_images(micro_images()));
    let losses = [0, 1].map(|_| mae.loss(&tape, &batch, &micro_noise()).unwrap().total);
    assert!(losses.iter().all(|loss| !loss.tracked()));
    assert_eq!(losses[0].value().item().to_bits(), losses[1].value().item().to_bits());
    assert!(tape.backward(&losses[0], &mut [&mut mae.params]).is_err());
    assert!(mae.params.trained().all(|id| mae.params.gradient(id).is_none()));
    for id in mae.params.ids() {
        mae.params.value_mut(id).unwrap();
    }
}

#[test]
fn a_run_that_stops_early_gives_what_the_full_run_gives_there() {
    let (model, params) = vit(VitConfig::new(32, 8, 32, 4, 4), Dtype::F32);
    let tape = Tape::off();
    let s = Scope::new(&tape, &params);
    let x = model.embed(&s, &images([2, 3, 32, 32]), None).unwrap();
    let mut seen = vec![x.value().to_f64()];
    model.blocks_seen(&s, &x, |_, x| seen.push(x.value().to_f64())).unwrap();
    assert_eq!(seen.len(), 5);
    for (count, want) in seen.iter().enumerate() {
        assert_eq!(model.first_blocks(&s, &x, count).unwrap().value().to_f64(), *want, "{count} blocks");
    }
    assert!(model.first_blocks(&s, &x, 5).is_err());
}

#[test]
fn images_may_be_rectangles_and_have_one_or_four_channels() {
    for (channels, image) in [(1, [24, 40]), (4, [40, 16]), (3, [8, 32])] {
        let encoder = VitConfig { image, channels, ..VitConfig::new(32, 8, 32, 2, 4) };
        let decoder = DecoderConfig { width: 16, depth: 1, heads: 2 };
        let rng = Rng::new(2);
        let mut mae = Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.5, norm_pix: Some(1e-6) }, Dtype::F32, &rng).unwrap();
        let patches = mae.encoder.config.patches();
        assert_eq!(patches, image[0] * image[1] / 64);
        let tape = Tape::new();
        let batch = Batch::of_images(images([2, channels, image[0], image[1]]));
        let loss = mae.loss(&tape, &batch, &rng).unwrap();
        assert!(loss.total.value().item().is_finite());
        tape.backward(&loss.total, &mut [&mut mae.params]).unwrap();
        for id in mae.params.trained() {
            let gradient = mae.params.gradient(id).unwrap_or_else(|| panic!("{} has no gradient", mae.params.name(id)));
            assert!(gradient.to_f64().iter().all(|g| g.is_finite()), "{}", mae.params.name(id));
        }
        assert_eq!(mae.mask(2, &rng).unwrap().kept.shape(), [2, masking::len_keep(patches, 0.5).unwrap()]);
    }
}
