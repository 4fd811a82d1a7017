//! Recipes by name: each is a list of flags that stands in front of what was typed, so that every flag of the user's overrides it.
//!
//! Without --preset and --data-path a training command takes the preset for the built-in images, so that it is a job of a minute on any machine.

use super::recipes::{Preset, all};
use crate::device::ranks::environment::Launched;
use crate::error::{Error, Result};
use crate::formats;
use crate::train::record;
use std::path::{Path, PathBuf};

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

/// The commands that take recipes, and the recipe that each takes where no other and no images are named.
const COMMANDS: [(&str, &str); 12] = [
    ("pretrain mae", "glyphs-pretrain"),
    ("pretrain dmae", "glyphs-dmae"),
    ("pretrain tinymim", "glyphs-tinymim"),
    ("pretrain dmjd", "glyphs-dmjd"),
    ("pretrain maskfeat", "glyphs-maskfeat"),
    ("pretrain convmae", "glyphs-convmae"),
    ("finetune", "glyphs-finetune"),
    ("probe", "glyphs-probe"),
    ("train", "glyphs-train"),
    ("distill maskedkd", "glyphs-maskedkd"),
    ("distill logit", "glyphs-logit"),
    ("distill deit", "glyphs-deit"),
];

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

/// A flag of the official programs that says nothing here, whether a value follows, and why.
type Inert = (&'static str, bool, &'static str);

const OFFICIAL: [Inert; 9] = [
    ("--dist-eval", false, "evaluation is always exact"),
    ("--pin-mem", false, "batches always go through pinned memory"),
    ("--no-pin-mem", false, "batches always go through pinned memory"),
    ("--dist-on-itp", false, LAUNCHER),
    ("--dist-url", true, LAUNCHER),
    ("--local-rank", true, LAUNCHER),
    ("--world-size", true, LAUNCHER),
    ("--log-dir", true, "TensorBoard's files are in the run folder"),
    ("--start-epoch", true, "--resume knows where a run stands"),
];

/// The same of DeiT's and MaskedKD's programs.
const OFFICIAL_DEIT: [Inert; 18] = [
    ("--cooldown-epochs", true, "a run has just --epochs, as in the official program"),
    ("--patience-epochs", true, "it is for another schedule"),
    ("--decay-epochs", true, "it is for another schedule"),
    ("--decay-rate", true, "it says nothing of one cycle of the cosine"),
    ("--dr", true, "it says nothing of one cycle of the cosine"),
    ("--lr-noise-pct", true, "the rate has no noise"),
    ("--lr-noise-std", true, "the rate has no noise"),
    ("--momentum", true, "it is for another optimiser"),
    ("--src", false, "it is the crop of --three-augment alone; --crop simple asks for it anywhere"),
    ("--resplit", false, "the official program does not read it"),
    ("--model-ema", false, "--model-ema-decay switches the averages on"),
    ("--no-model-ema", false, "the averages are off without --model-ema-decay"),
    ("--model-ema-force-cpu", false, "the averages are where the parameters are"),
    ("--nodes", true, LAUNCHER),
    ("--distributed", false, LAUNCHER),
    ("--inat-category", true, "folders of classes say what they are"),
    ("--data-set", true, "what lies at --data-path says what it is"),
    ("--train-interpolation", true, "images are always resized bicubically"),
];

/// Why flags of how many processes there are, and how they meet, say nothing.
const LAUNCHER: &str = "the launcher's variables say it";

/// What may be typed of an inert flag: anything else would mean something that is not done.
const ACCEPTED: [(&str, &[&str], &str); 3] = [
    ("--dist-url", &["env://"], "processes meet where MASTER_ADDR and MASTER_PORT say, which is --dist-url env://"),
    ("--data-set", &["IMNET", "CIFAR"], "folders of classes and CIFAR's files are read, from --data-path"),
    ("--train-interpolation", &["bicubic"], "images are resized bicubically only"),
];

