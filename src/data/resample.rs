//! The two passes of a resize: weighted sums of bytes along one axis, each rounded to a byte, as Pillow takes them.
//!
//! For one axis from n to m samples, s = n/m, f = max(s, 1):
//!
//!   centre   c = (i + 1/2) s
//!   window   max(trunc(c - 2f + 1/2), 0) .. min(trunc(c + 2f + 1/2), n)
//!   weight   k((j - c + 1/2) / f), k the Keys cubic with a = -1/2, divided by the window's sum, rounded to 22 fractional bits
//!   byte     clamp((2^21 + sum weight * byte) >> 22, 0, 255)
//!
//! Lanes of the vertical pass are the bytes of a row. Lanes of the horizontal pass are 16 rows: a strip of them is transposed, summed and transposed
//! back. Rows of the image between the passes are padded to whole blocks, so that neither pass has a ragged end.

use crate::error::Result;
use crate::{ensure, vectorised};
use std::cell::RefCell;
use std::ops::Range;

const BITS: u32 = 22;
const HALF: i32 = 1 << (BITS - 1);

/// Rows of a strip.
const ROWS: usize = 16;
/// Bytes of a row that the vertical pass sums at a time.
const BLOCK: usize = 64;

/// The windows and integer weights that make some of the samples of an axis.
pub(super) struct Axis {
    /// First source sample of each output, and where its weights end.
    outputs: Vec<(usize, usize)>,
    weights: Vec<i32>,
}

impl Axis {
    /// From n to m samples, of which `wanted` are made.
    pub fn new(n: usize, m: usize, wanted: Range<usize>) -> Result<Self> {
        let scale = n as f64 / m as f64;
        let filter = scale.max(1.0);
        let support = 2.0 * filter;
        let mut axis = Self { outputs: Vec::with_capacity(wanted.len()), weights: Vec::new() };
        let mut window = Vec::new();
        for i in wanted {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(n);
            window.clear();
            window.extend((first..end).map(|j| cubic((j as f64 - centre + 0.5) * (1.0 / filter))));
            let total: f64 = window.iter().sum();
            let start = axis.weights.len();
            // To the nearest, halves away from zero.
            axis.weights.extend(window.iter().map(|weight| {
                let scaled = weight / total * f64::from(1 << BITS);
                (scaled + 0.5f64.copysign(scaled)) as i32
            }));
            axis.outputs.push((first, axis.weights.len()));
            // No partial sum over bytes can leave 32 bits.
            let largest = axis.weights[start..].iter().map(|&weight| i64::from(weight).abs()).sum::<i64>() * 255 + i64::from(HALF);
            ensure!(largest <= i64::from(i32::MAX), "resize: the weights from {n} to {m} samples do not fit into 32-bit sums");
        }
        Ok(axis)
    }

    /// First source sample and weights of each output.
    pub fn windows(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let mut start = 0;
        self.outputs.iter().map(move |&(first, end)| (first, &self.weights[std::mem::replace(&mut start, end)..end]))
    }

    /// How many samples are made.
    pub fn len(&self) -> usize {
        self.outputs.len()
    }

    /// The source samples that are looked at.
    pub fn sources(&self) -> Range<usize> {
        let first = self.outputs.first().map_or(0, |&(first, _)| first);
        first..self.windows().map(|(first, weights)| first + weights.len()).max().unwrap_or(first)
    }
}

/// The Keys cubic with a = -1/2.
#[inline]
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[inline(always)]
fn to_byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Rows of whole blocks of bytes.
pub(super) struct Padded {
    blocks: Vec<[u8; BLOCK]>,
    /// Blocks of a row, and bytes of it that count.
    stride: usize,
    bytes: usize,
}

thread_local! {
    /// Blocks of the last image of this thread: fresh memory costs as much time as a pass.
    static SPARE: RefCell<Vec<[u8; BLOCK]>> = const { RefCell::new(Vec::new()) };
}
/// More blocks than this are not kept: 16 MiB.
const MOST_SPARE: usize = 1 << 18;

impl Drop for Padded {
    fn drop(&mut self) {
        if self.blocks.capacity() <= MOST_SPARE {
            SPARE.set(std::mem::take(&mut self.blocks));
        }
    }
}

impl Padded {
    /// Rows of arbitrary content.
    fn new(rows: usize, bytes: usize) -> Self {
        let stride = bytes.div_ceil(BLOCK);
        let mut blocks = SPARE.take();
        blocks.resize(rows * stride, [0; BLOCK]);
        Self { blocks, stride, bytes }
    }

    fn row_mut(&mut self, y: usize) -> &mut [u8] {
        let stride = self.stride;
        self.blocks[y * stride..][..stride].as_flattened_mut()
    }

