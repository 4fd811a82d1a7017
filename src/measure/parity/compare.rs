//! How close is close enough: what was computed against the golden, tensor by tensor, in the order of computation.
//!
//!   out/, grad/   max |a - b| / max |b|            absolute, at most 1e-6, where max |b| < 1e-12; integers exactly
//!   step<k>/      |p - golden| / |golden - start|  Euclidean, without the key third of `*.attn.qkv.bias`
//!
//! The gradient of a key bias is zero but for rounding, and Adam divides rounding by its own size: that third may be off by twice the sum
//! of the learning rates. What the golden leaves unchanged must be unchanged to the bit. In f64 only the rounding of the golden to f32 is
//! left, which the key third keeps to as well.

use super::case::Case;
use crate::error::{Error, Result};
use crate::formats::{FileDtype, FileTensor};
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

/// How much is allowed in f32, from how far the official code in f32 is from the golden.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limits {
    /// out max(2e-5, 20 x natural), grad max(5e-5, 20 x natural).
    Suggested,
    /// out max(3e-6, 5 x natural), grad max(1e-5, 5 x natural).
    Strict,
}

/// Half an f32 unit is 6e-8 of the largest value; the rest is for what is defined in f32, as mixing images is.
const F64_VALUE: f64 = 2e-7;
/// The golden's own rounding where an update is tiny against its weight.
const F64_UPDATE: f64 = 2e-4;
const TINY: f64 = 1e-12;
const TINY_ALLOWED: f64 = 1e-6;

struct Allowed {
    out: f64,
    grad: f64,
    update: f64,
    /// Of a parameter after a step, by its largest value; only f64 can promise it.
    value: Option<f64>,
}

impl Allowed {
    fn of(case: &Case, limits: Limits, dtype: Dtype) -> Result<Self> {
        if dtype == Dtype::F64 {
            return Ok(Self { out: F64_VALUE, grad: F64_VALUE, update: F64_UPDATE, value: Some(F64_VALUE) });
        }
        let fields = case.fields()?;
        let natural = |kind: &str| -> Result<f64> {
            if !fields.has("natural_f32") || !fields.object("natural_f32")?.has(kind) {
                return Ok(0.0);
            }
            fields.object("natural_f32")?.object(kind)?.number("rel")
        };
        let ((out, grad), times) = match limits {
            Limits::Suggested => ((2e-5, 5e-5), 20.0),
            Limits::Strict => ((3e-6, 1e-5), 5.0),
        };
        Ok(Self {
            out: f64::max(out, times * natural("out")?),
            grad: f64::max(grad, times * natural("grad")?),
            update: f64::max(1e-3, 20.0 * natural("step_upd_l2")?),
            value: None,
        })
    }
}

/// What a run computed, by the names of the file.
#[derive(Default)]
pub struct Record {
    given: Vec<(String, Given)>,
    place: HashMap<String, usize>,
    /// Parameters that the forward pass writes: compared like outputs.
    pub buffers: HashSet<String>,
    /// How far the key third of each parameter's bias may be off.
    pub reach: HashMap<String, f64>,
    /// The first tensor that could not be read.
    pub problem: Option<Error>,
}

pub struct Given {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Record {
    pub fn numbers(&mut self, name: String, shape: &[usize], values: Vec<f64>) {
        let given = Given { shape: shape.to_vec(), values };
        match self.place.get(&name) {
            Some(&place) => self.given[place].1 = given,
            None => {
                self.place.insert(name.clone(), self.given.len());
                self.given.push((name, given));
            }
        }
    }

    pub fn tensor(&mut self, name: String, tensor: &Tensor) {
        match tensor.read() {
            Ok(values) => self.numbers(name, tensor.shape(), values),
            Err(error) => self.problem = self.problem.take().or(Some(error)),
        }
    }

    pub fn number(&mut self, name: String, value: f64) {
        self.numbers(name, &[], vec![value]);
    }
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Check {
    pub name: String,
    pub error: f64,
    pub allowed: f64,
    /// Both numbers, where they differ most.
    pub detail: String,
}

impl Check {
    pub fn passed(&self) -> bool {
        self.error <= self.allowed
    }

    /// Error over what is allowed; infinite where nothing is or where the error is not a number.
    pub fn ratio(&self) -> f64 {
        match self.error / self.allowed {
            _ if self.error == 0.0 => 0.0,
            ratio if ratio.is_nan() => f64::INFINITY,
            ratio => ratio,
        }
    }

