//! Tokens in front of a sequence, taken from it, and averaged over it.
//!
//!   prepend     y[b] = [t_1, .., t_e, x[b]]       dx = the rest of dy, dt_i = sum over images of dy[b, i]
//!   tokens      y[b] = x[b, from..to]             dx = dy there, 0 elsewhere
//!   mean_tokens y[b] = mean of x[b, from..]       dx = dy / count there, 0 elsewhere
//!
//! x [B, N, C]; each t [1, 1, C], the same for all images, or [B, 1, C], one an image: then dt_i = dy[b, i].

use super::case::Case;
use crate::device::simd::{Real, add};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;
use std::ops::Range;

impl Var {
    pub fn prepend(&self, tokens: &[&Var]) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("prepend: x is {x:?} but [B, N, C] is needed") };
        for token in tokens {
            let value = token.value();
            let fits = value.numel() == c || value.shape() == [batch, 1, c];
            ensure!(fits && value.dtype() == x.dtype(), "prepend: a token is {value:?} but x is {x:?}");
        }
        let values: Vec<Tensor> = tokens.iter().map(|token| token.value().clone()).collect();
        let y = by_real!("prepend", x.dtype(), joined(x, &values))?;
        let inputs: Vec<&Var> = std::iter::once(self).chain(tokens.iter().copied()).collect();
        let (extra, dtype) = (tokens.len(), x.dtype());
        Var::record_many("prepend", &inputs, y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("prepend", dtype, cut(&dy, extra..extra + n, dx)))?;
            let tokens = (0..extra).map(|i| need.give(1 + i, |dt| by_real!("prepend", dtype, token_gradient(&dy, i, dt))));
            std::iter::once(Ok(dx)).chain(tokens).collect()
        })
    }

    /// Tokens `range` of each image, [B, len, C].
    pub fn tokens(&self, range: Range<usize>) -> Result<Var> {
        let x = self.value();
        let &[batch, n, c] = x.shape() else { crate::bail!("tokens: x is {x:?} but [B, N, C] is needed") };
        ensure!(range.start <= range.end && range.end <= n, "tokens: {range:?} of {n} tokens");
        let mut y = Tensor::empty(&[batch, range.len(), c], x.dtype())?;
        by_real!("tokens", x.dtype(), cut(x, range.clone(), &mut y))?;
        let dtype = x.dtype();
        Var::record("tokens", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("tokens", dtype, spread(&dy, range, &mut dx, false))?;
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
        let mut y = Tensor::zeros(&[batch, c], x.dtype())?;
        by_real!("mean_tokens", x.dtype(), average(x, from, &mut y))?;
        let dtype = x.dtype();
        Var::record("mean_tokens", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            by_real!("mean_tokens", dtype, spread(&dy, from..n, &mut dx, true))?;
            Ok([Some(dx)])
        })
    }
}

vectorised! {
    fn times<T: Real>(x: &[T], factor: T, y: &mut [T]) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * factor);
    }
}

fn joined<T: Real + Element>(x: &Tensor, tokens: &[Tensor]) -> Result<Tensor> {
    let (batch, n, c) = (x.shape()[0], x.shape()[1], x.last());
    let mut y = Tensor::empty(&[batch, tokens.len() + n, c], x.dtype())?;
    let images = y.data_mut::<T>().par_chunks_mut(((tokens.len() + n) * c).max(1));
    images.zip(x.data::<T>().par_chunks((n * c).max(1))).enumerate().for_each(|(image, (y, x))| {
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
        add(&mut dt[first..first + c], &dy[i * c..][..c]);
    }
    Ok(())
}

fn average<T: Real + Element>(x: &Tensor, from: usize, y: &mut Tensor) -> Result<()> {
    let (n, c) = (x.shape()[1], x.last());
    let share = T::of(1.0 / (n - from) as f64);
    let images = y.data_mut::<T>().par_chunks_mut(c.max(1)).zip(x.data::<T>().par_chunks((n * c).max(1)));
    images.for_each(|(y, x)| {
        x[from * c..].chunks_exact(c.max(1)).for_each(|x| add(y, x));
        y.iter_mut().for_each(|y| *y *= share);
    });
    Ok(())
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("prepend: class and distillation token", &[&[2, 3, 37], &[1, 1, 37], &[1, 1, 37]], |x| x[0].prepend(&[&x[1], &x[2]])),
        Case::new("prepend: one token an image", &[&[3, 2, 5], &[3, 1, 5], &[1, 1, 5]], |x| x[0].prepend(&[&x[1], &x[2]])),
        Case::new("prepend: one image", &[&[1, 1, 4], &[1, 1, 4]], |x| x[0].prepend(&[&x[1]])),
        Case::new("tokens: 1..4 of 5", &[&[2, 5, 6]], |x| x[0].tokens(1..4)),
        Case::new("token: the first", &[&[2, 5, 6]], |x| x[0].token(0)),
        Case::new("mean_tokens: all but the first", &[&[2, 5, 37]], |x| x[0].mean_tokens(1)),
    ]
}
