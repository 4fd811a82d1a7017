//! A batch of bytes becomes images that a model takes: normalised, boxes of each erased, mixed with the batch's reverse.
//!
//!   x[b, c] = (bytes[b, .., c] / 255 - mean[c]) / std[c]        bytes u8 [B, H, W, C], x [B, C, H, W], C from 1 to 16
//!   erasing   each box of image b becomes 0, one number a channel, or numbers of its own
//!   mixing    as in [`mixup`](super::mixup), after erasing
//!
//! What is drawn at random is an argument. Computed in f32 and rounded once to what is asked for. GPU: kernels/augment.cu, one pass, bit for bit.

use super::mixup::{self, CutBox};
use super::resize::MAX_CHANNELS;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::error::Result;
use crate::tensor::{Device, Dtype, Tensor};
use crate::{bail, ensure};
use rayon::prelude::*;

/// How a batch is mixed with its reverse.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum Mix {
    #[default]
    None,
    /// The share of an image's own pixels.
    Mixup(f64),
    Cutmix(CutBox),
}

/// What stands in an erased box.
#[derive(Clone, Copy, Debug)]
pub enum Fill<'a> {
    Zero,
    /// A number a box and channel, f32 [B, R, C].
    Channels(&'a Tensor),
    /// A number a pixel, f32 [B, C, H, W].
    Pixels(&'a Tensor),
}

/// The R boxes (top, left, height, width) of each image, u32 [B, R, 4], the last on top; of height 0 where nothing is erased.
#[derive(Clone, Copy, Debug)]
pub struct Erase<'a> {
    pub boxes: &'a Tensor,
    pub fill: Fill<'a>,
}

/// What happens to a batch besides its normalisation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Augment<'a> {
    pub erase: Option<Erase<'a>>,
    pub mix: Mix,
}

/// Mean and deviation of each channel where [`prepare`] reads them, f32 [2, C].
pub fn levels(mean: &[f32], std: &[f32], device: &Device) -> Result<Tensor> {
    ensure!(
        mean.len() == std.len() && (1..=MAX_CHANNELS).contains(&mean.len()),
        "normalising: {} means and {} deviations were given; each channel needs one of both, and there are 1 to {MAX_CHANNELS}",
        mean.len(),
        std.len()
    );
    let wrong = mean.iter().find(|x| !x.is_finite()).or(std.iter().find(|x| !x.is_finite() || **x <= 0.0));
    ensure!(wrong.is_none(), "normalising: means {mean:?} and deviations {std:?}; they must be finite, and deviations above 0");
    Tensor::from_slice(&[2, mean.len()], &[mean, std].concat())?.on(device)
}

/// Writes the images of `bytes` [B, H, W, C] into `out` [B, C, H, W], with the [`levels`] of their channels. All tensors are on one device.
pub fn prepare(bytes: &Tensor, levels: &Tensor, augment: &Augment, out: &mut Tensor) -> Result<()> {
    let &[batch, h, w, channels] = bytes.shape() else { bail!("augment: the batch is {bytes:?} but u8 [B, H, W, C] is needed") };
    ensure!(
        bytes.dtype() == Dtype::U8 && h * w > 0 && (1..=MAX_CHANNELS).contains(&channels),
        "augment: the batch is {bytes:?} but u8 [B, H, W, C] is needed, with 1 to {MAX_CHANNELS} channels"
    );
    let is_beside = |x: &Tensor, shape: &[usize], dtype: Dtype| x.shape() == shape && x.dtype() == dtype && x.gpu() == bytes.gpu();
    ensure!(
        is_beside(levels, &[2, channels], Dtype::F32),
        "augment: the batch is {bytes:?} but means and deviations are {levels:?}; f32 [2, C] is needed beside it"
    );
    let shape = [batch, channels, h, w];
    ensure!(is_beside(out, &shape, out.dtype()), "augment: the batch is {bytes:?} but the images are to be {out:?}");
    if let Some(Erase { boxes, fill }) = augment.erase {
        let each = boxes.shape().get(1).copied().unwrap_or(0);
        ensure!(
            is_beside(boxes, &[batch, each, 4], Dtype::U32),
            "augment: the boxes are {boxes:?} but the batch is {bytes:?}; u32 [B, R, 4] is needed beside it"
        );
        let (fill, fits) = match fill {
            Fill::Zero => (boxes, true),
            Fill::Channels(fill) => (fill, is_beside(fill, &[batch, each, channels], Dtype::F32)),
            Fill::Pixels(fill) => (fill, is_beside(fill, &shape, Dtype::F32)),
        };
        ensure!(fits, "augment: boxes {boxes:?} are filled with {fill:?} but the batch is {bytes:?}");
        if boxes.gpu().is_none() {
            check_boxes(boxes.data(), each, h, w)?;
        }
    }
    match augment.mix {
        Mix::None => {}
        Mix::Mixup(lam) => mixup::check_mixup(batch, lam)?,
        Mix::Cutmix(cut) => mixup::check_cut(shape, cut)?,
    }
    match bytes.gpu() {
        None => on_cpu(bytes.data(), shape, levels.data(), augment, out),
        Some(gpu) => on_gpu(gpu, bytes, shape, levels, augment, out),
    }
}

