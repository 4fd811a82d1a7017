//! What sees some patches of an image and says something about all of them: the models that DMJD trains.
//!
//!   autoencoder   MAE's and ConvMAE's: the encoder sees the kept patches alone, a decoder with mask tokens predicts
//!   MaskFeat      (arXiv 2112.09133) the encoder sees all patches, a learned token where one is hidden; a linear layer on its tokens predicts

use crate::error::{Error, Result};
use crate::masking::Mask;
use crate::nn::decoder::{Decoder, DecoderConfig, DecoderTokens};
use crate::nn::linear::Linear;
use crate::nn::stages::View;
use crate::nn::vit::{Tokens, Vit, VitConfig};
use crate::nn::{Scope, Start, flops};
use crate::param::{Init, ParamId, ParamsBuilder};
use crate::tape::Var;
use crate::tensor::Tensor;

/// What the encoder sees under a mask; `dense` where convolution stages are computed everywhere.
pub fn view(mask: &Mask, dense: bool) -> View<'_> {
    View { kept: &mask.kept, restore: &mask.restore, hidden: &mask.hidden, dense }
}

pub enum Baseline {
    Autoencoder { encoder: Box<Vit>, decoder: Box<Decoder> },
    MaskFeat { encoder: Box<Vit>, token: ParamId, head: Linear },
}

/// What is said about images, of M views of each.
pub struct Answer {
    /// Behind the encoder, the kept patches in their order: [M B, K, C].
    pub visible: Var,
    /// Predictions of all patches, [M B, L, P].
    pub predicted: Var,
}

impl Baseline {
    /// With a decoder, or without one as MaskFeat is; it predicts `out` numbers of each patch.
    pub fn new(b: &mut ParamsBuilder, encoder: VitConfig, decoder: Option<&DecoderConfig>, out: usize) -> Result<Self> {
        let (start, tokens) = (Start::Xavier, Tokens::new(b, &encoder)?);
        let Some(decoder) = decoder else {
            if encoder.stages.is_some() {
                return Err(Error::usage(
                    "MaskFeat puts tokens in the place of patches, which convolution stages do not allow; take a ViT",
                ));
            }
            let (width, token) = (encoder.width, b.add("mask_token", &[1, 1, encoder.width], Init::Normal(0.02))?);
            let encoder = Box::new(Vit::new(b, encoder, tokens, true, start)?);
            return Ok(Self::MaskFeat { encoder, token, head: Linear::new(b, "decoder_pred", width, out, start.linear(width, out))? });
        };
        let decoder_tokens = DecoderTokens::new(b, decoder, &encoder)?;
        let encoder = Vit::new(b, encoder, tokens, true, start)?;
        let decoder = Decoder::predicting(out, b, decoder, &encoder.config, decoder_tokens, start)?;
        Ok(Self::Autoencoder { encoder: Box::new(encoder), decoder: Box::new(decoder) })
    }

    pub fn encoder(&self) -> &Vit {
        match self {
            Self::Autoencoder { encoder, .. } | Self::MaskFeat { encoder, .. } => encoder,
        }
    }

    pub fn answer(&self, s: &Scope, images: &Tensor, mask: &Mask, dense: bool) -> Result<Answer> {
        let (view, extra) = (view(mask, dense), self.encoder().config.extra());
        match self {
            Self::Autoencoder { encoder, decoder } => {
                let latent = encoder.encode(s, images, &view)?; // [M B, extra + K, C]
                let predicted = decoder.forward(s, &latent, &mask.restore)?;
                let visible = if extra == 0 { latent } else { latent.tokens(extra..latent.shape()[1])? };
                Ok(Answer { visible, predicted })
            }
            Self::MaskFeat { encoder, token, head } => {
                let x = encoder.embed_hiding(s, images, &view, &s.param(*token))?; // [M B, extra + L, C]
                let x = encoder.norm(s, &encoder.blocks(s, &x)?)?;
                let patches = x.tokens(extra..x.shape()[1])?;
                Ok(Answer { visible: patches.gather(&mask.kept)?, predicted: head.forward(s, &patches)? })
            }
        }
    }

    /// Multiply-accumulates of one view of an image that keeps so many patches: of the encoder, and of what predicts.
    pub fn macs(&self, kept: usize, out: usize) -> [u64; 2] {
        let config = &self.encoder().config;
        match self {
            Self::Autoencoder { decoder, .. } => [flops::vit_macs(config, kept), flops::predictor_macs(&decoder.config, config, out, kept)],
            Self::MaskFeat { .. } => {
                let unseen = ((config.patches() - kept) * config.patch_values() * config.width) as u64;
                [flops::vit_macs(config, config.patches()) - unseen, (config.patches() * config.width * out) as u64]
            }
        }
    }
}
