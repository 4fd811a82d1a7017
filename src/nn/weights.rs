//! Weights out of a file into a model, whoever wrote and named them.
//!
//! A [`Policy`] says what may be missing, left over or of another shape; whatever it does not expect is an error that names it, and then nothing
//! has changed. What it does expect is told in a [`LoadReport`].
//!
//! A position table for another grid: a learned one is interpolated (rows in front are kept); where the model's is fixed sines, its own stays.
//! A table whose rows in front are not the model's is an error: with DeiT's class row read as a patch, or DeiT-III's patch as a class, everything
//! loads and nothing is right.

use super::contents::Contents;
use super::names::{self, Naming, Translated};
use super::position;
use super::vit::{Position, VitConfig};
use crate::error::{Context, Error, Result};
use crate::formats::{self, Checkpoint, FileDtype, FileTensor, TensorFile};
use crate::param::{ParamId, Params};
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};
use std::path::Path;

/// Which of the weights that a checkpoint keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    Trained,
    /// Their moving averages.
    Averages,
}

/// Our own checkpoints say so under this key of the metadata; their tensors are named `model.*`, `ema.*` and `optimizer.*`.
pub const OWN: &str = "masque.format";

/// The weights in a file: a `.pth`, a safetensors file or a checkpoint of ours. Their names are as they are in the file.
pub fn open(path: impl AsRef<Path>, which: Which) -> Result<TensorFile> {
    let path = path.as_ref();
    let file = formats::open(path)?;
    if let Some(selected) = select(&file, which)? {
        return Ok(selected);
    }
    if which == Which::Trained {
        return Ok(file);
    }
    let averages = if formats::is_pth(path)? { Checkpoint::open(path)?.averages()? } else { None };
    TensorFile::new(file.source(), averages.ok_or_else(|| no_averages(&file))?, Default::default())
}

fn no_averages(file: &TensorFile) -> Error {
    Error::usage(format!("{} keeps no averages of its weights; take its trained weights", file.source()))
}

/// The model's tensors of one of our checkpoints; None of any other file.
fn select(file: &TensorFile, which: Which) -> Result<Option<TensorFile>> {
    if !file.metadata().contains_key(OWN) {
        return Ok(None);
    }
    let prefix = if which == Which::Trained { "model." } else { "ema." };
    let tensors = file.tensors().iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.clone())));
    let tensors: Vec<_> = tensors.collect();
    match which {
        Which::Averages if tensors.is_empty() => return Err(no_averages(file)),
        _ => ensure!(!tensors.is_empty(), "{} is a checkpoint that holds no model", file.source()),
    }
    // No prefixes are left, so it is no checkpoint of ours any more.
    let metadata = file.metadata().iter().filter(|(key, _)| *key != OWN).map(|(key, value)| (key.clone(), value.clone()));
    TensorFile::new(file.source(), tensors, metadata.collect()).map(Some)
}

/// What becomes of a head, and of the norm in front of it that pools, where the file has some that fit the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Head {
    Keep,
    /// The model's own stay as they start.
    Fresh,
    /// The user has to say which: an error, as in the papers' programs.
    Ask,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// Every tensor of the file and of the model, with the same shape.
    Strict,
    /// The same, but a learned position table may be for another grid.
    OtherGrid,
    /// A classifier takes an encoder: a decoder is ignored, so is the norm of a model that pools; a head may be missing, one of other classes is dropped.
    Encoder(Head),
    /// A model to be pre-trained takes all of one; with `fresh_decoder` an encoder alone, whatever head it may have.
    PreTraining { fresh_decoder: bool },
}

/// What was done with every tensor.
#[derive(Clone, Debug)]
pub struct LoadReport {
    pub source: String,
    pub naming: Naming,
    /// Tensors of the model that now have the file's values.
    pub loaded: Vec<String>,
    /// Tensors of the model that are not in the file and stay as they start.
    pub missing: Vec<String>,
    /// Tensors of the file that the model has no use for.
    pub unexpected: Vec<String>,
    /// A sentence for each position table that was for another grid.
    pub reshaped: Vec<String>,
    /// A sentence for each tensor that was left although it has a place.
    pub dropped: Vec<String>,
}

