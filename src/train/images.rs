//! Which images a run reads: the flags, and the datasets they name.

use crate::data::Dataset;
use crate::data::cache::Cached;
use crate::data::crop::{ASPECTS, Crop};
use crate::data::open::{Split, lacks_validation, open};
use crate::data::synthetic::{Glyphs, GlyphsConfig};
use crate::data::transform::Transform;
use crate::error::{Error, Result};
use crate::rng::Rng;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImagesArgs {
    /// A folder with train/ and val/ (a sub-folder a class), CIFAR's binary files, packed files; synthetic: the built-in images [default: synthetic]
    #[arg(long, default_value = "synthetic", value_name = "PATH|synthetic")]
    pub data_path: PathBuf,
    /// Side of the square images that the model sees
    #[arg(long, default_value_t = 224, value_name = "PIXELS")]
    pub input_size: usize,
    /// Channels of the built-in images; images from files have 3
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub in_chans: usize,
    /// Use only so many training images: the first built-in ones, or ones spread over a sorted set [default: all]
    #[arg(long, value_name = "N")]
    pub train_images: Option<usize>,
    /// Use only this part of each class's training images, always the same ones [default: all]
    #[arg(long, value_name = "PART")]
    #[serde(default)]
    pub data_fraction: Option<f64>,
    /// Use only so many validation images, in the same way [default: all]
    #[arg(long, value_name = "N")]
    pub val_images: Option<usize>,
    /// An image that cannot be read ends the run, instead of being left out with a warning
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub strict_data: bool,
    /// Means of the channels that are subtracted [default: ImageNet's; 0.5 for the built-in images]
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, value_name = "R,G,B")]
    pub mean: Option<Vec<f32>>,
    /// Deviations of the channels [default: ImageNet's; 0.25 for the built-in images]
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, value_name = "R,G,B")]
    pub std: Option<Vec<f32>>,
}

/// How an image is cut, in training and in evaluation.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CropArgs {
    /// Which part of a training image is seen
    #[arg(long, value_enum, default_value_t = CropName::Resized)]
    pub crop: CropName,
    /// Least part of an image's area that a resized crop shows
    #[arg(long, default_value_t = 0.08, value_name = "PART")]
    pub crop_min: f64,
    /// Most pixels that --crop shift moves an image
    #[arg(long, default_value_t = 3, value_name = "PIXELS")]
    pub shift: usize,
    /// Mirror half of the training images
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub flip: bool,
    /// Evaluation resizes the short side to input size / ratio and takes the centre [default: 0.875, above 224 pixels 1]
    #[arg(long, value_name = "RATIO")]
    pub eval_crop_ratio: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CropName {
    /// A random part of random size and aspect, resized
    Resized,
    /// The same drawn only once, as linear probing does
    Once,
    /// The whole image, resized without regard to its aspect
    Whole,
    /// The whole image moved by a few pixels
    Shift,
    /// A random window of the image with a border of 4 pixels, as for CIFAR
    Padded,
    /// The short side resized, then a random window, as DeiT-III's --src
    Simple,
    /// The centre, as in evaluation
    Centre,
}

impl CropArgs {
    /// Crop and flip of training images, before their colours change.
    pub fn training(&self, side: usize) -> Result<Transform> {
        if !(self.crop_min > 0.0 && self.crop_min <= 1.0) {
            return Err(Error::usage(format!("--crop-min {} is not a part above 0 and up to 1", self.crop_min)));
        }
        let scale = [self.crop_min, 1.0];
        let crop = match self.crop {
            CropName::Resized => Crop::Resized { scale, ratio: ASPECTS },
            CropName::Once => Crop::Once { scale, ratio: ASPECTS },
            CropName::Whole => Crop::Whole,
            CropName::Shift => Crop::Shift { most: self.shift },
            CropName::Padded => Crop::Padded { padding: 4 },
            CropName::Simple => Crop::Simple,
            CropName::Centre => self.evaluation(side)?.crop,
        };
        Ok(Transform { crop, flip: self.flip, ..Transform::probe(side) })
    }

    pub fn evaluation(&self, side: usize) -> Result<Transform> {
        evaluation(side, self.eval_crop_ratio)
    }
}

/// What is done to an image that a model is judged by.
pub fn evaluation(side: usize, ratio: Option<f64>) -> Result<Transform> {
    match ratio {
        None => Ok(Transform::evaluate(side)),
        Some(ratio) if ratio > 0.0 && ratio <= 1.0 => Ok(Transform::evaluate_at(side, ratio)),
        Some(ratio) => Err(Error::usage(format!("--eval-crop-ratio {ratio} is not above 0 and up to 1"))),
    }
}

const IMAGENET: [[f32; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];

/// Most bytes of built-in images that are kept once they are drawn.
const CACHE: usize = 2 << 30;

/// Which part of a dataset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Train,
    Val,
}

impl ImagesArgs {
    pub fn is_synthetic(&self) -> bool {
        self.data_path.as_os_str() == "synthetic"
    }

