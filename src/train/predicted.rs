//! Pictures of what DMJD and MaskFeat predict: a row for each view of an image.
//!
//!   pixels      the four panels of MAE's
//!   gradients   original, visible patches, predicted, true
//!
//! Of each cell of gradients a stroke for each orientation lies along the edge, across the gradient, the brighter the more of it there is: its mean over the
//! channels, as far as it is more than 0, of the most that it can be. Features of a teacher are no picture.

use super::picture::SheetRow;
use super::visualize::{Normalised, TITLES, painted};
use crate::data::Picture;
use crate::error::Result;
use crate::masking::Mask;
use crate::methods::dmjd::Dmjd;
use crate::methods::maskfeat::MaskFeat;
use crate::methods::target::{Kind, Targets};
use crate::methods::{Batch, Method};
use crate::nn::Scope;
use crate::nn::vit::VitConfig;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::targets::hog;
use crate::targets::pixels::patchify;
use crate::tensor::{Device, Dtype, Tensor};
use std::any::Any;

/// Least side of a picture of gradients.
const SIDE: usize = 192;

/// What a method has predicted of images.
struct Seen<'a> {
    config: &'a VitConfig,
    targets: &'a Targets,
    target: Tensor,
    mask: Mask,
    predicted: Tensor,
}

/// What a batch looks like to a method that is one of these and what it makes of it, and what the rows show of the images; None of other methods.
pub fn rows(
    method: &dyn Method,
    batch: &Batch,
    normalised: Normalised,
    names: &[String],
    rng: &Rng,
) -> Result<Option<(Vec<SheetRow>, String)>> {
    let (any, tape) = (method as &dyn Any, Tape::off());
    let seen = if let Some(dmjd) = any.downcast_ref::<Dmjd>().filter(|dmjd| dmjd.targets.kind() != Kind::Teacher) {
        let pass = dmjd.pass(&Scope::new(&tape, &dmjd.params), batch, rng)?;
        let (config, targets, predicted) = (&dmjd.model.encoder().config, &dmjd.targets, pass.predicted.value().clone());
        Seen { config, targets, target: pass.target, mask: pass.mask, predicted }
    } else if let Some(maskfeat) = any.downcast_ref::<MaskFeat>().filter(|maskfeat| maskfeat.targets.kind() != Kind::Teacher) {
        let device = maskfeat.params.device();
        let (mask, predicted) = maskfeat.predict(&Scope::new(&tape, &maskfeat.params), &batch.images.on(device)?, rng)?;
        let (config, targets) = (&maskfeat.model.encoder().config, &maskfeat.targets);
        Seen { config, targets, target: targets.of(batch, device)?, mask, predicted: predicted.value().clone() }
    } else {
        return Ok(None);
    };
    let percent = 100.0 * seen.mask.hidden_each() as f64 / seen.config.patches() as f64;
    let what = match seen.targets.kind() {
        Kind::Hog | Kind::HogMaskfeat => "; strokes lie along edges",
        Kind::NormRgb => "; mean and deviation of each hidden patch are the true ones",
        _ => "",
    };
    Ok(Some((seen.rows(&batch.images, normalised, names)?, format!("with {percent:.0} % of the patches hidden{what}"))))
}

impl Seen<'_> {
    fn rows(&self, images: &Tensor, normalised: Normalised, names: &[String]) -> Result<Vec<SheetRow>> {
        let count = images.shape()[0];
        let views = self.mask.images() / count;
        let each = (0..views).map(|view| self.panels(images, normalised, view)).collect::<Result<Vec<_>>>()?;
        let row = |(image, view): (usize, usize)| {
            let (name, number) = (names.get(image).map_or("", String::as_str), format!("view {}", view + 1));
            let label = if views > 1 { format!("{name} {number}").trim().to_string() } else { name.to_string() };
            SheetRow { label, panels: each[view][image].clone() }
        };
        Ok((0..count).flat_map(|image| (0..views).map(move |view| (image, view))).map(row).collect())
    }

    /// The panels of each image in one view.
    fn panels(&self, images: &Tensor, normalised: Normalised, view: usize) -> Result<Vec<Vec<(String, Picture)>>> {
        let count = images.shape()[0];
        let (patch, kind) = (self.config.patch, self.targets.kind());
        let (hidden, predicted) = (part(&self.mask.hidden, view, count)?, part(&self.predicted, view, count)?);
        let titled = |titles: [&str; 4], pictures: [Picture; 4]| titles.map(String::from).into_iter().zip(pictures).collect::<Vec<_>>();
        if !matches!(kind, Kind::Hog | Kind::HogMaskfeat) {
            let panels = painted(images, &predicted, &hidden, patch, self.targets.norm_pix(), normalised)?;
            return Ok(panels.into_iter().map(|panels| titled(TITLES, panels)).collect());
        }
        let images = images.on(&Device::Cpu)?.cast(Dtype::F32)?;
        let shown = painted(&images, &patchify(&images, patch)?, &hidden, patch, None, normalised)?;
        let true_ones = part(&self.target, 0, count)?;
        let of = |gradients: &Tensor, image: usize| {
            let each = gradients.numel() / count;
            strokes(&gradients.data::<f32>()[image * each..][..each], self.config, kind)
        };
        let row = |(image, [original, visible, _, _]): (usize, [Picture; 4])| {
            let pictures = [original, visible, of(&predicted, image)?, of(&true_ones, image)?];
            Ok(titled(["original", "visible patches", "predicted gradients", "true gradients"], pictures))
        };
        shown.into_iter().enumerate().map(row).collect()
    }
}

