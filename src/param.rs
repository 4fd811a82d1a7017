//! Floor 3: the numbers that are learned, under the names of the official state dicts.
//!
//! All values of a model lie one behind the other in one buffer, in the order in which they were registered, and so do the gradients of
//! those that are trained. An optimiser, a clip or an exchange between machines sees ranges of flat buffers and never a layer.
//!
//! In bf16 a GPU holds a third buffer, the working copy that products read; values, gradients and moments stay f32. Whoever changes values brings it up to
//! date: the optimiser in the same pass, everything else by [`Params::refresh`].

use crate::device::launch::{Args, Launch};
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::formats::FileTensor;
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Device, Dtype, Element, Flat, Shape, Tensor};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Position of a parameter in its set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct ParamId(usize);

/// How a parameter starts.
#[derive(Clone, Debug)]
pub enum Init {
    Constant(f32),
    /// Uniform in [-a, a).
    Uniform(f32),
    /// Normal with this deviation, cut at +-2 absolute: at the deviations in use, a plain normal.
    Normal(f32),
    Table(Vec<f32>),
}

impl Init {
    /// Xavier: a = sqrt(6 / (fan_in + fan_out)).
    pub fn xavier(fan_in: usize, fan_out: usize) -> Self {
        Init::Uniform((6.0 / (fan_in + fan_out) as f64).sqrt() as f32)
    }

    /// What PyTorch gives a convolution's weight and bias: a = 1 / sqrt(fan_in).
    pub fn fan_in(fan_in: usize) -> Self {
        Init::Uniform((1.0 / fan_in as f64).sqrt() as f32)
    }

    fn draw(&self, rng: &Rng, name: &str, n: usize) -> Result<Vec<f32>> {
        Ok(match self {
            Init::Constant(value) => vec![*value; n],
            Init::Uniform(bound) => rng.uniform(name, n)?.into_iter().map(|u| (2.0 * u - 1.0) * bound).collect(),
            Init::Normal(deviation) => rng.normal(name, n).into_iter().map(|z| (z * deviation).clamp(-2.0, 2.0)).collect(),
            Init::Table(table) => table.clone(),
        })
    }
}

/// What may happen to an entry of the state dict.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Trained,
    /// Fixed: a sin-cos table, a frozen backbone.
    Frozen,
    /// Written by the forward pass: running statistics.
    Buffer,
}

struct Entry {
    name: String,
    role: Role,
    /// None: lent to the tape at this moment, or never allocated.
    gradient: Option<Tensor>,
    has_gradient: bool,
}

pub struct Params {
    set: u64,
    dtype: Dtype,
    device: Device,
    entries: Vec<Entry>,
    values: Vec<Tensor>,
    /// The values in bf16; empty unless that is the precision.
    working: Vec<Tensor>,
    by_name: HashMap<String, ParamId>,
    gradients_allocated: bool,
}

/// Collects names, shapes and starting values; [`ParamsBuilder::build`] lays them out.
#[derive(Default)]
pub struct ParamsBuilder {
    entries: Vec<(String, Shape, Init, Role)>,
}

