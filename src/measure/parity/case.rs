//! A case as it lies on disk: JSON that describes it and named tensors, every field checked before it is used.

use crate::error::{Context, Error, Result};
use crate::formats::{self, FileTensor, TensorFile};
use crate::tensor::{Device, Dtype, Tensor};
use crate::{bail, ensure};
use serde_json::{Map, Value as Json};
use std::path::Path;

/// No size in a description is larger.
const MOST: usize = 1 << 20;
/// No case attends over more tokens.
const MOST_TOKENS: usize = 4096;

pub struct Case {
    pub file: TensorFile,
    json: Json,
    /// Where it is computed.
    pub device: Device,
}

impl Case {
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let file = formats::open(path)?;
        let text = file.metadata().get("case").ok_or_else(|| Error::new("its header has no entry \"case\""))?;
        let json: Json = serde_json::from_str(text).context("its entry \"case\" is not JSON")?;
        let case = Self { file, json, device: device.clone() };
        let schema = case.fields()?.size("schema")?;
        ensure!(schema == 1, "its schema is {schema}, only 1 is known");
        Ok(case)
    }

    /// The description itself.
    pub fn fields(&self) -> Result<Fields<'_>> {
        Fields::of(&self.json, "the case")
    }

    /// One of its objects: `model`, `options`, `optim`.
    pub fn part(&self, name: &str) -> Result<Fields<'_>> {
        Fields::of(self.json.get(name).ok_or_else(|| Error::new(format!("the case has no field {name:?}")))?, name)
    }

    /// Sub-cases of an operation: `options.specs`.
    pub fn specs(&self) -> Result<Vec<Fields<'_>>> {
        self.part("options")?.objects("specs")
    }

    /// The `out/` tensors in the order in which they are computed.
    pub fn outputs(&self) -> Result<Vec<&str>> {
        let names = self.fields()?.list("outputs")?;
        names.iter().map(|name| name.as_str().ok_or_else(|| Error::new(format!("outputs: {name} is no name")))).collect()
    }

    /// Float tensor `name` as the engine's, on the device.
    pub fn tensor(&self, name: &str, dtype: Dtype) -> Result<Tensor> {
        let stored = self.file.get(name)?;
        let read = || Tensor::from_slice(stored.shape(), &self.numbers(name)?)?.cast(dtype)?.on(&self.device);
        read().with_context(|| format!("tensor {name}"))
    }

    /// The same, which must have four axes.
    pub fn images(&self, name: &str, dtype: Dtype) -> Result<Tensor> {
        let images = self.tensor(name, dtype)?;
        ensure!(images.shape().len() == 4 && images.numel() > 0, "{name} is {images:?} but [B, C, H, W] is needed");
        Ok(images)
    }

    pub fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        self.file.get(name)?.to_f64().with_context(|| format!("tensor {name}"))
    }

    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        self.file.get(name)?.to_f32().with_context(|| format!("tensor {name}"))
    }

    pub fn labels(&self, name: &str) -> Result<Vec<u32>> {
        let labels = self.file.get(name)?.to_i64().with_context(|| format!("tensor {name}"))?;
        labels.into_iter().map(|label| u32::try_from(label).with_context(|| format!("{name} holds {label}"))).collect()
    }

    /// The weights of a model, `w/`, or of its teacher, `tw/`, without that prefix.
    pub fn weights(&self, prefix: &str) -> impl Iterator<Item = (&str, &FileTensor)> {
        self.file.tensors().iter().filter_map(move |(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)))
    }

    /// Refuses a model larger than the weights that the file holds under a prefix, before anything is allocated; a part is sizes to be multiplied.
    pub fn check_size(&self, prefix: &str, parts: &[&[usize]]) -> Result<()> {
        let product = |part: &&[usize]| part.iter().fold(1u128, |product, &size| product.saturating_mul(size as u128));
        let wanted = parts.iter().map(product).fold(0u128, u128::saturating_add);
        let held: u128 = self.weights(prefix).map(|(_, tensor)| tensor.numel() as u128).sum();
        ensure!(wanted <= held, "the model described has at least {wanted} weights, the file holds {held}");
        Ok(())
    }
}

