//! Random numbers asked for by name: (seed, step, name, index) -> value, with no state to share.
//!
//! Philox 4x32-10 (Salmon et al. 2011) in counter mode. The same call gives the same numbers on any machine, in any order, from any thread; a
//! resumed run draws what the unbroken one would have drawn. A test hands out a generator that replays recorded numbers instead.

use crate::ensure;
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A part of the images that are drawn for.
#[derive(Clone, Copy, Debug)]
struct Share {
    number: usize,
    of: usize,
    first: usize,
}

const WHOLE: Share = Share { number: 0, of: 1, first: 0 };

#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    step: u64,
    /// In front of every name.
    within: &'static str,
    /// Which of how many shares of a batch its rows are drawn for, and the image of the whole that the share's first batch begins with.
    share: Share,
    replay: Option<Arc<BTreeMap<String, Vec<f32>>>>,
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self { seed, step: 0, within: "", share: WHOLE, replay: None }
    }

    /// The same generator at another step: every name gives fresh numbers.
    pub fn at(&self, step: u64) -> Self {
        Self { step, ..self.clone() }
    }

    /// The same generator with this in front of every name, so that two networks of one kind draw different numbers.
    pub fn within(&self, whose: &'static str) -> Self {
        Self { within: whose, ..self.clone() }
    }

    /// The same generator for share `number` of `of` of every batch: see [`Rng::rows`].
    pub fn of_share(&self, number: usize, of: usize) -> Self {
        Self { share: Share { number, of, ..self.share }, ..self.clone() }
    }

    /// The same generator for batches that begin with this image of a larger one.
    pub fn from_image(&self, first: usize) -> Self {
        Self { share: Share { first, ..self.share }, ..self.clone() }
    }

    /// A name with what stands in front of it.
    pub fn full(&self, name: &str) -> String {
        format!("{}{name}", self.within)
    }

    /// Answers with these recorded numbers; a name that was not recorded is an error.
    pub fn replaying(recorded: BTreeMap<String, Vec<f32>>) -> Self {
        Self { seed: 0, step: 0, within: "", share: WHOLE, replay: Some(Arc::new(recorded)) }
    }

    /// Uniform in [0, 1), multiples of 2^-24.
    pub fn uniform(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        self.rows_of(name, [n, 1], WHOLE)
    }

    /// The same for each image of a batch so many numbers. Where a batch is a part of a larger one that begins with image f, and is shared out, image i of share
    /// r of R is image f + i R + r of the whole, and gets the numbers that it would get there.
    pub fn rows(&self, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>> {
        self.rows_of(name, [rows, columns], self.share)
    }

    fn rows_of(&self, name: &str, [rows, columns]: [usize; 2], Share { number, of, first }: Share) -> Result<Vec<f32>> {
        let (name, n) = (&self.full(name), rows * columns);
        if let Some(recorded) = &self.replay {
            let values = recorded.get(name);
            ensure!(values.is_some(), "random numbers named {name:?} were not recorded");
            let values = values.cloned().unwrap_or_default();
            ensure!(values.len() == n, "random numbers named {name:?}: {} were recorded but {n} are wanted", values.len());
            return Ok(values);
        }
        let word = |word: u32| (word >> 8) as f32 * (1.0 / 16_777_216.0);
        if of == 1 {
            return Ok(self.words(name, first * columns, n).into_iter().map(word).collect());
        }
        Ok((0..rows).flat_map(|row| self.words(name, (first + row * of + number) * columns, columns)).map(word).collect())
    }

    /// Normal with mean 0 and deviation 1 (Box-Muller, from numbers of 32 bits).
    pub fn normal(&self, name: &str, n: usize) -> Vec<f32> {
        let words = self.words(&self.full(name), 0, n.div_ceil(2) * 2);
        let pairs = words.chunks_exact(2).flat_map(|pair| {
            let radius = (-2.0 * ((pair[0] as f64 + 0.5) / 4_294_967_296.0).ln()).sqrt();
            let angle = std::f64::consts::TAU * (pair[1] as f64 / 4_294_967_296.0);
            [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
        });
        pairs.take(n).collect()
    }

    /// Numbers one after another, for decisions whose count is not known beforehand: one stream for each name and number.
    pub fn stream(&self, name: &str, number: u64) -> Stream {
        let name = hash(&self.full(name)) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        let key = [self.seed as u32 ^ name as u32, (self.seed >> 32) as u32 ^ (name >> 32) as u32];
        Stream { key, step: self.step, next: 0, block: [0; 4] }
    }

    /// Words `first` to below `first + n` of a name.
    fn words(&self, name: &str, first: usize, n: usize) -> Vec<u32> {
        let name = hash(name);
        let key = [self.seed as u32 ^ name as u32, (self.seed >> 32) as u32 ^ (name >> 32) as u32];
        let block = |i: usize| philox([i as u32, (i >> 32) as u32, self.step as u32, (self.step >> 32) as u32], key);
        (first / 4..(first + n).div_ceil(4)).flat_map(block).skip(first % 4).take(n).collect()
    }
}

/// A stream of random numbers; see [`Rng::stream`].
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    step: u64,
    next: u64,
    block: [u32; 4],
}

