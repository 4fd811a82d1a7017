//! Pixels as regression targets.
//!
//! `patchify` cuts images [B, C, H, W] into patches [B, L, P], L = (H/p)(W/p) in raster order, P = p*p*C. Inside a patch the order is
//! (py, px, channel), channel fastest. (The weight of a patch convolution has the channel slowest.)
//!
//! The normalised target of a patch t of P values is (t - mean) / sqrt(var + eps), var = sum (t - mean)^2 / (P - 1). The eps inside the
//! root, 1e-6 in the published models, keeps constant patches at 0. Statistics are two passes in f64, so a nearly constant bright patch keeps its digits; on a GPU they are two passes in
//! f32 over the distances from the patch's first value. There patches are f32 whatever the images are (kernels/pixels.cu).

use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, sum_of};
use crate::error::Result;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};

/// What the published models add to the variance.
pub const EPS: f64 = 1e-6;

/// What kernels are given as eps where patches stay as they are.
pub(crate) const NOT_NORMALISED: f64 = -1.0;

/// Cuts images [B, C, H, W] into patches [B, L, P].
pub fn patchify(images: &Tensor, patch: usize) -> Result<Tensor> {
    let [batch, channels, height, width] = sizes(images.shape(), patch)?;
    if let Some(gpu) = images.gpu() {
        return patches_on(gpu, images, patch, None);
    }
    let mut patches = Tensor::empty(&[batch, (height / patch) * (width / patch), patch * patch * channels], images.dtype())?;
    fn cut<T: Real + Element>(images: &Tensor, sizes: [usize; 4], patch: usize, patches: &mut Tensor) -> Result<()> {
        let (images, row) = (images.data::<T>(), patches.last());
        parallel::rows(patches.data_mut::<T>(), row, |first, rows| cut_rows(images, sizes, patch, first, rows));
        Ok(())
    }
    by_real!("patchify", images.dtype(), cut(images, [batch, channels, height, width], patch, &mut patches))?;
    Ok(patches)
}

fn patches_on(gpu: &Gpu, images: &Tensor, patch: usize, normalised: Option<f64>) -> Result<Tensor> {
    let images = if images.dtype() == Dtype::U8 { images.cast(Dtype::F32)? } else { images.clone() };
    let [batch, channels, height, width] = sizes(images.shape(), patch)?;
    let mut patches = images.alike(&[batch, (height / patch) * (width / patch), patch * patch * channels], Dtype::F32)?;
    let rows = patches.rows();
    let args = Args::new().out(&mut patches).input(&images).int(rows).int(channels).int(height).int(width).int(patch);
    let args = args.float(normalised.unwrap_or(NOT_NORMALISED));
    gpu.launch(&typed("pixel_targets", images.dtype()), Launch::new(rows.div_ceil(8), 256), args)?;
    Ok(patches)
}

/// Puts patches [B, L, P] back into images of shape [B, C, H, W]. Pictures are made on the CPU: patches of a GPU are brought over first.
pub fn unpatchify(patches: &Tensor, shape: [usize; 4], patch: usize) -> Result<Tensor> {
    let (sizes, patches) = (sizes(&shape, patch)?, &patches.on(&Device::Cpu)?);
    let mut images = Tensor::empty(&shape, patches.dtype())?;
    let expected = [sizes[0], (sizes[2] / patch) * (sizes[3] / patch), patch * patch * sizes[1]];
    ensure!(patches.shape() == expected, "unpatchify: patches are {patches:?} but images of {shape:?} have {expected:?}");
    fn join<T: Real + Element>(patches: &Tensor, sizes: [usize; 4], patch: usize, images: &mut Tensor) -> Result<()> {
        let images = images.data_mut::<T>();
        for (i, values) in patches.data::<T>().chunks_exact(patches.last().max(1)).enumerate() {
            values.iter().zip(pixels_of(i, sizes, patch)).for_each(|(&value, pixel)| images[pixel] = value);
        }
        Ok(())
    }
    by_real!("unpatchify", patches.dtype(), join(patches, sizes, patch, &mut images))?;
    Ok(images)
}

/// Patches [B, L, P] of images, normalised each by itself with this eps on request: the targets of MAE.
pub fn targets(images: &Tensor, patch: usize, normalised: Option<f64>) -> Result<Tensor> {
    if normalised.is_some() {
        let values = patch * patch * sizes(images.shape(), patch)?[1];
        ensure!(values >= 2, "pixel targets: a patch of {values} values has no variance");
    }
    if let Some(gpu) = images.gpu() {
        return patches_on(gpu, images, patch, normalised);
    }
    let mut patches = patchify(images, patch)?;
    if let Some(eps) = normalised {
        by_real!("pixel targets", patches.dtype(), normalise(&mut patches, eps))?;
    }
    Ok(patches)
}

fn normalise<T: Real + Element>(patches: &mut Tensor, eps: f64) -> Result<()> {
    let width = patches.last();
    parallel::rows(patches.data_mut::<T>(), width, |_, rows| normalise_rows(rows, width, eps));
    Ok(())
}

