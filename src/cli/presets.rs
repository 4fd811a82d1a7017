//! Recipes by name: each is a list of flags that stands in front of what was typed, so that every flag of the user's overrides it.
//!
//! Without --preset and --data-path a training command takes the preset for the built-in images, so that it is a job of a minute on any machine.

use crate::error::{Error, Result};
use crate::formats;
use crate::train::record;
use std::path::{Path, PathBuf};

pub struct Preset {
    pub name: String,
    /// The command that it is for.
    pub command: &'static str,
    pub about: String,
    pub flags: Vec<(&'static str, String)>,
}

/// Size in names of presets, the program's name, what a person calls it, the patch.
const SIZES: [(&str, &str, &str, usize); 5] = [
    ("t", "tiny", "Tiny", 16),
    ("s", "small", "Small", 16),
    ("b", "base", "Base", 16),
    ("l", "large", "Large", 16),
    ("h", "huge", "Huge", 14),
];

fn preset(name: impl Into<String>, command: &'static str, about: impl Into<String>, flags: &[(&'static str, &str)]) -> Preset {
    let flags = flags.iter().map(|(flag, value)| (*flag, value.to_string())).collect();
    Preset { name: name.into(), command, about: about.into(), flags }
}

/// What all recipes for the built-in images share.
const GLYPHS: [(&str, &str); 7] = [
    ("model", "glyph_s"),
    ("data-path", "synthetic"),
    ("input-size", "48"),
    ("eval-crop-ratio", "1"),
    ("batch-size", "64"),
    ("eval-freq", "1"),
    ("save-freq", "1"),
];

fn glyphs(name: &'static str, command: &'static str, about: &'static str, more: &[(&'static str, &str)]) -> Preset {
    preset(name, command, about, &[&GLYPHS, more].concat())
}

