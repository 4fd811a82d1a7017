//! A teacher: a network that is asked and never trained. It runs off the tape, in evaluation, and its time is taken apart from the student's.
//!
//! With `kept` it sees those patches alone: positions first, then the choice, then all blocks on the short sequence. Asked for an early block it stops there.

use super::Batch;
use crate::error::Result;
use crate::nn::Scope;
use crate::nn::cait::Cait;
use crate::nn::classifier::Classifier;
use crate::nn::decoder::Decoder;
use crate::nn::flops;
use crate::nn::vit::{Vit, VitConfig};
use crate::param::Params;
use crate::tape::Tape;
use crate::tensor::Tensor;
use crate::trace;
use crate::{bail, ensure};
use std::cell::Cell;
use std::time::Instant;

pub enum Network {
    Encoder(Vit),
    /// An encoder with MAE's decoder behind it.
    Autoencoder(Vit, Decoder),
    Classifier(Classifier),
    Cait(Cait),
}

/// What a teacher costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiply-accumulates of its pass for one image.
    pub macs: u64,
    /// Time that its passes took so far, and how many there were. Recorded passes of a GPU are not in it: there the eager ones in front of them tell.
    pub seconds: f64,
    pub passes: u64,
    /// Of images whose answers may be remembered: how many were asked about, and how many there were.
    pub asked: u64,
    pub answered: u64,
}

/// Where a teacher's answers are known from before.
pub trait Memory {
    /// The answers to the images of a batch, on any device; `compute` asks the teacher about those that are not known.
    fn recall(&self, batch: &Batch, compute: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Tensor>;
}

pub struct Teacher {
    pub params: Params,
    pub network: Network,
    /// Where it comes from, for messages.
    pub name: String,
    /// The names of its classes, where its file says them.
    pub classes: Vec<String>,
    /// Its answers to views that return, where they are kept.
    pub memory: Option<Box<dyn Memory>>,
    seconds: Cell<f64>,
    passes: Cell<u64>,
    asked: Cell<u64>,
    answered: Cell<u64>,
}

impl Cost {
    /// The part of images that it was asked about since then: all, unless answers are remembered.
    pub fn share_since(&self, then: &Cost) -> f64 {
        match self.answered - then.answered {
            0 => 1.0,
            answered => (self.asked - then.asked) as f64 / answered as f64,
        }
    }
}

impl Teacher {
    pub fn new(name: impl Into<String>, params: Params, network: Network) -> Self {
        Self {
            params,
            network,
            name: name.into(),
            classes: Vec::new(),
            memory: None,
            seconds: Cell::new(0.0),
            passes: Cell::new(0),
            asked: Cell::new(0),
            answered: Cell::new(0),
        }
    }

    /// The part of it that sees patches.
    pub fn vit(&self) -> &VitConfig {
        match &self.network {
            Network::Encoder(vit) | Network::Autoencoder(vit, _) => &vit.config,
            Network::Classifier(classifier) => &classifier.vit.config,
            Network::Cait(cait) => &cait.config.vit,
        }
    }

    /// Its encoder; CaiT's blocks are no plain encoder's.
    pub fn encoder(&self) -> Result<&Vit> {
        match &self.network {
            Network::Encoder(vit) | Network::Autoencoder(vit, _) => Ok(vit),
            Network::Classifier(classifier) => Ok(&classifier.vit),
            Network::Cait(_) => {
                bail!("{} is a CaiT, whose blocks give no features or relations of a plain ViT; it teaches logits", self.name)
            }
        }
    }

    /// A pass off the tape, with its time taken.
    pub fn pass<R>(&self, f: impl FnOnce(&Scope) -> Result<R>) -> Result<R> {
        let tape = Tape::off();
        let _phase = trace::phase("teacher");
        let wait = || match self.params.device().gpu() {
            Some(gpu) => gpu.wait(),
            None => Ok(()),
        };
        if self.params.device().gpu().is_some_and(|gpu| gpu.is_recording()) {
            return f(&Scope::new(&tape, &self.params));
        }
        wait()?;
        let started = Instant::now();
        let answer = f(&Scope::new(&tape, &self.params))?;
        wait()?;
        self.seconds.set(self.seconds.get() + started.elapsed().as_secs_f64());
        self.passes.set(self.passes.get() + 1);
        Ok(answer)
    }

