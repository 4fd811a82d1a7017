//! Tokens in front of a sequence, taken from it, and averaged over it.
//!
//!   prepend     y[b] = [t_1, .., t_e, x[b]]       dx = the rest of dy, dt_i = sum over images of dy[b, i]
//!   tokens      y[b] = x[b, from..to]             dx = dy there, 0 elsewhere
//!   mean_tokens y[b] = mean of x[b, from..]       dx = dy / count there, 0 elsewhere
//!
//! x [B, N, C]; each t [1, 1, C], the same for all images, or [B, 1, C], one an image: then dt_i = dy[b, i]. Beside x in bf16 the former are f32 vectors,
//! the latter activations.
//!
//! `prepend_with_positions` adds the positions of all tokens, those in front included. GPU: kernels/tokens.cu, in the same pass.

use super::case::Case;
use super::gather::warps;
use super::{add, beside};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::simd::{Real, add as add_to};
use crate::error::Result;
use crate::tape::{Need, Var};
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;
use std::ops::Range;

impl Var {
    pub fn prepend(&self, tokens: &[&Var]) -> Result<Var> {
        let x = self.value();
        let values = check(x, tokens)?;
        let inputs: Vec<&Var> = std::iter::once(self).chain(tokens.iter().copied()).collect();
        if let Some(gpu) = x.gpu().cloned() {
            let (y, tokens) = (joined_on(&gpu, x, &values, None, None)?, kinds(&values));
            return Var::record_many("prepend", &inputs, y, move |dy, need| cut_on(&gpu, &dy, &tokens, need));
        }
        let n = x.shape()[1];
        let y = by_real!("prepend", x.dtype(), joined(x, &values))?;
        let (extra, dtype) = (tokens.len(), x.dtype());
        Var::record_many("prepend", &inputs, y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("prepend", dtype, cut(&dy, extra..extra + n, dx)))?;
            let tokens = (0..extra).map(|i| need.give(1 + i, |dt| by_real!("prepend", dtype, token_gradient(&dy, i, dt))));
            std::iter::once(Ok(dx)).chain(tokens).collect()
        })
    }

    /// The same with positions: the tokens in front have the first rows of the table, the others the rows that `ids` [B, N] name behind them (all in their
    /// order if None).
    pub fn prepend_with_positions(&self, tokens: &[&Var], table: &Var, ids: Option<&Tensor>) -> Result<Var> {
        let (x, front) = (self.value(), tokens.len());
        let Some(gpu) = x.gpu().cloned() else { return self.prepend(tokens)?.add_positions(table, front, ids) };
        let values = check(x, tokens)?;
        let ids = add::check_table(x, table.value(), front + x.shape()[1], ids.map(|ids| (x.shape()[0], front, ids)))?;
        let (y, kinds) = (joined_on(&gpu, x, &values, Some(table.value()), ids.as_ref())?, kinds(&values));
        let inputs: Vec<&Var> = std::iter::once(self).chain(tokens.iter().copied()).chain([table]).collect();
        Var::record_many("prepend_with_positions", &inputs, y, move |dy, need| {
            let dtable = need.give(1 + front, |dtable| add::table_gradient_on(&gpu, &dy, front, ids.as_ref(), dtable))?;
            let mut gradients = cut_on(&gpu, &dy, &kinds, need)?;
            gradients.push(dtable);
            Ok(gradients)
        })
    }

    /// Tokens `range` of each image, [B, len, C].
    pub fn tokens(&self, range: Range<usize>) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("tokens: x is {x:?} but [B, N, C] is needed") };
        ensure!(range.start <= range.end && range.end <= n, "tokens: {range:?} of {n} tokens");
        let mut y = x.alike(&[batch, range.len(), c], x.dtype())?;
        let (start, count) = (range.start, range.len());
        match x.gpu() {
            None => by_real!("tokens", x.dtype(), cut(x, range.clone(), &mut y))?,
            Some(gpu) => move_on(gpu, x, &mut y, 0, start, count)?,
        }
        let (dtype, gpu) = (x.dtype(), x.gpu().cloned());
        Var::record("tokens", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            match gpu {
                None => by_real!("tokens", dtype, spread(&dy, range, &mut dx, false))?,
                Some(gpu) => move_on(&gpu, &dy, &mut dx, start, 0, count)?,
            }
            Ok([Some(dx)])
        })
    }

    /// Token i of each image, [B, C].
    pub fn token(&self, i: usize) -> Result<Var> {
        let one = self.tokens(i..i + 1)?;
        let (batch, c) = (one.shape()[0], one.shape()[2]);
        one.reshape(&[batch, c])
    }

    /// Mean of the tokens from `from` on, [B, C].
    pub fn mean_tokens(&self, from: usize) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("mean_tokens: x is {x:?} but [B, N, C] is needed") };
        ensure!(from < n, "mean_tokens: from token {from} of {n} there is nothing to average");
        let mut y = x.alike(&[batch, c], x.dtype())?;
        let share = 1.0 / (n - from) as f64;
        match x.gpu() {
            None => by_real!("mean_tokens", x.dtype(), average(x, from, &mut y))?,
            Some(gpu) => {
                let args = Args::new().out(&mut y).input(x).int(n).int(from).int(c).float(share);
                gpu.launch(&typed("mean_tokens_fwd", x.dtype()), Launch::new(0, 256).grid(batch, c.div_ceil(256), 1), args)?;
            }
        }
        let (dtype, gpu) = (x.dtype(), x.gpu().cloned());
        Var::record("mean_tokens", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            match gpu {
                None => by_real!("mean_tokens", dtype, spread(&dy, from..n, &mut dx, true))?,
                Some(gpu) => {
                    let args = Args::new().out(&mut dx).input(&dy).int(batch * n).int(n).int(from).int(c).float(share);
                    gpu.launch(&typed("mean_tokens_bwd", dtype), warps(batch * n), args)?;
                }
            }
            Ok([Some(dx)])
        })
    }
}

