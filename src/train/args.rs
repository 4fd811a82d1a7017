//! The flags that all training commands share. Their names are the official ones; each struct is at once flag, default, help text and record.

use super::checkpoint::{self, Shelf};
use super::record::{Record, command_line};
use super::run::{Options, Place, Schedule};
use crate::data::loader::Loader;
use crate::device::{Device, Named, Precision};
use crate::error::{Context, Error, Result};
use crate::formats::{self, TensorFile};
use crate::optim::schedule;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunArgs {
    /// Images of a micro-batch
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub batch_size: usize,
    /// Passes through the training images
    #[arg(long, default_value_t = 400, value_name = "N")]
    pub epochs: u64,
    /// Micro-batches of an update
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub accum_iter: usize,
    /// Peak learning rate; without it --blr says it
    #[arg(long, value_name = "RATE")]
    pub lr: Option<f64>,
    /// Peak learning rate for 256 images: lr = blr x batch size x accumulation / 256
    #[arg(long, default_value_t = 1e-3, value_name = "RATE")]
    pub blr: f64,
    /// Learning rate at the end
    #[arg(long, default_value_t = 0.0, value_name = "RATE")]
    pub min_lr: f64,
    /// Epochs in which the learning rate rises from zero; may be a fraction
    #[arg(long, default_value_t = 40.0, value_name = "EPOCHS")]
    pub warmup_epochs: f64,
    /// Weight decay of AdamW (matrices only) or LARS
    #[arg(long, default_value_t = 0.05, value_name = "RATE")]
    pub weight_decay: f64,
    /// Longest gradient of all parameters together [default: not clipped]
    #[arg(long, value_name = "NORM")]
    pub clip_grad: Option<f64>,
    /// Keep a running average of the weights with this decay, evaluate it as well and store it in checkpoints [default: none]
    #[arg(long, value_name = "DECAY")]
    pub model_ema_decay: Option<f64>,
    /// Seed of weights, order, augmentation and masks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to compute
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    #[serde(with = "text")]
    pub device: Named,
    /// f32; on a GPU also bf16 and tf32
    #[arg(long, default_value = "f32", value_name = "f32|bf16|tf32")]
    #[serde(with = "text")]
    pub precision: Precision,
    /// Folder of the run [default: a new one under runs/]
    #[arg(long, value_name = "FOLDER")]
    pub output_dir: Option<PathBuf>,
    /// Go on from a checkpoint; auto: the newest whole one of the run's folder, or a fresh start
    #[arg(long, value_name = "PATH|auto")]
    pub resume: Option<String>,
    /// Epochs between two checkpoints
    #[arg(long, default_value_t = 20, value_name = "EPOCHS")]
    pub save_freq: u64,
    /// Also after every so many updates
    #[arg(long, value_name = "UPDATES")]
    pub save_updates: Option<u64>,
    /// Also after so many minutes
    #[arg(long, default_value_t = 10.0, value_name = "MINUTES")]
    pub save_minutes: f64,
    /// Checkpoints that are kept, besides the best
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub keep: usize,
    /// Epochs between two evaluations; 0: only at the end
    #[arg(long, default_value_t = 1, value_name = "EPOCHS")]
    pub eval_freq: u64,
    /// Updates between two rows of steps.jsonl
    #[arg(long, default_value_t = 20, value_name = "UPDATES")]
    pub log_freq: u64,
    /// Updates in a row that may be skipped because loss or gradient are not finite, before the run goes back to its last checkpoint
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub max_skips: u64,
    /// Threads that read and augment images; they never change what a batch holds [default: one a core]
    #[arg(long, value_name = "N")]
    pub num_workers: Option<usize>,
}

/// What was typed as text is stored as text.
mod text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<T: std::fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'d, T: std::str::FromStr<Err = crate::error::Error>, D: Deserializer<'d>>(deserializer: D) -> Result<T, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Where a run writes and what it goes on from.
pub struct Start {
    pub folder: PathBuf,
    pub from: Option<(PathBuf, TensorFile)>,
    /// What is to be said about it.
    pub notes: Vec<String>,
}

