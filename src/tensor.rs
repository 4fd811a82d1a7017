//! Floor 2: numbers with a shape. Contiguous, row-major, no strides; no gradients here.
//!
//! A tensor is a shared handle: a clone costs nothing, [`Tensor::data_mut`] needs to be the only one. It lives on one device; [`Tensor::on`] makes its
//! twin on another. Only on the CPU are its numbers there to be read: what is wanted of a GPU's is brought over first.

use crate::device::gpu::{Block, Draw, Gpu};
use crate::device::launch::{Args, Launch, Operand, typed};
use crate::device::memory::{Buffer, Slab};
use crate::device::parallel;
use crate::device::simd::{Real, add};
pub use crate::device::{Device, Dtype};
use crate::error::Result;
use crate::rng::Rng;
use crate::{bail, ensure};
use bytemuck::Pod;
use half::bf16;
use std::fmt;
use std::sync::Arc;

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
enum Storage {
    Cpu(Arc<Buffer>),
    Gpu(Arc<Block>),
}

#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    shape: Shape,
    dtype: Dtype,
}

/// Numbers that lie one behind the other on a GPU, zeros in the gaps between tensors: a whole slab.
pub struct Flat {
    address: u64,
    /// How many numbers.
    pub len: usize,
}

impl Flat {
    /// From the start of one tensor to the end of another, which lies behind it in the same slab of a GPU, or is it.
    pub fn between(first: &Tensor, last: &Tensor) -> Option<Self> {
        let (Storage::Gpu(from), Storage::Gpu(to)) = (&first.storage, &last.storage) else { return None };
        let bytes = Gpu::distance(from, to)? + last.numel() * last.dtype.size();
        Some(Self { address: from.address(), len: bytes / first.dtype.size() })
    }
}

impl Operand for Flat {
    fn address(&self) -> u64 {
        self.address
    }

    fn address_mut(&mut self) -> u64 {
        self.address
    }
}

impl Operand for Tensor {
    fn address(&self) -> u64 {
        match &self.storage {
            Storage::Gpu(block) => block.address(),
            Storage::Cpu(_) => panic!("a kernel is given {self:?}, which is not on its device"),
        }
    }

    fn address_mut(&mut self) -> u64 {
        assert!(self.is_unique(), "a tensor is written only by its one owner");
        self.address()
    }
}

impl Tensor {
    /// Memory from the pool with arbitrary content: for results that are about to be written.
    pub fn empty(shape: &[usize], dtype: Dtype) -> Result<Self> {
        Self::empty_on(&Device::Cpu, shape, dtype)
    }

    pub fn empty_on(device: &Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        let shape = Shape::new(shape)?;
        let bytes = shape.numel() * dtype.size();
        let storage = match device {
            Device::Cpu => Storage::Cpu(Arc::new(Buffer::take(bytes))),
            Device::Gpu(gpu) => Storage::Gpu(Arc::new(gpu.take(bytes)?)),
        };
        Ok(Self { storage, shape, dtype })
    }

    /// The same on this tensor's device.
    pub fn alike(&self, shape: &[usize], dtype: Dtype) -> Result<Self> {
        match &self.storage {
            Storage::Cpu(_) => Self::empty(shape, dtype),
            Storage::Gpu(block) => Self::empty_on(&Device::Gpu(block.gpu().clone()), shape, dtype),
        }
    }

    pub fn zeros(shape: &[usize], dtype: Dtype) -> Result<Self> {
        Self::zeros_on(&Device::Cpu, shape, dtype)
    }

    pub fn zeros_on(device: &Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        let mut tensor = Self::empty_on(device, shape, dtype)?;
        tensor.clear()?;
        Ok(tensor)
    }

