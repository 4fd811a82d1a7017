//! The names that other programs give a vision transformer's tensors, and ours: those of the published MAE and DeiT checkpoints.
//!
//!   official                        timm                       Hugging Face
//!   cls_token, pos_embed            the same                   vit.embeddings.cls_token, vit.embeddings.position_embeddings
//!   patch_embed.proj                the same                   vit.embeddings.patch_embeddings.projection
//!   blocks.0.norm1, norm2           the same                   vit.encoder.layer.0.layernorm_before, layernorm_after
//!   blocks.0.attn.qkv [3 D, D]      the same                   vit.encoder.layer.0.attention.attention.{query, key, value} [D, D]
//!   blocks.0.attn.proj              the same                   vit.encoder.layer.0.attention.output.dense
//!   blocks.0.mlp.fc1, fc2           the same                   vit.encoder.layer.0.intermediate.dense, output.dense
//!   blocks.0.gamma_1, gamma_2       blocks.0.ls1.gamma, ls2    no such thing
//!   norm, head                      the same                   vit.layernorm, classifier
//!   fc_norm                         the same                   no such thing
//!   mask_token, decoder_blocks.0    no such thing              decoder.mask_token, decoder.decoder_layers.0
//!   dist_token, head, head_dist     the same                   deit.embeddings.distillation_token, cls_classifier, distillation_classifier
//!
//! Everything is a function of names and tensors. What has no name on the other side is said, never left out in silence.

use crate::error::{Error, Result};
use crate::formats::{FileTensor, TensorFile};
use crate::{bail, ensure};
use std::collections::HashMap;
use std::fmt;

/// Who names the tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Naming {
    Official,
    Timm,
    HuggingFace,
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Official => "official",
            Self::Timm => "timm's",
            Self::HuggingFace => "Hugging Face's",
        })
    }
}

