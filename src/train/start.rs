//! How a run begins: where it writes, what it goes on from, and what a command has made ready for the loop.

use super::args::{RunArgs, command as command_of};
use super::cache::fingerprint;
use super::checkpoint::{self, Shelf};
use super::feed::Feed;
use super::place::{Batching, Place};
use super::record::{self, Record};
use super::run::{After, Ended, Run, Schedule, restore};
use super::step::{Step, StepOptions};
use crate::data::loader::Loader;
use crate::device::parallel;
use crate::device::ranks::Ranks;
use crate::error::{Context, Error, Result};
use crate::formats::{self, TensorFile};
use crate::methods::Method;
use crate::optim::Optimizer;
use crate::optim::ema::Ema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a run writes and what it goes on from.
pub struct Start {
    pub folder: PathBuf,
    pub from: Option<(PathBuf, TensorFile)>,
    /// What is to be said about it.
    pub notes: Vec<String>,
}

/// What rank 0 tells the others of it.
#[derive(Serialize, Deserialize)]
struct Chosen {
    folder: PathBuf,
    from: Option<PathBuf>,
}

const CHOICE: &str = "the choice of a folder";

/// What a command makes ready for the loop.
pub struct Ready<'a> {
    /// The command's words.
    pub command: &'static str,
    pub method: Box<dyn Method>,
    pub optimizer: Box<dyn Optimizer>,
    pub loader: Loader,
    pub validation: Option<Loader>,
    pub feed: Feed,
    pub schedule: Schedule,
    pub after: Option<After<'a>>,
    pub settings: Map<String, Value>,
    /// The classes that are learned; none where labels are not read.
    pub classes: Vec<String>,
}

fn first(name: &str) -> PathBuf {
    Path::new("runs").join(name)
}

/// runs/NAME, runs/NAME-2, runs/NAME-3 ...
fn numbered(name: &str) -> impl Iterator<Item = PathBuf> {
    let name = name.to_string();
    std::iter::once(first(&name)).chain((2..10_000).map(move |i| first(&format!("{name}-{i}"))))
}

/// These say where and how a run is computed and stored, not what it computes.
const FREE: [&str; 18] = [
    "exchange",
    "wire",
    "bucket-mb",
    "shard-optimizer",
    "check-sync",
    "rank-timeout",
    "output-dir",
    "teacher-cache",
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
const FIXED: [&str; 11] = [
    "batch-size",
    "accum-iter",
    "seed",
    "train-images",
    "data-fraction",
    "model",
    "input-size",
    "in-chans",
    "repeated-aug",
    "views",
    "labelled-images",
];

/// These make up a batch: with another number of ranks they may differ.
const BATCH: [&str; 2] = ["batch-size", "accum-iter"];

/// What differs from the settings that a checkpoint was made with: an error where that cannot be, else a sentence each. `ranks`: how many there are now, and
/// were then.
pub fn compare(now: &Map<String, Value>, then: &Map<String, Value>, ranks: [usize; 2], from: &Path) -> Result<Vec<String>> {
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
        if FIXED.contains(&name.as_str()) && !(ranks[0] != ranks[1] && BATCH.contains(&name.as_str())) {
            return Err(Error::usage(format!(
                "--{name} is {is} but {} was made with {was}; a run goes on with the value it began with",
                from.display()
            )));
        }
        notes.push(format!("--{name} is {is} from here on; the checkpoint was made with {was}"));
    }
    Ok(notes)
}

/// A number of a checkpoint's header, 1 where it is not there.
fn size(map: &Map<String, Value>, key: &str) -> usize {
    map.get(key).and_then(Value::as_u64).map_or(1, |size| size.max(1) as usize)
}

/// These may differ from rank to rank.
const OWN: [&str; 2] = ["num-workers", "device"];

