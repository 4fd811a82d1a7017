//! What is done when, if anybody asks: the phases of a step, the ops on a tape and a GPU's kernels, with their times.
//!
//! [`start`] begins a record on the calling thread, the one that walks a tape, and [`stop`] hands it out; between them every [`phase`] is a span from its
//! making to its end, and every op one that begins where the last thing on the thread ended. Where nobody asked, each costs a look at a flag.
//! On a GPU ops end when they are launched, so phases wait for the device, and the kernels have times of their own.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

/// What a span is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A part of a step, which may hold others.
    Phase,
    Forward,
    Backward,
    Kernel,
}

/// From when to when something was done, in microseconds since the record began.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: Cow<'static, str>,
    pub kind: Kind,
    pub start: f64,
    pub end: f64,
    /// Of an op: shapes and types. Of a kernel: how it was launched.
    pub detail: String,
    /// Shapes of what goes in, and of what comes out. Of an op's backward these are the gradient that arrives and those that are wanted.
    pub shapes: [Shapes; 2],
    /// How many phases it lies in.
    pub depth: usize,
}

pub type Shapes = Vec<Vec<usize>>;

/// Waits until the device has done what it was given.
pub type Wait = Box<dyn Fn()>;

struct Record {
    began: Instant,
    /// Where the last thing ended.
    mark: f64,
    depth: usize,
    wait: Option<Rc<dyn Fn()>>,
    events: Vec<Event>,
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

impl Record {
    fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e6
    }
}

/// Begins a record on this thread, in the place of one that was begun before. `wait` is for a device that works on its own.
pub fn start(wait: Option<Wait>) {
    RECORD.set(Some(Record { began: Instant::now(), mark: 0.0, depth: 0, wait: wait.map(Rc::from), events: Vec::new() }));
}

/// Ends the record: everything since [`start`], in the order in which it ended. Nothing if none was begun.
pub fn stop() -> Vec<Event> {
    RECORD.take().map(|record| record.events).unwrap_or_default()
}

/// Whether this thread keeps a record.
pub fn is_on() -> bool {
    with(|_| ()).is_some()
}

fn with<R>(f: impl FnOnce(&mut Record) -> R) -> Option<R> {
    RECORD.with_borrow_mut(|record| record.as_mut().map(f))
}

/// Microseconds since the record began; None where there is none.
pub fn now() -> Option<f64> {
    with(|record| record.now())
}

/// Waits for the device, if there is one; the record is free meanwhile.
fn settle() {
    if let Some(wait) = with(|record| record.wait.clone()).flatten() {
        wait();
    }
}

/// A part of a step, until it is dropped.
#[must_use = "a phase ends where it is dropped"]
pub struct Phase {
    name: &'static str,
    detail: String,
    /// When it began; None where nobody asked.
    start: Option<f64>,
}

pub fn phase(name: &'static str) -> Phase {
    phase_of(name, String::new)
}

/// A phase that is one of several of its name.
pub fn phase_of(name: &'static str, detail: impl FnOnce() -> String) -> Phase {
    settle();
    let start = with(|record| {
        record.depth += 1;
        record.mark = record.now();
        record.mark
    });
    Phase { name, detail: start.map_or(String::new(), |_| detail()), start }
}

impl Drop for Phase {
    fn drop(&mut self) {
        let Some(start) = self.start else { return };
        settle();
        with(|record| {
            record.depth = record.depth.saturating_sub(1);
            let end = record.now();
            let (name, detail, depth) = (self.name.into(), std::mem::take(&mut self.detail), record.depth);
            record.events.push(Event { name, kind: Kind::Phase, start, end, detail, shapes: Default::default(), depth });
            record.mark = end;
        });
    }
}

/// An op has just ended, which began where the last thing did. `sizes`: what stands in its detail, and its shapes.
pub fn op(name: &'static str, kind: Kind, sizes: impl FnOnce() -> (String, [Shapes; 2])) {
    with(|record| {
        let (start, end) = (record.mark, record.now());
        let (detail, shapes) = sizes();
        record.events.push(Event { name: name.into(), kind, start, end, detail, shapes, depth: record.depth });
        // What the record itself takes is nobody's time.
        record.mark = record.now();
    });
}

/// A kernel of a GPU, by times that the device took.
pub fn kernel(name: impl Into<Cow<'static, str>>, [start, end]: [f64; 2], detail: String, shapes: [Shapes; 2]) {
    with(|record| {
        let (name, depth) = (name.into(), record.depth);
        record.events.push(Event { name, kind: Kind::Kernel, start, end, detail, shapes, depth });
    });
}

/// Milliseconds of all phases of this name that do not lie in one of the others named in `inside`.
pub fn milliseconds(events: &[Event], name: &str, inside: &[&str]) -> f64 {
    let phases = || events.iter().filter(|event| event.kind == Kind::Phase);
    let own = phases().filter(|event| event.name == name);
    let free = own.filter(|event| {
        !phases().any(|other| {
            inside.contains(&&*other.name) && other.depth < event.depth && other.start <= event.start && event.end <= other.end
        })
    });
    free.map(|event| (event.end - event.start) / 1e3).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_holds_phases_and_ops_in_their_order_and_nothing_once_it_has_ended() {
        assert!(!is_on());
        drop(phase("before"));
        start(None);
        {
            let _outer = phase("teacher");
            let _inner = phase("encoder");
            op("linear", Kind::Forward, || ("f32 [2, 3]".into(), [vec![vec![2, 3]], Vec::new()]));
        }
        drop(phase("encoder"));
        let events = stop();
        assert!(!is_on() && stop().is_empty());
        let names: Vec<(&str, usize)> = events.iter().map(|event| (&*event.name, event.depth)).collect();
        assert_eq!(names, [("linear", 2), ("encoder", 1), ("teacher", 0), ("encoder", 0)]);
        assert!(events.iter().all(|event| event.start <= event.end) && events[0].start >= events[1].start);
        let [inside, beside] = [1, 3].map(|at: usize| (events[at].end - events[at].start) / 1e3);
        assert_eq!(milliseconds(&events, "encoder", &["teacher"]), beside);
        assert!((milliseconds(&events, "encoder", &[]) - (inside + beside)).abs() < 1e-12);
    }

    #[test]
    fn a_phase_waits_for_its_device() {
        let waits = std::rc::Rc::new(std::cell::Cell::new(0));
        let seen = waits.clone();
        start(Some(Box::new(move || seen.set(seen.get() + 1))));
        drop(phase("forward"));
        stop();
        assert_eq!(waits.get(), 2);
    }

    #[test]
    fn what_waits_for_a_device_may_write_down_its_kernels() {
        start(Some(Box::new(|| kernel("gelu", [1.0, 2.0], String::new(), Default::default()))));
        drop(phase_of("step", || "update 4".into()));
        let events = stop();
        assert_eq!(events.iter().map(|event| event.kind).collect::<Vec<_>>(), [Kind::Kernel, Kind::Kernel, Kind::Phase]);
        assert_eq!(events[2].detail, "update 4");
        assert!(now().is_none());
    }
}
