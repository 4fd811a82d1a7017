//! What a case is: an op at one shape with its inputs, written once and used for the gradient check, for f32 against f64, and for devices
//! against each other.

use crate::device::parallel;
use crate::error::Result;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Device, Dtype, Tensor};
use half::bf16;

/// What an input is where activations are bf16.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// bf16, and so is its gradient.
    Activation,
    /// bf16, its gradient f32: a weight of a product.
    Weight,
    /// f32: a vector, a token, a table.
    Vector,
}

/// An input of an op that gradients flow to.
pub struct Input {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
    pub kind: Kind,
}

/// What a case computes from its inputs.
pub type Run = Box<dyn Fn(&[Var]) -> Result<Var> + Send + Sync>;

pub struct Case {
    /// The op's name, then what is particular: `layernorm: one row, C = 37`.
    pub name: String,
    pub inputs: Vec<Input>,
    pub run: Run,
    /// The same on the CPU with [`rounded`] wherever the GPU's code rounds to bf16 between two kernels or inside one; None where it rounds results only.
    pub run_rounded: Option<Run>,
    /// Whether f32 can be compared with f64 at the usual tolerance; false where the case is ill-conditioned on purpose.
    pub conditioned: bool,
}

impl Case {
    /// A case whose inputs are normal numbers.
    pub fn new(name: &str, shapes: &[&[usize]], run: impl Fn(&[Var]) -> Result<Var> + Send + Sync + 'static) -> Self {
        let inputs = shapes.iter().enumerate().map(|(i, shape)| Input {
            shape: shape.to_vec(),
            values: numbers(name, i, shape),
            kind: Kind::Activation,
        });
        Self { name: name.to_string(), inputs: inputs.collect(), run: Box::new(run), run_rounded: None, conditioned: true }
    }

    /// A loss of one input, whose gradient a GPU makes together with it and rounds before the loss's own gradient comes to it.
    pub fn loss(name: &str, shape: &[usize], f: impl Fn(&Var) -> Result<Var> + Clone + Send + Sync + 'static) -> Self {
        let same = f.clone();
        Self::new(name, &[shape], move |x| f(&x[0])).rounded(move |x| rounded_loss(&x[0], &same))
    }

    /// Replaces the values of input i by a function of what they were.
    pub fn with(mut self, i: usize, f: impl Fn(usize, f64) -> f64) -> Self {
        self.inputs[i].values.iter_mut().enumerate().for_each(|(j, value)| *value = f(j, *value));
        self
    }

    pub fn weights(self, which: &[usize]) -> Self {
        self.kinds(which, Kind::Weight)
    }

    pub fn vectors(self, which: &[usize]) -> Self {
        self.kinds(which, Kind::Vector)
    }

    fn kinds(mut self, which: &[usize], kind: Kind) -> Self {
        which.iter().for_each(|&i| self.inputs[i].kind = kind);
        self
    }

    pub fn rounded(mut self, run: impl Fn(&[Var]) -> Result<Var> + Send + Sync + 'static) -> Self {
        self.run_rounded = Some(Box::new(run));
        self
    }

    /// The op's name.
    pub fn op(&self) -> &str {
        self.name.split(':').next().unwrap_or(&self.name)
    }

    pub fn ill_conditioned(mut self) -> Self {
        self.conditioned = false;
        self
    }

    pub fn tensors(&self, dtype: Dtype) -> Result<Vec<Tensor>> {
        self.inputs.iter().map(|input| Tensor::from_slice(&input.shape, &input.values)?.cast(dtype)).collect()
    }
}

/// The inputs on a tape, activations in this precision.
pub fn leaves(case: &Case, tape: &Tape, device: &Device, precision: Dtype) -> Result<Vec<Var>> {
    let leaf = |input: &Input| {
        let dtype = if input.kind == Kind::Vector { super::beside(precision) } else { precision };
        let value = Tensor::from_slice(&input.shape, &input.values)?.cast(dtype)?.on(device)?;
        Ok(if input.kind == Kind::Weight { tape.weight(value) } else { tape.leaf(value) })
    };
    case.inputs.iter().map(leaf).collect()
}

fn round(x: &Tensor) -> Result<Tensor> {
    let mut y = x.copy()?;
    match y.dtype() {
        Dtype::F64 => parallel::rows(y.data_mut::<f64>(), 1, |_, y| y.iter_mut().for_each(|y| *y = bf16::from_f64(*y).to_f64())),
        _ => parallel::rows(y.data_mut::<f32>(), 1, |_, y| y.iter_mut().for_each(|y| *y = bf16::from_f32(*y).to_f32())),
    }
    Ok(y)
}

/// x rounded to bf16, its gradient rounded too: what happens between two kernels. On the CPU, in f32 or f64.
pub fn rounded(x: &Var) -> Result<Var> {
    let y = round(x.value())?;
    Var::record("rounded", [x], y, |dy, _| Ok([Some(round(&dy)?)]))
}

/// x as it is, its gradient rounded to bf16: a factor of a product in a backward.
pub fn rounded_gradient(x: &Var) -> Result<Var> {
    let value = x.value().clone();
    Var::record("rounded", [x], value, |dy, _| Ok([Some(round(&dy)?)]))
}

/// The loss f(x), its gradient rounded to bf16 as it is for an upstream gradient of 1, and times the real one.
pub fn rounded_loss(x: &Var, f: impl Fn(&Var) -> Result<Var>) -> Result<Var> {
    let tape = Tape::new();
    let leaf = tape.leaf(x.value().clone());
    let y = f(&leaf)?;
    let gradients = tape.backward(&y, &mut [])?;
    let gradient = gradients.of(&leaf).map(round).transpose()?;
    Var::record("rounded", [x], y.value().clone(), move |dy, _| {
        let times = |gradient| Ok(Var::constant(gradient).scale(dy.item())?.value().clone());
        Ok([gradient.map(times).transpose()?])
    })
}

/// Normal numbers that f32 holds exactly, the same ones each time.
pub fn numbers(name: &str, i: usize, shape: &[usize]) -> Vec<f64> {
    let n = shape.iter().product();
    Rng::new(i as u64).normal(name, n).into_iter().map(f64::from).collect()
}
