//! What a model sees, as pictures: the four panels of MAE's demo, and where the class token looks.
//!
//!   original                   x
//!   masked                     x (1 - m): hidden patches are 0, the mean colour
//!   reconstruction             y, all patches as predicted; nothing trained the visible ones
//!   reconstruction + visible   x (1 - m) + y m
//!
//! m is 1 on hidden patches. A model of normalised pixels predicts (x - mu) / s of each patch; it is shown as y s + mu with the true mu and s of the patch,
//! which the model does not know. On the screen: clip((v std + mean) 255, 0, 255), cut down to a whole number (a value within rounding of one is that one).
//!
//! Attention maps: the class token's probabilities over the patches in the last block, from the least to the greatest of each map, spread over the image
//! bilinearly and laid over it in grey.

use super::picture::SheetRow;
use crate::data::Picture;
use crate::ensure;
use crate::error::Result;
use crate::masking;
use crate::methods::mae::Mae;
use crate::nn::Scope;
use crate::nn::vit::Vit;
use crate::param::Params;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::targets::pixels::{patchify, statistics, unpatchify};
use crate::tensor::{Device, Dtype, Tensor};

pub const TITLES: [&str; 4] = ["original", "masked", "reconstruction", "reconstruction + visible"];

/// Mean and deviation of the channels, with which images were normalised.
#[derive(Clone, Copy, Debug)]
pub struct Normalised<'a> {
    pub mean: &'a [f32],
    pub std: &'a [f32],
}

/// The four panels of each of the normalised images [B, C, H, W] with this part of the patches hidden; the mask is drawn from `rng` as in training.
pub fn panels(mae: &Mae, images: &Tensor, normalised: Normalised, ratio: f64, rng: &Rng) -> Result<Vec<[Picture; 4]>> {
    let config = &mae.encoder.config;
    let (patches, keep) = (config.patches(), masking::len_keep(config.patches(), ratio)?);
    ensure!(
        0 < keep && keep < patches,
        "a mask ratio of {ratio} keeps {keep} of {patches} patches; at least one has to be kept and one hidden"
    );
    let tape = Tape::off();
    let s = Scope::new(&tape, &mae.params);
    let mask = mae.mask_at(ratio, images.shape()[0], rng)?;
    let latent = mae.latent(&s, images, &mask)?; // [B, extra + K, C]
    let pred = mae.decoder.forward(&s, &latent, &mask.restore)?; // [B, L, P]

    painted(images, pred.value(), &mask.hidden, config.patch, mae.norm_pix(), normalised)
}

/// The same for what somebody has predicted, [B, L, P], with patches hidden where `hidden` [B, L] is 1; `norm_pix`: of pixels normalised patch by patch, with
/// this much added to the variance.
pub fn painted(
    images: &Tensor,
    predicted: &Tensor,
    hidden: &Tensor,
    patch: usize,
    norm_pix: Option<f64>,
    normalised: Normalised,
) -> Result<Vec<[Picture; 4]>> {
    let images = images.on(&Device::Cpu)?.cast(Dtype::F32)?;
    let &[batch, channels, height, width] = images.shape() else { crate::bail!("images are {images:?} but [B, C, H, W] is needed") };
    let x = patchify(&images, patch)?; // [B, L, P]
    let mut y = predicted.on(&Device::Cpu)?.cast(Dtype::F32)?.into_unique()?;
    let p = x.last();
    if let Some(eps) = norm_pix {
        for (y, x) in y.data_mut::<f32>().chunks_exact_mut(p).zip(x.data::<f32>().chunks_exact(p)) {
            let (mean, deviation) = statistics(x, eps);
            y.iter_mut().for_each(|y| *y = (*y as f64 * deviation + mean) as f32);
        }
    }
    let hidden = hidden.on(&Device::Cpu)?;
    let blend = |shown: &dyn Fn(f32, f32, bool) -> f32| {
        let hidden = hidden.data::<f32>().iter().flat_map(|m| std::iter::repeat_n(*m > 0.0, p));
        let values = x.data::<f32>().iter().zip(y.data::<f32>()).zip(hidden).map(|((x, y), hidden)| shown(*x, *y, hidden));
        let joined = unpatchify(&Tensor::from_slice(x.shape(), &values.collect::<Vec<f32>>())?, [batch, channels, height, width], patch)?;
        pictures(&joined, normalised)
    };
    let originals = blend(&|x, _, _| x)?;
    let masked = blend(&|x, _, hidden| if hidden { 0.0 } else { x })?;
    let painted = blend(&|_, y, _| y)?;
    let joined = blend(&|x, y, hidden| if hidden { y } else { x })?;
    let all = originals.into_iter().zip(masked).zip(painted.into_iter().zip(joined));
    Ok(all.map(|((a, b), (c, d))| [a, b, c, d]).collect())
}

