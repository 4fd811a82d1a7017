//! What many ranks cost, by formulas. Times are milliseconds, sizes bytes, rates bytes a millisecond.
//!
//!   one way round a ring of n ranks     way(n, S, B) = (n - 1) / n  S / B + (n - 1) L       reduce-scatter, or all-gather, of S bytes
//!   N ranks on machines of G            half(S) = way(g, S, link) + way(N / g, S / g, network)     with g = min(N, G)
//!   all-reduce                          2 half(S)
//!
//! L is the time that a step round the ring takes whatever its size. In a machine the ranks reduce and scatter, then the ranks of the same number on all
//! machines exchange their S / g, and then they gather in the machine.
//!
//! Bucket i of S_i bytes is complete at r_i, counted from the beginning of a backward pass of b milliseconds, and takes t_i to be exchanged: t_i = 2 half(S_i),
//! or half(S_i) where the optimiser is sharded. Buckets go one after the other:
//!
//!   e_i = max(r_i, e_(i-1)) + t_i       behind = max(0, e_last - b) with overlap, the sum of all t_i without
//!   step = forward + backward + behind + update                          every rank updates everything
//!   step = forward + backward + behind + share update + half(V)          sharded: a rank updates its share, then the values (V bytes, f32) are gathered
//!   exposed = behind, and half(V) where sharded                          efficiency = (forward + backward + update) / step
//!
//! The share is that of the rank that has most, as parameters are dealt out whole. What the formulas leave out: that an exchange takes memory and cores from
//! the computation that it runs beside, that ranks wait for the slowest, and that images have to be read.

use crate::device::ranks::Wire;

/// Something that ranks exchange numbers over.
pub trait Road {
    fn all_reduce(&self, bytes: f64) -> f64;
    fn reduce_scatter(&self, bytes: f64) -> f64;
    fn all_gather(&self, bytes: f64) -> f64;
}

/// What joins GPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    pub per_node: usize,
    /// Of a GPU to the others of its machine, in one direction.
    pub link: f64,
    /// Of a GPU to other machines, in one direction.
    pub network: f64,
    pub latency: f64,
}

/// So many ranks of it.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub network: Network,
    pub ranks: usize,
}

impl Ring {
    /// Ranks of a machine, and machines.
    pub fn machines(&self) -> (usize, usize) {
        let inside = self.ranks.clamp(1, self.network.per_node.max(1));
        (inside, (self.ranks / inside).max(1))
    }

    /// Reduce-scatter, or all-gather: half of an all-reduce.
    fn half(&self, bytes: f64) -> f64 {
        let (inside, machines) = self.machines();
        let Network { link, network, latency, .. } = self.network;
        way(inside, bytes, link, latency) + way(machines, bytes / inside as f64, network, latency)
    }
}

/// One way round a ring.
fn way(ranks: usize, bytes: f64, rate: f64, latency: f64) -> f64 {
    let steps = ranks as f64 - 1.0;
    steps / ranks as f64 * bytes / rate + steps * latency
}

impl Road for Ring {
    fn all_reduce(&self, bytes: f64) -> f64 {
        2.0 * self.half(bytes)
    }

    fn reduce_scatter(&self, bytes: f64) -> f64 {
        self.half(bytes)
    }

    fn all_gather(&self, bytes: f64) -> f64 {
        self.half(bytes)
    }
}

/// Gradients that are sent together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// When the last of them is complete, as a part of the backward pass.
    pub ready: f64,
    pub numbers: usize,
}

/// A step of one rank that exchanges nothing, and what it would have to exchange.
#[derive(Clone, Debug)]
pub struct Work {
    pub forward: f64,
    pub backward: f64,
    pub update: f64,
    /// In the order in which they are sent.
    pub buckets: Vec<Bucket>,
}

impl Work {
    pub fn step(&self) -> f64 {
        self.forward + self.backward + self.update
    }

    /// Trained numbers.
    pub fn numbers(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.numbers).sum()
    }

    /// The same computation in other times.
    pub fn taking(&self, [forward, backward, update]: [f64; 3]) -> Self {
        Self { forward, backward, update, buckets: self.buckets.clone() }
    }
}

/// How gradients go round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// While the backward pass goes on.
    pub overlap: bool,
    /// ZeRO, stage 1.
    pub sharded: bool,
    pub wire: Wire,
}

impl Form {
    /// The four forms, the one that is usual first.
    pub fn all(wire: Wire) -> [Self; 4] {
        [(true, false), (false, false), (true, true), (false, true)].map(|(overlap, sharded)| Self { overlap, sharded, wire })
    }

