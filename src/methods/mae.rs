//! MAE: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377).
//!
//! Hide 75 % of the patches, encode the rest alone, let a small decoder with mask tokens paint the hidden ones, and compare pixels there.
//! Speed: not measured for this method as a whole yet; `masque measure step` times its training step.

use super::masks::{KeepRounding, Masking, Masks};
use super::{Batch, Loss, Method, baseline};
use crate::error::{Error, Result};
use crate::masking::{self, Mask};
use crate::nn::decoder::{Decoder, DecoderConfig, DecoderTokens};
use crate::nn::presets::{self, Family, Named};
use crate::nn::vit::{Tokens, Vit, VitConfig};
use crate::nn::{Scope, Start, flops};
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::trace;
use serde::{Deserialize, Serialize};

/// The flags of the method, with the paper's values.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MaeArgs {
    /// Model by its published name or its size: mae_vit_base_patch16, base, glyph_s ...
    #[arg(long, default_value = "mae_vit_large_patch16", value_name = "NAME")]
    pub model: String,
    /// Side of a patch in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub patch_size: Option<usize>,
    /// Part of the patches that is hidden
    #[arg(long, default_value_t = 0.75, allow_negative_numbers = true, value_name = "RATIO")]
    pub mask_ratio: f64,
    /// Which patches are hidden
    #[arg(long, value_enum, default_value_t = Masking::Random)]
    #[serde(default)]
    pub masking: Masking,
    /// How the number of patches that are kept comes from the ratio
    #[arg(long, value_enum, default_value_t = KeepRounding::Floor)]
    #[serde(default)]
    pub keep_rounding: KeepRounding,
    /// Least area of a block of --masking block-wise, in patches [default: 15, or a quarter of what is hidden where that is less]
    #[arg(long, value_name = "N")]
    #[serde(default)]
    pub min_block_patches: Option<usize>,
    /// Compare with pixels that are normalised patch by patch
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub norm_pix_loss: bool,
    /// What is added to a patch's variance there; more of it keeps noise in plain patches from being a target
    #[arg(long, default_value_t = pixels::EPS, value_name = "VARIANCE")]
    pub norm_pix_eps: f64,
    /// Width of the decoder [default: the model's, 512]
    #[arg(long, value_name = "N")]
    pub decoder_dim: Option<usize>,
    /// Blocks of the decoder [default: the model's, 8]
    #[arg(long, value_name = "N")]
    pub decoder_depth: Option<usize>,
    /// Heads of the decoder [default: the model's, 16]
    #[arg(long, value_name = "N")]
    pub decoder_heads: Option<usize>,
}

impl MaeArgs {
    /// For square images of this side and so many channels.
    pub fn config(&self, image: usize, channels: usize) -> Result<MaeConfig> {
        let named = presets::named(&self.model)?;
        named.needs_patches(&self.model, "this pre-training")?;
        let usage = |text: String| Err(Error::usage(text));
        if let Some(family) = named.family.filter(|family| *family != Family::Mae) {
            return usage(format!("--model {} is a {family:?} classifier; pre-training takes mae_vit_... or a size", self.model));
        }
        self.config_of(&named, image, channels)
    }

    /// The same for a model of any kind.
    pub fn config_of(&self, named: &Named, image: usize, channels: usize) -> Result<MaeConfig> {
        let mut encoder = named.encoder(image)?;
        (encoder.patch, encoder.channels) = (self.patch_size.unwrap_or(encoder.patch), channels);
        encoder.check().map_err(|error| Error::usage(format!("--input-size and --patch-size: {}", error.chain())))?;
        let decoder = DecoderConfig {
            width: self.decoder_dim.unwrap_or(named.decoder.width),
            depth: self.decoder_depth.unwrap_or(named.decoder.depth),
            heads: self.decoder_heads.unwrap_or(named.decoder.heads),
        };
        decoder.check()?;
        self.masks(&encoder)?;
        if !(self.norm_pix_eps.is_finite() && self.norm_pix_eps > 0.0) {
            return Err(Error::usage(format!("--norm-pix-eps {} is not a number above 0", self.norm_pix_eps)));
        }
        Ok(MaeConfig { encoder, decoder, mask_ratio: self.mask_ratio, norm_pix: self.norm_pix_loss.then_some(self.norm_pix_eps) })
    }

    /// What makes the masks of training.
    pub fn masks(&self, encoder: &VitConfig) -> Result<Masks> {
        Masks::new(self.masking, encoder, self.mask_ratio, self.keep_rounding)?.with_least_block(self.min_block_patches)
    }
}

pub struct MaeConfig {
    pub encoder: VitConfig,
    pub decoder: DecoderConfig,
    pub mask_ratio: f64,
    /// Each target patch is normalised by its own mean and deviation, this much added to the variance; None leaves pixels as they are.
    pub norm_pix: Option<f64>,
}

pub struct Mae {
    pub params: Params,
    pub encoder: Vit,
    pub decoder: Decoder,
    mask_ratio: f64,
    masks: Masks,
    norm_pix: Option<f64>,
    /// Whether convolution stages are computed everywhere.
    dense: bool,
}

