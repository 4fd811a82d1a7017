//! `--teacher-cache`: what a teacher answers to views that return is computed once and kept on disk.
//!
//! DIR/teacher.masque-cache, all numbers little-endian:
//!
//! ```text
//! head      magic "masqueTC", version u32, bytes of the JSON u32, its CRC-32C u32, zeros up to 32; JSON: what the answers depend on, a text each;
//!           zeros up to a multiple of 4096
//! records   one for each view of each image, at view * images + number: the answer, CRC-32C of key and answer u32, 1 u32, zeros up to a multiple of 8
//! ```
//!
//! The file has its whole length from the start, with holes where nothing has been answered yet. A record counts only if its checksum is right: what a
//! killed process left half written, and what was damaged since, is computed again. One run writes at a time; of several ranks the first makes the file, and the first of
//! each machine that does not see it. It is read through a map.

use super::teacher::TeacherArgs;
use crate::data::Dataset;
use crate::data::transform::Transform;
use crate::device::ranks::Ranks;
use crate::device::{Precision, disk};
use crate::error::{Context, Error, Result};
use crate::formats::{MappedFile, crc32c, extend_crc32c};
use crate::methods::Batch;
use crate::methods::teacher::{Memory, Network, Teacher};
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Tensor};
use crate::{bail, ensure};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"masqueTC";
const VERSION: u32 = 1;
/// What stands before the JSON, and what the records begin at a multiple of.
const FIXED: usize = 32;
const BLOCK: usize = 4096;
/// Of a record, behind the answer.
const MARK: usize = 8;

const NAME: &str = "teacher.masque-cache";

/// What a run shows its teacher.
#[derive(Clone)]
pub struct Shown {
    pub images: Arc<dyn Dataset>,
    pub transform: Transform,
    /// Means and deviations of the channels.
    pub statistics: [Vec<f32>; 2],
    pub seed: u64,
    pub views: Option<u64>,
    pub precision: Precision,
    /// Those that write into the same cache.
    pub ranks: Ranks,
}

/// What is kept of a teacher.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// In words: logits, queries and keys ...
    pub what: &'static str,
    /// The block that gives it, from 1; None behind the last.
    pub block: Option<usize>,
}

impl TeacherArgs {
    /// Refuses a cache where the teacher sees something else each time.
    pub fn without_cache(&self, why: &str) -> Result<()> {
        match &self.teacher_cache {
            None => Ok(()),
            Some(_) => {
                Err(Error::usage(format!("--teacher-cache keeps answers that return, and here none does: {why}; leave the flag out")))
            }
        }
    }

    /// Lets the teacher remember its answers where --teacher-cache says so; `ask` is how it is asked.
    pub fn remember(
        &self,
        teacher: &mut Teacher,
        kept: Kept,
        shown: &Shown,
        ask: impl Fn(&Teacher, &Tensor) -> Result<Tensor>,
        say: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let Some(folder) = &self.teacher_cache else { return Ok(()) };
        let Some(views) = shown.views else {
            return Err(Error::usage(
                "--teacher-cache keeps what is answered to views that return; give their number by --views, for example --views 4",
            ));
        };
        // One image tells the shape of an answer.
        let config = teacher.vit();
        let [h, w] = config.image;
        let empty = Tensor::zeros_on(teacher.params.device(), &[1, config.channels, h, w], Dtype::F32)?;
        let example = ask(teacher, &empty)?;
        teacher.forget_cost();
        let depends = depends_on(teacher, kept, shown, views, &example)?;
        let records = views * shown.images.len() as u64;
        let mut open = |lock: bool| Cache::open(Place { folder, records, lock }, depends.clone(), &example, say);
        let ranks = &shown.ranks;
        let mut cache = ranks.is_first().then(|| open(true)).transpose()?;
        ranks.barrier("the teacher cache of rank 0")?;
        if cache.is_none() && ranks.local() == 0 && !folder.join(NAME).exists() {
            cache = Some(open(true)?);
        }
        ranks.barrier("the teacher caches of all machines")?;
        teacher.memory = Some(Box::new(cache.map_or_else(|| open(false), Ok)?));
        Ok(())
    }
}