    pub fn name(self) -> &'static str {
        match (self.overlap, self.sharded) {
            (true, false) => "overlap",
            (false, false) => "no overlap",
            (true, true) => "overlap, ZeRO-1",
            (false, true) => "no overlap, ZeRO-1",
        }
    }
}

/// What a step costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// That the road is busy.
    pub exchange: f64,
    /// Of it, what nothing is computed beside.
    pub exposed: f64,
    pub step: f64,
}

/// A step over a road; a rank updates the share of all numbers where the optimiser is sharded.
pub fn cost(work: &Work, road: &impl Road, form: Form, share: f64) -> Cost {
    let time = |bytes: f64| if form.sharded { road.reduce_scatter(bytes) } else { road.all_reduce(bytes) };
    let (mut sum, mut end) = (0.0, 0.0f64);
    for bucket in &work.buckets {
        let takes = time((bucket.numbers * form.wire.bytes()) as f64);
        sum += takes;
        end = end.max(bucket.ready * work.backward) + takes;
    }
    // Rounding leaves no more exposed than there is.
    let behind = if form.overlap { (end - work.backward).clamp(0.0, sum) } else { sum };
    let (values, update) = match form.sharded {
        true => (road.all_gather((work.numbers() * Wire::F32.bytes()) as f64), share * work.update),
        false => (0.0, work.update),
    };
    Cost { exchange: sum + values, exposed: behind + values, step: work.forward + work.backward + behind + update + values }
}

/// What a rank holds of the model between steps, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holds {
    pub values: usize,
    pub gradients: usize,
    pub optimizer: usize,
}

impl Holds {
    /// With a sharded optimiser: of the rank that has most.
    pub fn sharded(self, share: f64) -> Self {
        Self { optimizer: (self.optimizer as f64 * share).ceil() as usize, ..self }
    }

    pub fn all(self) -> usize {
        self.values + self.gradients + self.optimizer
    }
}

/// Time of a call by its size: a + bytes / b, so that the relative errors are least in square.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Milliseconds, at least 0.
    pub start: f64,
    /// Milliseconds a byte, at least 0.
    pub each: f64,
    /// The largest relative error.
    pub error: f64,
}

impl Fit {
    pub fn of(points: &[(f64, f64)]) -> Self {
        // Each row is divided by its time: 1/t a + S/t c = 1.
        let rows = || points.iter().filter(|(_, t)| *t > 0.0).map(|(bytes, t)| [1.0 / t, bytes / t]);
        let sum = |f: &dyn Fn([f64; 2]) -> f64| rows().map(f).sum::<f64>();
        let [aa, ac, cc] = [sum(&|[a, _]| a * a), sum(&|[a, c]| a * c), sum(&|[_, c]| c * c)];
        let [a1, c1] = [sum(&|[a, _]| a), sum(&|[_, c]| c)];
        let determinant = aa * cc - ac * ac;
        let only = |sum: f64, square: f64| if square > 0.0 { sum / square } else { 0.0 };
        let both = [(a1 * cc - c1 * ac) / determinant, (c1 * aa - a1 * ac) / determinant];
        let [start, each] = match both {
            [start, each] if start.is_finite() && each.is_finite() && start >= 0.0 && each >= 0.0 => both,
            [_, each] if each < 0.0 => [only(a1, aa), 0.0],
            _ => [0.0, only(c1, cc)],
        };
        let mut own = Self { start, each, error: 0.0 };
        own.error = points.iter().filter(|(_, t)| *t > 0.0).map(|&(bytes, t)| (own.at(bytes) / t - 1.0).abs()).fold(0.0, f64::max);
        own
    }

    pub fn at(&self, bytes: f64) -> f64 {
        self.start + self.each * bytes
    }

    /// Gigabytes a second; None where size makes no difference.
    pub fn rate(&self) -> Option<f64> {
        (self.each > 0.0).then(|| 1e-6 / self.each)
    }
}

/// What was measured of all-reduce, reduce-scatter and all-gather.
#[derive(Clone, Copy, Debug)]
pub struct Fits(pub [Fit; 3]);

impl Road for Fits {
    fn all_reduce(&self, bytes: f64) -> f64 {
        self.0[0].at(bytes)
    }

    fn reduce_scatter(&self, bytes: f64) -> f64 {
        self.0[1].at(bytes)
    }

    fn all_gather(&self, bytes: f64) -> f64 {
        self.0[2].at(bytes)
    }
}