    fn missing(name: &str, detail: String) -> Self {
        Self { name: name.to_string(), error: f64::INFINITY, allowed: 0.0, detail }
    }
}

/// Compares all that the file holds: outputs in their order, then gradients, then parameters after each step.
pub fn compare(case: &Case, record: &Record, limits: Limits, dtype: Dtype) -> Result<Vec<Check>> {
    let allowed = Allowed::of(case, limits, dtype)?;
    let mut checks = Vec::new();
    for name in order(case, record)? {
        let Ok(golden) = case.file.get(&name) else {
            checks.push(Check::missing(&name, "the file does not hold it".to_string()));
            continue;
        };
        let Some(given) = record.place.get(&name).map(|&place| &record.given[place].1) else {
            checks.push(Check::missing(&name, "the runner gives no such tensor".to_string()));
            continue;
        };
        if given.shape != golden.shape() {
            let detail = format!("its shape is {:?} but {:?} is expected", given.shape, golden.shape());
            checks.push(Check::missing(&name, detail));
            continue;
        }
        let values = if golden.dtype() == FileDtype::Bool { integers(golden)? } else { golden.to_f64()? };
        let pair = Pair { name: &name, shape: &given.shape, given: &given.values, golden: &values };
        let step = step_of(&name).map(|(_, key)| key).filter(|key| !record.buffers.contains(*key));
        if !is_float(golden.dtype()) {
            let tied = name.ends_with("keep_ids").then(|| tied(case, &name, &pair)).transpose()?;
            checks.push(tied.flatten().unwrap_or_else(|| pair.exact()));
        } else if let Some(key) = step {
            let start = case.file.get(&format!("w/{key}"))?;
            ensure!(start.shape() == golden.shape(), "{name} is {golden:?} but w/{key} is {start:?}");
            let apart = record.reach.get(key).filter(|_| key.ends_with(".attn.qkv.bias"));
            pair.step(&start.to_f64()?, apart.copied(), &allowed, &mut checks);
        } else {
            checks.push(pair.relative(if name.starts_with("grad/") { allowed.grad } else { allowed.out }));
        }
    }
    Ok(checks)
}

/// Scores that are nearer to each other leave the order of what they choose open.
const TIE: f64 = 1e-6;

/// A check that passes, where the chosen patches are as good as the golden ones.
fn tied(case: &Case, name: &str, pair: &Pair) -> Result<Option<Check>> {
    let Ok(scores) = case.file.get(&name.replace("keep_ids", "scores")) else { return Ok(None) };
    let good = scores.shape().len() == 2 && pair.as_good(scores.shape()[1], &scores.to_f64()?);
    Ok(good.then(|| Check { name: name.to_string(), error: 0.0, allowed: 0.0, detail: String::new() }))
}

fn integers(tensor: &FileTensor) -> Result<Vec<f64>> {
    Ok(tensor.to_i64()?.into_iter().map(|integer| integer as f64).collect())
}

fn is_float(dtype: FileDtype) -> bool {
    matches!(dtype, FileDtype::F64 | FileDtype::F32 | FileDtype::F16 | FileDtype::BF16)
}

/// Number and key of `step<k>/<key>`.
fn step_of(name: &str) -> Option<(usize, &str)> {
    let (number, key) = name.strip_prefix("step")?.split_once('/')?;
    Some((number.parse().ok()?, key))
}

/// All names that are to be compared, in the order of computation.
fn order(case: &Case, record: &Record) -> Result<Vec<String>> {
    let mut names: Vec<String> = case.outputs()?.into_iter().map(str::to_string).collect();
    let mut rest: BTreeMap<usize, Vec<&str>> = BTreeMap::new(); // 0 out, 1 grad, 1 + k step k
    for name in case.file.names() {
        match name.split('/').next() {
            Some("in" | "w" | "tw") => {}
            Some("out") => rest.entry(0).or_default().push(name),
            Some("grad") => rest.entry(1).or_default().push(name),
            _ => match step_of(name) {
                Some((k @ 1..=9999, _)) => rest.entry(1 + k).or_default().push(name),
                _ => bail!("the file holds {name:?}, which is no tensor of a case"),
            },
        }
    }
    // A gradient or an updated parameter that a model's run gives belongs into a file that holds others of its kind.
    let op = case.fields()?.text("method")? == "op";
    for (name, _) in record.given.iter().filter(|_| !op) {
        let kind = if name.starts_with("grad/") { Some(1) } else { step_of(name).map(|(k, _)| 1 + k) };
        if let Some(known) = kind.and_then(|kind| rest.get_mut(&kind)).filter(|_| !case.file.contains(name)) {
            known.push(name);
        }
    }
    let place = |name: &&str| record.place.get(*name).copied().unwrap_or(usize::MAX);
    for mut kind in rest.into_values() {
        kind.sort_by_key(place);
        names.extend(kind.into_iter().map(str::to_string));
    }
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    Ok(names)
}

/// What was computed beside what should have been.
struct Pair<'a> {
    name: &'a str,
    shape: &'a [usize],
    given: &'a [f64],
    golden: &'a [f64],
}

impl Pair<'_> {
    /// The largest difference within a range and where it is; a difference that is no number is larger than any.
    fn largest(&self, range: Range<usize>) -> (f64, usize) {
        let (mut largest, mut at) = (0.0, range.start);
        for i in range {
            let (a, b) = (self.given[i], self.golden[i]);
            let difference = if a == b { 0.0 } else { (a - b).abs() };
            if difference.is_nan() {
                return (f64::NAN, i);
            }
            if difference > largest {
                (largest, at) = (difference, i);
            }
        }
        (largest, at)
    }