impl ParamsBuilder {
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) -> Result<ParamId> {
        self.add_as(name, shape, init, Role::Trained)
    }

    pub fn add_as(&mut self, name: impl Into<String>, shape: &[usize], init: Init, role: Role) -> Result<ParamId> {
        let (name, shape) = (name.into(), Shape::new(shape)?);
        if let Init::Table(table) = &init {
            ensure!(table.len() == shape.numel(), "parameter {name} is {shape:?} but its table has {} numbers", table.len());
        }
        self.entries.push((name, shape, init, role));
        Ok(ParamId(self.entries.len() - 1))
    }

    /// In the order of registration, which is that of the state dict.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(name, ..)| &name[..])
    }

    /// How many numbers have been registered.
    pub fn count(&self) -> usize {
        self.entries.iter().map(|(_, shape, _, _)| shape.numel()).sum()
    }

    /// How many of them will be trained.
    pub fn count_trained(&self) -> usize {
        self.entries.iter().filter(|(.., role)| *role == Role::Trained).map(|(_, shape, _, _)| shape.numel()).sum()
    }

    /// Lays all parameters out and draws their starting values, each from the generator's stream of its name.
    pub fn build(self, dtype: Dtype, rng: &Rng) -> Result<Params> {
        static SETS: AtomicU64 = AtomicU64::new(0);
        let values = Tensor::slab(&Device::Cpu, self.entries.iter().map(|(_, shape, _, _)| &shape[..]), dtype)?;
        let mut params = Params {
            set: SETS.fetch_add(1, Ordering::Relaxed),
            dtype,
            device: Device::Cpu,
            entries: Vec::new(),
            values,
            working: Vec::new(),
            by_name: HashMap::new(),
            gradients_allocated: false,
        };
        for (i, (name, shape, init, role)) in self.entries.into_iter().enumerate() {
            ensure!(params.by_name.insert(name.clone(), ParamId(i)).is_none(), "parameter {name} is registered twice");
            let start = init.draw(rng, &name, shape.numel())?;
            params.write(ParamId(i), &start);
            params.entries.push(Entry { name, role, gradient: None, has_gradient: false });
        }
        Ok(params)
    }
}

impl Params {
    pub(crate) fn set(&self) -> u64 {
        self.set
    }

