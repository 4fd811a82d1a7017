//! A method that looks at another part of each image from now on, its weights as they are; and what that costs by arithmetic.
//!
//! Here nothing may be hidden at all, which training refuses: then all patches are predicted, and DMJD has one view.

use crate::error::{Error, Result};
use crate::masking::disjoint::{Disjoint, Rates};
use crate::masking::len_keep;
use crate::measure::subject::Point;
use crate::methods::Method;
use crate::methods::baseline::Baseline;
use crate::methods::dmae::Dmae;
use crate::methods::dmjd::Dmjd;
use crate::methods::mae::Mae;
use crate::methods::maskedkd::MaskedKd;
use crate::methods::masks::Masks;
use crate::methods::selection::Selection;
use crate::methods::tinymim::Tinymim;
use crate::nn::flops;
use std::any::Any;

/// Multiply-accumulates of a forward pass for one image, all of its views.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Macs {
    pub encoder: u64,
    pub decoder: u64,
    /// What else the student multiplies: heads, and products that a loss is made of.
    pub other: u64,
    pub teacher: u64,
    /// The part of all this that has a backward pass, which costs twice as much.
    pub trained: u64,
}

impl Macs {
    /// Of a whole step.
    pub fn step(&self) -> u64 {
        self.encoder + self.decoder + self.other + self.teacher + 2 * self.trained
    }
}

fn usage<T>(text: String) -> Result<T> {
    Err(Error::usage(text))
}

/// How many patches a point keeps of so many; all where it says nothing.
pub fn kept(point: &Point, patches: usize) -> Result<usize> {
    match (point.mask_ratio, point.keep) {
        (Some(ratio), None) => match len_keep(patches, ratio) {
            Err(_) => usage(format!("--mask-ratio {ratio} is not a part from 0, which hides nothing, to 1")),
            Ok(0) => usage(format!("--mask-ratio {ratio} keeps none of {patches} patches; at least one has to be kept")),
            Ok(kept) => Ok(kept),
        },
        (None, Some(keep)) if keep == 0 || keep > patches => {
            usage(format!("--keep {keep}: the image has {patches} patches, of which 1 to {patches} can be kept"))
        }
        (None, Some(keep)) => Ok(keep),
        (None, None) => Ok(patches),
        (Some(_), Some(_)) => usage("a mask ratio and a number of patches say the same; give one of them".to_string()),
    }
}

/// A teacher's block, from 0.
fn block(point: &Point, depth: usize) -> Result<Option<usize>> {
    match point.teacher_block {
        Some(block) if block == 0 || block > depth => usage(format!("--teacher-blocks {block}: the teacher has blocks 1 to {depth}")),
        block => Ok(block.map(|block| block - 1)),
    }
}

/// The views of a grid, of which each keeps so many patches.
fn views(grid: [usize; 2], keep: usize, point: &Point) -> Result<Disjoint> {
    let (patches, views) = (grid[0] * grid[1], point.views.unwrap_or(1));
    if views == 0 || views > patches {
        return usage(format!("--views {views}: there can be 1 to {patches} views, one a patch"));
    }
    if keep == patches {
        return match views {
            1 => Ok(Disjoint::whole(grid)),
            _ => usage(format!(
                "--views {views}: where nothing is hidden all views are the same one; take a mask ratio above 0, or --views 1"
            )),
        };
    }
    // A little more than is kept, so that cutting off gives that number again.
    let corruption = point.mask_ratio.unwrap_or(1.0 - (keep as f64 + 1e-6) / patches as f64);
    Disjoint::new(grid, 1, Rates { corruption, prediction: 1.0, views })
        .map_err(|error| Error::usage(format!("{views} views that keep {keep} of {patches} patches: {}", error.chain())))
}

