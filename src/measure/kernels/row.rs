//! What the machine can do at most, measured by the same clock, and a line of the table.

use super::bench::Work;
use super::time::{Pass, Rounds};
use crate::device::{Named, parallel};
use crate::error::Result;
use crate::measure::{Times, timed};
use crate::rng::Rng;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Tensor};
use serde_json::{Map, Value, json};

/// The best of the rounds.
#[derive(Clone, Copy)]
pub struct Ceilings {
    /// Bytes read and written a second by a copy.
    pub copy: f64,
    /// Operations a second of a large product.
    pub product: f64,
    /// Rows, columns and inner size of that product.
    pub side: usize,
}

impl Ceilings {
    pub fn measure(device: &Device, named: Named, precision: Dtype, rounds: Rounds) -> Result<Self> {
        let (bytes, side) = if matches!(named, Named::Gpu(_)) { (1 << 30, 8192) } else { (64 << 20, 512) };
        Ok(Self {
            copy: 2.0 * bytes as f64 / copying(device, bytes, rounds)?,
            product: 2.0 * (side as f64).powi(3) / multiplying(device, side, precision, rounds)?,
            side,
        })
    }
}

/// Seconds that a copy of so many bytes takes.
fn copying(device: &Device, bytes: usize, rounds: Rounds) -> Result<f64> {
    let from = Tensor::zeros_on(device, &[bytes / 4], Dtype::F32)?;
    let mut to = Some(from.copy()?);
    let times = rounds.times(|| match device.gpu() {
        Some(gpu) => gpu.time(|| {
            to = to.take().map(|to| to.replace(&from)).transpose()?;
            Ok(())
        }),
        None => {
            let from = from.data::<f32>();
            let to = to.as_mut().map(Tensor::data_mut).unwrap_or_default();
            Ok(timed(|| parallel::rows(to, 1, |first, to| to.copy_from_slice(&from[first..first + to.len()]))).0)
        }
    })?;
    Ok(times.min / 1e3)
}

/// Seconds that a square product takes, as a linear layer makes it.
fn multiplying(device: &Device, side: usize, precision: Dtype, rounds: Rounds) -> Result<f64> {
    let numbers = Rng::new(0).normal("product", side);
    let numbers = Tensor::from_slice(&[side, side], &numbers.repeat(side))?;
    let x = Var::constant(numbers.cast(precision)?.on(device)?);
    let times = match device.gpu() {
        Some(gpu) => rounds.times(|| gpu.time(|| x.linear(&x, None).map(drop))),
        None => rounds.times(|| {
            let (ms, y) = timed(|| x.linear(&x, None));
            y.map(|_| ms)
        }),
    };
    Ok(times?.min / 1e3)
}

/// One op, version and pass.
pub struct Row {
    pub model: &'static str,
    pub op: &'static str,
    pub case: Map<String, Value>,
    pub pass: Pass,
    pub precision: Dtype,
    pub device: Named,
    pub version: Option<&'static str>,
    /// Whether it is the version that runs unless another is asked for.
    pub chosen: bool,
    pub times: Times,
    pub work: Work,
    /// Median time of version 1 of the same.
    pub first: Option<f64>,
}

pub fn heading() -> String {
    format!(
        "{:<25} {:<44} {:<13} {:<5} {:<7} {:>10} {:>24} {:>18} {:>12} {:>7}",
        "op", "shape", "direction", "dtype", "version", "us", "(min to max)", "rate", "of ceiling", "vs v1"
    )
}

impl Row {
    pub fn seconds(&self) -> f64 {
        self.times.median / 1e3
    }

    pub fn bytes(&self) -> f64 {
        self.work.bytes(self.precision) as f64
    }

    /// What limits an ideal kernel, and how near to it this one comes.
    pub fn ceiling(&self, ceilings: &Ceilings) -> (&'static str, f64) {
        let (bytes, flops) = (self.bytes() / ceilings.copy, self.work.flops as f64 / ceilings.product);
        let (limit, floor) = if flops > bytes { ("flops", flops) } else { ("bytes", bytes) };
        (limit, 100.0 * floor / self.seconds())
    }

    pub fn json(&self, ceilings: &Ceilings) -> Value {
        let (limit, percent) = self.ceiling(ceilings);
        json!({
            "op": self.op, "model": self.model, "case": self.case, "direction": self.pass.name(), "dtype": self.precision.name(),
            "device": self.device.to_string(), "version": self.version, "chosen": self.chosen,
            "us": 1e3 * self.times.median, "min_us": 1e3 * self.times.min, "max_us": 1e3 * self.times.max, "runs": self.times.runs,
            "bytes": self.bytes(), "flops": self.work.flops, "gb_s": self.bytes() / self.seconds() / 1e9,
            "tflop_s": self.work.flops as f64 / self.seconds() / 1e12, "limit": limit, "percent": percent,
            "vs_v1": self.first.map(|first| first / self.times.median),
        })
    }

    /// Operations a second where those are the limit, else bytes.
    pub fn rate(&self, ceilings: &Ceilings) -> String {
        let flops = self.work.flops as f64 / self.seconds();
        match self.ceiling(ceilings).0 {
            "flops" if flops < 1e12 => format!("{:.0} GFLOP/s", flops / 1e9),
            "flops" => format!("{:.1} TFLOP/s", flops / 1e12),
            _ => format!("{:.0} GB/s", self.bytes() / self.seconds() / 1e9),
        }
    }

    /// The sizes in words.
    pub fn shape(&self) -> String {
        let size = |(name, value): (&String, &Value)| match value {
            Value::String(what) => what.clone(),
            size => format!("{name} {size}"),
        };
        self.case.iter().map(size).collect::<Vec<_>>().join(" ")
    }

    /// With a star if it is the one that runs.
    pub fn version(&self) -> String {
        self.version.map_or(String::new(), |version| format!("{version}{}", if self.chosen { "*" } else { "" }))
    }

    /// How many times as fast as version 1.
    pub fn vs_first(&self) -> String {
        self.first.map_or(String::new(), |first| format!("{:.2}", first / self.times.median))
    }

    /// Whether it is what a step does: the only version, or the one that is chosen.
    pub fn is_run(&self) -> bool {
        self.version.is_none() || self.chosen
    }

    pub fn text(&self, ceilings: &Ceilings) -> String {
        let (limit, percent) = self.ceiling(ceilings);
        let (shape, version, rate, first) = (self.shape(), self.version(), self.rate(ceilings), self.vs_first());
        let spread = format!("({:.1} to {:.1})", 1e3 * self.times.min, 1e3 * self.times.max);
        let ceiling = format!("{percent:.0} % {limit}");
        format!(
            "{:<25} {shape:<44} {:<13} {:<5} {version:<7} {:>10.1} {spread:>24} {rate:>18} {ceiling:>12} {first:>7}",
            self.op,
            self.pass.name(),
            self.precision.name(),
            1e3 * self.times.median,
        )
    }
}
