//! ConViT: stages computed for visible patches alone are the dense ones, the filter over regions is the depthwise one, published numbers come out.

use masque::device::gpu::Gpu;
use masque::masking::disjoint::{Disjoint, Rates};
use masque::masking::{self, Mask};
use masque::methods::dmjd::{Dmjd, DmjdConfig, VisibleHead, VisibleOrder};
use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::target::{Kind, LossType, Targets};
use masque::methods::{Batch, Method, baseline};
use masque::nn::Scope;
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::decoder::DecoderConfig;
use masque::nn::stages::StagesConfig;
use masque::nn::vit::{Position, VitConfig};
use masque::ops::regions::{Layout, Regions, Seen};
use masque::param::{Params, ParamsBuilder, Role};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::targets::{hog, pixels};
use masque::tensor::{Device, Dtype, Tensor};
use std::collections::BTreeMap;

/// The tiny model of the published numbers: widths 8, 12, 16, blocks 2, 1, 2.
fn tiny(image: usize, fused: bool) -> VitConfig {
    let stages = StagesConfig { patches: [4, 2, 2], widths: [8, 12], depths: [2, 1], mlp_ratios: [3.0, 2.0], eps: 1e-5, fused };
    VitConfig { mlp_ratio: 2.0, class_token: false, stages: Some(stages), ..VitConfig::new(image, 16, 16, 2, 2) }
}

const DECODER: DecoderConfig = DecoderConfig { width: 16, depth: 1, heads: 2 };

/// The published rule: 0.1 sin(0.7 i + s), s the sum of the key's characters modulo 97; 1 more in weights of one axis. Tables of positions stay.
fn by_rule(params: &mut Params) {
    for id in params.ids().collect::<Vec<_>>() {
        let name = params.name(id).to_string();
        if params.role(id) == Role::Frozen {
            continue;
        }
        let shape = params.value(id).shape().to_vec();
        let s = name.bytes().map(usize::from).sum::<usize>() % 97;
        let more = if shape.len() == 1 && name.ends_with("weight") { 1.0 } else { 0.0 };
        let values: Vec<f64> = (0..shape.iter().product()).map(|i| 0.1 * (0.7 * i as f64 + s as f64).sin() + more).collect();
        params.set_value(id, &Tensor::from_slice(&shape, &values).unwrap()).unwrap();
    }
}

/// The published images: (y^2 + 3 x y + 5 x + 50 c + 29 n) mod 256, as bytes.
fn byte(n: usize, y: usize, x: usize, c: usize) -> usize {
    (y * y + 3 * x * y + 5 * x + 50 * c + 29 * n) % 256
}

fn images(batch: usize, side: usize) -> Tensor {
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let at = |i: usize| {
        let (n, c, y, x) = (i / (3 * side * side), i / (side * side) % 3, i / side % side, i % side);
        (byte(n, y, x, c) as f64 / 255.0 - mean[c]) / std[c]
    };
    Tensor::from_slice(&[batch, 3, side, side], &(0..batch * 3 * side * side).map(at).collect::<Vec<f64>>()).unwrap()
}

fn bytes(batch: usize, side: usize) -> Tensor {
    let at = |i: usize| byte(i / (3 * side * side), i / (3 * side) % side, i / 3 % side, i % 3) as u8;
    Tensor::from_slice(&[batch, side, side, 3], &(0..batch * 3 * side * side).map(at).collect::<Vec<u8>>()).unwrap()
}

fn noise(batch: usize, units: usize) -> Vec<f32> {
    (0..batch * units).map(|at| ((37 * (at % units) + 11 + 5 * (at / units)) % units) as f32 / units as f32).collect()
}

#[track_caller]
fn close(found: &[f64], expected: &[f64], within: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= within * expected.abs().max(1.0), "value {i}: {found} is not {expected}");
    }
}

