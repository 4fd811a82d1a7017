//! Convolutions of images, and the way between images and tokens.
//!
//!   conv2d     y[b, o, i, j] = sum_{c, u, v} w[o, c, u, v] x[b, c, s i + u - p, s j + v - p] + bias[o]        x is 0 outside
//!   to_tokens  [B, C, H, W] to [B, H W, C];   to_map  back
//!
//! Stride s, padding p; x [B, C, H, W], w [O, C, kh, kw], bias [O]. conv2d copies each image's windows into columns and multiplies; its backward
//! multiplies and adds the columns back. Saved: x, w. GPU: the library's products and kernels/conv.cu; one product for the whole batch, the bias f32.

use super::beside;
use super::case::{Case, rounded};
use super::linear::column_sums;
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::parallel::Panel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

impl Var {
    pub fn conv2d(&self, w: &Var, bias: Option<&Var>, stride: usize, padding: usize) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        let s = Sizes::of(&x, &weight, stride, padding)?;
        check_bias("conv2d", bias, weight.shape()[0], beside(x.dtype()))?;
        if let Some(gpu) = x.gpu().cloned() {
            let y = gpu::convolve(&gpu, &x, &weight, bias.map(Var::value), &s)?;
            let none = Var::constant(y.clone());
            return Var::record("conv2d", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
                gpu::gradients(&gpu, &dy, &x, &weight, &s, need)
            });
        }
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

    pub fn to_tokens(&self) -> Result<Var> {
        let x = self.value();
        let &[batch, c, h, w] = x.shape() else { crate::bail!("to_tokens: x is {x:?} but [B, C, H, W] is needed") };
        let mut y = x.alike(&[batch, h * w, c], x.dtype())?;
        turn("to_tokens", x, c, h * w, &mut y)?;
        Var::record("to_tokens", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            turn("to_tokens", &dy, h * w, c, &mut dx)?;
            Ok([Some(dx)])
        })
    }

    pub fn to_map(&self, h: usize, w: usize) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("to_map: x is {x:?} but [B, H W, C] is needed") };
        ensure!(n == h * w, "to_map: x is {x:?} but the map is [{h}, {w}]");
        let mut y = x.alike(&[batch, c, h, w], x.dtype())?;
        turn("to_map", x, n, c, &mut y)?;
        Var::record("to_map", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            turn("to_map", &dy, c, n, &mut dx)?;
            Ok([Some(dx)])
        })
    }
}

