//! The built-in pictures, "glyphs": every one is computed from (seed, number), so there is nothing to download and nothing to keep.
//!
//! A picture shows one large object near the centre, a small one beside it, a bar, and a background that shades and waves. Its class is the shape AND
//! the texture of the large object (5 x 4); colours, pose, background and the small object are drawn apart from the class, and which of the object's
//! two colours is the light one is a toss. A texture turns, moves and grows with its object: a few visible patches determine the rest.
//!
//!   mix(z)      z ^= z >> 30; z *= 0xbf58476d1ce4e5b9; z ^= z >> 27; z *= 0x94d049bb133111eb; z ^= z >> 31
//!   h           mix(mix(seed + G) + G (number + 1)),   G = 0x9e3779b97f4a7c15
//!   U(slot)     (mix(h + G (slot + 1)) >> 40) 2^-24,   one slot for each thing that is drawn
//!   X, Y        (j + 0.5) / S 2 - 1 to the right, (i + 0.5) / S 2 - 1 down
//!
//! Layers are painted in the order of [`Glyphs::paint`], in f32 and with the sine of this file, so that a picture has the same bytes on every machine.
//! A picture of another size shows the same scene. Channel k of a colour is U(slot + k) for the first three and U(slot + 2^56 k) beyond.

use super::resize::MAX_CHANNELS;
use super::{Dataset, Picture};
use crate::ensure;
use crate::error::Result;
use std::f32::consts::TAU;
use std::ops::Range;

pub const SHAPES: [&str; 5] = ["disc", "square", "triangle", "cross", "ring"];
pub const TEXTURES: [&str; 4] = ["plain", "stripes", "checker", "dots"];

/// Images of the training pool, of which the first [`LABELLED`] are those whose labels a run may use, and images of the test set.
pub const POOL: usize = 16_384;
pub const LABELLED: usize = 2_000;
pub const TEST: usize = 2_000;

/// A network is given (byte / 255 - MEAN) / STD.
pub const MEAN: f32 = 0.5;
pub const STD: f32 = 0.25;

/// What the pictures are and how hard they are. The default is the training pool.
#[derive(Clone, PartialEq, Debug)]
pub struct GlyphsConfig {
    pub seed: u64,
    pub len: usize,
    /// Side of a picture in pixels.
    pub size: usize,
    pub channels: usize,
    /// The large object stands up to this far from the centre, in each direction; the picture reaches from -1 to 1.
    pub position: f32,
    /// Objects are turned by up to this angle.
    pub rotation: f32,
    /// Least and largest radius of the large object.
    pub radius: [f32; 2],
    /// How many bars lie on the background.
    pub bars: usize,
    /// Whether there is a small object.
    pub small: bool,
    /// Width of the noise; 1 is the range from black to white.
    pub noise: f32,
    /// Height of the background's wave.
    pub wave: f32,
}

impl Default for GlyphsConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            len: POOL,
            size: 48,
            channels: 3,
            position: 0.1,
            rotation: 0.12,
            radius: [0.62, 0.76],
            bars: 1,
            small: true,
            noise: 0.04,
            wave: 0.03,
        }
    }
}

impl GlyphsConfig {
    /// The training pool, where `train`, or the test set, whose seed is another one.
    pub fn of(train: bool) -> Self {
        if train { Self::default() } else { Self { seed: 1, len: TEST, ..Self::default() } }
    }

    /// The part of the training pool that comes with labels.
    pub fn labelled() -> Self {
        Self { len: LABELLED, ..Self::default() }
    }

