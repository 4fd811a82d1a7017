//! Tokens that stand in regions of a grid, of which only some may be there: convolution stages of which a transformer sees the kept patches alone.
//!
//! A grid of rows x columns regions is finer inside: a region has side x side tokens. Tokens come region by region; inside a region by cells of
//! cell x cell tokens, cells in raster order and so the tokens of a cell, so that the tokens of a cell lie beside each other and a strided
//! convolution over cells is a linear layer on what is there:
//!
//!   side 4, cell 2      0  1  4  5
//!                       2  3  6  7
//!                       8  9 12 13
//!                      10 11 14 15
//!
//!   tokens_of     number of each token on the fine grid (rows side) x (columns side): what patches of pixels are gathered by
//!   arrange_taps  a convolution's weight [O, C, side, side] as a linear layer's [O, side side C], taps in the order of the tokens
//!   region_conv   a k x k filter of each channel over the fine grid; see its file
//!
//! GPU: kernels/regions.cu and kernels/region_conv.cu.

mod conv;
mod cpu;
mod gpu;

use super::case::Case;
use crate::device::parallel;
use crate::device::simd::Real;
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, ensure};

pub use conv::{VERSIONS, conv_cases};

/// How the tokens of a region lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Tokens along a side of a region.
    pub side: usize,
    /// Tokens along a side of a cell; the side itself for raster order.
    pub cell: usize,
}

impl Layout {
    /// Row and column of token `p` inside its region.
    pub fn position(self, p: usize) -> [usize; 2] {
        let (across, each) = (self.side / self.cell, self.cell * self.cell);
        let (cell, inside) = (p / each, p % each);
        [cell / across * self.cell + inside / self.cell, cell % across * self.cell + inside % self.cell]
    }

    /// The inverse: which token stands there.
    pub fn token(self, [row, column]: [usize; 2]) -> usize {
        let (across, each) = (self.side / self.cell, self.cell * self.cell);
        (row / self.cell * across + column / self.cell) * each + row % self.cell * self.cell + column % self.cell
    }

    /// Tokens of a region.
    pub fn tokens(self) -> usize {
        self.side * self.side
    }

    fn check(self) -> Result<()> {
        let Self { side, cell } = self;
        ensure!(
            cell > 0 && side > 0 && side.is_multiple_of(cell),
            "regions of {side} x {side} tokens do not fall into cells of {cell} x {cell}"
        );
        Ok(())
    }
}

/// Which regions' tokens are there.
#[derive(Clone, Debug)]
pub enum Seen {
    /// All, in raster order.
    All,
    /// All, in raster order; those of the hidden ones, 1 in f32 [B, L], count as 0.
    Hiding(Tensor),
    /// Those of `kept`, u32 [B, K], in that order. `places`, u32 [B, L], says at which place of it a region stands: K or more where it does not.
    Only { kept: Tensor, places: Tensor },
}

#[derive(Clone, Debug)]
pub struct Regions {
    /// Regions down and across.
    pub grid: [usize; 2],
    pub layout: Layout,
    pub seen: Seen,
}

impl Regions {
    /// Regions of the grid.
    pub fn all(&self) -> usize {
        self.grid.iter().product()
    }

    /// Regions of an image whose tokens are there.
    pub fn present(&self) -> usize {
        match &self.seen {
            Seen::Only { kept, .. } => kept.last(),
            _ => self.all(),
        }
    }