/// Refuses ranks that were started with other settings, or that see other images.
fn same_everywhere(ranks: &Ranks, settings: &Map<String, Value>, data: &Map<String, Value>) -> Result<()> {
    let own: Map<String, Value> =
        settings.iter().filter(|(name, _)| !OWN.contains(&name.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect();
    let bytes = serde_json::to_vec(&[&own, data]).context("the settings of a run")?;
    let Some((rank, all)) = ranks.differing("the settings of the run", &bytes)? else { return Ok(()) };
    let read =
        |rank: usize| serde_json::from_slice::<[Map<String, Value>; 2]>(&all[rank]).with_context(|| format!("the settings of rank {rank}"));
    let ([settings, data], [others, seen]) = (read(0)?, read(rank)?);
    let shown = |value: Option<&Value>| {
        let given = value.filter(|value| !value.is_null());
        given.map_or("not given".to_string(), |value| value.as_str().map_or_else(|| value.to_string(), String::from))
    };
    let differs = |here: &Map<String, Value>, there: &Map<String, Value>| {
        let names = here.keys().chain(there.keys());
        names
            .into_iter()
            .find(|name| here.get(*name) != there.get(*name))
            .map(|name| (name.clone(), shown(here.get(name)), shown(there.get(name))))
    };
    let end = "; start all ranks with the same command, where they see the same files";
    Err(match (differs(&settings, &others), differs(&data, &seen)) {
        (Some((name, here, there)), _) => Error::usage(format!("--{name} is {there} on rank {rank} and {here} on rank 0{end}")),
        (None, Some((name, here, there))) => {
            Error::new(format!("{} are {there} on rank {rank} and {here} on rank 0{end}", name.replace('-', " ")))
        }
        (None, None) => Error::new(format!("rank {rank} writes the settings of the run in another way than rank 0{end}")),
    })
}

impl Start {
    /// Chooses the run's folder, and finds the checkpoint that it goes on from. `name` is what a new folder under runs/ is called. Of several ranks the first
    /// chooses for all, which have to see the same folders.
    pub fn of(run: &RunArgs, name: &str) -> Result<Self> {
        if !run.ranks.is_first() {
            let chosen = run.ranks.broadcast(CHOICE, Vec::new())?;
            let chosen: Chosen = serde_json::from_slice(&chosen).context("what rank 0 chose cannot be read")?;
            let open = |path: PathBuf| {
                let attempt = || {
                    let (rank, shown) = (run.ranks.rank(), path.display());
                    format!(
                        "rank {rank} cannot go on from {shown}, which rank 0 found; the folder of a run has to be one that all machines see"
                    )
                };
                let file = formats::open(&path).and_then(|file| checkpoint::check(&file).map(|()| file)).with_context(attempt)?;
                Ok((path, file))
            };
            let from = chosen.from.map(open).transpose()?;
            return Ok(Start { folder: chosen.folder, from, notes: Vec::new() });
        }
        let start = Self::chosen(run, name)?;
        let chosen = Chosen { folder: start.folder.clone(), from: start.from.as_ref().map(|(path, _)| path.clone()) };
        run.ranks.broadcast(CHOICE, serde_json::to_vec(&chosen).context("the choice of a folder")?)?;
        Ok(start)
    }

    fn chosen(run: &RunArgs, name: &str) -> Result<Self> {
        let folder = match (&run.output_dir, run.resume.as_deref()) {
            (Some(folder), _) => folder.clone(),
            (None, Some("auto")) => numbered(name).take_while(|folder| folder.exists()).last().unwrap_or_else(|| first(name)),
            (None, _) => numbered(name).find(|folder| !folder.exists()).unwrap_or_else(|| first(name)),
        };
        let mut start = Start { folder, from: None, notes: Vec::new() };
        match run.resume.as_deref() {
            None => {
                let shelf = Shelf::new(&start.folder, run.keep);
                if !shelf.updates().is_empty() || Record::holds_run(&start.folder) {
                    return Err(Error::usage(format!(
                        "--output-dir {}: the folder holds a run already; go on with it by --resume auto, or choose another folder",
                        start.folder.display()
                    )));
                }
            }
            Some("auto") => {
                let (newest, damaged) = Shelf::new(&start.folder, run.keep).newest();
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
        run.profile.try_path()?;
        Ok(start)
    }

    /// Trains to the end, or until a signal asks to stop.
    pub fn train(&self, run: &RunArgs, ready: Ready, say: &mut dyn FnMut(&str)) -> Result<Ended> {
        let Ready { command, method, optimizer, loader, validation, feed, schedule, after, settings, classes } = ready;
        loader.check()?;
        feed.fits(loader.transform())?;
        let batches = loader.batches();
        if batches < run.accum_iter {
            return Err(Error::usage(format!(
                "an epoch has {batches} batches of --batch-size {}, fewer than an update takes (--accum-iter {}); make one of them smaller",
                run.batch_size, run.accum_iter
            )));
        }
        let ranks = &run.ranks;
        let data = [
            ("command", json!(command)),
            ("train-images", json!(loader.dataset().len())),
            ("classes", json!(classes)),
            ("ranks", json!(ranks.world())),
        ];
        let teacher = method.teacher().map(fingerprint).transpose()?.map(|known| ("teacher", json!(known)));
        let data = data.into_iter().chain(teacher).map(|(key, value)| (key.to_string(), value)).collect();
        // A pass that is profiled is not recorded: all ranks do the same.
        let profile = (run.profile.profile.is_some(), run.profile.profile_updates);
        let typed = std::iter::once(("profile".to_string(), json!(profile)));
        same_everywhere(ranks, &settings.clone().into_iter().chain(typed).collect(), &data)?;
        self.check(&settings, &data, say)?;
        // Nothing in the folder is read or changed while another process writes into it.
        let _lock = ranks.is_first().then(|| record::lock(&self.folder)).transpose()?;
        let step = Step::new(method, optimizer, StepOptions { clip: run.clip_grad, accumulate: run.accum_iter });
        let mut step = step.with_ranks(ranks, run.together.options())?;
        let begun = self.begin(run, command, &settings, &mut step, say);
        let (ema, place, record) = begun.inspect_err(|error| step.fail(error))?;
        let threads = ("threads", json!(parallel::threads()));
        let facts = [("command", json!(command_of(command, &settings))), threads, ("ranks", json!(ranks.world()))];
        let facts = facts.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        if !ranks.is_alone() {
            say(&format!("{} ranks, {} images an update", ranks.world(), run.effective_batch()));
        }
        say(&format!("run folder: {}", self.folder.display()));
        let profile = &run.profile;
        let mut run = Run {
            ranks: ranks.clone(),
            step,
            loader: Arc::new(loader),
            feed,
            schedule,
            ema,
            validation: validation.map(Arc::new),
            after,
            record,
            settings,
            data,
            options: run.options(),
            place,
            told: Default::default(),
            spent: Default::default(),
            cost: None,
            profile: None,
        };
        run.profile = profile.profile(run.updates().saturating_sub(run.place.update), &run.feed.device, facts);
        let ranks = run.ranks.clone();
        let ended = run.run()?;
        ranks.barrier("the end of the run")?;
        if ended.signal.is_none() {
            say(&format!("weights: {}; report: {}", self.shelf().best_or_last().display(), self.folder.join("report.html").display()));
        }
        Ok(ended)
    }

    /// Averages, place and record, as the checkpoint has them or new.
    fn begin(
        &self,
        run: &RunArgs,
        command: &str,
        settings: &Map<String, Value>,
        step: &mut Step,
        say: &mut dyn FnMut(&str),
    ) -> Result<(Option<Ema>, Place, Record)> {
        let ranks = &run.ranks;
        let mut ema = run.model_ema_decay.map(|decay| Ema::new(step.method().params(), decay)).transpose()?;
        let mut place = self.from.as_ref().map(|(_, file)| restore(file, step, ema.as_mut())).transpose()?.unwrap_or_default();
        if let Some((_, file)) = &self.from {
            let header = checkpoint::header(file)?;
            let before = Batching {
                batch: size(&header.settings, "batch-size"),
                window: size(&header.settings, "accum-iter"),
                ranks: size(&header.data, "ranks"),
            };
            let now = Batching { batch: run.batch_size, window: run.accum_iter, ranks: ranks.world() };
            place.rebatch(before, now).into_iter().for_each(|note| say(&note));
        }
        let record = match ranks.is_first() {
            true => self.record(command, settings, &place, say)?,
            false => Record::silent(&self.folder),
        };
        Ok((ema, place, record))
    }

    /// Refuses a checkpoint of another command, of other images, or of settings that may not change; says what else differs.
    fn check(&self, settings: &Map<String, Value>, data: &Map<String, Value>, say: &mut dyn FnMut(&str)) -> Result<()> {
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
        let ranks = [size(data, "ranks"), size(&header.data, "ranks")];
        let notes = compare(settings, &header.settings, ranks, path)?;
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
        // Another teacher may be typed; one that has changed in its place is no longer whom the run learned from.
        let (was, is) = (header.data.get("teacher"), data.get("teacher"));
        let typed = settings.get("teacher-path") != header.settings.get("teacher-path");
        if was.is_some() && was != is && !typed {
            let short = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("none").to_string();
            return Err(Error::new(format!(
                "the teacher is not the one that {shown} was made with ({} now, {} then); put it back, or name another file by --teacher-path",
                short(is),
                short(was)
            )));
        }
        Ok(())
    }

    fn shelf(&self) -> Shelf {
        Shelf::new(&self.folder, 1)
    }

    /// Puts the checkpoints from an update on out of the way.
    fn leave(&self, first: u64, say: &mut dyn FnMut(&str)) -> Result<()> {
        for abandoned in self.shelf().set_aside(first)? {
            say(&format!("{} is of the run that is left here: it has been renamed", abandoned.display()));
        }
        Ok(())
    }

    /// Opens the record, new or continued, and says where the run begins.
    fn record(&self, words: &str, settings: &Map<String, Value>, place: &Place, say: &mut dyn FnMut(&str)) -> Result<Record> {
        let command = command_of(words, settings);
        let Some((path, _)) = &self.from else {
            self.leave(0, say)?;
            return Record::create(&self.folder, &command);
        };
        say(&format!("going on from {} (epoch {}, update {})", path.display(), place.epoch, place.update));
        let here =
            path.parent().is_some_and(|parent| parent == self.folder || parent.canonicalize().ok() == self.folder.canonicalize().ok());
        if !here {
            return Record::create(&self.folder, &command);
        }
        self.leave(place.update + 1, say)?;
        Record::resume(&self.folder, place.update, &command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_refused_or_said() {
        let map = |value: Value| value.as_object().cloned().unwrap();
        let then = map(json!({ "seed": 1, "lr": 0.1, "keep": 3 }));
        let compared = |now: Value| compare(&map(now), &then, [1, 1], Path::new("a.safetensors"));
        assert!(compared(json!({ "seed": 1, "lr": 0.1, "keep": 9 })).unwrap().is_empty());
        assert_eq!(compared(json!({ "seed": 1, "lr": 0.2 })).unwrap(), ["--lr is 0.2 from here on; the checkpoint was made with 0.1"]);
        let batch = |ranks: [usize; 2]| compare(&map(json!({ "batch-size": 8 })), &map(json!({ "batch-size": 4 })), ranks, Path::new("a"));
        assert!(batch([2, 2]).is_err() && batch([1, 2]).unwrap() == ["--batch-size is 8 from here on; the checkpoint was made with 4"]);
        let refused = compared(json!({ "seed": 2 })).unwrap_err();
        assert_eq!((refused.exit_code(), refused.chain().starts_with("--seed is 2 but a.safetensors was made with 1")), (2, true));
    }
}
