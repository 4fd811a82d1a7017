//! Cases of masked autoencoders.

use super::case::{Case, Fields};
use super::compare::Record;
use super::steps::{self, Place, Subject};
use super::vit::encoder_config;
use crate::ensure;
use crate::error::Result;
use crate::masking::{self, Mask};
use crate::methods::mae::{Mae, MaeConfig};
use crate::nn::Scope;
use crate::nn::decoder::DecoderConfig;
use crate::nn::vit::{Position, VitConfig};
use crate::optim::groups::{self, Group};
use crate::param::Params;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use std::collections::BTreeMap;

struct Autoencoder<'a> {
    case: &'a Case,
    mae: Mae,
}

/// The autoencoder that a description means, whose weights the file holds under a prefix.
pub fn autoencoder(case: &Case, model: &Fields, prefix: &str) -> Result<(VitConfig, DecoderConfig)> {
    let encoder = encoder_config(model, Position::SinCos)?;
    let decoder = DecoderConfig {
        width: model.size("decoder_embed_dim")?,
        depth: model.size("decoder_depth")?,
        heads: model.size("decoder_num_heads")?,
    };
    let (w, d, values) = (encoder.width, decoder.width, encoder.patch_values());
    let (hidden, decoder_hidden) = (encoder.block(0).hidden, (d as f64 * encoder.mlp_ratio) as usize);
    let parts: [&[usize]; 8] = [
        &[encoder.positions(), w],
        &[encoder.positions(), d],
        &[values, w],
        &[values, d],
        &[encoder.depth, 4, w, w],
        &[encoder.depth, 2, w, hidden],
        &[decoder.depth, 4, d, d],
        &[decoder.depth, 2, d, decoder_hidden],
    ];
    case.check_size(prefix, &parts)?;
    Ok((encoder, decoder))
}

/// The student that a case describes.
pub fn config(case: &Case) -> Result<MaeConfig> {
    let (model, options) = (case.part("model")?, case.part("options")?);
    let (encoder, decoder) = autoencoder(case, &model, "w/")?;
    let patches = encoder.patches();
    let mask_ratio = options.number("mask_ratio")?;
    let kept = masking::len_keep(patches, mask_ratio)?;
    for (field, ours) in [("len_keep", kept), ("num_patches", patches)] {
        let theirs = options.size_or(field, ours)?;
        ensure!(theirs == ours, "{field} is {ours} but options.{field} is {theirs}");
    }
    let norm_pix = options.flag_or("norm_pix_loss", model.flag_or("norm_pix_loss", false)?)?;
    Ok(MaeConfig { encoder, decoder, mask_ratio, norm_pix: norm_pix.then_some(pixels::EPS) })
}

pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let mut mae = Mae::new(config(case)?, dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut mae.params)?;
    steps::run(case, &mut Autoencoder { case, mae }, record)
}

/// The mask of a batch from the noise that the file holds, recorded.
pub fn mask(case: &Case, mae: &Mae, images: &Tensor, at: &Place, record: &mut Record) -> Result<Mask> {
    let noise = case.floats(&at.input("noise"))?;
    let mask = mae.mask(images.shape()[0], &Rng::replaying(BTreeMap::from([("mask".to_string(), noise)])))?;
    let indices = [("ids_keep", &mask.kept), ("ids_shuffle", &mask.shuffle), ("ids_restore", &mask.restore), ("mask", &mask.hidden)];
    indices.into_iter().for_each(|(name, tensor)| record.tensor(at.output(name), tensor));
    Ok(mask)
}

/// The groups of an autoencoder's parameters.
pub fn groups(params: &Params, depth: usize, optim: &Fields) -> Result<Vec<Vec<Group>>> {
    let weight_decay = optim.number_or("weight_decay", 0.0)?;
    if optim.has("layer_decay") {
        return Ok(vec![steps::layer_groups(params, optim.number("layer_decay")?, weight_decay, depth)?]);
    }
    Ok(vec![groups::by_decay(params, weight_decay, &[])])
}

impl Subject for Autoencoder<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.mae.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let (mae, extra) = (&self.mae, self.mae.encoder.config.extra());
        let images = self.case.images(&at.input("images"), mae.params.dtype())?;
        let mask = mask(self.case, mae, &images, at, record)?;

        let off = Tape::off();
        let all = mae.encoder.embed(&Scope::new(&off, &mae.params), &images, None)?;
        record.tensor(at.output("patch_tokens"), all.tokens(extra..all.shape()[1])?.value());

        let s = Scope::new(tape, &mae.params);
        let x = mae.encoder.embed(&s, &images, Some(&mask.kept))?;
        let x = mae.encoder.blocks_seen(&s, &x, |i, x| record.tensor(at.output(&format!("enc_block{i}")), x.value()))?;
        let latent = mae.encoder.norm(&s, &x)?;
        record.tensor(at.output("latent"), latent.value());
        let seen = |i: usize, y: &Var| record.tensor(at.output(&format!("dec_block{i}")), y.value());
        let pred = mae.decoder.forward_seen(&s, &latent, &mask.restore, seen)?;
        record.tensor(at.output("pred"), pred.value());
        let target: Tensor = mae.target(&images)?;
        record.tensor(at.output("target"), &target);
        mae.reconstruction(&pred, &images, &mask)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        groups(&self.mae.params, self.mae.encoder.config.depth, optim)
    }
}
