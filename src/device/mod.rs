//! Floor 1: where numbers live and run.
//!
//! There is one device today, the CPU: its memory pool ([`memory`]), its vector instructions ([`simd`]), its matrix product ([`gemm`]) and the
//! way work is shared out over threads ([`parallel`]). All `unsafe` code of the numeric part is on this floor.

pub mod gemm;
pub mod memory;
pub mod parallel;
pub mod simd;

use crate::error::{Error, Result};

/// Where a tensor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Device {
    #[default]
    Cpu,
}

impl std::str::FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Device::Cpu),
            "emulated" | "gpu" => {
                Err(Error::usage(format!("device {name}: this version of masque has no CUDA kernels yet; use --device cpu")))
            }
            _ => Err(Error::usage(format!("device {name} is unknown; use --device cpu"))),
        }
    }
}
