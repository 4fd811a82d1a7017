//! Nearest neighbours in the space of an encoder's features: how good they are without any training.
//!
//!   similarity   s = <f, g>, features f and g of length 1
//!   vote         for each class the sum of exp(s / T) over the k most similar training images of it

use super::evaluate::say_skipped;
use super::feed::Feed;
use crate::data::loader::Loader;
use crate::device::ranks::Ranks;
use crate::ensure;
use crate::error::{Error, Result};
use crate::methods::supervised::Supervised;
use rayon::prelude::*;

#[derive(Clone, Copy, Debug)]
pub struct Knn {
    pub neighbours: usize,
    pub temperature: f64,
}

/// Features of unit length [N, C] and their labels.
pub struct Features {
    pub values: Vec<f32>,
    pub width: usize,
    pub labels: Vec<u32>,
}

/// The features of all images that a loader gives.
pub fn features(model: &Supervised, loader: &Loader, feed: &Feed, say: &mut dyn FnMut(&str)) -> Result<Features> {
    let mut all = Features { values: Vec::new(), width: 1, labels: Vec::new() };
    for loaded in loader.epoch(0, 0) {
        let batch = feed.evaluation(loaded?)?;
        let features = model.features(&batch.images)?;
        all.width = features.last();
        for row in features.data::<f32>().chunks_exact(all.width) {
            let length = row.iter().map(|&x| x as f64 * x as f64).sum::<f64>().sqrt().max(1e-12);
            all.values.extend(row.iter().map(|&x| (x as f64 / length) as f32));
        }
        all.labels.extend(&batch.labels);
    }
    ensure!(!all.labels.is_empty(), "there is no image to take features of");
    say_skipped(loader, &Ranks::alone(), say)?;
    Ok(all)
}

impl Knn {
    /// Accuracy in percent: the label has the most votes, or is among the first five.
    pub fn classify(&self, known: &Features, asked: &Features, classes: usize) -> Result<[f64; 2]> {
        if self.neighbours == 0 || !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::usage(format!(
                "--knn {} --knn-temperature {}: at least one neighbour and a temperature above 0 are needed",
                self.neighbours, self.temperature
            )));
        }
        ensure!(known.width == asked.width, "features are {} and {} wide", known.width, asked.width);
        ensure!(
            known.labels.iter().chain(&asked.labels).all(|&label| (label as usize) < classes),
            "a label is not among {classes} classes"
        );
        let k = self.neighbours.min(known.labels.len());
        let right = |(own, &label): (&[f32], &u32)| -> [usize; 2] {
            let similar = |row: &[f32]| row.iter().zip(own).map(|(a, b)| a * b).sum::<f32>();
            let mut near: Vec<(f32, u32)> = known.values.chunks_exact(known.width).map(similar).zip(known.labels.iter().copied()).collect();
            near.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0));
            let mut votes = vec![0.0f64; classes];
            near[..k].iter().for_each(|&(similarity, label)| votes[label as usize] += (similarity as f64 / self.temperature).exp());
            let label = label as usize;
            let before =
                votes.iter().enumerate().filter(|&(class, &vote)| vote > votes[label] || (vote == votes[label] && class < label)).count();
            [usize::from(before < 1), usize::from(before < 5)]
        };
        let asked_rows: Vec<(&[f32], &u32)> = asked.values.chunks_exact(asked.width).zip(&asked.labels).collect();
        let counts = asked_rows.into_par_iter().map(right).reduce(|| [0, 0], |a, b| [a[0] + b[0], a[1] + b[1]]);
        Ok(counts.map(|count| 100.0 * count as f64 / asked.labels.len() as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(angles: &[f64], labels: &[u32]) -> Features {
        let values = angles.iter().flat_map(|a| [a.cos() as f32, a.sin() as f32]).collect();
        Features { values, width: 2, labels: labels.to_vec() }
    }

    #[test]
    fn the_nearest_images_vote() {
        let known = unit(&[0.0, 0.1, 0.2, 1.5, 1.6], &[0, 0, 1, 1, 1]);
        let knn = |neighbours| Knn { neighbours, temperature: 0.07 };
        assert_eq!(knn(1).classify(&known, &unit(&[0.02, 1.55], &[0, 1]), 2).unwrap(), [100.0, 100.0]);
        assert_eq!(knn(3).classify(&known, &unit(&[0.11], &[0]), 7).unwrap(), [100.0, 100.0]);
        // A far majority weighs less than a near minority at a low temperature, and more at a high one.
        let far = Knn { neighbours: 5, temperature: 100.0 };
        assert_eq!(far.classify(&known, &unit(&[0.05], &[0]), 2).unwrap()[0], 0.0);
        assert_eq!(knn(5).classify(&known, &unit(&[0.05], &[0]), 2).unwrap()[0], 100.0);
        assert!(knn(0).classify(&known, &known, 2).is_err());
    }
}
