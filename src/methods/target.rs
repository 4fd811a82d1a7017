//! What a masked model regresses of each patch.
//!
//!   hog            histograms of oriented gradients of the bytes of the image, as DMJD has them: 108 numbers of a patch
//!   hog-maskfeat   the same as MaskFeat has them, of the normalised image
//!   rgb, norm-rgb  pixels as the model sees them, or normalised patch by patch
//!   teacher        features of a frozen teacher that sees the whole image: its last block's tokens, normalised one by one

use super::Batch;
use super::teacher::{Cost, Teacher};
use crate::ensure;
use crate::error::{Error, Result};
use crate::nn::vit::VitConfig;
use crate::ops::feature_loss::Distance;
use crate::ops::gather;
use crate::tape::Var;
use crate::targets::{hog, pixels};
use crate::tensor::{Device, Tensor};
use crate::trace;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Oriented gradients of the bytes, as DMJD has them
    Hog,
    /// Oriented gradients of the normalised image, as MaskFeat has them
    #[value(alias = "hog_maskfeat")]
    HogMaskfeat,
    /// Pixels as the model sees them
    Rgb,
    /// Pixels normalised patch by patch
    #[value(alias = "norm_rgb")]
    NormRgb,
    /// Tokens of a frozen teacher that sees everything
    #[value(alias = "teacher-features")]
    Teacher,
}

/// How predictions are compared with a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossType {
    /// Squared error
    L2,
    /// Squared error where it is small, absolute where it is large
    #[value(alias = "smooth_l1")]
    SmoothL1,
}

impl LossType {
    pub fn distance(self, beta: f64) -> Distance {
        match self {
            Self::L2 => Distance::L2,
            Self::SmoothL1 => Distance::SmoothL1 { beta },
        }
    }
}

/// Refuses what no loss can be made with, and numbers that say nothing of these ones.
pub fn check_loss(kind: Kind, losses: [LossType; 2], beta: f64, eps: f64) -> Result<()> {
    for (flag, value) in [("--smooth-l1-beta", beta), ("--norm-pix-eps", eps)] {
        if !(value.is_finite() && value > 0.0) {
            return Err(Error::usage(format!("{flag} {value} is not a number above 0")));
        }
    }
    if beta != BETA && !losses.contains(&LossType::SmoothL1) {
        return Err(Error::usage(format!("--smooth-l1-beta {beta}: nothing is compared by smooth-l1; leave the flag out")));
    }
    if eps != pixels::EPS && kind != Kind::NormRgb {
        return Err(Error::usage(format!("--norm-pix-eps {eps} is for --pred-type norm-rgb; leave the flag out")));
    }
    Ok(())
}

/// Refuses patches that have no such target.
pub fn check_patch(kind: Kind, encoder: &VitConfig) -> Result<()> {
    if matches!(kind, Kind::Hog | Kind::HogMaskfeat) && !encoder.patch.is_multiple_of(2) {
        let patch = encoder.patch;
        return Err(Error::usage(format!("--pred-type: a patch of {patch} pixels does not fall into 2 x 2 cells of gradients; take rgb")));
    }
    Ok(())
}

/// From which difference on smooth-l1 is absolute, where nothing else is asked for.
pub const BETA: f64 = 2.0;

/// Makes the targets of batches.
pub struct Targets {
    kind: Kind,
    patch: usize,
    /// What is added to the variance of a patch's pixels.
    eps: f64,
    /// Numbers of a patch.
    pub width: usize,
    pub teacher: Option<Teacher>,
}

/// Of the norm of a teacher's tokens.
const TEACHER_EPS: f64 = 1e-6;

impl Targets {
    /// Targets of the patches of this encoder.
    pub fn new(kind: Kind, encoder: &VitConfig, eps: f64, teacher: Option<Teacher>) -> Result<Self> {
        let patch = encoder.patch;
        check_patch(kind, encoder)?;
        ensure!((kind == Kind::Teacher) == teacher.is_some(), "a teacher's features are the target exactly where there is a teacher");
        let width = match kind {
            Kind::Rgb | Kind::NormRgb => encoder.patch_values(),
            Kind::Hog | Kind::HogMaskfeat => 4 * hog::Options::dmjd().bins * encoder.channels,
            Kind::Teacher => teacher.as_ref().map_or(0, |teacher| teacher.vit().width),
        };
        Ok(Self { kind, patch, eps, width, teacher })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether they are made of the bytes of images.
    pub fn needs_bytes(&self) -> bool {
        self.kind == Kind::Hog
    }

    /// What the teacher costs, where there is one.
    pub fn teacher_cost(&self) -> Option<Cost> {
        self.teacher.as_ref().map(|teacher| teacher.cost(teacher.macs(teacher.vit().patches(), teacher.vit().depth)))
    }

    /// The targets of a batch on this device, [B, L, P]. No gradient flows to them.
    pub fn of(&self, batch: &Batch, device: &Device) -> Result<Tensor> {
        let _phase = trace::phase("target");
        let cell = self.patch / 2;
        match self.kind {
            Kind::Hog => {
                let bytes =
                    batch.bytes.as_ref().ok_or_else(|| Error::new("a target of gradients needs the bytes of the batch's images"))?;
                hog::target(&bytes.on(device)?, &hog::Options { cell, ..hog::Options::dmjd() })
            }
            Kind::HogMaskfeat => hog::target(&batch.images.on(device)?, &hog::Options { cell, ..hog::Options::maskfeat() }),
            Kind::Rgb => pixels::targets(&batch.images.on(device)?, self.patch, None),
            Kind::NormRgb => pixels::targets(&batch.images.on(device)?, self.patch, Some(self.eps)),
            Kind::Teacher => match &batch.teacher_output {
                Some(known) => known.on(device),
                None => features(self.taught()?, &batch.for_teacher().on(device)?),
            },
        }
    }

    fn taught(&self) -> Result<&Teacher> {
        self.teacher.as_ref().ok_or_else(|| Error::new("a target of features needs a teacher"))
    }

    /// Finds out which answers of the teacher are known already.
    pub fn prepare(&self, batch: &mut Batch) -> Result<()> {
        if let Some(teacher) = &self.teacher {
            batch.teacher_output = teacher.recall(batch, |images| features(teacher, images))?;
        }
        Ok(())
    }

    /// What is added to a patch's variance where targets are pixels normalised patch by patch; None of other targets.
    pub fn norm_pix(&self) -> Option<f64> {
        Some(self.eps).filter(|_| self.kind == Kind::NormRgb)
    }
}

/// The tokens of a teacher's last block, patches only, each normalised: [B, L, P].
pub fn features(teacher: &Teacher, images: &Tensor) -> Result<Tensor> {
    let (last, extra) = (teacher.vit().depth - 1, teacher.vit().extra());
    let features = teacher.features(images, None, &[last])?.remove(0);
    let patches = Var::constant(features).tokens(extra..extra + teacher.vit().patches())?;
    Ok(patches.layernorm_plain(TEACHER_EPS)?.value().clone())
}

/// Rows `ids` [M B, K] of each image's targets [B, L, P], of M views of each: [M B, K, P].
pub fn at(targets: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let &[batch, patches, width] = targets.shape() else { crate::bail!("targets are {targets:?} but [B, L, P] is needed") };
    gather::gather_patches(&targets.reshape(&[batch, 1, patches, width])?, (1, width), Some(ids), targets.dtype())
}
