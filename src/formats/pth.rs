//! PyTorch's `.pth`: the zip and the legacy container around a pickle and raw storages.
//!
//! Zip: `<root>/data.pkl` is the pickle, `<root>/data/<key>` the storages. Legacy: five pickles (magic, protocol, system, the object,
//! the storage keys), then for each key an element count and the data. A tensor is a view (offset, shape, strides) of a storage;
//! a contiguous one is a slice of the file, any other is copied out, within a budget.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::pickle::{self, Pickle, StorageSpec, TensorSpec};
use super::tensor::numel;
use super::value::contiguous_strides;
use super::zip_write::ZipWriter;
use super::{Bytes, FileDtype, FileTensor, StoredTensor, Value, atomic, pickle_write, quoted, zip};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};

/// 0x1950a86a20f9469cfc6c, little-endian.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const LEGACY_PROTOCOL: i64 = 1001;

/// For each parameter index the optimizer's tensors by name (`step`, `exp_avg`, ...).
pub type OptimizerState = Vec<(usize, Vec<(String, FileTensor)>)>;

/// A `.pth` file, read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    root: Value,
    source: String,
}

impl Checkpoint {
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(Bytes::map(path)?, &path.display().to_string())
    }

    /// [`Checkpoint::open`] for bytes already at hand; `source` names them in errors.
    pub fn parse(bytes: Bytes, source: &str) -> Result<Self> {
        let root = if bytes.starts_with(zip::MAGIC) { read_zip(&bytes) } else { read_legacy(&bytes) };
        let root = root.with_context(|| format!("cannot read {source} as a PyTorch checkpoint"))?;
        Ok(Self { root, source: source.to_string() })
    }

    /// Everything in the file.
    pub fn root(&self) -> &Value {
        &self.root
    }

    pub fn top_level_keys(&self) -> Vec<&str> {
        match &self.root {
            Value::Dict(pairs) => pairs.iter().filter_map(|(key, _)| if let Value::Str(key) = key { Some(&**key) } else { None }).collect(),
            _ => Vec::new(),
        }
    }

    /// The model's tensors in file order: those under `model`, else under `state_dict`, else the whole file as a bare state dict.
    /// A prefix `module.` that every key has is dropped.
    pub fn state_dict(&self) -> Result<Vec<(String, FileTensor)>> {
        Ok(self.stored_state_dict()?.into_iter().map(|(key, stored)| (key, stored.tensor.clone())).collect())
    }

    /// [`Checkpoint::state_dict`] with how each tensor was stored.
    pub fn stored_state_dict(&self) -> Result<Vec<(String, Arc<StoredTensor>)>> {
        let nested = ["model", "state_dict"].iter().filter_map(|key| self.root.get(key)).find(|value| matches!(value, Value::Dict(_)));
        self.tensors_of(nested.unwrap_or(&self.root)).with_context(|| format!("{} holds no state dict", self.source))
    }

    /// The moving averages of the model's tensors, where the trainer kept them (under `model_ema`).
    pub fn averages(&self) -> Result<Option<Vec<(String, FileTensor)>>> {
        let Some(averages @ Value::Dict(_)) = self.root.get("model_ema") else { return Ok(None) };
        let tensors = self.tensors_of(averages).with_context(|| format!("{}: model_ema is no state dict", self.source))?;
        Ok(Some(tensors.into_iter().map(|(key, stored)| (key, stored.tensor.clone())).collect()))
    }

    fn tensors_of(&self, dict: &Value) -> Result<Vec<(String, Arc<StoredTensor>)>> {
        let Value::Dict(pairs) = dict else { bail!("it holds {} where a dict of tensors is expected", dict.kind()) };
        let mut tensors = Vec::new();
        for (key, value) in pairs {
            match (key, value) {
                (Value::Str(key), Value::Tensor(stored)) => tensors.push((key.to_string(), stored.clone())),
                (Value::Str(key), other) => bail!("its entry {} is {} and no tensor", quoted(key), other.kind()),
                (other, _) => bail!("it has {} as a key", other.kind()),
            }
        }
        if tensors.iter().all(|(key, _)| key.starts_with("module.")) {
            tensors.iter_mut().for_each(|(key, _)| *key = key.split_off("module.".len()));
        }
        Ok(tensors)
    }

    /// Groups of state-dict keys whose tensors share one storage.
    pub fn tied(&self) -> Result<Vec<Vec<String>>> {
        let mut groups: Vec<Vec<String>> = Vec::new();
        let mut group_of = HashMap::new();
        for (key, stored) in self.stored_state_dict()? {
            let group = *group_of.entry(stored.storage).or_insert(groups.len());
            match groups.get_mut(group) {
                Some(keys) => keys.push(key),
                None => groups.push(vec![key]),
            }
        }
        groups.retain(|keys| keys.len() > 1);
        Ok(groups)
    }

    pub fn epoch(&self) -> Result<Option<i64>> {
        match self.root.get("epoch") {
            None | Some(Value::None) => Ok(None),
            Some(Value::Int(epoch)) => Ok(Some(*epoch)),
            Some(other) => bail!("{}: epoch is {} and no int", self.source, other.kind()),
        }
    }

    /// The training arguments, from a Namespace or a dict; see [`Value::to_json`] for how they are written.
    pub fn args(&self) -> Result<Option<Map<String, Json>>> {
        self.json_map("args")
    }

    /// The state of the loss scaler.
    pub fn scaler(&self) -> Result<Option<Map<String, Json>>> {
        self.json_map("scaler")
    }

    fn json_map(&self, key: &str) -> Result<Option<Map<String, Json>>> {
        match self.root.get(key) {
            None | Some(Value::None) => Ok(None),
            Some(value) => value.to_json_map().map(Some).with_context(|| format!("{}: {key}", self.source)),
        }
    }

    /// The optimizer's parameter groups; empty where the file has no optimizer.
    pub fn param_groups(&self) -> Result<Vec<Map<String, Json>>> {
        let Some(groups) = self.root.get("optimizer").and_then(|optimizer| optimizer.get("param_groups")) else { return Ok(Vec::new()) };
        let Value::List(groups) = groups else { bail!("{}: param_groups is {} and no list", self.source, groups.kind()) };
        groups.iter().map(Value::to_json_map).collect::<Result<_>>().with_context(|| format!("{}: param_groups", self.source))
    }

    /// The optimizer's state; a plain number becomes a tensor of shape [], and what is None is left out.
    pub fn optimizer_state(&self) -> Result<OptimizerState> {
        let Some(state) = self.root.get("optimizer").and_then(|optimizer| optimizer.get("state")) else { return Ok(Vec::new()) };
        let Value::Dict(pairs) = state else { bail!("{}: the optimizer's state is {} and no dict", self.source, state.kind()) };
        let entries = pairs.iter().map(|(index, entry)| {
            let (Value::Int(index), Value::Dict(fields)) = (index, entry) else { bail!("an entry is not a dict under an int") };
            let index = usize::try_from(*index).context("a parameter's index is negative")?;
            Ok((index, optimizer_entry(fields).with_context(|| format!("parameter {index}"))?))
        });
        entries.collect::<Result<_>>().with_context(|| format!("{}: the optimizer's state is wrong", self.source))
    }
}

