//! Which patches a model sees: pure index arithmetic on noise drawn elsewhere, or on what a model attends to.
//!
//! Random masking sorts the L patches of each image by their noise. The first K of that order are kept, the rest hidden:
//!
//!   shuffle  [B, L]  patch at each place of the sorted order
//!   kept     [B, K]  its first K columns: what the encoder gathers, in noise order, not raster order
//!   restore  [B, L]  the inverse permutation: place of each patch in the order, what the decoder gathers to put patches back
//!   hidden   [B, L]  1 where restore >= K, in raster order; the loss looks there
//!
//! Equal noises keep raster order (-0 equals +0), so a mask is a function of its noise on every machine.
//!
//! Block masking does the same with units of 2 x 2 patches, whose patches share a noise; [`blockwise`] sorts by keys that blocks of random sizes are drawn into.
//!
//! Attention-guided masking keeps the K patches to which a query attends most: s[j] = mean over heads of A[h, e + j], A the query's softmax over all keys
//! and e the tokens in front. Equal scores go to the smaller index.
//!
//! On a GPU: kernels/masking.cu. What is no number is an error here and comes last there.

pub mod blockwise;
pub mod disjoint;

use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, Versions};
use crate::device::simd::Real;
use crate::error::Result;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure};

pub const VERSIONS: Versions = Versions { op: "random_mask", all: &["v1", "v2"], chosen: "v2" };

/// One mask for a batch: see the head of this module. The tensors are on the device of the noise; how many are kept is known here without asking it.
#[derive(Clone, Debug)]
pub struct Mask {
    pub kept: Tensor,
    pub shuffle: Tensor,
    pub restore: Tensor,
    pub hidden: Tensor,
}

impl Mask {
    /// Images of the batch.
    pub fn images(&self) -> usize {
        self.shuffle.rows()
    }

    /// Kept patches of each image.
    pub fn kept_each(&self) -> usize {
        self.kept.last()
    }

    /// Hidden patches of each image.
    pub fn hidden_each(&self) -> usize {
        self.shuffle.last() - self.kept_each()
    }
}

/// How many of `l` patches stay when `ratio` of them are hidden: l * (1 - ratio) in f64, truncated.
///
/// The truncation is part of the definition: 20 % of 100 patches is 19, because 1 - 0.8 is a little less than 0.2.
pub fn len_keep(l: usize, ratio: f64) -> Result<usize> {
    ensure!((0.0..=1.0).contains(&ratio), "mask ratio is {ratio}; it is a fraction from 0 to 1");
    Ok((l as f64 * (1.0 - ratio)) as usize)
}

/// Keeps, in each row of `noise` [B, L], the `keep` patches with the smallest values.
pub fn random(noise: &Tensor, keep: usize) -> Result<Mask> {
    let &[b, l] = noise.shape() else { crate::bail!("mask: noise is {noise:?} but [B, L] is needed") };
    ensure!(noise.dtype() == Dtype::F32, "mask: noise is {noise:?} but f32 is needed");
    ensure!(keep <= l, "mask: cannot keep {keep} of {l} patches");
    ensure!(u32::try_from(l).is_ok(), "mask: {l} patches are more than an index can count");
    if let Some(gpu) = noise.gpu() {
        return random_on(gpu, noise, keep);
    }
    let noise = noise.data::<f32>();
    if let Some(at) = noise.iter().position(|u| u.is_nan()) {
        crate::bail!("mask: noise of image {}, patch {} is not a number", at / l, at % l);
    }
    let (mut all_kept, mut all_shuffle) = (Vec::with_capacity(b * keep), Vec::with_capacity(b * l));
    let (mut all_restore, mut all_hidden) = (vec![0u32; b * l], vec![1.0f32; b * l]);
    for n in 0..b {
        let row = n * l..(n + 1) * l;
        let noise = &noise[row.clone()];
        let (restore, hidden) = (&mut all_restore[row.clone()], &mut all_hidden[row]);
        let mut order: Vec<u32> = (0..l as u32).collect();
        order.sort_by(|&i, &j| noise[i as usize].partial_cmp(&noise[j as usize]).expect("noise holds no NaN"));
        for (place, &patch) in order.iter().enumerate() {
            restore[patch as usize] = place as u32;
        }
        for &patch in &order[..keep] {
            hidden[patch as usize] = 0.0;
        }
        all_kept.extend_from_slice(&order[..keep]);
        all_shuffle.extend_from_slice(&order);
    }
    Ok(Mask {
        kept: Tensor::from_slice(&[b, keep], &all_kept)?,
        shuffle: Tensor::from_slice(&[b, l], &all_shuffle)?,
        restore: Tensor::from_slice(&[b, l], &all_restore)?,
        hidden: Tensor::from_slice(&[b, l], &all_hidden)?,
    })
}

