//! TinyMIM: distilling masked-image-modelling pre-trained ViTs (arXiv 2301.01296).
//!
//! No mask, no decoder, no label: the student's last block is to relate its tokens as one block of a frozen teacher does, on the same crop.
//!
//!   R_XY = softmax(X Y^T / sqrt D) for X, Y of q, k, v, in heads;   L = sum over QK and VV of  mean_{b, head, i} sum_j T_ij (ln T_ij - ln S_ij)
//!
//! The student's last block has as many heads as the teacher's block; what lies behind its qkv gets no gradient and stays as it starts. Instead of relations the
//! features of a block, or the class token, can be the target; then a linear layer brings the student's to the teacher's width.
//!
//!   masque pretrain tinymim --teacher-path mae_pretrain_vit_large.pth --model tinymim_vit_base_patch16

use super::masks::{KeepRounding, Masking, Masks};
use super::teacher::{Cost, Teacher};
use super::{Batch, Loss, Method, Scores};
use crate::error::{Error, Result};
use crate::nn::block::Parts;
use crate::nn::decoder::{Decoder, DecoderConfig, DecoderTokens};
use crate::nn::linear::Linear;
use crate::nn::presets::{self, Family};
use crate::nn::vit::{DropPath, Tokens, Vit, VitConfig};
use crate::nn::weights::PROJECTIONS;
use crate::nn::{Scope, Start, flops};
use crate::ops::distill_kl::Reduction;
use crate::ops::feature_loss::Distance;
use crate::ops::relation_kl::Relation;
use crate::param::{Init, Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::trace;
use crate::{bail, ensure};
use clap::{ArgAction, ValueEnum};
use serde::{Deserialize, Serialize};

/// The flags of the method, with the released program's values.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TinymimArgs {
    /// Student by its published name or its size: tinymim_vit_base_patch16, small, glyph_t ...
    #[arg(long, default_value = "tinymim_vit_base_patch16", value_name = "NAME")]
    pub model: String,
    /// Side of a patch in pixels [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub patch_size: Option<usize>,
    /// What is distilled
    #[arg(long, value_enum, default_value_t = Target::Relations)]
    pub target: Target,
    /// Which relations
    #[arg(long, value_enum, value_delimiter = ',', action = ArgAction::Set, num_args = 1.., default_values_t = [Pair::Qk, Pair::Vv], value_name = "XY,..")]
    pub relations: Vec<Pair>,
    /// Relations are probabilities and compared by KL divergence; =false compares the scaled products by smooth L1
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = ArgAction::Set)]
    pub relation_softmax: bool,
    /// Which features --target features means
    #[arg(long, value_enum, default_value_t = Feature::Output)]
    pub feature: Feature,
    /// Compare class tokens behind the final norm; =false before it
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = ArgAction::Set)]
    pub class_token_norm: bool,
    /// The teacher's block, from 1 [default: 18 of 24, 12 of 12, else three quarters up]
    #[arg(long, value_name = "BLOCK")]
    pub intermediate: Option<usize>,
    /// Heads of the student's blocks [default: the model's]
    #[arg(long, value_name = "N")]
    pub heads: Option<usize>,
    /// Heads of the student's last block [default: those of the teacher's block]
    #[arg(long, value_name = "N")]
    pub last_heads: Option<usize>,
    /// Heads of the teacher's last block [default: those it was trained with where its file says so, else those of its other blocks]
    #[arg(long, value_name = "N")]
    pub teacher_last_heads: Option<usize>,
    /// Stochastic depth of the student, the same in all blocks but the last, which has none
    #[arg(long, default_value_t = 0.1, value_name = "RATE")]
    pub drop_path: f64,
    /// Stochastic depth of the teacher
    #[arg(long, default_value_t = 0.0, value_name = "RATE")]
    pub teacher_drop_path: f64,
    /// Jitter of brightness, contrast and saturation of what the student sees; the teacher sees the clean view of the same crop; 0: off
    #[arg(long, default_value_t = 0.4, value_name = "STRENGTH")]
    pub color_jitter: f64,
    /// Which patches student and teacher see
    #[arg(long, value_enum, default_value_t = Seen::None)]
    pub masking: Seen,
    /// Part of the patches that is hidden, where some are
    #[arg(long, default_value_t = 0.75, allow_negative_numbers = true, value_name = "RATIO")]
    pub mask_ratio: f64,
    /// How the number of patches that are kept comes from the ratio
    #[arg(long, value_enum, default_value_t = KeepRounding::Floor)]
    pub keep_rounding: KeepRounding,
    /// Reconstruct the hidden patches as well, as MAE does; needs --masking
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub reconstruct: bool,
    /// Of --reconstruct: compare with pixels that are normalised patch by patch
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub norm_pix_loss: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// How tokens relate in a block
    Relations,
    /// The class token as a distribution over channels
    #[value(alias = "class_token")]
    ClassToken,
    /// Features of a block
    Features,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pair {
    Qk,
    Vv,
    Qq,
    Kk,
}

