//! Floor 1: where numbers live and run.
//!
//! | module | what it is |
//! |---|---|
//! | [`memory`], [`simd`], [`gemm`], [`parallel`] | the CPU: its pool, its vector instructions, its matrix product, its threads |
//! | [`gpu`] | a GPU, real or emulated: memory that is kept, launches, products, recorded work |
//! | [`launch`] | kernels by name and their argument lists, one for both kinds of GPU |
//! | [`product`] | what a matrix product on a GPU is asked for |
//! | [`emulated`] | the kernels compiled by the C++ compiler, one fiber a CUDA thread |
//! | [`ranks`] | processes that train one model together: what they do in common, and how they find each other |
//! | [`real`] | CUDA: context, stream, fatbins, graphs, cuBLASLt, NCCL |
//! | [`disk`] | the room on a disk |
//! | [`libs`] | finding CUDA's libraries; what is missing is a sentence |
//!
//! All `unsafe` code of the numeric part is on this floor.

pub mod disk;
#[cfg(feature = "emulated")]
pub mod emulated;
pub mod gemm;
pub mod gpu;
pub mod launch;
pub mod libs;
pub mod memory;
pub mod parallel;
pub mod product;
pub mod ranks;
pub mod real;
pub mod simd;

use crate::error::{Error, Result};
use gpu::Gpu;
use std::fmt;

/// What the elements of a tensor are. f64 exists to check the others with: every op's CPU code is written once for f32 and f64.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
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

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F64 => "f64",
            Dtype::Bf16 => "bf16",
            Dtype::U32 => "u32",
            Dtype::U8 => "u8",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a device computes in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Precision {
    #[default]
    F32,
    /// f32, but products take their factors with the 11 significant bits that fast tensor cores read. Only where it is asked for.
    Tf32,
    /// Activations and weights of products in bf16; on the CPU, rounded by each product.
    Bf16,
}

impl Precision {
    /// Of activations.
    pub fn dtype(self) -> Dtype {
        match self {
            Precision::F32 | Precision::Tf32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Precision::F32),
            "tf32" => Ok(Precision::Tf32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err(Error::usage(format!("precision {name} is unknown; use f32, bf16 or tf32"))),
        }
    }
}

/// Where a tensor lives.
#[derive(Clone, Default, PartialEq, Debug)]
pub enum Device {
    #[default]
    Cpu,
    Gpu(Gpu),
}

impl Device {
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Device::Cpu => None,
            Device::Gpu(gpu) => Some(gpu),
        }
    }
}

impl Device {
    /// Makes products of f32 what the precision says; refuses one that the device does not have. On the CPU it holds for the whole program: there bf16 means
    /// that products round their factors, and what lies between products stays f32. The emulated GPU's products are the CPU's, and take factors as they are.
    pub fn compute_in(&self, precision: Precision) -> Result<()> {
        let real = self.gpu().and_then(Gpu::as_real);
        match (precision, real) {
            (Precision::Tf32, None) => Err(Error::usage(format!("device {self} has no tf32; use f32, or --device gpu"))),
            _ if !gemm::round_factors(precision == Precision::Bf16 && self.gpu().is_none()) => Err(Error::usage(
                "device cpu: this processor does not multiply bf16 numbers (AVX512-BF16); use --precision f32, or --device gpu or emulated",
            )),
            (_, Some(real)) => {
                real.allow_tf32(precision == Precision::Tf32);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Gpu(gpu) => f.write_str(gpu.name()),
        }
    }
}

/// A device as it is typed; [`Named::open`] makes it one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Named {
    #[default]
    Cpu,
    Emulated,
    /// The CUDA device of this number.
    Gpu(usize),
}

impl Named {
    pub fn open(self) -> Result<Device> {
        match self {
            Named::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "emulated")]
            Named::Emulated => Ok(Device::Gpu(Gpu::emulated()?)),
            #[cfg(not(feature = "emulated"))]
            Named::Emulated => Err(Error::new("device emulated: this binary was built without it; build with the feature \"emulated\"")),
            Named::Gpu(ordinal) => Ok(Device::Gpu(Gpu::cuda(ordinal)?)),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Named::Cpu => f.write_str("cpu"),
            Named::Emulated => f.write_str("emulated"),
            Named::Gpu(ordinal) => write!(f, "gpu:{ordinal}"),
        }
    }
}

impl std::str::FromStr for Named {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let unknown = || Error::usage(format!("device {name} is unknown; use cpu, emulated, gpu or gpu:1"));
        match name {
            "cpu" => Ok(Named::Cpu),
            "emulated" => Ok(Named::Emulated),
            "gpu" | "cuda" => Ok(Named::Gpu(0)),
            _ => name
                .strip_prefix("gpu:")
                .or_else(|| name.strip_prefix("cuda:"))
                .and_then(|number| number.parse().ok())
                .map(Named::Gpu)
                .ok_or_else(unknown),
        }
    }
}
