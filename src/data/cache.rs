//! A set whose pictures stay in memory once they were decoded, up to so many bytes.

use super::{Dataset, Picture};
use crate::error::Result;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// For sets that fit into memory, or begin to: what was asked for first stays, and what no longer fits is decoded each time.
pub struct Cached {
    dataset: Arc<dyn Dataset>,
    most_bytes: usize,
    kept_bytes: AtomicUsize,
    kept: Vec<OnceLock<Picture>>,
}

impl Cached {
    /// Keeps pictures of `most_bytes` in all.
    pub fn new(dataset: Arc<dyn Dataset>, most_bytes: usize) -> Self {
        // A picture has at least one byte.
        let most = dataset.len().min(most_bytes);
        Self { dataset, most_bytes, kept_bytes: AtomicUsize::new(0), kept: std::iter::repeat_with(OnceLock::new).take(most).collect() }
    }

    /// Bytes of the pictures that are kept by now.
    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes.load(Ordering::Relaxed)
    }

    fn keep(&self, index: usize, picture: &Picture) {
        let Some(place) = self.kept.get(index) else { return };
        let bytes = picture.pixels.len();
        let more = |kept: usize| kept.checked_add(bytes).filter(|&kept| kept <= self.most_bytes);
        if self.kept_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            return;
        }
        if place.set(picture.clone()).is_err() {
            // Another thread kept the same picture meanwhile.
            self.kept_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Dataset for Cached {
    fn len(&self) -> usize {
        self.dataset.len()
    }

    fn classes(&self) -> &[String] {
        self.dataset.classes()
    }

    fn label(&self, index: usize) -> u32 {
        self.dataset.label(index)
    }

    fn name(&self, index: usize) -> String {
        self.dataset.name(index)
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        if let Some(picture) = self.kept.get(index).and_then(OnceLock::get) {
            return Ok(picture.clone());
        }
        let picture = self.dataset.picture(index)?;
        self.keep(index, &picture);
        Ok(picture)
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        self.dataset.encoded(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bail;

    /// Pictures of `index + 1` pixels, except that one cannot be read; counts how often it was asked.
    struct Counting {
        len: usize,
        broken: usize,
        asked: AtomicUsize,
    }

    impl Dataset for Counting {
        fn len(&self) -> usize {
            self.len
        }

        fn classes(&self) -> &[String] {
            &[]
        }

        fn label(&self, index: usize) -> u32 {
            index as u32
        }

        fn name(&self, index: usize) -> String {
            format!("picture {index}")
        }

        fn picture(&self, index: usize) -> Result<Picture> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            if index == self.broken {
                bail!("{} is broken", self.name(index))
            }
            Picture::new([1, index + 1], 1, vec![index as u8; index + 1])
        }
    }

    fn set(len: usize, broken: usize, most_bytes: usize) -> (Arc<Counting>, Cached) {
        let counting = Arc::new(Counting { len, broken, asked: AtomicUsize::new(0) });
        (counting.clone(), Cached::new(counting, most_bytes))
    }

    #[test]
    fn a_picture_is_decoded_once_and_an_error_each_time() {
        let (counting, cached) = set(5, 3, 1 << 20);
        for _ in 0..3 {
            for index in [0, 1, 2, 4] {
                assert_eq!(cached.picture(index).unwrap(), counting.picture(index).unwrap());
            }
            assert!(cached.picture(3).unwrap_err().chain().contains("picture 3"));
        }
        assert_eq!(counting.asked.load(Ordering::Relaxed), 4 + 3 + 12);
        assert_eq!((cached.kept_bytes(), cached.len(), cached.label(4)), (1 + 2 + 3 + 5, 5, 4));
    }

    #[test]
    fn no_more_is_kept_than_was_allowed() {
        let (counting, cached) = set(10, usize::MAX, 7);
        for round in 0..2 {
            for index in 0..10 {
                assert_eq!(cached.picture(index).unwrap().pixels.len(), index + 1);
            }
            // Pictures of 1, 2 and 3 bytes are kept; none of the others fits.
            assert_eq!((cached.kept_bytes(), counting.asked.load(Ordering::Relaxed)), (6, 10 + 7 * round));
        }
        let (counting, cached) = set(2, usize::MAX, 0);
        assert!((0..4).all(|_| cached.picture(1).is_ok()) && counting.asked.load(Ordering::Relaxed) == 4 && cached.kept_bytes() == 0);
    }

    #[test]
    fn threads_that_ask_together_count_a_picture_once() {
        let (_, cached) = set(8, usize::MAX, 1000);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|i| assert_eq!(cached.picture(i % 8).unwrap().pixels.len(), i % 8 + 1)));
            }
        });
        let kept: usize = cached.kept.iter().flat_map(OnceLock::get).map(|picture| picture.pixels.len()).sum();
        assert_eq!((cached.kept_bytes(), kept), (36, 36));
    }
}
