//! A model out of a checkpoint, whoever wrote it: what it is stands in its settings, or is read off its tensors.

use super::checkpoint;
use super::dmjd::DmjdPretrainArgs;
use super::images::ImagesArgs;
use super::maskfeat::MaskFeatPretrainArgs;
use crate::device::ranks::Ranks;
use crate::device::{Named, Precision};
use crate::error::{Context, Error, Result};
use crate::formats::{self, Checkpoint, TensorFile};
use crate::methods::Method;
use crate::methods::convmae::ConvMaeArgs;
use crate::methods::dmjd::Dmjd;
use crate::methods::mae::{Mae, MaeArgs, MaeConfig};
use crate::methods::maskfeat::MaskFeat;
use crate::methods::supervised::Supervised;
use crate::nn::Start;
use crate::nn::classifier::{ClassifierConfig, Pool};
use crate::nn::contents::Contents;
use crate::nn::names;
use crate::nn::presets;
use crate::nn::stages::StagesConfig;
use crate::nn::vit::{DropPath, Tokens, Vit, VitConfig};
use crate::nn::weights::{self, Policy, Which};
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::targets::pixels;
use crate::tensor::Dtype;
use clap::Args;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Which model, and where it computes.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Checkpoint of masque, .pth or .safetensors
    pub checkpoint: PathBuf,
    /// Take the running average of the weights
    #[arg(long)]
    pub ema: bool,
    /// Name of the model, where the file does not say it and its sizes are no published ones
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Where to compute
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    pub device: Named,
    /// f32, bf16 (products of bf16 numbers, summed in f32; on a CPU that has it, and on a GPU); on a GPU also tf32
    #[arg(long, default_value = "f32", value_name = "f32|bf16|tf32")]
    pub precision: Precision,
}

pub enum Model {
    Mae(Box<Mae>),
    Dmjd(Box<Dmjd>),
    MaskFeat(Box<MaskFeat>),
    Classifier(Box<Supervised>),
    /// An encoder without head or decoder.
    Encoder(Box<(Params, Vit)>),
}

pub struct Opened {
    pub model: Model,
    /// The settings of the run that made it; empty where the file is not masque's.
    pub settings: Map<String, Value>,
    /// The classes that it learned; empty where the file does not say.
    pub classes: Vec<String>,
    /// What was loaded, for a person.
    pub report: String,
}

impl Opened {
    pub fn vit(&self) -> &Vit {
        match &self.model {
            Model::Mae(mae) => &mae.encoder,
            Model::Dmjd(dmjd) => dmjd.model.encoder(),
            Model::MaskFeat(maskfeat) => maskfeat.model.encoder(),
            Model::Classifier(classifier) => &classifier.model.vit,
            Model::Encoder(encoder) => &encoder.1,
        }
    }

    pub fn params(&self) -> &Params {
        match &self.model {
            Model::Mae(mae) => &mae.params,
            Model::Dmjd(dmjd) => &dmjd.params,
            Model::MaskFeat(maskfeat) => &maskfeat.params,
            Model::Classifier(classifier) => &classifier.params,
            Model::Encoder(encoder) => &encoder.0,
        }
    }

    /// What it learned by, or None of an encoder alone.
    pub fn method(&self) -> Option<&dyn Method> {
        match &self.model {
            Model::Mae(mae) => Some(&**mae),
            Model::Dmjd(dmjd) => Some(&**dmjd),
            Model::MaskFeat(maskfeat) => Some(&**maskfeat),
            Model::Classifier(classifier) => Some(&**classifier),
            Model::Encoder(_) => None,
        }
    }

    /// Side of its images.
    pub fn side(&self) -> usize {
        self.vit().config.image[0]
    }

    /// What the run that made it had for a flag.
    pub fn setting(&self, flag: &str) -> Option<&Value> {
        self.settings.get(flag).filter(|value| !value.is_null())
    }

