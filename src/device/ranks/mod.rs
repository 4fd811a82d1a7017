//! Ranks: processes (or threads, in tests) that train one model, each on its own part of every batch.
//!
//! | module | what it is |
//! |---|---|
//! | [`environment`] | who started this process, and which rank of how many it is |
//! | [`meeting`] | what all ranks do together, and what comes of it |
//! | [`threads`] | ranks that are threads of one process |
//! | [`tcp`] | ranks that are processes and talk to rank 0 over TCP |
//!
//! A [`Ranks`] is one rank's hold on the others. Everything that is done together is a *call*: all ranks make the same calls in the same order, each call says
//! what it is about, and a rank that makes another one is an error that names it. So is one that ends, or does not come in time. Sums are taken in the order of
//! the ranks: every rank gets the same bits.
//!
//! Threads and TCP move numbers through the memory of the host, by way of one of them: they are the control plane of every run (arguments are compared, losses
//! gathered, errors told), and the data plane of CPUs, for tests and small models. Between GPUs gradients go through NCCL ([`super::real`]).

pub mod environment;
pub mod meeting;
pub mod tcp;
pub mod threads;

use super::{Named, libs, parallel};
use crate::error::{Error, Result};
use environment::Launched;
pub use meeting::Wire;
use meeting::{Call, Kind};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How ranks meet.
pub trait Collective: Send {
    /// Gives `mine` to a call, which has then to be taken.
    fn give(&mut self, call: &Call, mine: &[u8]) -> Result<()>;

    /// Hands over what comes of the call for this rank, once every rank has given.
    fn take(&mut self, call: &Call, to: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;

    /// Tells the others that this rank makes no calls any more, and why.
    fn fail(&mut self, why: &str);

    /// An error if another rank is known to have ended or failed; waits for nothing.
    fn look(&mut self) -> Result<()>;
}

/// One rank's hold on the others; clones are the same. By default there are no others.
#[derive(Clone, Default)]
pub struct Ranks(Option<Arc<Group>>);

struct Group {
    rank: usize,
    world: usize,
    /// The number of this rank among those of its machine.
    local: usize,
    body: Mutex<Box<dyn Collective>>,
}

impl Ranks {
    /// One rank, which meets nobody.
    pub fn alone() -> Self {
        Self(None)
    }

    /// As many ranks as threads that are going to use them. A group of one meets nobody, and does what a larger one does.
    pub fn threads(world: usize, patience: Duration) -> Vec<Self> {
        let bodies = threads::group(world, patience).into_iter().enumerate();
        bodies.map(|(rank, body)| Self::of(rank, world, rank, Box::new(body))).collect()
    }

    /// The ranks that a launcher started with this one; alone where there was none.
    pub fn launched(patience: Duration) -> Result<Self> {
        match Launched::from_environment()? {
            None => Ok(Self::alone()),
            Some(launched) => Self::join(&launched, patience),
        }
    }

    /// Waits for the others of a launch.
    pub fn join(launched: &Launched, patience: Duration) -> Result<Self> {
        let body = tcp::Tcp::join(launched, patience)?;
        Ok(Self::of(launched.rank, launched.world, launched.local, Box::new(body)))
    }

