//! `masque pretrain convmae`: MAE with a ConViT.

use super::args::settings;
use super::pretrain::{CommonArgs, InitArgs, Job, Making};
use super::run::Ended;
use crate::error::Result;
use crate::methods::Method;
use crate::methods::convmae::ConvMaeArgs;
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::Args;
use serde::{Deserialize, Serialize};

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvMaePretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: ConvMaeArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub init: InitArgs,
}

pub fn convmae(args: &ConvMaePretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let (common, method) = (&args.common, &args.method);
    let config = method.config(common.images.input_size, common.images.in_chans)?;
    let masks = method.mae.masks(&config.encoder)?;
    let settings = settings(&ConvMaePretrainArgs { common: common.resolved(), ..args.clone() })?;
    let make = |making: Making| -> Result<Box<dyn Method>> {
        let mut mae = method.model(config, masks, Dtype::F32, &Rng::new(common.run.seed))?;
        if !making.resumed {
            args.init.load(&mut mae.params, &mae.encoder.config, making.say)?;
        }
        mae.params.move_to(&making.device, common.run.precision.dtype())?;
        Ok(Box::new(mae))
    };
    Job::new("pretrain convmae", "pretrain-convmae", common, settings).train(make, say)
}