impl RunArgs {
    /// What cannot be meant, as a sentence.
    pub fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::usage(text));
        for (flag, value) in [("--batch-size", self.batch_size as u64), ("--epochs", self.epochs), ("--accum-iter", self.accum_iter as u64)]
        {
            if value == 0 || value > 1 << 32 {
                return fail(format!("{flag} {value} is not from 1 to {}", 1u64 << 32));
            }
        }
        for (flag, value) in [
            ("--save-freq", self.save_freq),
            ("--log-freq", self.log_freq),
            ("--save-updates", self.save_updates.unwrap_or(1)),
            ("--keep", self.keep as u64),
        ] {
            if value == 0 {
                return fail(format!("{flag} 0: at least 1 is needed"));
            }
        }
        let rates =
            [("--blr", self.blr), ("--lr", self.lr.unwrap_or(0.0)), ("--min-lr", self.min_lr), ("--weight-decay", self.weight_decay)];
        for (flag, value) in rates.into_iter().chain([("--warmup-epochs", self.warmup_epochs), ("--save-minutes", self.save_minutes)]) {
            if !(value.is_finite() && value >= 0.0) {
                return fail(format!("{flag} {value} is not a number from 0 on"));
            }
        }
        if let Some(norm) = self.clip_grad.filter(|norm| !(norm.is_finite() && *norm > 0.0)) {
            return fail(format!(
                "--clip-grad {norm}: gradients are clipped to a length above 0; leave the flag out to switch clipping off"
            ));
        }
        if let Some(decay) = self.model_ema_decay.filter(|decay| !(0.0..1.0).contains(decay)) {
            return fail(format!("--model-ema-decay {decay} is not in [0, 1)"));
        }
        if self.num_workers.is_some_and(|workers| workers > 1024) {
            return fail(format!("--num-workers {} is more than 1024", self.num_workers.unwrap_or(0)));
        }
        Ok(())
    }

    pub fn open_device(&self) -> Result<Device> {
        let device = self.device.open()?;
        device.compute_in(self.precision)?;
        Ok(device)
    }

    /// Refuses an update of more batches than an epoch has.
    pub fn check_window(&self, loader: &Loader) -> Result<()> {
        let batches = loader.batches();
        if batches < self.accum_iter {
            return Err(Error::usage(format!(
                "an epoch has {batches} batches of --batch-size {}, fewer than an update takes (--accum-iter {}); make one of them smaller",
                self.batch_size, self.accum_iter
            )));
        }
        Ok(())
    }

    /// Images of an update.
    pub fn effective_batch(&self) -> usize {
        self.batch_size * self.accum_iter
    }

    pub fn schedule(&self) -> Schedule {
        let peak = self.lr.unwrap_or_else(|| schedule::peak_per_256(self.blr, self.effective_batch()));
        Schedule { peak, min: self.min_lr, warmup: self.warmup_epochs }
    }

    pub fn options(&self) -> Options {
        Options {
            epochs: self.epochs,
            save_epochs: self.save_freq,
            save_updates: self.save_updates,
            save_time: Duration::from_secs_f64((self.save_minutes * 60.0).min(1e9)),
            keep: self.keep,
            eval_epochs: self.eval_freq,
            row_updates: self.log_freq,
            most_skips: self.max_skips,
            seed: self.seed,
        }
    }

    pub fn workers(&self) -> usize {
        self.num_workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
    }

    /// Chooses the run's folder, and finds the checkpoint that it goes on from. `name` is what a new folder under runs/ is called.
    pub fn start(&self, name: &str) -> Result<Start> {
        let folder = match (&self.output_dir, self.resume.as_deref()) {
            (Some(folder), _) => folder.clone(),
            (None, Some("auto")) => numbered(name).take_while(|folder| folder.exists()).last().unwrap_or_else(|| first(name)),
            (None, _) => numbered(name).find(|folder| !folder.exists()).unwrap_or_else(|| first(name)),
        };
        let mut start = Start { folder, from: None, notes: Vec::new() };
        match self.resume.as_deref() {
            None => {
                let shelf = Shelf::new(&start.folder, self.keep);
                if !shelf.updates().is_empty() || Record::holds_run(&start.folder) {
                    return Err(Error::usage(format!(
                        "--output-dir {}: the folder holds a run already; go on with it by --resume auto, or choose another folder",
                        start.folder.display()
                    )));
                }
            }
            Some("auto") => {
                let (newest, damaged) = Shelf::new(&start.folder, self.keep).newest();
                start.notes = damaged;
                start.from = newest;
                if start.from.is_none() && !start.notes.is_empty() {
                    start.notes.push("no checkpoint of the folder is whole: the run begins anew".into());
                }
            }
            Some(path) => {
                let attempt = || format!("--resume {path}");
                let file = formats::open(path).with_context(attempt)?;
                if checkpoint::settings(&file)?.is_empty() {
                    return Err(Error::usage(format!(
                        "--resume {path}: the file is no checkpoint of a run of masque; --init, --finetune and masque evaluate take the weights of others"
                    )));
                }
                checkpoint::header(&file).and_then(|_| checkpoint::check(&file)).with_context(attempt)?;
                start.from = Some((PathBuf::from(path), file));
            }
        }
        Ok(start)
    }
}