impl Pair {
    pub fn name(self) -> &'static str {
        match self {
            Pair::Qk => "qk",
            Pair::Vv => "vv",
            Pair::Qq => "qq",
            Pair::Kk => "kk",
        }
    }

    fn relation(self) -> Relation {
        match self {
            Pair::Qk => Relation::Qk,
            Pair::Vv => Relation::Vv,
            Pair::Qq => Relation::Qq,
            Pair::Kk => Relation::Kk,
        }
    }

    /// Its two of q, k, v.
    fn parts(self) -> [usize; 2] {
        match self {
            Pair::Qk => [0, 1],
            Pair::Vv => [2, 2],
            Pair::Qq => [0, 0],
            Pair::Kk => [1, 1],
        }
    }

    /// X Y^T / sqrt D of packed q, k, v, [B, H, N, N].
    pub fn products(self, qkv: &Var, heads: usize) -> Result<Var> {
        let [x, y] = self.parts().map(|part| qkv.take_heads(part, 3, heads)); // [B, H, N, D]
        let x = x?;
        x.scale(1.0 / (x.value().last() as f64).sqrt())?.bmm_nt(&y?)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// What the block gives
    Output,
    /// The MLP before it joins the residual stream, and behind that (which is the output)
    Ffn,
    FfnResidual,
    /// The attention before it joins the residual stream, and behind that
    Attention,
    AttentionResidual,
    /// Queries, keys and values, three terms
    Qkv,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seen {
    /// All of them
    None,
    /// A part, at random
    Random,
    /// Units of 2 x 2 patches at random
    Block,
    /// Those that the student's class token looks at most
    Saliency,
}

/// The block that a teacher so deep is asked for, from 1.
pub fn usual_block(depth: usize) -> usize {
    match depth {
        12 => 12,
        24 => 18,
        _ => (3 * depth / 4).max(1),
    }
}

impl TinymimArgs {
    /// The teacher as it is built: its last block may have other heads.
    pub fn teacher(&self, config: VitConfig) -> Result<VitConfig> {
        let config = VitConfig {
            last_heads: self.teacher_last_heads.or(config.last_heads),
            drop_path: DropPath::Constant(rate("--teacher-drop-path", self.teacher_drop_path)?),
            ..config
        };
        config.check().map_err(|error| Error::usage(format!("--teacher-last-heads: {}", error.chain())))?;
        Ok(config)
    }

    /// For square images of this side and so many channels, and a teacher.
    pub fn config(&self, image: usize, channels: usize, teacher: &VitConfig) -> Result<TinymimConfig> {
        let usage = |text: String| Err(Error::usage(text));
        let named = presets::named(&self.model)?;
        named.needs_patches(&self.model, "masque pretrain tinymim")?;
        if let Some(family) = named.family.filter(|family| *family != Family::Mae) {
            return usage(format!("--model {} is a {family:?} classifier; pre-training takes tinymim_vit_... or a size", self.model));
        }
        self.check_read()?;
        let block = self.intermediate.unwrap_or_else(|| usual_block(teacher.depth));
        if block == 0 || block > teacher.depth {
            return usage(format!("--intermediate {block}: the teacher has blocks 1 to {}", teacher.depth));
        }
        let heads = teacher.heads_of(block - 1);
        if let Some(last) = self.teacher_last_heads.filter(|&last| block < teacher.depth && last != teacher.heads) {
            return usage(format!(
                "--teacher-last-heads {last} is about the teacher's last block, {}, but block {block} is asked; give --intermediate {} or --teacher-last-heads {}",
                teacher.depth, teacher.depth, teacher.heads
            ));
        }
        let mut student = named.encoder(image)?;
        (student.patch, student.channels) = (self.patch_size.unwrap_or(student.patch), channels);
        student.heads = self.heads.unwrap_or(student.heads);
        student.last_heads = Some(self.last_heads.unwrap_or(if self.target == Target::Relations { heads } else { student.heads }));
        student.drop_path = DropPath::ButLast(rate("--drop-path", self.drop_path)?);
        let own = student.heads_of(student.depth - 1);
        if self.target == Target::Relations && own != heads {
            return usage(format!(
                "relations are compared head by head, but the student's last block has {own} heads and the teacher's block {block} {heads}; leave --last-heads out"
            ));
        }
        if self.target != Target::Relations || self.last_heads.is_some() {
            let fits = own > 0 && student.width.is_multiple_of(own);
            let flag = if self.last_heads.is_some() { "--last-heads" } else { "--heads" };
            if !fits {
                return usage(format!("{flag} {own}: the student's width of {} does not split into so many heads", student.width));
            }
        } else if own == 0 || !student.width.is_multiple_of(own) {
            return usage(format!(
                "the teacher's block {block} has {heads} heads, into which the student's width of {} does not split; give --intermediate or --teacher-last-heads",
                student.width
            ));
        }
        student.check().map_err(|error| Error::usage(format!("--input-size, --patch-size and --heads: {}", error.chain())))?;
        if (1..self.relations.len()).any(|i| self.relations[..i].contains(&self.relations[i])) {
            return usage("--relations names one twice".to_string());
        }
        let masks = match self.masking {
            Seen::None if self.reconstruct => {
                return usage("--reconstruct paints hidden patches, but none are hidden; give --masking random".to_string());
            }
            Seen::None => None,
            Seen::Random => Some(Masking::Random),
            Seen::Block => Some(Masking::Block),
            Seen::Saliency => Some(Masking::Saliency),
        };
        let masks = masks.map(|kind| Masks::new(kind, &student, self.mask_ratio, self.keep_rounding)).transpose()?;
        Ok(TinymimConfig {
            student,
            block: block - 1,
            heads,
            target: self.target,
            relations: self.relations.clone(),
            softmax: self.relation_softmax,
            feature: self.feature,
            class_token_norm: self.class_token_norm,
            masks,
            decoder: self.reconstruct.then(|| (named.decoder.clone(), self.norm_pix_loss.then_some(pixels::EPS))),
        })
    }

    /// Refuses flags that say something of a target or of masks that are not chosen.
    fn check_read(&self) -> Result<()> {
        let (relations, features, masked) = (self.target == Target::Relations, self.target == Target::Features, self.masking != Seen::None);
        let unread = [
            ("--relations", "--target relations", !relations && self.relations != [Pair::Qk, Pair::Vv]),
            ("--relation-softmax=false", "--target relations", !relations && !self.relation_softmax),
            ("--feature", "--target features", !features && self.feature != Feature::Output),
            ("--class-token-norm=false", "--target class-token", self.target != Target::ClassToken && !self.class_token_norm),
            ("--mask-ratio", "--masking random", !masked && self.mask_ratio != 0.75),
            ("--keep-rounding", "--masking random", !masked && self.keep_rounding != KeepRounding::Floor),
            ("--norm-pix-loss", "--reconstruct", !self.reconstruct && self.norm_pix_loss),
        ];
        match unread.into_iter().find(|(.., unread)| *unread) {
            Some((flag, of, _)) => Err(Error::usage(format!("{flag} has no effect without {of}; give that too, or leave {flag} out"))),
            None => Ok(()),
        }
    }
}

fn rate(flag: &str, rate: f64) -> Result<f64> {
    if (0.0..1.0).contains(&rate) { Ok(rate) } else { Err(Error::usage(format!("{flag} {rate} is not in [0, 1)"))) }
}

pub struct TinymimConfig {
    pub student: VitConfig,
    /// The teacher's block, from 0, and its heads.
    pub block: usize,
    pub heads: usize,
    pub target: Target,
    pub relations: Vec<Pair>,
    pub softmax: bool,
    pub feature: Feature,
    pub class_token_norm: bool,
    /// None where all patches are seen.
    pub masks: Option<Masks>,
    /// Reconstructs hidden patches; what is added to a patch's variance where pixels are normalised.
    pub decoder: Option<(DecoderConfig, Option<f64>)>,
}

impl TinymimConfig {
    /// What the teacher's block gives of images [B, C, H, W]: packed q, k, v, features, or class tokens. Nothing behind it is run. Its stochastic depth
    /// draws from `noise`.
    pub fn ask(&self, teacher: &Teacher, images: &Tensor, kept: Option<&Tensor>, noise: Option<&Rng>) -> Result<Tensor> {
        let encoder = teacher.encoder()?;
        let noise = noise.map(|rng| rng.within("teacher."));
        teacher.pass(|s| {
            let s = &Scope { noise: noise.as_ref(), ..*s };
            let x = encoder.first_blocks(s, &encoder.embed(s, images, kept)?, self.block)?;
            let answer = match (self.target, self.feature) {
                _ if self.ends_at_qkv() => encoder.qkv(s, &x, self.block)?,
                (Target::Features, feature) => chosen(&encoder.parts(s, &x, self.block)?, feature),
                _ => self.class_token(s, encoder, &encoder.block(s, &x, self.block)?)?,
            };
            Ok(answer.value().clone())
        })
    }

    /// Whether nothing behind queries, keys and values of the blocks that are compared has to be run.
    fn ends_at_qkv(&self) -> bool {
        matches!((self.target, self.feature), (Target::Relations, _) | (Target::Features, Feature::Qkv))
    }

    fn class_token(&self, s: &Scope, vit: &Vit, x: &Var) -> Result<Var> {
        let token = x.token(0)?; // [B, C]
        if self.class_token_norm { vit.norm(s, &token) } else { Ok(token) }
    }

    /// What the teacher is asked for, in words.
    pub fn asked(&self) -> &'static str {
        match (self.target, self.feature) {
            (Target::Relations, _) | (Target::Features, Feature::Qkv) => "queries, keys and values",
            (Target::Features, Feature::Output | Feature::FfnResidual) => "features, the output",
            (Target::Features, Feature::Ffn) => "features, the MLP's branch",
            (Target::Features, Feature::Attention) => "features, the attention's branch",
            (Target::Features, Feature::AttentionResidual) => "features behind the attention",
            (Target::ClassToken, _) if self.class_token_norm => "class tokens behind the norm",
            (Target::ClassToken, _) => "class tokens",
        }
    }

    /// Whether the teacher answers the same of the same image.
    pub fn repeats(&self, teacher: &VitConfig) -> bool {
        self.masks.is_none() && teacher.drop_path == DropPath::Constant(0.0)
    }
}

