//! How work is shared out over threads. Pieces are cut by the shape of the data, never by the number of threads, so results do not depend on it.

use crate::error::{Context, Error, Result};
use rayon::prelude::*;

/// Runs the program's work `f` on one of so many threads; 0 leaves the number to the machine. Call it once, before any work.
///
/// The caller of a parallel loop is then itself one of the threads that work on it: nobody has to be woken before the loop begins.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> Result<R> {
    check(threads)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
    pool.build_global().context("starting the threads")?;
    Ok(rayon::scope(|_| f()))
}

/// Refuses a number of threads that nobody can mean.
pub fn check(threads: usize) -> Result<()> {
    if threads > 1024 {
        return Err(Error::usage(format!("--threads {threads} is more than 1024; leave it out to use every core")));
    }
    Ok(())
}

/// Runs `f` with one thread for its parallel loops: what one core can do.
pub fn alone<R: Send>(f: impl FnOnce() -> R + Send) -> Result<R> {
    on_threads(1, f)
}

/// Runs `f` with so many threads of its own for its parallel loops, beside those of the program.
pub fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).stack_size(STACK).build();
    Ok(pool.context("starting a thread")?.install(f))
}

/// As much stack as a program's first thread has.
const STACK: usize = 8 << 20;

pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// How many rows of this many elements make a piece worth handing to another thread (about 16 thousand elements).
pub fn rows_per_piece(columns: usize) -> usize {
    (16_384 / columns.max(1)).max(1)
}

/// Runs `f(first row, rows of y)` over pieces of `y`, a matrix with `columns` columns.
pub fn rows<T: Send>(y: &mut [T], columns: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    let piece = rows_per_piece(columns);
    let length = piece * columns.max(1);
    if y.len() <= length {
        return f(0, y);
    }
    y.par_chunks_mut(length).enumerate().for_each(|(i, part)| f(i * piece, part));
}

/// The same over two matrices with as many rows each.
pub fn rows2<T: Send, U: Send>(
    y: &mut [T],
    columns: usize,
    z: &mut [U],
    z_columns: usize,
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync + Send,
) {
    let piece = rows_per_piece(columns.max(z_columns));
    if y.len() <= piece * columns.max(1) {
        return f(0, y, z);
    }
    let pieces = y.par_chunks_mut(piece * columns.max(1)).zip(z.par_chunks_mut(piece * z_columns.max(1)));
    pieces.enumerate().for_each(|(i, (y, z))| f(i * piece, y, z));
}

/// Some columns of a row-major matrix, exclusively borrowed while others may hold the other columns.
pub struct Panel<'a, T> {
    start: *mut T,
    rows: usize,
    stride: usize,
    width: usize,
    lifetime: std::marker::PhantomData<&'a mut T>,
}

// SAFETY: a panel is an exclusive borrow of its elements, like a &mut [T].
unsafe impl<T: Send> Send for Panel<'_, T> {}

impl<'a, T> Panel<'a, T> {
    /// A whole matrix.
    pub fn of(data: &'a mut [T], columns: usize) -> Self {
        let rows = data.len().checked_div(columns).unwrap_or(0);
        Self { start: data.as_mut_ptr(), rows, stride: columns, width: columns, lifetime: Default::default() }
    }

    /// Matrices of `rows` x `columns` lying one behind the other, each cut into panels of `width` columns, matrix by matrix.
    pub fn split(data: &'a mut [T], rows: usize, columns: usize, width: usize) -> Vec<Panel<'a, T>> {
        assert!(
            width > 0 && columns.is_multiple_of(width) && data.len().is_multiple_of((rows * columns).max(1)),
            "panels of {width} in {columns}"
        );
        let matrices = data.chunks_mut((rows * columns).max(1));
        matrices
            .flat_map(|matrix| {
                let start = matrix.as_mut_ptr();
                (0..columns / width).map(move |i| {
                    // SAFETY: i * width is a column of the first row.
                    let start = unsafe { start.add(i * width) };
                    Panel { start, rows, stride: columns, width, lifetime: Default::default() }
                })
            })
            .collect()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the panel owns `width` elements of each of its rows, and &mut self makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.stride), self.width) }
    }

    /// Start and distance between rows, for the matrix product.
    pub(super) fn raw(&mut self) -> (*mut T, usize) {
        (self.start, self.stride)
    }
}
