//! Multi-head self-attention on packed queries, keys and values.
//!
//!   S = scale q k^T,   P = softmax(S),   y = P v                                        scale = D^-1/2
//!   dP = dy v^T,   dS = P (dP - rows(P dP)),   dq = scale dS k,   dk = scale dS^T q,   dv = P^T dy
//!
//! qkv [B, N, 3 C], a token's numbers lying as [q | k | v], each head-major: H heads of width D = C / H. y [B, N, C]. Each (image, head) is worked
//! on alone; the N x N scores live in scratch memory and are recomputed in the backward. Saved: qkv, and of each row of S its largest
//! number and one over the sum of its exponentials [B, H, N, 2], so that the backward finds the very same P.
//!
//! Two requests: only some keys (`keys`, [B, K] token numbers, distinct in a row) take part; the first query's row of P is handed out.

use super::case::Case;
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::parallel::Panel;
use crate::device::simd::{Real, largest, sum_of, sum_of2};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

/// Widest head that is served.
pub const MOST_WIDTH: usize = 128;

/// What is asked of an attention beyond its output.
#[derive(Clone, Default)]
pub struct Request {
    /// The tokens that serve as keys and values, [B, K]; all of them if None.
    pub keys: Option<Tensor>,
    /// Whether the first query's probabilities are handed out.
    pub class_rows: bool,
}

impl Var {
    pub fn attention(&self, heads: usize) -> Result<Var> {
        Ok(self.attention_with(heads, &Request::default())?.0)
    }

    /// The output, and P[.., 0, ..] as [B, H, keys] if it was requested.
    pub fn attention_with(&self, heads: usize, request: &Request) -> Result<(Var, Option<Tensor>)> {
        let qkv = self.value().clone();
        let sizes = Sizes::of(&qkv, heads, request.keys.as_ref())?;
        let keys = request.keys.clone();
        let done = by_real!("attention", qkv.dtype(), forward(&qkv, keys.as_ref(), &sizes, request.class_rows))?;
        let saved = done.saved;
        let var = Var::record("attention", [self], done.y, move |dy, need| {
            let mut dqkv = need.out(0)?;
            by_real!("attention", qkv.dtype(), backward(&dy, &qkv, &saved, keys.as_ref(), &sizes, &mut dqkv))?;
            Ok([Some(dqkv)])
        })?;
        Ok((var, done.class_rows))
    }
}

struct Sizes {
    batch: usize,
    n: usize,
    heads: usize,
    width: usize,
    keys: usize,
}

impl Sizes {
    fn of(qkv: &Tensor, heads: usize, keys: Option<&Tensor>) -> Result<Self> {
        let &[batch, n, triple] = qkv.shape() else { crate::bail!("attention: qkv is {qkv:?} but [B, N, 3 C] is needed") };
        ensure!(
            heads > 0 && triple > 0 && triple.is_multiple_of(3 * heads) && n > 0,
            "attention: qkv is {qkv:?}, which does not split into q, k and v of {heads} heads"
        );
        let width = triple / 3 / heads;
        ensure!(width <= MOST_WIDTH, "attention: heads of width {width} are wider than {MOST_WIDTH}; use more heads");
        let Some(ids) = keys else { return Ok(Self { batch, n, heads, width, keys: n }) };
        let &[b, keys] = ids.shape() else { crate::bail!("attention: keys are {ids:?} but [B, K] is needed") };
        ensure!(b == batch && keys > 0 && ids.dtype() == Dtype::U32, "attention: keys are {ids:?} but qkv is {qkv:?}");
        for (image, row) in ids.data::<u32>().chunks_exact(keys).enumerate() {
            let mut seen = vec![false; n];
            let distinct = row.iter().all(|&id| (id as usize) < n && !std::mem::replace(&mut seen[id as usize], true));
            ensure!(distinct, "attention: the keys of image {image} name a token twice or one beyond the {n} there are");
        }
        Ok(Self { batch, n, heads, width, keys })
    }

    /// Elements of one image's qkv.
    fn image(&self) -> usize {
        self.n * 3 * self.channels()
    }

    fn channels(&self) -> usize {
        self.heads * self.width
    }
}

