//! What a `.pth` file holds besides tensors, as a plain tree.

use std::sync::Arc;

use serde_json::{Map, Number, Value as Json};

use super::{FileDtype, FileTensor, quoted};
use crate::bail;
use crate::error::{Context, Error, Result};

/// Python data, inert. Nothing here can be called.
#[derive(Clone, Debug)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// An integer outside i64: two's complement, little-endian, without redundant sign bytes.
    BigInt(Arc<[u8]>),
    Float(f64),
    Str(Arc<str>),
    Bytes(Arc<[u8]>),
    List(Vec<Value>),
    Tuple(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    /// An `argparse.Namespace`.
    Namespace(Vec<(Arc<str>, Value)>),
    Tensor(Arc<StoredTensor>),
    /// The name of an allowed class that stands as a value.
    Global(&'static str),
}

/// A tensor, and how the file stored it.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    pub tensor: FileTensor,
    /// Tensors with the same number share their storage; None for a tensor that does not come from a file.
    pub storage: Option<usize>,
    /// In elements, as in the file; `tensor` itself is contiguous.
    pub strides: Vec<usize>,
}

impl Value {
    /// A dict with string keys.
    pub fn dict<K: Into<Arc<str>>>(pairs: impl IntoIterator<Item = (K, Value)>) -> Self {
        Self::Dict(pairs.into_iter().map(|(key, value)| (Self::Str(key.into()), value)).collect())
    }

    /// The entry of a dict or namespace under a string key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Self::Dict(pairs) => pairs.iter().find(|(k, _)| matches!(k, Self::Str(k) if &**k == key)).map(|(_, value)| value),
            Self::Namespace(pairs) => pairs.iter().find(|(k, _)| &**k == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// What it is, in Python's words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "a bool",
            Self::Int(_) | Self::BigInt(_) => "an int",
            Self::Float(_) => "a float",
            Self::Str(_) => "a str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "a list",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dict",
            Self::Namespace(_) => "a Namespace",
            Self::Tensor(_) => "a tensor",
            Self::Global(_) => "a class",
        }
    }

    /// The entries of a dict or namespace as JSON; see [`Value::to_json`].
    pub fn to_json_map(&self) -> Result<Map<String, Json>> {
        match self.to_json()? {
            Json::Object(map) => Ok(map),
            _ => bail!("expected a dict or a Namespace, found {}", self.kind()),
        }
    }

    /// JSON with tuples as lists, one-element tensors as numbers, number keys as strings, and the floats that JSON lacks as the
    /// strings `inf`, `-inf` and `nan`.
    pub fn to_json(&self) -> Result<Json> {
        Ok(match self {
            Self::None => Json::Null,
            Self::Bool(b) => Json::Bool(*b),
            Self::Int(i) => Json::from(*i),
            Self::BigInt(bytes) => match bytes.as_ref() {
                [low @ .., 0] if low.len() == 8 => Json::from(low.iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte))),
                _ => bail!("an integer of {} bytes is too large", bytes.len()),
            },
            Self::Float(x) => float_to_json(*x),
            Self::Str(s) => Json::from(&**s),
            Self::List(items) | Self::Tuple(items) => Json::Array(items.iter().map(Self::to_json).collect::<Result<_>>()?),
            Self::Dict(pairs) => {
                let mut map = Map::new();
                for (key, value) in pairs {
                    let key = match key.to_json()? {
                        Json::String(key) => key,
                        key @ (Json::Null | Json::Bool(_) | Json::Number(_)) => key.to_string(),
                        _ => bail!("a dict has {} as a key", key.kind()),
                    };
                    let json = value.to_json().with_context(|| format!("entry {}", quoted(&key)))?;
                    if map.contains_key(&key) {
                        bail!("a dict has two keys that read {}", quoted(&key));
                    }
                    map.insert(key, json);
                }
                Json::Object(map)
            }
            Self::Namespace(pairs) => Json::Object(
                pairs
                    .iter()
                    .map(|(key, value)| Ok((key.to_string(), value.to_json().with_context(|| format!("entry {}", quoted(key)))?)))
                    .collect::<Result<_>>()?,
            ),
            Self::Tensor(stored) if stored.tensor.numel() == 1 => match stored.tensor.dtype() {
                FileDtype::F64 | FileDtype::F32 | FileDtype::F16 | FileDtype::BF16 => float_to_json(stored.tensor.to_f64()?[0]),
                FileDtype::Bool => Json::Bool(stored.tensor.bytes()[0] != 0),
                _ => Json::from(stored.tensor.to_i64()?[0]),
            },
            Self::Bytes(_) | Self::Tensor(_) | Self::Global(_) => bail!("{} cannot be written as JSON", self.kind()),
        })
    }

    /// The inverse of [`Value::to_json`] as far as JSON goes; an unsigned integer above i64 is an error.
    pub fn from_json(json: &Json) -> Result<Self> {
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(b) => Self::Bool(*b),
            Json::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(i), _) => Self::Int(i),
                (None, Some(x)) if !number.is_u64() => Self::Float(x),
                _ => return Err(Error::new(format!("the number {number} does not fit 64 bits"))),
            },
            Json::String(s) => Self::from(s.as_str()),
            Json::Array(items) => Self::List(items.iter().map(Self::from_json).collect::<Result<_>>()?),
            Json::Object(map) => {
                let pairs: Result<Vec<_>> = map.iter().map(|(key, value)| Ok((key.as_str(), Self::from_json(value)?))).collect();
                Self::dict(pairs?)
            }
        })
    }
}

fn float_to_json(x: f64) -> Json {
    match Number::from_f64(x) {
        Some(number) => Json::Number(number),
        None if x.is_nan() => Json::from("nan"),
        None if x > 0.0 => Json::from("inf"),
        None => Json::from("-inf"),
    }
}

impl From<FileTensor> for Value {
    fn from(tensor: FileTensor) -> Self {
        let strides = contiguous_strides(tensor.shape());
        Self::Tensor(Arc::new(StoredTensor { tensor, storage: None, strides }))
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Self::Str(s.into())
    }
}

impl From<i64> for Value {
    fn from(i: i64) -> Self {
        Self::Int(i)
    }
}

impl From<f64> for Value {
    fn from(x: f64) -> Self {
        Self::Float(x)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

/// Row-major strides in elements, as PyTorch counts them: an empty dimension counts as one.
pub(super) fn contiguous_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
    }
    strides
}
