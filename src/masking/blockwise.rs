//! Blocks of random sizes that hide patches, as BEiT (arXiv 2106.08254) draws them and MaskFeat takes them.
//!
//!   until H patches are hidden, at most TRIES times:
//!     area    uniform in [least, what is left]        sqrt(aspect) = e^x, x uniform in [-a, a], a = ln(1 / 0.3) / 2
//!     block   round(sqrt(area) e^x) rows, round(sqrt(area) e^-x) columns, fewer than the grid has; at any place of it
//!     it counts if it hides at least one more patch and no more than are left; TEN failures in a row end it
//!
//! What is missing then is hidden at random, so that every image hides exactly H. The noise of an image is L numbers, one a patch, and 4 for each try. The
//! result are keys [B, L] for [`random`](super::random): the noise of a patch, and 1 more under a block, so those under blocks are hidden first.
//!
//! e^x is nine terms of its series, and every product that is added is one operation, so a GPU (kernels/masking.cu) gives the CPU's keys bit for bit.

use crate::device::launch::{Args, Launch};
use crate::ensure;
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// Blocks that are tried for an image.
pub const TRIES: usize = 64;

/// Failures in a row that end an image.
const TEN: usize = 10;

/// ln(1 / 0.3) / 2, where 0.3 is the least aspect.
const STRETCH: f32 = 0.601_986_4;

/// Random numbers of an image.
pub fn noise_each([rows, columns]: [usize; 2]) -> usize {
    rows * columns + 4 * TRIES
}

/// The least area of a block that a grid of 196 patches, 78 of them hidden, is published with; a quarter of what is hidden where that is less.
pub fn least_block(hidden: usize) -> usize {
    (hidden / 4).clamp(1, 15)
}

/// What a block is drawn for.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub grid: [usize; 2],
    /// Patches that are hidden.
    pub hide: usize,
    /// Least area of a block.
    pub least: usize,
}

/// From noise [B, L + 4 TRIES], uniform in [0, 1), the keys by which the patches of each image are sorted, [B, L].
pub fn keys(noise: &Tensor, c: Blocks) -> Result<Tensor> {
    let ([rows, columns], width) = (c.grid, noise_each(c.grid));
    let &[batch, given] = noise.shape() else { crate::bail!("mask: noise is {noise:?} but [B, {width}] is needed") };
    let l = rows * columns;
    ensure!(given == width && noise.dtype() == Dtype::F32, "mask: noise is {noise:?} but {width} numbers in f32 are needed of each image");
    ensure!(c.hide <= l && c.least > 0, "mask: blocks of at least {} patches cannot hide {} of {l}", c.least, c.hide);
    let mut keys = noise.alike(&[batch, l], Dtype::F32)?;
    if let Some(gpu) = noise.gpu() {
        let args = Args::new().out(&mut keys).input(noise).int(batch).int(rows).int(columns).int(c.hide).int(c.least).int(TRIES);
        gpu.launch("block_keys_f32", Launch::new(batch.div_ceil(32), 32), args)?;
        return Ok(keys);
    }
    for (keys, noise) in keys.data_mut::<f32>().chunks_exact_mut(l.max(1)).zip(noise.data::<f32>().chunks_exact(width)) {
        ensure!(noise.iter().all(|u| (0.0..1.0).contains(u)), "mask: the noise of blocks is not in [0, 1)");
        one(keys, noise, c);
    }
    Ok(keys)
}

fn one(keys: &mut [f32], noise: &[f32], c: Blocks) {
    let ([rows, columns], (own, tries)) = (c.grid, noise.split_at(keys.len()));
    keys.copy_from_slice(own);
    let (mut left, mut failures) = (c.hide, 0);
    for numbers in tries.chunks_exact(4) {
        if left == 0 || failures == TEN {
            return;
        }
        failures += 1;
        let area = numbers[0].mul_add(left as f32 - c.least as f32, c.least as f32);
        let (side, x) = (area.sqrt(), numbers[1].mul_add(2.0 * STRETCH, -STRETCH));
        let (height, width) = (rounded(side, exponential(x)), rounded(side, exponential(-x)));
        if height >= rows || width >= columns {
            continue;
        }
        let (top, first) = (place(numbers[2], rows - height), place(numbers[3], columns - width));
        let patches = || (top..top + height).flat_map(|row| (first..first + width).map(move |column| row * columns + column));
        let fresh = patches().filter(|&patch| keys[patch] < 1.0).count();
        if fresh == 0 || fresh > left {
            continue;
        }
        patches().for_each(|patch| {
            if keys[patch] < 1.0 {
                keys[patch] += 1.0;
            }
        });
        (left, failures) = (left - fresh, 0);
    }
}

