//! The vision transformer, once for all of its families: MAE encoders, ViT and DeiT classifiers, distilled DeiT, DeiT-III.
//!
//!   tokens = patches projected + their positions;  [class token, distillation token] in front;  blocks;  norm
//!
//! ConViT has no token in front, and convolution [`stages`](super::stages) in the place of the projection; in pre-training what they end with is added
//! between the last block and the norm.
//!
//! Only the patches that are kept are projected: [`Vit::embed`] gathers pixels first. A teacher that is asked for an early block stops there.

use super::block::{Block, BlockConfig, Parts};
use super::linear::Linear;
use super::norm::Norm;
use super::stages::{Staged, Stages, StagesConfig, View};
use super::{Scope, Start, position};
use crate::error::Result;
use crate::ops::gather::gather_patches;
use crate::param::{Init, ParamId, ParamsBuilder, Role};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::trace;
use crate::{bail, ensure};

/// Where the position table comes from and which tokens have a row in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Position {
    /// Fixed sines and cosines, zero rows for the tokens in front.
    SinCos,
    /// Learned, with rows for the tokens in front.
    Learned,
    /// Learned, for patches only (DeiT-III, CaiT).
    LearnedPatches,
}

/// Which tokens in front are asked where they look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Query {
    #[default]
    Class,
    Distillation,
    Both,
}

/// How the rate of stochastic depth goes over the blocks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum DropPath {
    /// From 0 in the first block to this in the last.
    Linear(f64),
    Constant(f64),
    /// The same in all blocks but the last, which has none (TinyMIM).
    ButLast(f64),
}

#[derive(Clone, Debug)]
pub struct VitConfig {
    /// Height and width of the images.
    pub image: [usize; 2],
    /// Side in pixels of what becomes one token.
    pub patch: usize,
    pub channels: usize,
    pub width: usize,
    pub depth: usize,
    pub heads: usize,
    /// Heads of the last block where they differ (TinyMIM).
    pub last_heads: Option<usize>,
    pub mlp_ratio: f64,
    pub eps: f64,
    pub qkv_bias: bool,
    pub position: Position,
    /// Whether a class token stands in front.
    pub class_token: bool,
    pub distillation_token: bool,
    /// Convolution stages in the place of the projection of patches.
    pub stages: Option<StagesConfig>,
    pub layer_scale: Option<f32>,
    pub drop_path: DropPath,
}

impl VitConfig {
    /// A plain ViT for square images of three channels, as MAE pre-trains it.
    pub fn new(image: usize, patch: usize, width: usize, depth: usize, heads: usize) -> Self {
        Self {
            image: [image, image],
            patch,
            channels: 3,
            width,
            depth,
            heads,
            last_heads: None,
            mlp_ratio: 4.0,
            eps: 1e-6,
            qkv_bias: true,
            position: Position::SinCos,
            class_token: true,
            distillation_token: false,
            stages: None,
            layer_scale: None,
            drop_path: DropPath::Constant(0.0),
        }
    }

