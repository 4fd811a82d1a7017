//! What an optimiser remembers: for each parameter some tensors of its shape, and how many updates it has had.
//!
//! All tensors of one name lie in one buffer, in the order in which the parameters were registered, as their gradients do. The buffers are
//! made at the first update, on the device of the parameters. An update cuts all parameters into one list of pieces of at most [`PIECE`] elements, so
//! that threads share large and small ones evenly; the pieces depend on the shapes alone. For a GPU that list lies on the device ([`super::pieces`]).

use super::groups::Group;
use super::pieces::{Pieces, Places};
use crate::device::gpu::Gpu;
use crate::ensure;
use crate::error::{Error, Result};
use crate::param::{ParamId, Params};
use crate::tensor::{Device, Element, Flat, Tensor};
use std::collections::HashMap;

/// Most elements of a piece.
pub const PIECE: usize = 32_768;

pub struct State {
    optimizer: &'static str,
    names: &'static [&'static str],
    groups: Vec<Group>,
    slots: Vec<Slot>,
    slot_of: HashMap<ParamId, usize>,
    /// For each name the tensors of all slots; empty until the first update.
    tensors: Vec<Vec<Tensor>>,
    /// On a GPU, from the first update on.
    pieces: Option<Pieces>,
}

struct Slot {
    id: ParamId,
    group: usize,
    steps: u64,
    /// Whether the last update that was prepared is counted in them.
    counted: bool,
    /// From when an update is prepared until it is made.
    plan: Option<Plan>,
}

/// The update that a parameter is about to get.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub lr: f64,
    pub weight_decay: f64,
    /// Which update it is, from 1.
    pub steps: u64,
    pub vector: bool,
}

/// What is remembered of one parameter.
pub struct Memory<'a> {
    pub id: ParamId,
    /// How many updates it has had.
    pub steps: u64,
    pub tensors: Vec<(&'static str, &'a Tensor)>,
}

impl State {
    pub(super) fn new(optimizer: &'static str, names: &'static [&'static str], groups: Vec<Group>) -> Result<Self> {
        let mut slots = Vec::new();
        for (i, group) in groups.iter().enumerate() {
            for (what, number) in [("weight decay", group.weight_decay), ("learning-rate scale", group.lr_scale)] {
                ensure!(number.is_finite() && number >= 0.0, "{optimizer}: group {} has a {what} of {number}", group.name);
            }
            slots.extend(group.params.iter().map(|&id| Slot { id, group: i, steps: 0, counted: false, plan: None }));
        }
        slots.sort_by_key(|slot| slot.id);
        let slot_of: HashMap<ParamId, usize> = slots.iter().enumerate().map(|(i, slot)| (slot.id, i)).collect();
        ensure!(slot_of.len() == slots.len(), "{optimizer}: a parameter is in two groups");
        Ok(Self { optimizer, names, groups, slots, slot_of, tensors: Vec::new(), pieces: None })
    }

    /// Remembers these parameters alone from now on; the others are another rank's to update. Before the first update.
    pub fn keep(&mut self, own: impl Fn(ParamId) -> bool) -> Result<()> {
        ensure!(self.tensors.is_empty(), "{}: parameters are dealt out before the first update", self.optimizer);
        self.slots.retain(|slot| own(slot.id));
        self.slot_of = self.slots.iter().enumerate().map(|(i, slot)| (slot.id, i)).collect();
        Ok(())
    }

    /// Whether another rank remembers a parameter of these groups.
    pub fn is_elsewhere(&self, id: ParamId) -> bool {
        !self.slot_of.contains_key(&id) && self.groups.iter().any(|group| group.params.contains(&id))
    }

    /// What is remembered of each parameter, by name.
    pub fn names(&self) -> &'static [&'static str] {
        self.names
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Every parameter that has been updated, in the order of registration.
    pub fn memories(&self) -> impl Iterator<Item = Memory<'_>> {
        let updated = self.slots.iter().enumerate().filter(|(_, slot)| slot.steps > 0);
        updated.map(|(i, slot)| {
            let tensors = self.names.iter().zip(&self.tensors).map(|(&name, tensors)| (name, &tensors[i])).collect();
            Memory { id: slot.id, steps: slot.steps, tensors }
        })
    }

