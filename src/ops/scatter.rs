//! Putting mask tokens where tokens are hidden, and all tokens back in order.
//!
//!   y[b, e + l] = x[b, e + restore[b, l]] if restore[b, l] < K, else the mask token;   y[b, i] = x[b, i] for the first e tokens
//!   dx[b, e + restore[b, l]] = dy[b, e + l] where restore[b, l] < K,   dmask = sum of dy over the hidden places
//!
//! x [B, e + K, C]; mask token [1, 1, C]; restore [B, L], in each row a permutation of 0..L; y [B, e + L, C].

use super::case::Case;
use super::gather::check_ids;
use crate::device::parallel;
use crate::device::simd::{Real, add};
use crate::error::Result;
use crate::tape::{Need, Var};
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure};
use rayon::prelude::*;

impl Var {
    pub fn unshuffle(&self, mask_token: &Var, restore: &Tensor, extra: usize) -> Result<Var> {
        let x = self.value();
        let &[batch, tokens, c] = x.shape() else { crate::bail!("unshuffle: x is {x:?} but [B, N, C] is needed") };
        let length = restore.last();
        ensure!(
            mask_token.value().numel() == c && mask_token.dtype() == x.dtype(),
            "unshuffle: the mask token is {:?} but x is {x:?}",
            mask_token.value()
        );
        ensure!(
            (extra..=extra + length).contains(&tokens),
            "unshuffle: x has {tokens} tokens, {extra} of them apart, but only {length} places"
        );
        check_ids("unshuffle", restore, batch, length)?;
        let y = by_real!("unshuffle", x.dtype(), forward(x, mask_token.value(), restore, extra))?;
        let (restore, dtype) = (restore.clone(), x.dtype());
        Var::record("unshuffle", [self, mask_token], y, move |dy, need| {
            by_real!("unshuffle", dtype, backward(&dy, &restore, tokens, extra, need))
        })
    }
}

fn forward<T: Real + Element>(x: &Tensor, mask_token: &Tensor, restore: &Tensor, extra: usize) -> Result<Tensor> {
    let (batch, tokens, c, length) = (x.shape()[0], x.shape()[1], x.last(), restore.last());
    let mut y = Tensor::empty(&[batch, extra + length, c], x.dtype())?;
    let (x, mask_token, restore) = (x.data::<T>(), mask_token.data::<T>(), restore.data::<u32>());
    parallel::rows(y.data_mut::<T>(), c, |first, y| {
        for (j, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
            let (image, place) = ((first + j) / (extra + length), (first + j) % (extra + length));
            let source = if place < extra { place } else { extra + restore[image * length + place - extra] as usize };
            y.copy_from_slice(if source < tokens { &x[(image * tokens + source) * c..][..c] } else { mask_token });
        }
    });
    Ok(y)
}

fn backward<T: Real + Element>(dy: &Tensor, restore: &Tensor, tokens: usize, extra: usize, need: &mut Need) -> Result<[Option<Tensor>; 2]> {
    let (c, length) = (dy.last(), restore.last());
    let (dy, restore) = (dy.data::<T>(), restore.data::<u32>());
    let places = |image: usize| {
        let source = move |place: usize| if place < extra { place } else { extra + restore[image * length + place - extra] as usize };
        (0..extra + length).map(move |place| (&dy[(image * (extra + length) + place) * c..][..c], source(place)))
    };
    let dx = need.give(0, |dx| {
        let images = dx.data_mut::<T>().par_chunks_mut((tokens * c).max(1));
        images.enumerate().for_each(|(image, dx)| {
            for (dy, source) in places(image).filter(|(_, source)| *source < tokens) {
                dx[source * c..][..c].copy_from_slice(dy);
            }
        });
        Ok(())
    })?;
    let dmask = need.give(1, |dmask| {
        // One sum an image, then the images in order.
        let mut sums = Tensor::zeros(&[restore.len() / length.max(1), c], T::DTYPE)?;
        sums.data_mut::<T>().par_chunks_mut(c.max(1)).enumerate().for_each(|(image, sum)| {
            places(image).filter(|(_, source)| *source >= tokens).for_each(|(dy, _)| add(sum, dy));
        });
        let dmask = dmask.data_mut::<T>();
        dmask.fill(T::ZERO);
        sums.data::<T>().chunks_exact(c.max(1)).for_each(|sum| add(dmask, sum));
        Ok(())
    })?;
    Ok([dx, dmask])
}

pub fn cases() -> Vec<Case> {
    let restore = Tensor::from_slice(&[2, 4], &[2u32, 0, 3, 1, 1, 3, 0, 2]).expect("eight numbers");
    let (a, b, c) = (restore.clone(), restore.clone(), restore);
    vec![
        Case::new("unshuffle: 2 of 4 kept, a class token", &[&[2, 3, 37], &[1, 1, 37]], move |x| x[0].unshuffle(&x[1], &a, 1)),
        Case::new("unshuffle: nothing hidden", &[&[2, 4, 5], &[1, 1, 5]], move |x| x[0].unshuffle(&x[1], &b, 0)),
        Case::new("unshuffle: everything hidden", &[&[2, 1, 5], &[1, 1, 5]], move |x| x[0].unshuffle(&x[1], &c, 1)),
    ]
}