/// All that the answers depend on, a text each, in the order in which it is compared.
fn depends_on(teacher: &Teacher, kept: Kept, shown: &Shown, views: u64, example: &Tensor) -> Result<Map<String, Value>> {
    let [mean, std] = &shown.statistics;
    let parts = [
        ("teacher", fingerprint(teacher)?),
        ("answers", kept.what.to_string()),
        ("block", kept.block.map_or("the last".to_string(), |block| block.to_string())),
        ("shape", format!("{:?}", &example.shape()[1..])),
        ("numbers", format!("{}, computed in {}", example.dtype(), shown.precision)),
        ("images", identity(&*shown.images)),
        ("views", views.to_string()),
        ("seed", shown.seed.to_string()),
        ("transform", shown.transform.for_teacher().to_string()),
        ("normalisation", format!("mean {mean:?}, deviation {std:?}")),
    ];
    Ok(parts.into_iter().map(|(name, text)| (name.to_string(), json!(text))).collect())
}

/// Tells a teacher from any other.
pub fn fingerprint(teacher: &Teacher) -> Result<String> {
    let about = match &teacher.network {
        Network::Encoder(vit) | Network::Autoencoder(vit, _) => format!("{:?}", vit.config),
        Network::Classifier(classifier) => format!("{:?} {}", classifier.vit.config, classifier.classes),
        Network::Cait(cait) => format!("{:?}", cait.config),
    };
    let mut sum = crc32c(about.as_bytes());
    let params = &teacher.params;
    for id in params.ids() {
        sum = extend_crc32c(sum, params.name(id).as_bytes());
        sum = extend_crc32c(sum, params.value(id).on(&Device::Cpu)?.bytes());
    }
    Ok(format!("{} tensors with checksum {sum:08x}", params.ids().count()))
}

/// Images that are looked at, spread over a set.
const LOOKED_AT: usize = 8;

/// Tells a set of images from another one: how many there are, their names and labels, the pixels of a few.
fn identity(images: &dyn Dataset) -> String {
    let (n, mut sum) = (images.len(), 0);
    for index in 0..n {
        let name = images.name(index);
        sum = extend_crc32c(extend_crc32c(sum, &(name.len() as u64).to_le_bytes()), name.as_bytes());
        sum = extend_crc32c(sum, &images.label(index).to_le_bytes());
    }
    let few = n.min(LOOKED_AT);
    for picture in (0..few).filter_map(|i| images.picture(i * n / few).ok()) {
        sum = extend_crc32c(sum, &picture.pixels);
    }
    format!("{n} with checksum {sum:08x}")
}

/// A number of bytes as a person reads it.
fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

struct Place<'a> {
    folder: &'a Path,
    records: u64,
    /// Whether no other run may write into it; false where another rank of this one sees to that.
    lock: bool,
}

/// A file of answers that is open.
struct Cache {
    path: PathBuf,
    file: RefCell<MappedFile>,
    records: u64,
    /// Where the first one begins, and the bytes of each, of the answer alone.
    start: usize,
    record: usize,
    answer: usize,
    /// Of one answer.
    shape: Vec<usize>,
    dtype: Dtype,
    /// Held for as long as the file is written.
    _lock: Option<File>,
}