vectorised! {
    /// The patches from `first` on, counted through all images: lines of pixels that follow each other in a channel, put `channels` apart.
    fn cut_rows<T: Real>(images: &[T], sizes: [usize; 4], patch: usize, first: usize, rows: &mut [T]) {
        let [_, channels, height, width] = sizes;
        let (across, down) = (width / patch, height / patch);
        for (i, values) in rows.chunks_exact_mut(patch * patch * channels).enumerate() {
            let i = first + i;
            let (n, top, left) = (i / (across * down), i / across % down * patch, i % across * patch);
            for (y, line) in values.chunks_exact_mut(patch * channels).enumerate() {
                for c in 0..channels {
                    let start = ((n * channels + c) * height + top + y) * width + left;
                    line[c..].iter_mut().step_by(channels).zip(&images[start..start + patch]).for_each(|(value, &pixel)| *value = pixel);
                }
            }
        }
    }
    fn normalise_rows<T: Real>(rows: &mut [T], width: usize, eps: f64) {
        for patch in rows.chunks_exact_mut(width) {
            let (mean, deviation) = statistics(patch, eps);
            patch.iter_mut().for_each(|value| *value = T::of((value.f64() - mean) / deviation));
        }
    }
}

/// Mean and sqrt(var + eps) of one patch of at least two values: what takes a normalised patch back to pixels.
#[inline(always)]
pub fn statistics<T: Real>(patch: &[T], eps: f64) -> (f64, f64) {
    let mean = sum_of(patch, |x| x.f64()) / patch.len() as f64;
    let squares = sum_of(patch, |x| (x.f64() - mean) * (x.f64() - mean));
    (mean, (squares / (patch.len() as f64 - 1.0) + eps).sqrt())
}

/// The sizes of images that divide into such patches.
pub(crate) fn sizes(shape: &[usize], patch: usize) -> Result<[usize; 4]> {
    let &[batch, channels, height, width] = shape else { crate::bail!("patches: images are {shape:?} but [B, C, H, W] is needed") };
    ensure!(
        patch > 0 && channels > 0 && height > 0 && width > 0 && height.is_multiple_of(patch) && width.is_multiple_of(patch),
        "patches: images of {channels} x {height} x {width} do not divide into patches of {patch} x {patch}"
    );
    Ok([batch, channels, height, width])
}

/// Where the values of patch `i`, counted through all images, lie in [B, C, H, W].
fn pixels_of(i: usize, [_, channels, height, width]: [usize; 4], patch: usize) -> impl Iterator<Item = usize> {
    let (across, down) = (width / patch, height / patch);
    let (n, top, left) = (i / (across * down), i / across % down * patch, i % across * patch);
    (top..top + patch).flat_map(move |y| {
        (left..left + patch).flat_map(move |x| (0..channels).map(move |c| ((n * channels + c) * height + y) * width + x))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    #[track_caller]
    fn close(found: &[f32], expected: &[f64], absolute: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(found) - expected).abs() <= absolute, "value {i}: {found} is not {expected}");
        }
    }

    #[test]
    fn patchify_has_the_values_of_the_golden_micro_model() {
        let pixels: Vec<f32> = (0..2).flat_map(|n| (0..3072).map(move |i| (0.05 * f64::from(i) + f64::from(n)).sin() as f32)).collect();
        let patches = patchify(&Tensor::from_slice(&[2, 3, 32, 32], &pixels).unwrap(), 8).unwrap();
        let expected = [0.5920735147072245, 0.9999964903456066, 0.5963353984889087, 0.6316109877182386];
        close(&patches.data::<f32>()[5 * 192..5 * 192 + 4], &expected, 6e-8);
    }

    #[test]
    fn patchify_puts_the_channel_fastest_then_the_column() {
        let patches = patchify(&Tensor::from_slice(&[1, 2, 2, 4], &numbers(16)).unwrap(), 2).unwrap();
        assert_eq!(patches.data::<f32>(), [0, 8, 1, 9, 4, 12, 5, 13, 2, 10, 3, 11, 6, 14, 7, 15].map(|v| v as f32));
    }

    #[test]
    fn unpatchify_undoes_patchify_for_rectangles_and_any_channels() {
        for shape in [[2, 3, 8, 12], [1, 1, 4, 4], [3, 5, 12, 4], [0, 3, 8, 8]] {
            let images = numbers(shape.iter().product());
            let patches = patchify(&Tensor::from_slice(&shape, &images).unwrap(), 4).unwrap();
            assert_eq!(unpatchify(&patches, shape, 4).unwrap().data::<f32>(), images);
        }
    }

    fn normalised(values: &[f32]) -> Vec<f32> {
        let image = Tensor::from_slice(&[1, values.len() / 4, 2, 2], values).unwrap();
        targets(&image, 2, Some(EPS)).unwrap().data::<f32>().to_vec()
    }

    #[test]
    fn normalisation_has_the_epsilon_inside_the_root_and_the_unbiased_variance() {
        let expected = [-0.9185586535, -0.3061862178, 0.3061862178, 0.9185586535];
        close(&normalised(&[0.0, 0.001, 0.002, 0.003]), &expected, 1e-7);
    }

    #[test]
    fn constant_patches_become_zero() {
        for value in [2.64, 0.3] {
            assert!(normalised(&[value; 768]).iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn nearly_constant_bright_patches_keep_their_digits() {
        let patch: Vec<f32> = (0..768).map(|i| 1000.0 + (i % 2) as f32 * 0.0078125).collect();
        let (mean, deviation) = statistics(&patch, EPS);
        assert_eq!(mean, 1000.00390625);
        let exact = (768.0 * 0.00390625f64.powi(2) / 767.0 + 1e-6).sqrt();
        approx::assert_relative_eq!(deviation, exact, max_relative = 1e-12);
    }

    #[test]
    fn images_that_do_not_divide_are_refused() {
        let image = Tensor::from_slice(&[1, 1, 5, 4], &numbers(20)).unwrap();
        assert!(patchify(&image, 4).unwrap_err().to_string().contains("do not divide"));
        assert!(patchify(&image, 0).is_err());
    }
}