/// The panels of each image below one another for several mask ratios, ready for [`super::picture::sheet`]; `names` may be empty.
pub fn panel_rows(
    mae: &Mae,
    images: &Tensor,
    normalised: Normalised,
    ratios: &[f64],
    names: &[String],
    rng: &Rng,
) -> Result<Vec<SheetRow>> {
    let each = ratios.iter().map(|&ratio| panels(mae, images, normalised, ratio, rng)).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for image in 0..images.shape()[0] {
        for (panels, ratio) in each.iter().zip(ratios) {
            let percent = if ratios.len() > 1 { format!("{} %", (ratio * 1000.0).round() / 10.0) } else { String::new() };
            let name = names.get(image).map_or("", String::as_str);
            let label = [name, &percent].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
            let titled = TITLES.iter().map(|title| title.to_string()).zip(panels[image].clone());
            rows.push(SheetRow { label, panels: titled.collect() });
        }
    }
    Ok(rows)
}

/// Normalised images [B, C, H, W] as they look.
pub fn pictures(images: &Tensor, normalised: Normalised) -> Result<Vec<Picture>> {
    let images = images.on(&Device::Cpu)?.cast(Dtype::F32)?;
    let &[_, channels, height, width] = images.shape() else { crate::bail!("images are {images:?} but [B, C, H, W] is needed") };
    let Normalised { mean, std } = normalised;
    ensure!(
        mean.len() == channels && std.len() == channels,
        "images have {channels} channels but there are {} means and {} deviations",
        mean.len(),
        std.len()
    );
    let area = height * width;
    let picture = |image: &[f32]| {
        let byte = |i: usize| {
            let (pixel, c) = (i / channels, i % channels);
            let value = (image[c * area + pixel] as f64 * std[c] as f64 + mean[c] as f64) * 255.0;
            (value + 1e-3).clamp(0.0, 255.0) as u8
        };
        Picture::new([height, width], channels, (0..area * channels).map(byte).collect())
    };
    images.data::<f32>().chunks_exact((area * channels).max(1)).map(picture).collect()
}

/// The class token's probabilities in the last block, patches only: f32 [B, H, L] on the CPU. Their sum is less than 1 by what the tokens in front get.
pub fn class_attention(vit: &Vit, params: &Params, images: &Tensor) -> Result<Tensor> {
    let tape = Tape::off();
    let s = Scope::new(&tape, params);
    let (_, rows) = vit.blocks_with_class_rows(&s, &vit.embed(&s, images, None)?)?;
    let rows = rows.on(&Device::Cpu)?.cast(Dtype::F32)?; // [B, H, extra + L]
    let (extra, l) = (vit.config.extra(), vit.config.patches());
    let patches = rows.data::<f32>().chunks_exact(extra + l).flat_map(|row| row[extra..].to_vec()).collect::<Vec<f32>>();
    Tensor::from_slice(&[rows.shape()[0], rows.shape()[1], l], &patches)
}

/// The original, the mean over heads, then each head, for each image; rows of seven panels, ready for [`super::picture::sheet`].
pub fn attention_rows(vit: &Vit, params: &Params, images: &Tensor, normalised: Normalised, names: &[String]) -> Result<Vec<SheetRow>> {
    const ACROSS: usize = 7;
    let maps = class_attention(vit, params, images)?;
    let (heads, l) = (maps.shape()[1], maps.last());
    let mut rows = Vec::new();
    for (i, picture) in pictures(images, normalised)?.into_iter().enumerate() {
        let maps = &maps.data::<f32>()[i * heads * l..][..heads * l];
        let mean: Vec<f32> = (0..l).map(|patch| maps.iter().skip(patch).step_by(l).sum::<f32>() / heads as f32).collect();
        let mut panels =
            vec![("original".to_string(), picture.clone()), ("mean of heads".to_string(), heat(&picture, &mean, vit.config.grid())?)];
        for (head, map) in maps.chunks_exact(l).enumerate() {
            panels.push((format!("head {}", head + 1), heat(&picture, map, vit.config.grid())?));
        }
        let label = names.get(i).cloned().unwrap_or_default();
        rows.extend(
            panels
                .chunks(ACROSS)
                .enumerate()
                .map(|(at, panels)| SheetRow { label: if at == 0 { label.clone() } else { String::new() }, panels: panels.to_vec() }),
        );
    }
    Ok(rows)
}