fn first(name: &str) -> PathBuf {
    Path::new("runs").join(name)
}

/// runs/NAME, runs/NAME-2, runs/NAME-3 ...
fn numbered(name: &str) -> impl Iterator<Item = PathBuf> {
    let name = name.to_string();
    std::iter::once(first(&name)).chain((2..10_000).map(move |i| first(&format!("{name}-{i}"))))
}

/// Settings as they are stored in a checkpoint.
pub fn settings(args: &impl Serialize) -> Result<Map<String, Value>> {
    let value = serde_json::to_value(args).context("the settings of a run")?;
    Ok(value.as_object().cloned().unwrap_or_default())
}

/// What a checkpoint and the images that a run goes on with have to agree in.
pub fn data_of(command: &str, images: usize, classes: &[String]) -> Map<String, Value> {
    let entries = [("command", json!(command)), ("train-images", json!(images)), ("classes", json!(classes))];
    entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

/// The whole command with every setting.
pub fn command(words: &[&str], settings: &Map<String, Value>) -> String {
    let mut all: Vec<String> = std::iter::once("masque").chain(words.iter().copied()).map(String::from).collect();
    for (name, value) in settings {
        let text = match value {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            Value::Array(values) => values.iter().map(shortest).collect::<Vec<_>>().join(","),
            other => other.to_string(),
        };
        all.push(format!("--{name}={text}"));
    }
    command_line(all.iter().map(String::as_str))
}

/// A number as it was typed: one that was an f32 has its digits, not those of the f64 it is stored as.
fn shortest(value: &Value) -> String {
    let narrow = value.as_f64().map(|x| (x as f32, x)).filter(|(narrow, x)| f64::from(*narrow) == *x);
    narrow.map_or_else(|| value.to_string(), |(narrow, _)| narrow.to_string())
}

/// These say where and how a run is computed and stored, not what it computes.
const FREE: [&str; 11] = [
    "output-dir",
    "resume",
    "save-freq",
    "save-updates",
    "save-minutes",
    "keep",
    "eval-freq",
    "log-freq",
    "num-workers",
    "max-skips",
    "device",
];

/// These may not differ: the place in the epoch and the order of the images depend on them.
const FIXED: [&str; 8] = ["batch-size", "accum-iter", "seed", "train-images", "model", "input-size", "in-chans", "repeated-aug"];

/// What differs from the settings that a checkpoint was made with: an error where that cannot be, else a sentence each.
pub fn compare(now: &Map<String, Value>, then: &Map<String, Value>, from: &Path) -> Result<Vec<String>> {
    let shown = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "not given".to_string(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let mut notes = Vec::new();
    for (name, value) in now {
        let before = then.get(name);
        if FREE.contains(&name.as_str()) || before.unwrap_or(&Value::Null) == value {
            continue;
        }
        let (was, is) = (shown(before), shown(Some(value)));
        if FIXED.contains(&name.as_str()) {
            return Err(Error::usage(format!(
                "--{name} is {is} but {} was made with {was}; a run goes on with the value it began with",
                from.display()
            )));
        }
        notes.push(format!("--{name} is {is} from here on; the checkpoint was made with {was}"));
    }
    Ok(notes)
}

impl Start {
    /// Refuses a checkpoint of another command, of other images, or of settings that may not change; says what else differs.
    pub fn check(&self, settings: &Map<String, Value>, data: &Map<String, Value>, say: &mut dyn FnMut(&str)) -> Result<()> {
        self.notes.iter().for_each(|note| say(note));
        let Some((path, file)) = &self.from else { return Ok(()) };
        let (header, path) = (checkpoint::header(file)?, path.as_path());
        let shown = path.display();
        let (was, is) = (header.data.get("command"), data.get("command"));
        if was != is {
            let word = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("another program").to_string();
            return Err(Error::usage(format!(
                "{shown} is of masque {}, not of masque {}; --finetune takes the encoder of another run",
                word(was),
                word(is)
            )));
        }
        let notes = compare(settings, &header.settings, path)?;
        for (key, what) in [("train-images", "training images"), ("classes", "classes")] {
            let (was, is) = (header.data.get(key), data.get(key));
            if was != is {
                let short = |value: Option<&Value>| match value {
                    Some(Value::Array(names)) => format!("{} classes", names.len()),
                    other => other.map_or_else(|| "none".to_string(), Value::to_string),
                };
                return Err(Error::new(format!(
                    "the {what} are not those that {shown} was made with ({} now, {} then, or in another order); the run cannot go on with them",
                    short(is),
                    short(was)
                )));
            }
        }
        notes.iter().for_each(|note| say(note));
        Ok(())
    }

    /// Opens the record, new or continued, and says where the run begins.
    pub fn record(&self, words: &[&str], settings: &Map<String, Value>, say: &mut dyn FnMut(&str)) -> Result<Record> {
        let command = command(words, settings);
        let Some((path, file)) = &self.from else { return Record::create(&self.folder, &command) };
        let header = checkpoint::header(file)?;
        let place: Place = serde_json::from_value(Value::Object(header.progress)).with_context(|| path.display().to_string())?;
        say(&format!("going on from {} (epoch {}, update {})", path.display(), place.epoch, place.update));
        let here =
            path.parent().is_some_and(|parent| parent == self.folder || parent.canonicalize().ok() == self.folder.canonicalize().ok());
        if !here {
            return Record::create(&self.folder, &command);
        }
        for abandoned in Shelf::new(&self.folder, 1).set_aside(place.update)? {
            say(&format!("{} is of the run that is left here: it has been renamed", abandoned.display()));
        }
        Record::resume(&self.folder, place.update, &command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_command_have_the_digits_that_were_typed() {
        let settings =
            json!({ "mean": [0.485f32, 0.5f32], "betas": [0.9, 0.95], "lr": 2e-3, "resume": null, "flip": true, "model": "glyph_s" });
        let text = command(&["finetune"], settings.as_object().unwrap());
        assert_eq!(text, "masque finetune --mean=0.485,0.5 --betas=0.9,0.95 --lr=0.002 --flip=true --model=glyph_s");
    }

    #[test]
    fn what_differs_is_refused_or_said() {
        let map = |value: Value| value.as_object().cloned().unwrap();
        let then = map(json!({ "seed": 1, "lr": 0.1, "keep": 3 }));
        let compared = |now: Value| compare(&map(now), &then, Path::new("a.safetensors"));
        assert!(compared(json!({ "seed": 1, "lr": 0.1, "keep": 9 })).unwrap().is_empty());
        assert_eq!(compared(json!({ "seed": 1, "lr": 0.2 })).unwrap(), ["--lr is 0.2 from here on; the checkpoint was made with 0.1"]);
        let refused = compared(json!({ "seed": 2 })).unwrap_err();
        assert_eq!((refused.exit_code(), refused.chain().starts_with("--seed is 2 but a.safetensors was made with 1")), (2, true));
    }
}
