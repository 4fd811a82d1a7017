//! Threads that fill batches ahead of the one that is asked for.

use super::assemble::{Assembly, Recipe};
use crate::error::{Context, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};

/// Batches that are filled besides the one that is handed out; more where batches are so small that workers would wait.
const AHEAD: usize = 2;
/// Images a worker may be ahead.
const AHEAD_EACH: usize = 4;

/// Running threads; dropping it stops and joins them.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    recipe: Recipe,
    /// Batches that may be in memory at a time.
    ahead: usize,
    state: Mutex<State>,
    /// A batch was handed out, or all is to stop.
    room: Condvar,
    /// The last row of a batch was tried.
    ready: Condvar,
}

struct State {
    /// The place that is taken next.
    next: usize,
    /// The batch that is handed out next, which is the first of those being filled.
    front: usize,
    filling: VecDeque<Slot>,
    stop: bool,
}

struct Slot {
    assembly: Arc<Assembly>,
    /// Rows not tried yet.
    missing: usize,
}

impl Workers {
    pub fn start(recipe: Recipe, first: usize, count: usize) -> Result<Self> {
        let ahead = AHEAD.max((count * AHEAD_EACH).div_ceil(recipe.batch));
        let state = State { next: recipe.places(first).start, front: first, filling: VecDeque::new(), stop: false };
        let shared = Arc::new(Shared { recipe, ahead, state: Mutex::new(state), room: Condvar::new(), ready: Condvar::new() });
        let mut workers = Self { shared: shared.clone(), threads: Vec::with_capacity(count) };
        for number in 0..count {
            let shared = shared.clone();
            match Builder::new().name(format!("loader-{number}")).spawn(move || shared.work()) {
                Ok(thread) => workers.threads.push(thread),
                // Fewer threads give the same batches.
                Err(_) if number > 0 => break,
                Err(error) => return Err(error).context("no thread could be started that loads images; --workers 0 does without"),
            }
        }
        Ok(workers)
    }

    pub fn recipe(&self) -> &Recipe {
        &self.shared.recipe
    }

    /// The next batch with all its rows tried, and how many they are.
    pub fn next(&mut self) -> Option<(Assembly, usize)> {
        let mut state = self.shared.lock();
        let rows = self.shared.recipe.places(state.front).len();
        if rows == 0 {
            return None;
        }
        while state.filling.front().is_none_or(|slot| slot.missing > 0) {
            state = self.shared.ready.wait(state).expect(UNBROKEN);
        }
        let slot = state.filling.pop_front()?;
        state.front += 1;
        drop(state);
        self.shared.room.notify_all();
        Some((Arc::into_inner(slot.assembly)?, rows))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // A thread's panic was made an error of its batch.
            let _ = thread.join();
        }
    }
}

const UNBROKEN: &str = "what is done under this lock does not panic";

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(UNBROKEN)
    }

    fn work(&self) {
        while let Some((assembly, batch, place)) = self.take() {
            assembly.fill(&self.recipe, place - self.recipe.places(batch).start, place);
            // Whoever holds a batch whose rows were all tried is its only owner.
            drop(assembly);
            let mut state = self.lock();
            let at = batch - state.front;
            state.filling[at].missing -= 1;
            if at == 0 && state.filling[at].missing == 0 {
                self.ready.notify_all();
            }
        }
    }

    /// The next place once there is room for its batch; nothing at the end.
    fn take(&self) -> Option<(Arc<Assembly>, usize, usize)> {
        let mut state = self.lock();
        loop {
            let (place, batch) = (state.next, state.next / self.recipe.batch);
            if state.stop || place >= self.recipe.images.len() {
                return None;
            }
            if batch < state.front + self.ahead {
                let at = batch - state.front;
                if at == state.filling.len() {
                    let missing = self.recipe.places(batch).len();
                    state.filling.push_back(Slot { assembly: Arc::new(Assembly::new(missing)), missing });
                }
                state.next += 1;
                return Some((state.filling[at].assembly.clone(), batch, place));
            }
            state = self.room.wait(state).expect(UNBROKEN);
        }
    }
}
