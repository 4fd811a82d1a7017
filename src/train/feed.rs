//! From bytes on the host to what a step takes: normalised images on its device, and targets.

use crate::data::augment::Augment;
use crate::data::loader::Loaded;
use crate::data::mixing::Mixing;
use crate::error::Result;
use crate::methods::Batch;
use crate::rng::Stream;
use crate::tensor::{Device, Tensor};

/// What is learned from the labels.
#[derive(Clone, Copy, Debug)]
pub struct Labels {
    pub classes: usize,
    /// How images and their labels are mixed and smoothed.
    pub mixing: Mixing,
}

#[derive(Clone, Debug)]
pub struct Feed {
    pub device: Device,
    /// Of each channel.
    pub mean: Vec<f32>,
    pub std: Vec<f32>,
    pub labels: Option<Labels>,
}

impl Feed {
    /// A batch to learn from; what is drawn comes from its own stream.
    pub fn training(&self, loaded: Loaded, draws: &mut Stream) -> Result<Batch> {
        let Some(Labels { classes, mixing }) = &self.labels else {
            return Ok(Batch::of_images(self.images(&loaded, &Augment::default())?));
        };
        let &[batch, h, w, _] = loaded.bytes.shape() else { crate::bail!("a batch is {:?} but [B, H, W, C] is needed", loaded.bytes) };
        let mixed = mixing.draw(batch, [h, w], draws)?;
        let mut images = self.images(&loaded, &Augment { mix: mixed.whole(), ..Augment::default() })?;
        mixed.finish(&mut images)?;
        let targets = Tensor::from_slice(&[batch, *classes], &mixed.targets(&loaded.labels, *classes)?)?;
        Ok(Batch { targets: Some(targets.on(&self.device)?), labels: loaded.labels, ..Batch::of_images(images) })
    }

    /// A batch to be judged by.
    pub fn evaluation(&self, loaded: Loaded) -> Result<Batch> {
        let images = self.images(&loaded, &Augment::default())?;
        Ok(Batch { labels: loaded.labels, ..Batch::of_images(images) })
    }

    fn images(&self, loaded: &Loaded, augment: &Augment) -> Result<Tensor> {
        loaded.images(&self.device, &self.mean, &self.std, augment)
    }
}
