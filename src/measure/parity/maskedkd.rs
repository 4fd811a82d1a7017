//! Cases of MaskedKD and DeiT's distillation: a classifier beside a teacher of logits that sees all patches or the chosen ones.

use super::case::{Case, Fields};
use super::compare::Record;
use super::steps::{self, Place, Subject};
use super::vit::{self, encoder_config};
use crate::error::Result;
use crate::masking::{self, Arrangement, Keys};
use crate::methods::Loss;
use crate::methods::maskedkd::{Distilling, Form, MaskedKd};
use crate::methods::selection::Selection;
use crate::methods::teacher::{Network, Teacher};
use crate::nn::Scope;
use crate::nn::attention;
use crate::nn::cait::{Cait, CaitConfig};
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::vit::{Position, Query, VitConfig};
use crate::ops::distill_kl::Reduction;
use crate::optim::groups::Group;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};

struct Taught<'a> {
    case: &'a Case,
    kd: MaskedKd,
    /// Patches that are chosen; None where none are, masked or not.
    keep: Option<usize>,
}

pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let (model, options) = (case.part("model")?, case.part("options")?);
    let kind = model.text("kind")?;
    ensure!(matches!(kind, "deit" | "deit_distilled"), "model.kind is {kind:?}; there are deit and deit_distilled");
    let student = encoder_config(&model, Position::Learned)?;
    let classes = model.size("num_classes")?;
    check_size(case, "w/", &student, classes)?;
    let extra = options.size_or("extra_tokens", student.extra())?;
    ensure!(extra == student.extra(), "options.extra_tokens is {extra} but the student has {} tokens in front", student.extra());
    let patches = student.patches();
    let keep = if options.has("len_keep") { Some(options.size("len_keep")?) } else { None };
    ensure!(keep.is_none_or(|keep| (1..=patches).contains(&keep)), "options.len_keep is {keep:?} of {patches} patches");
    let masked = options.flag_or("maskedkd", false)? && keep.is_some();
    let hard = match options.text("distillation_type")? {
        "soft" => false,
        "hard" => true,
        other => bail!("options.distillation_type is {other:?}; there are soft and hard"),
    };
    let reduction = if options.has("kl_reduction") { options.text("kl_reduction")? } else { "batchmean" };
    let distilling = Distilling {
        hard,
        alpha: options.number_or("alpha", 0.5)?,
        tau: options.number_or("tau", 1.0)?,
        form: Form::Convex,
        reduction: match reduction {
            "batchmean" => Reduction::Batch,
            "sum_over_numel" => Reduction::Elements,
            other => bail!("options.kl_reduction is {other:?}; there are batchmean and sum_over_numel"),
        },
        keep: keep.unwrap_or(patches),
        selection: if masked { Selection::Student } else { Selection::None },
        keys: Keys::All,
        query: Query::Class,
    };
    let teacher = teacher(case, dtype)?;
    ensure!(teacher.vit().image == student.image, "student and teacher see images of {:?} and {:?}", student.image, teacher.vit().image);
    ensure!(
        !masked || teacher.vit().grid() == student.grid(),
        "student and teacher have grids {:?} and {:?}",
        student.grid(),
        teacher.vit().grid()
    );
    ensure!(teacher.answers() == Some(classes), "the teacher answers {:?} classes and the student {classes}", teacher.answers());
    let config = ClassifierConfig { vit: student, classes, pool: Pool::ClassToken, probe: false };
    let mut kd = MaskedKd::new(config, Some((teacher, distilling)), false, dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut kd.params)?;
    steps::run(case, &mut Taught { case, kd, keep }, record)
}

fn check_size(case: &Case, prefix: &str, vit: &VitConfig, classes: usize) -> Result<()> {
    let (w, hidden) = (vit.width, vit.block(0).hidden);
    case.check_size(
        prefix,
        &[&[vit.positions(), w], &[vit.patch_values(), w], &[vit.depth, 4, w, w], &[vit.depth, 2, w, hidden], &[classes, w]],
    )
}

