//! region_conv on the CPU.
//!
//! A region is filtered for 32 channels at a time, or 16 where there are fewer: a row of its tokens stays in registers over all taps, with the
//! rows around it read once a row of taps. Tokens that are not there are zeros; rows that have no others are skipped. For the weight's gradient a
//! row of taps stays in registers over a region.
//! Sides of regions and filters that no ConViT has, and fewer channels, go one by one.

use super::{Layout, Regions, Seen};
use crate::device::parallel;
use crate::device::simd::Real;
use crate::error::Result;
use crate::ops::linear::column_sums;
use crate::tape::Need;
use crate::tensor::{Element, Tensor};
use crate::vectorised;
use rayon::prelude::*;

/// Channels that are filtered together: the most that there are.
const WIDTHS: [usize; 2] = [32, 16];

/// How channels are cut into blocks; what is kept by channel lies as [blocks, .., width]. Where the width is no divisor, the last block overlaps the one
/// before it.
#[derive(Clone, Copy)]
struct Blocks {
    c: usize,
    width: usize,
    k: usize,
}

impl Blocks {
    fn of(c: usize, k: usize, layout: Layout) -> Self {
        let usual = k == 5 && [2, 4].contains(&layout.side);
        Self { c, width: WIDTHS.into_iter().find(|&width| usual && c >= width).unwrap_or(1), k }
    }

    fn count(self) -> usize {
        self.c.div_ceil(self.width)
    }

    /// The first channel of a block.
    fn first(self, block: usize) -> usize {
        (block * self.width).min(self.c - self.width)
    }

    fn taps(self) -> usize {
        self.k * self.k
    }

    /// Where number `i` of `each` numbers of a channel lies.
    fn index(self, channel: usize, each: usize, i: usize) -> usize {
        let block = channel / self.width;
        (block * each + i) * self.width + channel - self.first(block)
    }

    /// The weight [C, 1, k, k] as [blocks, taps, width], turned round on request.
    fn pack<T: Real + Element>(self, w: &Tensor, turned: bool) -> Result<Tensor> {
        let taps = self.taps();
        let mut packed = Tensor::empty(&[self.count(), taps, self.width], w.dtype())?;
        let w = w.data::<T>();
        for (at, value) in packed.data_mut::<T>().iter_mut().enumerate() {
            let (block, tap, lane) = (at / self.width / taps, at / self.width % taps, at % self.width);
            *value = w[(self.first(block) + lane) * taps + if turned { taps - 1 - tap } else { tap }];
        }
        Ok(packed)
    }
}

/// What lies around the regions, and where.
struct Around<'a> {
    regions: &'a Regions,
    /// The regions near one, and for each the place in raster order of the region with its halo that each of its tokens has.
    near: Vec<([isize; 2], Vec<[usize; 2]>)>,
    /// Tokens along a side of a region with its halo.
    wide: usize,
    c: usize,
    kept: Option<&'a [u32]>,
    places: Option<&'a [u32]>,
    hidden: Option<&'a [f32]>,
}

/// One region with its halo.
struct Window<'a, T> {
    /// Numbers of the tokens in raster order; zeros for those that are not there.
    tokens: Vec<&'a [T]>,
    /// Whether one is there, for each row.
    rows: Vec<bool>,
    zeros: &'a [T],
    /// Tokens along a side of the window and of the region.
    wide: usize,
    side: usize,
    /// Where the region's own tokens begin, in raster order.
    own: Vec<usize>,
}

impl<'a> Around<'a> {
    fn of(regions: &'a Regions, k: usize, c: usize) -> Self {
        let (kept, places, hidden) = match &regions.seen {
            Seen::All => (None, None, None),
            Seen::Hiding(hidden) => (None, None, Some(hidden.data::<f32>())),
            Seen::Only { kept, places } => (Some(kept.data::<u32>()), Some(places.data::<u32>()), None),
        };
        let (layout, wide) = (regions.layout, regions.layout.side + k - 1);
        let mut near: Vec<([isize; 2], Vec<[usize; 2]>)> = Vec::new();
        for at in 0..wide * wide {
            let [row, column] = [at / wide, at % wide].map(|i| i as isize - (k / 2) as isize);
            let side = layout.side as isize;
            let offset = [row.div_euclid(side), column.div_euclid(side)];
            let token = layout.token([row.rem_euclid(side) as usize, column.rem_euclid(side) as usize]);
            match near.iter_mut().find(|(other, _)| *other == offset) {
                Some((_, tokens)) => tokens.push([at, token]),
                None => near.push((offset, vec![[at, token]])),
            }
        }
        Self { regions, near, wide, c, kept, places, hidden }
    }