/// Tensors under other names.
#[derive(Debug)]
pub struct Translated {
    pub file: TensorFile,
    /// How the tensors were named before.
    pub from: Naming,
    /// How many tensors of the result have a name that was not there before.
    pub renamed: usize,
    /// Names that have no counterpart, and why.
    pub dropped: Vec<(String, &'static str)>,
}

/// Names on both sides; those that end in a dot stand for a weight and a bias. Hugging Face's get a model's prefix in front.
const ENCODER: [(&str, &str); 5] = [
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("dist_token", "embeddings.distillation_token"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
];
/// The same without a prefix.
const REST: [(&str, &str); 8] = [
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
    ("head.", "classifier."),
    ("head.", "cls_classifier."),
    ("head_dist.", "distillation_classifier."),
];
/// Inside a block.
const BLOCK: [(&str, &str); 5] = [
    ("norm1.", "layernorm_before."),
    ("attn.proj.", "attention.output.dense."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
];
const BLOCKS: [(&str, &str); 2] = [("blocks.", "encoder.layer."), ("decoder_blocks.", "decoder.decoder_layers.")];
const QKV: [&str; 3] = ["attention.attention.query.", "attention.attention.key.", "attention.attention.value."];
const PREFIXES: [&str; 2] = ["vit.", "deit."];
/// What training wrappers put in front of every name.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];
/// Where tensors stand in a published state dict.
const ORDER: [&str; 15] = [
    "cls_token",
    "pos_embed",
    "dist_token",
    "mask_token",
    "decoder_pos_embed",
    "patch_embed.",
    "blocks.",
    "norm.",
    "decoder_embed.",
    "decoder_blocks.",
    "decoder_norm.",
    "decoder_pred.",
    "head.",
    "head_dist.",
    "fc_norm.",
];
const ORDER_IN_BLOCK: [&str; 8] = ["gamma_1", "gamma_2", "norm1.", "attn.qkv.", "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2."];

/// The projection of pixels in a ConViT, whose tensors have no names but the official ones.
pub const CONVIT: &str = "patch_embed1.proj.weight";

/// Whose names these are; None if no vision transformer's.
pub fn recognise<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Naming> {
    let mut found = None;
    for name in names {
        if name.ends_with("embeddings.patch_embeddings.projection.weight") {
            return Some(Naming::HuggingFace);
        }
        if name.ends_with(".ls1.gamma") {
            return Some(Naming::Timm);
        }
        if name.ends_with("patch_embed.proj.weight") || name.ends_with(CONVIT) {
            found = Some(Naming::Official);
        }
    }
    found
}

/// Gives tensors their official names. A name that nobody knows stays as it is, for the model to refuse.
pub fn to_official(file: &TensorFile) -> Result<Translated> {
    let mut tensors: Vec<(String, FileTensor)> = file.tensors().to_vec();
    for wrapper in WRAPPERS {
        if !tensors.is_empty() && tensors.iter().all(|(name, _)| name.starts_with(wrapper)) {
            tensors.iter_mut().for_each(|(name, _)| *name = name.split_off(wrapper.len()));
        }
    }
    let from = recognise(tensors.iter().map(|(name, _)| name.as_str())).unwrap_or(Naming::Official);
    let mut dropped = Vec::new();
    match from {
        Naming::Official => {}
        Naming::Timm => tensors.iter_mut().for_each(|(name, _)| {
            for (official, timm) in [(".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma")] {
                if let Some(block) = name.strip_suffix(timm) {
                    *name = format!("{block}{official}");
                }
            }
        }),
        Naming::HuggingFace => tensors = from_hugging_face(tensors, &mut dropped)?,
    }
    if from != Naming::Official {
        tensors.sort_by_key(|(name, _)| place(name));
    }
    Translated::new(file, tensors, from, dropped)
}

/// Gives tensors with official names those of another program. What it has no name for is an error, but for what it never needs.
pub fn from_official(file: &TensorFile, to: Naming) -> Result<Translated> {
    let (mut tensors, mut dropped) = (Vec::new(), Vec::new());
    let distilled = file.contains("dist_token");
    ensure!(
        to == Naming::Official || !file.contains(CONVIT),
        "{} is a ConViT, for which there are no {to} names; leave --to-names out, or give --to-names official",
        file.source()
    );
    let talking = file.names().any(|name| name.starts_with("blocks_token_only."));
    for (name, tensor) in file.tensors() {
        match to {
            Naming::Official => tensors.push((name.clone(), tensor.clone())),
            Naming::Timm if name == "mask_token" || name.starts_with("decoder_") => {
                dropped.push((name.clone(), "timm's vision transformer has no decoder"));
            }
            Naming::Timm if name.starts_with("head.0.") || name.starts_with("head.1.") => {
                bail!("{name}: timm's head is one linear layer and cannot hold a linear probe's batch norm")
            }
            // CaiT keeps its gains' names.
            Naming::Timm if talking => tensors.push((name.clone(), tensor.clone())),
            Naming::Timm => tensors.push((name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"), tensor.clone())),
            Naming::HuggingFace => to_hugging_face(name, tensor, distilled, &mut tensors)?,
        }
    }
    Translated::new(file, tensors, Naming::Official, dropped)
}

impl Translated {
    fn new(before: &TensorFile, tensors: Vec<(String, FileTensor)>, from: Naming, dropped: Vec<(String, &'static str)>) -> Result<Self> {
        let renamed = tensors.iter().filter(|(name, _)| !before.contains(name)).count();
        let file = TensorFile::new(before.source(), tensors, before.metadata().clone())?;
        Ok(Self { file, from, renamed, dropped })
    }
}

/// The other side's name by a list of pairs; `forth` goes from official to theirs.
fn look_up(pairs: &[(&str, &str)], name: &str, forth: bool) -> Option<String> {
    pairs.iter().find_map(|&(official, theirs)| {
        let (from, to) = if forth { (official, theirs) } else { (theirs, official) };
        match from.ends_with('.') {
            true => name.strip_prefix(from).filter(|rest| matches!(*rest, "weight" | "bias")).map(|rest| format!("{to}{rest}")),
            false => (name == from).then(|| to.to_string()),
        }
    })
}

/// The number and the rest of what follows `start`.
fn in_block<'a>(name: &'a str, start: &str) -> Option<(usize, &'a str)> {
    let (number, rest) = name.strip_prefix(start)?.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

fn to_hugging_face(name: &str, tensor: &FileTensor, distilled: bool, out: &mut Vec<(String, FileTensor)>) -> Result<()> {
    let prefix = PREFIXES[usize::from(distilled)];
    let encoder = look_up(&ENCODER, name, true).map(|theirs| format!("{prefix}{theirs}"));
    if let Some(theirs) = encoder.or_else(|| look_up(&REST, name, true)) {
        let theirs =
            if distilled { theirs.replacen("classifier.", "cls_classifier.", usize::from(name.starts_with("head."))) } else { theirs };
        out.push((theirs, tensor.clone()));
        return Ok(());
    }
    for (start, theirs) in BLOCKS {
        let Some((block, rest)) = in_block(name, start) else { continue };
        let front = format!("{}{theirs}{block}.", if start == "blocks." { prefix } else { "" });
        if let Some(kind) = rest.strip_prefix("attn.qkv.") {
            for (part, tensor) in QKV.iter().zip(thirds(name, tensor)?) {
                out.push((format!("{front}{part}{kind}"), tensor));
            }
            return Ok(());
        }
        if let Some(rest) = look_up(&BLOCK, rest, true) {
            out.push((format!("{front}{rest}"), tensor.clone()));
            return Ok(());
        }
    }
    let why = match name {
        _ if name.contains(".gamma_") => "it has no layer scale",
        _ if name.starts_with("fc_norm.") => "it classifies by the class token and does not pool",
        _ if name.starts_with("head.") => "its head is one linear layer",
        _ => "it has no such tensor",
    };
    bail!("{name} has no name in Hugging Face's ViT: {why}")
}

fn from_hugging_face(tensors: Vec<(String, FileTensor)>, dropped: &mut Vec<(String, &'static str)>) -> Result<Vec<(String, FileTensor)>> {
    let mut out = Vec::new();
    let mut packed: HashMap<String, [Option<FileTensor>; 3]> = HashMap::new();
    for (name, tensor) in tensors {
        let bare = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(&name);
        if bare.starts_with("pooler.") {
            dropped.push((name, "a pooler follows no published classifier"));
            continue;
        }
        let blocks = BLOCKS.iter().find_map(|&(official, start)| Some((official, in_block(bare, start)?)));
        let official = match blocks {
            None => look_up(&ENCODER, bare, false).or_else(|| look_up(&REST, &name, false)),
            Some((official, (block, rest))) => {
                let front = format!("{official}{block}.");
                if let Some((part, kind)) = QKV.iter().enumerate().find_map(|(i, part)| Some((i, rest.strip_prefix(part)?))) {
                    let parts = packed.entry(format!("{front}attn.qkv.{kind}")).or_default();
                    ensure!(parts[part].replace(tensor).is_none(), "{name} stands twice");
                    continue;
                }
                look_up(&BLOCK, rest, false).map(|rest| format!("{front}{rest}"))
            }
        };
        out.push((official.unwrap_or(name), tensor));
    }
    for (name, parts) in packed {
        let [Some(q), Some(k), Some(v)] = parts else { bail!("{name} cannot be put together: query, key or value is missing") };
        let tensor = stacked(&name, [&q, &k, &v])?;
        out.push((name, tensor));
    }
    Ok(out)
}

/// Queries, keys and values one above the other.
fn stacked(name: &str, parts: [&FileTensor; 3]) -> Result<FileTensor> {
    let [first, ..] = parts;
    let alike = |part: &&FileTensor| part.shape() == first.shape() && part.dtype() == first.dtype();
    ensure!(parts.iter().all(alike), "{name} cannot be put together: query, key and value are {:?}, which are not alike", parts);
    let mut shape = first.shape().to_vec();
    let rows = shape.first_mut().ok_or_else(|| Error::new(format!("{name} cannot be put together of single numbers")))?;
    *rows = rows.checked_mul(3).ok_or_else(|| Error::new(format!("{name} is too large")))?;
    FileTensor::from_bytes(first.dtype(), &shape, parts.iter().flat_map(|part| part.bytes()).copied().collect())
}

/// The inverse of [`stacked`].
fn thirds(name: &str, tensor: &FileTensor) -> Result<[FileTensor; 3]> {
    let mut shape = tensor.shape().to_vec();
    let rows = shape.first_mut().filter(|rows| rows.is_multiple_of(3));
    let rows = rows.ok_or_else(|| Error::new(format!("{name} is {:?}, which is no query, key and value", tensor.shape())))?;
    *rows /= 3;
    let size = tensor.bytes().len() / 3;
    let part = |i: usize| FileTensor::from_bytes(tensor.dtype(), &shape, tensor.bytes()[i * size..(i + 1) * size].to_vec());
    Ok([part(0)?, part(1)?, part(2)?])
}

/// Where an official name stands: its part, its block, its place there, weight before bias.
fn place(name: &str) -> (usize, usize, usize, bool) {
    let part = ORDER.iter().position(|start| name.starts_with(start)).unwrap_or(ORDER.len());
    let block = BLOCKS.iter().find_map(|(start, _)| in_block(name, start));
    let (block, rest) = block.unwrap_or((0, ""));
    let inside = ORDER_IN_BLOCK.iter().position(|start| rest.starts_with(start)).unwrap_or(ORDER_IN_BLOCK.len());
    (part, block, inside, name.ends_with("bias"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
    use crate::nn::decoder::{Decoder, DecoderConfig, DecoderTokens};
    use crate::nn::vit::{DropPath, Position, Tokens, Vit, VitConfig};
    use crate::nn::{Start, presets};
    use crate::param::{Params, ParamsBuilder};
    use crate::rng::Rng;
    use crate::tensor::Dtype;

    fn file(params: &Params) -> TensorFile {
        let tensor = |id| {
            let value = params.value(id);
            (params.name(id).to_string(), FileTensor::from_f32(value.data::<f32>(), value.shape()).unwrap())
        };
        TensorFile::new("memory", params.ids().map(tensor).collect(), Default::default()).unwrap()
    }

    fn small() -> VitConfig {
        VitConfig::new(32, 8, 16, 12, 4)
    }

    fn mae() -> TensorFile {
        let (config, decoder) = (small(), DecoderConfig { width: 8, depth: 2, heads: 2 });
        let mut b = ParamsBuilder::default();
        let tokens = Tokens::new(&mut b, &config).unwrap();
        let decoder_tokens = DecoderTokens::new(&mut b, &decoder, &config).unwrap();
        let vit = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
        Decoder::new(&mut b, &decoder, &vit.config, decoder_tokens, Start::Xavier).unwrap();
        file(&b.build(Dtype::F32, &Rng::new(1)).unwrap())
    }

    fn classifier(vit: VitConfig, pool: Pool, probe: bool) -> TensorFile {
        let mut b = ParamsBuilder::default();
        Classifier::new(&mut b, ClassifierConfig { vit, classes: 5, pool, probe }).unwrap();
        file(&b.build(Dtype::F32, &Rng::new(1)).unwrap())
    }

    fn learned() -> VitConfig {
        VitConfig { position: Position::Learned, ..small() }
    }

    fn deit3() -> VitConfig {
        let drop_path = DropPath::Constant(0.0);
        VitConfig { position: Position::LearnedPatches, layer_scale: Some(1e-4), drop_path, ..small() }
    }

    #[track_caller]
    fn same(a: &TensorFile, b: &TensorFile) {
        assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
        for ((name, a), (_, b)) in a.tensors().iter().zip(b.tensors()) {
            assert!(a.shape() == b.shape() && a.dtype() == b.dtype() && a.bytes() == b.bytes(), "{name}");
        }
    }

    #[test]
    fn names_go_to_hugging_face_and_back_without_loss() {
        let distilled = VitConfig { distillation_token: true, ..learned() };
        for before in [mae(), classifier(learned(), Pool::ClassToken, false), classifier(distilled, Pool::ClassToken, false)] {
            let there = from_official(&before, Naming::HuggingFace).unwrap();
            assert!(there.dropped.is_empty());
            assert_eq!(there.renamed, there.file.tensors().len());
            let back = to_official(&there.file).unwrap();
            assert_eq!((back.from, back.renamed), (Naming::HuggingFace, before.tensors().len()));
            same(&before, &back.file);
        }
    }

    #[test]
    fn names_go_to_timm_and_back_without_loss() {
        let before = classifier(deit3(), Pool::ClassToken, false);
        let there = from_official(&before, Naming::Timm).unwrap();
        assert!(there.file.contains("blocks.11.ls2.gamma") && !there.file.names().any(|name| name.contains("gamma_")));
        assert_eq!(there.renamed, 24);
        same(&before, &to_official(&there.file).unwrap().file);

        let pooled = classifier(learned(), Pool::Mean, false);
        same(&pooled, &from_official(&pooled, Naming::Timm).unwrap().file);
    }

    #[test]
    fn timm_gets_the_encoder_and_is_told_what_was_left_out() {
        let whole = mae();
        let there = from_official(&whole, Naming::Timm).unwrap();
        let (kept, dropped) = (there.file.tensors().len(), there.dropped.len());
        assert_eq!(kept + dropped, whole.tensors().len());
        assert!(there.dropped.iter().all(|(name, _)| name == "mask_token" || name.starts_with("decoder_")));
        assert!(there.file.contains("norm.weight") && !there.file.contains("mask_token"));
    }

    #[test]
    fn what_hugging_face_cannot_say_is_an_error() {
        for (file, why) in [
            (classifier(deit3(), Pool::ClassToken, false), "layer scale"),
            (classifier(learned(), Pool::Mean, false), "does not pool"),
            (classifier(learned(), Pool::ClassToken, true), "one linear layer"),
        ] {
            let said = from_official(&file, Naming::HuggingFace).unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
        }
        let probe = classifier(learned(), Pool::ClassToken, true);
        assert!(from_official(&probe, Naming::Timm).unwrap_err().to_string().contains("batch norm"));
    }

    #[test]
    fn a_wrapper_in_front_of_every_name_is_dropped() {
        let wrapped = |file: &TensorFile, prefix: &str| {
            let tensors = file.tensors().iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone()));
            TensorFile::new("memory", tensors.collect(), Default::default()).unwrap()
        };
        let before = mae();
        same(&before, &to_official(&wrapped(&before, "module.")).unwrap().file);
        same(&before, &to_official(&wrapped(&before, "module._orig_mod.")).unwrap().file);
        let hugging_face = from_official(&before, Naming::HuggingFace).unwrap().file;
        same(&before, &to_official(&wrapped(&hugging_face, "module.")).unwrap().file);
    }

    #[test]
    fn a_pooler_is_dropped_and_a_part_that_is_missing_is_named() {
        let there = from_official(&mae(), Naming::HuggingFace).unwrap().file;
        let with = |extra: Option<&str>, without: &str| {
            let mut tensors = there.tensors().to_vec();
            tensors.retain(|(name, _)| name != without);
            tensors.extend(extra.map(|name| (name.to_string(), FileTensor::from_f32(&[0.0], &[1]).unwrap())));
            to_official(&TensorFile::new("memory", tensors, Default::default()).unwrap())
        };
        let pooled = with(Some("vit.pooler.dense.bias"), "").unwrap();
        assert_eq!(pooled.dropped.len(), 1);
        same(&mae(), &pooled.file);
        let said = with(None, "vit.encoder.layer.3.attention.attention.key.bias").unwrap_err().to_string();
        assert!(said.contains("blocks.3.attn.qkv.bias"), "{said}");
        assert!(with(Some("vit.rel_pos_bias"), "").unwrap().file.contains("vit.rel_pos_bias"));
        let unequal = with(Some("vit.encoder.layer.3.attention.attention.key.bias"), "vit.encoder.layer.3.attention.attention.key.bias");
        assert!(unequal.unwrap_err().to_string().contains("not alike"));
    }

    #[test]
    fn caits_gains_keep_their_names_in_timm() {
        use crate::nn::cait::{Cait, CaitConfig};
        let mut b = ParamsBuilder::default();
        let vit = VitConfig { depth: 2, ..deit3() };
        Cait::new(&mut b, CaitConfig { vit, class_blocks: 2, ..presets::cait_s24(32, 5) }).unwrap();
        let before = file(&b.build(Dtype::F32, &Rng::new(1)).unwrap());
        same(&before, &from_official(&before, Naming::Timm).unwrap().file);
        same(&before, &to_official(&before).unwrap().file);
    }

    #[test]
    fn names_are_recognised() {
        let names = |file: &TensorFile| recognise(file.names());
        assert_eq!(names(&mae()), Some(Naming::Official));
        assert_eq!(names(&from_official(&mae(), Naming::HuggingFace).unwrap().file), Some(Naming::HuggingFace));
        let gains = classifier(deit3(), Pool::ClassToken, false);
        assert_eq!(names(&from_official(&gains, Naming::Timm).unwrap().file), Some(Naming::Timm));
        assert_eq!(recognise(["conv1.weight", "fc.bias"]), None);
    }
}
