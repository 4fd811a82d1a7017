//! Convolutions of images, and the way between images and tokens.
//!
//!   conv2d     y[b, o, i, j] = sum_{c, u, v} w[o, c, u, v] x[b, c, s i + u - p, s j + v - p] + bias[o]        x is 0 outside
//!   depthwise  y[b, c, i, j] = sum_{u, v} w[c, 0, u, v] (m x)[b, c, i + u - k/2, j + v - k/2] + bias[c]       m [B, 1, H, W] or 1 everywhere
//!   to_tokens  [B, C, H, W] to [B, H W, C];   to_map  back
//!
//! Stride s, padding p; x [B, C, H, W], w [O, C, kh, kw] or [C, 1, k, k] with odd k, bias [O]. conv2d copies each image's windows into columns
//! and multiplies; its backward multiplies and adds the columns back. depthwise keeps 16 results in registers over all taps of a zero-padded
//! plane; its dx is the same with the kernel turned round, times m. Saved: x, w, m.

use super::case::Case;
use super::linear::column_sums;
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::parallel::Panel;
use crate::device::simd::{LANES, Real, lane_sum, multiply};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

impl Var {
    pub fn conv2d(&self, w: &Var, bias: Option<&Var>, stride: usize, padding: usize) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        let s = Sizes::of(&x, &weight, stride, padding)?;
        check_bias("conv2d", bias, &weight)?;
        let mut y = Tensor::empty(&[s.batch, s.out, s.oh, s.ow], x.dtype())?;
        by_real!("conv2d", x.dtype(), convolve(&x, &weight, bias.map(Var::value), &s, &mut y))?;
        let none = Var::constant(y.clone());
        Var::record("conv2d", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("conv2d", x.dtype(), input_gradient(&dy, &weight, &s, dx)))?;
            let dw = need.give(1, |dw| by_real!("conv2d", x.dtype(), weight_gradient(&dy, &x, &s, dw)))?;
            let db = need.give(2, |db| by_real!("conv2d", x.dtype(), bias_gradient(&dy, db)))?;
            Ok([dx, dw, db])
        })
    }

    /// `visible`: 1 where x is seen, 0 where 0 stands in its place.
    pub fn depthwise(&self, w: &Var, bias: Option<&Var>, visible: Option<&Tensor>) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        let &[batch, c, h, wide] = x.shape() else { crate::bail!("depthwise: x is {x:?} but [B, C, H, W] is needed") };
        let fits = matches!(*weight.shape(), [channels, 1, k, l] if channels == c && k == l && k % 2 == 1);
        ensure!(
            fits && weight.dtype() == x.dtype() && x.numel() > 0,
            "depthwise: the weight is {weight:?} but x is {x:?}; it needs [C, 1, k, k] with odd k"
        );
        check_bias("depthwise", bias, &weight)?;
        if let Some(visible) = visible {
            let fits = visible.shape() == [batch, 1, h, wide] || visible.shape() == [batch, h, wide];
            ensure!(fits, "depthwise: the mask is {visible:?} but x is {x:?}; it needs [B, 1, H, W]");
        }
        let mask = visible.map(|visible| visible.cast(x.dtype())).transpose()?;
        let y = by_real!("depthwise", x.dtype(), filter(&x, &weight, bias.map(Var::value), mask.as_ref()))?;
        let none = Var::constant(y.clone());
        Var::record("depthwise", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("depthwise", x.dtype(), filter_input(&dy, &weight, mask.as_ref(), dx)))?;
            let dw = need.give(1, |dw| by_real!("depthwise", x.dtype(), filter_weight(&dy, &x, mask.as_ref(), dw)))?;
            let db = need.give(2, |db| by_real!("depthwise", x.dtype(), bias_gradient(&dy, db)))?;
            Ok([dx, dw, db])
        })
    }

    pub fn to_tokens(&self) -> Result<Var> {
        let x = self.value();
        let &[batch, c, h, w] = x.shape() else { crate::bail!("to_tokens: x is {x:?} but [B, C, H, W] is needed") };
        let mut y = Tensor::empty(&[batch, h * w, c], x.dtype())?;
        by_real!("to_tokens", x.dtype(), transpose(x, c, h * w, &mut y));
        let dtype = x.dtype();
        Var::record("to_tokens", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("to_tokens", dtype, transpose(&dy, h * w, c, &mut dx));
            Ok([Some(dx)])
        })
    }

    pub fn to_map(&self, h: usize, w: usize) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("to_map: x is {x:?} but [B, H W, C] is needed") };
        ensure!(n == h * w, "to_map: x is {x:?} but the map is [{h}, {w}]");
        let mut y = Tensor::empty(&[batch, c, h, w], x.dtype())?;
        by_real!("to_map", x.dtype(), transpose(x, n, c, &mut y));
        let dtype = x.dtype();
        Var::record("to_map", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("to_map", dtype, transpose(&dy, c, n, &mut dx));
            Ok([Some(dx)])
        })
    }
}

