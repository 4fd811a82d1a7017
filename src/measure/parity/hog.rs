//! Cases of the histogram targets.

use super::case::Case;
use super::compare::Record;
use crate::error::{Context, Result};
use crate::tape::Var;
use crate::targets::hog::{self, Options};
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};

const MOST_BINS: usize = 180;

pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let given = case.part("options")?;
    let options = Options {
        bins: given.size("orientations")?,
        cell: given.size("pixels_per_cell")?,
        eps: given.number("whitening_eps")?,
        ..Options::dmjd()
    };
    ensure!(options.bins <= MOST_BINS, "options.orientations is {} but no case has more than {MOST_BINS}", options.bins);
    for i in 0..given.list("images")?.len() {
        let images = planes(case, &format!("in/{i}/image_u8_nhwc"), dtype)?;
        let features = hog::features(&images, &options).with_context(|| format!("images {i}"))?;
        record.tensor(format!("out/{i}/hog"), &features.histograms);
        record.tensor(format!("out/{i}/whitened"), &features.normalised);
        record.tensor(format!("out/{i}/target"), &features.target);
    }
    Ok(())
}

/// Images [B, H, W, C] as [B, C, H, W].
pub fn planes(case: &Case, name: &str, dtype: Dtype) -> Result<Tensor> {
    let pixels = case.tensor(name, dtype)?;
    let &[batch, height, width, channels] = pixels.shape() else { bail!("{name} is {pixels:?} but [B, H, W, C] is needed") };
    let pixels = Var::constant(pixels.reshape(&[batch, height * width, channels])?);
    Ok(pixels.to_map(height, width)?.value().clone())
}
