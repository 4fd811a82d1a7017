//! Pixels as regression targets.
//!
//! `patchify` cuts images [B, C, H, W] into patches [B, L, P], L = (H/p)(W/p) in raster order, P = p*p*C. Inside a patch the order is
//! (py, px, channel), channel fastest. (The weight of a patch convolution has the channel slowest.)
//!
//! The normalised target of a patch t of P values is (t - mean) / sqrt(var + 1e-6), var = sum (t - mean)^2 / (P - 1). The 1e-6 inside the
//! root keeps constant patches at 0. Statistics are two passes in f64, so a nearly constant bright patch keeps its digits.

use crate::ensure;
use crate::error::Result;

const EPS: f64 = 1e-6;

/// Cuts `images` of shape `[B, C, H, W]` into patches [B, L, P].
pub fn patchify(images: &[f32], shape: [usize; 4], patch: usize) -> Result<Vec<f32>> {
    check("patchify", images.len(), shape, patch)?;
    let mut patches = Vec::with_capacity(images.len());
    for_each_pixel(shape, patch, |pixel| patches.push(images[pixel]));
    Ok(patches)
}

/// Puts patches [B, L, P] back into images of shape `[B, C, H, W]`.
pub fn unpatchify(patches: &[f32], shape: [usize; 4], patch: usize) -> Result<Vec<f32>> {
    check("unpatchify", patches.len(), shape, patch)?;
    let mut images = vec![0.0; patches.len()];
    let mut values = patches.iter();
    for_each_pixel(shape, patch, |pixel| {
        if let Some(&value) = values.next() {
            images[pixel] = value;
        }
    });
    Ok(images)
}

/// The normalised targets [B, L, P] of `images` of shape `[B, C, H, W]`.
pub fn normalised(images: &[f32], shape: [usize; 4], patch: usize) -> Result<Vec<f32>> {
    let mut patches = patchify(images, shape, patch)?;
    normalise(&mut patches, patch * patch * shape[1])?;
    Ok(patches)
}

/// Normalises each row of `patches` [.., P] in place.
pub fn normalise(patches: &mut [f32], width: usize) -> Result<()> {
    ensure!(width >= 2, "pixel targets: a patch of {width} values has no variance");
    ensure!(patches.len() % width == 0, "pixel targets: {} values are not rows of {width}", patches.len());
    for patch in patches.chunks_exact_mut(width) {
        let (mean, deviation) = statistics(patch);
        for value in patch {
            *value = ((f64::from(*value) - mean) / deviation) as f32;
        }
    }
    Ok(())
}

/// Mean and sqrt(var + 1e-6) of one patch of at least two values: what takes a normalised patch back to pixels.
pub fn statistics(patch: &[f32]) -> (f64, f64) {
    let mean = patch.iter().map(|&v| f64::from(v)).sum::<f64>() / patch.len() as f64;
    let squares = patch.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
    (mean, (squares / (patch.len() as f64 - 1.0) + EPS).sqrt())
}

fn check(op: &str, values: usize, shape: [usize; 4], patch: usize) -> Result<()> {
    let [_, channels, height, width] = shape;
    let wanted = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
    ensure!(wanted == Some(values), "{op}: {values} values are not [B, C, H, W] = {shape:?}");
    ensure!(
        patch > 0 && channels > 0 && height > 0 && width > 0 && height % patch == 0 && width % patch == 0,
        "{op}: images of {channels} x {height} x {width} do not divide into patches of {patch} x {patch}"
    );
    Ok(())
}

