//! How fast one core makes batches of JPEG files: decoding alone, with the crop and the flip, up to normalised images.

use super::{Times, timed};
use crate::data::decode::decode;
use crate::data::erase::{Erasing, Filling};
use crate::data::loader::{Loader, LoaderOptions};
use crate::data::order::Order;
use crate::data::resize::{IMAGENET_MEAN, IMAGENET_STD};
use crate::data::transform::Transform;
use crate::data::{Dataset, Picture, augment};
use crate::device::parallel;
use crate::error::{Context, Error, Result};
use crate::rng::Rng;
use crate::tensor::{Device, Tensor};
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is measured and on what.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadingArgs {
    /// JPEG files to measure with [default: photograph-like noise of 500 x 375 pixels, made on the spot]
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
    /// Side of the square images in pixels
    #[arg(long, default_value_t = 224)]
    pub image_size: usize,
    /// Passes over the files that count, after one that does not
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Threads of the loader in the last row
    #[arg(long, default_value_t = 1)]
    pub workers: usize,
}

/// No more than this is counted.
const MOST: usize = 100_000;
/// Files that are made, and their quality: about 80 KB each.
const MADE: usize = 32;
const QUALITY: u8 = 88;
const BATCH: usize = 32;

/// One measured step of the way from file to batch.
pub struct Row {
    /// A name for programs and one for people.
    pub step: &'static str,
    pub says: String,
    pub images: usize,
    pub times: Times,
}

impl Row {
    fn per_second(&self, ms: f64) -> f64 {
        self.images as f64 * 1e3 / ms
    }

    pub fn json(&self) -> Value {
        let Times { median, min, max, runs } = self.times;
        json!({ "what": "loading", "step": self.step, "images_per_s": self.per_second(median), "least": self.per_second(max), "most": self.per_second(min),
            "images": self.images, "runs": runs })
    }

    pub fn text(&self) -> String {
        let Times { median, min, max, .. } = self.times;
        format!(
            "{:<64} {:>8.0} images/s   ({:.0} to {:.0})",
            self.says,
            self.per_second(median),
            self.per_second(max),
            self.per_second(min)
        )
    }
}

/// JPEG files in memory, decoded each time.
struct Files {
    names: Vec<String>,
    files: Vec<Vec<u8>>,
}

impl Dataset for Files {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn label(&self, _index: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        self.names[index].clone()
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        decode(&self.files[index]).with_context(|| self.name(index))
    }
}

impl Files {
    /// Noise at all scales, the coarse stronger as in photographs, encoded.
    fn made() -> Result<Self> {
        let [height, width] = [375, 500];
        let mut files = Self { names: Vec::new(), files: Vec::new() };
        for number in 0..MADE {
            let rng = Rng::new(0).at(number as u64);
            let mut levels = vec![128.0; height * width * 3];
            for octave in 0..8 {
                let cell = 1 << octave;
                let (rows, columns) = (height / cell + 2, width / cell + 2);
                let grid = rng.normal(&format!("octave {octave}"), rows * columns * 3);
                let strength = 5.5 * (cell as f32).powf(0.4);
                for (at, level) in levels.iter_mut().enumerate() {
                    let (y, x, c) = (at / 3 / width, at / 3 % width, at % 3);
                    let (fy, fx) = ((y % cell) as f32 / cell as f32, (x % cell) as f32 / cell as f32);
                    let of = |dy: usize, dx: usize| grid[((y / cell + dy) * columns + x / cell + dx) * 3 + c];
                    let rows = [0, 1].map(|dy| of(dy, 0) * (1.0 - fx) + of(dy, 1) * fx);
                    *level += strength * (rows[0] * (1.0 - fy) + rows[1] * fy);
                }
            }
            let bytes: Vec<u8> = levels.iter().map(|&level| level as u8).collect();
            let mut file = Vec::new();
            let mut encoder = JpegEncoder::new_with_quality(&mut file, QUALITY);
            encoder.encode(&bytes, width as u32, height as u32, ExtendedColorType::Rgb8).context("a JPEG could not be made")?;
            files.names.push(format!("made {number}"));
            files.files.push(file);
        }
        Ok(files)
    }

