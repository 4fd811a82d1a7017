//! Writes a tree as a pickle of protocol 2, with the few opcodes that `torch.load(weights_only=True)` accepts.

use std::collections::HashMap;

use super::pickle::storage_class;
use super::value::contiguous_strides;
use super::{FileTensor, Value, quoted};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};

const DEEPEST: usize = 100;

/// The pickle, and the storages that it mentions as "0", "1", and so on.
pub(super) fn write(root: &Value) -> Result<(Vec<u8>, Vec<FileTensor>)> {
    let mut writer = Writer { out: vec![0x80, 2], storages: Vec::new(), by_bytes: HashMap::new() };
    writer.value(root, 0)?;
    writer.out.push(b'.');
    Ok((writer.out, writer.storages))
}

struct Writer {
    out: Vec<u8>,
    storages: Vec<FileTensor>,
    /// Tensors whose bytes are the same memory share a storage, so tied weights stay tied.
    by_bytes: HashMap<(usize, usize, &'static str), usize>,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        ensure!(depth < DEEPEST, "the data are nested more than {DEEPEST} deep");
        match value {
            Value::None => self.out.push(b'N'),
            Value::Bool(b) => self.out.push(if *b { 0x88 } else { 0x89 }),
            Value::Int(i) => self.int(*i),
            Value::BigInt(bytes) => {
                let len = i32::try_from(bytes.len()).context("an integer is too long")?;
                self.out.push(0x8b);
                self.out.extend(len.to_le_bytes());
                self.out.extend(bytes.iter());
            }
            Value::Float(x) => {
                self.out.push(b'G');
                self.out.extend(x.to_be_bytes());
            }
            Value::Str(text) => self.str(text)?,
            Value::List(items) => {
                self.out.extend(b"](");
                items.iter().try_for_each(|item| self.value(item, depth + 1))?;
                self.out.push(b'e');
            }
            Value::Tuple(items) => {
                self.out.push(b'(');
                items.iter().try_for_each(|item| self.value(item, depth + 1))?;
                self.out.push(b't');
            }
            Value::Dict(pairs) => {
                self.out.extend(b"}(");
                for (key, value) in pairs {
                    self.value(key, depth + 1)?;
                    self.value(value, depth + 1).with_context(|| match key {
                        Value::Str(key) => format!("entry {}", quoted(key)),
                        key => format!("an entry under {}", key.kind()),
                    })?;
                }
                self.out.push(b'u');
            }
            Value::Namespace(pairs) => {
                self.out.extend(b"cargparse\nNamespace\n)\x81}(");
                for (key, value) in pairs {
                    self.str(key)?;
                    self.value(value, depth + 1)?;
                }
                self.out.extend(b"ub");
            }
            Value::Tensor(stored) => self.tensor(&stored.tensor)?,
            Value::Bytes(_) | Value::Global(_) => bail!("{} has no place in a checkpoint", value.kind()),
        }
        Ok(())
    }

    fn int(&mut self, i: i64) {
        if let Ok(small) = u8::try_from(i) {
            self.out.extend([b'K', small]);
        } else if let Ok(small) = i32::try_from(i) {
            self.out.push(b'J');
            self.out.extend(small.to_le_bytes());
        } else {
            self.out.extend([0x8a, 8]);
            self.out.extend(i.to_le_bytes());
        }
    }

    fn size(&mut self, size: usize) -> Result<()> {
        self.int(i64::try_from(size).context("a size is too large")?);
        Ok(())
    }

    fn sizes(&mut self, sizes: &[usize]) -> Result<()> {
        self.out.push(b'(');
        sizes.iter().try_for_each(|&size| self.size(size))?;
        self.out.push(b't');
        Ok(())
    }

    fn str(&mut self, text: &str) -> Result<()> {
        let len = u32::try_from(text.len()).context("a string is too long")?;
        self.out.push(b'X');
        self.out.extend(len.to_le_bytes());
        self.out.extend(text.as_bytes());
        Ok(())
    }

    fn tensor(&mut self, tensor: &FileTensor) -> Result<()> {
        let dtype = tensor.dtype();
        let class = storage_class(dtype).ok_or_else(|| Error::new(format!("a .pth file cannot hold {dtype} tensors")))?;
        let bytes = tensor.bytes();
        let place = (bytes.as_ptr() as usize, bytes.len(), class);
        let storage = match self.by_bytes.get(&place) {
            Some(&storage) if !bytes.is_empty() => storage,
            _ => {
                self.storages.push(tensor.clone());
                self.by_bytes.insert(place, self.storages.len() - 1);
                self.storages.len() - 1
            }
        };

        self.out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.str("storage")?;
        self.out.extend(format!("c{}\n", class.replacen('.', "\n", 1)).as_bytes());
        self.str(&storage.to_string())?;
        self.str("cpu")?;
        self.size(tensor.numel())?;
        self.out.extend(b"tQ");
        self.int(0);
        self.sizes(tensor.shape())?;
        self.sizes(&contiguous_strides(tensor.shape()))?;
        self.out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        Ok(())
    }
}
