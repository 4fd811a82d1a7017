//! Putting mask tokens where tokens are hidden, and all tokens back in order.
//!
//!   y[b, e + l] = x[b, e + restore[b, l]] if restore[b, l] < K, else the mask token;   y[b, i] = x[b, i] for the first e tokens
//!   dx[b, e + restore[b, l]] = dy[b, e + l] where restore[b, l] < K,   dmask = sum of dy over the hidden places
//!
//! x [B, e + K, C]; mask token [1, 1, C]; restore [B, L], in each row a permutation of 0..L; y [B, e + L, C].
//!
//! `unshuffle_with_positions` adds row i of a table [1, e + L, C] to token i of each image. GPU: kernels/scatter.cu, in the same pass.

use super::case::Case;
use super::gather::{ids_on, warps};
use super::{add, beside, sum_of_parts};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, add as add_to};
use crate::error::Result;
use crate::tape::{Need, Var};
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure};
use rayon::prelude::*;

impl Var {
    pub fn unshuffle(&self, mask_token: &Var, restore: &Tensor, extra: usize) -> Result<Var> {
        let x = self.value();
        let restore = check(x, mask_token.value(), restore, extra)?;
        if let Some(gpu) = x.gpu().cloned() {
            let (y, tokens) = (forward_on(&gpu, x, mask_token.value(), None, &restore, extra)?, x.shape()[1]);
            return Var::record("unshuffle", [self, mask_token], y, move |dy, need| backward_on(&gpu, &dy, &restore, tokens, extra, need));
        }
        let y = by_real!("unshuffle", x.dtype(), forward(x, mask_token.value(), &restore, extra))?;
        let (tokens, dtype) = (x.shape()[1], x.dtype());
        Var::record("unshuffle", [self, mask_token], y, move |dy, need| {
            by_real!("unshuffle", dtype, backward(&dy, &restore, tokens, extra, need))
        })
    }

    /// The same with the positions of all tokens added.
    pub fn unshuffle_with_positions(&self, mask_token: &Var, restore: &Tensor, extra: usize, table: &Var) -> Result<Var> {
        let x = self.value();
        let Some(gpu) = x.gpu().cloned() else { return self.unshuffle(mask_token, restore, extra)?.add_positions(table, extra, None) };
        let restore = check(x, mask_token.value(), restore, extra)?;
        add::check_table(x, table.value(), extra + restore.last(), None)?;
        let (y, tokens) = (forward_on(&gpu, x, mask_token.value(), Some(table.value()), &restore, extra)?, x.shape()[1]);
        Var::record("unshuffle_with_positions", [self, mask_token, table], y, move |dy, need| {
            let dtable = need.give(2, |dtable| add::table_gradient_on(&gpu, &dy, extra, None, dtable))?;
            let [dx, dmask] = backward_on(&gpu, &dy, &restore, tokens, extra, need)?;
            Ok([dx, dmask, dtable])
        })
    }
}

/// The places on x's device, once everything fits.
fn check(x: &Tensor, mask_token: &Tensor, restore: &Tensor, extra: usize) -> Result<Tensor> {
    let &[batch, tokens, c] = x.shape() else { crate::bail!("unshuffle: x is {x:?} but [B, N, C] is needed") };
    let length = restore.last();
    ensure!(
        mask_token.numel() == c && mask_token.dtype() == beside(x.dtype()),
        "unshuffle: the mask token is {mask_token:?} but x is {x:?}"
    );
    ensure!(
        (extra..=extra + length).contains(&tokens),
        "unshuffle: x has {tokens} tokens, {extra} of them apart, but only {length} places"
    );
    ids_on(&x.device(), "unshuffle", restore, batch, length)
}

fn forward_on(gpu: &Gpu, x: &Tensor, mask_token: &Tensor, table: Option<&Tensor>, restore: &Tensor, extra: usize) -> Result<Tensor> {
    let (batch, tokens, c, length) = (x.shape()[0], x.shape()[1], x.last(), restore.last());
    let rows = batch * (extra + length);
    let mut y = x.alike(&[batch, extra + length, c], x.dtype())?;
    let args = Args::new().out(&mut y).input(x).input(mask_token).maybe(table).input(restore);
    let args = args.int(rows).int(tokens).int(extra).int(length).int(c).fault();
    gpu.launch(&typed("unshuffle_fwd", x.dtype()), warps(rows), args)?;
    Ok(y)
}

/// How many groups of rows the blocks of the backward share.
const SHARES: usize = 256;

fn backward_on(gpu: &Gpu, dy: &Tensor, restore: &Tensor, tokens: usize, extra: usize, need: &mut Need) -> Result<[Option<Tensor>; 2]> {
    let (rows, c, shares) = (dy.rows(), dy.last(), dy.rows().div_ceil(8).clamp(1, SHARES));
    let mut dx = if need.wants(0) { Some(need.out(0)?) } else { None };
    let mut partial = if need.wants(1) { Some(dy.alike(&[shares, c], Dtype::F32)?) } else { None };
    let args = Args::new().maybe_out(dx.as_mut()).maybe_out(partial.as_mut()).input(dy).input(restore);
    let args = args.int(rows).int(tokens).int(extra).int(restore.last()).int(c).fault();
    gpu.launch(&typed("unshuffle_bwd", dy.dtype()), Launch::new(0, 256).grid(c.div_ceil(256), shares, 1), args)?;
    let dmask = partial.map(|partial| need.give(1, |dmask| sum_of_parts(gpu, &partial, dmask))).transpose()?.flatten();
    Ok([dx, dmask])
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
            places(image).filter(|(_, source)| *source >= tokens).for_each(|(dy, _)| add_to(sum, dy));
        });
        let dmask = dmask.data_mut::<T>();
        dmask.fill(T::ZERO);
        sums.data::<T>().chunks_exact(c.max(1)).for_each(|sum| add_to(dmask, sum));
        Ok(())
    })?;
    Ok([dx, dmask])
}

pub fn cases() -> Vec<Case> {
    let restore = Tensor::from_slice(&[2, 4], &[2u32, 0, 3, 1, 1, 3, 0, 2]).expect("eight numbers");
    let many: Vec<u32> = (0..3 * 31).map(|i| 12 * (i % 31) % 31).collect();
    let many = Tensor::from_slice(&[3, 31], &many).expect("three rows of 31");
    let unshuffle = |name: &str, x: [usize; 3], extra: usize| {
        let (restore, token) = (restore.clone(), [1, 1, x[2]]);
        Case::new(&format!("unshuffle: {name}"), &[&x, &token], move |x| x[0].unshuffle(&x[1], &restore, extra)).vectors(&[1])
    };
    let with_positions = |name: &str, restore: &Tensor, x: [usize; 3], extra: usize| {
        let (restore, token, table) = (restore.clone(), [1, 1, x[2]], [1, extra + restore.last(), x[2]]);
        let run = move |x: &[Var]| x[0].unshuffle_with_positions(&x[1], &restore, extra, &x[2]);
        Case::new(&format!("unshuffle_with_positions: {name}"), &[&x, &token, &table], run).vectors(&[1, 2])
    };
    vec![
        unshuffle("2 of 4 kept, a class token", [2, 3, 37], 1),
        unshuffle("nothing hidden", [2, 4, 5], 0),
        unshuffle("everything hidden", [2, 1, 5], 1),
        with_positions("2 of 4 kept, two tokens in front", &restore, [2, 4, 37], 2),
        with_positions("three images of 31, whole vectors", &many, [3, 9, 264], 1),
    ]
}
