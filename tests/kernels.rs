//! Every kernel is the definition: each case of each op on the emulated device, in f32 and bf16, in every version, in several orders of threads, blocks and
//! asynchronous copies. Where there is a CUDA device the same cases run on it.
//!
//! f32 may be off by 1e-5 of a tensor's largest value. bf16 may be off by twice what the CPU's own computation is off when it rounds at the same places.
//! On the emulated device the result of an order must be that of any other, bit for bit.

#[cfg(feature = "emulated")]
mod stand_in;

#[cfg(feature = "emulated")]
use masque::device::emulated::{Copies, Order};
use masque::device::gpu::Gpu;
use masque::error::Result;
use masque::ops::{
    self,
    case::{Case, leaves, numbers},
};
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};
#[cfg(feature = "emulated")]
use std::path::Path;

/// Output and the inputs' gradients for the same upstream gradient each time, rounded to `rounding`.
fn run(case: &Case, f: &ops::case::Run, device: &Device, precision: Dtype, rounding: Dtype) -> Result<Vec<Tensor>> {
    let tape = Tape::new();
    let inputs = leaves(case, &tape, &Device::Cpu, rounding)?;
    // The CPU computes in f32 or f64 with numbers that were rounded before.
    let inputs: Vec<Var> = if device.gpu().is_some() {
        drop(inputs);
        leaves(case, &tape, device, precision)?
    } else {
        inputs.iter().map(|x| Ok(tape.leaf(x.value().cast(precision)?))).collect::<Result<_>>()?
    };
    let y = f(&inputs)?;
    let upstream = Tensor::from_slice(y.shape(), &numbers("upstream", 0, y.shape()))?;
    let upstream = if y.shape().is_empty() { upstream } else { upstream.cast(rounding)? };
    let upstream = upstream.cast(y.dtype())?.on(device)?;
    let gradients = tape.backward_from(&y, upstream, &mut [])?;
    let mut all = vec![y.value().on(&Device::Cpu)?];
    for input in &inputs {
        all.push(match gradients.of(input) {
            Some(gradient) => gradient.on(&Device::Cpu)?,
            None => Tensor::zeros(input.shape(), Dtype::F32)?,
        });
    }
    Ok(all)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let worse = |most: f64, (a, b): (&f64, &f64)| if (a - b).abs() > most || (a - b).is_nan() { (a - b).abs() } else { most };
    a.iter().zip(b).fold(0.0, worse)
}

/// Where the GPU's result is not the definition's.
fn compare(case: &Case, what: &str, got: &[Tensor], precision: Dtype) -> Result<()> {
    let exact = run(case, &case.run, &Device::Cpu, Dtype::F64, if precision == Dtype::Bf16 { precision } else { Dtype::F64 })?;
    let plain = case.run_rounded.as_ref().unwrap_or(&case.run);
    let plain = if precision == Dtype::Bf16 { Some(run(case, plain, &Device::Cpu, Dtype::F32, precision)?) } else { None };
    for (i, (got, want)) in got.iter().zip(&exact).enumerate() {
        assert_eq!(got.shape(), want.shape(), "{} {what}: tensor {i}", case.name);
        let (got_numbers, want) = (got.to_f64(), want.to_f64());
        let scale = want.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
        let allowed = match &plain {
            None => 1e-5 * scale,
            Some(plain) => {
                let rounded = plain[i].cast(Dtype::F32)?.cast(got.dtype())?.to_f64();
                2.0 * distance(&rounded, &want) + 1e-5 * scale
            }
        };
        let error = distance(&got_numbers, &want);
        assert!(error <= allowed, "{} {what}: tensor {i} is off by {error:e}, allowed are {allowed:e} at a scale of {scale:e}", case.name);
    }
    Ok(())
}

#[cfg(feature = "emulated")]
fn same_bits(a: &[Tensor], b: &[Tensor]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_f64().iter().zip(b.to_f64()).all(|(a, b)| a.to_bits() == b.to_bits()))
}

#[cfg(feature = "emulated")]
fn orders() -> Vec<Order> {
    let chance = (1..=4).map(|seed| Order { seed, copies: Copies::ByChance });
    [Order { seed: 0, copies: Copies::Early }].into_iter().chain(chance).collect()
}

/// Cases whose name holds this text; all of them if the variable is not set.
fn chosen() -> Vec<Case> {
    let only = std::env::var("MASQUE_CASES").unwrap_or_default();
    ops::cases().into_iter().filter(|case| case.conditioned && case.name.contains(&only)).collect()
}

