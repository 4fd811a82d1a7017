//! `masque finetune` and `masque probe`: a classifier from a pre-trained encoder, or from scratch.

use super::args::{RunArgs, settings};
use super::augment::AugmentArgs;
use super::evaluate::{Evaluation, evaluate, say_skipped};
use super::exchange;
use super::feed::{Feed, Labels};
use super::images::{CropArgs, ImagesArgs, Part};
use super::knn;
use super::run::Ended;
use super::start::{Ready, Start};
use crate::data::Dataset;
use crate::data::loader::{Loader, LoaderOptions, Order};
use crate::data::mixing::Mixing;
use crate::data::open::same_classes;
use crate::data::transform::Transform;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::methods::supervised::Supervised;
use crate::nn;
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::presets::{self, Family};
use crate::nn::vit::{Position, Tokens, Vit, VitConfig};
use crate::nn::weights::{self, Head, Policy, Which};
use crate::optim::Optimizer;
use crate::optim::adamw::AdamW;
use crate::optim::groups::{self, Group, LayerDecay};
use crate::optim::lars::Lars;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tensor::{Dtype, Tensor};
use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// The model and what it starts from.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ClassifierArgs {
    /// Model by its published name or its size: vit_base_patch16, deit_small_patch16_224, convit_base_patch16, base, glyph_s ...
    #[arg(long, default_value = "vit_large_patch16", value_name = "NAME")]
    pub model: String,
    /// Side of a patch in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub patch_size: Option<usize>,
    /// Pre-trained encoder: a checkpoint of masque, a .pth or a .safetensors [default: from scratch]
    #[arg(long, value_name = "PATH")]
    pub finetune: Option<PathBuf>,
    /// Take the running average of a masque checkpoint's weights
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub finetune_ema: bool,
    /// How an encoder starts from scratch
    #[arg(long, value_enum, default_value_t = StartName::Normal)]
    pub start: StartName,
    /// Average the patches, then norm and head; =false, or --cls-token, reads the class token (of a ConViT, which has none, the first patch)
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = ArgAction::Set)]
    pub global_pool: bool,
    /// What becomes of a head in --finetune that fits the model
    #[arg(long, value_enum, default_value_t = HeadName::Ask)]
    pub head: HeadName,
    /// Classes of the head [default: the dataset's]
    #[arg(long, value_name = "N")]
    pub nb_classes: Option<usize>,
    /// Deviation of the new head's weights on a pre-trained encoder
    #[arg(long, default_value_t = 2e-5, value_name = "DEVIATION")]
    pub head_std: f64,
    /// Only evaluate --resume and stop
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub eval: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartName {
    /// As classifiers do: normal with deviation 0.02
    Normal,
    /// As pre-training does: Xavier-uniform matrices, sines and cosines for positions; better for narrow models
    Xavier,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadName {
    /// An error: the checkpoint is a fine-tuned one already
    Ask,
    /// It stays, as when images become larger
    Keep,
    /// It is drawn anew
    Fresh,
}

impl ClassifierArgs {
    /// The classifier for these images.
    pub fn config(&self, images: &ImagesArgs, classes: usize, drop_path: f64, probe: bool) -> Result<ClassifierConfig> {
        let named = presets::named(&self.model)?;
        let classifier = match named.family {
            Some(Family::Mae) => Some(self.model.trim_start_matches("mae_").to_string()),
            Some(Family::ConvMae) => Some(format!("{}_patch{}", named.size, named.patch)),
            _ => None,
        };
        if let Some(classifier) = classifier {
            return Err(Error::usage(format!("--model {} is a model that is pre-trained; its classifier is {classifier}", self.model)));
        }
        let mut vit = named.classifier(images.input_size, drop_path)?;
        (vit.patch, vit.channels) = (self.patch_size.unwrap_or(vit.patch), images.in_chans);
        vit.check().map_err(|error| Error::usage(format!("--input-size and --patch-size: {}", error.chain())))?;
        if !(0.0..1.0).contains(&drop_path) {
            return Err(Error::usage(format!("--drop-path {drop_path} is not in [0, 1)")));
        }
        if vit.distillation_token && self.global_pool {
            return Err(Error::usage(format!("--model {} reads its two tokens; give --global-pool=false with it", self.model)));
        }
        let pool = if self.global_pool { Pool::Mean } else { Pool::ClassToken };
        Ok(ClassifierConfig { vit, classes, pool, probe })
    }

    /// Refuses a ConViT, where `command` needs a class token.
    pub fn needs_patches(&self, command: &str) -> Result<()> {
        presets::named(&self.model)?.needs_patches(&self.model, command)
    }

    /// Refuses a student of a teacher where there is none.
    pub fn learns_alone(&self) -> Result<()> {
        if presets::named(&self.model)?.family == Some(Family::Distilled) {
            return Err(Error::usage(format!(
                "--model {}: the second head of a distilled model learns from a teacher, which this command does not have; masque distill deit trains one, masque evaluate judges one",
                self.model
            )));
        }
        Ok(())
    }

    /// How many classes the head has; the labels of both sets must fit.
    fn classes(&self, train: &dyn Dataset, val: &dyn Dataset) -> Result<usize> {
        let found = train.classes().len();
        let classes = self.nb_classes.unwrap_or(found);
        if classes < found || classes == 0 {
            return Err(Error::usage(format!(
                "--nb-classes {classes}: the training images have {found} classes; leave the flag out or give at least as many"
            )));
        }
        same_classes(train, val)?;
        Ok(classes)
    }

    /// The encoder's weights from --finetune, and a new head.
    pub fn load(&self, params: &mut Params, model: &Classifier, rng: &Rng, say: &mut dyn FnMut(&str)) -> Result<()> {
        let Some(path) = &self.finetune else {
            if self.finetune_ema {
                return Err(Error::usage("--finetune-ema says which weights --finetune takes; give a checkpoint by --finetune PATH"));
            }
            return if self.start == StartName::Xavier { start_like_mae(params, model, rng) } else { Ok(()) };
        };
        if self.start != StartName::Normal {
            return Err(Error::usage("--start says how a model starts from scratch; leave it out beside --finetune"));
        }
        if !(self.head_std.is_finite() && self.head_std >= 0.0) {
            return Err(Error::usage(format!("--head-std {} is not a number from 0 on", self.head_std)));
        }
        let file = weights::open(path, if self.finetune_ema { Which::Averages } else { Which::Trained })?;
        let head = match self.head {
            HeadName::Ask => Head::Ask,
            HeadName::Keep => Head::Keep,
            HeadName::Fresh => Head::Fresh,
        };
        let report = weights::load(params, &model.vit.config, &file, Policy::Encoder(head))?;
        say(&report.text());
        if report.has_head() {
            return Ok(());
        }
        for name in ["head.weight", "head.1.weight"] {
            let Ok(id) = params.find(name) else { continue };
            let shape = params.value(id).shape().to_vec();
            let drawn = rng.normal("fresh head", shape.iter().product());
            let drawn: Vec<f32> = drawn.into_iter().map(|z| (z as f64 * self.head_std) as f32).collect();
            params.set_value(id, &Tensor::from_slice(&shape, &drawn)?)?;
        }
        Ok(())
    }
}

/// Gives the encoder the values that its pre-training would begin with.
fn start_like_mae(params: &mut Params, model: &Classifier, rng: &Rng) -> Result<()> {
    let config = VitConfig { position: Position::SinCos, ..model.vit.config.clone() };
    let learned = config.stages.is_some() || model.vit.config.position == Position::Learned;
    if !learned || config.layer_scale.is_some() {
        return Err(Error::usage(
            "--start xavier is for plain ViT, DeiT and ConViT classifiers; leave it out, or choose a vit_, deit_ or convit_ model",
        ));
    }
    let mut b = ParamsBuilder::default();
    let tokens = Tokens::new(&mut b, &config)?;
    let normed = params.find("norm.weight").is_ok();
    Vit::new(&mut b, config, tokens, normed, nn::Start::Xavier)?;
    let fresh = b.build(params.dtype(), rng)?;
    fresh.ids().try_for_each(|id| params.set_value(params.find(fresh.name(id))?, fresh.value(id)))
}

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FinetuneArgs {
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
    /// Most stochastic depth, reached in the last block
    #[arg(long, default_value_t = 0.1, value_name = "RATE")]
    pub drop_path: f64,
    /// A block learns this much as fast as the one above it
    #[arg(long, default_value_t = 0.75, value_name = "FACTOR")]
    pub layer_decay: f64,
    /// Betas of AdamW
    #[arg(long, value_delimiter = ',', action = ArgAction::Set, num_args = 1..=2, default_values_t = [0.9, 0.999], value_name = "B1,B2")]
    pub betas: Vec<f64>,
    /// The head learns this many times as fast
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub head_lr_scale: f64,
    #[command(flatten)]
    #[serde(flatten)]
    pub augment: AugmentArgs,
}

impl FinetuneArgs {
    fn optimizer(&self, params: &Params, depth: usize) -> Result<Box<dyn Optimizer>> {
        for (flag, value) in [("--layer-decay", self.layer_decay), ("--head-lr-scale", self.head_lr_scale)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::usage(format!("{flag} {value} is not a number above 0")));
            }
        }
        let last = depth + 1;
        let rule = LayerDecay { weight_decay: self.run.weight_decay, decay: self.layer_decay, last, no_decay: &["cls_token", "pos_embed"] };
        let groups = rule.groups(params, |name| groups::vit_layer(name, last))?;
        let betas = match self.betas[..] {
            [first, second] if (0.0..1.0).contains(&first) && (0.0..1.0).contains(&second) => (first, second),
            _ => return Err(Error::usage(format!("--betas {:?} are not two numbers in [0, 1)", self.betas))),
        };
        Ok(Box::new(AdamW::new(faster_head(groups, params, self.head_lr_scale), betas, 1e-8)?))
    }
}

