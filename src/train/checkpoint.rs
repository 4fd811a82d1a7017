//! A run's checkpoints: everything that is needed to go on as if nothing had happened.
//!
//! A checkpoint is a safetensors file, which any program that knows the format can read:
//!
//!   model.<key>                the values under their official names
//!   optimizer.<state>.<key>    what the optimiser remembers (exp_avg, exp_avg_sq, mu)
//!   ema.<key>                  the running averages, if there are any
//!
//! and in its header `masque.format`, `masque.settings` (the resolved flags), `masque.data` (command, images, classes), `masque.progress` (where the run
//! stands), `masque.updates` (how many updates each parameter has had) and `masque.checksum` (of all tensors). A file is written beside its place and renamed, so that a name always stands for a whole file.

use crate::device::ranks::Ranks;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::formats::{self, FileDtype, FileTensor, TensorFile};
use crate::optim::Optimizer;
use crate::optim::ema::Ema;
use crate::optim::state::Memory;
use crate::param::{ParamId, Params};
use crate::tensor::{Device, Dtype, Tensor};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

const FORMAT: &str = "1";

/// What stands in a checkpoint's header.
#[derive(Clone, Debug)]
pub struct Header {
    pub settings: Map<String, Value>,
    pub progress: Map<String, Value>,
    /// The command, how many training images there are, and the classes' names.
    pub data: Map<String, Value>,
}

pub fn header(file: &TensorFile) -> Result<Header> {
    let source = file.source();
    let format = text(file, "masque.format")?;
    ensure!(format == FORMAT, "{source} is a checkpoint of format {format}, this program reads format {FORMAT}");
    Ok(Header { settings: map(file, "masque.settings")?, progress: map(file, "masque.progress")?, data: map(file, "masque.data")? })
}

/// The settings of the run that a file comes from; none where it is not of a run of masque.
pub fn settings(file: &TensorFile) -> Result<Map<String, Value>> {
    if file.metadata().contains_key("masque.settings") { map(file, "masque.settings") } else { Ok(Map::new()) }
}

/// The command of the run that a file comes from; None where it does not say one.
pub fn command(file: &TensorFile) -> Result<Option<String>> {
    if !file.metadata().contains_key("masque.data") {
        return Ok(None);
    }
    Ok(map(file, "masque.data")?.get("command").and_then(Value::as_str).map(String::from))
}

/// The classes that a classifier's run learned; none where the file does not say.
pub fn classes(file: &TensorFile) -> Result<Vec<String>> {
    if !file.metadata().contains_key("masque.data") {
        return Ok(Vec::new());
    }
    let names = map(file, "masque.data")?.get("classes").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(names.iter().filter_map(|name| name.as_str().map(String::from)).collect())
}

fn text<'a>(file: &'a TensorFile, key: &str) -> Result<&'a str> {
    let found = file.metadata().get(key).map(String::as_str);
    found.ok_or_else(|| Error::new(format!("{} is no masque checkpoint: it has no {key}", file.source())))
}

fn map(file: &TensorFile, key: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(text(file, key)?).with_context(|| format!("{}: {key} cannot be read", file.source()))
}