/// Calls `f` with each version of the case's op chosen.
fn in_every_version(gpu: &Gpu, case: &Case, mut f: impl FnMut(&str)) {
    let Some(versions) = ops::versions().into_iter().find(|versions| versions.op == case.op()) else { return f("") };
    for version in versions.all {
        gpu.choose(versions, version).unwrap();
        f(version);
    }
}

#[cfg(feature = "emulated")]
fn every_case(precision: Dtype) {
    let gpu = Gpu::emulated().unwrap();
    let (device, emulated) = (Device::Gpu(gpu.clone()), gpu.as_emulated().unwrap());
    for case in chosen() {
        in_every_version(&gpu, &case, |version| {
            let what = format!("{precision} {version}");
            let on_gpu =
                || run(&case, &case.run, &device, precision, precision).unwrap_or_else(|e| panic!("{} {what}: {}", case.name, e.chain()));
            emulated.order(Order::default());
            let got = on_gpu();
            compare(&case, &what, &got, precision).unwrap_or_else(|e| panic!("{} {what}: {}", case.name, e.chain()));
            for order in orders() {
                emulated.order(order);
                assert!(same_bits(&got, &on_gpu()), "{} {what}: {order:?} gives other bits than the plain order", case.name);
            }
        });
    }
}

#[cfg(feature = "emulated")]
#[test]
fn every_kernel_is_the_definition_in_f32() {
    every_case(Dtype::F32);
}

#[cfg(feature = "emulated")]
#[test]
fn every_kernel_is_the_definition_in_bf16() {
    every_case(Dtype::Bf16);
}

/// Every launch of every case, in memory of just the size it needs: what `scripts/sanitize` runs again, which has them in a folder of its own.
#[cfg(feature = "emulated")]
#[test]
fn launches_are_written_down() {
    let gpu = Gpu::emulated().unwrap();
    let (device, emulated) = (Device::Gpu(gpu.clone()), gpu.as_emulated().unwrap());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("all.launches");
    if std::env::var_os("MASQUE_LAUNCHES").is_none() {
        gpu.exact(true);
        emulated.trace(&path).unwrap();
    }
    for case in chosen() {
        for precision in [Dtype::F32, Dtype::Bf16] {
            in_every_version(&gpu, &case, |version| {
                let what = format!("{precision} {version}");
                run(&case, &case.run, &device, precision, precision).unwrap_or_else(|e| panic!("{} {what}: {}", case.name, e.chain()));
            });
        }
    }
    emulated.end_trace().unwrap();
}

#[test]
fn a_cuda_device_gives_the_same() {
    #[cfg(feature = "emulated")]
    stand_in::enter();
    let gpu = match Gpu::cuda(0) {
        Ok(gpu) => gpu,
        Err(error) => return println!("skipped: no CUDA device: {}", error.chain()),
    };
    gpu.poison(true);
    let device = Device::Gpu(gpu.clone());
    // All that is wrong is worth knowing: the machine may not be there a second time.
    let mut wrong = Vec::new();
    for case in chosen() {
        for precision in [Dtype::F32, Dtype::Bf16] {
            in_every_version(&gpu, &case, |version| {
                let what = format!("{precision} {version}");
                let check = || compare(&case, &what, &run(&case, &case.run, &device, precision, precision)?, precision);
                match std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => wrong.push(format!("{} {what}: {}", case.name, error.chain())),
                    Err(_) => wrong.push(format!("{} {what}: see above", case.name)),
                }
            });
        }
    }
    for product in gpu.as_real().unwrap().without_cublas() {
        println!("cuBLASLt does not take a product: {product}");
    }
    assert!(wrong.is_empty(), "{} are not the definition:\n{}", wrong.len(), wrong.join("\n"));
}

/// The code for a real GPU, on a stand-in for CUDA's libraries that runs the emulated kernels: with cuBLASLt as it should be, without its bias, and without
/// any algorithm.
#[cfg(feature = "emulated")]
#[test]
fn a_stand_in_for_cuda_gives_the_same() {
    let test = "a_cuda_device_gives_the_same";
    let left_out = |said: String| said.contains("cuBLASLt does not take a product");
    assert!(!left_out(stand_in::run(test, "", None)));
    assert!(!left_out(stand_in::run(test, "no-bias", Some(("MASQUE_CASES", "linear")))));
    assert!(left_out(stand_in::run(test, "no-blas", Some(("MASQUE_CASES", "linear")))));
}