/// A map over the grid of patches laid over a picture: the warmer and the more opaque, the more attention.
fn heat(picture: &Picture, map: &[f32], grid: [usize; 2]) -> Result<Picture> {
    let [height, width] = picture.size;
    let [least, most] = map.iter().fold([f32::INFINITY, 0.0], |[least, most], &p| [p.min(least), p.max(most)]);
    let span = (most - least).max(f32::MIN_POSITIVE);
    let at = |y: usize, x: usize| map[y.min(grid[0] - 1) * grid[1] + x.min(grid[1] - 1)] - least;
    let mut pixels = Vec::with_capacity(3 * height * width);
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        let place =
            |i: usize, side: usize, cells: usize| ((i as f32 + 0.5) * cells as f32 / side as f32 - 0.5).clamp(0.0, cells as f32 - 1.0);
        let (v, u) = (place(y, height, grid[0]), place(x, width, grid[1]));
        let (top, left, down, right) = (v as usize, u as usize, v.fract(), u.fract());
        let upper = at(top, left) * (1.0 - right) + at(top, left + 1) * right;
        let lower = at(top + 1, left) * (1.0 - right) + at(top + 1, left + 1) * right;
        let strength = ((upper * (1.0 - down) + lower * down) / span).clamp(0.0, 1.0);
        let channel = |c: usize| picture.pixels[(y * width + x) * picture.channels + c.min(picture.channels - 1)] as f32;
        let grey = 0.299 * channel(0) + 0.587 * channel(1) + 0.114 * channel(2);
        let colour = warmth(strength);
        let opacity = 0.2 + 0.6 * strength;
        pixels.extend((0..3).map(|c| (0.8 * grey * (1.0 - opacity) + colour[c] * opacity) as u8));
    }
    Picture::new(picture.size, 3, pixels)
}