    /// Puts back what was remembered of one parameter. Those that are never put back start afresh.
    pub fn restore(&mut self, params: &Params, id: ParamId, steps: u64, tensors: &[(&str, &Tensor)]) -> Result<()> {
        let (optimizer, param) = (self.optimizer, params.name(id));
        self.allocate(params)?;
        let slot = self.slot_of.get(&id).copied();
        let slot = slot.ok_or_else(|| Error::new(format!("{optimizer}: {param} has a state but is in no group")))?;
        let given: Vec<&str> = tensors.iter().map(|(name, _)| *name).collect();
        let complete = given.len() == self.names.len() && self.names.iter().all(|name| given.contains(name));
        ensure!(complete, "{optimizer}: the state of {param} holds {given:?}, wanted are {:?}", self.names);
        let shape = params.value(id).shape();
        for (name, tensor) in tensors {
            ensure!(tensor.shape() == shape, "{optimizer}: {name} of {param} is {:?}, the model wants {shape:?}", tensor.shape());
        }
        for (name, own) in self.names.iter().zip(&mut self.tensors) {
            let own = &mut own[slot];
            ensure!(own.is_unique(), "{optimizer}: {name} of {param} is still held elsewhere");
            for (_, tensor) in tensors.iter().filter(|(given, _)| given == name) {
                own.upload(&tensor.on(&Device::Cpu)?.cast(params.dtype())?)?;
            }
        }
        self.slots[slot].steps = steps;
        Ok(())
    }

    /// Makes the tensors, or brings them to where the parameters have gone.
    fn allocate(&mut self, params: &Params) -> Result<()> {
        let there = self.tensors.first().and_then(|tensors| tensors.first()).map(Tensor::device);
        if there.as_ref() == Some(params.device()) {
            return Ok(());
        }
        let slab = |_: &&str| Tensor::slab(params.device(), self.slots.iter().map(|slot| params.value(slot.id).shape()), params.dtype());
        let mut tensors = self.names.iter().map(slab).collect::<Result<Vec<_>>>()?;
        for (to, from) in tensors.iter_mut().flatten().zip(self.tensors.iter().flatten()) {
            to.upload(&from.on(&Device::Cpu)?)?;
        }
        (self.tensors, self.pieces) = (tensors, None);
        Ok(())
    }

    /// Counts an update of everything that has a gradient. All checks happen here, before anything is changed. On a GPU the numbers of the
    /// rule, which `rule` works out, one of which is never 0, are put where the kernels read them.
    pub(super) fn prepare(&mut self, params: &Params, lr: f64, rule: impl Fn(&Plan) -> [f32; 4]) -> Result<()> {
        let optimizer = self.optimizer;
        ensure!(lr.is_finite() && lr >= 0.0, "{optimizer}: the learning rate is {lr}");
        let recording = params.device().gpu().is_some_and(Gpu::is_recording);
        ensure!(!recording, "{optimizer}: an update is prepared before recorded work and not inside it");
        self.allocate(params)?;
        for id in params.reached() {
            let name = params.name(id);
            let slot = self.slot_of.get(&id);
            ensure!(slot.is_some(), "{optimizer}: {name} has a gradient but is in no group");
            let own = slot.is_some_and(|&slot| self.tensors.iter().all(|tensors| tensors[slot].is_unique()));
            ensure!(own, "{optimizer}: the state of {name} is still held elsewhere");
            ensure!(params.value(id).is_unique(), "{name} is still in use by a recorded forward pass");
        }
        if params.device().gpu().is_some() {
            let places = Places::of(params, &self.slot_of);
            if self.pieces.as_ref().is_none_or(|pieces| pieces.places != places) {
                self.pieces = Some(Pieces::new(params, places)?);
            }
        }
        for slot in &mut self.slots {
            let group = &self.groups[slot.group];
            slot.counted = params.gradient(slot.id).is_some();
            slot.plan = params.gradient(slot.id).map(|gradient| {
                slot.steps += 1;
                let vector = gradient.shape().len() <= 1;
                Plan { lr: lr * group.lr_scale, weight_decay: group.weight_decay, steps: slot.steps, vector }
            });
        }
        let Some(pieces) = self.pieces.as_mut().filter(|_| params.device().gpu().is_some()) else { return Ok(()) };
        let rules = self.slots.iter().map(|slot| slot.plan.as_ref().map(&rule));
        let written = pieces.write(rules);
        if written.is_err() {
            self.withdraw();
        }
        written
    }