fn check_boxes(boxes: &[u32], each: usize, h: usize, w: usize) -> Result<()> {
    for (i, &[top, left, height, width]) in boxes.as_chunks::<4>().0.iter().enumerate() {
        ensure!(
            top as usize + height as usize <= h && left as usize + width as usize <= w,
            "erasing: {height} x {width} pixels at row {top}, column {left} of image {} are not inside {h} x {w}",
            i / each
        );
    }
    Ok(())
}

fn on_cpu(bytes: &[u8], shape: [usize; 4], levels: &[f32], augment: &Augment, out: &mut Tensor) -> Result<()> {
    if out.dtype() != Dtype::F32 {
        let mut images = Tensor::empty(&shape, Dtype::F32)?;
        on_cpu(bytes, shape, levels, augment, &mut images)?;
        return out.upload(&images.cast(out.dtype())?);
    }
    let [_, channels, h, w] = shape;
    let image = channels * h * w;
    let (mean, std) = levels.split_at(channels);
    // All that a byte can become, by channel.
    let table: Vec<[f32; 256]> =
        mean.iter().zip(std).map(|(mean, std)| std::array::from_fn(|byte| (byte as f32 / 255.0 - mean) / std)).collect();
    let images = out.data_mut::<f32>();
    images.par_chunks_exact_mut(image).zip(bytes.par_chunks_exact(image)).enumerate().for_each(|(b, (image, bytes))| {
        for ((c, plane), level) in image.chunks_exact_mut(h * w).enumerate().zip(&table) {
            for (x, byte) in plane.iter_mut().zip(bytes[c..].iter().step_by(channels)) {
                *x = level[*byte as usize];
            }
        }
        if let Some(erased) = &augment.erase {
            erase(image, b, [channels, h, w], erased);
        }
    });
    match augment.mix {
        Mix::None => Ok(()),
        Mix::Mixup(lam) => mixup::mixup(images, shape[0], lam),
        Mix::Cutmix(cut) => mixup::cutmix(images, shape, cut),
    }
}

/// Fills the boxes of image `b`, one after the other.
fn erase(image: &mut [f32], b: usize, [channels, h, w]: [usize; 3], Erase { boxes, fill }: &Erase) {
    let each = boxes.shape()[1];
    let own = &boxes.data::<u32>().as_chunks::<4>().0[b * each..(b + 1) * each];
    for (r, &corner) in own.iter().enumerate() {
        let [top, left, height, width] = corner.map(|x| x as usize);
        for (c, plane) in image.chunks_exact_mut(h * w).enumerate() {
            for y in top..top + height {
                let first = y * w + left;
                let row = &mut plane[first..first + width];
                match fill {
                    Fill::Zero => row.fill(0.0),
                    Fill::Channels(fill) => row.fill(fill.data::<f32>()[(b * each + r) * channels + c]),
                    Fill::Pixels(fill) => row.copy_from_slice(&fill.data::<f32>()[(b * channels + c) * h * w + first..][..width]),
                }
            }
        }
    }
}

