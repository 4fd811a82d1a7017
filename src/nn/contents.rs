//! What model a file's tensors belong to, read off their names and shapes.
//!
//! Heads are not among the shapes: they come from the published size of the same width and depth.

use super::cait::CaitConfig;
use super::convit;
use super::decoder::DecoderConfig;
use super::names;
use super::position;
use super::presets;
use super::stages::StagesConfig;
use super::vit::{DropPath, Position, VitConfig};
use crate::error::{Error, Result};
use crate::formats::TensorFile;
use crate::{bail, ensure};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Contents {
    pub width: usize,
    pub depth: usize,
    /// Width inside the MLPs.
    pub hidden: usize,
    pub patch: usize,
    pub channels: usize,
    /// Side of the grid of patches; None where the table is of no square.
    pub grid: Option<usize>,
    /// Tokens in front that have a row in the position table.
    pub extra: usize,
    pub layer_scale: bool,
    pub distilled: bool,
    /// Width and blocks of a decoder.
    pub decoder: Option<(usize, usize)>,
    pub classes: Option<usize>,
    /// Whether a classifier pools the patches.
    pub pooled: bool,
    /// Whether the head is a linear probe's.
    pub probe: bool,
    /// CaiT's blocks for the class token and its heads, which their own mixing tells.
    pub cait: Option<(usize, usize)>,
    /// ConViT's convolution stages.
    pub stages: Option<StagesFound>,
}

/// What tensors say of convolution stages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StagesFound {
    pub patches: [usize; 3],
    /// Of stages 1 and 2: widths, blocks, widths inside their MLPs.
    pub widths: [usize; 2],
    pub depths: [usize; 2],
    pub hidden: [usize; 2],
    /// Whether what they end with is added behind the last block.
    pub fused: bool,
}

impl StagesFound {
    /// The MLP ratios of both stages.
    pub fn ratios(&self) -> [f64; 2] {
        [0, 1].map(|stage| ratio(self.hidden[stage], self.widths[stage]))
    }

    pub fn config(&self) -> StagesConfig {
        let &Self { patches, widths, depths, fused, .. } = self;
        StagesConfig { patches, widths, depths, mlp_ratios: self.ratios(), eps: convit::STAGE_EPS, fused }
    }
}

/// The MLP ratio that makes `hidden` of this width, rounded down.
fn ratio(hidden: usize, width: usize) -> f64 {
    let ratio = hidden as f64 / width.max(1) as f64;
    if ((width as f64 * ratio) as usize) < hidden { ratio.next_up() } else { ratio }
}

impl Contents {
    /// Reads them off official names; see [`names::to_official`].
    pub fn of(file: &TensorFile) -> Result<Self> {
        let known = names::recognise(file.names());
        ensure!(known.is_some(), "{} holds no vision transformer: no tensor projects patches", file.source());
        let embedding = |name: &str| -> Result<[usize; 3]> {
            match file.get(name)?.shape() {
                &[width, channels, patch, _] => Ok([width, channels, patch]),
                _ => bail!("{}: {name} is no projection of patches", file.source()),
            }
        };
        let blocks = |start: &str| {
            let numbers = file.names().filter_map(|name| name.strip_prefix(start)?.split('.').next()?.parse::<usize>().ok());
            numbers.max().map_or(0, |last| last.saturating_add(1))
        };
        let first = |name: &str| file.get(name).ok().and_then(|tensor| tensor.shape().first().copied());
        let convit = file.contains(names::CONVIT);
        let ([width, channels, patch], stages) = if convit {
            let [first_embed, second, third] = [1, 2, 3].map(|stage| embedding(&format!("patch_embed{stage}.proj.weight")));
            let ([e1, channels, p1], [e2, _, p2], [width, _, p3]) = (first_embed?, second?, third?);
            let patch = p1.checked_mul(p2).and_then(|side| side.checked_mul(p3));
            let patch = patch.ok_or_else(|| Error::new(format!("{}: its patches are too large", file.source())))?;
            let stages = StagesFound {
                patches: [p1, p2, p3],
                widths: [e1, e2],
                depths: [blocks("blocks1."), blocks("blocks2.")],
                hidden: ["blocks1", "blocks2"].map(|stage| first(&format!("{stage}.0.mlp.fc1.weight")).unwrap_or(0)),
                fused: file.contains("stage1_output_decode.weight"),
            };
            ([width, channels, patch], Some(stages))
        } else {
            (embedding("patch_embed.proj.weight")?, None)
        };
        let own = if convit { "blocks3." } else { "blocks." };
        let rows = file.get("pos_embed").ok().and_then(|table| table.shape().get(1).copied());
        // A ConViT has no tokens in front.
        let table = rows.and_then(position::square).filter(|&(extra, _)| !convit || extra == 0);
        let distilled = file.contains("dist_token");
        Ok(Self {
            width,
            depth: blocks(own),
            hidden: first(&format!("{own}0.mlp.fc1.weight")).unwrap_or(0),
            patch,
            channels,
            grid: table.map(|(_, side)| side),
            extra: table.map_or(if convit { 0 } else { 1 + usize::from(distilled) }, |(extra, _)| extra),
            layer_scale: file.contains("blocks.0.gamma_1"),
            distilled,
            decoder: first("decoder_embed.weight").map(|width| (width, blocks("decoder_blocks."))),
            classes: first("head.weight").or_else(|| first("head.1.weight")),
            pooled: file.contains("fc_norm.weight"),
            probe: file.contains("head.1.weight"),
            cait: Some(blocks("blocks_token_only.")).filter(|&count| count > 0).zip(first("blocks.0.attn.proj_l.weight")),
            stages,
        })
    }

