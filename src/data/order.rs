//! The order in which an epoch passes through a set, and each rank's part of it. Depends on (seed, epoch) and sizes alone.
//!
//!   sequential  rank r of R takes batches r, r + R, .. of those that one rank would take; every image once, in the batch where one rank has it
//!   shuffled    a permutation, its head repeated until R divides it; rank r takes places r, r + R, ..
//!   repeated    a permutation with each image `times` times in a row, the head repeated likewise; rank r takes places r, r + R, .., of them the
//!               first floor(floor(n / 256) 256 / R): each image that is seen is seen `times` times, on different ranks (DeiT's repeated augmentation)
//!
//! Below 256 images the repeated order has floor(n / R) places a rank, so that small sets are not empty.

use crate::rng::Rng;
use std::fmt;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// As it stands; the last batch may be smaller.
    Sequential,
    /// Shuffled anew each epoch; a last batch that is not full is left out.
    Shuffled,
    /// Shuffled, with copies of each image in a row; a last batch that is not full is left out.
    Repeated { times: usize },
}

impl Order {
    /// Images of an epoch of `n` on one of several ranks, in batches of so many.
    pub fn len(self, n: usize, [rank, ranks]: [usize; 2], batch: usize) -> usize {
        assert!(rank < ranks, "rank {rank} of {ranks}");
        match self {
            Order::Sequential => (rank..n.div_ceil(batch)).step_by(ranks).map(|number| batch.min(n - number * batch)).sum(),
            Order::Shuffled => n.div_ceil(ranks),
            Order::Repeated { .. } if n < 256 => n / ranks,
            Order::Repeated { .. } => n / 256 * 256 / ranks,
        }
    }

    /// Whether a last batch that is not full is handed out.
    pub fn keeps_the_rest(self) -> bool {
        self == Order::Sequential
    }

    /// Batches of an epoch.
    pub fn batches(self, n: usize, part: [usize; 2], batch: usize) -> usize {
        let len = self.len(n, part, batch);
        if self.keeps_the_rest() { len.div_ceil(batch) } else { len / batch }
    }

