//! When the device does what it is given: by the host's clock for an emulated one, by events in the stream of a real one.
//!
//! Between two [`Gpu::time_work`] every kernel, product, copy and upload that a thread with a record ([`crate::trace`]) hands over is noted there. On a real
//! device nothing waits for that: an event stands before and behind each piece, and [`Gpu::collect_times`] asks them afterwards. Where the device has nothing
//! else to do, the time between the two is also that of the launch.

use super::super::real::Mark;
use super::{Gpu, Work, lock, real};
use crate::ensure;
use crate::error::{Context, Result};
use crate::trace::{self, Shapes};
use std::borrow::Cow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

#[derive(Default)]
pub(super) struct Timing {
    on: AtomicBool,
    /// Of a real device.
    marks: Mutex<Option<Marks>>,
}

struct Marks {
    /// An event, and when it was on the record's clock.
    first: Mark,
    at: f64,
    done: Vec<(What, [Mark; 2])>,
}

/// What a piece of work is called, how it is launched, and its shapes.
pub(super) struct What {
    name: Cow<'static, str>,
    detail: String,
    shapes: [Shapes; 2],
}

pub(super) fn upload(bytes: usize) -> What {
    What { name: "upload".into(), detail: format!("{bytes} bytes"), shapes: Default::default() }
}

impl Work {
    fn what(&self) -> What {
        let plain = |name: &'static str, detail: String| What { name: name.into(), detail, shapes: Default::default() };
        match self {
            Work::Kernel { kernel, launch, words, letters } => {
                let [x, y, z] = launch.grid;
                let sizes = words.iter().zip(letters.chars()).filter(|(_, letter)| matches!(letter, 'i' | 'l'));
                let sizes: Vec<String> = sizes.map(|(word, _)| word.to_string()).collect();
                let shared = if launch.shared > 0 { format!(", {} bytes shared", launch.shared) } else { String::new() };
                plain(kernel.name, format!("grid {x} x {y} x {z}, block {}{shared}, sizes {}", launch.block, sizes.join(" ")))
            }
            Work::Product(product) => {
                let (name, detail, shapes) = product.what();
                What { name: name.into(), detail, shapes }
            }
            Work::Copy { bytes, .. } => plain("copy", format!("{bytes} bytes")),
            Work::Set { bytes, .. } => plain("fill", format!("{bytes} bytes")),
        }
    }
}

impl Gpu {
    /// Milliseconds that the work takes which `f` hands over: by the device's own clock, or the host's for an emulated one.
    pub fn time(&self, f: impl FnOnce() -> Result<()>) -> Result<f64> {
        ensure!(!self.is_recording(), "{}: recorded work takes no time", self.name());
        if let Some(real) = self.as_real() {
            return real.elapsed_ms(f).context("timing");
        }
        self.wait()?;
        let start = Instant::now();
        f()?;
        self.wait()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Leaves nothing of use in a real device's cache, so that the next timing starts from its memory.
    pub fn scrub(&self) -> Result<()> {
        self.as_real().map_or(Ok(()), real::Real::scrub)
    }

    /// From now on each piece of work that this thread hands over is noted in its record, or no longer is.
    pub fn time_work(&self, on: bool) -> Result<()> {
        self.0.timing.on.store(on, Ordering::Relaxed);
        let marks = if on { self.first_mark()? } else { None };
        *lock(&self.0.timing.marks) = marks;
        Ok(())
    }

    /// A fresh beginning, once the device is idle.
    fn first_mark(&self) -> Result<Option<Marks>> {
        self.wait()?;
        let Some((real, at)) = self.as_real().zip(trace::now()) else { return Ok(None) };
        let [first, _] = real.marks()?;
        real.set(&first)?;
        Ok(Some(Marks { first, at, done: Vec::new() }))
    }

    /// Waits for the device and notes what it has done since the last time.
    pub fn collect_times(&self) -> Result<()> {
        let Some(real) = self.as_real() else { return Ok(()) };
        self.wait()?;
        let Some(Marks { first, at, done }) = lock(&self.0.timing.marks).take() else { return Ok(()) };
        for (What { name, detail, shapes }, marks) in done {
            let [start, end] = [real.between(&first, &marks[0])?, real.between(&first, &marks[1])?].map(|ms| at + 1e3 * ms);
            trace::kernel(name, [start, end], detail, shapes);
        }
        *lock(&self.0.timing.marks) = self.first_mark()?;
        Ok(())
    }

    pub(super) fn submit(&self, work: Work) -> Result<()> {
        let what = self.is_timed().then(|| work.what());
        self.timed(what, || self.0.backend.submit(work))
    }

    /// Whether work that is handed over now is to be noted.
    pub(super) fn is_timed(&self) -> bool {
        self.0.timing.on.load(Ordering::Relaxed) && trace::now().is_some() && !self.is_recording()
    }

    pub(super) fn timed(&self, what: Option<What>, f: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(what) = what else { return f() };
        if let Some(real) = self.as_real() {
            let marks = real.marks()?;
            real.set(&marks[0])?;
            f()?;
            real.set(&marks[1])?;
            if let Some(all) = &mut *lock(&self.0.timing.marks) {
                all.done.push((what, marks));
            }
            return Ok(());
        }
        let start = trace::now();
        f()?;
        if let Some((start, end)) = start.zip(trace::now()) {
            trace::kernel(what.name, [start, end], what.detail, what.shapes);
        }
        Ok(())
    }
}
