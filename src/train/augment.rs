//! The flags that say how labelled images are varied: colours, erasing, mixing, smoothing, repetition.

use super::images::{CropArgs, ImagesArgs};
use crate::data::erase::{Erasing, Filling};
use crate::data::mixing::{Mixing, Mode};
use crate::data::rand_augment::RandAugment;
use crate::data::transform::Transform;
use crate::error::{Error, Result};
use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AugmentArgs {
    /// RandAugment's policy; none for no policy
    #[arg(long, default_value = "rand-m9-mstd0.5-inc1", value_name = "POLICY")]
    pub aa: String,
    /// Jitter of brightness, contrast and saturation where there is no policy [default: none]
    #[arg(long, value_name = "STRENGTH")]
    pub color_jitter: Option<f64>,
    /// DeiT-III's ThreeAugment in the place of policy and erasing, with --color-jitter
    #[arg(long, alias = "ThreeAugment", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub three_augment: bool,
    /// See each image three times an epoch, and a third of the images (DeiT's repeated augmentation)
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub repeated_aug: bool,
    /// Label smoothing
    #[arg(long, default_value_t = 0.1, value_name = "PART")]
    pub smoothing: f64,
    /// Probability of random erasing
    #[arg(long, default_value_t = 0.25, value_name = "PROBABILITY")]
    pub reprob: f64,
    /// What erased boxes hold: pixel, rand or const
    #[arg(long, default_value = "pixel", value_name = "MODE")]
    pub remode: String,
    /// Most boxes that are erased
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub recount: usize,
    /// Mixup's alpha; 0: off
    #[arg(long, default_value_t = 0.0, value_name = "ALPHA")]
    pub mixup: f64,
    /// CutMix's alpha; 0: off
    #[arg(long, default_value_t = 0.0, value_name = "ALPHA")]
    pub cutmix: f64,
    /// Sides of CutMix's box as parts of the image's, in the place of --cutmix
    #[arg(long, value_delimiter = ',', action = ArgAction::Set, num_args = 1..=2, value_name = "LEAST,MOST")]
    pub cutmix_minmax: Option<Vec<f64>>,
    /// Probability of mixing a batch
    #[arg(long, default_value_t = 1.0, value_name = "PROBABILITY")]
    pub mixup_prob: f64,
    /// Probability of CutMix where both are asked for
    #[arg(long, default_value_t = 0.5, value_name = "PROBABILITY")]
    pub mixup_switch_prob: f64,
    /// What is mixed alike: batch, pair or elem
    #[arg(long, default_value = "batch", value_name = "MODE")]
    pub mixup_mode: String,
}

impl AugmentArgs {
    pub fn mixing(&self) -> Result<Mixing> {
        let minmax = match self.cutmix_minmax.as_deref() {
            None => None,
            Some(&[least, most]) => Some([least, most]),
            Some(other) => return Err(Error::usage(format!("--cutmix-minmax has {} numbers; it takes two, as 0.2,0.8", other.len()))),
        };
        Ok(Mixing {
            mixup: self.mixup,
            cutmix: self.cutmix,
            minmax,
            probability: self.mixup_prob,
            switch: self.mixup_switch_prob,
            mode: self.mixup_mode.parse::<Mode>()?,
            smoothing: self.smoothing,
        })
    }

    /// What happens to a training image before it is a row of a batch.
    pub fn transform(&self, images: &ImagesArgs, crop: &CropArgs) -> Result<Transform> {
        let side = images.input_size;
        let policy = match self.aa.as_str() {
            "" | "none" => None,
            policy => Some(policy.parse::<RandAugment>()?),
        };
        let erasing = Erasing::new(self.reprob, self.remode.parse::<Filling>()?, self.recount)?;
        let erasing = Some(erasing).filter(|erasing| erasing.probability > 0.0);
        if images.in_chans != 3 && (policy.is_some() || self.color_jitter.is_some() || self.three_augment) {
            return Err(Error::usage(format!(
                "--in-chans {}: colours are changed of images with 3 channels only; give --aa none and neither --color-jitter nor --three-augment",
                images.in_chans
            )));
        }
        let cut = crop.training(side)?;
        let recipe = if self.three_augment {
            if policy.is_some() || erasing.is_some() {
                return Err(Error::usage("--three-augment takes the place of policy and erasing; give --aa none and --reprob 0 with it"));
            }
            Transform::three(side, false, self.color_jitter)?
        } else {
            Transform::finetune(side, policy, self.color_jitter, erasing)?
        };
        Ok(Transform { crop: cut.crop, flip: cut.flip, ..recipe })
    }
}