/// Makes the method look at so much; answers how many patches each view keeps, of maskedkd the teacher's. What cannot be meant changes nothing.
pub fn look(method: &mut dyn Method, point: &Point) -> Result<usize> {
    let method = method as &mut dyn Any;
    if let Some(mae) = method.downcast_mut::<Mae>() {
        let keep = kept(point, mae.encoder.config.patches())?;
        mae.see(Masks::random(&mae.encoder.config, keep));
        return Ok(keep);
    }
    if let Some(dmae) = method.downcast_mut::<Dmae>() {
        let keep = kept(point, dmae.mae.encoder.config.patches())?;
        if let Some(block) = block(point, dmae.teacher.vit().depth)? {
            dmae.ask(&[block])?;
        }
        dmae.mae.see(Masks::random(&dmae.mae.encoder.config, keep));
        return Ok(keep);
    }
    if let Some(dmjd) = method.downcast_mut::<Dmjd>() {
        let config = &dmjd.model.encoder().config;
        let keep = kept(point, config.patches())?;
        dmjd.views = views(config.grid(), keep, point)?;
        return Ok(keep);
    }
    if let Some(kd) = method.downcast_mut::<MaskedKd>() {
        let patches = kd.student.vit.config.patches();
        let keep = kept(point, patches)?;
        let (_, distilling) = kd.taught.as_mut().ok_or_else(|| Error::new("there is no teacher that could see less"))?;
        (distilling.keep, distilling.selection) = (keep, if keep < patches { Selection::Student } else { Selection::None });
        return Ok(keep);
    }
    if let Some(tinymim) = method.downcast_mut::<Tinymim>() {
        let patches = tinymim.student.config.patches();
        let keep = kept(point, patches)?;
        if let Some(block) = block(point, tinymim.teacher.vit().depth)? {
            tinymim.ask(block)?;
        }
        tinymim.see((keep < patches).then(|| Masks::random(&tinymim.student.config, keep)));
        return Ok(keep);
    }
    Err(Error::new("this method looks at what it looks at"))
}

/// The teacher's block that is asked, from 1, and how many there are; None of a system that asks for no block.
pub fn asked(method: &dyn Method) -> Option<(usize, usize)> {
    let method = method as &dyn Any;
    let dmae = method.downcast_ref::<Dmae>().and_then(|dmae| Some((*dmae.asked().last()?, dmae.teacher.vit().depth)));
    let tinymim = method.downcast_ref::<Tinymim>().map(|tinymim| (tinymim.asked(), tinymim.teacher.vit().depth));
    dmae.or(tinymim).map(|(block, depth)| (block + 1, depth))
}

