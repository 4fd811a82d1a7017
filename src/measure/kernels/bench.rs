//! What is timed: an op at one shape, the inputs, and what an ideal kernel would have to do.

use crate::device::launch::Versions;
use crate::error::Result;
use crate::ops::beside;
use crate::ops::case::Kind;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Device, Dtype, Element, Tensor};
use half::bf16;
use serde_json::{Map, Value, json};

/// What an ideal kernel does: each tensor is moved once, and products are counted as operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Numbers in the precision of the activations.
    activations: usize,
    /// Bytes of everything else.
    bytes: usize,
    pub flops: usize,
}

impl Work {
    /// So many activations and so many numbers of four bytes.
    pub fn moves(activations: usize, fours: usize) -> Self {
        Self { activations, bytes: 4 * fours, flops: 0 }
    }

    pub fn and_bytes(self, bytes: usize) -> Self {
        Self { bytes: self.bytes + bytes, ..self }
    }

    pub fn flops(self, flops: usize) -> Self {
        Self { flops, ..self }
    }

    pub fn bytes(&self, precision: Dtype) -> usize {
        self.activations * precision.size() + self.bytes
    }
}

/// What an input is to the op.
#[derive(Clone, Copy)]
enum Role {
    /// A gradient flows to it.
    Leaf(Kind),
    Constant(Kind),
    /// A constant of this type in whatever precision.
    Exact(Dtype),
}

struct Input {
    shape: Vec<usize>,
    role: Role,
    /// One image's, or all of a weight; normal ones if there are none.
    numbers: Option<Vec<f32>>,
}

/// What is computed from the inputs.
pub type Run = Box<dyn Fn(&[Var]) -> Result<Var>>;

pub struct Bench {
    pub op: &'static str,
    pub case: Map<String, Value>,
    images: usize,
    inputs: Vec<Input>,
    /// The family of versions, and those that the op has at this shape and precision.
    pub versions: Option<(&'static Versions, Vec<&'static str>)>,
    /// A version whose backward is another version's.
    pub forward_only: Option<&'static str>,
    pub forward: Work,
    pub backward: Option<Work>,
    /// Whether it is a loss, whose gradient is a part of the forward work.
    pub loss: bool,
    /// Whether images are different, because the op compares them.
    pub distinct: bool,
    pub run: Run,
}

impl Bench {
    /// An op on so many images; the other sizes are for the reader.
    pub fn new(op: &'static str, images: usize, sizes: &[(&str, usize)], run: impl Fn(&[Var]) -> Result<Var> + 'static) -> Self {
        let sizes = std::iter::once(("b".to_string(), json!(images))).chain(sizes.iter().map(|&(name, size)| (name.into(), json!(size))));
        Self {
            op,
            case: sizes.collect(),
            images,
            inputs: Vec::new(),
            versions: None,
            forward_only: None,
            forward: Work::default(),
            backward: None,
            loss: false,
            distinct: false,
            run: Box::new(run),
        }
    }

    /// One more size.
    pub fn size(mut self, name: &str, size: usize) -> Self {
        self.case.insert(name.into(), json!(size));
        self
    }

    /// What is particular about it.
    pub fn particular(mut self, what: &str) -> Self {
        self.case.insert("what".into(), json!(what));
        self
    }

    fn input(mut self, shape: &[usize], role: Role, numbers: Option<Vec<f32>>) -> Self {
        self.inputs.push(Input { shape: shape.to_vec(), role, numbers });
        self
    }

    pub fn activation(self, shape: &[usize]) -> Self {
        self.input(shape, Role::Leaf(Kind::Activation), None)
    }

    pub fn weight(self, shape: &[usize]) -> Self {
        self.input(shape, Role::Leaf(Kind::Weight), None)
    }

    pub fn vector(self, shape: &[usize]) -> Self {
        self.input(shape, Role::Leaf(Kind::Vector), None)
    }

    /// A constant like an activation: a teacher's.
    pub fn features(self, shape: &[usize]) -> Self {
        self.input(shape, Role::Constant(Kind::Activation), None)
    }

    /// A constant like a vector: a fixed table.
    pub fn table(self, shape: &[usize]) -> Self {
        self.input(shape, Role::Constant(Kind::Vector), None)
    }

    /// A constant of this type; `numbers` are one image's.
    pub fn exact(self, shape: &[usize], dtype: Dtype, numbers: Option<Vec<f32>>) -> Self {
        self.input(shape, Role::Exact(dtype), numbers)
    }

    pub fn forward(self, forward: Work) -> Self {
        Self { forward, ..self }
    }

    pub fn backward(self, backward: Work) -> Self {
        Self { backward: Some(backward), ..self }
    }