/// Visits the index of every pixel of `[B, C, H, W]` in the order of [B, L, P].
fn for_each_pixel([batch, channels, height, width]: [usize; 4], patch: usize, mut visit: impl FnMut(usize)) {
    for n in 0..batch {
        for top in (0..height).step_by(patch) {
            for left in (0..width).step_by(patch) {
                for y in top..top + patch {
                    for x in left..left + patch {
                        for c in 0..channels {
                            visit(((n * channels + c) * height + y) * width + x);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(found: &[f32], expected: &[f64], absolute: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(found) - expected).abs() <= absolute, "value {i}: {found} is not {expected}");
        }
    }

    #[test]
    fn patchify_has_the_values_of_the_golden_micro_model() {
        let images: Vec<f32> = (0..2).flat_map(|n| (0..3072).map(move |i| (0.05 * f64::from(i) + f64::from(n)).sin() as f32)).collect();
        let patches = patchify(&images, [2, 3, 32, 32], 8).unwrap();
        let expected = [0.5920735147072245, 0.9999964903456066, 0.5963353984889087, 0.6316109877182386];
        close(&patches[5 * 192..5 * 192 + 4], &expected, 6e-8);
    }

    #[test]
    fn patchify_puts_the_channel_fastest_then_the_column() {
        let images: Vec<f32> = (0..2 * 2 * 4).map(|i| i as f32).collect(); // [1, 2, 2, 4]
        let patches = patchify(&images, [1, 2, 2, 4], 2).unwrap();
        assert_eq!(patches, [0, 8, 1, 9, 4, 12, 5, 13, 2, 10, 3, 11, 6, 14, 7, 15].map(|v| v as f32));
    }

    #[test]
    fn unpatchify_undoes_patchify_for_rectangles_and_any_channels() {
        for shape in [[2, 3, 8, 12], [1, 1, 4, 4], [3, 5, 12, 4], [0, 3, 8, 8]] {
            let images: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| i as f32).collect();
            let patches = patchify(&images, shape, 4).unwrap();
            assert_eq!(unpatchify(&patches, shape, 4).unwrap(), images);
        }
    }

    #[test]
    fn normalisation_has_the_epsilon_inside_the_root_and_the_unbiased_variance() {
        let mut patch = [0.0, 0.001, 0.002, 0.003];
        normalise(&mut patch, 4).unwrap();
        close(&patch, &[-0.9185586535, -0.3061862178, 0.3061862178, 0.9185586535], 1e-7);
    }

    #[test]
    fn constant_patches_become_zero() {
        let mut patches = vec![2.64; 768];
        patches.extend([0.3; 768]);
        normalise(&mut patches, 768).unwrap();
        assert!(patches.iter().all(|&v| v == 0.0));
    }

    #[test]
    fn nearly_constant_bright_patches_keep_their_digits() {
        // Two values one f32 step apart near 2.5: mean and variance are exact in f64, lost in f32 sums.
        let step = 2f64.powi(-22);
        let mut patch: Vec<f32> = (0..768).map(|i| (2.5 + f64::from(i % 2) * step) as f32).collect();
        normalise(&mut patch, 768).unwrap();
        let expected = 0.5 * step / (768.0 * (0.5 * step).powi(2) / 767.0 + 1e-6).sqrt();
        close(&patch[..2], &[-expected, expected], expected * 1e-7);
    }

    #[test]
    fn statistics_take_a_normalised_patch_back() {
        let patch: Vec<f32> = (0..48).map(|i| (i as f32).cos()).collect();
        let (mean, deviation) = statistics(&patch);
        let mut normal = patch.clone();
        normalise(&mut normal, 48).unwrap();
        let back: Vec<f32> = normal.iter().map(|&v| (f64::from(v) * deviation + mean) as f32).collect();
        close(&back, &patch.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), 2e-7);
    }

    #[test]
    fn shapes_that_do_not_divide_are_errors() {
        assert!(patchify(&[0.0; 48], [1, 3, 4, 4], 3).is_err());
        assert!(patchify(&[0.0; 48], [1, 3, 4, 4], 0).is_err());
        assert!(patchify(&[0.0; 47], [1, 3, 4, 4], 2).is_err());
        assert!(unpatchify(&[], [usize::MAX, 3, 4, 4], 2).is_err());
        assert!(normalised(&[0.0; 4], [1, 1, 2, 2], 1).is_err());
    }
}
