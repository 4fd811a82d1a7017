//! Floor 7: how long things take, whether the numbers are PyTorch's, and what the machine offers.

pub mod figure;
pub mod info;
pub mod kernels;
pub mod loading;
pub mod masking;
pub mod ops;
pub mod page;
pub mod parity;
pub mod room;
pub mod scaling;
pub mod stages;
pub mod step;
pub mod subject;
pub mod teacher;

use std::time::Instant;

/// Median, smallest and largest of some times in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub runs: usize,
}

impl Times {
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let runs = times.len();
        let middle = (times.get(runs.saturating_sub(1) / 2), times.get(runs / 2));
        let median = middle.0.zip(middle.1).map_or(0.0, |(a, b)| (a + b) / 2.0);
        Self { median, min: times.first().copied().unwrap_or(0.0), max: times.last().copied().unwrap_or(0.0), runs }
    }
}

/// Milliseconds that `f` takes, and what it gives.
pub fn timed<R>(f: impl FnOnce() -> R) -> (f64, R) {
    let start = Instant::now();
    let result = f();
    (start.elapsed().as_secs_f64() * 1e3, result)
}
