//! One model on many ranks: gradients become their means over the ranks while the backward pass still runs, and each update leaves the same numbers everywhere.
//!
//! | module | what it is |
//! |---|---|
//! | [`host`] | through the memory of the host, by a thread of its own |
//! | [`gpus`] | between GPUs, by NCCL on a stream of its own, inside recorded work too |
//!
//! Every rank's loss counts for its share, so sums of gradients are means over the whole batch. Parameters are cut into buckets from the last to the first, the
//! order in which the backward pass finishes them; a full bucket is summed while the pass goes on. Buckets are sent in one order on all ranks, whatever
//! finishes first. Of several micro-batches only the last sends. Where a GPU's gradients go through the host, and where a recorded pass is one of several
//! micro-batches, they go when the pass is over.
//!
//! With a sharded optimiser (ZeRO, stage 1) each rank gets the sums of its own parameters alone, keeps the optimiser's memory of those alone, updates them,
//! and then all ranks share the new values. Parameters are dealt out whole, one range of the order of registration to each rank, so that rules which look at
//! a whole parameter (LARS, LAMB) are the same.

mod gpus;
mod host;

use crate::device::ranks::{Ranks, Wire};
use crate::ensure;
use crate::error::{Error, Result};
use crate::formats::extend_crc32c;
use crate::param::{ParamId, Params, Role};
use crate::tensor::{Device, Dtype, Tensor};
use clap::ValueEnum;
use gpus::Gpus;
use host::{Job, Worker};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

/// How gradients and values go round.
#[derive(Clone, Copy, Debug)]
pub struct ExchangeOptions {
    pub wire: Wire,
    /// Most bytes of a bucket, unless one parameter is larger.
    pub bucket: usize,
    /// Whether each rank keeps the optimiser's memory of its own parameters alone.
    pub shard: bool,
    pub way: Way,
    /// How long a rank waits for the others.
    pub patience: Duration,
}

/// What gradients on GPUs go through; those on CPUs go through the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// NCCL, from GPU to GPU
    #[default]
    Nccl,
    /// The memory of the hosts and TCP: slow, and needs neither NCCL nor a GPU for each rank
    Host,
}

impl Default for ExchangeOptions {
    fn default() -> Self {
        Self { wire: Wire::F32, bucket: 25 << 20, shard: false, way: Way::Nccl, patience: Duration::from_secs(600) }
    }
}

/// Parameters whose gradients are sent together.
struct Bucket {
    /// In the order of registration.
    ids: Vec<ParamId>,
    /// How many of them have no gradient of this update yet.
    missing: usize,
    /// Memory for their numbers on the host, between updates.
    numbers: Vec<f32>,
}

pub struct Exchange {
    ranks: Ranks,
    options: ExchangeOptions,
    /// From the last parameter to the first.
    buckets: Vec<Bucket>,
    bucket_of: HashMap<ParamId, usize>,
    /// Of each trained parameter, if the optimiser is sharded.
    owners: HashMap<ParamId, usize>,
    /// Updates so far.
    updates: u64,
    /// Buckets that have been sent in this update.
    sent: usize,
    road: Road,
}

enum Road {
    Host(Worker),
    Gpus(Box<Gpus>),
}

impl Exchange {
    /// Deals the parameters out, and gives every rank the values of rank 0.
    pub fn new(ranks: Ranks, options: ExchangeOptions, params: &mut Params) -> Result<Self> {
        let gpu = params.device().gpu().filter(|gpu| gpu.as_real().is_some() && options.way == Way::Nccl);
        let road = match gpu {
            Some(gpu) => Road::Gpus(Box::new(Gpus::join(gpu, &ranks, options)?)),
            None => Road::Host(Worker::start(ranks.clone())),
        };
        let (bucket_of, owners) = (HashMap::new(), HashMap::new());
        let mut own = Self { ranks, options, buckets: Vec::new(), bucket_of, owners, updates: 0, sent: 0, road };
        own.deal_out(params)?;
        own.begin(params)?;
        Ok(own)
    }

    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// What is sent together, from the last parameters to the first.
    pub fn buckets(&self) -> impl Iterator<Item = &[ParamId]> {
        self.buckets.iter().map(|bucket| &bucket.ids[..])
    }

    pub fn is_sharded(&self) -> bool {
        self.options.shard
    }

    /// Whether this rank keeps the optimiser's memory of a parameter.
    pub fn owns(&self, id: ParamId) -> bool {
        self.owners.get(&id).is_none_or(|&owner| owner == self.ranks.rank())
    }