fn optimizer_entry(fields: &[(Value, Value)]) -> Result<Vec<(String, FileTensor)>> {
    let mut tensors = Vec::new();
    for (name, value) in fields {
        let Value::Str(name) = name else { bail!("{} names an entry", name.kind()) };
        let tensor = match value {
            Value::None => continue,
            Value::Tensor(stored) => stored.tensor.clone(),
            Value::Int(i) => FileTensor::from_i64(&[*i], &[])?,
            Value::Float(x) => FileTensor::from_f64(&[*x], &[])?,
            other => bail!("{} is {}", quoted(name), other.kind()),
        };
        tensors.push((name.to_string(), tensor));
    }
    Ok(tensors)
}

fn read_zip(file: &Bytes) -> Result<Value> {
    let entries = zip::entries(file)?;
    let mut roots = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    let root = roots.next().ok_or_else(|| Error::new("the zip file holds no data.pkl, so it is no PyTorch checkpoint"))?;
    ensure!(roots.next().is_none(), "the zip file holds more than one data.pkl");
    if let Some(range) = entries.get(&format!("{root}/byteorder")) {
        ensure!(&file[range.clone()] == b"little", "it was written in a byte order other than little-endian");
    }

    let data = &file[entries[&format!("{root}/data.pkl")].clone()];
    let pickle = pickle::read(data, 0)?;
    ensure!(pickle.end == data.len(), "{} bytes follow the end of data.pkl", data.len() - pickle.end);
    let storage = |spec: &StorageSpec| {
        let key = quoted(&spec.key);
        let range = entries.get(&format!("{root}/data/{}", spec.key)).ok_or_else(|| Error::new(format!("storage {key} is missing")))?;
        let held = file.slice(range.clone()).ok_or_else(|| Error::new(format!("storage {key} leaves the file")))?;
        storage_bytes(spec, &held)
    };
    let storages = pickle.storages.iter().map(storage).collect::<Result<Vec<_>>>()?;
    assemble(pickle, &storages, file.len())
}

