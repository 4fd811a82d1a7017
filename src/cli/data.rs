//! `masque data`: sets of images packed into one file, checked, unpacked and looked at.

use super::say;
use crate::data::Dataset;
use crate::data::open::{Split, open};
use crate::data::packed::{Event, Options, Packed, Storage, export, pack};
use crate::error::{Error, Result};
use clap::{Args, Subcommand, ValueEnum};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Subcommand)]
pub(super) enum Data {
    /// Write a set of images into one file, which is read faster than a folder; the same command continues what was interrupted
    Pack(Pack),
    /// Compare every byte of a packed file with its checksums
    Check {
        /// The packed file
        file: PathBuf,
        /// Decode every image as well
        #[arg(long)]
        decode: bool,
    },
    /// Write the images of a packed file into a folder, one folder a class: the original files as they were, or pixels as PNG
    Export {
        /// The packed file
        file: PathBuf,
        /// The folder to make
        folder: PathBuf,
    },
    /// How many images a set has, of which classes and sizes
    Show {
        /// A packed file, a folder with one folder of images a class, or a CIFAR folder
        path: PathBuf,
        /// Which part of a set that is no packed file [default: train]
        #[arg(long, value_enum)]
        split: Option<Part>,
        /// Every class with its number of images
        #[arg(long)]
        classes: bool,
    },
}