pub fn all() -> Vec<Preset> {
    let mut all = vec![
        glyphs(
            "glyphs-pretrain",
            "pretrain mae",
            "built-in images: MAE of a small ViT, some two minutes on two cores",
            &[
                ("epochs", "24"),
                ("warmup-epochs", "1"),
                ("lr", "3e-3"),
                ("eval-freq", "2"),
                ("weight-decay", "0.05"),
                ("mask-ratio", "0.75"),
                ("norm-pix-loss", "true"),
                ("norm-pix-eps", "0.01"),
                ("crop", "whole"),
            ],
        ),
        glyphs(
            "glyphs-finetune",
            "finetune",
            "built-in images: fine-tuning on 2000 labels, ten epochs; give the encoder by --finetune",
            &[&GLYPHS_LABELLED[..], &[("layer-decay", "0.75"), ("head-std", "0.01")]].concat(),
        ),
        glyphs(
            "glyphs-scratch",
            "finetune",
            "built-in images: the same steps from scratch",
            &[&GLYPHS_LABELLED[..], &[("layer-decay", "1"), ("start", "xavier")]].concat(),
        ),
        glyphs(
            "glyphs-probe",
            "probe",
            "built-in images: a linear head on 2000 labels",
            &[
                ("train-images", "2000"),
                ("epochs", "60"),
                ("warmup-epochs", "6"),
                ("lr", "15"),
                ("weight-decay", "0"),
                ("global-pool", "true"),
                ("crop", "whole"),
                ("eval-freq", "20"),
                ("save-freq", "20"),
            ],
        ),
    ];
    for (letter, size, called, patch) in SIZES {
        let pretrained = format!("mae_vit_{size}_patch{patch}");
        for (ending, epochs, target) in [("800ep", "800", true), ("1600ep", "1600", true), ("800ep-pixels", "800", false)] {
            all.push(preset(
                format!("mae-vit-{letter}-{ending}"),
                "pretrain mae",
                format!(
                    "ImageNet: MAE of ViT-{called}, {epochs} epochs, batch 4096, {} pixels{}",
                    if target { "normalised" } else { "raw" },
                    if "tsb".contains(letter) && letter != "b" { " (MAE's recipe for a size it does not publish)" } else { "" }
                ),
                &[
                    ("model", &pretrained),
                    ("batch-size", "64"),
                    ("accum-iter", "64"),
                    ("epochs", epochs),
                    ("warmup-epochs", "40"),
                    ("blr", "1.5e-4"),
                    ("weight-decay", "0.05"),
                    ("mask-ratio", "0.75"),
                    ("norm-pix-loss", if target { "true" } else { "false" }),
                    ("input-size", "224"),
                    ("crop-min", "0.2"),
                ],
            ));
        }
        let model = format!("vit_{size}_patch{patch}");
        let common = |epochs, blr, layer_decay, drop_path| {
            vec![
                ("model", model.as_str()),
                ("batch-size", "32"),
                ("accum-iter", "32"),
                ("epochs", epochs),
                ("warmup-epochs", "5"),
                ("blr", blr),
                ("min-lr", "1e-6"),
                ("weight-decay", "0.05"),
                ("layer-decay", layer_decay),
                ("drop-path", drop_path),
                ("mixup", "0.8"),
                ("cutmix", "1.0"),
                ("smoothing", "0.1"),
                ("aa", "rand-m9-mstd0.5-inc1"),
                ("input-size", "224"),
            ]
        };
        let (epochs, blr, decay, drop) = match letter {
            "t" | "s" | "b" => ("100", "5e-4", "0.65", "0.1"),
            "l" => ("50", "1e-3", "0.75", "0.2"),
            _ => ("50", "1e-3", "0.75", "0.3"),
        };
        let unpublished = if matches!(letter, "t" | "s") { " (the recipe of Base)" } else { "" };
        all.push(preset(
            format!("mae-vit-{letter}-finetune"),
            "finetune",
            format!("ImageNet: fine-tuning ViT-{called} pre-trained on normalised pixels, batch 1024{unpublished}"),
            &[&common(epochs, blr, decay, drop)[..], &[("reprob", "0.25")]].concat(),
        ));
        let drop = if letter == "h" { "0.2" } else { "0.1" };
        let epochs = if matches!(letter, "t" | "s" | "b") { "100" } else { "50" };
        all.push(preset(
            format!("mae-vit-{letter}-finetune-paper"),
            "finetune",
            format!("ImageNet: the paper's Table 9, for ViT-{called} pre-trained on raw pixels, batch 1024{unpublished}"),
            &[&common(epochs, "1e-3", "0.75", drop)[..], &[("reprob", "0")]].concat(),
        ));
        all.push(preset(
            format!("mae-vit-{letter}-linprobe"),
            "probe",
            format!("ImageNet: linear probing of ViT-{called}, LARS, batch 16384{unpublished}"),
            &[
                ("model", &model),
                ("batch-size", "512"),
                ("accum-iter", "32"),
                ("epochs", "90"),
                ("warmup-epochs", "10"),
                ("blr", "0.1"),
                ("weight-decay", "0"),
                ("global-pool", "false"),
                ("input-size", "224"),
                ("crop", "once"),
            ],
        ));
        let (epochs, drop) = if matches!(letter, "l" | "h") { ("200", "0.2") } else { ("300", "0.1") };
        all.push(preset(
            format!("mae-vit-{letter}-scratch"),
            "finetune",
            format!("ImageNet: ViT-{called} from scratch, the paper's Table 11, batch 4096{unpublished}"),
            &[
                ("model", &model),
                ("batch-size", "64"),
                ("accum-iter", "64"),
                ("epochs", epochs),
                ("warmup-epochs", "20"),
                ("blr", "1e-4"),
                ("min-lr", "0"),
                ("weight-decay", "0.3"),
                ("betas", "0.9,0.95"),
                ("layer-decay", "1"),
                ("drop-path", drop),
                ("mixup", "0.8"),
                ("cutmix", "1.0"),
                ("smoothing", "0.1"),
                ("aa", "rand-m9-mstd0.5-inc1"),
                ("reprob", "0"),
                ("model-ema-decay", "0.9999"),
                ("input-size", "224"),
            ],
        ));
    }
    all
}

/// Fine-tuning on the built-in images, without what depends on the encoder.
const GLYPHS_LABELLED: [(&str, &str); 14] = [
    ("train-images", "2000"),
    ("epochs", "10"),
    ("warmup-epochs", "1"),
    ("lr", "4e-3"),
    ("min-lr", "0"),
    ("weight-decay", "0.05"),
    ("head-lr-scale", "8"),
    ("drop-path", "0"),
    ("smoothing", "0.1"),
    ("aa", "none"),
    ("reprob", "0"),
    ("crop", "shift"),
    ("shift", "3"),
    ("global-pool", "true"),
];

impl Preset {
    /// The command that it stands for.
    pub fn text(&self) -> String {
        let flags: Vec<String> = self.flags.iter().map(|(flag, value)| format!("  --{flag}={value}")).collect();
        format!("{}: {}\n\nmasque {} \\\n{}", self.name, self.about, self.command, flags.join(" \\\n"))
    }
}

