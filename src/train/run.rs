//! The training loop, one for all methods.
//!
//!   for each epoch, for each window of `accumulate` micro-batches:  forward and backward of each, then one update at the rate of the schedule
//!
//! Where a run stands is a [`Place`], and everything that happens depends on it, the seed and the parameters alone; so a run that goes on from a checkpoint takes
//! the steps that an unbroken one would have taken, also from the middle of an epoch. The micro-batches at the end of an epoch that fill no window are left out.
//!
//! A window whose loss or gradient is not finite makes no update and is counted. After too many in a row the parameters go back to the last checkpoint, while
//! the data goes on: the batches that did the harm are not met again.

use super::checkpoint::{self, Header, Shelf};
use super::evaluate::{Evaluation, evaluate};
use super::feed::Feed;
use super::place::Place;
use super::profile::Profile;
use super::progress::{Plan, Progress, Seen};
use super::record::{Record, Row, Spent};
use super::report;
use super::signals::{Signals, Wish};
use super::step::Step;
use crate::bail;
use crate::data::loader::Loader;
use crate::device::ranks::Ranks;
use crate::error::{Context, Error, Result};
use crate::formats;
use crate::methods::Method;
use crate::methods::teacher::Cost;
use crate::optim::ema::Ema;
use crate::optim::schedule::{self, TimmCosine};
use crate::rng::Rng;
use crate::trace;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How the learning rate moves.
#[derive(Clone, Copy, Debug)]
pub enum Schedule {
    /// As MAE's programs move it; epochs may be fractions. `from`: the part of the peak that the warm-up starts with. `fixed`: after the warm-up it stays
    /// at its peak.
    Mae { peak: f64, min: f64, warmup: f64, from: f64, fixed: bool },
    /// As timm moves it, by whole epochs.
    Timm(TimmCosine),
}

impl Schedule {
    /// At this fractional epoch of so many.
    pub fn at(&self, epoch: f64, epochs: f64) -> f64 {
        match *self {
            Schedule::Mae { peak, warmup, fixed: true, .. } if epoch >= warmup => peak,
            Schedule::Mae { peak, warmup, from, .. } if from > 0.0 && epoch < warmup => peak * (from + (1.0 - from) * epoch / warmup),
            Schedule::Mae { peak, min, warmup, .. } => schedule::mae_cosine(epoch, peak, min, warmup, epochs),
            Schedule::Timm(cosine) => cosine.during_epoch(epoch as usize),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    pub epochs: u64,
    /// Checkpoints: every so many epochs, updates (if any), minutes.
    pub save_epochs: u64,
    pub save_updates: Option<u64>,
    pub save_time: Duration,
    pub keep: usize,
    /// Evaluations: every so many epochs; 0 for none but the last.
    pub eval_epochs: u64,
    /// Updates between two rows of `steps.jsonl`.
    pub row_updates: u64,
    /// Windows in a row that may be skipped.
    pub most_skips: u64,
    pub seed: u64,
    /// Updates between two comparisons of the ranks' parameters; 0 for none but those before checkpoints.
    pub sync_updates: u64,
}

/// What is done after an evaluation: pictures.
pub type After<'a> = Box<dyn FnMut(&dyn Method, &mut Record, &Place) -> Result<()> + 'a>;

pub struct Run<'a> {
    pub ranks: Ranks,
    pub step: Step,
    pub loader: Arc<Loader>,
    pub feed: Feed,
    pub schedule: Schedule,
    pub ema: Option<Ema>,
    pub validation: Option<Arc<Loader>>,
    pub after: Option<After<'a>>,
    pub record: Record,
    pub settings: Map<String, Value>,
    /// The command, the number of training images, the classes: what a checkpoint has to agree with.
    pub data: Map<String, Value>,
    pub options: Options,
    pub place: Place,
    /// What has been said of images that could not be read.
    pub told: HashSet<String>,
    /// Time since the last row of `steps.jsonl`, and of this epoch.
    pub spent: [Spent; 2],
    /// What the teacher had cost when the epoch began.
    pub cost: Option<Cost>,
    /// Until it is written.
    pub profile: Option<Profile>,
}

/// How a run ended.
pub struct Ended {
    pub place: Place,
    pub last: Option<Evaluation>,
    /// The signal that ended it early.
    pub signal: Option<(u8, &'static str)>,
    pub seconds: f64,
}

impl Ended {
    /// Of a command that trains nothing.
    pub fn nothing() -> Self {
        Self { place: Place::default(), last: None, signal: None, seconds: 0.0 }
    }
}

/// Gives model, optimiser and averages the values of a checkpoint, and answers where its run stood.
pub fn restore(file: &formats::TensorFile, step: &mut Step, ema: Option<&mut Ema>) -> Result<Place> {
    let progress = checkpoint::header(file)?.progress;
    let place = serde_json::from_value(Value::Object(progress)).with_context(|| format!("{}: its place cannot be read", file.source()))?;
    let (method, optimizer) = step.method_and_optimizer();
    checkpoint::restore(file, method.params(), optimizer, ema)?;
    Ok(place)
}

/// Going back more often than this is no use.
const MOST_RETURNS: u64 = 5;

impl Run<'_> {
    fn batches(&self) -> u64 {
        self.loader.batches() as u64
    }

