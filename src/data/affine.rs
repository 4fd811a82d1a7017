//! RGB bytes [H, W, 3] seen through an affine map, Pillow's bytes exactly.
//!
//!   the output pixel at (x, y) shows the input at  x' = m0 (x + 1/2) + m1 (y + 1/2) + m2,  y' = m3 (x + 1/2) + m4 (y + 1/2) + m5
//!   between samples v1 v2 v3 v4, d past v2:  v2 + d (v3 - v1 + d (2 (v1 - v2) + v3 - v4 + d (v2 - v1 + v4 - v3)))
//!
//! This is the cubic with a = -1, first along the four rows around the point, then down; rows and columns outside are the edge's. A point outside
//! the image shows the fill. Numbers are f64, cut off to bytes. A map that moves along one axis leaves d = 0 on the other, where the cubic is v2:
//! one row, or one column, is read instead of four.

use crate::vectorised;

const CHANNELS: usize = 3;

/// ImageNet's mean colour, which timm fills with.
pub const FILL: [u8; 3] = [124, 116, 104];

/// Coefficients of x' and y'.
pub type Map = [f64; 6];

pub fn shear_x(factor: f64) -> Map {
    [1.0, factor, 0.0, 0.0, 1.0, 0.0]
}

pub fn shear_y(factor: f64) -> Map {
    [1.0, 0.0, 0.0, factor, 1.0, 0.0]
}

pub fn translate_x(pixels: f64) -> Map {
    [1.0, 0.0, pixels, 0.0, 1.0, 0.0]
}

pub fn translate_y(pixels: f64) -> Map {
    [1.0, 0.0, 0.0, 0.0, 1.0, pixels]
}

/// A turn about the middle, counter-clockwise; sines are rounded to 15 decimals, as Pillow does.
pub fn rotate([h, w]: [usize; 2], degrees: f64) -> Map {
    let decimals = |x: f64| format!("{x:.15}").parse().unwrap_or(x);
    let angle = -degrees.rem_euclid(360.0).to_radians();
    let (cos, sin, against) = (decimals(angle.cos()), decimals(angle.sin()), decimals(-angle.sin()));
    let (cx, cy) = (w as f64 / 2.0, h as f64 / 2.0);
    [cos, sin, cos * -cx + sin * -cy + cx, against, cos, against * -cx + cos * -cy + cy]
}

/// The image through the map.
pub fn transform(pixels: &[u8], size: [usize; 2], map: &Map, fill: [u8; 3]) -> Vec<u8> {
    let mut out = vec![0; pixels.len()];
    if *map == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0] {
        out.copy_from_slice(pixels);
    } else if map[3] == 0.0 && map[4] == 1.0 && map[5] == 0.0 {
        sideways(&widened(pixels), size, map, fill, &mut out);
    } else if map[1] == 0.0 && map[0] == 1.0 && map[2] == 0.0 {
        upright(&widened(pixels), size, map, fill, &mut out);
    } else {
        anywhere(&widened(pixels), size, map, fill, &mut out);
    }
    out
}

/// The sample before a point, and how far past it the point lies.
#[inline(always)]
fn split(at: f64) -> (isize, f64) {
    let at = at - 0.5;
    let floor = at.floor();
    (floor as isize, at - floor)
}

/// The four samples around, clamped to the image.
#[inline(always)]
fn around(first: isize, len: usize) -> [usize; 4] {
    let last = len as isize - 1;
    [
        (first - 1).clamp(0, last) as usize,
        first.clamp(0, last) as usize,
        (first + 1).clamp(0, last) as usize,
        (first + 2).clamp(0, last) as usize,
    ]
}

/// A pixel with a fourth channel of nothing, which fills a vector register.
type Lanes<T> = [T; 4];

/// The image with room for vectors: whole numbers, exact in f32 as are their sums.
fn widened(pixels: &[u8]) -> Vec<Lanes<f32>> {
    pixels.as_chunks::<CHANNELS>().0.iter().map(|&[r, g, b]| [r, g, b, 0].map(f32::from)).collect()
}

/// Between the pixels at four places.
#[inline(always)]
fn between_pixels(image: &[Lanes<f32>], at: [usize; 4], d: f64) -> Lanes<f64> {
    let (v1, v2, v3, v4) = (&image[at[0]], &image[at[1]], &image[at[2]], &image[at[3]]);
    let mut out = [0f64; 4];
    for (c, out) in out.iter_mut().enumerate() {
        let p2 = f64::from(v3[c] - v1[c]);
        let p3 = f64::from(2.0 * (v1[c] - v2[c]) + v3[c] - v4[c]);
        let p4 = f64::from(v2[c] - v1[c] + v4[c] - v3[c]);
        *out = f64::from(v2[c]) + d * (p2 + d * (p3 + d * p4));
    }
    out
}