/// Black, violet, red, orange, pale yellow.
fn warmth(strength: f32) -> [f32; 3] {
    const STOPS: [[f32; 3]; 5] = [[0.0, 0.0, 4.0], [80.0, 18.0, 123.0], [183.0, 55.0, 84.0], [251.0, 136.0, 34.0], [252.0, 250.0, 160.0]];
    let place = strength.clamp(0.0, 1.0) * 4.0;
    let (below, part) = ((place as usize).min(3), place - (place as usize).min(3) as f32);
    [0, 1, 2].map(|c| STOPS[below][c] * (1.0 - part) + STOPS[below + 1][c] * part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::mae::MaeConfig;
    use crate::nn::decoder::DecoderConfig;
    use crate::nn::vit::VitConfig;

    const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
    const STD: [f32; 3] = [0.229, 0.224, 0.225];
    const NORMALISED: Normalised = Normalised { mean: &MEAN, std: &STD };

    fn mae(norm_pix: Option<f64>) -> Mae {
        let encoder = VitConfig::new(16, 4, 16, 2, 2);
        let decoder = DecoderConfig { width: 8, depth: 1, heads: 2 };
        Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix }, Dtype::F32, &Rng::new(1)).unwrap()
    }

    /// Bytes [B, 16, 16, 3], and the same normalised [B, 3, 16, 16].
    fn images(batch: usize) -> (Vec<u8>, Tensor) {
        let bytes: Vec<u8> = Rng::new(9).uniform("bytes", batch * 768).unwrap().iter().map(|x| (x * 256.0) as u8).collect();
        let value = |i: usize| {
            let (n, c, pixel) = (i / 768, i / 256 % 3, i % 256);
            (bytes[n * 768 + pixel * 3 + c] as f32 / 255.0 - MEAN[c]) / STD[c]
        };
        let values: Vec<f32> = (0..batch * 768).map(value).collect();
        let images = Tensor::from_slice(&[batch, 3, 16, 16], &values).unwrap();
        (bytes, images)
    }

    #[test]
    fn the_original_is_the_image_byte_for_byte() {
        let (bytes, images) = images(2);
        let panels = panels(&mae(None), &images, NORMALISED, 0.75, &Rng::new(2)).unwrap();
        assert_eq!(panels.iter().flat_map(|panels| panels[0].pixels.clone()).collect::<Vec<_>>(), bytes);
        let all: Vec<f32> = (0..=255).map(|byte| (byte as f32 / 255.0 - MEAN[0]) / STD[0]).collect();
        let shown = pictures(&Tensor::from_slice(&[1, 1, 16, 16], &all).unwrap(), Normalised { mean: &MEAN[..1], std: &STD[..1] }).unwrap();
        assert_eq!(shown[0].pixels, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn hidden_patches_are_grey_when_masked_and_painted_when_joined() {
        let grey: Vec<u8> = MEAN.iter().map(|mean| (mean * 255.0) as u8).collect();
        for (norm_pix, ratio, visible) in [(None, 0.75, 4), (Some(1e-6), 0.5, 8)] {
            let (_, images) = images(3);
            for [original, masked, painted, joined] in panels(&mae(norm_pix), &images, NORMALISED, ratio, &Rng::new(2)).unwrap() {
                let mut seen = 0;
                for patch in 0..16 {
                    let cut = |picture: &Picture| -> Vec<u8> {
                        let corner = patch / 4 * 4 * 48 + patch % 4 * 12;
                        (0..4).flat_map(|y| picture.pixels[corner + y * 48..][..12].to_vec()).collect()
                    };
                    let shown = cut(&masked) == cut(&original);
                    seen += usize::from(shown);
                    assert!(shown || cut(&masked) == grey.repeat(16));
                    assert_eq!(cut(&joined), cut(if shown { &original } else { &painted }));
                }
                assert_eq!(seen, visible);
                assert_ne!(painted, original);
            }
        }
    }

    #[test]
    fn a_model_of_normalised_pixels_is_shown_with_the_statistics_of_each_patch() {
        // Weights of the output layer are 0: it predicts its bias. With a bias of 0 each patch is painted in its own mean.
        let mut mae = mae(Some(1e-6));
        for name in ["decoder_pred.weight", "decoder_pred.bias"] {
            let id = mae.params.find(name).unwrap();
            let shape = mae.params.value(id).shape().to_vec();
            mae.params.set_value(id, &Tensor::zeros(&shape, Dtype::F32).unwrap()).unwrap();
        }
        let (_, images) = images(1);
        let panels = panels(&mae, &images, NORMALISED, 0.75, &Rng::new(2)).unwrap();
        let x = patchify(&images, 4).unwrap();
        let mean = statistics(&x.data::<f32>()[..48], 1e-6).0;
        let expected: Vec<u8> = (0..3).map(|c| ((mean * STD[c] as f64 + MEAN[c] as f64) * 255.0 + 1e-3) as u8).collect();
        assert_eq!(panels[0][2].pixels[..6], expected.repeat(2));
    }

    #[test]
    fn masks_depend_on_the_seed_alone_and_an_empty_one_is_refused() {
        let (_, images) = images(1);
        let masked = |ratio: f64, seed: u64| {
            panels(&mae(None), &images, NORMALISED, ratio, &Rng::new(seed)).map(|mut panels| panels.remove(0)[1].clone())
        };
        assert_eq!(masked(0.75, 2).unwrap(), masked(0.75, 2).unwrap());
        assert_ne!(masked(0.75, 2).unwrap(), masked(0.75, 3).unwrap());
        for ratio in [0.0, 0.99, 1.0] {
            assert!(masked(ratio, 2).unwrap_err().to_string().contains("at least one has to be kept and one hidden"));
        }
    }

    #[test]
    fn attention_is_probabilities_over_patches_and_its_panels_are_original_mean_and_heads() {
        let (mae, (_, images)) = (mae(None), images(2));
        let maps = class_attention(&mae.encoder, &mae.params, &images).unwrap();
        assert_eq!(maps.shape(), [2, 2, 16]);
        for row in maps.data::<f32>().chunks_exact(16) {
            let sum: f32 = row.iter().sum();
            assert!(row.iter().all(|p| *p > 0.0) && (0.5..1.0).contains(&sum), "{sum}");
        }
        let rows = attention_rows(&mae.encoder, &mae.params, &images, NORMALISED, &["a".into(), "b".into()]).unwrap();
        let titles: Vec<&str> = rows[1].panels.iter().map(|(title, _)| title.as_str()).collect();
        assert_eq!((rows.len(), rows[1].label.as_str(), titles), (2, "b", vec!["original", "mean of heads", "head 1", "head 2"]));
    }

    #[test]
    fn heat_is_warmest_where_attention_is_greatest() {
        let grey = Picture::new([8, 8], 1, vec![100; 64]).unwrap();
        let shown = heat(&grey, &[0.1, 0.1, 0.1, 0.7], [2, 2]).unwrap();
        let red = |y: usize, x: usize| shown.pixels[(y * 8 + x) * 3];
        assert!(red(7, 7) > 200 && (63..=64).contains(&red(0, 0)) && red(4, 4) > red(3, 3), "{} {}", red(7, 7), red(0, 0));
    }
}
