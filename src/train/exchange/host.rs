//! Gradients that go round through the memory of the host, summed by a thread of its own.

use crate::device::ranks::{Ranks, Wire};
use crate::error::{Context, Result};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// A bucket on its way.
pub struct Job {
    pub what: String,
    pub wire: Wire,
    pub numbers: Vec<f32>,
    /// Of each rank, where it gets its own alone.
    pub parts: Option<Vec<Range<usize>>>,
}

/// The thread that sums buckets while the pass goes on.
pub struct Worker {
    jobs: Option<Sender<Job>>,
    done: Receiver<Result<Vec<f32>>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub fn start(ranks: Ranks) -> Self {
        let (jobs, coming) = channel::<Job>();
        let (going, done) = channel();
        let sum = move |Job { what, wire, mut numbers, parts }: Job| {
            match parts {
                Some(parts) => ranks.sum_parts(&what, &mut numbers, &parts, wire)?,
                None => ranks.sum(&what, &mut numbers, wire)?,
            }
            Ok(numbers)
        };
        let work = move || {
            for job in coming {
                let sums = sum(job);
                let failed = sums.is_err();
                if going.send(sums).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::spawn(work);
        Self { jobs: Some(jobs), done, thread: Some(thread) }
    }

    pub fn send(&self, job: Job) {
        // After an error nobody takes jobs any more: `receive` answers with it.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }

    pub fn receive(&self) -> Result<Vec<f32>> {
        self.done.recv().context("the thread that sums gradients has ended")?
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of that thread was an error of `receive`.
            let _ = thread.join();
        }
    }
}
