//! `--profile FILE.json`: what was done when in a few updates of a run, as a file that chrome://tracing and ui.perfetto.dev draw, and the ops that took most.
//!
//! The record ([`crate::trace`]) begins once a few updates are behind, holds everything up to the end of the last one that it is about (waiting for data,
//! evaluations and checkpoints too), and is written at once, whole or not at all. On a GPU these updates and those before them are taken as they come: a
//! recorded step is one launch, of which nothing could be said.
//!
//! | module | what it is |
//! |---|---|
//! | [`events`] | the file |
//! | [`summary`] | what is printed |

pub mod events;
pub mod summary;

use crate::device::gpu::Gpu;
use crate::error::{Context, Error, Result};
use crate::formats;
use crate::tensor::Device;
use crate::trace;
use clap::Args;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// No setting of a run: neither its command nor its checkpoints remember it.
#[derive(Args, Clone, Debug, Default)]
pub struct ProfileArgs {
    /// Write down when each phase, op and GPU kernel of a few updates ran, for chrome://tracing or ui.perfetto.dev, and print what took most
    #[arg(long, value_name = "FILE.json")]
    pub profile: Option<PathBuf>,
    /// Updates that --profile is about, behind three that it is not (of `measure step`, behind those that are measured)
    #[arg(long, value_name = "N", default_value_t = 3, requires = "profile")]
    pub profile_updates: u64,
}

/// A file holds some thousand events an update.
const MOST_UPDATES: u64 = 100;
/// Updates before the first that is written down.
const BEFORE: u64 = 3;

impl ProfileArgs {
    /// What cannot be meant, as a sentence.
    pub fn check(&self) -> Result<()> {
        let Some(path) = &self.profile else { return Ok(()) };
        if !(1..=MOST_UPDATES).contains(&self.profile_updates) {
            return Err(Error::usage(format!("--profile-updates {} is not from 1 to {MOST_UPDATES}", self.profile_updates)));
        }
        if path.extension().is_none_or(|ending| !ending.eq_ignore_ascii_case("json")) {
            return Err(Error::usage(format!("--profile {}: a profile is written as JSON; use the ending .json", path.display())));
        }
        Ok(())
    }

    /// Refuses a file that could not be written once the updates are over; makes its folder.
    pub fn try_path(&self) -> Result<()> {
        self.profile.as_deref().map_or(Ok(()), try_path)
    }

    /// The profile of a run that will make so many updates.
    pub fn profile(&self, updates: u64, device: &Device, facts: Map<String, Value>) -> Option<Profile> {
        let wanted = self.profile_updates.min(updates);
        self.behind(BEFORE.min(updates - wanted), wanted, device, facts)
    }

    /// The profile of so many updates behind others.
    pub fn behind(&self, before: u64, updates: u64, device: &Device, facts: Map<String, Value>) -> Option<Profile> {
        self.profile.clone().map(|path| Profile::new(path, before, updates, device, facts))
    }
}

fn try_path(path: &Path) -> Result<()> {
    let refused = |why: String| Err(Error::usage(format!("--profile {}: {why}; name a file that can be written", path.display())));
    if path.is_dir() {
        return refused("this is a folder".into());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Err(error) = fs::create_dir_all(folder) {
        return refused(format!("the folder {} cannot be made: {error}", folder.display()));
    }
    let probe = folder.join(format!(".masque-profile-{}.tmp", std::process::id()));
    match File::create(&probe).and_then(|_| fs::remove_file(&probe)) {
        Ok(()) => Ok(()),
        Err(error) => refused(format!("nothing can be written into {}: {error}", folder.display())),
    }
}

/// A profile that is being taken. Where it is dropped before it is written, nothing is.
pub struct Profile {
    path: PathBuf,
    /// Updates before those that are written down, and those.
    before: u64,
    updates: u64,
    seen: u64,
    gpu: Option<Gpu>,
    facts: Map<String, Value>,
    /// The number of its first update, once that has begun.
    first: Option<u64>,
}

impl Profile {
    /// Of so many updates behind others; `facts` stand in the file.
    pub fn new(path: PathBuf, before: u64, updates: u64, device: &Device, facts: Map<String, Value>) -> Self {
        Self { path, before, updates, seen: 0, gpu: device.gpu().cloned(), facts, first: None }
    }

    /// Makes the update of this number, and writes it down if it is one of those that the profile is about. On a GPU its passes must be taken as they come:
    /// [`Step::set_eager`](super::step::Step::set_eager).
    pub fn update<R>(&mut self, number: u64, f: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.seen == self.before && self.updates > 0 {
            self.begin(number)?;
        }
        self.seen += 1;
        let step = trace::phase_of(summary::STEP, || format!("update {number}"));
        let done = f()?;
        drop(step);
        if let Some(gpu) = self.gpu.as_ref().filter(|_| self.first.is_some()) {
            gpu.collect_times()?;
        }
        Ok(done)
    }

    /// Whether the last of its updates is behind: then it is to be written.
    pub fn is_over(&self) -> bool {
        self.seen >= self.before + self.updates
    }

    /// What is to be said where a run is over before its updates are.
    pub fn unwritten(&self) -> String {
        match self.updates {
            0 => format!("no update is left to make a profile of: {} was not written", self.path.display()),
            updates => {
                format!("the run stopped before the {updates} updates of its profile were over: {} was not written", self.path.display())
            }
        }
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        let wait = self.gpu.clone().map(|gpu| -> trace::Wait {
            Box::new(move || {
                // What fails here shows at the next call.
                let _ = gpu.wait();
            })
        });
        trace::start(wait);
        self.first = Some(number);
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.time_work(true))
    }

    fn end(&mut self) -> Vec<trace::Event> {
        if self.first.take().is_none() {
            return Vec::new();
        }
        if let Some(gpu) = &self.gpu {
            // Where the device has failed, whatever comes next says so.
            let _ = gpu.time_work(false);
        }
        trace::stop()
    }

    /// Ends the record and writes the file. What is to be said of it.
    pub fn write(mut self) -> Result<String> {
        let first = self.first;
        let events = self.end();
        let device = self.gpu.as_ref().map_or("cpu", |gpu| gpu.name()).to_string();
        let notes: &[&str] = match &self.gpu {
            None => &[],
            Some(gpu) if gpu.as_real().is_some() => &[
                "steps were taken as they come: a recorded one, as in training, is a single launch",
                "phases wait for the device; ops end when their kernels are launched",
                "where the device has nothing else to do, a kernel's time is also that of its launch",
            ],
            Some(_) => &["EMULATED: the CPU runs the kernels one thread after the other; these times say nothing about a GPU"],
        };
        let facts = [
            ("program", json!(concat!("masque ", env!("CARGO_PKG_VERSION")))),
            ("device", json!(device)),
            ("first_update", json!(first)),
            ("updates", json!(self.updates)),
            ("notes", json!(notes)),
        ];
        let mut all: Map<String, Value> = facts.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        all.append(&mut self.facts);
        formats::write_atomically(&self.path, |out| events::write(out, &events, &device, all))
            .with_context(|| "the profile".to_string())?;
        Ok(summary::text(&events, &self.path, self.gpu.is_some(), notes))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        self.end();
    }
}
