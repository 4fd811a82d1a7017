//! Filters over neighbouring pixels of RGB bytes [H, W, 3], Pillow's bytes exactly.
//!
//!   smooth     (sum of the 3 x 3 neighbourhood + 4 times the middle) / 13, rounded to the nearest byte; the border of one pixel is kept
//!   sharpness  blend from the smoothed image past the image by the factor
//!   blur       a Gaussian as three box filters along the rows and three along the columns, each rounding to bytes; edges are repeated.
//!              A box of radius r + a (r whole, 0 <= a < 1) weighs 2 r + 1 pixels fully and the two beside them by a:
//!                s = sigma^2 / 3, L = sqrt(12 s + 1), r = floor((L - 1) / 2), a = (2 r + 1) (r (r + 1) - 3 s) / (6 (s - (r + 1)^2))
//!              in f32, then in whole numbers with 24 fractional bits.

use super::colour::blend;
use crate::vectorised;

const CHANNELS: usize = 3;

/// The 3 x 3 smoothing; images of fewer than three rows or columns stay as they are.
fn smooth(pixels: &[u8], [h, w]: [usize; 2]) -> Vec<u8> {
    let mut out = pixels.to_vec();
    if h < 3 || w < 3 {
        return out;
    }
    let stride = w * CHANNELS;
    for y in 1..h - 1 {
        let rows = [y - 1, y, y + 1].map(|y| &pixels[y * stride..][..stride]);
        smooth_row(rows, &mut out[y * stride + CHANNELS..(y + 1) * stride - CHANNELS]);
    }
    out
}

/// (2 s + 13) / 26 for sums s up to 13 * 255: the nearest whole number to s / 13, which is never halfway.
#[inline(always)]
fn thirteenth(sum: u32) -> u32 {
    ((2 * sum + 13) * 40330) >> 20
}

vectorised! {
    fn smooth_row(rows: [&[u8]; 3], out: &mut [u8]) {
        let n = out.len();
        let [above, own, below] = rows.map(|row| [&row[..n], &row[CHANNELS..][..n], &row[2 * CHANNELS..][..n]]);
        for (i, out) in out.iter_mut().enumerate() {
            let sum = |row: [&[u8]; 3]| u32::from(row[0][i]) + u32::from(row[1][i]) + u32::from(row[2][i]);
            *out = thirteenth(sum(above) + sum(own) + sum(below) + 4 * u32::from(own[1][i])) as u8;
        }
    }

    fn blend_all(degenerate: &[u8], pixels: &mut [u8], factor: f32) {
        for (v, &d) in pixels.iter_mut().zip(degenerate) {
            *v = blend(d, *v, factor);
        }
    }

    /// sums[i] += line[i].
    fn add(sums: &mut [u32], line: &[u8]) {
        for (sum, &v) in sums.iter_mut().zip(line) {
            *sum += u32::from(v);
        }
    }

    /// The weighted box from the sum of its whole pixels and the two beside them.
    fn weigh(sums: &[u32], before: &[u8], after: &[u8], whole: u32, part: u32, out: &mut [u8]) {
        for (((out, &sum), &a), &b) in out.iter_mut().zip(sums).zip(before).zip(after) {
            *out = (sum.wrapping_mul(whole).wrapping_add((u32::from(a) + u32::from(b)).wrapping_mul(part)).wrapping_add(1 << 23) >> 24) as u8;
        }
    }
}

pub fn sharpness(pixels: &mut [u8], size: [usize; 2], factor: f32) {
    let degenerate = smooth(pixels, size);
    blend_all(&degenerate, pixels, factor);
}

/// A box filter: pixels on each side that count fully, the weight of each, the weight of the two beside them.
#[derive(Clone, Copy)]
struct Box {
    radius: usize,
    whole: u32,
    part: u32,
}

impl Box {
    /// The box of which three make a Gaussian.
    fn of(sigma: f32) -> Self {
        let variance = sigma * sigma / 3.0;
        let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let l = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
        let a = (2.0 * l + 1.0) * (l * (l + 1.0) - 3.0 * variance) / (6.0 * (variance - (l + 1.0) * (l + 1.0)));
        let wide = l + a;
        let radius = wide as usize;
        let whole = (16_777_216.0 / (wide * 2.0 + 1.0)) as u32;
        Self { radius, whole, part: (16_777_216 - (2 * radius as u32 + 1) * whole) / 2 }
    }