    fn check(&self) -> Result<()> {
        let Self { len, size, channels, position, rotation, radius: [least, most], bars, noise, wave, .. } = *self;
        ensure!((1..=u32::MAX as usize).contains(&len), "synthetic images: {len} were asked for; 1 to {} can be had", u32::MAX);
        ensure!((8..=1024).contains(&size), "synthetic images: a side of {size} pixels was asked for; 8 to 1024 can be had");
        ensure!(
            (1..=MAX_CHANNELS).contains(&channels),
            "synthetic images: {channels} channels were asked for; 1 to {MAX_CHANNELS} can be had"
        );
        ensure!((0.0..=1.0).contains(&position), "synthetic images: a position within {position} of the centre; it must be from 0 to 1");
        ensure!(
            (0.0..=TAU / 2.0).contains(&rotation),
            "synthetic images: a rotation of up to {rotation}; it must be from 0 to {} (half a turn)",
            TAU / 2.0
        );
        ensure!(
            least > 0.0 && least <= most && most <= 2.0,
            "synthetic images: radii from {least} to {most}; they must be above 0, up to 2 and in this order"
        );
        ensure!(bars <= 16, "synthetic images: {bars} bars were asked for; up to 16 can be had");
        ensure!((0.0..=1.0).contains(&noise), "synthetic images: noise of {noise}; it must be from 0 to 1");
        ensure!((0.0..=1.0).contains(&wave), "synthetic images: a wave of {wave}; it must be from 0 to 1");
        Ok(())
    }
}

pub struct Glyphs {
    config: GlyphsConfig,
    classes: Vec<String>,
}

impl Glyphs {
    pub fn new(config: GlyphsConfig) -> Result<Self> {
        config.check()?;
        let classes = SHAPES.iter().flat_map(|shape| TEXTURES.map(|texture| format!("{shape} {texture}"))).collect();
        Ok(Self { config, classes })
    }

    /// The training pool, where `train`, or the test set, at their usual size.
    pub fn open(train: bool) -> Result<Self> {
        Self::new(GlyphsConfig::of(train))
    }

    pub fn config(&self) -> &GlyphsConfig {
        &self.config
    }

    fn draws(&self, index: usize) -> Draws {
        Draws(mix(mix(self.config.seed.wrapping_add(GOLDEN)).wrapping_add(GOLDEN.wrapping_mul(index as u64 + 1))))
    }

    /// The picture's planes before noise and rounding, from 0 to 1.
    fn paint(&self, draws: &Draws) -> Canvas {
        let GlyphsConfig { size, channels, position, radius: [least, most], bars, small, wave, .. } = self.config;
        let mut canvas = Canvas::new(size, channels);
        canvas.background(draws, wave);
        for bar in 0..bars as u64 {
            canvas.bar(draws, 30 + (bar << 40));
        }
        let centre = [draws.between(100, -position, position), draws.between(101, -position, position)];
        if small {
            let (angle, distance) = (draws.unit(200), draws.between(201, 0.75, 0.95));
            let beside = [centre[0] + distance * cos(angle), centre[1] + distance * sin(angle)].map(|x| x.clamp(-0.85, 0.85));
            self.object(&mut canvas, draws, 203, [draws.below(231, 5), draws.below(232, 4)], beside, draws.between(202, 0.20, 0.28));
        }
        self.object(&mut canvas, draws, 100, [draws.below(0, 5), draws.below(1, 4)], centre, draws.between(102, least, most));
        canvas
    }

    fn object(&self, canvas: &mut Canvas, draws: &Draws, slot: u64, kind: [usize; 2], centre: [f32; 2], radius: f32) {
        let rotation = self.config.rotation;
        let angle = draws.between(slot + 3, -rotation, rotation) / TAU;
        let light = draws.colour(slot + 8).map(|u| 0.65 + 0.35 * u);
        let dark = draws.colour(slot + 11).map(|u| 0.35 * u);
        let colours = if draws.unit(slot + 14) < 0.5 { [dark, light] } else { [light, dark] };
        canvas.object(kind, centre, radius, angle, &colours);
    }
}

impl Dataset for Glyphs {
    fn len(&self) -> usize {
        self.config.len
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        let draws = self.draws(index);
        (TEXTURES.len() * draws.below(0, SHAPES.len()) + draws.below(1, TEXTURES.len())) as u32
    }

