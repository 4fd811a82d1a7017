//! Matrix product on the CPU: c = a b, or c += a b, on strided views.

use super::parallel::{self, Panel};
use super::simd::Real;
use std::any::TypeId;

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

/// Whether the product replaces what c holds or is added to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    Replace,
    Add,
}

/// c = or += a[m, k] b[k, n] for a panel c of m rows and n columns, on this thread alone.
pub fn serial<T: Real>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, into: Into) {
    product(c, k, a, b, into, gemm::Parallelism::None);
}

/// The same on all threads. Each element's sum is taken by one thread, in an order that the shape alone decides.
pub fn parallel<T: Real>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, into: Into) {
    product(c, k, a, b, into, gemm::Parallelism::Rayon(parallel::threads()));
}

fn product<T: Real>(c: &mut Panel<T>, k: usize, a: View<T>, b: View<T>, into: Into, threads: gemm::Parallelism) {
    let (m, n) = (c.rows(), c.width());
    assert!(a.holds(m, k) && b.holds(k, n), "a product of {m} x {k} and {k} x {n} reaches beyond its slices");
    assert!(TypeId::of::<T>() == TypeId::of::<f32>() || TypeId::of::<T>() == TypeId::of::<f64>());
    let (start, stride) = c.raw();
    let (ar, ac, br, bc) = (a.row as isize, a.column as isize, b.row as isize, b.column as isize);
    let (a, b, add) = (a.data.as_ptr(), b.data.as_ptr(), into == Into::Add);
    // SAFETY: both views lie inside their slices and the panel is exclusively borrowed; T is one of the types that the product exists for.
    unsafe { gemm::gemm(m, n, k, start, 1, stride as isize, add, a, ac, ar, b, bc, br, T::ONE, T::ONE, false, false, false, threads) }
}
