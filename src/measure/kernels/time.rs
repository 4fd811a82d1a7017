//! Is it right, and how long does it take.
//!
//! On a GPU forward and backward are recorded, each by itself, and replayed: the host is no part of the time. Before each replay the device's cache is wiped.
//! All images of a batch are the same, so what was timed can be held against the CPU's result for one of them.

use super::bench::Bench;
use super::updates::{Model, Rule, Update};
use crate::device::gpu::{Gpu, Graph};
use crate::ensure;
use crate::error::Result;
use crate::measure::{Times, timed};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Device, Dtype, Tensor};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    Forward,
    Backward,
    /// Losses make their gradient in the forward pass.
    Loss,
    Update,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::Loss => "loss+gradient",
            Pass::Update => "update",
        }
    }
}

/// How often something is timed.
#[derive(Clone, Copy)]
pub struct Rounds {
    pub counted: usize,
    pub before: usize,
}

impl Rounds {
    /// Times of what `once` answers in milliseconds.
    pub fn times(self, mut once: impl FnMut() -> Result<f64>) -> Result<Times> {
        for _ in 0..self.before {
            once()?;
        }
        Ok(Times::of((0..self.counted).map(|_| once()).collect::<Result<_>>()?))
    }
}

/// How far a result may be off, as a part of its largest value. The kernels' own test has bounds of its own for each case; these here find what is wrong
/// altogether.
pub fn tolerance(precision: Dtype) -> f64 {
    if precision == Dtype::Bf16 { 3e-2 } else { 1e-4 }
}

/// What an op gives, and the gradients of its inputs.
pub struct Outcome {
    y: Tensor,
    gradients: Vec<Option<Tensor>>,
}

impl Outcome {
    fn of(bench: &Bench, inputs: &[Tensor], rounding: Dtype) -> Result<Self> {
        let tape = Tape::new();
        let vars = bench.vars(&tape, inputs);
        let y = (bench.run)(&vars)?;
        let mut gradients = Vec::new();
        if y.tracked() && (bench.loss || bench.backward.is_some()) {
            let all = match bench.loss {
                true => tape.backward(&y, &mut [])?,
                false => tape.backward_from(&y, bench.upstream(y.value(), rounding)?, &mut [])?,
            };
            gradients = vars.iter().map(|x| all.of(x).map(|x| x.on(&Device::Cpu)).transpose()).collect::<Result<_>>()?;
        }
        Ok(Self { y: y.value().on(&Device::Cpu)?, gradients })
    }

    /// The definition: the CPU's code in f64, on numbers rounded as the device's are.
    pub fn exact(bench: &Bench, precision: Dtype) -> Result<Self> {
        Self::of(bench, &bench.tensors(&Device::Cpu, precision, Dtype::F64)?, precision)
    }
}

/// Refuses numbers that are not the definition's.
fn close(what: impl Fn() -> String, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    near(what, &got.to_f64(), &want.to_f64(), if got.dtype() == Dtype::U32 { 0.0 } else { tolerance })
}

fn near(what: impl Fn() -> String, got: &[f64], want: &[f64], tolerance: f64) -> Result<()> {
    ensure!(got.len() == want.len(), "{} has {} numbers but the CPU's has {}", what(), got.len(), want.len());
    let most = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let error = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0f64, |worst, error| if worst.is_nan() || error <= worst { worst } else { error });
    let fits = error <= tolerance * most;
    ensure!(fits, "{} is off by {error:.2e} where {:.2e} is allowed", what(), tolerance * most);
    Ok(())
}

/// Compares `bench`, of one image, with the definition.
pub fn check(bench: &Bench, version: Option<&str>, device: &Device, precision: Dtype, exact: &Outcome) -> Result<()> {
    let got = Outcome::of(bench, &bench.tensors(device, precision, precision)?, precision)?;
    let what = |part: String| move || format!("{}: {part}", named(bench, version));
    close(what("the result".into()), &got.y, &exact.y, tolerance(precision))?;
    ensure!(got.gradients.len() == exact.gradients.len(), "{}: gradients are missing", named(bench, version));
    for (i, pair) in got.gradients.iter().zip(&exact.gradients).enumerate() {
        if let (Some(got), Some(want)) = pair {
            close(what(format!("the gradient of input {i}")), got, want, tolerance(precision))?;
        }
    }
    Ok(())
}

/// The op and its version for a sentence.
pub fn named(bench: &Bench, version: Option<&str>) -> String {
    version.map_or(bench.op.to_string(), |version| format!("{} {version}", bench.op))
}

fn replayed(gpu: &Gpu, graph: &Graph, rounds: Rounds) -> Result<Times> {
    let rng = Rng::new(0);
    rounds.times(|| {
        gpu.scrub()?;
        gpu.time(|| graph.replay(&rng))
    })
}