    /// The same number everywhere.
    pub fn full_on(device: &Device, shape: &[usize], dtype: Dtype, value: f64) -> Result<Self> {
        let mut tensor = Self::empty_on(device, shape, dtype)?;
        let n = tensor.numel();
        match (device.gpu(), dtype) {
            (None, Dtype::F32) => tensor.fill(value as f32),
            (None, Dtype::F64) => tensor.fill(value),
            (None, Dtype::Bf16) => tensor.fill(bf16::from_f64(value)),
            (Some(gpu), Dtype::F32) => {
                let args = Args::new().out(&mut tensor).bits((value as f32).to_bits()).long(n);
                gpu.launch("fill_32", Launch::elements(n, 8), args)?;
            }
            (Some(gpu), Dtype::Bf16) => {
                let args = Args::new().out(&mut tensor).bits(bf16::from_f64(value).to_bits() as u32).long(n);
                gpu.launch("fill_16", Launch::elements(n, 8), args)?;
            }
            (_, other) => bail!("fill: {device} cannot fill {other}"),
        }
        Ok(tensor)
    }

    /// Numbers uniform in [0, 1) by their name, f32, for each image of a batch ([`Rng::rows`]); recorded work draws them afresh at each replay.
    pub fn drawn(device: &Device, rng: &Rng, name: &str, shape: &[usize]) -> Result<Self> {
        let rows = shape.first().copied().unwrap_or(1);
        Self::drawn_as(device, rng, name, shape, Some(rows))
    }

    /// The same for a whole batch at once: every share of it gets the same numbers.
    pub fn drawn_once(device: &Device, rng: &Rng, name: &str, shape: &[usize]) -> Result<Self> {
        Self::drawn_as(device, rng, name, shape, None)
    }

    fn drawn_as(device: &Device, rng: &Rng, name: &str, shape: &[usize], rows: Option<usize>) -> Result<Self> {
        let size = Shape::new(shape)?;
        let draw = Draw { name: rng.full(name), count: size.numel(), rows };
        match device {
            Device::Cpu => Self::from_slice(shape, &draw.numbers(rng)?),
            Device::Gpu(gpu) => Ok(Self { storage: Storage::Gpu(gpu.drawn(rng, draw)?), shape: size, dtype: Dtype::F32 }),
        }
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

    /// Zeroed tensors of one dtype that lie one behind the other in one allocation; see [`Tensor::with_flat`] and [`Tensor::flat`].
    pub fn slab<'a>(device: &Device, shapes: impl IntoIterator<Item = &'a [usize]>, dtype: Dtype) -> Result<Vec<Self>> {
        let shapes = shapes.into_iter().map(Shape::new).collect::<Result<Vec<_>>>()?;
        let lengths: Vec<usize> = shapes.iter().map(|shape| shape.numel() * dtype.size()).collect();
        let ranges: Vec<Storage> = match device {
            Device::Cpu => Slab::cut(&lengths).into_iter().map(|range| Storage::Cpu(Arc::new(range))).collect(),
            Device::Gpu(gpu) => gpu.slab(&lengths)?.into_iter().map(|range| Storage::Gpu(Arc::new(range))).collect(),
        };
        Ok(ranges.into_iter().zip(shapes).map(|(storage, shape)| Self { storage, shape, dtype }).collect())
    }

