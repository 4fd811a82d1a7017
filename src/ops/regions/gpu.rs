//! The launches of kernels/regions.cu and kernels/region_conv.cu.

use super::conv::VERSIONS;
use super::{Layout, Regions, Seen};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::error::Result;
use crate::ops::sum_of_parts;
use crate::tape::Need;
use crate::tensor::{Dtype, Tensor};

pub fn tokens_of(gpu: &Gpu, kept: Option<&Tensor>, [down, across]: [usize; 2], layout: Layout, tokens: &mut Tensor) -> Result<()> {
    let (n, present) = (tokens.numel(), tokens.last() / layout.tokens());
    let args = Args::new().out(tokens).maybe(kept).int(n).int(present).int(down).int(across).int(layout.side).int(layout.cell);
    gpu.launch("tokens_of_u32", Launch::elements(n, 1), args.fault())
}

pub fn arrange(gpu: &Gpu, x: &Tensor, channels: usize, layout: Layout, back: bool, y: &mut Tensor) -> Result<()> {
    let (n, kernel) = (x.numel(), typed(&typed("arrange_taps", x.dtype()), y.dtype()));
    let args = Args::new().out(y).input(x).int(channels).int(layout.side).int(layout.cell).flag(back);
    gpu.launch(&kernel, Launch::elements(n, 1), args.long(n))
}

/// The side of the filter, the sides of regions and of their cells that v2 is written for; others run in v1.
const FILTER: usize = 5;
const SIDES: [usize; 2] = [2, 4];
const CELL: usize = 2;
/// Threads of v2's blocks.
const THREADS: usize = 64;
/// Regions of a block: at least so many, since its taps' way in or out costs as much as a few regions; at most, for a filter, so many.
const FEWEST: usize = 4;
const MOST: usize = 8;
/// Blocks that a device has room for, about.
const BLOCKS: usize = 1024;

/// How v2 cuts its work: `across` channels by `shares` regions.
struct Cut {
    across: usize,
    shares: usize,
    each: usize,
}

impl Cut {
    /// Where v2 takes these regions of channels. It leaves rows of bf16 that are no whole pairs to v1.
    fn of(gpu: &Gpu, x: &Tensor, k: usize, layout: Layout, most: usize) -> Option<Self> {
        let pair = 4 / x.dtype().size();
        let fits = k == FILTER && SIDES.contains(&layout.side) && layout.cell == CELL && x.last().is_multiple_of(pair);
        if !fits || gpu.version(&VERSIONS) != "v2" {
            return None;
        }
        let (across, regions) = (x.last().div_ceil(THREADS * pair), x.rows() / layout.tokens());
        let each = (regions * across).div_ceil(BLOCKS).clamp(FEWEST, most);
        Some(Self { across, shares: regions.div_ceil(each), each })
    }

    fn launch(&self) -> Launch {
        Launch::new(0, THREADS).grid(self.shares, self.across, 1)
    }
}

/// kept, places, hidden, and the sizes of the grid.
fn with_regions(args: Args, regions: &Regions) -> Args {
    let [down, across] = regions.grid;
    let (kept, places, hidden) = match &regions.seen {
        Seen::All => (None, None, None),
        Seen::Hiding(hidden) => (None, None, Some(hidden)),
        Seen::Only { kept, places } => (Some(kept), Some(places), None),
    };
    args.maybe(kept).maybe(places).maybe(hidden).int(down).int(across).int(regions.present())
}

/// The filter of x by `kernel`, whose arguments before the regions are `args`.
fn run(gpu: &Gpu, kernel: &str, x: &Tensor, k: usize, regions: &Regions, args: Args) -> Result<()> {
    let (layout, c) = (regions.layout, x.last());
    let args = with_regions(args, regions).int(c);
    if let Some(cut) = Cut::of(gpu, x, k, layout, MOST) {
        let kernel = format!("{}_side{}", typed(&format!("{kernel}_v2"), x.dtype()), layout.side);
        return gpu.launch(&kernel, cut.launch(), args.int(x.rows() / layout.tokens()).int(cut.each).fault());
    }
    let args = args.int(layout.side).int(layout.cell).int(k).long(x.numel());
    gpu.launch(&typed(&format!("{kernel}_v1"), x.dtype()), Launch::elements(x.numel(), 1), args.fault())
}

pub fn filter(gpu: &Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, regions: &Regions) -> Result<Tensor> {
    let mut y = x.alike(x.shape(), x.dtype())?;
    run(gpu, "region_conv_fwd", x, w.last(), regions, Args::new().out(&mut y).input(x).input(w).maybe(bias))?;
    Ok(y)
}

pub fn filter_input(gpu: &Gpu, dy: &Tensor, w: &Tensor, regions: &Regions, dx: &mut Tensor) -> Result<()> {
    run(gpu, "region_conv_bwd_x", dy, w.last(), regions, Args::new().out(dx).input(dy).input(w))
}

/// Regions that v1 sums in a row.
const PIECE: usize = 16;

/// dw and db.
pub fn filter_weight(gpu: &Gpu, dy: &Tensor, x: &Tensor, k: usize, regions: &Regions, need: &mut Need) -> Result<[Option<Tensor>; 2]> {
    if !need.wants(1) && !need.wants(2) {
        return Ok([None, None]);
    }
    let (layout, c, count) = (regions.layout, x.last(), x.rows() / regions.layout.tokens());
    let cut = Cut::of(gpu, x, k, layout, usize::MAX);
    let (shares, each) = cut.as_ref().map_or((count.div_ceil(PIECE), PIECE), |cut| (cut.shares, cut.each));
    let (mut dw, mut db) = (x.alike(&[shares, c * k * k], Dtype::F32)?, x.alike(&[shares, c], Dtype::F32)?);
    let args = with_regions(Args::new().out(&mut dw).out(&mut db).input(dy).input(x), regions).int(c);
    if let Some(cut) = cut {
        let kernel = format!("{}_side{}", typed("region_conv_bwd_w_v2", x.dtype()), layout.side);
        gpu.launch(&kernel, cut.launch(), args.int(count).int(each).fault())?;
    } else {
        let launch = Launch::new(0, 256).grid(shares, c.div_ceil(256), k * k);
        let args = args.int(layout.side).int(layout.cell).int(k).int(count).int(each);
        gpu.launch(&typed("region_conv_bwd_w_v1", x.dtype()), launch, args.fault())?;
    }
    Ok([need.give(1, |sum| sum_of_parts(gpu, &dw, sum))?, need.give(2, |sum| sum_of_parts(gpu, &db, sum))?])
}
