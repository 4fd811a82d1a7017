//! Matrix product on the CPU: c = a b or c += a b on strided views, with what follows it done while a tile of c is still in the first cache.
//!
//! One kernel, written once over a vector type, computes a tile of some rows and two vectors of columns in registers: per step of k it loads
//! two vectors of b and broadcasts a number of a for each row. Both factors are packed just before they are used: a in groups of a tile's rows, which stay in
//! the second cache while the panels of b, as wide as a tile, go by. k is cut into blocks to that end.
//!
//! Each element's sum is taken block by block, in each block from front to back: an order that k alone decides. So the result does not depend
//! on the number of threads, nor on which rows or columns are computed together.
//!
//! Against PyTorch's MKL: `tests/reference/bench_torch.py --what ops`.

#[cfg(target_arch = "x86_64")]
mod bf16;

use super::memory::Buffer;
use super::parallel::Panel;
use super::simd::{Level, Real, level};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// What happens to c: replaced or added to; then, on request, a bias is added to each row; then, on request, y = gelu(c) is written and c keeps
/// the derivative, or c itself becomes gelu(c). y has the shape of c, without gaps.
pub struct Finish<'a, T> {
    pub add: bool,
    pub bias: Option<&'a [T]>,
    pub gelu: Option<&'a mut [T]>,
    pub becomes_gelu: bool,
}

impl<T> Finish<'_, T> {
    pub fn replace() -> Self {
        Self { add: false, bias: None, gelu: None, becomes_gelu: false }
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

/// Vectors of a whole tile: with two, and as many rows as leave registers for them, b is read least.
const VECTORS: usize = 2;
/// Steps of k between a line of b that is asked for and the one in use.
const AHEAD: usize = 8;
/// Steps of k that are summed in registers before c is touched.
const DEPTH: usize = 384;
/// Below this many multiplications a product is not worth sharing out.
const WORTH_SHARING: usize = 1 << 18;

fn product<T: Product>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, finish: Finish<T>, share: bool) {
    let (m, n) = (c.rows(), c.width());
    assert!(a.holds(m, k) && b.holds(k, n), "a product of {m} x {k} and {k} x {n} reaches beyond its slices");
    assert!(finish.gelu.as_ref().is_none_or(|y| y.len() == m * n), "what follows a product has the shape of its result");
    assert!(finish.bias.is_none_or(|bias| bias.len() == n), "a bias has as many numbers as the result has columns");
    if m == 0 || n == 0 {
        return;
    }
    let share = share && m * n * k >= WORTH_SHARING;
    let (start, stride) = c.raw();
    let job = Job { m, n, k, start, stride, finish: Raw::of(finish) };
    if !T::rounded(&job, a, b, share) {
        drive(&job, a, b, share, T::kernel());
    }
}

/// Whether factors of f32 products are rounded to bf16.
static ROUNDED: AtomicBool = AtomicBool::new(false);

/// Makes all f32 products of this program take their factors rounded to bf16, or as they are. Answers whether that can be done: the processor has to
/// multiply bf16.
pub fn round_factors(round: bool) -> bool {
    let can = !round || has_bf16();
    ROUNDED.store(round && can, Ordering::Relaxed);
    can
}

/// Whether this processor multiplies bf16 numbers.
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return level() == Level::Avx512 && std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
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
    gelu: *mut T,
    becomes_gelu: bool,
}

impl<T> Raw<T> {
    fn of(finish: Finish<T>) -> Self {
        Self {
            add: finish.add,
            bias: finish.bias.map_or(std::ptr::null(), <[T]>::as_ptr),
            gelu: finish.gelu.map_or(std::ptr::null_mut(), <[T]>::as_mut_ptr),
            becomes_gelu: finish.becomes_gelu,
        }
    }
}

// SAFETY: the addresses come from borrows that outlive the job, and threads write disjoint rows of c and of the GELU's result.
unsafe impl<T: Sync> Sync for Job<T> {}