impl LoadReport {
    /// Whether the classifier's head is the file's.
    pub fn has_head(&self) -> bool {
        self.loaded.iter().any(|name| name == "head.weight" || name == "head.1.weight")
    }

    /// A few lines for a person.
    pub fn text(&self) -> String {
        let names = if self.naming == Naming::Official { String::new() } else { format!(" ({} names)", self.naming) };
        let mut lines = vec![format!("{}: {} tensors loaded{names}", self.source, self.loaded.len())];
        lines.extend(self.reshaped.iter().map(|what| format!("  {what}")));
        lines.extend(few(&self.dropped, "; ").map(|what| format!("  dropped: {what}")));
        lines.extend(few(&self.missing, ", ").map(|names| format!("  not in the file, as they start: {names}")));
        lines.extend(few(&self.unexpected, ", ").map(|names| format!("  in the file, of no use here: {names}")));
        lines.join("\n")
    }
}

/// The first of a list, and how many more there are; None of an empty one.
fn few(items: &[String], between: &str) -> Option<String> {
    const MOST: usize = 8;
    let shown = items.iter().take(MOST).cloned().collect::<Vec<_>>().join(between);
    match items.len() {
        0 => None,
        n if n > MOST => Some(format!("{shown} and {} more", n - MOST)),
        _ => Some(shown),
    }
}

/// What serves pre-training alone: a decoder, ConViT's views of its stages' ends, DMJD's heads for visible patches.
fn is_decoder(name: &str) -> bool {
    const STARTS: [&str; 5] = ["decoder_", "stage1_output_decode.", "stage2_output_decode.", "proj_embed.", "predictor."];
    name == "mask_token" || STARTS.iter().any(|start| name.starts_with(start))
}

/// Projections of a student to its teacher's width, which are of use in pre-training alone.
fn is_projection(name: &str) -> bool {
    name.starts_with(PROJECTIONS)
}

/// In front of the names of those projections.
pub const PROJECTIONS: &str = "aligned_feature_projection_heads.";

fn is_head(name: &str) -> bool {
    ["head.", "head_dist.", "fc_norm."].iter().any(|start| name.starts_with(start))
}

/// Where a parameter's new value comes from.
enum Source<'a> {
    File(&'a FileTensor),
    Moved(Vec<f32>),
}

/// What is about to happen, before anything has.
struct Plan<'a> {
    report: LoadReport,
    values: Vec<(ParamId, Source<'a>)>,
    wrong: Vec<String>,
    /// Names that the model has no place for and the policy does not expect.
    foreign: Vec<String>,
    /// Parts of a head that fit and that nobody has decided about.
    undecided: Vec<String>,
}

