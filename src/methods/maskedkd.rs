//! MaskedKD: The Role of Masking for Efficient Supervised Knowledge Distillation of Vision Transformers (arXiv 2302.10494); with all patches kept it is
//! plain distillation of logits, with a distillation token it is DeiT's (arXiv 2012.12877).
//!
//! The student sees the whole image and learns its labels and what a frozen teacher answers. The teacher sees only the k patches that the student's class
//! token attends to most in the last block, in the very pass that gives the student's logits; positions first, then the choice. In evaluation there is no teacher.
//!
//!   s_j = mean_h A[h, 0, e + j]                                     A: the student's last softmax over all keys, e tokens in front
//!   L = (1 - alpha) L_base(z, y) + alpha L_KD(z', z_t)              z' the distillation head's logits, where there is one; else z
//!   L_KD = tau^2 KL(softmax(z_t / tau) | softmax(z' / tau)) / B     soft; over B C with a distillation token, as DeiT
//!   L_KD = cross-entropy(z', argmax z_t)                            hard
//!
//!   masque distill maskedkd --model deit_tiny_patch16_224 --teacher-path deit_3_small_224_1k.pth --len-num-keep 98

use super::masks::{Masking, Masks};
use super::selection::{self, Selection};
use super::supervised::{answers, label_loss, score};
use super::teacher::{Cost, Network, Teacher};
use super::{Batch, Loss, Method, Scores};
use crate::error::{Context, Error, Result};
use crate::masking::Keys;
use crate::nn::classifier::{Classifier, ClassifierConfig, Output};
use crate::nn::vit::{Query, Vit, VitConfig};
use crate::nn::{Scope, flops};
use crate::ops::distill_kl::Reduction;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Dtype, Tensor};
use crate::trace;
use clap::{ArgAction, ValueEnum};
use serde::{Deserialize, Serialize};

