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
        let gradients = matches!(kind, Kind::Hog | Kind::HogMaskfeat);
        if gradients && !patch.is_multiple_of(2) {
            return Err(Error::usage(format!(
                "--pred-type: a patch of {patch} pixels does not fall into 2 x 2 cells of gradients; take rgb"
            )));
        }
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
            Kind::Teacher => {
                let teacher = self.teacher.as_ref().ok_or_else(|| Error::new("a target of features needs a teacher"))?;
                let (last, extra) = (teacher.vit().depth - 1, teacher.vit().extra());
                let features = teacher.features(&batch.for_teacher().on(device)?, None, &[last])?.remove(0);
                let patches = Var::constant(features).tokens(extra..extra + teacher.vit().patches())?;
                Ok(patches.layernorm_plain(TEACHER_EPS)?.value().clone())
            }
        }
    }
}

/// Rows `ids` [M B, K] of each image's targets [B, L, P], of M views of each: [M B, K, P].
pub fn at(targets: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let &[batch, patches, width] = targets.shape() else { crate::bail!("targets are {targets:?} but [B, L, P] is needed") };
    gather::gather_patches(&targets.reshape(&[batch, 1, patches, width])?, (1, width), Some(ids), targets.dtype())
}