/// Between four sums.
#[inline(always)]
fn between([v1, v2, v3, v4]: [Lanes<f64>; 4], d: f64) -> Lanes<f64> {
    let mut out = [0f64; 4];
    for (c, out) in out.iter_mut().enumerate() {
        let p2 = -v1[c] + v3[c];
        let p3 = 2.0 * (v1[c] - v2[c]) + v3[c] - v4[c];
        let p4 = -v1[c] + v2[c] - v3[c] + v4[c];
        *out = v2[c] + d * (p2 + d * (p3 + d * p4));
    }
    out
}

#[inline(always)]
fn to_bytes(pixel: Lanes<f64>) -> [u8; CHANNELS] {
    let mut out = [0i32; 4];
    for (c, out) in out.iter_mut().enumerate() {
        *out = pixel[c].clamp(0.0, 255.0) as i32;
    }
    [out[0] as u8, out[1] as u8, out[2] as u8]
}

#[inline(always)]
fn inside(at: f64, len: usize) -> bool {
    at >= 0.0 && at < len as f64
}

vectorised! {
    /// y' = y: each row by itself.
    fn sideways(image: &[Lanes<f32>], size: [usize; 2], map: &Map, fill: [u8; 3], out: &mut [u8]) {
        let [_, w] = size;
        let rows = image.chunks_exact(w).zip(out.chunks_exact_mut(w * CHANNELS));
        for (y, (row, out)) in rows.enumerate() {
            for (x, out) in out.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
                let at = map[0] * (x as f64 + 0.5) + map[1] * (y as f64 + 0.5) + map[2];
                *out = fill;
                if inside(at, w) {
                    let (first, d) = split(at);
                    *out = to_bytes(between_pixels(row, around(first, w), d));
                }
            }
        }
    }

    /// x' = x: each column by itself.
    fn upright(image: &[Lanes<f32>], size: [usize; 2], map: &Map, fill: [u8; 3], out: &mut [u8]) {
        let [h, w] = size;
        for (y, out) in out.chunks_exact_mut(w * CHANNELS).enumerate() {
            for (x, out) in out.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
                let at = map[3] * (x as f64 + 0.5) + map[4] * (y as f64 + 0.5) + map[5];
                *out = fill;
                if inside(at, h) {
                    let (first, d) = split(at);
                    let [y0, y1, y2, y3] = around(first, h);
                    *out = to_bytes(between_pixels(image, [y0 * w + x, y1 * w + x, y2 * w + x, y3 * w + x], d));
                }
            }
        }
    }

    fn anywhere(image: &[Lanes<f32>], size: [usize; 2], map: &Map, fill: [u8; 3], out: &mut [u8]) {
        let [h, w] = size;
        for (y, out) in out.chunks_exact_mut(w * CHANNELS).enumerate() {
            for (x, out) in out.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
                let (px, py) = (x as f64 + 0.5, y as f64 + 0.5);
                let at = [map[3] * px + map[4] * py + map[5], map[0] * px + map[1] * py + map[2]];
                *out = fill;
                if inside(at[0], h) && inside(at[1], w) {
                    let ((row, dy), (column, dx)) = (split(at[0]), split(at[1]));
                    let (rows, columns) = (around(row, h), around(column, w));
                    let mut lines = [[0.0; 4]; 4];
                    for (line, y) in lines.iter_mut().zip(rows) {
                        *line = between_pixels(&image[y * w..(y + 1) * w], columns, dx);
                    }
                    *out = to_bytes(between(lines, dy));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|&v| [v; 3]).collect()
    }

    #[test]
    fn half_a_pixel_to_the_left_is_the_published_row() {
        let row = grey(&[10, 20, 40, 80, 160, 200, 220, 250]);
        let moved = transform(&row, [1, 8], &translate_x(0.5), FILL);
        assert_eq!(moved[..21], grey(&[12, 26, 52, 120, 187, 211, 237])[..]);
        assert_eq!(moved[21..], FILL);
    }

    #[test]
    fn the_short_cuts_are_the_whole_map() {
        let (h, w) = (11, 14);
        let image: Vec<u8> = (0..h * w * 3).map(|i| (i * i * 31 % 253) as u8).collect();
        for map in [shear_x(0.3), shear_y(-0.27), translate_x(3.3), translate_y(-2.6), translate_x(40.0), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]] {
            let mut out = vec![0; image.len()];
            anywhere(&widened(&image), [h, w], &map, FILL, &mut out);
            assert_eq!(transform(&image, [h, w], &map, FILL), out, "{map:?}");
        }
    }

    #[test]
    fn four_quarter_turns_are_none() {
        let image: Vec<u8> = (0..9 * 9 * 3).map(|i| (i * 7 % 256) as u8).collect();
        let turned = (0..4).fold(image.clone(), |image, _| transform(&image, [9, 9], &rotate([9, 9], 90.0), FILL));
        assert_eq!(turned, image);
        assert_ne!(transform(&image, [9, 9], &rotate([9, 9], 90.0), FILL), image);
    }
}
