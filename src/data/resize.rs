//! Images from bytes to normalised pixels: crop, bicubic resize, flip, normalise; the resize gives Pillow's bytes exactly.
//!
//! Images are bytes [H, W, C], C = 1 .. 16, sizes are `[height, width]`. Resizing is two passes of [`resample`](super::resample), horizontal then
//! vertical, each rounding to bytes. A pass that changes nothing is skipped. The filter sees only the crop, and only what is wanted is computed.

use super::resample::{Axis, Padded};
use crate::ensure;
use crate::error::{Error, Result};

/// Mean and standard deviation of ImageNet's pixels, by channel, on the scale 0 to 1.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Channels that an image can have.
pub const MAX_CHANNELS: usize = 16;
const MAX_SIDE: usize = 65535;
const MAX_BYTES: usize = 1 << 30;

/// A rectangle of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

/// Resizes an image.
pub fn resize(pixels: &[u8], size: [usize; 2], channels: usize, to: [usize; 2]) -> Result<Vec<u8>> {
    View::whole(pixels, size, channels)?.resize(to, Crop::whole(to))
}

/// Cuts a rectangle out of an image.
pub fn crop(pixels: &[u8], size: [usize; 2], channels: usize, crop: Crop) -> Result<Vec<u8>> {
    Ok(View::whole(pixels, size, channels)?.crop(crop)?.copy())
}

/// Cuts a rectangle out of an image and resizes it.
pub fn crop_resize(pixels: &[u8], size: [usize; 2], channels: usize, crop: Crop, to: [usize; 2]) -> Result<Vec<u8>> {
    View::whole(pixels, size, channels)?.crop(crop)?.resize(to, Crop::whole(to))
}

/// Resizes an image and cuts a rectangle out of the result; what is outside it is not computed.
pub fn resize_crop(pixels: &[u8], size: [usize; 2], channels: usize, to: [usize; 2], crop: Crop) -> Result<Vec<u8>> {
    View::whole(pixels, size, channels)?.resize(to, crop)
}

/// Mirrors an image left to right, in place.
pub fn hflip(pixels: &mut [u8], size: [usize; 2], channels: usize) -> Result<()> {
    View::whole(pixels, size, channels)?;
    for row in pixels.chunks_exact_mut(size[1] * channels) {
        match channels {
            1 => row.reverse(),
            3 => row.as_chunks_mut::<3>().0.reverse(),
            _ => {
                row.reverse();
                row.chunks_exact_mut(channels).for_each(<[u8]>::reverse);
            }
        }
    }
    Ok(())
}

/// The rectangle of size `to` in the middle of an image, half a pixel rounded to the even side.
pub fn centre(size: [usize; 2], to: [usize; 2]) -> Result<Crop> {
    ensure!(
        to[0] <= size[0] && to[1] <= size[1],
        "centre crop: {} x {} does not fit into an image of {} x {}",
        to[0],
        to[1],
        size[0],
        size[1]
    );
    let offset = |size: usize, to: usize| ((size - to) as f64 / 2.0).round_ties_even() as usize;
    Ok(Crop { top: offset(size[0], to[0]), left: offset(size[1], to[1]), height: to[0], width: to[1] })
}

/// The size of an image whose short side becomes `short`; the long side is rounded down.
pub fn short_side_size(size: [usize; 2], short: usize) -> Result<[usize; 2]> {
    byte_len(size, 1)?;
    let [height, width] = size;
    let long = |long: usize, by: usize| short.checked_mul(long).map_or(usize::MAX, |product| product / by);
    let to = if width <= height { [long(height, width), short] } else { [short, long(width, height)] };
    byte_len(to, 1)?;
    Ok(to)
}

/// What evaluation sees of an image: the short side resized to `short`, then the `side` x `side` in the middle.
pub fn eval_transform(pixels: &[u8], size: [usize; 2], channels: usize, short: usize, side: usize) -> Result<Vec<u8>> {
    let to = short_side_size(size, short)?;
    resize_crop(pixels, size, channels, to, centre(to, [side, side])?)
}

