//! Histograms of oriented gradients as regression targets.
//!
//! Images are cut into cells of 8 x 8 pixels and patches of 2 x 2 cells. Each cell and channel has a histogram over 9 unsigned orientations: a pixel adds
//! the length of its gradient to the bin [20 k, 20 (k + 1)) degrees that its angle, modulo 180, falls into. Gradients cross the borders of cells.
//!
//! | | DMJD | MaskFeat |
//! |---|---|---|
//! | image | bytes 0..255 | normalised |
//! | gradient | difference of the two neighbours, 0 where one is missing | Sobel on the mirrored image |
//! | angle | of (vertical, horizontal) | of (horizontal, vertical) |
//! | weight of a pixel | 1/64 | a Gaussian over its patch, deviation 8 |
//! | normalised | (h - mean) / sqrt(var + eps) over the bins, eps 1e-5 | h / max(norm, eps), eps 1e-12 |
//! | order in a patch | (dh, dw, bin, channel) | (channel, bin, dh, dw) |
//!
//! The bin is found without an arctangent: once the gradient (a, b) lies in the upper half-plane, it is how many of the directions
//! 20 k degrees, k = 1..8, have it on their left, cos a - sin b >= 0. So f32 and f64 agree for every pair of differences of bytes.
//!
//! Images are [B, C, H, W], or bytes [B, H, W, C]; the target is [B, (H/16)(W/16), 4 * 9 * C] in raster order. GPU: kernels/hog.cu, bit for bit.

use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::Real;
use crate::error::Result;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    Dmjd,
    MaskFeat,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Options {
    pub variant: Variant,
    /// Orientations from 0 to 180 degrees.
    pub bins: usize,
    /// Side of a cell in pixels.
    pub cell: usize,
    pub eps: f64,
}

impl Options {
    pub fn dmjd() -> Self {
        Self { variant: Variant::Dmjd, bins: 9, cell: 8, eps: 1e-5 }
    }

    pub fn maskfeat() -> Self {
        Self { variant: Variant::MaskFeat, bins: 9, cell: 8, eps: 1e-12 }
    }
}

/// What is computed on the way, [B, C, H/8, W/8, 9] each, and the target.
pub struct Features {
    pub histograms: Tensor,
    pub normalised: Tensor,
    pub target: Tensor,
}

/// The regression target of each patch, [B, L, 4 * bins * C].
pub fn target(images: &Tensor, options: &Options) -> Result<Tensor> {
    let s = Sizes::of(images, options)?;
    match images.gpu() {
        None => Ok(on_cpu(images, options, &s)?.target),
        Some(gpu) => on_gpu(gpu, images, options, &s, None),
    }
}

/// The same with the histograms before and after their normalisation.
pub fn features(images: &Tensor, options: &Options) -> Result<Features> {
    let s = Sizes::of(images, options)?;
    let Some(gpu) = images.gpu() else { return on_cpu(images, options, &s) };
    let mut histograms = images.alike(&s.cells(), Dtype::F32)?;
    let mut normalised = images.alike(&s.cells(), Dtype::F32)?;
    let target = on_gpu(gpu, images, options, &s, Some([&mut histograms, &mut normalised]))?;
    Ok(Features { histograms, normalised, target })
}

struct Sizes {
    batch: usize,
    channels: usize,
    height: usize,
    width: usize,
    cell: usize,
    bins: usize,
}

impl Sizes {
    fn of(images: &Tensor, o: &Options) -> Result<Self> {
        let &[batch, b, c, d] = images.shape() else { crate::bail!("hog: the images are {images:?} but four axes are needed") };
        let [channels, height, width] = if images.dtype() == Dtype::U8 { [d, b, c] } else { [b, c, d] };
        ensure!(o.bins > 0 && (1..=1024).contains(&o.cell), "hog: {} bins in cells of {} pixels are not a histogram", o.bins, o.cell);
        ensure!(
            images.numel() > 0 && height.is_multiple_of(2 * o.cell) && width.is_multiple_of(2 * o.cell),
            "hog: the images are {images:?}; {height} x {width} pixels are not patches of 2 x 2 cells of {}",
            o.cell
        );
        Ok(Self { batch, channels, height, width, cell: o.cell, bins: o.bins })
    }

    fn cells(&self) -> [usize; 5] {
        [self.batch, self.channels, self.height / self.cell, self.width / self.cell, self.bins]
    }

    fn patches(&self) -> [usize; 3] {
        [self.batch, self.height / self.cell / 2 * (self.width / self.cell / 2), 4 * self.bins * self.channels]
    }
}