/// Numbers that the product is compiled for.
pub trait Product: Real {
    #[doc(hidden)]
    fn kernel() -> &'static Kernel<Self>;

    /// Computes it with rounded factors, if that is how these numbers are multiplied; answers whether it did.
    #[doc(hidden)]
    fn rounded(_: &Job<Self>, _: View<Self>, _: View<Self>, _: bool) -> bool {
        false
    }
}

impl Product for f32 {
    fn kernel() -> &'static Kernel<f32> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &avx512_f32::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &avx2_f32::KERNEL,
            _ => &plain_f32::KERNEL,
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn rounded(job: &Job<f32>, a: View<f32>, b: View<f32>, share: bool) -> bool {
        let rounded = ROUNDED.load(Ordering::Relaxed);
        if rounded {
            bf16::drive(job, a, b, share);
        }
        rounded
    }
}

impl Product for f64 {
    fn kernel() -> &'static Kernel<f64> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &avx512_f64::KERNEL,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &avx2_f64::KERNEL,
            _ => &plain_f64::KERNEL,
        }
    }
}

/// A kernel compiled for some processors: numbers in a vector, rows and vectors of a tile (as many sums as leave registers for b), and the
/// function that computes a piece of a product with it.
pub struct Kernel<T> {
    width: usize,
    rows: usize,
    vectors: usize,
    work: unsafe fn(&Job<T>, Work<T>),
}

