//! Batches of an epoch, each image decoded and transformed with numbers that depend on (seed, epoch, place) alone; with fixed views, on (seed, view, image),
//! the views taking turns over the epochs.
//!
//! Worker threads take the places of an epoch's order one after another and write each picture to its row of a batch. A few batches are filled ahead of
//! the one that is handed out, in memory that goes round; then the workers wait. Batches come out in order, whichever row was ready first.
//!
//! An image that cannot be read is remembered with its reason. In a shuffled order another one of the set stands in for it, drawn from the place's own
//! stream and with its own label; in a sequential order it is left out. Where everything has to be readable, it is an error.

use super::assemble::{Assembly, Recipe, Unread};
pub use super::order::Order;
use super::transform::Transform;
use super::workers::Workers;
use super::{Dataset, augment};
use crate::error::{Error, Result};
use crate::rng::Rng;
use crate::tensor::{Device, Dtype, Tensor};
use crate::{bail, ensure};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// Reasons that are kept of images that cannot be read.
const REASONS: usize = 10;
/// So many images are looked at before it is said that too many cannot be read.
const ENOUGH: usize = 100;

#[derive(Clone, Copy, Debug)]
pub struct LoaderOptions {
    pub batch: usize,
    pub order: Order,
    /// Threads that decode and transform, 0 for the one that asks; they never change what a batch holds.
    pub workers: usize,
    pub seed: u64,
    /// Whether an image that cannot be read is an error, and not skipped.
    pub strict: bool,
    /// Which part of the order is taken, and of how many.
    pub rank: usize,
    pub ranks: usize,
    /// In how many fixed views each image is seen, one an epoch in turn; None: another one in every epoch.
    pub views: Option<u64>,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self { batch: 1, order: Order::Sequential, workers: 0, seed: 0, strict: false, rank: 0, ranks: 1, views: None }
    }
}

impl LoaderOptions {
    /// Whether views and order can be meant.
    pub fn check(&self) -> Result<()> {
        match (self.views, self.order) {
            (Some(views), _) if views == 0 || views > 1 << 32 => Err(Error::usage(format!(
                "--views {views}: an image is seen in 1 to {} fixed views; leave the flag out for new ones in every epoch",
                1u64 << 32
            ))),
            (Some(views), Order::Repeated { times }) => Err(Error::usage(format!(
                "--views {views} shows an image once in an epoch, and --repeated-aug {times} times in different ways; give --repeated-aug=false, or no --views"
            ))),
            _ => Ok(()),
        }
    }
}

/// Boxes to be erased, on the host.
pub struct Erased {
    /// (top, left, height, width), u32 [B, R, 4]; of height 0 where nothing is erased.
    pub boxes: Tensor,
    pub fill: Filled,
}

/// What stands in erased boxes, f32.
pub enum Filled {
    Zero,
    /// [B, R, C]
    Channels(Tensor),
    /// [B, C, S, S]; arbitrary outside the boxes.
    Pixels(Tensor),
}

/// A batch as bytes, on the host.
pub struct Loaded {
    /// u8 [B, S, S, C]
    pub bytes: Tensor,
    /// The same before colours changed and with nothing erased, where the transform gives two views.
    pub clean: Option<Tensor>,
    pub labels: Vec<u32>,
    /// Numbers of the images in the set.
    pub indices: Vec<usize>,
    /// Which of all fixed views of all images each is: view * images + number; None where views are not fixed, and for what stands in for another image.
    pub keys: Vec<Option<u64>>,
    /// What the transform wants erased.
    pub erase: Option<Erased>,
}

impl Loaded {
    /// Normalised images [B, C, S, S] on a device, with the boxes of the transform erased unless `augment` has others.
    pub fn images(&self, device: &Device, mean: &[f32], std: &[f32], augment: &augment::Augment) -> Result<Tensor> {
        let bytes = self.bytes.on(device)?;
        let &[b, h, w, c] = bytes.shape() else { bail!("a batch is {bytes:?} but [B, H, W, C] is needed") };
        let mut images = Tensor::empty_on(device, &[b, c, h, w], Dtype::F32)?;
        let boxes = self.erase.as_ref().map(|erase| erase.boxes.on(device)).transpose()?;
        let fill = match self.erase.as_ref().map(|erase| &erase.fill) {
            Some(Filled::Channels(fill) | Filled::Pixels(fill)) => Some(fill.on(device)?),
            _ => None,
        };
        let own = boxes.as_ref().map(|boxes| augment::Erase {
            boxes,
            fill: match &fill {
                None => augment::Fill::Zero,
                Some(fill) if fill.shape().len() == 3 => augment::Fill::Channels(fill),
                Some(fill) => augment::Fill::Pixels(fill),
            },
        });
        let augment = augment::Augment { erase: augment.erase.or(own), ..*augment };
        augment::prepare(&bytes, &augment::levels(mean, std, device)?, &augment, &mut images)?;
        Ok(images)
    }

    /// The clean view, normalised, [B, C, S, S] on a device; None where there is one view alone.
    pub fn clean_images(&self, device: &Device, mean: &[f32], std: &[f32]) -> Result<Option<Tensor>> {
        let Some(clean) = &self.clean else { return Ok(None) };
        let &[b, h, w, c] = clean.shape() else { bail!("a batch is {clean:?} but [B, H, W, C] is needed") };
        let mut images = Tensor::empty_on(device, &[b, c, h, w], Dtype::F32)?;
        augment::prepare(&clean.on(device)?, &augment::levels(mean, std, device)?, &augment::Augment::default(), &mut images)?;
        Ok(Some(images))
    }
}