/// The short side that evaluation at `input` pixels resizes to when the centre crop takes `crop_ratio` of it: 256 for 224 at 0.875.
pub fn eval_short_side(input: usize, crop_ratio: f64) -> usize {
    (input as f64 / crop_ratio) as usize
}

/// MAE's crop ratio: 0.875 up to 224 pixels, the whole image above.
pub fn mae_crop_ratio(input: usize) -> f64 {
    if input <= 224 { 0.875 } else { 1.0 }
}

/// Bytes [H, W, C] to (byte/255 - mean) / std, [C, H, W], in f32; C numbers each of mean and std.
pub fn normalise(pixels: &[u8], size: [usize; 2], mean: &[f32], std: &[f32]) -> Result<Vec<f32>> {
    let channels = mean.len();
    ensure!(std.len() == channels, "normalise: {channels} means but {} deviations", std.len());
    View::whole(pixels, size, channels)?;
    let mut planes = Vec::with_capacity(pixels.len());
    for (channel, (mean, std)) in mean.iter().zip(std).enumerate() {
        let level: [f32; 256] = std::array::from_fn(|byte| (byte as f32 / 255.0 - mean) / std);
        planes.extend(pixels.chunks_exact(channels).map(|pixel| level[pixel[channel] as usize]));
    }
    Ok(planes)
}

impl Crop {
    /// All of an image.
    pub fn whole([height, width]: [usize; 2]) -> Self {
        Self { top: 0, left: 0, height, width }
    }

    /// The same, if it lies within an image.
    fn within(self, size: [usize; 2]) -> Result<Self> {
        let Self { top, left, height, width } = self;
        let inside = |from: usize, len: usize, size: usize| len > 0 && from.checked_add(len).is_some_and(|end| end <= size);
        ensure!(
            inside(top, height, size[0]) && inside(left, width, size[1]),
            "crop: {height} x {width} at row {top}, column {left} is not inside an image of {} x {}",
            size[0],
            size[1]
        );
        Ok(self)
    }
}

/// A rectangle of somebody else's pixels.
struct View<'a> {
    pixels: &'a [u8],
    channels: usize,
    /// Bytes from one row to the next.
    stride: usize,
    height: usize,
    width: usize,
}

impl<'a> View<'a> {
    fn whole(pixels: &'a [u8], [height, width]: [usize; 2], channels: usize) -> Result<Self> {
        let bytes = byte_len([height, width], channels)?;
        ensure!(bytes == pixels.len(), "image: {} bytes are not {height} x {width} pixels with {channels} channels", pixels.len());
        Ok(Self { pixels, channels, stride: width * channels, height, width })
    }

    fn crop(&self, crop: Crop) -> Result<Self> {
        let Crop { top, left, height, width } = crop.within([self.height, self.width])?;
        Ok(Self { pixels: &self.pixels[top * self.stride + left * self.channels..], height, width, ..*self })
    }

    fn row(&self, y: usize) -> &'a [u8] {
        &self.pixels[y * self.stride..][..self.width * self.channels]
    }

    fn copy(&self) -> Vec<u8> {
        (0..self.height).flat_map(|y| self.row(y)).copied().collect()
    }

    /// The rectangle `crop` of this resized to `to`.
    fn resize(self, to: [usize; 2], crop: Crop) -> Result<Vec<u8>> {
        byte_len(to, self.channels)?;
        let Crop { top, left, height, width } = crop.within(to)?;
        let columns = (to[1] != self.width).then(|| Axis::new(self.width, to[1], left..left + width)).transpose()?;
        let rows = (to[0] != self.height).then(|| Axis::new(self.height, to[0], top..top + height)).transpose()?;
        // The rows that the second pass looks at.
        let sources = rows.as_ref().map_or(top..top + height, Axis::sources);
        byte_len([sources.len(), width], self.channels)?;
        let lines = sources.clone().map(|y| self.row(y));
        let between = match columns {
            Some(axis) => Padded::horizontal(lines, self.channels, &axis),
            None => {
                let bytes = left * self.channels..(left + width) * self.channels;
                Padded::copied(lines.map(|line| &line[bytes.clone()]), bytes.len())
            }
        };
        let mut out = vec![0; height * width * self.channels];
        match rows {
            Some(axis) => between.vertical(sources.start, &axis, &mut out),
            None => between.copy_to(&mut out),
        }
        Ok(out)
    }
}

