//! A k x k filter of each channel over tokens that stand in regions of a grid; see the module above.
//!
//!   y[b, t, c] = bias[c] + sum_{u, v} w[c, 0, u, v] x[b, t + (u - k/2, v - k/2), c]        neighbours on the fine grid
//!   dx = the same of dy with w turned round,   dw[c, 0, u, v] = sum_{b, t} dy[b, t, c] x[b, t + (u - k/2, v - k/2), c],   db = sum_{b, t} dy
//!
//! x, y [B, K side side, C] in the order of the regions that are there. A neighbour outside the grid, of a region that is not there or of a hidden one is 0;
//! where regions are hidden, dx is 0 at their tokens. w [C, 1, k, k] with odd k, bias [C]; both f32 beside bf16. Saved: x, w.

use super::{Layout, Regions, Seen, cpu, gpu};
use crate::device::launch::Versions;
use crate::error::Result;
use crate::ops::beside;
use crate::ops::case::Case;
use crate::ops::conv::check_bias;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::{by_real, ensure};

pub const VERSIONS: Versions = Versions { op: "region_conv", all: &["v1", "v2"], chosen: "v2" };

impl Var {
    pub fn region_conv(&self, w: &Var, bias: Option<&Var>, regions: &Regions) -> Result<Var> {
        let (x, weight, regions) = (self.value().clone(), w.value().clone(), regions.clone());
        let &[batch, tokens, c] = x.shape() else { crate::bail!("region_conv: x is {x:?} but [B, N, C] is needed") };
        let fits = matches!(*weight.shape(), [channels, 1, k, l] if channels == c && k == l && k % 2 == 1);
        ensure!(
            fits && weight.dtype() == beside(x.dtype()) && x.numel() > 0,
            "region_conv: the weight is {weight:?} but x is {x:?}; it needs [C, 1, k, k] with odd k"
        );
        check_bias("region_conv", bias, c, beside(x.dtype()))?;
        regions.check("region_conv", batch)?;
        let each = regions.layout.tokens();
        ensure!(tokens == regions.present() * each, "region_conv: x is {x:?} but {} regions of {each} tokens are there", regions.present());
        if let Some(on) = x.gpu().cloned() {
            let y = gpu::filter(&on, &x, &weight, bias.map(Var::value), &regions)?;
            let none = Var::constant(y.clone());
            return Var::record("region_conv", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
                let dx = need.give(0, |dx| gpu::filter_input(&on, &dy, &weight, &regions, dx))?;
                let [dw, db] = gpu::filter_weight(&on, &dy, &x, weight.last(), &regions, need)?;
                Ok([dx, dw, db])
            });
        }
        let y = by_real!("region_conv", x.dtype(), cpu::filter(&x, &weight, bias.map(Var::value), &regions))?;
        let none = Var::constant(y.clone());
        Var::record("region_conv", [self, w, bias.unwrap_or(&none)], y, move |dy, need| {
            let dx = need.give(0, |dx| by_real!("region_conv", x.dtype(), cpu::filter_input(&dy, &weight, &regions, dx)))?;
            let [dw, db] = by_real!("region_conv", x.dtype(), cpu::filter_weight(&dy, &x, weight.last(), &regions, need))?;
            Ok([dx, dw, db])
        })
    }
}

/// Two images of 2 x 3 regions of which 3 are kept, so that neighbours are missing on every side.
pub fn some_regions(layout: Layout) -> Regions {
    let kept = Tensor::from_slice(&[2, 3], &[4u32, 0, 5, 2, 1, 3]).expect("six numbers");
    let places = Tensor::from_slice(&[2, 6], &[1u32, 3, 4, 5, 0, 2, 5, 1, 0, 2, 4, 3]).expect("twelve numbers");
    Regions { grid: [2, 3], layout, seen: Seen::Only { kept, places } }
}

pub fn conv_cases() -> Vec<Case> {
    let conv = |name: &str, regions: Regions, c: usize, k: usize| {
        let x = [2, regions.present() * regions.layout.tokens(), c];
        let run = move |v: &[Var]| {
            let device = v[0].value().device();
            let seen = match &regions.seen {
                Seen::All => Seen::All,
                Seen::Hiding(hidden) => Seen::Hiding(hidden.on(&device)?),
                Seen::Only { kept, places } => Seen::Only { kept: kept.on(&device)?, places: places.on(&device)? },
            };
            v[0].region_conv(&v[1], v.get(2), &Regions { seen, ..regions.clone() })
        };
        Case::new(&format!("region_conv: {name}"), &[&x, &[c, 1, k, k], &[c]], run).vectors(&[1, 2])
    };
    let (four, two) = (Layout { side: 4, cell: 2 }, Layout { side: 2, cell: 2 });
    let all = |grid, layout| Regions { grid, layout, seen: Seen::All };
    let hidden = Tensor::from_slice(&[2, 6], &[0.0f32, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).expect("twelve numbers");
    vec![
        conv("3 of 6 regions of 4 x 4, 5 x 5", some_regions(four), 40, 5),
        conv("3 of 6 regions of 2 x 2, 5 x 5", some_regions(two), 7, 5),
        conv("3 of 6 regions of 2 x 2, 20 channels", some_regions(two), 20, 5),
        conv("all of 2 x 2 regions of 4 x 4, 5 x 5", all([2, 2], four), 16, 5),
        conv("all of 3 x 1 regions of 3 x 3, 3 x 3", all([3, 1], Layout { side: 3, cell: 1 }), 18, 3),
        conv("blocks of channels, rows that are no pairs", some_regions(four), 131, 5),
        conv("blocks of channels at 2 x 2", some_regions(two), 138, 5),
        conv(
            "halves of blocks of channels, some regions hidden",
            Regions { seen: Seen::Hiding(hidden.clone()), ..all([2, 3], four) },
            66,
            5,
        ),
        conv("half of the regions hidden", Regions { grid: [2, 3], layout: two, seen: Seen::Hiding(hidden) }, 33, 5),
    ]
}