    /// The images of an epoch in turn.
    pub fn indices(self, n: usize, seed: u64, epoch: u64, [rank, ranks]: [usize; 2], batch: usize) -> Vec<usize> {
        if self == Order::Sequential {
            return (rank..n.div_ceil(batch)).step_by(ranks).flat_map(|number| number * batch..n.min((number + 1) * batch)).collect();
        }
        let places = (0..self.len(n, [rank, ranks], batch)).map(|i| rank + i * ranks);
        let mut order: Vec<usize> = (0..n).collect();
        Rng::new(seed).at(epoch).stream("order", 0).shuffle(&mut order);
        let times = if let Order::Repeated { times } = self { times.max(1) } else { 1 };
        places.map(|place| order[place / times % n]).collect()
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Sequential => f.write_str("in order"),
            Order::Shuffled => f.write_str("shuffled"),
            Order::Repeated { times } => write!(f, "shuffled, each image {times} times in a row"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const REPEATED: Order = Order::Repeated { times: 3 };

    fn counts(indices: impl IntoIterator<Item = usize>) -> BTreeMap<usize, usize> {
        indices.into_iter().fold(BTreeMap::new(), |mut counts, index| {
            *counts.entry(index).or_default() += 1;
            counts
        })
    }

    #[test]
    fn a_shuffled_epoch_shows_every_image_once() {
        let order = Order::Shuffled.indices(1000, 7, 0, [0, 1], 1);
        assert!(counts(order.clone()).into_iter().eq((0..1000).map(|i| (i, 1))));
        assert_ne!(order, Order::Shuffled.indices(1000, 7, 1, [0, 1], 1));
        assert_ne!(order, Order::Shuffled.indices(1000, 8, 0, [0, 1], 1));
        assert_eq!(order, Order::Shuffled.indices(1000, 7, 0, [0, 1], 1));
    }

    #[test]
    fn ranks_share_an_epoch_and_repeat_its_head_to_be_equally_long() {
        let whole = Order::Shuffled.indices(10, 3, 5, [0, 1], 1);
        let parts: Vec<_> = (0..4).map(|rank| Order::Shuffled.indices(10, 3, 5, [rank, 4], 1)).collect();
        assert!(parts.iter().all(|part| part.len() == 3));
        let interleaved: Vec<_> = (0..12).map(|place| parts[place % 4][place / 4]).collect();
        assert_eq!(interleaved[..10], whole);
        assert_eq!(interleaved[10..], whole[..2]);
        let few: Vec<_> = (0..5).map(|rank| Order::Shuffled.indices(2, 3, 5, [rank, 5], 1)).collect();
        assert!(few.iter().all(|part| part.len() == 1 && part[0] < 2));
    }

    #[test]
    fn evaluation_shows_every_image_once_in_the_batch_where_one_rank_has_it() {
        for (n, ranks) in [(11, 1), (11, 2), (12, 3), (11, 4), (3, 5), (0, 2)] {
            let whole: Vec<Vec<usize>> = Order::Sequential.indices(n, 0, 0, [0, 1], 3).chunks(3).map(<[usize]>::to_vec).collect();
            assert!(whole.concat().into_iter().eq(0..n));
            let mut batches = vec![Vec::new(); whole.len()];
            for rank in 0..ranks {
                let part = [rank, ranks];
                let own = Order::Sequential.indices(n, 0, 0, part, 3);
                assert_eq!([own.len(), own.len().div_ceil(3)], [Order::Sequential.len(n, part, 3), Order::Sequential.batches(n, part, 3)]);
                own.chunks(3).enumerate().for_each(|(i, batch)| batches[rank + i * ranks] = batch.to_vec());
            }
            assert_eq!(batches, whole, "{n} images on {ranks} ranks");
        }
        assert_eq!(Order::Sequential.indices(4, 9, 9, [0, 1], 1), [0, 1, 2, 3]);
    }

    #[test]
    fn repeated_augmentation_has_the_lengths_of_deit() {
        let n = 1_281_167;
        assert_eq!([1, 4, 8, 16].map(|ranks| REPEATED.len(n, [0, ranks], 1)), [1_281_024, 320_256, 160_128, 80_064]);
        let indices = REPEATED.indices(n, 0, 0, [0, 1], 1);
        assert_eq!(indices.len(), 1_281_024);
        let distinct: std::collections::HashSet<_> = indices.iter().collect();
        assert_eq!(distinct.len(), 427_008);
    }

    #[test]
    fn copies_stand_in_a_row_and_on_different_ranks() {
        let n = 515;
        let one = REPEATED.indices(n, 1, 2, [0, 1], 1);
        assert_eq!(one.len(), 512);
        assert!(one.chunks_exact(3).all(|copies| copies[0] == copies[1] && copies[1] == copies[2]));
        assert!(counts(one.iter().take(510).copied()).values().all(|&count| count == 3));
        let parts: Vec<_> = (0..4).map(|rank| REPEATED.indices(n, 1, 2, [rank, 4], 1)).collect();
        let interleaved: Vec<_> = (0..512).map(|place| parts[place % 4][place / 4]).collect();
        assert_eq!(interleaved, one);
        assert!(parts.iter().all(|part| counts(part.iter().copied()).values().all(|&count| count == 1)));
    }

    #[test]
    fn small_and_empty_sets_are_no_panic() {
        assert_eq!(REPEATED.indices(10, 0, 0, [0, 1], 1).len(), 10);
        assert_eq!(REPEATED.indices(10, 0, 0, [2, 3], 1).len(), 3);
        for order in [Order::Sequential, Order::Shuffled, REPEATED] {
            assert!(order.indices(0, 0, 0, [0, 1], 1).is_empty() && order.indices(0, 0, 0, [1, 2], 1).is_empty());
        }
        assert_eq!((Order::Sequential.batches(10, [0, 1], 4), Order::Shuffled.batches(10, [0, 1], 4)), (3, 2));
    }
}
