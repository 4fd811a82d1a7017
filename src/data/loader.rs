//! Batches of an epoch, each image decoded and transformed with numbers that depend on (seed, epoch, position) alone.

pub use super::order::Order;
use super::transform::Transform;
use super::{Dataset, augment};
use crate::error::Result;
use crate::rng::Rng;
use crate::tensor::{Device, Dtype, Tensor};
use std::sync::Arc;

#[derive(Clone, Copy, Debug)]
pub struct LoaderOptions {
    pub batch: usize,
    pub order: Order,
    /// Threads that decode and transform; they never change what a batch holds.
    pub workers: usize,
    pub seed: u64,
    /// Whether an image that cannot be read is an error, and not skipped with a warning.
    pub strict: bool,
}

/// A batch as bytes, on the host.
pub struct Loaded {
    /// u8 [B, S, S, C]
    pub bytes: Tensor,
    pub labels: Vec<u32>,
    /// Numbers of the images in the set.
    pub indices: Vec<usize>,
}

impl Loaded {
    /// Normalised images [B, C, S, S] on a device.
    pub fn images(&self, device: &Device, mean: [f32; 3], std: [f32; 3], augment: &augment::Augment) -> Result<Tensor> {
        let bytes = self.bytes.on(device)?;
        let &[b, h, w, c] = bytes.shape() else { crate::bail!("a batch is {bytes:?} but [B, H, W, C] is needed") };
        let mut images = Tensor::empty_on(device, &[b, c, h, w], Dtype::F32)?;
        augment::prepare(&bytes, mean, std, augment, &mut images)?;
        Ok(images)
    }
}

/// Images that could not be read.
#[derive(Clone, Debug, Default)]
pub struct Skipped {
    pub count: u64,
    /// The first few, with the reason.
    pub names: Vec<String>,
}

#[derive(Clone)]
pub struct Loader {
    dataset: Arc<dyn Dataset>,
    transform: Transform,
    options: LoaderOptions,
}

impl Loader {
    pub fn new(dataset: Arc<dyn Dataset>, transform: Transform, options: LoaderOptions) -> Self {
        Self { dataset, transform, options }
    }

    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.dataset
    }

    /// Images of a full batch.
    pub fn batch(&self) -> usize {
        self.options.batch
    }

    /// What could not be read so far.
    pub fn skipped(&self) -> Skipped {
        Skipped::default()
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        self.options.order.batches(self.dataset.len(), 0, 1, self.options.batch)
    }

    /// The batches of an epoch, from number `first` on.
    pub fn epoch(&self, epoch: u64, first: usize) -> impl Iterator<Item = Result<Loaded>> + use<'_> {
        let rng = Rng::new(self.options.seed).at(epoch);
        let order = self.options.order.indices(self.dataset.len(), self.options.seed, epoch, 0, 1);
        (first..self.batches()).map(move |batch| {
            let positions = batch * self.options.batch..((batch + 1) * self.options.batch).min(order.len());
            let indices = order[positions.clone()].to_vec();
            let mut bytes = Vec::new();
            for (position, &index) in positions.zip(&indices) {
                let picture = self.dataset.picture(index)?;
                bytes.extend(self.transform.apply(picture, &mut rng.stream("sample", position as u64))?.pixels);
            }
            let side = self.transform.side;
            let channels = bytes.len() / (indices.len() * side * side);
            Ok(Loaded {
                bytes: Tensor::from_slice(&[indices.len(), side, side, channels], &bytes)?,
                labels: indices.iter().map(|&index| self.dataset.label(index)).collect(),
                indices,
            })
        })
    }
}
