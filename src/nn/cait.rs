//! CaiT, a teacher: blocks on the patches alone whose heads talk to each other, then a few in which only the class token is updated.
//!
//!   blocks      l = (q / sqrt D) k^T;  a = mix_w(softmax(mix_l(l)));  y = a v              mix: a linear map across the heads
//!   class part  u = [class, patches];  class += g1 * attention(q from norm1(u)[0], k and v from norm1(u));  class += g2 * mlp(class)
//!   logits      head(norm(class))
//!
//! Patches have positions, the class token has none. With `kept`, the others are neither projected nor attended to.

use super::block::{BlockConfig, Mlp, Residual};
use super::linear::Linear;
use super::norm::Norm;
use super::vit::{PatchEmbed, Position, Tokens, VitConfig};
use super::{Scope, Start};
use crate::ensure;
use crate::error::{Error, Result};
use crate::param::{Init, ParamId, ParamsBuilder};
use crate::tape::Var;
use crate::tensor::Tensor;

#[derive(Clone, Debug)]
pub struct CaitConfig {
    /// The patches' part; its positions are learned, for patches only.
    pub vit: VitConfig,
    /// Blocks that update the class token.
    pub class_blocks: usize,
    pub classes: usize,
}

impl CaitConfig {
    fn check(&self) -> Result<()> {
        let c = &self.vit;
        ensure!(
            c.position == Position::LearnedPatches && !c.distillation_token && c.last_heads.is_none(),
            "cait: learned positions for patches only, one token in front and one number of heads are needed, not {c:?}"
        );
        ensure!(self.class_blocks > 0 && self.classes > 0, "cait: {} class blocks and {} classes", self.class_blocks, self.classes);
        Ok(())
    }
}

/// Attention whose heads are mixed before and after the softmax.
struct TalkingHeads {
    qkv: Linear,
    proj: Linear,
    logits: [ParamId; 2],
    weights: [ParamId; 2],
    heads: usize,
}

impl TalkingHeads {
    fn new(b: &mut ParamsBuilder, name: &str, c: &BlockConfig) -> Result<Self> {
        let (start, bias) = (Start::Normal, c.qkv_bias.then_some(Init::Constant(0.0)));
        let qkv_start = start.linear(c.width, 3 * c.width);
        let qkv = Linear::with_bias(b, &format!("{name}.qkv"), &[3 * c.width, c.width], qkv_start, bias)?;
        let proj = Linear::new(b, &format!("{name}.proj"), c.width, c.width, start.linear(c.width, c.width))?;
        let mut mix = |key: &str| -> Result<[ParamId; 2]> {
            let weight = b.add(format!("{name}.{key}.weight"), &[c.heads, c.heads], start.linear(c.heads, c.heads))?;
            Ok([weight, b.add(format!("{name}.{key}.bias"), &[c.heads], Init::Constant(0.0))?])
        };
        Ok(Self { qkv, proj, logits: mix("proj_l")?, weights: mix("proj_w")?, heads: c.heads })
    }

    fn forward(&self, s: &Scope, x: &Var) -> Result<Var> {
        let mix = |x: &Var, [w, bias]: [ParamId; 2]| x.mix_heads(&s.param(w), &s.param(bias));
        let qkv = self.qkv.forward(s, x)?;
        let [q, k, v] = [0, 1, 2].map(|part| qkv.take_heads(part, 3, self.heads)); // [B, H, K, D]
        let logits = scaled(&q?)?.bmm_nt(&k?)?; // [B, H, K, K]
        let weights = mix(&mix(&logits, self.logits)?.softmax()?, self.weights)?;
        self.proj.forward(s, &weights.bmm(&v?)?.merge_heads()?)
    }
}

/// Attention of the first token alone to all of them.
struct ClassAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    proj: Linear,
    heads: usize,
}

impl ClassAttention {
    fn new(b: &mut ParamsBuilder, name: &str, c: &BlockConfig) -> Result<Self> {
        let mut layer = |key: &str, bias: bool| {
            let bias = bias.then_some(Init::Constant(0.0));
            Linear::with_bias(b, &format!("{name}.{key}"), &[c.width, c.width], Start::Normal.linear(c.width, c.width), bias)
        };
        let (q, k, v) = (layer("q", c.qkv_bias)?, layer("k", c.qkv_bias)?, layer("v", c.qkv_bias)?);
        Ok(Self { q, k, v, proj: layer("proj", true)?, heads: c.heads })
    }

