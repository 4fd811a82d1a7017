//! Where the parameters of an optimiser lie in the flat buffers of a GPU, and the numbers of the next update: what kernels/flat.cuh reads.
//!
//! Each parameter is cut into pieces of at most [`PIECE`] numbers, a block of threads each. Everything lies in memory that stays where it is, so recorded
//! work finds the numbers that are written before each replay.

use crate::device::memory::ALIGN;
use crate::ensure;
use crate::error::Result;
use crate::param::{ParamId, Params, Role};
use crate::tensor::{Dtype, Flat, Tensor};
use std::collections::HashMap;

/// Most numbers of a piece, a multiple of [`EACH`].
const PIECE: usize = 4096;
/// Positions and counts are multiples of this: a thread's share, and a divisor of what a range is padded to.
const EACH: usize = 8;

/// Where one parameter starts in each buffer, in numbers.
#[derive(Clone, Copy, PartialEq, Default)]
struct Place {
    value: usize,
    working: usize,
    /// Of no meaning where nothing is trained.
    gradient: usize,
    state: usize,
    count: usize,
}

/// The places of all slots, and where each buffer ends.
#[derive(PartialEq)]
pub(super) struct Places {
    slots: Vec<Place>,
    end: Place,
}

impl Places {
    pub fn of(params: &Params, slots: &HashMap<ParamId, usize>) -> Self {
        let padded = |count: usize, dtype: Dtype| (count * dtype.size()).next_multiple_of(ALIGN) / dtype.size();
        let mut places = Self { slots: vec![Place::default(); slots.len()], end: Place::default() };
        for id in params.ids() {
            let (count, at) = (params.value(id).numel(), places.end);
            let (full, half) = (padded(count, Dtype::F32), padded(count, Dtype::Bf16));
            places.end.value += full;
            places.end.working += half;
            if params.role(id) == Role::Trained {
                places.end.gradient += full;
            }
            if let Some(&slot) = slots.get(&id) {
                places.slots[slot] = Place { count, ..at };
                places.end.state += full;
            }
        }
        places
    }
}

pub(super) struct Pieces {
    pub places: Places,
    /// How many.
    pub count: usize,
    /// [pieces, 8]: value, working copy, gradient and state in units of [`EACH`]; how many numbers; slot; nothing twice.
    pub table: Tensor,
    /// [slots + 1]: where the pieces of each slot start.
    pub firsts: Tensor,
    /// [slots, 4]: the numbers of the rule, or zeros where there is no gradient.
    pub scalars: Tensor,
}

impl Pieces {
    pub fn new(params: &Params, places: Places) -> Result<Self> {
        let end = places.end;
        let most = [end.value, end.working, end.gradient, end.state].into_iter().max().unwrap_or(0) / EACH;
        ensure!(u32::try_from(most).is_ok(), "a model of {} numbers is more than an update can address", end.value);
        let (mut table, mut firsts) = (Vec::new(), vec![0]);
        for (slot, place) in places.slots.iter().enumerate() {
            let count = place.count.next_multiple_of(EACH);
            for start in (0..count).step_by(PIECE) {
                let starts = [place.value, place.working, place.gradient, place.state].map(|at| ((at + start) / EACH) as u32);
                table.extend(starts);
                table.extend([PIECE.min(count - start) as u32, slot as u32, 0, 0]);
            }
            firsts.push((table.len() / 8) as u32);
        }
        let on = |shape: &[usize], numbers: &[u32]| Tensor::from_slice(shape, numbers)?.on(params.device());
        Ok(Self {
            count: table.len() / 8,
            table: on(&[table.len() / 8, 8], &table)?,
            firsts: on(&[firsts.len()], &firsts)?,
            scalars: Tensor::zeros_on(params.device(), &[places.slots.len(), 4], Dtype::F32)?,
            places,
        })
    }

    /// Puts the rule of each slot in place, None where it has no gradient.
    pub fn write(&mut self, rules: impl Iterator<Item = Option<[f32; 4]>>) -> Result<()> {
        let rows: Vec<f32> = rules.flat_map(Option::unwrap_or_default).collect();
        let rows = Tensor::from_slice(self.scalars.shape(), &rows)?;
        self.scalars.upload(&rows)
    }

    /// Refuses buffers that are not laid out as the table says.
    pub fn check(&self, values: &Flat, working: Option<&Flat>, gradients: &Flat, state: &[Flat]) -> Result<()> {
        let end = self.places.end;
        let fits = values.len == end.value
            && working.is_none_or(|working| working.len == end.working)
            && gradients.len == end.gradient
            && state.iter().all(|state| state.len == end.state);
        ensure!(fits, "the parameters have been laid out anew since the update was prepared");
        Ok(())
    }
}
