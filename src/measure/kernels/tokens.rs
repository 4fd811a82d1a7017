//! The ops whose work depends on how many tokens are kept, at the shapes of one model.

use super::bench::{Bench, Work, shuffled};
use crate::error::Result;
use crate::nn::presets;
use crate::ops::attention::{self, Request};
use crate::ops::feature_loss::Distance;
use crate::ops::relation_kl::{self, Relation};
use crate::ops::scale::Branch;
use crate::ops::{gather, layernorm, pixel_loss, softmax};
use crate::tape::Var;
use crate::targets::pixels;
use crate::tensor::Dtype;

/// The sizes of a model, and what is run of it.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub images: usize,
    pub precision: Dtype,
    pub width: usize,
    pub heads: usize,
    pub patch: usize,
    /// Patches of an image.
    pub patches: usize,
    /// Those that are kept.
    pub kept: usize,
}

/// Side of the images.
pub const SIDE: usize = 224;
/// MAE's decoder.
pub const DECODER_WIDTH: usize = 512;
pub const DECODER_HEADS: usize = 16;

impl Sizes {
    pub fn of(model: &str, percent: usize, images: usize, precision: Dtype) -> Result<Self> {
        let config = presets::mae(model, SIDE)?;
        let patches = config.patches();
        let kept = (patches * percent / 100).max(1);
        Ok(Self { images, precision, width: config.width, heads: config.heads, patch: config.patch, patches, kept })
    }

    /// Kept patches and the class token.
    fn tokens(&self) -> usize {
        self.kept + 1
    }
}

pub fn benches(s: &Sizes) -> Result<Vec<Bench>> {
    Ok([products(s), rows(s), attentions(s)?, moves(s)?, losses(s)?].into_iter().flatten().collect())
}

/// A linear layer of R rows, from k to n numbers.
fn linear(s: &Sizes, layer: &str, k: usize, n: usize, gelu: bool) -> Bench {
    let (b, tokens) = (s.images, s.tokens());
    let r = b * tokens;
    let op = if gelu { "linear_gelu" } else { "linear" };
    // With GELU the forward also leaves what the backward needs of x W^T.
    let saved = if gelu { r * n } else { 0 };
    let bench = Bench::new(op, b, &[("n", tokens), ("in", k), ("out", n)], move |x| match gelu {
        true => x[0].linear_gelu(&x[1], Some(&x[2])),
        false => x[0].linear(&x[1], Some(&x[2])),
    });
    let bench = bench.particular(layer).activation(&[b, tokens, k]).weight(&[n, k]).weight(&[n]);
    let forward = Work::moves(r * k + n * k + n + r * n + saved, 0).flops(2 * r * k * n);
    bench.forward(forward).backward(Work::moves(r * n + saved + 2 * r * k + n * k, n * k + n).flops(4 * r * k * n))
}

fn products(s: &Sizes) -> Vec<Bench> {
    let c = s.width;
    vec![
        linear(s, "qkv", c, 3 * c, false),
        linear(s, "proj", c, c, false),
        linear(s, "fc1", c, 4 * c, true),
        linear(s, "fc2", 4 * c, c, false),
    ]
}