    /// The same with hidden regions as good as others.
    fn unhidden(self) -> Self {
        Self { hidden: None, ..self }
    }

    fn region(&self, i: usize) -> usize {
        self.kept.map_or(i % self.regions.present(), |kept| kept[i] as usize)
    }

    fn is_hidden(&self, i: usize) -> bool {
        let image = i / self.regions.present();
        self.hidden.is_some_and(|hidden| hidden[image * self.regions.all() + self.region(i)] != 0.0)
    }

    fn window<'x, T: Real>(&self, zeros: &'x [T]) -> Window<'x, T> {
        let layout = self.regions.layout;
        let own = (0..layout.tokens()).map(|at| layout.token([at / layout.side, at % layout.side]) * self.c).collect();
        let (tokens, rows) = (vec![zeros; self.wide * self.wide], vec![false; self.wide]);
        Window { tokens, rows, zeros, wide: self.wide, side: layout.side, own }
    }

    /// Moves a window of x to region place `i`, counted through all images.
    fn see<'x, T: Real>(&self, i: usize, x: &'x [T], window: &mut Window<'x, T>) {
        let ([down, across], present, each) = (self.regions.grid, self.regions.present(), self.regions.layout.tokens());
        let (image, region) = (i / present, self.region(i));
        window.rows.fill(false);
        for ([dy, dx], tokens) in &self.near {
            let place = || {
                let row = (region / across).checked_add_signed(*dy).filter(|&row| row < down)?;
                let column = (region % across).checked_add_signed(*dx).filter(|&column| column < across)?;
                let at = row * across + column;
                let place = self.places.map_or(at, |places| places[image * down * across + at] as usize);
                let seen = place < present && self.hidden.is_none_or(|hidden| hidden[image * down * across + at] == 0.0);
                seen.then_some((image * present + place) * each)
            };
            let first = place();
            for &[at, token] in tokens {
                window.tokens[at] = first.map_or(window.zeros, |first| &x[(first + token) * self.c..][..self.c]);
                window.rows[at / self.wide] |= first.is_some();
            }
        }
    }
}

/// A block of channels of one token.
#[inline(always)]
fn block<T, const N: usize>(x: &[T], from: usize) -> &[T; N] {
    x[from..].first_chunk().expect("rows are as wide as blocks")
}

/// What a row of W tokens says to S sums beside each other.
#[inline(always)]
fn add_row<T: Real, const N: usize, const S: usize, const K: usize, const W: usize>(
    sums: &mut [[T; N]; S],
    x: &[&[T; N]; W],
    taps: &[[T; N]; K],
) {
    for v in 0..K {
        for j in 0..S {
            for l in 0..N {
                sums[j][l] = x[j + v][l].mul_add(taps[v][l], sums[j][l]);
            }
        }
    }
}

#[inline(always)]
fn filter_blocks<T: Real, const N: usize, const S: usize, const K: usize, const W: usize>(
    window: &Window<T>,
    w: &[T],
    bias: &[T],
    blocks: Blocks,
    y: &mut [T],
) {
    let (taps, _) = w.as_chunks::<N>().0.as_chunks::<K>();
    for (i, taps) in taps.chunks_exact(K).enumerate() {
        let from = blocks.first(i);
        for row in 0..S {
            let mut sums = [*block::<T, N>(bias, from); S];
            for (u, taps) in taps.iter().enumerate() {
                if window.rows[row + u] {
                    let tokens = &window.tokens[(row + u) * W..][..W];
                    let x: [&[T; N]; W] = std::array::from_fn(|v| block(tokens[v], from));
                    add_row(&mut sums, &x, taps);
                }
            }
            for (sums, own) in sums.iter().zip(&window.own[row * S..]) {
                y[own + from..][..N].copy_from_slice(sums);
            }
        }
    }
}