/// The declared elements out of what an entry holds.
fn storage_bytes(spec: &StorageSpec, held: &Bytes) -> Result<Bytes> {
    let wanted = spec.byte_len().and_then(|len| held.slice(0..len));
    wanted.ok_or_else(|| {
        Error::new(format!("storage {} should hold {} {} elements but has {} bytes", quoted(&spec.key), spec.count, spec.dtype, held.len()))
    })
}

fn read_legacy(file: &Bytes) -> Result<Value> {
    let foreign = || Error::new("it is a pickle without PyTorch's legacy header");
    let magic = pickle::read(file, 0)?;
    ensure!(matches!(magic.tree(&[])?, Value::BigInt(bytes) if bytes[..] == LEGACY_MAGIC), "{}", foreign());
    let protocol = pickle::read(file, magic.end)?;
    ensure!(matches!(protocol.tree(&[])?, Value::Int(LEGACY_PROTOCOL)), "{}", foreign());
    let system = pickle::read(file, protocol.end)?;
    ensure!(plain(&system)?.get("little_endian").is_some_and(|v| matches!(v, Value::Bool(true))), "it was not written little-endian");
    let object = pickle::read(file, system.end)?;
    let keys = pickle::read(file, object.end)?;
    let mut at = keys.end;
    let Value::List(keys) = plain(&keys)? else { bail!("the list of storage keys is missing") };

    let index_of: HashMap<&str, usize> = object.storages.iter().enumerate().map(|(index, spec)| (&*spec.key, index)).collect();
    let mut storages: Vec<Option<Bytes>> = vec![None; object.storages.len()];
    for key in &keys {
        let Value::Str(key) = key else { bail!("a storage key is no string") };
        let index = *index_of.get(&**key).ok_or_else(|| Error::new(format!("storage {} belongs to no tensor", quoted(key))))?;
        ensure!(storages[index].is_none(), "storage {} stands twice", quoted(key));
        let spec = &object.storages[index];
        let short = || Error::new(format!("storage {} leaves the file, so the file was probably cut short", quoted(key)));
        let head = file.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(short)?;
        let start = at + 8;
        let len = usize::try_from(u64::from_le_bytes(*head)).ok().and_then(|count| count.checked_mul(spec.dtype.size()));
        let held = len.and_then(|len| file.slice(start..start.checked_add(len)?)).ok_or_else(short)?;
        storages[index] = Some(storage_bytes(spec, &held)?);
        at = start + held.len();
    }
    ensure!(at == file.len(), "{} bytes follow the last storage", file.len() - at);
    let missing =
        |(bytes, spec): (Option<Bytes>, &StorageSpec)| bytes.ok_or_else(|| Error::new(format!("storage {} is missing", quoted(&spec.key))));
    let storages = storages.into_iter().zip(&object.storages).map(missing).collect::<Result<Vec<_>>>()?;
    assemble(object, &storages, file.len())
}

/// The tree of a pickle that may not mention tensors.
fn plain(pickle: &Pickle) -> Result<Value> {
    ensure!(pickle.tensors.is_empty(), "a tensor stands in the header");
    pickle.tree(&[])
}