/// What moves rows of a width through a formula.
fn rows(s: &Sizes) -> Vec<Bench> {
    let (b, n, c, h) = (s.images, s.tokens(), s.width, s.heads);
    let (r, shape, hidden) = (b * n, [b, n, c], [b, n, 4 * c]);
    let rc = r * c;
    let new = |op, run: fn(&[Var]) -> Result<Var>| Bench::new(op, b, &[("n", n), ("c", c)], run).activation(&shape);
    vec![
        Bench::new("gelu", b, &[("n", n), ("c", 4 * c)], |x| x[0].gelu())
            .activation(&hidden)
            .forward(Work::moves(8 * rc, 0))
            .backward(Work::moves(12 * rc, 0)),
        new("add", |x| x[0].add(&x[1])).activation(&shape).forward(Work::moves(3 * rc, 0)),
        new("layernorm", |x| x[0].layernorm(&x[1], &x[2], 1e-6))
            .vector(&[c])
            .vector(&[c])
            .all_versions(&layernorm::VERSIONS)
            .forward(Work::moves(2 * rc, 2 * r + 2 * c))
            .backward(Work::moves(3 * rc, 2 * r + 3 * c)),
        new("add_layernorm", |x| {
            let branch = Branch { value: x[1].clone(), gains: None, drop: None };
            let (sum, y) = x[0].add_layernorm(&branch, &x[2], &x[3], 1e-6)?;
            both(&y, &sum, &x[4])
        })
        .activation(&shape)
        .vector(&[c])
        .vector(&[c])
        .features(&shape)
        .all_versions(&layernorm::VERSIONS)
        .forward(Work::moves(4 * rc, 2 * r + 2 * c))
        .backward(Work::moves(4 * rc, 2 * r + 3 * c)),
        new("add_branch", |x| {
            let drop = Some((x[3].value().clone(), 0.1));
            x[0].add_branch(&Branch { value: x[1].clone(), gains: Some(x[2].clone()), drop })
        })
        .activation(&shape)
        .vector(&[c])
        .exact(&[b], Dtype::F32, Some(vec![0.7]))
        .forward(Work::moves(3 * rc, c + b))
        .backward(Work::moves(3 * rc, 2 * c + b)),
        new("scale", |x| x[0].scale(0.5)).forward(Work::moves(2 * rc, 0)).backward(Work::moves(2 * rc, 0)),
        new("scale_channels", |x| x[0].scale_channels(&x[1]))
            .vector(&[c])
            .forward(Work::moves(2 * rc, c))
            .backward(Work::moves(3 * rc, 2 * c)),
        new("drop_path", |x| x[0].drop_path(x[1].value(), 0.1))
            .exact(&[b], Dtype::F32, Some(vec![0.7]))
            .forward(Work::moves(2 * rc, b))
            .backward(Work::moves(2 * rc, b)),
        new("l2_normalise", |x| x[0].l2_normalise(1e-12)).forward(Work::moves(2 * rc, r)).backward(Work::moves(3 * rc, r)),
        Bench::new("softmax", b, &[("heads", h), ("n", n), ("c", n)], |x| x[0].softmax())
            .activation(&[b, h, n, n])
            .all_versions(&softmax::VERSIONS)
            .forward(Work::moves(2 * b * h * n * n, 0))
            .backward(Work::moves(3 * b * h * n * n, 0)),
    ]
}

/// y, where the gradient `base` comes to the sum that y was made of from elsewhere.
fn both(y: &Var, sum: &Var, base: &Var) -> Result<Var> {
    let base = base.value().clone();
    Var::record("both", [y, sum], y.value().clone(), move |dy, _| Ok([Some(dy), Some(base)]))
}

/// Attention of n tokens, `keys` of which serve as keys.
pub fn attention(
    images: usize,
    precision: Dtype,
    n: usize,
    [heads, d]: [usize; 2],
    keys: Option<usize>,
    class_rows: bool,
) -> Result<Bench> {
    let c = heads * d;
    let bench = Bench::new("attention", images, &[("n", n), ("heads", heads), ("d", d)], move |x| {
        let request = Request { keys: x.get(1).map(|keys| keys.value().clone()), class_rows };
        Ok(x[0].attention_with(heads, &request)?.0)
    });
    let bench = bench.activation(&[images, n, 3 * c]);
    let bench = match precision {
        Dtype::F32 => bench.only_versions(&attention::VERSIONS, &["v1"]),
        _ if n > attention::MOST_RESIDENT => bench.only_versions(&attention::VERSIONS, &["v1", "long"]),
        _ if matches!(d, 16 | 32) => bench.all_versions(&attention::VERSIONS),
        _ if d == 64 => bench.all_versions(&attention::VERSIONS).forward_only("v3"),
        _ => bench.only_versions(&attention::VERSIONS, &["v1", "v2", "long"]),
    };
    let k = keys.unwrap_or(n);
    let (queries, read, scores) = (images * n * c, images * k * c, images * heads * n * k * d);
    let ids = keys.map_or(0, |keys| images * keys);
    let class = if class_rows { images * heads * k } else { 0 };
    let forward = Work::moves(2 * queries + 2 * read, ids + class + if class_rows { 0 } else { images * heads * n }).flops(4 * scores);
    let backward = Work::moves(6 * queries + 2 * read, ids + images * heads * n).flops(10 * scores);
    let bench = match keys {
        Some(keys) => bench.exact(&[images, keys], Dtype::U32, Some(shuffled(n)?[..keys].to_vec())).size("keys", keys),
        None => bench,
    };
    // A teacher is asked for the class token's row, and has no backward.
    let bench = if class_rows { bench.particular("class rows") } else { bench.backward(backward) };
    Ok(bench.forward(forward))
}

