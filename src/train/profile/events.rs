//! A record in the form of Chrome's traces: one object whose `traceEvents` are complete events ("X") in microseconds, on named tracks.

use super::summary::flops;
use crate::error::{Context, Result};
use crate::trace::{Event, Kind};
use serde_json::{Map, Value, json};
use std::io::Write;

/// Process and thread that an event is shown on.
fn track(kind: Kind) -> (u64, u64) {
    match kind {
        Kind::Phase => (1, 1),
        Kind::Forward => (1, 2),
        Kind::Backward => (1, 3),
        Kind::Kernel => (2, 1),
    }
}

pub fn category(kind: Kind) -> &'static str {
    match kind {
        Kind::Phase => "phase",
        Kind::Forward => "forward",
        Kind::Backward => "backward",
        Kind::Kernel => "kernel",
    }
}

/// To the nanosecond: the number is short, and what nests goes on nesting.
fn nanoseconds(microseconds: f64) -> f64 {
    (microseconds * 1e3).round()
}

fn object(event: &Event) -> Value {
    let (pid, tid) = track(event.kind);
    let (start, end) = (nanoseconds(event.start), nanoseconds(event.end));
    let mut args = Map::new();
    if !event.detail.is_empty() {
        let name = match event.kind {
            Kind::Phase => "what",
            Kind::Kernel => "launch",
            Kind::Forward | Kind::Backward => "sizes",
        };
        args.insert(name.into(), json!(event.detail));
    }
    if let Some(flops) = flops(event) {
        args.insert("flops".into(), json!(flops));
        if end > start {
            args.insert("gflop_s".into(), json!((flops / (end - start) * 1e2).round() / 1e2));
        }
    }
    json!({
        "ph": "X", "pid": pid, "tid": tid, "ts": start / 1e3, "dur": (end - start) / 1e3, "name": event.name, "cat": category(event.kind),
        "args": args,
    })
}

fn named(what: &str, pid: u64, tid: u64, name: &str) -> Value {
    json!({ "ph": "M", "pid": pid, "tid": tid, "name": what, "args": { "name": name } })
}

/// The whole file, an event a line.
pub fn write(out: &mut impl Write, events: &[Event], device: &str, facts: Map<String, Value>) -> Result<()> {
    let mut lines = vec![
        named("process_name", 1, 0, "masque"),
        named("thread_name", 1, 1, "phases"),
        named("thread_name", 1, 2, "ops, forward"),
        named("thread_name", 1, 3, "ops, backward"),
    ];
    lines.extend(
        [1, 2, 3].map(|tid| json!({ "ph": "M", "pid": 1, "tid": tid, "name": "thread_sort_index", "args": { "sort_index": tid } })),
    );
    if events.iter().any(|event| event.kind == Kind::Kernel) {
        lines.extend([named("process_name", 2, 0, device), named("thread_name", 2, 1, "kernels")]);
    }
    let mut sorted: Vec<&Event> = events.iter().collect();
    // What holds others stands before them.
    sorted.sort_by(|a, b| a.start.total_cmp(&b.start).then(b.end.total_cmp(&a.end)).then(a.depth.cmp(&b.depth)));
    lines.extend(sorted.into_iter().map(object));
    let doing = || "writing its events";
    writeln!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{},\"traceEvents\":[", Value::Object(facts)).with_context(doing)?;
    for (at, line) in lines.iter().enumerate() {
        write!(out, "{}{line}", if at > 0 { ",\n" } else { "" }).with_context(doing)?;
    }
    out.write_all(b"\n]}\n").with_context(doing)
}
