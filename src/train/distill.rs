//! `masque train` and `masque distill`: a classifier by DeiT's recipe, from labels alone or with a teacher of logits.

use super::args::{RunArgs, settings};
use super::augment::AugmentArgs;
use super::cache::{Kept, Shown};
use super::classify::{ClassifierArgs, Job, Sets, faster_head};
use super::feed::{Labelled, Labels};
use super::images::{CropArgs, CropName, ImagesArgs};
use super::run::{Ended, Schedule};
use super::start::{Ready, Start};
use super::teacher::{TeacherArgs, Wanted, check_answers, check_sees};
use crate::data::loader::Loader;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::methods::maskedkd::{Distilling, LogitArgs, MaskedKd, MaskingArgs};
use crate::methods::selection::Selection;
use crate::methods::teacher::{Network, Teacher};
use crate::nn::classifier::ClassifierConfig;
use crate::optim::Optimizer;
use crate::optim::adamw::AdamW;
use crate::optim::groups;
use crate::optim::lamb::Lamb;
use crate::optim::schedule::{TimmCosine, peak_per_512};
use crate::param::Params;
use crate::rng::Rng;
use crate::tensor::{Dtype, Tensor};
use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

const WARMUP_LR: f64 = 1e-6;

/// The recipe: the flags of DeiT's program.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub classifier: ClassifierArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub images: ImagesArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub crop: CropArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub augment: AugmentArgs,
    /// Take --lr as it is; without this flag it is the rate for 512 images
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub unscale_lr: bool,
    /// How the learning rate moves
    #[arg(long, value_enum, default_value_t = Sched::Cosine)]
    pub sched: Sched,
    /// Learning rate that the warm-up begins with
    #[arg(long, default_value_t = WARMUP_LR, value_name = "RATE")]
    pub warmup_lr: f64,
    /// Update rule
    #[arg(long, value_enum, default_value_t = Opt::Adamw)]
    pub opt: Opt,
    /// Betas of the update rule
    #[arg(long, value_delimiter = ',', action = ArgAction::Set, num_args = 1..=2, default_values_t = [0.9, 0.999], value_name = "B1,B2")]
    pub opt_betas: Vec<f64>,
    /// What is added to the root of the second moment
    #[arg(long, default_value_t = 1e-8, value_name = "EPS")]
    pub opt_eps: f64,
    /// The head learns this many times as fast
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub head_lr_scale: f64,
    /// Dropout; only 0 is built
    #[arg(long, default_value_t = 0.0, value_name = "RATE")]
    pub drop: f64,
    /// Most stochastic depth, reached in the last block (DeiT) or the same in all (DeiT-III)
    #[arg(long, default_value_t = 0.1, value_name = "RATE")]
    pub drop_path: f64,
    /// =false, or --no-train-mode, trains without stochastic depth
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = ArgAction::Set)]
    pub train_mode: bool,
    /// Only so many training images have labels that may be looked at: the first built-in ones, or ones spread over a sorted set; of the others the teacher's
    /// answers alone are learned [default: all]
    #[arg(long, value_name = "N")]
    #[serde(default)]
    pub labelled_images: Option<usize>,
    /// Train the attention, the head and the positions alone
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub attn_only: bool,
    /// Each class is a question of its own: binary cross-entropy, every class of a mixed image counting fully (DeiT-III)
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub bce_loss: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sched {
    /// timm's: by whole epochs, the first two at --warmup-lr, then up to the peak and down half a cosine
    Cosine,
    /// MAE's: with every update, from 0; better where epochs are few
    Updates,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Opt {
    Adamw,
    /// LAMB as DeiT-III trains with it (fusedlamb)
    #[value(alias = "fusedlamb")]
    Lamb,
}

/// `masque distill logit` and `deit`.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LogitDistillArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub train: TrainArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub teacher: TeacherArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub logits: LogitArgs,
}

/// `masque distill maskedkd`: the same with a masked teacher.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MaskedKdArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub distill: LogitDistillArgs,
    #[command(flatten)]
    #[serde(flatten)]
    pub masking: MaskingArgs,
}