/// Writes one kernel. Its functions carry the processor's features themselves, so that the instructions are used whatever gets inlined.
macro_rules! kernel {
    (
        $(#[$feature:meta])? $module:ident: $number:ty, $width:literal lanes in $register:ty, tile of [$($rows:literal)+] rows,
        $zero:ident $splat:ident $load:ident $store:ident $fma:ident $near:ident $turn:expr
    ) => {
        mod $module {
            use super::*;
            #[cfg(target_arch = "x86_64")]
            #[allow(unused_imports)]
            use std::arch::x86_64::*;

            type Number = $number;
            const WIDTH: usize = $width;
            /// Rows of a whole tile.
            const MOST: usize = [$($rows),+].len();

            pub static KERNEL: Kernel<Number> = Kernel { width: WIDTH, rows: MOST, vectors: VECTORS, work };

            /// All tiles of a piece, block of k after block of k.
            $(#[$feature])?
            unsafe fn work(job: &Job<Number>, w: Work<Number>) {
                let mut panel = Buffer::take(w.depth * WIDTH * VECTORS * size_of::<Number>());
                let panel = bytemuck::cast_slice_mut::<u8, Number>(panel.bytes_mut());
                let in_place = w.a.column == 1 && w.columns.len() <= FEW_COLUMNS;
                let rows = if in_place { 0 } else { w.rows.len().next_multiple_of(MOST) };
                let mut left = Buffer::take((rows * w.depth + SQUARE) * size_of::<Number>());
                let left = bytemuck::cast_slice_mut::<u8, Number>(left.bytes_mut());
                for block in 0..w.blocks {
                    let first = block * w.depth;
                    let steps = w.depth.min(job.k - first);
                    if !in_place {
                        pack_left(left, w.a, w.rows.clone(), job.m, first..first + steps, MOST, $turn);
                    }
                    let (last, add) = (block + 1 == w.blocks, block > 0 || job.finish.add);
                    let mut column = w.columns.start;
                    while column < w.columns.end {
                        let columns = (w.columns.end - column).min(WIDTH * VECTORS);
                        let vectors = columns.div_ceil(WIDTH);
                        let panel = &mut panel[..steps * vectors * WIDTH];
                        pack(panel, w.b.transposed(), column..column + columns, first..first + steps, vectors * WIDTH, $turn);
                        let panel = panel.as_ptr();
                        let mut row = w.rows.start;
                        while row < w.rows.end {
                            let rows = (w.rows.end - row).min(MOST);
                            let (a, a_row) = match in_place {
                                true => (w.a.data[row * w.a.row + first..].as_ptr(), w.a.row),
                                false => (left[(row - w.rows.start) * steps..].as_ptr(), 1),
                            };
                            // SAFETY: rows and columns lie inside c; a and b hold `steps` steps of them.
                            unsafe {
                                let c = job.start.add(row * job.stride + column);
                                match (rows, vectors, in_place) {
                                    $(
                                        ($rows, 1, true) => tile::<$rows, 1, true>(steps, a, a_row, panel, c, job.stride, columns, add),
                                        ($rows, 1, false) => tile::<$rows, 1, false>(steps, a, a_row, panel, c, job.stride, columns, add),
                                        ($rows, 2, true) => tile::<$rows, 2, true>(steps, a, a_row, panel, c, job.stride, columns, add),
                                        ($rows, 2, false) => tile::<$rows, 2, false>(steps, a, a_row, panel, c, job.stride, columns, add),
                                    )+
                                    _ => unreachable!("a tile of {rows} rows and {vectors} vectors"),
                                }
                                if last {
                                    finish_tile(job, row, rows, column, columns);
                                }
                            }
                            row += rows;
                        }
                        column += columns;
                    }
                }
            }

            /// c[ROWS, columns] = or += sum over steps of a b, in registers.
            $(#[$feature])?
            #[allow(clippy::too_many_arguments)]
            unsafe fn tile<const ROWS: usize, const WIDE: usize, const IN_PLACE: bool>(
                steps: usize,
                mut a: *const Number,
                a_row: usize,
                mut b: *const Number,
                c: *mut Number,
                stride: usize,
                columns: usize,
                add: bool,
            ) {
                // SAFETY: a has ROWS rows and `steps` steps, b `steps` lines of WIDE vectors, c ROWS rows of `columns` numbers.
                unsafe {
                    let mut sums: [[$register; WIDE]; ROWS] = [[$zero(); WIDE]; ROWS];
                    let mut i = 0;
                    while i < ROWS {
                        let mut v = 0;
                        while v < WIDE {
                            $near(c.wrapping_add(i * stride + v * WIDTH));
                            v += 1;
                        }
                        i += 1;
                    }
                    let mut step = 0;
                    while step < steps {
                        let mut right: [$register; WIDE] = [$zero(); WIDE];
                        let mut v = 0;
                        while v < WIDE {
                            right[v] = $load(b.add(v * WIDTH));
                            v += 1;
                        }
                        let mut v = 0;
                        while v < WIDE {
                            $near(b.wrapping_add((v + AHEAD * WIDE) * WIDTH));
                            v += 1;
                        }
                        let mut i = 0;
                        while i < ROWS {
                            let left = $splat(*a.add(if IN_PLACE { i * a_row } else { i }));
                            let mut v = 0;
                            while v < WIDE {
                                sums[i][v] = $fma(left, right[v], sums[i][v]);
                                v += 1;
                            }
                            i += 1;
                        }
                        a = a.add(if IN_PLACE { 1 } else { MOST });
                        b = b.add(WIDE * WIDTH);
                        step += 1;
                    }
                    // The whole tile first and apart: short loops of known length keep the sums in their registers.
                    let one = $splat(1.0);
                    let whole = columns == WIDE * WIDTH;
                    let mut i = 0;
                    while i < ROWS && whole && add {
                        let mut v = 0;
                        while v < WIDE {
                            let c = c.add(i * stride + v * WIDTH);
                            $store(c, $fma($load(c), one, sums[i][v]));
                            v += 1;
                        }
                        i += 1;
                    }
                    while i < ROWS && whole {
                        let mut v = 0;
                        while v < WIDE {
                            $store(c.add(i * stride + v * WIDTH), sums[i][v]);
                            v += 1;
                        }
                        i += 1;
                    }
                    if !whole {
                        let mut rows = [[[0.0; WIDTH]; WIDE]; ROWS];
                        let mut i = 0;
                        while i < ROWS {
                            let mut v = 0;
                            while v < WIDE {
                                $store(rows[i][v].as_mut_ptr(), sums[i][v]);
                                v += 1;
                            }
                            i += 1;
                        }
                        edge(rows.as_flattened().as_flattened(), WIDE * WIDTH, c, stride, columns, add);
                    }
                }
            }

            /// The first `columns` numbers of a tile's rows, where c has no more.
            $(#[$feature])?
            #[inline(never)]
            unsafe fn edge(rows: &[Number], width: usize, c: *mut Number, stride: usize, columns: usize, add: bool) {
                for (i, row) in rows.chunks_exact(width).enumerate() {
                    // SAFETY: c has as many rows, of `columns` numbers.
                    let c = unsafe { std::slice::from_raw_parts_mut(c.add(i * stride), columns) };
                    for (c, &x) in c.iter_mut().zip(row) {
                        *c = if add { *c + x } else { x };
                    }
                }
            }

            /// Bias and GELU on a tile that has just been completed.
            $(#[$feature])?
            pub(super) unsafe fn finish_tile(job: &Job<Number>, row: usize, rows: usize, column: usize, columns: usize) {
                let f = &job.finish;
                if f.bias.is_null() && f.gelu.is_null() && !f.becomes_gelu {
                    return;
                }
                for i in row..row + rows {
                    // SAFETY: the tile lies inside c, the bias has a number a column, and y has c's shape.
                    unsafe {
                        let at = i * job.n + column;
                        let c = std::slice::from_raw_parts_mut(job.start.add(i * job.stride + column), columns);
                        if !f.bias.is_null() {
                            let bias = std::slice::from_raw_parts(f.bias.add(column), columns);
                            for j in 0..columns {
                                c[j] += bias[j];
                            }
                        }
                        if f.becomes_gelu {
                            for c in c.iter_mut() {
                                *c *= c.normal().0;
                            }
                        }
                        if !f.gelu.is_null() {
                            let y = std::slice::from_raw_parts_mut(f.gelu.add(at), columns);
                            for j in 0..columns {
                                let x = c[j];
                                let (probability, density) = x.normal();
                                y[j] = x * probability;
                                c[j] = Real::mul_add(x, density, probability);
                            }
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")] avx512_f32: f32, 16 lanes in __m512, tile of [1 2 3 4 5 6 7 8 9 10 11 12 13 14] rows,
    _mm512_setzero_ps _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_fmadd_ps near Some(turn_f32));
#[cfg(target_arch = "x86_64")]
kernel!(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")] avx512_f64: f64, 8 lanes in __m512d, tile of [1 2 3 4 5 6 7 8 9 10 11 12 13 14] rows,
    _mm512_setzero_pd _mm512_set1_pd _mm512_loadu_pd _mm512_storeu_pd _mm512_fmadd_pd near None);
#[cfg(target_arch = "x86_64")]
kernel!(#[target_feature(enable = "avx2,fma")] avx2_f32: f32, 8 lanes in __m256, tile of [1 2 3 4 5 6] rows,
    _mm256_setzero_ps _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_fmadd_ps near None);
#[cfg(target_arch = "x86_64")]
kernel!(#[target_feature(enable = "avx2,fma")] avx2_f64: f64, 4 lanes in __m256d, tile of [1 2 3 4 5 6] rows,
    _mm256_setzero_pd _mm256_set1_pd _mm256_loadu_pd _mm256_storeu_pd _mm256_fmadd_pd near None);
kernel!(plain_f32: f32, 4 lanes in [f32; 4], tile of [1 2 3 4] rows, zero4 splat4 load4 store4 fma4 far None);
kernel!(plain_f64: f64, 4 lanes in [f64; 4], tile of [1 2 3 4] rows, zero4 splat4 load4 store4 fma4 far None);

/// Asks for a number's line of memory, so that it is near when it is needed.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn near<T>(at: *const T) {
    // SAFETY: a prefetch reads nothing and cannot fail, whatever the address.
    unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()) }
}

// Four numbers and plain arithmetic, for processors without AVX2.

#[inline(always)]
fn zero4<T: Real>() -> [T; 4] {
    [T::ZERO; 4]
}

#[inline(always)]
fn splat4<T: Real>(x: T) -> [T; 4] {
    [x; 4]
}

#[inline(always)]
unsafe fn load4<T: Real>(from: *const T) -> [T; 4] {
    // SAFETY: the caller gives four readable numbers.
    unsafe { from.cast::<[T; 4]>().read_unaligned() }
}

#[inline(always)]
unsafe fn store4<T: Real>(to: *mut T, x: [T; 4]) {
    // SAFETY: the caller gives four writable numbers.
    unsafe { to.cast::<[T; 4]>().write_unaligned(x) }
}

#[inline(always)]
fn far<T>(_: *const T) {}

/// a b + c. A fused operation is a slow library call where the processor has none.
#[inline(always)]
fn fma4<T: Real>(a: [T; 4], b: [T; 4], c: [T; 4]) -> [T; 4] {
    let one = |i: usize| if cfg!(target_arch = "aarch64") { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] };
    [one(0), one(1), one(2), one(3)]
}

/// A part of a job's rows and columns, with what it is computed from.
pub struct Work<'a, T> {
    rows: Range<usize>,
    columns: Range<usize>,
    a: View<'a, T>,
    b: View<'a, T>,
    blocks: usize,
    depth: usize,
}

/// Rows of a piece: so many that a block of the left factor stays in the second cache while the panels go by.
const PIECE_ROWS: usize = 448;
/// Columns of a piece, roughly: so many that packing its rows is worth it.
const PIECE_COLUMNS: usize = 512;
/// Into so many pieces a product that is shared out is cut at least.
const PIECES: usize = 4;
/// For so many columns the left factor is read where it lies, if its rows run along k.
const FEW_COLUMNS: usize = 256;

/// Cuts the product into pieces by shape, and runs the kernel on each.
fn drive<T: Product>(job: &Job<T>, a: View<T>, b: View<T>, share: bool, kernel: &Kernel<T>) {
    let (m, n, k) = (job.m, job.n, job.k);
    let blocks = k.div_ceil(DEPTH).max(1);
    // Whole squares, for the transposition while packing.
    let depth = k.div_ceil(blocks).next_multiple_of(SQUARE).max(1);
    let blocks = k.div_ceil(depth).max(1);
    // Every piece packs what it reads: it should be tall and wide, but there must be some of them.
    let (mut down, mut across) = (1, 1);
    if share {
        (down, across) = (m.div_ceil(PIECE_ROWS), (n / PIECE_COLUMNS).max(1));
        while down * across < PIECES {
            if m / down >= n / across { down *= 2 } else { across *= 2 }
        }
    }
    // Whole tiles, as evenly as they go.
    let (tall, wide) = (m.div_ceil(kernel.rows), n.div_ceil(kernel.width * kernel.vectors));
    let row = |piece: usize| (tall * piece / down * kernel.rows).min(m);
    let column = |piece: usize| (wide * piece / across * kernel.width * kernel.vectors).min(n);
    let one = |i: usize| {
        let (i, j) = (i / across, i % across);
        let piece = Work { rows: row(i)..row(i + 1), columns: column(j)..column(j + 1), a, b, blocks, depth };
        // SAFETY: the views hold what the job says (checked where it was made), the pieces
        // are disjoint, and the processor has the instructions that the kernel was compiled for.
        unsafe { (kernel.work)(job, piece) }
    };
    if share { (0..down * across).into_par_iter().for_each(one) } else { one(0) }
}

/// Side of the squares that are transposed while packing.
const SQUARE: usize = 16;

/// packed[step][i] = from[rows.start + i][steps.start + step], zero where i is beyond the rows.
#[inline(always)]
fn pack<T: Real>(packed: &mut [T], from: View<T>, rows: Range<usize>, steps: Range<usize>, width: usize, turn: Option<Turn<T>>) {
    let count = rows.len();
    if from.row == 1 {
        let lines = steps.map(|step| &from.data[step * from.column + rows.start..][..count]);
        // A copy of known length is a few instructions, one of unknown length a call.
        match (width == count, width) {
            (true, 16) => copy_lines::<T, 16>(packed, lines),
            (true, 32) => copy_lines::<T, 32>(packed, lines),
            _ => {
                for (to, line) in packed.chunks_exact_mut(width).zip(lines) {
                    to[..count].copy_from_slice(line);
                    to[count..].fill(T::ZERO);
                }
            }
        }
        return;
    }
    // Rows run along k: transpose square by square, in registers where the processor has room for one.
    let depth = steps.len();
    for first in (0..depth).step_by(SQUARE) {
        let lines = &mut packed[first * width..(first + SQUARE).min(depth) * width];
        let high = lines.len() / width;
        for left in (0..width).step_by(SQUARE) {
            let wide = SQUARE.min(width - left);
            let start = (rows.start + left) * from.row + (steps.start + first) * from.column;
            if let (Some(turn), true) = (turn, from.column == 1 && high == SQUARE && left + SQUARE <= count) {
                let (source, target) = (&from.data[start..start + (SQUARE - 1) * from.row + SQUARE], &mut lines[left..]);
                assert!(target.len() >= (SQUARE - 1) * width + SQUARE);
                // SAFETY: both hold SQUARE lines of SQUARE numbers at these distances (just checked).
                unsafe { turn(source.as_ptr(), from.row, target.as_mut_ptr(), width) };
                continue;
            }
            for i in 0..wide {
                let source = start + i * from.row;
                for p in 0..high {
                    lines[p * width + left + i] = if left + i < count { from.data[source + p * from.column] } else { T::ZERO };
                }
            }
        }
    }
}

#[inline(always)]
fn copy_lines<'a, T: Real, const WIDTH: usize>(packed: &mut [T], lines: impl Iterator<Item = &'a [T]>) {
    for (to, line) in packed.as_chunks_mut::<WIDTH>().0.iter_mut().zip(lines) {
        *to = *<&[T; WIDTH]>::try_from(line).expect("a line of this length");
    }
}

/// Rows of the left factor in groups of `most`, in each group step after step; zeros where the last group has no rows. `all` rows can be read.
#[inline(always)]
fn pack_left<T: Real>(
    packed: &mut [T],
    from: View<T>,
    rows: Range<usize>,
    all: usize,
    steps: Range<usize>,
    most: usize,
    turn: Option<Turn<T>>,
) {
    const TOGETHER: usize = 8;
    let depth = steps.len();
    let groups = rows.len().div_ceil(most);
    for first in (0..groups).step_by(TOGETHER) {
        let last = (first + TOGETHER).min(groups);
        if from.row == 1 {
            // Some groups together, step by step: the lines of memory that they share are read once.
            for step in 0..depth {
                for group in first..last {
                    let row = rows.start + group * most;
                    let count = most.min(rows.end - row);
                    let line = &mut packed[(group * depth + step) * most..][..most];
                    let source = &from.data[(steps.start + step) * from.column + row..];
                    if count == 14 && most == 14 {
                        *line.first_chunk_mut::<14>().expect("a line of this length") =
                            *source.first_chunk().expect("a row of this length");
                    } else {
                        line[..count].copy_from_slice(&source[..count]);
                        line[count..].fill(T::ZERO);
                    }
                }
            }
            continue;
        }
        for group in first..last {
            let row = rows.start + group * most;
            let packed = &mut packed[group * depth * most..][..depth * most + SQUARE];
            let mut done = 0;
            if let (Some(turn), true) = (turn, from.column == 1 && row + SQUARE <= all && most <= SQUARE) {
                // A square is wider than a group: each line's surplus is overwritten by the next, the last one's by the next group.
                while done + SQUARE <= depth {
                    let source = &from.data[row * from.row + steps.start + done..][..(SQUARE - 1) * from.row + SQUARE];
                    let target = &mut packed[done * most..][..(SQUARE - 1) * most + SQUARE];
                    // SAFETY: both hold SQUARE lines of SQUARE numbers at these distances, as the slices say.
                    unsafe { turn(source.as_ptr(), from.row, target.as_mut_ptr(), most) };
                    done += SQUARE;
                }
            }
            for step in done..depth {
                for i in 0..most {
                    let value =
                        if row + i < rows.end { from.data[(row + i) * from.row + (steps.start + step) * from.column] } else { T::ZERO };
                    packed[step * most + i] = value;
                }
            }
        }
    }
}

/// Transposes a square of 16 x 16 numbers; the arguments are addresses and distances of lines.
type Turn<T> = unsafe fn(*const T, usize, *mut T, usize);

/// A square of 16 x 16 numbers of 32 bits in registers, transposed: pairs of rows, then fours, then the four quarters of a register change places.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(mut r: [std::arch::x86_64::__m512; 16]) -> [std::arch::x86_64::__m512; 16] {
    use std::arch::x86_64::*;
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        for j in 0..2 {
            let (a, b) = (_mm512_castps_pd(t[4 * i + j]), _mm512_castps_pd(t[4 * i + 2 + j]));
            r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for j in 0..4 {
        let (a, b, c, d) = (r[j], r[4 + j], r[8 + j], r[12 + j]);
        let (ab, cd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
        t[j] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
        t[8 + j] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
        let (ab, cd) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
        t[4 + j] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
        t[12 + j] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
    }
    t
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn turn_f32(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller gives 16 lines of 16 numbers on both sides.
    unsafe {
        let mut r = [_mm512_setzero_ps(); 16];
        for (i, r) in r.iter_mut().enumerate() {
            *r = _mm512_loadu_ps(from.add(i * from_stride));
        }
        for (i, &t) in transposed(r).iter().enumerate() {
            _mm512_storeu_ps(to.add(i * to_stride), t);
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
    fn every_kernel_that_this_processor_can_run_is_right() {
        let mut kernels = vec![("plain", &plain_f64::KERNEL)];
        #[cfg(target_arch = "x86_64")]
        if level() >= Level::Avx2 {
            kernels.push(("AVX2", &avx2_f64::KERNEL));
        }
        let draw = |name: &str, n: usize| Rng::new(5).normal(name, n).into_iter().map(f64::from).collect::<Vec<_>>();
        for (m, n, k) in [(1, 1, 1), (7, 9, 5), (13, 17, 400), (31, 300, 33)] {
            let (a, b, bias) = (draw("a", m * k), draw("b", k * n), draw("bias", n));
            for (name, kernel) in &kernels {
                for transposed in [false, true] {
                    let mut c = vec![0.0; m * n];
                    let a_view = if transposed { View::rows(&a, m).transposed() } else { View::rows(&a, k) };
                    let finish = Raw::of(Finish { bias: Some(&bias), ..Finish::replace() });
                    let job = Job { m, n, k, start: c.as_mut_ptr(), stride: n, finish };
                    drive(&job, a_view, View::rows(&b, n), true, kernel);
                    for (at, c) in c.iter().enumerate() {
                        let (i, j) = (at / n, at % n);
                        let left = |p: usize| a[if transposed { p * m + i } else { i * k + p }];
                        let exact = bias[j] + (0..k).map(|p| left(p) * b[p * n + j]).sum::<f64>();
                        assert!((c - exact).abs() < 1e-11, "{name} {m} {n} {k} {transposed}: ({i}, {j}) is {c}, not {exact}");
                    }
                }
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
        assert_eq!(run(Finish { bias: Some(&[1.0, 2.0]), ..Finish::add() }), [11.0, 11.0]);
        let mut y = [0.0; 2];
        let slope = run(Finish { gelu: Some(&mut y), ..Finish::replace() });
        let (probability, density) = 1.0f64.normal();
        assert_eq!((y, slope), ([probability, 0.0], [probability + density, 0.5]));
        assert_eq!(run(Finish { becomes_gelu: true, ..Finish::replace() }), y);
    }
}
