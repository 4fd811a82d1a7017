//! Mixup and CutMix of a batch with its own reverse: the partner of image i is image B-1-i. What is drawn at random (the share `lam`, the
//! centre of the box) is an argument.
//!
//!   mixup    x_i = lam x_i + (1 - lam) x_{B-1-i}
//!   cutmix   a box of x_i is replaced by the partner's; lam becomes 1 - area/(H W) of the box that lay inside the image
//!   targets  t_i = lam Y(y_i) + (1 - lam) Y(y_{B-1-i}),   Y = 1 - s + s/C at the label and s/C elsewhere (smoothing s, C classes)
//!
//! Images are [B, C, H, W], targets [B, classes]. Each pair needs both its images as they were, so pairs are updated together, in place;
//! a batch of odd size is refused. Targets are smoothed even when lam is 1.

use super::augment::Mix;
use crate::ensure;
use crate::error::Result;
use rayon::prelude::*;

/// The rows `y0..y1` and columns `x0..x1` that CutMix exchanges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutBox {
    pub y0: usize,
    pub y1: usize,
    pub x0: usize,
    pub x1: usize,
}

/// The box of share 1 - `lam` centred at (`cy`, `cx`) and clipped to `h` x `w`, and the share that the clipped box leaves.
///
/// Half a side is rounded down, so a box of odd side loses a pixel.
pub fn cutmix_box(h: usize, w: usize, lam: f64, cy: usize, cx: usize) -> Result<(CutBox, f64)> {
    check_lam(lam)?;
    ensure!(cy < h && cx < w, "cutmix: centre ({cy}, {cx}) is outside a {h} x {w} image");
    let ratio = (1.0 - lam).sqrt();
    let edges = |size: usize, centre: usize| {
        let half = (size as f64 * ratio) as usize / 2;
        (centre.saturating_sub(half), (centre + half).min(size))
    };
    let ((y0, y1), (x0, x1)) = (edges(h, cy), edges(w, cx));
    let share = ((y1 - y0) as f64 * (x1 - x0) as f64) / (h as f64 * w as f64);
    Ok((CutBox { y0, y1, x0, x1 }, 1.0 - share))
}

/// Mixes `images` [B, ..] with their partners in place.
pub fn mixup(images: &mut [f32], batch: usize, lam: f64) -> Result<()> {
    check_mixup(batch, lam)?;
    let (own, other) = (lam as f32, (1.0 - lam) as f32);
    if lam < 1.0 {
        for_each_pair(images, batch, |_, x, y| {
            for (x, y) in x.iter_mut().zip(y) {
                (*x, *y) = (own * *x + other * *y, own * *y + other * *x);
            }
        })?;
    } else {
        for_each_pair(images, batch, |_, _, _| {})?;
    }
    Ok(())
}

/// Exchanges the box of each image of `images`, shape `[B, C, H, W]`, with its partner's, in place.
pub fn cutmix(images: &mut [f32], shape: [usize; 4], cut: CutBox) -> Result<()> {
    let [batch, _, h, w] = shape;
    let wanted = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
    ensure!(wanted == Some(images.len()), "cutmix: {} values are not [B, C, H, W] = {shape:?}", images.len());
    check_cut(shape, cut)?;
    let CutBox { y0, y1, x0, x1 } = cut;
    for_each_pair(images, batch, |_, a, b| {
        for (a, b) in a.chunks_exact_mut(h * w).zip(b.chunks_exact_mut(h * w)) {
            for y in y0..y1 {
                a[y * w + x0..y * w + x1].swap_with_slice(&mut b[y * w + x0..y * w + x1]);
            }
        }
    })
}

/// The smoothed targets [B, classes] of a batch mixed with share `lam` (for CutMix the one that [`cutmix_box`] returned).
pub fn mix_targets(labels: &[u32], classes: usize, lam: f64, smoothing: f64) -> Result<Vec<f32>> {
    mix_each_target(labels, classes, &vec![lam; labels.len()], smoothing)
}

/// The smoothed targets [B, classes] where each image has a share of its own.
pub fn mix_each_target(labels: &[u32], classes: usize, lams: &[f64], smoothing: f64) -> Result<Vec<f32>> {
    lams.iter().try_for_each(|&lam| check_lam(lam))?;
    check_even(labels.len())?;
    ensure!(lams.len() == labels.len(), "mixup: {} shares were drawn for {} images", lams.len(), labels.len());
    ensure!((0.0..=1.0).contains(&smoothing), "label smoothing is {smoothing}; it is a fraction from 0 to 1");
    if let Some(label) = labels.iter().find(|&&label| label as usize >= classes) {
        crate::bail!("targets: label {label} does not exist among {classes} classes");
    }
    let off = smoothing / classes as f64;
    let on = 1.0 - smoothing + off;
    let smooth = |label: u32, class: usize| if label as usize == class { on } else { off };
    let mut targets = Vec::with_capacity(labels.len() * classes);
    for ((&own, &other), &lam) in labels.iter().zip(labels.iter().rev()).zip(lams) {
        targets.extend((0..classes).map(|class| (lam * smooth(own, class) + (1.0 - lam) * smooth(other, class)) as f32));
    }
    Ok(targets)
}