fn random_on(gpu: &Gpu, noise: &Tensor, keep: usize) -> Result<Mask> {
    let (b, l) = (noise.rows(), noise.last());
    let indices = |columns| noise.alike(&[b, columns], Dtype::U32);
    let (mut kept, mut shuffle, mut restore) = (indices(keep)?, indices(l)?, indices(l)?);
    let mut hidden = noise.alike(&[b, l], Dtype::F32)?;
    let args = Args::new().out(&mut shuffle).out(&mut restore).out(&mut kept).out(&mut hidden).input(noise).int(l).int(keep);
    match gpu.version(&VERSIONS) {
        "v1" => gpu.launch("random_mask_v1_f32", Launch::new(b, threads(l)).shared(KEY * l), args)?,
        _ => gpu.launch("random_mask_v2_f32", sorting(b, l), args.int(l.next_power_of_two()))?,
    }
    Ok(Mask { kept, shuffle, restore, hidden })
}

/// The units of `side` x `side` patches that a grid falls into: the unit of each patch, u32 [B, L], in raster order of units and patches.
pub fn units(batch: usize, [rows, columns]: [usize; 2], side: usize) -> Result<Tensor> {
    ensure!(
        side > 0 && rows.is_multiple_of(side) && columns.is_multiple_of(side) && rows * columns > 0,
        "a grid of {rows} x {columns} patches does not fall into units of {side} x {side}"
    );
    let row = |r: usize| (0..columns).map(move |c| (r / side * (columns / side) + c / side) as u32);
    let one: Vec<u32> = (0..rows).flat_map(row).collect();
    Tensor::from_slice(&[batch, rows * columns], &one.repeat(batch))
}

/// Keeps whole units: those with the smallest `noise` [B, U], a patch beside the others of its unit, which `units` [B, L] names. `keep` counts patches.
pub fn blocks(noise: &Tensor, units: &Tensor, keep: usize) -> Result<Mask> {
    let (&[b, u], &[images, l]) = (noise.shape(), units.shape()) else {
        crate::bail!("mask: noise is {noise:?} and units are {units:?} but [B, U] and [B, L] are needed")
    };
    ensure!(b == images && u > 0 && l.is_multiple_of(u), "mask: noise {noise:?} is not for units {units:?}");
    let each = l / u;
    ensure!(keep.is_multiple_of(each), "mask: {keep} patches are no whole number of units of {each}");
    let mut spread = noise.alike(&[b, l], Dtype::F32)?;
    if let Some(gpu) = noise.gpu() {
        let args = Args::new().out(&mut spread).input(noise).input(units).int(b * l).int(u).int(l).int(1);
        gpu.launch("gather_fwd_v1_f32", Launch::new((b * l).div_ceil(8), 256), args.fault())?;
    } else {
        let (noise, units) = (noise.data::<f32>(), units.data::<u32>());
        ensure!(units.iter().all(|&unit| (unit as usize) < u), "mask: units {units:?} are more than the {u} that have noise");
        spread.data_mut::<f32>().iter_mut().zip(units).enumerate().for_each(|(i, (own, &unit))| *own = noise[i / l * u + unit as usize]);
    }
    random(&spread, keep)
}

/// Bytes of a key in the shared memory of a block that sorts.
const KEY: usize = 8;

