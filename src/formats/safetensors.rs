//! safetensors: an 8-byte header length, a JSON header, then the tensors' bytes back to back.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Map, json};

use super::{Bytes, FileDtype, FileTensor, TensorFile, atomic, quoted};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};

const METADATA: &str = "__metadata__";

/// Reads a safetensors file whose bytes are at hand; `source` names them in errors.
pub fn parse_safetensors(bytes: Bytes, source: &str) -> Result<TensorFile> {
    read(&bytes, source).with_context(|| format!("cannot read {source} as safetensors"))
}

fn read(bytes: &Bytes, source: &str) -> Result<TensorFile> {
    let (header_len, header) = SafeTensors::read_metadata(bytes).context("its header is wrong")?;
    let data_start = 8 + header_len;
    let text = std::str::from_utf8(&bytes[8..data_start]).context("its header is wrong")?;

    let mut tensors = Vec::new();
    for name in top_level_keys(text)? {
        let Some(info) = header.info(&name) else { continue };
        let dtype = dtype_from(info.dtype).with_context(|| format!("tensor {}", quoted(&name)))?;
        let (start, end) = info.data_offsets;
        let data = bytes.slice(data_start + start..data_start + end).ok_or_else(|| Error::new("a tensor leaves the file"))?;
        let tensor = FileTensor::new(dtype, info.shape.clone(), data)?;
        tensors.push((name, tensor));
    }
    let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    TensorFile::new(source, tensors, metadata)
}

fn dtype_from(dtype: Dtype) -> Result<FileDtype> {
    Ok(match dtype {
        Dtype::F64 => FileDtype::F64,
        Dtype::F32 => FileDtype::F32,
        Dtype::F16 => FileDtype::F16,
        Dtype::BF16 => FileDtype::BF16,
        Dtype::I64 => FileDtype::I64,
        Dtype::I32 => FileDtype::I32,
        Dtype::I16 => FileDtype::I16,
        Dtype::I8 => FileDtype::I8,
        Dtype::U8 => FileDtype::U8,
        Dtype::U32 => FileDtype::U32,
        Dtype::BOOL => FileDtype::Bool,
        other => bail!("the dtype {other} is not supported"),
    })
}

/// The keys of the outermost object in their order. `json` is known to be well-formed; a key that stands twice in one object is
/// refused here, because the parser keeps the last one without a word.
fn top_level_keys(json: &str) -> Result<Vec<String>> {
    let bytes = json.as_bytes();
    let mut outermost = Vec::new();
    let mut open: Vec<HashSet<String>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'{' | b'[' => open.push(HashSet::new()),
            b'}' | b']' => drop(open.pop()),
            b'"' => {
                let start = at;
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                let after = bytes.get(at + 1..).unwrap_or_default().trim_ascii_start();
                if after.first() == Some(&b':') {
                    let key: String = serde_json::from_str(&json[start..=at]).context("its header is wrong")?;
                    if open.len() == 1 {
                        outermost.push(key.clone());
                    }
                    if let Some(seen) = open.last_mut() {
                        ensure!(seen.insert(key.clone()), "its header names {} twice", quoted(&key));
                    }
                }
            }
            _ => {}
        }
        at += 1;
    }
    Ok(outermost)
}

/// Writes a safetensors file whose header keeps the given order; the file at `path` is replaced as a whole or not at all.
pub fn write_safetensors<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a str, &'a FileTensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let tensors: Vec<(&str, &FileTensor)> = tensors.into_iter().collect();
    // Wide elements first, so that each tensor is aligned to its own element.
    let mut stored: Vec<usize> = (0..tensors.len()).collect();
    stored.sort_by_key(|&i| std::cmp::Reverse(tensors[i].1.dtype().size()));
    let mut offsets = vec![(0, 0); tensors.len()];
    let mut end = 0;
    for &i in &stored {
        let start = end;
        end += tensors[i].1.bytes().len();
        offsets[i] = (start, end);
    }

    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.to_string(), json!(metadata));
    }
    for ((name, tensor), (start, end)) in tensors.iter().zip(offsets) {
        ensure!(*name != METADATA, "{}: no tensor may be named {METADATA}", path.as_ref().display());
        let entry = json!({ "dtype": tensor.dtype().name(), "shape": tensor.shape(), "data_offsets": [start, end] });
        ensure!(header.insert(name.to_string(), entry).is_none(), "{}: two tensors named {name}", path.as_ref().display());
    }
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize((8 + text.len()).next_multiple_of(64) - 8, b' ');

    atomic::write(path.as_ref(), |out| {
        let mut put = |bytes: &[u8]| out.write_all(bytes).context("the disk refused");
        put(&(text.len() as u64).to_le_bytes())?;
        put(&text)?;
        stored.iter().try_for_each(|&i| put(tensors[i].1.bytes()))
    })
}