/// Loads a file's weights into the model whose encoder is `vit`. After an error the model is as it was.
pub fn load(params: &mut Params, vit: &VitConfig, file: &TensorFile, policy: Policy) -> Result<LoadReport> {
    let selected = select(file, Which::Trained)?;
    let Translated { file, from, dropped, .. } = names::to_official(selected.as_ref().unwrap_or(file))?;
    if let Some(text) = other_stages(vit, &file) {
        bail!("{} does not fit the model: {text}", file.source());
    }
    let report = LoadReport {
        source: file.source().to_string(),
        naming: from,
        loaded: Vec::new(),
        missing: Vec::new(),
        unexpected: dropped.into_iter().map(|(name, _)| name).collect(),
        reshaped: Vec::new(),
        dropped: Vec::new(),
    };
    let mut plan = Plan { report, values: Vec::new(), wrong: Vec::new(), foreign: Vec::new(), undecided: Vec::new() };
    plan.take(params, vit, &file, policy)?;
    plan.leave(params, &file, policy);
    let foreign = few(&plan.foreign, ", ").map(|names| format!("the model has no {names}"));
    let wrong: Vec<String> = few(&plan.wrong, "; ").into_iter().chain(foreign).collect();
    ensure!(wrong.is_empty(), "{} does not fit the model{}: {}", file.source(), sizes(vit, &file), wrong.join("; "));
    if let Some(parts) = few(&plan.undecided, ", ") {
        bail!("{} already has a head that fits the model ({parts}); say by --head keep or --head fresh what becomes of it", file.source());
    }
    for (id, source) in &plan.values {
        if let Source::File(tensor) = source {
            let finite = tensor.to_f32()?.iter().all(|x| x.is_finite());
            ensure!(finite, "{}: {} holds numbers that are not finite; such weights are of no use", file.source(), params.name(*id));
        }
    }
    for (id, source) in plan.values {
        let (name, shape) = (params.name(id).to_string(), params.value(id).shape());
        let value = match &source {
            Source::Moved(numbers) => Tensor::from_slice(shape, numbers),
            Source::File(tensor) if params.dtype() == Dtype::F64 => Tensor::from_slice(shape, &tensor.to_f64()?),
            Source::File(tensor) => Tensor::from_slice(shape, &tensor.to_f32()?),
        };
        params.set_value(id, &value?).with_context(|| format!("{}: {name}", file.source()))?;
        plan.report.loaded.push(name);
    }
    Ok(plan.report)
}

impl<'a> Plan<'a> {
    /// Finds a value for every parameter.
    fn take(&mut self, params: &Params, vit: &VitConfig, file: &'a TensorFile, policy: Policy) -> Result<()> {
        let optional = |name: &str| match policy {
            Policy::Strict | Policy::OtherGrid => false,
            Policy::Encoder(_) => is_head(name),
            Policy::PreTraining { fresh_decoder } => fresh_decoder && is_decoder(name),
        };
        for id in params.ids() {
            let (name, shape) = (params.name(id), params.value(id).shape());
            if !file.contains(name) {
                let (list, text) = match optional(name) {
                    true => (&mut self.report.missing, name.to_string()),
                    false => (&mut self.wrong, format!("{name} is missing")),
                };
                list.push(text);
                continue;
            }
            let tensor = file.get(name)?;
            let fits = tensor.shape() == shape;
            match policy {
                _ if tensor.dtype() == FileDtype::Bool => self.wrong.push(format!("{name} holds no numbers but true and false")),
                Policy::Encoder(head) if is_head(name) => match head {
                    _ if !fits => self.report.dropped.push(format!("{name} is {:?}, the model wants {shape:?}", tensor.shape())),
                    Head::Keep => self.values.push((id, Source::File(tensor))),
                    Head::Fresh => self.report.dropped.push(format!("{name}, for a fresh one")),
                    Head::Ask => self.undecided.push(name.to_string()),
                },
                _ if fits => self.values.push((id, Source::File(tensor))),
                Policy::OtherGrid | Policy::Encoder(_) | Policy::PreTraining { .. } if name.ends_with("pos_embed") => {
                    self.table(id, name, shape, tensor, vit)?
                }
                _ => self.wrong.push(format!("{name} is {:?}, the model wants {shape:?}", tensor.shape())),
            }
        }
        Ok(())
    }

