//! DMJD: Disjoint Masking with Joint Distillation (arXiv 2301.00230).
//!
//! Several views of each image, each hiding what those before it showed, so that one step predicts (nearly) all of the image. On each view two losses:
//!
//!   invisible   sum of mask * mean f(predicted - target) / sum of mask             f: squared error
//!   visible     mean g(predictor(proj_embed(latent)) - target of the kept patches)  g: smooth L1, beta 2
//!   loss        invisible + theta * visible
//!
//! Three models take it: MAE, MaskFeat and ConvMAE ([`baseline`](super::baseline)). The targets are made once an image. `--visible-order released` compares
//! the kept patches in the order of the model with targets in raster order, as the published program does.
//!
//! `masque pretrain dmjd`

use super::baseline::Baseline;
use super::target::{self, Kind, LossType, Targets};
use super::{Batch, Loss, Method};
use crate::error::{Error, Result};
use crate::masking::disjoint::{Disjoint, Rates};
use crate::masking::{self, Mask};
use crate::nn::decoder::DecoderConfig;
use crate::nn::linear::Linear;
use crate::nn::norm::Norm;
use crate::nn::presets::{self, Family};
use crate::nn::vit::{Vit, VitConfig};
use crate::nn::{Scope, Start};
use crate::ops::gather;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::trace;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaselineName {
    /// ConViT: convolution stages, then transformer blocks on the kept patches, and a decoder
    Convmae,
    /// A ViT on the kept patches, and a decoder
    Mae,
    /// A ViT on all patches, a token where one is hidden; linear heads
    Maskfeat,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaskType {
    /// Units of 2 x 2 patches
    Block,
    /// Single patches
    #[value(alias = "random")]
    Rand,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VisibleOrder {
    /// Each kept patch with its own target
    Aligned,
    /// Kept patches in the model's order with targets in raster order, as the published program compares them
    Released,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VisibleHead {
    /// Three layers with norms, then a linear one, as published
    Projector,
    /// A linear layer
    Linear,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StagesName {
    /// For the patches that are seen alone
    #[default]
    Visible,
    /// Everywhere, hidden patches left out afterwards: the same numbers, more work
    Dense,
}

/// The flags of the method, with the program's values.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DmjdArgs {
    /// Which model the two branches are put on
    #[arg(long, value_enum, default_value_t = BaselineName::Convmae)]
    pub baseline: BaselineName,
    /// Model by its published name or its size [default: dmjd_convit_base_patch16_dec8_hog, or mae_vit_base_patch16 of the other baselines]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Side of a patch in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub patch_size: Option<usize>,
    /// Corruption rate: part of the patches that each view hides
    #[arg(long, default_value_t = 0.75, allow_negative_numbers = true, value_name = "RATIO")]
    pub mask_ratio: f64,
    /// Prediction rate: part of the patches that are predicted in at least one view; it scales the learning rate too
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_name = "RATIO")]
    pub pred_ratio: f64,
    /// What is hidden together
    #[arg(long, value_enum, default_value_t = MaskType::Block)]
    pub mask_type: MaskType,
    /// Views of each image
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub num_views: usize,
    /// What is predicted, by both branches
    #[arg(long, value_enum, default_value_t = Kind::Hog)]
    pub pred_type: Kind,
    /// Weight of the loss on visible patches
    #[arg(long, default_value_t = 1.0, value_name = "WEIGHT")]
    pub theta: f64,
    /// How hidden patches are compared
    #[arg(long, value_enum, default_value_t = LossType::L2)]
    pub mim_loss_type: LossType,
    /// How visible patches are compared
    #[arg(long, value_enum, default_value_t = LossType::SmoothL1)]
    pub vis_loss_type: LossType,
    /// From which difference on smooth-l1 is absolute
    #[arg(long, default_value_t = target::BETA, value_name = "BETA")]
    pub smooth_l1_beta: f64,
    /// Which target a visible patch is compared with
    #[arg(long, alias = "vis-align", value_enum, default_value_t = VisibleOrder::Aligned)]
    pub visible_order: VisibleOrder,
    /// What visible patches are predicted by [default: projector; linear of maskfeat]
    #[arg(long, value_enum)]
    pub visible_head: Option<VisibleHead>,
    /// Where convolution stages are computed
    #[arg(long, value_enum, default_value_t = StagesName::Visible)]
    pub stages: StagesName,
    /// What is added to a patch's variance where pixels are normalised patch by patch
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

/// Width of the visible branch where there is no decoder that has one.
const PROJECTION: usize = 512;

impl DmjdArgs {
    pub fn model_name(&self) -> &str {
        self.model.as_deref().unwrap_or(match self.baseline {
            BaselineName::Convmae => "dmjd_convit_base_patch16_dec8_hog",
            _ => "mae_vit_base_patch16",
        })
    }

    pub fn rates(&self) -> Rates {
        Rates { corruption: self.mask_ratio, prediction: self.pred_ratio, views: self.num_views }
    }

    /// The encoder, and a decoder where the baseline has one.
    pub fn networks(&self, image: usize, channels: usize) -> Result<(VitConfig, Option<DecoderConfig>)> {
        let name = self.model_name();
        let named = presets::named(name)?;
        if named.family.is_some_and(|family| matches!(family, Family::Deit | Family::Distilled | Family::Deit3)) {
            return Err(Error::usage(format!(
                "--model {name} is a classifier of DeiT's; DMJD trains a plain ViT or a ConViT: base, convit_base ..."
            )));
        }
        let encoder = named.encoder(image)?;
        let encoder = VitConfig { patch: self.patch_size.unwrap_or(encoder.patch), channels, ..encoder };
        if encoder.stages.is_some() != (self.baseline == BaselineName::Convmae) {
            let (is, take) =
                if encoder.stages.is_some() { ("a ConViT", "--baseline convmae") } else { ("a ViT", "--baseline mae or maskfeat") };
            return Err(Error::usage(format!("--model {name} is {is}; give {take} with it, or another model")));
        }
        encoder.check().map_err(|error| Error::usage(format!("--input-size and --patch-size: {}", error.chain())))?;
        if self.baseline == BaselineName::Maskfeat {
            return Ok((encoder, None));
        }
        let decoder = DecoderConfig {
            width: self.decoder_dim.unwrap_or(named.decoder.width),
            depth: self.decoder_depth.unwrap_or(named.decoder.depth),
            heads: self.decoder_heads.unwrap_or(named.decoder.heads),
        };
        decoder.check()?;
        Ok((encoder, Some(decoder)))
    }

    /// The views of an image's patches.
    pub fn views(&self, encoder: &VitConfig) -> Result<Disjoint> {
        let usage = |text: String| Err(Error::usage(text));
        if self.num_views < 2 {
            return usage(format!(
                "--num-views {}: views are disjoint from each other; masque pretrain mae, maskfeat and convmae have one",
                self.num_views
            ));
        }
        if encoder.stages.is_some() && self.num_views != 2 {
            return usage(format!(
                "--num-views {}: ConViT is trained with 2 views; --baseline mae and maskfeat take any number",
                self.num_views
            ));
        }
        let (side, instead) = if self.mask_type == MaskType::Block { (2, "; or take --mask-type rand") } else { (1, "") };
        let [rows, columns] = encoder.grid();
        if side == 2 && !(rows.is_multiple_of(2) && columns.is_multiple_of(2)) {
            return usage(format!(
                "--mask-type block: {rows} x {columns} patches do not fall into units of 2 x 2; take --mask-type rand or another --input-size"
            ));
        }
        Disjoint::new([rows, columns], side, self.rates()).map_err(|error| {
            Error::usage(format!("--mask-ratio {} and --pred-ratio {}: {}{instead}", self.mask_ratio, self.pred_ratio, error.chain()))
        })
    }

    /// Refuses what cannot be meant, and flags that would say nothing.
    pub fn check(&self, encoder: &VitConfig) -> Result<()> {
        let usage = |text: String| Err(Error::usage(text));
        target::check_loss(self.pred_type, [self.mim_loss_type, self.vis_loss_type], self.smooth_l1_beta, self.norm_pix_eps)?;
        target::check_patch(self.pred_type, encoder)?;
        if !(self.theta.is_finite() && self.theta >= 0.0) {
            return usage(format!("--theta {} is not a number from 0 on", self.theta));
        }
        let decoder =
            [("--decoder-dim", self.decoder_dim), ("--decoder-depth", self.decoder_depth), ("--decoder-heads", self.decoder_heads)];
        if let Some((flag, _)) = decoder.iter().find(|(_, given)| given.is_some()).filter(|_| self.baseline == BaselineName::Maskfeat) {
            return usage(format!("{flag}: --baseline maskfeat has no decoder; leave the flag out"));
        }
        if self.stages == StagesName::Dense && encoder.stages.is_none() {
            return usage(format!("--stages dense: {} is a ViT, which has no convolution stages; leave the flag out", self.model_name()));
        }
        let of_visible = [
            ("--visible-order released", self.visible_order == VisibleOrder::Released),
            ("--visible-head", self.visible_head.is_some()),
            ("--vis-loss-type l2", self.vis_loss_type == LossType::L2),
        ];
        if let Some((flag, _)) = of_visible.iter().find(|(_, typed)| *typed && self.theta == 0.0) {
            return usage(format!("{flag}: with --theta 0 nothing is learned of visible patches; leave one of the two out"));
        }
        Ok(())
    }

    /// The method on these networks.
    pub fn config(&self, networks: (VitConfig, Option<DecoderConfig>), targets: Targets) -> Result<DmjdConfig> {
        self.check(&networks.0)?;
        let (encoder, decoder) = networks;
        let views = self.views(&encoder)?;
        let head = self.visible_head.unwrap_or(if decoder.is_some() { VisibleHead::Projector } else { VisibleHead::Linear });
        Ok(DmjdConfig {
            encoder,
            decoder,
            views,
            targets,
            head,
            theta: self.theta,
            losses: [self.mim_loss_type, self.vis_loss_type],
            beta: self.smooth_l1_beta,
            order: self.visible_order,
            dense: self.stages == StagesName::Dense,
        })
    }
}

pub struct DmjdConfig {
    pub encoder: VitConfig,
    /// None for MaskFeat.
    pub decoder: Option<DecoderConfig>,
    pub views: Disjoint,
    pub targets: Targets,
    pub head: VisibleHead,
    pub theta: f64,
    /// Of hidden and of visible patches.
    pub losses: [LossType; 2],
    pub beta: f64,
    pub order: VisibleOrder,
    pub dense: bool,
}

/// What predicts the targets of visible patches.
struct Visible {
    /// Linear layers and the norms behind them; none of a head that is linear.
    layers: Vec<(Linear, Norm)>,
    last: Option<Linear>,
    predictor: Linear,
    eps: f64,
}

impl Visible {
    fn new(b: &mut ParamsBuilder, head: VisibleHead, [fan_in, width, out]: [usize; 3], eps: f64) -> Result<Self> {
        let linear = |b: &mut ParamsBuilder, name: &str, from, to| Linear::new(b, name, from, to, Start::Xavier.linear(from, to));
        let (mut layers, mut last, mut from) = (Vec::new(), None, fan_in);
        if head == VisibleHead::Projector {
            for at in [0, 3] {
                let layer = linear(b, &format!("proj_embed.{at}"), from, width)?;
                layers.push((layer, Norm::new(b, &format!("proj_embed.{}", at + 1), width, eps)?));
                from = width;
            }
            last = Some(linear(b, "proj_embed.6", width, width)?);
        }
        Ok(Self { layers, last, predictor: linear(b, "predictor.0", from, out)?, eps })
    }

    fn forward(&self, s: &Scope, latent: &Var) -> Result<Var> {
        let mut x = latent.clone();
        for (linear, norm) in &self.layers {
            x = norm.forward(s, &linear.forward(s, &x)?)?.gelu()?;
        }
        if let Some(last) = &self.last {
            x = last.forward(s, &x)?.layernorm_plain(self.eps)?;
        }
        self.predictor.forward(s, &x)
    }
}

pub struct Dmjd {
    pub params: Params,
    pub model: Baseline,
    visible: Visible,
    pub views: Disjoint,
    pub targets: Targets,
    theta: f64,
    losses: [LossType; 2],
    beta: f64,
    order: VisibleOrder,
    dense: bool,
    /// Width of the visible branch.
    projection: usize,
    head: VisibleHead,
}

/// Everything that the loss is made of.
pub struct Pass {
    pub mask: Mask,
    /// [B, L, P]
    pub target: Tensor,
    /// Of hidden patches, [M B, L, P], and of visible ones, [M B, K, P].
    pub predicted: Var,
    pub predicted_visible: Var,
    pub latent: Var,
    pub invisible: Var,
    pub visible: Var,
}

impl Dmjd {
    pub fn new(c: DmjdConfig, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        let (width, eps, out) = (c.encoder.width, c.encoder.eps, c.targets.width);
        let projection = c.decoder.as_ref().map_or(PROJECTION.min(4 * width), |decoder| decoder.width);
        let model = Baseline::new(&mut b, c.encoder, c.decoder.as_ref(), out)?;
        let visible = Visible::new(&mut b, c.head, [width, projection, out], eps)?;
        Ok(Self {
            params: b.build(dtype, rng)?,
            model,
            visible,
            views: c.views,
            targets: c.targets,
            theta: c.theta,
            losses: c.losses,
            beta: c.beta,
            order: c.order,
            dense: c.dense,
            projection,
            head: c.head,
        })
    }

    /// Both branches on all views.
    pub fn pass(&self, s: &Scope, batch: &Batch, rng: &Rng) -> Result<Pass> {
        let device = self.params.device();
        let images = batch.images.on(device)?;
        let target = self.targets.of(batch, device)?; // [B, L, P]
        let phase = trace::phase("mask");
        let mask = self.views.draw(images.shape()[0], device, rng)?; // M B rows: all first views, then all second ones
        drop(phase);
        let answer = self.model.answer(s, &images, &mask, self.dense)?;
        let phase = trace::phase("visible");
        let predicted_visible = self.visible.forward(s, &answer.visible)?; // [M B, K, P]
        drop(phase);

        let _phase = trace::phase("loss");
        let of_all = gather::repeated(&target, self.views.views())?; // [M B, L, P]
        let invisible = answer.predicted.feature_loss_at(&of_all, self.losses[0].distance(self.beta), &mask.hidden)?;
        let visible = self.visible_loss(&predicted_visible, &self.visible_target(&target, &mask, self.order)?)?;
        Ok(Pass { mask, target, predicted: answer.predicted, predicted_visible, latent: answer.visible, invisible, visible })
    }

    /// What kept patches are compared with, [M B, K, P].
    pub fn visible_target(&self, target: &Tensor, mask: &Mask, order: VisibleOrder) -> Result<Tensor> {
        match order {
            VisibleOrder::Aligned => target::at(target, &mask.kept),
            // Sorted by whether they are hidden, the visible ones come first, in raster order.
            VisibleOrder::Released => target::at(target, &masking::random(&mask.hidden, mask.kept_each())?.kept),
        }
    }

    /// The distance of visible patches.
    pub fn visible_loss(&self, predicted: &Var, target: &Tensor) -> Result<Var> {
        predicted.feature_loss(target, self.losses[1].distance(self.beta))
    }

    /// Multiply-accumulates of all views of an image: of the encoder, and of what predicts hidden patches.
    pub fn model_macs(&self) -> [u64; 2] {
        self.model.macs(self.views.kept_each(), self.targets.width).map(|macs| self.views.views() as u64 * macs)
    }

    pub fn theta(&self) -> f64 {
        self.theta
    }
}

impl Method for Dmjd {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let s = Scope::new(tape, &self.params).with_noise(rng);
        let pass = self.pass(&s, batch, rng)?;
        Loss::sum(vec![("invisible", 1.0, pass.invisible), ("visible", self.theta, pass.visible)])
    }

    fn encoder(&self) -> &Vit {
        self.model.encoder()
    }

    fn needs_bytes(&self) -> bool {
        self.targets.needs_bytes()
    }

    fn macs(&self) -> [u64; 2] {
        let (kept, width, out) = (self.views.kept_each(), self.model.encoder().config.width, self.targets.width);
        let head = match self.head {
            VisibleHead::Linear => width * out,
            VisibleHead::Projector => (width + 2 * self.projection + out) * self.projection,
        };
        [self.views.views() as u64 * (self.model.macs(kept, out).iter().sum::<u64>() + (kept * head) as u64); 2]
    }

    fn teacher(&self) -> Option<&super::teacher::Teacher> {
        self.targets.teacher.as_ref()
    }

    fn teacher_cost(&self) -> Option<super::teacher::Cost> {
        self.targets.teacher_cost()
    }

    fn facts(&self) -> Vec<(&'static str, f64)> {
        let of = |patches: usize| patches as f64 / self.views.patches() as f64;
        let hidden = self.views.patches() - self.views.kept_each();
        vec![
            ("views_of_an_image", self.views.views() as f64),
            ("corruption_rate", of(hidden)),
            ("prediction_rate", of(self.views.predicted())),
        ]
    }

    fn prepare(&self, batch: &mut Batch, _rng: &Rng) -> Result<()> {
        self.targets.prepare(batch)
    }
}
