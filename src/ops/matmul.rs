//! Batched matrix products, and the heads they work on.
//!
//!   bmm         y = a b                                      da = dy b^T,  db = a^T dy        a [.., M, K], b [.., K, N]
//!   bmm_nt      y = a b^T                                    da = dy b,    db = dy^T a        a [.., M, K], b [.., N, K]
//!   take_heads  y[b, h, t] = x[b, t, part C + h D ..][..D]   dx = dy there, 0 elsewhere       x [B, N, parts C], y [B, H, N, D]
//!   merge_heads y[b, t, h D + d] = x[b, h, t, d]             the same way back                x [B, H, N, D], y [B, N, H D]
//!   mix_heads   y[b, g] = sum_h w[g, h] x[b, h] + c[g]       dx = w^T dy, dw = sum_b dy x^T, dc = sum dy        x [B, H, N, M], w [G, H]
//!
//! Leading axes are equal. Saved: the factors. GPU: the library's products and kernels/matmul.cu; w and c are f32 there, whatever x is.

use super::beside;
use super::case::Case;
use super::linear::column_sums;
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::parallel::Panel;
use crate::device::simd::{Real, lane_sum};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

impl Var {
    pub fn bmm(&self, b: &Var) -> Result<Var> {
        let (a, b_value) = (self.value().clone(), b.value().clone());
        let (lead, m, k) = matrices("bmm", &a)?;
        let (other, rows, n) = matrices("bmm", &b_value)?;
        ensure!(lead == other && rows == k && a.dtype() == b_value.dtype(), "bmm: a is {a:?} but b is {b_value:?}");
        let mut y = a.alike(&shape(lead, m, n), a.dtype())?;
        multiply("bmm", &mut y, [m, n, k], (&a, false), (&b_value, false))?;
        Var::record("bmm", [self, b], y, move |dy, need| {
            let da = need.give(0, |da| multiply("bmm", da, [m, k, n], (&dy, false), (&b_value, true)))?;
            let db = need.give(1, |db| multiply("bmm", db, [k, n, m], (&a, true), (&dy, false)))?;
            Ok([da, db])
        })
    }

    pub fn bmm_nt(&self, b: &Var) -> Result<Var> {
        let (a, b_value) = (self.value().clone(), b.value().clone());
        let (lead, m, k) = matrices("bmm_nt", &a)?;
        let (other, n, columns) = matrices("bmm_nt", &b_value)?;
        ensure!(lead == other && columns == k && a.dtype() == b_value.dtype(), "bmm_nt: a is {a:?} but b is {b_value:?}");
        let mut y = a.alike(&shape(lead, m, n), a.dtype())?;
        multiply("bmm_nt", &mut y, [m, n, k], (&a, false), (&b_value, true))?;
        Var::record("bmm_nt", [self, b], y, move |dy, need| {
            let da = need.give(0, |da| multiply("bmm_nt", da, [m, k, n], (&dy, false), (&b_value, false)))?;
            let db = need.give(1, |db| multiply("bmm_nt", db, [n, k, m], (&dy, true), (&a, false)))?;
            Ok([da, db])
        })
    }