    /// A position table of another shape than the model's.
    fn table(&mut self, id: ParamId, name: &str, shape: &[usize], tensor: &FileTensor, vit: &VitConfig) -> Result<()> {
        let (&[1, rows, width], &[_, own_rows, own_width]) = (tensor.shape(), shape) else {
            self.wrong.push(format!("{name} is {:?}, the model wants {shape:?}", tensor.shape()));
            return Ok(());
        };
        let [h, w] = vit.grid();
        let extra = own_rows.checked_sub(h * w).ok_or_else(|| Error::new(format!("{name} is not for {h} x {w} patches in the model")))?;
        let Some((old_extra, side)) = position::square(rows).filter(|_| width == own_width) else {
            self.wrong.push(format!("{name} is {:?}, the model wants {shape:?}", tensor.shape()));
            return Ok(());
        };
        if old_extra != extra {
            let whose = |extra| {
                ["patches alone", "a class token and patches", "a class and a distillation token and patches"][usize::min(extra, 2)]
            };
            let (theirs, own) = (whose(old_extra), whose(extra));
            self.wrong
                .push(format!("{name} has {rows} rows, for {theirs} ({side} x {side}), while the model has rows for {own} ({h} x {w})"));
            return Ok(());
        }
        let fixed = name == "decoder_pos_embed" || vit.position == Position::SinCos;
        if fixed {
            self.report.reshaped.push(format!("{name}: {side} x {side} patches in the file, the model keeps its own sines for {h} x {w}"));
            return Ok(());
        }
        let moved = position::interpolate(&tensor.to_f32()?, width, old_extra, [side, side], [h, w])?;
        self.values.push((id, Source::Moved(moved)));
        self.report.reshaped.push(format!("{name}: interpolated from {side} x {side} to {h} x {w} patches"));
        Ok(())
    }

    /// Goes through what the model has no parameter for.
    fn leave(&mut self, params: &Params, file: &TensorFile, policy: Policy) {
        let pools = params.find("norm.weight").is_err();
        for name in file.names().filter(|name| params.find(name).is_err()) {
            match policy {
                _ if is_projection(name) => self.report.unexpected.push(name.to_string()),
                Policy::Encoder(_) if is_decoder(name) || (pools && name.starts_with("norm.")) => {
                    self.report.unexpected.push(name.to_string());
                }
                Policy::Encoder(_) | Policy::PreTraining { fresh_decoder: true } if is_head(name) => {
                    self.report.dropped.push(format!("{name}, of another kind of head"));
                }
                _ => self.foreign.push(format!("{name:?}")),
            }
        }
    }
}

/// Why convolution stages do not fit, where that says more than a list of tensors.
fn other_stages(vit: &VitConfig, file: &TensorFile) -> Option<String> {
    let found = Contents::of(file).ok()?;
    match (&found.stages, &vit.stages) {
        (Some(_), None) => Some("it is a ConViT, the model a ViT without convolution stages; give the ConViT's name by --model".into()),
        (None, Some(_)) => Some("it is a ViT without convolution stages, the model a ConViT; give the ViT's name by --model".into()),
        (Some(theirs), Some(own)) if theirs.widths == own.widths && theirs.hidden != own.hidden() => {
            let kind = |ratios: [f64; 2]| match ratios {
                [8.0, 8.0] => " as DMJD's",
                [4.0, 4.0] => " as ConvMAE's",
                _ => "",
            };
            let ([a, b], [c, d]) = (theirs.ratios(), own.mlp_ratios);
            let (whose, ours) = (kind([a, b]), kind([c, d]));
            let hint = found.size().map_or(String::new(), |size| format!("; give --model {size}"));
            Some(format!("its convolution stages have MLP ratios of {a} and {b}{whose}, the model's of {c} and {d}{ours}{hint}"))
        }
        _ => None,
    }
}

/// How the file's sizes differ from the model's.
fn sizes(vit: &VitConfig, file: &TensorFile) -> String {
    let Ok(found) = Contents::of(file) else { return String::new() };
    let mut differ = Vec::new();
    for (what, theirs, own) in
        [("wide", found.width, vit.width), ("blocks deep", found.depth, vit.depth), ("pixels a patch side", found.patch, vit.patch)]
    {
        if theirs != own {
            differ.push(format!("{theirs} {what} instead of {own}"));
        }
    }
    let scaled = match (found.layer_scale, vit.layer_scale.is_some()) {
        (true, false) => ", with the layer scale of DeiT-III, which the model lacks",
        (false, true) => ", without the layer scale that the model has",
        _ => "",
    };
    if differ.is_empty() && scaled.is_empty() { String::new() } else { format!(" (it is {}{scaled})", differ.join(", ")) }
}
