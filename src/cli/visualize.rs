//! `masque visualize`: what a model sees in any image, as one PNG.

use crate::data::{Picture, decode, resize};
use crate::error::{Context, Error, Result};
use crate::formats;
use crate::methods::Batch;
use crate::rng::Rng;
use crate::targets::pixels;
use crate::tensor::Tensor;
use crate::train::images::{ImagesArgs, Part, spread};
use crate::train::model::{Model, ModelArgs, Opened};
use crate::train::picture::{SheetRow, sheet};
use crate::train::predicted;
use crate::train::visualize::{Normalised, attention_rows, panel_rows};
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// Images that go through the model together.
const TOGETHER: usize = 8;
/// Letters of a file's name that are shown beside its panels.
const LETTERS: usize = 16;

#[derive(Args)]
pub struct VisualizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Images (JPEG, PNG, WebP, BMP), resized to the model's size whatever their shape [default: four unseen images of the checkpoint's run]
    #[arg(value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Parts of the patches that are hidden, a row of panels each [default: the part hidden in training]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "RATIO,...")]
    mask_ratio: Vec<f64>,
    /// The file to write
    #[arg(long, default_value = "visualize.png", value_name = "FILE.png")]
    output: PathBuf,
    /// Also draw where the class token looks in the last block; a model without a decoder has nothing else to show
    #[arg(long)]
    attention: bool,
    /// The model predicts pixels normalised patch by patch: show them with the true mean and deviation of each patch [default: as the checkpoint says]
    #[arg(long)]
    norm_pix_loss: bool,
    /// Seed of the masks
    #[arg(long, default_value_t = 2)]
    seed: u64,
    /// Means of the channels that the model was trained with [default: the run's, or ImageNet's]
    #[arg(long, value_delimiter = ',', value_name = "R,G,B")]
    mean: Option<Vec<f32>>,
    /// Deviations of the channels
    #[arg(long, value_delimiter = ',', value_name = "R,G,B")]
    std: Option<Vec<f32>>,
}

impl VisualizeArgs {
    pub fn run(&self, say: &mut dyn FnMut(&str)) -> Result<()> {
        self.check()?;
        let mut opened = self.model.open()?;
        say(&opened.report);
        match &mut opened.model {
            Model::Mae(mae) if self.norm_pix_loss && mae.norm_pix().is_none() => mae.set_norm_pix(Some(pixels::EPS)),
            Model::Mae(_) => {}
            Model::Dmjd(_) | Model::MaskFeat(_) => self.as_it_learned(&opened)?,
            _ => self.needs_decoder(&opened)?,
        }
        let draws = matches!(opened.model, Model::Mae(_) | Model::Dmjd(_) | Model::MaskFeat(_));
        if !opened.vit().config.class_token && (self.attention || !draws) {
            let file = self.model.checkpoint.display();
            return Err(Error::usage(format!(
                "{file} is a ConViT, which has no class token, so there is nothing to show of where it looks"
            )));
        }
        let of_run = opened.images(None, [&self.mean, &self.std])?;
        let [mean, std] = of_run.statistics();
        let normalised = Normalised { mean: &mean, std: &std };
        let pictures = if self.images.is_empty() { self.unseen(&opened, &of_run)? } else { self.read(&opened)? };
        let mut rows = Vec::new();
        for some in pictures.chunks(TOGETHER) {
            rows.extend(self.rows(&opened, some, normalised)?);
        }
        let png = sheet(&rows)?.png()?;
        formats::write_atomically(&self.output, |out| out.write_all(&png).context("writing the picture"))?;
        say(&format!("{}: {} images, {} rows of panels", self.output.display(), pictures.len(), rows.len()));
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.output.extension().is_none_or(|ending| !ending.eq_ignore_ascii_case("png")) {
            return Err(Error::usage(format!("--output {}: pictures are written as PNG; use the ending .png", self.output.display())));
        }
        match self.mask_ratio.iter().find(|ratio| !(0.0..=1.0).contains(*ratio)) {
            Some(ratio) => Err(Error::usage(format!("--mask-ratio {ratio} is not a fraction from 0 to 1"))),
            None => Ok(()),
        }
    }

