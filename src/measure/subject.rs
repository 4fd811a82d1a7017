//! What is measured: one of the five systems with random weights, on random images, and how much of an image it looks at.
//!
//! The methods are built by the flags and defaults of their own commands, so what is timed is what a user trains.

use crate::device::{Device, Named, Precision};
use crate::error::{Error, Result};
use crate::methods::dmae::{Dmae, DmaeArgs};
use crate::methods::dmjd::{BaselineName, Dmjd, DmjdArgs};
use crate::methods::mae::{Mae, MaeArgs};
use crate::methods::maskedkd::{LogitArgs, MaskedKd, MaskingArgs};
use crate::methods::target::Targets;
use crate::methods::teacher::{Network, Teacher};
use crate::methods::tinymim::{Tinymim, TinymimArgs};
use crate::methods::{Batch, Method};
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::vit::{Tokens, Vit, VitConfig};
use crate::nn::{Start, presets};
use crate::optim::adamw::AdamW;
use crate::optim::groups;
use crate::param::ParamsBuilder;
use crate::rng::Rng;
use crate::tensor::{Dtype, Tensor};
use clap::{Args, ValueEnum};

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "lower")]
pub enum System {
    /// Hide patches, reconstruct them
    Mae,
    /// MAE beside a larger teacher on the same patches
    Dmae,
    /// A classifier whose teacher sees the patches that the student looks at
    MaskedKd,
    /// Several disjoint masks of each image
    Dmjd,
    /// Relations between tokens of a teacher's block
    TinyMim,
}

impl System {
    pub const ALL: [Self; 5] = [Self::Mae, Self::Dmae, Self::MaskedKd, Self::Dmjd, Self::TinyMim];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mae => "mae",
            Self::Dmae => "dmae",
            Self::MaskedKd => "maskedkd",
            Self::Dmjd => "dmjd",
            Self::TinyMim => "tinymim",
        }
    }

    /// Model and teacher where none are asked for.
    fn usual(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Mae | Self::Dmjd => ("tiny", None),
            Self::Dmae | Self::MaskedKd => ("tiny", Some("small")),
            Self::TinyMim => ("tiny", Some("base")),
        }
    }

    pub fn has_teacher(self) -> bool {
        self.usual().1.is_some()
    }
}

/// What is trained.
#[derive(Clone, Debug, Args)]
pub struct SubjectArgs {
    /// Which of the systems
    #[arg(long, value_enum, default_value_t = System::Mae)]
    pub method: System,
    /// What is trained, by name or size: tiny, small, base, large, huge, glyph_s ... [default: tiny]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Who teaches, by name or size [default: small for dmae and maskedkd, base for tinymim]
    #[arg(long, value_name = "NAME")]
    pub teacher: Option<String>,
    /// Side of the square images in pixels
    #[arg(long, default_value_t = 224)]
    pub image_size: usize,
    /// Side of a patch in pixels [default: the model's]
    #[arg(long)]
    pub patch_size: Option<usize>,
    /// Images a step
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Width of the decoder
    #[arg(long, default_value_t = 512)]
    pub decoder_dim: usize,
    /// Blocks of the decoder
    #[arg(long, default_value_t = 8)]
    pub decoder_depth: usize,
    /// Heads of the decoder
    #[arg(long, default_value_t = 16)]
    pub decoder_heads: usize,
    /// Normalise each target patch by its own mean and deviation
    #[arg(long)]
    pub norm_pix: bool,
    /// Of dmjd: mae, maskfeat, or convmae with a ConViT as --model
    #[arg(long, value_enum, default_value_t = BaselineName::Mae)]
    pub baseline: BaselineName,
    /// Classes of a classifier and of its teacher
    #[arg(long, default_value_t = 1000)]
    pub classes: usize,
    /// Seed of the weights, the images and the masks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to compute
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    pub device: Named,
    /// f32, bf16 (products of bf16 numbers, summed in f32); on a GPU also tf32 (f32 whose products are rounded)
    #[arg(long, default_value = "f32")]
    pub precision: Precision,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Args)]