    /// The images that it is for: what was typed, else what its run had. The path is empty where neither says one.
    pub fn images(&self, data_path: Option<&PathBuf>, [mean, std]: [&Option<Vec<f32>>; 2]) -> Result<ImagesArgs> {
        let own = |flag: &str| Some(self.setting(flag)?.as_array()?.iter().filter_map(Value::as_f64).map(|x| x as f32).collect());
        let path = || self.setting("data-path").and_then(Value::as_str).map(PathBuf::from);
        let images = ImagesArgs {
            data_path: data_path.cloned().or_else(path).unwrap_or_default(),
            input_size: self.side(),
            in_chans: self.vit().config.channels,
            train_images: None,
            data_fraction: None,
            val_images: None,
            strict_data: false,
            mean: mean.clone().or_else(|| own("mean")),
            std: std.clone().or_else(|| own("std")),
        };
        images.check()?;
        Ok(images)
    }
}

impl ModelArgs {
    pub fn open(&self) -> Result<Opened> {
        self.open_for(&Ranks::alone())
    }

    /// The same on the device of one of several ranks.
    pub fn open_for(&self, ranks: &Ranks) -> Result<Opened> {
        let device = ranks.device(self.device)?.open()?;
        device.compute_in(self.precision)?;
        let shown = || self.checkpoint.display().to_string();
        let stored = weights::open(&self.checkpoint, if self.ema { Which::Averages } else { Which::Trained })?;
        let settings = checkpoint::settings(&stored)?;
        let file = names::to_official(&stored)?.file;
        let contents = Contents::of(&file)?;
        if contents.cait.is_some() {
            return Err(Error::usage(format!("{} is a CaiT, which is a teacher here: masque distill takes it by --teacher-path", shown())));
        }
        let vit =
            encoder_of(&contents, &settings, self.model.as_deref()).with_context(|| format!("{}: give its name by --model", shown()))?;
        let (on, sizes) = ((&device, self.precision), [vit.image[0], vit.channels]);
        let mut model = if checkpoint::command(&stored)?.as_deref() == Some("pretrain dmjd") {
            Model::Dmjd(Box::new(of_run::<DmjdPretrainArgs>(&settings)?.model(sizes, on)?))
        } else if checkpoint::command(&stored)?.as_deref() == Some("pretrain maskfeat") {
            Model::MaskFeat(Box::new(of_run::<MaskFeatPretrainArgs>(&settings)?.model(sizes, on)?))
        } else if predicts_more(&file, &contents) {
            return Err(Error::usage(format!(
                "{} predicts other things than pixels, as DMJD and MaskFeat do, and does not say which; masque finetune and masque probe take its encoder \
                 by --finetune",
                shown()
            )));
        } else if contents.decoder.is_some() {
            Model::Mae(Box::new(Mae::new(self.mae(&contents, &settings, vit)?, Dtype::F32, &Rng::new(0))?))
        } else if let Some(classes) = contents.classes {
            let pool = if contents.pooled { Pool::Mean } else { Pool::ClassToken };
            let config = ClassifierConfig { vit, classes, pool, probe: contents.probe };
            Model::Classifier(Box::new(Supervised::new(config, Dtype::F32, &Rng::new(0))?))
        } else {
            let mut b = ParamsBuilder::default();
            let tokens = Tokens::new(&mut b, &vit)?;
            let encoder = Vit::new(&mut b, vit, tokens, file.contains("norm.weight"), Start::Normal)?;
            Model::Encoder(Box::new((b.build(Dtype::F32, &Rng::new(0))?, encoder)))
        };
        let (params, config) = match &mut model {
            Model::Mae(mae) => (&mut mae.params, &mae.encoder.config),
            Model::Dmjd(dmjd) => (&mut dmjd.params, &dmjd.model.encoder().config),
            Model::MaskFeat(maskfeat) => (&mut maskfeat.params, &maskfeat.model.encoder().config),
            Model::Classifier(classifier) => (&mut classifier.params, &classifier.model.vit.config),
            Model::Encoder(encoder) => (&mut encoder.0, &encoder.1.config),
        };
        let report = weights::load(params, config, &stored, Policy::Strict)?.text();
        params.move_to(&device, self.precision.dtype())?;
        Ok(Opened { model, settings, classes: checkpoint::classes(&stored)?, report })
    }