fn attentions(s: &Sizes) -> Result<Vec<Bench>> {
    let (n, head) = (s.tokens(), [s.heads, s.width / s.heads]);
    let of = |keys, class_rows| attention(s.images, s.precision, n, head, keys, class_rows);
    Ok(vec![of(None, false)?, of(None, true)?, of(Some(n.div_ceil(2)), false)?])
}

/// What chooses tokens, puts them in place and adds their positions.
fn moves(s: &Sizes) -> Result<Vec<Bench>> {
    let (b, n, c, k, l, d) = (s.images, s.tokens(), s.width, s.kept, s.patches, DECODER_WIDTH);
    let (p, patch) = (3 * s.patch * s.patch, s.patch);
    let ids = shuffled(l)?;
    let kept = || Some(ids[..k].to_vec());
    let (front, all) = (b * n * c, b * l * c);
    let shown = |size: usize| [("l", l), ("k", k), ("c", size)];
    let images = [b, 3, SIDE, SIDE];
    let precision = s.precision;
    let (unshuffled, shuffled) = (b * (1 + l) * d, b * (1 + k) * d);
    let unshuffle = Work::moves(unshuffled + shuffled, b * l + d);
    Ok(vec![
        Bench::new("gather", b, &shown(c), |x| x[0].gather(x[1].value()))
            .activation(&[b, l, c])
            .exact(&[b, k], Dtype::U32, kept())
            .all_versions(&gather::VERSIONS)
            .forward(Work::moves(2 * b * k * c, b * k))
            .backward(Work::moves(b * k * c + all, b * k)),
        Bench::new("gather_patches", b, &shown(p), move |x| {
            let dtype = if x[0].value().gpu().is_some() { precision } else { Dtype::F32 };
            Ok(Var::constant(gather::gather_patches(x[0].value(), (patch, patch), Some(x[1].value()), dtype)?))
        })
        .exact(&images, Dtype::F32, None)
        .exact(&[b, k], Dtype::U32, kept())
        .all_versions(&gather::VERSIONS)
        .forward(Work::moves(b * k * p, b * k * p + b * k)),
        Bench::new("unshuffle", b, &shown(d), |x| x[0].unshuffle(&x[1], x[2].value(), 1))
            .activation(&[b, 1 + k, d])
            .vector(&[1, 1, d])
            .exact(&[b, l], Dtype::U32, Some(ids.clone()))
            .forward(unshuffle)
            .backward(unshuffle),
        Bench::new("unshuffle_with_positions", b, &shown(d), |x| x[0].unshuffle_with_positions(&x[1], x[2].value(), 1, &x[3]))
            .activation(&[b, 1 + k, d])
            .vector(&[1, 1, d])
            .exact(&[b, l], Dtype::U32, Some(ids.clone()))
            .table(&[1, 1 + l, d])
            .forward(Work::moves(unshuffled + shuffled, b * l + d + (1 + l) * d))
            .backward(unshuffle),
        Bench::new("prepend", b, &[("n", n), ("c", c)], |x| x[0].prepend(&[&x[1]]))
            .activation(&[b, k, c])
            .vector(&[1, 1, c])
            .forward(Work::moves(b * k * c + front, c))
            .backward(Work::moves(b * k * c + front, c)),
        Bench::new("prepend_with_positions", b, &shown(c), |x| x[0].prepend_with_positions(&[&x[1]], &x[3], Some(x[2].value())))
            .activation(&[b, k, c])
            .vector(&[1, 1, c])
            .exact(&[b, k], Dtype::U32, kept())
            .table(&[1, 1 + l, c])
            .forward(Work::moves(b * k * c + front, c + b * k + (1 + l) * c))
            .backward(Work::moves(b * k * c + front, c)),
        Bench::new("add_positions", b, &[("n", n), ("c", c)], |x| x[0].add_positions(&x[1], 1, None))
            .activation(&[b, n, c])
            .vector(&[1, n, c])
            .forward(Work::moves(2 * front, n * c))
            .backward(Work::moves(front, n * c)),
        Bench::new("tokens", b, &[("n", n), ("c", c)], move |x| x[0].tokens(1..n))
            .activation(&[b, n, c])
            .forward(Work::moves(2 * b * k * c, 0))
            .backward(Work::moves(b * k * c + front, 0)),
        Bench::new("mean_tokens", b, &[("n", n), ("c", c)], |x| x[0].mean_tokens(1))
            .activation(&[b, n, c])
            .forward(Work::moves(b * k * c + b * c, 0))
            .backward(Work::moves(b * c + front, 0)),
    ])
}

