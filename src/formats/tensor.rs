//! One tensor as a file holds it: dtype, shape and little-endian bytes, contiguous and row-major.

use std::fmt;

use half::{bf16, f16};

use super::Bytes;
use crate::error::{Error, Result};
use crate::{bail, ensure};

#[cfg(target_endian = "big")]
compile_error!("files hold little-endian numbers, which this code takes to be the machine's own");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileDtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    U32,
    Bool,
}

impl FileDtype {
    pub const ALL: [Self; 11] =
        [Self::F64, Self::F32, Self::F16, Self::BF16, Self::I64, Self::I32, Self::I16, Self::I8, Self::U8, Self::U32, Self::Bool];

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The name that safetensors gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::U32 => "U32",
            Self::Bool => "BOOL",
        }
    }
}

impl fmt::Display for FileDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone)]
pub struct FileTensor {
    dtype: FileDtype,
    shape: Vec<usize>,
    data: Bytes,
}

impl fmt::Debug for FileTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.dtype, self.shape)
    }
}

impl FileTensor {
    /// `data` holds exactly the elements of `shape`.
    pub fn new(dtype: FileDtype, shape: Vec<usize>, data: Bytes) -> Result<Self> {
        let wanted = numel(&shape).and_then(|count| count.checked_mul(dtype.size()));
        ensure!(wanted == Some(data.len()), "a {dtype} tensor of shape {shape:?} cannot be made of {} bytes", data.len());
        Ok(Self { dtype, shape, data })
    }

    pub fn from_bytes(dtype: FileDtype, shape: &[usize], data: Vec<u8>) -> Result<Self> {
        Self::new(dtype, shape.to_vec(), data.into())
    }

    pub fn from_f32(values: &[f32], shape: &[usize]) -> Result<Self> {
        Self::from_bytes(FileDtype::F32, shape, bytemuck::cast_slice(values).to_vec())
    }

    pub fn from_f64(values: &[f64], shape: &[usize]) -> Result<Self> {
        Self::from_bytes(FileDtype::F64, shape, bytemuck::cast_slice(values).to_vec())
    }

    pub fn from_i64(values: &[i64], shape: &[usize]) -> Result<Self> {
        Self::from_bytes(FileDtype::I64, shape, bytemuck::cast_slice(values).to_vec())
    }

    pub fn from_u8(values: &[u8], shape: &[usize]) -> Result<Self> {
        Self::from_bytes(FileDtype::U8, shape, values.to_vec())
    }

    pub fn dtype(&self) -> FileDtype {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn numel(&self) -> usize {
        self.data.len() / self.dtype.size()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// The elements, from any float or integer dtype; f64 and large integers are rounded to nearest.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        if self.dtype == FileDtype::F32 {
            return Ok(self.each(f32::from_le_bytes, |x| x));
        }
        self.numbers(|x| x as f32, |i| i as f32)
    }

    /// The elements, from any float or integer dtype.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        self.numbers(|x| x, |i| i as f64)
    }

    /// The elements, from integers, bools, and floats that are whole numbers.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        if self.dtype == FileDtype::Bool {
            return Ok(self.data.iter().map(|&byte| i64::from(byte != 0)).collect());
        }
        let whole = |x: f64| (x.trunc() == x && x >= -(2f64.powi(63)) && x < 2f64.powi(63)).then_some(x as i64).ok_or(x);
        let values: std::result::Result<Vec<i64>, f64> = self.numbers(whole, Ok)?.into_iter().collect();
        values.map_err(|x| Error::new(format!("a {} tensor of shape {:?} holds {x}, which is no 64-bit integer", self.dtype, self.shape)))
    }

    fn numbers<T>(&self, from_float: impl Fn(f64) -> T, from_int: impl Fn(i64) -> T) -> Result<Vec<T>> {
        Ok(match self.dtype {
            FileDtype::F64 => self.each(f64::from_le_bytes, from_float),
            FileDtype::F32 => self.each(f32::from_le_bytes, |x| from_float(x.into())),
            FileDtype::F16 => self.each(f16::from_le_bytes, |x| from_float(x.into())),
            FileDtype::BF16 => self.each(bf16::from_le_bytes, |x| from_float(x.into())),
            FileDtype::I64 => self.each(i64::from_le_bytes, from_int),
            FileDtype::I32 => self.each(i32::from_le_bytes, |i| from_int(i.into())),
            FileDtype::I16 => self.each(i16::from_le_bytes, |i| from_int(i.into())),
            FileDtype::I8 => self.each(i8::from_le_bytes, |i| from_int(i.into())),
            FileDtype::U8 => self.each(u8::from_le_bytes, |i| from_int(i.into())),
            FileDtype::U32 => self.each(u32::from_le_bytes, |i| from_int(i.into())),
            FileDtype::Bool => bail!("a BOOL tensor of shape {:?} holds no numbers", self.shape),
        })
    }

    fn each<const N: usize, A, T>(&self, decode: impl Fn([u8; N]) -> A, convert: impl Fn(A) -> T) -> Vec<T> {
        self.data.as_chunks::<N>().0.iter().map(|element| convert(decode(*element))).collect()
    }
}

/// The element count of a shape, or None where it overflows.
pub(super) fn numel(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}