impl Cache {
    fn open(place: Place, depends: Map<String, Value>, example: &Tensor, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let Place { folder, records, lock: locks } = place;
        let shown = folder.display();
        fs::create_dir_all(folder).with_context(|| format!("--teacher-cache: cannot make the folder {shown}"))?;
        let lock = locks.then(|| lock(folder)).transpose()?;
        let path = folder.join(NAME);
        let json = Value::Object(depends.clone()).to_string();
        let start = (FIXED + json.len()).next_multiple_of(BLOCK);
        let shape = example.shape()[1..].to_vec();
        let answer = shape.iter().product::<usize>() * example.dtype().size();
        let record = (answer + MARK).next_multiple_of(8);
        let length = (record as u64).checked_mul(records).and_then(|all| all.checked_add(start as u64));
        let length = length.filter(|&length| length < 1 << 47).ok_or_else(|| {
            Error::usage(format!(
                "--teacher-cache {shown}: {records} answers of {} do not fit into any file; take fewer --views",
                bytes(record as u64)
            ))
        })?;
        let found = path.exists();
        if found {
            check(&path, &depends, length)?;
        }
        let there = allocated(&path);
        if let Some(room) = disk::room(folder).filter(|room| room.saturating_add(there) < length) {
            bail!(
                "--teacher-cache {shown}: {records} answers will take {} and the disk has room for {}; choose a folder elsewhere, or fewer --views",
                bytes(length),
                bytes(room)
            );
        }
        if !found {
            create(&path, &json, start, length).with_context(|| format!("--teacher-cache: cannot write {}", path.display()))?;
        }
        let file = MappedFile::open(&path)?;
        ensure!(file.bytes().len() as u64 == length, "{} was changed while it was opened; start again", path.display());
        let kept = if found { "answers that are there are used" } else { "begun now" };
        say(&format!(
            "teacher cache {}: {records} answers of {}, {} in all once every view was seen; {kept}",
            path.display(),
            bytes(answer as u64),
            bytes(length)
        ));
        Ok(Self { path, file: RefCell::new(file), records, start, record, answer, shape, dtype: example.dtype(), _lock: lock })
    }

    fn place(&self, key: u64) -> Result<usize> {
        ensure!(key < self.records, "{} has {} answers and view {key} was asked for", self.path.display(), self.records);
        Ok(self.start + key as usize * self.record)
    }

    fn checksum(key: u64, answer: &[u8]) -> u32 {
        extend_crc32c(crc32c(&key.to_le_bytes()), answer)
    }

    /// Copies the answer to a view, if there is one that is whole.
    fn read(&self, key: u64, to: &mut [u8]) -> Result<bool> {
        let (place, file) = (self.place(key)?, self.file.borrow());
        let (answer, mark) = file.bytes()[place..place + self.record].split_at(self.answer);
        let wanted = [Self::checksum(key, answer).to_le_bytes(), 1u32.to_le_bytes()].concat();
        // Where nothing was written, the sum of nothing is not worked out.
        let whole = mark[4..MARK] == wanted[4..] && mark[..MARK] == wanted[..];
        if whole {
            to.copy_from_slice(answer);
        }
        Ok(whole)
    }

    fn write(&self, key: u64, answer: &[u8]) -> Result<()> {
        let place = self.place(key)?;
        let mut record = vec![0; self.record];
        record[..self.answer].copy_from_slice(answer);
        record[self.answer..][..4].copy_from_slice(&Self::checksum(key, answer).to_le_bytes());
        record[self.answer + 4..][..4].copy_from_slice(&1u32.to_le_bytes());
        let written = self.file.borrow_mut().write(place as u64, &record);
        written.with_context(|| {
            format!("{}: an answer of the teacher cannot be written; make room, or run without --teacher-cache", self.path.display())
        })
    }

    /// Answers as a tensor, and those of them with a key written down.
    fn asked(&self, images: &Tensor, keys: &[Option<u64>], compute: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let answers = compute(images)?;
        let shape = [&[keys.len()], self.shape.as_slice()].concat();
        ensure!(
            answers.shape() == shape && answers.dtype() == self.dtype,
            "the teacher answered {answers:?} where {} {shape:?} was expected",
            self.dtype
        );
        let here = answers.on(&Device::Cpu)?;
        for (key, answer) in keys.iter().zip(here.bytes().chunks_exact(self.answer)) {
            key.iter().try_for_each(|&key| self.write(key, answer))?;
        }
        Ok(answers)
    }
}

impl Memory for Cache {
    fn recall(&self, batch: &Batch, compute: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (images, keys) = (batch.for_teacher(), &batch.keys);
        let count = images.shape()[0];
        ensure!(keys.len() == count, "{count} images came with {} keys to what is known of them", keys.len());
        let mut all = Tensor::empty(&[&[count], self.shape.as_slice()].concat(), self.dtype)?;
        let mut missing = Vec::new();
        for (row, (key, to)) in keys.iter().zip(all.bytes_mut().chunks_exact_mut(self.answer)).enumerate() {
            let known = key.map_or(Ok(false), |key| self.read(key, to))?;
            missing.extend((!known).then_some(row));
        }
        if missing.len() == count {
            return self.asked(images, keys, compute);
        }
        if !missing.is_empty() {
            let wanted: Vec<Option<u64>> = missing.iter().map(|&row| keys[row]).collect();
            let answers = self.asked(&rows(images, &missing)?, &wanted, compute)?.on(&Device::Cpu)?;
            for (&row, answer) in missing.iter().zip(answers.bytes().chunks_exact(self.answer)) {
                all.bytes_mut()[row * self.answer..][..self.answer].copy_from_slice(answer);
            }
        }
        Ok(all)
    }
}