struct Done {
    y: Tensor,
    saved: Tensor,
    class_rows: Option<Tensor>,
}

/// One head of one image, as views into its qkv or into gathered copies of k and v.
struct Head<'a, T> {
    q: View<'a, T>,
    k: View<'a, T>,
    v: View<'a, T>,
}

/// k and v of one head at the chosen tokens, one behind the other.
fn gathered<T: Product + Element>(qkv: &[T], ids: &[u32], s: &Sizes, head: usize) -> Result<Tensor> {
    let mut both = Tensor::empty(&[2, ids.len(), s.width], T::DTYPE)?;
    let (k, v) = both.data_mut::<T>().split_at_mut(ids.len() * s.width);
    for (which, rows) in [(1, k), (2, v)] {
        let column = which * s.channels() + head * s.width;
        for (row, &id) in rows.chunks_exact_mut(s.width).zip(ids) {
            row.copy_from_slice(&qkv[id as usize * 3 * s.channels() + column..][..s.width]);
        }
    }
    Ok(both)
}

impl<'a, T: Product + Element> Head<'a, T> {
    fn new(qkv: &'a [T], gathered: Option<&'a Tensor>, s: &Sizes, head: usize) -> Self {
        let part = |which: usize| View::rows(&qkv[which * s.channels() + head * s.width..], 3 * s.channels());
        let Some(both) = gathered else { return Self { q: part(0), k: part(1), v: part(2) } };
        let (k, v) = both.data::<T>().split_at(s.keys * s.width);
        Self { q: part(0), k: View::rows(k, s.width), v: View::rows(v, s.width) }
    }
}

vectorised! {
    /// Rows of scores become rows of probabilities.
    fn softmax_rows<T: Real>(scores: &mut [T], columns: usize, scale: T, saved: &mut [T]) {
        for (row, saved) in scores.chunks_exact_mut(columns).zip(saved.chunks_exact_mut(2)) {
            let most = largest(row) * scale;
            row.iter_mut().for_each(|s| *s = s.mul_add(scale, -most).exp());
            let inverse = T::ONE / sum_of(row, |s| s);
            row.iter_mut().for_each(|s| *s *= inverse);
            (saved[0], saved[1]) = (most, inverse);
        }
    }
    fn probabilities<T: Real>(scores: &mut [T], columns: usize, scale: T, saved: &[T]) {
        for (row, saved) in scores.chunks_exact_mut(columns).zip(saved.chunks_exact(2)) {
            let (most, inverse) = (saved[0], saved[1]);
            row.iter_mut().for_each(|s| *s = s.mul_add(scale, -most).exp() * inverse);
        }
    }
    /// dP becomes scale dS = scale P (dP - rows(P dP)).
    fn score_gradients<T: Real>(dp: &mut [T], p: &[T], columns: usize, scale: T) {
        for (dp, p) in dp.chunks_exact_mut(columns).zip(p.chunks_exact(columns)) {
            let delta = sum_of2(p, dp, |p, dp| p * dp);
            dp.iter_mut().zip(p).for_each(|(dp, &p)| *dp = p * (*dp - delta) * scale);
        }
    }
}

fn ids_of(keys: Option<&Tensor>, image: usize, s: &Sizes) -> Option<Vec<u32>> {
    keys.map(|keys| keys.data::<u32>()[image * s.keys..][..s.keys].to_vec())
}