fn check_bias(op: &str, bias: Option<&Var>, weight: &Tensor) -> Result<()> {
    if let Some(bias) = bias.map(Var::value) {
        let fits = bias.shape() == &weight.shape()[..1] && bias.dtype() == weight.dtype();
        ensure!(fits, "{op}: the bias is {bias:?} but the weight is {weight:?}");
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    /// Channels, height and width of x.
    c: usize,
    h: usize,
    w: usize,
    kh: usize,
    kw: usize,
    stride: usize,
    padding: usize,
    /// Channels, height and width of y.
    out: usize,
    oh: usize,
    ow: usize,
}

impl Sizes {
    fn of(x: &Tensor, weight: &Tensor, stride: usize, padding: usize) -> Result<Self> {
        let &[batch, c, h, w] = x.shape() else { crate::bail!("conv2d: x is {x:?} but [B, C, H, W] is needed") };
        let &[out, channels, kh, kw] = weight.shape() else {
            crate::bail!("conv2d: the weight is {weight:?} but [O, C, kh, kw] is needed")
        };
        ensure!(
            channels == c && weight.dtype() == x.dtype() && x.numel() > 0 && weight.numel() > 0,
            "conv2d: the weight is {weight:?} but x is {x:?}"
        );
        ensure!(stride > 0, "conv2d: a stride of 0 does not move");
        ensure!(
            kh <= h + 2 * padding && kw <= w + 2 * padding,
            "conv2d: the weight is {weight:?}, larger than x {x:?} with a padding of {padding}"
        );
        let (oh, ow) = ((h + 2 * padding - kh) / stride + 1, (w + 2 * padding - kw) / stride + 1);
        Ok(Self { batch, c, h, w, kh, kw, stride, padding, out, oh, ow })
    }

    /// Numbers of a window, and windows of an image.
    fn window(&self) -> usize {
        self.c * self.kh * self.kw
    }

    fn places(&self) -> usize {
        self.oh * self.ow
    }

    /// Calls `f(index in the image, index in the columns)` for each number of each window that lies inside the image.
    fn each_inside(&self, mut f: impl FnMut(usize, usize)) {
        for tap in 0..self.window() {
            let (channel, u, v) = (tap / (self.kh * self.kw), tap / self.kw % self.kh, tap % self.kw);
            for i in 0..self.oh {
                let y = (i * self.stride + u).wrapping_sub(self.padding);
                if y >= self.h {
                    continue;
                }
                for j in 0..self.ow {
                    let x = (j * self.stride + v).wrapping_sub(self.padding);
                    if x < self.w {
                        f((channel * self.h + y) * self.w + x, (tap * self.oh + i) * self.ow + j);
                    }
                }
            }
        }
    }

    /// The windows of one image as columns, [window, places].
    fn columns<T: Real>(&self, x: &[T], columns: &mut [T]) {
        columns.fill(T::ZERO);
        self.each_inside(|from, to| columns[to] = x[from]);
    }
}

fn convolve<T: Product + Element>(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, s: &Sizes, y: &mut Tensor) -> Result<()> {
    let (x, w, bias) = (x.data::<T>(), w.data::<T>(), bias.map(|bias| bias.data::<T>()));
    let images = y.data_mut::<T>().par_chunks_mut(s.out * s.places()).zip(x.par_chunks(s.c * s.h * s.w));
    images.try_for_each(|(y, x)| {
        let mut columns = Tensor::empty(&[s.window(), s.places()], T::DTYPE)?;
        s.columns(x, columns.data_mut::<T>());
        y.chunks_exact_mut(s.places()).enumerate().for_each(|(o, y)| y.fill(bias.map_or(T::ZERO, |bias| bias[o])));
        let columns = View::rows(columns.data::<T>(), s.places());
        gemm::serial(&mut Panel::of(y, s.places()), s.window(), View::rows(w, s.window()), columns, Finish::add());
        Ok(())
    })
}

fn input_gradient<T: Product + Element>(dy: &Tensor, w: &Tensor, s: &Sizes, dx: &mut Tensor) -> Result<()> {
    let (dy, w) = (dy.data::<T>(), View::rows(w.data::<T>(), s.window()).transposed());
    let images = dx.data_mut::<T>().par_chunks_mut(s.c * s.h * s.w).zip(dy.par_chunks(s.out * s.places()));
    images.try_for_each(|(dx, dy)| {
        let mut columns = Tensor::empty(&[s.window(), s.places()], T::DTYPE)?;
        let panel = &mut Panel::of(columns.data_mut::<T>(), s.places());
        gemm::serial(panel, s.out, w, View::rows(dy, s.places()), Finish::replace());
        let columns = columns.data::<T>();
        dx.fill(T::ZERO);
        s.each_inside(|to, from| dx[to] += columns[from]);
        Ok(())
    })
}

/// Image after image, each product on all threads: a partial sum an image would be larger than everything else.
fn weight_gradient<T: Product + Element>(dy: &Tensor, x: &Tensor, s: &Sizes, dw: &mut Tensor) -> Result<()> {
    let mut columns = Tensor::empty(&[s.window(), s.places()], T::DTYPE)?;
    let dw = dw.data_mut::<T>();
    dw.fill(T::ZERO);
    for (dy, x) in dy.data::<T>().chunks_exact(s.out * s.places()).zip(x.data::<T>().chunks_exact(s.c * s.h * s.w)) {
        s.columns(x, columns.data_mut::<T>());
        let columns = View::rows(columns.data::<T>(), s.places()).transposed();
        gemm::parallel(&mut Panel::of(dw, s.window()), s.places(), View::rows(dy, s.places()), columns, Finish::add());
    }
    Ok(())
}

/// The sum of each plane, then over the images in order.
fn bias_gradient<T: Product + Element>(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    let &[batch, c, h, w] = dy.shape() else { crate::bail!("bias gradient: dy is {dy:?} but [B, C, H, W] is needed") };
    let mut partial = Tensor::empty(&[batch, c], dy.dtype())?;
    let planes = partial.data_mut::<T>().par_iter_mut().zip(dy.data::<T>().par_chunks(h * w));
    planes.for_each(|(sum, plane)| *sum = plane_sum(plane));
    column_sums(partial.data::<T>(), c, db.data_mut());
    Ok(())
}

/// The sizes of a plane that depthwise works on: h x w inside rows of whole vectors, k / 2 zeros on each side.
#[derive(Clone, Copy)]
struct Plane {
    h: usize,
    w: usize,
    k: usize,
    /// w rounded up to whole vectors, and the padded plane's row.
    vectors: usize,
    stride: usize,
}

impl Plane {
    fn of(x: &Tensor, w: &Tensor) -> Self {
        let (h, wide, k) = (x.shape()[2], x.shape()[3], w.last());
        let vectors = wide.next_multiple_of(LANES);
        Self { h, w: wide, k, vectors, stride: vectors + k - 1 }
    }

    fn padded(&self) -> usize {
        (self.h + self.k - 1) * self.stride
    }

    /// A plane of x, times its mask, with zeros around it.
    fn pad<T: Real>(&self, x: &[T], mask: Option<&[T]>, padded: &mut [T]) {
        padded.fill(T::ZERO);
        for (i, x) in x.chunks_exact(self.w).enumerate() {
            let row = &mut padded[(i + self.k / 2) * self.stride + self.k / 2..][..self.w];
            row.copy_from_slice(x);
            if let Some(mask) = mask {
                multiply(row, &mask[i * self.w..][..self.w]);
            }
        }
    }
}

vectorised! {
    fn plane_sum<T: Real>(x: &[T]) -> T {
        lane_sum(x.len(), |i| x[i])
    }
    /// y = the padded plane seen through the taps, plus the bias.
    fn filter_plane<T: Real>(padded: &[T], taps: &[T], bias: T, p: Plane, y: &mut [T]) {
        for (i, y) in y.chunks_exact_mut(p.w).enumerate() {
            for (block, y) in y.chunks_mut(LANES).enumerate() {
                let mut sums = [bias; LANES];
                for u in 0..p.k {
                    let row = &padded[(i + u) * p.stride + block * LANES..];
                    for (v, &tap) in taps[u * p.k..][..p.k].iter().enumerate() {
                        let window = &row[v..v + LANES];
                        sums.iter_mut().zip(window).for_each(|(sum, &x)| *sum = x.mul_add(tap, *sum));
                    }
                }
                y.copy_from_slice(&sums[..y.len()]);
            }
        }
    }
    /// dw[u, v] = sum of dy times the padded plane moved by (u, v); dy lies in rows of whole vectors.
    fn tap_gradients<T: Real>(dy: &[T], padded: &[T], p: Plane, dw: &mut [T]) {
        for (tap, dw) in dw.iter_mut().enumerate() {
            let (u, v) = (tap / p.k, tap % p.k);
            let mut sums = [T::ZERO; LANES];
            for (i, dy) in dy.chunks_exact(p.vectors).enumerate() {
                let row = &padded[(i + u) * p.stride + v..][..p.vectors];
                for (dy, x) in dy.chunks_exact(LANES).zip(row.chunks_exact(LANES)) {
                    for l in 0..LANES {
                        sums[l] = dy[l].mul_add(x[l], sums[l]);
                    }
                }
            }
            *dw = lane_sum(LANES, |l| sums[l]);
        }
    }
}

/// Runs `f(plane number, channel, image's mask)` for each plane of y.
fn each_plane<T: Product + Element>(
    y: &mut [T],
    length: usize,
    channels: usize,
    mask: Option<(&Tensor, usize)>,
    f: impl Fn(usize, usize, Option<&[T]>, &mut [T]) -> Result<()> + Sync + Send,
) -> Result<()> {
    let mask = mask.map(|(mask, size)| (mask.data::<T>(), size));
    y.par_chunks_mut(length).enumerate().try_for_each(|(i, y)| {
        let mask = mask.map(|(mask, size)| &mask[i / channels * size..][..size]);
        f(i, i % channels, mask, y)
    })
}

fn filter<T: Product + Element>(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, mask: Option<&Tensor>) -> Result<Tensor> {
    let (p, channels) = (Plane::of(x, w), x.shape()[1]);
    let (size, taps) = (p.h * p.w, p.k * p.k);
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (x, w, bias) = (x.data::<T>(), w.data::<T>(), bias.map(|bias| bias.data::<T>()));
    each_plane(y.data_mut::<T>(), size, channels, mask.map(|mask| (mask, size)), |i, c, mask, y| {
        let mut padded = Tensor::empty(&[p.padded()], T::DTYPE)?;
        p.pad(&x[i * size..][..size], mask, padded.data_mut::<T>());
        filter_plane(padded.data::<T>(), &w[c * taps..][..taps], bias.map_or(T::ZERO, |bias| bias[c]), p, y);
        Ok(())
    })?;
    Ok(y)
}

fn filter_input<T: Product + Element>(dy: &Tensor, w: &Tensor, mask: Option<&Tensor>, dx: &mut Tensor) -> Result<()> {
    let (p, channels) = (Plane::of(dy, w), dy.shape()[1]);
    let (size, taps) = (p.h * p.w, p.k * p.k);
    let (dy, w) = (dy.data::<T>(), w.data::<T>());
    each_plane(dx.data_mut::<T>(), size, channels, mask.map(|mask| (mask, size)), |i, c, mask, dx| {
        let mut scratch = Tensor::empty(&[p.padded() + taps], T::DTYPE)?;
        let (padded, turned) = scratch.data_mut::<T>().split_at_mut(p.padded());
        p.pad(&dy[i * size..][..size], None, padded);
        turned.copy_from_slice(&w[c * taps..][..taps]);
        turned.reverse();
        filter_plane(padded, turned, T::ZERO, p, dx);
        if let Some(mask) = mask {
            multiply(dx, mask);
        }
        Ok(())
    })
}

/// The taps' gradients of each plane, then summed over the images in order.
fn filter_weight<T: Product + Element>(dy: &Tensor, x: &Tensor, mask: Option<&Tensor>, dw: &mut Tensor) -> Result<()> {
    let (p, batch, channels) = (Plane::of(x, dw), x.shape()[0], x.shape()[1]);
    let (size, taps) = (p.h * p.w, p.k * p.k);
    let mut partial = Tensor::empty(&[batch, channels * taps], x.dtype())?;
    let (dy, x) = (dy.data::<T>(), x.data::<T>());
    each_plane(partial.data_mut::<T>(), taps, channels, mask.map(|mask| (mask, size)), |i, _, mask, dw| {
        let mut scratch = Tensor::empty(&[p.padded() + p.h * p.vectors], T::DTYPE)?;
        let (padded, rows) = scratch.data_mut::<T>().split_at_mut(p.padded());
        p.pad(&x[i * size..][..size], mask, padded);
        for (row, dy) in rows.chunks_exact_mut(p.vectors).zip(dy[i * size..][..size].chunks_exact(p.w)) {
            row[..p.w].copy_from_slice(dy);
            row[p.w..].fill(T::ZERO);
        }
        tap_gradients(rows, padded, p, dw);
        Ok(())
    })?;
    column_sums(partial.data::<T>(), channels * taps, dw.data_mut());
    Ok(())
}

/// Each image's [rows, columns] becomes [columns, rows], in squares that stay in the cache.
fn transpose<T: Product + Element>(x: &Tensor, rows: usize, columns: usize, y: &mut Tensor) {
    const SQUARE: usize = 32;
    let size = (rows * columns).max(1);
    y.data_mut::<T>().par_chunks_mut(size).zip(x.data::<T>().par_chunks(size)).for_each(|(y, x)| {
        for (top, left) in (0..rows).step_by(SQUARE).flat_map(|top| (0..columns).step_by(SQUARE).map(move |left| (top, left))) {
            for j in left..(left + SQUARE).min(columns) {
                for i in top..(top + SQUARE).min(rows) {
                    y[j * rows + i] = x[i * columns + j];
                }
            }
        }
    });
}

pub fn cases() -> Vec<Case> {
    let conv = |name: &str, x: [usize; 4], w: [usize; 4], stride: usize, padding: usize| {
        let run = move |v: &[Var]| v[0].conv2d(&v[1], v.get(2), stride, padding);
        Case::new(&format!("conv2d: {name}"), &[&x, &w, &[w[0]]], run)
    };
    let depthwise = |name: &str, x: [usize; 4], k: usize, masked: bool| {
        let visible: Vec<f64> = (0..x[0] * x[2] * x[3]).map(|i| if i % 3 == 1 { 0.0 } else { 1.0 }).collect();
        let visible = Tensor::from_slice(&[x[0], 1, x[2], x[3]], &visible).expect("as many numbers");
        let run = move |v: &[Var]| v[0].depthwise(&v[1], v.get(2), masked.then_some(&visible));
        Case::new(&format!("depthwise: {name}"), &[&x, &[x[1], 1, k, k], &[x[1]]], run)
    };
    vec![
        conv("patches of 4 x 4", [2, 3, 8, 12], [5, 3, 4, 4], 4, 0),
        conv("3 x 3, stride 1, padding 1", [2, 4, 5, 7], [3, 4, 3, 3], 1, 1),
        conv("2 x 3, stride 2, padding 1, odd sizes", [1, 2, 5, 6], [3, 2, 2, 3], 2, 1),
        conv("1 x 1, one image", [1, 37, 3, 3], [6, 37, 1, 1], 1, 0),
        Case::new("conv2d: no bias", &[&[2, 2, 4, 4], &[3, 2, 2, 2]], |x| x[0].conv2d(&x[1], None, 2, 0)),
        depthwise("5 x 5, masked, 14 x 14", [2, 6, 14, 14], 5, true),
        depthwise("5 x 5, 28 x 28", [1, 3, 28, 28], 5, false),
        depthwise("3 x 3, one row of 37", [1, 2, 1, 37], 3, true),
        depthwise("7 x 7, wider than the plane", [1, 2, 2, 3], 7, false),
        depthwise("1 x 1", [2, 2, 3, 16], 1, false),
        Case::new("depthwise: no bias", &[&[1, 2, 4, 4], &[2, 1, 3, 3]], |x| x[0].depthwise(&x[1], None, None)),
        Case::new("to_tokens: 5 channels of 3 x 4", &[&[2, 5, 3, 4]], |x| x[0].to_tokens()),
        Case::new("to_tokens: 37 channels of 7 x 7", &[&[1, 37, 7, 7]], |x| x[0].to_tokens()),
        Case::new("to_map: 3 x 4 tokens of 5", &[&[2, 12, 5]], |x| x[0].to_map(3, 4)),
    ]
}
