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
    if map[1] == 0.0 && map[3] == 0.0 && *map == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0] {
        out.copy_from_slice(pixels);
    } else if map[3] == 0.0 && map[4] == 1.0 && map[5] == 0.0 {
        sideways(pixels, size, map, fill, &mut out);
    } else if map[1] == 0.0 && map[0] == 1.0 && map[2] == 0.0 {
        upright(pixels, size, map, fill, &mut out);
    } else {
        anywhere(pixels, size, map, fill, &mut out);
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
    std::array::from_fn(|i| (first - 1 + i as isize).clamp(0, len as isize - 1) as usize)
}

/// Between four bytes, of three channels.
#[inline(always)]
fn between_bytes(taps: [&[u8; 3]; 4], d: f64) -> [f64; 3] {
    std::array::from_fn(|c| {
        let [v1, v2, v3, v4] = taps.map(|tap| i32::from(tap[c]));
        let (p2, p3, p4) = (v3 - v1, 2 * (v1 - v2) + v3 - v4, v2 - v1 + v4 - v3);
        f64::from(v2) + d * (f64::from(p2) + d * (f64::from(p3) + d * f64::from(p4)))
    })
}

#[inline(always)]
fn between([v1, v2, v3, v4]: [f64; 4], d: f64) -> f64 {
    let p2 = -v1 + v3;
    let p3 = 2.0 * (v1 - v2) + v3 - v4;
    let p4 = -v1 + v2 - v3 + v4;
    v2 + d * (p2 + d * (p3 + d * p4))
}

#[inline(always)]
fn to_bytes(pixel: [f64; 3]) -> [u8; 3] {
    pixel.map(|v| v.clamp(0.0, 255.0) as i32 as u8)
}

#[inline(always)]
fn inside(at: f64, len: usize) -> bool {
    at >= 0.0 && at < len as f64
}

vectorised! {
    /// y' = y: each row by itself.
    fn sideways(pixels: &[u8], size: [usize; 2], map: &Map, fill: [u8; 3], out: &mut [u8]) {
        let [_, w] = size;
        let rows = pixels.chunks_exact(w * CHANNELS).zip(out.chunks_exact_mut(w * CHANNELS));
        for (y, (row, out)) in rows.enumerate() {
            let row = row.as_chunks::<CHANNELS>().0;
            for (x, out) in out.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
                let at = map[0] * (x as f64 + 0.5) + map[1] * (y as f64 + 0.5) + map[2];
                *out = fill;
                if inside(at, w) {
                    let (first, d) = split(at);
                    *out = to_bytes(between_bytes(around(first, w).map(|x| &row[x]), d));
                }
            }
        }
    }

    /// x' = x: each column by itself.
    fn upright(pixels: &[u8], size: [usize; 2], map: &Map, fill: [u8; 3], out: &mut [u8]) {
        let [h, w] = size;
        let image = pixels.as_chunks::<CHANNELS>().0;
        for (y, out) in out.chunks_exact_mut(w * CHANNELS).enumerate() {
            for (x, out) in out.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
                let at = map[3] * (x as f64 + 0.5) + map[4] * (y as f64 + 0.5) + map[5];
                *out = fill;
                if inside(at, h) {
                    let (first, d) = split(at);
                    *out = to_bytes(between_bytes(around(first, h).map(|y| &image[y * w + x]), d));
                }
            }
        }
    }

    fn anywhere(pixels: &[u8], size: [usize; 2], map: &Map, fill: [u8; 3], out: &mut [u8]) {
        let [h, w] = size;
        let image = pixels.as_chunks::<CHANNELS>().0;
        for (y, out) in out.chunks_exact_mut(w * CHANNELS).enumerate() {
            for (x, out) in out.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
                let (px, py) = (x as f64 + 0.5, y as f64 + 0.5);
                let at = [map[3] * px + map[4] * py + map[5], map[0] * px + map[1] * py + map[2]];
                *out = fill;
                if inside(at[0], h) && inside(at[1], w) {
                    let ((row, dy), (column, dx)) = (split(at[0]), split(at[1]));
                    let columns = around(column, w);
                    let lines = around(row, h).map(|y| between_bytes(columns.map(|x| &image[y * w + x]), dx));
                    *out = to_bytes(std::array::from_fn(|c| between(lines.map(|line| line[c]), dy)));
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
            anywhere(&image, [h, w], &map, FILL, &mut out);
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