    /// Refuses what does not describe `batch` images; indices that are on a GPU are looked at by its kernels alone.
    fn check(&self, op: &str, batch: usize) -> Result<()> {
        self.layout.check()?;
        let all = self.all();
        let counts = |tensor: &Tensor, columns: usize| tensor.shape() == [batch, columns];
        match &self.seen {
            Seen::All => {}
            Seen::Hiding(hidden) => {
                ensure!(
                    counts(hidden, all) && hidden.dtype() == Dtype::F32,
                    "{op}: hidden is {hidden:?} but f32 [{batch}, {all}] is needed"
                )
            }
            Seen::Only { kept, places } => {
                let fits = kept.shape().len() == 2 && counts(kept, kept.last()) && kept.dtype() == Dtype::U32 && kept.last() <= all;
                ensure!(fits, "{op}: kept is {kept:?} but u32 [{batch}, K] with K up to {all} is needed");
                ensure!(
                    counts(places, all) && places.dtype() == Dtype::U32,
                    "{op}: places are {places:?} but u32 [{batch}, {all}] is needed"
                );
                if kept.gpu().is_none() {
                    let within = kept.data::<u32>().iter().all(|&region| (region as usize) < all);
                    ensure!(within, "{op}: a kept region is not among the {all} of the grid");
                }
            }
        }
        Ok(())
    }

    /// The numbers of the tokens that are there on the fine grid, u32 [B, K side side] on this device.
    pub fn tokens_of(&self, batch: usize, device: &Device) -> Result<Tensor> {
        self.check("tokens_of", batch)?;
        let (layout, each, [_, columns]) = (self.layout, self.layout.tokens(), self.grid);
        let mut tokens = Tensor::empty_on(device, &[batch, self.present() * each], Dtype::U32)?;
        let kept = match &self.seen {
            Seen::Only { kept, .. } => Some(kept.on(device)?),
            _ => None,
        };
        if let Some(gpu) = device.gpu() {
            gpu::tokens_of(gpu, kept.as_ref(), self.grid, layout, &mut tokens)?;
            return Ok(tokens);
        }
        let (kept, present) = (kept.as_ref().map(|kept| kept.data::<u32>()), self.present());
        for (i, region) in tokens.data_mut::<u32>().chunks_exact_mut(each).enumerate() {
            let at = kept.map_or(i % present, |kept| kept[i] as usize);
            let corner = [at / columns * layout.side, at % columns * layout.side];
            for (p, token) in region.iter_mut().enumerate() {
                let [row, column] = layout.position(p);
                *token = ((corner[0] + row) * columns * layout.side + corner[1] + column) as u32;
            }
        }
        Ok(tokens)
    }
}

impl Var {
    /// A convolution's weight [O, C, side, side] as [O, side side C]: what a region's tokens are multiplied by, one beside the other. Its gradient is f32
    /// where it is bf16, as a weight's is.
    pub fn arrange_taps(&self, layout: Layout) -> Result<Var> {
        layout.check()?;
        let w = self.value();
        let &[out, channels, kh, kw] = w.shape() else {
            crate::bail!("arrange_taps: the weight is {w:?} but [O, C, side, side] is needed")
        };
        ensure!([kh, kw] == [layout.side; 2], "arrange_taps: the weight is {w:?} but a region has {} x {0} tokens", layout.side);
        let mut y = w.alike(&[out, layout.tokens() * channels], w.dtype())?;
        arrange(w, channels, layout, false, &mut y)?;
        Var::record_weight("arrange_taps", [self], y, move |dy, need| {
            let mut dw = need.out(0)?;
            arrange(&dy, channels, layout, true, &mut dw)?;
            Ok([Some(dw)])
        })
    }
}

/// [O, C, taps] in raster order to [O, taps, C] in token order, or back.
fn arrange(x: &Tensor, channels: usize, layout: Layout, back: bool, y: &mut Tensor) -> Result<()> {
    match x.gpu() {
        None => by_real!("arrange_taps", x.dtype(), arranged(x, channels, layout, back, y)),
        Some(gpu) => gpu::arrange(gpu, x, channels, layout, back, y)?,
    }
    Ok(())
}