    /// The rows that are given, as they are.
    pub fn copied<'a>(rows: impl ExactSizeIterator<Item = &'a [u8]>, bytes: usize) -> Self {
        let mut padded = Self::new(rows.len(), bytes);
        for (y, row) in rows.enumerate() {
            padded.row_mut(y)[..bytes].copy_from_slice(row);
        }
        padded
    }

    /// The horizontal pass over the rows that are given.
    pub fn horizontal<'a>(rows: impl ExactSizeIterator<Item = &'a [u8]>, channels: usize, axis: &Axis) -> Self {
        let mut padded = Self::new(rows.len(), axis.len() * channels);
        let (sources, mut rows) = (axis.sources(), rows.peekable());
        let columns = sources.start * channels..sources.end * channels;
        // One line a byte of a row, its numbers those of the strip's rows.
        let mut strip = vec![[0; ROWS]; columns.len().next_multiple_of(ROWS)];
        let mut summed = vec![[0; ROWS]; padded.stride * BLOCK];
        let mut first = 0;
        while rows.peek().is_some() {
            let mut lines: [&[u8]; ROWS] = [&[]; ROWS];
            let mut count = 0;
            for (line, row) in lines.iter_mut().zip(&mut rows) {
                *line = &row[columns.clone()];
                count += 1;
            }
            // Lanes without a row of their own repeat one.
            let last = lines[count - 1];
            lines[count..].fill(last);
            to_columns(&lines, &mut strip);
            sum_columns(&strip, sources.start, channels, axis, &mut summed);
            let stride = padded.stride;
            to_rows(&summed, &mut padded.blocks[first * stride..(first + count) * stride], stride);
            first += count;
        }
        padded
    }

    /// The vertical pass; row 0 belongs to source sample `start`.
    pub fn vertical(&self, start: usize, axis: &Axis, out: &mut [u8]) {
        sum_rows(self, start, axis, out);
    }

    /// The bytes that count.
    pub fn copy_to(&self, out: &mut [u8]) {
        for (row, out) in self.blocks.chunks_exact(self.stride).zip(out.chunks_exact_mut(self.bytes)) {
            out.copy_from_slice(&row.as_flattened()[..self.bytes]);
        }
    }
}

/// Rows and columns of a square exchanged, by four perfect shuffles of its elements.
#[inline(always)]
fn transposed(mut square: [[u8; ROWS]; ROWS]) -> [[u8; ROWS]; ROWS] {
    const HALF: usize = ROWS / 2;
    for _ in 0..ROWS.ilog2() {
        let mut next = [[0; ROWS]; ROWS];
        for i in 0..HALF {
            let (a, b) = (square[i], square[i + HALF]);
            for j in 0..HALF {
                next[2 * i][2 * j] = a[j];
                next[2 * i][2 * j + 1] = b[j];
                next[2 * i + 1][2 * j] = a[j + HALF];
                next[2 * i + 1][2 * j + 1] = b[j + HALF];
            }
        }
        square = next;
    }
    square
}

vectorised! {
    /// A strip of rows as lines, one a byte.
    fn to_columns(rows: &[&[u8]; ROWS], columns: &mut [[u8; ROWS]]) {
        for (i, square) in columns.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
            let mut tile = [[0; ROWS]; ROWS];
            for (line, row) in tile.iter_mut().zip(rows) {
                let rest = &row[i * ROWS..];
                match rest.first_chunk() {
                    Some(whole) => *line = *whole,
                    None => line[..rest.len()].copy_from_slice(rest),
                }
            }
            *square = transposed(tile);
        }
    }

    /// Lines, one a byte, as rows of `stride` blocks.
    fn to_rows(columns: &[[u8; ROWS]], rows: &mut [[u8; BLOCK]], stride: usize) {
        for (block, squares) in columns.as_chunks::<BLOCK>().0.iter().enumerate() {
            for (i, square) in squares.as_chunks::<ROWS>().0.iter().enumerate() {
                let tile = transposed(*square);
                for (row, line) in rows.chunks_exact_mut(stride).zip(&tile) {
                    row[block].as_chunks_mut::<ROWS>().0[i] = *line;
                }
            }
        }
    }

    /// The weighted sums of lines; line 0 belongs to source sample `start`.
    fn sum_columns(lines: &[[u8; ROWS]], start: usize, channels: usize, axis: &Axis, out: &mut [[u8; ROWS]]) {
        match channels {
            1 => sum_columns_of::<1>(lines, start, axis, out),
            3 => sum_columns_of::<3>(lines, start, axis, out),
            _ => {
                for c in 0..channels {
                    for (i, (first, weights)) in axis.windows().enumerate() {
                        let mut sums = [HALF; ROWS];
                        let window = lines[(first - start) * channels + c..].iter().step_by(channels);
                        for (line, &weight) in window.zip(weights) {
                            add(&mut sums, line, weight);
                        }
                        out[i * channels + c] = sums.map(to_byte);
                    }
                }
            }
        }
    }

    /// The weighted sums of rows; row 0 belongs to source sample `start`.
    fn sum_rows(image: &Padded, start: usize, axis: &Axis, out: &mut [u8]) {
        let stride = image.stride;
        for ((first, weights), out) in axis.windows().zip(out.chunks_exact_mut(image.bytes)) {
            let window = &image.blocks[(first - start) * stride..][..weights.len() * stride];
            for (i, out) in out.chunks_mut(BLOCK).enumerate() {
                let mut sums = [HALF; BLOCK];
                for (row, &weight) in window.chunks_exact(stride).zip(weights) {
                    add(&mut sums, &row[i], weight);
                }
                let bytes = sums.map(to_byte);
                let count = out.len();
                match out.first_chunk_mut() {
                    Some(whole) => *whole = bytes,
                    None => out.copy_from_slice(&bytes[..count]),
                }
            }
        }
    }
}

