//! The teacher of a run: its flags, opening it from a checkpoint of anybody's, and whether it fits the student.

use super::checkpoint;
use super::model::encoder_of;
use crate::device::{Device, Precision};
use crate::error::{Context, Error, Result};
use crate::formats::TensorFile;
use crate::methods::teacher::{Network, Teacher};
use crate::nn::Start;
use crate::nn::cait::Cait;
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::contents::Contents;
use crate::nn::decoder::{Decoder, DecoderTokens};
use crate::nn::names;
use crate::nn::vit::{Tokens, Vit, VitConfig};
use crate::nn::weights::{self, Head, Policy, Which};
use crate::param::ParamsBuilder;
use crate::rng::Rng;
use crate::tensor::Dtype;
use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TeacherArgs {
    /// The teacher's checkpoint: of masque, a .pth or a .safetensors
    #[arg(long, alias = "teacher-model-path", value_name = "PATH")]
    pub teacher_path: Option<PathBuf>,
    /// The teacher's name, where its file does not say it and its sizes are no published ones [default: read off the file]
    #[arg(long, alias = "model-teacher", value_name = "NAME")]
    pub teacher_model: Option<String>,
    /// Take the running average of the teacher's weights
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub teacher_ema: bool,
    /// See each image in so many fixed views, one an epoch in turn; what only the student sees of it is new in every epoch all the same [default: a
    /// new view in every epoch]
    #[arg(long, value_name = "N")]
    pub views: Option<u64>,
    /// Keep what the teacher answers to fixed views in this folder and compute it once; with --views, where its answers return: it sees whole images that are
    /// not mixed
    #[arg(long, value_name = "FOLDER")]
    pub teacher_cache: Option<PathBuf>,
}

/// What a method needs of its teacher.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// The blocks; head and decoder are left out.
    Encoder,
    /// Blocks and MAE's decoder.
    Autoencoder,
    /// Blocks and head.
    Classifier,
}

impl TeacherArgs {
    /// The teacher on its device, every tensor that is wanted in place.
    pub fn open(&self, wanted: Wanted, device: &Device, precision: Precision, say: &mut dyn FnMut(&str)) -> Result<Teacher> {
        self.open_as(wanted, Ok, device, precision, say)
    }

    /// Whether its file has MAE's decoder.
    pub fn has_decoder(&self) -> Result<bool> {
        Ok(self.described(Wanted::Encoder)?.1.contains("decoder_embed.weight"))
    }

    /// What its file says of it, before it is opened.
    pub fn config(&self, wanted: Wanted) -> Result<VitConfig> {
        Ok(self.described(wanted)?.2)
    }

