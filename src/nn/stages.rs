//! ConViT's convolution stages, in front of the blocks of a [`Vit`](super::vit::Vit) where another one projects patches (arXiv 2205.03892).
//!
//!   stage 1   embed 4 x 4 pixels, blocks;   stage 2   embed 2 x 2, blocks;   stage 3   embed 2 x 2, linear: a token for each 16 x 16 pixels
//!   embed     gelu(norm(convolution that does not overlap))
//!   block     x += dp(conv2(depthwise 5 x 5(V conv1(norm1(x)))));   x += dp(mlp(norm2(x)))        V: 0 at hidden patches
//!   fused     a linear view of the ends of stages 1 and 2, one row a patch: added behind the last block in pre-training
//!
//! Nothing of a visible patch depends on a hidden one, since only the depthwise filter looks beyond a patch and sees zeros there. So the stages are computed
//! for visible patches alone, as tokens in regions ([`regions`](crate::ops::regions)); [`View::dense`] computes them everywhere and agrees up to the order of sums.

use super::block::{BlockConfig, Mlp, Residual};
use super::linear::Linear;
use super::norm::Norm;
use super::vit::VitConfig;
use super::{Scope, Start};
use crate::ensure;
use crate::error::Result;
use crate::ops::gather::gather_patches;
use crate::ops::regions::{Layout, Regions, Seen};
use crate::param::{Init, ParamId, ParamsBuilder};
use crate::tape::Var;
use crate::tensor::Tensor;

/// The sizes of the stages; those of the blocks behind them are the ViT's.
#[derive(Clone, Debug, PartialEq)]
pub struct StagesConfig {
    /// Side of what each of the three embeddings takes together: pixels, then tokens.
    pub patches: [usize; 3],
    /// Widths and numbers of blocks of stages 1 and 2.
    pub widths: [usize; 2],
    pub depths: [usize; 2],
    pub mlp_ratios: [f64; 2],
    /// Of the norms of embeddings and blocks.
    pub eps: f64,
    /// Whether what they end with is added behind the last block, as in pre-training.
    pub fused: bool,
}

impl StagesConfig {
    /// Blocks of both stages.
    pub fn depth(&self) -> usize {
        self.depths.iter().sum()
    }

    /// Widths inside the MLPs of both stages.
    pub fn hidden(&self) -> [usize; 2] {
        [0, 1].map(|stage| (self.widths[stage] as f64 * self.mlp_ratios[stage]) as usize)
    }

    /// Side in pixels of what becomes one token of stage 3.
    pub fn patch(&self) -> usize {
        self.patches.iter().product()
    }

    /// How the tokens of stage 1 or 2, counted from 0, lie in a patch.
    pub fn layout(&self, stage: usize) -> Layout {
        let [_, second, third] = self.patches;
        if stage == 0 { Layout { side: second * third, cell: second } } else { Layout { side: third, cell: third } }
    }

    pub fn check(&self) -> Result<()> {
        let whole = self.patches.iter().chain(&self.widths).all(|&n| n > 0);
        ensure!(whole, "convolution stages need patches and widths, not {:?} and {:?}", self.patches, self.widths);
        for (width, ratio) in self.widths.into_iter().zip(self.mlp_ratios) {
            ensure!(ratio.is_finite() && (width as f64 * ratio) >= 1.0, "an MLP ratio of {ratio} leaves nothing of a width of {width}");
        }
        Ok(())
    }
}

/// What an encoder sees of each image: a mask's tensors, all [B, ..].
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The patches that are seen, in this order.
    pub kept: &'a Tensor,
    /// At which place of it each patch stands; as many or more where it is hidden.
    pub restore: &'a Tensor,
    /// 1 where a patch is hidden.
    pub hidden: &'a Tensor,
    /// Compute convolution stages everywhere and then leave out what is hidden.
    pub dense: bool,
}

/// What the stages give: a row for each patch that is seen.
pub struct Staged {
    /// Without positions, [B, K, C].
    pub tokens: Var,
    /// The ends of stages 1 and 2 for the sum behind the last block, [B, K, C]; None in a classifier.
    pub fused: Option<Var>,
}