#[inline(always)]
fn add<const N: usize>(sums: &mut [i32; N], bytes: &[u8; N], weight: i32) {
    for (sum, &byte) in sums.iter_mut().zip(bytes) {
        *sum += weight * i32::from(byte);
    }
}

#[inline(always)]
fn sum_columns_of<const C: usize>(lines: &[[u8; ROWS]], start: usize, axis: &Axis, out: &mut [[u8; ROWS]]) {
    let (pixels, outputs) = (lines.as_chunks::<C>().0, out.as_chunks_mut::<C>().0);
    for ((first, weights), out) in axis.windows().zip(outputs) {
        let mut sums = [[HALF; ROWS]; C];
        for (pixel, &weight) in pixels[first - start..][..weights.len()].iter().zip(weights) {
            for (sums, line) in sums.iter_mut().zip(pixel) {
                add(sums, line, weight);
            }
        }
        *out = sums.map(|sums| sums.map(to_byte));
    }
}

#[cfg(test)]
mod tests {
    use super::super::resize::{Crop, MAX_CHANNELS, crop, resize, resize_crop};
    use super::*;
    use crate::rng::Rng;

    /// One axis of [outer, n, inner] by the definition, in 64 bits.
    fn pass(bytes: &[u8], n: usize, m: usize, inner: usize) -> Vec<u8> {
        let axis = Axis::new(n, m, 0..m).unwrap();
        let mut out = Vec::new();
        for image in bytes.chunks_exact(n * inner) {
            for (first, weights) in axis.windows() {
                for at in 0..inner {
                    let taken =
                        weights.iter().enumerate().map(|(j, &weight)| i64::from(weight) * i64::from(image[(first + j) * inner + at]));
                    out.push(((taken.sum::<i64>() + (1 << 21)) >> 22).clamp(0, 255) as u8);
                }
            }
        }
        out
    }

    #[test]
    fn both_passes_are_the_sums_of_the_definition_at_any_size_and_number_of_channels() {
        let mut draws = Rng::new(0).stream("sizes", 0);
        for number in 0..120 {
            let channels = 1 + number % MAX_CHANNELS;
            let size = [1 + draws.below(50), 1 + draws.below(70)];
            let to = [1 + draws.below(40), 1 + draws.below(60)];
            let bytes: Vec<u8> = (0..size[0] * size[1] * channels).map(|_| draws.below(256) as u8).collect();
            let wide = if size[1] == to[1] { bytes.clone() } else { pass(&bytes, size[1], to[1], channels) };
            let wanted = if size[0] == to[0] { wide } else { pass(&wide, size[0], to[0], to[1] * channels) };
            assert!(resize(&bytes, size, channels, to).unwrap() == wanted, "{size:?} to {to:?}, {channels} channels");
            let (top, left) = (draws.below(to[0]), draws.below(to[1]));
            let part = Crop { top, left, height: 1 + draws.below(to[0] - top), width: 1 + draws.below(to[1] - left) };
            let cut = crop(&wanted, to, channels, part).unwrap();
            assert!(resize_crop(&bytes, size, channels, to, part).unwrap() == cut, "{part:?} of {size:?} to {to:?}, {channels} channels");
        }
    }

    #[test]
    fn a_square_is_transposed() {
        let square: [[u8; ROWS]; ROWS] = std::array::from_fn(|i| std::array::from_fn(|j| (i * ROWS + j) as u8));
        let turned = transposed(square);
        assert!((0..ROWS).all(|i| (0..ROWS).all(|j| turned[i][j] == square[j][i])));
    }
}
