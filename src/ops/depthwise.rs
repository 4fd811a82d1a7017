//! A k x k filter of each channel's plane, of what a mask lets through.
//!
//!   y[b, c, i, j] = sum_{u, v} w[c, 0, u, v] (m x)[b, c, i + u - k/2, j + v - k/2] + bias[c]        m [B, 1, H, W] or 1 everywhere
//!   dx = m times the same of dy with w turned round
//!   dw[c, 0, u, v] = sum_{b, i, j} dy[b, c, i, j] (m x)[b, c, i + u - k/2, j + v - k/2],   db = sum_{b, i, j} dy
//!
//! x [B, C, H, W], 0 outside; w [C, 1, k, k] with odd k, bias [C]. The CPU keeps 16 results in registers over all taps of a zero-padded plane. Saved:
//! x, w, m. GPU: kernels/depthwise.cu; w, bias and m are f32 there, whatever x is.

use super::beside;
use super::case::Case;
use super::conv::{bias_gradient, check_bias};
use super::linear::column_sums;
use crate::device::gemm::Product;
use crate::device::launch::Versions;
use crate::device::simd::{LANES, Real, lane_sum, multiply};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

pub const VERSIONS: Versions = Versions { op: "depthwise", all: &["v1", "v2"], chosen: "v2" };

impl Var {
    /// `visible`: 1 where x is seen, 0 where 0 stands in its place.
    pub fn depthwise(&self, w: &Var, bias: Option<&Var>, visible: Option<&Tensor>) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        let &[batch, c, h, wide] = x.shape() else { crate::bail!("depthwise: x is {x:?} but [B, C, H, W] is needed") };
        let fits = matches!(*weight.shape(), [channels, 1, k, l] if channels == c && k == l && k % 2 == 1);
        ensure!(
            fits && weight.dtype() == beside(x.dtype()) && x.numel() > 0,
            "depthwise: the weight is {weight:?} but x is {x:?}; it needs [C, 1, k, k] with odd k"
        );
        check_bias("depthwise", bias, c, beside(x.dtype()))?;
        if let Some(visible) = visible {
            let fits = visible.shape() == [batch, 1, h, wide] || visible.shape() == [batch, h, wide];
            ensure!(fits, "depthwise: the mask is {visible:?} but x is {x:?}; it needs [B, 1, H, W]");
        }
        let mask = visible.map(|visible| visible.cast(weight.dtype())?.on(&x.device())).transpose()?;
        if let Some(gpu) = x.gpu().cloned() {
            let y = gpu::filter(&gpu, &x, &weight, bias.map(Var::value), mask.as_ref())?;
            let none = Var::constant(y.clone());
            return Var::record("depthwise", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
                let dx = need.give(0, |dx| gpu::filter_input(&gpu, &dy, &weight, mask.as_ref(), dx))?;
                let [dw, db] = gpu::filter_weight(&gpu, &dy, &x, mask.as_ref(), weight.last(), need)?;
                Ok([dx, dw, db])
            });
        }
        let y = by_real!("depthwise", x.dtype(), filter(&x, &weight, bias.map(Var::value), mask.as_ref()))?;
        let none = Var::constant(y.clone());
        Var::record("depthwise", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("depthwise", x.dtype(), filter_input(&dy, &weight, mask.as_ref(), dx)))?;
            let dw = need.give(1, |dw| by_real!("depthwise", x.dtype(), filter_weight(&dy, &x, mask.as_ref(), dw)))?;
            let db = need.give(2, |db| by_real!("depthwise", x.dtype(), bias_gradient(&dy, db)))?;
            Ok([dx, dw, db])
        })
    }
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

mod gpu {
    use super::VERSIONS;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{Args, Launch, typed};
    use crate::error::Result;
    use crate::ops::sum_of_parts;
    use crate::tape::Need;
    use crate::tensor::{Dtype, Tensor};

    /// The side of the kernel that v2 is written for; others run in v1.
    const SIDE: usize = 5;
    /// Rows and columns of v2's tiles, at most, and its threads.
    const TILE: [usize; 2] = [28, 32];
    const THREADS: usize = 128;

    fn tiled(gpu: &Gpu, k: usize) -> bool {
        k == SIDE && gpu.version(&VERSIONS) == "v2"
    }