    pub fn loss(self, forward: Work) -> Self {
        Self { forward, loss: true, ..self }
    }

    pub fn different_images(self) -> Self {
        Self { distinct: true, ..self }
    }

    pub fn all_versions(self, versions: &'static Versions) -> Self {
        self.only_versions(versions, versions.all)
    }

    pub fn only_versions(self, versions: &'static Versions, these: &[&'static str]) -> Self {
        Self { versions: Some((versions, these.to_vec())), ..self }
    }

    pub fn forward_only(self, version: &'static str) -> Self {
        Self { forward_only: Some(version), ..self }
    }

    /// How often the numbers of one image are repeated.
    pub fn repeats(&self) -> usize {
        if self.distinct { 1 } else { self.images }
    }

    /// Bytes of inputs and what is computed from them, roughly.
    pub fn memory(&self, precision: Dtype) -> usize {
        2 * self.forward.bytes(precision).max(self.backward.map_or(0, |work| work.bytes(precision)))
    }

    /// The inputs on a device: activations of type `dtype`, rounded to `rounding` before.
    pub fn tensors(&self, device: &Device, rounding: Dtype, dtype: Dtype) -> Result<Vec<Tensor>> {
        let make = |(i, input): (usize, &Input)| {
            let (kind, (rounding, dtype)) = match input.role {
                Role::Exact(dtype) => (Kind::Activation, (dtype, dtype)),
                Role::Leaf(Kind::Vector) | Role::Constant(Kind::Vector) => (Kind::Vector, (Dtype::F32, beside(dtype))),
                Role::Leaf(kind) | Role::Constant(kind) => (kind, (rounding, dtype)),
            };
            let repeats = if kind == Kind::Activation { self.repeats() } else { 1 };
            let count = input.shape.iter().product::<usize>() / repeats;
            let numbers = input.numbers.clone().unwrap_or_else(|| {
                // Sums over a weight's row stay near 1.
                let scale = if kind == Kind::Weight { (input.shape[0] as f32 / count as f32).sqrt() } else { 1.0 };
                Rng::new(i as u64).normal(self.op, count).into_iter().map(|x| scale * x).collect()
            });
            repeated(&numbers, &input.shape, rounding, dtype)?.on(device)
        };
        self.inputs.iter().enumerate().map(make).collect()
    }

    /// The inputs as the op takes them; constants where there is no backward.
    pub fn vars(&self, tape: &Tape, tensors: &[Tensor]) -> Vec<Var> {
        let trained = self.loss || self.backward.is_some();
        let var = |(input, tensor): (&Input, &Tensor)| match input.role {
            Role::Leaf(Kind::Weight) if trained => tape.weight(tensor.clone()),
            Role::Leaf(_) if trained => tape.leaf(tensor.clone()),
            _ => Var::constant(tensor.clone()),
        };
        self.inputs.iter().zip(tensors).map(var).collect()
    }

    /// A gradient for the output y, rounded to `rounding` where y is an activation.
    pub fn upstream(&self, y: &Tensor, rounding: Dtype) -> Result<Tensor> {
        let numbers = Rng::new(0).normal("upstream", y.numel() / self.repeats());
        repeated(&numbers, y.shape(), rounding, y.dtype())?.on(&y.device())
    }
}

/// A tensor of the CPU that holds these numbers again and again.
fn repeated(numbers: &[f32], shape: &[usize], rounding: Dtype, dtype: Dtype) -> Result<Tensor> {
    fn fill<T: Element>(numbers: &[T], shape: &[usize]) -> Result<Tensor> {
        let count = shape.iter().product::<usize>() / numbers.len().max(1);
        Tensor::from_slice(shape, &numbers.repeat(count))
    }
    if dtype == Dtype::U32 {
        return fill(&numbers.iter().map(|&x| x as u32).collect::<Vec<_>>(), shape);
    }
    if dtype == Dtype::U8 {
        return fill(&numbers.iter().map(|&x| x as u8).collect::<Vec<_>>(), shape);
    }
    let numbers = Tensor::from_slice(&[numbers.len()], numbers)?.cast(rounding)?.cast(dtype)?;
    match dtype {
        Dtype::F64 => fill(numbers.data::<f64>(), shape),
        Dtype::Bf16 => fill(numbers.data::<bf16>(), shape),
        _ => fill(numbers.data::<f32>(), shape),
    }
}

/// The numbers from 0 to n in a fixed order that looks like none.
pub fn shuffled(n: usize) -> Result<Vec<f32>> {
    let keys = Rng::new(0).uniform("order", n)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    Ok(order.into_iter().map(|i| i as f32).collect())
}