/// What a row of dy says to the K taps of a row, where x is the row that they see.
#[inline(always)]
fn add_taps<T: Real, const N: usize, const S: usize, const K: usize, const W: usize>(
    taps: &mut [[T; N]; K],
    x: &[&[T; N]; W],
    dy: &[&[T; N]; S],
) {
    for j in 0..S {
        for v in 0..K {
            for l in 0..N {
                taps[v][l] = x[j + v][l].mul_add(dy[j][l], taps[v][l]);
            }
        }
    }
}

#[inline(always)]
fn sum_blocks<T: Real, const N: usize, const S: usize, const K: usize, const W: usize>(
    window: &Window<T>,
    dy: &[T],
    blocks: Blocks,
    sums: &mut [T],
) {
    let (sums, _) = sums.as_chunks_mut::<N>();
    for (i, sums) in sums.chunks_exact_mut(K * K + 1).enumerate() {
        let from = blocks.first(i);
        let own = |row: usize| -> [&[T; N]; S] { std::array::from_fn(|j| block(dy, window.own[row * S + j] + from)) };
        let (taps, bias) = sums.split_at_mut(K * K);
        for (u, taps) in taps.as_chunks_mut::<K>().0.iter_mut().enumerate() {
            let mut sums = *taps;
            for row in 0..S {
                if window.rows[row + u] {
                    let tokens = &window.tokens[(row + u) * W..][..W];
                    let x: [&[T; N]; W] = std::array::from_fn(|v| block(tokens[v], from));
                    add_taps(&mut sums, &x, &own(row));
                }
            }
            *taps = sums;
        }
        for dy in (0..S).flat_map(own) {
            bias[0].iter_mut().zip(dy).for_each(|(sum, &dy)| *sum += dy);
        }
    }
}

vectorised! {
    /// A region's tokens. w is packed, bias [C].
    fn filter_region<T: Real>(window: &Window<T>, w: &[T], bias: &[T], blocks: Blocks, y: &mut [T]) {
        match (blocks.width, window.side, blocks.k) {
            (32, 4, 5) => return filter_blocks::<T, 32, 4, 5, 8>(window, w, bias, blocks, y),
            (32, 2, 5) => return filter_blocks::<T, 32, 2, 5, 6>(window, w, bias, blocks, y),
            (16, 4, 5) => return filter_blocks::<T, 16, 4, 5, 8>(window, w, bias, blocks, y),
            (16, 2, 5) => return filter_blocks::<T, 16, 2, 5, 6>(window, w, bias, blocks, y),
            _ => {}
        }
        let k = blocks.k;
        for (at, &own) in window.own.iter().enumerate() {
            for (c, y) in y[own..own + blocks.c].iter_mut().enumerate() {
                let mut sum = bias[c];
                for (tap, &w) in w[c * k * k..][..k * k].iter().enumerate() {
                    let token = window.tokens[(at / window.side + tap / k) * window.wide + at % window.side + tap % k];
                    sum = token[c].mul_add(w, sum);
                }
                *y = sum;
            }
        }
    }
    /// Adds what a region's dy says to the taps and the bias, [blocks, taps + 1, width].
    fn sum_region<T: Real>(window: &Window<T>, dy: &[T], blocks: Blocks, sums: &mut [T]) {
        match (blocks.width, window.side, blocks.k) {
            (32, 4, 5) => return sum_blocks::<T, 32, 4, 5, 8>(window, dy, blocks, sums),
            (32, 2, 5) => return sum_blocks::<T, 32, 2, 5, 6>(window, dy, blocks, sums),
            (16, 4, 5) => return sum_blocks::<T, 16, 4, 5, 8>(window, dy, blocks, sums),
            (16, 2, 5) => return sum_blocks::<T, 16, 2, 5, 6>(window, dy, blocks, sums),
            _ => {}
        }
        let k = blocks.k;
        for (at, &own) in window.own.iter().enumerate() {
            for (c, &dy) in dy[own..own + blocks.c].iter().enumerate() {
                let (taps, bias) = sums[c * (k * k + 1)..][..k * k + 1].split_at_mut(k * k);
                for (tap, sum) in taps.iter_mut().enumerate() {
                    let token = window.tokens[(at / window.side + tap / k) * window.wide + at % window.side + tap % k];
                    *sum = token[c].mul_add(dy, *sum);
                }
                bias[0] += dy;
            }
        }
    }
}

