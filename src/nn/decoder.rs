//! MAE's decoder: mask tokens put where patches are hidden, a few narrow blocks, pixels or other targets out.

use super::block::{Block, BlockConfig};
use super::linear::Linear;
use super::norm::Norm;
use super::vit::VitConfig;
use super::{Scope, Start, position};
use crate::error::{Error, Result};
use crate::param::{Init, ParamId, ParamsBuilder, Role};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::trace;

#[derive(Clone, Debug)]
pub struct DecoderConfig {
    pub width: usize,
    pub depth: usize,
    pub heads: usize,
}

impl DecoderConfig {
    pub fn check(&self) -> Result<()> {
        let (width, heads) = (self.width, self.heads);
        if width == 0 || heads == 0 || !width.is_multiple_of(4) || !width.is_multiple_of(heads) {
            return Err(Error::usage(format!("--decoder-dim {width} has to be a multiple of 4 and of --decoder-heads {heads}")));
        }
        Ok(())
    }
}

/// The mask token and the position table, which the state dict names before the encoder's weights.
pub struct DecoderTokens {
    mask: ParamId,
    position: ParamId,
}

impl DecoderTokens {
    pub fn new(b: &mut ParamsBuilder, c: &DecoderConfig, encoder: &VitConfig) -> Result<Self> {
        let mask = b.add("mask_token", &[1, 1, c.width], Init::Normal(0.02))?;
        let table = position::sincos(encoder.grid(), c.width, encoder.extra())?;
        let shape = [1, encoder.patches() + encoder.extra(), c.width];
        let position = b.add_as("decoder_pos_embed", &shape, Init::Table(table), Role::Frozen)?;
        Ok(Self { mask, position })
    }
}

pub struct Decoder {
    pub config: DecoderConfig,
    tokens: DecoderTokens,
    extra: usize,
    patches: usize,
    embed: Linear,
    blocks: Vec<Block>,
    norm: Norm,
    pred: Linear,
}

impl Decoder {
    /// A decoder that predicts pixels.
    pub fn new(b: &mut ParamsBuilder, c: &DecoderConfig, encoder: &VitConfig, tokens: DecoderTokens, start: Start) -> Result<Self> {
        Self::predicting(encoder.patch_values(), b, c, encoder, tokens, start)
    }

    /// A decoder that predicts `out` numbers of each patch.
    pub fn predicting(
        out: usize,
        b: &mut ParamsBuilder,
        c: &DecoderConfig,
        encoder: &VitConfig,
        tokens: DecoderTokens,
        start: Start,
    ) -> Result<Self> {
        let block = BlockConfig {
            width: c.width,
            heads: c.heads,
            hidden: (c.width as f64 * encoder.decoder_mlp_ratio()) as usize,
            eps: encoder.eps,
            qkv_bias: encoder.qkv_bias,
            layer_scale: None,
            drop_path: 0.0,
        };
        Ok(Self {
            config: c.clone(),
            tokens,
            extra: encoder.extra(),
            patches: encoder.patches(),
            embed: Linear::new(b, "decoder_embed", encoder.width, c.width, start.linear(encoder.width, c.width))?,
            blocks: (0..c.depth).map(|i| Block::new(b, &format!("decoder_blocks.{i}"), &block, start)).collect::<Result<_>>()?,
            norm: Norm::new(b, "decoder_norm", c.width, encoder.eps)?,
            pred: Linear::new(b, "decoder_pred", c.width, out, start.linear(c.width, out))?,
        })
    }

    /// Predictions for all patches [B, L, P] from the latent [B, extra + K, C]; `see` is shown what each block gives.
    pub fn forward_seen(&self, s: &Scope, latent: &Var, restore: &Tensor, mut see: impl FnMut(usize, &Var)) -> Result<Var> {
        let _phase = trace::phase("decoder");
        let y = self.embed.forward(s, latent)?; // [B, extra + K, D]
        let (mask, table) = (s.param(self.tokens.mask), s.param(self.tokens.position));
        let mut y = y.unshuffle_with_positions(&mask, restore, self.extra, &table)?; // [B, extra + L, D]
        for (i, block) in self.blocks.iter().enumerate() {
            y = block.forward(s, &y)?;
            see(i, &y);
        }
        let y = self.norm.forward(s, &y.tokens(self.extra..self.extra + self.patches)?)?;
        self.pred.forward(s, &y) // [B, L, P]
    }

    pub fn forward(&self, s: &Scope, latent: &Var, restore: &Tensor) -> Result<Var> {
        self.forward_seen(s, latent, restore, |_, _| ())
    }
}
