//! Cases of ConViT: its classifiers.

use super::case::{Case, Fields, check_tokens};
use super::compare::Record;
use super::steps::{self, Place, Subject};
use super::vit::{base_loss, decay_groups};
use crate::error::{Error, Result};
use crate::nn::Scope;
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::convit::STAGE_EPS;
use crate::nn::stages::StagesConfig;
use crate::nn::vit::{Position, VitConfig};
use crate::optim::groups::Group;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::Dtype;
use crate::{bail, ensure};

/// What a case's `model` says of a ConViT: lists have an entry for each stage. `fused` as in pre-training.
pub fn encoder_config(model: &Fields, position: Position, fused: bool) -> Result<VitConfig> {
    let three = |key: &str| -> Result<[usize; 3]> {
        let sizes = model.sizes(key)?;
        let count = sizes.len();
        sizes.try_into().map_err(|_| Error::new(format!("model.{key} has {count} entries but ConViT has 3 stages")))
    };
    let [e1, e2, width] = three("embed_dim")?;
    let [d1, d2, depth] = three("depth")?;
    let patches = three("patch_size")?;
    let ratios = model.numbers("mlp_ratio")?;
    let &[r1, r2, mlp_ratio] = &ratios[..] else { bail!("model.mlp_ratio has {} entries but ConViT has 3 stages", ratios.len()) };
    ensure!(ratios.iter().all(|ratio| *ratio > 0.0 && *ratio <= 1024.0), "model.mlp_ratio is {ratios:?}; each is above 0 and at most 1024");
    let [eps, stage_eps] = [model.number_or("norm_eps", 1e-6)?, model.number_or("stage_norm_eps", STAGE_EPS)?];
    ensure!(eps >= 0.0 && stage_eps >= 0.0, "model.norm_eps is {eps} and model.stage_norm_eps {stage_eps}; they cannot be negative");
    let image = images(model, patches)?;
    let stages = StagesConfig { patches, widths: [e1, e2], depths: [d1, d2], mlp_ratios: [r1, r2], eps: stage_eps, fused };
    let config = VitConfig {
        image,
        channels: model.size_or("in_chans", 3)?,
        mlp_ratio,
        eps,
        qkv_bias: model.flag_or("qkv_bias", true)?,
        position,
        class_token: false,
        ..VitConfig::new(image[0], product(patches)?, width, depth, model.size("num_heads")?)
    };
    let finest = patches[1].saturating_mul(patches[2]);
    let config = VitConfig { stages: Some(stages), ..config };
    config.check()?;
    check_tokens(config.positions().saturating_mul(finest.saturating_mul(finest)))?;
    Ok(config)
}

/// Side in pixels of a patch of stage 3.
fn product(patches: [usize; 3]) -> Result<usize> {
    let side = patches.into_iter().try_fold(1usize, |product, patch| product.checked_mul(patch));
    side.ok_or_else(|| Error::new(format!("model.patch_size is {patches:?}, which is too large")))
}

/// Height and width of the images; `image_size` has the input of each embedding.
fn images(model: &Fields, patches: [usize; 3]) -> Result<[usize; 2]> {
    let list = model.list("image_size")?;
    ensure!(list.len() == 3, "model.image_size has {} entries but ConViT has 3 stages", list.len());
    let inputs = [0, 1, 2].map(|stage| model.sides_at("image_size", stage));
    let [first, second, third] = inputs;
    let (first, second, third) = (first?, second?, third?);
    for (stage, (larger, smaller)) in [(first, second), (second, third)].into_iter().enumerate() {
        let fits = [0, 1].into_iter().all(|axis| smaller[axis].checked_mul(patches[stage]) == Some(larger[axis]));
        ensure!(fits, "model.image_size: patches of {} make no input of {smaller:?} of {larger:?}", patches[stage]);
    }
    Ok(first)
}

/// Refuses a model larger than the weights that the file holds.
pub fn check_size(case: &Case, vit: &VitConfig, more: &[&[usize]]) -> Result<()> {
    let Some(stages) = &vit.stages else { bail!("the model has no convolution stages") };
    let ([e1, e2], [h1, h2], w) = (stages.widths, stages.hidden(), vit.width);
    let [p1, p2, p3] = stages.patches;
    let own: [&[usize]; 10] = [
        &[vit.positions(), w],
        &[e1, vit.channels, p1, p1],
        &[e2, e1, p2, p2],
        &[w, e2, p3, p3],
        &[stages.depths[0], 2, e1, e1],
        &[stages.depths[0], 2, e1, h1],
        &[stages.depths[1], 2, e2, e2],
        &[stages.depths[1], 2, e2, h2],
        &[vit.depth, 4, w, w],
        &[vit.depth, 2, w, vit.block(0).hidden],
    ];
    case.check_size("w/", &[&own, more].concat())
}

struct Model<'a> {
    case: &'a Case,
    params: Params,
    classifier: Classifier,
}

/// A classifier, kind `convvit_classifier`.
pub fn classify(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let model = case.part("model")?;
    let vit = encoder_config(&model, Position::LearnedPatches, false)?;
    let classes = model.size("num_classes")?;
    check_size(case, &vit, &[&[classes, vit.width]])?;
    let pool = if model.flag_or("global_pool", false)? { Pool::Mean } else { Pool::ClassToken };
    let mut builder = ParamsBuilder::default();
    let classifier = Classifier::new(&mut builder, ClassifierConfig { vit, classes, pool, probe: false })?;
    let mut params = builder.build(dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut params)?;
    steps::run(case, &mut Model { case, params, classifier }, record)
}

impl Subject for Model<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let images = self.case.images(&at.input("images"), self.params.dtype())?;
        let s = Scope::new(tape, &self.params);
        let vit = &self.classifier.vit;
        let x = vit.embed(&s, &images, None)?;
        let x = vit.blocks_seen(&s, &x, |i, x| record.tensor(at.output(&format!("stage3_block{i}")), x.value()))?;
        let output = self.classifier.head(&s, &x, true)?;
        record.tensor(at.output("features"), output.features.value());
        record.tensor(at.output("logits"), output.logits.value());
        base_loss(self.case, "loss", at, &output.logits)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        let options = self.case.part("options")?;
        let source = if optim.has("layer_decay") { optim } else { &options };
        if !source.has("layer_decay") {
            return decay_groups(&self.params, optim);
        }
        let (weight_decay, depth) = (optim.number_or("weight_decay", 0.0)?, self.classifier.vit.config.depth);
        Ok(vec![steps::layer_groups(&self.params, source.number("layer_decay")?, weight_decay, depth)?])
    }
}
