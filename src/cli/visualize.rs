//! `masque visualize`: what a model paints where patches are hidden, and where its class token looks.

use crate::data::loader::{Loader, LoaderOptions};
use crate::data::transform::{Crop, Transform};
use crate::data::{Dataset, Picture, decode};
use crate::error::{Context, Error, Result};
use crate::rng::Rng;
use crate::train::feed::Feed;
use crate::train::images::{ImagesArgs, Part, evaluation};
use crate::train::model::{Model, ModelArgs};
use crate::train::picture;
use crate::train::visualize::{Normalised, attention_rows, panel_rows};
use clap::Args;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Args)]
pub struct Visualize {
    #[command(flatten)]
    model: ModelArgs,
    /// Images to show (JPEG, PNG, WebP, BMP), resized to the model's size [default: the first validation images of the checkpoint's run]
    images: Vec<PathBuf>,
    /// The picture to write
    #[arg(long, short, default_value = "masque.png", value_name = "FILE.png")]
    output: PathBuf,
    /// Parts of the patches that are hidden, one row each
    #[arg(long, value_delimiter = ',', default_value = "0.75", value_name = "RATIO,...")]
    mask_ratio: Vec<f64>,
    /// Show where the class token looks in the last block, instead
    #[arg(long)]
    attention: bool,
    /// How many images to show where none are named
    #[arg(long, default_value_t = 4, value_name = "N")]
    count: usize,
    /// Seed of the masks; 2 is that of MAE's demo
    #[arg(long, default_value_t = 2)]
    seed: u64,
    /// The model predicts normalised pixels; masque's own checkpoints say so themselves
    #[arg(long)]
    norm_pix_loss: bool,
}

/// No more images than these stand in one picture.
const MOST: usize = 64;

impl Visualize {
    pub fn run(&self, say: &mut dyn FnMut(&str)) -> Result<()> {
        if self.output.extension().is_none_or(|ending| ending != "png") {
            return Err(Error::usage(format!("--output {}: a picture is written as .png", self.output.display())));
        }
        let count = if self.images.is_empty() { self.count } else { self.images.len() };
        if count == 0 || count > MOST {
            return Err(Error::usage(format!("{count} images cannot be shown in one picture; give 1 to {MOST}")));
        }
        let mut opened = self.model.open()?;
        say(&opened.report);
        if let (Model::Mae(mae), true) = (&mut opened.model, self.norm_pix_loss) {
            mae.predict_normalised();
        }
        let own = |key: &str| opened.settings.get(key)?.as_array().map(|x| x.iter().filter_map(Value::as_f64).map(|x| x as f32).collect());
        let data_path = opened.settings.get("data-path").and_then(Value::as_str);
        let images = ImagesArgs {
            data_path: PathBuf::from(data_path.unwrap_or_default()),
            input_size: opened.side(),
            train_images: None,
            val_images: None,
            strict_data: false,
            mean: own("mean"),
            std: own("std"),
        };
        let [mean, std] = images.statistics();
        let (dataset, transform): (Arc<dyn Dataset>, _) = if !self.images.is_empty() {
            let whole = Transform { crop: Crop::Whole, ..Transform::evaluate(opened.side()) };
            (Arc::new(Files { paths: self.images.clone() }), whole)
        } else if data_path.is_some() {
            let ratio = opened.settings.get("eval-crop-ratio").and_then(Value::as_f64);
            (images.open(Part::Val)?, evaluation(opened.side(), ratio)?)
        } else {
            return Err(Error::usage("no image was named, and the checkpoint does not say what images it is for; name an image"));
        };
        let loader = Loader::new(dataset, transform, LoaderOptions { batch: count, strict: true, ..LoaderOptions::default() });
        let loaded = loader.epoch(0, 0).next().ok_or_else(|| Error::new("the set holds no image"))??;
        let names: Vec<String> = match self.images.is_empty() {
            true => Vec::new(),
            false => loaded.indices.iter().map(|&index| loader.dataset().name(index)).collect(),
        };
        let feed = Feed { device: opened.params().device().clone(), mean, std, labels: None };
        let pixels = feed.evaluation(loaded)?.images;
        let normalised = Normalised { mean: &mean, std: &std };
        let rows = match (&opened.model, self.attention) {
            (_, true) => attention_rows(opened.vit(), opened.params(), &pixels, normalised, &names)?,
            (Model::Mae(mae), false) => panel_rows(mae, &pixels, normalised, &self.mask_ratio, &names, &Rng::new(self.seed))?,
            (_, false) => {
                return Err(Error::usage(format!(
                    "{} has no decoder to paint with; --attention shows where it looks",
                    self.model.checkpoint.display()
                )));
            }
        };
        picture::sheet(&rows)?.save(&self.output)?;
        say(&format!("{}: {count} images", self.output.display()));
        Ok(())
    }
}

/// Images named one by one.
struct Files {
    paths: Vec<PathBuf>,
}

impl Dataset for Files {
    fn len(&self) -> usize {
        self.paths.len()
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn label(&self, _index: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        let path = &self.paths[index];
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        let attempt = || self.paths[index].display().to_string();
        let bytes = std::fs::read(&self.paths[index]).with_context(attempt)?;
        decode::decode(&bytes).with_context(attempt)
    }
}
