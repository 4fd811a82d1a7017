//! The ops whose work does not depend on how many tokens are kept: once a model, and once altogether for the parts of other networks.

use super::bench::{Bench, Work, shuffled};
use super::tokens::{DECODER_HEADS, DECODER_WIDTH, SIDE, Sizes, attention};
use crate::data::augment::{self, Augment, Mix};
use crate::data::resize::{IMAGENET_MEAN, IMAGENET_STD};
use crate::error::Result;
use crate::masking::{self, Arrangement, Keys};
use crate::ops::depthwise;
use crate::ops::distill_kl::Reduction;
use crate::ops::regions::{self, Layout, Regions, Seen};
use crate::rng::Rng;
use crate::tape::Var;
use crate::targets::{hog, pixels};
use crate::tensor::{Dtype, Tensor};

const CLASSES: usize = 1000;

pub fn of_a_model(s: &Sizes) -> Result<Vec<Bench>> {
    let head = [DECODER_HEADS, DECODER_WIDTH / DECODER_HEADS];
    let decoder = attention(s.images, s.precision, 1 + s.patches, head, None, false)?.particular("decoder");
    Ok([vec![decoder], classifiers(s)?, inputs(s)?].into_iter().flatten().collect())
}

/// Logits, and the norm of a linear probe.
fn classifiers(s: &Sizes) -> Result<Vec<Bench>> {
    let (b, c) = (s.images, s.width);
    let (shape, n) = ([b, CLASSES], b * CLASSES);
    let new = |op, run: fn(&[Var]) -> Result<Var>| Bench::new(op, b, &[("classes", CLASSES)], run).activation(&shape);
    let soft = Rng::new(0).uniform("targets", CLASSES)?;
    let sum: f32 = soft.iter().sum();
    let soft: Vec<f32> = soft.into_iter().map(|x| x / sum).collect();
    // A batch of one has no statistics, and one of two nothing but signs.
    let many = b.max(8);
    Ok(vec![
        Bench::new("batchnorm", many, &[("c", c)], |x| Ok(x[0].batchnorm(1e-6)?.0))
            .activation(&[many, c])
            .different_images()
            .forward(Work::moves(2 * many * c, 2 * c))
            .backward(Work::moves(3 * many * c, 2 * c)),
        new("cross_entropy", |x| x[0].cross_entropy_at(x[1].value(), 0.1))
            .exact(&[b], Dtype::U32, Some(vec![7.0]))
            .loss(Work::moves(2 * n, b)),
        new("cross_entropy_soft", |x| x[0].cross_entropy_soft(x[1].value()))
            .exact(&shape, Dtype::F32, Some(soft.clone()))
            .loss(Work::moves(2 * n, n)),
        new("bce", |x| x[0].bce(x[1].value(), false)).exact(&shape, Dtype::F32, Some(soft)).loss(Work::moves(2 * n, n)),
        new("distill_kl", |x| x[0].distill_kl(x[1].value(), 2.0, Reduction::Batch)).features(&shape).loss(Work::moves(3 * n, 0)),
    ])
}

/// Masks, targets, and bytes that become images.
fn inputs(s: &Sizes) -> Result<Vec<Bench>> {
    let (b, l, h) = (s.images, s.patches, s.heads);
    let (kept, patch, precision) = (l / 4, s.patch, s.precision);
    let n = b * 3 * SIDE * SIDE;
    let bytes: Vec<f32> = Rng::new(0).uniform("bytes", 3 * SIDE * SIDE)?.into_iter().map(|x| (256.0 * x).floor()).collect();
    let mix = if b.is_multiple_of(2) { Mix::Mixup(0.7) } else { Mix::None };
    let constant = |x: Tensor| Ok(Var::constant(x));
    Ok(vec![
        Bench::new("random_mask", b, &[("l", l), ("k", kept)], move |x| constant(masking::random(x[0].value(), kept)?.restore))
            .exact(&[b, l], Dtype::F32, Some(Rng::new(0).uniform("noise", l)?))
            .all_versions(&masking::VERSIONS)
            .forward(Work::moves(0, 4 * b * l + b * kept)),
        Bench::new("most_attended", b, &[("heads", h), ("l", l), ("k", kept)], move |x| {
            constant(masking::most_attended(x[0].value(), 1, kept, Keys::All, Arrangement::Falling)?.kept)
        })
        .exact(&[b, h, 1 + l], Dtype::F32, Some(Rng::new(0).uniform("probabilities", h * (1 + l))?))
        .forward(Work::moves(0, b * h * (1 + l) + b * l + b * kept)),
        Bench::new("pixel_targets", b, &[("side", SIDE), ("patch", patch)], move |x| {
            constant(pixels::targets(x[0].value(), patch, Some(pixels::EPS))?)
        })
        .exact(&[b, 3, SIDE, SIDE], Dtype::F32, None)
        .forward(Work::moves(0, 2 * n)),
        Bench::new("hog", b, &[("side", SIDE)], move |x| constant(hog::target(x[0].value(), &hog::Options::dmjd())?))
            .exact(&[b, SIDE, SIDE, 3], Dtype::U8, Some(bytes.clone()))
            .forward(Work::moves(0, n * 9 / 64).and_bytes(n)),
        Bench::new("augment", b, &[("side", SIDE)], move |x| {
            let bytes = x[0].value();
            let dtype = if bytes.gpu().is_some() { precision } else { Dtype::F32 };
            let mut images = bytes.alike(&[b, 3, SIDE, SIDE], dtype)?;
            augment::prepare(bytes, x[1].value(), &Augment { erase: None, mix }, &mut images)?;
            constant(images)
        })
        .exact(&[b, SIDE, SIDE, 3], Dtype::U8, Some(bytes))
        .exact(&[2, 3], Dtype::F32, Some([IMAGENET_MEAN, IMAGENET_STD].concat()))
        .forward(Work::moves(n, 0).and_bytes(n)),
    ])
}