fn teacher(case: &Case, dtype: Dtype) -> Result<Teacher> {
    let model = case.part("teacher")?;
    let (kind, classes) = (model.text("kind")?, model.size("num_classes")?);
    let position = if matches!(kind, "deit3" | "cait") { Position::LearnedPatches } else { Position::Learned };
    let vit = VitConfig { layer_scale: matches!(kind, "deit3" | "cait").then_some(1e-4), ..encoder_config(&model, position)? };
    check_size(case, "tw/", &vit, classes)?;
    let mut b = ParamsBuilder::default();
    let network = match kind {
        "deit" | "deit_distilled" | "deit3" => {
            Network::Classifier(Classifier::new(&mut b, ClassifierConfig { vit, classes, pool: Pool::ClassToken, probe: false })?)
        }
        "cait" => {
            let class_blocks = model.size("depth_token_only")?;
            case.check_size("tw/", &[&[class_blocks, 4, vit.width, vit.width]])?;
            Network::Cait(Cait::new(&mut b, CaitConfig { vit, class_blocks, classes })?)
        }
        other => bail!("teacher.kind is {other:?}; there are deit, deit_distilled, deit3 and cait"),
    };
    let mut params = b.build(dtype, &Rng::new(0))?;
    steps::load(case, "tw/", &mut params)?;
    Ok(Teacher::new("the teacher", params, network))
}

impl Taught<'_> {
    /// All of the last block's probabilities, the score of each patch, and the ones that are chosen.
    fn attention(&self, at: &Place, images: &Tensor, record: &mut Record) -> Result<()> {
        let Some(keep) = self.keep else { return Ok(()) };
        let (off, vit) = (Tape::off(), &self.kd.student.vit);
        let s = Scope::new(&off, &self.kd.params);
        let (last, extra) = (vit.config.depth - 1, vit.config.extra());
        let x = vit.first_blocks(&s, &vit.embed(&s, images, None)?, last)?;
        let all = attention::rows(&vit.qkv(&s, &x, last)?, vit.config.block(last).heads, 0..x.shape()[1])?;
        record.tensor(at.output("attn"), &all);
        let (_, rows) = vit.blocks_with_class_rows(&s, &vit.embed(&s, images, None)?)?;
        for (name, arrangement) in [("keep_ids", Arrangement::Falling), ("keep_ids_sorted", Arrangement::Raster)] {
            let chosen = masking::most_attended(&rows, extra, keep, Keys::All, arrangement)?;
            record.tensor(at.output("scores"), &chosen.saliency);
            record.tensor(at.output(name), &chosen.kept);
        }
        Ok(())
    }
}

impl Subject for Taught<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.kd.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let (kd, rng) = (&self.kd, Rng::new(0));
        let (teacher, distilling) = kd.taught.as_ref().expect("every case has a teacher");
        let images = self.case.images(&at.input("images"), kd.params.dtype())?;
        self.attention(at, &images, record)?;

        let s = Scope::new(tape, &kd.params);
        let seen = kd.see(&s, &images, &rng)?;
        let kept = kd.choose(seen.rows.as_ref(), &images, &rng)?;
        let answers = teacher.logits(&images, kept.as_ref())?;
        record.tensor(at.output("teacher_logits"), &answers);
        record.tensor(at.output("logits"), seen.output.logits.value());
        if let Some(logits) = &seen.output.distillation {
            record.tensor(at.output("logits_dist"), logits.value());
            record.tensor(at.output("eval_logits"), seen.output.evaluated()?.value());
        }
        let base = vit::base_loss(self.case, "base_loss", at, &seen.output.logits)?;
        let distilled = distilling.loss(seen.output.distillation.as_ref().unwrap_or(&seen.output.logits), &answers)?;
        record.tensor(at.output("loss_base"), base.value());
        record.tensor(at.output("loss_distill"), distilled.value());
        Ok(Loss::sum(distilling.terms(base, distilled))?.total)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        vit::decay_groups(&self.kd.params, optim)
    }
}
