//! Checkpoint files beside what must come out of reading them.

use super::case::Case;
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::formats::{Checkpoint, FileDtype, FileTensor};
use crate::tensor::Device;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::Path;

/// Reads `path` and compares with `<stem>.expected.safetensors` or `<stem>.expected.json` beside it. Answers how many tensors were compared.
pub fn run(path: &Path) -> Result<usize> {
    let beside = |ending: &str| path.with_extension(format!("expected.{ending}"));
    let (tensors, text) = (beside("safetensors"), beside("json"));
    if !path.exists() {
        bail!("there is no {} beside its expectation", path.display());
    }
    if tensors.exists() {
        return loads(path, &Case::open(&tensors, &Device::Cpu).context("its expectation cannot be read")?);
    }
    let text = std::fs::read_to_string(&text).with_context(|| format!("cannot read {}", text.display()))?;
    let expected: Json = serde_json::from_str(&text).context("its expectation is not JSON")?;
    let opened = Checkpoint::open(path);
    match expected.get("expect").and_then(Json::as_str) {
        Some("either") => {}
        Some("refuse") if opened.is_err() => {}
        Some("refuse") => bail!("it was read without an error but must be refused: {}", expected["reason"]),
        other => bail!("its expectation is {other:?}; there are refuse and either"),
    }
    Ok(0)
}

fn loads(path: &Path, case: &Case) -> Result<usize> {
    let fields = case.fields()?;
    let expect = fields.text("expect")?;
    if expect != "load" {
        bail!("its expectation is {expect:?} where load is needed");
    }
    let checkpoint = Checkpoint::open(path)?;
    let model = checkpoint.stored_state_dict()?;
    let mut found: BTreeMap<String, FileTensor> = BTreeMap::new();
    found.extend(model.iter().map(|(key, stored)| (format!("model/{key}"), stored.tensor.clone())));
    for (index, entry) in checkpoint.optimizer_state()? {
        found.extend(entry.into_iter().map(|(field, tensor)| (format!("optimizer/state/{index}/{field}"), tensor)));
    }
    for (name, wanted) in case.file.tensors() {
        let Some(tensor) = found.remove(name) else { bail!("it holds no {name}") };
        same(name, &tensor, wanted)?;
    }
    if let Some(name) = found.keys().next() {
        bail!("it holds {name}, which is not expected");
    }
    let strides = model.iter().map(|(key, stored)| (key.clone(), Json::from(stored.strides.clone()))).collect();
    let facts: [(&str, Json); 7] = [
        ("top_level_keys", checkpoint.top_level_keys().into()),
        ("epoch", checkpoint.epoch()?.into()),
        ("args", checkpoint.args()?.into()),
        ("scaler", checkpoint.scaler()?.into()),
        ("param_groups", checkpoint.param_groups()?.into_iter().map(Json::from).collect()),
        ("tied", checkpoint.tied()?.into()),
        ("strides", Json::Object(strides)),
    ];
    let described = case.fields()?;
    for (name, found) in facts {
        // What is null in the description is a value here, not an absence.
        let Some(wanted) = described.raw(name) else { continue };
        if found != *wanted {
            bail!("{name} is {} but {} is expected", short(&found), short(wanted));
        }
    }
    Ok(case.file.tensors().len())
}

/// The same dtype, shape and bytes, where one NaN is as good as another. A step counter may be a plain integer.
fn same(name: &str, found: &FileTensor, wanted: &FileTensor) -> Result<()> {
    let counter = name.ends_with("/step") && found.shape() == wanted.shape() && found.numel() == 1;
    if counter && found.to_f64()? == wanted.to_f64()? {
        return Ok(());
    }
    if found.dtype() != wanted.dtype() || found.shape() != wanted.shape() {
        bail!("{name} is {found:?} but {wanted:?} is expected");
    }
    if found.bytes() == wanted.bytes() {
        return Ok(());
    }
    let float = matches!(wanted.dtype(), FileDtype::F64 | FileDtype::F32 | FileDtype::F16 | FileDtype::BF16);
    let (a, b) = if float { (found.to_f64()?, wanted.to_f64()?) } else { (numbers(found)?, numbers(wanted)?) };
    let differ = a.iter().zip(&b).position(|(a, b)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
    match differ {
        None if float => Ok(()),
        at => {
            let at = at.ok_or_else(|| Error::new(format!("{name} differs in its bytes")))?;
            bail!("{name} has {:e} at place {at} but {:e} is expected", a[at], b[at])
        }
    }
}

fn numbers(tensor: &FileTensor) -> Result<Vec<f64>> {
    Ok(tensor.to_i64()?.into_iter().map(|integer| integer as f64).collect())
}

fn short(json: &Json) -> String {
    let text = json.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