    fn of(rank: usize, world: usize, local: usize, body: Box<dyn Collective>) -> Self {
        Self(Some(Arc::new(Group { rank, world, local, body: Mutex::new(body) })))
    }

    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |group| group.rank)
    }

    pub fn world(&self) -> usize {
        self.0.as_ref().map_or(1, |group| group.world)
    }

    /// The number of this rank among those of its machine.
    pub fn local(&self) -> usize {
        self.0.as_ref().map_or(0, |group| group.local)
    }

    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Whether this rank speaks for all: it writes and prints.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The device of this rank: of several GPUs, the one with its number on this machine, counted round where there are fewer.
    pub fn device(&self, named: Named) -> Result<Named> {
        match named {
            Named::Gpu(0) if !self.is_alone() => Ok(Named::Gpu(self.local() % libs::devices()?)),
            Named::Gpu(other) if !self.is_alone() => Err(Error::usage(format!(
                "--device gpu:{other}: of several ranks each takes the GPU with its number on its machine; give --device gpu, and name the GPUs by CUDA_VISIBLE_DEVICES"
            ))),
            other => Ok(other),
        }
    }

    /// Threads of this rank's share of the machine, unless a number was typed; None where there are no others.
    pub fn own_threads(&self, typed: Option<usize>) -> Option<usize> {
        typed.or_else(|| (!self.is_alone()).then(parallel::threads))
    }

    /// What every rank gives, in the order of the ranks.
    pub fn gather(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        match &self.0 {
            None => Ok(vec![mine.to_vec()]),
            Some(group) => meeting::split(&group.meet(what, Kind::Gather, mine)?, group.world),
        }
    }

    /// The same of numbers, of which every rank gives as many.
    pub fn gather_numbers<const N: usize>(&self, what: &str, mine: [f64; N]) -> Result<Vec<[f64; N]>> {
        let bytes = mine.map(f64::to_le_bytes).concat();
        let numbers = |bytes: Vec<u8>| {
            let (words, rest) = bytes.as_chunks::<8>();
            let words: Vec<f64> = words.iter().map(|word| f64::from_le_bytes(*word)).collect();
            let complete = <[f64; N]>::try_from(words).ok().filter(|_| rest.is_empty());
            complete.ok_or_else(|| Error::new(format!("{what}: a rank gave {} bytes where {N} numbers are wanted", bytes.len())))
        };
        self.gather(what, &bytes)?.into_iter().map(numbers).collect()
    }

    /// What rank 0 gives; the others' is not looked at.
    pub fn broadcast(&self, what: &str, mine: Vec<u8>) -> Result<Vec<u8>> {
        match &self.0 {
            None => Ok(mine),
            Some(group) => group.meet(what, Kind::Broadcast, if group.rank == 0 { &mine } else { &[] }),
        }
    }

    /// What all ranks give is gathered on rank 0; the others get nothing.
    pub fn collect(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        match &self.0 {
            None => Ok(vec![mine.to_vec()]),
            Some(group) => match group.meet(what, Kind::Collect, mine)? {
                all if group.rank == 0 => meeting::split(&all, group.world),
                _ => Ok(Vec::new()),
            },
        }
    }

    /// The first rank that gives other bytes than rank 0, and what every rank gave; None where all give the same. Hashes are compared first.
    pub fn differing(&self, what: &str, mine: &[u8]) -> Result<Option<(usize, Vec<Vec<u8>>)>> {
        let hash = mine.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let hashes = self.gather(what, &hash.to_le_bytes())?;
        let Some(rank) = hashes.iter().position(|hash| *hash != hashes[0]) else { return Ok(None) };
        Ok(Some((rank, self.gather(what, mine)?)))
    }

    /// Waits until every rank is here.
    pub fn barrier(&self, what: &str) -> Result<()> {
        self.gather(what, &[]).map(|_| ())
    }

    /// Numbers become their sums over the ranks.
    pub fn sum(&self, what: &str, numbers: &mut [f32], wire: Wire) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        let (mut body, call) = (group.body(), Call { what, kind: Kind::Sum(wire) });
        body.give(&call, &wire.packed(numbers))?;
        body.take(&call, &mut |sums| wire.unpack(sums, numbers))
    }

    /// Those of this rank's part become their sums over the ranks; the rest is left as it is. Parts lie one behind the other.
    pub fn sum_parts(&self, what: &str, numbers: &mut [f32], parts: &[Range<usize>], wire: Wire) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        let (mut body, call) = (group.body(), Call { what, kind: Kind::SumParts(wire, parts) });
        body.give(&call, &wire.packed(numbers))?;
        body.take(&call, &mut |sums| wire.unpack(sums, &mut numbers[parts[group.rank].clone()]))
    }

    /// Every rank's part becomes what it is on that rank. Parts lie one behind the other, and cover the numbers.
    pub fn share_parts(&self, what: &str, numbers: &mut [f32], parts: &[Range<usize>]) -> Result<()> {
        let Some(group) = &self.0 else { return Ok(()) };
        let first = parts.first().map_or(0, |part| part.start);
        let last = parts.last().map_or(0, |part| part.end);
        let (mut body, call) = (group.body(), Call { what, kind: Kind::Share });
        body.give(&call, &Wire::F32.packed(&numbers[parts[group.rank].clone()]))?;
        body.take(&call, &mut |all| Wire::F32.unpack(all, &mut numbers[first..last]))
    }

    /// An error if another rank is known to have ended or failed; waits for nothing.
    pub fn look(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |group| group.body().look())
    }

    /// Tells the others that this rank ends, and why.
    pub fn fail(&self, error: &Error) {
        if let Some(group) = &self.0 {
            group.body().fail(&error.chain());
        }
    }
}

impl Group {
    fn body(&self) -> MutexGuard<'_, Box<dyn Collective>> {
        // Whoever panicked while holding it made its call to the end or not at all; the others find out.
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meet(&self, what: &str, kind: Kind, mine: &[u8]) -> Result<Vec<u8>> {
        let (mut body, call) = (self.body(), Call { what, kind });
        body.give(&call, mine)?;
        let mut own = Vec::new();
        body.take(&call, &mut |taken| {
            own.extend_from_slice(taken);
            Ok(())
        })?;
        Ok(own)
    }
}

/// "rank 1", "ranks 1, 2 and 3", and of many only the first.
pub fn named(ranks: &[usize]) -> String {
    let names: Vec<String> = ranks.iter().take(8).map(ToString::to_string).collect();
    match (names.as_slice(), ranks.len() - names.len()) {
        ([one], 0) => format!("rank {one}"),
        ([before @ .., last], 0) => format!("ranks {} and {last}", before.join(", ")),
        (some, more) => format!("ranks {} and {more} more", some.join(", ")),
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.world())
    }
}