    /// Of values and gradients.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Of activations, and of what products read.
    pub fn precision(&self) -> Dtype {
        if self.working.is_empty() { self.dtype } else { Dtype::Bf16 }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Puts all values on a device, to be computed with in this precision. Gradients are forgotten. On the CPU bf16 is a matter of products alone
    /// ([`Device::compute_in`]): they round what they read, and there is no working copy.
    pub fn move_to(&mut self, device: &Device, precision: Dtype) -> Result<()> {
        let fits = precision == self.dtype || (precision == Dtype::Bf16 && self.dtype == Dtype::F32);
        ensure!(fits, "device {device} does not compute in {precision} with parameters in {}; use f32 or bf16", self.dtype);
        let precision = if device.gpu().is_none() { self.dtype } else { precision };
        ensure!(device.gpu().is_none() || self.dtype == Dtype::F32, "device {device} computes in f32 or bf16, not {}", self.dtype);
        let shapes = || self.values.iter().map(Tensor::shape);
        let mut values = Tensor::slab(device, shapes(), self.dtype)?;
        let working = if precision == Dtype::Bf16 { Tensor::slab(device, shapes(), precision)? } else { Vec::new() };
        for (to, from) in values.iter_mut().zip(&self.values) {
            to.upload(&from.on(&Device::Cpu)?)?;
        }
        (self.device, self.values, self.working) = (device.clone(), values, working);
        self.forget_gradients();
        self.refresh()
    }

    /// Brings the working copy up to date after values were changed.
    pub fn refresh(&mut self) -> Result<()> {
        for (working, value) in self.working.iter_mut().zip(&self.values) {
            ensure!(working.is_unique(), "the working copy is still in use by a recorded forward pass");
            working.round_from(value)?;
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All entries in the order of the state dict.
    pub fn ids(&self) -> impl Iterator<Item = ParamId> + use<> {
        (0..self.entries.len()).map(ParamId)
    }

    pub fn trained(&self) -> impl Iterator<Item = ParamId> + '_ {
        self.ids().filter(|&id| self.role(id) == Role::Trained)
    }

    pub fn name(&self, id: ParamId) -> &str {
        &self.entries[id.0].name
    }

    pub fn role(&self, id: ParamId) -> Role {
        self.entries[id.0].role
    }

    pub fn value(&self, id: ParamId) -> &Tensor {
        &self.values[id.0]
    }

    /// The gradient, if backward has reached this parameter since the last [`Params::clear_gradients`].
    pub fn gradient(&self, id: ParamId) -> Option<&Tensor> {
        let entry = &self.entries[id.0];
        entry.gradient.as_ref().filter(|_| entry.has_gradient)
    }

    pub fn find(&self, name: &str) -> Result<ParamId> {
        self.by_name.get(name).copied().ok_or_else(|| Error::new(format!("the model has no parameter {name}")))
    }

    /// How many numbers are trained.
    pub fn count_trained(&self) -> usize {
        self.trained().map(|id| self.value(id).numel()).sum()
    }

    /// The parameter as an op's input: tracked if it is trained and the tape is on.
    pub fn var(&self, tape: &Tape, id: ParamId) -> Var {
        let value = self.values[id.0].clone();
        if self.role(id) == Role::Trained { tape.param(value, self.set, id) } else { Var::constant(value) }
    }

    /// The same as products take it: the working copy where there is one.
    pub fn working(&self, tape: &Tape, id: ParamId) -> Var {
        let Some(value) = self.working.get(id.0) else { return self.var(tape, id) };
        if self.role(id) == Role::Trained { tape.param(value.clone(), self.set, id) } else { Var::constant(value.clone()) }
    }

    /// Stops training every parameter whose name does not satisfy `trained`. All gradients are forgotten: their buffer holds what is trained.
    pub fn train_only(&mut self, trained: impl Fn(&str) -> bool) {
        for entry in &mut self.entries {
            if entry.role == Role::Trained && !trained(&entry.name) {
                entry.role = Role::Frozen;
            }
        }
        self.forget_gradients();
    }

    pub(crate) fn forget_gradients(&mut self) {
        self.entries.iter_mut().for_each(|entry| (entry.gradient, entry.has_gradient) = (None, false));
        self.gradients_allocated = false;
    }

    /// Replaces a value, and its working copy where there is one; the shapes must agree.
    pub fn set_value(&mut self, id: ParamId, value: &Tensor) -> Result<()> {
        let own = &self.values[id.0];
        ensure!(value.shape() == own.shape(), "{} is {:?}, the model wants {:?}", self.name(id), value.shape(), own.shape());
        let value = value.cast(self.dtype)?.on(&Device::Cpu)?;
        let free = self.working.get(id.0).is_none_or(Tensor::is_unique);
        ensure!(free, "the working copy of {} is still in use by a recorded forward pass", self.name(id));
        self.value_mut(id)?.upload(&value)?;
        self.working.get_mut(id.0).map_or(Ok(()), |working| working.round_from(&self.values[id.0]))
    }

    /// Takes every value from named tensors. Nothing changes unless names and shapes agree throughout; the error lists all that do not.
    pub fn load<'a>(&mut self, tensors: impl IntoIterator<Item = (&'a str, &'a FileTensor)>) -> Result<()> {
        let tensors: HashMap<&str, &FileTensor> = tensors.into_iter().collect();
        let mut wrong = Vec::new();
        for id in self.ids() {
            let (name, shape) = (self.name(id), self.value(id).shape());
            match tensors.get(name) {
                None => wrong.push(format!("{name} is missing")),
                Some(tensor) if tensor.shape() != shape => wrong.push(format!("{name} is {:?}, the model wants {shape:?}", tensor.shape())),
                Some(_) => {}
            }
        }
        let mut extra: Vec<&str> = tensors.keys().copied().filter(|name| !self.by_name.contains_key(*name)).collect();
        extra.sort_unstable();
        wrong.extend(extra.into_iter().map(|name| format!("the model has no {name:?}")));
        ensure!(wrong.is_empty(), "the weights do not fit the model: {}", wrong.join("; "));
        let read = |id: ParamId| Tensor::from_slice(self.value(id).shape(), &tensors[self.name(id)].to_f64()?);
        let values = self.ids().map(|id| read(id).with_context(|| self.name(id).to_string())).collect::<Result<Vec<_>>>()?;
        self.ids().zip(values).try_for_each(|(id, value)| self.set_value(id, &value))
    }

    /// The value, to be written; refused while a tape or another handle still reads it.
    pub fn value_mut(&mut self, id: ParamId) -> Result<&mut Tensor> {
        ensure!(self.values[id.0].is_unique(), "{} is still in use by a recorded forward pass", self.name(id));
        Ok(&mut self.values[id.0])
    }

    /// Value and gradient, for an optimiser, of every parameter that backward gave a gradient.
    pub fn values_and_gradients(&mut self) -> Result<impl Iterator<Item = (ParamId, &mut Tensor, &Tensor)>> {
        for id in self.trained().filter(|&id| self.gradient(id).is_some()) {
            ensure!(self.values[id.0].is_unique(), "{} is still in use by a recorded forward pass", self.name(id));
        }
        let pairs = self.entries.iter().zip(&mut self.values).enumerate();
        Ok(pairs.filter_map(|(i, (entry, value))| {
            let gradient = entry.gradient.as_ref().filter(|_| entry.has_gradient)?;
            Some((ParamId(i), value, gradient))
        }))
    }

    /// Every gradient that backward gave, to be scaled.
    pub fn gradients_mut(&mut self) -> Result<impl Iterator<Item = &mut Tensor>> {
        for id in self.trained() {
            ensure!(self.gradient(id).is_none_or(Tensor::is_unique), "the gradient of {} is still held elsewhere", self.name(id));
        }
        let present = self.entries.iter_mut().filter(|entry| entry.has_gradient);
        Ok(present.filter_map(|entry| entry.gradient.as_mut()))
    }

    /// Gives `f` all values, of every role, as one slice in the order of registration, zeros in the gaps between them.
    pub fn with_flat_values<T: Element, R>(&mut self, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
        ensure!(self.dtype == T::DTYPE, "the values are {}, not {}", self.dtype, T::DTYPE);
        let whole = Tensor::with_flat(&mut self.values, f);
        whole.ok_or_else(|| Error::new("the values are still in use by a recorded forward pass"))
    }

    /// Gives `f` the gradients of everything that is trained as one slice, zeros where backward gave none; writing
    /// there makes no gradient of them.
    pub fn with_flat_gradients<T: Element, R>(&mut self, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
        ensure!(self.dtype == T::DTYPE, "the gradients are {}, not {}", self.dtype, T::DTYPE);
        self.allocate_gradients()?;
        let absent = self.entries.iter_mut().filter(|entry| !entry.has_gradient);
        for gradient in absent.filter_map(|entry| entry.gradient.as_mut()).filter(|gradient| gradient.is_unique()) {
            gradient.clear()?;
        }
        let whole = Tensor::with_flat(self.entries.iter_mut().filter_map(|entry| entry.gradient.as_mut()), f);
        whole.ok_or_else(|| Error::new("a gradient is still held elsewhere, or nothing is trained"))
    }

    /// All values on a GPU, of every role, in the order of registration.
    pub fn flat_values(&mut self) -> Result<Flat> {
        let whole = Tensor::flat(&mut self.values);
        whole.ok_or_else(|| Error::new("the values are still in use by a recorded forward pass"))
    }

    /// Their working copy, laid out like them but for the size of a number; None where there is none.
    pub fn flat_working(&mut self) -> Result<Option<Flat>> {
        if self.working.is_empty() {
            return Ok(None);
        }
        let whole = Tensor::flat(&mut self.working);
        whole.map(Some).ok_or_else(|| Error::new("the working copy is still in use by a recorded forward pass"))
    }

    /// The gradients on a GPU of everything that is trained, in the order of registration, zeros where backward gave none.
    pub fn flat_gradients(&mut self) -> Result<Flat> {
        self.allocate_gradients()?;
        for entry in self.entries.iter_mut().filter(|entry| !entry.has_gradient) {
            entry.gradient.as_mut().filter(|gradient| gradient.is_unique()).map_or(Ok(()), Tensor::clear)?;
        }
        self.flat_gradients_as_they_are()
    }

    fn flat_gradients_as_they_are(&mut self) -> Result<Flat> {
        self.allocate_gradients()?;
        let whole = Tensor::flat(self.entries.iter_mut().filter_map(|entry| entry.gradient.as_mut()));
        whole.ok_or_else(|| Error::new("a gradient is still held elsewhere, or nothing is trained"))
    }

    /// On a GPU: the gradients from one parameter to another, with what lies between them; None where one has no memory.
    pub fn gradient_span(&self, first: ParamId, last: ParamId) -> Option<Flat> {
        let gradient = |id: ParamId| self.entries[id.0].gradient.as_ref();
        Flat::between(gradient(first)?, gradient(last)?)
    }

    /// The same of their values.
    pub fn value_span(&self, first: ParamId, last: ParamId) -> Option<Flat> {
        Flat::between(&self.values[first.0], &self.values[last.0])
    }

    /// Everything that has a gradient.
    pub fn reached(&self) -> Vec<ParamId> {
        self.trained().filter(|&id| self.gradient(id).is_some()).collect()
    }

    /// Says that these and no others have a gradient. For recorded work: a replay writes the gradients that were written while it was recorded, and
    /// leaves no trace of it on the host.
    pub fn assume_gradients(&mut self, ids: &[ParamId]) -> Result<()> {
        for &id in ids {
            ensure!(self.entries[id.0].gradient.is_some(), "the gradient of {} has been forgotten since it was recorded", self.name(id));
        }
        self.clear_gradients();
        ids.iter().for_each(|id| self.entries[id.0].has_gradient = true);
        Ok(())
    }

    /// Gives these and no others a gradient of zeros, on a GPU: what follows adds to them.
    pub fn zero_gradients(&mut self, ids: &[ParamId]) -> Result<()> {
        self.clear_gradients();
        let mut flat = self.flat_gradients_as_they_are()?;
        if let Some(gpu) = self.device.gpu() {
            let n = flat.len;
            gpu.launch("fill_32", Launch::elements(n, 8), Args::new().out(&mut flat).bits(0).long(n))?;
        }
        ids.iter().for_each(|id| self.entries[id.0].has_gradient = true);
        Ok(())
    }

    /// Replaces a gradient that backward gave.
    pub fn set_gradient(&mut self, id: ParamId, numbers: &[f32]) -> Result<()> {
        let name = self.entries[id.0].name.clone();
        let gradient = self.entries[id.0].gradient.as_mut().filter(|gradient| gradient.is_unique());
        let gradient = gradient.ok_or_else(|| Error::new(format!("the gradient of {name} is still held elsewhere")))?;
        match gradient.gpu() {
            Some(_) => gradient.upload(&Tensor::from_slice(gradient.shape(), numbers)?),
            None => {
                ensure!(numbers.len() == gradient.numel(), "the gradient of {name} is given {} numbers", numbers.len());
                gradient.data_mut::<f32>().copy_from_slice(numbers);
                Ok(())
            }
        }
    }

    /// Forgets all gradients; their memory stays.
    pub fn clear_gradients(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.has_gradient = false);
    }