    fn name(&self, index: usize) -> String {
        format!("synthetic image {index} of seed {}", self.config.seed)
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        let GlyphsConfig { len, size, channels, noise, .. } = self.config;
        ensure!(index < len, "{}: there are only {len}", self.name(index));
        let draws = self.draws(index);
        let canvas = self.paint(&draws);
        let mut pixels = vec![0u8; size * size * channels];
        for (at, pixel) in pixels.chunks_exact_mut(channels).enumerate() {
            // One word is noise for three channels.
            for (third, levels) in pixel.chunks_mut(3).enumerate() {
                let word = draws.word(1000 + at as u64 + ((third as u64) << 56));
                for (k, level) in levels.iter_mut().enumerate() {
                    let u = (word >> (21 * k) & 0x1f_ffff) as f32 * (1.0 / 2_097_152.0) - 0.5;
                    let value = canvas.planes[(3 * third + k) * size * size + at] + noise * u;
                    *level = (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
                }
            }
        }
        Picture::new([size, size], channels, pixels)
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

type Colour = [f32; MAX_CHANNELS];

/// What is drawn for one picture, by slot.
struct Draws(u64);

impl Draws {
    fn word(&self, slot: u64) -> u64 {
        mix(self.0.wrapping_add(GOLDEN.wrapping_mul(slot.wrapping_add(1))))
    }

    fn unit(&self, slot: u64) -> f32 {
        (self.word(slot) >> 40) as f32 * (1.0 / 16_777_216.0)
    }

    fn between(&self, slot: u64, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit(slot)
    }

    fn below(&self, slot: u64, n: usize) -> usize {
        ((n as f32 * self.unit(slot)) as usize).min(n - 1)
    }

    fn colour(&self, slot: u64) -> Colour {
        std::array::from_fn(|k| self.unit(if k < 3 { slot + k as u64 } else { slot + ((k as u64) << 56) }))
    }
}

/// Planes [C, S, S] that are painted on, and a row's room for what is painted.
struct Canvas {
    size: usize,
    channels: usize,
    planes: Vec<f32>,
    /// X of a column, which is Y of a row.
    places: Vec<f32>,
    /// How much of each pixel of a row is covered, and with what.
    cover: Vec<f32>,
    weight: Vec<f32>,
}

impl Canvas {
    fn new(size: usize, channels: usize) -> Self {
        let places = (0..size).map(|j| (j as f32 + 0.5) / size as f32 * 2.0 - 1.0).collect();
        Self { size, channels, planes: vec![0.0; channels * size * size], places, cover: vec![0.0; size], weight: vec![0.0; size] }
    }

    /// Columns, or rows, whose places are within `reach` of `centre`; those just outside may be among them.
    fn around(&self, centre: f32, reach: f32) -> Range<usize> {
        let at = |x: f32| ((x + 1.0) * 0.5 * self.size as f32 - 0.5).clamp(0.0, self.size as f32) as usize;
        at(centre - reach)..(at(centre + reach) + 2).min(self.size)
    }

    /// Puts lerp(a, b, weight) over the columns of row `i`, as much of it as `cover` says.
    fn over(&mut self, i: usize, columns: Range<usize>, [a, b]: &[Colour; 2]) {
        let (first, n) = (i * self.size + columns.start, columns.len());
        for (channel, plane) in self.planes.chunks_exact_mut(self.size * self.size).enumerate() {
            let (a, b) = (a[channel], b[channel]);
            for ((pixel, &cover), &w) in plane[first..first + n].iter_mut().zip(&self.cover[..n]).zip(&self.weight[..n]) {
                *pixel = *pixel * (1.0 - cover) + (a * (1.0 - w) + b * w) * cover;
            }
        }
    }

    /// Two colours that go over into each other along a direction, and a wave that is the same on every channel.
    fn background(&mut self, draws: &Draws, height: f32) {
        let from = draws.colour(10).map(|u| 0.35 + 0.3 * u);
        let shift = draws.colour(13);
        let to: Colour = std::array::from_fn(|k| (from[k] + 0.4 * (shift[k] - 0.5)).clamp(0.0, 1.0));
        let (right, down) = (cos(draws.unit(16)), sin(draws.unit(16)));
        let (across, along, phase) = (draws.between(17, -1.5, 1.5), draws.between(18, -1.5, 1.5), draws.unit(19));
        // sin(a + b) = sin a cos b + cos a sin b: a sine and a cosine for each row and column are enough.
        let columns: Vec<[f32; 2]> = self.places.iter().map(|x| [sin(across * x), cos(across * x)]).collect();
        for i in 0..self.size {
            let y = self.places[i];
            let (row_sin, row_cos) = (sin(along * y + phase), cos(along * y + phase));
            for (j, [sin, cos]) in columns.iter().enumerate() {
                self.weight[j] = 0.5 + 0.35 * (self.places[j] * right + y * down);
                self.cover[j] = height * (sin * row_cos + cos * row_sin);
            }
            for channel in 0..self.channels {
                let row = &mut self.planes[(channel * self.size + i) * self.size..][..self.size];
                for ((pixel, &t), &wave) in row.iter_mut().zip(&self.weight).zip(&self.cover) {
                    *pixel = from[channel] * (1.0 - t) + to[channel] * t + wave;
                }
            }
        }
    }

    /// A thin bar at any place and angle.
    fn bar(&mut self, draws: &Draws, slot: u64) {
        let angle = draws.unit(slot) * 0.5;
        let (sin, cos) = (sin(angle), cos(angle));
        let [x0, y0] = [1, 2].map(|i| draws.between(slot + i, -0.9, 0.9));
        let half = draws.between(slot + 3, 0.3, 0.8);
        let colour = draws.colour(slot + 4).map(|u| 0.2 + 0.6 * u);
        let pixels = self.size as f32 * 0.5;
        let (wide, tall) = (half * cos.abs() + 0.03 * sin.abs() + 2.0 / pixels, half * sin.abs() + 0.03 * cos.abs() + 2.0 / pixels);
        let columns = self.around(x0, wide);
        for i in self.around(y0, tall) {
            let y = self.places[i] - y0;
            for (j, x) in self.places[columns.clone()].iter().map(|x| x - x0).enumerate() {
                let (d1, d2) = ((x * sin - y * cos).abs() - 0.03, (x * cos + y * sin).abs() - half);
                self.cover[j] = (0.5 - d1.max(d2) * pixels).clamp(0.0, 1.0);
                self.weight[j] = 0.0;
            }
            self.over(i, columns.clone(), &[colour; 2]);
        }
    }

    /// An object of a shape and a texture; `angle` is in turns.
    fn object(&mut self, [shape, texture]: [usize; 2], [cx, cy]: [f32; 2], radius: f32, angle: f32, colours: &[Colour; 2]) {
        let (sin, cos) = (sin(angle), cos(angle));
        let edge = radius * self.size as f32 * 0.5;
        // Nothing of the shape is further from its centre, the blurred edge included: a triangle's tip goes twice as far out as its sides.
        let reach = radius * [0.8, 1.005, 1.24, 1.042, 1.0][shape] + 2.0 / self.size as f32;
        let columns = self.around(cx, reach);
        for i in self.around(cy, reach) {
            let y = self.places[i] - cy;
            let (places, cover, weight) = (&self.places[columns.clone()], &mut self.cover[..], &mut self.weight[..]);
            let within = move |x: f32| [((x - cx) * cos + y * sin) / radius, (y * cos - (x - cx) * sin) / radius];
            shape_row(shape, places, within, edge, cover);
            texture_row(texture, places, within, weight);
            self.over(i, columns.clone(), colours);
        }
    }
}

/// How much of each pixel of a row lies in the shape. All shapes have about the same area.
fn shape_row(shape: usize, places: &[f32], within: impl Fn(f32) -> [f32; 2], edge: f32, cover: &mut [f32]) {
    let inside = |distance: f32| (0.5 - distance * edge).clamp(0.0, 1.0);
    match shape {
        0 => row(places, within, cover, |x, y| inside((x * x + y * y).sqrt() - 0.80)),
        1 => row(places, within, cover, |x, y| inside(x.abs().max(y.abs()) - 0.71)),
        2 => row(places, within, cover, |x, y| inside((-y).max(0.866_025_4 * x.abs() + 0.5 * y) - 0.62)),
        3 => row(places, within, cover, |x, y| {
            let (x, y) = (x.abs(), y.abs());
            inside((x - 1.0).max(y - 0.29).min((y - 1.0).max(x - 0.29)))
        }),
        _ => row(places, within, cover, |x, y| inside(((x * x + y * y).sqrt() - 0.8).abs() - 0.2)),
    }
}

/// The share of the second colour in each pixel of a row.
fn texture_row(texture: usize, places: &[f32], within: impl Fn(f32) -> [f32; 2], weight: &mut [f32]) {
    let (u, v) = (|x: f32| 1.5 * x + 0.25, |y: f32| 1.5 * y + 0.25);
    match texture {
        0 => weight.fill(0.0),
        1 => row(places, within, weight, |x, _| (0.5 + 2.0 * sin(u(x))).clamp(0.0, 1.0)),
        2 => row(places, within, weight, |x, y| (0.5 + 4.0 * sin(u(x)) * sin(v(y))).clamp(0.0, 1.0)),
        _ => row(places, within, weight, |x, y| {
            let (a, b) = (u(x) - 0.5 - nearest(u(x) - 0.5), v(y) - 0.5 - nearest(v(y) - 0.5));
            (0.5 + 6.0 * (0.36 - (a * a + b * b).sqrt())).clamp(0.0, 1.0)
        }),
    }
}

fn row(places: &[f32], within: impl Fn(f32) -> [f32; 2], out: &mut [f32], value: impl Fn(f32, f32) -> f32) {
    for (out, &x) in out.iter_mut().zip(places) {
        let [x, y] = within(x);
        *out = value(x, y);
    }
}

/// The whole number nearest to `x`, which is below 2^22.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// The sine of an angle in turns, the same on every machine; the series is off by less than 1e-7 within a quarter of a turn.
fn sin(turns: f32) -> f32 {
    let r = turns - nearest(turns);
    let x = TAU * (0.25 - (r.abs() - 0.25).abs()).copysign(r);
    let s = x * x;
    x * (1.0 - s * (1.0 / 6.0 - s * (1.0 / 120.0 - s * (1.0 / 5040.0 - s * (1.0 / 362_880.0 - s * (1.0 / 39_916_800.0))))))
}

fn cos(turns: f32) -> f32 {
    sin(turns + 0.25)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_are_those_of_the_definition() {
        let draws = Glyphs::open(true).unwrap().draws(0);
        assert_eq!(draws.0, 0xa706_dd2f_4d19_7e6f);
        for (slot, wanted) in [(0, 0.13870936632), (1, 0.97110205889), (10, 0.66977882385)] {
            assert!((draws.unit(slot) as f64 - wanted).abs() < 1e-10, "{slot}");
        }
    }

    #[test]
    fn pictures_are_those_of_the_prototype() {
        let glyphs = Glyphs::open(true).unwrap();
        let labels: Vec<u32> = (0..10).map(|i| glyphs.label(i)).collect();
        assert_eq!(labels, [3, 2, 1, 18, 18, 1, 4, 12, 12, 2]);
        let means = [116.137, 139.080, 117.731, 139.601];
        let centres = [[223, 190, 207], [75, 74, 45], [71, 22, 34], [142, 129, 186]];
        let corners = [[142, 109, 113], [139, 178, 96], [107, 113, 108], [125, 121, 159]];
        for i in 0..4 {
            let pixels = glyphs.picture(i).unwrap().pixels;
            let mean = pixels.iter().map(|&x| x as f64).sum::<f64>() / pixels.len() as f64;
            assert!((mean - means[i]).abs() < 0.01, "image {i}: {mean} but {}", means[i]);
            let near = |at: usize, wanted: [u8; 3]| pixels[3 * at..3 * at + 3].iter().zip(wanted).all(|(x, y)| x.abs_diff(y) <= 1);
            assert!(near(24 * 48 + 24, centres[i]) && near(0, corners[i]), "image {i}");
        }
    }

    #[test]
    fn the_sine_is_the_sine() {
        for i in -3000..3000 {
            let turns = i as f32 * 0.00137;
            let wanted = (turns as f64 * std::f64::consts::TAU).sin();
            assert!((sin(turns) as f64 - wanted).abs() < 4e-7, "{turns}: {} but {wanted}", sin(turns));
        }
    }

    #[test]
    fn painting_within_a_box_leaves_nothing_out() {
        let size = 61;
        let colours = [[0.25; MAX_CHANNELS], [0.75; MAX_CHANNELS]];
        for (shape, texture) in [(0, 0), (1, 1), (2, 2), (2, 3), (3, 1), (4, 3)] {
            for (centre, radius, angle) in [([0.1, -0.05], 0.7, 0.02), ([0.85, -0.8], 0.2, -0.11), ([-0.9, 0.9], 1.9, 0.37)] {
                let mut canvas = Canvas::new(size, 1);
                canvas.object([shape, texture], centre, radius, angle, &colours);
                let painted = std::mem::take(&mut canvas.planes);
                let whole = whole_picture([shape, texture], centre, radius, angle, size);
                for (at, (a, b)) in painted.iter().zip(&whole).enumerate() {
                    assert!((a - b).abs() < 1e-4, "shape {shape}, texture {texture}, pixel {at}: {a} but {b}");
                }
            }
        }
    }

    /// The object of 0.25 and 0.75 on black, every pixel visited, in f64.
    fn whole_picture([shape, texture]: [usize; 2], centre: [f32; 2], radius: f32, angle: f32, size: usize) -> Vec<f32> {
        let (sin, cos) = (angle as f64 * std::f64::consts::TAU).sin_cos();
        let (radius, side) = (radius as f64, size as f64);
        let pixel = |at: usize| {
            let x = ((at % size) as f64 + 0.5) / side * 2.0 - 1.0 - centre[0] as f64;
            let y = ((at / size) as f64 + 0.5) / side * 2.0 - 1.0 - centre[1] as f64;
            let (x, y) = ((x * cos + y * sin) / radius, (y * cos - x * sin) / radius);
            let (ax, ay, rho) = (x.abs(), y.abs(), x.hypot(y));
            let distance = match shape {
                0 => rho - 0.8,
                1 => ax.max(ay) - 0.71,
                2 => (-y).max(0.8660254 * ax + 0.5 * y) - 0.62,
                3 => (ax - 1.0).max(ay - 0.29).min((ay - 1.0).max(ax - 0.29)),
                _ => (rho - 0.8).abs() - 0.2,
            };
            let (u, v) = (1.5 * x + 0.25, 1.5 * y + 0.25);
            let wave = |t: f64| (std::f64::consts::TAU * t).sin();
            let weight = match texture {
                0 => 0.0,
                1 => 0.5 + 2.0 * wave(u),
                2 => 0.5 + 4.0 * wave(u) * wave(v),
                _ => 0.5 + 6.0 * (0.36 - (u - u.floor() - 0.5).hypot(v - v.floor() - 0.5)),
            };
            let cover = (0.5 - distance * radius * side / 2.0).clamp(0.0, 1.0);
            (cover * (0.25 + 0.5 * weight.clamp(0.0, 1.0))) as f32
        };
        (0..size * size).map(pixel).collect()
    }

    #[test]
    fn impossible_pictures_are_one_sentence_each() {
        let is_wrong = |change: fn(&mut GlyphsConfig)| {
            let mut config = GlyphsConfig::default();
            change(&mut config);
            let error = Glyphs::new(config).err().expect("an error").chain();
            assert!(error.starts_with("synthetic images: ") && !error.contains('\n'), "{error}");
        };
        is_wrong(|c| c.len = 0);
        is_wrong(|c| c.size = 7);
        is_wrong(|c| c.size = usize::MAX);
        is_wrong(|c| c.channels = 0);
        is_wrong(|c| c.channels = 17);
        is_wrong(|c| c.position = -0.1);
        is_wrong(|c| c.rotation = f32::NAN);
        is_wrong(|c| c.radius = [0.7, 0.6]);
        is_wrong(|c| c.radius = [0.0, 0.6]);
        is_wrong(|c| c.radius = [0.5, f32::INFINITY]);
        is_wrong(|c| c.bars = 17);
        is_wrong(|c| c.noise = 1.5);
        is_wrong(|c| c.wave = -0.01);
        let error = Glyphs::open(false).unwrap().picture(TEST).unwrap_err().chain();
        assert!(error.contains("synthetic image 2000 of seed 1"), "{error}");
    }
}