#[derive(Args)]
pub(super) struct Pack {
    /// The set: a folder with one folder of images a class, a CIFAR folder, or a packed file
    #[arg(long, alias = "data_path", value_name = "PATH")]
    data_path: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE.masque")]
    output: PathBuf,
    /// Which part of a set that is no packed file [default: train]
    #[arg(long, value_enum)]
    split: Option<Part>,
    /// Keep pixels, the short side resized to N; images that are smaller stay as they are [default: 256]
    #[arg(long, value_name = "N", conflicts_with = "original")]
    size: Option<u32>,
    /// Keep the files' own bytes, such as JPEG
    #[arg(long)]
    original: bool,
    /// Fail at an image that cannot be read, instead of skipping it
    #[arg(long, alias = "strict_data")]
    strict_data: bool,
    /// Replace FILE, and begin anew where an interrupted attempt was of other images
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Part {
    Train,
    Val,
}

/// Opens the set at `path`; a packed file is one part of a set, so there is none to choose.
fn opened(path: &Path, part: Option<Part>) -> Result<Arc<dyn Dataset>> {
    if !Packed::is_at(path) {
        return open(path, if matches!(part, Some(Part::Val)) { Split::Val } else { Split::Train });
    }
    if part.is_some() {
        return Err(Error::usage(format!("--split: {} is a packed file, which has no parts; leave the flag out", path.display())));
    }
    Ok(Arc::new(Packed::open(path)?))
}

pub(super) fn run(command: Data) -> Result<ExitCode> {
    match command {
        Data::Pack(args) => packs(&args)?,
        Data::Check { file, decode } => return checks(&file, decode),
        Data::Export { file, folder } => {
            let packed = Packed::open(&file)?;
            let mut pace = Pace::new("written");
            export(&packed, &folder, &mut |done| pace.tell(done, packed.len()))?;
            say(&format!("{}: {} images of {} classes", folder.display(), packed.len(), packed.classes().len()));
        }
        Data::Show { path, split, classes } => shows(&path, split, classes)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn packs(args: &Pack) -> Result<()> {
    let storage = match args.size {
        Some(0) => return Err(Error::usage("--size 0: the short side of an image is at least 1; 256 is usual")),
        _ if args.original => Storage::Original,
        size => Storage::Pixels { short: size.unwrap_or(256) },
    };
    if args.output.extension().is_none_or(|ending| ending != "masque") {
        return Err(Error::usage(format!(
            "--output {}: packed files are named train.masque and val.masque, side by side, so that --data-path finds them",
            args.output.display()
        )));
    }
    if args.output.exists() && !args.force {
        return Err(Error::new(format!("{} is there already; --force replaces it", args.output.display())));
    }
    let dataset = opened(&args.data_path, args.split)?;
    dataset.notes().iter().for_each(|note| say(note));
    let options = Options { storage, strict: args.strict_data, force: args.force, root: &args.data_path };
    let mut pace = Pace::new("done");
    let packing = pack(&*dataset, &args.output, &options, &mut |event| match event {
        Event::Continued { images } => say(&format!("continuing with the {images} images that are there")),
        Event::Skipped { name, why } if why.contains(name) => eprintln!("masque: skipped: {why}"),
        Event::Skipped { name, why } => eprintln!("masque: skipped: {name}: {why}"),
        Event::Progress { done, of } => pace.tell(done, of),
    })?;
    if packing.skipped > 0 {
        eprintln!("masque: {} of {} images were skipped because they could not be read", packing.skipped, packing.skipped + packing.images);
    }
    let size = bytes(packing.bytes);
    say(&format!("{}: {} images of {} classes, {storage}, {size}", args.output.display(), packing.images, dataset.classes().len()));
    Ok(())
}

/// Exit code 1 if anything is damaged.
fn checks(file: &Path, decode: bool) -> Result<ExitCode> {
    let packed = Packed::open(file)?;
    let mut pace = Pace::new("checked");
    let Some(damage) = packed.check(decode, &mut |done| pace.tell(done, packed.len())) else {
        say(&format!("{}: {} images are as they were written", file.display(), packed.len()));
        return Ok(ExitCode::SUCCESS);
    };
    eprintln!(
        "masque: {} of {} images of {} are damaged; the first: {}",
        damage.records,
        packed.len(),
        file.display(),
        damage.first.chain()
    );
    Ok(ExitCode::FAILURE)
}

fn shows(path: &Path, part: Option<Part>, every_class: bool) -> Result<()> {
    const SHOWN: usize = 20;
    const LOOKED_AT: usize = 500;
    let dataset = opened(path, part)?;
    dataset.notes().iter().for_each(|note| say(note));
    let sizes: Vec<[usize; 2]> = if Packed::is_at(path) {
        let packed = Packed::open(path)?;
        say(&format!("{}: {}, {}, {} skipped", path.display(), packed.storage(), bytes(packed.file_len() as u64), packed.skipped()));
        (0..packed.len()).map(|index| packed.size(index)).collect::<Result<_>>()?
    } else {
        say(&format!("{}", path.display()));
        let looked_at = dataset.len().min(LOOKED_AT);
        let indices = (0..looked_at).into_par_iter().map(|i| i * dataset.len() / looked_at);
        indices.filter_map(|index| dataset.picture(index).ok().map(|picture| picture.size)).collect()
    };
    let mut counts = vec![0usize; dataset.classes().len()];
    for index in 0..dataset.len() {
        if let Some(count) = counts.get_mut(dataset.label(index) as usize) {
            *count += 1;
        }
    }
    let between = |numbers: &mut dyn Iterator<Item = usize>| {
        let numbers: Vec<usize> = numbers.collect();
        let [least, most] = [numbers.iter().min(), numbers.iter().max()].map(|number| number.copied().unwrap_or(0));
        if least == most { least.to_string() } else { format!("{least} to {most}") }
    };
    let of_a_class = between(&mut counts.iter().copied());
    say(&format!("{} images of {} classes, {of_a_class} of a class", dataset.len(), counts.len()));
    let height = between(&mut sizes.iter().map(|size| size[0]));
    let width = between(&mut sizes.iter().map(|size| size[1]));
    let looked_at = if sizes.len() == dataset.len() { "all".to_string() } else { format!("{} that were looked at", sizes.len()) };
    say(&format!("height {height}, width {width} ({looked_at})"));
    let shown = if every_class { counts.len() } else { counts.len().min(SHOWN) };
    for (class, count) in dataset.classes().iter().zip(&counts).take(shown) {
        say(&format!("  {class}  {count}"));
    }
    if shown < counts.len() {
        say(&format!("  and {} more; --classes lists them", counts.len() - shown));
    }
    Ok(())
}

/// A line every few seconds.
struct Pace {
    word: &'static str,
    /// When it began, and what was done by then.
    start: Option<(Instant, usize)>,
    last: Instant,
}

impl Pace {
    fn new(word: &'static str) -> Self {
        Self { word, start: None, last: Instant::now() }
    }

    fn tell(&mut self, done: usize, of: usize) {
        const EVERY: Duration = Duration::from_secs(5);
        let (start, first) = *self.start.get_or_insert((Instant::now(), done));
        if self.last.elapsed() < EVERY || done >= of {
            return;
        }
        self.last = Instant::now();
        let rate = (done - first) as f64 / start.elapsed().as_secs_f64().max(1e-9);
        let left = if rate > 0.0 { format!(", {:.0} s left", (of - done) as f64 / rate) } else { String::new() };
        say(&format!("{done} of {of} images {}, {rate:.0} a second{left}", self.word));
    }
}

/// A number of bytes as a person reads it.
fn bytes(count: u64) -> String {
    match count {
        0..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}
