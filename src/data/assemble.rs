//! One picture becomes a row of a batch.

use super::erase::Filling;
use super::loader::{Erased, Filled, Loaded};
use super::{Dataset, Picture};

use super::transform::{Sample, Transform};
use crate::error::{Context, Error, Result};
use crate::rng::{Rng, Stream};
use crate::tensor::{Dtype, Element, Tensor};
use crate::{bail, ensure};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Images that are tried for a row before it is an error.
const TRIES: usize = 8;

/// What the batches of an epoch are made from.
pub(super) struct Recipe {
    pub dataset: Arc<dyn Dataset>,
    pub transform: Transform,
    /// Of this epoch.
    pub rng: Rng,
    /// Which of the fixed views this epoch shows.
    pub view: Option<u64>,
    /// The images of the epoch in turn.
    pub images: Vec<usize>,
    /// This one's number among those that share an epoch, and theirs.
    pub rank: [usize; 2],
    pub batch: usize,
    /// Whether another image stands in for one that cannot be read.
    pub replace: bool,
    pub strict: bool,
}

/// An image that could not be read.
pub(super) struct Unread {
    pub index: usize,
    pub reason: String,
    /// Whether it was the one asked for, and not one that stood in.
    pub first: bool,
}

/// What became of a place.
struct Made {
    index: usize,
    key: Option<u64>,
    sample: Option<Sample>,
    /// Numbers for the erased boxes, in their order.
    fill: Vec<f32>,
    unread: Vec<Unread>,
}

impl Recipe {
    /// The places of the images of a batch; none after the last.
    pub fn places(&self, batch: usize) -> Range<usize> {
        let end = self.images.len();
        let start = batch.saturating_mul(self.batch).min(end);
        start..(start + self.batch).min(end)
    }

    fn make(&self, place: usize) -> Result<Made> {
        let [rank, ranks] = self.rank;
        // In a sequential order an image's place is its number.
        let whole = if self.replace { place * ranks + rank } else { self.images[place] };
        let draws = self.rng.stream("sample", whole as u64);
        let (mut index, mut unread) = (self.images[place], Vec::new());
        // Colours and boxes that only a student sees are new in every epoch, however often a view is shown.
        let (mut view, mut own) = match self.view {
            None => (draws, None),
            Some(view) => (self.rng.at(view).stream("view", index as u64), self.transform.clean.then_some(draws)),
        };
        loop {
            // What cannot be done to any image is no fault of this one: only one that cannot be read is passed over.
            let error = match self.dataset.picture(index) {
                Ok(picture) => {
                    // What stands in for another image is not one of its own views.
                    let key = self.view.filter(|_| unread.is_empty()).map(|view| view * self.dataset.len() as u64 + index as u64);
                    let (sample, fill) = self.finish(index, picture, &mut view, own.as_mut())?;
                    return Ok(Made { index, key, sample: Some(sample), fill, unread });
                }
                Err(error) => error,
            };
            if self.strict {
                return Err(error);
            }
            unread.push(Unread { index, reason: error.chain(), first: unread.is_empty() });
            if !self.replace {
                return Ok(Made { index, key: None, sample: None, fill: Vec::new(), unread });
            }
            if unread.len() == TRIES {
                return Err(error).with_context(|| format!("{TRIES} images drawn for one place of a batch cannot be read; the last"));
            }
            index = view.below(self.dataset.len());
        }
    }

    fn finish(&self, index: usize, picture: Picture, view: &mut Stream, own: Option<&mut Stream>) -> Result<(Sample, Vec<f32>)> {
        let cut = self.transform.cut(picture, view).with_context(|| self.dataset.name(index))?;
        let draws = own.unwrap_or(view);
        let sample = self.transform.change(cut, draws);
        let channels = sample.pixels.len() / self.transform.side.pow(2).max(1);
        let numbers = match self.transform.erasing.map(|erasing| erasing.mode) {
            None | Some(Filling::Const) => 0,
            // One colour a box.
            Some(Filling::Rand) => sample.erased.len() * channels,
            Some(Filling::Pixel) => sample.erased.iter().map(|&[_, _, height, width]| height as usize * width as usize * channels).sum(),
        };
        Ok((sample, normals(draws, numbers)))
    }
}