    /// The filter of x [B, C, H, W] by `kernel`, whose arguments before the sizes are `args`.
    fn run(gpu: &Gpu, kernel: &str, x: &Tensor, k: usize, args: Args) -> Result<()> {
        let [batch, c, h, w] = [0, 1, 2, 3].map(|axis| x.shape()[axis]);
        let args = args.int(c).int(h).int(w);
        if tiled(gpu, k) {
            let tiles = h.div_ceil(TILE[0]) * w.div_ceil(TILE[1]);
            return gpu.launch(&typed(&format!("{kernel}_v2"), x.dtype()), Launch::new(batch * c * tiles, THREADS), args);
        }
        gpu.launch(&typed(&format!("{kernel}_v1"), x.dtype()), Launch::elements(x.numel(), 1), args.int(k).long(x.numel()))
    }

    pub fn filter(gpu: &Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, mask: Option<&Tensor>) -> Result<Tensor> {
        let mut y = x.alike(x.shape(), x.dtype())?;
        run(gpu, "depthwise_fwd", x, w.last(), Args::new().out(&mut y).input(x).input(w).maybe(bias).maybe(mask))?;
        Ok(y)
    }

    pub fn filter_input(gpu: &Gpu, dy: &Tensor, w: &Tensor, mask: Option<&Tensor>, dx: &mut Tensor) -> Result<()> {
        run(gpu, "depthwise_bwd_x", dy, w.last(), Args::new().out(dx).input(dy).input(w).maybe(mask))
    }

    /// dw and db.
    pub fn filter_weight(
        gpu: &Gpu,
        dy: &Tensor,
        x: &Tensor,
        mask: Option<&Tensor>,
        k: usize,
        need: &mut Need,
    ) -> Result<[Option<Tensor>; 2]> {
        if !need.wants(1) && !need.wants(2) {
            return Ok([None, None]);
        }
        let [batch, c, h, w] = [0, 1, 2, 3].map(|axis| x.shape()[axis]);
        // About as many blocks as a device has room for, but two images each, since a block's last sums cost as much as a tile.
        let parts = if tiled(gpu, k) { (2048 / c).clamp(1, batch.div_ceil(2)) } else { batch };
        let (mut dw, mut db) = (x.alike(&[parts, c * k * k], Dtype::F32)?, x.alike(&[parts, c], Dtype::F32)?);
        let args = Args::new().out(&mut dw).out(&mut db).input(dy).input(x).maybe(mask);
        if tiled(gpu, k) {
            let launch = Launch::new(0, THREADS).grid(c, parts, 1);
            gpu.launch(&typed("depthwise_bwd_w_v2", x.dtype()), launch, args.int(batch).int(c).int(h).int(w))?;
        } else {
            gpu.launch(&typed("depthwise_bwd_w_v1", x.dtype()), Launch::new(batch * c, 256), args.int(c).int(h).int(w).int(k))?;
        }
        Ok([need.give(1, |sum| sum_of_parts(gpu, &dw, sum))?, need.give(2, |sum| sum_of_parts(gpu, &db, sum))?])
    }
}

pub fn cases() -> Vec<Case> {
    let depthwise = |name: &str, x: [usize; 4], k: usize, masked: bool| {
        let visible: Vec<f64> = (0..x[0] * x[2] * x[3]).map(|i| if i % 3 == 1 { 0.0 } else { 1.0 }).collect();
        let visible = Tensor::from_slice(&[x[0], 1, x[2], x[3]], &visible).expect("as many numbers");
        let run = move |v: &[Var]| v[0].depthwise(&v[1], v.get(2), masked.then_some(&visible));
        Case::new(&format!("depthwise: {name}"), &[&x, &[x[1], 1, k, k], &[x[1]]], run).vectors(&[1, 2])
    };
    vec![
        depthwise("5 x 5, masked, 14 x 14", [2, 6, 14, 14], 5, true),
        depthwise("5 x 5, 28 x 28", [1, 3, 28, 28], 5, false),
        depthwise("5 x 5, masked, 2 x 2 tiles", [3, 2, 30, 37], 5, true),
        depthwise("3 x 3, one row of 37", [1, 2, 1, 37], 3, true),
        depthwise("7 x 7, wider than the plane", [1, 2, 2, 3], 7, false),
        depthwise("1 x 1", [2, 2, 3, 16], 1, false),
        Case::new("depthwise: no bias", &[&[1, 2, 4, 4], &[2, 1, 3, 3]], |x| x[0].depthwise(&x[1], None, None)).vectors(&[1]),
    ]
}
