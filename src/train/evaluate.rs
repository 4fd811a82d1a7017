//! How good a model is on a set of images.

use super::args::workers;
use super::exchange;
use super::feed::Feed;
use super::images::{ImagesArgs, Part, evaluation};
use super::model::{Model, ModelArgs};
use crate::data::loader::{Loader, LoaderOptions};
use crate::device::ranks::Ranks;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::formats::extend_crc32c;
use crate::methods::Method;
use crate::rng::Rng;
use clap::Args;
use std::path::PathBuf;

/// `masque evaluate`; what is not given is what the checkpoint's own run had.
#[derive(Args, Clone, Debug)]
pub struct EvaluateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A folder with val/, CIFAR's binary files, packed files; synthetic: the built-in images [default: those of the checkpoint's run]
    #[arg(long, value_name = "PATH|synthetic")]
    pub data_path: Option<PathBuf>,
    /// Images of a batch
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub batch_size: usize,
    /// Use only so many images: the first built-in ones, or ones spread over a sorted set [default: all]
    #[arg(long, value_name = "N")]
    pub val_images: Option<usize>,
    /// Classes of the model, where the images show only the first of them
    #[arg(long, value_name = "N")]
    pub nb_classes: Option<usize>,
    /// Resize the short side to the model's size / ratio and take the centre [default: the run's; else 0.875, above 224 pixels 1]
    #[arg(long, value_name = "RATIO")]
    pub eval_crop_ratio: Option<f64>,
    /// Means of the channels [default: the run's, or ImageNet's]
    #[arg(long, value_delimiter = ',', value_name = "R,G,B")]
    pub mean: Option<Vec<f32>>,
    /// Deviations of the channels
    #[arg(long, value_delimiter = ',', value_name = "R,G,B")]
    pub std: Option<Vec<f32>>,
    /// An image that cannot be read is an error, instead of being left out with a warning
    #[arg(long)]
    pub strict_data: bool,
    /// Threads that read images [default: one a core]
    #[arg(long, value_name = "N")]
    pub num_workers: Option<usize>,
    /// Those that evaluate with this one.
    #[arg(skip)]
    pub ranks: Ranks,
}

impl EvaluateArgs {
    pub fn run(&self, say: &mut dyn FnMut(&str)) -> Result<Evaluation> {
        if self.batch_size == 0 {
            return Err(Error::usage("--batch-size 0: at least one image is needed"));
        }
        let opened = self.model.open_for(&self.ranks)?;
        say(&opened.report);
        let images = opened.images(self.data_path.as_ref(), [&self.mean, &self.std])?;
        if images.data_path.as_os_str().is_empty() {
            return Err(Error::usage(format!(
                "{} does not say what images it is for; give them by --data-path",
                self.model.checkpoint.display()
            )));
        }
        let images = ImagesArgs { val_images: self.val_images, strict_data: self.strict_data, ..images };
        images.check()?;
        let dataset = images.open(Part::Val)?;
        dataset.notes().iter().for_each(|note| say(note));
        let Some(method) = opened.method() else {
            return Err(Error::usage(format!(
                "{} is an encoder without a head; masque probe --finetune judges its features",
                self.model.checkpoint.display()
            )));
        };
        let classes = if let Model::Classifier(classifier) = &opened.model { Some(classifier.classes) } else { None };
        let found = dataset.classes().len();
        if let Some(classes) = classes.filter(|&classes| classes < found || (classes > found && self.nb_classes != Some(classes))) {
            let more = if classes > found {
                format!("; if they are the first {found} of them, say so by --nb-classes {classes}")
            } else {
                String::new()
            };
            return Err(Error::new(format!(
                "{} answers with {classes} classes but {} has {found}{more}",
                self.model.checkpoint.display(),
                images.data_path.display()
            )));
        }
        if let Some((learned, named)) = opened.classes.iter().zip(dataset.classes()).find(|(learned, named)| learned != named) {
            return Err(Error::new(format!(
                "{} learned the class {learned} where {} has {named}: their labels do not mean the same",
                self.model.checkpoint.display(),
                images.data_path.display()
            )));
        }
        let ratio = self.eval_crop_ratio.or_else(|| opened.setting("eval-crop-ratio")?.as_f64());
        let options = LoaderOptions {
            batch: self.batch_size,
            workers: workers(self.ranks.own_threads(self.num_workers)),
            strict: self.strict_data,
            rank: self.ranks.rank(),
            ranks: self.ranks.world(),
            ..LoaderOptions::default()
        };
        let loader = Loader::new(dataset, evaluation(opened.side(), ratio)?, options);
        let [mean, std] = images.statistics();
        let feed = Feed { device: opened.params().device().clone(), mean, std, labels: None, bytes: method.needs_bytes() };
        exchange::compare(&self.ranks, opened.params(), "before the evaluation")?;
        let found = evaluate(method, &loader, &feed, &self.ranks)?;
        say_skipped(&loader, &self.ranks, say)?;
        say(&found.to_string());
        Ok(found)
    }
}

