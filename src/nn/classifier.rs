//! A ViT with a classification head: class token or pooled patches, one or two heads, or a linear probe.
//!
//!   class token   features = norm(x)[0],  logits = head(features);  a distillation token gives a second head its logits
//!   pooled        features = fc_norm(mean of the patch tokens); the encoder's own norm does not exist
//!   probe         logits = linear(batch norm(features)), everything before frozen

use super::linear::Linear;
use super::norm::Norm;
use super::vit::{Tokens, Vit, VitConfig};
use super::{Scope, Start};
use crate::ensure;
use crate::error::Result;
use crate::ops::batchnorm::Statistics;
use crate::param::{Init, ParamId, Params, ParamsBuilder, Role};
use crate::tape::Var;
use crate::tensor::Tensor;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pool {
    ClassToken,
    Mean,
}

#[derive(Clone, Debug)]
pub struct ClassifierConfig {
    pub vit: VitConfig,
    pub classes: usize,
    pub pool: Pool,
    /// Batch norm without affine before the head, and only the head trained.
    pub probe: bool,
}

/// Running statistics of a probe, keys `head.0.*`.
struct Running {
    mean: ParamId,
    variance: ParamId,
    batches: ParamId,
}

const PROBE_EPS: f64 = 1e-6;
const PROBE_MOMENTUM: f64 = 0.1;

pub struct Classifier {
    pub vit: Vit,
    pub classes: usize,
    pool: Pool,
    running: Option<Running>,
    head: Linear,
    distillation_head: Option<Linear>,
    fc_norm: Option<Norm>,
}

pub struct Output {
    /// What enters the head, before a probe's batch norm: [B, C].
    pub features: Var,
    pub logits: Var,
    /// Logits of the distillation head.
    pub distillation: Option<Var>,
    /// A probe's statistics of this batch, to be taken in by [`Classifier::update_statistics`].
    pub statistics: Option<Statistics>,
}

impl Output {
    /// What is evaluated: the mean of both heads where there are two.
    pub fn evaluated(&self) -> Result<Var> {
        let Some(distillation) = &self.distillation else { return Ok(self.logits.clone()) };
        self.logits.add(distillation)?.scale(0.5)
    }
}

impl Classifier {
    pub fn new(b: &mut ParamsBuilder, c: ClassifierConfig) -> Result<Self> {
        ensure!(c.classes > 0, "a classifier needs classes");
        ensure!(!c.probe || !c.vit.distillation_token, "a linear probe has one head: it cannot sit on a distilled model");
        let (start, width, eps) = (Start::Normal, c.vit.width, c.vit.eps);
        let distilled = c.vit.distillation_token;
        let tokens = Tokens::new(b, &c.vit)?;
        let vit = Vit::new(b, c.vit, tokens, c.pool == Pool::ClassToken, start)?;
        let running = if c.probe {
            Some(Running {
                mean: b.add_as("head.0.running_mean", &[width], Init::Constant(0.0), Role::Buffer)?,
                variance: b.add_as("head.0.running_var", &[width], Init::Constant(1.0), Role::Buffer)?,
                batches: b.add_as("head.0.num_batches_tracked", &[], Init::Constant(0.0), Role::Buffer)?,
            })
        } else {
            None
        };
        let head = Linear::new(b, if c.probe { "head.1" } else { "head" }, width, c.classes, start.linear(width, c.classes))?;
        let distillation_head =
            if distilled { Some(Linear::new(b, "head_dist", width, c.classes, start.linear(width, c.classes))?) } else { None };
        let fc_norm = if c.pool == Pool::Mean { Some(Norm::new(b, "fc_norm", width, eps)?) } else { None };
        Ok(Self { vit, classes: c.classes, pool: c.pool, running, head, distillation_head, fc_norm })
    }

    /// Freezes all but the head, as linear probing does.
    pub fn train_head_only(params: &mut Params) {
        params.train_only(|name| name.starts_with("head."));
    }

    /// From the blocks' output [B, extra + N, C] to logits. `training` makes a probe use the batch's own statistics.
    pub fn head(&self, s: &Scope, x: &Var, training: bool) -> Result<Output> {
        let features = self.features(s, x, 0)?;
        let mut statistics = None;
        let normalised = match &self.running {
            None => features.clone(),
            Some(running) if !training => {
                features.batchnorm_given(s.params.value(running.mean), s.params.value(running.variance), PROBE_EPS)?
            }
            Some(_) => {
                let (y, batch) = features.batchnorm(PROBE_EPS)?;
                statistics = Some(batch);
                y
            }
        };
        let logits = self.head.forward(s, &normalised)?;
        let distillation = match &self.distillation_head {
            Some(head) => Some(head.forward(s, &self.features(s, x, 1)?)?),
            None => None,
        };
        Ok(Output { features, logits, distillation, statistics })
    }

    fn features(&self, s: &Scope, x: &Var, token: usize) -> Result<Var> {
        match (&self.fc_norm, self.pool) {
            (Some(fc_norm), Pool::Mean) => fc_norm.forward(s, &x.mean_tokens(self.vit.config.extra())?),
            // The norm works on each token alone: one token is enough.
            _ => self.vit.norm(s, &x.token(token)?),
        }
    }

    pub fn forward(&self, s: &Scope, images: &Tensor, kept: Option<&Tensor>, training: bool) -> Result<Output> {
        let x = self.vit.blocks(s, &self.vit.embed(s, images, kept)?)?;
        self.head(s, &x, training)
    }

    /// Takes the statistics of a batch of `images` into the running ones: running = 0.9 running + 0.1 batch, the variance unbiased.
    pub fn update_statistics(&self, params: &mut Params, batch: &Statistics, images: usize) -> Result<()> {
        let Some(running) = &self.running else { return Ok(()) };
        let unbias = images as f64 / (images as f64 - 1.0);
        for (id, fresh, factor) in [(running.mean, &batch.mean, 1.0), (running.variance, &batch.variance, unbias)] {
            let old = params.value(id).read()?;
            let blend = |(old, fresh): (&f64, f64)| (1.0 - PROBE_MOMENTUM) * old + PROBE_MOMENTUM * factor * fresh;
            let new: Vec<f64> = old.iter().zip(fresh.read()?).map(blend).collect();
            params.set_value(id, &Tensor::from_slice(&[new.len()], &new)?)?;
        }
        let batches = params.value(running.batches).read()?[0] + 1.0;
        params.set_value(running.batches, &Tensor::from_slice(&[], &[batches])?)
    }
}
