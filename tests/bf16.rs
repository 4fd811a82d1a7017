//! bf16 on the CPU: products that round their factors, everything between them f32. One test at a time: it holds for the whole program.

use masque::device::gemm;
use masque::device::{Named, Precision};
use masque::measure::subject::{Point, Subject, SubjectArgs, System};
use masque::tape::Tape;
use masque::tensor::Device;
use std::sync::Mutex;

static ONE: Mutex<()> = Mutex::new(());

#[derive(clap::Parser)]
struct Typed {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    point: Point,
}

/// Loss and all gradients of a step.
fn step(system: System, device: Named, precision: Precision) -> (f64, Vec<f64>) {
    let flags = "measure --model glyph_t --image-size 48 --batch 3 --decoder-dim 48 --decoder-depth 2 --decoder-heads 3 --classes 10";
    let Typed { subject, point } = <Typed as clap::Parser>::parse_from(flags.split_whitespace());
    let teacher = system.has_teacher().then(|| "glyph_s".to_string());
    let mut s: Subject = SubjectArgs { method: system, device, precision, teacher, ..subject }.open(&point).unwrap();
    let tape = Tape::new();
    let loss = s.method.loss(&tape, &s.batch, &s.rng).unwrap().total;
    let value = loss.value().read().unwrap()[0];
    tape.backward(&loss, &mut [s.method.params()]).unwrap();
    let params = s.method.params();
    let gradients = params.trained().filter_map(|id| params.gradient(id)).flat_map(|gradient| gradient.read().unwrap()).collect();
    (value, gradients)
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    length(&mut a.iter().zip(b).map(|(a, b)| a - b)) / length(&mut b.iter().copied())
}

/// Whether there is something to test; where there is not, it is refused.
fn here() -> bool {
    if !gemm::has_bf16() {
        let error = Device::Cpu.compute_in(Precision::Bf16).unwrap_err().chain();
        assert!(error.contains("does not multiply bf16"), "{error}");
        println!("skipped: this processor does not multiply bf16 numbers");
    }
    gemm::has_bf16()
}

#[test]
fn every_system_is_as_near_to_f32_as_the_gpus_bf16_is() {
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !here() {
        return;
    }
    for system in System::ALL {
        let (exact, gradients) = step(system, Named::Cpu, Precision::F32);
        let (loss, rounded) = step(system, Named::Cpu, Precision::Bf16);
        let (again, _) = step(system, Named::Cpu, Precision::F32);
        assert_eq!(exact, again, "{}: f32 is f32 again", system.name());
        assert!(loss != exact && (loss - exact).abs() < 0.02 * exact.abs(), "{}: {loss} for {exact}", system.name());
        let off = apart(&rounded, &gradients);
        assert!(off > 1e-4 && off < 0.05, "{}: gradients are {off} apart", system.name());
        #[cfg(feature = "emulated")]
        {
            let gpu = step(system, Named::Emulated, Precision::Bf16).1;
            assert!(off <= apart(&gpu, &gradients), "{}: {off}, the device {}", system.name(), apart(&gpu, &gradients));
        }
    }
}

#[test]
fn a_rounded_product_does_not_depend_on_the_number_of_threads() {
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !here() {
        return;
    }
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| step(System::Mae, Named::Cpu, Precision::Bf16))
    };
    assert_eq!(run(1), run(3));
}
