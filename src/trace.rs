//! What is done when, if anybody asks: the phases of a step, the ops on a tape and a GPU's kernels, with their times.
//!
//! [`start`] begins a record on the calling thread, the one that walks a tape, and [`stop`] hands it out; between them every [`phase`] is a span from its
//! making to its end, and every op one that begins where the last thing on the thread ended. Where nobody asked, each costs a look at a flag.
//! On a GPU ops end when they are launched, so phases wait for the device, and the kernels have times of their own.

use std::borrow::Cow;
use std::cell::RefCell;
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
    /// Of an op: shapes and types.
    pub detail: String,
    /// How many phases it lies in.
    pub depth: usize,
}

/// Waits until the device has done what it was given.
pub type Wait = Box<dyn Fn()>;

struct Record {
    began: Instant,
    /// Where the last thing ended.
    mark: f64,
    depth: usize,
    wait: Option<Wait>,
    events: Vec<Event>,
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

impl Record {
    fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e6
    }

    fn settle(&self) {
        if let Some(wait) = &self.wait {
            wait();
        }
    }
}

/// Begins a record on this thread, in the place of one that was begun before. `wait` is for a device that works on its own.
pub fn start(wait: Option<Wait>) {
    RECORD.set(Some(Record { began: Instant::now(), mark: 0.0, depth: 0, wait, events: Vec::new() }));
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

/// A part of a step, until it is dropped.
#[must_use = "a phase ends where it is dropped"]
pub struct Phase {
    name: &'static str,
    /// When it began; None where nobody asked.
    start: Option<f64>,
}

pub fn phase(name: &'static str) -> Phase {
    let start = with(|record| {
        record.settle();
        record.depth += 1;
        record.mark = record.now();
        record.mark
    });
    Phase { name, start }
}

impl Drop for Phase {
    fn drop(&mut self) {
        let Some(start) = self.start else { return };
        with(|record| {
            record.settle();
            record.depth = record.depth.saturating_sub(1);
            let end = record.now();
            let (name, depth) = (self.name.into(), record.depth);
            record.events.push(Event { name, kind: Kind::Phase, start, end, detail: String::new(), depth });
            record.mark = end;
        });
    }
}

/// An op has just ended, which began where the last thing did.
pub fn op(name: &'static str, kind: Kind, detail: impl FnOnce() -> String) {
    with(|record| {
        let (start, end) = (record.mark, record.now());
        record.events.push(Event { name: name.into(), kind, start, end, detail: detail(), depth: record.depth });
        // What the record itself takes is nobody's time.
        record.mark = record.now();
    });
}

/// A kernel of a GPU, by times that the device took.
pub fn kernel(name: String, start: f64, end: f64, detail: String) {
    with(|record| {
        let depth = record.depth;
        record.events.push(Event { name: name.into(), kind: Kind::Kernel, start, end, detail, depth });
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
            op("linear", Kind::Forward, || "[2, 3]".into());
        }
        drop(phase("encoder"));
        let events = stop();
        assert!(!is_on() && stop().is_empty());
        let names: Vec<(&str, usize)> = events.iter().map(|event| (&*event.name, event.depth)).collect();
        assert_eq!(names, [("linear", 2), ("encoder", 1), ("teacher", 0), ("encoder", 0)]);
        assert!(events.iter().all(|event| event.start <= event.end) && events[0].start >= events[1].start);
        let all = milliseconds(&events, "encoder", &[]);
        assert_eq!(all - milliseconds(&events, "encoder", &["teacher"]), (events[1].end - events[1].start) / 1e3);
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
}