/// What an optimiser remembers of one parameter, on the host.
pub struct Remembered {
    pub name: String,
    pub steps: u64,
    pub tensors: Vec<(&'static str, FileTensor)>,
}

/// All that an optimiser remembers here.
pub fn remembered(params: &Params, optimizer: &dyn Optimizer) -> Result<Vec<Remembered>> {
    let host = |(state, tensor): (&'static str, &Tensor)| Ok((state, stored(tensor)?));
    let one = |memory: Memory| {
        let tensors = memory.tensors.into_iter().map(host).collect::<Result<_>>()?;
        Ok(Remembered { name: params.name(memory.id).to_string(), steps: memory.steps, tensors })
    };
    optimizer.state().memories().map(one).collect()
}

const CUT: &str = "what the optimiser of another rank remembers came cut short";

/// The same of all ranks, on rank 0, where each remembers a part; elsewhere nothing.
pub fn remembered_by_all(ranks: &Ranks, params: &Params, optimizer: &dyn Optimizer) -> Result<Vec<Remembered>> {
    let mut own = Vec::new();
    for Remembered { name, steps, tensors } in remembered(params, optimizer)? {
        let id = params.find(&name)?;
        own.extend((params.ids().position(|other| other == id).unwrap_or(0) as u64).to_le_bytes());
        own.extend(steps.to_le_bytes());
        tensors.iter().for_each(|(_, tensor)| own.extend(tensor.bytes()));
    }
    let ids: Vec<ParamId> = params.ids().collect();
    let states = optimizer.state().names();
    let mut all = Vec::new();
    for bytes in ranks.collect("what the optimiser remembers", &own)? {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let mut numbers = [0; 2];
            rest.read_exact(bytemuck::cast_slice_mut(&mut numbers)).context(CUT)?;
            let [at, steps] = numbers.map(u64::from_le);
            let &id = ids.get(at as usize).ok_or_else(|| Error::new(CUT))?;
            let shape = params.value(id).shape();
            let mut tensors = Vec::new();
            for state in states {
                let mut numbers = vec![0f32; params.value(id).numel()];
                rest.read_exact(bytemuck::cast_slice_mut(&mut numbers)).context(CUT)?;
                tensors.push((*state, FileTensor::from_f32(&numbers, shape)?));
            }
            all.push((id, Remembered { name: params.name(id).to_string(), steps, tensors }));
        }
    }
    all.sort_by_key(|(id, _)| *id);
    Ok(all.into_iter().map(|(_, remembered)| remembered).collect())
}

/// Writes model, optimiser and averages; the file at `path` is the old one or the whole new one.
pub fn save(path: &Path, header: &Header, params: &Params, optimizer: Vec<Remembered>, ema: Option<&Ema>) -> Result<()> {
    let mut tensors: Vec<(String, FileTensor)> = Vec::new();
    for id in params.ids() {
        tensors.push((format!("model.{}", params.name(id)), stored(params.value(id))?));
    }
    let mut updates = Map::new();
    for Remembered { name, steps, tensors: states } in optimizer {
        updates.insert(name.clone(), steps.into());
        tensors.extend(states.into_iter().map(|(state, tensor)| (format!("optimizer.{state}.{name}"), tensor)));
    }
    for (id, value) in ema.iter().flat_map(|ema| params.ids().zip(ema.values())) {
        tensors.push((format!("ema.{}", params.name(id)), stored(value)?));
    }
    let json = |map: &Map<String, Value>| Value::Object(map.clone()).to_string();
    let metadata = BTreeMap::from([
        ("masque.format".to_string(), FORMAT.to_string()),
        ("masque.settings".to_string(), json(&header.settings)),
        ("masque.progress".to_string(), json(&header.progress)),
        ("masque.data".to_string(), json(&header.data)),
        ("masque.updates".to_string(), json(&updates)),
        ("masque.checksum".to_string(), sum_of(tensors.iter().map(|(_, tensor)| tensor))),
    ]);
    formats::write_safetensors(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &metadata)
}

/// Puts everything back; the model must be the one that was saved. What the optimiser remembers of some parameters may be another rank's.
pub fn restore(file: &TensorFile, params: &mut Params, optimizer: &mut dyn Optimizer, ema: Option<&mut Ema>) -> Result<()> {
    let source = file.source().to_string();
    check(file)?;
    let model: Vec<(&str, &FileTensor)> =
        file.tensors().iter().filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?, tensor))).collect();
    params.load(model).with_context(|| source.clone())?;
    let updates = file.metadata().get("masque.updates").map_or("{}", String::as_str);
    let updates: BTreeMap<String, u64> =
        serde_json::from_str(updates).with_context(|| format!("{source}: masque.updates cannot be read"))?;
    let states = optimizer.state().names();
    for (name, steps) in updates {
        let id = params.find(&name).with_context(|| source.clone())?;
        if optimizer.state().is_elsewhere(id) {
            continue;
        }
        let tensors = states
            .iter()
            .map(|state| Ok((*state, tensor_of(file.get(&format!("optimizer.{state}.{name}"))?, params.value(id))?)))
            .collect::<Result<Vec<_>>>()?;
        let lent: Vec<(&str, &Tensor)> = tensors.iter().map(|(state, tensor)| (*state, tensor)).collect();
        optimizer.state_mut().restore(params, id, steps, &lent).with_context(|| source.clone())?;
    }
    if let Some(ema) = ema {
        if !file.names().any(|name| name.starts_with("ema.")) {
            return Err(Error::usage(format!("{source} was made without --model-ema-decay; leave the flag out")));
        }
        let ids: Vec<ParamId> = params.ids().collect();
        let values = ids.iter().map(|&id| tensor_of(file.get(&format!("ema.{}", params.name(id)))?, params.value(id)));
        ema.restore(&values.collect::<Result<Vec<_>>>()?).with_context(|| source)?;
    }
    Ok(())
}