/// Numbers of N(0, 1).
fn normals(draws: &mut Stream, count: usize) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(count + 1);
    while numbers.len() < count {
        let radius = (-2.0 * ((draws.word() as f32 + 0.5) / 4_294_967_296.0).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * (draws.word() as f32 / 4_294_967_296.0)).sin_cos();
        numbers.extend([radius * cos, radius * sin]);
    }
    numbers.truncate(count);
    numbers
}

/// A batch whose rows are being filled, by whom and in which order does not matter.
pub(super) struct Assembly(Mutex<Rows>);

struct Rows {
    /// u8 [B, S, S, C], there from the first row on: only then C is known.
    bytes: Option<Tensor>,
    /// The same before colours changed, where the transform says so.
    clean: Option<Tensor>,
    /// [B, R, C] or [B, C, S, S], likewise.
    fill: Option<Tensor>,
    rows: Vec<Option<Row>>,
    unread: Vec<Vec<Unread>>,
    /// Of the first row that has one.
    error: Option<(usize, Error)>,
}

struct Row {
    index: usize,
    key: Option<u64>,
    erased: Vec<[u32; 4]>,
}

impl Assembly {
    pub fn new(rows: usize) -> Self {
        let empty = || std::iter::repeat_with(Vec::new).take(rows).collect();
        let rows = std::iter::repeat_with(|| None).take(rows).collect();
        Self(Mutex::new(Rows { bytes: None, clean: None, fill: None, rows, unread: empty(), error: None }))
    }

    /// Makes a row; what goes wrong is an error of the batch.
    pub fn fill(&self, recipe: &Recipe, row: usize, place: usize) {
        let made = catch_unwind(AssertUnwindSafe(|| {
            let made = recipe.make(place)?;
            self.lock().put(recipe, row, made)
        }));
        let error = match made {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => {
                let words = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
                let index = recipe.images[place];
                let name = catch_unwind(AssertUnwindSafe(|| recipe.dataset.name(index))).unwrap_or_else(|_| format!("image {index}"));
                Error::new(format!("{name}: a loading thread broke off: {}", words.unwrap_or("it did not say why")))
            }
        };
        let mut rows = self.lock();
        if rows.error.as_ref().is_none_or(|&(first, _)| row < first) {
            rows.error = Some((row, error));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rows> {
        // A panic while it was held became the error of this batch.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The batch, unless nothing of it could be read, and what could not.
    pub fn finish(self, recipe: &Recipe) -> Result<(Option<Loaded>, Vec<Unread>)> {
        let Rows { bytes, clean, fill, rows, unread, error } = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, error)) = error {
            return Err(error);
        }
        let unread = unread.into_iter().flatten().collect();
        let Some(bytes) = bytes else { return Ok((None, unread)) };
        let there: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].is_some()).collect();
        let rows: Vec<Row> = rows.into_iter().flatten().collect();
        let erase = match recipe.transform.erasing {
            None => None,
            Some(erasing) => Some(Erased {
                boxes: boxes(&rows, erasing.count)?,
                fill: match (erasing.mode, fill) {
                    (Filling::Rand, Some(fill)) => Filled::Channels(kept::<f32>(fill, &there)?),
                    (Filling::Pixel, Some(fill)) => Filled::Pixels(kept::<f32>(fill, &there)?),
                    _ => Filled::Zero,
                },
            }),
        };
        let clean = clean.map(|clean| kept::<u8>(clean, &there)).transpose()?;
        let indices: Vec<usize> = rows.iter().map(|row| row.index).collect();
        let labels = indices.iter().map(|&index| recipe.dataset.label(index)).collect();
        let keys = rows.iter().map(|row| row.key).collect();
        Ok((Some(Loaded { bytes: kept::<u8>(bytes, &there)?, clean, labels, indices, keys, erase }), unread))
    }
}

