//! The product of f32 matrices whose numbers are rounded to bf16 (to nearest even) while they are packed; every sum is f32. For processors with AVX512-BF16.
//!
//! One instruction multiplies pairs: the packed numbers 2p and 2p + 1 of k lie side by side, a pair in 32 bits. The right factor is packed once, in panels of two
//! vectors of columns, by all threads; then each piece packs its rows of the left factor, in groups of a tile's rows, and lets the panels go by.
//!
//!   panel [pair of k][32 columns]      group [pair of k][14 rows]      tile 14 x 32, in registers over all pairs of a block of k
//!
//! Sums are taken in an order that k alone decides, as in the f32 product.

use super::{Job, View, avx512_f32};
use crate::device::memory::Buffer;
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows and columns of a tile.
const ROWS: usize = 14;
const WIDTH: usize = 32;
/// Numbers of k that are summed in registers before c is touched: a panel of them fills the first cache.
const DEPTH: usize = 768;
/// Rows of a piece: a block of so many stays in the second cache.
const PIECE_ROWS: usize = 448;
/// Into so many pieces a product that is shared out is cut at least.
const PIECES: usize = 4;
/// Lanes of a vector of pairs.
const LANES: usize = 16;
/// Lines between one that is asked for and the one in use.
const AHEAD: usize = 8;
/// Groups, or panels, that are packed side by side where their numbers lie in one line of memory.
const TOGETHER: usize = 8;

/// Blocks of k, each with whole pairs.
struct Blocks {
    k: usize,
    depth: usize,
}

impl Blocks {
    fn of(k: usize) -> Self {
        let count = k.div_ceil(DEPTH).max(1);
        Self { k, depth: k.div_ceil(count).next_multiple_of(2 * LANES).max(2) }
    }

    fn count(&self) -> usize {
        self.k.div_ceil(self.depth).max(1)
    }

    fn steps(&self, block: usize) -> Range<usize> {
        let first = block * self.depth;
        first..(first + self.depth).min(self.k)
    }

    fn pairs(&self, block: usize) -> usize {
        self.steps(block).len().div_ceil(2)
    }
}

/// Memory for so many pairs, as a slice of 32 bits each.
fn pairs_of(buffer: &mut Buffer) -> &mut [u32] {
    bytemuck::cast_slice_mut(buffer.bytes_mut())
}

pub(super) fn drive(job: &Job<f32>, a: View<f32>, b: View<f32>, share: bool) {
    let (blocks, panels) = (Blocks::of(job.k), job.n.div_ceil(WIDTH));
    let before = |block: usize| block * blocks.depth / 2 * panels * WIDTH;
    let total = before(blocks.count() - 1) + blocks.pairs(blocks.count() - 1) * panels * WIDTH;
    let mut right = Buffer::take(4 * total.max(1));
    let right = &mut pairs_of(&mut right)[..total];
    for block in 0..blocks.count() {
        let length = blocks.pairs(block) * WIDTH;
        let whole = &mut right[before(block)..][..length * panels];
        let some = |(i, to): (usize, &mut [u32])| {
            let columns = i * TOGETHER * WIDTH..((i + 1) * TOGETHER * WIDTH).min(job.n);
            // SAFETY: the processor has the instructions, as whoever chose this product made sure.
            unsafe { pack_panels(to, b, columns, blocks.steps(block)) }
        };
        match share {
            true => whole.par_chunks_mut((TOGETHER * length).max(1)).enumerate().for_each(some),
            false => whole.chunks_mut((TOGETHER * length).max(1)).enumerate().for_each(some),
        }
    }
    let right = &*right;
    let (mut down, mut across) = (1, 1);
    if share {
        down = job.m.div_ceil(PIECE_ROWS);
        while down * across < PIECES {
            if job.m / down >= job.n / across { down *= 2 } else { across *= 2 }
        }
    }
    let tall = job.m.div_ceil(ROWS);
    let piece = |i: usize| {
        let (i, j) = (i / across, i % across);
        let rows = (tall * i / down * ROWS).min(job.m)..(tall * (i + 1) / down * ROWS).min(job.m);
        let columns = panels * j / across..panels * (j + 1) / across;
        let panel = |block: usize, panel: usize| {
            let length = blocks.pairs(block) * WIDTH;
            right[before(block) + panel * length..][..length].as_ptr()
        };
        // SAFETY: as above; pieces are disjoint and lie inside c.
        unsafe { compute(job, a, rows, columns, &blocks, panel) }
    };
    if share { (0..down * across).into_par_iter().for_each(piece) } else { piece(0) }
}