fn arranged<T: Real + Element>(x: &Tensor, channels: usize, layout: Layout, back: bool, y: &mut Tensor) {
    let (taps, size) = (layout.tokens(), layout.tokens() * channels);
    let x = x.data::<T>();
    parallel::rows(y.data_mut::<T>(), size, |first, rows| {
        for (o, y) in rows.chunks_exact_mut(size).enumerate() {
            let x = &x[(first + o) * size..][..size];
            for p in 0..taps {
                let [row, column] = layout.position(p);
                let tap = row * layout.side + column;
                for c in 0..channels {
                    let (raster, arranged) = (c * taps + tap, p * channels + c);
                    let (to, from) = if back { (raster, arranged) } else { (arranged, raster) };
                    y[to] = x[from];
                }
            }
        }
    });
}

pub fn cases() -> Vec<Case> {
    let taps = |name: &str, w: [usize; 4], cell: usize| {
        let layout = Layout { side: w[3], cell };
        let run = move |x: &[Var]| x[0].arrange_taps(layout);
        Case::new(&format!("arrange_taps: {name}"), &[&w], run).weights(&[0])
    };
    let taps =
        [taps("4 x 4 in cells of 2", [5, 3, 4, 4], 2), taps("2 x 2", [8, 40, 2, 2], 2), taps("4 x 4 in raster order", [3, 5, 4, 4], 4)];
    taps.into_iter().chain(conv_cases()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_tokens_are_inverse_and_cells_lie_together() {
        for (side, cell) in [(4, 2), (2, 2), (4, 4), (6, 3), (1, 1), (4, 1)] {
            let layout = Layout { side, cell };
            let mut seen = vec![false; layout.tokens()];
            for p in 0..layout.tokens() {
                let [row, column] = layout.position(p);
                assert!(row < side && column < side);
                assert_eq!(layout.token([row, column]), p);
                assert!(!std::mem::replace(&mut seen[row * side + column], true));
                let first = layout.position(p / (cell * cell) * (cell * cell));
                assert_eq!([row / cell, column / cell], [first[0] / cell, first[1] / cell]);
            }
        }
        let four: Vec<usize> = (0..16).map(|at| Layout { side: 4, cell: 2 }.token([at / 4, at % 4])).collect();
        assert_eq!(four, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
    }

    #[test]
    fn tokens_are_numbered_on_the_fine_grid() {
        let kept = Tensor::from_slice(&[1, 2], &[5u32, 0]).unwrap();
        let places = Tensor::from_slice(&[1, 6], &[1u32, 2, 3, 4, 5, 0]).unwrap();
        let regions = Regions { grid: [2, 3], layout: Layout { side: 2, cell: 2 }, seen: Seen::Only { kept, places } };
        assert_eq!(regions.tokens_of(1, &Device::Cpu).unwrap().data::<u32>(), [16, 17, 22, 23, 0, 1, 6, 7]);
        let all = Regions { seen: Seen::All, ..regions };
        assert_eq!(all.tokens_of(2, &Device::Cpu).unwrap().data::<u32>()[24..28], [0, 1, 6, 7]);
    }

    #[test]
    fn regions_that_do_not_fit_are_errors() {
        let index = |shape: &[usize], values: &[u32]| Tensor::from_slice(shape, values).unwrap();
        let only = |kept, places| Regions { grid: [1, 2], layout: Layout { side: 2, cell: 2 }, seen: Seen::Only { kept, places } };
        let said = |regions: Regions| regions.tokens_of(1, &Device::Cpu).unwrap_err().to_string();
        assert!(said(only(index(&[1, 1], &[2]), index(&[1, 2], &[1, 0]))).contains("not among the 2"));
        assert!(said(only(index(&[2, 1], &[0, 0]), index(&[1, 2], &[1, 0]))).contains("kept is"));
        assert!(said(only(index(&[1, 1], &[0]), index(&[1, 1], &[0]))).contains("places are"));
        let uneven = Regions { grid: [1, 2], layout: Layout { side: 3, cell: 2 }, seen: Seen::All };
        assert!(said(uneven).contains("do not fall into cells"));
    }
}