    /// Filters along the rows; `line` holds a row with its edges repeated.
    fn rows(self, pixels: &[u8], w: usize, line: &mut Vec<u8>, sums: &mut [u32], out: &mut [u8]) {
        let stride = w * CHANNELS;
        for (row, out) in pixels.chunks_exact(stride).zip(out.chunks_exact_mut(stride)) {
            let (first, last) = (&row[..CHANNELS], &row[stride - CHANNELS..]);
            line.clear();
            (0..=self.radius).for_each(|_| line.extend_from_slice(first));
            line.extend_from_slice(row);
            (0..=self.radius).for_each(|_| line.extend_from_slice(last));
            let shifted = |by: usize| &line[by * CHANNELS..][..stride];
            sums.fill(0);
            (1..2 * self.radius + 2).for_each(|by| add(sums, shifted(by)));
            weigh(sums, shifted(0), shifted(2 * self.radius + 2), self.whole, self.part, out);
        }
    }

    /// Filters along the columns.
    fn columns(self, pixels: &[u8], [h, w]: [usize; 2], sums: &mut [u32], out: &mut [u8]) {
        let stride = w * CHANNELS;
        let reach = self.radius as isize;
        for (y, out) in out.chunks_exact_mut(stride).enumerate() {
            let row = |by: isize| &pixels[(y as isize + by).clamp(0, h as isize - 1) as usize * stride..][..stride];
            sums.fill(0);
            (-reach..=reach).for_each(|by| add(sums, row(by)));
            weigh(sums, row(-reach - 1), row(reach + 1), self.whole, self.part, out);
        }
    }
}

/// The widest Gaussian that is blurred with; sums of a wider box would not fit 32 bits everywhere.
pub const MOST_SIGMA: f32 = 1000.0;

/// Blurs with a Gaussian of this deviation, at most [`MOST_SIGMA`].
pub fn blur(pixels: &mut Vec<u8>, size: [usize; 2], sigma: f32) {
    let sigma = sigma.clamp(0.0, MOST_SIGMA);
    if sigma == 0.0 || pixels.is_empty() {
        return;
    }
    let filter = Box::of(sigma);
    let (mut other, mut line, mut sums) = (vec![0; pixels.len()], Vec::new(), vec![0; size[1] * CHANNELS]);
    for _ in 0..3 {
        filter.rows(pixels, size[1], &mut line, &mut sums, &mut other);
        std::mem::swap(pixels, &mut other);
    }
    for _ in 0..3 {
        filter.columns(pixels, size, &mut sums, &mut other);
        std::mem::swap(pixels, &mut other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thirteenths_are_rounded_to_the_nearest_byte() {
        for sum in 0..=13 * 255 {
            assert_eq!(thirteenth(sum), (f64::from(sum) / 13.0).round() as u32, "{sum}");
        }
    }

    #[test]
    fn blurring_keeps_a_flat_image_and_spreads_a_point_evenly() {
        let mut flat = vec![200; 7 * 5 * 3];
        blur(&mut flat, [7, 5], 1.7);
        assert_eq!(flat, vec![200; 7 * 5 * 3]);
        let mut point = vec![0; 15 * 15 * 3];
        point[(7 * 15 + 7) * 3] = 255;
        blur(&mut point, [15, 15], 1.2);
        let red = |y: usize, x: usize| i32::from(point[(y * 15 + x) * 3]);
        // The passes round, so that rows and columns differ by a step or two.
        assert!((0..225).all(|i| (red(i / 15, i % 15) - red(i % 15, i / 15)).abs() <= 2 && point[i * 3 + 1..i * 3 + 3] == [0, 0]));
        assert_eq!((red(7, 6), red(6, 7)), (red(7, 8), red(8, 7)));
        let total: i32 = (0..225).map(|i| red(i / 15, i % 15)).sum();
        assert!((total - 255).abs() < 30, "{total}");
    }

    #[test]
    fn weights_of_a_box_add_up_to_one() {
        for sigma in [0.1f32, 0.5, 1.0, 2.0, 7.7, 1000.0] {
            let Box { radius, whole, part } = Box::of(sigma);
            let total = (2 * radius as u32 + 1) * whole + 2 * part;
            assert!((16_777_215..=16_777_216).contains(&total), "{sigma}: {total}");
        }
    }
}