/// Gives the pickle's tensors their bytes and its objects the form of a tree.
fn assemble(mut pickle: Pickle, storages: &[Bytes], file_len: usize) -> Result<Value> {
    const ALWAYS_ALLOWED: usize = 64 << 20;
    const MULTIPLE: usize = 64;
    let specs = std::mem::take(&mut pickle.tensors);
    let mut left = file_len.saturating_mul(MULTIPLE).max(ALWAYS_ALLOWED);
    for spec in specs.iter().filter(|spec| !is_contiguous(spec)) {
        let len = byte_len(spec, pickle.storages[spec.storage].dtype)?;
        let shape = &spec.shape;
        ensure!(len <= left, "expanded and strided tensors such as one of shape {shape:?} would take far more memory than the file");
        left -= len;
    }

    let mut tensors = Vec::new();
    for spec in specs {
        let dtype = pickle.storages[spec.storage].dtype;
        let (storage, len) = (&storages[spec.storage], byte_len(&spec, dtype)?);
        let data = if len == 0 {
            Vec::new().into()
        } else if is_contiguous(&spec) {
            let start = spec.offset * dtype.size();
            storage.slice(start..start + len).ok_or_else(|| Error::new("a tensor leaves its storage"))?
        } else {
            copy_out(&spec, storage, dtype.size(), len).into()
        };
        let tensor = FileTensor::new(dtype, spec.shape, data)?;
        tensors.push(Arc::new(StoredTensor { tensor, storage: Some(spec.storage), strides: spec.strides }));
    }
    pickle.tree(&tensors)
}

fn byte_len(spec: &TensorSpec, dtype: FileDtype) -> Result<usize> {
    let len = numel(&spec.shape).and_then(|count| count.checked_mul(dtype.size()));
    len.ok_or_else(|| Error::new(format!("a tensor of shape {:?} is too large", spec.shape)))
}

/// Whether the elements already stand in row-major order, one after the other.
fn is_contiguous(spec: &TensorSpec) -> bool {
    let natural = contiguous_strides(&spec.shape);
    let fits = |((size, stride), natural): ((&usize, &usize), &usize)| *size == 1 || stride == natural;
    spec.shape.contains(&0) || spec.shape.iter().zip(&spec.strides).zip(&natural).all(fits)
}

/// The elements of a view in row-major order. The view lies inside its storage, has an axis and is not empty.
fn copy_out(spec: &TensorSpec, storage: &[u8], size: usize, len: usize) -> Vec<u8> {
    let last = spec.shape.len() - 1;
    let (row, step) = (spec.shape[last], spec.strides[last]);
    let mut out = Vec::with_capacity(len);
    let mut index = vec![0; last];
    let mut start = spec.offset;
    while out.len() < len {
        for i in 0..row {
            let at = (start + i * step) * size;
            out.extend_from_slice(&storage[at..at + size]);
        }
        for axis in (0..last).rev() {
            index[axis] += 1;
            start += spec.strides[axis];
            if index[axis] < spec.shape[axis] {
                break;
            }
            start -= spec.shape[axis] * spec.strides[axis];
            index[axis] = 0;
        }
    }
    out
}

/// Writes what `torch.load` reads, in the zip container; the file at `path` is replaced as a whole or not at all.
///
/// `torch.load(weights_only=True)` refuses a [`Value::Namespace`]; write arguments as a dict.
pub fn write_pth(path: impl AsRef<Path>, root: &Value) -> Result<()> {
    let path = path.as_ref();
    let (pickle, storages) = pickle_write::write(root).with_context(|| format!("cannot write {}", path.display()))?;
    atomic::write(path, |out| {
        let mut zip = ZipWriter::new(out.by_ref());
        let mut entry = |name: &str, data: &[u8]| zip.entry(&format!("archive/{name}"), data).context("the disk refused");
        entry("data.pkl", &pickle)?;
        entry(".format_version", b"1")?;
        entry(".storage_alignment", b"64")?;
        entry("byteorder", b"little")?;
        for (key, tensor) in storages.iter().enumerate() {
            entry(&format!("data/{key}"), tensor.bytes())?;
        }
        entry("version", b"3\n")?;
        zip.finish().context("the disk refused")
    })
}
