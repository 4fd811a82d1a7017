//! What a matrix product on a GPU is asked for: c = a b or c += a b, some of them one behind the other, a bias added to each row of c.
//!
//! A factor [rows, columns] lies row by row, `stride` elements apart, or turned: then it is the transpose of what lies there. Sums are taken in f32
//! whatever the factors are. A real GPU gives the work to cuBLASLt, the emulated one to the CPU's product.

use super::Dtype;
use super::launch::Operand;
use crate::trace::Shapes;

/// A matrix that is read, or a row of `batch` of them, `step` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    pub(super) address: u64,
    pub(super) dtype: Dtype,
    pub(super) stride: usize,
    pub(super) step: usize,
    pub(super) turned: bool,
}

impl Factor {
    pub fn rows(x: &impl Operand, dtype: Dtype, stride: usize) -> Self {
        Self { address: x.address(), dtype, stride, step: 0, turned: false }
    }

    pub fn turned(self) -> Self {
        Self { turned: !self.turned, ..self }
    }

    /// The same, `offset` elements further on.
    pub fn from(self, offset: usize) -> Self {
        Self { address: self.address + (offset * self.dtype.size()) as u64, ..self }
    }

    pub fn step(self, elements: usize) -> Self {
        Self { step: elements, ..self }
    }
}

/// The matrix that is written: never turned.
#[derive(Clone, Copy, Debug)]
pub struct Target(pub(super) Factor);

impl Target {
    pub fn rows(x: &mut impl Operand, dtype: Dtype, stride: usize) -> Self {
        Self(Factor { address: x.address_mut(), dtype, stride, step: 0, turned: false })
    }

    pub fn from(self, offset: usize) -> Self {
        Self(self.0.from(offset))
    }

    pub fn step(self, elements: usize) -> Self {
        Self(self.0.step(elements))
    }
}

/// c [m, n] = a [m, k] b [k, n].
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) batch: usize,
    pub(super) a: Factor,
    pub(super) b: Factor,
    pub(super) c: Factor,
    /// One number a column of c, of the factors' type.
    pub(super) bias: Option<u64>,
    pub(super) add: bool,
}

impl Product {
    pub fn new([m, n, k]: [usize; 3], a: Factor, b: Factor, c: Target) -> Self {
        Self { m, n, k, batch: 1, a, b, c: c.0, bias: None, add: false }
    }

    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    pub fn bias(self, bias: Option<&impl Operand>) -> Self {
        Self { bias: bias.map(Operand::address), ..self }
    }

    /// c += a b.
    pub fn add(self) -> Self {
        Self { add: true, ..self }
    }

    /// Name, sizes as text, and the shapes of the factors and of the result.
    pub(super) fn what(&self) -> (String, String, [Shapes; 2]) {
        let Self { m, n, k, batch, a, b, c, .. } = *self;
        let turned = |x: &Factor| if x.turned { " turned" } else { "" };
        let bias = if self.bias.is_some() { ", bias" } else { "" };
        let times = if batch > 1 { format!("{batch} x ") } else { String::new() };
        let detail = format!(
            "{times}{}{} [{m}, {k}], {}{} [{k}, {n}] {} {} [{m}, {n}]{bias}",
            a.dtype,
            turned(&a),
            b.dtype,
            turned(&b),
            if self.add { "+>" } else { "->" },
            c.dtype
        );
        (format!("product_{}", a.dtype), detail, [vec![vec![batch, m, k], vec![batch, k, n]], vec![vec![batch, m, n]]])
    }
}