fn check_lam(lam: f64) -> Result<()> {
    ensure!((0.0..=1.0).contains(&lam), "mixup: the share of an image is {lam}; it lies from 0 to 1");
    Ok(())
}

/// Refuses a share that is none and a batch that cannot be paired.
pub(super) fn check_mixup(batch: usize, lam: f64) -> Result<()> {
    check_lam(lam)?;
    check_even(batch)
}

/// Refuses a batch that cannot be paired and a box that is not inside its images.
pub(super) fn check_cut([batch, _, h, w]: [usize; 4], cut: CutBox) -> Result<()> {
    let CutBox { y0, y1, x0, x1 } = cut;
    ensure!(y0 <= y1 && y1 <= h && x0 <= x1 && x1 <= w, "cutmix: rows {y0}..{y1}, columns {x0}..{x1} are not inside {h} x {w}");
    check_even(batch)
}

fn check_even(batch: usize) -> Result<()> {
    ensure!(batch.is_multiple_of(2), "mixup: a batch of {batch} cannot be paired with its reverse; use an even batch size");
    Ok(())
}

/// Mixes each image of `images`, shape `[B, C, H, W]`, in its own way with its partner as that was before.
pub fn mix_each(images: &mut [f32], shape: [usize; 4], mixes: &[Mix]) -> Result<()> {
    let [batch, _, h, w] = shape;
    let wanted = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
    ensure!(wanted == Some(images.len()), "mixup: {} values are not [B, C, H, W] = {shape:?}", images.len());
    ensure!(mixes.len() == batch, "mixup: {} ways to mix were drawn for {batch} images", mixes.len());
    for mix in mixes {
        match *mix {
            Mix::None => {}
            Mix::Mixup(lam) => check_lam(lam)?,
            Mix::Cutmix(cut) => check_cut(shape, cut)?,
        }
    }
    let mix = |x: &mut [f32], y: &[f32], mix: Mix| match mix {
        Mix::None => {}
        Mix::Mixup(1.0) => {}
        Mix::Mixup(lam) => {
            let (own, other) = (lam as f32, (1.0 - lam) as f32);
            x.iter_mut().zip(y).for_each(|(x, y)| *x = own * *x + other * *y);
        }
        Mix::Cutmix(CutBox { y0, y1, x0, x1 }) => {
            for (x, y) in x.chunks_exact_mut(h * w).zip(y.chunks_exact(h * w)) {
                (y0..y1).for_each(|row| x[row * w + x0..row * w + x1].copy_from_slice(&y[row * w + x0..row * w + x1]));
            }
        }
    };
    for_each_pair(images, batch, |first, x, y| {
        let before = x.to_vec();
        mix(x, y, mixes[first]);
        mix(y, &before, mixes[batch - 1 - first]);
    })
}