pub struct Tinymim {
    pub params: Params,
    pub student: Vit,
    pub teacher: Teacher,
    /// To the teacher's width: none, one, or one for each of q, k, v.
    heads: Vec<Linear>,
    decoder: Option<(Decoder, Option<f64>)>,
    c: TinymimConfig,
}

/// Beta of every smooth L1 of the method.
const SMOOTH: Distance = Distance::SmoothL1 { beta: 2.0 };
/// Of the whitening of features.
const WHITE: f64 = 1e-6;

impl Tinymim {
    pub fn new(c: TinymimConfig, teacher: Teacher, dtype: Dtype, rng: &Rng) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        let tokens = Tokens::new(&mut b, &c.student)?;
        let decoder_tokens = c.decoder.as_ref().map(|(decoder, _)| DecoderTokens::new(&mut b, decoder, &c.student)).transpose()?;
        let student = Vit::new(&mut b, c.student.clone(), tokens, true, Start::Xavier)?;
        let decoder = match (&c.decoder, decoder_tokens) {
            (Some((decoder, norm)), Some(tokens)) => Some((Decoder::new(&mut b, decoder, &student.config, tokens, Start::Xavier)?, *norm)),
            _ => None,
        };
        let (from, to) = (c.student.width, teacher.vit().width);
        let count = match (c.target, c.feature) {
            (Target::Relations, _) => 0,
            (Target::Features, Feature::Qkv) => 3,
            _ => 1,
        };
        let head = |n: usize| Linear::new(&mut b, &format!("{PROJECTIONS}{n}"), from, to, Init::xavier(from, to));
        let heads = (0..count).map(head).collect::<Result<_>>()?;
        Ok(Self { params: b.build(dtype, rng)?, student, teacher, heads, decoder, c })
    }

    /// What the teacher's block gives of images [B, C, H, W]; see [`TinymimConfig::ask`].
    pub fn teach(&self, images: &Tensor, kept: Option<&Tensor>, noise: Option<&Rng>) -> Result<Tensor> {
        self.c.ask(&self.teacher, images, kept, noise)
    }

    /// Student and teacher see the patches of other masks from now on, or all where there are none.
    pub fn see(&mut self, masks: Option<Masks>) {
        self.c.masks = masks;
    }

    /// The teacher's block that is asked, from 0.
    pub fn asked(&self) -> usize {
        self.c.block
    }

    /// Asks another block of the teacher from now on, from 0.
    pub fn ask(&mut self, block: usize) -> Result<()> {
        let teacher = self.teacher.vit();
        ensure!(block < teacher.depth, "block {block} of {} was asked for", teacher.depth);
        let heads = teacher.heads_of(block);
        ensure!(heads == self.c.heads, "block {block} of the teacher has {heads} heads, and the student's last block {}", self.c.heads);
        self.c.block = block;
        Ok(())
    }

    /// Multiply-accumulates of the student's encoder for one image.
    pub fn encoder_macs(&self) -> u64 {
        let (c, seen) = (&self.c.student, self.seen());
        let (n, width) = ((seen + c.extra()) as u64, c.width as u64);
        let until = |depth: usize| flops::vit_macs(&VitConfig { depth, ..c.clone() }, seen);
        if self.ends_at_qkv() { until(c.depth - 1) + 3 * n * width * width } else { until(c.depth) }
    }

    /// Hands out the teacher and how it is asked about whole images, so that its answers can be remembered.
    pub fn remembering(
        &mut self,
        remember: impl FnOnce(&mut Teacher, &dyn Fn(&Teacher, &Tensor) -> Result<Tensor>) -> Result<()>,
    ) -> Result<()> {
        let (teacher, c) = (&mut self.teacher, &self.c);
        remember(teacher, &|teacher, images| c.ask(teacher, images, None, None))
    }

    /// The residual stream that enters the student's last block, [B, 1 + K, C].
    pub fn before_last(&self, s: &Scope, images: &Tensor, kept: Option<&Tensor>) -> Result<Var> {
        self.student.first_blocks(s, &self.student.embed(s, images, kept)?, self.c.student.depth - 1)
    }

    /// The student's packed q, k, v of its last block.
    pub fn relating(&self, s: &Scope, x: &Var) -> Result<Var> {
        self.student.qkv(s, x, self.c.student.depth - 1)
    }

    /// One term for each relation.
    pub fn relations(&self, student: &Var, teacher: &Tensor) -> Result<Vec<(&'static str, f64, Var)>> {
        let term = |pair: &Pair| -> Result<_> {
            let loss = if self.c.softmax {
                student.relation_kl(teacher, self.c.heads, &[pair.relation()])?.0
            } else {
                let target = pair.products(&Var::constant(teacher.clone()), self.c.heads)?;
                pair.products(student, self.c.heads)?.feature_loss(target.value(), SMOOTH)?
            };
            Ok((pair.name(), 1.0, loss))
        };
        self.c.relations.iter().map(term).collect()
    }

    /// The distance of the student's features, projected, to the teacher's, whitened.
    fn features(&self, s: &Scope, head: usize, student: &Var, teacher: &Var) -> Result<Var> {
        let target = teacher.layernorm_plain(WHITE)?;
        self.heads[head].forward(s, student)?.feature_loss(target.value(), SMOOTH)
    }

    /// The loss as it stands between what the student's last block gives and the teacher's answer. `parts` is None where nothing behind `qkv` is needed.
    fn distillation(&self, s: &Scope, qkv: &Var, parts: Option<&Parts>, taught: &Tensor) -> Result<Vec<(&'static str, f64, Var)>> {
        let teacher = Var::constant(taught.clone());
        match (self.c.target, self.c.feature, parts) {
            (Target::Relations, ..) => self.relations(qkv, taught),
            (Target::Features, Feature::Qkv, _) => {
                let part = |packed: &Var, part: usize| -> Result<Var> {
                    let &[batch, n, c] = packed.shape() else { bail!("q, k and v are {:?} but [B, N, 3 C] is needed", packed.value()) };
                    packed.take_heads(part, 3, 1)?.reshape(&[batch, n, c / 3])
                };
                let term = |(i, name)| Ok((name, 1.0, self.features(s, i, &part(qkv, i)?, &part(&teacher, i)?)?));
                ["q", "k", "v"].into_iter().enumerate().map(term).collect()
            }
            (Target::Features, feature, Some(parts)) => {
                Ok(vec![("features", 1.0, self.features(s, 0, &chosen(parts, feature), &teacher)?)])
            }
            (Target::ClassToken, _, Some(parts)) => {
                let own = self.c.class_token(s, &self.student, &parts.output)?;
                Ok(vec![("class token", 1.0, self.heads[0].forward(s, &own)?.distill_kl(taught, 1.0, Reduction::Batch)?)])
            }
            (_, _, None) => bail!("the student's last block was not run"),
        }
    }

    fn walk(&self, s: &Scope, batch: &Batch, rng: &Rng) -> Result<Loss> {
        let device = self.params.device();
        let images = batch.images.on(device)?;
        let mask = self.c.masks.as_ref().map(|masks| masks.draw(&images, (&self.student, &self.params), rng)).transpose()?;
        let kept = mask.as_ref().map(|mask| &mask.kept);
        let taught = match &batch.teacher_output {
            Some(known) => known.on(device)?,
            None => self.teach(&batch.for_teacher().on(device)?, kept, s.noise)?,
        };
        let x = self.before_last(s, &images, kept)?;
        let whole = if self.ends_at_qkv() { None } else { Some(self.student.parts(s, &x, self.c.student.depth - 1)?) };
        let qkv = whole.as_ref().map_or_else(|| self.relating(s, &x), |parts| Ok(parts.qkv.clone()))?;
        let phase = trace::phase("loss");
        let mut terms = self.distillation(s, &qkv, whole.as_ref(), &taught)?;
        drop(phase);
        if let (Some((decoder, norm_pix)), Some(mask), Some(parts)) = (&self.decoder, &mask, &whole) {
            let latent = self.student.norm(s, &parts.output)?;
            let pred = decoder.forward(s, &latent, &mask.restore)?;
            let _phase = trace::phase("loss");
            terms.push(("pixels", 1.0, pred.pixel_loss(&images, self.c.student.patch, *norm_pix, &mask.hidden)?));
        }
        Loss::sum(terms)
    }

    /// Whether the student's last block ends at queries, keys and values too: a decoder needs all of it.
    fn ends_at_qkv(&self) -> bool {
        self.c.ends_at_qkv() && self.decoder.is_none()
    }

    /// Patches that both see.
    fn seen(&self) -> usize {
        self.c.masks.as_ref().map_or(self.c.student.patches(), Masks::kept_each)
    }
}

