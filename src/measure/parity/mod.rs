//! Whether the numbers are PyTorch's: golden cases run again and compared, tensor by tensor.
//!
//! A case is a `.safetensors` file (an operation or a model with inputs, weights and results of the official code) or a `.pth` file beside
//! `<stem>.expected.safetensors` or `<stem>.expected.json`. One row a case:
//!
//!   ok, FAILED or unsupported | name | worst tensor | its error | what is allowed | error / allowed
//!
//! A file that is broken fails its own row; the run goes on.

mod case;
mod compare;
mod convmae;
mod dmae;
mod dmjd;
mod hog;
mod mae;
mod maskedkd;
mod ops;
mod pth;
mod steps;
mod tables;
mod tinymim;
mod vit;

pub use compare::{Check, Limits};

use crate::device::Device;
use crate::error::{Context, Error, Result};
use crate::tensor::Dtype;
use case::Case;
use compare::Record;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// What is run, and how strictly.
#[derive(Clone, Debug)]
pub struct Options {
    /// Case files, and folders that are searched for them.
    pub paths: Vec<PathBuf>,
    pub device: Device,
    /// F32, or F64 for the whole engine.
    pub precision: Dtype,
    pub limits: Limits,
    /// Whether a case of a method that does not exist yet counts as failed.
    pub strict: bool,
}

impl Options {
    /// The defaults: CPU, f32, the suggested limits.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, device: Device::Cpu, precision: Dtype::F32, limits: Limits::Suggested, strict: false }
    }
}

/// What became of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed(String),
    Unsupported(String),
}

#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub outcome: Outcome,
    /// The comparison that is nearest to its limit or farthest beyond it.
    pub worst: Option<Check>,
}

#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    pub rows: Vec<Row>,
}

/// Runs every case and prints its row as soon as it is done, then the counts.
pub fn run(options: &Options, print: &mut dyn FnMut(&str)) -> Result<Summary> {
    if !matches!(options.precision, Dtype::F32 | Dtype::F64) {
        return Err(Error::usage(format!("parity is computed in f32 or f64, not {}", options.precision)));
    }
    if options.device.gpu().is_some() && options.precision != Dtype::F32 {
        return Err(Error::usage(format!(
            "device {} computes parity in f32, not {}; leave --precision out",
            options.device, options.precision
        )));
    }
    let mut files = Vec::new();
    for path in &options.paths {
        find(path, &mut files)?;
    }
    if files.is_empty() {
        let names: Vec<String> = options.paths.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::usage(format!("there is no case in {}; name .safetensors or .pth files or their folder", names.join(", "))));
    }
    let mut summary = Summary::default();
    for path in files {
        let mut row = run_file(&path, options);
        if let (true, Outcome::Unsupported(reason)) = (options.strict, &row.outcome) {
            row.outcome = Outcome::Failed(reason.clone());
        }
        match row.outcome {
            Outcome::Passed => summary.passed += 1,
            Outcome::Failed(_) => summary.failed += 1,
            Outcome::Unsupported(_) => summary.skipped += 1,
        }
        row.text().iter().for_each(|line| print(line));
        summary.rows.push(row);
    }
    if summary.skipped > 0 {
        print(&format!("{} skipped: not supported yet, named above", summary.skipped));
    }
    print(&format!("{} passed, {} failed", summary.passed, summary.failed));
    Ok(summary)
}

impl Row {
    /// The lines that are printed: one, and a second where something is wrong.
    fn text(&self) -> Vec<String> {
        let (status, reason) = match &self.outcome {
            Outcome::Passed => ("ok", None),
            Outcome::Failed(reason) => ("FAILED", Some(reason)),
            Outcome::Unsupported(reason) => ("unsupported", Some(reason)),
        };
        let numbers = self.worst.as_ref().map_or(String::new(), |worst| {
            format!("{:<44} {:>9.1e} of {:>8.1e}  ({:.3})", worst.name, worst.error, worst.allowed, worst.ratio())
        });
        let line = format!("{status:<11} {:<36} {numbers}", self.name);
        std::iter::once(line.trim_end().to_string()).chain(reason.map(|reason| format!("            {reason}"))).collect()
    }
}

