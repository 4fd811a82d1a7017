//! Mean squared error of predicted hidden patches, against the pixels of the images themselves.
//!
//!   loss = sum_r m[r] mean_P (x[r] - t[r])^2 / sum(m),   t the patches of the images, normalised each by itself on request
//!
//! Prediction x [B, L, P]; images [B, C, H, W]; m [B, L], 1 where a patch is hidden. The order of a patch's values and the normalisation are those of
//! [`crate::targets::pixels`], which makes the targets on the CPU, for the masked mean squared error. On a GPU one kernel (kernels/pixel_loss.cu) reads
//! the hidden patches from the images and makes loss and gradient. A mask that is on a GPU already cannot be looked at: if it hides no patch, loss and
//! gradient are 0.

use super::case::{Case, numbers};
use super::loss_of;
use super::masked_mse::count_of;
use super::total::{Made, Parts};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, Versions, typed};
use crate::ensure;
use crate::error::Result;
use crate::tape::Var;
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};

pub const VERSIONS: Versions = Versions { op: "pixel_loss", all: &["v1", "v2"], chosen: "v2" };

impl Var {
    pub fn pixel_loss(&self, images: &Tensor, patch: usize, normalised: Option<f64>, hidden: &Tensor) -> Result<Var> {
        let Some(gpu) = self.value().gpu() else {
            let images = images.on(&self.value().device())?.cast(self.dtype())?;
            return self.masked_mse(&pixels::targets(&images, patch, normalised)?, hidden);
        };
        let made = on_gpu(gpu, self, images, patch, normalised, hidden)?;
        Var::record("pixel_loss", [self], made.loss.clone(), move |dy, _| made.backward(&dy))
    }
}

fn on_gpu(gpu: &Gpu, x: &Var, images: &Tensor, patch: usize, normalised: Option<f64>, hidden: &Tensor) -> Result<Made> {
    let value = x.value();
    let [batch, channels, height, width] = pixels::sizes(images.shape(), patch)?;
    let (tokens, p) = ((height / patch) * (width / patch), patch * patch * channels);
    ensure!(
        value.shape() == [batch, tokens, p] && batch > 0,
        "pixel_loss: x is {value:?} but images of {images:?} have [{batch}, {tokens}, {p}]"
    );
    ensure!(hidden.shape() == [batch, tokens], "pixel_loss: the mask is {hidden:?} but x is {value:?}");
    ensure!(normalised.is_none() || p >= 2, "pixel targets: a patch of {p} values has no variance");
    count_of("pixel_loss", value, hidden)?;
    let on_device = |t: &Tensor| t.cast(Dtype::F32)?.on(&value.device());
    let (images, hidden) = (on_device(images)?, on_device(hidden)?);
    let count = loss_of(gpu, &hidden, 1.0)?;
    let (patches, blocks) = (batch * tokens, (batch * tokens).div_ceil(8));
    let mut parts = Parts::new(x, blocks)?;
    let args = Args::new().maybe_out(parts.gradient.as_mut()).out(&mut parts.partial).input(value).input(&images);
    let args = args.input(&hidden).input(&count).int(patches);
    if gpu.version(&VERSIONS) == "v2" && patch == 16 && channels == 3 {
        let args = args.int(height).int(width).float(normalised.unwrap_or(pixels::NOT_NORMALISED));
        gpu.launch(&typed("pixel_loss_v2", x.dtype()), Launch::new(blocks, 256), args)?;
    } else {
        let args = args.int(channels).int(height).int(width).int(patch).float(normalised.unwrap_or(pixels::NOT_NORMALISED));
        gpu.launch(&typed("pixel_loss_v1", x.dtype()), Launch::new(blocks, 256), args)?;
    }
    parts.finish(gpu)
}

pub fn cases() -> Vec<Case> {
    let case =
        |name: &str, [batch, channels, height, width]: [usize; 4], patch: usize, normalised: Option<f64>, hidden: fn(usize) -> f64| {
            let shape = [batch, channels, height, width];
            let images = Tensor::from_slice(&shape, &numbers("images", 0, &shape)).expect("as many numbers");
            let tokens = (height / patch) * (width / patch);
            let mask: Vec<f64> = (0..batch * tokens).map(hidden).collect();
            let mask = Tensor::from_slice(&[batch, tokens], &mask).expect("as many numbers");
            let name = format!("pixel_loss: {name}");
            Case::loss(&name, &[batch, tokens, patch * patch * channels], move |x| x.pixel_loss(&images, patch, normalised, &mask))
        };
    let most: fn(usize) -> f64 = |i| if i % 4 == 1 { 0.0 } else { 1.0 };
    vec![
        case("patches of 16, normalised", [2, 3, 32, 80], 16, Some(pixels::EPS), most),
        case("patches of 16 as they are", [1, 3, 48, 32], 16, None, most),
        case("patches of 14, normalised", [1, 3, 28, 14], 14, Some(pixels::EPS), |_| 1.0),
        case("patches of 4 of 2 channels", [3, 2, 8, 12], 4, Some(0.25), most),
        case("one hidden patch", [2, 1, 6, 6], 2, None, |i| if i == 12 { 1.0 } else { 0.0 }),
    ]
}