/// CaiT-S24's heads that talk to each other, on 196 patches.
pub fn cait(b: usize) -> Vec<Bench> {
    let (n, h, d) = (196, 8, 48);
    let (tokens, scores, c) = (b * n * h * d, b * h * n * n, h * d);
    let of = [("n", n), ("heads", h), ("d", d)];
    vec![
        Bench::new("take_heads", b, &of, move |x| x[0].take_heads(0, 3, h))
            .activation(&[b, n, 3 * c])
            .forward(Work::moves(2 * tokens, 0))
            .backward(Work::moves(4 * tokens, 0)),
        Bench::new("merge_heads", b, &of, |x| x[0].merge_heads())
            .activation(&[b, h, n, d])
            .forward(Work::moves(2 * tokens, 0))
            .backward(Work::moves(2 * tokens, 0)),
        Bench::new("bmm_nt", b, &of, |x| x[0].bmm_nt(&x[1]))
            .activation(&[b, h, n, d])
            .activation(&[b, h, n, d])
            .forward(Work::moves(2 * tokens + scores, 0).flops(2 * scores * d))
            .backward(Work::moves(4 * tokens + scores, 0).flops(4 * scores * d)),
        Bench::new("bmm", b, &of, |x| x[0].bmm(&x[1]))
            .activation(&[b, h, n, n])
            .activation(&[b, h, n, d])
            .forward(Work::moves(2 * tokens + scores, 0).flops(2 * scores * d))
            .backward(Work::moves(3 * tokens + 2 * scores, 0).flops(4 * scores * d)),
        Bench::new("mix_heads", b, &[("n", n), ("heads", h)], |x| x[0].mix_heads(&x[1], &x[2]))
            .activation(&[b, h, n, n])
            .vector(&[h, h])
            .vector(&[h])
            .forward(Work::moves(2 * scores, h * h + h))
            .backward(Work::moves(3 * scores, 2 * h * h + h)),
    ]
}

/// ConvMAE-B's convolutional stages.
pub fn convmae(b: usize) -> Result<Vec<Bench>> {
    let stages = [(56, 256), (28, 384)];
    let by_regions =
        stages.iter().flat_map(|&(side, c)| [49, REGIONS[0] * REGIONS[1]].map(|kept| region_conv(b, side / REGIONS[0], c, kept)));
    let by_regions = by_regions.collect::<Result<Vec<_>>>()?;
    let depthwise = stages.map(|(side, c)| {
        let n = b * c * side * side;
        Bench::new("depthwise", b, &[("c", c), ("side", side), ("kernel", 5)], |x| x[0].depthwise(&x[1], Some(&x[2]), None))
            .activation(&[b, c, side, side])
            .vector(&[c, 1, 5, 5])
            .vector(&[c])
            .all_versions(&depthwise::VERSIONS)
            .forward(Work::moves(2 * n, 26 * c))
            .backward(Work::moves(3 * n, 51 * c))
    });
    let [(side, c), (_, out)] = stages;
    let (x, y, w) = (b * c * side * side, b * out * (side / 2) * (side / 2), out * c * 4);
    let between =
        Bench::new("conv2d", b, &[("in", c), ("side", side), ("out", out), ("kernel", 2)], |x| x[0].conv2d(&x[1], Some(&x[2]), 2, 0))
            .activation(&[b, c, side, side])
            .weight(&[out, c, 2, 2])
            .vector(&[out])
            .forward(Work::moves(x + y + w, out).flops(2 * y * c * 4))
            .backward(Work::moves(2 * x + y + w, w + out).flops(4 * y * c * 4));
    Ok(depthwise.into_iter().chain(by_regions).chain([between]).collect())
}

/// Patches of the last stage, each a region of the stages before.
const REGIONS: [usize; 2] = [14, 14];

/// A stage's filter over so many of its regions of `side` x `side` tokens.
fn region_conv(b: usize, side: usize, c: usize, kept: usize) -> Result<Bench> {
    let (all, layout) = (REGIONS[0] * REGIONS[1], Layout { side, cell: 2 });
    let order = shuffled(all)?;
    let mut places = vec![0.0; all];
    order.iter().enumerate().for_each(|(place, &region)| places[region as usize] = place as f32);
    let run = move |x: &[Var]| {
        let [kept, places] = [&x[3], &x[4]].map(|ids| ids.value().clone());
        let seen = if kept.last() == all { Seen::All } else { Seen::Only { kept, places } };
        x[0].region_conv(&x[1], Some(&x[2]), &Regions { grid: REGIONS, layout, seen })
    };
    let tokens = kept * layout.tokens();
    let n = b * tokens * c;
    let bench = Bench::new("region_conv", b, &[("k", kept), ("l", all), ("region", side), ("c", c), ("kernel", 5)], run)
        .activation(&[b, tokens, c])
        .vector(&[c, 1, 5, 5])
        .vector(&[c])
        .exact(&[b, kept], Dtype::U32, Some(order[..kept].to_vec()))
        .exact(&[b, all], Dtype::U32, Some(places));
    let forward = Work::moves(2 * n, 26 * c);
    Ok(bench.all_versions(&regions::VERSIONS).forward(forward).backward(Work::moves(3 * n, 51 * c)))
}