/// A thread for each of `n`, in whole warps, as far as a block goes.
fn threads(n: usize) -> usize {
    n.next_multiple_of(32).clamp(32, 1024)
}

/// A block an image that sorts `n` numbers, a thread for two of them.
fn sorting(images: usize, n: usize) -> Launch {
    let padded = n.next_power_of_two();
    Launch::new(images, threads(padded / 2)).shared(KEY * padded)
}

/// Which keys a row of attention is normalised over before heads are averaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Keys {
    /// All of them, as the softmax left it.
    #[default]
    All,
    /// The patches: A[h, e + j] / (1 - sum of A[h, ..e]).
    Patches,
}

/// In which order the chosen patches come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Arrangement {
    /// The largest first.
    #[default]
    Falling,
    Raster,
}

/// The patches that a query attends to most, and how much.
#[derive(Clone, Debug)]
pub struct Attended {
    /// [B, K]
    pub kept: Tensor,
    /// [B, N], the mean over heads.
    pub saliency: Tensor,
}

/// The `keep` patches of each image to which a query attends most: `rows` [B, H, e + N] are its probabilities over all keys, `extra` = e.
pub fn most_attended(rows: &Tensor, extra: usize, keep: usize, keys: Keys, arrangement: Arrangement) -> Result<Attended> {
    let &[b, heads, width] = rows.shape() else { crate::bail!("saliency: probabilities are {rows:?} but [B, H, N] is needed") };
    ensure!(heads > 0 && extra <= width, "saliency: probabilities are {rows:?}, which have no {extra} tokens in front of the patches");
    let n = width - extra;
    ensure!(keep <= n, "saliency: cannot keep {keep} of {n} patches");
    let mut saliency = rows.alike(&[b, n], rows.dtype())?;
    if let Some(gpu) = rows.gpu() {
        ensure!(rows.dtype() == Dtype::F32, "saliency: probabilities are {rows:?} but f32 is needed");
        let mut kept = rows.alike(&[b, keep], Dtype::U32)?;
        let args = Args::new().out(&mut kept).out(&mut saliency).input(rows).int(n).int(heads).int(extra).int(keep);
        let args = args.int(n.next_power_of_two()).flag(keys == Keys::Patches).flag(arrangement == Arrangement::Raster);
        gpu.launch("most_attended_f32", sorting(b, n), args)?;
        return Ok(Attended { kept, saliency });
    }
    by_real!("saliency", rows.dtype(), average(rows, extra, keys, &mut saliency));
    let scores = saliency.to_f64();
    if let Some(at) = scores.iter().position(|score| score.is_nan()) {
        crate::bail!("saliency: the score of image {}, patch {} is not a number", at / n, at % n);
    }
    let mut kept = Vec::with_capacity(b * keep);
    for scores in scores.chunks_exact(n.max(1)) {
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by(|&i, &j| scores[j as usize].partial_cmp(&scores[i as usize]).expect("no score is NaN"));
        order.truncate(keep);
        if arrangement == Arrangement::Raster {
            order.sort_unstable();
        }
        kept.extend(order);
    }
    Ok(Attended { kept: Tensor::from_slice(&[b, keep], &kept)?, saliency })
}

/// Indices of the `keep` largest of each row of `saliency` [B, N].
pub fn top(saliency: &Tensor, keep: usize, arrangement: Arrangement) -> Result<Tensor> {
    let &[b, n] = saliency.shape() else { crate::bail!("saliency: scores are {saliency:?} but [B, N] is needed") };
    Ok(most_attended(&saliency.reshape(&[b, 1, n])?, 0, keep, Keys::All, arrangement)?.kept)
}