    /// Rows and columns of the grid of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.image.map(|side| side / self.patch.max(1))
    }

    pub fn patches(&self) -> usize {
        self.grid().iter().product()
    }

    /// Numbers in a patch.
    pub fn patch_values(&self) -> usize {
        self.patch * self.patch * self.channels
    }

    /// Tokens in front of the patches.
    pub fn extra(&self) -> usize {
        self.class_token as usize + self.distillation_token as usize
    }

    /// Rows of the position table.
    pub fn positions(&self) -> usize {
        self.patches() + if self.position == Position::LearnedPatches { 0 } else { self.extra() }
    }

    /// Heads of block `i`.
    pub fn heads_of(&self, i: usize) -> usize {
        if i + 1 == self.depth { self.last_heads.unwrap_or(self.heads) } else { self.heads }
    }

    /// Of the decoder that it is pre-trained with: ConViT's takes the ratio of its first stage.
    pub fn decoder_mlp_ratio(&self) -> f64 {
        self.stages.as_ref().map_or(self.mlp_ratio, |stages| stages.mlp_ratios[0])
    }

    /// Blocks in front of those of the ViT itself.
    fn stage_blocks(&self) -> usize {
        self.stages.as_ref().map_or(0, StagesConfig::depth)
    }

    /// Stochastic depth of block `i`, counted through stages and blocks.
    pub fn drop_rate(&self, i: usize) -> f64 {
        let last = self.stage_blocks() + self.depth - 1;
        match self.drop_path {
            DropPath::Linear(most) if last > 0 => most * i as f64 / last as f64,
            DropPath::Linear(_) => 0.0,
            DropPath::ButLast(_) if i == last => 0.0,
            DropPath::Constant(rate) | DropPath::ButLast(rate) => rate,
        }
    }

    /// Block `i` of the transformer.
    pub fn block(&self, i: usize) -> BlockConfig {
        let drop_path = self.drop_rate(self.stage_blocks() + i);
        BlockConfig {
            width: self.width,
            heads: self.heads_of(i),
            hidden: (self.width as f64 * self.mlp_ratio) as usize,
            eps: self.eps,
            qkv_bias: self.qkv_bias,
            layer_scale: self.layer_scale,
            drop_path,
        }
    }

    pub fn check(&self) -> Result<()> {
        let [h, w] = self.image;
        ensure!(
            self.patch > 0 && h > 0 && w > 0 && h.is_multiple_of(self.patch) && w.is_multiple_of(self.patch),
            "an image of {h} x {w} does not split into patches of {}; choose a size that is a multiple",
            self.patch
        );
        ensure!(self.class_token || !self.distillation_token, "a distillation token stands behind a class token, and there is none");
        if let Some(stages) = &self.stages {
            stages.check()?;
            ensure!(
                stages.patch() == self.patch && !self.class_token,
                "convolution stages of {:?} make tokens of {} pixels and no class token; the patch is {}",
                stages.patches,
                stages.patch(),
                self.patch
            );
        }
        ensure!(self.channels > 0 && self.depth > 0, "a ViT needs channels and blocks, not {} and {}", self.channels, self.depth);
        for heads in [self.heads, self.last_heads.unwrap_or(self.heads)] {
            ensure!(
                heads > 0 && self.width > 0 && self.width.is_multiple_of(heads),
                "a width of {} does not split into {heads} heads",
                self.width
            );
        }
        if self.position == Position::SinCos {
            ensure!(self.width.is_multiple_of(4), "sin-cos positions need a width that is a multiple of 4, not {}", self.width);
        }
        ensure!(
            self.mlp_ratio.is_finite() && self.mlp_ratio > 0.0 && self.block(0).hidden > 0,
            "an MLP ratio of {} leaves nothing",
            self.mlp_ratio
        );
        Ok(())
    }
}

impl VitConfig {
    fn check_images(&self, images: &Tensor) -> Result<()> {
        let &[_, channels, h, w] = images.shape() else { bail!("images are {images:?} but [B, C, H, W] is needed") };
        ensure!(
            channels == self.channels && [h, w] == self.image,
            "images are {images:?} but the model wants {} x {} x {}",
            self.channels,
            self.image[0],
            self.image[1]
        );
        Ok(())
    }
}

/// The tokens in front and the position table, which come first in the state dict.
pub struct Tokens {
    pub(super) class: Option<ParamId>,
    pub(super) position: ParamId,
    distillation: Option<ParamId>,
}

impl Tokens {
    pub fn new(b: &mut ParamsBuilder, c: &VitConfig) -> Result<Self> {
        c.check()?;
        let class = if c.class_token { Some(b.add("cls_token", &[1, 1, c.width], Init::Normal(0.02))?) } else { None };
        let shape = [1, c.positions(), c.width];
        let position = match c.position {
            Position::SinCos => {
                let table = position::sincos(c.grid(), c.width, c.extra())?;
                b.add_as("pos_embed", &shape, Init::Table(table), Role::Frozen)?
            }
            _ => b.add("pos_embed", &shape, Init::Normal(0.02))?,
        };
        let distillation = if c.distillation_token { Some(b.add("dist_token", &[1, 1, c.width], Init::Normal(0.02))?) } else { None };
        Ok(Self { class, position, distillation })
    }
}

/// The projection of patches.
pub(super) struct PatchEmbed(Linear);

impl PatchEmbed {
    pub fn new(b: &mut ParamsBuilder, c: &VitConfig, start: Start) -> Result<Self> {
        let values = c.patch_values();
        let shape = [c.width, c.channels, c.patch, c.patch];
        let weight = start.patch_projection(values, c.width);
        Ok(Self(Linear::with_bias(b, "patch_embed.proj", &shape, weight, Some(Init::fan_in(values)))?))
    }