/// side * stretch to the nearest whole number.
fn rounded(side: f32, stretch: f32) -> usize {
    side.mul_add(stretch, 0.5) as usize
}

/// One of the places 0 to `last`, each as likely.
fn place(u: f32, last: usize) -> usize {
    ((u * (last + 1) as f32) as usize).min(last)
}

/// e^x for |x| < 0.61, to a few units of the last place.
fn exponential(x: f32) -> f32 {
    (1..=8).rev().fold(1.0, |sum: f32, n| (x / n as f32).mul_add(sum, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::masking::random;
    use crate::rng::Rng;

    fn drawn(seed: u64, batch: usize, c: Blocks) -> Tensor {
        let width = noise_each(c.grid);
        let noise = Tensor::from_slice(&[batch, width], &Rng::new(seed).uniform("mask", batch * width).unwrap()).unwrap();
        keys(&noise, c).unwrap()
    }

    #[test]
    fn every_image_hides_exactly_as_many_and_all_under_its_blocks() {
        for (grid, hide) in [([14, 14], 78), ([14, 14], 1), ([14, 14], 195), ([6, 6], 14), ([4, 9], 20), ([1, 7], 3), ([2, 2], 2)] {
            let c = Blocks { grid, hide, least: least_block(hide) };
            let (keys, l) = (drawn(3, 40, c), grid[0] * grid[1]);
            let mask = random(&keys, l - hide).unwrap();
            for (keys, hidden) in keys.data::<f32>().chunks(l).zip(mask.hidden.data::<f32>().chunks(l)) {
                let covered = keys.iter().filter(|&&key| key >= 1.0).count();
                assert!(covered <= hide, "{covered} of {hide}");
                assert_eq!(hidden.iter().filter(|&&hidden| hidden == 1.0).count(), hide);
                assert!(keys.iter().zip(hidden).all(|(&key, &hidden)| key < 1.0 || hidden == 1.0), "{grid:?}");
            }
        }
    }

    #[test]
    fn blocks_hide_nearly_everything_and_lie_together() {
        let c = Blocks { grid: [14, 14], hide: 78, least: 15 };
        let keys = drawn(5, 200, c);
        let covered = keys.data::<f32>().iter().filter(|&&key| key >= 1.0).count();
        assert!(covered > 200 * 70, "blocks hide {} of 78", covered as f64 / 200.0);
        // Neighbours of a hidden patch are hidden far more often than the two in five of single patches.
        let mask = random(&keys, 118).unwrap();
        let (mut pairs, mut both) = (0, 0);
        for hidden in mask.hidden.data::<f32>().chunks(196) {
            for at in (0..196).filter(|at| at % 14 < 13 && hidden[*at] == 1.0) {
                pairs += 1;
                both += usize::from(hidden[at + 1] == 1.0);
            }
        }
        assert!(both as f64 > 0.65 * pairs as f64, "{both} of {pairs}");
        // No place of the grid is left out, though corners lie under fewer blocks.
        let mut counts = [0.0f32; 196];
        mask.hidden.data::<f32>().iter().enumerate().for_each(|(at, hidden)| counts[at % 196] += hidden);
        assert!(counts.iter().all(|&count| count > 2.0), "{counts:?}");
    }

    #[test]
    fn a_block_has_the_area_the_aspect_and_the_place_of_its_numbers() {
        let c = Blocks { grid: [8, 8], hide: 20, least: 10 };
        let mut noise = vec![0.25f32; noise_each([8, 8])];
        // 15 patches, as high as they are wide; from the third row and the last column but three. Then what fails ten times.
        noise[64..68].copy_from_slice(&[0.5, 0.5, 0.5, 0.99]);
        noise[68..].chunks_mut(4).for_each(|numbers| numbers.copy_from_slice(&[0.5, 0.5, 0.5, 0.99]));
        let keys = keys(&Tensor::from_slice(&[1, noise.len()], &noise).unwrap(), c).unwrap();
        let covered: Vec<usize> = (0..64).filter(|&at| keys.data::<f32>()[at] == 1.25).collect();
        let wanted: Vec<usize> = (2..6).flat_map(|row| (4..8).map(move |column| 8 * row + column)).collect();
        assert_eq!(covered, wanted);
    }

    #[test]
    fn stretches_are_exponentials_and_small_grids_have_small_blocks() {
        for x in [-0.602f32, -0.3, 0.0, 1e-3, 0.45, 0.602] {
            assert!((f64::from(exponential(x)) / f64::from(x).exp() - 1.0).abs() < 2e-7, "{x}");
        }
        assert!((f64::from(STRETCH) - (1.0f64 / 0.3).ln() / 2.0).abs() < 1e-7);
        assert_eq!([1, 4, 14, 60, 78, 500].map(least_block), [1, 1, 3, 15, 15, 15]);
    }
}
