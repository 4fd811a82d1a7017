//! NCCL: how it is found under the name that pip gives it, and one rank's end of a group. What needs a GPU runs on a real one where there is one and NCCL with
//! it, says "not run" where not, and always on the stand-in, where two ranks are two threads, each on a device of its own.

mod common;
mod stand_in;

use common::Scratch;
use masque::device::gpu::Gpu;
use masque::device::real::{Nccl, Numbers, distinct, machine};
use masque::error::{Error, Result};
use masque::rng::Rng;
use masque::tape::Var;
use masque::tensor::{Device, Dtype, Tensor};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

fn nothing() -> Result<()> {
    Ok(())
}

/// A real GPU or the stand-in's, if NCCL can be used with it.
fn gpu() -> Option<(Gpu, Device)> {
    let stands_in = stand_in::enter();
    match Gpu::cuda(0).and_then(|gpu| Nccl::id().map(|_| gpu)) {
        Ok(gpu) => Some((gpu.clone(), Device::Gpu(gpu))),
        Err(error) => {
            assert!(!stands_in, "{}", error.chain());
            println!("not run: no GPU with NCCL: {}", error.chain());
            None
        }
    }
}

fn alone(gpu: &Gpu) -> Nccl {
    Nccl::join(gpu, &Nccl::id().unwrap(), 0, 1, LONG, &mut nothing).unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// f(rank, its device, its end) on a thread for each of two ranks; on the stand-in only.
fn two(f: impl Fn(usize, &Device, Nccl) + Sync) {
    let id = Nccl::id().unwrap();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let f = &f;
            scope.spawn(move || {
                let gpu = Gpu::cuda(rank).unwrap();
                gpu.poison(true);
                let nccl = Nccl::join(&gpu, &id, rank, 2, LONG, &mut nothing).unwrap_or_else(|error| panic!("{}", error.chain()));
                f(rank, &Device::Gpu(gpu), nccl);
            });
        }
    });
}

fn numbers(device: &Device, values: &[f64], dtype: Dtype) -> Tensor {
    let tensor = match dtype {
        Dtype::F64 => Tensor::from_slice(&[values.len()], values),
        Dtype::U8 => Tensor::from_slice(&[values.len()], &values.iter().map(|&x| x as u8).collect::<Vec<_>>()),
        Dtype::U32 => Tensor::from_slice(&[values.len()], &values.iter().map(|&x| x as u32).collect::<Vec<_>>()),
        _ => Tensor::from_slice(&[values.len()], &values.iter().map(|&x| x as f32).collect::<Vec<_>>()),
    };
    let tensor = tensor.unwrap();
    if dtype == Dtype::Bf16 { tensor.cast(dtype).unwrap().on(device).unwrap() } else { tensor.on(device).unwrap() }
}

fn all(tensor: &mut Tensor) -> Numbers<'_> {
    let (dtype, len) = (tensor.dtype(), tensor.numel());
    Numbers::of(tensor, dtype, len)
}

/// What is on the device, for any kind of number.
fn read(tensor: &Tensor) -> Vec<f64> {
    tensor.on(&Device::Cpu).unwrap().to_f64()
}

/// The sum of two tensors, put on the device's stream.
fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(Var::constant(a.clone()).add(&Var::constant(b.clone()))?.value().clone())
}

#[cfg(feature = "emulated")]
#[test]
fn the_stand_in_is_used() {
    for test in [
        "alone_every_exchange_gives_what_it_was_given",
        "a_recorded_exchange_is_done_at_each_replay",
        "a_recording_without_fork_or_join_back_is_refused",
        "what_cannot_be_joined_is_refused",
        "an_exchange_settles",
        "a_graph_keeps_the_group_that_it_uses",
        "two_ranks_exchange_in_all_ways",
        "two_ranks_replay_what_they_recorded",
        "one_gpu_takes_one_rank",
        "a_rank_that_never_comes_is_not_waited_for",
    ] {
        stand_in::run(test, "", None);
    }
    for how in ["nccl-hangs", "nccl-lost", "nccl-fails", "nccl-old"] {
        stand_in::run("a_failure_is_a_sentence_and_holds_nobody_up", how, None);
    }
}