impl Rows {
    fn put(&mut self, recipe: &Recipe, row: usize, made: Made) -> Result<()> {
        let Made { index, key, sample, fill, unread } = made;
        self.unread[row] = unread;
        let Some(Sample { pixels, clean, erased }) = sample else { return Ok(()) };
        let (batch, side) = (self.rows.len(), recipe.transform.side);
        let channels = pixels.len() / side.pow(2).max(1);
        let bytes = match &mut self.bytes {
            Some(bytes) => bytes,
            none => none.insert(Tensor::empty(&[batch, side, side, channels], Dtype::U8)?),
        };
        ensure!(
            bytes.last() == channels && pixels.len() == channels * side * side && !pixels.is_empty(),
            "{}: it has {channels} channels but others of its batch have {}",
            recipe.dataset.name(index),
            bytes.last()
        );
        bytes.data_mut::<u8>()[row * pixels.len()..][..pixels.len()].copy_from_slice(&pixels);
        if let Some(own) = clean {
            let clean = match &mut self.clean {
                Some(clean) => clean,
                none => none.insert(Tensor::empty(&[batch, side, side, channels], Dtype::U8)?),
            };
            clean.data_mut::<u8>()[row * own.len()..][..own.len()].copy_from_slice(&own);
        }
        let (mode, most) =
            (recipe.transform.erasing.map(|erasing| erasing.mode), recipe.transform.erasing.map_or(0, |erasing| erasing.count));
        if erased.len() > most {
            bail!("{}: {} boxes are to be erased, more than were asked for", recipe.dataset.name(index), erased.len());
        }
        match mode {
            Some(Filling::Rand) => {
                let colours = match &mut self.fill {
                    Some(colours) => colours,
                    none => none.insert(Tensor::empty(&[batch, most, channels], Dtype::F32)?),
                };
                let own = &mut colours.data_mut::<f32>()[row * most * channels..][..most * channels];
                own.fill(0.0);
                own[..fill.len()].copy_from_slice(&fill);
            }
            Some(Filling::Pixel) => {
                let noise = match &mut self.fill {
                    Some(noise) => noise,
                    none => none.insert(Tensor::empty(&[batch, channels, side, side], Dtype::F32)?),
                };
                let image = pixels.len();
                write_boxes(&mut noise.data_mut::<f32>()[row * image..][..image], side, &erased, &fill);
            }
            Some(Filling::Const) | None => {}
        }
        self.rows[row] = Some(Row { index, key, erased });
        Ok(())
    }
}

/// Writes numbers to the boxes of an image [C, S, S], one box after another.
fn write_boxes(image: &mut [f32], side: usize, boxes: &[[u32; 4]], mut numbers: &[f32]) {
    for &[top, left, height, width] in boxes {
        let [top, left, height, width] = [top, left, height, width].map(|x| x as usize);
        for plane in image.chunks_exact_mut(side * side) {
            for row in plane.chunks_exact_mut(side).skip(top).take(height) {
                let (now, rest) = numbers.split_at(width);
                row[left..left + width].copy_from_slice(now);
                numbers = rest;
            }
        }
    }
}

/// u32 [B, R, 4]
fn boxes(rows: &[Row], most: usize) -> Result<Tensor> {
    let boxes: Vec<u32> = rows.iter().flat_map(|row| (0..most).flat_map(|i| row.erased.get(i).copied().unwrap_or([0; 4]))).collect();
    Tensor::from_slice(&[rows.len(), most, 4], &boxes)
}

/// The rows that are there.
fn kept<T: Element>(all: Tensor, there: &[usize]) -> Result<Tensor> {
    let count = all.shape()[0];
    if there.len() == count {
        return Ok(all);
    }
    let len = all.numel() / count;
    let mut shape = all.shape().to_vec();
    shape[0] = there.len();
    let data = all.data::<T>();
    let kept: Vec<T> = there.iter().flat_map(|&row| &data[row * len..][..len]).copied().collect();
    Tensor::from_slice(&shape, &kept)
}