impl TrainArgs {
    fn check(&self) -> Result<()> {
        let usage = |text: String| Err(Error::usage(text));
        if self.drop != 0.0 {
            return usage(format!("--drop {}: dropout is not built, as no published recipe uses it; leave the flag out", self.drop));
        }
        if self.run.blr != 1e-3 {
            return usage(format!("--blr {}: this command's rate is --lr, for 512 images, or as it is with --unscale-lr", self.run.blr));
        }
        if !(self.warmup_lr.is_finite() && self.warmup_lr >= 0.0) {
            return usage(format!("--warmup-lr {} is not a number from 0 on", self.warmup_lr));
        }
        if self.sched == Sched::Cosine && self.run.warmup_epochs.fract() != 0.0 {
            return usage(format!(
                "--warmup-epochs {}: --sched cosine moves by whole epochs; --sched updates takes fractions",
                self.run.warmup_epochs
            ));
        }
        if self.sched == Sched::Updates && self.warmup_lr != WARMUP_LR {
            return usage(format!("--warmup-lr {} is for --sched cosine; --sched updates rises from 0", self.warmup_lr));
        }
        if self.bce_loss && self.augment.smoothing != 0.0 {
            return usage(format!(
                "--bce-loss asks of each class whether its target is above 0, which smoothing makes of every class; give --smoothing 0 with it, not {}",
                self.augment.smoothing
            ));
        }
        Ok(())
    }

    /// Which of so many images have labels.
    fn labelled(&self, images: usize, mixed: bool) -> Result<Option<Labelled>> {
        let Some(count) = self.labelled_images else { return Ok(None) };
        let usage = |text: String| Err(Error::usage(format!("--labelled-images {count}: {text}")));
        match count {
            0 => usage("at least one label is needed; --distillation-alpha 1 learns from the teacher alone".into()),
            count if count > images => usage(format!("there are {images} training images; leave the flag out for all of them")),
            _ if mixed => usage("a mixed image has two labels, of which one may be missing; give --mixup 0 --cutmix 0".into()),
            _ if self.bce_loss => usage("--bce-loss takes an image without a label for one of no class; leave one of the two out".into()),
            count => Ok(Some(Labelled { count, of: images, spread: !self.images.is_synthetic() })),
        }
    }

    fn schedule(&self) -> Schedule {
        let lr = self.run.lr.unwrap_or(5e-4);
        let peak = if self.unscale_lr { lr } else { peak_per_512(lr, self.run.effective_batch()) };
        if self.sched == Sched::Updates {
            return Schedule::Mae { peak, min: self.run.min_lr, warmup: self.run.warmup_epochs, from: 0.0, fixed: false };
        }
        let (epochs, warmup) = (self.run.epochs as usize, self.run.warmup_epochs as usize);
        Schedule::Timm(TimmCosine::new(peak, epochs, self.run.min_lr, warmup, self.warmup_lr))
    }

    fn optimizer(&self, params: &Params) -> Result<Box<dyn Optimizer>> {
        if !(self.head_lr_scale.is_finite() && self.head_lr_scale > 0.0) {
            return Err(Error::usage(format!("--head-lr-scale {} is not a number above 0", self.head_lr_scale)));
        }
        let betas = match self.opt_betas[..] {
            [first, second] if (0.0..1.0).contains(&first) && (0.0..1.0).contains(&second) => (first, second),
            _ => return Err(Error::usage(format!("--opt-betas {:?} are not two numbers in [0, 1)", self.opt_betas))),
        };
        if !(self.opt_eps.is_finite() && self.opt_eps > 0.0) {
            return Err(Error::usage(format!("--opt-eps {} is not a number above 0", self.opt_eps)));
        }
        let groups = groups::by_decay(params, self.run.weight_decay, &["pos_embed", "cls_token"]);
        let groups = faster_head(groups, params, self.head_lr_scale);
        Ok(match self.opt {
            Opt::Adamw => Box::new(AdamW::new(groups, betas, self.opt_eps)?),
            Opt::Lamb => Box::new(Lamb::new(groups, betas, self.opt_eps, Lamb::MOST)?),
        })
    }
}