/// Convolution that does not overlap, norm, GELU.
struct Embed {
    weight: ParamId,
    bias: ParamId,
    norm: Norm,
    layout: Layout,
}

impl Embed {
    fn new(b: &mut ParamsBuilder, name: &str, [fan_in, width, side]: [usize; 3], weight: Option<Init>, eps: f64) -> Result<Self> {
        let default = Init::fan_in(fan_in * side * side);
        let weight = b.add(format!("{name}.proj.weight"), &[width, fan_in, side, side], weight.unwrap_or_else(|| default.clone()))?;
        let bias = b.add(format!("{name}.proj.bias"), &[width], default)?;
        Ok(Self { weight, bias, norm: Norm::new(b, &format!("{name}.norm"), width, eps)?, layout: Layout { side, cell: side } })
    }

    fn finish(&self, s: &Scope, x: &Var, weight: &Var) -> Result<Var> {
        self.norm.forward(s, &x.linear(weight, Some(&s.working(self.bias)))?)?.gelu()
    }

    /// Of pixels in the order of the weight, [B, N, P].
    fn of_pixels(&self, s: &Scope, pixels: Tensor) -> Result<Var> {
        self.finish(s, &Var::constant(pixels), &s.working(self.weight))
    }

    /// Of cells of tokens that lie beside each other: [B, N cells, C] to [B, N, C'].
    fn of_cells(&self, s: &Scope, x: &Var) -> Result<Var> {
        self.finish(s, &cells(x, self.layout.tokens())?, &s.working(self.weight).arrange_taps(self.layout)?)
    }
}

/// [B, N each, C] as [B, N, each C].
fn cells(x: &Var, each: usize) -> Result<Var> {
    let &[batch, tokens, width] = x.shape() else { crate::bail!("cells: x is {x:?} but [B, N, C] is needed", x = x.value()) };
    x.reshape(&[batch, tokens / each, each * width])
}

struct Block {
    norm: Norm,
    conv1: Linear,
    conv2: Linear,
    filter: ParamId,
    bias: ParamId,
    mlp: Mlp,
    residual: Residual,
}

/// Side of the depthwise filter.
const FILTER: usize = 5;

impl Block {
    fn new(b: &mut ParamsBuilder, name: &str, c: &BlockConfig) -> Result<Self> {
        let norm = Norm::new(b, &format!("{name}.norm1"), c.width, c.eps)?;
        let [conv1, conv2] = ["conv1", "conv2"].map(|part| Linear::pointwise(b, &format!("{name}.{part}"), c.width, c.width));
        let taps = FILTER * FILTER;
        let (conv1, conv2) = (conv1?, conv2?);
        let filter = b.add(format!("{name}.attn.weight"), &[c.width, 1, FILTER, FILTER], Init::fan_in(taps))?;
        let bias = b.add(format!("{name}.attn.bias"), &[c.width], Init::fan_in(taps))?;
        Ok(Self { norm, conv1, conv2, filter, bias, mlp: Mlp::pointwise(b, name, c)?, residual: Residual::new(b, name, c)? })
    }

    fn forward(&self, s: &Scope, x: &Var, regions: &Regions) -> Result<Var> {
        let y = self.conv1.forward(s, &self.norm.forward(s, x)?)?;
        let y = y.region_conv(&s.param(self.filter), Some(&s.param(self.bias)), regions)?;
        let y = self.conv2.forward(s, &y)?;
        self.mlp.finish(s, &self.residual, x, y)
    }
}

pub struct Stages {
    config: StagesConfig,
    grid: [usize; 2],
    embeds: [Embed; 3],
    last: Linear,
    fused: Option<[(ParamId, ParamId); 2]>,
    blocks: [Vec<Block>; 2],
}

