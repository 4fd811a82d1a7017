//! Floor 2: numbers with a shape. Contiguous, row-major, no strides; no gradients here.
//!
//! A tensor is a shared handle: a clone costs nothing, [`Tensor::data_mut`] needs to be the only one.

use crate::device::memory::{Buffer, Slab};
use crate::device::parallel;
use crate::device::simd::{Real, add};
use crate::error::Result;
use crate::{bail, ensure};
use bytemuck::Pod;
use half::bf16;
use std::fmt;
use std::sync::Arc;

/// What the elements are. f64 exists to check the others with: every op's CPU code is written once for f32 and f64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    F32,
    F64,
    Bf16,
    U32,
    U8,
}

impl Dtype {
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 | Dtype::U32 => 4,
            Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::F64 => "f64",
            Dtype::Bf16 => "bf16",
            Dtype::U32 => "u32",
            Dtype::U8 => "u8",
        })
    }
}

/// A type that tensors can hold.
pub trait Element: Pod + Send + Sync {
    const DTYPE: Dtype;
}
macro_rules! elements {
    ($($type:ty => $dtype:ident),*) => { $(impl Element for $type { const DTYPE: Dtype = Dtype::$dtype; })* };
}
elements!(f32 => F32, f64 => F64, bf16 => Bf16, u32 => U32, u8 => U8);

/// Sizes of the axes, slowest first; at most six of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    sizes: [usize; Shape::MOST],
    rank: usize,
}

impl Shape {
    pub const MOST: usize = 6;

    pub fn new(sizes: &[usize]) -> Result<Self> {
        ensure!(sizes.len() <= Self::MOST, "a tensor has at most {} axes, not {sizes:?}", Self::MOST);
        let bytes = sizes.iter().try_fold(8usize, |total, &size| total.checked_mul(size.max(1)));
        ensure!(bytes.is_some_and(|bytes| bytes < 1 << 47), "a tensor of shape {sizes:?} does not fit into memory");
        let mut all = [1; Self::MOST];
        all[..sizes.len()].copy_from_slice(sizes);
        Ok(Self { sizes: all, rank: sizes.len() })
    }

    pub fn numel(&self) -> usize {
        self.iter().product()
    }
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.sizes[..self.rank]
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self[..], f)
    }
}

#[derive(Clone)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    shape: Shape,
    dtype: Dtype,
}

impl Tensor {
    /// Memory from the pool with arbitrary content: for results that are about to be written.
    pub fn empty(shape: &[usize], dtype: Dtype) -> Result<Self> {
        let shape = Shape::new(shape)?;
        Ok(Self { buffer: Arc::new(Buffer::take(shape.numel() * dtype.size())), shape, dtype })
    }

    pub fn zeros(shape: &[usize], dtype: Dtype) -> Result<Self> {
        let mut tensor = Self::empty(shape, dtype)?;
        tensor.buffer_mut().fill(0);
        Ok(tensor)
    }

    pub fn from_slice<T: Element>(shape: &[usize], data: &[T]) -> Result<Self> {
        let mut tensor = Self::empty(shape, T::DTYPE)?;
        ensure!(tensor.numel() == data.len(), "a tensor of shape {shape:?} has {} elements, not {}", tensor.numel(), data.len());
        tensor.data_mut().copy_from_slice(data);
        Ok(tensor)
    }

