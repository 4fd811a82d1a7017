//! A classifier learns from labels: fine-tuning of a pre-trained encoder, training from scratch, linear probing.
//!
//! The loss is the soft cross-entropy -sum_k t_k log p_k, mean over the batch; targets carry label smoothing, mixup and CutMix. Evaluation takes hard labels.

use super::{Batch, Loss, Method, Scores};
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::nn::classifier::{Classifier, ClassifierConfig};
use crate::nn::vit::Vit;
use crate::nn::{Scope, flops};
use crate::ops::batchnorm::Statistics;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Device, Dtype, Tensor};
use crate::trace;

pub struct Supervised {
    pub params: Params,
    pub model: Classifier,
    pub classes: usize,
    probe: bool,
    /// Whether each class is a question of its own, as DeiT-III trains.
    pub binary: bool,
}

impl Supervised {
    pub fn new(c: ClassifierConfig, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        let (classes, probe) = (c.classes, c.probe);
        let model = Classifier::new(&mut b, c)?;
        let mut params = b.build(dtype, rng)?;
        if probe {
            Classifier::train_head_only(&mut params);
        }
        Ok(Self { params, model, classes, probe, binary: false })
    }

    /// What the model answers; see [`answers`].
    pub fn answers(&self, images: &Tensor) -> Result<Tensor> {
        answers(&self.model, &self.params, images)
    }

    /// What enters the head, f32 [B, C] on the CPU.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        let tape = Tape::off();
        let images = images.on(self.params.device())?;
        let output = self.model.forward(&Scope::new(&tape, &self.params), &images, None, false)?;
        output.features.value().on(&Device::Cpu)?.cast(Dtype::F32)
    }
}

impl Method for Supervised {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let targets = batch.targets.as_ref().ok_or_else(|| Error::new("a classifier's batch needs targets"))?;
        let s = Scope::new(tape, &self.params).with_noise(rng);
        let images = batch.images.on(self.params.device())?;
        let output = self.model.forward(&s, &images, None, true)?;
        let _phase = trace::phase("loss");
        let loss = label_loss(&output.logits, targets, self.binary)?;
        let name = if self.binary { "binary-cross-entropy" } else { "cross-entropy" };
        Ok(Loss { statistics: output.statistics, ..Loss::single(name, loss) })
    }

    fn encoder(&self) -> &Vit {
        &self.model.vit
    }

    fn scores(&self, batch: &Batch, _rng: &Rng) -> Result<Scores> {
        let answers = self.answers(&batch.images)?;
        score(answers.data(), &batch.labels, self.classes).context("evaluation")
    }

    fn learn(&mut self, statistics: &Statistics, images: usize) -> Result<()> {
        self.model.update_statistics(&mut self.params, statistics, images)
    }

    fn macs(&self) -> [u64; 2] {
        let all = flops::classifier_macs(&self.model.vit.config, self.classes);
        [all, if self.probe { (self.model.vit.config.width * self.classes) as u64 } else { all }]
    }
}

/// What a classifier answers in evaluation, f32 [B, classes] on the CPU: of two heads the mean; nothing is drawn.
pub fn answers(model: &Classifier, params: &Params, images: &Tensor) -> Result<Tensor> {
    let tape = Tape::off();
    let images = images.on(params.device())?;
    let output = model.forward(&Scope::new(&tape, params), &images, None, false)?;
    output.evaluated()?.value().on(&Device::Cpu)?.cast(Dtype::F32)
}

/// The loss of labels that are probabilities, f32 [B, classes]: cross-entropy, or where `binary` the mean binary cross-entropy over all classes, of which each
/// counts as meant whose probability is above 0.
pub fn label_loss(logits: &Var, targets: &Tensor, binary: bool) -> Result<Var> {
    if binary { logits.bce(targets, true) } else { logits.cross_entropy_soft(targets) }
}

/// Cross-entropy of hard labels, and how many of them are first and among the first five of `answers` [B, classes]. Of equal answers the lower class comes first.
pub fn score(answers: &[f32], labels: &[u32], classes: usize) -> Result<Scores> {
    ensure!(
        answers.len() == labels.len() * classes && !labels.is_empty(),
        "{} answers are not {} x {classes}",
        answers.len(),
        labels.len()
    );
    let (mut loss, mut right) = (0.0, [0, 0]);
    for (row, &label) in answers.chunks_exact(classes).zip(labels) {
        let label = label as usize;
        ensure!(label < classes, "label {label} does not exist among {classes} classes");
        let most = row.iter().fold(f32::NEG_INFINITY, |most, &x| most.max(x)) as f64;
        let sum: f64 = row.iter().map(|&x| (x as f64 - most).exp()).sum();
        loss += most + sum.ln() - row[label] as f64;
        let own = row[label];
        let before = row.iter().enumerate().filter(|&(k, &x)| x > own || (x == own && k < label)).count();
        // An answer that is no number is not right.
        if own.is_finite() {
            right[0] += usize::from(before < 1);
            right[1] += usize::from(before < 5);
        }
    }
    Ok(Scores { loss: loss / labels.len() as f64, right: Some(right) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_count_first_and_first_five() {
        let answers = [0.0f32, 3.0, 2.0, 1.0, -1.0, -2.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let scores = score(&answers, &[1, 5], 6).unwrap();
        assert_eq!(scores.right, Some([1, 1]));
        assert_eq!(score(&answers, &[2, 4], 6).unwrap().right, Some([0, 2]));
        let by_hand: f64 = [[0.0f64, 3.0, 2.0, 1.0, -1.0, -2.0], [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
            .iter()
            .zip([1, 5])
            .map(|(row, label)| row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[label])
            .sum();
        assert!((scores.loss - by_hand / 2.0).abs() < 1e-6);
        assert_eq!(score(&[f32::NAN; 3], &[0], 3).unwrap().right, Some([0, 0]));
        assert!(score(&answers, &[1, 6], 6).is_err());
    }
}