fn norm_of(params: &Params, name: &str) -> f64 {
    let gradient = params.gradient(params.find(name).unwrap()).unwrap().to_f64();
    gradient.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn convmae_has_the_published_numbers_of_the_tiny_model() {
    for (norm_pix, loss, norms, first) in [
        (None, 1.988400621, [0.00105325, 4.34e-6, 0.19555662, 0.00042550, 0.12382572], 1.53312524e-2),
        (Some(pixels::EPS), 1.271979664, [0.00105600, 4.40e-6, 0.19577190, 0.00042890, 0.11069004], 1.51775762e-2),
    ] {
        let config = MaeConfig { encoder: tiny(224, true), decoder: DECODER, mask_ratio: 0.75, norm_pix };
        let mut mae = Mae::new(config, Dtype::F64, &Rng::new(0)).unwrap();
        by_rule(&mut mae.params);
        let images = images(2, 224);
        let mask = masking::random(&Tensor::from_slice(&[2, 196], &noise(2, 196)).unwrap(), 49).unwrap();
        let tape = Tape::new();
        let s = Scope::new(&tape, &mae.params);
        let latent = mae.latent(&s, &images, &mask).unwrap();
        let values = latent.value().to_f64();
        close(&values[..4], &[-1.9560319, -0.6439752, 0.5934563, -0.7025409], 1e-7);
        close(&values[(49 + 48) * 16..][..4], &[1.1511362, -0.9047824, -0.7173193, 0.0725248], 1e-7);
        let pred = mae.decoder.forward(&s, &latent, &mask.restore).unwrap();
        close(&pred.value().to_f64()[..4], &[-0.4902666, -0.7498190, 0.0906920, 0.6753563], 1e-7);
        close(&pred.value().to_f64()[2 * 196 * 768 - 4..], &[-0.3127712, -0.7647026, -0.1084874, 0.6480430], 1e-7);
        let own = mae.reconstruction(&pred, &images, &mask).unwrap();
        close(&[own.value().item()], &[loss], 1e-9);
        tape.backward(&own, &mut [&mut mae.params]).unwrap();
        let names =
            ["patch_embed1.proj.weight", "blocks1.0.attn.weight", "mask_token", "stage2_output_decode.weight", "decoder_pred.weight"];
        close(&names.map(|name| norm_of(&mae.params, name)), &norms, 1e-8);
        let token = mae.params.gradient(mae.params.find("mask_token").unwrap()).unwrap().to_f64()[0];
        close(&[token], &[first], 1e-10);
    }
}

#[test]
fn the_classifier_has_the_published_logits_of_the_tiny_model() {
    for (pool, logits) in [
        (Pool::Mean, [0.8236972, 0.1341847, -0.7986030, -0.4110311, 0.7336045, 0.8173382, -0.3377373, -0.9649889, -0.1341792, 0.7984761]),
        (
            Pool::ClassToken,
            [0.8604147, -0.1394522, -0.9464197, -0.1974093, 0.9681538, 0.6989456, -0.6203551, -0.9613419, 0.1499193, 0.9101760],
        ),
    ] {
        // The published numbers are of the fixed table, which does not follow the rule of the weights.
        let vit = VitConfig { position: Position::SinCos, ..tiny(224, false) };
        let mut b = ParamsBuilder::default();
        let classifier = Classifier::new(&mut b, ClassifierConfig { vit, classes: 10, pool, probe: false }).unwrap();
        let mut params = b.build(Dtype::F64, &Rng::new(0)).unwrap();
        by_rule(&mut params);
        let off = Tape::off();
        let output = classifier.forward(&Scope::new(&off, &params), &images(1, 224), None, false).unwrap();
        close(&output.logits.value().to_f64(), &logits, 1e-7);
    }
}

fn coprime(n: usize) -> usize {
    let divisor = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (5..).find(|&a| divisor(a, n) == 1).unwrap()
}

/// Noise whose order is the published stand-in for a permutation, j to (a j + 3) mod n.
fn permutation(n: usize) -> Vec<f32> {
    let mut noise = vec![0.0; n];
    (0..n).for_each(|j| noise[(coprime(n) * j + 3) % n] = j as f32);
    noise
}

fn dmjd(image: usize, side: usize, corruption: f64, order: VisibleOrder, losses: [LossType; 2]) -> Dmjd {
    let encoder = tiny(image, true);
    let rates = Rates { corruption, prediction: 1.0, views: 2 };
    let config = DmjdConfig {
        views: Disjoint::new(encoder.grid(), side, rates).unwrap(),
        targets: Targets::new(Kind::Hog, &encoder, pixels::EPS, None).unwrap(),
        encoder,
        decoder: Some(DECODER),
        head: VisibleHead::Projector,
        theta: 1.0,
        losses,
        beta: 2.0,
        order,
        dense: false,
    };
    Dmjd::new(config, Dtype::F64, &Rng::new(0)).unwrap()
}

#[test]
fn dmjd_has_the_published_numbers_of_the_tiny_model() {
    struct Published {
        side: usize,
        corruption: f64,
        latent: [[f64; 4]; 2],
        mean: f64,
        pred: [[f64; 4]; 2],
        visible: [[f64; 4]; 2],
        mim: [f64; 2],
        vis: [[f64; 2]; 2],
        total: [f64; 2],
        norms: [f64; 8],
        token: f64,
    }
    let published = [
        Published {
            side: 2,
            corruption: 0.6,
            latent: [[-2.3678713, 0.8831069, 0.2783626, -0.6734710], [0.1733186, 0.0890883, -0.4845720, 0.2756916]],
            mean: 0.7876325031,
            pred: [[-0.4897055, -0.7477088, 0.0909877, 0.6733661], [0.2743027, 0.5212251, 0.0496696, -0.4138484]],
            visible: [[-0.3579070, 0.7716316, 0.6229930, -0.6209488], [-0.3178200, -0.8835403, 0.0528345, 1.0166047]],
            mim: [1.282511631, 0.311211958],
            vis: [[0.355454250, 0.355408549], [1.473766977, 1.473632285]],
            total: [1.637965881, 1.637920180],
            norms: [0.04684256, 0.00012445, 0.00404741, 0.19655547, 0.02143048, 0.28799076, 0.12069547, 0.23461348],
            token: 1.34844725e-2,
        },
        Published {
            side: 1,
            corruption: 0.75,
            latent: [[-1.9560319, -0.6439752, 0.5934563, -0.7025409], [-1.0703950, -0.5429388, -0.0614127, 0.5092236]],
            mean: 0.7909559715,
            pred: [[-0.4902666, -0.7498190, 0.0906920, 0.6753563], [0.1932304, 0.7723178, 0.2326880, -0.5906339]],
            visible: [[-0.3247575, 0.6536347, 0.5419356, -0.5358619], [-0.2946008, -0.8842662, 0.0293206, 1.0077838]],
            mim: [1.274592765, 0.309316135],
            vis: [[0.353035041, 0.352981995], [1.460819371, 1.460665665]],
            total: [1.627627807, 1.627574761],
            norms: [0.06267485, 0.00055062, 0.00508728, 0.19471866, 0.03088227, 0.28435212, 0.12059323, 0.26919523],
            token: 1.26633801e-2,
        },
    ];
    for p in published {
        let units = 196 / (p.side * p.side);
        let keep = (units as f64 * (1.0 - p.corruption)) as usize;
        let drawn = [
            ("mask".to_string(), noise(2, units)),
            ("view 2 seen".to_string(), permutation(keep)),
            ("view 2 hidden".to_string(), permutation(units - keep)),
        ];
        let rng = Rng::replaying(BTreeMap::from(drawn));
        let batch = Batch { bytes: Some(bytes(2, 224)), ..Batch::of_images(images(2, 224)) };
        let tape = Tape::new();
        let mut totals = Vec::new();
        for (i, order) in [VisibleOrder::Released, VisibleOrder::Aligned].into_iter().enumerate() {
            for (j, losses) in [[LossType::L2, LossType::SmoothL1], [LossType::SmoothL1, LossType::L2]].into_iter().enumerate() {
                let mut dmjd = dmjd(224, p.side, p.corruption, order, losses);
                by_rule(&mut dmjd.params);
                let pass = dmjd.pass(&Scope::new(&tape, &dmjd.params), &batch, &rng).unwrap();
                // The target is made in f32.
                close(&[pass.invisible.value().item(), pass.visible.value().item()], &[p.mim[j], p.vis[j][i]], 1e-6);
                if (i, j) == (0, 0) {
                    let latent = pass.latent.value().to_f64();
                    close(&latent[..4], &p.latent[0], 1e-7);
                    close(&latent[latent.len() - 16..][..4], &p.latent[1], 1e-7);
                    close(&[latent.iter().map(|x| x.abs()).sum::<f64>() / latent.len() as f64], &[p.mean], 1e-9);
                    let pred = pass.predicted.value().to_f64();
                    close(&pred[..4], &p.pred[0], 1e-7);
                    close(&pred[pred.len() - 4..], &p.pred[1], 1e-7);
                    let visible = pass.predicted_visible.value().to_f64();
                    close(&visible[..4], &p.visible[0], 1e-7);
                    close(&visible[visible.len() - 4..], &p.visible[1], 1e-7);
                }
                if j == 0 {
                    let tape = Tape::new();
                    let loss = dmjd.loss(&tape, &batch, &rng).unwrap();
                    totals.push(loss.total.value().item());
                    tape.backward(&loss.total, &mut [&mut dmjd.params]).unwrap();
                    if i == 0 {
                        let names = [
                            "patch_embed1.proj.weight",
                            "blocks1.0.attn.weight",
                            "blocks3.1.attn.qkv.weight",
                            "mask_token",
                            "stage1_output_decode.weight",
                            "decoder_pred.weight",
                            "predictor.0.weight",
                            "proj_embed.0.weight",
                        ];
                        close(&names.map(|name| norm_of(&dmjd.params, name)), &p.norms, 1e-7);
                        let token = dmjd.params.gradient(dmjd.params.find("mask_token").unwrap()).unwrap().to_f64()[0];
                        close(&[token], &[p.token], 1e-8);
                    }
                }
            }
        }
        close(&totals, &p.total, 1e-6);
    }
}

/// Latents and all gradients of one pass.
fn pass(mae: &mut Mae, images: &Tensor, mask: &Mask) -> (Vec<f64>, Vec<(String, Vec<f64>)>) {
    let tape = Tape::new();
    mae.params.clear_gradients();
    let s = Scope::new(&tape, &mae.params);
    let latent = mae.latent(&s, images, mask).unwrap();
    let pred = mae.decoder.forward(&s, &latent, &mask.restore).unwrap();
    let loss = mae.reconstruction(&pred, images, mask).unwrap();
    tape.backward(&loss, &mut [&mut mae.params]).unwrap();
    let params = &mae.params;
    let gradient = |id| (params.name(id).to_string(), params.gradient(id).unwrap().read().unwrap());
    let gradients = params.trained().map(gradient).collect();
    (latent.value().read().unwrap(), gradients)
}

/// How far two lists are apart, for the largest number of them.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    a.iter().zip(b).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn stages_of_visible_patches_alone_are_the_dense_ones_in_outputs_and_gradients() {
    let emulated = Device::Gpu(Gpu::emulated().unwrap());
    for (device, dtype, within) in [(Device::Cpu, Dtype::F64, 1e-12), (Device::Cpu, Dtype::F32, 2e-5), (emulated, Dtype::F32, 2e-5)] {
        // A grid that is no square, and one patch of a row alone.
        for (image, ratio) in [([96, 64], 0.75), ([64, 64], 0.5), ([64, 64], 0.9375)] {
            let encoder = VitConfig { image, ..tiny(64, true) };
            let make = |dense: bool| {
                let config = MaeConfig { encoder: encoder.clone(), decoder: DECODER, mask_ratio: ratio, norm_pix: None };
                let mut mae = Mae::new(config, if dtype == Dtype::F64 { dtype } else { Dtype::F32 }, &Rng::new(3)).unwrap();
                mae.params.move_to(&device, dtype).unwrap();
                mae.with_dense_stages(dense)
            };
            let pixels = Rng::new(5).normal("images", 2 * 3 * image[0] * image[1]);
            let images = Tensor::from_slice(&[2, 3, image[0], image[1]], &pixels).unwrap().cast(dtype).unwrap().on(&device).unwrap();
            let [mut dense, mut sparse] = [make(true), make(false)];
            let mask = sparse.mask(2, &Rng::new(7)).unwrap();
            let ((latent, gradients), (own, own_gradients)) = (pass(&mut dense, &images, &mask), pass(&mut sparse, &images, &mask));
            assert!(apart(&latent, &own) <= within, "{device} {dtype}: latents are {} apart", apart(&latent, &own));
            for ((name, a), (_, b)) in gradients.iter().zip(&own_gradients) {
                assert!(apart(a, b) <= within, "{device} {dtype} {image:?}: gradients of {name} are {} apart", apart(a, b));
            }
        }
    }
}

