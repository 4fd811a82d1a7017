//! Which parameters decay, and how fast each learns.
//!
//! The order of the groups and of the parameters in them is that of the published checkpoints, whose optimiser states are numbered by it.

use crate::ensure;
use crate::error::{Context, Result};
use crate::param::{ParamId, Params};

#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub name: String,
    pub weight_decay: f64,
    pub lr_scale: f64,
    pub params: Vec<ParamId>,
}

/// Everything that is trained, treated alike.
pub fn all(params: &Params, weight_decay: f64) -> Vec<Group> {
    vec![Group { name: "all".into(), weight_decay, lr_scale: 1.0, params: params.trained().collect() }]
}

/// First what does not decay (vectors, names that end in ".bias", and the names listed), then the rest.
pub fn by_decay(params: &Params, weight_decay: f64, no_decay: &[&str]) -> Vec<Group> {
    let exempt = |id: &ParamId| {
        let name = params.name(*id);
        params.value(*id).shape().len() <= 1 || name.ends_with(".bias") || no_decay.contains(&name)
    };
    let (without, with) = params.trained().partition(exempt);
    vec![
        Group { name: "no_decay".into(), weight_decay: 0.0, lr_scale: 1.0, params: without },
        Group { name: "decay".into(), weight_decay, lr_scale: 1.0, params: with },
    ]
}

/// Layers numbered from 0 (the embeddings) to `last` (the head), each learning `decay` times as fast as the one after it.
pub struct LayerDecay<'a> {
    pub weight_decay: f64,
    pub decay: f64,
    pub last: usize,
    /// Names that do not decay; neither do vectors.
    pub no_decay: &'a [&'a str],
}

impl LayerDecay<'_> {
    /// One group for each layer and kind of decay, in order of first appearance; `layer` says where a name belongs.
    pub fn groups(&self, params: &Params, layer: impl Fn(&str) -> Result<usize>) -> Result<Vec<Group>> {
        ensure!(self.decay > 0.0 && self.decay.is_finite(), "a layer decay of {} is not a positive number", self.decay);
        let mut groups: Vec<Group> = Vec::new();
        for id in params.trained() {
            let name = params.name(id);
            let layer = layer(name)?;
            ensure!(layer <= self.last, "layer decay: {name} is in layer {layer}, beyond the last, {}", self.last);
            let exempt = params.value(id).shape().len() <= 1 || self.no_decay.contains(&name);
            let (kind, weight_decay) = if exempt { ("no_decay", 0.0) } else { ("decay", self.weight_decay) };
            let group = format!("layer_{layer}_{kind}");
            match groups.iter_mut().find(|known| known.name == group) {
                Some(known) => known.params.push(id),
                None => {
                    let lr_scale = self.decay.powf((self.last - layer) as f64);
                    groups.push(Group { name: group, weight_decay, lr_scale, params: vec![id] });
                }
            }
        }
        Ok(groups)
    }
}

/// The layer of a vision transformer's parameter: embeddings and ConViT's convolution stages 0, block k is k + 1, norm and head are `last`, which is the
/// depth + 1.
pub fn vit_layer(name: &str, last: usize) -> Result<usize> {
    let first = ["patch_embed", "blocks1.", "blocks2."].iter().any(|start| name.starts_with(start));
    if name == "cls_token" || name == "pos_embed" || first {
        return Ok(0);
    }
    let Some(rest) = name.strip_prefix("blocks.").or_else(|| name.strip_prefix("blocks3.")) else { return Ok(last) };
    let block = rest.split('.').next().unwrap_or(rest).parse::<usize>();
    Ok(block.with_context(|| format!("layer decay: {name} names no block"))?.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_a_convit_learn_like_its_embeddings() {
        for (name, layer) in [
            ("pos_embed", 0),
            ("patch_embed1.proj.weight", 0),
            ("patch_embed4.bias", 0),
            ("blocks1.1.attn.weight", 0),
            ("blocks2.0.mlp.fc1.bias", 0),
            ("blocks3.0.attn.qkv.weight", 1),
            ("blocks3.10.norm1.weight", 11),
            ("fc_norm.weight", 12),
            ("norm.bias", 12),
            ("head.weight", 12),
            ("blocks.10.norm1.weight", 11),
        ] {
            assert_eq!(vit_layer(name, 12).unwrap(), layer, "{name}");
        }
        assert!(vit_layer("blocks3.x.norm1.weight", 12).is_err());
    }
}
