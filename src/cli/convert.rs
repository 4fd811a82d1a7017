//! `masque convert`: weights from one file into another, under the names that the next program expects.

use crate::error::{Error, Result};
use crate::formats::{self, TensorFile, Value};
use crate::nn::names::{self, Naming, Translated};
use crate::nn::weights::{self, Which};
use crate::train::official;
use clap::{Args, ValueEnum};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Args)]
pub struct Convert {
    /// The checkpoint to read: .pth (either container), .safetensors, or one of masque's own
    from: PathBuf,
    /// The file to write; its ending, .pth or .safetensors, says what it becomes
    to: PathBuf,
    /// Whose names the tensors get [default: those they have]
    #[arg(long, alias = "to_names", value_enum, value_name = "NAMES")]
    to_names: Option<ToNames>,
    /// The moving averages of the weights instead of the weights
    #[arg(long)]
    ema: bool,
    /// From a checkpoint of masque pretrain mae to .pth: also what the optimiser remembers and the epoch, for MAE's own program to resume from
    #[arg(long, alias = "with_optimizer", conflicts_with_all = ["to_names", "ema"])]
    with_optimizer: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ToNames {
    /// Those of the published MAE and DeiT checkpoints
    Official,
    /// Those of timm's vision transformers (an encoder or a classifier)
    Timm,
    /// Those of Hugging Face's ViTMAEForPreTraining, ViTForImageClassification or DeiTForImageClassificationWithTeacher
    Hf,
}

/// Where one of our checkpoints keeps the settings of its run, as JSON.
const SETTINGS: &str = "masque.settings";

pub fn run(args: &Convert, say: impl Fn(&str)) -> Result<()> {
    let (from, to) = (args.from.display(), args.to.display());
    let ending = args.to.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if !matches!(ending, "pth" | "safetensors") {
        return Err(Error::usage(format!("{to}: the ending says what to write; use .pth or .safetensors")));
    }
    if args.with_optimizer && ending != "pth" {
        return Err(Error::usage(format!("{to}: --with-optimizer writes what MAE's program resumes from, a .pth file")));
    }
    if args.to.canonicalize().is_ok_and(|there| args.from.canonicalize().is_ok_and(|here| here == there)) {
        return Err(Error::usage(format!("{to}: a checkpoint is not converted into itself; give another name")));
    }
    let before = weights::open(&args.from, if args.ema { Which::Averages } else { Which::Trained })?;
    let (mut lines, mut file) = (Vec::new(), before);
    if let Some(naming) = args.to_names {
        let naming = match naming {
            ToNames::Official => Naming::Official,
            ToNames::Timm => Naming::Timm,
            ToNames::Hf => Naming::HuggingFace,
        };
        let official = names::to_official(&file)?;
        if names::recognise(official.file.names()).is_none() {
            return Err(Error::new(format!("{from} holds no vision transformer's names; leave --to-names out to keep them")));
        }
        let Translated { file: there, dropped, .. } = names::from_official(&official.file, naming)?;
        let renamed = there.names().filter(|name| !file.contains(name)).count();
        lines.push(format!("{} names become {naming}: {renamed} of {} tensors renamed", official.from, there.tensors().len()));
        lines.extend(left_out(official.dropped.into_iter().chain(dropped)));
        if naming == Naming::HuggingFace {
            lines.push("set layer_norm_eps to 1e-6 in the model's config: Hugging Face's default is 1e-12".to_string());
        }
        file = there;
    }
    let more = match args.with_optimizer {
        false => Vec::new(),
        true => {
            let (optimizer, epoch, micro) = official::optimizer(&formats::open(&args.from)?)?;
            lines.push(format!("with the optimiser's state after {} whole epochs", epoch + 1));
            if micro > 0 {
                lines.push(format!("{micro} batches of the next epoch are behind too, but MAE's program begins that epoch again"));
            }
            vec![("optimizer".into(), optimizer), ("epoch".into(), epoch.into())]
        }
    };
    write(args, ending, &file, more)?;
    say(&format!("{from} -> {to}: {} tensors", file.tensors().len()));
    lines.iter().for_each(|line| say(&format!("  {line}")));
    Ok(())
}

/// A line for each reason.
fn left_out(dropped: impl Iterator<Item = (String, &'static str)>) -> Vec<String> {
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for (name, why) in dropped {
        match reasons.iter_mut().find(|(known, _)| *known == why) {
            Some((_, names)) => names.push(name),
            None => reasons.push((why, vec![name])),
        }
    }
    let line = |(why, names): (&str, Vec<String>)| match names.len() {
        0..=4 => format!("left out: {} ({why})", names.join(", ")),
        n => format!("left out: {} and {} more ({why})", names[..3].join(", "), n - 3),
    };
    reasons.into_iter().map(line).collect()
}

fn write(args: &Convert, ending: &str, file: &TensorFile, more: Vec<(Value, Value)>) -> Result<()> {
    if ending == "safetensors" {
        // Hugging Face's loaders ask for this line.
        let format = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        return formats::write_safetensors(&args.to, file.tensors().iter().map(|(name, tensor)| (name.as_str(), tensor)), &format);
    }
    let model = Value::Dict(file.tensors().iter().map(|(name, tensor)| (name.as_str().into(), tensor.clone().into())).collect());
    let mut root = vec![("model".into(), model)];
    root.extend(more);
    if let Some(Json::Object(settings)) = file.metadata().get(SETTINGS).and_then(|text| serde_json::from_str(text).ok()) {
        root.push(("args".into(), official::args(&settings)?));
    }
    formats::write_pth(&args.to, &Value::Dict(root))
}