fn losses(s: &Sizes) -> Result<Vec<Bench>> {
    let (b, n, c, k, l) = (s.images, s.tokens(), s.width, s.kept, s.patches);
    let (p, patch) = (3 * s.patch * s.patch, s.patch);
    let shape = [b, n, c];
    let mut all = vec![
        Bench::new("feature_loss", b, &[("n", n), ("c", c)], |x| x[0].feature_loss(x[1].value(), Distance::SmoothL1 { beta: 2.0 }))
            .activation(&shape)
            .features(&shape)
            .loss(Work::moves(3 * b * n * c, 0)),
        relation(s),
    ];
    if k < l {
        let hidden: Vec<f32> = shuffled(l)?.into_iter().map(|place| if (place as usize) < k { 0.0 } else { 1.0 }).collect();
        let work = Work::moves(b * (l - k) * p + b * l * p, b * (l - k) * p + b * l);
        let shown = [("l", l), ("k", k), ("p", p)];
        let (versions, images): (&[&str], _) = (if patch == 16 { pixel_loss::VERSIONS.all } else { &["v1"] }, [b, 3, SIDE, SIDE]);
        all.push(
            Bench::new("masked_mse", b, &shown, |x| x[0].masked_mse(x[1].value(), x[2].value()))
                .activation(&[b, l, p])
                .exact(&[b, l, p], Dtype::F32, None)
                .exact(&[b, l], Dtype::F32, Some(hidden.clone()))
                .loss(work),
        );
        all.push(
            Bench::new("pixel_loss", b, &shown, move |x| x[0].pixel_loss(x[1].value(), patch, Some(pixels::EPS), x[2].value()))
                .activation(&[b, l, p])
                .exact(&images, Dtype::F32, None)
                .exact(&[b, l], Dtype::F32, Some(hidden))
                .only_versions(&pixel_loss::VERSIONS, versions)
                .loss(work),
        );
    }
    Ok(all)
}

/// TinyMIM's relations, q-k and v-v, with the heads of the next larger teacher.
fn relation(s: &Sizes) -> Bench {
    let (heads, dt) = match s.width {
        192 | 384 => (12, 64),
        1280 => (16, 80),
        _ => (16, 64),
    };
    let (b, n, ds) = (s.images, s.tokens(), s.width / heads);
    let bench = Bench::new("relation_kl", b, &[("n", n), ("heads", heads), ("student", ds), ("teacher", dt)], move |x| {
        Ok(x[0].relation_kl(x[1].value(), heads, &[Relation::Qk, Relation::Vv])?.0)
    });
    let resident = s.precision == Dtype::Bf16 && dt <= 64;
    let versions: &[&str] = if resident { relation_kl::VERSIONS.all } else { &["v1"] };
    let rows = b * n * heads;
    bench
        .activation(&[b, n, 3 * s.width])
        .features(&[b, n, 3 * heads * dt])
        .only_versions(&relation_kl::VERSIONS, versions)
        .loss(Work::moves(rows * (6 * ds + 3 * dt), 0).flops(2 * rows * n * (5 * ds + 2 * dt)))
}