/// The bytes of an image, for sizes that an image can have.
fn byte_len([height, width]: [usize; 2], channels: usize) -> Result<usize> {
    ensure!(height > 0 && width > 0, "image: {height} x {width} has no pixels");
    ensure!((1..=MAX_CHANNELS).contains(&channels), "image: {channels} channels are not from 1 to {MAX_CHANNELS}");
    let bytes = height.checked_mul(width).and_then(|area| area.checked_mul(channels)).filter(|&bytes| bytes <= MAX_BYTES);
    bytes
        .filter(|_| height <= MAX_SIDE && width <= MAX_SIDE)
        .ok_or_else(|| Error::new(format!("image: {height} x {width} is too large; sides go up to {MAX_SIDE} and an image up to 1 GiB")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Grey RGB pixels.
    fn grey(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|&byte| [byte; 3]).collect()
    }

    #[test]
    fn weights_of_a_short_axis_are_the_published_ones() {
        let axis = Axis::new(5, 3, 0..3).unwrap();
        let (first, weights) = axis.windows().next().unwrap();
        assert_eq!((first, weights), (0, &[2452055, 1871305, 0, -129056][..]));
        assert_eq!(resize(&grey(&[10, 20, 40, 80, 160]), [1, 5], 3, [1, 3]).unwrap(), grey(&[12, 42, 129]));
        assert_eq!(resize(&grey(&[10, 20, 40, 80, 160]), [5, 1], 3, [3, 1]).unwrap(), grey(&[12, 42, 129]));
    }

    #[test]
    fn two_passes_round_to_bytes_in_between() {
        let enlarged = resize(&grey(&[0, 255, 10, 200, 30, 90]), [2, 3], 3, [3, 5]).unwrap();
        assert_eq!(enlarged, grey(&[0, 98, 255, 110, 0, 107, 119, 143, 84, 48, 227, 140, 15, 58, 101]));
    }

    #[test]
    fn weights_of_every_pair_of_sides_fit_32_bit_sums() {
        for n in 1..=96 {
            for m in 1..=96 {
                Axis::new(n, m, 0..m).unwrap();
            }
        }
        for n in [1, 2, 3, 4, 7, 500, 4032, 65535] {
            for m in [1, 2, 3, 224, 256, 65535] {
                Axis::new(n, m, 0..m).unwrap();
            }
        }
    }

    #[test]
    fn constant_images_stay_constant_at_any_size() {
        for value in [0, 1, 127, 254, 255] {
            for (size, to) in [([7, 5], [3, 11]), ([1, 1], [4, 4]), ([40, 30], [1, 1]), ([64, 64], [63, 65])] {
                let resized = resize(&vec![value; size[0] * size[1] * 3], size, 3, to).unwrap();
                assert_eq!(resized, vec![value; to[0] * to[1] * 3], "{value}: {size:?} to {to:?}");
            }
        }
    }

    #[test]
    fn channels_do_not_mix() {
        let (h, w) = (13, 17);
        let plane = |c: usize| (0..h * w).map(|i| (i * (7 + 4 * c) % 256) as u8).collect::<Vec<_>>();
        let planes = [plane(0), plane(1), plane(2)];
        let image: Vec<u8> = (0..h * w).flat_map(|i| planes.iter().map(move |plane| plane[i])).collect();
        let resized = resize(&image, [h, w], 3, [20, 9]).unwrap();
        for (c, plane) in planes.iter().enumerate() {
            let alone = resize(&grey(plane), [h, w], 3, [20, 9]).unwrap();
            assert!(resized.chunks_exact(3).zip(alone.chunks_exact(3)).all(|(mixed, alone)| mixed[c] == alone[c]));
        }
    }

    #[test]
    fn crop_is_taken_before_the_filter() {
        let image: Vec<u8> = (0..9 * 11 * 3).map(|i| (i * 37 % 251) as u8).collect();
        let rectangle = Crop { top: 2, left: 3, height: 5, width: 7 };
        let cut = crop(&image, [9, 11], 3, rectangle).unwrap();
        assert_eq!(cut[..21], image[(2 * 11 + 3) * 3..][..21]);
        assert_eq!(crop_resize(&image, [9, 11], 3, rectangle, [4, 8]).unwrap(), resize(&cut, [5, 7], 3, [4, 8]).unwrap());
        assert_eq!(crop_resize(&image, [9, 11], 3, rectangle, [5, 7]).unwrap(), cut);
    }

    #[test]
    fn flip_mirrors_pixels_and_not_channels() {
        let mut image = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19];
        hflip(&mut image, [2, 3], 3).unwrap();
        assert_eq!(image, [7, 8, 9, 4, 5, 6, 1, 2, 3, 17, 18, 19, 14, 15, 16, 11, 12, 13]);
    }

    #[test]
    fn centre_rounds_half_to_even() {
        let corner = |size, to| centre([size, size + 1], [to, to]).map(|crop| (crop.top, crop.left)).unwrap();
        assert_eq!(corner(256, 224), (16, 16)); // 16.5 goes to 16
        assert_eq!(corner(6, 4), (1, 2)); // 1.5 goes to 2
        assert_eq!(corner(5, 4), (0, 1)); // 0.5 goes to 0
        assert!(centre([4, 9], [5, 5]).is_err());
    }

    #[test]
    fn long_side_is_rounded_down() {
        assert_eq!(short_side_size([375, 500], 256).unwrap(), [256, 341]);
        assert_eq!(short_side_size([500, 333], 256).unwrap(), [384, 256]);
        assert_eq!(short_side_size([256, 300], 256).unwrap(), [256, 300]);
        assert_eq!(eval_short_side(224, mae_crop_ratio(224)), 256);
        assert_eq!(eval_short_side(384, 0.875), 438);
        assert_eq!(eval_short_side(448, mae_crop_ratio(448)), 448);
    }

    #[test]
    fn normalisation_is_f32_and_planar() {
        let planes = normalise(&[0, 128, 255, 10, 20, 30], [1, 2], &IMAGENET_MEAN, &IMAGENET_STD).unwrap();
        let level = |byte: f32, c: usize| (byte / 255.0 - IMAGENET_MEAN[c]) / IMAGENET_STD[c];
        assert_eq!(planes, [level(0.0, 0), level(10.0, 0), level(128.0, 1), level(20.0, 1), level(255.0, 2), level(30.0, 2)]);
    }

    #[test]
    fn sizes_that_no_image_has_are_errors() {
        let one = [1, 2, 3];
        assert!(resize(&one, [1, 1], 3, [0, 4]).is_err());
        assert!(resize(&[], [0, 4], 3, [4, 4]).is_err());
        assert!(resize(&one, [1, 2], 3, [4, 4]).is_err());
        assert!(resize(&one, [1, 1], 3, [usize::MAX, 2]).is_err());
        assert!(resize(&one, [1, 1], 3, [60000, 60000]).is_err());
        assert!(resize(&one, [usize::MAX, usize::MAX], 3, [1, 1]).is_err());
        assert!(short_side_size([1, 60000], 256).is_err());
        assert!(short_side_size([2, 3], usize::MAX).is_err());
        assert!(short_side_size([2, 3], 0).is_err());
        assert!(crop(&one, [1, 1], 3, Crop { top: 0, left: usize::MAX, height: 1, width: 2 }).is_err());
        assert!(crop(&one, [1, 1], 3, Crop { top: 0, left: 0, height: 0, width: 1 }).is_err());
        assert!(hflip(&mut [0; 4], [1, 1], 3).is_err());
        assert!(normalise(&one, [1, 2], &IMAGENET_MEAN, &IMAGENET_STD).is_err());
    }
}