#[test]
fn alone_every_exchange_gives_what_it_was_given() {
    let Some((gpu, device)) = gpu() else { return };
    let nccl = alone(&gpu);
    let values: Vec<f64> = (0..1000).map(|i| f64::from(i % 200)).collect();
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F64, Dtype::U32, Dtype::U8] {
        let mut x = numbers(&device, &values, dtype);
        nccl.fork().unwrap();
        nccl.all_reduce(all(&mut x)).unwrap();
        nccl.reduce_scatter(all(&mut x), std::slice::from_ref(&(0..1000))).unwrap();
        nccl.reduce_scatter(all(&mut x), std::slice::from_ref(&(7..900))).unwrap();
        nccl.all_gather(all(&mut x), std::slice::from_ref(&(3..1000))).unwrap();
        nccl.broadcast(all(&mut x), 0).unwrap();
        nccl.all_reduce(all(&mut x).part(5..5)).unwrap();
        nccl.all_reduce(all(&mut x).part(10..990)).unwrap();
        nccl.join_back().unwrap();
        assert_eq!(read(&x), values, "{dtype}");
    }
    let mut x = numbers(&device, &values, Dtype::F32);
    let wrong = |result: Result<()>| result.unwrap_err().chain();
    assert!(wrong(nccl.broadcast(all(&mut x), 1)).contains("rank 1 of 1 does not exist"));
    assert!(wrong(nccl.all_gather(all(&mut x), &[0..1, 1..2])).contains("all-gather: there are 2 parts for 1 ranks"));
    assert!(
        wrong(nccl.reduce_scatter(all(&mut x), std::slice::from_ref(&(0..1001)))).contains("reduce-scatter: part 0..1001 of 1000 numbers")
    );
    // A wrong call is no failure of the group.
    nccl.all_reduce(all(&mut x)).unwrap();
    nccl.settle(LONG, &mut nothing).unwrap();
    assert_eq!((nccl.rank(), nccl.world()), (0, 1));
}

/// x + x, exchanged, and x added once more: recorded, the exchange on the side.
fn record(device: &Device, nccl: &Nccl, x: &Tensor) -> (masque::device::gpu::Graph, Tensor) {
    let recorded = device.gpu().unwrap().capture(|| {
        let mut y = add(x, x)?;
        nccl.fork()?;
        nccl.all_reduce(all(&mut y))?;
        // Meanwhile the device does something else.
        let other = add(x, x)?;
        nccl.join_back()?;
        add(&add(&y, x)?, &other)
    });
    recorded.unwrap_or_else(|error| panic!("{}", error.chain()))
}

#[test]
fn a_recorded_exchange_is_done_at_each_replay() {
    let Some((gpu, device)) = gpu() else { return };
    let nccl = alone(&gpu);
    let mut x = numbers(&device, &[1.0, -2.0, 3.0], Dtype::F32);
    let (graph, y) = record(&device, &nccl, &x);
    for step in 1..4 {
        x.upload(&numbers(&Device::Cpu, &[1.0, f64::from(step), 3.0], Dtype::F32)).unwrap();
        graph.replay(&Rng::new(0)).unwrap();
        nccl.settle(LONG, &mut nothing).unwrap();
        assert_eq!(read(&y), [5.0, 5.0 * f64::from(step), 15.0]);
    }
}

#[test]
fn a_recording_without_fork_or_join_back_is_refused() {
    let Some((gpu, device)) = gpu() else { return };
    let nccl = alone(&gpu);
    let mut x = numbers(&device, &[1.0, 2.0], Dtype::F32);
    let said = gpu.capture(|| nccl.all_reduce(all(&mut x))).map(drop).unwrap_err().chain();
    assert!(said.contains("gpu:0: all-reduce inside a recording has to come behind a fork"), "{said}");
    let said = gpu.capture(|| nccl.settle(LONG, &mut nothing)).map(drop).unwrap_err().chain();
    assert!(said.contains("gpu:0: recorded work is not waited for"), "{said}");
    let unjoined = gpu.capture(|| nccl.fork().and_then(|()| nccl.all_reduce(all(&mut x))));
    assert!(unjoined.map(drop).unwrap_err().chain().contains("ending to record"));
    // Both streams are as before.
    nccl.fork().unwrap();
    nccl.all_reduce(all(&mut x)).unwrap();
    nccl.settle(LONG, &mut nothing).unwrap();
    assert_eq!(read(&x), [1.0, 2.0]);
    let (graph, y) = record(&device, &nccl, &x);
    graph.replay(&Rng::new(0)).unwrap();
    assert_eq!(read(&y), [5.0, 10.0]);
}