/// Official switches that are typed here with a value.
const SWITCHES: [(&str, &str); 4] = [
    ("--cls-token", "--global-pool"),
    ("--no-maskedkd", "--maskedkd"),
    ("--no-repeated-aug", "--repeated-aug"),
    ("--no-train-mode", "--train-mode"),
];

/// Refuses numbers of processes and of machines that are not those of this run.
fn counted(flag: &str, value: &str, launched: Option<&Launched>) -> Result<()> {
    let world = launched.map_or(1, |launched| launched.world);
    let started = match launched {
        Some(launched) => format!("{} has started {world} processes", launched.by),
        None => "this process was started alone".into(),
    };
    let number: Option<usize> = value.parse().ok().filter(|&number| number > 0);
    let Some(number) = number else { return Err(Error::usage(format!("{flag} {value}: a number from 1 is needed, and {started}"))) };
    // Without the number of processes on this machine that of machines is not known; there are not more than processes.
    let (fits, next) = match (flag, launched.map(|launched| launched.local_world)) {
        ("--world-size", _) => (number == world, format!("masque launch --nproc {number} -- ... starts {number} on this machine")),
        (_, None) => (number == 1, "torchrun, srun or mpirun start a run on several machines".into()),
        (_, Some(Some(each))) => (number == world.div_ceil(each), format!("{each} of them on this machine")),
        (_, Some(None)) => (number <= world, "they are not on more machines than that".into()),
    };
    if fits { Ok(()) } else { Err(Error::usage(format!("{flag} {value}: {started}; {next}"))) }
}

/// Takes out the official flags that mean nothing here, and says so once; negative switches become values of the positive ones.
fn official(arguments: &mut Vec<String>, command: &str, launched: Option<Launched>) -> Result<()> {
    let deit: &[Inert] = if matches!(command, "train" | "distill") { &OFFICIAL_DEIT } else { &[] };
    let three = arguments.iter().any(|argument| argument.starts_with("--three-augment") || argument.starts_with("--ThreeAugment"));
    let mut at = 1;
    while at < arguments.len() {
        let (name, value) = match arguments[at].split_once('=') {
            Some((name, value)) => (name.to_string(), Some(value.to_string())),
            None => (arguments[at].clone(), None),
        };
        if let Some((_, positive)) = SWITCHES.iter().find(|(negative, _)| *negative == name) {
            arguments[at] = format!("{positive}={}", value.as_deref() == Some("false"));
        }
        if name == "--src" && three {
            arguments[at] = "--crop=simple".into();
        }
        let inert = |(flag, ..): &&Inert| *flag == name && !(three && name == "--src");
        let Some((flag, takes, why)) = OFFICIAL.iter().chain(deit).find(inert) else {
            at += 1;
            continue;
        };
        let follows = *takes && value.is_none();
        let value = value.or_else(|| arguments.get(at + 1).filter(|_| follows).cloned()).unwrap_or_default();
        if let Some((_, _, why)) = ACCEPTED.iter().find(|(known, accepted, _)| known == flag && !accepted.contains(&value.as_str())) {
            return Err(Error::usage(format!("{flag} {value}: {why}")));
        }
        if matches!(*flag, "--world-size" | "--nodes") {
            counted(flag, &value, launched.as_ref())?;
        }
        if launched.as_ref().is_none_or(|launched| launched.rank == 0) {
            eprintln!("masque: {flag} has no effect: {why}");
        }
        arguments.drain(at..(at + 1 + usize::from(follows)).min(arguments.len()));
    }
    Ok(())
}