fn on_gpu(gpu: &Gpu, images: &Tensor, o: &Options, s: &Sizes, cells: Option<[&mut Tensor; 2]>) -> Result<Tensor> {
    ensure!(
        o.bins == 9 && matches!(o.cell, 4 | 8),
        "hog: {gpu:?} computes 9 bins in cells of 8 or 4 pixels, not {} in cells of {}; the CPU computes any",
        o.bins,
        o.cell
    );
    ensure!(matches!(images.dtype(), Dtype::F32 | Dtype::U8), "hog: {gpu:?} takes images in f32 or u8, not {images:?}");
    let mut target = images.alike(&s.patches(), Dtype::F32)?;
    let [histograms, normalised] = cells.map_or([None, None], |cells| cells.map(Some));
    let args = Args::new().out(&mut target).maybe_out(histograms).maybe_out(normalised).input(images);
    let args = args.int(s.batch).int(s.channels).int(s.height).int(s.width).flag(o.variant == Variant::MaskFeat).float(o.eps);
    let cells = s.batch * (s.height / s.cell) * (s.width / s.cell);
    let name = if o.cell == 8 { "hog" } else { "hog_cell4" };
    gpu.launch(&typed(name, images.dtype()), Launch::new(cells.div_ceil(4), 128), args)?;
    Ok(target)
}

fn on_cpu(images: &Tensor, o: &Options, s: &Sizes) -> Result<Features> {
    let planes = if images.dtype() == Dtype::U8 { planes(images, s)? } else { images.clone() };
    by_real!("hog", planes.dtype(), compute(&planes, o, s))
}

/// Bytes [B, H, W, C] as numbers [B, C, H, W].
fn planes(images: &Tensor, s: &Sizes) -> Result<Tensor> {
    let mut planes = Tensor::empty(&[s.batch, s.channels, s.height, s.width], Dtype::F32)?;
    let (bytes, size) = (images.data::<u8>(), s.height * s.width);
    parallel::rows(planes.data_mut::<f32>(), size, |first, rows| {
        for (i, plane) in rows.chunks_exact_mut(size).enumerate() {
            let (image, channel) = ((first + i) / s.channels, (first + i) % s.channels);
            let pixels = bytes[image * size * s.channels..].chunks_exact(s.channels);
            plane.iter_mut().zip(pixels).for_each(|(number, pixel)| *number = pixel[channel] as f32);
        }
    });
    Ok(planes)
}

fn compute<T: Real + Element>(images: &Tensor, o: &Options, s: &Sizes) -> Result<Features> {
    let mut histograms = Tensor::empty(&s.cells(), images.dtype())?;
    let (pixels, size, across) = (images.data::<T>(), s.height * s.width, s.width / s.cell);
    let (directions, window) = (directions::<T>(s.bins), window::<T>(s.cell));
    parallel::rows(histograms.data_mut::<T>(), s.bins, |first, rows| {
        for (n, histogram) in rows.chunks_exact_mut(s.bins).enumerate() {
            let (row, j) = ((first + n) / across, (first + n) % across);
            let (plane, i) = (row / (s.height / s.cell), row % (s.height / s.cell));
            let plane = Plane { pixels: &pixels[plane * size..][..size], height: s.height, width: s.width };
            cell_histogram(&plane, [i, j], o, &directions, &window, histogram);
        }
    });
    let mut normalised = histograms.copy()?;
    parallel::rows(normalised.data_mut::<T>(), s.bins, |_, rows| normalise(rows, o));
    let mut target = Tensor::empty(&s.patches(), images.dtype())?;
    let (cells, columns) = (normalised.data::<T>(), target.last());
    parallel::rows(target.data_mut::<T>(), columns, |first, rows| {
        for (n, values) in rows.chunks_exact_mut(columns).enumerate() {
            let (row, pw) = ((first + n) / (across / 2), (first + n) % (across / 2));
            let down = s.height / s.cell;
            let (image, ph) = (row / (down / 2), row % (down / 2));
            for (at, value) in values.iter_mut().enumerate() {
                let (channel, bin, dh, dw) = match o.variant {
                    Variant::Dmjd => {
                        (at % s.channels, at / s.channels % s.bins, at / (2 * s.bins * s.channels), at / (s.bins * s.channels) % 2)
                    }
                    Variant::MaskFeat => (at / (4 * s.bins), at / 4 % s.bins, at / 2 % 2, at % 2),
                };
                let (i, j) = (2 * ph + dh, 2 * pw + dw);
                *value = cells[(((image * s.channels + channel) * down + i) * across + j) * s.bins + bin];
            }
        }
    });
    Ok(Features { histograms, normalised, target })
}