    fn mae(&self, contents: &Contents, settings: &Map<String, Value>, vit: VitConfig) -> Result<MaeConfig> {
        if settings.contains_key("decoder-dim") {
            let (image, channels) = (vit.image[0], vit.channels);
            if vit.stages.is_some() {
                return of_run::<ConvMaeArgs>(settings)?.config(image, channels);
            }
            return of_run::<MaeArgs>(settings)?.config(image, channels);
        }
        let decoder = contents.decoder()?.ok_or_else(|| Error::new("there is no decoder"))?;
        // Where a file does not say what its pixels were, they are taken to be raw, as those of the models published for pictures are.
        let args = if formats::is_pth(&self.checkpoint)? { Checkpoint::open(&self.checkpoint)?.args()? } else { None };
        let said = || args.as_ref().and_then(|args| args.get("norm_pix_loss")?.as_bool());
        let normalised = settings.get("norm-pix-loss").and_then(Value::as_bool).or_else(said).unwrap_or(false);
        let mask_ratio = settings.get("mask-ratio").and_then(Value::as_f64).unwrap_or(0.75);
        Ok(MaeConfig { encoder: vit, decoder, mask_ratio, norm_pix: normalised.then_some(pixels::EPS) })
    }
}

/// The flags of the run that a checkpoint comes from.
fn of_run<T: DeserializeOwned>(settings: &Map<String, Value>) -> Result<T> {
    serde_json::from_value(Value::Object(settings.clone())).context("the settings of the checkpoint")
}

/// Whether a model's last layer predicts something else than the pixels of patches, or of visible patches too.
fn predicts_more(file: &TensorFile, contents: &Contents) -> bool {
    let values = contents.patch.checked_mul(contents.patch).and_then(|area| area.checked_mul(contents.channels));
    let predicted = file.get("decoder_pred.weight").ok().and_then(|weight| weight.shape().first().copied());
    file.contains("predictor.0.weight") || predicted.is_some_and(|predicted| contents.decoder.is_none() || Some(predicted) != values)
}

/// The encoder of a file: shapes are its tensors', heads are the name's where one is typed or stands in its settings, else those of the published size.
pub fn encoder_of(contents: &Contents, settings: &Map<String, Value>, name: Option<&str>) -> Result<VitConfig> {
    if let Some(cait) = contents.cait()? {
        return Ok(cait.vit);
    }
    let name = name.or_else(|| settings.get("model").and_then(Value::as_str));
    let Some(name) = name else { return contents.vit() };
    let grid = contents.grid.ok_or_else(|| Error::new("its position table is of no square grid"))?;
    let side = grid.checked_mul(contents.patch).ok_or_else(|| Error::new("its position table is too large"))?;
    let named = presets::named(name)?;
    if named.is_convit() != contents.stages.is_some() {
        let [is, holds] = if named.is_convit() { ["a ConViT", "none"] } else { ["no ConViT", "one"] };
        return Err(Error::usage(format!("model {name} is {is} but the file holds {holds}")));
    }
    let fixed = contents.decoder.is_some();
    let config = if fixed { named.encoder(side)? } else { named.classifier(side, 0.0)? };
    let number = |key: &str| settings.get(key).and_then(Value::as_u64).map(|n| n as usize);
    // Heads of a TinyMIM student, which are not those that it is fine-tuned with.
    let heads = number("heads").or(named.heads).unwrap_or(config.heads);
    // A file may hold an encoder as it is pre-trained and no decoder.
    let stages = config.stages.map(|stages| StagesConfig { fused: contents.stages.as_ref().is_some_and(|found| found.fused), ..stages });
    Ok(VitConfig {
        stages,
        patch: contents.patch,
        channels: contents.channels,
        drop_path: DropPath::Constant(0.0),
        heads,
        last_heads: number("last-heads"),
        ..config
    })
}
