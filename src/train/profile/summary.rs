//! What is printed of a profile: where the time of a step went, and the ops or kernels that took most of it.

use super::events::category;
use crate::trace::{Event, Kind};
use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

/// The phase that a whole update is.
pub const STEP: &str = "step";
/// Lines of the table.
const SHOWN: usize = 10;

/// Operations of the products that an op makes, twice for each multiply-accumulate; None for what makes none, or is not counted.
///
/// The backward of a linear layer makes a product for each matrix that wants a gradient. Attention makes two products forward and four backward; what its
/// backward computes again is not counted.
pub fn flops(event: &Event) -> Option<f64> {
    let numel = |shape: &Vec<usize>| shape.iter().product::<usize>() as f64;
    let [from, to] = &event.shapes;
    let (first, result) = (from.first()?, to.first()?);
    let backward = event.kind == Kind::Backward;
    let matrices = to.iter().filter(|shape| shape.len() > 1);
    Some(match &*event.name {
        "linear" | "linear_gelu" | "bmm" | "bmm_nt" if backward => {
            // [.., n] came in. Where no gradient flows to the input, the weight [n, ..] is the only matrix.
            let weight = matrices.clone().count() == 1 && result.first() == first.last();
            let inner = if weight { numel(result) / *first.last()? as f64 } else { *result.last()? as f64 };
            2.0 * numel(first) * inner * matrices.count() as f64
        }
        "linear" | "linear_gelu" | "bmm" | "bmm_nt" => 2.0 * numel(result) * *first.last()? as f64,
        name if name.starts_with("product_") => 2.0 * numel(result) * *first.last()? as f64,
        "attention" => {
            // The packed q, k and v [B, N, 3 C].
            let &[batch, n, packed] = &(if backward { result } else { first })[..] else { return None };
            let products = if backward { 4.0 } else { 2.0 };
            products * 2.0 * (batch * n * n * (packed / 3)) as f64
        }
        _ => return None,
    })
}

/// Of one name and pass.
#[derive(Default)]
struct Sum {
    calls: usize,
    microseconds: f64,
    flops: f64,
}

fn sums<'a>(events: impl Iterator<Item = &'a Event>) -> Vec<(&'a str, Kind, Sum)> {
    let mut sums: HashMap<(&str, &str), (Kind, Sum)> = HashMap::new();
    for event in events {
        let (_, sum) = sums.entry((&*event.name, category(event.kind))).or_insert((event.kind, Sum::default()));
        sum.calls += 1;
        sum.microseconds += event.end - event.start;
        sum.flops += flops(event).unwrap_or(0.0);
    }
    let mut sums: Vec<_> = sums.into_iter().map(|((name, _), (kind, sum))| (name, kind, sum)).collect();
    sums.sort_by(|a, b| b.2.microseconds.total_cmp(&a.2.microseconds).then(a.0.cmp(b.0)));
    sums
}