    /// One number, shape [].
    pub fn scalar(value: f64, dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F64 => Self::from_slice(&[], &[value]),
            Dtype::F32 => Self::from_slice(&[], &[value as f32]),
            other => bail!("a scalar is f32 or f64, not {other}"),
        }
    }

    /// Zeroed tensors of one dtype that lie one behind the other in one allocation; see [`Tensor::with_flat`].
    pub fn slab<'a>(shapes: impl IntoIterator<Item = &'a [usize]>, dtype: Dtype) -> Result<Vec<Self>> {
        let shapes = shapes.into_iter().map(Shape::new).collect::<Result<Vec<_>>>()?;
        let lengths: Vec<usize> = shapes.iter().map(|shape| shape.numel() * dtype.size()).collect();
        let ranges = Slab::cut(&lengths);
        Ok(ranges.into_iter().zip(shapes).map(|(range, shape)| Self { buffer: Arc::new(range), shape, dtype }).collect())
    }

    /// Gives `f` all tensors of one slab as one slice, zeros in the gaps; None if one is missing, out of order or shared.
    pub fn with_flat<'a, T: Element, R>(tensors: impl IntoIterator<Item = &'a mut Tensor>, f: impl FnOnce(&mut [T]) -> R) -> Option<R> {
        let mut ranges: Vec<&mut Arc<Buffer>> = Vec::new();
        for tensor in tensors {
            if tensor.dtype != T::DTYPE {
                return None;
            }
            ranges.push(&mut tensor.buffer);
        }
        Slab::whole_mut(&mut ranges).map(|bytes| f(bytemuck::cast_slice_mut(bytes)))
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn numel(&self) -> usize {
        self.shape.numel()
    }

    /// Size of the last axis; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, before)| before.iter().product())
    }

    /// The elements. Asking for another type than the tensor's is a mistake of ours: ops check dtypes at their entry.
    pub fn data<T: Element>(&self) -> &[T] {
        assert!(self.dtype == T::DTYPE, "a tensor of {} read as {}", self.dtype, T::DTYPE);
        bytemuck::cast_slice(&self.buffer.bytes()[..self.numel() * self.dtype.size()])
    }

    /// The elements, to be written; the tensor must be the only handle on them.
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        assert!(self.dtype == T::DTYPE, "a tensor of {} written as {}", self.dtype, T::DTYPE);
        bytemuck::cast_slice_mut(self.buffer_mut())
    }

    fn buffer_mut(&mut self) -> &mut [u8] {
        let bytes = self.numel() * self.dtype.size();
        let buffer = Arc::get_mut(&mut self.buffer).expect("a tensor is written only by its one owner");
        &mut buffer.bytes_mut()[..bytes]
    }

    /// Whether this is the only handle on the numbers, so that they may be overwritten.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }

    /// This tensor if nobody else holds its numbers, otherwise a copy.
    pub fn into_unique(self) -> Result<Self> {
        if self.is_unique() { Ok(self) } else { self.copy() }
    }

    /// New memory with the same numbers.
    pub fn copy(&self) -> Result<Self> {
        let mut copy = Self::empty(&self.shape, self.dtype)?;
        let bytes = self.numel() * self.dtype.size();
        copy.buffer_mut().copy_from_slice(&self.buffer.bytes()[..bytes]);
        Ok(copy)
    }

    /// The same numbers under another shape; free.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let new = Shape::new(shape)?;
        ensure!(new.numel() == self.numel(), "reshape: {:?} has {} elements but {shape:?} has {}", self.shape, self.numel(), new.numel());
        Ok(Self { buffer: self.buffer.clone(), shape: new, dtype: self.dtype })
    }

    pub fn fill<T: Element>(&mut self, value: T) {
        self.data_mut().fill(value);
    }

    /// The same numbers as another type, rounded to nearest even; free if it is the type already.
    pub fn cast(&self, dtype: Dtype) -> Result<Self> {
        use Dtype::*;
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        let mut out = Self::empty(&self.shape, dtype)?;
        match (self.dtype, dtype) {
            (F32, F64) => convert(self.data(), out.data_mut(), |x: f32| x as f64),
            (F64, F32) => convert(self.data(), out.data_mut(), |x: f64| x as f32),
            (F32, Bf16) => convert(self.data(), out.data_mut(), bf16::from_f32),
            (Bf16, F32) => convert(self.data(), out.data_mut(), bf16::to_f32),
            (F64, Bf16) => convert(self.data(), out.data_mut(), bf16::from_f64),
            (Bf16, F64) => convert(self.data(), out.data_mut(), bf16::to_f64),
            (U8, F32) => convert(self.data(), out.data_mut(), |x: u8| x as f32),
            (from, to) => bail!("cast: {from} to {to} is not a conversion that loses nothing but digits"),
        }
        Ok(out)
    }

    /// All elements as f64, whatever they are; for reports and comparisons.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            Dtype::F32 => self.data::<f32>().iter().map(|&x| x as f64).collect(),
            Dtype::F64 => self.data::<f64>().to_vec(),
            Dtype::Bf16 => self.data::<bf16>().iter().map(|x| x.to_f64()).collect(),
            Dtype::U32 => self.data::<u32>().iter().map(|&x| x as f64).collect(),
            Dtype::U8 => self.data::<u8>().iter().map(|&x| x as f64).collect(),
        }
    }

    /// The one number of a tensor with one element.
    pub fn item(&self) -> f64 {
        assert_eq!(self.numel(), 1, "item of a tensor of shape {:?}", self.shape);
        self.to_f64()[0]
    }

    /// The numbers of `other` in the memory of self.
    pub fn replace(mut self, other: &Tensor) -> Result<Self> {
        ensure!(self.shape == other.shape && self.dtype == other.dtype, "replace: {self:?} by {other:?}");
        let bytes = other.numel() * other.dtype.size();
        self.buffer_mut().copy_from_slice(&other.buffer.bytes()[..bytes]);
        Ok(self)
    }

    /// self + other, in place where nobody else holds self.
    pub fn accumulate(self, other: &Tensor) -> Result<Self> {
        ensure!(
            self.shape == other.shape && self.dtype == other.dtype,
            "sum: {:?} of {} and {:?} of {} differ",
            self.shape,
            self.dtype,
            other.shape,
            other.dtype
        );
        let mut sum = self.into_unique()?;
        match sum.dtype {
            Dtype::F32 => add_into(sum.data_mut::<f32>(), other.data()),
            Dtype::F64 => add_into(sum.data_mut::<f64>(), other.data()),
            dtype => bail!("sum: gradients are f32 or f64, not {dtype}"),
        }
        Ok(sum)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.dtype, self.shape)
    }
}

fn convert<A: Element, B: Element>(from: &[A], to: &mut [B], f: impl Fn(A) -> B + Sync + Send) {
    parallel::rows(to, 1, |first, to| {
        let from = &from[first..first + to.len()];
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = f(from));
    });
}

fn add_into<T: Real + Element>(sum: &mut [T], other: &[T]) {
    parallel::rows(sum, 1, |first, sum| add(sum, &other[first..first + sum.len()]));
}

/// Calls a generic function with f32 or f64 as its type, by a tensor's dtype; anything else is an error naming the op.
#[macro_export]
macro_rules! by_real {
    ($op:expr, $dtype:expr, $($function:ident)::+ ($($arg:expr),* $(,)?)) => {
        match $dtype {
            $crate::tensor::Dtype::F32 => $($function)::+::<f32>($($arg),*),
            $crate::tensor::Dtype::F64 => $($function)::+::<f64>($($arg),*),
            other => return Err($crate::error::Error::new(format!("{}: the CPU computes in f32 or f64, not {other}", $op))),
        }
    };
}
