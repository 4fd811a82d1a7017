//! Whether a step can be taken: what is looked at belongs to the networks, and it needs no more memory than there is.
//! The bytes are less than it needs, so that what cannot fit is a sentence and no end by the system:
//!
//!   weights      16 bytes each of what is trained (value, gradient, two moments), 4 each of a teacher's
//!   activations  images, and for each token of a block what its backward wants: 8 widths and 2 of the MLP's; a teacher's are not kept

use super::subject::{Point, SubjectArgs, System};
use crate::device::{Dtype, Named, memory};
use crate::error::{Error, Result};
use crate::masking;
use crate::methods::dmjd::BaselineName;
use crate::nn::presets;
use crate::nn::vit::VitConfig;

/// A product of sizes that may be anything.
fn product(sizes: &[usize]) -> u128 {
    sizes.iter().fold(1u128, |product, &size| product.saturating_mul(size as u128))
}

fn weights(vit: &VitConfig) -> u128 {
    let blocks = product(&[vit.width, vit.width, vit.depth]).saturating_mul(4 + (2.0 * vit.mlp_ratio) as u128);
    blocks.saturating_add(product(&[vit.patch, vit.patch, vit.channels, vit.width]))
}

/// What blocks on so many tokens keep for their backward, in numbers.
fn kept(tokens: u128, width: usize, depth: usize, mlp_ratio: f64) -> u128 {
    product(&[width, depth]).saturating_mul(8 + (2.0 * mlp_ratio) as u128).saturating_mul(tokens)
}

impl SubjectArgs {
    /// The network that is trained, as its flags have it.
    pub fn student(&self) -> Result<VitConfig> {
        self.network("--model", self.model())
    }

    /// Who teaches, where anybody does.
    pub fn taught_by(&self) -> Result<Option<VitConfig>> {
        self.teacher()?.map(|name| self.network("--teacher", name)).transpose()
    }

    fn network(&self, flag: &str, name: &str) -> Result<VitConfig> {
        let named = presets::named(name)?;
        let of = |error: Error| Error::usage(format!("{flag} {name}, --image-size and --patch-size: {}", error.chain()));
        let vit = if self.method == System::MaskedKd { named.classifier(self.image_size, 0.0) } else { named.encoder(self.image_size) };
        let vit = vit.map_err(of)?;
        let vit = VitConfig { patch: self.patch_size.unwrap_or(vit.patch), ..vit };
        vit.check().map_err(of)?;
        Ok(vit)
    }

    /// Whether there is a decoder.
    pub fn decodes(&self) -> bool {
        match self.method {
            System::Mae | System::Dmae => true,
            System::Dmjd => self.baseline != BaselineName::Maskfeat,
            System::MaskedKd | System::TinyMim => false,
        }
    }

    /// Refuses flags that say nothing of this method.
    pub fn check_read(&self) -> Result<()> {
        let decoder = (self.decoder_dim, self.decoder_depth, self.decoder_heads) != (512, 8, 16);
        if decoder && !self.decodes() {
            let of = if self.method == System::Dmjd { "dmjd with --baseline maskfeat" } else { self.method.name() };
            return Err(Error::usage(format!(
                "--decoder-dim, --decoder-depth and --decoder-heads are for --method mae, dmae or dmjd; {of} has no decoder; leave them out"
            )));
        }
        if self.classes != 1000 && self.method != System::MaskedKd {
            return Err(Error::usage(format!(
                "--classes {} is for --method maskedkd, not {}; leave it out",
                self.classes,
                self.method.name()
            )));
        }
        Ok(())
    }

