//! Cases of ConViT's pre-training: ConvMAE, and DMJD with its masks.

use super::case::{Case, Fields, check_tokens};
use super::compare::Record;
use super::hog::planes;
use super::steps::{self, Place, Subject};
use super::{convmae, mae};
use crate::error::Result;
use crate::masking::Mask;
use crate::masking::disjoint::{Disjoint, Rates};
use crate::methods::baseline;
use crate::methods::dmjd::{Dmjd, DmjdConfig, VisibleHead, VisibleOrder};
use crate::methods::mae::{Mae, MaeConfig};
use crate::methods::target::{Kind, LossType, Targets};
use crate::methods::{Batch, Loss};
use crate::nn::Scope;
use crate::nn::decoder::DecoderConfig;
use crate::nn::vit::{Position, Vit, VitConfig};
use crate::optim::groups::Group;
use crate::param::Params;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};
use std::collections::BTreeMap;

/// Encoder and decoder of a case, about as large as the weights that its file holds.
fn networks(case: &Case, model: &Fields) -> Result<(VitConfig, DecoderConfig)> {
    let (encoder, decoder) = (convmae::encoder_config(model, Position::SinCos, true)?, decoder(model)?);
    let (width, hidden) = (decoder.width, (decoder.width as f64 * encoder.decoder_mlp_ratio()) as usize);
    convmae::check_size(
        case,
        &encoder,
        &[&[encoder.patches(), width], &[decoder.depth, 4, width, width], &[decoder.depth, 2, width, hidden]],
    )?;
    Ok((encoder, decoder))
}

fn decoder(model: &Fields) -> Result<DecoderConfig> {
    let decoder = DecoderConfig {
        width: model.size("decoder_embed_dim")?,
        depth: model.size("decoder_depth")?,
        heads: model.size("decoder_num_heads")?,
    };
    decoder.check()?;
    Ok(decoder)
}

/// What a case names must be what we count.
fn same(options: &Fields, field: &str, ours: usize) -> Result<()> {
    let theirs = options.size_or(field, ours)?;
    ensure!(theirs == ours, "{field} is {ours} but options.{field} is {theirs}");
    Ok(())
}

/// What the stages give everywhere and the blocks where patches are seen; the tape sees nothing of it.
fn inner(at: &Place, (encoder, params): (&Vit, &Params), images: &Tensor, mask: &Mask, record: &mut Record) -> Result<()> {
    let off = Tape::off();
    let s = Scope::new(&off, params);
    let mut found = Vec::new();
    let mut see = |stage: usize, block: usize, x: &Var| found.push((format!("stage{}_block{block}", stage + 1), stage, x.value().clone()));
    let seen = encoder.embed_view(&s, images, &baseline::view(mask, true), &mut see)?;
    let Some(stages) = &encoder.config.stages else { bail!("the encoder has no convolution stages") };
    for (name, stage, tokens) in found {
        let (layout, [rows, columns]) = (stages.layout(stage), encoder.config.grid());
        let (side, width, batch) = (layout.side, tokens.last(), tokens.shape()[0]);
        let (values, [height, wide]) = (tokens.read()?, [rows * side, columns * side]);
        let mut map = vec![0.0; values.len()];
        for (row, value) in values.chunks_exact(width).enumerate() {
            let (region, [y, x]) = (row / layout.tokens() % (rows * columns), layout.position(row % layout.tokens()));
            let (image, y, x) = (row / (layout.tokens() * rows * columns), region / columns * side + y, region % columns * side + x);
            for (channel, &value) in value.iter().enumerate() {
                map[((image * width + channel) * height + y) * wide + x] = value;
            }
        }
        record.numbers(at.output(&name), &[batch, width, height, wide], map);
    }
    let x = encoder.blocks_seen(&s, &seen.tokens, |i, x| record.tensor(at.output(&format!("stage3_block{i}")), x.value()))?;
    record.tensor(at.output("latent"), encoder.finish(&s, &x, seen.fused.as_ref())?.value());
    Ok(())
}