    /// The kept patches (all if None) in the order of `kept` [B, K], without positions: [B, K, C].
    pub fn forward(&self, s: &Scope, c: &VitConfig, images: &Tensor, kept: Option<&Tensor>) -> Result<Var> {
        c.check_images(images)?;
        let images = images.on(s.params.device())?;
        let pixels = gather_patches(&images, (c.patch, c.patch), kept, s.params.precision())?; // [B, K, P]
        self.0.forward(s, &Var::constant(pixels))
    }
}

/// How pixels become tokens.
enum Embedding {
    Patches(PatchEmbed),
    Stages(Box<Stages>),
}

pub struct Vit {
    pub config: VitConfig,
    tokens: Tokens,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Option<Norm>,
}

impl Vit {
    /// Registers everything behind the tokens; `norm` is false for classifiers that pool first.
    pub fn new(b: &mut ParamsBuilder, config: VitConfig, tokens: Tokens, norm: bool, start: Start) -> Result<Self> {
        let c = &config;
        let embedding = match &c.stages {
            None => Embedding::Patches(PatchEmbed::new(b, c, start)?),
            Some(stages) => Embedding::Stages(Box::new(Stages::new(b, c, stages, start)?)),
        };
        let name = if c.stages.is_some() { "blocks3" } else { "blocks" };
        let blocks = (0..c.depth).map(|i| Block::new(b, &format!("{name}.{i}"), &c.block(i), start)).collect::<Result<_>>()?;
        let norm = if norm { Some(Norm::new(b, "norm", c.width, c.eps)?) } else { None };
        Ok(Self { config, tokens, embedding, blocks, norm })
    }

    /// Tokens in front, then the kept patches (all if None) in the order of `kept` [B, K]; all with their positions: [B, extra + K, C].
    pub fn embed(&self, s: &Scope, images: &Tensor, kept: Option<&Tensor>) -> Result<Var> {
        let _phase = trace::phase("encoder");
        let x = match &self.embedding {
            Embedding::Patches(patches) => patches.forward(s, &self.config, images, kept)?, // [B, K, C]
            Embedding::Stages(stages) => {
                ensure!(kept.is_none(), "convolution stages have to know where patches are that are not seen, not only which are");
                stages.forward(s, &self.checked(s, images)?, None, &mut |_, _, _| ())?.tokens
            }
        };
        self.with_positions(s, &x, kept)
    }

    /// Images on the model's device, once they fit.
    fn checked(&self, s: &Scope, images: &Tensor) -> Result<Tensor> {
        self.config.check_images(images)?;
        images.on(s.params.device())
    }

    /// Tokens in front of x [B, K, C], all with their positions.
    fn with_positions(&self, s: &Scope, x: &Var, kept: Option<&Tensor>) -> Result<Var> {
        let table = s.param(self.tokens.position);
        let [class, distillation] = [self.tokens.class, self.tokens.distillation].map(|id| id.map(|id| s.param(id)));
        let front: Vec<&Var> = class.iter().chain(&distillation).collect();
        if front.is_empty() {
            return x.add_positions(&table, 0, kept);
        }
        if self.config.position == Position::LearnedPatches {
            return x.add_positions(&table, 0, kept)?.prepend(&front);
        }
        x.prepend_with_positions(&front, &table, kept) // [B, extra + K, C]
    }

    /// A view of the images: tokens in front, then the patches that are seen, all with their positions; and what is to be added behind the last block.
    /// Views may be several times as many as images: view i is of image i modulo their number.
    pub fn embed_view(&self, s: &Scope, images: &Tensor, view: &View, see: &mut dyn FnMut(usize, usize, &Var)) -> Result<Staged> {
        let Embedding::Stages(stages) = &self.embedding else {
            return Ok(Staged { tokens: self.embed(s, images, Some(view.kept))?, fused: None });
        };
        let _phase = trace::phase("encoder");
        let staged = stages.forward(s, &self.checked(s, images)?, Some(view), see)?;
        Ok(Staged { tokens: self.with_positions(s, &staged.tokens, Some(view.kept))?, ..staged })
    }

    /// All patches, with `token` where the view hides one, behind the tokens in front; all with their positions: [B, extra + L, C].
    pub fn embed_hiding(&self, s: &Scope, images: &Tensor, view: &View, token: &Var) -> Result<Var> {
        let _phase = trace::phase("encoder");
        let Embedding::Patches(patches) = &self.embedding else { bail!("convolution stages have no place for a token instead of a patch") };
        let seen = patches.forward(s, &self.config, images, Some(view.kept))?; // [B, K, C]
        self.with_positions(s, &seen.unshuffle(token, view.restore, 0)?, None)
    }

