//! Multi-head self-attention on packed queries, keys and values.
//!
//!   S = scale q k^T,   P = softmax(S),   y = P v                                        scale = D^-1/2
//!   dP = dy v^T,   dS = P (dP - rows(P dP)),   dq = scale dS k,   dk = scale dS^T q,   dv = P^T dy
//!
//! qkv [B, N, 3 C], a token's numbers lying as [q | k | v], each head-major: H heads of width D = C / H. y [B, N, C]. Each (image, head) is worked
//! on alone; the N x N scores live in scratch memory and are recomputed in the backward. Saved: qkv, and on the CPU of each row of S its largest
//! number and one over the sum of its exponentials [B, H, N, 2], so that the backward finds the very same P. On a GPU the scores never reach its memory
//! and what is saved of a row is log sum e^S [B, H, N] f32, and y. GPU: kernels/attention.cu, attention_long.cu, attention_v1.cu.
//!
//! Two requests: only some keys (`keys`, [B, K] token numbers, distinct in a row) take part; the first query's row of P is handed out.

mod cases;
mod cpu;
mod gpu;

pub use cases::cases;
pub use gpu::MOST_RESIDENT;

use crate::device::launch::Versions;
use crate::device::simd::Real;
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, ensure};

pub const VERSIONS: Versions = Versions { op: "attention", all: &["v1", "v2", "v3", "long"], chosen: "v2" };

/// Widest head that is served.
pub const MOST_WIDTH: usize = 128;

/// What is asked of an attention beyond its output.
#[derive(Clone, Default)]
pub struct Request {
    /// The tokens that serve as keys and values, [B, K]; all of them if None.
    pub keys: Option<Tensor>,
    /// Whether the first query's probabilities are handed out.
    pub class_rows: bool,
}

impl Var {
    pub fn attention(&self, heads: usize) -> Result<Var> {
        Ok(self.attention_with(heads, &Request::default())?.0)
    }

    /// The output, and P[.., 0, ..] as [B, H, keys] if it was requested.
    pub fn attention_with(&self, heads: usize, request: &Request) -> Result<(Var, Option<Tensor>)> {
        let qkv = self.value().clone();
        let sizes = Sizes::of(&qkv, heads, request.keys.as_ref())?;
        let keys = request.keys.as_ref().map(|keys| keys.on(&qkv.device())).transpose()?;
        if let Some(gpu) = qkv.gpu().cloned() {
            let Done { y, saved, class_rows } = gpu::forward(&gpu, &qkv, keys.as_ref(), &sizes, self.tracked(), request.class_rows)?;
            let value = y.clone();
            let var = Var::record("attention", [self], value, move |dy, need| {
                let lse = saved.expect("saved where a gradient flows");
                let mut dqkv = need.out(0)?;
                gpu::backward(&gpu, &dy, &gpu::Saved { qkv, keys, y, lse }, &sizes, &mut dqkv)?;
                Ok([Some(dqkv)])
            })?;
            return Ok((var, class_rows));
        }
        let done = by_real!("attention", qkv.dtype(), cpu::forward(&qkv, keys.as_ref(), &sizes, request.class_rows))?;
        let saved = done.saved.expect("the CPU always saves");
        let var = Var::record("attention", [self], done.y, move |dy, need| {
            let mut dqkv = need.out(0)?;
            by_real!("attention", qkv.dtype(), cpu::backward(&dy, &qkv, &saved, keys.as_ref(), &sizes, &mut dqkv))?;
            Ok([Some(dqkv)])
        })?;
        Ok((var, done.class_rows))
    }
}

struct Sizes {
    batch: usize,
    n: usize,
    heads: usize,
    width: usize,
    keys: usize,
}

impl Sizes {
    fn of(qkv: &Tensor, heads: usize, keys: Option<&Tensor>) -> Result<Self> {
        let &[batch, n, triple] = qkv.shape() else { crate::bail!("attention: qkv is {qkv:?} but [B, N, 3 C] is needed") };
        ensure!(
            heads > 0 && triple > 0 && triple.is_multiple_of(3 * heads) && n > 0,
            "attention: qkv is {qkv:?}, which does not split into q, k and v of {heads} heads"
        );
        let known = qkv.gpu().is_none() || matches!(qkv.dtype(), Dtype::F32 | Dtype::Bf16);
        ensure!(known, "attention: qkv is {qkv:?} but a GPU computes in f32 or bf16");
        let width = triple / 3 / heads;
        ensure!(width <= MOST_WIDTH, "attention: heads of width {width} are wider than {MOST_WIDTH}; use more heads");
        let Some(ids) = keys else { return Ok(Self { batch, n, heads, width, keys: n }) };
        let &[b, keys] = ids.shape() else { crate::bail!("attention: keys are {ids:?} but [B, K] is needed") };
        ensure!(b == batch && keys > 0 && ids.dtype() == Dtype::U32, "attention: keys are {ids:?} but qkv is {qkv:?}");
        let here = if qkv.gpu().is_none() { ids.on(&Device::Cpu)? } else { ids.clone() };
        if here.gpu().is_some() {
            // The kernels look at what cannot be looked at here.
            return Ok(Self { batch, n, heads, width, keys });
        }
        for (image, row) in here.data::<u32>().chunks_exact(keys).enumerate() {
            let mut seen = vec![false; n];
            let distinct = row.iter().all(|&id| (id as usize) < n && !std::mem::replace(&mut seen[id as usize], true));
            ensure!(distinct, "attention: the keys of image {image} name a token twice or one beyond the {n} there are");
        }
        Ok(Self { batch, n, heads, width, keys })
    }

