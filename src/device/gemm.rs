//! Matrix product on the CPU: c = a b or c += a b on strided views, with what follows it done while a tile of c is still in the first cache.
//!
//! One kernel, written once over a vector type, computes a tile of MR rows and NV vectors of columns in registers: per step of k it loads
//! NV vectors of b, and broadcasts MR numbers of a. b is packed into panels of a tile's width, once for all rows; a is read where it lies if its
//! rows run along k, and packed otherwise. k is cut into blocks, so that a panel of b stays near while the rows go by.
//!
//! Each element's sum is taken block by block, in each block from front to back: an order that k alone decides. So the result does not depend
//! on the number of threads, nor on which rows or columns are computed together.
//!
//! Against the `gemm` crate and PyTorch's MKL: `tests/reference/bench_torch.py --what ops`.

use super::memory::Buffer;
use super::parallel::Panel;
use super::simd::{Level, Real, level};
use rayon::prelude::*;

/// A matrix inside a slice: element (i, j) lies at i * row + j * column.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    row: usize,
    column: usize,
}

impl<'a, T> View<'a, T> {
    /// Rows one behind the other, `stride` apart.
    pub fn rows(data: &'a [T], stride: usize) -> Self {
        Self { data, row: stride, column: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { data: self.data, row: self.column, column: self.row }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.data.len()
    }
}

/// What happens to c: replaced or added to, and then, on request and in this order, h = ab + bias; h *= times; h += plus; or y = gelu(h)
/// with c keeping the derivative. `times`, `plus` and `gelu` have the shape of c, without gaps.
pub struct Finish<'a, T> {
    pub add: bool,
    pub bias: Option<&'a [T]>,
    pub times: Option<&'a [T]>,
    pub plus: Option<&'a [T]>,
    pub gelu: Option<&'a mut [T]>,
}

impl<T> Finish<'_, T> {
    pub fn replace() -> Self {
        Self { add: false, bias: None, times: None, plus: None, gelu: None }
    }

    pub fn add() -> Self {
        Self { add: true, ..Self::replace() }
    }
}

/// c[m, n] = a[m, k] b[k, n] for a panel c of m rows and n columns, on this thread alone.
pub fn serial<T: Product>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, finish: Finish<T>) {
    product(c, k, a, b, finish, false);
}

/// The same on all threads.
pub fn parallel<T: Product>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, finish: Finish<T>) {
    product(c, k, a, b, finish, true);
}

/// Steps of k that are summed in registers before c is touched.
const DEPTH: usize = 384;
/// Below this many multiplications a product is not worth sharing out.
const WORTH_SHARING: usize = 1 << 18;

fn product<T: Product>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, finish: Finish<T>, share: bool) {
    let (m, n) = (c.rows(), c.width());
    assert!(a.holds(m, k) && b.holds(k, n), "a product of {m} x {k} and {k} x {n} reaches beyond its slices");
    let like_c = [finish.times.map(<[T]>::len), finish.plus.map(<[T]>::len), finish.gelu.as_ref().map(|y| y.len())];
    assert!(like_c.iter().flatten().all(|&len| len == m * n), "what follows a product has the shape of its result");
    assert!(finish.bias.is_none_or(|bias| bias.len() == n), "a bias has as many numbers as the result has columns");
    if m == 0 || n == 0 {
        return;
    }
    let share = share && m * n * k >= WORTH_SHARING;
    let (start, stride) = c.raw();
    let job = Job { m, n, k, start, stride, finish: Raw::of(finish) };
    T::run(&job, a, b, share);
}

/// A product to be computed: sizes, c, and what follows.
pub struct Job<T> {
    m: usize,
    n: usize,
    k: usize,
    start: *mut T,
    stride: usize,
    finish: Raw<T>,
}

/// `Finish` by addresses, null where nothing is asked.
struct Raw<T> {
    add: bool,
    bias: *const T,
    times: *const T,
    plus: *const T,
    gelu: *mut T,
}