/// Predictions, and what is kept of them where all would be too many.
fn predictions(at: &Place, pred: &Tensor, record: &mut Record) -> Result<()> {
    record.tensor(at.output("pred"), pred);
    let &[batch, tokens, width] = pred.shape() else { bail!("predictions are {pred:?}") };
    let (values, first) = (pred.read()?, tokens.min(8));
    let means = values.chunks_exact(width).map(|row| row.iter().sum::<f64>() / width as f64).collect();
    record.numbers(at.output("pred_per_token_mean"), &[batch, tokens], means);
    let some = values.chunks_exact(tokens * width).flat_map(|image| image[..first * width].to_vec()).collect();
    record.numbers(at.output("pred_first8"), &[batch, first, width], some);
    Ok(())
}

struct ConvMae<'a> {
    case: &'a Case,
    mae: Mae,
}

pub fn convmae(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let (model, options) = (case.part("model")?, case.part("options")?);
    let (encoder, decoder) = networks(case, &model)?;
    same(&options, "target_patch", encoder.patch)?;
    let norm_pix = options.flag_or("norm_pix_loss", model.flag_or("norm_pix_loss", false)?)?.then_some(pixels::EPS);
    let config = MaeConfig { encoder, decoder, mask_ratio: options.number("mask_ratio")?, norm_pix };
    let mut mae = Mae::new(config, dtype, &Rng::new(0))?;
    same(&options, "len_keep", mae.kept_each())?;
    steps::load(case, "w/", &mut mae.params)?;
    steps::run(case, &mut ConvMae { case, mae }, record)
}

impl Subject for ConvMae<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.mae.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let mae = &self.mae;
        let images = self.case.images(&at.input("images"), mae.params.dtype())?;
        let mask = mae::mask(self.case, mae, &images, at, record)?;
        inner(at, (&mae.encoder, &mae.params), &images, &mask, record)?;
        let s = Scope::new(tape, &mae.params);
        let latent = mae.latent(&s, &images, &mask)?;
        record.tensor(at.output("latent"), latent.value());
        let pred = mae.decoder.forward(&s, &latent, &mask.restore)?;
        predictions(at, pred.value(), record)?;
        mae.reconstruction(&pred, &images, &mask)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        mae::groups(&self.mae.params, self.mae.encoder.config.depth, optim)
    }
}

/// The views that options describe.
fn views(options: &Fields, grid: [usize; 2]) -> Result<Disjoint> {
    let side = if options.text("mask_type")? == "rand" { 1 } else { 2 };
    let rates = Rates { corruption: options.number("mask_ratio")?, prediction: options.number_or("pred_ratio", 1.0)?, views: 2 };
    let views = Disjoint::new(grid, side, rates)?;
    same(options, "len_keep", views.kept_each())?;
    same(options, "num_extra", views.kept_each() + views.predicted() - views.patches())?;
    Ok(views)
}

/// Numbers whose order is this permutation, and its inverse by the place that each takes.
fn noise_of(case: &Case, name: &str) -> Result<Vec<f32>> {
    let permutation = case.labels(name)?;
    let mut noise = vec![f32::NAN; permutation.len()];
    for (i, &at) in permutation.iter().enumerate() {
        let place = noise.get_mut(at as usize).filter(|place| place.is_nan());
        ensure!(place.is_some(), "{name} is no permutation: {at} lies beyond it or stands twice");
        place.into_iter().for_each(|place| *place = i as f32);
    }
    Ok(noise)
}

/// What is drawn for two views, out of the file.
fn recorded(case: &Case, name: impl Fn(&str) -> String) -> Result<Rng> {
    let drawn = [
        ("mask".to_string(), case.floats(&name("noise"))?),
        ("view 2 seen".to_string(), noise_of(case, &name("perm_disj"))?),
        ("view 2 hidden".to_string(), noise_of(case, &name("perm_joint"))?),
    ];
    Ok(Rng::replaying(BTreeMap::from(drawn)))
}

fn record_mask(mask: &Mask, name: impl Fn(&str) -> String, record: &mut Record) {
    let indices = [("ids_keep", &mask.kept), ("ids_restore", &mask.restore), ("mask", &mask.hidden)];
    indices.into_iter().for_each(|(what, tensor)| record.tensor(name(what), tensor));
}

fn masks(case: &Case, options: &Fields, record: &mut Record) -> Result<()> {
    for (i, spec) in options.objects("specs")?.iter().enumerate() {
        let patches = spec.size("num_patches")?;
        check_tokens(patches)?;
        let side = patches.isqrt();
        ensure!(side * side == patches, "options.specs[{i}].num_patches is {patches}, which is no square grid");
        let rng = recorded(case, |what| format!("in/{i}/{what}"))?;
        let mask = views(spec, [side, side])?.draw(spec.size("batch")?, &case.device, &rng)?;
        record_mask(&mask, |what| format!("out/{i}/{what}"), record);
    }
    Ok(())
}