    fn deal_out(&mut self, params: &mut Params) -> Result<()> {
        ensure!(params.dtype() == Dtype::F32, "gradients go round in f32 or bf16, not {}", params.dtype());
        let trained: Vec<ParamId> = params.trained().collect();
        let bytes = |id: ParamId| 4 * params.value(id).numel();
        let mut filled = usize::MAX;
        for &id in trained.iter().rev() {
            let more = filled.saturating_add(bytes(id));
            let bucket = match self.buckets.last_mut() {
                Some(last) if more <= self.options.bucket => last,
                _ => {
                    filled = 0;
                    self.buckets.push(Bucket { ids: Vec::new(), missing: 0, numbers: Vec::new() });
                    self.buckets.last_mut().expect("just pushed")
                }
            };
            filled += bytes(id);
            bucket.ids.insert(0, id);
            self.bucket_of.insert(id, self.buckets.len() - 1);
        }
        if self.options.shard {
            self.owners = deal(&trained.iter().map(|&id| (id, params.value(id).numel())).collect::<Vec<_>>(), self.ranks.world());
        }
        Ok(())
    }

    /// Gives every rank the values of rank 0.
    fn begin(&self, params: &mut Params) -> Result<()> {
        if let Road::Gpus(gpus) = &self.road {
            gpus.values_of_first(params)?;
            return self.settle();
        }
        let all: Vec<ParamId> = params.ids().collect();
        self.take_from_first(params, &all, "the values that the run begins with")
    }

    /// Gives every rank the values that rank 0 has of these.
    fn take_from_first(&self, params: &mut Params, ids: &[ParamId], what: &str) -> Result<()> {
        let mut values = Vec::new();
        if self.ranks.is_first() {
            values = packed(ids.iter().map(|&id| params.value(id)))?;
        }
        let bytes = self.ranks.broadcast(what, bytemuck::cast_slice(&values).to_vec())?;
        if self.ranks.is_first() {
            return Ok(());
        }
        unpacked(&bytes, params, ids, what)
    }

    /// Running statistics become those of rank 0, as they are where one program drives many devices.
    pub fn share_statistics(&self, params: &mut Params) -> Result<()> {
        let buffers: Vec<ParamId> = params.ids().filter(|&id| params.role(id) == Role::Buffer).collect();
        if buffers.is_empty() { Ok(()) } else { self.take_from_first(params, &buffers, "running statistics") }
    }

    /// Whether buckets are sent while a backward pass on this device goes on: where it is taken as it comes, and where it is recorded.
    pub fn goes_beside(&self, on_gpu: bool, recorded: bool, micro_batches: usize) -> bool {
        match self.road {
            Road::Host(_) => !on_gpu,
            Road::Gpus(_) => !recorded || micro_batches == 1,
        }
    }

    /// Before the backward pass whose gradients are to go round.
    pub fn prepare(&mut self) {
        self.sent = 0;
        self.buckets.iter_mut().for_each(|bucket| bucket.missing = bucket.ids.len());
    }

    /// The gradient of a parameter is what it will be on this rank.
    pub fn ready(&mut self, params: &Params, id: ParamId) -> Result<()> {
        let bucket = self.bucket_of.get(&id).and_then(|&at| self.buckets.get_mut(at));
        let bucket = bucket.ok_or_else(|| Error::new(format!("{} began to be trained after the ranks were joined", params.name(id))))?;
        bucket.missing = bucket.missing.saturating_sub(1);
        while self.buckets.get(self.sent).is_some_and(|bucket| bucket.missing == 0) {
            self.send(params)?;
        }
        Ok(())
    }

    /// Sends what is left when the pass is over. On GPUs what they are given from here on comes behind the sums.
    pub fn end_pass(&mut self, params: &Params) -> Result<()> {
        while self.sent < self.buckets.len() {
            self.send(params)?;
        }
        match &mut self.road {
            Road::Host(_) => Ok(()),
            Road::Gpus(gpus) => gpus.end_pass(params, self.buckets.iter().map(|bucket| &bucket.ids[..])),
        }
    }

    /// A pass was replayed that sent its buckets itself.
    pub fn replayed(&mut self) {
        self.sent = self.buckets.len();
    }

    /// Hands the next bucket over.
    fn send(&mut self, params: &Params) -> Result<()> {
        let at = self.sent;
        self.sent += 1;
        let ids = &self.buckets[at].ids;
        if let Road::Gpus(gpus) = &mut self.road {
            let parts = self.options.shard.then(|| gpus::parts(params, ids, &self.owners, self.ranks.world()));
            return gpus.send(params, at, ids, parts.as_deref());
        }
        let reached: Vec<ParamId> = ids.iter().copied().filter(|&id| params.gradient(id).is_some()).collect();
        let mut numbers = std::mem::take(&mut self.buckets[at].numbers);
        pack(reached.iter().filter_map(|&id| params.gradient(id)), &mut numbers)?;
        let parts = self.options.shard.then(|| self.parts(params, &reached));
        let what = format!("the gradients of update {} (piece {})", self.updates + 1, at + 1);
        if let Road::Host(worker) = &self.road {
            worker.send(Job { what, wire: self.options.wire, numbers, parts });
        }
        Ok(())
    }