/// What a pass multiplies as the method stands now.
pub fn macs(method: &dyn Method) -> Macs {
    let ([all, trained], cost) = (method.macs(), method.teacher_cost().map_or(0, |cost| cost.macs));
    let any = method as &dyn Any;
    let autoencoder = |mae: &Mae| {
        let (config, kept) = (&mae.encoder.config, mae.kept_each());
        [flops::vit_macs(config, kept), flops::decoder_macs(&mae.decoder.config, config, kept)]
    };
    let ([encoder, decoder], teacher, more) = if let Some(mae) = any.downcast_ref::<Mae>() {
        (autoencoder(mae), cost, 0)
    } else if let Some(dmae) = any.downcast_ref::<Dmae>() {
        (autoencoder(&dmae.mae), cost, 0)
    } else if let Some(dmjd) = any.downcast_ref::<Dmjd>() {
        // MaskFeat's head is no decoder.
        let [encoder, predictor] = dmjd.model_macs();
        let decoder = if matches!(dmjd.model, Baseline::MaskFeat { .. }) { 0 } else { predictor };
        ([encoder, decoder], cost, 0)
    } else if let Some(kd) = any.downcast_ref::<MaskedKd>() {
        let config = &kd.student.vit.config;
        // The papers' count projects all patches in front of the teacher's blocks; those that it does not see are not projected here.
        let unseen = kd.taught.as_ref().map_or(0, |(teacher, distilling)| {
            let vit = teacher.vit();
            (vit.patches() - distilling.keep.min(vit.patches())) * vit.width * vit.patch_values()
        });
        ([flops::vit_macs(config, config.patches()), 0], cost - unseen as u64, 0)
    } else if let Some(tinymim) = any.downcast_ref::<Tinymim>() {
        let encoder = tinymim.encoder_macs();
        // The loss multiplies the teacher's queries, keys and values as it does the student's, and no gradient flows there.
        let products = (all - encoder) / tinymim.student.config.width as u64 * tinymim.teacher.vit().width as u64;
        ([encoder, 0], cost, products)
    } else {
        ([all, 0], cost, 0)
    };
    Macs { encoder, decoder, other: all - encoder - decoder + more, teacher, trained }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::subject::{SubjectArgs, System};

    #[derive(clap::Parser)]
    struct Typed {
        #[command(flatten)]
        subject: SubjectArgs,
    }

    fn open(flags: &str) -> Box<dyn Method> {
        let typed = <Typed as clap::Parser>::parse_from(["measure"].into_iter().chain(flags.split_whitespace()));
        let nothing = Point { mask_ratio: None, keep: None, views: None, teacher_block: None };
        typed.subject.open(&nothing).unwrap().method
    }

    fn point(mask_ratio: Option<f64>, keep: Option<usize>, views: Option<usize>, teacher_block: Option<usize>) -> Point {
        Point { mask_ratio, keep, views, teacher_block }
    }

    /// Blocks of n tokens of width d with an MLP of four widths.
    fn blocks(count: u64, n: u64, d: u64) -> u64 {
        count * (12 * n * d * d + 2 * n * n * d)
    }

    const SMALL: &str = "--model glyph_t --image-size 48 --batch 1 --classes 10 --decoder-dim 32 --decoder-depth 2 --decoder-heads 2";

    /// Of glyph_t and glyph_s at 48 pixels in patches of 8: 36 patches of 192 numbers, and a class token.
    fn sizes() -> [(u64, u64); 2] {
        ["glyph_t", "glyph_s"].map(|name| {
            let vit = crate::nn::presets::mae(name, 48).unwrap();
            assert_eq!((vit.patches(), vit.patch, vit.mlp_ratio), (36, 8, 4.0));
            (vit.width as u64, vit.depth as u64)
        })
    }

    #[test]
    fn a_step_costs_what_a_count_by_hand_gives() {
        let [(d, depth), (teacher, blocks_of_it)] = sizes();
        let embed = |kept: u64, d: u64| kept * 192 * d;
        let encoder = |kept: u64| embed(kept, d) + blocks(depth, kept + 1, d);
        let decoder = |kept: u64| (kept + 1) * d * 32 + blocks(2, 37, 32) + 37 * 32 * 192;

        let mut mae = open(SMALL);
        for (at, kept) in
            [(point(Some(0.75), None, None, None), 9), (point(Some(0.0), None, None, None), 36), (point(None, Some(1), None, None), 1)]
        {
            assert_eq!(look(&mut *mae, &at).unwrap() as u64, kept);
            let macs = macs(&*mae);
            assert_eq!(
                macs,
                Macs { encoder: encoder(kept), decoder: decoder(kept), other: 0, teacher: 0, trained: encoder(kept) + decoder(kept) }
            );
            assert_eq!(macs.step(), 3 * (encoder(kept) + decoder(kept)));
        }

        let mut dmae = open(&format!("{SMALL} --method dmae --teacher glyph_s"));
        look(&mut *dmae, &point(Some(0.5), None, None, Some(2))).unwrap();
        let own = Macs {
            encoder: encoder(18),
            decoder: decoder(18),
            other: 19 * d * teacher,
            teacher: embed(18, teacher) + blocks(2, 19, teacher),
            trained: 0,
        };
        assert_eq!(macs(&*dmae), Macs { trained: own.encoder + own.decoder + own.other, ..own });

        let mut kd = open(&format!("{SMALL} --method maskedkd --teacher glyph_s"));
        for kept in [36, 9] {
            look(&mut *kd, &point(None, Some(kept as usize), None, None)).unwrap();
            let asked = embed(kept, teacher) + blocks(blocks_of_it, kept + 1, teacher) + teacher * 10;
            assert_eq!(macs(&*kd), Macs { encoder: encoder(36), decoder: 0, other: d * 10, teacher: asked, trained: encoder(36) + d * 10 });
        }

        let mut dmjd = open(&format!("{SMALL} --method dmjd"));
        let head = |kept: u64| kept * (d * 32 + 2 * 32 * 32 + 32 * 192);
        for (at, views, kept) in [(point(Some(0.75), None, Some(3), None), 3, 9), (point(None, None, None, None), 1, 36)] {
            look(&mut *dmjd, &at).unwrap();
            let own =
                Macs { encoder: views * encoder(kept), decoder: views * decoder(kept), other: views * head(kept), teacher: 0, trained: 0 };
            assert_eq!(macs(&*dmjd), Macs { trained: own.encoder + own.decoder + own.other, ..own });
        }

        let mut tinymim = open(&format!("{SMALL} --method tinymim --teacher glyph_s"));
        look(&mut *tinymim, &point(Some(0.5), None, None, Some(3))).unwrap();
        let (n, asked) = (19, embed(18, teacher) + blocks(2, 19, teacher) + 3 * 19 * teacher * teacher);
        let encoder = embed(18, d) + blocks(depth - 1, n, d) + 3 * n * d * d;
        let own = Macs { encoder, decoder: 0, other: 2 * n * n * (d + teacher), teacher: asked, trained: encoder + 2 * n * n * d };
        assert_eq!(macs(&*tinymim), own);
    }

    #[test]
    fn what_cannot_be_kept_is_said_and_changes_nothing() {
        let mut all: Vec<_> = System::ALL
            .into_iter()
            .map(|system| {
                let teacher = if system.has_teacher() { "--teacher glyph_s" } else { "" };
                (system, open(&format!("{SMALL} --method {} {teacher}", system.name())))
            })
            .collect();
        for (system, method) in &mut all {
            let before = macs(&**method);
            for (at, part) in [
                (point(Some(0.99), None, None, None), "--mask-ratio 0.99 keeps none of 36 patches"),
                (point(Some(1.0), None, None, None), "keeps none"),
                (point(Some(2.0), None, None, None), "--mask-ratio 2 is not a part"),
                (point(Some(-0.5), None, None, None), "--mask-ratio -0.5 is not"),
                (point(Some(f64::NAN), None, None, None), "--mask-ratio NaN is not"),
                (point(None, Some(0), None, None), "--keep 0: the image has 36 patches"),
                (point(None, Some(37), None, None), "--keep 37: the image has 36"),
                (point(Some(0.5), Some(3), None, None), "give one of them"),
            ] {
                let error = look(&mut **method, &at).unwrap_err();
                assert!(error.exit_code() == 2 && error.chain().contains(part), "{}: {}", system.name(), error.chain());
            }
            let of_one = match system {
                System::Dmae | System::TinyMim => {
                    vec![(point(Some(0.5), None, None, Some(0)), "blocks 1 to"), (point(Some(0.5), None, None, Some(99)), "blocks 1 to")]
                }
                System::Dmjd => {
                    vec![(point(Some(0.5), None, Some(0), None), "--views 0"), (point(None, None, Some(2), None), "all views are the same")]
                }
                _ => Vec::new(),
            };
            for (at, part) in of_one {
                let error = look(&mut **method, &at).unwrap_err().chain();
                assert!(error.contains(part), "{}: {error}", system.name());
            }
            assert_eq!(macs(&**method), before);
        }
    }
}
