//! Cases of classifiers and of linear probes.

use super::case::{Case, Fields, check_tokens};
use super::compare::Record;
use super::steps::{self, Place, Subject};
use crate::error::Result;
use crate::nn::Scope;
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::vit::{DropPath, Position, VitConfig};
use crate::optim::groups::{self, Group};
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::Dtype;
use crate::{bail, ensure};

/// What a case's `model` says of its vision transformer.
pub fn encoder_config(model: &Fields, position: Position) -> Result<VitConfig> {
    let [patch, width_of_patch] = model.sides("patch_size")?;
    ensure!(patch == width_of_patch, "patches of {patch} x {width_of_patch} are not square");
    let mlp_ratio = model.number_or("mlp_ratio", 4.0)?;
    ensure!(mlp_ratio > 0.0 && mlp_ratio <= 1024.0, "model.mlp_ratio is {mlp_ratio}; it is above 0 and at most 1024");
    let eps = model.number_or("norm_eps", 1e-6)?;
    ensure!((0.0..).contains(&eps), "model.norm_eps is {eps}; it cannot be negative");
    let config = VitConfig {
        image: model.sides("image_size")?,
        patch,
        channels: model.size_or("in_chans", 3)?,
        width: model.size("embed_dim")?,
        depth: model.size("depth")?,
        heads: model.size("num_heads")?,
        last_heads: None,
        mlp_ratio,
        eps,
        qkv_bias: model.flag_or("qkv_bias", true)?,
        position,
        class_token: true,
        stages: None,
        distillation_token: model.has("kind") && model.text("kind")? == "deit_distilled",
        layer_scale: None,
        drop_path: DropPath::Constant(0.0),
    };
    config.check()?;
    check_tokens(config.positions())?;
    Ok(config)
}

struct Model<'a> {
    case: &'a Case,
    params: Params,
    classifier: Classifier,
}

pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let (model, options) = (case.part("model")?, case.part("options")?);
    let probe = case.fields()?.text("method")? == "linprobe";
    let vit = encoder_config(&model, Position::Learned)?;
    let classes = model.size("num_classes")?;
    let (w, hidden) = (vit.width, vit.block(0).hidden);
    case.check_size(
        "w/",
        &[&[vit.positions(), w], &[vit.patch_values(), w], &[vit.depth, 4, w, w], &[vit.depth, 2, w, hidden], &[classes, w]],
    )?;
    if probe {
        let fixed = options.number_or("bn_eps", 1e-6)? == 1e-6 && options.number_or("bn_momentum", 0.1)? == 0.1;
        ensure!(fixed && !options.flag_or("bn_affine", false)?, "a probe's batch norm has eps 1e-6, momentum 0.1 and no weights");
    }
    let pool = if model.flag_or("global_pool", false)? { Pool::Mean } else { Pool::ClassToken };
    let mut builder = ParamsBuilder::default();
    let classifier = Classifier::new(&mut builder, ClassifierConfig { vit, classes, pool, probe })?;
    let mut params = builder.build(dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut params)?;
    if probe {
        Classifier::train_head_only(&mut params);
    }
    let mut subject = Model { case, params, classifier };
    steps::run(case, &mut subject, record)?;
    if case.file.contains("in/eval_images") {
        let images = case.images("in/eval_images", dtype)?;
        let off = Tape::off();
        let output = subject.classifier.forward(&Scope::new(&off, &subject.params), &images, None, false)?;
        record.tensor("out/eval_logits".to_string(), output.evaluated()?.value());
    }
    Ok(())
}

impl Subject for Model<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let images = self.case.images(&at.input("images"), self.params.dtype())?;
        let (s, vit) = (Scope::new(tape, &self.params), &self.classifier.vit);
        let x = vit.embed(&s, &images, None)?;
        let x = vit.blocks_seen(&s, &x, |i, x| record.tensor(at.output(&format!("block{i}")), x.value()))?;
        let output = self.classifier.head(&s, &x, true)?;
        record.tensor(at.output("features"), output.features.value());
        record.tensor(at.output("logits"), output.logits.value());
        if let Some(distillation) = &output.distillation {
            record.tensor(at.output("logits_dist"), distillation.value());
            record.tensor(at.output("eval_logits"), output.evaluated()?.value());
        }
        let loss = base_loss(self.case, "loss", at, &output.logits)?;
        if let Some(statistics) = &output.statistics {
            self.classifier.update_statistics(&mut self.params, statistics, images.shape()[0])?;
        }
        Ok(loss)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        let weight_decay = optim.number_or("weight_decay", 0.0)?;
        let options = self.case.part("options")?;
        let source = if optim.has("layer_decay") { optim } else { &options };
        if source.has("layer_decay") {
            let depth = self.classifier.vit.config.depth;
            return Ok(vec![steps::layer_groups(&self.params, source.number("layer_decay")?, weight_decay, depth)?]);
        }
        decay_groups(&self.params, optim)
    }
}

/// Groups by weight decay: with the tokens and the table decayed, without any of them, and without all but the distillation token.
pub fn decay_groups(params: &Params, optim: &Fields) -> Result<Vec<Vec<Group>>> {
    let weight_decay = optim.number_or("weight_decay", 0.0)?;
    let skipped: [&[&str]; 3] = [&[], &["pos_embed", "cls_token", "dist_token"], &["pos_embed", "cls_token"]];
    Ok(skipped.map(|skipped| groups::by_decay(params, weight_decay, skipped)).to_vec())
}

/// The classification loss that this field of the options names.
pub fn base_loss(case: &Case, field: &str, at: &Place, logits: &Var) -> Result<Var> {
    let options = case.part("options")?;
    let kind = if options.has(field) { options.text(field)? } else { "ce" };
    match kind {
        "ce" => logits.cross_entropy(&case.labels(&at.input("labels"))?, 0.0),
        "label_smoothing_ce" => logits.cross_entropy(&case.labels(&at.input("labels"))?, options.number("smoothing")?),
        "soft_target_ce" => logits.cross_entropy_soft(&case.tensor(&at.input("targets"), logits.dtype())?),
        other => bail!("options.{field} is {other:?}; there are ce, label_smoothing_ce and soft_target_ce"),
    }
}