/// Compares the checksum of the tensors with what the header says.
pub fn check(file: &TensorFile) -> Result<()> {
    let said = file.metadata().get("masque.checksum").map_or("", String::as_str);
    let found = sum_of(file.tensors().iter().map(|(_, tensor)| tensor));
    ensure!(said == found, "{} is damaged: the checksum of its tensors is {found}, its header says {said}", file.source());
    Ok(())
}

fn sum_of<'a>(tensors: impl Iterator<Item = &'a FileTensor>) -> String {
    format!("{:08x}", tensors.fold(0u32, |sum, tensor| formats::extend_crc32c(sum, tensor.bytes())))
}

fn stored(tensor: &Tensor) -> Result<FileTensor> {
    let here = tensor.on(&Device::Cpu)?;
    match here.dtype() {
        Dtype::F64 => FileTensor::from_f64(here.data(), here.shape()),
        _ => FileTensor::from_f32(here.cast(Dtype::F32)?.data(), here.shape()),
    }
}

fn tensor_of(stored: &FileTensor, like: &Tensor) -> Result<Tensor> {
    match stored.dtype() {
        FileDtype::F64 => Tensor::from_slice(stored.shape(), &stored.to_f64()?)?.cast(like.dtype()),
        _ => Tensor::from_slice(stored.shape(), &stored.to_f32()?)?.cast(like.dtype()),
    }
}

/// The checkpoints of a run folder.
pub struct Shelf {
    folder: PathBuf,
    /// How many of them stay, besides the best.
    keep: usize,
}

const PREFIX: &str = "checkpoint-";
const ENDING: &str = ".safetensors";

impl Shelf {
    pub fn new(folder: &Path, keep: usize) -> Self {
        Self { folder: folder.to_path_buf(), keep }
    }

    pub fn path(&self, update: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{update:08}{ENDING}"))
    }

    pub fn best(&self) -> PathBuf {
        self.folder.join(format!("best{ENDING}"))
    }

    /// The best weights, or the last where nothing was evaluated.
    pub fn best_or_last(&self) -> PathBuf {
        let last = || self.updates().first().map_or_else(|| self.folder.clone(), |&update| self.path(update));
        if self.best().is_file() { self.best() } else { last() }
    }

    /// Updates at which there is a checkpoint, the newest first.
    pub fn updates(&self) -> Vec<u64> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let files = entries.filter(|entry| entry.path().is_file());
        let number = |name: &str| name.strip_prefix(PREFIX)?.strip_suffix(ENDING)?.parse().ok();
        let mut updates: Vec<u64> = files.filter_map(|file| number(file.file_name().to_str()?)).collect();
        updates.sort_unstable_by(|a, b| b.cmp(a));
        updates
    }

    /// The newest checkpoint that is whole, and a sentence for each newer one that is not.
    pub fn newest(&self) -> (Option<(PathBuf, TensorFile)>, Vec<String>) {
        self.newest_before(u64::MAX)
    }

    /// The same of those before an update.
    pub fn newest_before(&self, end: u64) -> (Option<(PathBuf, TensorFile)>, Vec<String>) {
        let mut damaged = Vec::new();
        for update in self.updates().into_iter().filter(|&update| update < end) {
            let path = self.path(update);
            let opened = formats::open(&path).and_then(|file| header(&file).and_then(|_| check(&file)).map(|()| file));
            match opened {
                Ok(file) => return (Some((path, file)), damaged),
                Err(error) => damaged.push(format!("{}; an older checkpoint is used", error.chain())),
            }
        }
        (None, damaged)
    }

    /// Renames the checkpoints from an update on: they are of another course than the one that is about to be taken.
    pub fn set_aside(&self, first: u64) -> Result<Vec<PathBuf>> {
        let mut renamed = Vec::new();
        for later in self.updates().into_iter().filter(|&later| later >= first) {
            let path = self.path(later);
            std::fs::rename(&path, path.with_extension("safetensors.old")).with_context(|| format!("renaming {}", path.display()))?;
            renamed.push(path);
        }
        Ok(renamed)
    }

    /// Removes all but the newest, and what a killed process left half written.
    pub fn tidy(&self) {
        for update in self.updates().into_iter().skip(self.keep.max(1)) {
            // A file that cannot be removed harms nobody.
            let _ = std::fs::remove_file(self.path(update));
        }
        let ours = format!(".{}.", std::process::id());
        for folder in [self.folder.clone(), self.folder.join("pictures")] {
            for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                if name.starts_with('.') && name.ends_with(".tmp") && !name.contains(&ours) {
                    let _ = std::fs::remove_file(file.path());
                }
            }
        }
    }
}