vectorised! {
    /// The histogram of cell (i, j), its pixels added in their order.
    fn cell_histogram<T: Real>(
        plane: &Plane<T>, place: [usize; 2], o: &Options, directions: &[(T, T)], window: &[T], histogram: &mut [T],
    ) {
        histogram.fill(T::ZERO);
        for pixel in 0..o.cell * o.cell {
            let (y, x) = (place[0] * o.cell + pixel / o.cell, place[1] * o.cell + pixel % o.cell);
            let (a, b) = plane.gradient(y, x, o.variant);
            let mut weight = b.mul_add(b, a * a).sqrt();
            if o.variant == Variant::MaskFeat {
                weight *= window[y % (2 * o.cell)] * window[x % (2 * o.cell)];
            }
            histogram[bin(a, b, directions)] += weight;
        }
        if o.variant == Variant::Dmjd {
            histogram.iter_mut().for_each(|h| *h /= T::of((o.cell * o.cell) as f64));
        }
    }
    /// Each row of histograms by itself.
    fn normalise<T: Real>(histograms: &mut [T], o: &Options) {
        let (count, eps) = (T::of(o.bins as f64), T::of(o.eps));
        for histogram in histograms.chunks_exact_mut(o.bins) {
            if o.variant == Variant::MaskFeat {
                let norm = squares(histogram).sqrt().max(eps);
                histogram.iter_mut().for_each(|h| *h /= norm);
                continue;
            }
            let mean = histogram.iter().fold(T::ZERO, |sum, &h| sum + h) / count;
            histogram.iter_mut().for_each(|h| *h -= mean);
            let deviation = (squares(histogram) / count + eps).sqrt();
            histogram.iter_mut().for_each(|h| *h /= deviation);
        }
    }
}

#[inline(always)]
fn squares<T: Real>(numbers: &[T]) -> T {
    numbers.iter().fold(T::ZERO, |sum, &h| h.mul_add(h, sum))
}

/// One channel of one image.
struct Plane<'a, T> {
    pixels: &'a [T],
    height: usize,
    width: usize,
}

impl<T: Real> Plane<'_, T> {
    #[inline(always)]
    fn at(&self, y: usize, x: usize) -> T {
        self.pixels[y * self.width + x]
    }

    /// The two numbers whose angle counts.
    #[inline(always)]
    fn gradient(&self, y: usize, x: usize, variant: Variant) -> (T, T) {
        let inside = |at: usize, size: usize| at > 0 && at + 1 < size;
        if variant == Variant::Dmjd {
            let down = if inside(y, self.height) { self.at(y + 1, x) - self.at(y - 1, x) } else { T::ZERO };
            let right = if inside(x, self.width) { self.at(y, x + 1) - self.at(y, x - 1) } else { T::ZERO };
            return (down, right);
        }
        // The image goes on mirrored beyond its border, which is not repeated.
        let around = |at: usize, size: usize| [at.abs_diff(1), at, if at + 1 < size { at + 1 } else { size - 2 }];
        let (rows, columns) = (around(y, self.height), around(x, self.width));
        let [[a, b, c], [d, _, f], [g, h, i]] = rows.map(|y| columns.map(|x| self.at(y, x)));
        let two = T::of(2.0);
        (((a - c) + (g - i)) + two * (d - f), ((a - g) + (c - i)) + two * (b - h))
    }
}

/// (cos, sin) of the angles between bins.
fn directions<T: Real>(bins: usize) -> Vec<(T, T)> {
    let angle = |k: usize| std::f64::consts::PI * k as f64 / bins as f64;
    (1..bins).map(|k| (T::of(angle(k).cos()), T::of(angle(k).sin()))).collect()
}

/// The Gaussian along one side of a patch; its sum is 1.
fn window<T: Real>(cell: usize) -> Vec<T> {
    let weight = |i: usize| (-0.5 * ((i as f64 - (2 * cell - 1) as f64 / 2.0) / cell as f64).powi(2)).exp();
    let total: f64 = (0..2 * cell).map(weight).sum();
    (0..2 * cell).map(|i| T::of(weight(i) / total)).collect()
}

