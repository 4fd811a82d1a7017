//! ConvMAE: Masked Convolution Meets Masked Autoencoders (arXiv 2205.03892).
//!
//! MAE with a ConViT as its encoder. The mask is drawn on the grid of stage 3, 16 x 16 pixels a patch, and holds in stages 1 and 2 too, where convolutions
//! see zeros at hidden patches. Stage 3 sees the kept patches alone; what stages 1 and 2 end with is added to them in front of the norm, and MAE's decoder
//! predicts pixels. The stages are computed for the kept patches alone, as the authors' fast version does (`--stages dense`: everywhere).
//!
//! `masque pretrain convmae`

use super::dmjd::StagesName;
use super::mae::{Mae, MaeArgs, MaeConfig};
use super::masks::Masks;
use crate::error::{Error, Result};
use crate::nn::presets::{self, Family};
use crate::rng::Rng;
use crate::tensor::Dtype;
use serde::{Deserialize, Serialize};

/// The flags of the method, with the paper's values.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvMaeArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub mae: MaeArgs,
    /// Where convolution stages are computed
    #[arg(long, value_enum, default_value_t = StagesName::Visible)]
    pub stages: StagesName,
}

impl ConvMaeArgs {
    /// For square images of this side and so many channels.
    pub fn config(&self, image: usize, channels: usize) -> Result<MaeConfig> {
        let name = &self.mae.model;
        let named = presets::named(name)?;
        if named.family == Some(Family::ConVit) {
            return Err(Error::usage(format!("--model {name} is a classifier; pre-training takes convmae_convvit_... or a size")));
        }
        if named.encoder(image)?.stages.is_none() {
            return Err(Error::usage(format!(
                "--model {name} has no convolution stages; masque pretrain mae takes it, and this command a ConViT"
            )));
        }
        self.mae.config_of(&named, image, channels)
    }

    /// The model, with its masks of training.
    pub fn model(&self, config: MaeConfig, masks: Masks, dtype: Dtype, rng: &Rng) -> Result<Mae> {
        Ok(Mae::new(config, dtype, rng)?.with_masks(masks).with_dense_stages(self.stages == StagesName::Dense))
    }
}