fn forward<T: Product + Element>(qkv: &Tensor, keys: Option<&Tensor>, s: &Sizes, class_rows: bool) -> Result<Done> {
    let scale = T::of(1.0 / (s.width as f64).sqrt());
    let mut y = Tensor::empty(&[s.batch, s.n, s.channels()], T::DTYPE)?;
    let mut saved = Tensor::empty(&[s.batch, s.heads, s.n, 2], T::DTYPE)?;
    let mut rows = if class_rows { Some(Tensor::empty(&[s.batch, s.heads, s.keys], T::DTYPE)?) } else { None };
    let data = qkv.data::<T>();
    let panels = Panel::split(y.data_mut::<T>(), s.n, s.channels(), s.width);
    let row_parts: Vec<Option<&mut [T]>> = match &mut rows {
        Some(rows) => rows.data_mut::<T>().chunks_exact_mut(s.keys).map(Some).collect(),
        None => (0..panels.len()).map(|_| None).collect(),
    };
    let pieces = panels.into_par_iter().zip(saved.data_mut::<T>().par_chunks_exact_mut(2 * s.n)).zip(row_parts);
    pieces.enumerate().try_for_each(|(i, ((mut y, saved), class_row))| {
        let (image, head) = (i / s.heads, i % s.heads);
        let qkv = &data[image * s.image()..][..s.image()];
        let both = ids_of(keys, image, s).map(|ids| gathered(qkv, &ids, s, head)).transpose()?;
        let h = Head::new(qkv, both.as_ref(), s, head);
        let mut scores = Tensor::empty(&[s.n, s.keys], T::DTYPE)?;
        let p = scores.data_mut::<T>();
        gemm::serial(&mut Panel::of(p, s.keys), s.width, h.q, h.k.transposed(), Finish::replace());
        softmax_rows(p, s.keys, scale, saved);
        gemm::serial(&mut y, s.keys, View::rows(p, s.keys), h.v, Finish::replace());
        if let Some(row) = class_row {
            row.copy_from_slice(&p[..s.keys]);
        }
        Ok(())
    })?;
    Ok(Done { y, saved, class_rows: rows })
}

fn backward<T: Product + Element>(
    dy: &Tensor,
    qkv: &Tensor,
    saved: &Tensor,
    keys: Option<&Tensor>,
    s: &Sizes,
    dqkv: &mut Tensor,
) -> Result<()> {
    let scale = T::of(1.0 / (s.width as f64).sqrt());
    let (dy, saved, data) = (dy.data::<T>(), saved.data::<T>(), qkv.data::<T>());
    // Panels come image by image, in each the q parts of all heads, then the k parts, then the v parts.
    let mut panels: Vec<Option<Panel<T>>> =
        Panel::split(dqkv.data_mut::<T>(), s.n, 3 * s.channels(), s.width).into_iter().map(Some).collect();
    let mut head_of = |i: usize, which: usize| {
        let (image, head) = (i / s.heads, i % s.heads);
        panels[(image * 3 + which) * s.heads + head].take().expect("each panel is taken once")
    };
    let heads: Vec<[Panel<T>; 3]> = (0..s.batch * s.heads).map(|i| [head_of(i, 0), head_of(i, 1), head_of(i, 2)]).collect();
    heads.into_par_iter().enumerate().try_for_each(|(i, [mut dq, mut dk, mut dv])| {
        let (image, head) = (i / s.heads, i % s.heads);
        let qkv = &data[image * s.image()..][..s.image()];
        let ids = ids_of(keys, image, s);
        let both = ids.as_ref().map(|ids| gathered(qkv, ids, s, head)).transpose()?;
        let h = Head::new(qkv, both.as_ref(), s, head);
        let rows = image * s.n * s.channels()..(image + 1) * s.n * s.channels();
        let dout = View::rows(&dy[rows][head * s.width..], s.channels());
        let mut scratch = Tensor::empty(&[2, s.n, s.keys], T::DTYPE)?;
        let (p, ds) = scratch.data_mut::<T>().split_at_mut(s.n * s.keys);
        gemm::serial(&mut Panel::of(p, s.keys), s.width, h.q, h.k.transposed(), Finish::replace());
        probabilities(p, s.keys, scale, &saved[2 * i * s.n..][..2 * s.n]);
        gemm::serial(&mut Panel::of(ds, s.keys), s.width, dout, h.v.transposed(), Finish::replace());
        score_gradients(ds, p, s.keys, scale);
        gemm::serial(&mut dq, s.keys, View::rows(ds, s.keys), h.k, Finish::replace());
        let (p, ds) = (View::rows(&*p, s.keys).transposed(), View::rows(&*ds, s.keys).transposed());
        let Some(ids) = ids else {
            gemm::serial(&mut dv, s.n, p, dout, Finish::replace());
            gemm::serial(&mut dk, s.n, ds, h.q, Finish::replace());
            return Ok(());
        };
        for (into, left, right) in [(&mut dv, p, dout), (&mut dk, ds, h.q)] {
            let mut part = Tensor::empty(&[s.keys, s.width], T::DTYPE)?;
            gemm::serial(&mut Panel::of(part.data_mut::<T>(), s.width), s.n, left, right, Finish::replace());
            (0..s.n).for_each(|token| into.row(token).fill(T::ZERO));
            part.data::<T>().chunks_exact(s.width).zip(&ids).for_each(|(row, &id)| into.row(id as usize).copy_from_slice(row));
        }
        Ok(())
    })
}