    fn window(&self) -> u64 {
        self.step.options().accumulate as u64
    }

    /// Updates of a whole run: those that are behind, and those that are left of it.
    pub fn updates(&self) -> u64 {
        let (an_epoch, place) = (self.batches() / self.window(), &self.place);
        let left = self.options.epochs.saturating_sub(place.epoch) * an_epoch;
        place.update + left.saturating_sub(place.micro / self.window())
    }

    fn shelf(&self) -> Shelf {
        Shelf::new(self.record.folder(), self.options.keep)
    }

    /// Trains to the end, or until a signal asks to stop.
    pub fn run(mut self) -> Result<Ended> {
        self.train().inspect_err(|error| self.step.fail(error))
    }

    fn train(&mut self) -> Result<Ended> {
        let (batches, window) = (self.batches(), self.window());
        self.step.set_eager(self.profile.is_some());
        let signals = Signals::listen()?;
        let started = Instant::now();
        let method = self.step.method();
        // Of a teacher that remembers nobody knows beforehand how much it will compute.
        let asked = method.teacher().is_some_and(|teacher| teacher.memory.is_none());
        let (macs, teacher) = (method.macs(), method.teacher_cost().filter(|_| asked).map_or(0, |cost| cost.macs));
        let plan = Plan {
            updates: self.updates(),
            before: self.place.update,
            epochs: self.options.epochs as f64,
            images_per_update: (self.loader.batch() as u64 * window) as usize * self.ranks.world(),
            flops_per_image: 2.0 * (macs[0] + 2 * macs[1] + teacher) as f64,
        };
        let mut progress = if self.ranks.is_first() { Progress::new(plan) } else { Progress::silent(plan) };
        if self.place.epoch >= self.options.epochs {
            progress.line(&format!("all of the {} epochs are done already; a greater --epochs goes on", self.options.epochs));
        } else if self.first_finds(|run| run.shelf().updates().is_empty())? {
            // There is always something to go back to, and a folder that cannot be written is found now.
            self.save()?;
        }
        let mut saved = Instant::now();
        let mut last = None;
        while self.place.epoch < self.options.epochs {
            let loader = self.loader.clone();
            let mut coming = loader.epoch(self.place.epoch, self.place.micro as usize);
            while self.place.micro + window <= batches {
                let mine = Wish { signal: signals.came(), save: saved.elapsed() >= self.options.save_time };
                let wish = self.profiled(&mut coming, batches, window, mine, &mut progress)?;
                if self.options.sync_updates > 0 && self.place.update.is_multiple_of(self.options.sync_updates) {
                    self.step.check_sync(self.place.update)?;
                }
                self.tell_skipped(&loader, "replaced by another", &mut progress)?;
                if self.place.in_a_row > self.options.most_skips {
                    self.go_back(&mut progress)?;
                }
                let due = self.options.save_updates.is_some_and(|every| self.place.update.is_multiple_of(every));
                let signal = if self.ranks.is_alone() { signals.came() } else { wish.signal };
                if self.place.micro + window > batches {
                    break;
                }
                // What skipped updates may have led to is not saved: the last checkpoint is a good one.
                if (due || wish.save || signal.is_some()) && self.is_good() {
                    progress.pause();
                    self.save()?;
                    saved = Instant::now();
                    progress.go_on();
                }
                if signal.is_some() {
                    return self.end(progress, last, signal, started);
                }
            }
            drop(coming);
            progress.pause();
            last = self.end_epoch(&mut progress)?.or(last);
            saved = Instant::now();
            progress.go_on();
            let signal = self.agreed(Wish { signal: signals.came(), save: false })?.signal;
            if signal.is_some() && self.place.epoch < self.options.epochs {
                if self.is_good() {
                    self.save()?;
                }
                return self.end(progress, last, signal, started);
            }
        }
        self.end(progress, last, None, started)
    }