    /// What only a decoder can answer was not asked of a model that has none.
    fn needs_decoder(&self, opened: &Opened) -> Result<()> {
        let what = if matches!(opened.model, Model::Classifier(_)) { "a classifier" } else { "an encoder alone" };
        let flag = match (self.mask_ratio.is_empty(), self.norm_pix_loss) {
            (false, _) => "--mask-ratio",
            (true, true) => "--norm-pix-loss",
            (true, false) => return Ok(()),
        };
        let file = self.model.checkpoint.display();
        Err(Error::usage(format!(
            "{flag}: {file} is {what}, which reconstructs nothing; leave the flag out to see where its class token looks"
        )))
    }

    /// DMJD and MaskFeat are shown with the masks that they learned with, and only where what they predict is a picture.
    fn as_it_learned(&self, opened: &Opened) -> Result<()> {
        let file = self.model.checkpoint.display();
        if !self.mask_ratio.is_empty() || self.norm_pix_loss {
            let flag = if self.norm_pix_loss { "--norm-pix-loss" } else { "--mask-ratio" };
            return Err(Error::usage(format!("{flag}: {file} is shown as it learned, whose settings it knows; leave the flag out")));
        }
        if opened.setting("pred-type").and_then(|kind| kind.as_str()) == Some("teacher") && !self.attention {
            return Err(Error::usage(format!(
                "{file} predicts the features of a teacher, which are no picture; --attention shows where its class token looks"
            )));
        }
        Ok(())
    }

    fn read(&self, opened: &Opened) -> Result<Vec<(String, Picture)>> {
        let several = self.images.len() > 1;
        let read = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name: String = if several { name.chars().take(LETTERS).collect() } else { String::new() };
            Ok((name, fitted(decode::open(path)?, opened).with_context(|| path.display().to_string())?))
        };
        self.images.iter().map(read).collect()
    }

    /// Four validation images, spread over the set.
    fn unseen(&self, opened: &Opened, of_run: &ImagesArgs) -> Result<Vec<(String, Picture)>> {
        if of_run.data_path.as_os_str().is_empty() {
            let file = self.model.checkpoint.display();
            return Err(Error::usage(format!("{file} does not say what images it is for; name the images to show behind it")));
        }
        let set = spread(of_run.open(Part::Val)?, 4);
        (0..set.len()).map(|index| Ok((String::new(), fitted(set.picture(index)?, opened)?))).collect()
    }

    fn rows(&self, opened: &Opened, pictures: &[(String, Picture)], normalised: Normalised) -> Result<Vec<SheetRow>> {
        let names: Vec<String> = pictures.iter().map(|(name, _)| name.clone()).collect();
        let side = opened.side();
        let values = pictures.iter().map(|(_, picture)| resize::normalise(&picture.pixels, picture.size, normalised.mean, normalised.std));
        let values = values.collect::<Result<Vec<_>>>()?.concat();
        let images = Tensor::from_slice(&[pictures.len(), normalised.mean.len(), side, side], &values)?;
        let images = images.on(opened.params().device())?;
        let mut rows = Vec::new();
        if let Model::Mae(mae) = &opened.model {
            let ratios = if self.mask_ratio.is_empty() { vec![mae.mask_ratio()] } else { self.mask_ratio.clone() };
            rows = panel_rows(mae, &images, normalised, &ratios, &names, &Rng::new(self.seed))?;
        }
        if let (Model::Dmjd(_) | Model::MaskFeat(_), Some(method)) = (&opened.model, opened.method()) {
            let bytes = pictures.iter().flat_map(|(_, picture)| picture.pixels.iter().copied()).collect::<Vec<u8>>();
            let bytes = Tensor::from_slice(&[pictures.len(), side, side, normalised.mean.len()], &bytes)?;
            let batch = Batch { bytes: Some(bytes), ..Batch::of_images(images.clone()) };
            rows = predicted::rows(method, &batch, normalised, &names, &Rng::new(self.seed))?.map_or(Vec::new(), |(rows, _)| rows);
        }
        if self.attention || !matches!(opened.model, Model::Mae(_) | Model::Dmjd(_) | Model::MaskFeat(_)) {
            rows.extend(attention_rows(opened.vit(), opened.params(), &images, normalised, &names)?);
        }
        Ok(rows)
    }
}

/// A picture as the model takes it: its size, whatever the shape was.
fn fitted(picture: Picture, opened: &Opened) -> Result<Picture> {
    let config = &opened.vit().config;
    if picture.channels != config.channels {
        return Err(Error::new(format!("the image has {} channels but the model takes {}", picture.channels, config.channels)));
    }
    let pixels = resize::resize(&picture.pixels, picture.size, picture.channels, config.image)?;
    Picture::new(config.image, picture.channels, pixels)
}
