//! Which patches a model sees: pure index arithmetic on noise drawn elsewhere.
//!
//! Random masking sorts the L patches of each image by their noise. The first K of that order are kept, the rest hidden:
//!
//!   shuffle  [B, L]  patch at each place of the sorted order
//!   kept     [B, K]  its first K columns: what the encoder gathers, in noise order, not raster order
//!   restore  [B, L]  the inverse permutation: place of each patch in the order, what the decoder gathers to put patches back
//!   hidden   [B, L]  1 where restore >= K, in raster order; the loss looks there
//!
//! Equal noises keep raster order (-0 equals +0), so a mask is a function of its noise on every machine.

use crate::ensure;
use crate::error::Result;
use crate::tensor::Tensor;

/// One mask for a batch: see the head of this module.
#[derive(Clone, Debug)]
pub struct Mask {
    pub kept: Tensor,
    pub shuffle: Tensor,
    pub restore: Tensor,
    pub hidden: Tensor,
}

/// How many of `l` patches stay when `ratio` of them are hidden: l * (1 - ratio) in f64, truncated.
///
/// The truncation is part of the definition: 20 % of 100 patches is 19, because 1 - 0.8 is a little less than 0.2.
pub fn len_keep(l: usize, ratio: f64) -> Result<usize> {
    ensure!((0.0..=1.0).contains(&ratio), "mask ratio is {ratio}; it is a fraction from 0 to 1");
    Ok((l as f64 * (1.0 - ratio)) as usize)
}

/// Keeps, in each row of `noise` [B, L], the `keep` patches with the smallest values.
pub fn random(noise: &[f32], b: usize, l: usize, keep: usize) -> Result<Mask> {
    ensure!(b.checked_mul(l) == Some(noise.len()), "mask: noise has {} values but [B, L] is [{b}, {l}]", noise.len());
    ensure!(keep <= l, "mask: cannot keep {keep} of {l} patches");
    ensure!(u32::try_from(l).is_ok(), "mask: {l} patches are more than an index can count");
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn bad_noise_is_an_error() {
        assert!(random(&[0.1, f32::NAN], 1, 2, 1).unwrap_err().to_string().contains("patch 1"));
        assert!(random(&[0.1], 1, 2, 1).is_err());
        assert!(random(&[0.1, 0.2], 1, 2, 3).is_err());
        assert!(random(&[0.1, 0.2], usize::MAX, 2, 1).is_err());
    }
}