#[test]
fn nothing_that_is_hidden_changes_what_is_visible() {
    let config = MaeConfig { encoder: tiny(64, true), decoder: DECODER, mask_ratio: 0.75, norm_pix: None };
    let mae = Mae::new(config, Dtype::F32, &Rng::new(1)).unwrap().with_dense_stages(true);
    let mask = mae.mask(1, &Rng::new(2)).unwrap();
    let numbers = Rng::new(3).normal("images", 3 * 64 * 64);
    let mut other = numbers.clone();
    for (at, value) in other.iter_mut().enumerate() {
        let (y, x) = (at / 64 % 64, at % 64);
        if mask.hidden.data::<f32>()[y / 16 * 4 + x / 16] == 1.0 {
            *value = -7.0 * *value + 1.0;
        }
    }
    assert_ne!(numbers, other);
    let off = Tape::off();
    let latent = |pixels: &[f32]| {
        let images = Tensor::from_slice(&[1, 3, 64, 64], pixels).unwrap();
        mae.latent(&Scope::new(&off, &mae.params), &images, &mask).unwrap().value().to_f64()
    };
    assert_eq!(latent(&numbers), latent(&other));
}

#[test]
fn the_filter_over_regions_is_the_depthwise_filter_of_the_map() {
    let (batch, channels, grid, layout) = (2, 5, [3, 2], Layout { side: 4, cell: 2 });
    let [height, width] = grid.map(|n| n * layout.side);
    let mask = masking::random(&Tensor::drawn(&Device::Cpu, &Rng::new(1), "mask", &[batch, 6]).unwrap(), 4).unwrap();
    let draw = |name: &str, shape: &[usize]| {
        let numbers = Rng::new(2).normal(name, shape.iter().product());
        Tensor::from_slice(shape, &numbers).unwrap().cast(Dtype::F64).unwrap()
    };
    let (map, weight, bias) = (draw("x", &[batch, channels, height, width]), draw("w", &[channels, 1, 5, 5]), draw("b", &[channels]));
    let seen = |at: usize, image: usize| mask.hidden.data::<f32>()[image * 6 + at] == 0.0;
    let visible: Vec<f64> = (0..batch * height * width)
        .map(|i| {
            let (image, y, x) = (i / (height * width), i / width % height, i % width);
            f64::from(seen(y / 4 * grid[1] + x / 4, image))
        })
        .collect();
    let visible = Tensor::from_slice(&[batch, 1, height, width], &visible).unwrap();
    let want =
        Var::constant(map.clone()).depthwise(&Var::constant(weight.clone()), Some(&Var::constant(bias.clone())), Some(&visible)).unwrap();

    // The tokens of the kept regions, out of the map.
    let only = Seen::Only { kept: mask.kept.clone(), places: mask.restore.clone() };
    let regions = Regions { grid, layout, seen: only };
    let numbers = regions.tokens_of(batch, &Device::Cpu).unwrap();
    let tokens = |map: &Tensor| Var::constant(map.clone()).to_tokens().unwrap().gather(&numbers).unwrap();
    let got = tokens(&map).region_conv(&Var::constant(weight), Some(&Var::constant(bias)), &regions).unwrap();
    close(&got.value().to_f64(), &tokens(want.value()).value().to_f64(), 1e-13);
}

