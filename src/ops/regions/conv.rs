//! A k x k filter of each channel over tokens that stand in regions of a grid; see the module above.
//!
//!   y[b, t, c] = bias[c] + sum_{u, v} w[c, 0, u, v] x[b, t + (u - k/2, v - k/2), c]        neighbours on the fine grid
//!   dx = the same of dy with w turned round,   dw[c, 0, u, v] = sum_{b, t} dy[b, t, c] x[b, t + (u - k/2, v - k/2), c],   db = sum_{b, t} dy
//!
//! x, y [B, K side side, C] in the order of the regions that are there. A neighbour outside the grid, of a region that is not there or of a hidden one is 0;
//! where regions are hidden, dx is 0 at their tokens. w [C, 1, k, k] with odd k, bias [C]; both f32 beside bf16. Saved: x, w.
//!
//! The CPU keeps 4 tokens by 16 channels in registers over all taps and skips neighbours that are not there.

use super::{Layout, Regions, Seen, gpu};
use crate::device::launch::Versions;
use crate::device::parallel;
use crate::device::simd::{LANES, Real};
use crate::error::Result;
use crate::ops::beside;
use crate::ops::case::Case;
use crate::ops::conv::check_bias;
use crate::ops::linear::column_sums;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

pub const VERSIONS: Versions = Versions { op: "region_conv", all: &["v1", "v2"], chosen: "v2" };

impl Var {
    pub fn region_conv(&self, w: &Var, bias: Option<&Var>, regions: &Regions) -> Result<Var> {
        let (x, weight, regions) = (self.value().clone(), w.value().clone(), regions.clone());
        let &[batch, tokens, c] = x.shape() else { crate::bail!("region_conv: x is {x:?} but [B, N, C] is needed") };
        let fits = matches!(*weight.shape(), [channels, 1, k, l] if channels == c && k == l && k % 2 == 1);
        ensure!(
            fits && weight.dtype() == beside(x.dtype()) && x.numel() > 0,
            "region_conv: the weight is {weight:?} but x is {x:?}; it needs [C, 1, k, k] with odd k"
        );
        check_bias("region_conv", bias, c, beside(x.dtype()))?;
        regions.check("region_conv", batch)?;
        let each = regions.layout.tokens();
        ensure!(tokens == regions.present() * each, "region_conv: x is {x:?} but {} regions of {each} tokens are there", regions.present());
        if let Some(on) = x.gpu().cloned() {
            let y = gpu::filter(&on, &x, &weight, bias.map(Var::value), &regions)?;
            let none = Var::constant(y.clone());
            return Var::record("region_conv", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
                let dx = need.give(0, |dx| gpu::filter_input(&on, &dy, &weight, &regions, dx))?;
                let [dw, db] = gpu::filter_weight(&on, &dy, &x, weight.last(), &regions, need)?;
                Ok([dx, dw, db])
            });
        }
        let y = by_real!("region_conv", x.dtype(), filter(&x, &weight, bias.map(Var::value), &regions))?;
        let none = Var::constant(y.clone());
        Var::record("region_conv", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("region_conv", x.dtype(), filter_input(&dy, &weight, &regions, dx)))?;
            let dw = need.give(1, |dw| by_real!("region_conv", x.dtype(), filter_weight(&dy, &x, &regions, dw)))?;
            let db = need.give(2, |db| by_real!("region_conv", x.dtype(), bias_gradient(&dy, db)))?;
            Ok([dx, dw, db])
        })
    }
}

/// A token that is not there.
const ABSENT: usize = usize::MAX;

/// Where the neighbours of each region's tokens lie.
struct Neighbours<'a> {
    grid: [usize; 2],
    layout: Layout,
    present: usize,
    halo: usize,
    kept: Option<&'a [u32]>,
    places: Option<&'a [u32]>,
    hidden: Option<&'a [f32]>,
}

impl<'a> Neighbours<'a> {
    fn of(regions: &'a Regions, k: usize) -> Self {
        let (kept, places, hidden) = match &regions.seen {
            Seen::All => (None, None, None),
            Seen::Hiding(hidden) => (None, None, Some(hidden.data::<f32>())),
            Seen::Only { kept, places } => (Some(kept.data::<u32>()), Some(places.data::<u32>()), None),
        };
        Self { grid: regions.grid, layout: regions.layout, present: regions.present(), halo: k / 2, kept, places, hidden }
    }