    fn end(
        &mut self,
        mut progress: Progress,
        last: Option<Evaluation>,
        signal: Option<(u8, &'static str)>,
        started: Instant,
    ) -> Result<Ended> {
        if let Some(profile) = &self.profile {
            progress.line(&profile.unwritten());
        }
        progress.finish();
        if let Some((_, name)) = signal {
            self.record.note(self.place.update, &format!("stopped by {name} after update {}", self.place.update))?;
        }
        self.publish()?;
        Ok(Ended { place: self.place.clone(), last, signal, seconds: started.elapsed().as_secs_f64() })
    }

    /// One window, which the profile may be about.
    fn profiled(
        &mut self,
        coming: &mut dyn Iterator<Item = Result<crate::data::loader::Loaded>>,
        batches: u64,
        window: u64,
        wish: Wish,
        progress: &mut Progress,
    ) -> Result<Wish> {
        let Some(mut profile) = self.profile.take() else { return self.update(coming, batches, window, wish, progress) };
        let wish = profile.update(self.place.update + 1, || self.update(coming, batches, window, wish, progress))?;
        if !profile.is_over() {
            self.profile = Some(profile);
            return Ok(wish);
        }
        progress.pause();
        self.step.set_eager(false);
        // A run is worth more than its profile.
        if self.record.writes() {
            let text = profile.write().unwrap_or_else(|error| format!("the profile is lost: {}", error.chain()));
            progress.line(&text);
        }
        progress.go_on();
        Ok(wish)
    }

    /// One window. Answers what the ranks wish after it.
    fn update(
        &mut self,
        coming: &mut dyn Iterator<Item = Result<crate::data::loader::Loaded>>,
        batches: u64,
        window: u64,
        wish: Wish,
        progress: &mut Progress,
    ) -> Result<Wish> {
        let place = &mut self.place;
        let at = place.epoch as f64 + place.micro as f64 / batches as f64;
        let lr = self.schedule.at(at, self.options.epochs as f64);
        let (rank, world) = (self.ranks.rank(), self.ranks.world());
        // Numbers of chance belong to an image's place in its update, however many micro-batches and ranks share it.
        let rng = Rng::new(self.options.seed).of_share(rank, world).at(place.epoch * (batches / window) + place.micro / window);
        let before = self.step.method().teacher_cost();
        let mut apart = self.feed.device.gpu().is_none();
        let mut seconds = 0.0;
        for number in 0..window as usize {
            let phase = trace::phase("data");
            let loaded = coming.next().ok_or_else(|| Error::new("the epoch ended before its last batch"))??;
            drop(phase);
            let rng = rng.starting_at(number * world * self.loader.batch());
            let phase = trace::phase("feed");
            let mut batch = self.feed.training(loaded, &mut rng.stream("mixing", (number * world + rank) as u64))?;
            drop(phase);
            let started = Instant::now();
            let phase = trace::phase("prepare");
            self.step.method().prepare(&mut batch, &rng)?;
            drop(phase);
            apart |= batch.teacher_output.is_some();
            self.step.add(&batch, &rng)?;
            seconds += started.elapsed().as_secs_f64();
            place.micro += 1;
        }
        let started = Instant::now();
        let outcome = self.step.finish_telling(lr, wish.word())?;
        for &loss in outcome.losses.iter().filter(|loss| loss.is_finite()) {
            place.epoch_loss.add(loss);
            place.epoch_lr.add(lr);
        }
        seconds += started.elapsed().as_secs_f64();
        let cost = self.step.method().teacher_cost();
        // Within recorded work the two cannot be told apart: then the eager updates before it speak for all.
        if let Some((before, after)) = before.zip(cost).filter(|(before, after)| apart || after.passes > before.passes) {
            self.spent.iter_mut().for_each(|spent| spent.add(seconds, after.seconds - before.seconds));
        }
        place.update += 1;
        let epoch = place.epoch as f64 + place.micro as f64 / batches as f64;
        if outcome.taken {
            (place.in_a_row, place.back_at) = (0, None);
            place.row_loss.add(outcome.loss);
            for (name, part) in &outcome.parts {
                place.epoch_parts.entry(name.replace(' ', "_")).or_default().add(*part);
            }
            if let Some(ema) = &mut self.ema {
                let _phase = trace::phase("average");
                ema.update(self.step.method().params())?;
            }
        } else {
            place.skipped += 1;
            place.in_a_row += 1;
            let what = if outcome.loss.is_finite() { "the length of the gradient" } else { "the loss" };
            let number = if outcome.loss.is_finite() { outcome.norm } else { outcome.loss };
            let text = format!("update {} was skipped: {what} is {number} ({} in a row)", place.update, place.in_a_row);
            progress.line(&text);
            self.record.note(place.update, &text)?;
        }
        let _phase = trace::phase("log");
        progress.step(Seen { update: place.update, epoch, loss: outcome.taken.then_some(outcome.loss), lr, skipped: place.skipped });
        if place.update.is_multiple_of(self.options.row_updates) && place.row_loss.count > 0 {
            let mean = std::mem::take(&mut place.row_loss).value();
            let mut row = row(json!({ "update": place.update, "epoch": epoch, "loss": mean, "lr": lr, "grad_norm": outcome.norm }));
            row.extend(outcome.parts.iter().map(|(name, value)| (format!("loss_{name}"), json!(value))));
            row.extend(progress.images_per_s().map(|rate| ("images_per_s".to_string(), json!(rate))));
            let spent = std::mem::take(&mut self.spent[0]);
            if spent.updates > 0 {
                let milliseconds = |seconds: f64| json!(1e3 * seconds / spent.updates as f64);
                row.extend([
                    ("teacher_ms".to_string(), milliseconds(spent.teacher)),
                    ("student_ms".to_string(), milliseconds(spent.student)),
                ]);
            }
            self.record.step(&row)?;
        }
        Ok(Wish::of_all(&outcome.told))
    }

    /// What all ranks wish.
    fn agreed(&self, mine: Wish) -> Result<Wish> {
        let told = self.ranks.gather_numbers("signals", [mine.word()])?;
        Ok(Wish::of_all(told.as_flattened()))
    }

    /// Whether rank 0 finds something to be so; only it need look at the disk.
    fn first_finds(&self, so: impl FnOnce(&Self) -> bool) -> Result<bool> {
        let found = if self.ranks.is_first() { vec![u8::from(so(self))] } else { Vec::new() };
        Ok(self.ranks.broadcast("what rank 0 finds", found)? == [1])
    }

    /// Brings the page up to date.
    fn publish(&self) -> Result<()> {
        if self.record.writes() { report::write(self.record.folder()) } else { Ok(()) }
    }

    /// Whether the parameters are worth keeping: numbers were finite since the last update, and since the run went back to a checkpoint.
    fn is_good(&self) -> bool {
        self.place.in_a_row == 0 && self.place.back_at.is_none() && !self.place.spoiled
    }

    /// Says of images that could not be read, once for each that is named, and how many there are.
    fn tell_skipped(&mut self, loader: &Loader, what: &str, progress: &mut Progress) -> Result<()> {
        let skipped = loader.skipped();
        for name in skipped.names {
            if self.told.insert(name.clone()) {
                if !self.record.writes() {
                    eprintln!("masque: rank {}: an image could not be read and is {what}: {name}", self.ranks.rank());
                    continue;
                }
                let text = format!("an image could not be read and is {what} ({} so far): {name}", skipped.count);
                progress.line(&text);
                self.record.note(self.place.update, &text)?;
            }
        }
        Ok(())
    }

    /// The parameters go back to the last checkpoint; the data goes on.
    fn go_back(&mut self, progress: &mut Progress) -> Result<()> {
        let place = &mut self.place;
        let reason = format!("{} updates in a row were skipped because loss or gradient were not finite", place.in_a_row);
        // Where not one update could be made since the last return, its checkpoint was no good one.
        let before = place.back_at.unwrap_or(u64::MAX);
        let shelf = Shelf::new(self.record.folder(), self.options.keep);
        let (newest, damaged) = if self.ranks.is_first() { shelf.newest_before(before) } else { (None, Vec::new()) };
        damaged.iter().for_each(|text| progress.line(text));
        let path = newest.as_ref().map_or(String::new(), |(path, _)| path.to_string_lossy().into_owned());
        let path = self.ranks.broadcast("the checkpoint to go back to", path.into_bytes())?;
        let newest = match newest {
            None if !path.is_empty() => {
                let path = std::path::PathBuf::from(String::from_utf8_lossy(&path).into_owned());
                Some((path.clone(), formats::open(&path)?))
            }
            newest => newest,
        };
        let Some((path, file)) = newest else {
            bail!("{reason}, and there is no good checkpoint to go back to; try a smaller --lr or --clip-grad, or --precision f32");
        };
        place.returns += 1;
        if place.returns > MOST_RETURNS {
            bail!("{reason}; the run went back to a checkpoint {MOST_RETURNS} times already; try a smaller --lr or --clip-grad");
        }
        let then = restore(&file, &mut self.step, self.ema.as_mut())?;
        (place.in_a_row, place.back_at, place.spoiled) = (0, Some(then.update), false);
        let text = format!("{reason}: the parameters are those of {} again, the data goes on", path.display());
        progress.line(&text);
        self.record.note(place.update, &text)
    }

    fn save(&mut self) -> Result<()> {
        let shelf = self.shelf();
        self.save_as(&shelf.path(self.place.update)).with_context(|| match shelf.newest().0 {
            Some((path, _)) => format!("saving failed; the last good checkpoint is {}", path.display()),
            None => "saving failed; there is no checkpoint yet".to_string(),
        })?;
        if self.record.writes() {
            shelf.tidy();
        }
        Ok(())
    }

    fn save_as(&mut self, path: &std::path::Path) -> Result<()> {
        let _phase = trace::phase("checkpoint");
        self.step.check_sync(self.place.update)?;
        let sharded = self.step.exchange().is_some_and(|exchange| exchange.is_sharded());
        if !self.record.writes() && !sharded {
            return Ok(());
        }
        let progress = serde_json::to_value(&self.place).context("the place of the run")?;
        let header = Header {
            settings: self.settings.clone(),
            progress: progress.as_object().cloned().unwrap_or_default(),
            data: self.data.clone(),
        };
        let ema = self.ema.as_ref();
        let (method, optimizer) = self.step.method_and_optimizer();
        let params = method.params();
        let optimizer = match sharded {
            true => checkpoint::remembered_by_all(&self.ranks, params, optimizer)?,
            false => checkpoint::remembered(params, optimizer)?,
        };
        if self.record.writes() { checkpoint::save(path, &header, params, optimizer, ema) } else { Ok(()) }
    }

    /// Evaluation, the row of the log, checkpoints.
    fn end_epoch(&mut self, progress: &mut Progress) -> Result<Option<Evaluation>> {
        let (epochs, shelf) = (self.options.epochs, self.shelf());
        let place = &mut self.place;
        let (loss, lr) = (std::mem::take(&mut place.epoch_loss), std::mem::take(&mut place.epoch_lr));
        let mut line = row(json!({ "train_lr": lr.value(), "train_loss": loss.value() }));
        let number = place.epoch;
        (place.epoch, place.micro) = (number + 1, 0);
        let done = place.epoch;
        let every = |n: u64| n > 0 && done.is_multiple_of(n) || done == epochs;
        let mut evaluation = None;
        let phase = trace::phase("evaluation");
        if let Some(loader) = self.validation.as_ref().filter(|_| every(self.options.eval_epochs)) {
            let found = evaluate(self.step.method(), loader, &self.feed, &self.ranks)?;
            line.insert("test_loss".into(), json!(found.loss));
            if let Some([first, five]) = found.accuracy {
                line.insert("test_acc1".into(), json!(first));
                line.insert("test_acc5".into(), json!(five));
            }
            if let Some(ema) = &mut self.ema {
                ema.swap(self.step.method().params())?;
                let averaged = evaluate(self.step.method(), loader, &self.feed, &self.ranks);
                ema.swap(self.step.method().params())?;
                let averaged = averaged?;
                line.insert("test_loss_ema".into(), json!(averaged.loss));
                line.extend(averaged.accuracy.map(|[first, _]| ("test_acc1_ema".to_string(), json!(first))));
            }
            self.place.spoiled = !found.loss.is_finite();
            evaluation = Some(found);
        }
        drop(phase);
        let spent = std::mem::take(&mut self.spent[1]);
        if let Some(cost) = self.step.method().teacher_cost() {
            if spent.updates > 0 {
                if done == epochs {
                    progress.line(&spent.text());
                }
                line.insert("teacher_s".into(), json!(spent.teacher));
                line.insert("student_s".into(), json!(spent.student));
            }
            let [forward, trained] = self.step.method().macs();
            // What is remembered is not computed.
            let asked = cost.share_since(&self.cost.unwrap_or_default());
            line.insert("teacher_flops_per_image".into(), json!((2.0 * cost.macs as f64 * asked).round()));
            line.insert("student_flops_per_image".into(), json!(2 * (forward + 2 * trained)));
        }
        self.cost = self.step.method().teacher_cost();
        for (name, mean) in std::mem::take(&mut self.place.epoch_parts) {
            line.insert(format!("train_loss_{name}"), json!(mean.value()));
        }
        line.extend(self.step.method().facts().into_iter().map(|(name, value)| (name.to_string(), json!(value))));
        line.insert("epoch".into(), json!(number));
        line.insert("n_parameters".into(), json!(self.step.method().params().count_trained()));
        if !self.ranks.is_alone() {
            line.insert("ranks".into(), json!(self.ranks.world()));
        }
        line.insert("update".into(), json!(self.place.update));
        self.record.epoch(&line)?;
        progress.line(&summary(number, epochs, loss.value(), evaluation.as_ref()));
        if self.place.spoiled {
            let text = "the evaluation gave no number: these parameters are not kept as a checkpoint";
            progress.line(text);
            self.record.note(self.place.update, text)?;
        }
        if let Some(loader) = self.validation.clone() {
            self.tell_skipped(&loader, "left out of the evaluation", progress)?;
        }
        if let (Some(_), Some(after), true) = (&evaluation, &mut self.after, self.record.writes()) {
            let _phase = trace::phase("pictures");
            after(self.step.method(), &mut self.record, &self.place)?;
        }
        let best = evaluation.filter(|found| found.beats(self.place.best));
        if let Some(best) = &best {
            self.place.best = Some(best.score().0);
        }
        // In this order: the other way round, a run that is killed in between would go on without its best weights.
        if best.is_some() {
            self.save_as(&shelf.best())?;
        }
        // Numbers of a whole evaluation say more than a last update that was skipped.
        let judged = evaluation.is_some() && self.place.back_at.is_none() && !self.place.spoiled;
        if every(self.options.save_epochs) && (self.is_good() || judged) {
            self.save()?;
        }
        if done == epochs && !self.is_good() && !judged {
            self.publish()?;
            bail!(
                "the run ended with parameters that give no finite numbers, which are not kept; its last good checkpoint is in {}; try a smaller --lr or --clip-grad",
                self.record.folder().display()
            );
        }
        self.publish()?;
        Ok(evaluation)
    }
}

fn row(value: Value) -> Row {
    value.as_object().cloned().unwrap_or_default()
}

/// What is said at the end of an epoch.
fn summary(epoch: u64, epochs: u64, loss: f64, evaluation: Option<&Evaluation>) -> String {
    let mut text = format!("epoch {} of {epochs}: train loss {loss:.4}", epoch + 1);
    if let Some(found) = evaluation {
        text += &match found.accuracy {
            Some([first, five]) => {
                format!(", on {} images acc@1 {first:.2} % acc@5 {five:.2} % loss {:.4}", found.images, found.loss)
            }
            None => format!(", loss on {} unseen images {:.4}", found.images, found.loss),
        };
    }
    text
}