    /// One of the parts of packed heads, [B, H, N, D].
    pub fn take_heads(&self, part: usize, parts: usize, heads: usize) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("take_heads: x is {x:?} but [B, N, parts C] is needed") };
        ensure!(
            part < parts && heads > 0 && c > 0 && c.is_multiple_of(parts * heads),
            "take_heads: x is {x:?}, which has no part {part} of {parts} with {heads} heads"
        );
        let width = c / parts / heads;
        let mut y = x.alike(&[batch, heads, n, width], x.dtype())?;
        apart("take_heads", x, part * heads * width, &mut y)?;
        Var::record("take_heads", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            together("take_heads", &dy, part * heads * width, &mut dx)?;
            Ok([Some(dx)])
        })
    }

    /// All parts of packed heads, each [B, H, N, D].
    pub fn split_heads(&self, parts: usize, heads: usize) -> Result<Vec<Var>> {
        (0..parts).map(|part| self.take_heads(part, parts, heads)).collect()
    }

    /// [B, H, N, D] to [B, N, H D].
    pub fn merge_heads(&self) -> Result<Var> {
        let x = self.value();
        let &[batch, heads, n, width] = x.shape() else { crate::bail!("merge_heads: x is {x:?} but [B, H, N, D] is needed") };
        ensure!(heads * width > 0, "merge_heads: x is {x:?}, an axis is empty");
        let mut y = x.alike(&[batch, n, heads * width], x.dtype())?;
        together("merge_heads", x, 0, &mut y)?;
        Var::record("merge_heads", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            apart("merge_heads", &dy, 0, &mut dx)?;
            Ok([Some(dx)])
        })
    }

    /// A linear map across the heads.
    pub fn mix_heads(&self, w: &Var, bias: &Var) -> Result<Var> {
        let (x, weight) = (self.value().clone(), w.value().clone());
        let &[batch, heads, n, m] = x.shape() else { crate::bail!("mix_heads: x is {x:?} but [B, H, N, M] is needed") };
        let &[out, columns] = weight.shape() else { crate::bail!("mix_heads: the weight is {weight:?} but x is {x:?}; it needs [G, H]") };
        ensure!(
            columns == heads && x.numel() * out > 0 && weight.dtype() == beside(x.dtype()),
            "mix_heads: the weight is {weight:?} but x is {x:?}; it needs [G, H]"
        );
        ensure!(
            bias.shape() == [out] && bias.dtype() == weight.dtype(),
            "mix_heads: the bias is {:?} but the weight is {weight:?}",
            bias.value()
        );
        let mut y = x.alike(&[batch, out, n, m], x.dtype())?;
        if let Some(gpu) = x.gpu().cloned() {
            gpu::mixed(&gpu, &x, &weight, Some(bias.value()), false, &mut y)?;
            return Var::record("mix_heads", [self, w, bias], y, move |dy, need| {
                let dx = need.give(0, |dx| gpu::mixed(&gpu, &dy, &weight, None, true, dx))?;
                let [dw, db] = gpu::mixing_gradients(&gpu, &dy, &x, need)?;
                Ok([dx, dw, db])
            });
        }
        by_real!("mix_heads", x.dtype(), mixed(&x, &weight, bias.value(), &mut y));
        Var::record("mix_heads", [self, w, bias], y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("mix_heads", x.dtype(), unmixed(&dy, &weight, dx)))?;
            let dw = need.give(1, |dw| by_real!("mix_heads", x.dtype(), mixing_gradient(&dy, &x, dw)))?;
            let db = need.give(2, |db| by_real!("mix_heads", x.dtype(), bias_gradient(&dy, db)))?;
            Ok([dx, dw, db])
        })
    }
}

/// Leading axes, rows and columns of a stack of matrices.
fn matrices<'a>(op: &str, x: &'a Tensor) -> Result<(&'a [usize], usize, usize)> {
    match x.shape() {
        [lead @ .., rows, columns] if x.numel() > 0 => Ok((lead, *rows, *columns)),
        _ => crate::bail!("{op}: {x:?} is not a stack of matrices with elements"),
    }
}

fn shape(lead: &[usize], rows: usize, columns: usize) -> Vec<usize> {
    [lead, &[rows, columns]].concat()
}

/// Each [m, n] matrix of y is the product of those of a and b, [m, k] and [k, n] once they are turned where it says so.
fn multiply(op: &str, y: &mut Tensor, sizes: [usize; 3], a: (&Tensor, bool), b: (&Tensor, bool)) -> Result<()> {
    match a.0.gpu() {
        None => by_real!(op, a.0.dtype(), products(y, sizes, a, b)),
        Some(gpu) => gpu::products(gpu, y, sizes, a, b),
    }
}

/// y [B, H, N, D] from the columns of x [B, N, ..] that begin at `column`.
fn apart(op: &str, x: &Tensor, column: usize, y: &mut Tensor) -> Result<()> {
    match x.gpu() {
        None => by_real!(op, x.dtype(), split(x, column, y)),
        Some(gpu) => gpu::split(gpu, x, column, y)?,
    }
    Ok(())
}