/// The bias of `out` channels.
pub(in crate::ops) fn check_bias(op: &str, bias: Option<&Var>, out: usize, dtype: Dtype) -> Result<()> {
    if let Some(bias) = bias.map(Var::value) {
        ensure!(bias.shape() == [out] && bias.dtype() == dtype, "{op}: the bias is {bias:?} but [{out}] of {dtype} is needed");
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
pub(super) fn bias_gradient<T: Product + Element>(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    let &[batch, c, h, w] = dy.shape() else { crate::bail!("bias gradient: dy is {dy:?} but [B, C, H, W] is needed") };
    let mut partial = Tensor::empty(&[batch, c], dy.dtype())?;
    let planes = partial.data_mut::<T>().par_iter_mut().zip(dy.data::<T>().par_chunks(h * w));
    planes.for_each(|(sum, plane)| *sum = plane_sum(plane));
    column_sums(partial.data::<T>(), c, db.data_mut());
    Ok(())
}

vectorised! {
    fn plane_sum<T: Real>(x: &[T]) -> T {
        lane_sum(x.len(), |i| x[i])
    }
}

/// Each image's [rows, columns] becomes [columns, rows].
fn turn(op: &str, x: &Tensor, rows: usize, columns: usize, y: &mut Tensor) -> Result<()> {
    match x.gpu() {
        None => by_real!(op, x.dtype(), transpose(x, rows, columns, y)),
        Some(gpu) => gpu::transpose(gpu, x, None, [x.shape()[0], rows, columns], y)?,
    }
    Ok(())
}

/// In squares that stay in the cache.
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

mod gpu {
    use super::Sizes;
    use crate::device::gpu::Gpu;
    use crate::device::launch::{Args, Launch, typed};
    use crate::device::product::{Factor, Product, Target};
    use crate::ensure;
    use crate::error::Result;
    use crate::ops::sum_of_rows_on;
    use crate::tape::Need;
    use crate::tensor::{Dtype, Tensor};

    /// The sizes as im2col and col2im take them.
    fn sizes(args: Args, s: &Sizes) -> Args {
        [s.c, s.h, s.w, s.kh, s.kw, s.stride, s.padding, s.oh, s.ow].into_iter().fold(args, Args::int)
    }

    /// The windows of all images as rows, [B oh ow, window].
    fn windows(gpu: &Gpu, x: &Tensor, s: &Sizes) -> Result<Tensor> {
        let mut rows = x.alike(&[s.batch * s.places(), s.window()], x.dtype())?;
        let launch = Launch::new(0, 256).grid((s.places() * s.c * s.kh).div_ceil(256), s.batch, 1);
        gpu.launch(&typed("im2col", x.dtype()), launch, sizes(Args::new().out(&mut rows).input(x), s))?;
        Ok(rows)
    }

    /// Each image's [rows, columns] becomes [columns, rows], a bias added to each column.
    pub fn transpose(gpu: &Gpu, x: &Tensor, bias: Option<&Tensor>, [batch, rows, columns]: [usize; 3], y: &mut Tensor) -> Result<()> {
        let launch = Launch::new(0, 256).grid(columns.div_ceil(32), rows.div_ceil(32), batch);
        gpu.launch(&typed("transpose", x.dtype()), launch, Args::new().out(y).input(x).maybe(bias).int(rows).int(columns))
    }

    pub fn convolve(gpu: &Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, s: &Sizes) -> Result<Tensor> {
        // Kernels number what belongs to one image in 32 bits.
        let most = (s.c * s.h * s.w).max(s.places() * s.window());
        ensure!(
            most < 1 << 31,
            "conv2d: x is {x:?}, of which an image or its windows have {most} numbers, more than a GPU's kernel can count to"
        );
        let (rows, dtype) = (s.batch * s.places(), x.dtype());
        let windows = windows(gpu, x, s)?;
        let mut tokens = x.alike(&[rows, s.out], dtype)?;
        let (left, right) = (Factor::rows(&windows, dtype, s.window()), Factor::rows(w, dtype, s.window()).turned());
        let target = Target::rows(&mut tokens, dtype, s.out);
        gpu.product(Product::new([rows, s.out, s.window()], left, right, target))?;
        let mut y = x.alike(&[s.batch, s.out, s.oh, s.ow], dtype)?;
        transpose(gpu, &tokens, bias, [s.batch, s.places(), s.out], &mut y)?;
        Ok(y)
    }

    pub fn gradients(gpu: &Gpu, dy: &Tensor, x: &Tensor, w: &Tensor, s: &Sizes, need: &mut Need) -> Result<[Option<Tensor>; 3]> {
        let (rows, dtype) = (s.batch * s.places(), x.dtype());
        let mut tokens = x.alike(&[rows, s.out], dtype)?; // dy
        transpose(gpu, dy, None, [s.batch, s.out, s.places()], &mut tokens)?;
        let left = Factor::rows(&tokens, dtype, s.out);
        let dx = need.give(0, |dx| {
            // Windows that do not overlap give each number of dx one summand, which may be rounded before.
            let kind = if s.stride >= s.kh.max(s.kw) { dtype } else { Dtype::F32 };
            let mut windows = x.alike(&[rows, s.window()], kind)?;
            let target = Target::rows(&mut windows, kind, s.window());
            gpu.product(Product::new([rows, s.window(), s.out], left, Factor::rows(w, dtype, s.window()), target))?;
            let launch = Launch::new(0, 256).grid((s.c * s.h * s.w).div_ceil(256), s.batch, 1);
            gpu.launch(&typed(&typed("col2im", kind), dtype), launch, sizes(Args::new().out(dx).input(&windows), s))
        })?;
        let dw = need.give(1, |dw| {
            let (windows, kind) = (windows(gpu, x, s)?, dw.dtype());
            let target = Target::rows(dw, kind, s.window());
            gpu.product(Product::new([s.out, s.window(), rows], left.turned(), Factor::rows(&windows, dtype, s.window()), target))
        })?;
        let db = need.give(2, |db| sum_of_rows_on(gpu, &tokens, db))?;
        Ok([dx, dw, db])
    }
}

pub fn cases() -> Vec<Case> {
    // On a GPU y is rounded before the bias is added; a 1 x 1 filter of ones adds it here.
    let conv = |name: &str, x: [usize; 4], w: [usize; 4], stride: usize, padding: usize| {
        let run = move |v: &[Var]| v[0].conv2d(&v[1], v.get(2), stride, padding);
        let run_rounded = move |v: &[Var]| {
            let y = rounded(&v[0].conv2d(&v[1], None, stride, padding)?)?;
            let ones = Tensor::from_slice(&[w[0], 1, 1, 1], &vec![1.0; w[0]])?.cast(y.dtype())?;
            y.depthwise(&Var::constant(ones), v.get(2), None)
        };
        Case::new(&format!("conv2d: {name}"), &[&x, &w, &[w[0]]], run).weights(&[1]).vectors(&[2]).rounded(run_rounded)
    };
    vec![
        conv("patches of 4 x 4", [2, 3, 8, 12], [5, 3, 4, 4], 4, 0),
        conv("3 x 3, stride 1, padding 1", [2, 4, 5, 7], [3, 4, 3, 3], 1, 1),
        conv("2 x 3, stride 2, padding 1, odd sizes", [1, 2, 5, 6], [3, 2, 2, 3], 2, 1),
        conv("1 x 1, one image", [1, 37, 3, 3], [6, 37, 1, 1], 1, 0),
        Case::new("conv2d: no bias", &[&[2, 2, 4, 4], &[3, 2, 2, 2]], |x| x[0].conv2d(&x[1], None, 2, 0)).weights(&[1]),
        conv("5 x 5, stride 2, padding 2, several squares", [2, 3, 13, 17], [40, 3, 5, 5], 2, 2),
        Case::new("to_tokens: 5 channels of 3 x 4", &[&[2, 5, 3, 4]], |x| x[0].to_tokens()),
        Case::new("to_tokens: 37 channels of 7 x 7", &[&[1, 37, 7, 7]], |x| x[0].to_tokens()),
        Case::new("to_tokens: 64 channels of 8 x 8", &[&[2, 64, 8, 8]], |x| x[0].to_tokens()),
        Case::new("to_map: 3 x 4 tokens of 5", &[&[2, 12, 5]], |x| x[0].to_map(3, 4)),
    ]
}