/// The tiles of some rows and panels of columns, block of k after block of k.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn compute(
    job: &Job<f32>,
    a: View<f32>,
    rows: Range<usize>,
    panels: Range<usize>,
    blocks: &Blocks,
    panel: impl Fn(usize, usize) -> *const u32,
) {
    let groups = rows.len().div_ceil(ROWS);
    // A line is stored as a whole vector: what is too much of a group's last one lies between the groups.
    let stride = |pairs: usize| pairs * ROWS + LANES - ROWS;
    let mut left = Buffer::take(4 * groups * stride(blocks.depth.div_ceil(2)).max(1));
    let left = pairs_of(&mut left);
    for block in 0..blocks.count() {
        let (pairs, steps) = (blocks.pairs(block), blocks.steps(block));
        let (last, add) = (block + 1 == blocks.count(), block > 0 || job.finish.add);
        // SAFETY: the buffer has room for all groups.
        unsafe { pack_groups(left, a, rows.clone(), steps, stride(pairs)) };
        for column in panels.clone() {
            let (b, first) = (panel(block, column), column * WIDTH);
            let columns = WIDTH.min(job.n - first);
            for group in 0..groups {
                let row = rows.start + group * ROWS;
                let high = ROWS.min(rows.end - row);
                // SAFETY: the tile lies inside c; group and panel hold `pairs` lines.
                unsafe {
                    let a = left.as_ptr().add(group * stride(pairs));
                    let c = job.start.add(row * job.stride + first);
                    macro_rules! tiles {
                        ($($rows:literal)+) => {
                            match (high, columns > LANES) {
                                $(
                                    ($rows, true) => tile::<$rows, 2>(pairs, a, b, c, job.stride, columns, add),
                                    ($rows, false) => tile::<$rows, 1>(pairs, a, b, c, job.stride, columns, add),
                                )+
                                _ => unreachable!("a tile of {high} rows"),
                            }
                        };
                    }
                    tiles!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
                    if last {
                        avx512_f32::finish_tile(job, row, high, first, columns);
                    }
                }
            }
        }
    }
}

/// c[HIGH, columns] = or += the sum over pairs of a b, in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn tile<const HIGH: usize, const WIDE: usize>(
    pairs: usize,
    mut a: *const u32,
    mut b: *const u32,
    c: *mut f32,
    stride: usize,
    columns: usize,
    add: bool,
) {
    // SAFETY: a has `pairs` lines of ROWS pairs, b as many of WIDTH pairs, c HIGH rows of `columns` numbers.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); WIDE]; HIGH];
        for i in 0..HIGH {
            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * stride).cast());
            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * stride + LANES).cast());
        }
        for _ in 0..pairs {
            let mut right: [__m512bh; WIDE] = [std::mem::zeroed(); WIDE];
            for (v, right) in right.iter_mut().enumerate() {
                *right = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(v * LANES).cast()));
            }
            for v in 0..WIDE {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * WIDTH + v * LANES).cast());
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*a.add(i) as i32));
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = _mm512_dpbf16_ps(*sum, left, right);
                }
            }
            a = a.add(ROWS);
            b = b.add(WIDTH);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let (c, here) = (c.add(i * stride + v * LANES), columns.saturating_sub(v * LANES));
                if here >= LANES {
                    _mm512_storeu_ps(c, if add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum });
                } else {
                    let mask = first(here);
                    _mm512_mask_storeu_ps(c, mask, if add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), sum) } else { sum });
                }
            }
        }
    }
}

/// The first `count` of sixteen.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { (1 << count) - 1 }
}