/// x [B, H, N, D] into the columns of y [B, N, ..] that begin at `column`, zeros into the others.
fn together(op: &str, x: &Tensor, column: usize, y: &mut Tensor) -> Result<()> {
    match x.gpu() {
        None => by_real!(op, x.dtype(), join(x, column, y)),
        Some(gpu) => gpu::join(gpu, x, column, y)?,
    }
    Ok(())
}

fn products<T: Product + Element>(
    y: &mut Tensor,
    [m, n, k]: [usize; 3],
    (a, turn_a): (&Tensor, bool),
    (b, turn_b): (&Tensor, bool),
) -> Result<()> {
    let view = |data, rows: usize, columns: usize, turned: bool| {
        if turned { View::rows(data, rows).transposed() } else { View::rows(data, columns) }
    };
    let (a, b) = (a.data::<T>(), b.data::<T>());
    if y.numel() == m * n {
        gemm::parallel(&mut Panel::of(y.data_mut::<T>(), n), k, view(a, m, k, turn_a), view(b, k, n, turn_b), Finish::replace());
        return Ok(());
    }
    let stack = y.data_mut::<T>().par_chunks_exact_mut(m * n).zip(a.par_chunks_exact(m * k)).zip(b.par_chunks_exact(k * n));
    stack.for_each(|((y, a), b)| {
        gemm::serial(&mut Panel::of(y, n), k, view(a, m, k, turn_a), view(b, k, n, turn_b), Finish::replace());
    });
    Ok(())
}

fn split<T: Product + Element>(x: &Tensor, column: usize, y: &mut Tensor) {
    let (n, c) = (x.shape()[1], x.last());
    let (heads, width) = (y.shape()[1], y.last());
    let x = x.data::<T>();
    y.data_mut::<T>().par_chunks_mut((n * width).max(1)).enumerate().for_each(|(i, y)| {
        let (image, head) = (i / heads, i % heads);
        for (token, y) in y.chunks_exact_mut(width).enumerate() {
            y.copy_from_slice(&x[(image * n + token) * c + column + head * width..][..width]);
        }
    });
}

fn join<T: Product + Element>(x: &Tensor, column: usize, y: &mut Tensor) {
    let (heads, width) = (x.shape()[1], x.last());
    let (n, c) = (y.shape()[1], y.last());
    let x = x.data::<T>();
    y.data_mut::<T>().par_chunks_mut((n * c).max(1)).enumerate().for_each(|(image, y)| {
        for (token, y) in y.chunks_exact_mut(c).enumerate() {
            y[..column].fill(T::ZERO);
            y[column + heads * width..].fill(T::ZERO);
            for (head, y) in y[column..column + heads * width].chunks_exact_mut(width).enumerate() {
                y.copy_from_slice(&x[((image * heads + head) * n + token) * width..][..width]);
            }
        }
    });
}

vectorised! {
    fn row_sum<T: Real>(x: &[T]) -> T {
        lane_sum(x.len(), |i| x[i])
    }
}

fn mixed<T: Product + Element>(x: &Tensor, w: &Tensor, bias: &Tensor, y: &mut Tensor) {
    let (heads, out, scores) = (w.last(), w.rows(), x.shape()[2] * x.last());
    let (x, w, bias) = (x.data::<T>(), w.data::<T>(), bias.data::<T>());
    y.data_mut::<T>().par_chunks_mut(out * scores).zip(x.par_chunks(heads * scores)).for_each(|(y, x)| {
        y.chunks_exact_mut(scores).zip(bias).for_each(|(y, &bias)| y.fill(bias));
        gemm::serial(&mut Panel::of(y, scores), heads, View::rows(w, heads), View::rows(x, scores), Finish::add());
    });
}

fn unmixed<T: Product + Element>(dy: &Tensor, w: &Tensor, dx: &mut Tensor) -> Result<()> {
    let (heads, out, scores) = (w.last(), w.rows(), dy.shape()[2] * dy.last());
    let (dy, w) = (dy.data::<T>(), w.data::<T>());
    dx.data_mut::<T>().par_chunks_mut(heads * scores).zip(dy.par_chunks(out * scores)).for_each(|(dx, dy)| {
        gemm::serial(&mut Panel::of(dx, scores), out, View::rows(w, heads).transposed(), View::rows(dy, scores), Finish::replace());
    });
    Ok(())
}