    pub fn check(&self) -> Result<()> {
        if self.in_chans != 3 && !self.is_synthetic() {
            return Err(Error::usage(format!("--in-chans {}: images from files have 3 channels", self.in_chans)));
        }
        for (flag, count) in [("--train-images", self.train_images), ("--val-images", self.val_images)] {
            if count == Some(0) {
                return Err(Error::usage(format!("{flag} 0: at least one image is needed; leave the flag out for all of them")));
            }
        }
        if let Some(part) = self.data_fraction.filter(|part| !(*part > 0.0 && *part <= 1.0)) {
            return Err(Error::usage(format!("--data-fraction {part} is not a part above 0 and up to 1")));
        }
        for (flag, given) in [("--mean", &self.mean), ("--std", &self.std)] {
            let wrong = given.iter().flatten().find(|x| !x.is_finite() || (flag == "--std" && **x <= 0.0));
            if let Some(wrong) = wrong {
                return Err(Error::usage(format!("{flag} {wrong} cannot be normalised with")));
            }
            if let Some(given) = given.as_ref().filter(|given| given.len() != self.in_chans) {
                return Err(Error::usage(format!("{flag} has {} numbers but the images have {} channels", given.len(), self.in_chans)));
            }
        }
        Ok(())
    }

    /// Mean and deviation of the channels.
    pub fn statistics(&self) -> [Vec<f32>; 2] {
        let own = if self.is_synthetic() { [vec![0.5; self.in_chans], vec![0.25; self.in_chans]] } else { IMAGENET.map(Vec::from) };
        let [mean, std] = own;
        [self.mean.clone().unwrap_or(mean), self.std.clone().unwrap_or(std)]
    }

    /// Whether there are images to train with and none to evaluate on.
    pub fn lacks_validation(&self) -> bool {
        !self.is_synthetic() && lacks_validation(&self.data_path)
    }

    /// With the statistics written out, as a checkpoint remembers them.
    pub fn resolved(&self) -> Self {
        let [mean, std] = self.statistics();
        Self { mean: Some(mean), std: Some(std), ..self.clone() }
    }

    pub fn open(&self, part: Part) -> Result<Arc<dyn Dataset>> {
        let dataset: Arc<dyn Dataset> = if self.is_synthetic() {
            let glyphs = GlyphsConfig { size: self.input_size, channels: self.in_chans, ..GlyphsConfig::of(part == Part::Train) };
            Arc::new(Cached::new(Arc::new(Glyphs::new(glyphs)?), CACHE))
        } else {
            open(&self.data_path, if part == Part::Train { Split::Train } else { Split::Val })?
        };
        let most = if part == Part::Train { self.train_images } else { self.val_images };
        let dataset: Arc<dyn Dataset> = match most.filter(|most| *most < dataset.len()) {
            Some(most) if self.is_synthetic() => Arc::new(Fewer { dataset, images: (0..most).collect() }),
            Some(most) => spread(dataset, most),
            None => dataset,
        };
        Ok(match self.data_fraction.filter(|_| part == Part::Train) {
            Some(fraction) => Arc::new(Fewer { images: of_each_class(&*dataset, fraction), dataset }),
            None => dataset,
        })
    }
}

/// So many images of a set, from all of its parts.
pub fn spread(dataset: Arc<dyn Dataset>, most: usize) -> Arc<dyn Dataset> {
    let (most, len) = (most.min(dataset.len()), dataset.len());
    let images = (0..most).map(|index| (index as u128 * len as u128 / most as u128) as usize).collect();
    Arc::new(Fewer { dataset, images })
}

/// This part of the images of each class, at least one, drawn the same way in every run.
fn of_each_class(dataset: &dyn Dataset, fraction: f64) -> Vec<usize> {
    let mut classes: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    (0..dataset.len()).for_each(|index| classes.entry(dataset.label(index)).or_default().push(index));
    let mut chosen = Vec::new();
    for (class, mut images) in classes {
        let count = ((images.len() as f64 * fraction).round() as usize).max(1);
        Rng::new(0).stream("data fraction", class.into()).shuffle(&mut images);
        chosen.extend(&images[..count]);
    }
    chosen.sort_unstable();
    chosen
}

/// Some images of a set.
struct Fewer {
    dataset: Arc<dyn Dataset>,
    images: Vec<usize>,
}

impl Dataset for Fewer {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn classes(&self) -> &[String] {
        self.dataset.classes()
    }

    fn label(&self, index: usize) -> u32 {
        self.dataset.label(self.images[index])
    }

    fn name(&self, index: usize) -> String {
        self.dataset.name(self.images[index])
    }

    fn picture(&self, index: usize) -> Result<crate::data::Picture> {
        self.dataset.picture(self.images[index])
    }

    fn notes(&self) -> &[String] {
        self.dataset.notes()
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        self.dataset.encoded(self.images[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_is_taken_of_each_class_and_always_the_same() {
        let set = Glyphs::new(GlyphsConfig { len: 400, ..GlyphsConfig::of(true) }).unwrap();
        let counts = |chosen: &[usize]| {
            let mut counts = [0usize; 20];
            chosen.iter().for_each(|&index| counts[set.label(index) as usize] += 1);
            counts
        };
        let (all, half) = (counts(&(0..400).collect::<Vec<_>>()), of_each_class(&set, 0.5));
        counts(&half).iter().zip(all).for_each(|(&half, all)| assert!(half.abs_diff(all.div_ceil(2)) <= 1, "{half} of {all}"));
        assert_eq!(half, of_each_class(&set, 0.5));
        assert!(counts(&of_each_class(&set, 1e-9)).iter().all(|&count| count == 1));
        assert!(half.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
