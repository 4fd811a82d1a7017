//! What follows the gradients: clipping, the optimisers, the average. Each over all parameters of a model, or a few to be compared with the CPU's.

use crate::error::Result;
use crate::nn::Start;
use crate::nn::presets;
use crate::nn::vit::{Tokens, Vit};
use crate::optim::adamw::AdamW;
use crate::optim::ema::Ema;
use crate::optim::lamb::Lamb;
use crate::optim::lars::Lars;
use crate::optim::sgd::Sgd;
use crate::optim::{Optimizer, clip, groups};
use crate::param::{Init, ParamId, Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tensor::{Device, Dtype, Tensor};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    AdamW,
    Lamb,
    Lars,
    Sgd,
    Clip,
    Ema,
}

impl Rule {
    pub const ALL: [Rule; 6] = [Rule::AdamW, Rule::Lamb, Rule::Lars, Rule::Sgd, Rule::Clip, Rule::Ema];

    pub fn name(self) -> &'static str {
        match self {
            Rule::AdamW => "adamw",
            Rule::Lamb => "lamb",
            Rule::Lars => "lars",
            Rule::Sgd => "sgd",
            Rule::Clip => "clip",
            Rule::Ema => "ema",
        }
    }

    /// Bytes that have to be moved for each parameter, the working copy in bf16 included where there is one.
    pub fn bytes(self, precision: Dtype) -> usize {
        let working = if precision == Dtype::Bf16 { 2 } else { 0 };
        match self {
            Rule::AdamW => 28 + working,
            // The norms have to be known before anything can move.
            Rule::Lamb => 40 + working,
            Rule::Lars => 28 + working,
            Rule::Sgd => 20 + working,
            Rule::Clip | Rule::Ema => 12,
        }
    }
}

/// Parameters with gradients.
pub struct Model {
    pub params: Params,
    gradients: Vec<(ParamId, Tensor)>,
}

impl Model {
    /// MAE's encoder of this size.
    pub fn vit(size: &str, device: &Device, precision: Dtype) -> Result<Self> {
        let (mut b, config) = (ParamsBuilder::default(), presets::mae(size, super::tokens::SIDE)?);
        let tokens = Tokens::new(&mut b, &config)?;
        Vit::new(&mut b, config, tokens, true, Start::Xavier)?;
        Self::new(b, device, precision)
    }

    /// Two parameters.
    pub fn small(device: &Device, precision: Dtype) -> Result<Self> {
        let mut b = ParamsBuilder::default();
        b.add("weight", &[300, 70], Init::Normal(0.1))?;
        b.add("bias", &[70], Init::Normal(0.1))?;
        Self::new(b, device, precision)
    }

    fn new(b: ParamsBuilder, device: &Device, precision: Dtype) -> Result<Self> {
        let mut params = b.build(Dtype::F32, &Rng::new(0))?;
        params.move_to(device, precision)?;
        let numbers = Rng::new(1).normal("gradient", 1 << 16);
        let gradient = |id: ParamId| {
            let shape = params.value(id).shape();
            let numbers: Vec<f32> = numbers.iter().copied().cycle().take(shape.iter().product()).collect();
            Ok((id, Tensor::from_slice(shape, &numbers)?.on(device)?))
        };
        let gradients = params.trained().map(gradient).collect::<Result<Vec<_>>>()?;
        let mut model = Self { params, gradients };
        model.put_gradients()?;
        Ok(model)
    }

    fn put_gradients(&mut self) -> Result<()> {
        self.params.clear_gradients();
        self.gradients.iter().try_for_each(|(id, gradient)| self.params.accept(*id, gradient.clone()))
    }
}

enum State {
    Optimizer(Box<dyn Optimizer>),
    Clip,
    Ema(Ema),
}

/// A rule on its way through the parameters.
pub struct Update<'a> {
    model: &'a mut Model,
    state: State,
}

const LEARNING_RATE: f64 = 1e-4;

impl<'a> Update<'a> {
    pub fn new(rule: Rule, model: &'a mut Model) -> Result<Self> {
        model.put_gradients()?;
        let groups = groups::by_decay(&model.params, 0.05, &[]);
        let state = match rule {
            Rule::AdamW => State::Optimizer(Box::new(AdamW::new(groups, (0.9, 0.95), 1e-8)?)),
            Rule::Lamb => State::Optimizer(Box::new(Lamb::new(groups, (0.9, 0.999), 1e-8, Lamb::MOST)?)),
            Rule::Lars => State::Optimizer(Box::new(Lars::new(groups, 0.9, 1e-3)?)),
            Rule::Sgd => State::Optimizer(Box::new(Sgd::new(groups, 0.9)?)),
            Rule::Clip => State::Clip,
            Rule::Ema => {
                let ema = Ema::new(&mut model.params, 0.9)?;
                // The values move away from where the average starts.
                Sgd::new(groups, 0.0)?.step(&mut model.params, 1.0)?;
                State::Ema(ema)
            }
        };
        Ok(Self { model, state })
    }

    /// What the host does before each; not timed.
    pub fn prepare(&mut self) -> Result<()> {
        match &mut self.state {
            State::Optimizer(optimizer) => optimizer.prepare(&self.model.params, LEARNING_RATE),
            // Gradients that are short already would not be touched.
            State::Clip => self.model.put_gradients(),
            State::Ema(_) => Ok(()),
        }
    }

    /// What is timed; on a GPU it may be recorded.
    pub fn apply(&mut self) -> Result<()> {
        let params = &mut self.model.params;
        match &mut self.state {
            State::Optimizer(optimizer) => optimizer.apply(params),
            State::Clip => clip::clip_on_device(params, 1.0).map(drop),
            State::Ema(ema) => ema.update(params),
        }
    }

    /// What it has changed: all numbers of it.
    pub fn result(&mut self) -> Result<Vec<f64>> {
        let params = &mut self.model.params;
        if let State::Ema(ema) = &mut self.state {
            ema.swap(params)?;
        }
        let tensor = |id| if matches!(self.state, State::Clip) { params.gradient(id) } else { Some(params.value(id)) };
        let tensors = params.trained().filter_map(tensor).map(Tensor::read).collect::<Result<Vec<_>>>()?;
        Ok(tensors.concat())
    }
}
