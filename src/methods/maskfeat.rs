//! MaskFeat: Masked Feature Prediction for Self-Supervised Visual Pre-Training (arXiv 2112.09133), for images.
//!
//! All patches enter the encoder; where one is hidden, a learned token stands for its pixels. A linear layer predicts the oriented gradients of each
//! patch, and the squared error counts where patches are hidden.
//!
//! `masque pretrain maskfeat`

use super::baseline::Baseline;
use super::masks::{KeepRounding, Masking, Masks};
use super::target::{Kind, LossType, Targets};
use super::{Batch, Loss, Method};
use crate::error::{Error, Result};
use crate::nn::Scope;
use crate::nn::presets::{self, Family};
use crate::nn::vit::{Vit, VitConfig};
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::Tape;
use crate::targets::pixels;
use crate::tensor::Dtype;
use serde::{Deserialize, Serialize};

/// The flags of the method, with the values that its images are known to be trained with.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MaskFeatArgs {
    /// Model by its published name or its size: vit_base_patch16, base, glyph_s ...
    #[arg(long, default_value = "vit_base_patch16", value_name = "NAME")]
    pub model: String,
    /// Side of a patch in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub patch_size: Option<usize>,
    /// Part of the patches that is hidden
    #[arg(long, default_value_t = 0.4, allow_negative_numbers = true, value_name = "RATIO")]
    pub mask_ratio: f64,
    /// Which patches are hidden
    #[arg(long, value_enum, default_value_t = Masking::Random)]
    pub masking: Masking,
    /// What is predicted
    #[arg(long, value_enum, default_value_t = Kind::HogMaskfeat)]
    pub pred_type: Kind,
    /// How it is compared
    #[arg(long, value_enum, default_value_t = LossType::L2)]
    pub mim_loss_type: LossType,
    /// From which difference on smooth-l1 is absolute
    #[arg(long, default_value_t = 2.0, value_name = "BETA")]
    pub smooth_l1_beta: f64,
    /// What is added to a patch's variance where pixels are normalised patch by patch
    #[arg(long, default_value_t = pixels::EPS, value_name = "VARIANCE")]
    pub norm_pix_eps: f64,
}

/// An encoder of a ViT to be pre-trained, by its name.
pub fn vit(model: &str, patch: Option<usize>, image: usize, channels: usize) -> Result<VitConfig> {
    let named = presets::named(model)?;
    if let Some(family) = named.family.filter(|family| !matches!(family, Family::Mae | Family::Vit)) {
        return Err(Error::usage(format!(
            "--model {model} is a {family:?} model; this method trains a plain ViT: vit_base_patch16, base ..."
        )));
    }
    let encoder = named.encoder(image)?;
    let encoder = VitConfig { patch: patch.unwrap_or(encoder.patch), channels, ..encoder };
    encoder.check().map_err(|error| Error::usage(format!("--input-size and --patch-size: {}", error.chain())))?;
    Ok(encoder)
}

impl MaskFeatArgs {
    pub fn encoder(&self, image: usize, channels: usize) -> Result<VitConfig> {
        vit(&self.model, self.patch_size, image, channels)
    }

    /// The method for this encoder.
    pub fn config(&self, encoder: VitConfig, targets: Targets) -> Result<MaskFeatConfig> {
        super::dmjd::check_loss(self.smooth_l1_beta, self.norm_pix_eps)?;
        let masks = Masks::new(self.masking, &encoder, self.mask_ratio, KeepRounding::Floor)?;
        Ok(MaskFeatConfig { encoder, masks, targets, loss: self.mim_loss_type, beta: self.smooth_l1_beta })
    }
}

pub struct MaskFeatConfig {
    pub encoder: VitConfig,
    pub masks: Masks,
    pub targets: Targets,
    pub loss: LossType,
    pub beta: f64,
}

pub struct MaskFeat {
    pub params: Params,
    model: Baseline,
    masks: Masks,
    targets: Targets,
    loss: LossType,
    beta: f64,
}

impl MaskFeat {
    pub fn new(c: MaskFeatConfig, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        let model = Baseline::new(&mut b, c.encoder, None, c.targets.width)?;
        Ok(Self { params: b.build(dtype, rng)?, model, masks: c.masks, targets: c.targets, loss: c.loss, beta: c.beta })
    }
}

impl Method for MaskFeat {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let s = Scope::new(tape, &self.params).with_noise(rng);
        let images = batch.images.on(self.params.device())?;
        let target = self.targets.of(batch, self.params.device())?; // [B, L, P]
        let mask = self.masks.draw(&images, (self.model.encoder(), &self.params), rng)?;
        let answer = self.model.answer(&s, &images, &mask, false)?;
        Ok(Loss::single("features", answer.predicted.feature_loss_at(&target, self.loss.distance(self.beta), &mask.hidden)?))
    }

    fn encoder(&self) -> &Vit {
        self.model.encoder()
    }

    fn needs_bytes(&self) -> bool {
        self.targets.needs_bytes()
    }

    fn macs(&self) -> [u64; 2] {
        [self.model.macs(self.masks.kept_each(), self.targets.width); 2]
    }

    fn teacher(&self) -> Option<&super::teacher::Teacher> {
        self.targets.teacher.as_ref()
    }

    fn teacher_cost(&self) -> Option<super::teacher::Cost> {
        self.targets.teacher_cost()
    }
}