/// Over a whole set. As in the published programs the loss is the mean over batches, each counting the same; accuracies are over images.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Evaluation {
    pub loss: f64,
    /// In percent: the label is the first, or among the first five, of the answers. None for a method that does not classify.
    pub accuracy: Option<[f64; 2]>,
    pub images: usize,
}

/// As the published programs print it.
impl std::fmt::Display for Evaluation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.accuracy {
            Some([first, five]) => write!(f, "* Acc@1 {first:.3} Acc@5 {five:.3} loss {:.3} ({} images)", self.loss, self.images),
            None => write!(f, "loss {:.4} ({} images)", self.loss, self.images),
        }
    }
}

impl Evaluation {
    /// Whether this is better than what `best` says: more are right, or the loss is lower where nothing is classified.
    pub fn beats(&self, best: Option<f64>) -> bool {
        let (score, sign) = self.score();
        score.is_finite() && best.is_none_or(|best| sign * score > sign * best)
    }

    /// The number by which models are compared, and whether more (1) or less (-1) of it is better.
    pub fn score(&self) -> (f64, f64) {
        self.accuracy.map_or((self.loss, -1.0), |[first, _]| (first, 1.0))
    }
}

/// Names of unreadable images that are said.
const NAMES: usize = 10;

/// Says how many images could not be read, on any rank.
pub fn say_skipped(loader: &Loader, ranks: &Ranks, say: &mut dyn FnMut(&str)) -> Result<()> {
    let skipped = loader.skipped();
    let own = serde_json::to_vec(&(skipped.count, skipped.names)).context("images that could not be read")?;
    let (mut count, mut names) = (0, Vec::new());
    for bytes in ranks.gather("images that could not be read", &own)? {
        let (more, others): (usize, Vec<String>) = serde_json::from_slice(&bytes).context("images that could not be read")?;
        count += more;
        names.extend(others);
    }
    names.truncate(NAMES);
    if count > 0 {
        say(&format!("{count} images could not be read and are left out, the first: {}", names.join("; ")));
    }
    Ok(())
}

/// What came of one batch.
struct Judged {
    /// Among the batches of all ranks.
    number: u64,
    loss: f64,
    images: u64,
    right: Option<[u64; 2]>,
}

impl Judged {
    fn words(&self) -> [u64; 5] {
        // No batch has as many images as this.
        let [first, five] = self.right.unwrap_or([u64::MAX; 2]);
        [self.number, self.loss.to_bits(), self.images, first, five]
    }

    fn of(&[number, loss, images, first, five]: &[u64; 5]) -> Self {
        Self { number, loss: f64::from_bits(loss), images, right: (first != u64::MAX).then_some([first, five]) }
    }
}

/// Passes once through `loader`; a method that draws at random draws the same each time. Of several ranks each takes its batches of the loader, and everybody
/// gets what one rank would have found, to the last bit.
pub fn evaluate(method: &dyn Method, loader: &Loader, feed: &Feed, ranks: &Ranks) -> Result<Evaluation> {
    const SEED: u64 = 0;
    let (images, Feed { mean, std, .. }) = (loader.dataset(), feed);
    let labels = (0..images.len()).fold(0, |sum, image| extend_crc32c(sum, &images.label(image).to_le_bytes()));
    let (n, batch, transform) = (images.len(), loader.batch(), loader.transform());
    let what = format!("{n} images (labels {labels:08x}) in batches of {batch}, {transform}, mean {mean:?}, deviation {std:?}");
    if let Some((rank, all)) = ranks.differing("what is evaluated", what.as_bytes())? {
        let [theirs, first] = [rank, 0].map(|rank| String::from_utf8_lossy(&all[rank]).into_owned());
        crate::bail!(
            "rank {rank} evaluates {theirs} and rank 0 {first}; start all ranks with the same command, where they see the same files"
        );
    }
    let mut own = Vec::new();
    for (place, loaded) in loader.epoch(0, 0).enumerate() {
        let number = (ranks.rank() + place * ranks.world()) as u64;
        let batch = feed.evaluation(loaded?)?;
        let images = batch.images.shape()[0] as u64;
        let scores = method.scores(&batch, &Rng::new(SEED).at(number))?;
        own.extend(Judged { number, loss: scores.loss, images, right: scores.right.map(|right| right.map(|n| n as u64)) }.words());
    }
    let mut judged = Vec::new();
    for bytes in ranks.gather("the evaluation", bytemuck::cast_slice(&own))? {
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        judged.extend(words.as_chunks::<5>().0.iter().map(Judged::of));
    }
    judged.sort_by_key(|batch| batch.number);
    let images: u64 = judged.iter().map(|batch| batch.images).sum();
    ensure!(images > 0, "there is nothing to evaluate on: no image of the set could be read");
    let loss = judged.iter().fold(0.0, |sum, batch| sum + batch.loss) / judged.len() as f64;
    let right = judged.iter().try_fold([0, 0], |sum, batch| batch.right.map(|more| [sum[0] + more[0], sum[1] + more[1]]));
    let percent = |right: u64| 100.0 * right as f64 / images as f64;
    Ok(Evaluation { loss, accuracy: right.map(|right| right.map(percent)), images: images as usize })
}