/// The same groups with the head's parameters in groups of their own that learn so many times as fast.
pub fn faster_head(groups: Vec<Group>, params: &Params, factor: f64) -> Vec<Group> {
    if factor == 1.0 {
        return groups;
    }
    let apart = |group: Group| {
        let (head, rest): (Vec<_>, Vec<_>) = group.params.iter().partition(|&&id| params.name(id).starts_with("head"));
        let fast = Group { name: format!("{}_head", group.name), lr_scale: group.lr_scale * factor, params: head, ..group.clone() };
        [Group { params: rest, ..group }, fast].into_iter().filter(|group| !group.params.is_empty())
    };
    groups.into_iter().flat_map(apart).collect()
}

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProbeArgs {
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
    /// No training: each image is classified by its so many nearest training images [default: train a linear head; 20 where no number is given]
    #[arg(long, num_args = 0..=1, default_missing_value = "20", value_name = "NEIGHBOURS")]
    pub knn: Option<usize>,
    /// Temperature of the neighbours' votes
    #[arg(long, default_value_t = 0.07, value_name = "T")]
    pub knn_temperature: f64,
}

/// What is the same for both: the sets, how they are read, how batches are made.
pub struct Sets {
    pub train: Arc<dyn Dataset>,
    pub val: Arc<dyn Dataset>,
    pub classes: usize,
    pub loading: LoaderOptions,
}