/// Mean over the heads of class rows [B, H, K] -> [B, K], head by head in order.
pub fn mean_over_heads(class_rows: &Tensor) -> Result<Tensor> {
    let &[batch, heads, keys] = class_rows.shape() else { crate::bail!("mean over heads: {class_rows:?} is not [B, H, K]") };
    let mut mean = Tensor::zeros(&[batch, keys], class_rows.dtype())?;
    fn add<T: Product + Element>(rows: &Tensor, mean: &mut Tensor, heads: usize, keys: usize) -> Result<()> {
        let scale = T::of(1.0 / heads as f64);
        for (mean, rows) in mean.data_mut::<T>().chunks_exact_mut(keys).zip(rows.data::<T>().chunks_exact(heads * keys)) {
            rows.chunks_exact(keys).for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, &p)| *mean += p));
            mean.iter_mut().for_each(|mean| *mean *= scale);
        }
        Ok(())
    }
    by_real!("mean over heads", class_rows.dtype(), add(class_rows, &mut mean, heads, keys))?;
    Ok(mean)
}

pub fn cases() -> Vec<Case> {
    let plain = |name: &str, b: usize, n: usize, heads: usize, width: usize| {
        Case::new(&format!("attention: {name}"), &[&[b, n, 3 * heads * width]], move |x| x[0].attention(heads))
    };
    let some_keys = Request { keys: Some(Tensor::from_slice(&[2, 3], &[4u32, 0, 2, 1, 3, 6]).expect("six numbers")), class_rows: true };
    vec![
        plain("2 images, 7 tokens, 3 heads of 5", 2, 7, 3, 5),
        plain("one token", 2, 1, 2, 8),
        plain("one image, one head of 37", 1, 9, 1, 37),
        plain("197 tokens, head of 16", 1, 197, 1, 16),
        plain("the widest head", 1, 5, 1, MOST_WIDTH),
        plain("saturated softmax", 1, 9, 2, 8).with(0, |i, x| if i % 48 < 32 { 6.0 * x } else { x }),
        Case::new("attention: some keys", &[&[2, 7, 24]], move |x| Ok(x[0].attention_with(2, &some_keys)?.0)),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::case::numbers;
    use super::*;

    #[test]
    fn all_keys_named_out_of_order_change_nothing() {
        let qkv = Tensor::from_slice(&[1, 4, 24], &numbers("attention", 0, &[96])).unwrap();
        let x = Var::constant(qkv);
        let request = Request { keys: Some(Tensor::from_slice(&[1, 4], &[2u32, 0, 3, 1]).unwrap()), class_rows: true };
        let (some, rows) = x.attention_with(2, &request).unwrap();
        let all = x.attention(2).unwrap();
        for (a, b) in some.value().to_f64().iter().zip(all.value().to_f64()) {
            approx::assert_relative_eq!(*a, b, max_relative = 1e-12);
        }
        let sum: f64 = mean_over_heads(&rows.unwrap()).unwrap().to_f64().iter().sum();
        approx::assert_relative_eq!(sum, 1.0, max_relative = 1e-12);
    }

    #[test]
    fn keys_that_repeat_or_lie_outside_are_refused() {
        let x = Var::constant(Tensor::zeros(&[1, 4, 24], Dtype::F32).unwrap());
        for ids in [[1u32, 1], [0, 4]] {
            let request = Request { keys: Some(Tensor::from_slice(&[1, 2], &ids).unwrap()), class_rows: false };
            assert!(x.attention_with(2, &request).is_err());
        }
    }
}
