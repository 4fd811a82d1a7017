//! One of our pre-training checkpoints in the form in which MAE's program stores and resumes a run.
//!
//!   model       the state dict                        epoch   the last whole epoch, counted from 0; -1 before the first
//!   optimizer   state {i: step, exp_avg, exp_avg_sq}, param_groups [no decay, decay]
//!   args        the settings, hyphens as underscores
//!
//! Parameters are numbered group after group: first those that do not decay (vectors and biases), then the rest, in the order of the state dict;
//! fixed tables have no number.

use super::checkpoint::{self, Header};
use crate::ensure;
use crate::error::{Context, Result};
use crate::formats::{FileTensor, TensorFile, Value};
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;

/// The settings as the programs' own arguments are named.
pub fn args(settings: &Map<String, Json>) -> Result<Value> {
    let renamed = settings.iter().map(|(name, value)| (name.replace('-', "_"), value.clone()));
    Value::from_json(&Json::Object(renamed.collect()))
}

/// `optimizer` and `epoch` of a checkpoint of `masque pretrain mae`, and the micro-batches behind that epoch, which no program can resume in.
pub fn optimizer(file: &TensorFile) -> Result<(Value, i64, u64)> {
    let source = file.source();
    let Header { settings, progress, .. } = checkpoint::header(file)?;
    let updates = file.metadata().get("masque.updates").map_or("{}", String::as_str);
    let updates: BTreeMap<String, u64> =
        serde_json::from_str(updates).with_context(|| format!("{source}: masque.updates cannot be read"))?;
    let whole = file.contains("model.decoder_pred.weight") && file.names().any(|name| name.starts_with("optimizer.exp_avg."));
    ensure!(
        whole && !updates.is_empty(),
        "{source} holds no optimiser state of masque pretrain mae, which --with-optimizer is for; leave it out"
    );

    // In the order of the model, those without decay first.
    let trained = file.tensors().iter().filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?, tensor)));
    let trained = trained.filter(|(name, _)| updates.contains_key(*name));
    let (without, with): (Vec<_>, Vec<_>) = trained.partition(|(name, tensor)| tensor.shape().len() <= 1 || name.ends_with(".bias"));
    let mut state = Vec::new();
    for (index, (name, tensor)) in without.iter().chain(&with).enumerate() {
        let moment = |kind: &str| -> Result<Value> {
            let moment = file.get(&format!("optimizer.{kind}.{name}"))?;
            ensure!(moment.shape() == tensor.shape(), "{source}: {kind} of {name} is {:?}, not {:?}", moment.shape(), tensor.shape());
            Ok(moment.clone().into())
        };
        let step = FileTensor::from_f32(&[updates[*name] as f32], &[])?;
        let entry = Value::dict([("step", step.into()), ("exp_avg", moment("exp_avg")?), ("exp_avg_sq", moment("exp_avg_sq")?)]);
        state.push((Value::from(index as i64), entry));
    }
    let number = |name: &str| settings.get(name).and_then(Json::as_f64);
    let group = |weight_decay: f64, first: usize, count: usize| {
        Value::dict([
            ("weight_decay", Value::from(weight_decay)),
            // The program sets it before each update.
            ("lr", number("lr").unwrap_or(0.0).into()),
            ("betas", Value::Tuple(vec![0.9.into(), 0.95.into()])),
            ("eps", 1e-8.into()),
            ("amsgrad", false.into()),
            ("maximize", false.into()),
            ("foreach", Value::None),
            ("capturable", false.into()),
            ("differentiable", false.into()),
            ("fused", Value::None),
            ("params", Value::List((first..first + count).map(|index| Value::from(index as i64)).collect())),
        ])
    };
    let decay = number("weight-decay").unwrap_or(0.05);
    let groups = vec![group(0.0, 0, without.len()), group(decay, without.len(), with.len())];
    let place = |name: &str| progress.get(name).and_then(Json::as_u64).unwrap_or(0);
    let epoch = i64::try_from(place("epoch")).context("the epoch is too large")? - 1;
    Ok((Value::dict([("state", Value::Dict(state)), ("param_groups", Value::List(groups))]), epoch, place("micro")))
}