#[test]
fn what_cannot_be_joined_is_refused() {
    let Some((gpu, _)) = gpu() else { return };
    let id = Nccl::id().unwrap();
    assert_ne!(id, Nccl::id().unwrap());
    let said = |gpu: &Gpu, id: &[u8; 128], rank, world| Nccl::join(gpu, id, rank, world, LONG, &mut nothing).map(drop).unwrap_err().chain();
    assert!(said(&gpu, &[0; 128], 0, 1).contains("the id of NCCL's group is all zeros; it has to come from rank 0"));
    assert!(said(&gpu, &id, 1, 1).contains("rank 1 of 1 does not exist"));
    assert!(said(&gpu, &id, 0, 0).contains("rank 0 of 0 does not exist"));
    #[cfg(feature = "emulated")]
    assert!(said(&Gpu::emulated().unwrap(), &id, 0, 1).contains("NCCL is for GPUs, and the device is emulated"));
}

#[test]
fn an_exchange_settles() {
    let Some((gpu, device)) = gpu() else { return };
    let nccl = alone(&gpu);
    let mut x = numbers(&device, &vec![1.5; 1 << 16], Dtype::F32);
    for _ in 0..3 {
        nccl.fork().unwrap();
        nccl.all_reduce(all(&mut x)).unwrap();
        nccl.settle(LONG, &mut nothing).unwrap();
    }
    nccl.settle(LONG, &mut nothing).unwrap();
    assert_eq!(read(&x), vec![1.5; 1 << 16]);
    // Another rank's failure, heard of by other means.
    nccl.give_up("rank 3 has stopped");
    let said = nccl.all_reduce(all(&mut x)).unwrap_err().chain();
    assert_eq!(said, "the exchange between GPUs was given up before: rank 3 has stopped");
    assert!(nccl.settle(LONG, &mut nothing).unwrap_err().chain().contains("rank 3 has stopped"));
    let start = Instant::now();
    drop(nccl);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(read(&x), vec![1.5; 1 << 16]);
}

#[test]
fn a_graph_keeps_the_group_that_it_uses() {
    let Some((gpu, device)) = gpu() else { return };
    let start = Instant::now();
    let nccl = alone(&gpu);
    let x = numbers(&device, &[1.0, 2.0], Dtype::F32);
    let (graph, y) = record(&device, &nccl, &x);
    drop(nccl);
    graph.replay(&Rng::new(0)).unwrap();
    assert_eq!(read(&y), [5.0, 10.0]);
    if stand_in::enter() {
        assert_eq!((stand_in::call("stand_in_ended_well"), stand_in::call("stand_in_ended_badly")), (0, 0));
    }
    drop(graph);
    if stand_in::enter() {
        assert_eq!((stand_in::call("stand_in_ended_well"), stand_in::call("stand_in_ended_badly")), (1, 0));
    }
    assert!(start.elapsed() < Duration::from_secs(9), "its end waited for something");
}