/// The numbers of the last image of a batch.
fn last_image(y: &Tensor, images: usize) -> Result<Tensor> {
    let (rows, c) = (y.rows(), y.last());
    if rows < images || !matches!(y.dtype(), Dtype::F32 | Dtype::Bf16) {
        let (all, here) = (y.on(&Device::Cpu)?.to_f64(), y.numel() / images.min(y.numel()));
        return Tensor::from_slice(&[here], &all[all.len() - here..]);
    }
    let last = Var::constant(y.reshape(&[1, rows, c])?).tokens(rows - rows / images..rows)?;
    last.value().on(&Device::Cpu)
}

/// Times of the passes of `bench` in the version that is chosen; their results for the last image have to be those of `exact`.
pub fn on_gpu(
    gpu: &Gpu,
    bench: &Bench,
    version: Option<&str>,
    inputs: &[Tensor],
    rounds: Rounds,
    exact: &Outcome,
    precision: Dtype,
) -> Result<Vec<(Pass, Times)>> {
    let tape = Tape::new();
    let vars = bench.vars(&tape, inputs);
    let (graph, y) = gpu.capture(|| (bench.run)(&vars))?;
    let mut all = vec![(if bench.loss { Pass::Loss } else { Pass::Forward }, replayed(gpu, &graph, rounds)?)];
    let as_it_should_be = |part: &str, got: &Tensor, want: &Tensor| {
        if bench.distinct {
            return Ok(());
        }
        let what = || format!("{}: {part} that was timed", named(bench, version));
        close(what, &last_image(got, bench.repeats())?, want, tolerance(precision))
    };
    as_it_should_be("the result", y.value(), &exact.y)?;
    if bench.backward.is_some() && (version.is_none() || version != bench.forward_only) {
        let upstream = bench.upstream(y.value(), precision)?;
        let (graph, gradients) = gpu.capture(|| tape.backward_from(&y, upstream, &mut []))?;
        all.push((Pass::Backward, replayed(gpu, &graph, rounds)?));
        if let (Some(got), Some(Some(want))) = (gradients.of(&vars[0]), exact.gradients.first()) {
            as_it_should_be("the gradient", got, want)?;
        }
    }
    Ok(all)
}

/// Times of the passes on the CPU, each round from a fresh tape.
pub fn on_cpu(bench: &Bench, inputs: &[Tensor], rounds: Rounds) -> Result<Vec<(Pass, Times)>> {
    let (mut backward, mut upstream) = (Vec::new(), None);
    let forward = rounds.times(|| {
        let tape = Tape::new();
        let vars = bench.vars(&tape, inputs);
        let (forward, y) = timed(|| (bench.run)(&vars));
        let y = y?;
        if bench.loss {
            let (ms, done) = timed(|| tape.backward(&y, &mut []));
            done?;
            return Ok(forward + ms);
        }
        if bench.backward.is_some() {
            // In a step the gradient that arrives is the op's own, to be overwritten: so it is here.
            let upstream = match &upstream {
                None => upstream.insert(bench.upstream(y.value(), Dtype::F32)?),
                Some(upstream) => upstream,
            };
            let upstream = upstream.copy()?;
            let (ms, done) = timed(|| tape.backward_from(&y, upstream, &mut []));
            done?;
            backward.push(ms);
        }
        Ok(forward)
    })?;
    let backward = backward.split_off(rounds.before.min(backward.len()));
    let mut all = vec![(if bench.loss { Pass::Loss } else { Pass::Forward }, forward)];
    if !backward.is_empty() {
        all.push((Pass::Backward, Times::of(backward)));
    }
    Ok(all)
}

/// Compares an update of a few parameters with the CPU's.
pub fn check_update(rule: Rule, device: &Device, precision: Dtype) -> Result<()> {
    let result = |device: &Device, precision| {
        let mut model = Model::small(device, precision)?;
        let mut update = Update::new(rule, &mut model)?;
        for _ in 0..3 {
            update.prepare()?;
            update.apply()?;
        }
        update.result()
    };
    let (got, want) = (result(device, precision)?, result(&Device::Cpu, Dtype::F32)?);
    near(|| format!("{}: the result", rule.name()), &got, &want, tolerance(Dtype::F32))
}

/// Time of an update of all parameters of a model.
pub fn update(rule: Rule, model: &mut Model, rounds: Rounds) -> Result<Times> {
    let gpu = model.params.device().gpu().cloned();
    let mut update = Update::new(rule, model)?;
    let Some(gpu) = gpu else {
        return rounds.times(|| {
            update.prepare()?;
            let (ms, done) = timed(|| update.apply());
            done.map(|()| ms)
        });
    };
    update.prepare()?;
    let (graph, ()) = gpu.capture(|| update.apply())?;
    let rng = Rng::new(0);
    rounds.times(|| {
        update.prepare()?;
        gpu.scrub()?;
        gpu.time(|| graph.replay(&rng))
    })
}