    /// Which of the numbers of some parameters, one behind the other, belong to each rank.
    fn parts(&self, params: &Params, ids: &[ParamId]) -> Vec<Range<usize>> {
        let mut end = 0;
        let start = |id: &ParamId| {
            let start = end;
            end += params.value(*id).numel();
            (self.owners[id], start)
        };
        let starts: Vec<_> = ids.iter().map(start).collect();
        dealt(starts.into_iter(), end, self.ranks.world())
    }

    /// Waits until all gradients are those of the whole batch; of a sharded optimiser, those that this rank owns, and it has no others then.
    pub fn finish(&mut self, params: &mut Params) -> Result<()> {
        if self.sent < self.buckets.len() {
            self.end_pass(params)?;
        }
        if let Road::Host(worker) = &self.road {
            let rank = self.ranks.rank();
            for bucket in &mut self.buckets {
                bucket.numbers = worker.receive()?;
                let mut rest = &bucket.numbers[..];
                for &id in &bucket.ids {
                    let Some(own) = params.gradient(id) else { continue };
                    let (mine, others) = rest.split_at_checked(own.numel()).ok_or_else(|| Error::new("a bucket came back cut short"))?;
                    rest = others;
                    if self.owners.get(&id).is_none_or(|&owner| owner == rank) {
                        params.set_gradient(id, mine)?;
                    }
                }
            }
        }
        self.settle()?;
        self.updates += 1;
        if self.options.shard {
            let own: Vec<ParamId> = params.reached().into_iter().filter(|&id| self.owns(id)).collect();
            params.assume_gradients(&own)?;
        }
        Ok(())
    }

    /// Waits for what GPUs exchange, with an eye on the other ranks: nothing that this thread then asks of its device waits for them.
    pub fn settle(&self) -> Result<()> {
        match &self.road {
            Road::Host(_) => Ok(()),
            Road::Gpus(gpus) => gpus.settle(&self.ranks),
        }
    }

    /// What the losses of this update are called among the ranks.
    pub fn losses(&self) -> String {
        format!("the losses of update {}", self.updates)
    }

    /// The length of the whole gradient, of which a sharded rank has a part.
    pub fn whole_norm(&self, own: f64) -> Result<f64> {
        if !self.options.shard {
            return Ok(own);
        }
        let squares = self.ranks.gather_numbers("the length of the gradient", [own * own])?;
        Ok(squares.into_iter().map(|[square]| square).sum::<f64>().sqrt())
    }

    /// After an update of a sharded optimiser: everybody gets what each rank has made of its own parameters.
    pub fn share_values(&self, params: &mut Params) -> Result<()> {
        if !self.options.shard {
            return Ok(());
        }
        if let Road::Gpus(gpus) = &self.road {
            gpus.share_values(params, &self.owners, self.ranks.world())?;
            // Whatever asks the device next, the checkpoint or the evaluation, would wait for the others unwatched.
            return self.settle();
        }
        let trained: Vec<ParamId> = params.trained().collect();
        let mut values = packed(trained.iter().map(|&id| params.value(id)))?;
        let parts = self.parts(params, &trained);
        self.ranks.share_parts(&format!("the values after update {}", self.updates), &mut values, &parts)?;
        let mut rest = &values[..];
        for id in trained {
            let (value, others) = rest.split_at(params.value(id).numel());
            rest = others;
            if !self.owns(id) {
                let value = Tensor::from_slice(params.value(id).shape(), value)?;
                params.set_value(id, &value)?;
            }
        }
        Ok(())
    }

    /// Gives up what is exchanged between GPUs, for a rank that fails: nothing that it drops waits for the others.
    pub fn give_up(&self, why: &str) {
        if let Road::Gpus(gpus) = &self.road {
            gpus.give_up(why);
        }
    }
}