/// What was typed, with other flags in front of the user's: those of the run that --resume goes on with, then those of the preset.
pub fn expand(arguments: Vec<String>) -> Result<Vec<String>> {
    let mut arguments: Vec<String> = arguments.into_iter().map(hyphens).collect();
    let at = command_words(&arguments);
    let first = at.first().map(|&at| arguments[at].clone()).unwrap_or_default();
    if COMMANDS.iter().any(|(command, _)| command.split(' ').next() == Some(first.as_str())) {
        official(&mut arguments, &first, Launched::from_environment()?)?;
    }
    let at = command_words(&arguments);
    let words: Vec<&str> = at.iter().map(|&at| arguments[at].as_str()).collect();
    let named = |(command, _): &&(&'static str, _)| command.split(' ').eq(words.iter().take(command.split(' ').count()).copied());
    let Some(&(command, usual)) = COMMANDS.iter().find(named) else { return Ok(arguments) };
    let behind = at[command.split(' ').count() - 1] + 1;
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
        None if command == "finetune" && given("--finetune").is_none() => Some("glyphs-scratch".into()),
        None => Some(usual.into()),
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
    // A base rate that was typed is not to lose against a rate that was not, nor an encoder against a start from scratch.
    // Models of other kinds have a start of their own.
    let typed = given("--model").map_or(String::new(), |(_, model, _)| model.replace('-', "_"));
    let another = ["distilled", "_LS", "deit3"].iter().any(|kind| typed.contains(kind));
    let encoder = (another || given("--finetune").is_some()) && given("--start").is_none();
    flags.retain(|flag| !encoder || !flag.starts_with("--start="));
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
        let taught = expanded("masque distill maskedkd --finetune x.pth --no-maskedkd --src --cooldown_epochs 3 --data_set IMNET").unwrap();
        assert!(!taught.contains("--start") && taught.ends_with("--finetune x.pth --maskedkd=false"), "{taught}");
        assert!(expanded("masque train --src --ThreeAugment").unwrap().ends_with("--crop=simple --ThreeAugment"));
        assert!(expanded("masque train --data-set INAT19").unwrap_err().chain().contains("--data-set INAT19"));
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
    fn processes_and_machines_are_counted_by_the_launcher() {
        let variables = [("RANK", "1"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "a")];
        let read = |more: &'static [(&str, &str)]| {
            let find = move |name: &str| variables.iter().chain(more).find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
            Launched::read(&find).unwrap()
        };
        let (known, unknown) = (read(&[("LOCAL_WORLD_SIZE", "8")]), read(&[]));
        let left = |line: &str, launched: &Option<Launched>| {
            let mut arguments: Vec<String> = line.split(' ').map(String::from).collect();
            official(&mut arguments, "train", launched.clone()).map(|()| arguments.join(" ")).map_err(|error| error.chain())
        };
        for line in ["--world-size 16", "--world-size=16", "--nodes 2", "--dist-url env:// --local-rank 3 --distributed --dist-on-itp"] {
            assert_eq!(left(&format!("masque train {line} --lr 1"), &known), Ok("masque train --lr 1".into()), "{line}");
        }
        assert!(left("masque train --world-size 1 --nodes 1", &None).is_ok() && left("masque train --nodes 16", &unknown).is_ok());
        for (line, launched, parts) in [
            ("--world-size 8", &known, ["--world-size 8: whoever set RANK has started 16 processes", "masque launch --nproc 8"]),
            ("--world-size 8", &None, ["--world-size 8: this process was started alone", "masque launch --nproc 8"]),
            ("--world-size 0", &None, ["--world-size 0", "a number from 1"]),
            ("--nodes 3", &known, ["--nodes 3", "8 of them on this machine"]),
            ("--nodes 17", &unknown, ["--nodes 17", "16 processes"]),
            ("--nodes 2", &None, ["--nodes 2: this process was started alone", "torchrun"]),
            ("--nodes", &None, ["--nodes : a number", "alone"]),
            ("--dist-url tcp://a:1", &None, ["--dist-url tcp://a:1", "MASTER_ADDR"]),
        ] {
            let said = left(&format!("masque train {line}"), launched).unwrap_err();
            assert!(parts.iter().all(|part| said.contains(part)), "{line}: {said}");
        }
    }

    #[test]
    fn presets_that_do_not_fit_are_refused() {
        assert!(expanded("masque probe --preset mae-vit-b-800ep").unwrap_err().chain().contains("is for masque pretrain mae"));
        assert!(expanded("masque probe --preset mae-vit-b-linprob").unwrap_err().chain().contains("did you mean mae-vit-b-linprobe"));
        assert!(expanded("masque probe --preset").unwrap_err().chain().contains("needs a name"));
    }
}
