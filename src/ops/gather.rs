//! Choosing tokens, and choosing patches before they are projected.
//!
//!   gather          y[b, t] = x[b, ids[b, t]]            dx[b, ids[b, t]] = dy[b, t], 0 elsewhere
//!   gather_patches  rows of pixels of the chosen patches, in the order of a convolution's weight (channel, row, column)
//!
//! x [B, N, C]; ids [B, K], distinct in a row, so each row of dx has one writer. Patches come from images, to which no gradient flows.
//! GPU: kernels/gather.cu, where each row of dx looks for itself among the ids.

use super::case::Case;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, Versions, typed};
use crate::device::{Device, parallel, simd::Real};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
use crate::{by_real, ensure};

pub const VERSIONS: Versions = Versions { op: "gather", all: &["v1", "v2"], chosen: "v2" };

impl Var {
    pub fn gather(&self, ids: &Tensor) -> Result<Var> {
        let x = self.value();
        let &[batch, n, _] = x.shape() else { crate::bail!("gather: x is {x:?} but [B, N, C] is needed") };
        let ids = ids_on(&x.device(), "gather", ids, batch, n)?;
        let y = match x.gpu() {
            None => by_real!("gather", x.dtype(), rows_at(x, &ids))?,
            Some(gpu) => rows_at_on(gpu, x, &ids)?,
        };
        let (dtype, gpu) = (x.dtype(), x.gpu().cloned());
        Var::record("gather", [self], y, move |dy, need| {
            let mut dx = need.out(0)?;
            match gpu {
                None => by_real!("gather", dtype, put_back(&dy, &ids, &mut dx))?,
                Some(gpu) => put_back_on(&gpu, &dy, &ids, &mut dx)?,
            }
            Ok([Some(dx)])
        })
    }
}

/// The ids on this device, once they fit. Ids that are on a GPU are looked at by its kernels alone; that they are distinct is then the caller's word.
pub(crate) fn ids_on(device: &Device, op: &str, ids: &Tensor, batch: usize, n: usize) -> Result<Tensor> {
    let ids = if device.gpu().is_none() { ids.on(device)? } else { ids.clone() };
    check_ids(op, &ids, batch, n)?;
    ids.on(device)
}

/// Refuses ids that are not [B, K] of u32 and, where they are on the CPU, those that lie beyond n or name a token of an image twice.
fn check_ids(op: &str, ids: &Tensor, batch: usize, n: usize) -> Result<()> {
    let fits = matches!(ids.shape(), &[b, k] if b == batch && k <= n) && ids.dtype() == Dtype::U32;
    ensure!(fits, "{op}: ids are {ids:?} but there are {batch} images of {n} tokens");
    if ids.gpu().is_some() {
        return Ok(());
    }
    let k = ids.last().max(1);
    let mut seen = vec![usize::MAX; n];
    for (image, row) in ids.data::<u32>().chunks_exact(k).enumerate() {
        for &id in row {
            ensure!((id as usize) < n, "{op}: image {image} asks for token {id} but has {n}");
            ensure!(std::mem::replace(&mut seen[id as usize], image) != image, "{op}: image {image} asks for token {id} twice");
        }
    }
    Ok(())
}

fn rows_at<T: Real + Element>(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (n, c, k) = (x.shape()[1], x.last(), ids.last());
    let mut y = Tensor::empty(&[x.shape()[0], k, c], x.dtype())?;
    let (x, ids) = (x.data::<T>(), ids.data::<u32>());
    parallel::rows(y.data_mut::<T>(), c, |first, y| {
        for (j, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
            let i = first + j;
            y.copy_from_slice(&x[(i / k * n + ids[i] as usize) * c..][..c]);
        }
    });
    Ok(y)
}