    /// u [B, 1 + K, C] to [B, 1, C].
    fn forward(&self, s: &Scope, u: &Var) -> Result<Var> {
        let heads = |x: Var| x.take_heads(0, 1, self.heads);
        let q = scaled(&heads(self.q.forward(s, &u.tokens(0..1)?)?)?)?; // [B, H, 1, D]
        let (k, v) = (heads(self.k.forward(s, u)?)?, heads(self.v.forward(s, u)?)?);
        let weights = q.bmm_nt(&k)?.softmax()?; // [B, H, 1, 1 + K]
        self.proj.forward(s, &weights.bmm(&v)?.merge_heads()?)
    }
}

/// q [B, H, N, D] divided by the root of D.
fn scaled(q: &Var) -> Result<Var> {
    q.scale(1.0 / (q.value().last() as f64).sqrt())
}

struct Block<A> {
    residual: Residual,
    norm: Norm,
    attention: A,
    mlp: Mlp,
}

impl<A> Block<A> {
    fn new(
        b: &mut ParamsBuilder,
        name: &str,
        c: &BlockConfig,
        attention: impl FnOnce(&mut ParamsBuilder, &str, &BlockConfig) -> Result<A>,
    ) -> Result<Self> {
        Ok(Self {
            residual: Residual::new(b, name, c)?,
            norm: Norm::new(b, &format!("{name}.norm1"), c.width, c.eps)?,
            attention: attention(b, &format!("{name}.attn"), c)?,
            mlp: Mlp::new(b, name, c, Start::Normal)?,
        })
    }

    /// x and both branches, the first being `attended`.
    fn finish(&self, s: &Scope, x: &Var, attended: Var) -> Result<Var> {
        self.mlp.finish(s, &self.residual, x, attended)
    }
}

pub struct Cait {
    pub config: CaitConfig,
    tokens: Tokens,
    class: ParamId,
    patches: PatchEmbed,
    blocks: Vec<Block<TalkingHeads>>,
    class_blocks: Vec<Block<ClassAttention>>,
    norm: Norm,
    head: Linear,
}

impl Cait {
    pub fn new(b: &mut ParamsBuilder, config: CaitConfig) -> Result<Self> {
        config.check()?;
        let c = &config.vit;
        let tokens = Tokens::new(b, c)?;
        let class = tokens.class.ok_or_else(|| Error::new("CaiT attends from a class token, and its configuration has none"))?;
        let patches = PatchEmbed::new(b, c, Start::Normal)?;
        let blocks = (0..c.depth).map(|i| Block::new(b, &format!("blocks.{i}"), &c.block(i), TalkingHeads::new));
        let blocks = blocks.collect::<Result<_>>()?;
        let class_block = BlockConfig { drop_path: 0.0, ..c.block(0) };
        let names = (0..config.class_blocks).map(|i| format!("blocks_token_only.{i}"));
        let class_blocks = names.map(|name| Block::new(b, &name, &class_block, ClassAttention::new)).collect::<Result<_>>()?;
        let norm = Norm::new(b, "norm", c.width, c.eps)?;
        let head = Linear::new(b, "head", c.width, config.classes, Start::Normal.linear(c.width, config.classes))?;
        Ok(Self { config, tokens, class, patches, blocks, class_blocks, norm, head })
    }

    /// Logits [B, classes] from the kept patches (all if None).
    pub fn forward(&self, s: &Scope, images: &Tensor, kept: Option<&Tensor>) -> Result<Var> {
        let x = self.patches.forward(s, &self.config.vit, images, kept)?;
        let mut x = x.add_positions(&s.param(self.tokens.position), 0, kept)?; // [B, K, C]
        for block in &self.blocks {
            x = block.finish(s, &x, block.attention.forward(s, &block.norm.forward(s, &x)?)?)?;
        }
        let mut u = x.prepend(&[&s.param(self.class)])?; // [B, 1 + K, C]
        let mut class = u.tokens(0..1)?; // [B, 1, C]
        for (i, block) in self.class_blocks.iter().enumerate() {
            if i > 0 {
                u = x.prepend(&[&class])?;
            }
            class = block.finish(s, &class, block.attention.forward(s, &block.norm.forward(s, &u)?)?)?;
        }
        self.head.forward(s, &self.norm.forward(s, &class.token(0)?)?)
    }
}
