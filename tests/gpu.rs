//! The device itself, by the example of the emulated one: memory, recorded work, draws, and what it says when something is wrong. What a real one has to do as
//! well is done once more by its code, on a stand-in for CUDA's libraries.
#![cfg(feature = "emulated")]

mod stand_in;

use masque::device::gpu::Gpu;
use masque::device::launch::{Args, KERNELS, Launch};
use masque::error::Result;
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Device, Dtype, Tensor};

fn device() -> (Gpu, Device) {
    let gpu = stand_in::gpu();
    (gpu.clone(), Device::Gpu(gpu))
}

#[test]
fn the_code_for_cuda_does_the_same() {
    for test in [
        "numbers_go_there_and_come_back",
        "fresh_memory_holds_no_numbers",
        "memory_that_was_dropped_is_used_again",
        "recorded_work_is_done_at_each_replay_and_not_before",
        "a_replay_draws_afresh_what_the_cpu_would_draw",
        "nothing_recorded_before_a_draw_writes_over_it",
        "memory_of_a_recording_is_not_handed_out_while_it_lives",
        "a_graph_that_is_dropped_gives_its_memory_back",
        "a_recording_refuses_the_host_and_leaves_the_device_usable",
        "tensors_of_different_devices_do_not_meet",
        "a_weight_in_bf16_has_a_gradient_in_f32",
    ] {
        stand_in::run(test, "", None);
    }
}

