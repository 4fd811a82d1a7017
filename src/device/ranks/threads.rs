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
    given: Vec<Option<(Announced, Vec<u8>)>>,
    /// Calls that are over, and what came of the last.
    over: u64,
    result: Arc<Vec<u8>>,
    /// Why there are no calls any more, and the rank that is at fault.
    failed: Option<(usize, String)>,
}

/// One end for each thread.
pub fn group(world: usize, patience: Duration) -> Vec<Threads> {
    let inside = Inside { given: (0..world).map(|_| None).collect(), ..Inside::default() };
    let room = Arc::new(Room { inside: Mutex::new(inside), changed: Condvar::new() });
    (0..world).map(|rank| Threads { rank, patience, calls: 0, room: room.clone() }).collect()
}

impl Room {
    fn enter(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, rank: usize, why: String) {
        let mut inside = self.enter();
        inside.failed.get_or_insert((rank, why));
        self.changed.notify_all();
    }
}

impl Collective for Threads {
    fn meet(&mut self, call: &Call, mine: &[u8]) -> Result<Vec<u8>> {
        let announced = Announced::of(self.calls, call, mine.len());
        let deadline = Instant::now() + self.patience;
        let mut inside = self.room.enter();
        if let Some((_, why)) = &inside.failed {
            return Err(Error::new(why.clone()));
        }
        inside.given[self.rank] = Some((announced, mine.to_vec()));
        self.calls += 1;
        if inside.given.iter().all(Option::is_some) {
            let given: Vec<(Announced, Vec<u8>)> = inside.given.iter_mut().filter_map(Option::take).collect();
            let same = given.iter().enumerate().try_for_each(|(rank, (announced, _))| announced.check(rank, &given[0].0));
            let parts: Vec<&[u8]> = given.iter().map(|(_, bytes)| &bytes[..]).collect();
            match same.and_then(|()| combine(call.kind, &parts)) {
                Ok(result) => (inside.result, inside.over) = (Arc::new(result), inside.over + 1),
                Err(error) => inside.failed = Some((self.rank, error.chain())),
            }
            self.room.changed.notify_all();
        }
        while inside.over < self.calls && inside.failed.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = inside.given.iter().position(Option::is_none).unwrap_or(0);
                let why = late(missing, call.what, self.patience);
                inside.failed = Some((missing, why));
                self.room.changed.notify_all();
                break;
            }
            inside = self.room.changed.wait_timeout(inside, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match &inside.failed {
            Some((_, why)) if inside.over < self.calls => Err(Error::new(why.clone())),
            _ => Ok(piece(call.kind, self.rank, &inside.result).to_vec()),
        }
    }

    fn fail(&mut self, why: &str) {
        self.room.fail(self.rank, format!("rank {} failed: {why}", self.rank));
    }

    fn look(&mut self) -> Result<()> {
        self.room.enter().failed.as_ref().map_or(Ok(()), |(_, why)| Err(Error::new(why.clone())))
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }
}

impl Drop for Threads {
    /// Whoever still waits for this rank waits in vain.
    fn drop(&mut self) {
        self.room.fail(self.rank, format!("rank {} has ended", self.rank));
    }
}
