//! MAE: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377).
//!
//! Hide 75 % of the patches, encode the rest alone, let a small decoder with mask tokens paint the hidden ones, and compare pixels there.
//! Speed: not measured for this method as a whole yet; `masque measure step` times its training step.

use super::{Batch, Loss, Method};
use crate::error::Result;
use crate::masking::{self, Mask};
use crate::nn::decoder::{Decoder, DecoderConfig, DecoderTokens};
use crate::nn::vit::{Tokens, Vit, VitConfig};
use crate::nn::{Scope, Start, flops};
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};

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
    decoder_config: DecoderConfig,
    mask_ratio: f64,
    norm_pix: Option<f64>,
}

impl Mae {
    pub fn new(c: MaeConfig, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        let tokens = Tokens::new(&mut b, &c.encoder)?;
        let decoder_tokens = DecoderTokens::new(&mut b, &c.decoder, &c.encoder)?;
        let encoder = Vit::new(&mut b, c.encoder, tokens, true, Start::Xavier)?;
        let decoder = Decoder::new(&mut b, &c.decoder, &encoder.config, decoder_tokens, Start::Xavier)?;
        Ok(Self {
            params: b.build(dtype, rng)?,
            encoder,
            decoder,
            decoder_config: c.decoder,
            mask_ratio: c.mask_ratio,
            norm_pix: c.norm_pix,
        })
    }

    /// The random mask of a batch of this size.
    pub fn mask(&self, batch: usize, rng: &Rng) -> Result<Mask> {
        let patches = self.encoder.config.patches();
        let noise = Tensor::drawn(self.params.device(), rng, "mask", &[batch, patches])?;
        masking::random(&noise, masking::len_keep(patches, self.mask_ratio)?)
    }

    /// What the decoder is compared with: the pixels of all patches, [B, L, P].
    pub fn target(&self, images: &Tensor) -> Result<Tensor> {
        pixels::targets(&images.on(self.params.device())?.cast(self.params.dtype())?, self.encoder.config.patch, self.norm_pix)
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
        let mask = self.mask(images.shape()[0], rng)?;
        let latent = self.encoder.forward(&s, &images, Some(&mask.kept))?; // [B, 1 + K, C]
        let pred = self.decoder.forward(&s, &latent, &mask.restore)?; // [B, L, P]
        Ok(Loss::single("pixels", self.reconstruction(&pred, &images, &mask)?))
    }

    fn encoder(&self) -> &Vit {
        &self.encoder
    }

    fn macs(&self) -> [u64; 2] {
        let kept = masking::len_keep(self.encoder.config.patches(), self.mask_ratio).unwrap_or(0);
        let all = flops::vit_macs(&self.encoder.config, kept) + flops::decoder_macs(&self.decoder_config, &self.encoder.config, kept);
        [all, all]
    }
}