/// Means over heads, summed in their order.
fn average<T: Real + Element>(rows: &Tensor, extra: usize, keys: Keys, saliency: &mut Tensor) {
    let (heads, width, n) = (rows.shape()[1], rows.last(), saliency.last());
    let images = rows.data::<T>().chunks_exact((heads * width).max(1));
    for (rows, saliency) in images.zip(saliency.data_mut::<T>().chunks_exact_mut(n.max(1))) {
        saliency.fill(T::ZERO);
        for head in rows.chunks_exact(width) {
            let apart = head[..extra].iter().fold(T::ZERO, |sum, &p| sum + p);
            let patches = head[extra..].iter().map(|&p| if keys == Keys::Patches { p / (T::ONE - apart) } else { p });
            saliency.iter_mut().zip(patches).for_each(|(score, p)| *score += p);
        }
        saliency.iter_mut().for_each(|score| *score /= T::of(heads as f64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(noise: &[f32], b: usize, l: usize, keep: usize) -> Result<Mask> {
        super::random(&Tensor::from_slice(&[b, l], noise)?, keep)
    }

    #[test]
    fn len_keep_truncates_in_f64_like_the_reference() {
        let ratios = [0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98];
        let table = [
            (196, [147, 117, 98, 78, 58, 49, 39, 29, 19, 9, 3]),
            (256, [192, 153, 128, 102, 76, 64, 51, 38, 25, 12, 5]),
            (100, [75, 60, 50, 40, 30, 25, 19, 15, 9, 5, 2]),
            (200, [150, 120, 100, 80, 60, 50, 39, 30, 19, 10, 4]),
        ];
        for (l, kept) in table {
            for (ratio, kept) in ratios.into_iter().zip(kept) {
                assert_eq!(len_keep(l, ratio).unwrap(), kept, "{l} patches, ratio {ratio}");
            }
        }
        assert_eq!((len_keep(196, 0.0).unwrap(), len_keep(196, 1.0).unwrap()), (196, 0));
    }

    #[test]
    fn len_keep_refuses_what_is_not_a_fraction() {
        for ratio in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(len_keep(196, ratio).is_err(), "{ratio}");
        }
    }

    #[test]
    fn random_mask_has_the_indices_of_the_golden_micro_model() {
        let noise: Vec<f32> = (1..=2).flat_map(|k| (1..=16).map(move |l| (0.6180339887 * f64::from(l * k)).fract() as f32)).collect();
        let mask = random(&noise, 2, 16, 4).unwrap();
        assert_eq!(mask.kept.data::<u32>(), [12, 4, 9, 1, 12, 8, 4, 0]);
        assert_eq!(mask.restore.data::<u32>()[..16], [9, 3, 13, 7, 1, 11, 5, 15, 8, 2, 12, 6, 0, 10, 4, 14]);
        assert_eq!(mask.restore.data::<u32>()[16..], [3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12]);
        let hidden = [1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1];
        assert_eq!(mask.hidden.data::<f32>(), hidden.map(|h| h as f32));
    }

    #[test]
    fn equal_noises_keep_raster_order() {
        let mask = random(&[0.5, 0.0, 0.5, -0.0, 0.0], 1, 5, 2).unwrap();
        assert_eq!(mask.shuffle.data::<u32>(), [1, 3, 4, 0, 2]);
        assert_eq!(mask.kept.data::<u32>(), [1, 3]);
    }

    #[test]
    fn restore_is_the_inverse_of_shuffle_in_every_row() {
        let (b, l) = (7, 37);
        let noise: Vec<f32> = (0..b * l).map(|i| (i * 7919 % 101) as f32).collect();
        let mask = random(&noise, b, l, 9).unwrap();
        for n in 0..b {
            for patch in 0..l {
                assert_eq!(mask.shuffle.data::<u32>()[n * l + mask.restore.data::<u32>()[n * l + patch] as usize] as usize, patch);
            }
            assert_eq!(mask.hidden.data::<f32>()[n * l..(n + 1) * l].iter().sum::<f32>(), (l - 9) as f32);
        }
    }

    #[test]
    fn everything_or_nothing_may_be_kept() {
        let all = random(&[0.2, 0.1], 1, 2, 2).unwrap();
        assert_eq!((all.kept.data(), all.hidden.data()), (&[1u32, 0][..], &[0.0f32, 0.0][..]));
        let none = random(&[0.2, 0.1], 1, 2, 0).unwrap();
        assert_eq!((none.kept.numel(), none.hidden.data()), (0, &[1.0f32, 1.0][..]));
        assert_eq!(random(&[], 0, 4, 2).unwrap().kept.shape(), [0, 2]);
    }

    #[test]
    fn blocks_keep_whole_units_in_the_order_of_their_noise() {
        let units = units(1, [4, 4], 2).unwrap();
        assert_eq!(units.data::<u32>(), [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]);
        let noise = Tensor::from_slice(&[1, 4], &[0.3f32, 0.9, 0.8, 0.1]).unwrap();
        let mask = blocks(&noise, &units, 8).unwrap();
        assert_eq!(mask.kept.data::<u32>(), [10, 11, 14, 15, 0, 1, 4, 5]);
        assert!(blocks(&noise, &units, 6).unwrap_err().to_string().contains("6 patches are no whole number of units of 4"));
        assert!(super::units(1, [3, 4], 2).unwrap_err().to_string().contains("3 x 4 patches does not fall into units of 2 x 2"));
    }

    #[test]
    fn bad_noise_is_an_error() {
        assert!(random(&[0.1, f32::NAN], 1, 2, 1).unwrap_err().to_string().contains("patch 1"));
        assert!(random(&[0.1], 1, 2, 1).is_err());
        assert!(random(&[0.1, 0.2], 1, 2, 3).is_err());
        assert!(super::random(&Tensor::from_slice(&[1, 2], &[0.1f64, 0.2]).unwrap(), 1).is_err());
        assert!(super::random(&Tensor::from_slice(&[2], &[0.1f32, 0.2]).unwrap(), 1).is_err());
    }

    #[test]
    fn a_mask_knows_its_counts() {
        let mask = random(&[0.5; 21], 3, 7, 2).unwrap();
        assert_eq!((mask.images(), mask.kept_each(), mask.hidden_each()), (3, 2, 5));
    }

    #[test]
    fn the_largest_are_kept_and_ties_go_to_the_smaller_index() {
        let scores = Tensor::from_slice(&[2, 5], &[0.1f32, 0.4, 0.4, 0.0, 0.3, -1.0, -0.0, 0.0, -2.0, 0.0]).unwrap();
        assert_eq!(top(&scores, 3, Arrangement::Falling).unwrap().data::<u32>(), [1, 2, 4, 1, 2, 4]);
        assert_eq!(top(&scores, 4, Arrangement::Falling).unwrap().data::<u32>(), [1, 2, 4, 0, 1, 2, 4, 0]);
        assert_eq!(top(&scores, 4, Arrangement::Raster).unwrap().data::<u32>(), [0, 1, 2, 4, 0, 1, 2, 4]);
        assert_eq!(top(&scores, 0, Arrangement::Raster).unwrap().shape(), [2, 0]);
        assert!(top(&scores, 6, Arrangement::Falling).unwrap_err().to_string().contains("keep 6 of 5"));
        let bad = Tensor::from_slice(&[1, 2], &[0.1f32, f32::NAN]).unwrap();
        assert!(top(&bad, 1, Arrangement::Falling).unwrap_err().to_string().contains("patch 1"));
    }

    #[test]
    fn heads_that_look_at_the_class_token_weigh_less_unless_keys_are_patches() {
        // One head gives nearly everything to the class token and the rest to patch 1, the other looks at patch 0 a little more.
        let rows = Tensor::from_slice(&[1, 2, 3], &[0.9, 0.0, 0.1, 0.0, 0.55, 0.45]).unwrap();
        let all = most_attended(&rows, 1, 1, Keys::All, Arrangement::Falling).unwrap();
        assert_eq!((all.kept.data::<u32>(), all.saliency.to_f64()), (&[0u32][..], vec![0.275, 0.275]));
        let patches = most_attended(&rows, 1, 1, Keys::Patches, Arrangement::Falling).unwrap();
        assert_eq!(patches.kept.data::<u32>(), [1]);
        approx::assert_relative_eq!(patches.saliency.to_f64()[1], 0.725, max_relative = 1e-12);
        assert!(most_attended(&rows, 4, 0, Keys::All, Arrangement::Falling).is_err());
    }
}
