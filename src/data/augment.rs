//! A batch of bytes becomes images that a model takes: normalised, a box of each erased, mixed with the batch's reverse.
//!
//!   x[b, c] = (bytes[b, .., c] / 255 - mean[c]) / std[c]        bytes u8 [B, H, W, 3], x [B, 3, H, W]
//!   erasing   the box of image b becomes 0, one number a channel, or numbers of its own
//!   mixing    as in [`mixup`](super::mixup), after erasing
//!
//! What is drawn at random is an argument. Computed in f32 and rounded once to what is asked for. GPU: kernels/augment.cu, one pass, bit for bit.

use super::mixup::{self, CutBox};
use super::resize;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};

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
    /// A number a channel, f32 [B, 3].
    Channels(&'a Tensor),
    /// A number a pixel, f32 [B, 3, H, W].
    Pixels(&'a Tensor),
}

/// The box (top, left, height, width) of each image, u32 [B, 4]; of height 0 where nothing is erased.
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

/// Writes the images of `bytes` [B, H, W, 3] into `out` [B, 3, H, W]. All tensors are on one device.
pub fn prepare(bytes: &Tensor, mean: [f32; 3], std: [f32; 3], augment: &Augment, out: &mut Tensor) -> Result<()> {
    let &[batch, h, w, 3] = bytes.shape() else { bail!("augment: the batch is {bytes:?} but u8 [B, H, W, 3] is needed") };
    ensure!(bytes.dtype() == Dtype::U8 && h * w > 0, "augment: the batch is {bytes:?} but u8 [B, H, W, 3] is needed");
    ensure!(
        out.shape() == [batch, 3, h, w] && out.device() == bytes.device(),
        "augment: the batch is {bytes:?} but the images are to be {out:?}"
    );
    if let Some(Erase { boxes, fill }) = augment.erase {
        let fits = boxes.shape() == [batch, 4] && boxes.dtype() == Dtype::U32 && boxes.gpu() == bytes.gpu();
        ensure!(fits, "augment: the boxes are {boxes:?} but the batch is {bytes:?}; u32 [B, 4] is needed beside it");
        let (fill, fits) = match fill {
            Fill::Zero => (boxes, true),
            Fill::Channels(fill) => (fill, fill.shape() == [batch, 3] && fill.dtype() == Dtype::F32),
            Fill::Pixels(fill) => (fill, fill.shape() == [batch, 3, h, w] && fill.dtype() == Dtype::F32),
        };
        ensure!(fits && fill.gpu() == bytes.gpu(), "augment: boxes are filled with {fill:?} but the batch is {bytes:?}");
        if boxes.gpu().is_none() {
            check_boxes(boxes.data(), h, w)?;
        }
    }
    let shape = [batch, 3, h, w];
    match bytes.gpu() {
        None => on_cpu(bytes.data(), shape, mean, std, augment, out),
        Some(gpu) => on_gpu(gpu, bytes, shape, mean, std, augment, out),
    }
}

fn check_boxes(boxes: &[u32], h: usize, w: usize) -> Result<()> {
    for (image, &[top, left, height, width]) in boxes.as_chunks::<4>().0.iter().enumerate() {
        ensure!(
            top as usize + height as usize <= h && left as usize + width as usize <= w,
            "erasing: {height} x {width} pixels at row {top}, column {left} of image {image} are not inside {h} x {w}"
        );
    }
    Ok(())
}

fn on_cpu(bytes: &[u8], shape: [usize; 4], mean: [f32; 3], std: [f32; 3], augment: &Augment, out: &mut Tensor) -> Result<()> {
    let [_, _, h, w] = shape;
    let mut images = Vec::with_capacity(bytes.len());
    for image in bytes.chunks_exact(h * w * 3) {
        images.extend(resize::normalise(image, [h, w], &mean, &std)?);
    }
    if let Some(Erase { boxes, fill }) = augment.erase {
        let boxes = boxes.data::<u32>();
        match fill {
            Fill::Zero => erase(&mut images, shape, boxes, |_, _| 0.0),
            Fill::Channels(fill) => erase(&mut images, shape, boxes, |plane, _| fill.data::<f32>()[plane]),
            Fill::Pixels(fill) => erase(&mut images, shape, boxes, |_, pixel| fill.data::<f32>()[pixel]),
        }
    }
    match augment.mix {
        Mix::None => {}
        Mix::Mixup(lam) => mixup::mixup(&mut images, shape[0], lam)?,
        Mix::Cutmix(cut) => mixup::cutmix(&mut images, shape, cut)?,
    }
    out.upload(&Tensor::from_slice(&shape, &images)?.cast(out.dtype())?)
}

/// Fills the box of each image of `images` [B, C, H, W] with `fill(plane, pixel)`, plane counted over [B, C] and pixel over all of `images`.
fn erase(images: &mut [f32], [_, channels, h, w]: [usize; 4], boxes: &[u32], fill: impl Fn(usize, usize) -> f32) {
    for (plane, pixels) in images.chunks_exact_mut(h * w).enumerate() {
        let [top, left, height, width] = std::array::from_fn(|i| boxes[plane / channels * 4 + i] as usize);
        for y in top..top + height {
            let first = y * w + left;
            for (i, pixel) in pixels[first..first + width].iter_mut().enumerate() {
                *pixel = fill(plane, plane * h * w + first + i);
            }
        }
    }
}

fn on_gpu(
    gpu: &Gpu,
    bytes: &Tensor,
    [batch, _, h, w]: [usize; 4],
    mean: [f32; 3],
    std: [f32; 3],
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
    let nothing = CutBox { y0: 0, y1: 0, x0: 0, x1: 0 };
    let (lam, cut) = match augment.mix {
        Mix::None => (1.0, nothing),
        Mix::Mixup(lam) => {
            mixup::check_mixup(batch, lam)?;
            (lam, nothing)
        }
        Mix::Cutmix(cut) => {
            mixup::check_cut([batch, 3, h, w], cut)?;
            (1.0, cut)
        }
    };
    let args = Args::new().out(out).input(bytes).maybe(boxes).maybe(fill).int(batch).int(h).int(w);
    let args = args.flag(fill.is_some_and(|fill| fill.shape().len() == 4)).flag(lam < 1.0);
    let args = args.int(cut.y0).int(cut.y1).int(cut.x0).int(cut.x1);
    let args = [mean, std].iter().flatten().fold(args, |args, &x| args.float(x as f64));
    let args = args.float(lam).float(1.0 - lam);
    gpu.launch(&typed("augment", dtype), Launch::elements(h * w, 4).grid((h * w).div_ceil(1024), batch.div_ceil(2), 1), args)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two images of 2 x 3 whose numbers are those of the bytes times 1/255, channel c of image b erased as asked for.
    fn prepared(augment: &Augment, out: Dtype) -> Result<Vec<f64>> {
        let bytes: Vec<u8> = (0..36).collect();
        let bytes = Tensor::from_slice(&[2, 2, 3, 3], &bytes)?;
        let mut images = Tensor::empty(&[2, 3, 2, 3], out)?;
        prepare(&bytes, [0.0; 3], [1.0 / 255.0; 3], augment, &mut images)?;
        Ok(images.to_f64().into_iter().map(|x| (x * 1e4).round() / 1e4).collect())
    }

    #[test]
    fn boxes_are_erased_before_images_are_mixed() {
        let boxes = Tensor::from_slice(&[2, 4], &[0u32, 1, 2, 1, 1, 0, 0, 3]).unwrap();
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
        let boxes = Tensor::from_slice(&[2, 4], &[0u32, 0, 0, 0, 1, 1, 1, 2]).unwrap();
        let channels = Tensor::from_slice(&[2, 3], &[-1f32, -2.0, -3.0, -4.0, -5.0, -6.0]).unwrap();
        let augment = Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Channels(&channels) }), mix: Mix::None };
        let images = prepared(&augment, Dtype::F64).unwrap();
        assert_eq!((images[0], &images[18..24]), (0.0, &[18.0, 21.0, 24.0, 27.0, -4.0, -4.0][..]));
        assert_eq!(images[34..], [-6.0, -6.0]);
        let pixels = Tensor::from_slice(&[2, 3, 2, 3], &(0..36).map(|i| -(i as f32)).collect::<Vec<_>>()).unwrap();
        let augment = Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Pixels(&pixels) }), mix: Mix::None };
        assert_eq!(prepared(&augment, Dtype::Bf16).unwrap()[22..24], [-22.0, -23.0]);
    }

    #[test]
    fn impossible_batches_are_errors() {
        let outside = Tensor::from_slice(&[2, 4], &[0u32, 1, 2, 3, 0, 0, 0, 0]).unwrap();
        assert!(prepared(&Augment { erase: Some(Erase { boxes: &outside, fill: Fill::Zero }), mix: Mix::None }, Dtype::F32).is_err());
        let boxes = Tensor::zeros(&[2, 4], Dtype::U32).unwrap();
        assert!(
            prepared(&Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Channels(&boxes) }), mix: Mix::None }, Dtype::F32).is_err()
        );
        assert!(prepared(&Augment { mix: Mix::Mixup(1.5), ..Augment::default() }, Dtype::F32).is_err());
        let cut = CutBox { y0: 0, y1: 3, x0: 0, x1: 1 };
        assert!(prepared(&Augment { mix: Mix::Cutmix(cut), ..Augment::default() }, Dtype::F32).is_err());
        let mut images = Tensor::empty(&[1, 3, 2, 2], Dtype::F32).unwrap();
        let bytes = Tensor::zeros(&[1, 2, 3, 3], Dtype::U8).unwrap();
        assert!(prepare(&bytes, [0.0; 3], [1.0; 3], &Augment::default(), &mut images).is_err());
    }
}