    /// Elements of one image's qkv.
    fn image(&self) -> usize {
        self.n * 3 * self.channels()
    }

    fn channels(&self) -> usize {
        self.heads * self.width
    }
}

struct Done {
    y: Tensor,
    saved: Option<Tensor>,
    class_rows: Option<Tensor>,
}

/// Mean over the heads of class rows [B, H, K] -> [B, K], head by head in order.
pub fn mean_over_heads(class_rows: &Tensor) -> Result<Tensor> {
    let &[batch, heads, keys] = class_rows.shape() else { crate::bail!("mean over heads: {class_rows:?} is not [B, H, K]") };
    if let Some(gpu) = class_rows.gpu() {
        ensure!(class_rows.dtype() == Dtype::F32, "mean over heads: {class_rows:?} is not f32");
        return gpu::mean_over_heads(gpu, class_rows, [batch, heads, keys]);
    }
    let mut mean = Tensor::zeros(&[batch, keys], class_rows.dtype())?;
    fn add<T: Real + Element>(rows: &Tensor, mean: &mut Tensor, heads: usize, keys: usize) -> Result<()> {
        let scale = T::of(1.0 / heads as f64);
        for (mean, rows) in mean.data_mut::<T>().chunks_exact_mut(keys).zip(rows.data::<T>().chunks_exact(heads * keys)) {
            rows.chunks_exact(keys).for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, &p)| *mean += p));
            mean.iter_mut().for_each(|mean| *mean *= scale);
        }
        Ok(())
    }
    by_real!("mean over heads", class_rows.dtype(), add(class_rows, &mut mean, heads, keys))?;
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::super::case::numbers;
    use super::*;
    #[cfg(feature = "emulated")]
    use crate::{
        device::emulated::{Copies, Order},
        device::gpu::Gpu,
        tape::Tape,
    };

    #[test]
    fn all_keys_named_out_of_order_change_nothing() {
        let qkv = Tensor::from_slice(&[1, 4, 24], &numbers("attention", 0, &[96])).unwrap();
        let x = Var::constant(qkv);
        let request = Request { keys: Some(Tensor::from_slice(&[1, 4], &[2u32, 0, 3, 1]).unwrap()), class_rows: true };
        let (some, rows) = x.attention_with(2, &request).unwrap();
        let all = x.attention(2).unwrap();
        for (a, b) in some.value().to_f64().iter().zip(all.value().to_f64()) {
            approx::assert_relative_eq!(*a, b, max_relative = 1e-12);
        }
        let sum: f64 = mean_over_heads(&rows.unwrap()).unwrap().to_f64().iter().sum();
        approx::assert_relative_eq!(sum, 1.0, max_relative = 1e-12);
    }

    #[test]
    fn keys_that_repeat_or_lie_outside_are_refused() {
        let x = Var::constant(Tensor::zeros(&[1, 4, 24], Dtype::F32).unwrap());
        for ids in [[1u32, 1], [0, 4]] {
            let request = Request { keys: Some(Tensor::from_slice(&[1, 2], &ids).unwrap()), class_rows: false };
            assert!(x.attention_with(2, &request).is_err());
        }
    }

    /// Distinct tokens out of order, N being no multiple of 7.
    #[cfg(feature = "emulated")]
    fn some(n: usize, keys: usize) -> Tensor {
        let ids: Vec<u32> = (0..keys).map(|i| ((i * 7 + 3) % n) as u32).collect();
        Tensor::from_slice(&[1, keys], &ids).unwrap()
    }

    #[cfg(feature = "emulated")]
    /// f32, and bf16 in each version; each in several orders of threads.
    fn every_form(gpu: &Gpu, mut f: impl FnMut(Dtype, &str)) {
        for seed in 0..4 {
            let copies = if seed == 0 { Copies::Late } else { Copies::ByChance };
            gpu.as_emulated().unwrap().order(Order { seed, copies });
            f(Dtype::F32, "v1");
            for version in VERSIONS.all {
                gpu.choose(&VERSIONS, version).unwrap();
                f(Dtype::Bf16, version);
            }
        }
    }

    #[test]
    #[cfg(feature = "emulated")]
    fn class_rows_of_every_kernel_are_the_definition() {
        let gpu = Gpu::emulated().unwrap();
        let device = Device::Gpu(gpu.clone());
        // One token; a strip and a bit; more than two tiles of the long kernels, with all keys and with some.
        for (n, heads, width, keys) in
            [(1, 2, 8, None), (33, 3, 20, None), (33, 3, 20, Some(18)), (150, 1, 16, None), (150, 1, 16, Some(133))]
        {
            let shape = [1, n, 3 * heads * width];
            let numbers = numbers("class rows", 0, &shape);
            let qkv = Tensor::from_slice(&shape, &numbers).unwrap().cast(Dtype::Bf16).unwrap();
            let request = Request { keys: keys.map(|keys| some(n, keys)), class_rows: true };
            let exact = Var::constant(qkv.cast(Dtype::F64).unwrap());
            let exact = exact.attention_with(heads, &request).unwrap().1.unwrap();
            every_form(&gpu, |dtype, version| {
                let qkv = qkv.cast(Dtype::F32).unwrap().cast(dtype).unwrap();
                let x = Var::constant(qkv.on(&device).unwrap());
                let rows = x.attention_with(heads, &request).unwrap().1.unwrap();
                assert_eq!((rows.shape(), rows.dtype()), (exact.shape(), Dtype::F32));
                let mean = mean_over_heads(&rows).unwrap();
                let pairs = [(rows, exact.clone()), (mean, mean_over_heads(&exact).unwrap())];
                for (got, want) in pairs {
                    for (got, want) in got.on(&Device::Cpu).unwrap().to_f64().iter().zip(want.to_f64()) {
                        assert!((got - want).abs() <= 2e-6, "{n} tokens, {keys:?} keys, {dtype} {version}: {got} but {want}");
                    }
                }
            });
        }
    }

    #[test]
    #[cfg(feature = "emulated")]
    fn the_longest_sequences_are_served() {
        // The most that may lie in shared memory, and the most there are.
        for n in [272, 1025] {
            a_sequence_is_served(n);
        }
    }

    #[cfg(feature = "emulated")]
    fn a_sequence_is_served(n: usize) {
        let device = Device::Gpu(Gpu::emulated().unwrap());
        let half = |i: usize, c: usize| Tensor::from_slice(&[1, n, c], &numbers("long", i, &[n, c])).unwrap().cast(Dtype::Bf16).unwrap();
        let (qkv, upstream) = (half(0, 48), half(1, 16));
        let run = |attention: &dyn Fn(&Var) -> Var, device: &Device, dtype: Dtype| {
            let tape = Tape::new();
            let x = tape.leaf(qkv.cast(dtype).unwrap().on(device).unwrap());
            let y = attention(&x);
            let dx = tape.backward_from(&y, upstream.cast(dtype).unwrap().on(device).unwrap(), &mut []).unwrap();
            [y.value(), dx.of(&x).unwrap()].map(|x| x.on(&Device::Cpu).unwrap())
        };
        let exact = run(&|x| x.attention(1).unwrap(), &Device::Cpu, Dtype::F64);
        let plain = run(&|x| cases::with_rounding(x, 1, None).unwrap(), &Device::Cpu, Dtype::F64);
        let got = run(&|x| x.attention(1).unwrap(), &device, Dtype::Bf16);
        let distance = |a: &Tensor, b: &Tensor| a.to_f64().iter().zip(b.to_f64()).fold(0.0f64, |most, (a, b)| most.max((a - b).abs()));
        for ((got, exact), plain) in got.iter().zip(&exact).zip(&plain) {
            let (error, allowed) = (distance(got, exact), 2.0 * distance(&plain.cast(Dtype::Bf16).unwrap(), exact));
            assert!(error <= allowed, "{n} tokens: off by {error}, allowed are {allowed}");
        }
    }

    #[test]
    #[cfg(feature = "emulated")]
    fn a_bad_key_that_is_already_on_the_device_is_an_error_with_the_place() {
        let gpu = Gpu::emulated().unwrap();
        let device = Device::Gpu(gpu.clone());
        let keys = Tensor::from_slice(&[1, 2], &[0u32, 9]).unwrap().on(&device).unwrap();
        let request = Request { keys: Some(keys), class_rows: false };
        every_form(&gpu, |dtype, version| {
            let x = Var::constant(Tensor::zeros_on(&device, &[1, 4, 48], dtype).unwrap());
            let error = x.attention_with(1, &request).err().expect("key 9 of 4").chain();
            for part in [&format!("attention_fwd_{version}_{dtype}_d16"), "index 9 is outside 0..4", "in block (", "thread ("] {
                assert!(error.contains(part), "{error}");
            }
        });
    }

    #[test]
    fn heads_that_are_too_wide_are_refused_in_a_sentence() {
        let devices = [
            Device::Cpu,
            #[cfg(feature = "emulated")]
            Device::Gpu(Gpu::emulated().unwrap()),
        ];
        for device in devices {
            let x = Var::constant(Tensor::zeros_on(&device, &[1, 2, 3 * 129], Dtype::F32).unwrap());
            let error = x.attention(1).err().expect("129 is more than 128").chain();
            assert_eq!(error, "attention: heads of width 129 are wider than 128; use more heads");
        }
    }
}