    /// The same with hidden regions as good as others.
    fn unhidden(self) -> Self {
        Self { hidden: None, ..self }
    }

    /// Tokens along a side of a region with its neighbours.
    fn wide(&self) -> usize {
        self.layout.side + 2 * self.halo
    }

    /// The region at place `i`, counted through all images.
    fn region(&self, i: usize) -> usize {
        self.kept.map_or(i % self.present, |kept| kept[i] as usize)
    }

    fn is_hidden(&self, i: usize) -> bool {
        let all = self.grid[0] * self.grid[1];
        self.hidden.is_some_and(|hidden| hidden[i / self.present * all + self.region(i)] != 0.0)
    }

    /// For the tokens of region place `i` with `halo` more on each side, in raster order: which row of x each is, or ABSENT.
    fn table(&self, i: usize, table: &mut [usize]) {
        let [down, across] = self.grid;
        let (side, image, all) = (self.layout.side, i / self.present, down * across);
        let corner = [self.region(i) / across * side, self.region(i) % across * side];
        for (at, row) in table.iter_mut().enumerate() {
            *row = ABSENT;
            let [y, x] = [corner[0] + at / self.wide(), corner[1] + at % self.wide()];
            // The corner of the halo is `halo` up and left.
            let (Some(y), Some(x)) = (y.checked_sub(self.halo), x.checked_sub(self.halo)) else { continue };
            if y >= down * side || x >= across * side {
                continue;
            }
            let region = y / side * across + x / side;
            let place = self.places.map_or(region, |places| places[image * all + region] as usize);
            if place < self.present && self.hidden.is_none_or(|hidden| hidden[image * all + region] == 0.0) {
                *row = (image * self.present + place) * self.layout.tokens() + self.layout.token([y % side, x % side]);
            }
        }
    }
}

/// Sums of J tokens beside each other for 16 channels.
#[inline(always)]
fn sums<T: Real, const J: usize>(
    x: &[T],
    c: usize,
    from: usize,
    w: &[T],
    bias: [T; LANES],
    rows: &[usize],
    wide: usize,
    k: usize,
) -> [[T; LANES]; J] {
    let mut sums = [bias; J];
    for u in 0..k {
        for v in 0..k {
            let tap = &w[(u * k + v) * c + from..][..LANES];
            for j in 0..J {
                let row = rows[u * wide + j + v];
                if row != ABSENT {
                    let x = &x[row * c + from..][..LANES];
                    for l in 0..LANES {
                        sums[j][l] = x[l].mul_add(tap[l], sums[j][l]);
                    }
                }
            }
        }
    }
    sums
}

