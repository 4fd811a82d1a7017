//! The launches of kernels/regions.cu and kernels/region_conv.cu.

use super::{Layout, Regions};
use crate::bail;
use crate::device::gpu::Gpu;
use crate::error::Result;
use crate::tape::Need;
use crate::tensor::Tensor;

pub fn tokens_of(gpu: &Gpu, _kept: Option<&Tensor>, _grid: [usize; 2], _layout: Layout, _tokens: &mut Tensor) -> Result<()> {
    bail!("tokens_of: {gpu:?} has no kernel yet")
}

pub fn arrange(gpu: &Gpu, _x: &Tensor, _channels: usize, _layout: Layout, _back: bool, _y: &mut Tensor) -> Result<()> {
    bail!("arrange_taps: {gpu:?} has no kernel yet")
}

pub fn filter(gpu: &Gpu, _x: &Tensor, _w: &Tensor, _bias: Option<&Tensor>, _regions: &Regions) -> Result<Tensor> {
    bail!("region_conv: {gpu:?} has no kernel yet")
}

pub fn filter_input(gpu: &Gpu, _dy: &Tensor, _w: &Tensor, _regions: &Regions, _dx: &mut Tensor) -> Result<()> {
    bail!("region_conv: {gpu:?} has no kernel yet")
}

/// dw and db.
pub fn filter_weight(gpu: &Gpu, _dy: &Tensor, _x: &Tensor, _k: usize, _regions: &Regions, _need: &mut Need) -> Result<[Option<Tensor>; 2]> {
    bail!("region_conv: {gpu:?} has no kernel yet")
}