pub struct Point {
    /// Part of the patches that is hidden: of each view for dmjd, from teacher and student alike for dmae; for tinymim 0 hides none [default: 0.75, 0 for tinymim]
    #[arg(long, allow_negative_numbers = true, value_name = "RATIO")]
    pub mask_ratio: Option<f64>,
    /// Of maskedkd: patches that the teacher sees [default: half]
    #[arg(long, value_name = "K")]
    pub keep: Option<usize>,
    /// Of dmjd: views of each image [default: 2]
    #[arg(long, value_name = "N")]
    pub views: Option<usize>,
    /// Of dmae and tinymim: the teacher's block that is asked, from 1 [default: the method's]
    #[arg(long, value_name = "BLOCK")]
    pub teacher_block: Option<usize>,
}

/// A method, ready to take steps.
pub struct Subject {
    pub method: Box<dyn Method>,
    pub batch: Batch,
    pub device: Device,
    pub rng: Rng,
}

/// A command's arguments as they are when these flags are typed.
fn typed<A: Args>(flags: &[String]) -> Result<A> {
    let command = A::augment_args(clap::Command::new("masque").no_binary_name(true));
    let usage = |error: clap::Error| Error::usage(error.to_string().trim_start_matches("error: ").trim_end().to_string());
    A::from_arg_matches(&command.try_get_matches_from(flags).map_err(usage)?).map_err(usage)
}

fn flag(name: &str, value: impl std::fmt::Display) -> String {
    format!("--{name}={value}")
}

impl SubjectArgs {
    pub fn model(&self) -> &str {
        self.model.as_deref().unwrap_or(self.method.usual().0)
    }

    /// Its name, where the system has one; refuses one where it has none.
    pub fn teacher(&self) -> Result<Option<&str>> {
        match (self.method.usual().1, self.teacher.as_deref()) {
            (None, Some(given)) => Err(Error::usage(format!(
                "--teacher {given}: {} has no teacher; take --method dmae, maskedkd or tinymim",
                self.method.name()
            ))),
            (usual, given) => Ok(given.or(usual)),
        }
    }

    /// Refuses what a point says of another system.
    pub fn check(&self, point: &Point) -> Result<()> {
        let (of, method) = (|systems: &[System]| systems.contains(&self.method), self.method.name());
        let unread = [
            ("--mask-ratio", "mae, dmae, dmjd or tinymim", point.mask_ratio.is_some() && of(&[System::MaskedKd])),
            ("--keep", "maskedkd", point.keep.is_some() && !of(&[System::MaskedKd])),
            ("--views", "dmjd", point.views.is_some() && !of(&[System::Dmjd])),
            ("--teacher-block", "dmae or tinymim", point.teacher_block.is_some() && !of(&[System::Dmae, System::TinyMim])),
            ("--norm-pix", "mae, dmae or dmjd", self.norm_pix && of(&[System::MaskedKd, System::TinyMim])),
            ("--baseline", "dmjd", self.baseline != BaselineName::Mae && !of(&[System::Dmjd])),
        ];
        match unread.into_iter().find(|(.., unread)| *unread) {
            Some((flag, systems, _)) => Err(Error::usage(format!("{flag} is for --method {systems}, not {method}; leave it out"))),
            None if self.batch == 0 => Err(Error::usage("--batch 0: at least one image is needed")),
            None => Ok(()),
        }
    }

    /// Flags that the methods with a decoder share.
    fn masked(&self, point: &Point) -> Vec<String> {
        let mut flags = vec![
            flag("model", self.model()),
            flag("mask-ratio", point.mask_ratio.unwrap_or(0.75)),
            flag("decoder-dim", self.decoder_dim),
            flag("decoder-depth", self.decoder_depth),
            flag("decoder-heads", self.decoder_heads),
        ];
        flags.extend(self.patch_size.map(|patch| flag("patch-size", patch)));
        flags
    }

    fn autoencoder(&self, point: &Point) -> Vec<String> {
        let mut flags = self.masked(point);
        flags.extend(self.norm_pix.then(|| flag("norm-pix-loss", true)));
        flags
    }