/// Hands out each image of the first half, by number, with its partner, both writable.
fn for_each_pair(images: &mut [f32], batch: usize, update: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) -> Result<()> {
    check_even(batch)?;
    if images.is_empty() {
        return Ok(());
    }
    ensure!(batch > 0 && images.len().is_multiple_of(batch), "mixup: {} values are not {batch} images", images.len());
    let image = images.len() / batch;
    let (first, second) = images.split_at_mut(images.len() / 2);
    let pairs = first.par_chunks_exact_mut(image).zip(second.par_chunks_exact_mut(image).rev());
    pairs.enumerate().for_each(|(i, (x, y))| update(i, x, y));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn box_is_clipped_and_the_share_corrected() {
        let (cut, lam) = cutmix_box(224, 224, 0.7, 10, 200).unwrap();
        assert_eq!(cut, CutBox { y0: 0, y1: 71, x0: 139, x1: 224 });
        assert!((lam - 0.8797233737244898).abs() < 1e-15);
    }

    #[test]
    fn box_of_a_rectangle_follows_each_side() {
        let (cut, lam) = cutmix_box(10, 20, 0.75, 5, 10).unwrap();
        assert_eq!(cut, CutBox { y0: 3, y1: 7, x0: 5, x1: 15 }); // 5 rows wanted, one lost
        assert_eq!(lam, 1.0 - 40.0 / 200.0);
        let (cut, lam) = cutmix_box(10, 20, 1.0, 5, 10).unwrap();
        assert_eq!((cut.y0, cut.y1, lam), (5, 5, 1.0));
    }

    #[test]
    fn mixup_blends_every_image_with_the_reverse_of_the_batch() {
        let mut images = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        mixup(&mut images, 4, 0.75).unwrap();
        assert_eq!(images, [2.5, 3.5, 3.5, 4.5, 4.5, 5.5, 5.5, 6.5]);
    }

    #[test]
    fn whole_share_leaves_images_alone_even_when_one_is_infinite() {
        let mut images = [1.0, f32::INFINITY];
        mixup(&mut images, 2, 1.0).unwrap();
        assert_eq!(images, [1.0, f32::INFINITY]);
    }

    #[test]
    fn cutmix_exchanges_the_box_in_every_channel() {
        let mut images: Vec<f32> = (0..24).map(|i| i as f32).collect(); // [2, 2, 2, 3]
        cutmix(&mut images, [2, 2, 2, 3], CutBox { y0: 1, y1: 2, x0: 0, x1: 2 }).unwrap();
        let expected = [0, 1, 2, 15, 16, 5, 6, 7, 8, 21, 22, 11, 12, 13, 14, 3, 4, 17, 18, 19, 20, 9, 10, 23];
        assert_eq!(images, expected.map(|v| v as f32));
    }

    #[test]
    fn targets_are_smoothed_even_when_nothing_is_mixed() {
        let targets = mix_targets(&[0, 999], 1000, 1.0, 0.1).unwrap();
        assert_eq!((targets[0], targets[1], targets[1999]), (0.9001, 0.0001, 0.9001));
        let targets = mix_targets(&[1, 0], 2, 0.25, 0.0).unwrap();
        assert_eq!(targets, [0.75, 0.25, 0.25, 0.75]);
    }

    #[test]
    fn images_that_are_mixed_in_their_own_ways_see_their_partners_as_they_were() {
        let original: Vec<f32> = (0..16).map(|i| i as f32).collect(); // [4, 1, 2, 2]
        let mut images = original.clone();
        let row = CutBox { y0: 0, y1: 1, x0: 0, x1: 2 };
        mix_each(&mut images, [4, 1, 2, 2], &[Mix::Mixup(0.25), Mix::None, Mix::Cutmix(row), Mix::Mixup(0.5)]).unwrap();
        assert_eq!(images[..4], [9.0, 10.0, 11.0, 12.0]);
        assert_eq!(images[4..8], original[4..8]);
        assert_eq!(images[8..12], [4.0, 5.0, 10.0, 11.0]);
        assert_eq!(images[12..], [6.0, 7.0, 8.0, 9.0]);
        let targets = mix_each_target(&[0, 1], 2, &[0.75, 1.0], 0.0).unwrap();
        assert_eq!(targets, [0.75, 0.25, 0.0, 1.0]);
    }

    #[test]
    fn one_way_for_all_is_the_way_of_the_batch() {
        let original: Vec<f32> = (0..4 * 2 * 3 * 5).map(|i| (i * i % 17) as f32 * 0.37).collect();
        let cut = CutBox { y0: 1, y1: 3, x0: 2, x1: 5 };
        let (mut each, mut batch) = (original.clone(), original.clone());
        mix_each(&mut each, [4, 2, 3, 5], &[Mix::Cutmix(cut); 4]).unwrap();
        cutmix(&mut batch, [4, 2, 3, 5], cut).unwrap();
        assert_eq!(each, batch);
        let (mut each, mut batch) = (original.clone(), original);
        mix_each(&mut each, [4, 2, 3, 5], &[Mix::Mixup(0.3); 4]).unwrap();
        mixup(&mut batch, 4, 0.3).unwrap();
        assert_eq!(each, batch);
        assert!(mix_each(&mut each, [4, 2, 3, 5], &[Mix::None; 3]).is_err());
        assert!(mix_each(&mut each, [4, 2, 3, 5], &[Mix::Mixup(2.0); 4]).is_err());
        assert!(mix_each_target(&[0, 1], 2, &[0.5], 0.0).is_err());
    }

    #[test]
    fn odd_batches_are_errors() {
        let cut = CutBox { y0: 0, y1: 1, x0: 0, x1: 1 };
        assert!(mixup(&mut [0.0; 3], 3, 0.5).is_err());
        assert!(mixup(&mut [0.0; 3], 3, 1.0).is_err());
        assert!(cutmix(&mut [0.0; 3], [3, 1, 1, 1], cut).is_err());
        assert!(mix_targets(&[0, 1, 0], 2, 0.5, 0.0).is_err());
    }

    #[test]
    fn impossible_arguments_are_errors() {
        assert!(mixup(&mut [0.0; 4], 2, f64::NAN).is_err());
        assert!(mixup(&mut [0.0; 5], 2, 0.5).is_err());
        assert!(mixup(&mut [0.0; 4], 0, 0.5).is_err());
        assert!(cutmix_box(8, 8, 1.5, 0, 0).is_err());
        assert!(cutmix_box(8, 8, 0.5, 8, 0).is_err());
        assert!(cutmix(&mut [0.0; 2], [2, 1, 1, 1], CutBox { y0: 0, y1: 2, x0: 0, x1: 1 }).is_err());
        assert!(mix_targets(&[0, 2], 2, 0.5, 0.0).is_err());
        assert!(mix_targets(&[], 0, 0.5, 0.0).unwrap().is_empty());
    }
}