/// The preset of this name.
pub fn find(name: &str) -> Result<Preset> {
    let mut all = all();
    if let Some(at) = all.iter().position(|preset| preset.name == name) {
        return Ok(all.swap_remove(at));
    }
    let near = formats::nearest(name, all.iter().map(|preset| preset.name.as_str()));
    let hint = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
    Err(Error::usage(format!("preset {name:?} is unknown{hint}; masque presets lists them")))
}

/// Underscores in the names of flags become hyphens.
fn hyphens(argument: String) -> String {
    let Some(flag) = argument.strip_prefix("--") else { return argument };
    let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
    let name = name.replace('_', "-");
    value.map_or_else(|| format!("--{name}"), |value| format!("--{name}={value}"))
}

/// Positions of the words that name the command.
fn command_words(arguments: &[String]) -> Vec<usize> {
    let (mut words, mut at) = (Vec::new(), 1);
    while at < arguments.len() && words.len() < 2 {
        match arguments[at].as_str() {
            "--threads" => at += 1,
            flag if flag.starts_with('-') => {}
            _ => words.push(at),
        }
        at += 1;
    }
    words
}

/// Flags of the official programs that say nothing here, whether a value follows, and why.
const OFFICIAL: [(&str, bool, &str); 9] = [
    ("--dist-eval", false, "evaluation is always exact"),
    ("--pin-mem", false, "batches always go through pinned memory"),
    ("--no-pin-mem", false, "batches always go through pinned memory"),
    ("--dist-on-itp", false, "this version computes on one device"),
    ("--dist-url", true, "this version computes on one device"),
    ("--local-rank", true, "this version computes on one device"),
    ("--world-size", true, "this version computes on one device"),
    ("--log-dir", true, "TensorBoard's files are in the run folder"),
    ("--start-epoch", true, "--resume knows where a run stands"),
];

/// Takes out the official flags that mean nothing here, and says so; --cls-token is another word for --global-pool=false.
fn official(arguments: &mut Vec<String>) -> Result<()> {
    let mut at = 1;
    while at < arguments.len() {
        let (name, value) = match arguments[at].split_once('=') {
            Some((name, value)) => (name.to_string(), Some(value.to_string())),
            None => (arguments[at].clone(), None),
        };
        if name == "--cls-token" {
            let pool = value.as_deref() == Some("false");
            arguments[at] = format!("--global-pool={pool}");
        }
        let Some((flag, takes, why)) = OFFICIAL.iter().find(|(flag, ..)| *flag == name) else {
            at += 1;
            continue;
        };
        let follows = *takes && value.is_none();
        let value = value.or_else(|| arguments.get(at + 1).filter(|_| follows).cloned()).unwrap_or_default();
        if *flag == "--world-size" && value != "1" {
            return Err(Error::usage(format!("--world-size {value}: this version computes on one device; several come later")));
        }
        eprintln!("masque: {flag} has no effect: {why}");
        arguments.drain(at..(at + 1 + usize::from(follows)).min(arguments.len()));
    }
    Ok(())
}