/// Compares the parameters of all ranks, `when` it is asked; one that has others is named.
pub fn compare(ranks: &Ranks, params: &Params, when: &str) -> Result<()> {
    if ranks.is_alone() {
        return Ok(());
    }
    let mut sum = 0;
    for id in params.ids() {
        sum = extend_crc32c(sum, params.value(id).on(&Device::Cpu)?.bytes());
    }
    let sums = ranks.gather_numbers("the checksum of the parameters", [f64::from(sum)])?;
    let sums: Vec<u32> = sums.into_iter().map(|[sum]| sum as u32).collect();
    let Some((rank, theirs, most)) = odd_one(&sums) else { return Ok(()) };
    Err(Error::new(format!(
        "{when} the parameters of rank {rank} are not those of the others (checksum {theirs:08x} and not {most:08x}); look for another checkpoint, a failing device or \
         another build of the program there; a run goes on from its last checkpoint with --resume auto"
    )))
}

/// The first rank that has not what most have (or rank 0, where there is no most), with its sum and theirs.
fn odd_one(sums: &[u32]) -> Option<(usize, u32, u32)> {
    let count = |sum: u32| sums.iter().filter(|&&other| other == sum).count();
    let most = sums.iter().copied().rev().max_by_key(|&sum| (count(sum), sum == sums[0]))?;
    sums.iter().position(|&sum| sum != most).map(|rank| (rank, sums[rank], most))
}

/// Deals parameters out in ranges of about as many numbers: the rank of each.
pub fn deal(sizes: &[(ParamId, usize)], world: usize) -> HashMap<ParamId, usize> {
    let all: usize = sizes.iter().map(|(_, size)| size).sum();
    let mut before = 0;
    let owner = |&(id, size): &(ParamId, usize)| {
        let middle = (2 * before + size) as u128;
        before += size;
        let owner = middle * world as u128 / (2 * all.max(1)) as u128;
        (id, (owner as usize).min(world - 1))
    };
    sizes.iter().map(owner).collect()
}

/// From the owner of each parameter and where it starts: a range for each rank, which together go from 0 to the end.
fn dealt(starts: impl Iterator<Item = (usize, usize)>, end: usize, world: usize) -> Vec<Range<usize>> {
    let mut bounds = vec![0; world + 1];
    let mut before = None;
    for (owner, start) in starts {
        if before != Some(owner) {
            // Ranks between two owners have nothing.
            let first = before.map_or(0, |before| before + 1);
            bounds[first..=owner].fill(if before.is_none() { 0 } else { start });
            before = Some(owner);
        }
    }
    let first = before.map_or(0, |before| before + 1);
    bounds[first..].fill(end);
    bounds.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// Numbers of tensors one behind the other.
fn packed<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Vec<f32>> {
    let mut numbers = Vec::new();
    pack(tensors, &mut numbers)?;
    Ok(numbers)
}

/// The same in memory that was used before.
fn pack<'a>(tensors: impl Iterator<Item = &'a Tensor>, numbers: &mut Vec<f32>) -> Result<()> {
    numbers.clear();
    for tensor in tensors {
        numbers.extend_from_slice(tensor.on(&Device::Cpu)?.data::<f32>());
    }
    Ok(())
}

fn unpacked(bytes: &[u8], params: &mut Params, ids: &[ParamId], what: &str) -> Result<()> {
    let mut rest = bytes;
    for &id in ids {
        let own = params.value(id);
        let mine_and_others = rest.split_at_checked(4 * own.numel());
        let (mine, others) = mine_and_others.ok_or_else(|| Error::new(format!("{what}: rank 0 has a smaller model than this rank")))?;
        rest = others;
        let numbers: Vec<f32> = mine.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
        let value = Tensor::from_slice(own.shape(), &numbers)?;
        params.set_value(id, &value)?;
    }
    ensure!(rest.is_empty(), "{what}: rank 0 has a larger model than this rank");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_differs_is_named() {
        assert_eq!(odd_one(&[7, 7, 7]), None);
        assert_eq!(odd_one(&[7, 7, 9]), Some((2, 9, 7)));
        assert_eq!(odd_one(&[9, 7, 7]), Some((0, 9, 7)));
        assert_eq!(odd_one(&[7, 9]), Some((1, 9, 7)));
        assert_eq!(odd_one(&[9, 7]), Some((1, 7, 9)));
    }

    #[test]
    fn numbers_are_dealt_out_without_gaps() {
        assert_eq!(dealt([(0, 0), (0, 5), (1, 8), (2, 12)].into_iter(), 20, 3), [0..8, 8..12, 12..20]);
        assert_eq!(dealt([(1, 0), (3, 7)].into_iter(), 9, 5), [0..0, 0..7, 7..7, 7..9, 9..9]);
        assert_eq!(dealt([(2, 4)].into_iter(), 9, 3), [0..0, 0..0, 0..9]);
        assert_eq!(dealt(std::iter::empty(), 0, 2), [0..0, 0..0]);
    }
}