    /// The published size of this width and depth, and of these stages.
    pub fn size(&self) -> Option<&'static str> {
        if let Some(found) = &self.stages {
            let sized = |name: &&str| {
                let Ok(VitConfig { width, depth, stages: Some(stages), .. }) = convit::encoder(name, 224) else { return false };
                (width, depth, stages.patches, stages.widths, stages.depths)
                    == (self.width, self.depth, found.patches, found.widths, found.depths)
            };
            let sized: Vec<&str> = convit::NAMES.into_iter().filter(sized).collect();
            // Where ConvMAE's and DMJD's differ in nothing but the MLPs, any of them has the right heads.
            let ratios =
                |name: &&&str| convit::encoder(name, 224).is_ok_and(|vit| vit.stages.is_some_and(|own| own.mlp_ratios == found.ratios()));
            return sized.iter().find(ratios).or(sized.first()).copied();
        }
        presets::NAMES.into_iter().find(|size| presets::mae(size, 224).is_ok_and(|vit| (vit.width, vit.depth) == (self.width, self.depth)))
    }

    /// The encoder, for the images that the position table is made for.
    pub fn vit(&self) -> Result<VitConfig> {
        let unknown =
            || Error::new(format!("no published model is {} wide and {} blocks deep, so its heads are unknown", self.width, self.depth));
        let size = self.size().ok_or_else(unknown)?;
        let preset = if self.stages.is_some() { convit::encoder(size, self.patch)? } else { presets::mae(size, self.patch)? };
        let side = self.side()?;
        let position = match (self.extra, self.decoder) {
            (_, Some(_)) if self.extra > 0 || self.stages.is_some() => Position::SinCos,
            (0, _) => Position::LearnedPatches,
            _ => Position::Learned,
        };
        Ok(VitConfig {
            image: [side, side],
            patch: self.patch,
            channels: self.channels,
            mlp_ratio: ratio(self.hidden, self.width),
            position,
            distillation_token: self.distilled,
            layer_scale: self.layer_scale.then_some(1e-4),
            stages: self.stages.as_ref().map(StagesFound::config),
            drop_path: DropPath::Constant(0.0),
            ..preset
        })
    }

    /// A CaiT, for the images that the position table is made for; None of other models.
    pub fn cait(&self) -> Result<Option<CaitConfig>> {
        let Some((class_blocks, heads)) = self.cait else { return Ok(None) };
        let classes = self.classes.ok_or_else(|| Error::new("it is a CaiT without a head"))?;
        let side = self.side()?;
        let vit = VitConfig {
            channels: self.channels,
            mlp_ratio: ratio(self.hidden, self.width),
            position: Position::LearnedPatches,
            layer_scale: Some(1e-5),
            ..VitConfig::new(side, self.patch, self.width, self.depth, heads)
        };
        Ok(Some(CaitConfig { vit, class_blocks, classes }))
    }

    /// Side of the images.
    fn side(&self) -> Result<usize> {
        let grid = self.grid.ok_or_else(|| Error::new("the position table is of no square grid, so the size of the images is unknown"))?;
        grid.checked_mul(self.patch).ok_or_else(|| Error::new("the position table is too large"))
    }

    /// The decoder, if there is one; its heads are 32 wide, or those of the size's own decoder.
    pub fn decoder(&self) -> Result<Option<DecoderConfig>> {
        let Some((width, depth)) = self.decoder else { return Ok(None) };
        let own = self.size().map(presets::decoder_of).filter(|own| own.width == width);
        let heads = own.map_or(width / 32, |own| own.heads);
        ensure!(heads > 0 && width.is_multiple_of(heads), "no published decoder is {width} wide, so its heads are unknown");
        Ok(Some(DecoderConfig { width, depth, heads }))
    }
}
