//! Cases of TinyMIM: how tokens relate in the student's last block and in a block of its teacher.

use super::case::{Case, Fields};
use super::compare::Record;
use super::mae;
use super::steps::{self, Place, Subject};
use super::vit::encoder_config;
use crate::error::Result;
use crate::methods::Loss;
use crate::methods::teacher::{Network, Teacher};
use crate::methods::tinymim::{Feature, Pair, Target, Tinymim, TinymimConfig};
use crate::nn::vit::{Position, Tokens, Vit, VitConfig};
use crate::nn::{Scope, Start};
use crate::optim::groups::Group;
use crate::param::{Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};
use serde_json::Value as Json;

struct Distilled<'a> {
    case: &'a Case,
    tinymim: Tinymim,
    pairs: Vec<Pair>,
    heads: usize,
}

pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let (model, options) = (case.part("model")?, case.part("options")?);
    let student = encoder(case, &model, "w/")?;
    let own = options.size_or("student_block", model.size_or("relation_block", student.depth)?)?;
    ensure!(own == student.depth, "relations are those of the student's last block, {}, not of block {own}", student.depth);
    ensure!(model.number_or("drop_path", 0.0)? == 0.0, "cases have no stochastic depth");
    let described = case.part("teacher")?;
    let theirs = encoder(case, &described, "tw/")?;
    let block =
        if options.has("teacher_block") { options.size("teacher_block")? } else { described.size_or("intermediate", theirs.depth)? };
    ensure!((1..=theirs.depth).contains(&block), "the teacher's block is {block} of {}", theirs.depth);
    let heads = theirs.heads_of(block - 1);
    ensure!(
        student.heads_of(student.depth - 1) == heads,
        "the student's last block has {} heads, the teacher's block {block} {heads}",
        student.heads_of(student.depth - 1)
    );
    ensure!(student.grid() == theirs.grid(), "student and teacher have grids {:?} and {:?}", student.grid(), theirs.grid());
    let named = if options.has("relations") { options.list("relations")? } else { &[Json::from("qk"), Json::from("vv")] };
    let pairs = named.iter().map(|name| match name.as_str() {
        Some("qk") => Ok(Pair::Qk),
        Some("vv") => Ok(Pair::Vv),
        Some("qq") => Ok(Pair::Qq),
        Some("kk") => Ok(Pair::Kk),
        _ => bail!("options.relations names {name}; there are qk, vv, qq and kk"),
    });
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    ensure!(!pairs.is_empty() && pairs.len() <= 4, "options.relations names {} relations", pairs.len());
    let config = TinymimConfig {
        student,
        block: block - 1,
        heads,
        target: Target::Relations,
        relations: pairs.clone(),
        softmax: options.flag_or("softmax", true)?,
        feature: Feature::Output,
        class_token_norm: true,
        masks: None,
        decoder: None,
    };
    let mut tinymim = Tinymim::new(config, teacher(case, theirs, dtype)?, dtype, &Rng::new(0))?;
    steps::load(case, "w/", &mut tinymim.params)?;
    steps::run(case, &mut Distilled { case, tinymim, pairs, heads }, record)
}

fn encoder(case: &Case, model: &Fields, prefix: &str) -> Result<VitConfig> {
    let last_heads = model.has("last_heads").then(|| model.size("last_heads")).transpose()?;
    let config = VitConfig { last_heads, ..encoder_config(model, Position::SinCos)? };
    config.check()?;
    let (w, hidden) = (config.width, config.block(0).hidden);
    case.check_size(
        prefix,
        &[&[config.positions(), w], &[config.patch_values(), w], &[config.depth, 4, w, w], &[config.depth, 2, w, hidden]],
    )?;
    Ok(config)
}

fn teacher(case: &Case, config: VitConfig, dtype: Dtype) -> Result<Teacher> {
    let mut b = ParamsBuilder::default();
    let tokens = Tokens::new(&mut b, &config)?;
    let vit = Vit::new(&mut b, config, tokens, case.file.contains("tw/norm.weight"), Start::Xavier)?;
    let mut params = b.build(dtype, &Rng::new(0))?;
    steps::load(case, "tw/", &mut params)?;
    Ok(Teacher::new("the teacher", params, Network::Encoder(vit)))
}

impl Distilled<'_> {
    /// The relations of packed q, k, v under their names.
    fn note(&self, who: &str, qkv: &Var, at: &Place, record: &mut Record) -> Result<()> {
        for pair in &self.pairs {
            let relation = pair.products(qkv, self.heads)?.softmax()?;
            record.tensor(at.output(&format!("{who}_{}", pair.name())), relation.value());
        }
        Ok(())
    }
}

impl Subject for Distilled<'_> {
    fn params(&mut self) -> &mut Params {
        &mut self.tinymim.params
    }

    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var> {
        let tinymim = &self.tinymim;
        let [images, clean]: [Result<Tensor>; 2] =
            ["images", "images_teacher"].map(|name| self.case.images(&at.input(name), tinymim.params.dtype()));
        let taught = tinymim.teach(&clean?, None, None)?;
        self.note("teacher", &Var::constant(taught.clone()), at, record)?;
        let s = Scope::new(tape, &tinymim.params);
        let x = tinymim.before_last(&s, &images?, None)?;
        record.tensor(at.output(&format!("student_block{}_out", tinymim.student.config.depth - 1)), x.value());
        let qkv = tinymim.relating(&s, &x)?;
        self.note("student", &Var::constant(qkv.value().clone()), at, record)?;
        let terms = tinymim.relations(&qkv, &taught)?;
        ensure!(!terms.is_empty(), "there is no relation to learn");
        terms.iter().for_each(|(name, _, term)| record.tensor(at.output(&format!("loss_{name}")), term.value()));
        Ok(Loss::sum(terms)?.total)
    }

    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>> {
        mae::groups(&self.tinymim.params, self.tinymim.student.config.depth, optim)
    }
}
