//! Cases of DMAE: an autoencoder beside a teacher that sees the same patches.

use super::case::{Case, Fields};
use super::compare::Record;
use super::mae;
use super::steps::{self, Place, Subject};
use crate::ensure;
use crate::error::{Error, Result};
use crate::methods::Loss;
use crate::methods::dmae::{Align, Dmae, DmaeConfig, Normalise, Projection, Target};
use crate::methods::teacher::{Network, Teacher};
use crate::nn::decoder::{Decoder, DecoderTokens};
use crate::nn::vit::{Tokens, Vit};
use crate::nn::{Scope, Start};
use crate::ops::feature_loss::Distance;
use crate::optim::groups::Group;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::Dtype;

struct Distilled<'a> {
    case: &'a Case,
    dmae: Dmae,
    pairs: Vec<(usize, usize)>,
}

pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let options = case.part("options")?;
    let target = options.text("student_reconstruction_target")?;
    ensure!(target == "original_img", "options.student_reconstruction_target is {target:?}; cases have original_img alone");
    let mae = mae::config(case)?;
    let teacher = teacher(case, dtype)?;
    let pairs = pairs(&options, [mae.encoder.depth, teacher.vit().depth])?;
    let (projection, normalise) = match options.get("aligned_feature_projection_mode").and_then(|mode| mode.as_str()) {
        None => (Projection::None, Normalise::None),
        Some("fc-1layer") => (Projection::Fc1Layer, Normalise::L2),
        Some("mlp-1layer") => (Projection::Mlp1Layer, Normalise::L2),
        Some("mlp-2layer") => (Projection::Mlp2Layer, Normalise::L2),
        Some(other) => return Err(Error::new(format!("options.aligned_feature_projection_mode is {other:?}, which is unknown"))),
    };
    let [from, to] = [mae.encoder.width, teacher.vit().width];
    ensure!(projection != Projection::None || from == to, "features {from} and {to} wide are compared without a projection");
    ensure!(
        mae.encoder.grid() == teacher.vit().grid(),
        "student and teacher have grids {:?} and {:?}",
        mae.encoder.grid(),
        teacher.vit().grid()
    );
    if projection != Projection::None {
        case.check_size("w/", &[&[pairs.len(), from, to]])?;
    }
    let distance = match options.text("embedding_distillation_func")? {
        "L1" => Distance::L1,
        "L2" => Distance::L2,
        other => return Err(Error::new(format!("options.embedding_distillation_func is {other:?}; there are L1 and L2"))),
    };
    let weight = options.number_or("distill_weight", 1.0)?;
    let align = Align {
        pairs: pairs.clone(),
        distance,
        normalise,
        weight,
        projection,
        target: Target::OriginalImg,
        sum: [0.5, 0.5],
        full_teacher: true,
    };
    let mut dmae = Dmae::new(DmaeConfig { mae, align }, teacher, dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut dmae.mae.params)?;
    steps::run(case, &mut Distilled { case, dmae, pairs }, record)
}

/// The blocks that are aligned, in rising order.
fn pairs(options: &Fields, depths: [usize; 2]) -> Result<Vec<(usize, usize)>> {
    let list = |key: &str, depth: usize| -> Result<Vec<usize>> {
        let blocks = options.list(key)?.iter().map(|json| json.as_u64().map(|block| block as usize).filter(|&block| block < depth));
        let mut blocks = blocks
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::new(format!("options.{key} names blocks beyond 0 to {}", depth - 1)))?;
        blocks.sort_unstable();
        blocks.dedup();
        Ok(blocks)
    };
    let own = list("aligned_blks_indices", depths[0])?;
    let key = if options.has("teacher_aligned_blks_indices") { "teacher_aligned_blks_indices" } else { "aligned_blks_indices" };
    let theirs = list(key, depths[1])?;
    ensure!(
        own.len() == theirs.len() && !own.is_empty(),
        "{} blocks of the student are aligned with {} of the teacher",
        own.len(),
        theirs.len()
    );
    Ok(own.into_iter().zip(theirs).collect())
}

fn teacher(case: &Case, dtype: Dtype) -> Result<Teacher> {
    let model = case.part("teacher")?;
    let (encoder, decoder) = mae::autoencoder(case, &model, "tw/")?;
    let mut b = ParamsBuilder::default();
    let tokens = Tokens::new(&mut b, &encoder)?;
    let decoder_tokens = DecoderTokens::new(&mut b, &decoder, &encoder)?;
    let encoder = Vit::new(&mut b, encoder, tokens, true, Start::Xavier)?;
    let decoder = Decoder::new(&mut b, &decoder, &encoder.config, decoder_tokens, Start::Xavier)?;
    let mut params = b.build(dtype, &Rng::new(0))?;
    steps::load(case, "tw/", &mut params)?;
    Ok(Teacher::new("the teacher", params, Network::Autoencoder(encoder, decoder)))
}

impl Subject for Distilled<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.dmae.mae.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let (dmae, mae) = (&self.dmae, &self.dmae.mae);
        let images = self.case.images(&at.input("images"), mae.params.dtype())?;
        let mask = mae::mask(self.case, mae, &images, at, record)?;

        let taught = dmae.teach(&images, &mask)?;
        for ((_, block), features) in self.pairs.iter().zip(&taught.features) {
            record.tensor(at.output(&format!("teacher_latent_{block}")), features);
        }
        let encoder = dmae.teacher.encoder()?;
        let latent = dmae.teacher.pass(|s| encoder.forward(s, &images, Some(&mask.kept)))?;
        record.tensor(at.output("teacher_latent_final"), latent.value());
        taught.prediction.iter().for_each(|prediction| record.tensor(at.output("teacher_pred"), prediction));

        let s = Scope::new(tape, &mae.params);
        let learned = dmae.learn_from(&s, &images, &mask)?;
        for ((block, _), features) in self.pairs.iter().zip(&learned.features) {
            record.tensor(at.output(&format!("student_latent_{block}")), features.value());
        }
        record.tensor(at.output("student_latent_final"), learned.latent.value());
        learned.prediction.iter().for_each(|prediction| record.tensor(at.output("pred"), prediction.value()));
        let terms = dmae.terms(&s, &images, &mask, &taught, &learned)?;
        for (name, _, term) in &terms {
            let name = if name == "pixels" { "loss_recon".to_string() } else { format!("loss_{name}") };
            record.tensor(at.output(&name), term.value());
        }
        Ok(Loss::sum(terms)?.total)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        mae::groups(&self.dmae.mae.params, self.dmae.mae.encoder.config.depth, optim)
    }
}
