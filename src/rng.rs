//! Random numbers asked for by name: (seed, step, name, index) -> value, with no state to share.
//!
//! Philox 4x32-10 (Salmon et al. 2011) in counter mode. The same call gives the same numbers on any machine, in any order, from any thread; a
//! resumed run draws what the unbroken one would have drawn. A test hands out a generator that replays recorded numbers instead.

use crate::ensure;
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    step: u64,
    replay: Option<Arc<BTreeMap<String, Vec<f32>>>>,
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self { seed, step: 0, replay: None }
    }

    /// The same generator at another step: every name gives fresh numbers.
    pub fn at(&self, step: u64) -> Self {
        Self { step, ..self.clone() }
    }

    /// Answers with these recorded numbers; a name that was not recorded is an error.
    pub fn replaying(recorded: BTreeMap<String, Vec<f32>>) -> Self {
        Self { seed: 0, step: 0, replay: Some(Arc::new(recorded)) }
    }

    /// Uniform in [0, 1), multiples of 2^-24.
    pub fn uniform(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        if let Some(recorded) = &self.replay {
            let values = recorded.get(name);
            ensure!(values.is_some(), "random numbers named {name:?} were not recorded");
            let values = values.cloned().unwrap_or_default();
            ensure!(values.len() == n, "random numbers named {name:?}: {} were recorded but {n} are wanted", values.len());
            return Ok(values);
        }
        Ok(self.words(name, n).into_iter().map(|word| (word >> 8) as f32 * (1.0 / 16_777_216.0)).collect())
    }

    /// Normal with mean 0 and deviation 1 (Box-Muller, from numbers of 32 bits).
    pub fn normal(&self, name: &str, n: usize) -> Vec<f32> {
        let words = self.words(name, n.div_ceil(2) * 2);
        let pairs = words.chunks_exact(2).flat_map(|pair| {
            let radius = (-2.0 * ((pair[0] as f64 + 0.5) / 4_294_967_296.0).ln()).sqrt();
            let angle = std::f64::consts::TAU * (pair[1] as f64 / 4_294_967_296.0);
            [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
        });
        pairs.take(n).collect()
    }

    fn words(&self, name: &str, n: usize) -> Vec<u32> {
        let name = hash(name);
        let key = [self.seed as u32 ^ name as u32, (self.seed >> 32) as u32 ^ (name >> 32) as u32];
        let block = |i: usize| philox([i as u32, (i >> 32) as u32, self.step as u32, (self.step >> 32) as u32], key);
        (0..n.div_ceil(4)).flat_map(block).take(n).collect()
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
    fn moments_are_those_of_the_distributions() {
        let uniform = Rng::new(1).uniform("u", 100_000).unwrap();
        let mean = uniform.iter().map(|&x| x as f64).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.004 && uniform.iter().all(|x| (0.0..1.0).contains(x)), "{mean}");
        let normal = Rng::new(1).normal("n", 100_001);
        let (mean, square) = normal.iter().fold((0.0, 0.0), |(m, s), &x| (m + x as f64 / 1e5, s + (x as f64).powi(2) / 1e5));
        assert!(mean.abs() < 0.015 && (square - 1.0).abs() < 0.02, "{mean} {square}");
    }

    #[test]
    fn a_replay_refuses_what_was_not_recorded() {
        let rng = Rng::replaying(BTreeMap::from([("mask".to_string(), vec![0.5, 0.25])]));
        assert_eq!(rng.uniform("mask", 2).unwrap(), [0.5, 0.25]);
        assert!(rng.uniform("mask", 3).is_err() && rng.uniform("other", 2).is_err());
    }
}