impl Stages {
    /// The stages in front of a ViT of this kind.
    pub fn new(b: &mut ParamsBuilder, vit: &VitConfig, c: &StagesConfig, start: Start) -> Result<Self> {
        let ([p1, p2, p3], [e1, e2], e3) = (c.patches, c.widths, vit.width);
        // The last embedding alone is drawn like a linear layer, and that in pre-training only.
        let third = (start == Start::Xavier).then(|| Init::xavier(e2 * p3 * p3, e3));
        let embeds = [
            Embed::new(b, "patch_embed1", [vit.channels, e1, p1], None, c.eps)?,
            Embed::new(b, "patch_embed2", [e1, e2, p2], None, c.eps)?,
            Embed::new(b, "patch_embed3", [e2, e3, p3], third, c.eps)?,
        ];
        let last = Linear::new(b, "patch_embed4", e3, e3, start.linear(e3, e3))?;
        let mut output = |stage: usize| {
            let (width, side) = (c.widths[stage], c.layout(stage).side);
            let (name, fan_in) = (format!("stage{}_output_decode", stage + 1), width * side * side);
            let weight = b.add(format!("{name}.weight"), &[e3, width, side, side], Init::fan_in(fan_in))?;
            Ok((weight, b.add(format!("{name}.bias"), &[e3], Init::fan_in(fan_in))?))
        };
        let fused = if c.fused { Some([output(0)?, output(1)?]) } else { None };
        let mut stage = |stage: usize| {
            let width = c.widths[stage];
            let before = if stage == 0 { 0 } else { c.depths[0] };
            let block = |i: usize| BlockConfig {
                width,
                heads: 1,
                hidden: c.hidden()[stage],
                eps: c.eps,
                qkv_bias: true,
                layer_scale: None,
                drop_path: vit.drop_rate(before + i),
            };
            (0..c.depths[stage]).map(|i| Block::new(b, &format!("blocks{}.{i}", stage + 1), &block(i))).collect::<Result<Vec<_>>>()
        };
        let blocks = [stage(0)?, stage(1)?];
        Ok(Self { config: c.clone(), grid: vit.grid(), embeds, last, fused, blocks })
    }

    fn regions(&self, stage: usize, seen: &Seen) -> Regions {
        Regions { grid: self.grid, layout: self.config.layout(stage), seen: seen.clone() }
    }

    /// The stages for so many images' views, which are [B, C, H, W] times a whole number; `see` is shown what each block gives, by stage and block.
    pub fn forward(&self, s: &Scope, images: &Tensor, view: Option<&View>, see: &mut dyn FnMut(usize, usize, &Var)) -> Result<Staged> {
        let batch = view.map_or(images.shape()[0], |view| view.kept.shape()[0]);
        let seen = match view {
            None => Seen::All,
            Some(view) if view.dense => Seen::Hiding(view.hidden.clone()),
            Some(view) => Seen::Only { kept: view.kept.clone(), places: view.restore.clone() },
        };
        let regions = [self.regions(0, &seen), self.regions(1, &seen)];
        let side = self.config.patches[0];
        let tokens = regions[0].tokens_of(batch, &images.device())?;
        let pixels = gather_patches(images, (side, side), Some(&tokens), s.params.precision())?; // [B, N1, P]
        let mut x = self.embeds[0].of_pixels(s, pixels)?; // [B, N1, C1]
        let mut fused: Option<Var> = None;
        for stage in 0..2 {
            for (i, block) in self.blocks[stage].iter().enumerate() {
                x = block.forward(s, &x, &regions[stage])?;
                see(stage, i, &x);
            }
            if let Some(outputs) = &self.fused {
                let (weight, bias) = outputs[stage];
                let layout = regions[stage].layout;
                let weight = s.working(weight).arrange_taps(layout)?;
                let output = cells(&x, layout.tokens())?.linear(&weight, Some(&s.working(bias)))?; // [B, K, C3]
                fused = Some(match fused {
                    None => output,
                    Some(first) => first.add(&output)?,
                });
            }
            x = self.embeds[stage + 1].of_cells(s, &x)?;
        }
        let tokens = self.last.forward(s, &x)?; // [B, K, C3]
        match view {
            Some(view) if view.dense => {
                let fused = fused.map(|fused| fused.gather(view.kept)).transpose()?;
                Ok(Staged { tokens: tokens.gather(view.kept)?, fused })
            }
            _ => Ok(Staged { tokens, fused }),
        }
    }
}