    /// The file as it is and by official names, and the encoder.
    fn described(&self, wanted: Wanted) -> Result<(TensorFile, TensorFile, VitConfig)> {
        let path = self.teacher_path.as_ref().ok_or_else(|| {
            let make = if wanted == Wanted::Classifier { "finetune" } else { "pretrain mae" };
            let published = self.teacher_model.as_deref().and_then(published);
            let hint = published.map_or(String::new(), |(name, file)| format!("; {name} is published as {file}"));
            Error::usage(format!("a teacher is needed: give its checkpoint by --teacher-path PATH; masque {make} makes one{hint}"))
        })?;
        let attempt = || format!("--teacher-path {}", path.display());
        if !path.exists() {
            let make = if wanted == Wanted::Classifier { "finetune --output-dir runs/teacher" } else { "pretrain mae" };
            return Err(Error::new(format!("{}: there is no such file; masque {make} makes a teacher", attempt())));
        }
        let stored = weights::open(path, if self.teacher_ema { Which::Averages } else { Which::Trained }).with_context(attempt)?;
        let settings = checkpoint::settings(&stored).with_context(attempt)?;
        let file = names::to_official(&stored).with_context(attempt)?.file;
        let contents = Contents::of(&file).with_context(attempt)?;
        if contents.stages.is_some() {
            return Err(Error::new(format!(
                "{}: it is a ConViT, which projects no patches and has no class token; a teacher is a ViT, DeiT, DeiT-III or CaiT",
                attempt()
            )));
        }
        let name = self.teacher_model.as_deref();
        if let Some(name) = name.filter(|name| name.starts_with("regnet")) {
            return Err(Error::usage(format!(
                "--teacher-model {name}: there are no RegNets here; a teacher is a ViT, DeiT, DeiT-III or CaiT"
            )));
        }
        if let Some(name) = name.filter(|name| name.to_lowercase().starts_with("cait") != contents.cait.is_some()) {
            let what = if contents.cait.is_some() { "a CaiT" } else { "no CaiT but a ViT" };
            let path = path.display();
            return Err(Error::usage(format!("--teacher-model {name}: {path} holds {what}; leave the flag out, or name what the file is")));
        }
        if contents.cait.is_some() && wanted != Wanted::Classifier {
            return Err(Error::new(format!(
                "{}: it is a CaiT, whose blocks give no features or relations of a plain ViT; it teaches classes, by masque distill",
                attempt()
            )));
        }
        let hint = if name.is_some() { "" } else { ": give its name by --teacher-model" };
        let vit = encoder_of(&contents, &settings, name).with_context(|| format!("{}{hint}", attempt()))?;
        Ok((stored, file, vit))
    }

    /// The same with its encoder's configuration changed.
    pub fn open_as(
        &self,
        wanted: Wanted,
        change: impl FnOnce(VitConfig) -> Result<VitConfig>,
        device: &Device,
        precision: Precision,
        say: &mut dyn FnMut(&str),
    ) -> Result<Teacher> {
        let (stored, file, vit) = self.described(wanted)?;
        let shown = self.teacher_path.iter().map(|path| path.display().to_string()).collect::<String>();
        let attempt = || format!("--teacher-path {shown}");
        let contents = Contents::of(&file).with_context(attempt)?;
        let vit = change(vit)?;
        let mut b = ParamsBuilder::default();
        let (network, policy) = match wanted {
            Wanted::Encoder => {
                let tokens = Tokens::new(&mut b, &vit)?;
                (
                    Network::Encoder(Vit::new(&mut b, vit, tokens, file.contains("norm.weight"), Start::Normal)?),
                    Policy::Encoder(Head::Fresh),
                )
            }
            Wanted::Autoencoder => {
                let decoder = contents.decoder().with_context(attempt)?;
                let decoder = decoder.ok_or_else(|| {
                    Error::new(format!("{}: it has no decoder, whose predictions are asked for; take a whole MAE checkpoint", attempt()))
                })?;
                let tokens = Tokens::new(&mut b, &vit)?;
                let decoder_tokens = DecoderTokens::new(&mut b, &decoder, &vit)?;
                let vit = Vit::new(&mut b, vit, tokens, true, Start::Normal)?;
                let decoder = Decoder::new(&mut b, &decoder, &vit.config, decoder_tokens, Start::Normal)?;
                (Network::Autoencoder(vit, decoder), Policy::Strict)
            }
            Wanted::Classifier if contents.cait.is_some() => {
                let config = contents.cait().with_context(attempt)?.ok_or_else(|| Error::new(format!("{}: it is no CaiT", attempt())))?;
                (Network::Cait(Cait::new(&mut b, config)?), Policy::Strict)
            }
            Wanted::Classifier => {
                let classes = contents.classes.ok_or_else(|| {
                    Error::new(format!("{}: it has no head, so it teaches no classes; fine-tune it first by masque finetune", attempt()))
                })?;
                let pool = if contents.pooled { Pool::Mean } else { Pool::ClassToken };
                let config = ClassifierConfig { vit, classes, pool, probe: contents.probe };
                (Network::Classifier(Classifier::new(&mut b, config)?), Policy::Strict)
            }
        };
        let params = b.build(Dtype::F32, &Rng::new(0))?;
        let mut teacher = Teacher::new(shown.clone(), params, network);
        teacher.classes = checkpoint::classes(&stored).with_context(attempt)?;
        let config = teacher.vit().clone();
        let mut report = weights::load(&mut teacher.params, &config, &stored, policy).with_context(attempt)?;
        if wanted == Wanted::Encoder {
            // Head and decoder are left out on purpose.
            report.unexpected.clear();
            report.dropped.clear();
        }
        say(&format!("teacher {}", report.text()));
        teacher.params.move_to(device, precision.dtype())?;
        Ok(teacher)
    }
}