/// What a command adds to the recipe: from the student's configuration, its teacher and how it teaches.
type Teaching<'a> = dyn FnOnce(&ClassifierConfig, &Device, Shown, &mut dyn FnMut(&str)) -> Result<Option<(Teacher, Distilling)>> + 'a;

struct Command<'a> {
    words: &'static str,
    folder: &'static str,
    args: &'a TrainArgs,
    settings: serde_json::Map<String, serde_json::Value>,
    views: Option<u64>,
    cached: bool,
}

impl Command<'_> {
    fn run(self, teaching: Box<Teaching>, say: &mut dyn FnMut(&str)) -> Result<Ended> {
        let Command { args, .. } = self;
        args.check()?;
        let mixing = args.augment.mixing()?;
        if !args.classifier.eval {
            mixing.check(args.run.batch_size)?;
        }
        if self.cached && mixing.is_on() {
            return Err(Error::usage(
                "--teacher-cache keeps what is answered to images that return, and mixed images do not; give --mixup 0 --cutmix 0, or leave it out",
            ));
        }
        let mut sets = Sets::open(&args.classifier, &args.run, &args.images, args.augment.repeated_aug, say)?;
        sets.loading.views = self.views;
        sets.loading.check()?;
        let drop_path = if args.train_mode { args.drop_path } else { 0.0 };
        let config = args.classifier.config(&args.images, sets.classes, drop_path, false)?;
        let mut crop = args.crop.clone();
        if crop.crop == CropName::Resized && args.images.input_size <= 32 {
            say("up to 32 pixels images are cut out of a border of 4 and not resized, as in DeiT's program");
            crop.crop = CropName::Padded;
        }
        let transform = args.augment.transform(&args.images, &crop)?;
        let labels = Labels { classes: sets.classes, mixing, labelled: args.labelled(sets.train.len(), mixing.is_on())? };
        let job = Job {
            word: self.words,
            classifier: &args.classifier,
            run: &args.run,
            images: &args.images,
            crop: &args.crop,
            sets,
            settings: self.settings,
        };
        if args.classifier.eval {
            return job.evaluate(config, say);
        }
        let start = Start::of(&args.run, self.folder)?;
        let device = args.run.open_device()?;
        let shown = Shown {
            images: job.sets.train.clone(),
            transform: transform.clone(),
            statistics: args.images.statistics(),
            seed: args.run.seed,
            views: self.views,
            precision: args.run.precision,
            ranks: args.run.ranks.clone(),
        };
        let taught = teaching(&config, &device, shown, say)?;
        if let Some(count) = args.labelled_images.filter(|_| taught.is_none()) {
            return Err(Error::usage(format!(
                "--labelled-images {count}: images without labels teach nothing where there is no teacher; give --train-images {count}"
            )));
        }
        let rng = Rng::new(args.run.seed);
        let mut method = MaskedKd::new(config, taught, args.bce_loss, Dtype::F32, &rng)?;
        if start.from.is_none() {
            args.classifier.load(&mut method.params, &method.student, &rng, say)?;
        }
        if args.attn_only {
            // What a ConViT's stages call so is a convolution.
            let attention = |name: &str| name.contains(".attn.") && !name.starts_with("blocks1.") && !name.starts_with("blocks2.");
            method.params.train_only(|name| attention(name) || name.starts_with("head") || name == "pos_embed");
        }
        method.params.move_to(&device, args.run.precision.dtype())?;
        let ready = Ready {
            command: self.words,
            optimizer: args.optimizer(&method.params)?,
            method: Box::new(method),
            loader: Loader::new(job.sets.train.clone(), transform, job.sets.loading),
            validation: Some(job.sets.in_order(false, args.crop.evaluation(args.images.input_size)?)),
            feed: job.feed(device, Some(labels)),
            schedule: args.schedule(),
            after: None,
            settings: job.settings,
            classes: job.sets.train.classes().to_vec(),
        };
        start.train(&args.run, ready, say)
    }
}

fn resolved(args: &TrainArgs) -> TrainArgs {
    TrainArgs { images: args.images.resolved(), ..args.clone() }
}