vectorised! {
    /// One region: its tokens' sums over all taps. `table` names the rows of x, `w` is [taps, C].
    fn filter_region<T: Real>(x: &[T], w: &[T], bias: Option<&[T]>, table: &[usize], layout: Layout, k: usize, c: usize, y: &mut [T]) {
        let (side, wide) = (layout.side, layout.side + k - 1);
        let whole = c / LANES * LANES;
        for from in (0..whole).step_by(LANES) {
            let mut start = [T::ZERO; LANES];
            if let Some(bias) = bias {
                start.copy_from_slice(&bias[from..from + LANES]);
            }
            for i in 0..side {
                let mut j = 0;
                while j < side {
                    let rows = &table[i * wide + j..];
                    let mut put = |at: usize, sums: &[T; LANES]| y[layout.token([i, at]) * c + from..][..LANES].copy_from_slice(sums);
                    if side - j >= 4 {
                        let sums = sums::<T, 4>(x, c, from, w, start, rows, wide, k);
                        sums.iter().enumerate().for_each(|(n, sums)| put(j + n, sums));
                        j += 4;
                    } else if side - j >= 2 {
                        let sums = sums::<T, 2>(x, c, from, w, start, rows, wide, k);
                        sums.iter().enumerate().for_each(|(n, sums)| put(j + n, sums));
                        j += 2;
                    } else {
                        let [sums] = sums::<T, 1>(x, c, from, w, start, rows, wide, k);
                        put(j, &sums);
                        j += 1;
                    }
                }
            }
        }
        for channel in whole..c {
            for (i, j) in (0..side).flat_map(|i| (0..side).map(move |j| (i, j))) {
                let mut sum = bias.map_or(T::ZERO, |bias| bias[channel]);
                for (u, v) in (0..k).flat_map(|u| (0..k).map(move |v| (u, v))) {
                    let row = table[(i + u) * wide + j + v];
                    if row != ABSENT {
                        sum = x[row * c + channel].mul_add(w[(u * k + v) * c + channel], sum);
                    }
                }
                y[layout.token([i, j]) * c + channel] = sum;
            }
        }
    }
    /// Adds what one region's dy says to dw [taps, C].
    fn tap_gradients<T: Real>(x: &[T], dy: &[T], table: &[usize], layout: Layout, k: usize, c: usize, dw: &mut [T]) {
        let (side, wide) = (layout.side, layout.side + k - 1);
        for (u, v) in (0..k).flat_map(|u| (0..k).map(move |v| (u, v))) {
            let dw = &mut dw[(u * k + v) * c..][..c];
            for (i, j) in (0..side).flat_map(|i| (0..side).map(move |j| (i, j))) {
                let row = table[(i + u) * wide + j + v];
                if row != ABSENT {
                    let (x, dy) = (&x[row * c..][..c], &dy[layout.token([i, j]) * c..][..c]);
                    for l in 0..c {
                        dw[l] = dy[l].mul_add(x[l], dw[l]);
                    }
                }
            }
        }
    }
}

/// The weight [C, 1, k, k] as [taps, C], turned round on request.
fn by_taps<T: Real + Element>(w: &Tensor, turned: bool) -> Result<Tensor> {
    let (c, taps) = (w.shape()[0], w.last() * w.last());
    let mut by_taps = Tensor::empty(&[taps, c], w.dtype())?;
    let w = w.data::<T>();
    for (tap, row) in by_taps.data_mut::<T>().chunks_exact_mut(c).enumerate() {
        let tap = if turned { taps - 1 - tap } else { tap };
        row.iter_mut().enumerate().for_each(|(channel, value)| *value = w[channel * taps + tap]);
    }
    Ok(by_taps)
}

fn filter<T: Real + Element>(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, regions: &Regions) -> Result<Tensor> {
    let (k, c, layout) = (w.last(), x.last(), regions.layout);
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (w, neighbours) = (by_taps::<T>(w, false)?, Neighbours::of(regions, k));
    let (x, w, bias) = (x.data::<T>(), w.data::<T>(), bias.map(|bias| bias.data::<T>()));
    let size = layout.tokens() * c;
    parallel::rows(y.data_mut::<T>(), size, |first, rows| {
        let mut table = vec![ABSENT; neighbours.wide() * neighbours.wide()];
        for (i, y) in rows.chunks_exact_mut(size).enumerate() {
            neighbours.table(first + i, &mut table);
            filter_region(x, w, bias, &table, layout, k, c, y);
        }
    });
    Ok(y)
}

fn filter_input<T: Real + Element>(dy: &Tensor, w: &Tensor, regions: &Regions, dx: &mut Tensor) -> Result<()> {
    let (k, c, layout) = (w.last(), dy.last(), regions.layout);
    let (w, own, neighbours) = (by_taps::<T>(w, true)?, Neighbours::of(regions, k), Neighbours::of(regions, k).unhidden());
    let (dy, w) = (dy.data::<T>(), w.data::<T>());
    let size = layout.tokens() * c;
    parallel::rows(dx.data_mut::<T>(), size, |first, rows| {
        let mut table = vec![ABSENT; neighbours.wide() * neighbours.wide()];
        for (i, dx) in rows.chunks_exact_mut(size).enumerate() {
            if own.is_hidden(first + i) {
                dx.fill(T::ZERO);
                continue;
            }
            neighbours.table(first + i, &mut table);
            filter_region(dy, w, None, &table, layout, k, c, dx);
        }
    });
    Ok(())
}

/// Regions whose taps' gradients are summed before the sums are added up.
const PIECE: usize = 64;