/// The bin of the angle of (a, b), a upwards. Which one a gradient of 0 gets does not matter: it weighs nothing.
#[inline(always)]
fn bin<T: Real>(a: T, b: T, directions: &[(T, T)]) -> usize {
    let (a, b) = if a < T::ZERO || (a == T::ZERO && b < T::ZERO) { (-a, -b) } else { (a, b) };
    directions.iter().filter(|(cos, sin)| cos.mul_add(a, -(*sin * b)) >= T::ZERO).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published example, 16 x 16 x 3, as fractions of 11 or as bytes.
    fn example(pixel: impl Fn(usize) -> f64) -> Tensor {
        let value = |at: usize| pixel((3 * (at / 16 % 16) + 5 * (at % 16) + 7 * (at / 256)) % 11);
        Tensor::from_slice(&[1, 3, 16, 16], &(0..768).map(value).collect::<Vec<f64>>()).unwrap()
    }

    fn close(got: &[f64], want: &[f64], allowed: f64) {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).enumerate().for_each(|(i, (a, b))| assert!((a - b).abs() <= allowed, "{i}: {a} but {b} is expected"));
    }

    /// sum of i v[i].
    fn weighted(v: &[f64]) -> f64 {
        v.iter().enumerate().map(|(i, v)| i as f64 * v).sum()
    }

    #[test]
    fn worked_example_of_fractions() {
        let images = example(|q| q as f64 / 11.0);
        for dtype in [Dtype::F64, Dtype::F32] {
            let f = features(&images.cast(dtype).unwrap(), &Options::dmjd()).unwrap();
            let (h, t) = (f.histograms.to_f64(), f.normalised.to_f64());
            close(&h[..9], &[0.022727, 0.066261, 0.0, 0.195559, 0.210923, 0.0, 0.0, 0.0, 0.0], 1e-6);
            // Channel 2, cell (1, 1).
            close(&h[2 * 36 + 27..][..9], &[0.022727, 0.082826, 0.0, 0.195559, 0.202283, 0.0, 0.0, 0.0, 0.0], 1e-6);
            let empty = -0.644581; // channel 1, cell (1, 0)
            close(&t[36 + 18..][..9], &[-0.374140, -0.053232, empty, 1.596271, 2.054006, empty, empty, empty, empty], 2e-6);
            let target = f.target.to_f64();
            assert!((target.iter().map(|x| x * x).sum::<f64>() - 107.837151).abs() < 1e-4);
            assert!((weighted(&target) + 217.338198).abs() < 1e-3);
        }
    }

    #[test]
    fn worked_example_of_bytes() {
        let images = example(|q| 23.0 * q as f64);
        let f = features(&images, &Options::dmjd()).unwrap();
        close(&f.histograms.to_f64()[..5], &[5.75, 16.763987, 0.0, 49.476424, 53.363495], 2e-6);
        let target = f.target.to_f64();
        let start =
            [-0.394709, -0.411782, -0.393636, 0.136864, 0.337064, 0.136534, -0.672224, -0.694970, -0.670418, 1.715680, 1.741745, 1.622975];
        close(&target[..12], &start, 2e-6);
        close(&target[102..], &[-0.672224, -0.671559, -0.694461, -0.672224, -0.671559, -0.694461], 2e-6);
        assert!((target.iter().map(|x| x * x).sum::<f64>() - 107.999997).abs() < 1e-5);
        assert!((weighted(&target) + 217.502588).abs() < 1e-3);
    }

    #[test]
    fn worked_example_of_maskfeat() {
        let images = example(|q| q as f64 / 11.0);
        let f = features(&images, &Options::maskfeat()).unwrap();
        let t = f.normalised.to_f64();
        close(&t[..9], &[0.046220, 0.0, 0.0, 0.0, 0.497066, 0.741115, 0.0, 0.448929, 0.0], 1e-6);
        close(&t[27..36], &t[..9], 1e-12); // channel 0, cell (1, 1)
        close(&t[36..45], &[0.103163, 0.0, 0.0, 0.0, 0.547703, 0.656642, 0.0, 0.508134, 0.0], 1e-6);
        close(&t[72 + 27..], &[0.045162, 0.0, 0.0, 0.0, 0.555407, 0.709752, 0.0, 0.430970, 0.0], 1e-6);
        let target = f.target.to_f64();
        assert_eq!((target[4 * 4], target[4 * 4 + 3]), (t[4], t[27 + 4])); // channel 0, bin 4, cells (0, 0) and (1, 1)
        assert_eq!(target[(9 + 7) * 4 + 3], t[36 + 27 + 7]);
    }

    /// Images of bytes [2, 224, 224, 3] whose numbers are published.
    #[test]
    fn large_images_of_bytes() {
        let byte = |at: usize| {
            let (c, x, y, n) = (at % 3, at / 3 % 224, at / 672 % 224, at / (672 * 224));
            ((y * y + 3 * x * y + 5 * x + 50 * c + 29 * n) % 256) as u8
        };
        let images = Tensor::from_slice(&[2, 224, 224, 3], &(0..2 * 224 * 672).map(byte).collect::<Vec<u8>>()).unwrap();
        let f = features(&images, &Options::dmjd()).unwrap();
        let first = [1.0937500, 7.8557878, 30.7733898, 5.0977693, 1.7500000, 0.0, 0.0, 0.0, 0.0];
        close(&f.histograms.to_f64()[..9], &first, 3e-6);
        let target = f.target.to_f64();
        close(&target[..6], &[-0.4333787, -0.4623364, -0.4360142, 0.2847509, 0.1634154, 0.0369190], 2e-6);
        close(&target[100 * 108 + 50..][..4], &[-0.4929130, 0.0431901, -0.0611127, 0.0338486], 2e-6);
        close(&target[2 * 196 * 108 - 4..], &[0.8062380, -0.9919286, -0.9751581, -1.0335350], 2e-6);
        let sum: f64 = target.chunks(108).map(weighted).sum();
        assert!((sum + 4578.9513).abs() < 0.01, "{sum}");
    }

    #[test]
    fn every_pair_of_differences_of_bytes_has_the_bin_of_its_angle() {
        let (single, double) = (directions::<f32>(9), directions::<f64>(9));
        for (a, b) in (-255i32..=255).flat_map(|a| (-255i32..=255).map(move |b| (a, b))).filter(|&pair| pair != (0, 0)) {
            let angle = (a as f64).atan2(b as f64).to_degrees().rem_euclid(180.0);
            let want = if angle >= 180.0 { 0 } else { (angle / 20.0) as usize };
            assert_eq!((bin(a as f32, b as f32, &single), bin(a as f64, b as f64, &double)), (want, want), "({a}, {b})");
        }
    }

    #[test]
    fn bytes_and_planes_give_the_same() {
        let byte = |at: usize| (at * at % 251) as u8;
        let (height, width) = (32, 48);
        let bytes: Vec<u8> = (0..2 * height * width * 3).map(byte).collect();
        let number = |at: usize| {
            let (pixel, channel, image) = (at % (height * width), at / (height * width) % 3, at / (3 * height * width));
            bytes[(image * height * width + pixel) * 3 + channel] as f32
        };
        let planes: Vec<f32> = (0..bytes.len()).map(number).collect();
        let planes = Tensor::from_slice(&[2, 3, height, width], &planes).unwrap();
        let bytes = Tensor::from_slice(&[2, height, width, 3], &bytes).unwrap();
        let [a, b] = [planes, bytes].map(|images| target(&images, &Options::dmjd()).unwrap());
        assert_eq!((a.shape(), a.data::<f32>()), (&[2, 6, 108][..], b.data::<f32>()));
    }

    #[test]
    fn a_flat_cell_is_0_and_one_orientation_alone_is_the_root_of_8() {
        let flat = target(&Tensor::full_on(&Default::default(), &[1, 1, 16, 16], Dtype::F64, 7.0).unwrap(), &Options::dmjd()).unwrap();
        assert!(flat.to_f64().iter().all(|&x| x == 0.0));
        let ramp: Vec<f64> = (0..256).map(|at| 10.0 * (at % 16) as f64).collect();
        let t = features(&Tensor::from_slice(&[1, 1, 16, 16], &ramp).unwrap(), &Options::dmjd()).unwrap().normalised.to_f64();
        close(&t[..3], &[8f64.sqrt(), -1.0 / 8f64.sqrt(), -1.0 / 8f64.sqrt()], 1e-6);
    }

    #[test]
    fn images_that_are_no_patches_are_errors() {
        let image = |shape: &[usize]| Tensor::zeros(shape, Dtype::F32).unwrap();
        assert!(target(&image(&[1, 3, 24, 32]), &Options::dmjd()).is_err());
        assert!(target(&image(&[3, 32, 32]), &Options::dmjd()).is_err());
        assert!(target(&image(&[0, 3, 32, 32]), &Options::dmjd()).is_err());
        assert!(target(&image(&[1, 3, 32, 32]), &Options { bins: 0, ..Options::dmjd() }).is_err());
    }
}