/// The values of the tokens, once they fit.
fn check(x: &Tensor, tokens: &[&Var]) -> Result<Vec<Tensor>> {
    let &[batch, _, c] = x.shape() else { crate::bail!("prepend: x is {x:?} but [B, N, C] is needed") };
    for token in tokens {
        let value = token.value();
        let one_an_image = value.shape() == [batch, 1, c] && value.dtype() == x.dtype();
        let shared = value.numel() == c && value.dtype() == beside(x.dtype());
        ensure!(one_an_image || shared, "prepend: a token is {value:?} but x is {x:?}");
    }
    Ok(tokens.iter().map(|token| token.value().clone()).collect())
}

/// What the gradient of each token is: its dtype, and whether it is one for all images.
fn kinds(tokens: &[Tensor]) -> Vec<(Dtype, bool)> {
    tokens.iter().map(|token| (token.dtype(), token.numel() == token.last())).collect()
}

fn joined_on(gpu: &Gpu, x: &Tensor, tokens: &[Tensor], table: Option<&Tensor>, ids: Option<&Tensor>) -> Result<Tensor> {
    let (batch, c, front) = (x.shape()[0], x.last(), tokens.len());
    ensure!(front <= 2, "prepend: {} puts at most two tokens in front, not {front}", gpu.name());
    let total = front + x.shape()[1];
    let mut y = x.alike(&[batch, total, c], x.dtype())?;
    let vectors = tokens.iter().map(|token| token.cast(Dtype::F32)).collect::<Result<Vec<_>>>()?;
    let step = |i: usize| tokens.get(i).map_or(0, |token| if token.numel() == c { 0 } else { c });
    let args = Args::new().out(&mut y).input(x).maybe(vectors.first()).maybe(vectors.get(1)).maybe(table).maybe(ids);
    let args = args.int(batch * total).int(total).int(front).int(c).int(step(0)).int(step(1)).int(table.map_or(0, Tensor::rows)).fault();
    gpu.launch(&typed("prepend_fwd", x.dtype()), warps(batch * total), args)?;
    Ok(y)
}

