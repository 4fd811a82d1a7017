//! `masque pretrain tinymim`: an encoder that learns how the tokens of a teacher relate.

use super::args::settings;
use super::cache::Kept;
use super::pretrain::{CommonArgs, Job, Making};
use super::run::Ended;
use super::teacher::{TeacherArgs, Wanted, check_sees, check_tokens};
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::methods::tinymim::{Target, Tinymim, TinymimArgs};
use crate::nn::weights::{self, Head, Policy, Which};
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TinymimPretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: TinymimArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub teacher: TeacherArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    /// Start from this encoder [default: from scratch]
    #[arg(long, value_name = "PATH")]
    pub init: Option<PathBuf>,
}

pub fn tinymim(args: &TinymimPretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let (common, method) = (&args.common, &args.method);
    let teacher = method.teacher(args.teacher.config(Wanted::Encoder)?)?;
    let config = method.config(common.images.input_size, common.images.in_chans, &teacher)?;
    if !(method.color_jitter.is_finite() && method.color_jitter >= 0.0) {
        return Err(Error::usage(format!("--color-jitter {} is not a number from 0 on", method.color_jitter)));
    }
    // The next stage of a chain has to know how many heads the relations had.
    let resolved = TinymimArgs { last_heads: config.student.last_heads, ..method.clone() };
    let settings = settings(&TinymimPretrainArgs { method: resolved, common: common.resolved(), ..args.clone() })?;
    let make = |making: Making| -> Result<Box<dyn Method>> {
        let Making { device, resumed, say, shown } = making;
        let teacher = args.teacher.open_as(Wanted::Encoder, |config| method.teacher(config), &device, common.run.precision, say)?;
        check_sees(&teacher, &config.student, true)?;
        if method.target != Target::ClassToken {
            check_tokens(&teacher, &config.student)?;
        } else if method.class_token_norm && !teacher.encoder()?.has_norm() {
            return Err(Error::usage(format!(
                "--target class-token: the teacher {} has no final norm, as it pools its patches; give --class-token-norm=false",
                teacher.name
            )));
        }
        let (heads, block, asked) = (config.heads, config.block + 1, config.asked());
        if !config.repeats(teacher.vit()) {
            args.teacher.without_cache(
                "with --masking the teacher sees other patches each time, and with --teacher-drop-path it answers otherwise",
            )?;
        }
        let mut tinymim = Tinymim::new(config, teacher, Dtype::F32, &Rng::new(common.run.seed))?;
        let of = if method.target == Target::Relations { format!(" in {heads} heads") } else { String::new() };
        say(&format!("the teacher is asked for {asked} of block {block}{of}, of {}", tinymim.teacher.vit().depth));
        tinymim.remembering(|teacher, ask| args.teacher.remember(teacher, Kept { what: asked, block: Some(block) }, &shown, ask, say))?;
        if method.target == Target::Relations && tinymim.student.config.heads != heads {
            say(&format!("the student's last block has {heads} heads, the others {}", tinymim.student.config.heads));
        }
        if let Some(path) = args.init.as_ref().filter(|_| !resumed) {
            let file = weights::open(path, Which::Trained)?;
            say(&weights::load(&mut tinymim.params, &tinymim.student.config, &file, Policy::Encoder(Head::Fresh))?.text());
        }
        tinymim.params.move_to(&device, common.run.precision.dtype())?;
        Ok(Box::new(tinymim))
    };
    let jitter = Some(method.color_jitter).filter(|strength| *strength > 0.0);
    let views = args.teacher.views;
    Job { jitter, views, ..Job::new("pretrain tinymim", "pretrain-tinymim", common, settings) }.train(make, say)
}