fn numbers(device: &Device, values: &[f32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap().on(device).unwrap()
}

#[test]
fn numbers_go_there_and_come_back() {
    let (_, device) = device();
    for n in [0, 1, 7, 1000] {
        let here = Tensor::from_slice(&[n], &Rng::new(1).normal("x", n)).unwrap();
        let there = here.on(&device).unwrap();
        assert_eq!(there.device(), device);
        assert_eq!(there.read().unwrap(), here.to_f64());
        assert_eq!(there.copy().unwrap().read().unwrap(), here.to_f64());
        let half = there.cast(Dtype::Bf16).unwrap();
        assert_eq!(half.read().unwrap(), here.cast(Dtype::Bf16).unwrap().to_f64());
        assert_eq!(there.clone().accumulate(&there).unwrap().read().unwrap(), here.to_f64().iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    }
    let bytes = Tensor::from_slice(&[3], &[0u8, 7, 255]).unwrap();
    assert_eq!(bytes.on(&device).unwrap().cast(Dtype::F32).unwrap().read().unwrap(), [0.0, 7.0, 255.0]);
    assert_eq!(Tensor::full_on(&device, &[5], Dtype::F32, -2.5).unwrap().read().unwrap(), [-2.5; 5]);
    assert_eq!(Tensor::full_on(&device, &[5], Dtype::Bf16, 1.5).unwrap().read().unwrap(), [1.5; 5]);
}

#[test]
fn fresh_memory_holds_no_numbers() {
    let (_, device) = device();
    assert!(Tensor::empty_on(&device, &[100], Dtype::F32).unwrap().read().unwrap().iter().all(|x| x.is_nan()));
}

#[test]
fn memory_that_was_dropped_is_used_again() {
    let (gpu, device) = device();
    let sizes = || (1..20).map(|i| Tensor::zeros_on(&device, &[i * 1000], Dtype::F32).unwrap()).collect::<Vec<_>>();
    drop(sizes());
    let taken = gpu.memory().1;
    (0..5).for_each(|_| drop(sizes()));
    assert_eq!(gpu.memory().1, taken);
}

#[test]
fn recorded_work_is_done_at_each_replay_and_not_before() {
    let (gpu, device) = device();
    let mut x = numbers(&device, &[1.0, 2.0]);
    let (graph, y) = gpu
        .capture(|| {
            let sum = Var::constant(x.clone()).add(&Var::constant(x.clone()))?;
            sum.add(&Var::constant(x.clone()))
        })
        .unwrap();
    assert_ne!(y.value().read().unwrap(), [3.0, 6.0]);
    graph.replay(&Rng::new(0)).unwrap();
    assert_eq!(y.value().read().unwrap(), [3.0, 6.0]);
    x.upload(&Tensor::from_slice(&[2], &[10.0f32, -1.0]).unwrap()).unwrap();
    graph.replay(&Rng::new(0)).unwrap();
    assert_eq!(y.value().read().unwrap(), [30.0, -3.0]);
}

#[test]
fn a_replay_draws_afresh_what_the_cpu_would_draw() {
    let (gpu, device) = device();
    let rng = Rng::new(5);
    let (graph, u) = gpu.capture(|| Tensor::drawn(&device, &rng, "mask", &[2, 3])).unwrap();
    for step in 0..3 {
        graph.replay(&rng.at(step)).unwrap();
        assert_eq!(u.read().unwrap(), rng.at(step).uniform("mask", 6).unwrap().iter().map(|&u| u as f64).collect::<Vec<_>>());
    }
}

#[test]
fn nothing_recorded_before_a_draw_writes_over_it() {
    let (gpu, device) = device();
    let x = numbers(&device, &[1.0; 6]);
    drop((0..4).map(|_| x.copy().unwrap()).collect::<Vec<_>>());
    let (graph, u) = gpu
        .capture(|| {
            drop(x.copy()?);
            let u = Tensor::drawn(&device, &Rng::new(5), "mask", &[6])?;
            drop(x.copy()?);
            Ok(u)
        })
        .unwrap();
    graph.replay(&Rng::new(5)).unwrap();
    assert_eq!(u.read().unwrap(), Tensor::drawn(&Device::Cpu, &Rng::new(5), "mask", &[6]).unwrap().to_f64());
}

#[test]
fn memory_of_a_recording_is_not_handed_out_while_it_lives() {
    let (gpu, device) = device();
    let x = numbers(&device, &[1.0; 64]);
    let (graph, y) = gpu
        .capture(|| {
            let a = Var::constant(x.clone()).add(&Var::constant(x.clone()))?; // freed before the end
            Var::constant(x.clone()).add(&a)
        })
        .unwrap();
    let others: Vec<Tensor> = (0..8).map(|i| Tensor::full_on(&device, &[64], Dtype::F32, i as f64).unwrap()).collect();
    graph.replay(&Rng::new(0)).unwrap();
    assert_eq!(y.value().read().unwrap(), [3.0; 64]);
    for (i, other) in others.iter().enumerate() {
        assert_eq!(other.read().unwrap(), [i as f64; 64]);
    }
}

#[test]
fn a_graph_that_is_dropped_gives_its_memory_back() {
    let (gpu, device) = device();
    let x = numbers(&device, &[1.0; 4096]);
    let record = || gpu.capture(|| Var::constant(x.clone()).add(&Var::constant(x.clone()))).map(drop).unwrap();
    record();
    let taken = gpu.memory().1;
    (0..5).for_each(|_| record());
    assert_eq!(gpu.memory().1, taken);
}

#[test]
fn a_recording_refuses_the_host_and_leaves_the_device_usable() {
    let (gpu, device) = device();
    let x = numbers(&device, &[1.0]);
    let error = gpu.capture(|| Tensor::from_slice(&[1], &[1.0f32])?.on(&device)).err().unwrap().chain();
    assert!(error.contains("recorded work cannot copy from the host"), "{error}");
    let error = gpu.capture(|| x.read()).err().unwrap().chain();
    assert!(error.contains("no numbers to read yet"), "{error}");
    let error = gpu.capture(|| gpu.capture(|| Ok(())).map(|_| ())).err().unwrap().chain();
    assert!(error.contains("being recorded already"), "{error}");
    let error = gpu.capture(|| gpu.wait()).err().unwrap().chain();
    assert!(error.contains("recorded work is not waited for"), "{error}");
    let (graph, _) = gpu.capture(|| x.copy()).unwrap();
    let error = gpu.capture(|| graph.replay(&Rng::new(0))).err().unwrap().chain();
    assert!(error.contains("not replayed inside a recording"), "{error}");
    assert_eq!(x.read().unwrap(), [1.0]);
    assert_eq!(Var::constant(x.clone()).add(&Var::constant(x)).unwrap().value().read().unwrap(), [2.0]);
}

#[test]
fn eight_numbers_at_once_and_the_tail_one_by_one() {
    let (gpu, device) = device();
    for n in [1, 7, 8, 2049, 2056] {
        let bytes: Vec<u8> = (0..n).map(|i| (i * 37 % 251) as u8).collect();
        let want: Vec<f64> = bytes.iter().map(|&x| f64::from(x)).collect();
        let bytes = Tensor::from_slice(&[n], &bytes).unwrap().on(&device).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let x = bytes.cast(dtype).unwrap();
            let other = if dtype == Dtype::F32 { Dtype::Bf16 } else { Dtype::F32 };
            assert_eq!(x.read().unwrap(), want, "{n} bytes as {dtype}");
            assert_eq!(x.cast(other).unwrap().read().unwrap(), want, "{n} of {dtype} as {other}");
            let same = Tensor::full_on(&device, &[n], dtype, -1.5).unwrap();
            assert_eq!(same.read().unwrap(), vec![-1.5; n], "{n} of {dtype}");
            let sum = same.accumulate(&Tensor::full_on(&device, &[n], dtype, 3.5).unwrap()).unwrap();
            assert_eq!(sum.read().unwrap(), vec![2.0; n], "the sum of {n} of {dtype}");
        }
        let (mut sum, x) = (Tensor::zeros_on(&device, &[], Dtype::F32).unwrap(), bytes.cast(Dtype::F32).unwrap());
        gpu.launch("sum_f32", Launch::new(1, 1024), Args::new().out(&mut sum).input(&x).int(n).float(0.5)).unwrap();
        assert_eq!(sum.read().unwrap(), [want.iter().sum::<f64>() / 2.0], "the sum of {n}");
    }
}

#[test]
fn a_panic_ends_the_recording() {
    let (gpu, device) = device();
    let x = numbers(&device, &[1.0]);
    let panicked =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| gpu.capture(|| -> Result<()> { panic!("on purpose") }).map(drop)));
    assert!(panicked.is_err() && !gpu.is_recording());
    assert_eq!(Var::constant(x.clone()).add(&Var::constant(x)).unwrap().value().read().unwrap(), [2.0]);
}