    fn check(&self, note: &str, error: f64, allowed: f64, at: usize) -> Check {
        let mut index = vec![0; self.shape.len()];
        let mut rest = at;
        for (place, &size) in index.iter_mut().zip(self.shape).rev() {
            (*place, rest) = (rest % size.max(1), rest / size.max(1));
        }
        let detail = match self.given.get(at) {
            Some(given) => format!("{given:e} but {:e} is expected at {index:?}{note}", self.golden[at]),
            None => String::new(),
        };
        Check { name: self.name.to_string(), error, allowed, detail }
    }

    /// Whether the chosen patches of each image are distinct and have the scores of the golden ones, place by place; `scores` has `n` an image.
    fn as_good(&self, n: usize, scores: &[f64]) -> bool {
        let k = self.shape.last().copied().unwrap_or(0).max(1);
        if self.given.len() / k * n != scores.len() {
            return false;
        }
        let images = self.given.chunks_exact(k).zip(self.golden.chunks_exact(k)).zip(scores.chunks_exact(n.max(1)));
        images.into_iter().all(|((given, golden), scores)| {
            let score = |id: f64| if id >= 0.0 { scores.get(id as usize).copied().unwrap_or(f64::NAN) } else { f64::NAN };
            let distinct = (1..k).all(|i| !given[..i].contains(&given[i]));
            distinct && given.iter().zip(golden).all(|(&a, &b)| (score(a) - score(b)).abs() <= TIE)
        })
    }

    fn exact(&self) -> Check {
        let differ = |i: &usize| self.given[*i] != self.golden[*i];
        let count = (0..self.given.len()).filter(differ).count();
        let first = (0..self.given.len()).find(differ).unwrap_or(0);
        self.check(", where every element counts", count as f64, 0.0, first)
    }

    fn relative(&self, allowed: f64) -> Check {
        let (difference, at) = self.largest(0..self.given.len());
        let scale = self.golden.iter().fold(0.0, |most: f64, b| if b.is_nan() { f64::NAN } else { most.max(b.abs()) });
        if scale < TINY {
            return self.check(", absolutely", difference, TINY_ALLOWED, at);
        }
        let error = if self.golden.iter().all(|b| b.is_finite()) { difference / scale } else { f64::NAN };
        self.check("", error, allowed, at)
    }

