//! `masque pretrain dmjd`: several views of each image, each hiding what those before it showed.

use super::args::settings;
use super::pretrain::{CommonArgs, InitArgs, Job, Making};
use super::run::{Ended, Schedule};
use super::target::Targeted;
use super::teacher::TeacherArgs;
use crate::device::{Device, Precision};
use crate::error::Result;
use crate::masking::disjoint::Disjoint;
use crate::methods::Method;
use crate::methods::dmjd::{Dmjd, DmjdArgs};
use crate::optim::schedule;
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::Args;
use serde::{Deserialize, Serialize};

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DmjdPretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: DmjdArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub teacher: TeacherArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub init: InitArgs,
}

impl DmjdPretrainArgs {
    fn targeted(&self) -> Targeted<'_> {
        Targeted { kind: self.method.pred_type, eps: self.method.norm_pix_eps, teacher: &self.teacher }
    }

    /// The model of a checkpoint of such a run.
    pub fn model(&self, [image, channels]: [usize; 2], on: (&Device, Precision)) -> Result<Dmjd> {
        let networks = self.method.networks(image, channels)?;
        let targets = self.targeted().open(&networks.0, on, None, &mut |_| ())?;
        Dmjd::new(self.method.config(networks, targets)?, Dtype::F32, &Rng::new(0))
    }

    /// The peak of the learning rate, and how it comes about.
    fn peak(&self) -> (f64, String) {
        let (run, method) = (&self.common.run, &self.method);
        if let Some(lr) = run.lr {
            return (lr, "--lr says it".to_string());
        }
        let (images, predicted, hidden) = (run.effective_batch(), method.pred_ratio, method.mask_ratio);
        let peak = schedule::peak_predicted(run.blr, images, [predicted, hidden]);
        (peak, format!("{} x {images} images x ({predicted} / {hidden}) / 256", run.blr))
    }

    /// What the views of an image come to.
    fn told(&self, views: &Disjoint) -> String {
        let (all, shown, each, method) = (views.patches(), views.kept_each(), views.each(), &self.method);
        let percent = |part: f64| format!("{} %", (part * 1000.0).round() / 10.0);
        let of = |patches: usize| percent(patches as f64 / all as f64);
        let units = if each == 1 { String::new() } else { format!(" ({} of {} units of 2 x 2)", shown / each, all / each) };
        let (lr, how) = self.peak();
        format!(
            "{count} views of each image: each shows {shown} of {all} patches{units} and hides {} ({}, asked for {}); together they predict {} ({}, asked for {}); \
             lr {} ({how}); a step takes {count} x {} views, images/s count images",
            all - shown,
            of(all - shown),
            percent(method.mask_ratio),
            views.predicted(),
            of(views.predicted()),
            percent(method.pred_ratio),
            (lr * 1e9).round() / 1e9,
            self.common.run.effective_batch(),
            count = views.views(),
        )
    }
}

pub fn dmjd(args: &DmjdPretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let (common, method) = (&args.common, &args.method);
    let networks = method.networks(common.images.input_size, common.images.in_chans)?;
    method.check(&networks.0)?;
    let targeted = args.targeted();
    targeted.check(&networks.0, common.run.device)?;
    common.run.check()?;
    say(&args.told(&method.views(&networks.0)?));
    let settings = settings(&DmjdPretrainArgs { common: common.resolved(), ..args.clone() })?;
    let make = |making: Making| -> Result<Box<dyn Method>> {
        let on = (&making.device, common.run.precision);
        let targets = targeted.open(&networks.0, on, Some(&making.shown), making.say)?;
        let mut dmjd = Dmjd::new(method.config(networks, targets)?, Dtype::F32, &Rng::new(common.run.seed))?;
        if !making.resumed {
            args.init.load(&mut dmjd.params, &dmjd.model.encoder().config, making.say)?;
        }
        dmjd.params.move_to(&making.device, common.run.precision.dtype())?;
        Ok(Box::new(dmjd))
    };
    let schedule = match common.run.schedule() {
        Schedule::Mae { min, warmup, from, fixed, .. } => Schedule::Mae { peak: args.peak().0, min, warmup, from, fixed },
        other => other,
    };
    let job = Job::new("pretrain dmjd", "pretrain-dmjd", common, settings);
    Job { views: args.teacher.views, schedule, ..job }.train(make, say)
}
