//! Which patches a method shows: at random, whole blocks at random, what blocks of random sizes leave, or those that a class token looks at
//! most.

use crate::ensure;
use crate::error::{Error, Result};
use crate::masking::blockwise::{self, Blocks};
use crate::masking::{self, Keys, Mask};
use crate::nn::Scope;
use crate::nn::vit::{Vit, VitConfig};
use crate::param::Params;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Device, Dtype, Tensor};
use crate::trace;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Masking {
    /// Patches at random, each as likely
    #[default]
    Random,
    /// Units of 2 x 2 patches at random
    Block,
    /// Blocks of random sizes, as BEiT draws them
    #[value(alias = "blockwise", alias = "beit")]
    BlockWise,
    /// The patches that the student's own class token looks at most, which takes a pass of the student over the whole image
    Saliency,
}

/// How a kept number comes from a ratio.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepRounding {
    /// Cut off, as the papers' programs do: 95 % of 196 hidden keeps 9
    #[default]
    Floor,
    /// To the nearest: 95 % of 196 hidden keeps 10
    Round,
}

/// Side of a unit of [`Masking::Block`].
const SIDE: usize = 2;

/// Makes the masks of batches.
pub struct Masks {
    kind: Masking,
    grid: [usize; 2],
    /// Patches that are kept.
    keep: usize,
    /// Least area of a block of random size.
    least: usize,
    /// The unit of each patch, for each size of batch; what recorded work reads stays.
    units: RefCell<Vec<Tensor>>,
}

impl Masks {
    pub fn new(kind: Masking, config: &VitConfig, ratio: f64, rounding: KeepRounding) -> Result<Self> {
        let each = if kind == Masking::Block { SIDE * SIDE } else { 1 };
        if kind == Masking::Block {
            masking::units(1, config.grid(), SIDE)
                .map_err(|error| Error::usage(format!("--masking block: {error}; take --masking random")))?;
        }
        let (count, what) = (config.patches() / each, if each == 1 { "patches" } else { "units of 2 x 2 patches" });
        let kept = masking::len_keep(count, ratio).map_err(|error| Error::usage(format!("--mask-ratio: {}", error.chain())))?;
        let kept = if rounding == KeepRounding::Round { (count as f64 * (1.0 - ratio)).round() as usize } else { kept };
        if kept == 0 || kept >= count {
            return Err(Error::usage(format!(
                "--mask-ratio {ratio} keeps {kept} of {count} {what}; at least one has to be kept and one hidden"
            )));
        }
        if kind == Masking::Saliency && !config.class_token {
            return Err(Error::usage(
                "--masking saliency asks where a class token looks, and a ConViT has none; take random, block or block-wise",
            ));
        }
        Ok(Self::of(kind, config, kept * each))
    }

    fn of(kind: Masking, config: &VitConfig, keep: usize) -> Self {
        let least = blockwise::least_block(config.patches().saturating_sub(keep));
        Self { kind, grid: config.grid(), keep, least, units: RefCell::default() }
    }

    /// With another least area of blocks of random sizes, where one is given.
    pub fn with_least_block(self, patches: Option<usize>) -> Result<Self> {
        let Some(least) = patches else { return Ok(self) };
        let hidden = self.grid.iter().product::<usize>() - self.keep;
        let wrong = match self.kind {
            Masking::BlockWise if (1..=hidden).contains(&least) => return Ok(Self { least, ..self }),
            Masking::BlockWise => format!("blocks hide from 1 to all {hidden} of the patches that are to be hidden"),
            _ => "it is the least area of the blocks of --masking block-wise".to_string(),
        };
        Err(Error::usage(format!("--min-block-patches {least}: {wrong}")))
    }

