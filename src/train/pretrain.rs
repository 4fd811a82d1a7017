//! `masque pretrain`: a method that learns from images alone.

use super::args::{RunArgs, settings};
use super::cache::Shown;
use super::feed::Feed;
use super::images::{CropArgs, ImagesArgs, Part, spread};
use super::picture::{self, SheetRow};
use super::predicted;
use super::run::{After, Ended, Schedule};
use super::start::{Ready, Start};
use super::visualize::{self, Normalised};
use crate::data::loader::{Loader, LoaderOptions, Order};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::methods::dmae::Dmae;
use crate::methods::mae::{Mae, MaeArgs};
use crate::methods::{Batch, Method};
use crate::nn::vit::VitConfig;
use crate::nn::weights::{self, Policy, Which};
use crate::optim::adamw::AdamW;
use crate::optim::groups;
use crate::param::Params;
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::any::Any;
use std::path::PathBuf;

/// What all pre-training commands share.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CommonArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub images: ImagesArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub crop: CropArgs,
}

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PretrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub method: MaeArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub init: InitArgs,
}

/// What a whole pre-training model starts from.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InitArgs {
    /// Start from the weights of this checkpoint: a whole model of masque or of the method's program (.pth, .safetensors) [default: from scratch]
    #[arg(long, value_name = "PATH")]
    pub init: Option<PathBuf>,
    /// --init may be an encoder alone: decoder and heads start from scratch
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub fresh_decoder: bool,
}

impl InitArgs {
    /// Gives a fresh model, whose encoder is `vit`, the weights of --init.
    pub fn load(&self, params: &mut Params, vit: &VitConfig, say: &mut dyn FnMut(&str)) -> Result<()> {
        if let Some(path) = &self.init {
            let file = weights::open(path, Which::Trained)?;
            let policy = Policy::PreTraining { fresh_decoder: self.fresh_decoder };
            say(&weights::load(params, vit, &file, policy)?.text());
        } else if self.fresh_decoder {
            return Err(Error::usage("--fresh-decoder says what --init may lack; give a checkpoint by --init PATH"));
        }
        Ok(())
    }
}

/// Images that the pictures of a run show.
const SHOWN: usize = 6;

/// Draws the panels of a few unseen images after each evaluation.
fn pictures<'a>(shown: Loader, feed: Feed) -> After<'a> {
    Box::new(move |method, record, place| {
        let Some(loaded) = shown.epoch(0, 0).next() else { return Ok(()) };
        let batch = feed.evaluation(loaded?)?;
        let normalised = Normalised { mean: &feed.mean, std: &feed.std };
        let Some((rows, what)) = rows_of(method, &batch, normalised)? else { return Ok(()) };
        let caption = format!("Unseen images {what}, after epoch {}", place.epoch);
        record.picture(place.update, "reconstruction", &caption, &picture::sheet(&rows)?.png()?)
    })
}

/// Rows of panels and what they show of the images; None of a method that has nothing to show.
fn rows_of(method: &dyn Method, batch: &Batch, normalised: Normalised) -> Result<Option<(Vec<SheetRow>, String)>> {
    let rng = Rng::new(2);
    if let Some((rows, what)) = predicted::rows(method, batch, normalised, &[], &rng)? {
        return Ok(Some((rows, what)));
    }
    let method = method as &dyn Any;
    let distilled = || method.downcast_ref::<Dmae>().map(|dmae| &dmae.mae);
    let Some(mae) = method.downcast_ref::<Mae>().or_else(distilled) else { return Ok(None) };
    let rows = visualize::panel_rows(mae, &batch.images, normalised, &[mae.mask_ratio()], &[], &rng)?;
    let given = if mae.norm_pix().is_some() { "; mean and deviation of each hidden patch are the true ones" } else { "" };
    Ok(Some((rows, format!("with {:.0} % of the patches hidden{given}", 100.0 * mae.mask_ratio()))))
}

/// Betas of MAE's AdamW.
const BETAS: (f64, f64) = (0.9, 0.95);

/// A pre-training command: what is its own.
pub struct Job<'a> {
    /// The command's words.
    pub command: &'static str,
    /// What a new folder under runs/ is called.
    pub folder: &'static str,
    pub common: &'a CommonArgs,
    /// Strength of the jitter of the colours that the student sees, where its teacher sees the clean view of the same cut.
    pub jitter: Option<f64>,
    /// Fixed views of each image.
    pub views: Option<u64>,
    pub schedule: Schedule,
    /// AdamW's, and the names of parameters that do not decay although they are no vectors.
    pub betas: (f64, f64),
    pub no_decay: &'static [&'static str],
    pub settings: Map<String, Value>,
}