/// One product an image, then summed image by image.
fn mixing_gradient<T: Product + Element>(dy: &Tensor, x: &Tensor, dw: &mut Tensor) -> Result<()> {
    let (batch, heads, out, scores) = (x.shape()[0], x.shape()[1], dy.shape()[1], x.shape()[2] * x.last());
    let mut partial = Tensor::empty(&[batch, out * heads], x.dtype())?;
    let (dy, x) = (dy.data::<T>(), x.data::<T>());
    let images = partial.data_mut::<T>().par_chunks_mut(out * heads).zip(dy.par_chunks(out * scores).zip(x.par_chunks(heads * scores)));
    images.for_each(|(partial, (dy, x))| {
        let x = View::rows(x, scores).transposed();
        gemm::serial(&mut Panel::of(partial, heads), scores, View::rows(dy, scores), x, Finish::replace());
    });
    column_sums(partial.data::<T>(), out * heads, dw.data_mut());
    Ok(())
}

fn bias_gradient<T: Product + Element>(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    let (batch, out, scores) = (dy.shape()[0], dy.shape()[1], dy.shape()[2] * dy.last());
    let mut partial = Tensor::empty(&[batch, out], dy.dtype())?;
    let maps = partial.data_mut::<T>().par_iter_mut().zip(dy.data::<T>().par_chunks(scores));
    maps.for_each(|(sum, dy)| *sum = row_sum(dy));
    column_sums(partial.data::<T>(), out, db.data_mut());
    Ok(())
}

mod gpu {
    use crate::device::gpu::Gpu;
    use crate::device::launch::{Args, Launch, typed};
    use crate::device::product::{Factor, Product, Target};
    use crate::error::Result;
    use crate::ops::sum_of_parts;
    use crate::tape::Need;
    use crate::tensor::{Dtype, Tensor};

    pub fn products(gpu: &Gpu, y: &mut Tensor, [m, n, k]: [usize; 3], a: (&Tensor, bool), b: (&Tensor, bool)) -> Result<()> {
        let factor = |(x, turned): (&Tensor, bool), rows: usize, columns: usize| {
            let all = Factor::rows(x, x.dtype(), if turned { rows } else { columns }).step(rows * columns);
            if turned { all.turned() } else { all }
        };
        let (dtype, batch) = (y.dtype(), y.numel() / (m * n));
        let target = Target::rows(y, dtype, n).step(m * n);
        gpu.product(Product::new([m, n, k], factor(a, m, k), factor(b, k, n), target).batch(batch))
    }

    /// How many numbers a thread moves at once.
    fn each(width: usize, stride: usize, column: usize) -> usize {
        if [width, stride, column].iter().all(|size| size.is_multiple_of(8)) { 8 } else { 1 }
    }

    pub fn split(gpu: &Gpu, x: &Tensor, column: usize, y: &mut Tensor) -> Result<()> {
        let (batch, heads, n, width, stride) = (y.shape()[0], y.shape()[1], y.shape()[2], y.last(), x.last());
        let each = each(width, stride, column);
        let launch = Launch::elements(heads * n * width, each);
        let args = Args::new().out(y).input(x).int(heads).int(n).int(width).int(stride).int(column).int(each);
        gpu.launch(&typed("split_heads_fwd", x.dtype()), launch.grid(launch.grid[0], batch, 1), args)
    }

    pub fn join(gpu: &Gpu, x: &Tensor, column: usize, y: &mut Tensor) -> Result<()> {
        let (batch, heads, n, width, stride) = (x.shape()[0], x.shape()[1], x.shape()[2], x.last(), y.last());
        let each = each(width, stride, column);
        let launch = Launch::elements(n * stride, each);
        let args = Args::new().out(y).input(x).int(heads).int(n).int(width).int(stride).int(column).int(each);
        gpu.launch(&typed("join_heads_fwd", x.dtype()), launch.grid(launch.grid[0], batch, 1), args)
    }

