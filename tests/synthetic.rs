//! The built-in pictures: the same everywhere, disjoint, balanced, and not to be told apart by their raw pixels.

use masque::data::Dataset;
use masque::data::augment::{self, Augment};
use masque::data::synthetic::{Glyphs, GlyphsConfig, MEAN, STD};
use masque::optim::{Optimizer, adamw::AdamW, groups};
use masque::param::{Init, ParamsBuilder};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};
use rayon::prelude::*;
use std::collections::HashSet;

type Knob = (&'static str, fn(&mut GlyphsConfig));

fn glyphs(change: impl FnOnce(&mut GlyphsConfig)) -> Glyphs {
    let mut config = GlyphsConfig::default();
    change(&mut config);
    Glyphs::new(config).unwrap()
}

fn pixels(glyphs: &Glyphs, index: usize) -> Vec<u8> {
    glyphs.picture(index).unwrap().pixels
}

/// FNV-1a.
fn sum(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn training_and_test_set_share_no_image() {
    let sums = |glyphs: Glyphs| (0..glyphs.len()).into_par_iter().map(|i| sum(0, &pixels(&glyphs, i))).collect::<HashSet<u64>>();
    let (pool, test) = (sums(Glyphs::open(true).unwrap()), sums(Glyphs::open(false).unwrap()));
    assert_eq!((pool.len(), test.len()), (16_384, 2_000));
    assert!(pool.is_disjoint(&test));
}

#[test]
fn every_class_has_its_share_and_its_name() {
    for train in [true, false] {
        let glyphs = Glyphs::open(train).unwrap();
        let mut counts = [0usize; 20];
        (0..glyphs.len()).for_each(|i| counts[glyphs.label(i) as usize] += 1);
        // Five standard deviations.
        let share = glyphs.len() as f64 / 20.0;
        assert!(counts.iter().all(|&n| (n as f64 - share).abs() < 5.0 * share.sqrt()), "{counts:?}");
        assert_eq!(glyphs.classes().len(), 20);
        assert_eq!((&*glyphs.classes()[0], &*glyphs.classes()[6], &*glyphs.classes()[19]), ("disc plain", "square checker", "ring dots"));
    }
}

#[test]
fn pictures_have_the_same_bytes_from_any_thread_in_any_order_on_any_machine() {
    let glyphs = Glyphs::open(true).unwrap();
    let in_order: Vec<Vec<u8>> = (0..64).map(|i| pixels(&glyphs, i)).collect();
    let mut backwards: Vec<(usize, Vec<u8>)> =
        (0..64).into_par_iter().rev().map(|i| (i, pixels(&Glyphs::open(true).unwrap(), i))).collect();
    backwards.sort();
    assert!(backwards.iter().all(|(i, pixels)| *pixels == in_order[*i]));
    // Nothing in a picture depends on the machine's mathematics library.
    assert_eq!(in_order.iter().fold(0, |hash, pixels| sum(hash, pixels)), 3_419_617_609_454_217_850);
}

#[test]
fn any_size_and_number_of_channels_can_be_had() {
    for size in [16, 48, 64, 224] {
        let three = glyphs(|c| c.size = size);
        for channels in [1, 2, 4, 16] {
            let other = glyphs(|c| (c.size, c.channels) = (size, channels));
            for i in 0..3 {
                let (picture, three) = (other.picture(i).unwrap(), pixels(&three, i));
                assert_eq!((picture.size, picture.channels, picture.pixels.len()), ([size; 2], channels, size * size * channels));
                let shared = channels.min(3);
                let same = picture.pixels.chunks_exact(channels).zip(three.chunks_exact(3)).all(|(a, b)| a[..shared] == b[..shared]);
                assert!(same, "the first channels are the same whatever their number");
                let plane = |k: usize| picture.pixels.iter().skip(k).step_by(channels).copied().collect::<Vec<u8>>();
                assert!((1..channels).all(|k| plane(k) != plane(k - 1)), "channels differ");
            }
        }
    }
}

#[test]
fn a_larger_picture_shows_the_same_scene() {
    let (small, large) = (glyphs(|c| c.noise = 0.0), glyphs(|c| (c.size, c.noise) = (192, 0.0)));
    for i in 0..20 {
        assert_eq!(small.label(i), large.label(i));
        let (small, large) = (pixels(&small, i), pixels(&large, i));
        let mean = |at: usize| {
            let (y, x, c) = (at / 3 / 48, at / 3 % 48, at % 3);
            let all = (0..16).map(|k| large[((4 * y + k / 4) * 192 + 4 * x + k % 4) * 3 + c] as f64);
            all.sum::<f64>() / 16.0
        };
        let apart = small.iter().enumerate().map(|(at, &x)| (x as f64 - mean(at)).abs()).sum::<f64>() / small.len() as f64;
        // Hard edges are where a mean of points and one point differ.
        assert!(apart < 4.0, "image {i}: {apart} of 255 apart");
    }
}

#[test]
fn every_knob_turns_something_and_the_label_stays() {
    let usual = Glyphs::open(true).unwrap();
    let knobs: [Knob; 9] = [
        ("position", |c| c.position = 0.3),
        ("rotation", |c| c.rotation = 3.0),
        ("radius", |c| c.radius = [0.3, 0.5]),
        ("no bar", |c| c.bars = 0),
        ("two bars", |c| c.bars = 2),
        ("small", |c| c.small = false),
        ("noise", |c| c.noise = 0.0),
        ("wave", |c| c.wave = 0.0),
        ("seed", |c| c.seed = 2),
    ];
    for (name, knob) in knobs {
        let other = glyphs(knob);
        let apart = (0..10).filter(|&i| pixels(&usual, i) != pixels(&other, i)).count();
        assert!(apart >= 9, "{name}: {apart} of 10 pictures differ");
        let same = (0..50).filter(|&i| usual.label(i) == other.label(i)).count();
        assert!(if name == "seed" { same < 15 } else { same == 50 }, "{name}: {same} of 50 labels are the same");
    }
}

/// Normalised images [n, C S S] and their labels.
fn images(glyphs: &Glyphs, n: usize) -> (Tensor, Vec<u32>) {
    let (size, channels) = (glyphs.config().size, glyphs.config().channels);
    let bytes: Vec<u8> = (0..n).into_par_iter().flat_map_iter(|i| pixels(glyphs, i)).collect();
    let bytes = Tensor::from_slice(&[n, size, size, channels], &bytes).unwrap();
    let levels = augment::levels(&vec![MEAN; channels], &vec![STD; channels], &Device::Cpu).unwrap();
    let mut images = Tensor::empty(&[n, channels, size, size], Dtype::F32).unwrap();
    augment::prepare(&bytes, &levels, &Augment::default(), &mut images).unwrap();
    (images.reshape(&[n, channels * size * size]).unwrap(), (0..n).map(|i| glyphs.label(i)).collect())
}

/// Each feature less its mean and over its deviation, those of `of` [n, K].
fn standardise(images: &Tensor, of: &Tensor) -> Tensor {
    let (k, n) = (of.last(), of.rows() as f64);
    let (mut mean, mut square) = (vec![0f64; k], vec![0f64; k]);
    for row in of.data::<f32>().chunks_exact(k) {
        for ((x, mean), square) in row.iter().zip(&mut mean).zip(&mut square) {
            (*mean, *square) = (*mean + *x as f64 / n, *square + (*x as f64).powi(2) / n);
        }
    }
    let scale: Vec<f64> = mean.iter().zip(&square).map(|(mean, square)| (square - mean * mean + 1e-6).sqrt()).collect();
    let rows = images.data::<f32>().chunks_exact(k);
    let all: Vec<f32> = rows.flat_map(|row| row.iter().zip(&mean).zip(&scale).map(|((x, m), s)| ((*x as f64 - m) / s) as f32)).collect();
    Tensor::from_slice(images.shape(), &all).unwrap()
}

/// Accuracy on the first `test` test images of a softmax regression on the pixels of the first `train` of the pool: full-batch AdamW, cosine to 0.
fn softmax_regression(train: usize, test: usize, steps: usize) -> f64 {
    let (raw, labels) = images(&Glyphs::open(true).unwrap(), train);
    let (raw_test, test_labels) = images(&Glyphs::open(false).unwrap(), test);
    let (x, x_test) = (standardise(&raw, &raw), standardise(&raw_test, &raw));
    let mut builder = ParamsBuilder::default();
    let w = builder.add("w", &[20, x.last()], Init::Constant(0.0)).unwrap();
    let b = builder.add("b", &[20], Init::Constant(0.0)).unwrap();
    let mut params = builder.build(Dtype::F32, &Rng::new(0)).unwrap();
    let mut adamw = AdamW::new(groups::by_decay(&params, 1e-4, &[]), (0.9, 0.999), 1e-8).unwrap();
    for step in 0..steps {
        let tape = Tape::new();
        let logits = Var::constant(x.clone()).linear(&params.var(&tape, w), Some(&params.var(&tape, b))).unwrap();
        let loss = logits.cross_entropy(&labels, 0.0).unwrap();
        tape.backward(&loss, &mut [&mut params]).unwrap();
        let rate = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
        adamw.step(&mut params, 1e-2 * rate).unwrap();
        params.clear_gradients();
    }
    let tape = Tape::off();
    let logits = Var::constant(x_test).linear(&params.var(&tape, w), Some(&params.var(&tape, b))).unwrap();
    let best = |row: &[f32]| (0..20).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
    let right = logits.value().data::<f32>().chunks_exact(20).zip(&test_labels).filter(|(row, label)| best(row) == **label).count();
    right as f64 / test as f64
}

#[test]
fn raw_pixels_tell_little_of_the_class() {
    // 20 classes: chance is 0.05, with a deviation of 0.005 over so many images.
    let accuracy = softmax_regression(1000, 2000, 60);
    println!("softmax regression on raw pixels: {accuracy}");
    assert!((0.065..0.20).contains(&accuracy), "{accuracy}");
}