    /// Of masks that keep so many patches, for one who is shown all of them where that is all.
    pub fn keeping(kind: Masking, config: &VitConfig, keep: usize) -> Result<Self> {
        let each = if kind == Masking::Block { SIDE * SIDE } else { 1 };
        if kind == Masking::Block {
            masking::units(1, config.grid(), SIDE)?;
        }
        ensure!(keep.is_multiple_of(each), "{keep} patches are no whole number of units of {each}");
        ensure!(keep > 0 && keep <= config.patches(), "{keep} of {} patches cannot be kept", config.patches());
        Ok(Self::of(kind, config, keep))
    }

    /// Of random masks that keep so many patches.
    pub fn random(config: &VitConfig, keep: usize) -> Self {
        Self::of(Masking::Random, config, keep)
    }

    pub fn kind(&self) -> Masking {
        self.kind
    }

    /// Patches that are kept of each image.
    pub fn kept_each(&self) -> usize {
        self.keep
    }

    /// The masks of a batch. `student` is asked where it looks.
    pub fn draw(&self, images: &Tensor, student: (&Vit, &Params), rng: &Rng) -> Result<Mask> {
        let _phase = trace::phase("mask");
        let (device, batch) = (student.1.device(), images.shape()[0]);
        let [rows, columns] = self.grid;
        match self.kind {
            Masking::Random => {
                let noise = Tensor::drawn(device, rng, "mask", &[batch, rows * columns])?;
                let mask = masking::random(&noise, self.keep)?;
                // Where nothing is hidden, which is measured and not trained, all patches are predicted.
                let hidden = if mask.hidden_each() == 0 { masking::random(&noise, 0)?.hidden } else { mask.hidden };
                Ok(Mask { hidden, ..mask })
            }
            Masking::Block => {
                let noise = Tensor::drawn(device, rng, "mask", &[batch, rows * columns / (SIDE * SIDE)])?;
                masking::blocks(&noise, &self.units(device, batch)?, self.keep)
            }
            Masking::BlockWise => {
                let noise = Tensor::drawn(device, rng, "mask", &[batch, blockwise::noise_each(self.grid)])?;
                let blocks = Blocks { grid: self.grid, hide: rows * columns - self.keep, least: self.least };
                masking::random(&blockwise::keys(&noise, blocks)?, self.keep)
            }
            Masking::Saliency => looked_at(images, student, self.keep),
        }
    }

    fn units(&self, device: &Device, batch: usize) -> Result<Tensor> {
        let found = self.units.borrow().iter().find(|units| units.shape()[0] == batch && units.device() == *device).cloned();
        if let Some(units) = found {
            return Ok(units);
        }
        let units = masking::units(batch, self.grid, SIDE)?.on(device)?;
        self.units.borrow_mut().push(units.clone());
        Ok(units)
    }
}

