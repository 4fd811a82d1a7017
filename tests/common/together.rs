//! Runs of several ranks, and how near their numbers are.
#![allow(dead_code)] // each test program uses a part of it

use super::runs::{checkpoints, rows};
use masque::device::ranks::Ranks;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Who teaches.
#[derive(Clone, Copy, PartialEq)]
pub enum Taught {
    Alone,
    ByEncoder,
    ByClassifier,
}

/// The five systems: a name, its command, its teacher.
pub const SYSTEMS: [(&str, &str, Taught); 5] = [
    ("mae", "pretrain mae --model glyph_t --crop shift --clip-grad 0.5 --model-ema-decay 0.9", Taught::Alone),
    ("dmae", "pretrain dmae --masking block", Taught::ByEncoder),
    ("maskedkd", "distill maskedkd --mixup 0 --cutmix 0 --drop-path 0.2", Taught::ByClassifier),
    ("tinymim", "pretrain tinymim --color-jitter 0.4 --drop-path 0.1 --teacher-drop-path 0.1", Taught::ByEncoder),
    ("dmjd", "pretrain dmjd --accum-iter 2", Taught::Alone),
];

/// What a run of one epoch of 48 images has that takes 8 images a batch from all ranks together.
pub fn few(command: &str, world: usize) -> String {
    let batch = 8 / world;
    format!(
        "{command} --train-images 48 --val-images 8 --batch-size {batch} --epochs 1 --log-freq 1 --warmup-epochs 0.5 --keep 9 --num-workers 0"
    )
}

/// How each rank ended: what it would have said, with its exit code.
pub type Ended = Result<(), (u8, String)>;

/// Runs a command as one of some ranks, in this process.
pub fn run_as(command: &str, output: &Path, ranks: &Ranks) -> Ended {
    let output = output.display().to_string();
    let words: Vec<&str> = command.split_whitespace().chain(["--output-dir", &output]).collect();
    masque::cli::run_as(&words, ranks).map(|_| ()).map_err(|error| (error.exit_code(), error.chain()))
}

#[track_caller]
pub fn alone(command: &str, output: &Path) {
    run_as(command, output, &Ranks::alone()).unwrap();
}

/// Runs a command as so many threads, each a rank with a command of its own.
pub fn threads(world: usize, command: impl Fn(usize) -> String + Sync, output: &Path) -> Vec<Ended> {
    let ranks = Ranks::threads(world, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let start = |ranks: Ranks| {
            scope.spawn({
                let command = &command;
                move || run_as(&command(ranks.rank()), output, &ranks)
            })
        };
        let threads: Vec<_> = ranks.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[track_caller]
pub fn as_threads(world: usize, command: &str, output: &Path) {
    threads(world, |_| command.to_string(), output).into_iter().for_each(|ended| ended.unwrap());
}

/// Trains the teachers that `SYSTEMS` name; answers what to add to a command.
pub fn teachers(base: &Path) -> impl Fn(Taught) -> String {
    let small = "--train-images 32 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0 --num-workers 0";
    let (encoder, classifier) = (base.join("encoder"), base.join("classifier"));
    alone(&format!("pretrain mae {small}"), &encoder);
    alone(&format!("finetune --model glyph_s --cls-token {small}"), &classifier);
    move |taught| match taught {
        Taught::Alone => String::new(),
        Taught::ByEncoder => format!("--teacher-path {}", encoder.join("best.safetensors").display()),
        Taught::ByClassifier => format!("--teacher-path {}", classifier.join("best.safetensors").display()),
    }
}

pub fn losses(folder: &Path) -> Vec<f64> {
    rows(folder.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect()
}

/// Losses that differ by no more than a part of themselves.
#[track_caller]
pub fn near(name: &str, own: &[f64], expected: &[f64], limit: f64) {
    assert_eq!(own.len(), expected.len(), "{name}: {own:?} {expected:?}");
    let worst = own.iter().zip(expected).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max);
    assert!(worst <= limit, "{name}: {worst:e}\n{own:?}\n{expected:?}");
}

pub fn checkpoint(folder: &Path, update: u64) -> PathBuf {
    folder.join(format!("checkpoint-{update:08}.safetensors"))
}

/// The tensors of a checkpoint whose names begin like this. The biases of keys are zeros: a constant in all of a query's scores changes nothing, so that their
/// gradients are the rounding of zero, which Adam brings to the size of any other.
pub fn tensors(path: &Path, beginning: &str) -> BTreeMap<String, Vec<f32>> {
    let file = masque::formats::open(path).unwrap();
    let tensors = file.tensors().iter().filter(|(name, _)| name.starts_with(beginning));
    let without_keys = |name: &str, mut numbers: Vec<f32>| {
        let width = numbers.len() / 3;
        if name.ends_with("attn.qkv.bias") {
            numbers[width..2 * width].fill(0.0);
        }
        numbers
    };
    tensors.map(|(name, tensor)| (name.clone(), without_keys(name, tensor.to_f32().unwrap()))).collect()
}

fn distance(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f64 {
    assert!(a.keys().eq(b.keys()) && !a.is_empty());
    let numbers = a.values().flatten().zip(b.values().flatten());
    numbers.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

/// How far the last parameters of two runs lie apart, as a part of the way that they went.
#[track_caller]
pub fn apart(own: &Path, expected: &Path, beginning: &str) -> f64 {
    assert_eq!(checkpoints(own), checkpoints(expected));
    let last = checkpoints(expected).pop().unwrap();
    let [own, end, start] =
        [(own, last), (expected, last), (expected, 0)].map(|(folder, update)| tensors(&checkpoint(folder, update), beginning));
    distance(&own, &end) / distance(&end, &start)
}
