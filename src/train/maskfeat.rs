//! `masque pretrain maskfeat`: a ViT that predicts the oriented gradients of patches that it sees a token for.

use super::args::settings;
use super::pretrain::{CommonArgs, InitArgs, Job, Making};
use super::run::{Ended, Schedule};
use super::target::Targeted;
use super::teacher::TeacherArgs;
use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::methods::maskfeat::{MaskFeat, MaskFeatArgs};
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::Args;
use serde::{Deserialize, Serialize};

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MaskFeatPretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: MaskFeatArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub teacher: TeacherArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub init: InitArgs,
    /// Part of its peak at which the learning rate starts its warm-up
    #[arg(long, default_value_t = 1e-6, value_name = "PART")]
    pub warmup_start: f64,
}

impl MaskFeatPretrainArgs {
    fn targeted(&self) -> Targeted<'_> {
        Targeted { kind: self.method.pred_type, eps: self.method.norm_pix_eps, teacher: &self.teacher }
    }

    /// The model of a checkpoint of such a run.
    pub fn model(&self, [image, channels]: [usize; 2], on: (&Device, Precision)) -> Result<MaskFeat> {
        let encoder = self.method.encoder(image, channels)?;
        let targets = self.targeted().open(&encoder, on, None, &mut |_| ())?;
        MaskFeat::new(self.method.config(encoder, targets)?, Dtype::F32, &Rng::new(0))
    }
}

/// Betas of MaskFeat's AdamW.
const BETAS: (f64, f64) = (0.9, 0.999);

pub fn maskfeat(args: &MaskFeatPretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let (common, method) = (&args.common, &args.method);
    if !(0.0..=1.0).contains(&args.warmup_start) {
        return Err(Error::usage(format!("--warmup-start {} is not a part from 0 to 1", args.warmup_start)));
    }
    let encoder = method.encoder(common.images.input_size, common.images.in_chans)?;
    method.check(&encoder)?;
    let targeted = args.targeted();
    targeted.check(&encoder, common.run.device)?;
    let settings = settings(&MaskFeatPretrainArgs { common: common.resolved(), ..args.clone() })?;
    let make = |making: Making| -> Result<Box<dyn Method>> {
        let on = (&making.device, common.run.precision);
        let targets = targeted.open(&encoder, on, Some(&making.shown), making.say)?;
        let mut maskfeat = MaskFeat::new(method.config(encoder, targets)?, Dtype::F32, &Rng::new(common.run.seed))?;
        if !making.resumed {
            args.init.load(&mut maskfeat.params, &maskfeat.model.encoder().config, making.say)?;
        }
        maskfeat.params.move_to(&making.device, common.run.precision.dtype())?;
        Ok(Box::new(maskfeat))
    };
    let schedule = match common.run.schedule() {
        Schedule::Mae { peak, min, warmup, fixed, .. } => Schedule::Mae { peak, min, warmup, from: args.warmup_start, fixed },
        other => other,
    };
    let job = Job::new("pretrain maskfeat", "pretrain-maskfeat", common, settings);
    Job { views: args.teacher.views, schedule, betas: BETAS, no_decay: &["mask_token"], ..job }.train(make, say)
}