/// The flags of every distillation of logits.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LogitArgs {
    /// What of the teacher's answers is learned
    #[arg(long, value_enum, default_value_t = Distillation::Soft)]
    pub distillation_type: Distillation,
    /// Weight of the teacher against the labels
    #[arg(long, default_value_t = 0.5, value_name = "ALPHA")]
    pub distillation_alpha: f64,
    /// Temperature that softens both answers
    #[arg(long, default_value_t = 1.0, value_name = "TAU")]
    pub distillation_tau: f64,
    /// How labels and teacher are added
    #[arg(long, value_enum, default_value_t = Form::Convex)]
    pub loss_form: Form,
    /// What the sum of the divergences is divided by [default: batch; elements for a student with a distillation token, as in DeiT]
    #[arg(long, value_enum)]
    pub kl_reduction: Option<Division>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distillation {
    /// Nothing: labels alone, no teacher is opened
    None,
    /// All of its probabilities
    Soft,
    /// The class that it gives most
    Hard,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// (1 - alpha) labels + alpha teacher, as the programs do
    Convex,
    /// Labels + alpha / (1 - alpha) teacher, as the paper writes it
    Additive,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Division {
    /// The images (MaskedKD)
    Batch,
    /// Images times classes (DeiT)
    Elements,
}

/// The flags of masking.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MaskingArgs {
    /// Patches that the teacher sees of each image [default: all, 196 of 224 pixels in patches of 16]
    #[arg(long, value_name = "K")]
    pub len_num_keep: Option<usize>,
    /// Whether the teacher is masked where --len-num-keep is less than all; =false, or --no-maskedkd, shows it everything
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = ArgAction::Set)]
    pub maskedkd: bool,
    /// Which patches those are. student: the ones that the student attends to most, which is the method. Ablations: random; block (units of 2 x 2 at random);
    /// student-lowest; teacher (by its own attention, at the price of a whole pass more, which is counted as its time); layer:L (the student's block L, from 0);
    /// top-plus-random:A,B; mask-student (the student sees K at random, the teacher everything); none (everything). Not built: the attention of a third model,
    /// attention between patches, merging of tokens
    #[arg(long, default_value_t = Selection::Student, value_name = "RULE")]
    pub selection: Selection,
    /// Which keys a row of attention is normalised over before heads are averaged
    #[arg(long, value_enum, default_value_t = Softmax::AllKeys)]
    pub saliency_softmax: Softmax,
    /// Whose attention counts in a student with a distillation token
    #[arg(long, value_enum, default_value_t = QueryName::Cls)]
    pub saliency_query: QueryName,
    /// What is done where student and teacher cut an image into different grids
    #[arg(long, value_enum, default_value_t = Resize::Error)]
    pub saliency_resize: Resize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Softmax {
    /// All of them, as the program does
    #[value(alias = "all_keys")]
    AllKeys,
    /// The patches alone, as the paper's formula
    #[value(alias = "patch_keys")]
    PatchKeys,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QueryName {
    /// The class token's
    Cls,
    /// The distillation token's
    Dist,
    /// The mean of both
    Mean,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resize {
    /// It is refused; maps of attention are not resized
    Error,
}

/// What is distilled, and how; None where nothing is.
#[derive(Clone, Debug)]
pub struct Distilling {
    pub hard: bool,
    pub alpha: f64,
    pub tau: f64,
    pub form: Form,
    pub reduction: Reduction,
    /// Patches that the masked one of the two sees.
    pub keep: usize,
    pub selection: Selection,
    pub keys: Keys,
    pub query: Query,
}

impl LogitArgs {
    /// For a student whose teacher sees everything.
    pub fn config(&self, student: &VitConfig) -> Result<Option<Distilling>> {
        let usage = |text: String| Err(Error::usage(text));
        if self.distillation_type == Distillation::None {
            return Ok(None);
        }
        let (alpha, tau) = (self.distillation_alpha, self.distillation_tau);
        if !(0.0..=1.0).contains(&alpha) {
            return usage(format!("--distillation-alpha {alpha} is not from 0 to 1"));
        }
        if self.loss_form == Form::Additive && alpha == 1.0 {
            return usage("--distillation-alpha 1 leaves nothing of the labels, which --loss-form additive cannot say; take convex".into());
        }
        if !(tau.is_finite() && tau > 0.0) {
            return usage(format!("--distillation-tau {tau} is not a temperature above 0"));
        }
        let usual = if student.distillation_token { Division::Elements } else { Division::Batch };
        Ok(Some(Distilling {
            hard: self.distillation_type == Distillation::Hard,
            alpha,
            tau,
            form: self.loss_form,
            reduction: match self.kl_reduction.unwrap_or(usual) {
                Division::Batch => Reduction::Batch,
                Division::Elements => Reduction::Elements,
            },
            keep: student.patches(),
            selection: Selection::None,
            keys: Keys::All,
            query: Query::Class,
        }))
    }
}

impl MaskingArgs {
    /// The same with a teacher, or a student, that sees some patches alone.
    pub fn apply(&self, logits: Distilling, student: &VitConfig) -> Result<Distilling> {
        let usage = |text: String| Err(Error::usage(text));
        let patches = student.patches();
        let keep = match (self.selection, self.len_num_keep) {
            (Selection::TopPlusRandom(top, rest), given) => {
                let sum = top.saturating_add(rest);
                if let Some(given) = given.filter(|&given| given != sum && given != patches) {
                    return usage(format!(
                        "--selection top-plus-random:{top},{rest} keeps {sum} patches and --len-num-keep says {given}; give one of the two"
                    ));
                }
                sum
            }
            (_, given) => given.unwrap_or(patches),
        };
        if keep == 0 || keep > patches {
            return usage(format!("--len-num-keep {keep}: the image has {patches} patches, of which 1 to {patches} can be kept"));
        }
        let query = match self.saliency_query {
            QueryName::Cls => Query::Class,
            QueryName::Dist => Query::Distillation,
            QueryName::Mean => Query::Both,
        };
        if query != Query::Class && !student.distillation_token {
            return usage("--saliency-query: the student has no distillation token, only a class token; leave the flag out".into());
        }
        if let Selection::Layer(block) = self.selection
            && block >= student.depth
        {
            return usage(format!("--selection layer:{block}: the student has blocks 0 to {}", student.depth - 1));
        }
        if self.selection == Selection::Block {
            Masks::keeping(Masking::Block, student, keep)
                .map_err(|error| Error::usage(format!("--selection block: {}; take --selection random or another K", error.chain())))?;
        }
        let masked = self.maskedkd && keep < patches;
        let keys = if self.saliency_softmax == Softmax::PatchKeys { Keys::Patches } else { Keys::All };
        Ok(Distilling {
            keep: if masked { keep } else { patches },
            selection: if masked { self.selection } else { Selection::None },
            keys,
            query,
            ..logits
        })
    }
}

impl Distilling {
    /// Patches that the teacher sees of `patches`.
    fn shown(&self, patches: usize) -> usize {
        if matches!(self.selection, Selection::None | Selection::MaskStudent) { patches } else { self.keep }
    }

    /// Whether the teacher is shown some of the student's patches, which it then has to cut alike.
    pub fn masks_teacher(&self) -> bool {
        !matches!(self.selection, Selection::None | Selection::MaskStudent)
    }

    /// Who sees what, for a person.
    pub fn text(&self, teacher: &Teacher, student: &VitConfig) -> String {
        let (all, kept) = (teacher.vit().patches(), self.keep);
        match self.selection {
            Selection::None => format!("the teacher sees all {all} patches"),
            Selection::MaskStudent => {
                format!("the student learns from {kept} of its {} patches at random, the teacher sees all {all}", student.patches())
            }
            Selection::Teacher => {
                format!("the teacher sees {kept} of {all} patches by its own attention, for which it sees all of them first")
            }
            selection => format!("the teacher sees {kept} of {all} patches, chosen by {selection}"),
        }
    }

    /// What the student's answers lose against the teacher's.
    pub fn loss(&self, answers: &Var, teacher: &Tensor) -> Result<Var> {
        if self.hard { answers.hard_distill(teacher) } else { answers.distill_kl(teacher, self.tau, self.reduction) }
    }

    /// Labels and teacher with their weights.
    pub fn terms(&self, base: Var, distilled: Var) -> Vec<(&'static str, f64, Var)> {
        let [labels, teacher] = match self.form {
            Form::Convex => [1.0 - self.alpha, self.alpha],
            Form::Additive => [1.0, self.alpha / (1.0 - self.alpha)],
        };
        vec![("base", labels, base), ("distill", teacher, distilled)]
    }
}

pub struct MaskedKd {
    pub params: Params,
    pub student: Classifier,
    /// Who teaches, and how; None: labels alone.
    pub taught: Option<(Teacher, Distilling)>,
    /// Where patches are kept at random.
    masks: Option<Masks>,
    binary: bool,
}

/// What a pass of the student gives.
pub struct Seen {
    pub output: Output,
    /// What its token in front attends to, [B, H, e + N], where the choice depends on it.
    pub rows: Option<Tensor>,
}

impl MaskedKd {
    /// `binary`: labels by binary cross-entropy.
    pub fn new(c: ClassifierConfig, taught: Option<(Teacher, Distilling)>, binary: bool, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        let student = Classifier::new(&mut b, c)?;
        let config = &student.vit.config;
        let masks = match taught.as_ref().map(|(_, distilling)| (distilling.selection, distilling.keep)) {
            Some((Selection::Random | Selection::MaskStudent, keep)) => Some(Masks::keeping(Masking::Random, config, keep)?),
            Some((Selection::Block, keep)) => Some(Masks::keeping(Masking::Block, config, keep)?),
            _ => None,
        };
        Ok(Self { params: b.build(dtype, rng)?, student, taught, masks, binary })
    }

    fn selection(&self) -> Selection {
        self.taught.as_ref().map_or(Selection::None, |(_, distilling)| distilling.selection)
    }

    /// Patches at random, in raster order: [B, K].
    fn at_random(&self, images: &Tensor, rng: &Rng) -> Result<Option<Tensor>> {
        let Some(masks) = &self.masks else { return Ok(None) };
        let mask = masks.draw(images, (&self.student.vit, &self.params), rng)?;
        selection::in_raster(&mask.hidden, masks.kept_each()).map(Some)
    }

    /// The student's answers, and where it looked when it gave them.
    pub fn see(&self, s: &Scope, images: &Tensor, rng: &Rng) -> Result<Seen> {
        let (vit, selection) = (&self.student.vit, self.selection());
        let own = if selection == Selection::MaskStudent { self.at_random(images, rng)? } else { None };
        let x = vit.embed(s, images, own.as_ref())?; // [B, e + N, C]
        let (x, rows) = match &self.taught {
            Some((_, distilling)) if selection.looks() => {
                let at = if let Selection::Layer(block) = selection { block } else { vit.config.depth - 1 };
                let (x, rows) = vit.blocks_with_rows(s, &x, at, distilling.query)?;
                (x, Some(rows))
            }
            _ => (vit.blocks(s, &x)?, None),
        };
        Ok(Seen { output: self.student.head(s, &x, true)?, rows })
    }

    /// The patches that the teacher is shown, in raster order [B, K]; None for all.
    pub fn choose(&self, rows: Option<&Tensor>, images: &Tensor, rng: &Rng) -> Result<Option<Tensor>> {
        let _phase = trace::phase("select");
        let Some((teacher, c)) = &self.taught else { return Ok(None) };
        let (rows, extra) = match c.selection {
            Selection::None | Selection::MaskStudent => return Ok(None),
            Selection::Random | Selection::Block => return self.at_random(images, rng),
            Selection::Teacher => (teacher.looks(images)?, teacher.vit().extra()),
            _ => (rows.cloned().ok_or_else(|| Error::new("the student was not asked where it looks"))?, self.student.vit.config.extra()),
        };
        let noise = |shape: &[usize]| Tensor::drawn(self.params.device(), rng, "selection", shape);
        selection::by_attention(c.selection, &rows, extra, c.keep, c.keys, noise).map(Some)
    }
}

impl Method for MaskedKd {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let targets = batch.targets.as_ref().ok_or_else(|| Error::new("a classifier's batch needs targets"))?;
        let s = Scope::new(tape, &self.params).with_noise(rng);
        let device = self.params.device();
        let images = batch.images.on(device)?;

        let seen = self.see(&s, &images, rng)?; // answers, and the attention they came from
        let phase = trace::phase("loss");
        let base = label_loss(&seen.output.logits, targets, self.binary)?;
        drop(phase);
        let Some((teacher, distilling)) = &self.taught else { return Ok(Loss::single("base", base)) };

        let known = batch.teacher_output.as_ref().filter(|_| !distilling.masks_teacher());
        let answers = match known {
            Some(known) => known.on(device)?,
            None => {
                let images = batch.for_teacher().on(device)?;
                let kept = self.choose(seen.rows.as_ref(), &images, rng)?; // [B, K]
                teacher.logits(&images, kept.as_ref())?
            }
        };
        let _phase = trace::phase("loss");
        let follower = seen.output.distillation.as_ref().unwrap_or(&seen.output.logits);
        Loss::sum(distilling.terms(base, distilling.loss(follower, &answers)?))
    }

    fn encoder(&self) -> &Vit {
        &self.student.vit
    }

    fn prepare(&self, batch: &mut Batch, _rng: &Rng) -> Result<()> {
        if let Some((teacher, distilling)) = &self.taught
            && !distilling.masks_teacher()
        {
            batch.teacher_output = teacher.recall(batch, |images| teacher.logits(images, None))?;
        }
        Ok(())
    }

    fn scores(&self, batch: &Batch, _rng: &Rng) -> Result<Scores> {
        let answers = answers(&self.student, &self.params, &batch.images)?;
        score(answers.data(), &batch.labels, self.student.classes).context("evaluation")
    }

    fn macs(&self) -> [u64; 2] {
        let (config, heads) = (&self.student.vit.config, self.student.classes);
        let all = match (&self.taught, self.selection()) {
            (Some((_, distilling)), Selection::MaskStudent) => {
                let head = flops::classifier_macs(config, heads) - flops::vit_macs(config, config.patches());
                flops::vit_macs(config, distilling.keep) + head
            }
            _ => flops::classifier_macs(config, heads),
        };
        [all, all]
    }

    fn teacher(&self) -> Option<&Teacher> {
        self.taught.as_ref().map(|(teacher, _)| teacher)
    }

    fn teacher_cost(&self) -> Option<Cost> {
        let (teacher, distilling) = self.taught.as_ref()?;
        let patches = teacher.vit().patches();
        let asked = match (&teacher.network, distilling.selection) {
            (Network::Classifier(_), Selection::Teacher) => teacher.macs(patches, teacher.vit().depth),
            _ => 0,
        };
        Some(teacher.cost(teacher.logit_macs(distilling.shown(patches)) + asked))
    }
}