/// Some images of a batch.
fn rows(images: &Tensor, which: &[usize]) -> Result<Tensor> {
    let count = images.shape()[0];
    let each = images.numel() / count.max(1);
    let ids: Vec<u32> = which.iter().map(|&row| row as u32).collect();
    let chosen = Var::constant(images.reshape(&[1, count, each])?).gather(&Tensor::from_slice(&[1, ids.len()], &ids)?)?;
    let mut shape = images.shape().to_vec();
    shape[0] = which.len();
    chosen.value().reshape(&shape)
}

/// Makes sure that no other process writes into the folder for as long as the answer is held.
fn lock(folder: &Path) -> Result<File> {
    let attempt = || format!("--teacher-cache: cannot write into {}", folder.display());
    let file = File::options().create(true).truncate(false).write(true).open(folder.join(".teacher-lock")).with_context(attempt)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(format!(
            "--teacher-cache {}: another process writes into this folder; wait for it, or choose another folder",
            folder.display()
        ))),
        Err(TryLockError::Error(error)) => Err(error).with_context(attempt),
    }
}

/// A whole file without answers; a name always stands for a file with a whole head.
fn create(path: &Path, json: &str, start: usize, length: u64) -> std::io::Result<()> {
    let mut head = Vec::with_capacity(start);
    head.extend_from_slice(MAGIC);
    head.extend([VERSION, json.len() as u32, crc32c(json.as_bytes())].into_iter().flat_map(u32::to_le_bytes));
    head.resize(FIXED, 0);
    head.extend_from_slice(json.as_bytes());
    head.resize(start, 0);
    let partial = path.with_extension("partial");
    let mut file = File::create(&partial)?;
    file.write_all(&head)?;
    file.set_len(length)?;
    file.sync_all()?;
    fs::rename(&partial, path)
}

/// Bytes of a file that are on the disk; none where there is no file.
fn allocated(path: &Path) -> u64 {
    #[cfg(unix)]
    let blocks = |about: fs::Metadata| std::os::unix::fs::MetadataExt::blocks(&about) * 512;
    #[cfg(not(unix))]
    let blocks = |about: fs::Metadata| about.len();
    fs::metadata(path).map_or(0, blocks)
}

/// Refuses a file that holds other answers, naming what differs.
fn check(path: &Path, depends: &Map<String, Value>, length: u64) -> Result<()> {
    let shown = path.display();
    let file = MappedFile::open(path)?;
    let Some(then) = head(file.bytes()) else {
        bail!("{shown} is no teacher cache of this program, or its head is damaged; remove it, or choose another folder by --teacher-cache")
    };
    for (name, now) in depends {
        let [was, is] = [then.get(name), Some(now)].map(|value| value.and_then(Value::as_str).unwrap_or("unknown"));
        ensure!(
            was == is,
            "{shown} is of another run: its {name} {} {was}, this run's {is}; choose another folder by --teacher-cache, or remove it",
            if name.ends_with('s') { "are" } else { "is" }
        );
    }
    let found = file.bytes().len() as u64;
    ensure!(found == length, "{shown} has {found} bytes and not {length}: it was cut short; remove it, or choose another folder");
    Ok(())
}

fn head(file: &[u8]) -> Option<Map<String, Value>> {
    let (fixed, rest) = file.split_at_checked(FIXED)?;
    let word = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("four bytes"));
    let json = rest.get(..word(12) as usize)?;
    let ours = fixed.starts_with(MAGIC) && word(8) == VERSION && word(16) == crc32c(json);
    ours.then(|| serde_json::from_slice(json).ok()).flatten()
}