/// Adds the cases at `path`, in the order of their names.
fn find(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).with_context(|| format!("cannot read the folder {}", path.display()))?;
        let entries = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
        let mut entries = entries.with_context(|| format!("cannot read the folder {}", path.display()))?;
        entries.sort();
        for entry in entries {
            if entry.is_dir() {
                // A link may lead back up.
                if !entry.is_symlink() {
                    find(&entry, files)?;
                }
            } else if let Some(file) = case_file(&entry) {
                add(file, files);
            }
        }
        return Ok(());
    }
    if !path.exists() {
        return Err(Error::usage(format!("{} does not exist", path.display())));
    }
    let file = case_file(path).ok_or_else(|| Error::usage(format!("{} is no case: neither .safetensors nor .pth", path.display())))?;
    add(file, files);
    Ok(())
}

fn add(file: PathBuf, files: &mut Vec<PathBuf>) {
    if !files.contains(&file) {
        files.push(file);
    }
}

/// The case that a file is or belongs to: an expectation belongs to its checkpoint.
fn case_file(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    for ending in [".expected.safetensors", ".expected.json"] {
        if let Some(stem) = name.strip_suffix(ending) {
            return Some(path.with_file_name(format!("{stem}.pth")));
        }
    }
    (name.ends_with(".safetensors") || name.ends_with(".pth")).then(|| path.to_path_buf())
}

fn run_file(path: &Path, options: &Options) -> Row {
    let name = path.file_stem().map_or_else(|| path.display().to_string(), |stem| stem.to_string_lossy().into_owned());
    let ran = catch_unwind(AssertUnwindSafe(|| match path.extension().is_some_and(|extension| extension == "pth") {
        true => pth::run(path).map(|_| Ran::Compared(Vec::new())),
        false => run_case(path, options),
    }));
    let ran = ran.unwrap_or_else(|_| Err(Error::new("the engine broke an assumption of its own; see the message above")));
    let (outcome, worst) = match ran {
        Err(error) => (Outcome::Failed(one_line(&error.chain())), None),
        Ok(Ran::Unsupported(reason)) => (Outcome::Unsupported(reason), None),
        Ok(Ran::Compared(checks)) => {
            let outcome = checks
                .iter()
                .find(|check| !check.passed())
                .map_or(Outcome::Passed, |check| Outcome::Failed(format!("first mismatch: {}: {}", check.name, check.detail)));
            (outcome, checks.into_iter().rev().max_by(|a, b| a.ratio().total_cmp(&b.ratio())))
        }
    };
    Row { name, outcome, worst }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

enum Ran {
    Compared(Vec<Check>),
    Unsupported(String),
}

fn run_case(path: &Path, options: &Options) -> Result<Ran> {
    let (case, mut record) = (Case::open(path, &options.device)?, Record::default());
    let (method, dtype) = (case.fields()?.text("method")?, options.precision);
    let model = case.part("model")?;
    let kind = if model.has("kind") { model.text("kind")? } else { "" };
    match method {
        "mae" if kind.is_empty() => mae::run(&case, dtype, &mut record)?,
        "mae" => return Ok(Ran::Unsupported(format!("models of kind {kind:?} are not supported yet"))),
        "tinymim" => tinymim::run(&case, dtype, &mut record)?,
        "dmae" => dmae::run(&case, dtype, &mut record)?,
        "maskedkd" => maskedkd::run(&case, dtype, &mut record)?,
        "vit" | "linprobe" if matches!(kind, "" | "deit" | "deit_distilled") => vit::run(&case, dtype, &mut record)?,
        "vit" | "linprobe" => return Ok(Ran::Unsupported(format!("models of kind {kind:?} are not supported yet"))),
        "dmjd" => dmjd::dmjd(&case, dtype, &mut record)?,
        "convmae" if kind.is_empty() => dmjd::convmae(&case, dtype, &mut record)?,
        "convmae" if kind == "convvit_classifier" => convmae::classify(&case, dtype, &mut record)?,
        "convmae" => return Ok(Ran::Unsupported(format!("models of kind {kind:?} are not supported yet"))),
        "hog" => hog::run(&case, dtype, &mut record)?,
        "op" => {
            if !ops::run(&case, dtype, &mut record)? {
                let op = case.part("options")?.text("op")?;
                return Ok(Ran::Unsupported(format!("the operation {op:?} is not supported yet")));
            }
        }
        other => return Err(Error::new(format!("there is no method {other:?}"))),
    }
    if let Some(problem) = record.problem.take() {
        return Err(problem);
    }
    let checks = compare::compare(&case, &record, options.limits, dtype)?;
    if checks.is_empty() {
        return Err(Error::new("it holds nothing to compare"));
    }
    Ok(Ran::Compared(checks))
}
