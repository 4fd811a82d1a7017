//! ConViT's published sizes: the encoders of ConvMAE and of DMJD, which is wider inside the MLPs of stages 1 and 2.
//!
//!   convvit_base   ConvMAE's       convit_base, convit_large   DMJD's       glyph_conv   for the built-in images

use super::stages::StagesConfig;
use super::vit::{DropPath, Position, VitConfig};
use crate::error::{Error, Result};

struct Size {
    name: &'static str,
    patches: [usize; 3],
    /// Stages 1 and 2: widths, blocks, MLP ratios.
    widths: [usize; 2],
    depths: [usize; 2],
    ratios: [f64; 2],
    /// Stage 3: width, blocks, heads.
    transformer: [usize; 3],
}

/// Of the norms in the stages.
pub const STAGE_EPS: f64 = 1e-5;

const PATCHES: [usize; 3] = [4, 2, 2];

const SIZES: [Size; 4] = [
    Size {
        name: "convvit_base",
        patches: PATCHES,
        widths: [256, 384],
        depths: [2, 2],
        ratios: [4.0, 4.0],
        transformer: [768, 11, 12],
    },
    Size {
        name: "convit_base",
        patches: PATCHES,
        widths: [256, 384],
        depths: [2, 2],
        ratios: [8.0, 8.0],
        transformer: [768, 11, 12],
    },
    Size {
        name: "convit_large",
        patches: PATCHES,
        widths: [384, 768],
        depths: [2, 2],
        ratios: [8.0, 8.0],
        transformer: [1024, 23, 16],
    },
    Size {
        name: "glyph_conv",
        patches: [2, 2, 2],
        widths: [16, 32],
        depths: [1, 1],
        ratios: [4.0, 4.0],
        transformer: [64, 3, 4],
    },
];

/// The sizes there are.
pub const NAMES: [&str; 4] = [SIZES[0].name, SIZES[1].name, SIZES[2].name, SIZES[3].name];

/// The encoder that is pre-trained: fixed sines, and the ends of its stages added behind the last block.
pub fn encoder(size: &str, image: usize) -> Result<VitConfig> {
    let found = SIZES.iter().find(|known| known.name == size);
    let size = found.ok_or_else(|| Error::usage(format!("ConViT {size} is unknown; there are {}", NAMES.join(", "))))?;
    let [width, depth, heads] = size.transformer;
    let stages = StagesConfig {
        patches: size.patches,
        widths: size.widths,
        depths: size.depths,
        mlp_ratios: size.ratios,
        eps: STAGE_EPS,
        fused: true,
    };
    let patch = stages.patch();
    Ok(VitConfig { class_token: false, stages: Some(stages), ..VitConfig::new(image, patch, width, depth, heads) })
}

/// The classifier's: learned positions, nothing is fused, stochastic depth grows over the blocks of all stages.
pub fn classifier(size: &str, image: usize, drop_path: f64) -> Result<VitConfig> {
    let encoder = encoder(size, image)?;
    let stages = encoder.stages.clone().map(|stages| StagesConfig { fused: false, ..stages });
    Ok(VitConfig { position: Position::LearnedPatches, stages, drop_path: DropPath::Linear(drop_path), ..encoder })
}