#[test]
fn views_of_one_image_share_its_target_and_hide_what_the_other_shows() {
    let dmjd = dmjd(64, 1, 0.75, VisibleOrder::Aligned, [LossType::L2, LossType::SmoothL1]);
    let batch = Batch { bytes: Some(bytes(3, 64)), ..Batch::of_images(images(3, 64)) };
    let off = Tape::off();
    let pass = dmjd.pass(&Scope::new(&off, &dmjd.params), &batch, &Rng::new(4)).unwrap();
    assert_eq!(pass.target.shape(), [3, 16, 108]);
    assert_eq!((pass.predicted.shape(), pass.predicted_visible.shape()), (&[6, 16, 108][..], &[6, 4, 108][..]));
    let target = dmjd.visible_target(&pass.target, &pass.mask, VisibleOrder::Aligned).unwrap();
    let (all, some) = (pass.target.to_f64(), target.to_f64());
    for (row, &patch) in pass.mask.kept.data::<u32>().iter().enumerate() {
        let image = row / 4 % 3;
        assert_eq!(some[row * 108..][..108], all[(image * 16 + patch as usize) * 108..][..108], "row {row}");
    }
    // Released: the same rows of each view, in raster order.
    let released = dmjd.visible_target(&pass.target, &pass.mask, VisibleOrder::Released).unwrap().to_f64();
    let mut sorted = pass.mask.kept.data::<u32>().to_vec();
    sorted.chunks_exact_mut(4).for_each(|row| row.sort_unstable());
    for (row, &patch) in sorted.iter().enumerate() {
        assert_eq!(released[row * 108..][..108], all[(row / 4 % 3 * 16 + patch as usize) * 108..][..108]);
    }
    let whole = hog::target(&bytes(3, 64), &hog::Options::dmjd()).unwrap();
    assert_eq!(whole.to_f64(), all);
    let view = baseline::view(&pass.mask, false);
    assert_eq!(view.kept.shape(), [6, 4]);
}