    fn of(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).with_context(|| format!("--folder {} cannot be read", folder.display()))?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("--folder {} cannot be read", folder.display()))?.path();
            let ending = path.extension().map(|ending| ending.to_ascii_lowercase());
            if ending.is_some_and(|ending| ending == "jpg" || ending == "jpeg") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            return Err(Error::usage(format!("--folder {} holds no .jpg files", folder.display())));
        }
        let files = paths.iter().map(|path| std::fs::read(path).with_context(|| path.display().to_string()));
        Ok(Self { files: files.collect::<Result<_>>()?, names: paths.iter().map(|path| path.display().to_string()).collect() })
    }
}

/// Measures each step on the calling thread, the last one with the loader's own threads.
pub fn run(args: &LoadingArgs, mut row: impl FnMut(Row) + Send) -> Result<()> {
    let counted = |flag: &str, value: usize, least: usize, most: usize| match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(Error::usage(format!("{flag} {value} is not from {least} to {most}"))),
    };
    counted("--rounds", args.rounds, 1, MOST)?;
    counted("--image-size", args.image_size, 1, 4096)?;
    counted("--workers", args.workers, 0, 1024)?;
    let files = Arc::new(match &args.folder {
        Some(folder) => Files::of(folder)?,
        None => Files::made()?,
    });
    parallel::alone(|| measure(args, files, &mut row))?
}

fn measure(args: &LoadingArgs, files: Arc<Files>, row: &mut (impl FnMut(Row) + Send)) -> Result<()> {
    let (side, images) = (args.image_size, files.len());
    let mut measured = |step: &'static str, says: String, pass: &mut dyn FnMut(u64) -> Result<()>| -> Result<()> {
        pass(0)?;
        let mut times = Vec::with_capacity(args.rounds);
        for round in 1..=args.rounds {
            let (ms, done) = timed(|| pass(round as u64));
            done?;
            times.push(ms);
        }
        row(Row { step, says, images, times: Times::of(times) });
        Ok(())
    };
    measured("decode", "decode".into(), &mut |_| (0..images).try_for_each(|index| files.picture(index).map(drop)))?;
    let mae = Transform::mae_pretrain(side);
    let erasing = Erasing::new(0.25, Filling::Pixel, 1)?;
    let finetune = Transform::finetune(side, Some("rand-m9-mstd0.5-inc1".parse()?), None, Some(erasing))?;
    let ways = [
        ("pretrain", "pretrain: decode, random resized crop, flip, normalise", mae.clone(), 0),
        ("evaluate", "evaluate: decode, short side, centre crop, normalise", Transform::evaluate(side), 0),
        ("finetune", "finetune: decode, crop, flip, RandAugment, normalise, erasing", finetune, 0),
        ("loader", "", mae, args.workers),
    ];
    for (step, says, transform, workers) in ways {
        // In this order no image is left out, and a new epoch still draws anew.
        let options = LoaderOptions { batch: BATCH, order: Order::Sequential, workers, strict: true, ..LoaderOptions::default() };
        let loader = Loader::new(files.clone(), transform, options);
        let says = if step == "loader" { format!("the same as pretrain by {workers} workers, normalise here") } else { says.to_string() };
        measured(step, says, &mut |round| {
            let mut last: Option<Tensor> = None;
            for loaded in loader.epoch(round, 0) {
                last = Some(loaded?.images(&Device::Cpu, &IMAGENET_MEAN, &IMAGENET_STD, &augment::Augment::default())?);
            }
            last.map(drop).ok_or_else(|| Error::new("the loader gave no batch"))
        })?;
    }
    Ok(())
}