/// One line on the file, one on the phases, and the table. On a GPU it is one of kernels.
pub fn text(events: &[Event], path: &Path, gpu: bool, notes: &[&str]) -> String {
    let steps: Vec<&Event> = events.iter().filter(|event| event.kind == Kind::Phase && event.name == STEP && event.depth == 0).collect();
    let whole: f64 = steps.iter().map(|step| step.end - step.start).sum();
    let count = steps.len().max(1) as f64;
    let middle = |event: &Event| (event.start + event.end) / 2.0;
    let in_step = |event: &&Event| steps.iter().any(|step| (step.start..=step.end).contains(&middle(event)));
    let each = |microseconds: f64| microseconds / 1e3 / count;
    let part = |microseconds: f64| 100.0 * microseconds / whole.max(f64::MIN_POSITIVE);

    let mut out = format!(
        "profile: {} update{} of {:.2} ms in {}; chrome://tracing or ui.perfetto.dev show it",
        steps.len(),
        if steps.len() == 1 { "" } else { "s" },
        each(whole),
        path.display()
    );
    notes.iter().for_each(|note| out += &format!("\n{note}"));
    let parts = sums(events.iter().filter(|event| event.kind == Kind::Phase && event.depth == 1).filter(in_step));
    let shown = parts.iter().filter(|(.., sum)| part(sum.microseconds) >= 0.05);
    let named: Vec<String> = shown.map(|(name, _, sum)| format!("{name} {:.1} %", part(sum.microseconds))).collect();
    let _ = write!(out, "\na step: {}", named.join(", "));

    let of = |event: &&Event| if gpu { event.kind == Kind::Kernel } else { matches!(event.kind, Kind::Forward | Kind::Backward) };
    let rows = sums(events.iter().filter(of).filter(in_step));
    let what = if gpu { "kernel" } else { "op" };
    let _ = write!(out, "\n{what:<28} {:<9} {:>12} {:>10} {:>7} {:>9}", "pass", "calls a step", "ms a step", "%", "GFLOP/s");
    for (name, kind, sum) in rows.iter().take(SHOWN) {
        let rate = if sum.flops > 0.0 { format!("{:.1}", sum.flops / sum.microseconds / 1e3) } else { String::new() };
        let (ms, percent, pass) = (each(sum.microseconds), part(sum.microseconds), category(*kind));
        let line = format!("{name:<28} {pass:<9} {:>12} {ms:>10.3} {percent:>7.1} {rate:>9}", (sum.calls as f64 / count).round());
        let _ = write!(out, "\n{}", line.trim_end());
    }
    if rows.len() > SHOWN {
        let rest: f64 = rows[SHOWN..].iter().map(|(.., sum)| sum.microseconds).sum();
        let name = format!("{} others", rows.len() - SHOWN);
        let _ = write!(out, "\n{name:<28} {:<9} {:>12} {:>10.3} {:>7.1}", "", "", each(rest), part(rest));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &'static str, kind: Kind, shapes: [&[&[usize]]; 2]) -> Event {
        let shapes = shapes.map(|shapes| shapes.iter().map(|shape| shape.to_vec()).collect());
        Event { name: name.into(), kind, start: 0.0, end: 1.0, detail: String::new(), shapes, depth: 1 }
    }

    #[test]
    fn operations_are_those_of_the_products() {
        let of = |name, kind, from: &[&[usize]], to: &[&[usize]]| flops(&event(name, kind, [from, to]));
        let (x, w, bias, y): (&[usize], &[usize], &[usize], &[usize]) = (&[2, 5, 3], &[7, 3], &[7], &[2, 5, 7]);
        assert_eq!(of("linear", Kind::Forward, &[x, w, bias], &[y]), Some(420.0));
        assert_eq!(of("linear", Kind::Backward, &[y], &[x, w, bias]), Some(840.0));
        // The first layer's input wants none; its weight may be one of patches.
        assert_eq!(of("linear", Kind::Backward, &[y], &[w, bias]), Some(420.0));
        assert_eq!(of("linear", Kind::Backward, &[y], &[&[7, 3, 2, 2], bias]), Some(2.0 * 70.0 * 12.0));
        assert_eq!(of("bmm_nt", Kind::Forward, &[&[4, 5, 3], &[4, 6, 3]], &[&[4, 5, 6]]), Some(720.0));
        // One head or several: 2 x 2 B N^2 C.
        assert_eq!(of("attention", Kind::Forward, &[&[2, 5, 12]], &[&[2, 5, 4]]), Some(800.0));
        assert_eq!(of("attention", Kind::Backward, &[&[2, 5, 4]], &[&[2, 5, 12]]), Some(1600.0));
        assert_eq!(of("product_bf16", Kind::Kernel, &[&[1, 5, 3], &[1, 3, 7]], &[&[1, 5, 7]]), Some(210.0));
        assert_eq!(of("gelu", Kind::Forward, &[x], &[x]), None);
    }

    #[test]
    fn the_table_is_of_steps_alone_and_adds_up_calls() {
        let at = |mut event: Event, start: f64, end: f64, depth: usize| {
            (event.start, event.end, event.depth) = (start, end, depth);
            event
        };
        let phase = |name| event(name, Kind::Phase, [&[], &[]]);
        let gelu = || event("gelu", Kind::Forward, [&[&[3]], &[&[3]]]);
        let events = [
            at(gelu(), 10.0, 20.0, 2),
            at(gelu(), 20.0, 50.0, 2),
            at(phase("forward"), 0.0, 80.0, 1),
            at(phase(STEP), 0.0, 100.0, 0),
            at(gelu(), 120.0, 220.0, 1),
            at(phase("evaluation"), 110.0, 230.0, 0),
        ];
        let text = text(&events, Path::new("a.json"), false, &[]);
        assert!(text.starts_with("profile: 1 update of 0.10 ms in a.json"), "{text}");
        assert!(text.contains("\na step: forward 80.0 %\n"), "{text}");
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(row, ["gelu", "forward", "2", "0.040", "40.0"]);
    }
}