/// The rows of view `view`, of `count` images, on the CPU.
fn part(all: &Tensor, view: usize, count: usize) -> Result<Tensor> {
    let all = all.on(&Device::Cpu)?.cast(Dtype::F32)?;
    let each = all.numel() / all.shape()[0];
    let shape = [&[count], &all.shape()[1..]].concat();
    Tensor::from_slice(&shape, &all.data::<f32>()[view * count * each..][..count * each])
}

/// The gradients of an image's patches, one row each.
fn strokes(patches: &[f32], config: &VitConfig, kind: Kind) -> Result<Picture> {
    let ([rows, columns], channels, bins) = (config.grid(), config.channels, hog::Options::dmjd().bins);
    let (width, most) = (4 * bins * channels, if kind == Kind::Hog { (bins as f32 - 1.0).sqrt() } else { 1.0 });
    // Numbers of a patch: (dh, dw, bin, channel) of DMJD's, (channel, bin, dh, dw) of MaskFeat's.
    let place = |cell: usize, bin: usize, c: usize| match kind {
        Kind::Hog => (cell * bins + bin) * channels + c,
        _ => (c * bins + bin) * 4 + cell,
    };
    let scale = SIDE.div_ceil(config.image[0].max(config.image[1]));
    let side = config.patch / 2 * scale;
    let (height, across, half) = (2 * rows * side, 2 * columns * side, side as f32 / 2.0);
    let mut pixels = vec![0u8; height * across];
    for (row, column) in (0..2 * rows).flat_map(|row| (0..2 * columns).map(move |column| (row, column))) {
        let patch = &patches[(row / 2 * columns + column / 2) * width..][..width];
        let cell = row % 2 * 2 + column % 2;
        let strengths: Vec<f32> = (0..bins)
            .map(|bin| (0..channels).map(|c| patch[place(cell, bin, c)].max(0.0)).sum::<f32>() / (channels as f32 * most))
            .collect();
        for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
            let (v, u) = (y as f32 + 0.5 - half, x as f32 + 0.5 - half);
            let brightness = strengths.iter().enumerate().map(|(bin, strength)| {
                let (sine, cosine) = ((bin as f32 + 0.5) * std::f32::consts::PI / bins as f32).sin_cos();
                // How far the gradient leads from the stroke through the middle: columns go with the cosine of DMJD's angle, with the sine of MaskFeat's.
                let off = if kind == Kind::Hog { u * cosine + v * sine } else { u * sine + v * cosine };
                let inside = u * u + v * v <= half * half;
                if inside { strength * (1.5 - off.abs() * 8.0 / side as f32).clamp(0.0, 1.0) } else { 0.0 }
            });
            let brightest = brightness.fold(0.0, f32::max).clamp(0.0, 1.0);
            pixels[(row * side + y) * across + column * side + x] = (255.0 * brightest.sqrt()) as u8;
        }
    }
    Picture::new([height, across], 1, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strokes_lie_along_the_edges_of_both_kinds_of_gradients() {
        let config = VitConfig::new(16, 16, 16, 1, 2);
        // Brighter from left to right, or from top to bottom.
        for (upright, step) in [(true, [0, 1]), (false, [1, 0])] {
            let value = |at: usize| (10 * (step[0] * (at / 48) + step[1] * (at / 3 % 16))) as u8;
            let bytes = Tensor::from_slice(&[1, 16, 16, 3], &(0..768).map(value).collect::<Vec<u8>>()).unwrap();
            let planes = Tensor::from_slice(&[1, 3, 16, 16], &(0..768).map(|at| value(at % 256 * 3) as f32).collect::<Vec<f32>>()).unwrap();
            for (kind, target) in [
                (Kind::Hog, hog::target(&bytes, &hog::Options::dmjd()).unwrap()),
                (Kind::HogMaskfeat, hog::target(&planes, &hog::Options::maskfeat()).unwrap()),
            ] {
                let drawn = strokes(target.data::<f32>(), &config, kind).unwrap();
                assert_eq!(drawn.size, [192, 192]);
                // The first cell is 96 pixels wide; a stroke through its middle leans by at most 20 degrees.
                let lit = |y: usize, x: usize| drawn.pixels[y * 192 + x] > 60;
                let (along, across) = ((lit(38, 47) && lit(57, 47)), (lit(47, 14) || lit(47, 80)));
                let (beside, below) = (lit(47, 38) && lit(47, 57), lit(14, 47) || lit(80, 47));
                if upright {
                    assert!(along && !across, "{kind:?}");
                } else {
                    assert!(beside && !below, "{kind:?}");
                }
            }
        }
    }
}