    /// A teacher with random weights; a classifier where it is to answer classes.
    fn make_teacher(&self, name: &str, classes: Option<usize>, device: &Device, rng: &Rng) -> Result<Teacher> {
        let named = presets::named(name)?;
        named.needs_patches(name, "masque measure")?;
        let config = match classes {
            Some(_) => named.classifier(self.image_size, 0.0)?,
            None => named.encoder(self.image_size)?,
        };
        let config = VitConfig { patch: self.patch_size.unwrap_or(config.patch), ..config };
        config.check().map_err(|error| Error::usage(format!("--teacher {name}: {}", error.chain())))?;
        let mut b = ParamsBuilder::default();
        let network = match classes {
            Some(classes) => Network::Classifier(Classifier::new(
                &mut b,
                ClassifierConfig { vit: config, classes, pool: Pool::ClassToken, probe: false },
            )?),
            None => {
                let tokens = Tokens::new(&mut b, &config)?;
                Network::Encoder(Vit::new(&mut b, config, tokens, true, Start::Xavier)?)
            }
        };
        let mut params = b.build(Dtype::F32, &rng.within("teacher."))?;
        params.move_to(device, self.precision.dtype())?;
        Ok(Teacher::new(name, params, network))
    }

    /// The method on a device, looking at so much.
    fn build(&self, point: &Point, device: &Device, rng: &Rng) -> Result<Box<dyn Method>> {
        self.check(point)?;
        let teacher = |classes| {
            let name = self.teacher()?.ok_or_else(|| Error::new("this system has no teacher"))?;
            self.make_teacher(name, classes, device, rng)
        };
        self.teacher()?;
        Ok(match self.method {
            System::Mae => {
                let args: MaeArgs = typed(&self.autoencoder(point))?;
                Box::new(Mae::new(args.config(self.image_size, 3)?, Dtype::F32, rng)?)
            }
            System::Dmae => {
                let mut flags = self.autoencoder(point);
                flags.extend(point.teacher_block.map(|block| flag("teacher-aligned-blks-indices", block.saturating_sub(1))));
                let args: DmaeArgs = typed(&flags)?;
                let teacher = teacher(None)?;
                let args = match point.teacher_block {
                    // A teacher's block that is named needs the student's named too.
                    Some(_) => DmaeArgs {
                        aligned_blks_indices: Some(vec![3 * args.mae.config(self.image_size, 3)?.encoder.depth / 4 - 1]),
                        ..args
                    },
                    None => args,
                };
                Box::new(Dmae::new(args.config(args.mae.config(self.image_size, 3)?, &teacher)?, teacher, Dtype::F32, rng)?)
            }
            System::MaskedKd => {
                let named = presets::named(self.model())?;
                named.needs_patches(self.model(), "masque measure")?;
                let vit = named.classifier(self.image_size, 0.0)?;
                let vit = VitConfig { patch: self.patch_size.unwrap_or(vit.patch), ..vit };
                vit.check().map_err(|error| Error::usage(format!("--model {}: {}", self.model(), error.chain())))?;
                let masking: MaskingArgs = typed(&[flag("len-num-keep", point.keep.unwrap_or(vit.patches() / 2))])?;
                let logits: LogitArgs = typed(&[])?;
                let distilling = logits.config(&vit)?.ok_or_else(|| Error::new("there is nothing to distil"))?;
                let distilling = masking.apply(distilling, &vit)?;
                let teacher = teacher(Some(self.classes))?;
                if teacher.vit().grid() != vit.grid() {
                    return Err(Error::usage(format!(
                        "--teacher {} cuts an image into {:?} patches, --model {} into {:?}; both have to share the grid",
                        teacher.name,
                        teacher.vit().grid(),
                        self.model(),
                        vit.grid()
                    )));
                }
                let config = ClassifierConfig { vit, classes: self.classes, pool: Pool::ClassToken, probe: false };
                Box::new(MaskedKd::new(config, Some((teacher, distilling)), false, Dtype::F32, rng)?)
            }
            System::Dmjd => {
                let mut flags = self.masked(point);
                if self.baseline == BaselineName::Maskfeat {
                    flags.retain(|flag| !flag.starts_with("--decoder"));
                }
                flags.extend([flag("num-views", point.views.unwrap_or(2)), flag("mask-type", "rand")]);
                flags.push(flag("pred-type", if self.norm_pix { "norm-rgb" } else { "rgb" }));
                let args = DmjdArgs { baseline: self.baseline, ..typed(&flags)? };
                let networks = args.networks(self.image_size, 3)?;
                let targets = Targets::new(args.pred_type, &networks.0, args.norm_pix_eps, None)?;
                Box::new(Dmjd::new(args.config(networks, targets)?, Dtype::F32, rng)?)
            }
            System::TinyMim => {
                let mut flags = vec![flag("model", self.model()), flag("drop-path", 0)];
                flags.extend(self.patch_size.map(|patch| flag("patch-size", patch)));
                flags.extend(point.teacher_block.map(|block| flag("intermediate", block)));
                if let Some(ratio) = point.mask_ratio.filter(|&ratio| ratio != 0.0) {
                    flags.extend([flag("masking", "random"), flag("mask-ratio", ratio)]);
                }
                let args: TinymimArgs = typed(&flags)?;
                let teacher = teacher(None)?;
                Box::new(Tinymim::new(args.config(self.image_size, 3, teacher.vit())?, teacher, Dtype::F32, rng)?)
            }
        })
    }

