//! Colours of RGB bytes changed in place, Pillow's bytes exactly.
//!
//!   table     v becomes table[v]: invert, posterise, solarise, autocontrast, equalise, brightness, contrast
//!   blend     v becomes trunc(clamp(d + f (v - d), 0, 255)) in f32, d the degenerate image and f the factor: brightness (d = 0), contrast (d = the rounded
//!             mean luma), saturation (d = the luma); f = 1 changes nothing
//!   luma      (19595 R + 38470 G + 7471 B + 32768) >> 16
//!
//! Pixels are [.., 3], the channel fastest.

use crate::rng::Stream;

/// What each byte becomes.
pub type Table = [u8; 256];

pub fn table(level: impl Fn(u8) -> u8) -> Table {
    std::array::from_fn(|v| level(v as u8))
}

pub fn map(pixels: &mut [u8], table: &Table) {
    pixels.iter_mut().for_each(|v| *v = table[*v as usize]);
}

fn map_channels(pixels: &mut [u8], tables: &[Table; 3]) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        *pixel = std::array::from_fn(|c| tables[c][pixel[c] as usize]);
    }
}

pub fn invert(pixels: &mut [u8]) {
    pixels.iter_mut().for_each(|v| *v = 255 - *v);
}

/// Inverts what is at least `threshold`.
pub fn solarise(pixels: &mut [u8], threshold: u32) {
    pixels.iter_mut().for_each(|v| *v = if u32::from(*v) < threshold { *v } else { 255 - *v });
}

/// Adds to the dark half.
pub fn solarise_add(pixels: &mut [u8], add: u32) {
    map(pixels, &table(|v| if v < 128 { (u32::from(v) + add).min(255) as u8 } else { v }));
}

/// Keeps the highest bits of each byte; none leaves black.
pub fn posterise(pixels: &mut [u8], bits: u32) {
    let mask = if bits == 0 { 0 } else { !0u8 << (8 - bits.min(8)) };
    pixels.iter_mut().for_each(|v| *v &= mask);
}

fn histograms(pixels: &[u8]) -> [[u32; 256]; 3] {
    let mut counts = [[0; 256]; 3];
    for pixel in pixels.as_chunks::<3>().0 {
        for (counts, &v) in counts.iter_mut().zip(pixel) {
            counts[v as usize] += 1;
        }
    }
    counts
}

/// Stretches each channel from its least and greatest byte to 0 and 255.
pub fn autocontrast(pixels: &mut [u8]) {
    let tables = histograms(pixels).map(|counts| {
        let low = counts.iter().position(|&n| n > 0).unwrap_or(0);
        let high = counts.iter().rposition(|&n| n > 0).unwrap_or(0);
        if high <= low {
            return table(|v| v);
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        table(|v| (f64::from(v) * scale + offset) as u8)
    });
    map_channels(pixels, &tables);
}

/// Makes each channel's bytes about equally frequent.
pub fn equalise(pixels: &mut [u8]) {
    let tables = histograms(pixels).map(|counts| {
        let last = counts.iter().rfind(|&&n| n > 0).copied().unwrap_or(0);
        let step = (counts.iter().sum::<u32>() - last) / 255;
        if step == 0 {
            return table(|v| v);
        }
        let mut n = step / 2;
        counts.map(|count| {
            let level = (n / step).min(255) as u8;
            n += count;
            level
        })
    });
    map_channels(pixels, &tables);
}

pub fn luma([r, g, b]: [u8; 3]) -> u8 {
    ((19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b) + 32768) >> 16) as u8
}

/// Each pixel becomes its luma, three times.
pub fn grey(pixels: &mut [u8]) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        *pixel = [luma(*pixel); 3];
    }
}

/// From the degenerate byte past the image's by the factor.
#[inline(always)]
pub fn blend(degenerate: u8, v: u8, factor: f32) -> u8 {
    let d = f32::from(degenerate);
    (d + factor * (f32::from(v) - d)).clamp(0.0, 255.0) as i32 as u8
}

pub fn brightness(pixels: &mut [u8], factor: f32) {
    map(pixels, &table(|v| blend(0, v, factor)));
}

pub fn contrast(pixels: &mut [u8], factor: f32) {
    let (pixels_of, count) = (pixels.as_chunks::<3>().0, pixels.len() / 3);
    let sum: u64 = pixels_of.iter().map(|&pixel| u64::from(luma(pixel))).sum();
    let mean = (sum as f64 / count.max(1) as f64 + 0.5) as u8;
    map(pixels, &table(|v| blend(mean, v, factor)));
}

pub fn saturation(pixels: &mut [u8], factor: f32) {
    for pixel in pixels.as_chunks_mut::<3>().0 {
        let grey = luma(*pixel);
        *pixel = pixel.map(|v| blend(grey, v, factor));
    }
}

/// Brightness, contrast and saturation by factors up to this far from 1, one after another in an order of chance.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Jitter(pub f64);

impl Jitter {
    pub fn apply(self, pixels: &mut [u8], draws: &mut Stream) {
        let changes: [fn(&mut [u8], f32); 3] = [brightness, contrast, saturation];
        let factors = [(); 3].map(|()| draws.between((1.0 - self.0).max(0.0), 1.0 + self.0) as f32);
        let mut order = [0, 1, 2];
        draws.shuffle(&mut order);
        for change in order {
            changes[change](pixels, factors[change]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn colours_of_the_specification() {
        let mut pixel = [10, 200, 60];
        assert_eq!(luma(pixel), 127);
        saturation(&mut pixel, 0.19);
        assert_eq!(pixel, [104, 140, 114]);
        let mut pixel = [10, 200, 60];
        saturation(&mut pixel, 1.81);
        assert_eq!(pixel, [0, 255, 5]);
    }

    #[test]
    fn jitter_of_nothing_changes_nothing() {
        let image: Vec<u8> = (0..=254).collect();
        let mut jittered = image.clone();
        Jitter(0.0).apply(&mut jittered, &mut Rng::new(0).stream("jitter", 0));
        assert_eq!(jittered, image);
    }

    #[test]
    fn jitter_applies_its_three_changes_in_every_order() {
        let image: Vec<u8> = (0..300).map(|i| (i * 37 % 256) as u8).collect();
        let mut seen = [[0usize; 3]; 3];
        for number in 0..600 {
            let mut draws = Rng::new(1).stream("jitter", number);
            let mut jittered = image.clone();
            Jitter(0.4).apply(&mut jittered, &mut draws.clone());
            let factors = [(); 3].map(|()| draws.between(0.6, 1.4) as f32);
            let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
            let changes: [fn(&mut [u8], f32); 3] = [brightness, contrast, saturation];
            let expected = orders.map(|order| {
                let mut image = image.clone();
                order.iter().for_each(|&i| changes[i](&mut image, factors[i]));
                image
            });
            let order = orders[expected.iter().position(|image| *image == jittered).expect("one of six orders")];
            order.iter().enumerate().for_each(|(place, &change)| seen[place][change] += 1);
        }
        assert!(seen.iter().flatten().all(|count| (130..270).contains(count)), "{seen:?}");
    }
}
