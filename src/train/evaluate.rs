//! How good a model is on a set of images.

use super::feed::Feed;
use crate::data::loader::Loader;
use crate::ensure;
use crate::error::Result;
use crate::methods::Method;
use crate::rng::Rng;

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

/// Passes once through `loader`; a method that draws at random draws the same each time.
pub fn evaluate(method: &dyn Method, loader: &Loader, feed: &Feed) -> Result<Evaluation> {
    const SEED: u64 = 0;
    let (mut loss, mut batches, mut images, mut right) = (0.0, 0usize, 0usize, Some([0usize; 2]));
    for (number, loaded) in loader.epoch(0, 0).enumerate() {
        let batch = feed.evaluation(loaded?)?;
        let count = batch.images.shape()[0];
        let scores = method.scores(&batch, &Rng::new(SEED).at(number as u64))?;
        loss += scores.loss;
        batches += 1;
        images += count;
        right = right.zip(scores.right).map(|(sum, more)| [sum[0] + more[0], sum[1] + more[1]]);
    }
    ensure!(images > 0, "there is nothing to evaluate on: no image of the set could be read");
    let percent = |right: usize| 100.0 * right as f64 / images as f64;
    Ok(Evaluation { loss: loss / batches as f64, accuracy: right.map(|right| right.map(percent)), images })
}
