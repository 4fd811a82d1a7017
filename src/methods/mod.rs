//! Floor 6: one file a method, each reading like its paper's method section.

pub mod baseline;
pub mod convmae;
pub mod dmae;
pub mod dmjd;
pub mod mae;
pub mod maskedkd;
pub mod maskfeat;
pub mod masks;
pub mod selection;
pub mod supervised;
pub mod target;
pub mod teacher;
pub mod tinymim;

use crate::error::Result;
use crate::nn::vit::Vit;
use crate::ops::batchnorm::Statistics;
use crate::param::Params;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::any::Any;
use std::borrow::Cow;
use teacher::{Cost, Teacher};

/// What a step of training sees.
#[derive(Clone)]
pub struct Batch {
    /// Normalised, [B, C, H, W].
    pub images: Tensor,
    /// The same before they were normalised, u8 [B, H, W, C], where a method asks for them.
    pub bytes: Option<Tensor>,
    /// What a teacher sees, where that is another view of the same images; else it sees these.
    pub teacher_images: Option<Tensor>,
    /// What the teacher answers, where that is known before the pass; see [`Method::prepare`].
    pub teacher_output: Option<Tensor>,
    /// What a classifier is to answer: a probability for each class, f32 [B, classes]. Smoothing and mixing are in them already.
    pub targets: Option<Tensor>,
    /// The class of each image, for evaluation; empty where nobody asks.
    pub labels: Vec<u32>,
    /// What tells the view of each image from all others, where that view returns in later epochs; empty where none does.
    pub keys: Vec<Option<u64>>,
}

impl Batch {
    pub fn of_images(images: Tensor) -> Self {
        Self { images, bytes: None, teacher_images: None, teacher_output: None, targets: None, labels: Vec::new(), keys: Vec::new() }
    }

    /// What a teacher sees of it.
    pub fn for_teacher(&self) -> &Tensor {
        self.teacher_images.as_ref().unwrap_or(&self.images)
    }
}

/// A loss and the named parts it is the sum of: numbers on the model's device, which nobody has to wait for.
pub struct Loss {
    pub total: Var,
    pub parts: Vec<(Cow<'static, str>, Tensor)>,
    /// What the batch says about the columns of a batch norm, to be learned by [`Method::learn`] after the pass.
    pub statistics: Option<Statistics>,
}

impl Loss {
    pub fn single(name: &'static str, total: Var) -> Self {
        let parts = vec![(name.into(), total.value().clone())];
        Self { total, parts, statistics: None }
    }

    /// The sum of named terms, each with its weight.
    pub fn sum(terms: Vec<(impl Into<Cow<'static, str>>, f64, Var)>) -> Result<Self> {
        let weighted: Vec<(f64, &Var)> = terms.iter().map(|(_, weight, term)| (*weight, term)).collect();
        let total = Var::weighted_sum(&weighted)?;
        let parts = terms.into_iter().map(|(name, _, term)| (name.into(), term.value().clone())).collect();
        Ok(Self { total, parts, statistics: None })
    }
}

/// How good a model is on a batch.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Scores {
    /// Mean over the batch.
    pub loss: f64,
    /// How many labels are the first, and among the first five, of the model's answers; None where it does not classify.
    pub right: Option<[usize; 2]>,
}

pub trait Method: Any {
    /// What is trained; a teacher's parameters are not among them.
    fn params(&mut self) -> &mut Params;

    fn loss(&self, tape: &Tape, batch: &Batch, rng: &Rng) -> Result<Loss>;

    /// What fine-tuning keeps.
    fn encoder(&self) -> &Vit;

    /// Whether its batches have to hold the bytes of the images.
    fn needs_bytes(&self) -> bool {
        false
    }

    /// On images it does not learn from; nothing is drawn but what the method draws for every pass, from `rng`.
    fn scores(&self, batch: &Batch, rng: &Rng) -> Result<Scores> {
        let loss = self.loss(&Tape::off(), batch, rng)?.total;
        Ok(Scores { loss: loss.value().read()?[0], right: None })
    }

    /// Takes in running statistics after a pass over so many images.
    fn learn(&mut self, _statistics: &Statistics, _images: usize) -> Result<()> {
        Ok(())
    }

    /// Multiply-accumulates of a forward pass for one image, without a teacher's, and of the part of them that is trained.
    fn macs(&self) -> [u64; 2];

    /// Whom it learns from, if from anybody.
    fn teacher(&self) -> Option<&Teacher> {
        None
    }

    /// What its teacher costs; None where there is none.
    fn teacher_cost(&self) -> Option<Cost> {
        None
    }

    /// Numbers that say what it does to an image, to be recorded beside its losses.
    fn facts(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// Before a pass, and never recorded: finds out what need not be computed in it, such as a teacher's answers that are known already.
    fn prepare(&self, _batch: &mut Batch, _rng: &Rng) -> Result<()> {
        Ok(())
    }
}
