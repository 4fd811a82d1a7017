//! Ranks that are threads of one process. The last to come to a call does its work, the others wait for it.

use super::Collective;
use super::meeting::{Announced, Call, combine, late, piece};
use crate::error::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub struct Threads {
    rank: usize,
    patience: Duration,
    /// Calls made so far.
    calls: u64,
    room: Arc<Room>,
}

struct Room {
    inside: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Default)]
struct Inside {
    /// What each rank has said of the next call, and what it gives; the memory is used again.
    announced: Vec<Option<Announced>>,
    given: Vec<Vec<u8>>,
    /// Calls that are over, and what came of the last: the next cannot be before every rank has taken it.
    over: u64,
    result: Vec<u8>,
    /// Why there are no calls any more.
    failed: Option<String>,
}

/// One end for each thread.
pub fn group(world: usize, patience: Duration) -> Vec<Threads> {
    let inside = Inside { announced: vec![None; world], given: vec![Vec::new(); world], ..Inside::default() };
    let room = Arc::new(Room { inside: Mutex::new(inside), changed: Condvar::new() });
    (0..world).map(|rank| Threads { rank, patience, calls: 0, room: room.clone() }).collect()
}

impl Room {
    fn enter(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, why: String) {
        let mut inside = self.enter();
        inside.failed.get_or_insert(why);
        self.changed.notify_all();
    }
}

impl Inside {
    /// Does what every rank has come for.
    fn finish(&mut self, call: &Call) -> Result<()> {
        let said: Vec<Announced> = self.announced.iter_mut().filter_map(Option::take).collect();
        said.iter().enumerate().try_for_each(|(rank, announced)| announced.check(rank, &said[0]))?;
        let given: Vec<&[u8]> = self.given.iter().map(Vec::as_slice).collect();
        combine(call.kind, &given, &mut self.result)?;
        self.over += 1;
        Ok(())
    }
}

impl Collective for Threads {
    fn give(&mut self, call: &Call, mine: &[u8]) -> Result<()> {
        let mut inside = self.room.enter();
        if let Some(why) = &inside.failed {
            return Err(Error::new(why.clone()));
        }
        inside.announced[self.rank] = Some(Announced::of(self.calls, call, mine.len()));
        let given = &mut inside.given[self.rank];
        given.clear();
        given.extend_from_slice(mine);
        self.calls += 1;
        if inside.announced.iter().all(Option::is_some) {
            inside.finish(call).unwrap_or_else(|error| inside.failed = Some(error.chain()));
            self.room.changed.notify_all();
        }
        Ok(())
    }

    fn take(&mut self, call: &Call, to: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        let mut inside = self.room.enter();
        while inside.over < self.calls && inside.failed.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = inside.announced.iter().position(Option::is_none).unwrap_or(0);
                inside.failed = Some(late(missing, call.what, self.patience));
                self.room.changed.notify_all();
                break;
            }
            inside = self.room.changed.wait_timeout(inside, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match &inside.failed {
            Some(why) if inside.over < self.calls => Err(Error::new(why.clone())),
            _ => to(piece(call.kind, self.rank, &inside.result)),
        }
    }

    fn fail(&mut self, why: &str) {
        self.room.fail(format!("rank {} failed: {why}", self.rank));
    }

    fn look(&mut self) -> Result<()> {
        self.room.enter().failed.as_ref().map_or(Ok(()), |why| Err(Error::new(why.clone())))
    }
}

impl Drop for Threads {
    /// Whoever still waits for this rank waits in vain.
    fn drop(&mut self) {
        self.room.fail(format!("rank {} has ended", self.rank));
    }
}