#[test]
fn wrong_launches_are_one_sentence() {
    let (gpu, device) = device();
    let (mut y, x) = (numbers(&device, &[0.0; 8]), numbers(&device, &[1.0; 8]));
    let error = gpu.launch("no_such_kernel", Launch::new(1, 32), Args::new()).unwrap_err().chain();
    assert_eq!(error, "emulated: there is no kernel no_such_kernel");
    let error = gpu.launch("add_f32", Launch::new(1, 256), Args::new().out(&mut y).input(&x).int(8)).unwrap_err().chain();
    assert_eq!(error, "emulated: kernel add_f32: it takes the arguments pppl but was given ppi");
    let error = gpu.launch("fill_32", Launch::new(1, 2048), Args::new().out(&mut y).int(0).long(8)).unwrap_err().chain();
    assert!(error.contains("cannot be launched as [1, 1, 1] blocks of 2048 threads"), "{error}");
    let error = gpu.launch("fill_32", Launch::new(1, 32).shared(1 << 20), Args::new().out(&mut y).int(0).long(8)).unwrap_err().chain();
    assert!(error.contains("needs 1048576 bytes of shared memory but a block has 232448"), "{error}");
    let error = gpu.launch("sum_f32", Launch::new(1, 32), Args::new().out(&mut y).input(&x).int(1 << 31).float(1.0)).unwrap_err().chain();
    let want = "emulated: kernel sum_f32: a size of 2147483648 is more than the 2147483647 that it can count to; make the batch smaller";
    assert_eq!(error, want);
    assert_eq!(x.read().unwrap(), [1.0; 8]);
}

#[test]
fn more_memory_than_there_is_is_one_sentence() {
    let (_, device) = device();
    let error = Tensor::empty_on(&device, &[1 << 40], Dtype::F32).unwrap_err().chain();
    assert!(error.starts_with("emulated: no memory for ") && error.contains("make the batch or the model smaller"), "{error}");
    assert_eq!(numbers(&device, &[3.0]).read().unwrap(), [3.0]);
}

#[test]
fn tensors_of_different_devices_do_not_meet() {
    let ((_, one), (_, other)) = (device(), device());
    let (a, b) = (numbers(&one, &[1.0]), numbers(&other, &[1.0]));
    assert!(a.clone().accumulate(&b).unwrap_err().to_string().contains("different devices"));
    assert!(a.replace(&b).unwrap_err().to_string().contains("different devices"));
}

#[test]
fn kernels_are_sorted_by_name_and_have_an_emulated_form() {
    assert!(KERNELS.is_sorted_by_key(|kernel| kernel.name));
    assert!(KERNELS.iter().all(|kernel| kernel.entry.is_some()));
}

#[test]
fn a_weight_in_bf16_has_a_gradient_in_f32() {
    let (_, device) = device();
    let tape = Tape::new();
    let half = |values: &[f32], shape: &[usize]| Tensor::from_slice(shape, values).unwrap().cast(Dtype::Bf16).unwrap().on(&device).unwrap();
    let (x, w) = (tape.leaf(half(&[1.0, 2.0], &[1, 2])), tape.weight(half(&[0.5, 0.25], &[1, 2])));
    let y = x.linear(&w, None).unwrap();
    let gradients = tape.backward_from(&y, half(&[3.0], &[1, 1]), &mut []).unwrap();
    let (dx, dw) = (gradients.of(&x).unwrap(), gradients.of(&w).unwrap());
    assert_eq!((dx.dtype(), dw.dtype()), (Dtype::Bf16, Dtype::F32));
    assert_eq!((dx.read().unwrap(), dw.read().unwrap()), (vec![1.5, 0.75], vec![3.0, 6.0]));
}