/// The filter of x where `hidden` does not say that the result is 0.
fn run<T: Real + Element>(
    x: &Tensor,
    w: &Tensor,
    blocks: Blocks,
    bias: Option<&Tensor>,
    around: &Around,
    hidden: impl Fn(usize) -> bool + Sync + Send,
    y: &mut Tensor,
) -> Result<()> {
    let zeros = Tensor::zeros(&[blocks.c], x.dtype())?;
    let (x, w, zeros, bias) = (x.data::<T>(), w.data::<T>(), zeros.data::<T>(), bias.map(|bias| bias.data::<T>()));
    let size = around.regions.layout.tokens() * blocks.c;
    parallel::rows(y.data_mut::<T>(), size, |first, rows| {
        let mut window = around.window(zeros);
        for (i, y) in rows.chunks_exact_mut(size).enumerate() {
            if hidden(first + i) {
                y.fill(T::ZERO);
                continue;
            }
            around.see(first + i, x, &mut window);
            filter_region(&window, w, bias.unwrap_or(zeros), blocks, y);
        }
    });
    Ok(())
}

pub fn filter<T: Real + Element>(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, regions: &Regions) -> Result<Tensor> {
    let (k, c) = (w.last(), x.last());
    let blocks = Blocks::of(c, k, regions.layout);
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    run::<T>(x, &blocks.pack::<T>(w, false)?, blocks, bias, &Around::of(regions, k, c), |_| false, &mut y)?;
    Ok(y)
}

pub fn filter_input<T: Real + Element>(dy: &Tensor, w: &Tensor, regions: &Regions, dx: &mut Tensor) -> Result<()> {
    let (k, c) = (w.last(), dy.last());
    let blocks = Blocks::of(c, k, regions.layout);
    let (own, around) = (Around::of(regions, k, c), Around::of(regions, k, c).unhidden());
    run::<T>(dy, &blocks.pack::<T>(w, true)?, blocks, None, &around, |i| own.is_hidden(i), dx)
}

/// Regions whose gradients are summed before the sums are added up.
const PIECE: usize = 64;

/// dw and db.
pub fn filter_weight<T: Real + Element>(
    dy: &Tensor,
    x: &Tensor,
    k: usize,
    regions: &Regions,
    need: &mut Need,
) -> Result<[Option<Tensor>; 2]> {
    if !need.wants(1) && !need.wants(2) {
        return Ok([None, None]);
    }
    let (c, each) = (x.last(), regions.layout.tokens());
    let (blocks, around) = (Blocks::of(c, k, regions.layout), Around::of(regions, k, c));
    let (taps, size, count) = (blocks.taps(), each * c, x.rows() / each);
    let length = blocks.count() * (taps + 1) * blocks.width;
    let mut partial = Tensor::empty(&[count.div_ceil(PIECE), length], x.dtype())?;
    let zeros = Tensor::zeros(&[c], x.dtype())?;
    let (x, dy, zeros) = (x.data::<T>(), dy.data::<T>(), zeros.data::<T>());
    partial.data_mut::<T>().par_chunks_mut(length).enumerate().for_each(|(piece, sums)| {
        let mut window = around.window(zeros);
        sums.fill(T::ZERO);
        for i in piece * PIECE..((piece + 1) * PIECE).min(count) {
            around.see(i, x, &mut window);
            sum_region(&window, &dy[i * size..][..size], blocks, sums);
        }
    });
    let mut all = Tensor::empty(&[length], partial.dtype())?;
    column_sums(partial.data::<T>(), length, all.data_mut::<T>());
    let all = all.data::<T>();
    let put = |gradient: &mut Tensor, each: usize, first: usize| {
        for (at, value) in gradient.data_mut::<T>().iter_mut().enumerate() {
            *value = all[blocks.index(at / each, taps + 1, first + at % each)];
        }
        Ok(())
    };
    Ok([need.give(1, |dw| put(dw, taps, 0))?, need.give(2, |db| put(db, 1, taps))?])
}