fn put_back<T: Real + Element>(dy: &Tensor, ids: &Tensor, dx: &mut Tensor) -> Result<()> {
    let (n, c, k) = (dx.shape()[1], dx.last(), ids.last());
    let (dy, ids, dx) = (dy.data::<T>(), ids.data::<u32>(), dx.data_mut::<T>());
    dx.fill(T::ZERO);
    for (i, (dy, &id)) in dy.chunks_exact(c.max(1)).zip(ids).enumerate() {
        dx[(i / k * n + id as usize) * c..][..c].copy_from_slice(dy);
    }
    Ok(())
}

/// A warp for each of so many rows, in blocks of eight.
pub(super) fn warps(rows: usize) -> Launch {
    Launch::new(rows.div_ceil(8), 256)
}

fn rows_at_on(gpu: &Gpu, x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (n, c, k) = (x.shape()[1], x.last(), ids.last());
    let mut y = x.alike(&[x.shape()[0], k, c], x.dtype())?;
    let kernel = typed(&format!("gather_fwd_{}", gpu.version(&VERSIONS)), x.dtype());
    let args = Args::new().out(&mut y).input(x).input(ids).int(ids.numel()).int(n).int(k).int(c);
    gpu.launch(&kernel, warps(ids.numel()), args.fault())?;
    Ok(y)
}

fn put_back_on(gpu: &Gpu, dy: &Tensor, ids: &Tensor, dx: &mut Tensor) -> Result<()> {
    let (rows, n, c) = (dx.rows(), dx.shape()[1], dx.last());
    let kernel = typed(&format!("gather_bwd_{}", gpu.version(&VERSIONS)), dy.dtype());
    gpu.launch(&kernel, warps(rows), Args::new().out(dx).input(dy).input(ids).int(rows).int(n).int(ids.last()).int(c))
}

/// Pixels of the chosen patches (all of them if `ids` is None) of images [B, channels, H, W], as numbers of this type: [B, K, channels * ph * pw]. There may
/// be several times as many rows of ids as images: row i is of image i modulo their number.
pub fn gather_patches(images: &Tensor, (ph, pw): (usize, usize), ids: Option<&Tensor>, dtype: Dtype) -> Result<Tensor> {
    let &[batch, channels, h, w] = images.shape() else { crate::bail!("patches: images are {images:?} but [B, C, H, W] is needed") };
    ensure!(
        ph > 0 && pw > 0 && h.is_multiple_of(ph) && w.is_multiple_of(pw),
        "patches: images of {h} x {w} do not split into patches of {ph} x {pw}"
    );
    let n = (h / ph) * (w / pw);
    let views = ids.map_or(batch, |ids| ids.shape().first().map_or(0, |&views| views));
    ensure!(batch > 0 && views.is_multiple_of(batch), "patches: there are {views} rows of ids, which is no multiple of {batch} images");
    let ids = ids.map(|ids| ids_on(&images.device(), "patches", ids, views, n)).transpose()?;
    let mut rows = images.alike(&[views, ids.as_ref().map_or(n, Tensor::last), channels * ph * pw], dtype)?;
    match images.gpu() {
        None => by_real!("patches", dtype, copy_patches(&images.cast(dtype)?, (ph, pw), ids.as_ref(), &mut rows))?,
        Some(gpu) => copy_patches_on(gpu, images, (ph, pw), ids.as_ref(), &mut rows)?,
    }
    Ok(rows)
}

/// x [B, ..] so many times, one whole copy behind the other: [times B, ..].
pub fn repeated(x: &Tensor, times: usize) -> Result<Tensor> {
    let (&[batch, ref rest @ ..], numbers) = (x.shape(), x.numel()) else { crate::bail!("repeated: x is a single number") };
    let size = numbers / batch.max(1);
    let mut rows = x.alike(&[times * batch, 1, size], x.dtype())?;
    let images = x.reshape(&[batch, 1, 1, size])?;
    match x.gpu() {
        None => by_real!("repeated", x.dtype(), copy_patches(&images, (1, size), None, &mut rows))?,
        Some(gpu) => copy_patches_on(gpu, &images, (1, size), None, &mut rows)?,
    }
    rows.reshape(&[&[times * batch], rest].concat())
}