    /// A parameter after a step. `reach` is given where the key third stands apart.
    fn step(&self, start: &[f64], reach: Option<f64>, allowed: &Allowed, checks: &mut Vec<Check>) {
        let n = self.given.len();
        if self.golden == start {
            let moved = |i: &usize| f64::from(self.given[*i] as f32) != start[*i];
            let count = (0..n).filter(moved).count();
            let first = (0..n).find(moved).unwrap_or(0);
            checks.push(self.check(", unchanged to the bit", count as f64, 0.0, first));
            return;
        }
        let apart = reach.map_or(0..0, |_| n / 3..2 * (n / 3));
        let square = |sum: f64, (a, b): (&f64, &f64)| sum + (a - b).powi(2);
        let length = |a: &[f64], b: &[f64]| {
            let ends = [0..apart.start, apart.end..n];
            ends.into_iter().fold(0.0, |sum, range| a[range.clone()].iter().zip(&b[range]).fold(sum, square)).sqrt()
        };
        let (error, update) = (length(self.given, self.golden), length(self.golden, start));
        let at = [0..apart.start, apart.end..n].map(|range| self.largest(range));
        let at = if at[0].0 >= at[1].0 || at[0].0.is_nan() { at[0].1 } else { at[1].1 };
        if update > 0.0 {
            checks.push(self.check(" (difference over update)", error / update, allowed.update, at));
        } else {
            checks.push(self.check(", which should not have moved", error, 0.0, at));
        }
        if let Some(limit) = allowed.value {
            checks.push(self.relative(limit));
        } else if let Some(reach) = reach {
            let (difference, at) = self.largest(apart);
            checks.push(self.check(" (key bias, absolutely)", difference, reach, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair<'a>(given: &'a [f64], golden: &'a [f64], shape: &'a [usize]) -> Pair<'a> {
        Pair { name: "out/x", shape, given, golden }
    }

    const LIMITS: Allowed = Allowed { out: 1e-5, grad: 1e-5, update: 1e-3, value: None };

    #[test]
    fn relative_error_is_taken_of_the_largest_golden_value() {
        let check = pair(&[1.0, 2.0, 4.0, 1.5], &[1.0, 2.0, 4.0, 1.0], &[2, 2]).relative(0.2);
        assert_eq!((check.error, check.passed(), check.ratio()), (0.125, true, 0.625));
        assert!(check.detail.contains("[1, 1]"), "{}", check.detail);
        assert!(!pair(&[1.0, 2.0], &[1.0, 4.0], &[2]).relative(0.2).passed());
    }

    #[test]
    fn what_is_no_number_never_passes() {
        for (given, golden) in [(f64::NAN, 1.0), (1.0, f64::NAN), (f64::INFINITY, 1.0), (1.0, f64::INFINITY), (f64::NAN, f64::NAN)] {
            let (given, golden) = ([0.5, given], [0.5, golden]);
            let check = pair(&given, &golden, &[2]).relative(0.2);
            assert!(!check.passed() && check.ratio() > 1.0, "{check:?}");
            let mut checks = Vec::new();
            pair(&given, &golden, &[2]).step(&[0.0, 0.0], None, &LIMITS, &mut checks);
            assert!(checks.iter().any(|check| !check.passed()), "{checks:?}");
        }
        assert!(!pair(&[f64::NAN], &[0.0], &[1]).exact().passed());
    }

    #[test]
    fn golden_zeros_are_compared_absolutely() {
        assert!(pair(&[1e-7], &[0.0], &[1]).relative(1e-9).passed());
        assert!(!pair(&[1e-5], &[1e-13], &[1]).relative(1e9).passed());
        assert!(pair(&[], &[], &[0]).relative(1e-9).passed());
    }

    #[test]
    fn integers_are_compared_exactly() {
        assert!(pair(&[1.0, 7.0], &[1.0, 7.0], &[2]).exact().passed());
        let check = pair(&[1.0, 7.0], &[2.0, 7.0], &[2]).exact();
        assert!(!check.passed() && check.ratio() == f64::INFINITY);
    }

    #[test]
    fn chosen_patches_may_differ_only_where_scores_tie() {
        let scores = [0.3, 0.3, 0.1, 0.2, 0.0, 0.5, 0.5, 0.4];
        let good = |given: &[f64]| pair(given, &[0.0, 3.0, 1.0, 3.0], &[2, 2]).as_good(4, &scores);
        assert!(good(&[0.0, 3.0, 1.0, 3.0]) && good(&[1.0, 3.0, 2.0, 3.0]));
        assert!(!good(&[0.0, 2.0, 1.0, 3.0]), "another score");
        assert!(!good(&[3.0, 0.0, 1.0, 3.0]), "another order");
        assert!(!pair(&[0.0, 0.0], &[0.0, 1.0], &[1, 2]).as_good(4, &scores[..4]), "one patch twice");
        assert!(!good(&[0.0, 9.0, 1.0, 3.0]) && !good(&[0.0, -1.0, 1.0, 3.0]), "no patch");
    }

    #[test]
    fn key_third_is_apart_from_the_update() {
        let start = [0.0; 6];
        let golden = [1.0, 1.0, 0.1, 0.1, 1.0, 1.0];
        let given = [1.0, 1.0, -0.1, 0.3, 1.0, 1.0];
        let checks = |given: &[f64], reach| {
            let mut checks = Vec::new();
            pair(given, &golden, &[6]).step(&start, reach, &LIMITS, &mut checks);
            checks.iter().all(Check::passed)
        };
        assert!(checks(&given, Some(0.3)));
        assert!(!checks(&given, Some(0.1)));
        assert!(!checks(&given, None));
        assert!(!checks(&[1.0, 1.1, 0.1, 0.1, 1.0, 1.0], Some(0.3)));
    }

    #[test]
    fn unchanged_parameters_are_unchanged_to_the_bit() {
        let passed = |given: f64| {
            let mut checks = Vec::new();
            pair(&[given], &[0.5], &[1]).step(&[0.5], None, &LIMITS, &mut checks);
            checks[0].passed()
        };
        assert!(passed(0.5) && !passed(0.5 + 1e-7));
    }
}