/// Images that could not be read so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// How many different ones.
    pub count: usize,
    /// Reasons of the first few, each naming its image.
    pub names: Vec<String>,
}

pub struct Loader {
    dataset: Arc<dyn Dataset>,
    transform: Transform,
    options: LoaderOptions,
    record: Mutex<Record>,
}

/// What became of the images of all batches handed out.
#[derive(Default)]
struct Record {
    unread: BTreeSet<usize>,
    reasons: Vec<String>,
    /// Places looked at, and those whose image could not be read.
    seen: usize,
    failed: usize,
}

impl Loader {
    pub fn new(dataset: Arc<dyn Dataset>, transform: Transform, options: LoaderOptions) -> Self {
        Self { dataset, transform, options, record: Mutex::default() }
    }

    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.dataset
    }

    pub fn transform(&self) -> &Transform {
        &self.transform
    }

    /// Images of a full batch.
    pub fn batch(&self) -> usize {
        self.options.batch
    }

    /// Whether its options can be meant.
    pub fn check(&self) -> Result<()> {
        self.options.check()
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        let LoaderOptions { order, rank, ranks, batch, .. } = self.options;
        order.batches(self.dataset.len(), [rank, ranks], batch.max(1))
    }

    /// Images that could not be read in the batches handed out so far.
    pub fn skipped(&self) -> Skipped {
        let record = self.record.lock().expect("the record's holder does not panic");
        Skipped { count: record.unread.len(), names: record.reasons.clone() }
    }

    /// The batches of an epoch, from number `first` on. After an error there are no more.
    pub fn epoch(&self, epoch: u64, first: usize) -> impl Iterator<Item = Result<Loaded>> + use<'_> {
        let LoaderOptions { batch, order, workers, seed, strict, rank, ranks, views } = self.options;
        let mut images = order.indices(self.dataset.len(), seed, epoch, [rank, ranks], batch.max(1));
        if !order.keeps_the_rest() {
            images.truncate(self.batches() * batch);
        }
        let recipe = Recipe {
            dataset: self.dataset.clone(),
            transform: self.transform.clone(),
            rng: Rng::new(seed).at(epoch),
            view: views.map(|views| epoch % views.max(1)),
            images,
            rank: [rank, ranks],
            batch: batch.max(1),
            replace: !order.keeps_the_rest(),
            strict,
        };
        let source = match (self.check(), batch, workers) {
            (Err(error), ..) => Err(error),
            (_, 0, _) => Err(Error::usage("a batch of 0 images cannot be loaded; --batch-size is at least 1")),
            (_, _, 0) => Ok(Source::Here(Box::new(recipe), first)),
            _ => Workers::start(recipe, first, workers).map(Source::There),
        };
        Epoch { loader: self, source: Some(source) }
    }

    /// Notes what could not be read, and refuses to go on where it is too much.
    fn note(&self, rows: usize, unread: Vec<Unread>) -> Result<()> {
        let mut record = self.record.lock().expect("the record's holder does not panic");
        record.seen += rows;
        for Unread { index, reason, first } in unread {
            record.failed += usize::from(first);
            if record.unread.insert(index) && record.reasons.len() < REASONS {
                record.reasons.push(reason);
            }
        }
        let (seen, failed) = (record.seen, record.failed);
        ensure!(
            failed * 2 <= seen || seen < ENOUGH.min(self.dataset.len()),
            "{failed} of the first {seen} images cannot be read; is this a folder of images? The first: {}",
            record.reasons.first().map_or("", String::as_str)
        );
        Ok(())
    }
}

/// Who fills the batches.
enum Source {
    /// The thread that asks; the number of the next batch.
    Here(Box<Recipe>, usize),
    There(Workers),
}

impl Source {
    /// The next batch with all its rows tried, and how many they are.
    fn next(&mut self) -> Option<(Assembly, usize)> {
        match self {
            Source::There(workers) => workers.next(),
            Source::Here(recipe, next) => {
                let number = *next;
                *next = next.saturating_add(1);
                let places = recipe.places(number);
                let assembly = Assembly::new(places.len());
                for (row, place) in places.clone().enumerate() {
                    assembly.fill(recipe, row, place);
                }
                (!places.is_empty()).then_some((assembly, places.len()))
            }
        }
    }

    fn recipe(&self) -> &Recipe {
        match self {
            Source::Here(recipe, _) => recipe,
            Source::There(workers) => workers.recipe(),
        }
    }
}

struct Epoch<'a> {
    loader: &'a Loader,
    /// Nothing after the end and after an error.
    source: Option<Result<Source>>,
}

impl Epoch<'_> {
    fn advance(&mut self) -> Result<Option<Loaded>> {
        let mut source = match self.source.take() {
            None => return Ok(None),
            Some(source) => source?,
        };
        while let Some((assembly, rows)) = source.next() {
            let (loaded, unread) = assembly.finish(source.recipe())?;
            self.loader.note(rows, unread)?;
            // A batch of which nothing could be read is left out like its images.
            if loaded.is_some() {
                self.source = Some(Ok(source));
                return Ok(loaded);
            }
        }
        Ok(None)
    }
}

impl Iterator for Epoch<'_> {
    type Item = Result<Loaded>;

    fn next(&mut self) -> Option<Result<Loaded>> {
        self.advance().transpose()
    }
}
