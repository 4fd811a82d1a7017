//! The vision transformer, once for all of its families: MAE encoders, ViT and DeiT classifiers, distilled DeiT, DeiT-III.
//!
//!   tokens = patches projected + their positions;  [class token, distillation token] in front;  blocks;  norm
//!
//! Only the patches that are kept are projected: [`Vit::embed`] gathers pixels first. A teacher that is asked for an early block stops there.

use super::block::{Block, BlockConfig, Parts};
use super::linear::Linear;
use super::norm::Norm;
use super::{Scope, Start, position};
use crate::error::Result;
use crate::ops::gather::gather_patches;
use crate::param::{Init, ParamId, ParamsBuilder, Role};
use crate::tape::Var;
use crate::tensor::Tensor;
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
    pub distillation_token: bool,
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
            distillation_token: false,
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
        1 + self.distillation_token as usize
    }

    /// Rows of the position table.
    pub fn positions(&self) -> usize {
        self.patches() + if self.position == Position::LearnedPatches { 0 } else { self.extra() }
    }

    /// Heads of block `i`.
    pub fn heads_of(&self, i: usize) -> usize {
        if i + 1 == self.depth { self.last_heads.unwrap_or(self.heads) } else { self.heads }
    }

    pub fn block(&self, i: usize) -> BlockConfig {
        let drop_path = match self.drop_path {
            DropPath::Linear(most) if self.depth > 1 => most * i as f64 / (self.depth - 1) as f64,
            DropPath::Linear(_) => 0.0,
            DropPath::ButLast(_) if i + 1 == self.depth => 0.0,
            DropPath::Constant(rate) | DropPath::ButLast(rate) => rate,
        };
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

/// The tokens in front and the position table, which come first in the state dict.
pub struct Tokens {
    pub(super) class: ParamId,
    pub(super) position: ParamId,
    distillation: Option<ParamId>,
}

impl Tokens {
    pub fn new(b: &mut ParamsBuilder, c: &VitConfig) -> Result<Self> {
        c.check()?;
        let class = b.add("cls_token", &[1, 1, c.width], Init::Normal(0.02))?;
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
        let &[_, channels, h, w] = images.shape() else { bail!("images are {images:?} but [B, C, H, W] is needed") };
        ensure!(
            channels == c.channels && [h, w] == c.image,
            "images are {images:?} but the model wants {} x {} x {}",
            c.channels,
            c.image[0],
            c.image[1]
        );
        let images = images.on(s.params.device())?;
        let pixels = gather_patches(&images, (c.patch, c.patch), kept, s.params.precision())?; // [B, K, P]
        self.0.forward(s, &Var::constant(pixels))
    }
}

pub struct Vit {
    pub config: VitConfig,
    tokens: Tokens,
    patches: PatchEmbed,
    blocks: Vec<Block>,
    norm: Option<Norm>,
}

impl Vit {
    /// Registers everything behind the tokens; `norm` is false for classifiers that pool first.
    pub fn new(b: &mut ParamsBuilder, config: VitConfig, tokens: Tokens, norm: bool, start: Start) -> Result<Self> {
        let c = &config;
        let patches = PatchEmbed::new(b, c, start)?;
        let blocks = (0..c.depth).map(|i| Block::new(b, &format!("blocks.{i}"), &c.block(i), start)).collect::<Result<_>>()?;
        let norm = if norm { Some(Norm::new(b, "norm", c.width, c.eps)?) } else { None };
        Ok(Self { config, tokens, patches, blocks, norm })
    }

    /// Tokens in front, then the kept patches (all if None) in the order of `kept` [B, K]; all with their positions: [B, extra + K, C].
    pub fn embed(&self, s: &Scope, images: &Tensor, kept: Option<&Tensor>) -> Result<Var> {
        let c = &self.config;
        let x = self.patches.forward(s, c, images, kept)?; // [B, K, C]
        let table = s.param(self.tokens.position);
        let class = s.param(self.tokens.class);
        let distillation = self.tokens.distillation.map(|id| s.param(id));
        let front: Vec<&Var> = std::iter::once(&class).chain(&distillation).collect();
        if c.position == Position::LearnedPatches {
            return x.add_positions(&table, 0, kept)?.prepend(&front);
        }
        x.prepend_with_positions(&front, &table, kept) // [B, extra + K, C]
    }

    /// All blocks; `see` is shown what each gives.
    pub fn blocks_seen(&self, s: &Scope, x: &Var, mut see: impl FnMut(usize, &Var)) -> Result<Var> {
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
        ensure!(i < self.blocks.len(), "block {i} was asked for but there are {}", self.blocks.len());
        self.blocks[i].forward(s, x)
    }

    /// Block `i` alone, with everything on its way.
    pub fn parts(&self, s: &Scope, x: &Var, i: usize) -> Result<Parts> {
        ensure!(i < self.blocks.len(), "block {i} was asked for but there are {}", self.blocks.len());
        self.blocks[i].parts(s, x)
    }

    /// The first `count` blocks and no more.
    pub fn first_blocks(&self, s: &Scope, x: &Var, count: usize) -> Result<Var> {
        ensure!(count <= self.blocks.len(), "block {count} was asked for but there are {}", self.blocks.len());
        self.blocks[..count].iter().try_fold(x.clone(), |x, block| block.forward(s, &x))
    }

    /// Packed queries, keys and values of block `i` for its input x; the block itself is not run.
    pub fn qkv(&self, s: &Scope, x: &Var, i: usize) -> Result<Var> {
        ensure!(i < self.blocks.len(), "block {i} was asked for but there are {}", self.blocks.len());
        self.blocks[i].qkv(s, x)
    }

    /// The final norm; the input itself where there is none.
    pub fn norm(&self, s: &Scope, x: &Var) -> Result<Var> {
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
