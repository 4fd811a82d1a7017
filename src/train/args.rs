//! The flags that all training commands share. Their names are the official ones; each struct is at once flag, default, help text and record.

use super::exchange::{ExchangeOptions, Way};
use super::profile::ProfileArgs;
use super::record::command_line;
use super::run::{Options, Schedule};
use crate::device::ranks::{Ranks, Wire};
use crate::device::{Device, Named, Precision};
use crate::error::{Context, Error, Result};
use crate::optim::schedule;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunArgs {
    /// Images of a micro-batch; of several ranks, of each
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
    /// Peak learning rate for 256 images: lr = blr x batch size x accumulation x ranks / 256
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
    /// f32, bf16 (products of bf16 numbers, summed in f32; on a CPU that has it, and on a GPU); on a GPU also tf32
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
    #[command(flatten)]
    #[serde(flatten)]
    pub together: TogetherArgs,
    #[command(flatten)]
    #[serde(skip)]
    pub profile: ProfileArgs,
    /// Those that train with this one.
    #[arg(skip)]
    #[serde(skip)]
    pub ranks: Ranks,
}

/// What matters where several ranks train one model.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TogetherArgs {
    /// Several ranks: how gradients are sent
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    #[serde(with = "text")]
    pub wire: Wire,
    /// Several ranks on GPUs: what gradients go through
    #[arg(long, value_enum, default_value_t = Way::Nccl)]
    pub exchange: Way,
    /// Several ranks: so many megabytes of gradients are sent at once, while the backward pass goes on
    #[arg(long, default_value_t = 25.0, value_name = "MB")]
    pub bucket_mb: f64,
    /// Several ranks: each keeps the optimiser's memory of its share of the parameters alone (ZeRO, stage 1)
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub shard_optimizer: bool,
    /// Several ranks: their parameters are compared after every so many updates, and before each checkpoint; 0: only then
    #[arg(long, default_value_t = 1000, value_name = "UPDATES")]
    pub check_sync: u64,
    /// Several ranks: one that does not come for so long is given up, and the run with it
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS")]
    pub rank_timeout: f64,
}

impl TogetherArgs {
    fn check(&self) -> Result<()> {
        for (flag, value, least, most) in [("--bucket-mb", self.bucket_mb, 0.001, 4096.0), ("--rank-timeout", self.rank_timeout, 1.0, 1e6)]
        {
            if !(least..=most).contains(&value) {
                return Err(Error::usage(format!("{flag} {value} is not from {least} to {most}")));
            }
        }
        Ok(())
    }

    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.rank_timeout.clamp(1.0, 1e6))
    }

    pub fn options(&self) -> ExchangeOptions {
        ExchangeOptions {
            wire: self.wire,
            bucket: (self.bucket_mb * f64::from(1 << 20)) as usize,
            shard: self.shard_optimizer,
            way: self.exchange,
            patience: self.patience(),
        }
    }
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
            return fail(format!("--clip-grad {norm}: gradients are clipped to a length above 0; one as large as 1e9 clips none"));
        }
        if let Some(decay) = self.model_ema_decay.filter(|decay| !(0.0..1.0).contains(decay)) {
            return fail(format!("--model-ema-decay {decay} is not in [0, 1)"));
        }
        if self.num_workers.is_some_and(|workers| workers > 1024) {
            return fail(format!("--num-workers {} is more than 1024", self.num_workers.unwrap_or(0)));
        }
        self.together.check()?;
        self.profile.check()
    }

    /// Waits for the other ranks of a launch, if this process is one of several.
    pub fn join(&self) -> Result<Ranks> {
        self.together.check()?;
        Ranks::launched(self.together.patience())
    }

    /// The device of this rank: of several GPUs, the one with its number on this machine.
    pub fn open_device(&self) -> Result<Device> {
        let device = self.ranks.device(self.device)?.open()?;
        device.compute_in(self.precision)?;
        Ok(device)
    }

    /// Images of an update, those of all ranks.
    pub fn effective_batch(&self) -> usize {
        self.batch_size * self.accum_iter * self.ranks.world()
    }

    pub fn schedule(&self) -> Schedule {
        let peak = self.lr.unwrap_or_else(|| schedule::peak_per_256(self.blr, self.effective_batch()));
        Schedule::Mae { peak, min: self.min_lr, warmup: self.warmup_epochs, from: 0.0, fixed: false }
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
            sync_updates: self.together.check_sync,
        }
    }

    /// Threads that read images; a rank does not take the others' cores.
    pub fn workers(&self) -> usize {
        workers(self.ranks.own_threads(self.num_workers))
    }
}

/// Threads that read images: one a core where nothing was typed.
pub fn workers(given: Option<usize>) -> usize {
    given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Settings as they are stored in a checkpoint.
pub fn settings(args: &impl Serialize) -> Result<Map<String, Value>> {
    let value = serde_json::to_value(args).context("the settings of a run")?;
    Ok(value.as_object().cloned().unwrap_or_default())
}

/// The whole command with every setting.
pub fn command(words: &str, settings: &Map<String, Value>) -> String {
    let mut all: Vec<String> = std::iter::once("masque").chain(words.split(' ')).map(String::from).collect();
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

/// One of a list as it was typed: a word without quotes, a number that was an f32 with its digits and not those of the f64 it is stored as.
fn shortest(value: &Value) -> String {
    if let Value::String(word) = value {
        return word.clone();
    }
    let narrow = value.as_f64().map(|x| (x as f32, x)).filter(|(narrow, x)| f64::from(*narrow) == *x);
    narrow.map_or_else(|| value.to_string(), |(narrow, _)| narrow.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_of_a_command_are_written_as_they_were_typed() {
        let settings = json!({
            "mean": [0.485f32, 0.5f32], "betas": [0.9, 0.95], "lr": 2e-3, "resume": null, "flip": true, "model": "glyph_s",
            "relations": ["qk", "vv"], "aligned-blks-indices": [1, 2]
        });
        let text = command("finetune", settings.as_object().unwrap());
        let wanted = "masque finetune --mean=0.485,0.5 --betas=0.9,0.95 --lr=0.002 --flip=true --model=glyph_s --relations=qk,vv \
                      --aligned-blks-indices=1,2";
        assert_eq!(text, wanted);
    }
}