fn chosen(parts: &Parts, feature: Feature) -> Var {
    let chosen = match feature {
        Feature::Output | Feature::FfnResidual => &parts.output,
        Feature::Ffn => &parts.mlp,
        Feature::Attention => &parts.attention,
        Feature::AttentionResidual => &parts.attended,
        Feature::Qkv => &parts.qkv,
    };
    chosen.clone()
}

impl Method for Tinymim {
    fn params(&mut self) -> &mut Params {
        &mut self.params
    }

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss> {
        self.walk(&Scope::new(tape, &self.params).with_noise(rng), batch, rng)
    }

    fn encoder(&self) -> &Vit {
        &self.student
    }

    fn prepare(&self, batch: &mut Batch, _rng: &Rng) -> Result<()> {
        batch.teacher_output = self.teacher.recall(batch, |images| self.teach(images, None, None))?;
        Ok(())
    }

    fn scores(&self, batch: &Batch, rng: &Rng) -> Result<Scores> {
        let loss = self.walk(&Scope::new(&Tape::off(), &self.params), batch, rng)?.total;
        Ok(Scores { loss: loss.value().read()?[0], right: None })
    }

    fn macs(&self) -> [u64; 2] {
        let (c, seen) = (&self.c.student, self.seen());
        let (n, width) = ((seen + c.extra()) as u64, c.width as u64);
        let mut all = self.encoder_macs();
        let (products, projected) = match self.c.target {
            Target::Relations => (self.c.relations.len() as u64, 0),
            Target::Features => (0, n),
            Target::ClassToken => (0, 1),
        };
        all += products * n * n * width + self.heads.len() as u64 * projected * width * self.teacher.vit().width as u64;
        all += self.decoder.as_ref().map_or(0, |(decoder, _)| flops::decoder_macs(&decoder.config, c, seen));
        let looks = self.c.masks.as_ref().is_some_and(|masks| masks.kind() == Masking::Saliency);
        [all + if looks { flops::vit_macs(c, c.patches()) } else { 0 }, all]
    }

    fn teacher(&self) -> Option<&Teacher> {
        Some(&self.teacher)
    }

    fn teacher_cost(&self) -> Option<Cost> {
        let teacher = self.teacher.vit();
        let (n, width) = ((self.seen() + teacher.extra()) as u64, teacher.width as u64);
        let macs = match self.c.ends_at_qkv() {
            true => self.teacher.macs(self.seen(), self.c.block) + 3 * n * width * width,
            false => self.teacher.macs(self.seen(), self.c.block + 1),
        };
        Some(self.teacher.cost(macs))
    }
}
