//! The cases, and what bf16 kernels round.

use super::super::case::Case;
use super::{MOST_WIDTH, Request, Sizes};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::Tensor;
use half::bf16;

/// Attention in plain loops as the tensor-core kernels do it: P and dS are rounded to bf16 before they are multiplied, and dS is made with the rounded
/// output.
struct Rounding {
    s: Sizes,
    qkv: Vec<f64>,
    keys: Option<Vec<f64>>,
}

fn round(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

impl Rounding {
    /// Where a token's numbers of one head begin: in q, k or v (0, 1, 2).
    fn at(&self, image: usize, token: usize, which: usize, head: usize) -> usize {
        ((image * self.s.n + token) * 3 + which) * self.s.channels() + head * self.s.width
    }

    fn row(&self, image: usize, token: usize, which: usize, head: usize) -> &[f64] {
        &self.qkv[self.at(image, token, which, head)..][..self.s.width]
    }

    fn token(&self, image: usize, key: usize) -> usize {
        self.keys.as_ref().map_or(key, |keys| keys[image * self.s.keys + key] as usize)
    }

    fn scale(&self) -> f64 {
        1.0 / (self.s.width as f64).sqrt()
    }

    /// (token, probability) of each key for one query.
    fn probabilities(&self, image: usize, query: usize, head: usize) -> Vec<(usize, f64)> {
        let tokens = (0..self.s.keys).map(|key| self.token(image, key));
        let q = self.row(image, query, 0, head);
        let scores: Vec<(usize, f64)> = tokens.map(|token| (token, self.scale() * dot(q, self.row(image, token, 1, head)))).collect();
        let most = scores.iter().fold(f64::NEG_INFINITY, |most, (_, score)| most.max(*score));
        let sum: f64 = scores.iter().map(|(_, score)| (score - most).exp()).sum();
        scores.into_iter().map(|(token, score)| (token, (score - most).exp() / sum)).collect()
    }

    /// Each query of each head with where its row of y begins.
    fn queries(&self) -> Vec<(usize, usize, usize, usize)> {
        let place = |i: usize| {
            let (image, query, head) = (i / self.s.heads / self.s.n, i / self.s.heads % self.s.n, i % self.s.heads);
            (image, query, head, i * self.s.width)
        };
        (0..self.s.batch * self.s.n * self.s.heads).map(place).collect()
    }

    fn forward(&self) -> Vec<f64> {
        let mut y = vec![0.0; self.s.batch * self.s.n * self.s.channels()];
        for (image, query, head, at) in self.queries() {
            for (token, p) in self.probabilities(image, query, head) {
                add(&mut y[at..][..self.s.width], round(p), self.row(image, token, 2, head));
            }
        }
        y
    }

    fn backward(&self, y: &[f64], dy: &[f64]) -> Vec<f64> {
        let mut dqkv = vec![0.0; self.qkv.len()];
        for (image, query, head, at) in self.queries() {
            let (g, width) = (&dy[at..][..self.s.width], self.s.width);
            let delta: f64 = g.iter().zip(&y[at..]).map(|(g, &y)| g * round(y)).sum();
            for (token, p) in self.probabilities(image, query, head) {
                let ds = round(p * (dot(g, self.row(image, token, 2, head)) - delta)) * self.scale();
                add(&mut dqkv[self.at(image, query, 0, head)..][..width], ds, self.row(image, token, 1, head));
                add(&mut dqkv[self.at(image, token, 1, head)..][..width], ds, self.row(image, query, 0, head));
                add(&mut dqkv[self.at(image, token, 2, head)..][..width], round(p), g);
            }
        }
        dqkv
    }
}

pub(super) fn with_rounding(x: &Var, heads: usize, keys: Option<&Tensor>) -> Result<Var> {
    let (shape, dtype) = (x.shape().to_vec(), x.dtype());
    let rounding = Rounding { s: Sizes::of(x.value(), heads, keys)?, qkv: x.value().to_f64(), keys: keys.map(Tensor::to_f64) };
    let numbers = rounding.forward();
    let y = Tensor::from_slice(&[shape[0], shape[1], rounding.s.channels()], &numbers)?.cast(dtype)?;
    Var::record("rounded", [x], y, move |dy, _| {
        let dqkv = rounding.backward(&numbers, &dy.to_f64());
        Ok([Some(Tensor::from_slice(&shape, &dqkv)?.cast(dtype)?)])
    })
}

/// B images of N tokens, H heads of width D. `keys` tokens of each image serve as keys, or all of them.
fn case(name: &str, [batch, n, heads, width]: [usize; 4], keys: Option<usize>) -> Case {
    let list = keys.map(|keys| {
        // 11 is prime to every N here, so no token is named twice.
        let ids: Vec<u32> = (0..batch * keys).map(|i| ((i % keys * 11 + i / keys + 1) % n) as u32).collect();
        Tensor::from_slice(&[batch, keys], &ids).expect("as many numbers as places")
    });
    let request = Request { keys: list.clone(), class_rows: list.is_some() };
    let case =
        Case::new(&format!("attention: {name}"), &[&[batch, n, 3 * heads * width]], move |x| Ok(x[0].attention_with(heads, &request)?.0));
    case.rounded(move |x| with_rounding(&x[0], heads, list.as_ref()))
}

pub fn cases() -> Vec<Case> {
    // Whether a number of a packed row belongs to q, k or v: 0, 1, 2.
    let which = |i: usize, channels: usize| i / channels % 3;
    vec![
        case("2 images, 7 tokens, 3 heads of 5", [2, 7, 3, 5], None),
        case("one token", [2, 1, 2, 8], None),
        case("two tokens, 5 heads of 32", [1, 2, 5, 32], None),
        case("one image, one head of 37", [1, 9, 1, 37], None),
        case("17 tokens, 3 heads of 20 run as 32", [1, 17, 3, 20], None),
        case("50 tokens, 5 heads of 16", [1, 50, 5, 16], None),
        case("50 tokens, 2 heads of 64", [1, 50, 2, 64], None),
        case("65 tokens, 2 heads of 48", [1, 65, 2, 48], None),
        case("33 tokens, one head of 80", [1, 33, 1, 80], None),
        case("197 tokens, head of 16", [1, 197, 1, 16], None),
        case("the widest head", [1, 5, 1, MOST_WIDTH], None),
        case("20 tokens, 2 of the widest heads", [1, 20, 2, MOST_WIDTH], None),
        case("saturated softmax", [1, 9, 2, 8], None).with(0, move |i, x| if which(i, 16) < 2 { 6.0 * x } else { x }),
        // Every log-sum-exp is below -88, so that e^-lse overflows. Products of such numbers are exact in f32, or the scores could not be compared.
        case("every score far below zero", [1, 19, 1, 8], None).with(0, move |i, x| match which(i, 8) {
            0 => 6.0 + (4.0 * x).round() / 16.0,
            1 => -6.0 + (4.0 * x).round() / 16.0,
            _ => x,
        }),
        case("some keys", [2, 7, 2, 4], Some(3)),
        case("one key", [1, 5, 2, 16], Some(1)),
        case("19 of 40 keys, 3 heads of 20", [2, 40, 3, 20], Some(19)),
        case("140 of 150 keys", [1, 150, 1, 16], Some(140)),
    ]
}