/// Refuses sequences that would need too much scratch memory.
pub fn check_tokens(tokens: usize) -> Result<()> {
    ensure!(tokens <= MOST_TOKENS, "{tokens} tokens are more than a case may have, {MOST_TOKENS}");
    Ok(())
}

/// The fields of one JSON object; what is null counts as absent.
#[derive(Clone)]
pub struct Fields<'a> {
    what: String,
    map: &'a Map<String, Json>,
}

impl<'a> Fields<'a> {
    fn of(json: &'a Json, what: &str) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| Error::new(format!("{what} is no JSON object")))?;
        Ok(Self { what: what.to_string(), map })
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub fn get(&self, key: &str) -> Option<&'a Json> {
        self.map.get(key).filter(|json| !json.is_null())
    }

    /// The value under a key, null included.
    pub fn raw(&self, key: &str) -> Option<&'a Json> {
        self.map.get(key)
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn need(&self, key: &str) -> Result<&'a Json> {
        self.get(key).ok_or_else(|| Error::new(format!("{} has no field {key:?}", self.what)))
    }

    fn wrong<T>(&self, key: &str, json: &Json, wanted: &str) -> Result<T> {
        let shown: String = json.to_string().chars().take(60).collect();
        bail!("{}.{key} is {shown} but {wanted} is needed", self.what)
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        let json = self.need(key)?;
        match size(json) {
            Some(size) => Ok(size),
            None => self.wrong(key, json, "a whole number from 0 to 2^20"),
        }
    }

    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.has(key) { self.size(key) } else { Ok(default) }
    }

    /// Height and width, given as one number or a list of two.
    pub fn sides(&self, key: &str) -> Result<[usize; 2]> {
        let json = self.need(key)?;
        self.sides_of(key, json)
    }

    /// The same of an entry of a list.
    pub fn sides_at(&self, key: &str, at: usize) -> Result<[usize; 2]> {
        let json = self.list(key)?.get(at).ok_or_else(|| Error::new(format!("{}.{key} has no entry {at}", self.what)))?;
        self.sides_of(key, json)
    }

    fn sides_of(&self, key: &str, json: &Json) -> Result<[usize; 2]> {
        let sides = match json.as_array().map(Vec::as_slice) {
            Some([height, width]) => size(height).zip(size(width)),
            Some([one]) => size(one).zip(size(one)),
            _ => size(json).zip(size(json)),
        };
        match sides {
            Some((height, width)) => Ok([height, width]),
            None => self.wrong(key, json, "a whole number, or height and width,"),
        }
    }

    /// A list of whole numbers.
    pub fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let list = self.list(key)?;
        list.iter().map(|json| size(json).map_or_else(|| self.wrong(key, json, "a whole number from 0 to 2^20"), Ok)).collect()
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        let json = self.need(key)?;
        match json.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(number),
            None => self.wrong(key, json, "a number"),
        }
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        if self.has(key) { self.number(key) } else { Ok(default) }
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        let Some(json) = self.get(key) else { return Ok(default) };
        match json.as_bool() {
            Some(flag) => Ok(flag),
            None => self.wrong(key, json, "true or false"),
        }
    }

    pub fn text(&self, key: &str) -> Result<&'a str> {
        let json = self.need(key)?;
        match json.as_str() {
            Some(text) => Ok(text),
            None => self.wrong(key, json, "a string"),
        }
    }

    pub fn list(&self, key: &str) -> Result<&'a [Json]> {
        let json = self.need(key)?;
        match json.as_array() {
            Some(list) => Ok(list),
            None => self.wrong(key, json, "a list"),
        }
    }

    pub fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let list = self.list(key)?;
        list.iter().map(|json| json.as_f64().map_or_else(|| self.wrong(key, json, "a number"), Ok)).collect()
    }

    pub fn objects(&self, key: &str) -> Result<Vec<Fields<'a>>> {
        let list = self.list(key)?.iter().enumerate();
        list.map(|(i, json)| Fields::of(json, &format!("{}.{key}[{i}]", self.what))).collect()
    }

    pub fn object(&self, key: &str) -> Result<Fields<'a>> {
        Fields::of(self.need(key)?, &format!("{}.{key}", self.what))
    }
}

fn size(json: &Json) -> Option<usize> {
    json.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size <= MOST)
}