/// What a method is made with.
pub struct Making<'a> {
    pub device: Device,
    /// Whether a checkpoint brings the weights.
    pub resumed: bool,
    pub say: &'a mut dyn FnMut(&str),
    /// What a teacher would see.
    pub shown: Shown,
}

impl<'a> Job<'a> {
    /// One that trains as MAE does.
    pub fn new(command: &'static str, folder: &'static str, common: &'a CommonArgs, settings: Map<String, Value>) -> Self {
        let schedule = common.run.schedule();
        Self { command, folder, common, jitter: None, views: None, schedule, betas: BETAS, no_decay: &[], settings }
    }

    /// Trains what `make` makes, on its device.
    pub fn train(self, make: impl FnOnce(Making) -> Result<Box<dyn Method>>, say: &mut dyn FnMut(&str)) -> Result<Ended> {
        let CommonArgs { run, images, crop } = self.common;
        run.check()?;
        images.check()?;
        let side = images.input_size;
        let start = Start::of(run, self.folder)?;
        let device = run.open_device()?;
        let train = images.open(Part::Train)?;
        // Pre-training reads no labels and needs no other images; where there are some, they show how it generalises.
        let validation = if images.lacks_validation() {
            say(&format!("{} has no images for validation: nothing is evaluated", images.data_path.display()));
            None
        } else {
            Some(images.open(Part::Val)?)
        };
        train.notes().iter().chain(validation.iter().flat_map(|set| set.notes())).for_each(|note| say(note));

        let cut = crop.training(side)?;
        let transform = match self.jitter {
            Some(_) if images.in_chans != 3 => {
                return Err(Error::usage(format!(
                    "--in-chans {}: colours are changed of images with 3 channels only; give --color-jitter 0",
                    images.in_chans
                )));
            }
            Some(strength) => cut.two_views(strength)?,
            None => cut,
        };
        let loading = LoaderOptions {
            batch: run.batch_size,
            order: Order::Shuffled,
            workers: run.workers(),
            seed: run.seed,
            strict: images.strict_data,
            views: self.views,
            rank: run.ranks.rank(),
            ranks: run.ranks.world(),
        };
        loading.check()?;
        let [mean, std] = images.statistics();
        let shown = Shown {
            images: train.clone(),
            transform: transform.clone(),
            statistics: [mean.clone(), std.clone()],
            seed: run.seed,
            views: self.views,
            precision: run.precision,
            ranks: run.ranks.clone(),
        };
        let mut method = make(Making { device: device.clone(), resumed: start.from.is_some(), say: &mut *say, shown })?;
        let optimizer = AdamW::new(groups::by_decay(method.params(), run.weight_decay, self.no_decay), self.betas, 1e-8)?;
        let feed = Feed { device, mean, std, labels: None, bytes: method.needs_bytes() };
        let shown = spread(validation.clone().unwrap_or_else(|| train.clone()), SHOWN);
        let few = LoaderOptions { batch: SHOWN, order: Order::Sequential, workers: 0, views: None, rank: 0, ranks: 1, ..loading };
        let after = pictures(Loader::new(shown, crop.evaluation(side)?, few), feed.clone());
        let in_order =
            |set| Ok(Loader::new(set, crop.evaluation(side)?, LoaderOptions { order: Order::Sequential, views: None, ..loading }));
        let ready = Ready {
            command: self.command,
            method,
            optimizer: Box::new(optimizer),
            loader: Loader::new(train, transform, loading),
            validation: validation.map(in_order).transpose()?,
            feed,
            schedule: self.schedule,
            after: Some(after),
            settings: self.settings,
            classes: Vec::new(),
        };
        start.train(run, ready, say)
    }
}

impl CommonArgs {
    /// With the statistics written out, as a checkpoint remembers them.
    pub fn resolved(&self) -> Self {
        Self { images: self.images.resolved(), ..self.clone() }
    }
}

pub fn mae(args: &PretrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let common = &args.common;
    let config = args.method.config(common.images.input_size, common.images.in_chans)?;
    let masks = args.method.masks(&config.encoder)?;
    let settings = settings(&PretrainArgs { common: common.resolved(), ..args.clone() })?;
    let make = |making: Making| -> Result<Box<dyn Method>> {
        let mut mae = Mae::new(config, Dtype::F32, &Rng::new(common.run.seed))?.with_masks(masks);
        if !making.resumed {
            args.init.load(&mut mae.params, &mae.encoder.config, making.say)?;
        }
        mae.params.move_to(&making.device, common.run.precision.dtype())?;
        Ok(Box::new(mae))
    };
    Job::new("pretrain mae", "pretrain-mae", common, settings).train(make, say)
}