/// From f32 or the wanted type in one pass; other images are converted first.
fn copy_patches_on(gpu: &Gpu, images: &Tensor, (ph, pw): (usize, usize), ids: Option<&Tensor>, rows: &mut Tensor) -> Result<()> {
    let images = if images.dtype() == Dtype::F32 { images.clone() } else { images.cast(rows.dtype())? };
    let (channels, h, w) = (images.shape()[1], images.shape()[2], images.shape()[3]);
    let (patches, k) = (rows.rows(), rows.shape()[1]);
    let kernel = typed(&typed(&format!("gather_patches_{}", gpu.version(&VERSIONS)), images.dtype()), rows.dtype());
    let args = Args::new().out(rows).input(&images).maybe(ids).int(patches).int(k).int(images.shape()[0]);
    gpu.launch(&kernel, warps(patches), args.int(channels).int(h).int(w).int(ph).int(pw).fault())
}

fn copy_patches<T: Real + Element>(images: &Tensor, (ph, pw): (usize, usize), ids: Option<&Tensor>, rows: &mut Tensor) -> Result<()> {
    let (batch, channels, h, w) = (images.shape()[0], images.shape()[1], images.shape()[2], images.shape()[3]);
    let (k, p, grid) = (rows.shape()[1], rows.last(), w / pw);
    let (images, ids) = (images.data::<T>(), ids.map(|ids| ids.data::<u32>()));
    parallel::rows(rows.data_mut::<T>(), p, |first, rows| {
        for (j, row) in rows.chunks_exact_mut(p.max(1)).enumerate() {
            let i = first + j;
            let patch = ids.map_or(i % k, |ids| ids[i] as usize);
            let corner = (patch / grid * ph) * w + patch % grid * pw;
            for (line, pixels) in row.chunks_exact_mut(pw).enumerate() {
                let (channel, y) = (line / ph, line % ph);
                let start = (i / k % batch * channels + channel) * h * w + corner + y * w;
                pixels.copy_from_slice(&images[start..start + pw]);
            }
        }
    });
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let ids = Tensor::from_slice(&[2, 3], &[4u32, 0, 2, 2, 1, 4]).expect("six numbers");
    let one = Tensor::from_slice(&[1, 1], &[0u32]).expect("one number");
    let long: Vec<u32> = (0..33).map(|i| 38 - i).chain((0..33).map(|i| 7 * i % 39)).collect();
    let long = Tensor::from_slice(&[2, 33], &long).expect("two rows of 33");
    let same = ids.clone();
    vec![
        Case::new("gather: 3 of 5 tokens, C = 37", &[&[2, 5, 37]], move |x| x[0].gather(&ids)),
        Case::new("gather: 3 of 5 tokens, whole vectors", &[&[2, 5, 264]], move |x| x[0].gather(&same)),
        Case::new("gather: more tokens than a warp compares at once", &[&[2, 39, 8]], move |x| x[0].gather(&long)),
        Case::new("gather: one token", &[&[1, 1, 3]], move |x| x[0].gather(&one)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_come_in_the_order_of_a_convolutions_weight() {
        let pixels: Vec<f32> = (0..2 * 4 * 6).map(|i| i as f32).collect();
        let images = Tensor::from_slice(&[1, 2, 4, 6], &pixels).unwrap();
        let ids = Tensor::from_slice(&[1, 1], &[4u32]).unwrap();
        let rows = gather_patches(&images, (2, 2), Some(&ids), Dtype::F32).unwrap();
        assert_eq!(rows.data::<f32>(), [14.0, 15.0, 20.0, 21.0, 38.0, 39.0, 44.0, 45.0]);
        let all = gather_patches(&images, (2, 2), None, Dtype::F32).unwrap();
        assert_eq!((all.shape(), &all.data::<f32>()[32..40]), (&[1, 6, 8][..], rows.data::<f32>()));
        assert!(gather_patches(&images, (3, 2), None, Dtype::F32).is_err());
    }
}