/// The gradients of x and of each token in front of it.
fn cut_on(gpu: &Gpu, dy: &Tensor, tokens: &[(Dtype, bool)], need: &mut Need) -> Result<Vec<Option<Tensor>>> {
    let (batch, total, c, front) = (dy.shape()[0], dy.shape()[1], dy.last(), tokens.len());
    let mut gradients = vec![need.give(0, |dx| move_on(gpu, dy, dx, 0, front, total - front))?];
    for (i, &(dtype, shared)) in tokens.iter().enumerate() {
        gradients.push(need.give(1 + i, |dt| {
            if !shared || dtype != Dtype::F32 {
                return move_on(gpu, dy, dt, 0, i, 1);
            }
            let args = Args::new().out(dt).input(dy).int(batch).int(total).int(i).int(c);
            gpu.launch(&typed("prepend_bwd", dy.dtype()), Launch::new(c.div_ceil(32), 1024), args)
        })?);
    }
    Ok(gradients)
}

/// Tokens `from` on of each image of x become tokens `to` on of y, so many of them; the others of y become 0.
fn move_on(gpu: &Gpu, x: &Tensor, y: &mut Tensor, to: usize, from: usize, count: usize) -> Result<()> {
    let (rows, y_tokens, c) = (y.rows(), y.shape()[1], y.last());
    let args = Args::new().out(y).input(x).int(rows).int(y_tokens).int(x.shape()[1]).int(to).int(from).int(count).int(c);
    gpu.launch(&typed("move_tokens", x.dtype()), warps(rows), args)
}

vectorised! {
    fn times<T: Real>(x: &[T], factor: T, y: &mut [T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * factor);
    }
}

fn joined<T: Real + Element>(x: &Tensor, tokens: &[Tensor]) -> Result<Tensor> {
    let (batch, n, c) = (x.shape()[0], x.shape()[1], x.last());
    let mut y = Tensor::empty(&[batch, tokens.len() + n, c], x.dtype())?;
    let x = x.data::<T>();
    y.data_mut::<T>().par_chunks_mut(((tokens.len() + n) * c).max(1)).enumerate().for_each(|(image, y)| {
        // By number, as an image of which no patch is kept has tokens in front all the same.
        let x = &x[image * n * c..][..n * c];
        let (front, rest) = y.split_at_mut(tokens.len() * c);
        for (y, token) in front.chunks_exact_mut(c.max(1)).zip(tokens) {
            let first = if token.numel() == c { 0 } else { image * c };
            y.copy_from_slice(&token.data()[first..first + c]);
        }
        rest.copy_from_slice(x);
    });
    Ok(y)
}

fn cut<T: Real + Element>(x: &Tensor, range: Range<usize>, y: &mut Tensor) -> Result<()> {
    let (n, c) = (x.shape()[1], x.last());
    let images = y.data_mut::<T>().par_chunks_mut((range.len() * c).max(1)).zip(x.data::<T>().par_chunks((n * c).max(1)));
    images.for_each(|(y, x)| y.copy_from_slice(&x[range.start * c..range.end * c]));
    Ok(())
}

/// dx = 0 outside `range`; inside, dy itself, or dy [B, C] divided by the number of tokens.
fn spread<T: Real + Element>(dy: &Tensor, range: Range<usize>, dx: &mut Tensor, averaged: bool) -> Result<()> {
    let (n, c) = (dx.shape()[1], dx.last());
    let share = T::of(1.0 / range.len().max(1) as f64);
    let piece = if averaged { c } else { range.len() * c };
    let dy = dy.data::<T>();
    dx.data_mut::<T>().par_chunks_mut((n * c).max(1)).enumerate().for_each(|(image, dx)| {
        let dy = &dy[image * piece..][..piece];
        dx.fill(T::ZERO);
        let inside = &mut dx[range.start * c..range.end * c];
        if averaged {
            inside.chunks_exact_mut(c.max(1)).for_each(|dx| times(dy, share, dx));
        } else {
            inside.copy_from_slice(dy);
        }
    });
    Ok(())
}