#[test]
fn two_ranks_exchange_in_all_ways() {
    if !stand_in::enter() {
        return;
    }
    // Even, with a gap, of two lengths, with an empty one, the whole not covered.
    let splits: [[Range<usize>; 2]; 6] = [[0..5, 5..10], [2..5, 5..8], [0..3, 3..10], [0..4, 6..10], [0..0, 0..10], [1..9, 9..9]];
    two(|rank, device, nccl| {
        let mine: Vec<f64> = (0..10).map(|i| f64::from(i) + 20.0 * rank as f64).collect();
        let sums: Vec<f64> = (0..10).map(|i| 2.0 * f64::from(i) + 20.0).collect();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            // Made by the device right before and used by it right behind, so that each fork and join_back is needed.
            let half = numbers(device, &mine.iter().map(|x| x / 2.0).collect::<Vec<_>>(), dtype);
            let zeros = numbers(device, &[0.0; 10], dtype);
            let exchanged = |f: &dyn Fn(Numbers) -> Result<()>| {
                let mut x = add(&half, &half).unwrap();
                nccl.fork().unwrap();
                f(all(&mut x)).unwrap();
                nccl.join_back().unwrap();
                read(&add(&x, &zeros).unwrap())
            };
            assert_eq!(exchanged(&|x| nccl.all_reduce(x)), sums);
            assert_eq!(exchanged(&|mut x| nccl.all_reduce(x.part(2..4)))[1..5], [mine[1], sums[2], sums[3], mine[4]]);
            for root in 0..2 {
                let root_has: Vec<f64> = (0..10).map(|i| f64::from(i) + 20.0 * root as f64).collect();
                assert_eq!(exchanged(&|x| nccl.broadcast(x, root)), root_has);
            }
            for parts in &splits {
                let own = parts[rank].clone();
                assert_eq!(exchanged(&|x| nccl.reduce_scatter(x, parts))[own.clone()], sums[own], "{parts:?}");
                let owner = |i: usize| parts.iter().position(|part| part.contains(&i)).unwrap_or(rank);
                let gathered: Vec<f64> = (0..10).map(|i| i as f64 + 20.0 * owner(i) as f64).collect();
                assert_eq!(exchanged(&|x| nccl.all_gather(x, parts)), gathered, "{parts:?}");
            }
        }
        nccl.settle(LONG, &mut nothing).unwrap();
    });
    assert_eq!((stand_in::call("stand_in_ended_well"), stand_in::call("stand_in_ended_badly")), (2, 0));
}

#[test]
fn two_ranks_replay_what_they_recorded() {
    if !stand_in::enter() {
        return;
    }
    two(|rank, device, nccl| {
        let mut x = numbers(device, &[0.0], Dtype::F32);
        let (graph, y) = record(device, &nccl, &x);
        for step in 0..3 {
            let given = [1.0, 10.0].map(|x: f64| x + f64::from(step));
            x.upload(&numbers(&Device::Cpu, &[given[rank]], Dtype::F32)).unwrap();
            graph.replay(&Rng::new(0)).unwrap();
            assert_eq!(read(&y), [2.0 * (given[0] + given[1]) + 3.0 * given[rank]]);
        }
    });
    assert_eq!((stand_in::call("stand_in_ended_well"), stand_in::call("stand_in_ended_badly")), (2, 0));
}

#[test]
fn one_gpu_takes_one_rank() {
    if !stand_in::enter() {
        return;
    }
    let bus = |ordinal| Gpu::cuda(ordinal).unwrap().as_real().unwrap().bus().unwrap();
    assert_eq!((bus(0).as_str(), bus(1).as_str()), ("0000:1A:00.0", "0000:1B:00.0"));
    distinct(&[(machine(), bus(0)), (machine(), bus(1))]).unwrap();
    let said = distinct(&[(machine(), bus(0)), (machine(), bus(1)), (machine(), bus(0))]).unwrap_err().chain();
    assert!(said.contains("the GPU 0000:1A:00.0 of") && said.contains("is used by ranks 0 and 2"), "{said}");
    // NCCL itself says so to whoever did not ask.
    let (id, gpu) = (Nccl::id().unwrap(), Gpu::cuda(0).unwrap());
    let join = |rank, within| Nccl::join(&gpu, &id, rank, 2, within, &mut nothing).map(drop).unwrap_err().chain();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| join(0, Duration::from_millis(1500)));
        std::thread::sleep(Duration::from_millis(500));
        let said = join(1, LONG);
        assert!(said.contains("rank 1 of 2: NCCL, joining the group: invalid usage; run again with NCCL_DEBUG=INFO"), "{said}");
        assert!(first.join().unwrap().contains("waited 1.5 s for all 2 ranks"));
    });
}

