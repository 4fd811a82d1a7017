//! Named tensors on disk: safetensors (memory-mapped) and PyTorch's `.pth`, read without executing anything.
//!
//! [`open`] tells the two apart by their first bytes and gives a [`TensorFile`]; [`Checkpoint`] gives everything else that a `.pth`
//! file holds (optimizer, epoch, arguments) as a tree of [`Value`]s. A contiguous tensor is a slice of the mapped file. What is read
//! is taken to be hostile: every number is checked before it is used, and a bad file is a sentence, never a panic.

mod atomic;
mod bytes;
mod checksum;
mod pickle;
mod pickle_write;
mod pth;
mod safetensors;
mod tensor;
mod value;
mod zip;
mod zip_write;

pub(crate) use atomic::write as write_atomically;
pub use bytes::{Bytes, MappedFile};
pub use checksum::{crc32c, extend_crc32c};
pub use pth::{Checkpoint, OptimizerState, write_pth};
pub use safetensors::{parse_safetensors, write_safetensors};
pub use tensor::{FileDtype, FileTensor};
pub use value::{StoredTensor, Value};

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::bail;
use crate::error::{Error, Result};

/// Reads the tensors of a safetensors file or of the model in a `.pth` file.
pub fn open(path: impl AsRef<Path>) -> Result<TensorFile> {
    let path = path.as_ref();
    parse(Bytes::map(path)?, &path.display().to_string())
}

/// Whether a file looks like a `.pth`, of which [`Checkpoint`] reads more than the weights.
pub fn is_pth(path: impl AsRef<Path>) -> Result<bool> {
    let bytes = Bytes::map(path.as_ref())?;
    Ok(bytes.starts_with(zip::MAGIC) || bytes.first() == Some(&pickle::FIRST_BYTE) && bytes.get(8) != Some(&b'{'))
}

/// [`open`] for bytes already at hand; `source` names them in errors.
pub fn parse(bytes: Bytes, source: &str) -> Result<TensorFile> {
    if bytes.get(8) == Some(&b'{') && !bytes.starts_with(zip::MAGIC) {
        return parse_safetensors(bytes, source);
    }
    if bytes.starts_with(zip::MAGIC) || bytes.first() == Some(&pickle::FIRST_BYTE) {
        let checkpoint = Checkpoint::parse(bytes, source)?;
        return TensorFile::new(source, checkpoint.state_dict()?, BTreeMap::new());
    }
    bail!("cannot read {source}: it is neither a safetensors file nor a PyTorch checkpoint (zip or legacy)");
}

/// The named tensors of one file, in its order.
#[derive(Debug)]
pub struct TensorFile {
    source: String,
    tensors: Vec<(String, FileTensor)>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// `source` names the file in errors; no name may stand twice.
    pub fn new(source: &str, tensors: Vec<(String, FileTensor)>, metadata: BTreeMap<String, String>) -> Result<Self> {
        let mut by_name = HashMap::new();
        for (position, (name, _)) in tensors.iter().enumerate() {
            if by_name.insert(name.clone(), position).is_some() {
                bail!("{source} holds two tensors named {}", quoted(name));
            }
        }
        Ok(Self { source: source.to_string(), tensors, by_name, metadata })
    }

    pub fn get(&self, name: &str) -> Result<&FileTensor> {
        if let Some(&position) = self.by_name.get(name) {
            return Ok(&self.tensors[position].1);
        }
        let hint = match nearest(name, self.names()) {
            Some(near) => format!("; did you mean {}?", quoted(near)),
            None => String::new(),
        };
        Err(Error::new(format!("{} holds no tensor named {}{hint}", self.source, quoted(name))))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    pub fn tensors(&self) -> &[(String, FileTensor)] {
        &self.tensors
    }

    /// The strings that a safetensors header carries beside the tensors; empty for a `.pth` file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What names this file in errors.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// A name from a file as an error may show it: quoted, escaped and not endless.
fn quoted(name: &str) -> String {
    const MOST: usize = 80;
    match name.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}...", &name[..end]),
        None => format!("{name:?}"),
    }
}

/// The candidate with the fewest edits to `name`, if those are few.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 200;
    let allowed = name.len() / 4 + 1;
    candidates
        .filter(|candidate| candidate.len() <= LONGEST && candidate.len().abs_diff(name.len()) <= allowed)
        .map(|candidate| (edits(name.as_bytes(), candidate.as_bytes()), candidate))
        .filter(|&(distance, _)| distance <= allowed)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance.
fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