/// Some panels [pair][WIDTH] of the right factor, zeros beyond its columns.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn pack_panels(to: &mut [u32], b: View<f32>, columns: Range<usize>, steps: Range<usize>) {
    let pairs = steps.len().div_ceil(2);
    let halves = 2 * columns.len().div_ceil(WIDTH);
    assert!(to.len() >= halves * pairs * LANES);
    // Where a half begins in its panel, its first column, and how many there are.
    let half = |half: usize| {
        let left = columns.start + half * LANES;
        (half / 2 * pairs * WIDTH + half % 2 * LANES, left, columns.end.saturating_sub(left).min(LANES))
    };
    if b.column == 1 {
        // Some panels together, line by line: their numbers lie side by side.
        for pair in 0..pairs {
            for (start, left, count) in (0..halves).map(half) {
                // SAFETY: the panel has room for the line, and the factor has the numbers that are asked for.
                unsafe { side_by_side(to.as_mut_ptr().add(start + pair * WIDTH), b, left, count, steps.start + 2 * pair, steps.end) };
            }
        }
        return;
    }
    for (start, left, count) in (0..halves).map(half) {
        for pair in (0..pairs).step_by(LANES) {
            let lines = LANES.min(pairs - pair);
            // SAFETY: as above, for so many lines.
            unsafe {
                let to = to.as_mut_ptr().add(start + pair * WIDTH);
                turned(to, WIDTH, lines, b.transposed(), left, count, steps.start + 2 * pair, steps.end);
            }
        }
    }
}

/// Groups [pair][ROWS] of the left factor, `stride` apart, zeros beyond its rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn pack_groups(to: &mut [u32], a: View<f32>, rows: Range<usize>, steps: Range<usize>, stride: usize) {
    let (groups, pairs) = (rows.len().div_ceil(ROWS), steps.len().div_ceil(2));
    assert!(to.len() >= groups * stride);
    let count = |row: usize| ROWS.min(rows.end - row);
    if a.column == 1 {
        for group in 0..groups {
            let row = rows.start + group * ROWS;
            for pair in (0..pairs).step_by(LANES) {
                let lines = LANES.min(pairs - pair);
                // SAFETY: the group has room for its lines and what is too much of the last one.
                unsafe {
                    let to = to.as_mut_ptr().add(group * stride + pair * ROWS);
                    turned(to, ROWS, lines, a, row, count(row), steps.start + 2 * pair, steps.end);
                }
            }
        }
        return;
    }
    for some in (0..groups).step_by(TOGETHER) {
        for pair in 0..pairs {
            for group in some..(some + TOGETHER).min(groups) {
                let row = rows.start + group * ROWS;
                // SAFETY: as above.
                unsafe {
                    let to = to.as_mut_ptr().add(group * stride + pair * ROWS);
                    side_by_side(to, a.transposed(), row, count(row), steps.start + 2 * pair, steps.end);
                }
            }
        }
    }
}

/// to[i] = the pair of numbers `left + i` of lines `step` and `step + 1` of x, whose lines run along; zeros from `count` and from line `end` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn side_by_side(to: *mut u32, x: View<f32>, left: usize, count: usize, step: usize, end: usize) {
    // The first half of a register has the upper line's numbers, the second the lower line's: they take turns.
    const TURNS: [u16; 32] = {
        let mut turns = [0; 32];
        let mut i = 0;
        while i < 32 {
            turns[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        turns
    };
    // SAFETY: masked loads read the numbers that are there, and the caller has room for a vector.
    unsafe {
        let line = |step: usize| match step < end {
            true => _mm512_maskz_loadu_ps(first(count), x.data.as_ptr().wrapping_add(step * x.row + left)),
            false => _mm512_setzero_ps(),
        };
        for line in [step, step + 1] {
            // Lines lie too far apart to be foreseen.
            _mm_prefetch::<_MM_HINT_T0>(x.data.as_ptr().wrapping_add((line + AHEAD) * x.row + left).cast());
        }
        let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(line(step + 1), line(step)));
        let turns = _mm512_loadu_si512(TURNS.as_ptr().cast());
        _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(turns, both));
    }
}