    /// On its device, with a batch of random images, and targets where it answers classes.
    pub fn open(&self, point: &Point) -> Result<Subject> {
        let device = self.device.open()?;
        device.compute_in(self.precision)?;
        let rng = Rng::new(self.seed);
        let mut method = self.build(point, &device, &rng)?;
        method.params().move_to(&device, self.precision.dtype())?;
        let shape = [self.batch, 3, self.image_size, self.image_size];
        let images = Tensor::from_slice(&shape, &rng.normal("images", shape.iter().product()))?;
        let targets = match self.method {
            System::MaskedKd => {
                let mut targets = vec![0f32; self.batch * self.classes];
                targets.chunks_exact_mut(self.classes).enumerate().for_each(|(i, row)| row[i % self.classes] = 1.0);
                Some(Tensor::from_slice(&[self.batch, self.classes], &targets)?)
            }
            _ => None,
        };
        Ok(Subject { method, batch: Batch { targets, ..Batch::of_images(images) }, device, rng })
    }
}

impl Subject {
    /// As the methods' recipes have it, decay for matrices alone.
    pub fn optimizer(&mut self) -> Result<AdamW> {
        AdamW::new(groups::by_decay(self.method.params(), 0.05, &[]), (0.9, 0.95), 1e-8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Optimizer;
    use crate::tape::Tape;

    #[derive(clap::Parser)]
    struct Typed {
        #[command(flatten)]
        subject: SubjectArgs,
        #[command(flatten)]
        point: Point,
    }

    fn read(flags: &str) -> Typed {
        <Typed as clap::Parser>::parse_from(["measure"].into_iter().chain(flags.split_whitespace()))
    }

    #[test]
    fn every_system_takes_a_step() {
        for system in System::ALL {
            let small = "--model glyph_t --image-size 32 --batch 2 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --classes 10";
            let teacher = if system.has_teacher() { "--teacher glyph_s" } else { "" };
            let Typed { subject, point } = read(&format!("--method {} {small} {teacher}", system.name()));
            let mut s = subject.open(&point).unwrap();
            let mut optimizer = s.optimizer().unwrap();
            let tape = Tape::new();
            let loss = s.method.loss(&tape, &s.batch, &s.rng).unwrap().total;
            assert!(loss.value().item().is_finite(), "{}", system.name());
            tape.backward(&loss, &mut [s.method.params()]).unwrap();
            drop(loss);
            optimizer.step(s.method.params(), 1e-4).unwrap();
        }
    }

    #[test]
    fn what_says_something_of_another_system_is_refused() {
        for (flags, named) in [
            ("--method mae --keep 3", "--keep"),
            ("--method maskedkd --mask-ratio 0.5", "--mask-ratio"),
            ("--method mae --teacher base", "--teacher base"),
            ("--method tinymim --views 2", "--views"),
            ("--method dmjd --teacher-block 2", "--teacher-block"),
            ("--method mae --batch 0", "--batch 0"),
        ] {
            let Typed { subject, point } = read(flags);
            let error = subject.open(&point).err().unwrap().chain();
            assert!(error.contains(named), "{flags}: {error}");
        }
    }
}
