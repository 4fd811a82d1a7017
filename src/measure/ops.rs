//! Times of single ops on the CPU at the shapes a ViT meets, forward and backward, and of the update that follows.

use super::{Times, timed};
use crate::device::gemm::{self, Finish, View};
use crate::device::parallel::{self, Panel};
use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::masking;
use crate::ops::case::numbers;
use crate::ops::regions::{Layout, Regions, Seen};
use crate::optim::adamw::AdamW;
use crate::optim::{Optimizer, groups};
use crate::param::{Init, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::tensor::{Dtype, Tensor};
use serde_json::{Map, Value, json};

/// What can be measured.
pub const NAMES: [&str; 10] =
    ["matmul_forward", "matmul_input", "matmul_weight", "layernorm", "gelu", "softmax", "attention", "depthwise", "region_conv", "adamw"];

const PRODUCT_ROWS: [usize; 3] = [400, 1576, 3152];
const PRODUCTS: [(usize, usize); 7] = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (1536, 512), (512, 2048), (576, 192)];
const NORMS: [(usize, usize); 3] = [(1576, 512), (400, 768), (3152, 512)];
const GELUS: [(usize, usize); 2] = [(1576, 2048), (400, 3072)];
const SOFTMAXES: [(usize, usize); 1] = [(25_216, 197)];
const ATTENTIONS: [(usize, usize, usize, usize); 3] = [(8, 50, 12, 64), (8, 197, 16, 32), (16, 50, 3, 64)];
/// Images, channels, rows and columns.
const DEPTHWISES: [[usize; 4]; 2] = [[8, 256, 56, 56], [8, 384, 28, 28]];
/// Images, kept of 14 x 14 regions, tokens along a side of one, channels.
const REGIONS: [[usize; 4]; 4] = [[8, 196, 4, 256], [32, 49, 4, 256], [8, 196, 2, 384], [32, 49, 2, 384]];
const UPDATES: [usize; 2] = [5_700_000, 31_200_000];

/// Runs of each case that do not count.
const WARMUP: usize = 2;

/// One measured case.
pub struct Row {
    pub op: &'static str,
    pub case: Map<String, Value>,
    pub precision: Precision,
    pub times: Times,
}

impl Row {
    pub fn json(&self) -> Value {
        json!({ "op": self.op, "case": self.case, "dtype": self.precision.name(), "threads": parallel::threads(), "ms": self.times.median,
            "min_ms": self.times.min, "max_ms": self.times.max, "runs": self.times.runs })
    }

    pub fn text(&self) -> String {
        let case: Vec<String> = self.case.iter().map(|(name, size)| format!("{name} {size}")).collect();
        let Times { median, min, max, .. } = self.times;
        format!("{:<16} {:<32} {median:>9.3} ms   ({min:.3} to {max:.3})", self.op, case.join(", "))
    }
}

/// No case is run more often than this.
const MOST_RUNS: usize = 1_000_000;

/// Measures the ops named in `only` (all if empty), each case `runs` times after two runs that do not count.
pub fn run(only: &[String], runs: usize, precision: Precision, mut row: impl FnMut(Row)) -> Result<()> {
    Device::Cpu.compute_in(precision)?;
    let mut row = |timed: Row| row(Row { precision, ..timed });
    if !(1..=MOST_RUNS).contains(&runs) {
        return Err(Error::usage(format!("--rounds {runs} is not from 1 to {MOST_RUNS}")));
    }
    if let Some(name) = only.iter().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(Error::usage(format!("--only {name}: there is no such op; there are {}", NAMES.join(", "))));
    }
    for op in NAMES.into_iter().filter(|op| only.is_empty() || only.iter().any(|name| name == op)) {
        match op {
            "layernorm" => {
                for (rows, c) in NORMS {
                    let shapes: [&[usize]; 3] = [&[rows, c], &[c], &[c]];
                    row(both_ways(op, &[("rows", rows), ("c", c)], &shapes, runs, |x| x[0].layernorm(&x[1], &x[2], 1e-6))?);
                }
            }
            "gelu" => {
                for (rows, c) in GELUS {
                    row(both_ways(op, &[("rows", rows), ("c", c)], &[&[rows, c]], runs, |x| x[0].gelu())?);
                }
            }
            "softmax" => {
                for (rows, c) in SOFTMAXES {
                    row(both_ways(op, &[("rows", rows), ("c", c)], &[&[rows, c]], runs, |x| x[0].softmax())?);
                }
            }
            "attention" => {
                for (b, n, heads, d) in ATTENTIONS {
                    let case = [("b", b), ("n", n), ("heads", heads), ("d", d)];
                    row(both_ways(op, &case, &[&[b, n, 3 * heads * d]], runs, |x| x[0].attention(heads))?);
                }
            }
            "depthwise" => {
                for [b, c, h, w] in DEPTHWISES {
                    let shapes: [&[usize]; 3] = [&[b, c, h, w], &[c, 1, 5, 5], &[c]];
                    let case = [("b", b), ("c", c), ("h", h), ("w", w)];
                    row(both_ways(op, &case, &shapes, runs, |x| x[0].depthwise(&x[1], Some(&x[2]), None))?);
                }
            }
            "region_conv" => {
                for [b, kept, side, c] in REGIONS {
                    let (grid, layout) = ([14, 14], Layout { side, cell: 2 });
                    let mask = masking::random(&Tensor::from_slice(&[b, 196], &Rng::new(0).uniform("mask", b * 196)?)?, kept)?;
                    let seen = if kept == 196 { Seen::All } else { Seen::Only { kept: mask.kept, places: mask.restore } };
                    let shapes: [&[usize]; 3] = [&[b, kept * layout.tokens(), c], &[c, 1, 5, 5], &[c]];
                    let (case, regions) = ([("b", b), ("k", kept), ("region", side), ("c", c)], Regions { grid, layout, seen });
                    row(both_ways(op, &case, &shapes, runs, |x| x[0].region_conv(&x[1], Some(&x[2]), &regions))?);
                }
            }
            "adamw" => {
                for numel in UPDATES {
                    row(update(op, numel, runs)?);
                }
            }
            _ => {
                for (n, k) in PRODUCTS {
                    for m in PRODUCT_ROWS {
                        row(product(op, (m, n, k), runs)?);
                    }
                }
            }
        }
    }
    Ok(())
}

