//! From bytes on the host to what a step takes: normalised images on its device, and targets.

use crate::data::augment::Augment;
use crate::data::loader::Loaded;
use crate::data::mixup;
use crate::error::Result;
use crate::methods::Batch;
use crate::rng::Stream;
use crate::tensor::{Device, Tensor};

#[derive(Clone, Debug)]
pub struct Feed {
    pub device: Device,
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// How many classes targets have; None where nothing is learned from labels.
    pub classes: Option<usize>,
    pub smoothing: f64,
}

impl Feed {
    /// A batch to learn from; what is drawn comes from its own stream.
    pub fn training(&self, loaded: Loaded, _draws: &mut Stream) -> Result<Batch> {
        let images = loaded.images(&self.device, self.mean, self.std, &Augment::default())?;
        let targets = self.classes.map(|classes| {
            let targets = mixup::mix_targets(&loaded.labels, classes, 1.0, self.smoothing)?;
            Tensor::from_slice(&[loaded.labels.len(), classes], &targets)
        });
        Ok(Batch { images, targets: targets.transpose()?, labels: loaded.labels })
    }

    /// A batch to be judged by.
    pub fn evaluation(&self, loaded: Loaded) -> Result<Batch> {
        let images = loaded.images(&self.device, self.mean, self.std, &Augment::default())?;
        Ok(Batch { images, targets: None, labels: loaded.labels })
    }
}