    /// Refuses a point that cannot be meant of these networks.
    pub fn check_point(&self, point: &Point) -> Result<()> {
        let usage = |text: String| Err(Error::usage(text));
        let (vit, teacher) = (self.student()?, self.taught_by()?);
        let patches = vit.patches();
        if let (Some(teacher), Ok(Some(name))) = (&teacher, self.teacher()) {
            if teacher.grid() != vit.grid() {
                return usage(format!(
                    "--teacher {name} cuts an image into {:?} patches, --model {} into {:?}; both have to share the grid",
                    teacher.grid(),
                    self.model(),
                    vit.grid()
                ));
            }
            if let Some(block) = point.teacher_block.filter(|block| !(1..=teacher.depth).contains(block)) {
                return usage(format!("--teacher-block {block}: {name} has blocks 1 to {}", teacher.depth));
            }
        }
        if let Some(keep) = point.keep.filter(|keep| !(1..=patches).contains(keep)) {
            return usage(format!("--keep {keep}: the image has {patches} patches, of which 1 to {patches} can be seen"));
        }
        if let Some(views) = point.views.filter(|&views| views < 2) {
            return usage(format!("--views {views}: views are disjoint from each other, so there are at least 2; --method mae has one"));
        }
        let hidden = self.hidden(point);
        if hidden == 0.0 && matches!(self.method, System::MaskedKd | System::TinyMim) {
            return Ok(());
        }
        match masking::len_keep(patches, hidden) {
            Err(_) => usage(format!("--mask-ratio {hidden} is not a part from 0 to 1")),
            Ok(seen) if seen == 0 || seen == patches => {
                usage(format!("--mask-ratio {hidden} keeps {seen} of {patches} patches; at least one has to be kept and one hidden"))
            }
            Ok(_) => Ok(()),
        }
    }

    /// Part of the patches that the student does not see.
    fn hidden(&self, point: &Point) -> f64 {
        match self.method {
            System::MaskedKd => 0.0,
            System::TinyMim => point.mask_ratio.unwrap_or(0.0),
            _ => point.mask_ratio.unwrap_or(0.75),
        }
    }

    /// Bytes that a step takes at least.
    pub fn least_bytes(&self, point: &Point) -> Result<u128> {
        let (vit, teacher) = (self.student()?, self.taught_by()?);
        let patches = vit.patches();
        let seen = masking::len_keep(patches, self.hidden(point))?;
        let views = if self.method == System::Dmjd { point.views.unwrap_or(2) } else { 1 };
        let rows = product(&[self.batch, views]);
        let seen = if self.method == System::Dmjd && !self.decodes() { patches } else { seen };
        // TinyMIM's last block ends at its queries, keys and values.
        let depth = vit.depth - usize::from(self.method == System::TinyMim);
        let mut numbers = kept(rows.saturating_mul(seen as u128), vit.width, depth, vit.mlp_ratio);
        if let Some(stages) = &vit.stages {
            let tokens = rows.saturating_mul(product(&[seen, stages.layout(0).tokens()]));
            numbers = numbers.saturating_add(kept(tokens, stages.widths[0], stages.depths[0], stages.mlp_ratios[0]) / 2);
        }
        let mut bytes = weights(&vit).saturating_mul(16);
        if self.decodes() {
            let all = rows.saturating_mul(patches as u128);
            numbers = numbers.saturating_add(kept(all, self.decoder_dim, self.decoder_depth, vit.decoder_mlp_ratio()));
            bytes = bytes.saturating_add(product(&[12 * 16, self.decoder_depth]).saturating_mul(product(&[self.decoder_dim; 2])));
        }
        let images = product(&[self.batch, vit.channels, self.image_size, self.image_size]).saturating_mul(4);
        let teaching = teacher.as_ref().map_or(0, weights).saturating_mul(4);
        // On the CPU what lies between products is f32 in any precision.
        let dtype = if self.device == Named::Cpu { Dtype::F32 } else { self.precision.dtype() };
        let numbers = numbers.saturating_mul(dtype.size() as u128);
        Ok([images, teaching, numbers].into_iter().fold(bytes, u128::saturating_add))
    }

    /// Refuses what the machine has no memory for.
    pub fn fits(&self, point: &Point) -> Result<()> {
        let (bytes, there) = (self.least_bytes(point)?, u128::from(memory::of_the_machine()));
        if bytes <= there {
            return Ok(());
        }
        let giga = |bytes: u128| bytes / 1_000_000_000;
        Err(Error::usage(format!(
            "a step of {} needs at least {} GB of memory but the machine has {}; make --batch, --image-size, --model or --teacher smaller",
            self.method.name(),
            giga(bytes),
            giga(there)
        )))
    }
}