impl Stream {
    pub fn word(&mut self) -> u32 {
        let at = (self.next % 4) as usize;
        if at == 0 {
            // Streams count in the upper half: they share no block with the numbers that are asked for by name alone.
            let block = self.next / 4;
            self.block = philox([block as u32, (block >> 32) as u32 | 1 << 31, self.step as u32, (self.step >> 32) as u32], self.key);
        }
        self.next += 1;
        self.block[at]
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    pub fn unit(&mut self) -> f64 {
        let bits = (self.word() as u64) << 32 | self.word() as u64;
        (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// A whole number from 0 to below `n`, each equally likely; 0 if there is none.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        // The product's upper half is uniform up to 2^-64 n.
        let word = (self.word() as u64) << 32 | self.word() as u64;
        ((word as u128 * n as u128) >> 64) as usize
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// Normal with mean 0 and deviation 1.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Puts the elements in an order of chance.
    pub fn shuffle<T>(&mut self, elements: &mut [T]) {
        for i in (1..elements.len()).rev() {
            elements.swap(i, self.below(i + 1));
        }
    }
}

/// FNV-1a with a final mix, so that names that differ in one letter share no bits.
fn hash(name: &str) -> u64 {
    let fnv = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3));
    let mixed = (fnv ^ (fnv >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = counter[0] as u64 * 0xd251_1f53;
        let b = counter[2] as u64 * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn numbers_depend_on_seed_step_and_name_and_on_nothing_else() {
        let rng = Rng::new(7);
        let numbers = rng.uniform("mask", 100).unwrap();
        assert_eq!(numbers, rng.uniform("mask", 100).unwrap());
        assert_eq!(numbers[..10], rng.uniform("mask", 10).unwrap());
        assert_ne!(numbers, rng.uniform("mast", 100).unwrap());
        assert_ne!(numbers, rng.at(1).uniform("mask", 100).unwrap());
        assert_ne!(numbers, Rng::new(8).uniform("mask", 100).unwrap());
    }

    #[test]
    fn a_share_of_a_batch_draws_what_its_images_get_in_the_whole() {
        let rng = Rng::new(7).at(3);
        let whole = rng.rows("mask", 12, 5).unwrap();
        assert_eq!(whole, rng.uniform("mask", 60).unwrap());
        for share in 0..3 {
            let own = rng.of_share(share, 3).rows("mask", 4, 5).unwrap();
            let expected: Vec<f32> = (0..4).flat_map(|row| whole[(row * 3 + share) * 5..][..5].to_vec()).collect();
            assert_eq!(own, expected, "{share}");
            assert_eq!(rng.of_share(share, 3).uniform("mask", 20).unwrap(), whole[..20]);
            let later = rng.of_share(share, 3).from_image(6).rows("mask", 2, 5).unwrap();
            assert_eq!(later, expected[10..]);
        }
        assert_eq!(rng.from_image(6).rows("mask", 6, 5).unwrap(), whole[30..]);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let uniform = Rng::new(1).uniform("u", 100_000).unwrap();
        let mean = uniform.iter().map(|&x| x as f64).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.004 && uniform.iter().all(|x| (0.0..1.0).contains(x)), "{mean}");
        let normal = Rng::new(1).normal("n", 100_001);
        let (mean, square) = normal.iter().fold((0.0, 0.0), |(m, s), &x| (m + x as f64 / 1e5, s + (x as f64).powi(2) / 1e5));
        assert!(mean.abs() < 0.015 && (square - 1.0).abs() < 0.02, "{mean} {square}");
    }

    #[test]
    fn streams_are_apart_and_have_the_moments_of_their_distributions() {
        let rng = Rng::new(3);
        let first = |name: &str, number: u64, step: u64| rng.at(step).stream(name, number).word();
        let words = [first("a", 0, 0), first("a", 1, 0), first("b", 0, 0), first("a", 0, 1), Rng::new(4).stream("a", 0).word()];
        assert!((1..words.len()).all(|i| !words[..i].contains(&words[i])), "{words:?}");
        let mut stream = rng.stream("moments", 5);
        let n = 100_000;
        let mean = (0..n).map(|_| stream.unit()).sum::<f64>() / n as f64;
        let square = (0..n).map(|_| stream.normal().powi(2)).sum::<f64>() / n as f64;
        let mut counts = [0usize; 7];
        (0..n).for_each(|_| counts[stream.below(7)] += 1);
        assert!((mean - 0.5).abs() < 0.005 && (square - 1.0).abs() < 0.02, "{mean} {square}");
        assert!(counts.iter().all(|&count| count.abs_diff(n / 7) < 500), "{counts:?}");
        let mut order: Vec<usize> = (0..50).collect();
        stream.shuffle(&mut order);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn a_replay_refuses_what_was_not_recorded() {
        let rng = Rng::replaying(BTreeMap::from([("mask".to_string(), vec![0.5, 0.25])]));
        assert_eq!(rng.uniform("mask", 2).unwrap(), [0.5, 0.25]);
        assert!(rng.uniform("mask", 3).is_err() && rng.uniform("other", 2).is_err());
    }
}