    /// Behind the last block: the sum with what the stages ended with, then the norm.
    pub fn finish(&self, s: &Scope, x: &Var, fused: Option<&Var>) -> Result<Var> {
        match fused {
            None => self.norm(s, x),
            Some(fused) => self.norm(s, &x.add(fused)?),
        }
    }

    /// What a decoder sees of a view, [B, extra + K, C].
    pub fn encode(&self, s: &Scope, images: &Tensor, view: &View) -> Result<Var> {
        let seen = self.embed_view(s, images, view, &mut |_, _, _| ())?;
        self.finish(s, &self.blocks(s, &seen.tokens)?, seen.fused.as_ref())
    }

    /// All blocks; `see` is shown what each gives.
    pub fn blocks_seen(&self, s: &Scope, x: &Var, mut see: impl FnMut(usize, &Var)) -> Result<Var> {
        let _phase = trace::phase("encoder");
        let mut x = x.clone();
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(s, &x)?;
            see(i, &x);
        }
        Ok(x)
    }

    pub fn blocks(&self, s: &Scope, x: &Var) -> Result<Var> {
        self.blocks_seen(s, x, |_, _| ())
    }

    /// All blocks, and the class token's probabilities [B, H, N] in the last one.
    pub fn blocks_with_class_rows(&self, s: &Scope, x: &Var) -> Result<(Var, Tensor)> {
        self.blocks_with_rows(s, x, self.blocks.len() - 1, Query::Class)
    }

    /// All blocks, and what tokens in front attend to in block `at`: probabilities over all keys, [B, H, N], or [B, 2 H, N] of both tokens.
    pub fn blocks_with_rows(&self, s: &Scope, x: &Var, at: usize, query: Query) -> Result<(Var, Tensor)> {
        let _phase = trace::phase("encoder");
        ensure!(at < self.blocks.len(), "block {at} was asked for but there are {}", self.blocks.len());
        ensure!(query == Query::Class || self.config.distillation_token, "there is no distillation token to ask where it looks");
        let (mut x, mut seen) = (x.clone(), None);
        for (i, block) in self.blocks.iter().enumerate() {
            if i != at {
                x = block.forward(s, &x)?;
                continue;
            }
            let (y, rows) = block.forward_looking(s, &x, query)?;
            (x, seen) = (y, Some(rows));
        }
        Ok((x, seen.expect("the block is among them")))
    }

    /// Block `i` alone.
    pub fn block(&self, s: &Scope, x: &Var, i: usize) -> Result<Var> {
        let _phase = trace::phase("encoder");
        ensure!(i < self.blocks.len(), "block {i} was asked for but there are {}", self.blocks.len());
        self.blocks[i].forward(s, x)
    }

    /// Block `i` alone, with everything on its way.
    pub fn parts(&self, s: &Scope, x: &Var, i: usize) -> Result<Parts> {
        let _phase = trace::phase("encoder");
        ensure!(i < self.blocks.len(), "block {i} was asked for but there are {}", self.blocks.len());
        self.blocks[i].parts(s, x)
    }

    /// The first `count` blocks and no more.
    pub fn first_blocks(&self, s: &Scope, x: &Var, count: usize) -> Result<Var> {
        let _phase = trace::phase("encoder");
        ensure!(count <= self.blocks.len(), "block {count} was asked for but there are {}", self.blocks.len());
        self.blocks[..count].iter().try_fold(x.clone(), |x, block| block.forward(s, &x))
    }

    /// Packed queries, keys and values of block `i` for its input x; the block itself is not run.
    pub fn qkv(&self, s: &Scope, x: &Var, i: usize) -> Result<Var> {
        let _phase = trace::phase("encoder");
        ensure!(i < self.blocks.len(), "block {i} was asked for but there are {}", self.blocks.len());
        self.blocks[i].qkv(s, x)
    }

    /// The final norm; the input itself where there is none.
    pub fn norm(&self, s: &Scope, x: &Var) -> Result<Var> {
        let _phase = trace::phase("encoder");
        self.norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(s, x))
    }

    /// Whether there is a final norm.
    pub fn has_norm(&self) -> bool {
        self.norm.is_some()
    }

    /// Embedding, blocks and norm.
    pub fn forward(&self, s: &Scope, images: &Tensor, kept: Option<&Tensor>) -> Result<Var> {
        self.norm(s, &self.blocks(s, &self.embed(s, images, kept)?)?)
    }
}
