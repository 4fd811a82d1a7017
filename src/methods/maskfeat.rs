//! MaskFeat: Masked Feature Prediction for Self-Supervised Visual Pre-Training (arXiv 2112.09133), for images.
//!
//! All patches enter the encoder; where one is hidden, a learned token stands for its pixels. A linear layer predicts the oriented gradients of each
//! patch, and the squared error counts where patches are hidden.
//!
//! `masque pretrain maskfeat`

use super::baseline::Baseline;
use super::masks::{KeepRounding, Masking, Masks};
use super::target::{self, Kind, LossType, Targets};
use super::{Batch, Loss, Method};
use crate::error::{Error, Result};
use crate::masking::Mask;
use crate::nn::presets::{self, Family};
use crate::nn::vit::{Vit, VitConfig};
use crate::nn::{Scope, flops};
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::trace;
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
    #[arg(long, value_enum, default_value_t = Masking::BlockWise)]
    pub masking: Masking,
    /// Least area of a block of --masking block-wise, in patches [default: 15, or a quarter of what is hidden where that is less]
    #[arg(long, value_name = "N")]
    pub min_block_patches: Option<usize>,
    /// What is predicted
    #[arg(long, value_enum, default_value_t = Kind::HogMaskfeat)]
    pub pred_type: Kind,
    /// How it is compared
    #[arg(long, value_enum, default_value_t = LossType::L2)]
    pub mim_loss_type: LossType,
    /// From which difference on smooth-l1 is absolute
    #[arg(long, default_value_t = target::BETA, value_name = "BETA")]
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
    if encoder.stages.is_some() {
        return Err(Error::usage(format!(
            "--model {model} is a ConViT, whose convolution stages have no place for a token instead of a patch; take a ViT, or masque pretrain convmae"
        )));
    }
    let encoder = VitConfig { patch: patch.unwrap_or(encoder.patch), channels, ..encoder };
    encoder.check().map_err(|error| Error::usage(format!("--input-size and --patch-size: {}", error.chain())))?;
    Ok(encoder)
}

impl MaskFeatArgs {
    pub fn encoder(&self, image: usize, channels: usize) -> Result<VitConfig> {
        vit(&self.model, self.patch_size, image, channels)
    }

    /// What makes the masks of training. Of 196 patches 78 are hidden, which is what is nearest to two in five.
    pub fn masks(&self, encoder: &VitConfig) -> Result<Masks> {
        Masks::new(self.masking, encoder, self.mask_ratio, KeepRounding::Round)?.with_least_block(self.min_block_patches)
    }

    /// Refuses what cannot be meant.
    pub fn check(&self, encoder: &VitConfig) -> Result<()> {
        target::check_loss(self.pred_type, [self.mim_loss_type; 2], self.smooth_l1_beta, self.norm_pix_eps)?;
        target::check_patch(self.pred_type, encoder)?;
        self.masks(encoder).map(|_| ())
    }

    /// The method for this encoder.
    pub fn config(&self, encoder: VitConfig, targets: Targets) -> Result<MaskFeatConfig> {
        self.check(&encoder)?;
        let masks = self.masks(&encoder)?;
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
    pub model: Baseline,
    masks: Masks,
    pub targets: Targets,
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

impl MaskFeat {
    /// What is hidden of images to learn from, and what is predicted of all patches.
    pub fn predict(&self, s: &Scope, images: &Tensor, rng: &Rng) -> Result<(Mask, Var)> {
        let mask = self.masks.draw(images, (self.model.encoder(), &self.params), rng)?;
        let predicted = self.model.answer(s, images, &mask, false)?.predicted;
        Ok((mask, predicted))
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
        let (mask, predicted) = self.predict(&s, &images, rng)?;
        let _phase = trace::phase("loss");
        Ok(Loss::single("features", predicted.feature_loss_at(&target, self.loss.distance(self.beta), &mask.hidden)?))
    }

    fn encoder(&self) -> &Vit {
        self.model.encoder()
    }

    fn needs_bytes(&self) -> bool {
        self.targets.needs_bytes()
    }

    fn macs(&self) -> [u64; 2] {
        let seen = &self.model.encoder().config;
        let looked = if self.masks.kind() == Masking::Saliency { flops::vit_macs(seen, seen.patches()) } else { 0 };
        let all = self.model.macs(self.masks.kept_each(), self.targets.width).iter().sum::<u64>();
        [looked + all, all]
    }

    fn teacher(&self) -> Option<&super::teacher::Teacher> {
        self.targets.teacher.as_ref()
    }

    fn teacher_cost(&self) -> Option<super::teacher::Cost> {
        self.targets.teacher_cost()
    }

    fn prepare(&self, batch: &mut Batch, _rng: &Rng) -> Result<()> {
        self.targets.prepare(batch)
    }
}