/// to[p * stride + i] = the pair 2 p, 2 p + 1 behind `step` of row `row + i` of x, whose rows run along k; zeros from `count` and from `end` on.
#[inline]
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn turned(to: *mut u32, stride: usize, lines: usize, x: View<f32>, row: usize, count: usize, step: usize, end: usize) {
    // SAFETY: masked loads read the numbers that are there, and the caller has room for `lines` vectors.
    unsafe {
        let here = end - step;
        let (low, high) = (first(here), first(here.saturating_sub(LANES)));
        let mut r = [_mm512_setzero_ps(); 16];
        for (i, r) in r.iter_mut().enumerate() {
            // A row that is not there is read with an empty mask.
            let (low, high) = if i < count { (low, high) } else { (0, 0) };
            let from = x.data.as_ptr().wrapping_add((row + i) * x.row + step);
            // Sixteen rows are more than the processor foresees.
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(4 * LANES).cast());
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(5 * LANES).cast());
            let (front, back) = (_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from.wrapping_add(LANES)));
            *r = std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(back, front));
        }
        let t = super::transposed(r);
        if lines == LANES {
            for (i, &t) in t.iter().enumerate() {
                _mm512_storeu_ps(to.add(i * stride).cast(), t);
            }
        } else {
            for (i, &t) in t.iter().enumerate().take(lines) {
                _mm512_storeu_ps(to.add(i * stride).cast(), t);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Finish, Raw, has_bf16};
    use super::*;
    use crate::rng::Rng;
    use half::bf16;

    fn product(a: View<f32>, b: View<f32>, c: &mut [f32], [m, n, k]: [usize; 3], finish: Finish<f32>, share: bool) {
        drive(&Job { m, n, k, start: c.as_mut_ptr(), stride: n, finish: Raw::of(finish) }, a, b, share);
    }

    #[test]
    fn it_is_the_product_of_rounded_numbers_whatever_the_sizes_orders_and_threads() {
        if !has_bf16() {
            return println!("skipped: this processor does not multiply bf16 numbers");
        }
        let draw = |name: &str, n: usize| Rng::new(3).normal(name, n);
        let rounded = |x: &f32| bf16::from_f32(*x).to_f64();
        for (m, n, k) in [
            (1, 1, 1),
            (5, 3, 2),
            (8, 48, 7),
            (9, 49, 33),
            (14, 32, 32),
            (17, 100, 400),
            (70, 65, 800),
            (3, 200, 1),
            (2, 2, 0),
            (450, 96, 1601),
        ] {
            let (a, b, before, bias) = (draw("a", m * k), draw("b", k * n), draw("c", m * n), draw("bias", n));
            for (turn_a, turn_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let left = if turn_a { View::rows(&a, m).transposed() } else { View::rows(&a, k) };
                let right = if turn_b { View::rows(&b, k).transposed() } else { View::rows(&b, n) };
                let mut once = None;
                for share in [false, true] {
                    let mut c = before.clone();
                    product(left, right, &mut c, [m, n, k], Finish { bias: Some(&bias), ..Finish::add() }, share);
                    for i in 0..m.min(20) {
                        for j in 0..n {
                            let a_at = |p: usize| rounded(&a[if turn_a { p * m + i } else { i * k + p }]);
                            let b_at = |p: usize| rounded(&b[if turn_b { j * k + p } else { p * n + j }]);
                            let exact = f64::from(before[i * n + j] + bias[j]) + (0..k).map(|p| a_at(p) * b_at(p)).sum::<f64>();
                            let error = (f64::from(c[i * n + j]) - exact).abs();
                            assert!(error <= 4e-6 * (k as f64).sqrt().max(1.0), "{m} {n} {k} {turn_a} {turn_b}: ({i}, {j}) off by {error}");
                        }
                    }
                    assert_eq!(*once.get_or_insert_with(|| c.clone()), c, "{m} {n} {k}: shared out it is another");
                }
            }
        }
    }
}