    /// y [B, G, N, M] = w x + bias, or y [B, H, N, M] = w^T x.
    pub fn mixed(gpu: &Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, turned: bool, y: &mut Tensor) -> Result<()> {
        let (batch, heads, out, positions) = (x.shape()[0], x.shape()[1], y.shape()[1], x.shape()[2] * x.last());
        let (row, step) = if turned { (1, w.last()) } else { (w.last(), 1) };
        let launch = Launch::new(0, 256).grid(positions.div_ceil(256), batch, 1).shared(heads * 16 * 4);
        let args = Args::new().out(y).input(x).input(w).maybe(bias).int(heads).int(out).int(positions).int(row).int(step);
        gpu.launch(&typed("mix_heads_fwd", x.dtype()), launch, args)
    }

    /// The most parts that the sums over images and positions are taken in.
    const SHARES: usize = 512;

    pub fn mixing_gradients(gpu: &Gpu, dy: &Tensor, x: &Tensor, need: &mut Need) -> Result<[Option<Tensor>; 2]> {
        if !need.wants(1) && !need.wants(2) {
            return Ok([None, None]);
        }
        let (batch, heads, out, positions) = (x.shape()[0], x.shape()[1], dy.shape()[1], x.shape()[2] * x.last());
        // Four units of 1024 positions each at least, since a block's last sums cost about as much as one.
        let shares = (batch * positions.div_ceil(1024)).div_ceil(4).min(SHARES);
        let (mut dw, mut db) = (x.alike(&[shares, out * heads], Dtype::F32)?, x.alike(&[shares, out], Dtype::F32)?);
        let launch = Launch::new(0, 256).grid(shares, out.div_ceil(8) * heads.div_ceil(8), 1);
        let args = Args::new().out(&mut dw).out(&mut db).input(dy).input(x).int(batch).int(heads).int(out).int(positions);
        gpu.launch(&typed("mix_heads_bwd", x.dtype()), launch, args)?;
        Ok([need.give(1, |sum| sum_of_parts(gpu, &dw, sum))?, need.give(2, |sum| sum_of_parts(gpu, &db, sum))?])
    }
}

pub fn cases() -> Vec<Case> {
    let mix = |name: &str, [batch, heads, n, m]: [usize; 4], out: usize| {
        let shapes: [&[usize]; 3] = [&[batch, heads, n, m], &[out, heads], &[out]];
        Case::new(&format!("mix_heads: {name}"), &shapes, |x| x[0].mix_heads(&x[1], &x[2])).vectors(&[1, 2])
    };
    vec![
        Case::new("bmm: 2 x 3 products of 5 x 7 and 7 x 4", &[&[2, 3, 5, 7], &[2, 3, 7, 4]], |x| x[0].bmm(&x[1])),
        Case::new("bmm: one product of 1 x 37 and 37 x 1", &[&[1, 37], &[37, 1]], |x| x[0].bmm(&x[1])),
        Case::new("bmm_nt: 2 x 3 products of 5 x 7 and 4 x 7", &[&[2, 3, 5, 7], &[2, 3, 4, 7]], |x| x[0].bmm_nt(&x[1])),
        Case::new("bmm_nt: a matrix with itself", &[&[2, 6, 3]], |x| x[0].bmm_nt(&x[0])),
        Case::new("bmm_nt: one product of 70 x 20 and 90 x 20", &[&[70, 20], &[90, 20]], |x| x[0].bmm_nt(&x[1])),
        Case::new("take_heads: the keys of 3 heads", &[&[2, 5, 36]], |x| x[0].take_heads(1, 3, 3)),
        Case::new("take_heads: the values of 2 heads of 8", &[&[2, 3, 48]], |x| x[0].take_heads(2, 3, 2)),
        Case::new("take_heads: one token, one head", &[&[1, 1, 6]], |x| x[0].take_heads(0, 1, 1)),
        Case::new("merge_heads: 3 heads of 4", &[&[2, 3, 5, 4]], |x| x[0].merge_heads()),
        Case::new("merge_heads: 2 heads of 16", &[&[2, 2, 9, 16]], |x| x[0].merge_heads()),
        mix("3 heads to 4", [2, 3, 5, 7], 4),
        mix("one head, one score", [1, 1, 1, 1], 1),
        mix("many scores", [2, 4, 50, 50], 4),
        mix("9 heads to 17", [2, 9, 3, 5], 17),
    ]
}