    /// What `ask` gives for a batch, remembered where there is a memory; None where there is none. For [`Method::prepare`](super::Method::prepare).
    pub fn recall(&self, batch: &Batch, ask: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Option<Tensor>> {
        let Some(memory) = &self.memory else { return Ok(None) };
        self.answered.set(self.answered.get() + batch.images.shape()[0] as u64);
        let asking = &mut |images: &Tensor| {
            self.asked.set(self.asked.get() + images.shape()[0] as u64);
            ask(&images.on(self.params.device())?)
        };
        memory.recall(batch, asking).map(Some)
    }

    pub fn forget_cost(&self) {
        self.seconds.set(0.0);
        self.passes.set(0);
    }

    /// What it has cost so far, at so many multiply-accumulates an image.
    pub fn cost(&self, macs: u64) -> Cost {
        Cost { macs, seconds: self.seconds.get(), passes: self.passes.get(), asked: self.asked.get(), answered: self.answered.get() }
    }

    /// What each of these blocks (rising, from 0) gives: the residual stream behind both of its branches, [B, extra + K, C]. Later blocks are not run.
    pub fn features(&self, images: &Tensor, kept: Option<&Tensor>, blocks: &[usize]) -> Result<Vec<Tensor>> {
        let encoder = self.encoder()?;
        let depth = encoder.config.depth;
        let last = *blocks.last().ok_or_else(|| crate::error::Error::new("no block of the teacher was asked for"))?;
        ensure!(blocks.is_sorted_by(|a, b| a < b) && last < depth, "blocks {blocks:?} of {depth} were asked for");
        self.pass(|s| {
            let mut x = encoder.embed(s, images, kept)?;
            let mut found = Vec::with_capacity(blocks.len());
            for i in 0..=last {
                x = encoder.block(s, &x, i)?;
                if blocks.contains(&i) {
                    found.push(x.value().clone());
                }
            }
            Ok(found)
        })
    }

    /// Logits [B, classes]; of two heads the mean, as in evaluation.
    pub fn logits(&self, images: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        self.pass(|s| match &self.network {
            Network::Classifier(classifier) => Ok(classifier.forward(s, images, kept, false)?.evaluated()?.value().clone()),
            Network::Cait(cait) => Ok(cait.forward(s, images, kept)?.value().clone()),
            _ => bail!("{} has no head: it answers no classes", self.name),
        })
    }

    /// How many classes it answers; None where it has no head.
    pub fn answers(&self) -> Option<usize> {
        match &self.network {
            Network::Classifier(classifier) => Some(classifier.classes),
            Network::Cait(cait) => Some(cait.config.classes),
            _ => None,
        }
    }

    /// Multiply-accumulates of its logits from `kept` patches, counted as MaskedKD does: all patches are projected.
    pub fn logit_macs(&self, kept: usize) -> u64 {
        match &self.network {
            Network::Cait(cait) => flops::cait_macs(&cait.config, kept),
            _ => flops::masked_classifier_macs(self.vit(), kept, self.answers().unwrap_or(0)),
        }
    }

    /// What its own class token attends to in its last block, all patches seen: probabilities [B, H, extra + N].
    pub fn looks(&self, images: &Tensor) -> Result<Tensor> {
        let encoder = self.encoder()?;
        self.pass(|s| Ok(encoder.blocks_with_class_rows(s, &encoder.embed(s, images, None)?)?.1))
    }

    /// Multiply-accumulates of the first `blocks` blocks on `kept` patches; a head's are not among them.
    pub fn macs(&self, kept: usize, blocks: usize) -> u64 {
        let config = self.vit();
        flops::vit_macs(&VitConfig { depth: blocks, ..config.clone() }, kept)
    }
}