/// The files of the teachers that MaskedKD's program knows by name.
fn published(name: &str) -> Option<(&'static str, &'static str)> {
    const FILES: [(&str, &str); 7] = [
        ("deit_small", "deit_small_patch16_224-cd65a155.pth"),
        ("deit_base", "deit_base_patch16_224-b5f2ef4d.pth"),
        ("deit3_small", "deit_3_small_224_1k.pth"),
        ("deit3_base", "deit_3_base_224_1k.pth"),
        ("deit3_large", "deit_3_large_224_1k.pth"),
        ("deit3_huge", "deit_3_huge_224_1k.pth"),
        ("caits_24", "S24_224.pth"),
    ];
    FILES.into_iter().find(|(known, _)| *known == name)
}

/// Refuses a teacher that answers other classes than the student learns: another number of them, or others where both have names.
pub fn check_answers(teacher: &Teacher, classes: usize, names: &[String]) -> Result<()> {
    let name = &teacher.name;
    let answered = teacher.answers().ok_or_else(|| Error::new(format!("the teacher {name} has no head: it teaches no classes")))?;
    if answered != classes {
        return Err(Error::new(format!(
            "the teacher {name} answers {answered} classes, the student {classes}; take a teacher of the same classes, or give --nb-classes {answered} where \
             the images show only the first of them"
        )));
    }
    if let Some((theirs, own)) = teacher.classes.iter().zip(names).find(|(theirs, own)| theirs != own) {
        return Err(Error::new(format!(
            "the teacher {name} learned the class {theirs} where the images have {own}: their answers do not mean the same"
        )));
    }
    Ok(())
}

/// Refuses a teacher with other tokens in front of the patches than the student's, where each token is compared with its own.
pub fn check_tokens(teacher: &Teacher, student: &VitConfig) -> Result<()> {
    let (own, name) = (teacher.vit(), &teacher.name);
    if own.extra() != student.extra() {
        return Err(Error::new(format!(
            "the teacher {name} has {} tokens in front of the patches, the student {}, and they are compared token by token; take a teacher \
             without a distillation token",
            own.extra(),
            student.extra()
        )));
    }
    Ok(())
}

/// Refuses a teacher that cannot see the student's images patch by patch. `same_grid`: it is shown, or compared at, the student's patches.
pub fn check_sees(teacher: &Teacher, student: &VitConfig, same_grid: bool) -> Result<()> {
    let (own, name) = (teacher.vit(), &teacher.name);
    if own.channels != student.channels {
        return Err(Error::new(format!(
            "the teacher {name} takes images of {} channels, the student's have {}; take a teacher for such images",
            own.channels, student.channels
        )));
    }
    if own.image != student.image {
        let [h, w] = own.image;
        return Err(Error::new(format!(
            "the teacher {name} takes images of {h} x {w} pixels, the student sees {} x {}; give --input-size {h} or another teacher",
            student.image[0], student.image[1]
        )));
    }
    if same_grid && own.grid() != student.grid() {
        let ([h, w], [rows, columns]) = (own.grid(), student.grid());
        return Err(Error::new(format!(
            "the teacher {name} cuts an image into {h} x {w} patches of {}, the student into {rows} x {columns} of {}; both have to share the grid: give --patch-size {} or another teacher",
            own.patch, student.patch, own.patch
        )));
    }
    Ok(())
}
