//! What a case is: an op at one shape with its inputs, written once and used for the gradient check, for f32 against f64, and for devices
//! against each other.

use crate::error::Result;
use crate::rng::Rng;
use crate::tape::Var;
use crate::tensor::{Dtype, Tensor};

/// An input of an op that gradients flow to.
pub struct Input {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

/// What a case computes from its inputs.
pub type Run = Box<dyn Fn(&[Var]) -> Result<Var> + Send + Sync>;

pub struct Case {
    /// The op's name, then what is particular: `layernorm: one row, C = 37`.
    pub name: String,
    pub inputs: Vec<Input>,
    pub run: Run,
    /// Whether f32 can be compared with f64 at the usual tolerance; false where the case is ill-conditioned on purpose.
    pub conditioned: bool,
}

impl Case {
    /// A case whose inputs are normal numbers.
    pub fn new(name: &str, shapes: &[&[usize]], run: impl Fn(&[Var]) -> Result<Var> + Send + Sync + 'static) -> Self {
        let inputs = shapes.iter().enumerate().map(|(i, shape)| Input { shape: shape.to_vec(), values: numbers(name, i, shape) });
        Self { name: name.to_string(), inputs: inputs.collect(), run: Box::new(run), conditioned: true }
    }

    /// Replaces the values of input i by a function of what they were.
    pub fn with(mut self, i: usize, f: impl Fn(usize, f64) -> f64) -> Self {
        self.inputs[i].values.iter_mut().enumerate().for_each(|(j, value)| *value = f(j, *value));
        self
    }

    pub fn ill_conditioned(mut self) -> Self {
        self.conditioned = false;
        self
    }

    pub fn tensors(&self, dtype: Dtype) -> Result<Vec<Tensor>> {
        self.inputs.iter().map(|input| Tensor::from_slice(&input.shape, &input.values)?.cast(dtype)).collect()
    }
}

/// Normal numbers that f32 holds exactly, the same ones each time.
pub fn numbers(name: &str, i: usize, shape: &[usize]) -> Vec<f64> {
    let n = shape.iter().product();
    Rng::new(i as u64).normal(name, n).into_iter().map(f64::from).collect()
}