impl Sets {
    pub fn open(
        classifier: &ClassifierArgs,
        run: &RunArgs,
        images: &ImagesArgs,
        repeated: bool,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self> {
        run.check()?;
        images.check()?;
        let (train, val) = (images.open(Part::Train)?, images.open(Part::Val)?);
        train.notes().iter().chain(val.notes()).for_each(|note| say(note));
        let classes = classifier.classes(&*train, &*val)?;
        let order = if repeated { Order::Repeated { times: 3 } } else { Order::Shuffled };
        let loading = LoaderOptions {
            batch: run.batch_size,
            order,
            workers: run.workers(),
            seed: run.seed,
            strict: images.strict_data,
            rank: run.ranks.rank(),
            ranks: run.ranks.world(),
            ..LoaderOptions::default()
        };
        Ok(Self { train, val, classes, loading })
    }

    pub fn in_order(&self, train: bool, transform: Transform) -> Loader {
        let set = if train { &self.train } else { &self.val };
        Loader::new(set.clone(), transform, LoaderOptions { order: Order::Sequential, views: None, ..self.loading })
    }
}

pub fn finetune(args: &FinetuneArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    args.classifier.learns_alone()?;
    let mixing = args.augment.mixing()?;
    if !args.classifier.eval {
        mixing.check(args.run.batch_size)?;
    }
    let sets = Sets::open(&args.classifier, &args.run, &args.images, args.augment.repeated_aug, say)?;
    let config = args.classifier.config(&args.images, sets.classes, args.drop_path, false)?;
    let depth = config.vit.depth;
    let labels = Labels { classes: sets.classes, mixing, labelled: None };
    let settings = settings(&FinetuneArgs { images: args.images.resolved(), ..args.clone() })?;
    let job =
        Job { word: "finetune", classifier: &args.classifier, run: &args.run, images: &args.images, crop: &args.crop, sets, settings };
    job.train(config, args.augment.transform(&args.images, &args.crop)?, labels, |params| args.optimizer(params, depth), say)
}

pub fn probe(args: &ProbeArgs, say: &mut dyn FnMut(&str)) -> Result<Ended> {
    args.classifier.learns_alone()?;
    let sets = Sets::open(&args.classifier, &args.run, &args.images, false, say)?;
    let config = args.classifier.config(&args.images, sets.classes, 0.0, args.knn.is_none())?;
    let settings = settings(&ProbeArgs { images: args.images.resolved(), ..args.clone() })?;
    let job = Job { word: "probe", classifier: &args.classifier, run: &args.run, images: &args.images, crop: &args.crop, sets, settings };
    if let Some(neighbours) = args.knn {
        return job.neighbours(config, knn::Knn { neighbours, temperature: args.knn_temperature }, say);
    }
    let labels = Labels { classes: job.sets.classes, mixing: Mixing { smoothing: 0.0, ..Mixing::default() }, labelled: None };
    let transform = args.crop.training(args.images.input_size)?;
    let decay = args.run.weight_decay;
    job.train(config, transform, labels, |params| Ok(Box::new(Lars::new(groups::all(params, decay), 0.9, 0.001)?)), say)
}

pub struct Job<'a> {
    pub word: &'static str,
    pub classifier: &'a ClassifierArgs,
    pub run: &'a RunArgs,
    pub images: &'a ImagesArgs,
    pub crop: &'a CropArgs,
    pub sets: Sets,
    pub settings: serde_json::Map<String, serde_json::Value>,
}