    /// Allocates the gradients of everything that is trained, in one buffer.
    fn allocate_gradients(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.gradients_allocated, true) {
            return Ok(());
        }
        let ids: Vec<ParamId> = self.trained().collect();
        let shapes = ids.iter().map(|&id| self.values[id.0].shape());
        let gradients = Tensor::slab(&self.device, shapes, self.dtype)?;
        for (id, gradient) in ids.into_iter().zip(gradients) {
            self.entries[id.0].gradient = Some(gradient);
        }
        Ok(())
    }

    /// The gradient's own memory, if nothing has been written to it.
    pub(crate) fn lend(&mut self, id: ParamId) -> Result<Option<Tensor>> {
        if self.entries[id.0].has_gradient {
            return Ok(None);
        }
        self.allocate_gradients()?;
        Ok(self.entries[id.0].gradient.take())
    }

    pub(crate) fn give_back(&mut self, id: ParamId, range: Tensor) {
        self.entries[id.0].gradient = Some(range);
    }

    /// Takes a gradient from the tape: the lent range itself, or something to copy or add.
    pub(crate) fn accept(&mut self, id: ParamId, gradient: Tensor) -> Result<()> {
        self.allocate_gradients()?;
        let entry = &mut self.entries[id.0];
        entry.gradient = Some(match entry.gradient.take() {
            None => gradient,
            Some(own) if entry.has_gradient => own.accumulate(&gradient)?,
            Some(own) => own.replace(&gradient)?,
        });
        entry.has_gradient = true;
        Ok(())
    }

    fn write(&mut self, id: ParamId, numbers: &[f32]) {
        let value = &mut self.values[id.0];
        match self.dtype {
            Dtype::F64 => value.data_mut::<f64>().iter_mut().zip(numbers).for_each(|(value, &x)| *value = x as f64),
            _ => value.data_mut::<f32>().copy_from_slice(numbers),
        }
    }
}