#[test]
fn a_rank_that_never_comes_is_not_waited_for() {
    if !stand_in::enter() {
        return;
    }
    let (id, gpu) = (Nccl::id().unwrap(), Gpu::cuda(0).unwrap());
    let said = Nccl::join(&gpu, &id, 1, 2, Duration::from_millis(300), &mut nothing).map(drop).unwrap_err().chain();
    assert!(said.contains("rank 1 waited 0.3 s for all 2 ranks to join NCCL's group; look at what the others say"), "{said}");
    let mut calls = 0;
    let mut heard = || {
        calls += 1;
        if calls < 3 { Ok(()) } else { Err(Error::new("rank 0 has stopped")) }
    };
    let said = Nccl::join(&gpu, &Nccl::id().unwrap(), 1, 2, LONG, &mut heard).map(drop).unwrap_err().chain();
    assert_eq!((said.as_str(), calls), ("rank 0 has stopped", 3));
}

#[test]
fn a_failure_is_a_sentence_and_holds_nobody_up() {
    if !stand_in::enter() {
        return;
    }
    let how = std::env::var("MASQUE_STAND_IN").unwrap();
    let gpu = Gpu::cuda(0).unwrap();
    let device = Device::Gpu(gpu.clone());
    if how.contains("nccl-old") {
        let said = Nccl::id().unwrap_err().chain();
        return assert!(said.contains("NCCL is of version 2.8.4 (") && said.contains("needs 2.14.0 or newer; pip install"), "{said}");
    }
    let start = Instant::now();
    let nccl = alone(&gpu);
    let mut x = numbers(&device, &[1.0; 8], Dtype::F32);
    nccl.fork().unwrap();
    let exchange = nccl.all_reduce(all(&mut x));
    let (said, again) = if how.contains("nccl-fails") {
        (
            exchange.unwrap_err().chain(),
            "NCCL, all-reduce: an error of the stand-in (the stand-in refuses everything); run again with NCCL_DEBUG=INFO",
        )
    } else {
        exchange.unwrap();
        let mut calls = 0;
        let said = nccl.settle(Duration::from_millis(300), &mut || {
            calls += 1;
            Ok(())
        });
        let lost = how.contains("nccl-lost");
        assert!(lost || calls > 10, "{calls}");
        let want = if lost {
            "NCCL, exchanging numbers: remote process exited; run again"
        } else {
            "rank 0 of 1 waited 0.3 s for numbers of the others; "
        };
        (said.unwrap_err().chain(), want)
    };
    assert!(said.starts_with(again), "{said}");
    let said = nccl.all_reduce(all(&mut x)).unwrap_err().chain();
    assert!(said.starts_with("the exchange between GPUs was given up before: ") && said.contains(again), "{said}");
    // What waits for the device is not held up by an exchange that will not end.
    gpu.wait().unwrap();
    drop((nccl, x, device, gpu));
    assert_eq!((stand_in::call("stand_in_ended_well"), stand_in::call("stand_in_ended_badly")), (0, 1));
    assert!(start.elapsed() < Duration::from_secs(8));
}

/// A library with nothing but a version.
fn tiny(folder: &Path, name: &str, soname: &str, version: i32) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("tiny.c"), format!("int ncclGetVersion(int* version) {{ *version = {version}; return 0; }}\n")).unwrap();
    stand_in::library(folder, name, &["tiny.c", &format!("-Wl,-soname,{soname}")]);
    folder.join(name)
}

/// What `masque info` says of NCCL, in an environment without any but the given variables.
fn info(variables: &[(&str, &Path)]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    let output = apart(command.arg("info")).envs(variables.iter().copied()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().find(|line| line.contains("libnccl")).unwrap().to_string()
}

fn apart(command: &mut Command) -> &mut Command {
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "MASQUE_CUDA_LIBS", "MASQUE_NO_CUDA"] {
        command.env_remove(name);
    }
    command.env("PATH", "/nowhere")
}

