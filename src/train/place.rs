//! Where a run stands: all that it needs to go on, besides parameters and the optimiser's memory.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a run stands.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    pub epoch: u64,
    /// Micro-batches of this epoch that are behind.
    pub micro: u64,
    /// Windows that are behind, skipped ones among them.
    pub update: u64,
    pub skipped: u64,
    /// Skipped since the last update that was made.
    pub in_a_row: u64,
    /// How often the parameters went back to a checkpoint.
    pub returns: u64,
    /// The update of that checkpoint, until an update has been made after it.
    pub back_at: Option<u64>,
    /// Whether the last evaluation gave no number: then the parameters are not worth keeping.
    pub spoiled: bool,
    pub best: Option<f64>,
    /// Of this epoch.
    pub(super) epoch_loss: Mean,
    pub(super) epoch_lr: Mean,
    #[serde(default)]
    pub(super) epoch_parts: BTreeMap<String, Mean>,
    /// Since the last row of `steps.jsonl`.
    pub(super) row_loss: Mean,
}

#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Mean {
    sum: f64,
    pub count: u64,
}

impl Mean {
    pub fn add(&mut self, x: f64) {
        self.sum += x;
        self.count += 1;
    }

    pub fn value(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// How many images make a batch.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// Images of a micro-batch on one rank.
    pub batch: usize,
    /// Micro-batches of an update.
    pub window: usize,
    pub ranks: usize,
}

impl Place {
    /// Where a run stands that goes on with other batches: in front of the first image that it has not seen in this epoch, or of a few that it has, where
    /// updates do not begin there. Answers what is to be said about it.
    pub fn rebatch(&mut self, before: Batching, now: Batching) -> Option<String> {
        let images = |b: Batching| (b.batch * b.ranks) as u64;
        if images(before) == images(now) && before.window == now.window {
            return None;
        }
        let update = |b: Batching| images(b) * b.window as u64;
        let seen = self.micro * images(before);
        self.micro = seen / update(now) * now.window as u64;
        let again = seen - self.micro * images(now);
        let twice = if again > 0 { format!(", and {again} images of this epoch are seen again") } else { String::new() };
        let size = match update(before) == update(now) {
            true => format!("an update has {} images as before", update(now)),
            false => format!("an update has {} images from here on, and had {} before", update(now), update(before)),
        };
        Some(format!("{} ranks now, {} then: {size}{twice}", now.ranks, before.ranks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_goes_on_with_other_batches_misses_no_image() {
        let then = Batching { batch: 8, window: 1, ranks: 4 };
        let at = |now: Batching| {
            let mut place = Place { micro: 3, ..Place::default() };
            let said = place.rebatch(then, now);
            (place.micro, said.unwrap_or_default())
        };
        assert_eq!(at(then), (3, String::new()));
        assert_eq!(at(Batching { batch: 16, window: 1, ranks: 2 }), (3, String::new()));
        assert_eq!(
            at(Batching { batch: 8, window: 2, ranks: 2 }),
            (6, "2 ranks now, 4 then: an update has 32 images as before".to_string())
        );
        let (micro, said) = at(Batching { batch: 8, window: 1, ranks: 8 });
        assert_eq!(
            (micro, said.as_str()),
            (1, "8 ranks now, 4 then: an update has 64 images from here on, and had 32 before, and 32 images of this epoch are seen again")
        );
        assert_eq!(at(Batching { batch: 8, window: 1, ranks: 2 }).0, 6);
    }
}