/// What was typed, with other flags in front of the user's: those of the run that --resume goes on with, then those of the preset.
pub fn expand(arguments: Vec<String>) -> Result<Vec<String>> {
    let mut arguments: Vec<String> = arguments.into_iter().map(hyphens).collect();
    let at = command_words(&arguments);
    if at.first().is_some_and(|&at| ["pretrain", "finetune", "probe"].contains(&arguments[at].as_str())) {
        official(&mut arguments)?;
    }
    let at = command_words(&arguments);
    let words: Vec<&str> = at.iter().map(|&at| arguments[at].as_str()).collect();
    let (command, behind) = match words[..] {
        ["pretrain", "mae"] => ("pretrain mae", at[1] + 1),
        ["finetune", ..] => ("finetune", at[0] + 1),
        ["probe", ..] => ("probe", at[0] + 1),
        _ => return Ok(arguments),
    };
    // The last one counts, as everywhere.
    let given = |flag: &str| {
        let at = arguments.iter().rposition(|argument| argument == flag || argument.starts_with(&format!("{flag}=")))?;
        let value = arguments[at].split_once('=').map(|(_, value)| value.to_string());
        let joined = value.is_some();
        Some((at, value.or_else(|| arguments.get(at + 1).cloned()).unwrap_or_default(), joined))
    };
    if given("--help").is_some() || arguments.iter().any(|argument| argument == "-h") {
        return Ok(arguments);
    }
    let resumed = resumed(given("--resume").map(|given| given.1), given("--output-dir").map(|given| given.1), command);
    let named = given("--preset");
    let name = match &named {
        Some((_, name, _)) if name.is_empty() => return Err(Error::usage("--preset needs a name; masque presets lists them")),
        Some((_, name, _)) => Some(name.clone()),
        None if resumed.is_some() || given("--data-path").is_some_and(|(_, path, _)| path != "synthetic") => None,
        None if command == "pretrain mae" => Some("glyphs-pretrain".into()),
        None if command == "probe" => Some("glyphs-probe".into()),
        None if given("--finetune").is_some() => Some("glyphs-finetune".into()),
        None => Some("glyphs-scratch".into()),
    };
    let only_base_rate = given("--blr").is_some() && given("--lr").is_none();
    let mut flags = resumed.unwrap_or_default();
    if let Some(name) = name {
        let preset = find(&name)?;
        if preset.command != command {
            return Err(Error::usage(format!("preset {name} is for masque {}, not for masque {command}", preset.command)));
        }
        flags.extend(preset.flags.into_iter().map(|(flag, value)| format!("--{flag}={value}")));
    }
    // A base rate that was typed is not to lose against a rate that was not.
    flags.retain(|flag| !only_base_rate || !flag.starts_with("--lr="));
    arguments.splice(behind..behind, flags.iter().cloned());
    if let Some((at, _, joined)) = named {
        let at = if at >= behind { at + flags.len() } else { at };
        arguments.drain(at..if joined { at + 1 } else { at + 2 });
    }
    Ok(arguments)
}

/// The flags of the run that is gone on with, from its command.txt.
fn resumed(resume: Option<String>, folder: Option<String>, command: &str) -> Option<Vec<String>> {
    let folder = match resume?.as_str() {
        "auto" => PathBuf::from(folder?),
        path => Path::new(path).parent()?.to_path_buf(),
    };
    let words = record::words(&std::fs::read_to_string(folder.join(record::COMMAND)).ok()?);
    let own = 1 + command.split(' ').count();
    if words.get(1..own)?.join(" ") != command {
        return None;
    }
    let of_the_run = |flag: &String| !["--resume=", "--output-dir=", "--eval="].iter().any(|start| flag.starts_with(start));
    Some(words[own..].iter().filter(|flag| of_the_run(flag)).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(line: &str) -> Result<String> {
        Ok(expand(line.split(' ').map(String::from).collect())?.join(" "))
    }

    #[test]
    fn a_preset_stands_in_front_of_what_was_typed() {
        let line = expanded("masque pretrain mae --batch_size 8 --preset=mae-vit-b-800ep --mask_ratio=0.5").unwrap();
        assert!(line.starts_with("masque pretrain mae --model=mae_vit_base_patch16 --batch-size=64"), "{line}");
        assert!(line.ends_with("--crop-min=0.2 --batch-size 8 --mask-ratio=0.5"), "{line}");
        assert!(expanded("masque finetune").unwrap().contains("--layer-decay=1"));
        assert!(expanded("masque finetune --finetune x.pth").unwrap().contains("--layer-decay=0.75"));
        assert_eq!(expanded("masque finetune --data_path /d").unwrap(), "masque finetune --data-path /d");
        assert_eq!(
            expanded("masque finetune --data-path synthetic").unwrap(),
            expanded("masque finetune").unwrap() + " --data-path synthetic"
        );
        assert!(expanded("masque --threads 1 pretrain mae").unwrap().starts_with("masque --threads 1 pretrain mae --model=glyph_s"));
        assert!(expanded("masque pretrain --threads=1 mae").unwrap().starts_with("masque pretrain --threads=1 mae --model=glyph_s"));
        let rate = expanded("masque finetune --blr 1e-2").unwrap();
        assert!(!rate.contains("--lr=") && rate.ends_with("--blr 1e-2"), "{rate}");
        assert_eq!(expanded("masque info --kernels").unwrap(), "masque info --kernels");
    }

    #[test]
    fn presets_that_do_not_fit_are_refused() {
        assert!(expanded("masque probe --preset mae-vit-b-800ep").unwrap_err().chain().contains("is for masque pretrain mae"));
        assert!(expanded("masque probe --preset mae-vit-b-linprob").unwrap_err().chain().contains("did you mean mae-vit-b-linprobe"));
        assert!(expanded("masque probe --preset").unwrap_err().chain().contains("needs a name"));
    }
}