    /// Gives `f` all tensors of one slab of the CPU as one slice, zeros in the gaps; None if one is missing, out of order or shared.
    pub fn with_flat<'a, T: Element, R>(tensors: impl IntoIterator<Item = &'a mut Tensor>, f: impl FnOnce(&mut [T]) -> R) -> Option<R> {
        let mut ranges: Vec<&mut Arc<Buffer>> = Vec::new();
        for tensor in tensors {
            match &mut tensor.storage {
                Storage::Cpu(buffer) if tensor.dtype == T::DTYPE => ranges.push(buffer),
                _ => return None,
            }
        }
        Slab::whole_mut(&mut ranges).map(|bytes| f(bytemuck::cast_slice_mut(bytes)))
    }

    /// All tensors of one slab of a GPU, for a kernel; None if one is missing, out of order or shared.
    pub fn flat<'a>(tensors: impl IntoIterator<Item = &'a mut Tensor>) -> Option<Flat> {
        let mut ranges: Vec<&mut Arc<Block>> = Vec::new();
        let mut size = 1;
        for tensor in tensors {
            size = tensor.dtype.size();
            match &mut tensor.storage {
                Storage::Gpu(block) => ranges.push(block),
                Storage::Cpu(_) => return None,
            }
        }
        Gpu::whole(ranges).map(|(address, bytes)| Flat { address, len: bytes / size })
    }

    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::Cpu(_) => Device::Cpu,
            Storage::Gpu(block) => Device::Gpu(block.gpu().clone()),
        }
    }

    /// The GPU that it is on, if it is on one: what an op looks at to choose its code.
    pub fn gpu(&self) -> Option<&Gpu> {
        match &self.storage {
            Storage::Cpu(_) => None,
            Storage::Gpu(block) => Some(block.gpu()),
        }
    }

    /// The same numbers on this device; free if that is where they are.
    pub fn on(&self, device: &Device) -> Result<Self> {
        if self.gpu() == device.gpu() {
            return Ok(self.clone());
        }
        if let Storage::Gpu(block) = &self.storage {
            let mut here = Self::empty(&self.shape, self.dtype)?;
            block.gpu().download(block, here.bytes_mut())?;
            return here.on(device);
        }
        let mut there = Self::empty_on(device, &self.shape, self.dtype)?;
        there.upload(self)?;
        Ok(there)
    }

    /// Writes the numbers of a tensor of the CPU into the memory of this one, which must be the only handle on it where it is on the CPU itself.
    pub fn upload(&mut self, from: &Tensor) -> Result<()> {
        ensure!(self.shape == from.shape && self.dtype == from.dtype, "upload: {self:?} from {from:?}");
        let bytes = from.bytes();
        match &self.storage {
            Storage::Cpu(_) => self.bytes_mut().copy_from_slice(bytes),
            Storage::Gpu(block) => block.gpu().upload(block, 0, bytes)?,
        }
        Ok(())
    }

    /// Zeros everywhere.
    pub fn clear(&mut self) -> Result<()> {
        match &mut self.storage {
            Storage::Cpu(_) => self.bytes_mut().fill(0),
            Storage::Gpu(block) => {
                let block = Arc::get_mut(block).expect("a tensor is written only by its one owner");
                let gpu = block.gpu().clone();
                gpu.set(block, 0)?;
            }
        }
        Ok(())
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

    /// The elements. Asking for another type than the tensor's, or for those of a GPU, is a mistake of ours: ops check at their entry.
    pub fn data<T: Element>(&self) -> &[T] {
        assert!(self.dtype == T::DTYPE, "a tensor of {} read as {}", self.dtype, T::DTYPE);
        bytemuck::cast_slice(self.bytes())
    }

    /// The elements, to be written; the tensor must be the only handle on them.
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        assert!(self.dtype == T::DTYPE, "a tensor of {} written as {}", self.dtype, T::DTYPE);
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// The elements as they lie in memory, whatever they are.
    pub fn bytes(&self) -> &[u8] {
        match &self.storage {
            Storage::Cpu(buffer) => &buffer.bytes()[..self.numel() * self.dtype.size()],
            Storage::Gpu(_) => panic!("the numbers of {self:?} are read where they are not"),
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.numel() * self.dtype.size();
        match &mut self.storage {
            Storage::Cpu(buffer) => {
                let buffer = Arc::get_mut(buffer).expect("a tensor is written only by its one owner");
                &mut buffer.bytes_mut()[..bytes]
            }
            Storage::Gpu(_) => panic!("the numbers of a tensor of a GPU are written where they are not"),
        }
    }

    /// Whether this is the only handle on the numbers, so that they may be overwritten.
    pub fn is_unique(&self) -> bool {
        match &self.storage {
            Storage::Cpu(buffer) => Arc::strong_count(buffer) == 1,
            Storage::Gpu(block) => Arc::strong_count(block) == 1,
        }
    }

    /// This tensor if nobody else holds its numbers, otherwise a copy.
    pub fn into_unique(self) -> Result<Self> {
        if self.is_unique() { Ok(self) } else { self.copy() }
    }

    /// New memory with the same numbers.
    pub fn copy(&self) -> Result<Self> {
        let mut copy = self.alike(&self.shape, self.dtype)?;
        copy.copy_from(self)?;
        Ok(copy)
    }

    /// Takes over the numbers of a tensor of the same device, shape and dtype; nobody else may hold those of this one.
    pub fn copy_from(&mut self, other: &Tensor) -> Result<()> {
        ensure!(self.shape == other.shape && self.dtype == other.dtype, "replace: {self:?} by {other:?}");
        ensure!(self.gpu() == other.gpu(), "replace: {self:?} and {other:?} are on different devices");
        ensure!(self.is_unique(), "replace: {self:?} is still in use");
        let bytes = other.numel() * other.dtype.size();
        match (&mut self.storage, &other.storage) {
            (Storage::Gpu(to), Storage::Gpu(from)) => {
                let to = Arc::get_mut(to).expect("a tensor is written only by its one owner");
                from.gpu().copy(to, from, bytes)?;
            }
            _ => self.bytes_mut().copy_from_slice(other.bytes()),
        }
        Ok(())
    }

    /// The same numbers under another shape; free.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let new = Shape::new(shape)?;
        ensure!(new.numel() == self.numel(), "reshape: {:?} has {} elements but {shape:?} has {}", self.shape, self.numel(), new.numel());
        Ok(Self { storage: self.storage.clone(), shape: new, dtype: self.dtype })
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
        let mut out = self.alike(&self.shape, dtype)?;
        if let Some(gpu) = self.gpu() {
            let known = matches!((self.dtype, dtype), (F32, Bf16) | (Bf16, F32) | (U8, F32) | (U8, Bf16));
            ensure!(known, "cast: a GPU has no conversion from {} to {dtype}", self.dtype);
            let n = self.numel();
            let kernel = typed(&typed("cast", self.dtype), dtype);
            gpu.launch(&kernel, Launch::elements(n, 8), Args::new().out(&mut out).input(self).long(n))?;
            return Ok(out);
        }
        match (self.dtype, dtype) {
            (F32, F64) => convert(self.data(), out.data_mut(), |x: f32| x as f64),
            (F64, F32) => convert(self.data(), out.data_mut(), |x: f64| x as f32),
            (F32, Bf16) => convert(self.data(), out.data_mut(), bf16::from_f32),
            (Bf16, F32) => convert(self.data(), out.data_mut(), bf16::to_f32),
            (F64, Bf16) => convert(self.data(), out.data_mut(), bf16::from_f64),
            (Bf16, F64) => convert(self.data(), out.data_mut(), bf16::to_f64),
            (U8, F32) => convert(self.data(), out.data_mut(), |x: u8| x as f32),
            (U8, F64) => convert(self.data(), out.data_mut(), |x: u8| x as f64),
            (from, to) => bail!("cast: {from} to {to} is not a conversion that loses nothing but digits"),
        }
        Ok(out)
    }

    /// The numbers of `from`, f32 on a GPU, rounded to bf16 into the memory of this tensor.
    pub fn round_from(&mut self, from: &Tensor) -> Result<()> {
        ensure!(self.shape == from.shape && self.dtype == Dtype::Bf16 && from.dtype == Dtype::F32, "round: {self:?} from {from:?}");
        let Some(gpu) = from.gpu() else { bail!("round: {from:?} is on the CPU") };
        let n = from.numel();
        gpu.launch("cast_f32_bf16", Launch::elements(n, 8), Args::new().out(self).input(from).long(n))
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

    /// The same from whatever device it is on, waiting for it.
    pub fn read(&self) -> Result<Vec<f64>> {
        Ok(self.on(&Device::Cpu)?.to_f64())
    }

    /// The one number of a tensor with one element.
    pub fn item(&self) -> f64 {
        assert_eq!(self.numel(), 1, "item of a tensor of shape {:?}", self.shape);
        self.to_f64()[0]
    }

    /// The numbers of `other` in the memory of self.
    pub fn replace(mut self, other: &Tensor) -> Result<Self> {
        self.copy_from(other)?;
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
        ensure!(self.gpu() == other.gpu(), "sum: {self:?} and {other:?} are on different devices");
        let mut sum = self.into_unique()?;
        if let Some(gpu) = other.gpu() {
            let (n, kernel) = (sum.numel(), typed("accumulate", sum.dtype));
            gpu.launch(&kernel, Launch::elements(n, 8), Args::new().out(&mut sum).input(other).long(n))?;
            return Ok(sum);
        }
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
        write!(f, "{} {:?}", self.dtype, self.shape)?;
        self.gpu().map_or(Ok(()), |gpu| write!(f, " on {}", gpu.name()))
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
