//! `masque pretrain dmae`: a masked autoencoder beside a teacher that sees the same patches.

use super::args::settings;
use super::pretrain::{CommonArgs, InitArgs, Job, Making};
use super::run::{Ended, Schedule};
use super::teacher::{TeacherArgs, Wanted, check_sees, check_tokens};
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::methods::dmae::{Dmae, DmaeArgs};
use crate::methods::mae::Mae;
use crate::nn::names;
use crate::nn::weights::{self, Which};
use crate::param::Role;
use crate::rng::Rng;
use crate::tensor::{Dtype, Tensor};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DmaePretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: DmaeArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub teacher: TeacherArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub init: InitArgs,
    /// After the warm-up the learning rate stays at its peak
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub fixed_lr: bool,
    /// Start those of the student's tensors whose names contain one of --load-weights-keywords from this checkpoint
    #[arg(long, value_name = "PATH")]
    pub student_init_weights: Option<PathBuf>,
    /// See --student-init-weights
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1.., value_name = "WORD")]
    pub load_weights_keywords: Option<Vec<String>>,
    /// Parameters whose names contain one of these stay as they start
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1.., value_name = "WORD")]
    pub freeze_keywords: Option<Vec<String>>,
}

impl DmaePretrainArgs {
    /// Gives the student the tensors of --student-init-weights that were asked for.
    fn start_partly(&self, mae: &mut Mae, say: &mut dyn FnMut(&str)) -> Result<()> {
        let (path, words) = match (&self.student_init_weights, &self.load_weights_keywords) {
            (None, None) => return Ok(()),
            (Some(path), Some(words)) => (path, words),
            _ => {
                return Err(Error::usage(
                    "--student-init-weights and --load-weights-keywords go together: a checkpoint, and which of its tensors",
                ));
            }
        };
        let file = names::to_official(&weights::open(path, Which::Trained)?)?.file;
        let (mut loaded, mut left) = (0, Vec::new());
        for (name, tensor) in file.tensors().iter().filter(|(name, _)| words.iter().any(|word| name.contains(word.as_str()))) {
            match mae.params.find(name) {
                Ok(id) if mae.params.value(id).shape() == tensor.shape() && mae.params.role(id) != Role::Frozen => {
                    mae.params.set_value(id, &Tensor::from_slice(tensor.shape(), &tensor.to_f32()?)?)?;
                    loaded += 1;
                }
                _ => left.push(name.as_str()),
            }
        }
        let words = words.join(", ");
        if loaded == 0 {
            return Err(Error::usage(format!(
                "--student-init-weights {}: none of its tensors has {words} in its name and a place in the student",
                path.display()
            )));
        }
        let rest = if left.is_empty() { String::new() } else { format!("; without a place in the student: {}", left.join(", ")) };
        say(&format!("{}: {loaded} tensors with {words} in their names{rest}", path.display()));
        Ok(())
    }

    fn freeze(&self, mae: &mut Mae) -> Result<()> {
        let Some(words) = &self.freeze_keywords else { return Ok(()) };
        let frozen = |name: &str| words.iter().any(|word| name.contains(word.as_str()));
        let params = &mut mae.params;
        let (all, few) = (params.trained().count(), params.trained().filter(|&id| frozen(params.name(id))).count());
        if few == 0 || few == all {
            return Err(Error::usage(format!(
                "--freeze-keywords {}: {few} of {all} parameters have one in their names; some have to, and some not",
                words.join(",")
            )));
        }
        params.train_only(|name| !frozen(name));
        Ok(())
    }
}

pub fn dmae(args: &DmaePretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    args.teacher.without_cache("the teacher of DMAE sees the patches that the student keeps, which are others each time")?;
    let (common, method) = (&args.common, &args.method);
    let mae = method.mae.config(common.images.input_size, common.images.in_chans)?;
    let masks = method.mae.masks(&mae.encoder)?;
    let settings = settings(&DmaePretrainArgs { common: common.resolved(), ..args.clone() })?;
    let make = |making: Making| -> Result<Box<dyn Method>> {
        let Making { device, resumed, say, .. } = making;
        let predicts = method.student_reconstruction_target.needs_prediction();
        let whole = predicts || (method.full_teacher && args.teacher.has_decoder()?);
        let wanted = if whole { Wanted::Autoencoder } else { Wanted::Encoder };
        let teacher = args.teacher.open(wanted, &device, common.run.precision, say)?;
        check_sees(&teacher, &mae.encoder, true)?;
        check_tokens(&teacher, &mae.encoder)?;
        let config = method.config(mae, &teacher)?;
        let pairs: Vec<String> = config.align.pairs.iter().map(|(own, theirs)| format!("{own} with {theirs}")).collect();
        say(&format!("blocks of student and teacher that are aligned, from 0: {}", pairs.join(", ")));
        let mut dmae = Dmae::new(config, teacher, Dtype::F32, &Rng::new(common.run.seed))?.with_masks(masks);
        if !resumed {
            args.init.load(&mut dmae.mae.params, &dmae.mae.encoder.config, say)?;
            args.start_partly(&mut dmae.mae, say)?;
        }
        args.freeze(&mut dmae.mae)?;
        dmae.mae.params.move_to(&device, common.run.precision.dtype())?;
        Ok(Box::new(dmae))
    };
    let schedule = match common.run.schedule() {
        Schedule::Mae { peak, min, warmup, from, .. } => Schedule::Mae { peak, min, warmup, from, fixed: args.fixed_lr },
        other => other,
    };
    let views = args.teacher.views;
    Job { views, schedule, ..Job::new("pretrain dmae", "pretrain-dmae", common, settings) }.train(make, say)
}