impl Job<'_> {
    /// The model on its device, with its starting weights; a run that is gone on with brings its own.
    fn model(&self, config: ClassifierConfig, device: &Device, resumed: bool, say: &mut dyn FnMut(&str)) -> Result<Supervised> {
        let rng = Rng::new(self.run.seed);
        let mut model = Supervised::new(config, Dtype::F32, &rng)?;
        if !resumed {
            self.classifier.load(&mut model.params, &model.model, &rng, say)?;
        }
        model.params.move_to(device, self.run.precision.dtype())?;
        Ok(model)
    }

    pub fn feed(&self, device: Device, labels: Option<Labels>) -> Feed {
        let [mean, std] = self.images.statistics();
        Feed { device, mean, std, labels, bytes: false }
    }

    fn train(
        self,
        config: ClassifierConfig,
        transform: Transform,
        labels: Labels,
        optimizer: impl FnOnce(&Params) -> Result<Box<dyn Optimizer>>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Ended> {
        if self.classifier.eval {
            return self.evaluate(config, say);
        }
        let start = Start::of(self.run, self.word)?;
        let device = self.run.open_device()?;
        let model = self.model(config, &device, start.from.is_some(), say)?;
        let ready = Ready {
            command: self.word,
            optimizer: optimizer(&model.params)?,
            method: Box::new(model),
            loader: Loader::new(self.sets.train.clone(), transform, self.sets.loading),
            validation: Some(self.sets.in_order(false, self.crop.evaluation(self.images.input_size)?)),
            feed: self.feed(device, Some(labels)),
            schedule: self.run.schedule(),
            after: None,
            settings: self.settings,
            classes: self.sets.train.classes().to_vec(),
        };
        start.train(self.run, ready, say)
    }

    /// What `--eval --resume PATH` says of a checkpoint, whoever wrote it.
    pub fn evaluate(self, config: ClassifierConfig, say: &mut dyn FnMut(&str)) -> Result<Ended> {
        if self.run.profile.profile.is_some() {
            return Err(Error::usage("--profile is about updates, and --eval makes none; leave one of them out"));
        }
        let path = match self.run.resume.as_deref() {
            Some("auto") => Start::of(self.run, self.word)?.from.map(|(path, _)| path),
            path => path.map(PathBuf::from),
        };
        let missing = || Error::usage("--eval evaluates what --resume names; give a checkpoint by --resume PATH, or use masque evaluate");
        let file = weights::open(path.ok_or_else(missing)?, Which::Trained)?;
        let mut model = Supervised::new(config, Dtype::F32, &Rng::new(self.run.seed))?;
        say(&weights::load(&mut model.params, &model.model.vit.config, &file, Policy::Strict)?.text());
        let feed = self.feed(self.run.open_device()?, None);
        model.params.move_to(&feed.device, self.run.precision.dtype())?;
        let loader = self.sets.in_order(false, self.crop.evaluation(self.images.input_size)?);
        exchange::compare(&self.run.ranks, &model.params, "before the evaluation")?;
        let found = evaluate(&model, &loader, &feed, &self.run.ranks)?;
        say_skipped(&loader, &self.run.ranks, say)?;
        say(&found.to_string());
        Ok(Ended { last: Some(found), ..Ended::nothing() })
    }

    fn neighbours(self, config: ClassifierConfig, knn: knn::Knn, say: &mut dyn FnMut(&str)) -> Result<Ended> {
        let run = self.run;
        let given = [
            ("--resume", run.resume.is_some()),
            ("--eval", self.classifier.eval),
            ("--output-dir", run.output_dir.is_some()),
            ("--profile", run.profile.profile.is_some()),
        ];
        if let Some((flag, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(Error::usage(format!("{flag} has no meaning with --knn, which trains and writes nothing; leave it out")));
        }
        if !run.ranks.is_alone() {
            return Err(Error::usage(format!("--knn is done by one process, and {} were started; start one", run.ranks.world())));
        }
        let device = self.run.open_device()?;
        let model = self.model(config, &device, false, say)?;
        let feed = self.feed(device, None);
        let transform = self.crop.evaluation(self.images.input_size)?;
        let known = knn::features(&model, &self.sets.in_order(true, transform.clone()), &feed, say)?;
        let asked = knn::features(&model, &self.sets.in_order(false, transform), &feed, say)?;
        let accuracy = knn.classify(&known, &asked, self.sets.classes)?;
        say(&format!(
            "{} nearest of {} training images, temperature {}: acc@1 {:.2} % acc@5 {:.2} % on {} images",
            knn.neighbours.min(known.labels.len()),
            known.labels.len(),
            knn.temperature,
            accuracy[0],
            accuracy[1],
            asked.labels.len()
        ));
        let last = Evaluation { loss: f64::NAN, accuracy: Some(accuracy), images: asked.labels.len() };
        Ok(Ended { last: Some(last), ..Ended::nothing() })
    }
}
