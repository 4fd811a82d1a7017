//! The definition: each head of each image by itself, its N x N scores in scratch memory.

use super::{Done, Sizes};
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::parallel::Panel;
use crate::device::simd::{Real, largest, sum_of, sum_of2};
use crate::error::Result;
use crate::tensor::{Element, Tensor};
use crate::vectorised;
use rayon::prelude::*;

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

pub(super) fn forward<T: Product + Element>(qkv: &Tensor, keys: Option<&Tensor>, s: &Sizes, class_rows: bool) -> Result<Done> {
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
    Ok(Done { y, saved: Some(saved), class_rows: rows })
}

pub(super) fn backward<T: Product + Element>(
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
