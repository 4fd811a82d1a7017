//! `masque pretrain`: a method that learns from images alone.

use super::args::{RunArgs, settings};
use super::feed::Feed;
use super::images::{CropArgs, ImagesArgs, Part, spread};
use super::picture;
use super::run::{After, Ended};
use super::start::{Ready, Start};
use super::visualize::{self, Normalised};
use crate::data::loader::{Loader, LoaderOptions, Order};
use crate::error::{Error, Result};
use crate::methods::mae::{Mae, MaeArgs};
use crate::nn::weights::{self, Policy, Which};
use crate::optim::adamw::AdamW;
use crate::optim::groups;
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::path::PathBuf;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: MaeArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub images: ImagesArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub crop: CropArgs,
    /// Start from the weights of this checkpoint: a whole model of masque or of MAE's programs (.pth, .safetensors) [default: from scratch]
    #[arg(long, value_name = "PATH")]
    pub init: Option<PathBuf>,
    /// --init may be an encoder alone: the decoder starts from scratch
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub fresh_decoder: bool,
}

/// Images that the pictures of a run show.
const SHOWN: usize = 6;

/// Draws the panels of a few unseen images after each evaluation.
fn pictures<'a>(shown: Loader, feed: Feed) -> After<'a> {
    Box::new(move |method, record, place| {
        let Some(mae) = (method as &dyn Any).downcast_ref::<Mae>() else { return Ok(()) };
        let Some(loaded) = shown.epoch(0, 0).next() else { return Ok(()) };
        let images = feed.evaluation(loaded?)?.images;
        let normalised = Normalised { mean: &feed.mean, std: &feed.std };
        let rows = visualize::panel_rows(mae, &images, normalised, &[mae.mask_ratio()], &[], &Rng::new(2))?;
        let percent = 100.0 * mae.mask_ratio();
        let given = if mae.norm_pix().is_some() { "; mean and deviation of each hidden patch are the true ones" } else { "" };
        let caption = format!("Unseen images with {percent:.0} % of the patches hidden, after epoch {}{given}", place.epoch);
        record.picture(place.update, "reconstruction", &caption, &picture::sheet(&rows)?.png()?)
    })
}

/// Betas of MAE's AdamW.
const BETAS: (f64, f64) = (0.9, 0.95);

pub fn mae(args: &PretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    args.run.check()?;
    args.images.check()?;
    let config = args.method.config(args.images.input_size, args.images.in_chans)?;
    let device = args.run.open_device()?;
    let start = Start::of(&args.run, "pretrain-mae")?;
    let train = args.images.open(Part::Train)?;
    // Pre-training reads no labels and needs no other images; where there are some, they show how it generalises.
    let validation = if args.images.lacks_validation() {
        say(&format!("{} has no images for validation: nothing is evaluated", args.images.data_path.display()));
        None
    } else {
        Some(args.images.open(Part::Val)?)
    };
    train.notes().iter().chain(validation.iter().flat_map(|set| set.notes())).for_each(|note| say(note));

    let mut mae = Mae::new(config, Dtype::F32, &Rng::new(args.run.seed))?;
    if let Some(path) = args.init.as_ref().filter(|_| start.from.is_none()) {
        let file = weights::open(path, Which::Trained)?;
        let policy = Policy::PreTraining { fresh_decoder: args.fresh_decoder };
        say(&weights::load(&mut mae.params, &mae.encoder.config, &file, policy)?.text());
    } else if args.fresh_decoder && args.init.is_none() {
        return Err(Error::usage("--fresh-decoder says what --init may lack; give a checkpoint by --init PATH"));
    }
    mae.params.move_to(&device, args.run.precision.dtype())?;
    let optimizer = AdamW::new(groups::by_decay(&mae.params, args.run.weight_decay, &[]), BETAS, 1e-8)?;
    let [mean, std] = args.images.statistics();
    let feed = Feed { device, mean, std, labels: None };
    let loading = LoaderOptions {
        batch: args.run.batch_size,
        order: Order::Shuffled,
        workers: args.run.workers(),
        seed: args.run.seed,
        strict: args.images.strict_data,
        ..LoaderOptions::default()
    };
    let side = args.images.input_size;
    let shown = spread(validation.clone().unwrap_or_else(|| train.clone()), SHOWN);
    let few = LoaderOptions { batch: SHOWN, order: Order::Sequential, workers: 0, ..loading };
    let after = pictures(Loader::new(shown, args.crop.evaluation(side)?, few), feed.clone());
    let in_order = |set| Ok(Loader::new(set, args.crop.evaluation(side)?, LoaderOptions { order: Order::Sequential, ..loading }));
    let ready = Ready {
        command: "pretrain mae",
        method: Box::new(mae),
        optimizer: Box::new(optimizer),
        loader: Loader::new(train, args.crop.training(side)?, loading),
        validation: validation.map(in_order).transpose()?,
        feed,
        after: Some(after),
        settings: settings(&PretrainArgs { images: args.images.resolved(), ..args.clone() })?,
        classes: Vec::new(),
    };
    start.train(&args.run, ready, say)
}