impl<T> Raw<T> {
    fn of(finish: Finish<T>) -> Self {
        let address = |slice: Option<&[T]>| slice.map_or(std::ptr::null(), <[T]>::as_ptr);
        Self {
            add: finish.add,
            bias: address(finish.bias),
            times: address(finish.times),
            plus: address(finish.plus),
            gelu: finish.gelu.map_or(std::ptr::null_mut(), <[T]>::as_mut_ptr),
        }
    }
}

// SAFETY: the addresses come from borrows that outlive the job, and threads write disjoint rows of c and of the GELU's result.
unsafe impl<T: Sync> Sync for Job<T> {}

/// Numbers that the product is compiled for.
pub trait Product: Real {
    #[doc(hidden)]
    fn run(job: &Job<Self>, a: View<Self>, b: View<Self>, share: bool);
}

macro_rules! product_of {
    ($type:ty, $wide:ty, $narrow:ty) => {
        impl Product for $type {
            fn run(job: &Job<$type>, a: View<$type>, b: View<$type>, share: bool) {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                    unsafe fn wide(job: &Job<$type>, work: Work<$type>) {
                        // SAFETY: the caller's.
                        unsafe { work_on::<$wide>(job, work) }
                    }
                    #[target_feature(enable = "avx2,fma")]
                    unsafe fn narrow(job: &Job<$type>, work: Work<$type>) {
                        // SAFETY: the caller's.
                        unsafe { work_on::<$narrow>(job, work) }
                    }
                    match level() {
                        Level::Avx512 => return drive::<$wide>(job, a, b, share, wide),
                        Level::Avx2 => return drive::<$narrow>(job, a, b, share, narrow),
                        Level::Plain => {}
                    }
                }
                unsafe fn plain(job: &Job<$type>, work: Work<$type>) {
                    // SAFETY: the caller's.
                    unsafe { work_on::<Plain<$type>>(job, work) }
                }
                drive::<Plain<$type>>(job, a, b, share, plain)
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
mod registers {
    pub use std::arch::x86_64::{__m256, __m256d, __m512, __m512d};
}
#[cfg(target_arch = "x86_64")]
use registers::*;
#[cfg(not(target_arch = "x86_64"))]
type __m512 = Plain<f32>;
#[cfg(not(target_arch = "x86_64"))]
type __m256 = Plain<f32>;
#[cfg(not(target_arch = "x86_64"))]
type __m512d = Plain<f64>;
#[cfg(not(target_arch = "x86_64"))]
type __m256d = Plain<f64>;
product_of!(f32, __m512, __m256);
product_of!(f64, __m512d, __m256d);

/// One vector register and the shape of a tile made of them.
trait Lanes: Copy {
    type Number: Product;
    const WIDTH: usize;
    /// Rows and vectors of a tile: as many accumulators as leave registers for b.
    const ROWS: usize;
    const VECTORS: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: Self::Number) -> Self;
    unsafe fn load(from: *const Self::Number) -> Self;
    unsafe fn store(self, to: *mut Self::Number);
    /// a * b + self
    unsafe fn fma(self, a: Self, b: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
macro_rules! lanes {
    ($register:ty, $number:ty, $width:expr, $rows:expr, $vectors:expr, $zero:ident, $splat:ident, $load:ident, $store:ident, $fma:ident) => {
        impl Lanes for $register {
            type Number = $number;
            const WIDTH: usize = $width;
            const ROWS: usize = $rows;
            const VECTORS: usize = $vectors;
            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: the processor has these instructions wherever this type is used.
                unsafe { std::arch::x86_64::$zero() }
            }
            #[inline(always)]
            unsafe fn splat(x: $number) -> Self {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::$splat(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $number) -> Self {
                // SAFETY: the caller gives WIDTH readable numbers.
                unsafe { std::arch::x86_64::$load(from) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $number) {
                // SAFETY: the caller gives WIDTH writable numbers.
                unsafe { std::arch::x86_64::$store(to, self) }
            }
            #[inline(always)]
            unsafe fn fma(self, a: Self, b: Self) -> Self {
                // SAFETY: as for zero.
                unsafe { std::arch::x86_64::$fma(a, b, self) }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
lanes!(__m512, f32, 16, 8, 3, _mm512_setzero_ps, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
#[cfg(target_arch = "x86_64")]
lanes!(__m512d, f64, 8, 8, 3, _mm512_setzero_pd, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd);
#[cfg(target_arch = "x86_64")]
lanes!(__m256, f32, 8, 4, 3, _mm256_setzero_ps, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
#[cfg(target_arch = "x86_64")]
lanes!(__m256d, f64, 4, 4, 3, _mm256_setzero_pd, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd);

/// Four numbers and plain arithmetic, for processors without AVX2.
#[derive(Clone, Copy)]
struct Plain<T>([T; 4]);

impl<T: Product> Lanes for Plain<T> {
    type Number = T;
    const WIDTH: usize = 4;
    const ROWS: usize = 4;
    const VECTORS: usize = 2;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([T::ZERO; 4])
    }
    #[inline(always)]
    unsafe fn splat(x: T) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller gives WIDTH readable numbers.
        Self(unsafe { from.cast::<[T; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut T) {
        // SAFETY: the caller gives WIDTH writable numbers.
        unsafe { to.cast::<[T; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // A fused operation is a slow library call where the processor has none.
        let fused = cfg!(target_arch = "aarch64");
        let one = |i: usize| if fused { a.0[i].mul_add(b.0[i], self.0[i]) } else { a.0[i] * b.0[i] + self.0[i] };
        Self([one(0), one(1), one(2), one(3)])
    }
}

/// Rows `from..to` of a job, with what they are computed from.
struct Work<'a, T> {
    from: usize,
    to: usize,
    a: Left<'a, T>,
    b: &'a [T],
    blocks: usize,
    depth: usize,
}

/// The left factor: where it lies, or packed in groups of a tile's rows with k slowest.
#[derive(Clone, Copy)]
enum Left<'a, T> {
    InPlace(View<'a, T>),
    Packed(&'a [T]),
}

/// Packs, cuts the rows into pieces by shape, and runs `work` on each.
fn drive<V: Lanes>(
    job: &Job<V::Number>,
    a: View<V::Number>,
    b: View<V::Number>,
    share: bool,
    work: unsafe fn(&Job<V::Number>, Work<V::Number>),
) {
    let tile = V::WIDTH * V::VECTORS;
    let (m, n, k) = (job.m, job.n, job.k);
    let blocks = k.div_ceil(DEPTH).max(1);
    let depth = k.div_ceil(blocks).max(1);
    let padded = n.div_ceil(V::WIDTH) * V::WIDTH;
    let bytes = size_of::<V::Number>();
    let mut packed_b = Buffer::take(padded * k.max(1) * bytes);
    let packed = bytemuck::cast_slice_mut::<u8, V::Number>(packed_b.bytes_mut());
    // Panels of one block lie one behind the other, all blocks likewise; a panel is depth x width.
    let mut panels = Vec::with_capacity(blocks * n.div_ceil(tile));
    let mut rest = &mut packed[..padded * k];
    for block in 0..blocks {
        let steps = block * depth..((block + 1) * depth).min(k);
        for column in (0..n).step_by(tile) {
            let width = (padded - column).min(tile);
            let (panel, after) = rest.split_at_mut(width * steps.len());
            rest = after;
            panels.push((panel, steps.clone(), column, width));
        }
    }
    let fill = |(panel, steps, column, width): (&mut [V::Number], std::ops::Range<usize>, usize, usize)| {
        pack(panel, b.transposed(), column..(column + width).min(n), steps, width);
    };
    if share {
        panels.into_par_iter().for_each(fill)
    } else {
        panels.into_iter().for_each(fill)
    }

    let mut packed_a = (a.column != 1).then(|| Buffer::take(m.div_ceil(V::ROWS) * V::ROWS * k.max(1) * bytes));
    let left = match &mut packed_a {
        None => Left::InPlace(a),
        Some(buffer) => {
            let packed = bytemuck::cast_slice_mut::<u8, V::Number>(buffer.bytes_mut());
            let group = V::ROWS * k.max(1);
            let fill = |(i, group): (usize, &mut [V::Number])| {
                pack(group, a, i * V::ROWS..((i + 1) * V::ROWS).min(m), 0..k, V::ROWS);
            };
            if share {
                packed.par_chunks_mut(group).enumerate().for_each(fill);
            } else {
                packed.chunks_mut(group).enumerate().for_each(fill);
            }
            Left::Packed(packed)
        }
    };
    let b = &*bytemuck::cast_slice::<u8, V::Number>(packed_b.bytes());
    let pieces = if share { (2 * m.div_ceil(512)).max(4) } else { 1 };
    let rows = m.div_ceil(pieces).div_ceil(V::ROWS) * V::ROWS;
    let one = |i: usize| {
        let work_piece = Work { from: i * rows, to: ((i + 1) * rows).min(m), a: left, b, blocks, depth };
        // SAFETY: the views hold what the job says (checked where it was made), the packed copies have just been made for its sizes, the pieces
        // are disjoint rows, and the processor has the instructions that `work` was compiled for.
        unsafe { work(job, work_piece) }
    };
    let pieces = m.div_ceil(rows);
    if share { (0..pieces).into_par_iter().for_each(one) } else { (0..pieces).for_each(one) }
}

/// packed[step][i] = from[rows.start + i][steps.start + step], zero where i is beyond the rows.
fn pack<T: Real>(packed: &mut [T], from: View<T>, rows: std::ops::Range<usize>, steps: std::ops::Range<usize>, width: usize) {
    let count = rows.len();
    if from.row == 1 {
        for (line, step) in packed.chunks_exact_mut(width).zip(steps) {
            line[..count].copy_from_slice(&from.data[step * from.column + rows.start..][..count]);
            line[count..].fill(T::ZERO);
        }
        return;
    }
    // Rows run along k: transpose in squares that stay in the first cache.
    const SQUARE: usize = 16;
    let depth = steps.len();
    for first in (0..depth).step_by(SQUARE) {
        let lines = &mut packed[first * width..(first + SQUARE).min(depth) * width];
        for i in 0..count {
            let row = &from.data[(rows.start + i) * from.row + (steps.start + first) * from.column..];
            if from.column == 1 {
                lines.iter_mut().skip(i).step_by(width).zip(row).for_each(|(to, &x)| *to = x);
            } else {
                lines.iter_mut().skip(i).step_by(width).zip(row.iter().step_by(from.column)).for_each(|(to, &x)| *to = x);
            }
        }
        for line in lines.chunks_exact_mut(width) {
            line[count..].fill(T::ZERO);
        }
    }
}

/// All tiles of some rows, block of k after block of k.
#[inline(always)]
unsafe fn work_on<V: Lanes>(job: &Job<V::Number>, w: Work<V::Number>) {
    let tile_width = V::WIDTH * V::VECTORS;
    let padded = job.n.div_ceil(V::WIDTH) * V::WIDTH;
    for block in 0..w.blocks {
        let (first, steps) = (block * w.depth, w.depth.min(job.k - block * w.depth));
        let last = block + 1 == w.blocks;
        let add = block > 0 || job.finish.add;
        for column in (0..job.n).step_by(tile_width) {
            let width = (padded - column).min(tile_width);
            let columns = (job.n - column).min(tile_width);
            let panel = w.b[first * padded + column * steps..].as_ptr();
            let mut row = w.from;
            while row < w.to {
                let rows = (w.to - row).min(V::ROWS);
                let (a, a_row, a_step) = match w.a {
                    Left::InPlace(view) => (view.data[(row * view.row + first).min(view.data.len())..].as_ptr(), view.row, 1),
                    Left::Packed(packed) => (packed[row * job.k + first * V::ROWS..].as_ptr(), 1, V::ROWS),
                };
                // SAFETY: rows and columns lie inside c; a and b hold `steps` steps of them.
                unsafe {
                    let c = job.start.add(row * job.stride + column);
                    tile_of_any_size::<V>(rows, width / V::WIDTH, steps, a, a_row, a_step, panel, c, job.stride, columns, add);
                    if last {
                        finish_tile::<V>(job, row, rows, column, columns);
                    }
                }
                row += rows;
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tile_of_any_size<V: Lanes>(
    rows: usize,
    vectors: usize,
    steps: usize,
    a: *const V::Number,
    a_row: usize,
    a_step: usize,
    b: *const V::Number,
    c: *mut V::Number,
    stride: usize,
    columns: usize,
    add: bool,
) {
    macro_rules! sizes {
        ($($rows:literal)*) => {
            // SAFETY: of each call, the caller's.
            match (rows, vectors) {
                $(
                    ($rows, 1) if $rows <= V::ROWS => unsafe { tile::<V, $rows, 1>(steps, a, a_row, a_step, b, c, stride, columns, add) },
                    ($rows, 2) if $rows <= V::ROWS => unsafe { tile::<V, $rows, 2>(steps, a, a_row, a_step, b, c, stride, columns, add) },
                    ($rows, 3) if $rows <= V::ROWS && V::VECTORS > 2 => unsafe {
                        tile::<V, $rows, 3>(steps, a, a_row, a_step, b, c, stride, columns, add)
                    },
                )*
                _ => unreachable!("a tile of {rows} rows and {vectors} vectors"),
            }
        };
    }
    sizes!(1 2 3 4 5 6 7 8)
}

/// c[ROWS, columns] = or += sum over steps of a b, in registers.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<V: Lanes, const ROWS: usize, const VECTORS: usize>(
    steps: usize,
    a: *const V::Number,
    a_row: usize,
    a_step: usize,
    b: *const V::Number,
    c: *mut V::Number,
    stride: usize,
    columns: usize,
    add: bool,
) {
    // SAFETY: a has ROWS rows and `steps` steps, b `steps` lines of VECTORS vectors, c ROWS rows of `columns` numbers.
    unsafe {
        let mut sums = [[V::zero(); VECTORS]; ROWS];
        let (mut a, mut b) = (a, b);
        for _ in 0..steps {
            let mut right = [V::zero(); VECTORS];
            for (v, right) in right.iter_mut().enumerate() {
                *right = V::load(b.add(v * V::WIDTH));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = V::splat(*a.add(i * a_row));
                for (sum, &right) in sums.iter_mut().zip(&right) {
                    *sum = sum.fma(left, right);
                }
            }
            a = a.add(a_step);
            b = b.add(VECTORS * V::WIDTH);
        }
        let one = V::splat(V::Number::ONE);
        for (i, sums) in sums.iter().enumerate() {
            let c = c.add(i * stride);
            for (v, &sum) in sums.iter().enumerate() {
                let (c, left) = (c.add(v * V::WIDTH), columns.saturating_sub(v * V::WIDTH));
                if left >= V::WIDTH {
                    let sum = if add { sum.fma(V::load(c), one) } else { sum };
                    sum.store(c);
                } else if left > 0 {
                    let mut whole = [V::Number::ZERO; 16];
                    sum.store(whole.as_mut_ptr());
                    for (j, &x) in whole[..left].iter().enumerate() {
                        *c.add(j) = if add { *c.add(j) + x } else { x };
                    }
                }
            }
        }
    }
}

/// Bias, factor, addend or GELU on a tile that has just been completed.
#[inline(always)]
unsafe fn finish_tile<V: Lanes>(job: &Job<V::Number>, row: usize, rows: usize, column: usize, columns: usize) {
    let f = &job.finish;
    if f.bias.is_null() && f.times.is_null() && f.plus.is_null() && f.gelu.is_null() {
        return;
    }
    for i in row..row + rows {
        // SAFETY: the tile lies inside c, and the other operands have c's shape.
        unsafe {
            let at = i * job.n + column;
            let c = std::slice::from_raw_parts_mut(job.start.add(i * job.stride + column), columns);
            if !f.bias.is_null() {
                let bias = std::slice::from_raw_parts(f.bias.add(column), columns);
                c.iter_mut().zip(bias).for_each(|(c, &b)| *c += b);
            }
            if !f.times.is_null() {
                let times = std::slice::from_raw_parts(f.times.add(at), columns);
                c.iter_mut().zip(times).for_each(|(c, &t)| *c *= t);
            }
            if !f.plus.is_null() {
                let plus = std::slice::from_raw_parts(f.plus.add(at), columns);
                c.iter_mut().zip(plus).for_each(|(c, &p)| *c += p);
            }
            if !f.gelu.is_null() {
                let y = std::slice::from_raw_parts_mut(f.gelu.add(at), columns);
                for (c, y) in c.iter_mut().zip(y) {
                    let x = *c;
                    let (probability, density) = x.normal();
                    *y = x * probability;
                    *c = x.mul_add(density, probability);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn check<T: Product>(m: usize, n: usize, k: usize, transpose_a: bool, transpose_b: bool, tolerance: f64) {
        let draw = |name: &str, n: usize| Rng::new(3).normal(name, n).into_iter().map(|x| T::of(x as f64)).collect::<Vec<T>>();
        let (a, b, before, bias) = (draw("a", m * k), draw("b", k * n), draw("c", m * n), draw("bias", n));
        let a_view = if transpose_a { View::rows(&a, m).transposed() } else { View::rows(&a, k) };
        let b_view = if transpose_b { View::rows(&b, k).transposed() } else { View::rows(&b, n) };
        let at = |v: &View<T>, i: usize, j: usize| v.data[i * v.row + j * v.column].f64();
        for share in [false, true] {
            let mut c = before.clone();
            let finish = Finish { bias: Some(&bias), ..Finish::add() };
            product(&mut Panel::of(&mut c, n), k, a_view, b_view, finish, share);
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k).map(|p| at(&a_view, i, p) * at(&b_view, p, j)).sum();
                    let exact = sum + before[i * n + j].f64() + bias[j].f64();
                    let error = (c[i * n + j].f64() - exact).abs();
                    assert!(
                        error <= tolerance * (k as f64).sqrt().max(1.0),
                        "{m} {n} {k} {transpose_a} {transpose_b}: ({i}, {j}) off by {error}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_of_all_sizes_and_orders_are_right() {
        for (m, n, k) in
            [(1, 1, 1), (5, 3, 2), (8, 48, 7), (9, 49, 33), (17, 100, 400), (70, 65, 800), (3, 200, 1), (2, 2, 0), (40, 96, 385)]
        {
            for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
                check::<f32>(m, n, k, transpose_a, transpose_b, 4e-6);
                check::<f64>(m, n, k, transpose_a, transpose_b, 1e-14);
            }
        }
    }

    #[test]
    fn what_follows_a_product_is_done_in_its_order() {
        let (a, b): (Vec<f64>, Vec<f64>) = (vec![1.0, 2.0], vec![0.5, -1.0, 0.25, 0.5]);
        let run = |finish: Finish<f64>| {
            let mut c = [9.0; 2];
            serial(&mut Panel::of(&mut c, 2), 2, View::rows(&a, 2), View::rows(&b, 2), finish);
            c
        };
        assert_eq!(run(Finish::replace()), [1.0, 0.0]);
        let all = Finish { bias: Some(&[1.0, 2.0]), times: Some(&[3.0, 4.0]), plus: Some(&[0.5, 0.25]), ..Finish::replace() };
        assert_eq!(run(all), [6.5, 8.25]);
        let mut y = [0.0; 2];
        let slope = run(Finish { gelu: Some(&mut y), ..Finish::replace() });
        let (probability, density) = 1.0f64.normal();
        assert_eq!((y, slope), ([probability, 0.0], [probability + density, 0.5]));
    }
}