fn token_gradient<T: Real + Element>(dy: &Tensor, i: usize, dt: &mut Tensor) -> Result<()> {
    let (n, c) = (dy.shape()[1], dy.last());
    let dt = dt.data_mut::<T>();
    let shared = dt.len() == c;
    dt.fill(T::ZERO);
    for (image, dy) in dy.data::<T>().chunks_exact((n * c).max(1)).enumerate() {
        let first = if shared { 0 } else { image * c };
        add_to(&mut dt[first..first + c], &dy[i * c..][..c]);
    }
    Ok(())
}

fn average<T: Real + Element>(x: &Tensor, from: usize, y: &mut Tensor) -> Result<()> {
    let (n, c) = (x.shape()[1], x.last());
    let share = T::of(1.0 / (n - from) as f64);
    let images = y.data_mut::<T>().par_chunks_mut(c.max(1)).zip(x.data::<T>().par_chunks((n * c).max(1)));
    images.for_each(|(y, x)| {
        y.fill(T::ZERO);
        x[from * c..].chunks_exact(c.max(1)).for_each(|x| add_to(y, x));
        y.iter_mut().for_each(|y| *y *= share);
    });
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let ids = Tensor::from_slice(&[2, 3], &[4u32, 0, 2, 2, 1, 4]).expect("six numbers");
    vec![
        Case::new("prepend: class and distillation token", &[&[2, 3, 37], &[1, 1, 37], &[1, 1, 37]], |x| x[0].prepend(&[&x[1], &x[2]]))
            .vectors(&[1, 2]),
        Case::new("prepend: one token an image", &[&[3, 2, 5], &[3, 1, 5], &[1, 1, 5]], |x| x[0].prepend(&[&x[1], &x[2]])).vectors(&[2]),
        Case::new("prepend: one image", &[&[1, 1, 4], &[1, 1, 4]], |x| x[0].prepend(&[&x[1]])),
        Case::new("prepend: 35 images, whole vectors", &[&[35, 1, 40], &[1, 1, 40]], |x| x[0].prepend(&[&x[1]])).vectors(&[1]),
        Case::new("prepend_with_positions: two tokens before the kept", &[&[2, 3, 37], &[1, 1, 37], &[1, 1, 37], &[1, 7, 37]], move |x| {
            x[0].prepend_with_positions(&[&x[1], &x[2]], &x[3], Some(&ids))
        })
        .vectors(&[1, 2, 3]),
        Case::new("prepend_with_positions: one token before all", &[&[2, 4, 264], &[1, 1, 264], &[1, 5, 264]], |x| {
            x[0].prepend_with_positions(&[&x[1]], &x[2], None)
        })
        .vectors(&[1, 2]),
        Case::new("tokens: 1..4 of 5", &[&[2, 5, 6]], |x| x[0].tokens(1..4)),
        Case::new("tokens: whole vectors", &[&[2, 5, 264]], |x| x[0].tokens(1..5)),
        Case::new("token: the first", &[&[2, 5, 6]], |x| x[0].token(0)),
        Case::new("mean_tokens: all but the first", &[&[2, 5, 37]], |x| x[0].mean_tokens(1)),
        Case::new("mean_tokens: whole vectors", &[&[2, 19, 264]], |x| x[0].mean_tokens(0)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_stand_in_front_of_no_patches_too() {
        let class = Var::constant(Tensor::from_slice(&[1, 1, 3], &[1.0f32, 2.0, 3.0]).unwrap());
        let none = Var::constant(Tensor::zeros(&[2, 0, 3], Dtype::F32).unwrap());
        let joined = none.prepend(&[&class]).unwrap();
        assert_eq!((joined.shape(), joined.value().data::<f32>()), (&[2, 1, 3][..], &[1.0, 2.0, 3.0, 1.0, 2.0, 3.0][..]));
    }
}