struct Views<'a> {
    case: &'a Case,
    dmjd: Dmjd,
    order: VisibleOrder,
}

fn loss_type(options: &Fields, key: &str, default: &str) -> Result<LossType> {
    match if options.has(key) { options.text(key)? } else { default } {
        "smooth_l1" => Ok(LossType::SmoothL1),
        _ => Ok(LossType::L2),
    }
}

pub fn dmjd(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let (model, options) = (case.part("model")?, case.part("options")?);
    if options.has("op") {
        let op = options.text("op")?;
        ensure!(op == "disjoint_masks", "there is no operation {op:?} of dmjd");
        return masks(case, &options, record);
    }
    let (encoder, decoder) = networks(case, &model)?;
    let targets = Targets::new(Kind::Hog, &encoder, pixels::EPS, None)?;
    same(&model, "decoder_pred_dim", targets.width)?;
    let order = match options.text("vis_target_order")? {
        text if text.starts_with("raster") => VisibleOrder::Released,
        text if text.starts_with("keep_order") => VisibleOrder::Aligned,
        other => bail!("options.vis_target_order is {other:?}; it starts with raster or keep_order"),
    };
    let config = DmjdConfig {
        views: views(&options, encoder.grid())?,
        encoder,
        decoder: Some(decoder),
        targets,
        head: VisibleHead::Projector,
        theta: options.number_or("theta", 1.0)?,
        losses: [loss_type(&options, "mim_loss_type", "l2")?, loss_type(&options, "vis_loss_type", "smooth_l1")?],
        beta: options.number_or("smooth_l1_beta", 2.0)?,
        order,
        dense: false,
    };
    let mut dmjd = Dmjd::new(config, dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut dmjd.params)?;
    steps::run(case, &mut Views { case, dmjd, order }, record)
}

impl Views<'_> {
    /// The bytes of a batch; in f64 as numbers of that type.
    fn bytes(&self, name: &str) -> Result<Tensor> {
        if self.dmjd.params.dtype() == Dtype::F64 {
            return planes(self.case, name, Dtype::F64);
        }
        let numbers = self.case.tensor(name, Dtype::F32)?;
        let bytes: Vec<u8> = numbers.read()?.into_iter().map(|byte| byte as u8).collect();
        Tensor::from_slice(numbers.shape(), &bytes)?.on(&self.case.device)
    }
}

impl Subject for Views<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.dmjd.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let dmjd = &self.dmjd;
        let images = self.case.images(&at.input("images"), dmjd.params.dtype())?;
        let batch = Batch { bytes: Some(self.bytes(&at.input("image_u8_nhwc"))?), ..Batch::of_images(images) };
        let pass = dmjd.pass(&Scope::new(tape, &dmjd.params), &batch, &recorded(self.case, |what| at.input(what))?)?;
        record_mask(&pass.mask, |what| at.output(what), record);
        inner(at, (dmjd.model.encoder(), &dmjd.params), &batch.images, &pass.mask, record)?;
        record.tensor(at.output("target"), &pass.target);
        record.tensor(at.output("latent"), pass.latent.value());
        predictions(at, pass.predicted.value(), record)?;
        record.tensor(at.output("pred_vis"), pass.predicted_visible.value());
        record.tensor(at.output("loss_mim"), pass.invisible.value());
        for (name, order) in [("loss_vis", VisibleOrder::Released), ("alt_loss_vis_aligned", VisibleOrder::Aligned)] {
            let target = dmjd.visible_target(&pass.target, &pass.mask, order)?;
            let loss = dmjd.visible_loss(&Var::constant(pass.predicted_visible.value().clone()), &target)?;
            record.tensor(at.output(name), loss.value());
            if order == self.order {
                record.tensor(at.output(name), pass.visible.value());
            }
        }
        Ok(Loss::sum(vec![("invisible", 1.0, pass.invisible), ("visible", dmjd.theta(), pass.visible)])?.total)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        mae::groups(&self.dmjd.params, self.dmjd.model.encoder().config.depth, optim)
    }
}