pub fn train(args: &TrainArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let settings = settings(&resolved(args))?;
    let command = Command { words: "train", folder: "train", args, settings, views: None, cached: false };
    args.classifier.learns_alone()?;
    command.run(Box::new(|_, _, _, _| Ok(None)), say)
}

const LABELS_ALONE: &str = "--distillation-type none: the student learns from labels alone, no teacher is opened";

/// The teacher of logits, checked against the student.
fn opened(
    teacher: &TeacherArgs,
    train: &TrainArgs,
    config: &ClassifierConfig,
    distilling: &Distilling,
    device: &Device,
    shown: &Shown,
    say: &mut dyn FnMut(&str),
) -> Result<Teacher> {
    if distilling.masks_teacher() {
        teacher.without_cache("the teacher sees other patches each time")?;
    }
    let args = teacher;
    let mut teacher = teacher.open(Wanted::Classifier, device, train.run.precision, say)?;
    check_sees(&teacher, &config.vit, distilling.masks_teacher())?;
    check_answers(&teacher, config.classes, shown.images.classes())?;
    if distilling.selection == Selection::Teacher && matches!(teacher.network, Network::Cait(_)) {
        return Err(Error::usage(format!(
            "--selection teacher: {} is a CaiT, whose class token looks at patches in blocks of its own; take another rule",
            teacher.name
        )));
    }
    let logits = |teacher: &Teacher, images: &Tensor| teacher.logits(images, None);
    args.remember(&mut teacher, Kept { what: "logits", block: None }, shown, logits, say)?;
    Ok(teacher)
}

pub fn logit(args: &LogitDistillArgs, deit: bool, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let settings = settings(&LogitDistillArgs { train: resolved(&args.train), ..args.clone() })?;
    let cached = args.teacher.teacher_cache.is_some();
    let words = if deit { "distill deit" } else { "distill logit" };
    args.train.classifier.needs_patches("masque distill")?;
    let folder = if deit { "distill-deit" } else { "distill-logit" };
    let command = Command { words, folder, args: &args.train, settings, views: args.teacher.views, cached };
    let teaching: Box<Teaching> = Box::new(move |config, device, shown, say| {
        if deit != config.vit.distillation_token {
            return Err(Error::usage(match deit {
                true => format!(
                    "--model {} has no distillation token, on which DeiT's loss works alone; take a deit_..._distilled_ model, or masque distill logit",
                    args.train.classifier.model
                ),
                false => format!(
                    "--model {} has a distillation token; take masque distill deit, or a model without _distilled",
                    args.train.classifier.model
                ),
            }));
        }
        let Some(distilling) = args.logits.config(&config.vit)? else {
            args.teacher.without_cache("there is no teacher")?;
            say(LABELS_ALONE);
            return Ok(None);
        };
        let teacher = opened(&args.teacher, &args.train, config, &distilling, device, &shown, say)?;
        say(&distilling.text(&teacher, &config.vit));
        Ok(Some((teacher, distilling)))
    });
    command.run(teaching, say)
}

pub fn maskedkd(args: &MaskedKdArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    let LogitDistillArgs { train, teacher: taught, logits } = &args.distill;
    train.classifier.needs_patches("masque distill")?;
    let distill = LogitDistillArgs { train: resolved(train), ..args.distill.clone() };
    let settings = settings(&MaskedKdArgs { distill, ..args.clone() })?;
    let cached = taught.teacher_cache.is_some();
    let command = Command { words: "distill maskedkd", folder: "distill-maskedkd", args: train, settings, views: taught.views, cached };
    let teaching: Box<Teaching> = Box::new(move |config, device, shown, say| {
        let Some(logits) = logits.config(&config.vit)? else {
            taught.without_cache("there is no teacher")?;
            say(LABELS_ALONE);
            return Ok(None);
        };
        let distilling = args.masking.apply(logits, &config.vit)?;
        let teacher = opened(taught, train, config, &distilling, device, &shown, say)?;
        say(&distilling.text(&teacher, &config.vit));
        Ok(Some((teacher, distilling)))
    });
    command.run(teaching, say)
}