fn filter_weight<T: Real + Element>(dy: &Tensor, x: &Tensor, regions: &Regions, dw: &mut Tensor) -> Result<()> {
    let (k, c, layout) = (dw.last(), x.last(), regions.layout);
    let (taps, size, count) = (k * k, layout.tokens() * c, x.rows() / layout.tokens());
    let mut partial = Tensor::empty(&[count.div_ceil(PIECE), taps * c], x.dtype())?;
    let (neighbours, x, dy) = (Neighbours::of(regions, k), x.data::<T>(), dy.data::<T>());
    partial.data_mut::<T>().par_chunks_mut(taps * c).enumerate().for_each(|(piece, sums)| {
        let mut table = vec![ABSENT; neighbours.wide() * neighbours.wide()];
        sums.fill(T::ZERO);
        for i in piece * PIECE..((piece + 1) * PIECE).min(count) {
            neighbours.table(i, &mut table);
            tap_gradients(x, &dy[i * size..][..size], &table, layout, k, c, sums);
        }
    });
    let mut by_taps = Tensor::empty(&[taps, c], dw.dtype())?;
    column_sums(partial.data::<T>(), taps * c, by_taps.data_mut::<T>());
    let (by_taps, dw) = (by_taps.data::<T>(), dw.data_mut::<T>());
    for (at, value) in dw.iter_mut().enumerate() {
        *value = by_taps[at % taps * c + at / taps];
    }
    Ok(())
}

fn bias_gradient<T: crate::device::gemm::Product + Element>(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    column_sums(dy.data::<T>(), dy.last(), db.data_mut::<T>());
    Ok(())
}

/// Two images of 2 x 3 regions of which 3 are kept, so that neighbours are missing on every side.
pub fn some_regions(layout: Layout) -> Regions {
    let kept = Tensor::from_slice(&[2, 3], &[4u32, 0, 5, 2, 1, 3]).expect("six numbers");
    let places = Tensor::from_slice(&[2, 6], &[1u32, 3, 4, 5, 0, 2, 5, 1, 0, 2, 4, 3]).expect("twelve numbers");
    Regions { grid: [2, 3], layout, seen: Seen::Only { kept, places } }
}

pub fn conv_cases() -> Vec<Case> {
    let conv = |name: &str, regions: Regions, c: usize, k: usize| {
        let x = [2, regions.present() * regions.layout.tokens(), c];
        let run = move |v: &[Var]| {
            let device = v[0].value().device();
            let seen = match &regions.seen {
                Seen::All => Seen::All,
                Seen::Hiding(hidden) => Seen::Hiding(hidden.on(&device)?),
                Seen::Only { kept, places } => Seen::Only { kept: kept.on(&device)?, places: places.on(&device)? },
            };
            v[0].region_conv(&v[1], v.get(2), &Regions { seen, ..regions.clone() })
        };
        Case::new(&format!("region_conv: {name}"), &[&x, &[c, 1, k, k], &[c]], run).vectors(&[1, 2])
    };
    let (four, two) = (Layout { side: 4, cell: 2 }, Layout { side: 2, cell: 2 });
    let all = |grid, layout| Regions { grid, layout, seen: Seen::All };
    let hidden = Tensor::from_slice(&[2, 6], &[0.0f32, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).expect("twelve numbers");
    vec![
        conv("3 of 6 regions of 4 x 4, 5 x 5", some_regions(four), 40, 5),
        conv("3 of 6 regions of 2 x 2, 5 x 5", some_regions(two), 7, 5),
        conv("all of 2 x 2 regions of 4 x 4, 5 x 5", all([2, 2], four), 16, 5),
        conv("all of 3 x 1 regions of 3 x 3, 3 x 3", all([3, 1], Layout { side: 3, cell: 1 }), 18, 3),
        conv("blocks of channels, rows that are no pairs", some_regions(four), 131, 5),
        conv("blocks of channels at 2 x 2", some_regions(two), 138, 5),
        conv(
            "halves of blocks of channels, some regions hidden",
            Regions { seen: Seen::Hiding(hidden.clone()), ..all([2, 3], four) },
            66,
            5,
        ),
        conv("half of the regions hidden", Regions { grid: [2, 3], layout: two, seen: Seen::Hiding(hidden) }, 33, 5),
    ]
}