/// Keeps the patches that the class token of the last block looks at most, seen off the tape and without stochastic depth.
fn looked_at(images: &Tensor, (vit, params): (&Vit, &Params), keep: usize) -> Result<Mask> {
    let tape = Tape::off();
    let s = Scope::new(&tape, params);
    let (_, rows) = vit.blocks_with_class_rows(&s, &vit.embed(&s, images, None)?)?; // [B, H, extra + L]
    let saliency = masking::most_attended(&rows, vit.config.extra(), keep, Keys::All, Default::default())?.saliency; // [B, L]
    ensure!(saliency.last() == vit.config.patches(), "saliency is {saliency:?} but {} patches are there", vit.config.patches());
    // The smallest are kept: the most looked at are the least of the negatives.
    let falling = Var::constant(saliency.cast(Dtype::F32)?).scale(-1.0)?;
    masking::random(falling.value(), keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VitConfig {
        VitConfig::new(32, 8, 16, 1, 2)
    }

    #[test]
    fn counts_are_cut_off_or_rounded_as_asked() {
        let c = VitConfig::new(224, 16, 16, 1, 2);
        let kept = |kind, ratio, rounding| Masks::new(kind, &c, ratio, rounding).map(|masks| masks.kept_each());
        assert_eq!(kept(Masking::Random, 0.95, KeepRounding::Floor).unwrap(), 9);
        assert_eq!(kept(Masking::Random, 0.95, KeepRounding::Round).unwrap(), 10);
        assert_eq!(kept(Masking::Block, 0.75, KeepRounding::Floor).unwrap(), 48);
        assert!(kept(Masking::Random, 0.999, KeepRounding::Floor).unwrap_err().chain().contains("keeps 0 of 196 patches"));
        assert!(kept(Masking::Random, 0.0, KeepRounding::Floor).unwrap_err().chain().contains("keeps 196 of 196"));
        let odd = VitConfig::new(24, 8, 16, 1, 2);
        let refused = Masks::new(Masking::Block, &odd, 0.5, KeepRounding::Floor).err().expect("3 x 3 patches").chain();
        assert!(refused.contains("--masking block") && refused.contains("3 x 3"), "{refused}");
    }

    #[test]
    fn where_nothing_is_hidden_everything_counts() {
        let mut b = crate::param::ParamsBuilder::default();
        let tokens = crate::nn::vit::Tokens::new(&mut b, &config()).unwrap();
        let vit = Vit::new(&mut b, config(), tokens, true, crate::nn::Start::Xavier).unwrap();
        let params = b.build(Dtype::F32, &Rng::new(3)).unwrap();
        let images = Tensor::from_slice(&[2, 3, 32, 32], &vec![0f32; 2 * 3 * 32 * 32]).unwrap();
        for (keep, counted) in [(16, 16.0), (15, 1.0)] {
            let mask = Masks::random(&config(), keep).draw(&images, (&vit, &params), &Rng::new(0)).unwrap();
            assert_eq!((mask.kept_each(), mask.hidden.data::<f32>().iter().sum::<f32>()), (keep, 2.0 * counted));
        }
    }

    #[test]
    fn the_least_area_of_a_block_is_for_blocks_of_random_sizes() {
        let masks = |kind| Masks::new(kind, &config(), 0.5, KeepRounding::Floor).unwrap();
        assert_eq!((masks(Masking::BlockWise).least, masks(Masking::BlockWise).with_least_block(Some(8)).unwrap().least), (2, 8));
        assert!(masks(Masking::Random).with_least_block(None).is_ok());
        for (kind, patches, part) in [(Masking::Random, 2, "--masking block-wise"), (Masking::BlockWise, 9, "from 1 to all 8")] {
            let refused = masks(kind).with_least_block(Some(patches)).err().expect("a usage error").chain();
            assert!(refused.contains(part), "{refused}");
        }
    }

    #[test]
    fn saliency_keeps_what_the_class_token_looks_at_most() {
        let mut b = crate::param::ParamsBuilder::default();
        let tokens = crate::nn::vit::Tokens::new(&mut b, &config()).unwrap();
        let vit = Vit::new(&mut b, config(), tokens, true, crate::nn::Start::Xavier).unwrap();
        let params = b.build(Dtype::F32, &Rng::new(3)).unwrap();
        let numbers: Vec<f32> = Rng::new(4).normal("images", 2 * 3 * 32 * 32);
        let images = Tensor::from_slice(&[2, 3, 32, 32], &numbers).unwrap();
        let masks = Masks::new(Masking::Saliency, &config(), 0.75, KeepRounding::Floor).unwrap();
        let mask = masks.draw(&images, (&vit, &params), &Rng::new(0)).unwrap();
        let tape = Tape::off();
        let s = Scope::new(&tape, &params);
        let (_, rows) = vit.blocks_with_class_rows(&s, &vit.embed(&s, &images, None).unwrap()).unwrap();
        let best = masking::most_attended(&rows, 1, 4, Keys::All, Default::default()).unwrap();
        assert_eq!(mask.kept.data::<u32>(), best.kept.data::<u32>());
    }
}