    /// Forgets the update that was prepared last and counts it no more: it could not be made.
    pub(super) fn withdraw(&mut self) {
        for slot in &mut self.slots {
            slot.steps -= u64::from(std::mem::take(&mut slot.counted));
            slot.plan = None;
        }
    }

    /// Takes the plans: one for each slot, and only for what has a gradient.
    fn take_plans(&mut self, params: &Params) -> Result<Vec<Option<Plan>>> {
        let optimizer = self.optimizer;
        for id in params.trained() {
            let prepared = self.slot_of.get(&id).is_some_and(|&slot| self.slots[slot].plan.is_some());
            let reached = params.gradient(id).is_some();
            let (name, has) = (params.name(id), if reached { "a gradient" } else { "no gradient" });
            ensure!(prepared == reached, "{optimizer}: {name} has {has}, and the update was not prepared for that");
        }
        Ok(self.slots.iter_mut().map(|slot| slot.plan.take()).collect())
    }

    /// Everything that has a gradient, with its `K` tensors of state.
    pub(super) fn lend<'a, const K: usize>(&'a mut self, params: &'a mut Params) -> Result<Vec<Update<'a, K>>> {
        let plans = self.take_plans(params)?;
        let lent = params.values_and_gradients()?.map(|(id, value, gradient)| (id, (value, gradient)));
        let mut lent: HashMap<ParamId, (&mut Tensor, &Tensor)> = lent.collect();
        let mut columns: Vec<_> = self.tensors.iter_mut().map(|tensors| tensors.iter_mut()).collect();
        let mut updates = Vec::with_capacity(lent.len());
        for (slot, plan) in self.slots.iter().zip(plans) {
            let state = std::array::from_fn(|k| columns[k].next().expect("every slot has a tensor of each name"));
            let Some(((value, gradient), plan)) = lent.remove(&slot.id).zip(plan) else { continue };
            updates.push(Update { plan, value, gradient, state });
        }
        Ok(updates)
    }

    /// The same as whole buffers of a GPU; None if nothing has a gradient.
    pub(super) fn lend_flat<const K: usize>(&mut self, params: &mut Params) -> Result<Option<FlatUpdate<'_, K>>> {
        let (optimizer, plans) = (self.optimizer, self.take_plans(params)?);
        let Some(pieces) = self.pieces.as_ref().filter(|_| plans.iter().any(Option::is_some)) else { return Ok(None) };
        let state = self.tensors.iter_mut().map(|tensors| {
            let whole = Tensor::flat(tensors);
            whole.ok_or_else(|| Error::new(format!("{optimizer}: the state of a parameter is still held elsewhere")))
        });
        let state = state.collect::<Result<Vec<_>>>()?;
        let (values, working, gradients) = (params.flat_values()?, params.flat_working()?, params.flat_gradients()?);
        pieces.check(&values, working.as_ref(), &gradients, &state)?;
        let mut state = state.into_iter();
        let state = std::array::from_fn(|_| state.next().expect("there is a buffer for each name"));
        Ok(Some(FlatUpdate { values, working, gradients, state, pieces }))
    }
}

/// One parameter that is about to change.
pub(super) struct Update<'a, const K: usize> {
    pub plan: Plan,
    pub value: &'a mut Tensor,
    pub gradient: &'a Tensor,
    pub state: [&'a mut Tensor; K],
}

/// All parameters that are about to change, on a GPU.
pub(super) struct FlatUpdate<'a, const K: usize> {
    pub values: Flat,
    pub working: Option<Flat>,
    pub gradients: Flat,
    pub state: [Flat; K],
    pub pieces: &'a Pieces,
}

/// A part of a parameter, and the rule by which it changes.
pub(super) struct Piece<'a, T, R, const K: usize> {
    pub rule: R,
    pub value: &'a mut [T],
    pub gradient: &'a [T],
    pub state: [&'a mut [T]; K],
}

impl<'a, const K: usize> Update<'a, K> {
    pub fn cut<T: Element, R: Copy>(self, rule: R, pieces: &mut Vec<Piece<'a, T, R, K>>) {
        let mut state = self.state.map(|tensor| tensor.data_mut::<T>().chunks_mut(PIECE));
        let values = self.value.data_mut::<T>().chunks_mut(PIECE);
        for (value, gradient) in values.zip(self.gradient.data::<T>().chunks(PIECE)) {
            let state = state.each_mut().map(|chunks| chunks.next().expect("a state has the shape of its parameter"));
            pieces.push(Piece { rule, value, gradient, state });
        }
    }
}
