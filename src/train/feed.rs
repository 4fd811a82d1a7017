//! From bytes on the host to what a step takes: normalised images on its device, and targets.

use crate::data::augment::Augment;
use crate::data::loader::Loaded;
use crate::data::mixing::Mixing;
use crate::data::transform::Transform;
use crate::error::{Error, Result};
use crate::methods::Batch;
use crate::rng::Stream;
use crate::tensor::{Device, Tensor};

/// What is learned from the labels.
#[derive(Clone, Copy, Debug)]
pub struct Labels {
    pub classes: usize,
    /// How images and their labels are mixed and smoothed.
    pub mixing: Mixing,
    /// Which images have one; None: all.
    pub labelled: Option<Labelled>,
}

/// Some images of a set have a label that may be looked at.
#[derive(Clone, Copy, Debug)]
pub struct Labelled {
    pub count: usize,
    /// Images of the set.
    pub of: usize,
    /// Whether they are spread over the set, which is sorted by class; else they are the first.
    pub spread: bool,
}

impl Labelled {
    fn has(&self, image: usize) -> bool {
        let before = |image: usize| image as u128 * self.count as u128 / self.of.max(1) as u128;
        if self.spread { before(image + 1) > before(image) } else { image < self.count }
    }
}

#[derive(Clone, Debug)]
pub struct Feed {
    pub device: Device,
    /// Of each channel.
    pub mean: Vec<f32>,
    pub std: Vec<f32>,
    pub labels: Option<Labels>,
    /// Whether batches hold the bytes of their images too.
    pub bytes: bool,
}

impl Feed {
    /// Whether batches can be made of images that are transformed so.
    pub fn fits(&self, transform: &Transform) -> Result<()> {
        self.check(transform.clean)
    }

    /// A teacher's clean view shows one image, and what is mixed is two.
    fn check(&self, two_views: bool) -> Result<()> {
        if two_views && self.labels.is_some_and(|labels| labels.mixing.is_on()) {
            return Err(Error::usage(
                "--mixup and --cutmix blend the images that the student sees, but its teacher is to see a view of its own, which is not blended; \
                 give --mixup 0 --cutmix 0, or one view for both",
            ));
        }
        Ok(())
    }

    /// A batch to learn from; what is drawn comes from its own stream.
    pub fn training(&self, loaded: Loaded, draws: &mut Stream) -> Result<Batch> {
        let Some(Labels { classes, mixing, labelled }) = &self.labels else {
            let images = self.images(&loaded, &Augment::default())?;
            let (bytes, teacher_images) = (self.bytes(&loaded)?, self.clean(&loaded)?);
            return Ok(Batch { bytes, teacher_images, keys: loaded.keys, ..Batch::of_images(images) });
        };
        self.check(loaded.clean.is_some())?;
        let &[batch, h, w, _] = loaded.bytes.shape() else { crate::bail!("a batch is {:?} but [B, H, W, C] is needed", loaded.bytes) };
        let mixed = mixing.draw(batch, [h, w], draws)?;
        let mut images = self.images(&loaded, &Augment { mix: mixed.whole(), ..Augment::default() })?;
        mixed.finish(&mut images)?;
        let mut targets = mixed.targets(&loaded.labels, *classes)?;
        // A target of zeros asks for nothing: neither loss nor gradient.
        let unlabelled = loaded.indices.iter().map(|&image| labelled.is_some_and(|labelled| !labelled.has(image)));
        targets.chunks_exact_mut(*classes).zip(unlabelled).filter(|(_, none)| *none).for_each(|(row, _)| row.fill(0.0));
        let targets = Tensor::from_slice(&[batch, *classes], &targets)?;
        let teacher_images = self.clean(&loaded)?;
        let (labels, keys) = (loaded.labels, loaded.keys);
        Ok(Batch { teacher_images, targets: Some(targets.on(&self.device)?), labels, keys, ..Batch::of_images(images) })
    }

    /// A batch to be judged by.
    pub fn evaluation(&self, loaded: Loaded) -> Result<Batch> {
        let images = self.images(&loaded, &Augment::default())?;
        Ok(Batch { bytes: self.bytes(&loaded)?, labels: loaded.labels, ..Batch::of_images(images) })
    }

    fn bytes(&self, loaded: &Loaded) -> Result<Option<Tensor>> {
        self.bytes.then(|| loaded.bytes.on(&self.device)).transpose()
    }

    fn clean(&self, loaded: &Loaded) -> Result<Option<Tensor>> {
        loaded.clean_images(&self.device, &self.mean, &self.std)
    }

    fn images(&self, loaded: &Loaded, augment: &Augment) -> Result<Tensor> {
        loaded.images(&self.device, &self.mean, &self.std, augment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labelled_images_are_as_many_as_asked_for() {
        for (count, of, spread) in [(2000, 16384, true), (2000, 16384, false), (3, 3, true), (1, 10, true)] {
            let labelled = Labelled { count, of, spread };
            let has: Vec<usize> = (0..of).filter(|&image| labelled.has(image)).collect();
            assert_eq!(has.len(), count);
            assert_eq!(has.last() == Some(&(count - 1)), !spread || count == of);
        }
    }
}
