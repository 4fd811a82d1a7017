//! DMAE: Masked Autoencoders Enable Efficient Knowledge Distillers (arXiv 2208.12256).
//!
//! MAE with a frozen, larger MAE beside it that sees the same few patches. What a block of the student gives (residual stream, before the final norm) is
//! projected to the teacher's width and pulled toward what a block of the teacher gives, class token included; the teacher stops at that block.
//!
//!   L = L_pixels + alpha sum_pairs mean | n(z_T) - n(head(z_S)) |        n(z) = z / max(|z|, 1e-12) a token
//!
//!   masque pretrain dmae --teacher-path mae_visualize_vit_large.pth --model mae_vit_base_patch16

use super::mae::{Mae, MaeArgs, MaeConfig};
use super::masks::Masks;
use super::teacher::{Cost, Network, Teacher};
use super::{Batch, Loss, Method};
use crate::ensure;
use crate::error::{Error, Result};
use crate::masking::Mask;
use crate::nn::linear::Linear;
use crate::nn::vit::Vit;
use crate::nn::weights::PROJECTIONS;
use crate::nn::{Scope, flops};
use crate::ops::feature_loss::Distance;
use crate::param::{Init, Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Dtype, Tensor};
use crate::trace;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The flags of the method, with the released program's values.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DmaeArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub mae: MaeArgs,
    /// Blocks of the student that are aligned, from 0 [default: three quarters up: 8 of 12, 17 of 24]
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1.., value_name = "I,J")]
    pub aligned_blks_indices: Option<Vec<usize>>,
    /// The teacher's blocks they are aligned with, in the same order [default: the student's where those are given, else three quarters up]
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1.., value_name = "I,J")]
    pub teacher_aligned_blks_indices: Option<Vec<usize>>,
    /// Distance between features
    #[arg(long, value_enum, ignore_case = true, default_value_t = Func::L1)]
    pub embedding_distillation_func: Func,
    /// How features are normalised before they are compared [default: l2; none where there is no projection]
    #[arg(long, value_enum)]
    pub distill_normalize: Option<Normalise>,
    /// Weight of the alignment against the reconstruction
    #[arg(long, default_value_t = 1.0, value_name = "ALPHA")]
    pub distill_weight: f64,
    /// What projects the student's features to the teacher's width
    #[arg(long, value_enum, default_value_t = Projection::Fc1Layer)]
    pub aligned_feature_projection_mode: Projection,
    /// The widths it goes from and to, as a check [default: those of student and teacher]
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1..=2, value_name = "FROM,TO")]
    pub aligned_feature_projection_dim: Option<Vec<usize>>,
    /// What the decoder is to reconstruct. Not built: the unpublished targets that make the decoder predict two or three things at once
    /// (--distillation-disentangled-target)
    #[arg(long, value_enum, default_value_t = Target::OriginalImg)]
    pub student_reconstruction_target: Target,
    /// Weights of the image and of the teacher's prediction in their weighted sum
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1..=2, default_values_t = [0.5, 0.5], value_name = "W0,W1")]
    pub target_sum_weights: Vec<f64>,
    /// Run all of the teacher, as the released program does, and not only up to its last aligned block: the same loss in more time
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub full_teacher: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Func {
    #[value(name = "L1")]
    L1,
    #[value(name = "L2")]
    L2,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalise {
    /// Each token's features to length one, as the released program does
    L2,
    /// Not at all, as the paper's formula has it
    None,
    /// The teacher's features to mean 0 and variance 1 a token, the student's as they are
    LayerNorm,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// One linear layer
    #[value(name = "fc-1layer")]
    #[serde(rename = "fc-1layer")]
    Fc1Layer,
    /// Two with GELU between them
    #[value(name = "mlp-1layer")]
    #[serde(rename = "mlp-1layer")]
    Mlp1Layer,
    /// Two such
    #[value(name = "mlp-2layer")]
    #[serde(rename = "mlp-2layer")]
    Mlp2Layer,
    /// None; both widths have to be the same
    None,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Target {
    /// The pixels, as MAE does
    OriginalImg,
    /// What the teacher's decoder reconstructs
    TeacherPrediction,
    /// --target-sum-weights of both
    OriginalTeacherPredWeightedSum,
    /// The pixels less the teacher's prediction
    Difference,
    /// Nothing: only features are learned
    None,
}

impl Target {
    /// Whether the teacher's decoder has to run.
    pub fn needs_prediction(self) -> bool {
        matches!(self, Target::TeacherPrediction | Target::OriginalTeacherPredWeightedSum | Target::Difference)
    }
}

/// Three quarters up: block 8 of 12, 17 of 24, 23 of 32.
pub fn three_quarters(depth: usize) -> usize {
    (3 * depth / 4).saturating_sub(1)
}

impl DmaeArgs {
    /// For a student and the teacher beside it.
    pub fn config(&self, mae: MaeConfig, teacher: &Teacher) -> Result<DmaeConfig> {
        let usage = |text: String| Err(Error::usage(text));
        let (student, depth) = (&mae.encoder, teacher.encoder()?.config.depth);
        let mut own = self.aligned_blks_indices.clone().unwrap_or_else(|| vec![three_quarters(student.depth)]);
        let mut theirs = match (&self.teacher_aligned_blks_indices, &self.aligned_blks_indices) {
            (Some(theirs), _) => theirs.clone(),
            (None, Some(own)) => own.clone(),
            (None, None) => vec![three_quarters(depth)],
        };
        if own.len() != theirs.len() {
            return usage(format!(
                "--aligned-blks-indices names {} blocks and --teacher-aligned-blks-indices {}; each block of the student needs one of the teacher",
                own.len(),
                theirs.len()
            ));
        }
        // They are paired in rising order, however they were typed.
        own.sort_unstable();
        theirs.sort_unstable();
        for (flag, blocks, depth) in [("--aligned-blks-indices", &own, student.depth), ("--teacher-aligned-blks-indices", &theirs, depth)] {
            if let Some(block) = blocks.iter().find(|&&block| block >= depth) {
                return usage(format!(
                    "{flag} {block}: the {} has blocks 0 to {}",
                    if flag.contains("teacher") { "teacher" } else { "student" },
                    depth - 1
                ));
            }
            if !blocks.is_sorted_by(|a, b| a < b) {
                return usage(format!("{flag} {blocks:?}: a block is named once"));
            }
        }
        let [from, to] = [student.width, teacher.vit().width];
        match self.aligned_feature_projection_dim.as_deref() {
            None => {}
            Some(&[a, b]) if [a, b] == [from, to] => {}
            Some(dim) => {
                return usage(format!(
                    "--aligned-feature-projection-dim {dim:?}: the student is {from} wide and the teacher {to}; leave the flag out"
                ));
            }
        }
        if self.aligned_feature_projection_mode == Projection::None && from != to {
            return usage(format!(
                "--aligned-feature-projection-mode none compares features as they are, but the student is {from} wide and the teacher {to}; take fc-1layer"
            ));
        }
        let [w0, w1] = self.target_sum_weights[..] else {
            return usage(format!("--target-sum-weights has {} numbers; it takes two, as 0.5,0.5", self.target_sum_weights.len()));
        };
        if !(self.distill_weight.is_finite() && self.distill_weight >= 0.0 && w0.is_finite() && w1.is_finite()) {
            return usage(format!(
                "--distill-weight {} and --target-sum-weights {w0},{w1} have to be numbers, the first from 0 on",
                self.distill_weight
            ));
        }
        let align = Align {
            pairs: own.into_iter().zip(theirs).collect(),
            distance: if self.embedding_distillation_func == Func::L1 { Distance::L1 } else { Distance::L2 },
            normalise: self.distill_normalize.unwrap_or(match self.aligned_feature_projection_mode {
                Projection::None => Normalise::None,
                _ => Normalise::L2,
            }),
            weight: self.distill_weight,
            projection: self.aligned_feature_projection_mode,
            target: self.student_reconstruction_target,
            sum: [w0, w1],
            full_teacher: self.full_teacher,
        };
        Ok(DmaeConfig { mae, align })
    }
}

pub struct DmaeConfig {
    pub mae: MaeConfig,
    pub align: Align,
}

/// What is aligned, and how.
pub struct Align {
    /// Blocks of student and teacher, both rising.
    pub pairs: Vec<(usize, usize)>,
    pub distance: Distance,
    pub normalise: Normalise,
    pub weight: f64,
    pub projection: Projection,
    /// What the decoder is to reconstruct, and the weights of its sum.
    pub target: Target,
    pub sum: [f64; 2],
    pub full_teacher: bool,
}

/// Projects features of the student to the teacher's width: layers with GELU between the two of each pair.
struct Head(Vec<[Linear; 2]>, Option<Linear>);

impl Head {
    fn new(b: &mut ParamsBuilder, projection: Projection, n: usize, from: usize, to: usize) -> Result<Self> {
        // PyTorch's own start of a linear layer, which the released program leaves: its bias is not zero.
        let mut layer = |key: &str, from: usize| {
            let start = Init::fan_in(from);
            Linear::with_bias(b, &format!("{PROJECTIONS}{n}{key}"), &[to, from], start.clone(), Some(start))
        };
        Ok(match projection {
            Projection::None => Self(Vec::new(), None),
            Projection::Fc1Layer => Self(Vec::new(), Some(layer("", from)?)),
            Projection::Mlp1Layer => Self(vec![[layer(".fc1", from)?, layer(".fc2", to)?]], None),
            Projection::Mlp2Layer => {
                let first = [layer(".0.fc1", from)?, layer(".0.fc2", to)?];
                Self(vec![first, [layer(".1.fc1", to)?, layer(".1.fc2", to)?]], None)
            }
        })
    }

    fn forward(&self, s: &Scope, z: &Var) -> Result<Var> {
        if let Some(layer) = &self.1 {
            return layer.forward(s, z);
        }
        self.0.iter().try_fold(z.clone(), |z, [fc1, fc2]| fc2.forward(s, &fc1.forward_gelu(s, &z)?))
    }

    fn macs(projection: Projection, from: usize, to: usize) -> usize {
        match projection {
            Projection::None => 0,
            Projection::Fc1Layer => from * to,
            Projection::Mlp1Layer => from * to + to * to,
            Projection::Mlp2Layer => from * to + 3 * to * to,
        }
    }
}

pub struct Dmae {
    pub mae: Mae,
    pub teacher: Teacher,
    heads: Vec<Head>,
    align: Align,
}

/// What the teacher gives: features of its aligned blocks, and the prediction of its decoder where that was asked for.
pub struct Taught {
    pub features: Vec<Tensor>,
    pub prediction: Option<Tensor>,
}

/// What the student gives.
pub struct Learned {
    /// Of the aligned blocks, before they are projected.
    pub features: Vec<Var>,
    pub latent: Var,
    /// Of the decoder; None where nothing is reconstructed.
    pub prediction: Option<Var>,
}

impl Dmae {
    pub fn new(c: DmaeConfig, teacher: Teacher, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let (from, to) = (c.mae.encoder.width, teacher.vit().width);
        let align = c.align;
        let (mae, heads) = Mae::with(c.mae, dtype, rng, |b| {
            (0..align.pairs.len()).map(|n| Head::new(b, align.projection, n, from, to)).collect::<Result<Vec<_>>>()
        })?;
        Ok(Self { mae, teacher, heads, align })
    }

    /// The same with other masks in training.
    pub fn with_masks(self, masks: Masks) -> Self {
        Self { mae: self.mae.with_masks(masks), ..self }
    }

    /// Blocks of the teacher that are aligned, from 0.
    pub fn asked(&self) -> Vec<usize> {
        self.align.pairs.iter().map(|pair| pair.1).collect()
    }

    /// Aligns other blocks of the teacher from now on, from 0 and rising: one for each of the student's.
    pub fn ask(&mut self, blocks: &[usize]) -> Result<()> {
        let (pairs, depth) = (&mut self.align.pairs, self.teacher.vit().depth);
        ensure!(blocks.len() == pairs.len(), "{} blocks of the teacher were asked for {} of the student", blocks.len(), pairs.len());
        ensure!(
            blocks.is_sorted_by(|a, b| a < b) && blocks.iter().all(|&block| block < depth),
            "blocks {blocks:?} of {depth} were asked for"
        );
        pairs.iter_mut().zip(blocks).for_each(|(pair, &block)| pair.1 = block);
        Ok(())
    }

    /// Blocks of the teacher that run.
    fn teacher_depth(&self) -> usize {
        let stop = self.align.pairs.iter().map(|pair| pair.1 + 1).max().unwrap_or(0);
        if self.align.full_teacher || self.align.target.needs_prediction() { self.teacher.vit().depth } else { stop }
    }

    /// The teacher on the patches that the student sees.
    pub fn teach(&self, images: &Tensor, mask: &Mask) -> Result<Taught> {
        let blocks: Vec<usize> = self.align.pairs.iter().map(|pair| pair.1).collect();
        if !self.align.full_teacher && !self.align.target.needs_prediction() {
            return Ok(Taught { features: self.teacher.features(images, Some(&mask.kept), &blocks)?, prediction: None });
        }
        let encoder = self.teacher.encoder()?;
        self.teacher.pass(|s| {
            let mut features = Vec::new();
            let x = encoder.embed(s, images, Some(&mask.kept))?;
            let x = encoder.blocks_seen(s, &x, |i, x| features.extend(blocks.contains(&i).then(|| x.value().clone())))?;
            let Network::Autoencoder(_, decoder) = &self.teacher.network else { return Ok(Taught { features, prediction: None }) };
            let prediction = decoder.forward(s, &encoder.norm(s, &x)?, &mask.restore)?;
            Ok(Taught { features, prediction: Some(prediction.value().clone()) })
        })
    }

    /// The student on the same patches.
    pub fn learn_from(&self, s: &Scope, images: &Tensor, mask: &Mask) -> Result<Learned> {
        let (encoder, mut features) = (&self.mae.encoder, Vec::new());
        let x = encoder.embed(s, images, Some(&mask.kept))?;
        let aligned = |i: usize| self.align.pairs.iter().any(|pair| pair.0 == i);
        let x = encoder.blocks_seen(s, &x, |i, x| features.extend(aligned(i).then(|| x.clone())))?;
        let latent = encoder.norm(s, &x)?; // [B, 1 + K, C]
        let reconstructs = self.align.target != Target::None;
        let prediction = reconstructs.then(|| self.mae.decoder.forward(s, &latent, &mask.restore)).transpose()?; // [B, L, P]
        Ok(Learned { features, latent, prediction })
    }

    /// Mean distance between the student's projected features and the teacher's.
    fn alignment(&self, s: &Scope, head: &Head, own: &Var, theirs: &Tensor) -> Result<Var> {
        let (own, theirs) = (head.forward(s, own)?, Var::constant(theirs.clone()));
        let (own, theirs) = match self.align.normalise {
            Normalise::None => (own, theirs),
            Normalise::L2 => (own.l2_normalise(1e-12)?, theirs.l2_normalise(1e-12)?),
            Normalise::LayerNorm => (own, theirs.layernorm_plain(1e-6)?),
        };
        own.feature_loss(theirs.value(), self.align.distance)
    }

    /// Mean squared error over the hidden patches; None where nothing is reconstructed.
    fn reconstruction(&self, learned: &Learned, taught: &Taught, images: &Tensor, mask: &Mask) -> Result<Option<Var>> {
        let Some(own) = &learned.prediction else { return Ok(None) };
        if !self.align.target.needs_prediction() {
            return self.mae.reconstruction(own, images, mask).map(Some);
        }
        let prediction =
            taught.prediction.clone().ok_or_else(|| Error::new("the teacher has no decoder, whose predictions are the target"))?;
        let dtype = own.dtype();
        let (pixels, predicted) = (Var::constant(self.mae.target(images)?.cast(dtype)?), Var::constant(prediction.cast(dtype)?));
        let sum = |w0: f64, w1: f64| pixels.scale(w0)?.add(&predicted.scale(w1)?);
        let target = match self.align.target {
            Target::TeacherPrediction => predicted,
            Target::Difference => sum(1.0, -1.0)?,
            _ => sum(self.align.sum[0], self.align.sum[1])?,
        };
        own.masked_mse(target.value(), &mask.hidden).map(Some)
    }

    /// The parts of the loss, each under its name with its weight.
    pub fn terms(&self, s: &Scope, images: &Tensor, mask: &Mask, taught: &Taught, learned: &Learned) -> Result<Vec<(String, f64, Var)>> {
        ensure!(taught.features.len() == self.heads.len(), "{} features for {} heads", taught.features.len(), self.heads.len());
        let reconstruction = self.reconstruction(learned, taught, images, mask)?;
        let mut terms: Vec<_> = reconstruction.map(|loss| ("pixels".to_string(), 1.0, loss)).into_iter().collect();
        for (n, (student, _)) in self.align.pairs.iter().enumerate() {
            let loss = self.alignment(s, &self.heads[n], &learned.features[n], &taught.features[n])?;
            terms.push((format!("align_block{student}"), self.align.weight, loss));
        }
        Ok(terms)
    }
}

impl Method for Dmae {
    fn params(&mut self) -> &mut Params {
        &mut self.mae.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let s = Scope::new(tape, &self.mae.params).with_noise(rng);
        let device = self.mae.params.device();
        let images = batch.images.on(device)?;
        let mask = self.mae.training_mask(&images, rng)?; // one for both
        let taught = self.teach(&batch.for_teacher().on(device)?, &mask)?;
        let learned = self.learn_from(&s, &images, &mask)?;
        let _phase = trace::phase("loss");
        Loss::sum(self.terms(&s, &images, &mask, &taught, &learned)?)
    }

    fn encoder(&self) -> &Vit {
        &self.mae.encoder
    }

    fn macs(&self) -> [u64; 2] {
        let [all, trained] = self.mae.macs();
        let (from, to) = (self.mae.encoder.config.width, self.teacher.vit().width);
        let heads = (self.heads.len() * (self.mae.kept_each() + 1) * Head::macs(self.align.projection, from, to)) as u64;
        let unused = match self.align.target {
            Target::None => flops::decoder_macs(&self.mae.decoder.config, &self.mae.encoder.config, self.mae.kept_each()),
            _ => 0,
        };
        [all + heads - unused, trained + heads - unused]
    }

    fn teacher(&self) -> Option<&Teacher> {
        Some(&self.teacher)
    }

    fn teacher_cost(&self) -> Option<Cost> {
        let kept = self.mae.kept_each();
        let decoder = match (&self.teacher.network, self.align.full_teacher || self.align.target.needs_prediction()) {
            (Network::Autoencoder(vit, decoder), true) => flops::decoder_macs(&decoder.config, &vit.config, kept),
            _ => 0,
        };
        Some(self.teacher.cost(self.teacher.macs(kept, self.teacher_depth()) + decoder))
    }
}