fn case(sizes: &[(&str, usize)]) -> Map<String, Value> {
    sizes.iter().map(|(name, size)| (name.to_string(), json!(size))).collect()
}

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(shape, &numbers("measure", shape.len(), shape))?.cast(Dtype::F32)
}

fn both_ways(
    op: &'static str,
    sizes: &[(&str, usize)],
    shapes: &[&[usize]],
    runs: usize,
    f: impl Fn(&[Var]) -> Result<Var>,
) -> Result<Row> {
    let inputs = shapes.iter().map(|shape| random(shape)).collect::<Result<Vec<_>>>()?;
    let upstream = random(f(&inputs.iter().cloned().map(Var::constant).collect::<Vec<_>>())?.shape())?;
    let once = |upstream: Tensor| -> Result<()> {
        let tape = Tape::new();
        let inputs: Vec<Var> = inputs.iter().map(|input| tape.leaf(input.clone())).collect();
        let y = f(&inputs)?;
        tape.backward_from(&y, upstream, &mut [])?;
        Ok(())
    };
    // In a step the gradient that arrives is the op's own, to be overwritten: so it is here.
    measure(op, sizes, runs, || upstream.copy(), once)
}

/// The three products of a linear layer with m rows, from k to n numbers.
fn product(op: &'static str, (m, n, k): (usize, usize, usize), runs: usize) -> Result<Row> {
    let (x, w, dy) = (random(&[m, k])?, random(&[n, k])?, random(&[m, n])?);
    let (x, w, dy) = (x.data::<f32>(), w.data::<f32>(), dy.data::<f32>());
    let (x, w, dy) = (View::rows(x, k), View::rows(w, k), View::rows(dy, n));
    let (rows, columns, inner, a, b) = match op {
        "matmul_forward" => (m, n, k, x, w.transposed()),
        "matmul_input" => (m, k, n, dy, w),
        _ => (n, k, m, dy.transposed(), x),
    };
    let mut c = Tensor::empty(&[rows, columns], Dtype::F32)?;
    let c = c.data_mut::<f32>();
    measure(
        op,
        &[("m", m), ("n", n), ("k", k)],
        runs,
        || Ok(()),
        |()| {
            gemm::parallel(&mut Panel::of(c, columns), inner, a, b, Finish::replace());
            Ok(())
        },
    )
}

fn update(op: &'static str, numel: usize, runs: usize) -> Result<Row> {
    let mut b = ParamsBuilder::default();
    let id = b.add("weight", &[numel, 1], Init::Normal(0.02))?;
    let mut params = b.build(Dtype::F32, &Rng::new(0))?;
    params.accept(id, random(&[numel, 1])?)?;
    let mut optimizer = AdamW::new(groups::all(&params, 0.05), (0.9, 0.95), 1e-8)?;
    measure(op, &[("numel", numel)], runs, || Ok(()), |()| optimizer.step(&mut params, 1e-3))
}

/// Times `once` on what `prepare` gives; preparing is not timed.
fn measure<P>(
    op: &'static str,
    sizes: &[(&str, usize)],
    runs: usize,
    prepare: impl Fn() -> Result<P>,
    mut once: impl FnMut(P) -> Result<()>,
) -> Result<Row> {
    let mut times = Vec::with_capacity(runs);
    for run in 0..WARMUP + runs {
        let prepared = prepare()?;
        let (ms, done) = timed(|| once(prepared));
        done?;
        if run >= WARMUP {
            times.push(ms);
        }
    }
    Ok(Row { op, case: case(sizes), precision: Precision::F32, times: Times::of(times) })
}
