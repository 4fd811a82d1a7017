//! What an optimiser remembers: for each parameter some tensors of its shape, and how many updates it has had.
//!
//! All tensors of one name lie in one buffer, in the order in which the parameters were registered, as their gradients do. The buffers are
//! made at the first update. An update cuts all parameters into one list of pieces of at most [`PIECE`] elements, so that threads share large
//! and small ones evenly; the pieces depend on the shapes alone.

use super::groups::Group;
use crate::ensure;
use crate::error::{Error, Result};
use crate::param::{ParamId, Params};
use crate::tensor::{Element, Tensor};
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
}

struct Slot {
    id: ParamId,
    group: usize,
    steps: u64,
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
            slots.extend(group.params.iter().map(|&id| Slot { id, group: i, steps: 0 }));
        }
        slots.sort_by_key(|slot| slot.id);
        let slot_of: HashMap<ParamId, usize> = slots.iter().enumerate().map(|(i, slot)| (slot.id, i)).collect();
        ensure!(slot_of.len() == slots.len(), "{optimizer}: a parameter is in two groups");
        Ok(Self { optimizer, names, groups, slots, slot_of, tensors: Vec::new() })
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
                let numbers = tensor.cast(params.dtype())?;
                crate::by_real!(optimizer, params.dtype(), write(own, &numbers));
            }
        }
        self.slots[slot].steps = steps;
        Ok(())
    }

    fn allocate(&mut self, params: &Params) -> Result<()> {
        if !self.tensors.is_empty() {
            return Ok(());
        }
        let slab = |_: &&str| Tensor::slab(params.device(), self.slots.iter().map(|slot| params.value(slot.id).shape()), params.dtype());
        self.tensors = self.names.iter().map(slab).collect::<Result<_>>()?;
        Ok(())
    }

    /// Everything that has a gradient, with its `K` tensors of state. All checks happen here, before anything is changed.
    pub(super) fn lend<'a, const K: usize>(&'a mut self, params: &'a mut Params, lr: f64) -> Result<Vec<Update<'a, K>>> {
        let optimizer = self.optimizer;
        ensure!(lr.is_finite() && lr >= 0.0, "{optimizer}: the learning rate is {lr}");
        self.allocate(params)?;
        for id in params.trained().filter(|&id| params.gradient(id).is_some()) {
            let slot = self.slot_of.get(&id);
            ensure!(slot.is_some(), "{optimizer}: {} has a gradient but is in no group", params.name(id));
            let own = slot.is_some_and(|&slot| self.tensors.iter().all(|tensors| tensors[slot].is_unique()));
            ensure!(own, "{optimizer}: the state of {} is still held elsewhere", params.name(id));
        }
        let lent = params.values_and_gradients()?.map(|(id, value, gradient)| (id, (value, gradient)));
        let mut lent: HashMap<ParamId, (&mut Tensor, &Tensor)> = lent.collect();
        let mut columns: Vec<_> = self.tensors.iter_mut().map(|tensors| tensors.iter_mut()).collect();
        let mut updates = Vec::with_capacity(lent.len());
        for slot in &mut self.slots {
            let state = std::array::from_fn(|k| columns[k].next().expect("every slot has a tensor of each name"));
            let Some((value, gradient)) = lent.remove(&slot.id) else { continue };
            let group = &self.groups[slot.group];
            let (lr, weight_decay) = (lr * group.lr_scale, group.weight_decay);
            updates.push(Update { lr, weight_decay, steps: &mut slot.steps, value, gradient, state });
        }
        Ok(updates)
    }
}

fn write<T: Element>(own: &mut Tensor, numbers: &Tensor) {
    own.data_mut::<T>().copy_from_slice(numbers.data());
}

/// One parameter that is about to change.
pub(super) struct Update<'a, const K: usize> {
    pub lr: f64,
    pub weight_decay: f64,
    pub steps: &'a mut u64,
    pub value: &'a mut Tensor,
    pub gradient: &'a Tensor,
    pub state: [&'a mut Tensor; K],
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