impl Mae {
    pub fn new(c: MaeConfig, dtype: Dtype, rng: &Rng) -> Result<Self> {
        Ok(Self::with(c, dtype, rng, |_| Ok(()))?.0)
    }

    /// One among whose parameters there are others, behind its own.
    pub fn with<T>(c: MaeConfig, dtype: Dtype, rng: &Rng, more: impl FnOnce(&mut ParamsBuilder) -> Result<T>) -> Result<(Self, T)> {
        let mut b = ParamsBuilder::default();
        let tokens = Tokens::new(&mut b, &c.encoder)?;
        let decoder_tokens = DecoderTokens::new(&mut b, &c.decoder, &c.encoder)?;
        let encoder = Vit::new(&mut b, c.encoder, tokens, true, Start::Xavier)?;
        let decoder = Decoder::new(&mut b, &c.decoder, &encoder.config, decoder_tokens, Start::Xavier)?;
        let (more, config) = (more(&mut b)?, &encoder.config);
        let masks = Masks::random(config, masking::len_keep(config.patches(), c.mask_ratio)?);
        let (mask_ratio, norm_pix) = (c.mask_ratio, c.norm_pix);
        Ok((Self { params: b.build(dtype, rng)?, encoder, decoder, mask_ratio, masks, norm_pix, dense: false }, more))
    }

    /// The same with other masks in training.
    pub fn with_masks(self, masks: Masks) -> Self {
        Self { masks, ..self }
    }

    /// Other masks in training from now on.
    pub fn see(&mut self, masks: Masks) {
        self.masks = masks;
    }

    /// The same with convolution stages computed everywhere, or for the patches that are seen alone.
    pub fn with_dense_stages(self, dense: bool) -> Self {
        Self { dense, ..self }
    }

    /// The mask of a batch to learn from.
    pub fn training_mask(&self, images: &Tensor, rng: &Rng) -> Result<Mask> {
        self.masks.draw(images, (&self.encoder, &self.params), rng)
    }

    /// Patches that are kept of an image to learn from.
    pub fn kept_each(&self) -> usize {
        self.masks.kept_each()
    }

    /// The random mask of a batch of this size.
    pub fn mask(&self, batch: usize, rng: &Rng) -> Result<Mask> {
        self.mask_at(self.mask_ratio, batch, rng)
    }

    /// The same with another part of the patches hidden.
    pub fn mask_at(&self, ratio: f64, batch: usize, rng: &Rng) -> Result<Mask> {
        let patches = self.encoder.config.patches();
        let noise = Tensor::drawn(self.params.device(), rng, "mask", &[batch, patches])?;
        masking::random(&noise, masking::len_keep(patches, ratio)?)
    }

    /// Part of the patches that is hidden in training.
    pub fn mask_ratio(&self) -> f64 {
        self.mask_ratio
    }

    /// What the decoder sees.
    pub fn latent(&self, s: &Scope, images: &Tensor, mask: &Mask) -> Result<Var> {
        self.encoder.encode(s, images, &baseline::view(mask, self.dense))
    }

    /// What the decoder is compared with: the pixels of all patches, [B, L, P].
    pub fn target(&self, images: &Tensor) -> Result<Tensor> {
        pixels::targets(&images.on(self.params.device())?.cast(self.params.dtype())?, self.encoder.config.patch, self.norm_pix)
    }

    /// What is added to a patch's variance where targets are normalised patch by patch; None where they are not.
    pub fn norm_pix(&self) -> Option<f64> {
        self.norm_pix
    }

    /// For files that do not say what their model predicts.
    pub fn set_norm_pix(&mut self, eps: Option<f64>) {
        self.norm_pix = eps;
    }

    /// Mean squared error over the hidden patches.
    pub fn reconstruction(&self, pred: &Var, images: &Tensor, mask: &Mask) -> Result<Var> {
        pred.pixel_loss(images, self.encoder.config.patch, self.norm_pix, &mask.hidden)
    }
}

impl Method for Mae {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let s = Scope::new(tape, &self.params).with_noise(rng);
        let images = batch.images.on(self.params.device())?;
        let mask = self.training_mask(&images, rng)?;
        let latent = self.latent(&s, &images, &mask)?; // [B, extra + K, C]
        let pred = self.decoder.forward(&s, &latent, &mask.restore)?; // [B, L, P]
        let _phase = trace::phase("loss");
        Ok(Loss::single("pixels", self.reconstruction(&pred, &images, &mask)?))
    }

    fn encoder(&self) -> &Vit {
        &self.encoder
    }

    fn macs(&self) -> [u64; 2] {
        let kept = self.kept_each();
        let looked =
            if self.masks.kind() == Masking::Saliency { flops::vit_macs(&self.encoder.config, self.encoder.config.patches()) } else { 0 };
        let all = flops::vit_macs(&self.encoder.config, kept) + flops::decoder_macs(&self.decoder.config, &self.encoder.config, kept);
        [looked + all, all]
    }
}