#[test]
fn nccl_is_found_under_pips_name() {
    let scratch = Scratch::new("nccl-found");
    let environment = scratch.0.join("env");
    let folder = environment.join("lib/python3.11/site-packages/nvidia/nccl/lib");
    let path = tiny(&folder, "libnccl.so.2", "libnccl.so.2", 22_809);
    let want = format!("{} 2.28.9", path.display());
    assert!(info(&[("VIRTUAL_ENV", &environment)]).ends_with(&want));
    assert!(info(&[("CONDA_PREFIX", &environment)]).ends_with(&want));
    assert!(info(&[("MASQUE_CUDA_LIBS", &folder)]).ends_with(&want));
    assert!(info(&[("LD_LIBRARY_PATH", &folder)]).ends_with(&want));
    // Another one, of the very name that the bindings look for, is on the loader's path: the one that is shown is the one that answers.
    let other = scratch.0.join("other");
    tiny(&other, "libnccl.so", "libnccl.so.2", 22_000);
    assert!(info(&[("MASQUE_CUDA_LIBS", &folder), ("LD_LIBRARY_PATH", &other)]).ends_with(&want));
    assert!(info(&[("LD_LIBRARY_PATH", &other)]).ends_with(&format!("{} 2.20.0", other.join("libnccl.so").display())));
    assert!(info(&[("MASQUE_CUDA_LIBS", &other)]).ends_with("2.20.0"));
}

#[test]
fn pips_nccl_is_loaded() {
    let in_environment = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let on_path = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .filter(|folder| folder.join("python3").exists())
        .filter_map(|folder| folder.parent().map(Path::to_path_buf))
        .collect::<Vec<_>>();
    let roots: Vec<PathBuf> = in_environment.into_iter().chain(on_path).collect();
    let folder = roots.iter().find_map(|root| {
        let pythons = std::fs::read_dir(root.join("lib")).ok()?.flatten();
        let folders = pythons.map(|python| python.path().join("site-packages/nvidia/nccl/lib"));
        folders.into_iter().find(|folder| folder.join("libnccl.so.2").is_file()).map(|folder| (root, folder))
    });
    let Some((root, folder)) = folder else {
        return println!("not run: no pip NCCL in VIRTUAL_ENV or beside the python3 of PATH");
    };
    for said in [info(&[("VIRTUAL_ENV", root)]), info(&[("MASQUE_CUDA_LIBS", &folder)])] {
        let version = said.strip_prefix(&format!("libnccl.so.2       {} ", folder.join("libnccl.so.2").display()));
        let version = version.unwrap_or_else(|| panic!("{said}"));
        assert!(version.starts_with("2.") && version.split('.').all(|part| part.parse::<u32>().is_ok()), "{said}");
        println!("NCCL {version}");
    }
}

#[test]
fn nccl_that_is_missing_or_cannot_be_used_is_one_sentence() {
    const CHILD: &str = "MASQUE_TEST_OF_NCCL";
    if std::env::var_os(CHILD).is_some() {
        return println!("said: {}", Nccl::id().unwrap_err().chain());
    }
    let scratch = Scratch::new("nccl-missing");
    let said = |folder: &str, more: &[(&str, &str)]| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = apart(child.args(["nccl_that_is_missing_or_cannot_be_used_is_one_sentence", "--exact", "--nocapture"]));
        let output = child.env(CHILD, "1").env("MASQUE_CUDA_LIBS", scratch.0.join(folder)).envs(more.iter().copied()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find_map(|line| line.split_once("said: ")).map(|(_, said)| said.to_string()).unwrap_or(text)
    };
    assert_eq!(said("", &[("MASQUE_NO_CUDA", "1")]), "CUDA is switched off by MASQUE_NO_CUDA; unset it to use NCCL");
    if !info(&[]).ends_with("not found") {
        return println!("not run: this system has an NCCL");
    }
    let missing = "NCCL (libnccl.so.2) was not found; pip install \"nvidia-nccl-cu13==2.28.*\" into the active environment, or name the folder that holds it \
                   in MASQUE_CUDA_LIBS";
    assert_eq!(said("nowhere", &[]), missing);
    scratch.write("text/libnccl.so.2", "no library");
    assert_eq!(said("text", &[]), missing);
    let path = tiny(&scratch.0.join("other"), "libnccl.so.2", "libother.so", 22_809);
    let other = said("other", &[]);
    assert!(
        other.starts_with(&format!("NCCL is there ({}) but cannot be used: its alias library does not load (", path.display())),
        "{other}"
    );
    assert!(other.ends_with("put a link of the name libnccl.so to it into a folder of LD_LIBRARY_PATH"), "{other}");
    assert!(info(&[("MASQUE_CUDA_LIBS", &scratch.0.join("other"))]).contains("libnccl.so.2 not used: its alias library does not load"));
}