fn on_gpu(
    gpu: &Gpu,
    bytes: &Tensor,
    [batch, channels, h, w]: [usize; 4],
    levels: &Tensor,
    augment: &Augment,
    out: &mut Tensor,
) -> Result<()> {
    let dtype = out.dtype();
    ensure!(matches!(dtype, Dtype::F32 | Dtype::Bf16), "augment: {gpu:?} makes images in f32 or bf16, not {dtype}");
    let (boxes, fill) = match augment.erase {
        None => (None, None),
        Some(Erase { boxes, fill: Fill::Zero }) => (Some(boxes), None),
        Some(Erase { boxes, fill: Fill::Channels(fill) | Fill::Pixels(fill) }) => (Some(boxes), Some(fill)),
    };
    // Without boxes there may be no memory for them.
    let boxes = boxes.filter(|boxes| boxes.numel() > 0);
    let each = boxes.map_or(0, |boxes| boxes.shape()[1]);
    let by_pixel = matches!(augment.erase, Some(Erase { fill: Fill::Pixels(_), .. }));
    let nothing = CutBox { y0: 0, y1: 0, x0: 0, x1: 0 };
    let (lam, cut) = match augment.mix {
        Mix::None => (1.0, nothing),
        Mix::Mixup(lam) => (lam, nothing),
        Mix::Cutmix(cut) => (1.0, cut),
    };
    let args = Args::new().out(out).input(bytes).input(levels).maybe(boxes).maybe(fill).int(batch).int(channels).int(h).int(w);
    let args = args.int(each).flag(by_pixel).flag(lam < 1.0);
    let args = args.int(cut.y0).int(cut.y1).int(cut.x0).int(cut.x1).float(lam).float(1.0 - lam);
    let (kernel, fours) = if channels == 3 { ("augment", 1) } else { ("augment_any", channels.div_ceil(4)) };
    gpu.launch(&typed(kernel, dtype), Launch::elements(h * w, 4).grid((h * w).div_ceil(1024), batch.div_ceil(2), fours), args)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two images of 2 x 3 whose numbers are those of the bytes, channel c of image b erased as asked for.
    fn prepared_of(channels: usize, augment: &Augment, out: Dtype) -> Result<Vec<f64>> {
        let bytes: Vec<u8> = (0..12 * channels as u8).collect();
        let bytes = Tensor::from_slice(&[2, 2, 3, channels], &bytes)?;
        let levels = levels(&vec![0.0; channels], &vec![1.0 / 255.0; channels], &Device::Cpu)?;
        let mut images = Tensor::empty(&[2, channels, 2, 3], out)?;
        prepare(&bytes, &levels, augment, &mut images)?;
        Ok(images.to_f64().into_iter().map(|x| (x * 1e4).round() / 1e4).collect())
    }

    fn prepared(augment: &Augment, out: Dtype) -> Result<Vec<f64>> {
        prepared_of(3, augment, out)
    }

    #[test]
    fn boxes_are_erased_before_images_are_mixed() {
        let boxes = Tensor::from_slice(&[2, 1, 4], &[0u32, 1, 2, 1, 1, 0, 0, 3]).unwrap();
        let erase = Some(Erase { boxes: &boxes, fill: Fill::Zero });
        let images = prepared(&Augment { erase, mix: Mix::None }, Dtype::F32).unwrap();
        assert_eq!(images[..6], [0.0, 0.0, 6.0, 9.0, 0.0, 15.0]);
        assert_eq!(images[18..21], [18.0, 21.0, 24.0]);
        let images = prepared(&Augment { erase, mix: Mix::Mixup(0.75) }, Dtype::F32).unwrap();
        assert_eq!(images[..3], [4.5, 0.25 * 21.0, 10.5]);
        assert_eq!(images[19], 0.75 * 21.0);
    }

    #[test]
    fn boxes_are_filled_with_what_is_given() {
        let boxes = Tensor::from_slice(&[2, 1, 4], &[0u32, 0, 0, 0, 1, 1, 1, 2]).unwrap();
        let channels = Tensor::from_slice(&[2, 1, 3], &[-1f32, -2.0, -3.0, -4.0, -5.0, -6.0]).unwrap();
        let augment = Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Channels(&channels) }), mix: Mix::None };
        let images = prepared(&augment, Dtype::F64).unwrap();
        assert_eq!((images[0], &images[18..24]), (0.0, &[18.0, 21.0, 24.0, 27.0, -4.0, -4.0][..]));
        assert_eq!(images[34..], [-6.0, -6.0]);
        let pixels = Tensor::from_slice(&[2, 3, 2, 3], &(0..36).map(|i| -(i as f32)).collect::<Vec<_>>()).unwrap();
        let augment = Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Pixels(&pixels) }), mix: Mix::None };
        assert_eq!(prepared(&augment, Dtype::Bf16).unwrap()[22..24], [-22.0, -23.0]);
    }

    #[test]
    fn of_several_boxes_the_last_is_on_top() {
        // Image 0: a row, a column over it, nothing. Image 1: nothing, a pixel, the same pixel again.
        let boxes = [[0u32, 0, 1, 3], [0, 1, 2, 1], [0, 0, 0, 0], [1, 0, 0, 2], [1, 2, 1, 1], [1, 2, 1, 1]].concat();
        let boxes = Tensor::from_slice(&[2, 3, 4], &boxes).unwrap();
        let fill: Vec<f32> = (1..=12).map(|i| -(i as f32)).collect();
        let fill = Tensor::from_slice(&[2, 3, 2], &fill).unwrap();
        let augment = Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Channels(&fill) }), mix: Mix::None };
        let images = prepared_of(2, &augment, Dtype::F32).unwrap();
        assert_eq!(images[..12], [-1.0, -3.0, -1.0, 6.0, -3.0, 10.0, -2.0, -4.0, -2.0, 7.0, -4.0, 11.0]);
        assert_eq!(images[12..], [12.0, 14.0, 16.0, 18.0, 20.0, -11.0, 13.0, 15.0, 17.0, 19.0, 21.0, -12.0]);
    }

    #[test]
    fn every_channel_has_its_own_levels() {
        for channels in [1, 2, 3, 4, 7, 16] {
            let bytes: Vec<u8> = (0..2 * 6 * channels).map(|i| (i * 37 % 256) as u8).collect();
            let (mean, std): (Vec<f32>, Vec<f32>) = (0..channels).map(|c| (0.1 + 0.03 * c as f32, 0.2 + 0.02 * c as f32)).unzip();
            let mut images = Tensor::empty(&[2, channels, 2, 3], Dtype::F32).unwrap();
            let levels = levels(&mean, &std, &Device::Cpu).unwrap();
            let shaped = Tensor::from_slice(&[2, 2, 3, channels], &bytes).unwrap();
            prepare(&shaped, &levels, &Augment::default(), &mut images).unwrap();
            for (at, &x) in images.data::<f32>().iter().enumerate() {
                let (b, c, pixel) = (at / (6 * channels), at / 6 % channels, at % 6);
                assert_eq!(x, (bytes[(b * 6 + pixel) * channels + c] as f32 / 255.0 - mean[c]) / std[c], "{channels} channels, {at}");
            }
        }
    }

    #[test]
    fn impossible_batches_are_errors() {
        fn zeroed(boxes: &Tensor) -> Augment<'_> {
            Augment { erase: Some(Erase { boxes, fill: Fill::Zero }), mix: Mix::None }
        }
        let outside = Tensor::from_slice(&[2, 2, 4], &[0u32, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 0]).unwrap();
        let error = prepared(&zeroed(&outside), Dtype::F32).unwrap_err().chain();
        assert!(error.contains("3 x 0 pixels at row 1, column 2 of image 1"), "{error}");
        let boxes = Tensor::zeros(&[2, 1, 4], Dtype::U32).unwrap();
        assert!(prepared(&zeroed(&boxes), Dtype::F32).is_ok());
        for shape in [&[2, 4][..], &[1, 2, 4], &[2, 1, 5]] {
            let boxes = Tensor::zeros(shape, Dtype::U32).unwrap();
            assert!(prepared(&zeroed(&boxes), Dtype::F32).is_err(), "{shape:?}");
        }
        let filled = |fill| Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Channels(fill) }), mix: Mix::None };
        assert!(prepared(&filled(&boxes), Dtype::F32).is_err());
        assert!(prepared(&filled(&Tensor::zeros(&[2, 2, 3], Dtype::F32).unwrap()), Dtype::F32).is_err());
        assert!(prepared(&Augment { mix: Mix::Mixup(1.5), ..Augment::default() }, Dtype::F32).is_err());
        let cut = CutBox { y0: 0, y1: 3, x0: 0, x1: 1 };
        assert!(prepared(&Augment { mix: Mix::Cutmix(cut), ..Augment::default() }, Dtype::F32).is_err());
        assert!(prepared_of(17, &Augment::default(), Dtype::F32).is_err());
        let three = levels(&[0.0; 3], &[1.0; 3], &Device::Cpu).unwrap();
        let run = |side: usize, channels: usize| {
            let mut images = Tensor::empty(&[1, channels, 2, side], Dtype::F32).unwrap();
            prepare(&Tensor::zeros(&[1, 2, 3, channels], Dtype::U8).unwrap(), &three, &Augment::default(), &mut images)
        };
        assert!(run(3, 3).is_ok() && run(2, 3).is_err() && run(3, 4).is_err());
        for (mean, std) in [(&[0.0f32; 3][..], &[1.0f32; 2][..]), (&[], &[]), (&[f32::NAN], &[1.0]), (&[0.5], &[0.0])] {
            assert!(levels(mean, std, &Device::Cpu).is_err(), "{mean:?}, {std:?}");
        }
    }
}
