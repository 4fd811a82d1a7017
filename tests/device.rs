//! Devices by their names, what is said where there is none, and the code for a real GPU on a stand-in for CUDA's libraries.

#[cfg(feature = "emulated")]
mod stand_in;

use masque::device::Named;
use std::process::{Command, Output};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/parity");

fn masque(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    command.args(args);
    command
}

/// The one line on standard error, with this exit code and nothing on standard output.
#[track_caller]
fn refused(output: Output, code: i32) -> String {
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty() && said.lines().count() == 1 && said.starts_with("masque: ") && !said.contains("panicked"), "{said}");
    said.trim().to_string()
}

const PARITY_ON_GPU: [&str; 4] = ["parity", FIXTURES, "--device", "gpu"];

#[test]
fn a_device_is_what_its_name_says() {
    assert_eq!("cpu".parse::<Named>().unwrap(), Named::Cpu);
    assert_eq!("emulated".parse::<Named>().unwrap(), Named::Emulated);
    assert_eq!("gpu".parse::<Named>().unwrap(), Named::Gpu(0));
    assert_eq!("gpu:3".parse::<Named>().unwrap(), Named::Gpu(3));
    assert_eq!(("cuda".parse::<Named>().unwrap(), "cuda:1".parse::<Named>().unwrap()), (Named::Gpu(0), Named::Gpu(1)));
    for name in ["", "GPU", "tpu", "gpu:", "gpu:-1", "gpu:x", "gpu:1:2", "gpu:99999999999999999999"] {
        let said = name.parse::<Named>().unwrap_err();
        assert_eq!(said.exit_code(), 2);
        assert!(said.chain().contains("use cpu, emulated, gpu or gpu:1"), "{}", said.chain());
    }
}

#[test]
fn without_cuda_a_gpu_is_one_sentence() {
    let said = refused(masque(&PARITY_ON_GPU).env("MASQUE_NO_CUDA", "1").output().unwrap(), 1);
    assert_eq!(said, "masque: device gpu:0: CUDA is switched off by MASQUE_NO_CUDA; unset it to use a GPU");
    let said = refused(masque(&["measure", "step", "--device", "gpu:1"]).env("MASQUE_NO_CUDA", "1").output().unwrap(), 1);
    assert!(said.contains("gpu:1") && said.contains("MASQUE_NO_CUDA"), "{said}");
    let said = refused(masque(&["parity", FIXTURES, "--device", "tpu"]).output().unwrap(), 2);
    assert!(said.contains("device tpu is unknown"), "{said}");
    let info = masque(&["info"]).env("MASQUE_NO_CUDA", "1").output().unwrap();
    let said = String::from_utf8(info.stdout).unwrap();
    assert!(info.status.success() && said.contains("gpu        none: CUDA is switched off") && said.contains("not found"), "{said}");
}

#[test]
fn what_only_looks_like_a_driver_is_none() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("no_driver");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("libcuda.so.1"), "no library").unwrap();
    let output = masque(&PARITY_ON_GPU).env("MASQUE_CUDA_LIBS", &folder).env_remove("MASQUE_NO_CUDA").output().unwrap();
    if output.status.success() {
        return println!("skipped: this machine has a driver");
    }
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && !said.contains("panicked"), "{said}");
}

#[cfg(feature = "emulated")]
mod on_a_stand_in {
    use super::*;
    use masque::device::gpu::Gpu;
    use masque::device::launch::{Args, KERNELS, Launch};
    use masque::error::Result;
    use masque::rng::Rng;
    use masque::tape::Var;
    use masque::tensor::{Device, Dtype, Tensor};

    #[test]
    fn each_way_to_have_no_gpu_has_its_own_sentence() {
        for (how, args, want) in [
            ("no-init", &PARITY_ON_GPU, "does not start (CUDA_ERROR_OF_THE_STAND_IN: error number 999); look at nvidia-smi"),
            ("no-device", &PARITY_ON_GPU, "sees no device; look at nvidia-smi and at CUDA_VISIBLE_DEVICES"),
            ("old-driver", &PARITY_ON_GPU, "is for CUDA 12.4 and this program needs 13.0; install driver 580 or newer"),
            ("old-device", &PARITY_ON_GPU, "stand-in 0 has compute capability 7.0 and kernels need 8.0 or newer"),
            ("", &["parity", FIXTURES, "--device", "gpu:7"], "device gpu:7: there is no device 7, the driver sees 2: gpu:0 to gpu:1"),
        ] {
            let said = refused(stand_in::with(&mut masque(args), how), 1);
            assert!(said.contains(want), "{how}: {said}");
        }
    }

    #[test]
    fn info_says_what_there_is() {
        let output = stand_in::with(&mut masque(&["info"]), "");
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{said}");
        for want in [
            "gpu:0      stand-in 0, compute capability 9.0, 1024 MB",
            "gpu:1      stand-in 1",
            "libcuda.so.1 for CUDA 13.0",
            "libcublasLt.so.13 13.0.0",
        ] {
            assert!(said.contains(want), "{want} is not in {said}");
        }
    }

    /// Whether this process is to use the stand-in; where not, there is nothing to see.
    fn gpu() -> Option<(Gpu, Device)> {
        if !stand_in::enter() {
            return None;
        }
        let gpu = Gpu::cuda(0).unwrap_or_else(|error| panic!("{}", error.chain()));
        Some((gpu.clone(), Device::Gpu(gpu)))
    }

    #[test]
    fn the_stand_in_is_used() {
        for test in [
            "everything_that_was_sent_arrives",
            "anything_may_come_first_while_recording",
            "many_threads_share_a_device",
            "mistakes_are_errors",
            "nothing_is_left_behind",
            "a_device_that_failed_says_so_at_each_call",
        ] {
            stand_in::run(&format!("on_a_stand_in::{test}"), "", None);
        }
    }

    /// More than the staging memory holds, in pieces of all sizes, none of which may be overwritten before it has arrived.
    #[test]
    fn everything_that_was_sent_arrives() {
        let Some((_, device)) = gpu() else { return };
        let sizes = [1, 3, 1000, 1 << 20, 5 << 20, 17, (1 << 20) + 1, 7 << 20, 2, 12 << 20];
        let sent: Vec<(Tensor, Tensor)> = (0..30)
            .map(|i| {
                let n = sizes[i % sizes.len()];
                let here = Tensor::from_slice(&[n], &(0..n).map(|j| (i * 31 + j * 7) as u8).collect::<Vec<u8>>()).unwrap();
                (here.on(&device).unwrap(), here)
            })
            .collect();
        for (there, here) in &sent {
            assert!(there.on(&Device::Cpu).unwrap().to_f64() == here.to_f64());
        }
    }

    /// Memory is taken, code loaded and a product planned for the first time.
    #[test]
    fn anything_may_come_first_while_recording() {
        let Some((gpu, device)) = gpu() else { return };
        let mut x = Tensor::from_slice(&[1, 2], &[1.0f32, 2.0]).unwrap().on(&device).unwrap();
        let w = Tensor::from_slice(&[2, 2], &[1.0f32, 1.0, 0.0, 1.0]).unwrap().on(&device).unwrap();
        let (graph, y) = gpu
            .capture(|| {
                let x = Var::constant(x.clone());
                let _room = Tensor::zeros_on(&device, &[123_457], Dtype::F32)?;
                Ok(x.linear(&Var::constant(w.clone()), None)?.add(&x)?.value().clone())
            })
            .unwrap();
        graph.replay(&Rng::new(0)).unwrap();
        assert_eq!(y.read().unwrap(), [4.0, 4.0]);
        x.upload(&Tensor::from_slice(&[1, 2], &[5.0f32, 7.0]).unwrap()).unwrap();
        graph.replay(&Rng::new(0)).unwrap();
        assert_eq!(y.read().unwrap(), [17.0, 14.0]);
    }

    #[test]
    fn many_threads_share_a_device() {
        let Some((gpu, device)) = gpu() else { return };
        std::thread::scope(|scope| {
            for i in 0..8 {
                let device = device.clone();
                scope.spawn(move || {
                    let x = Tensor::from_slice(&[1000], &vec![i as f32; 1000]).unwrap().on(&device).unwrap();
                    let y = Var::constant(x.clone()).add(&Var::constant(x)).unwrap();
                    assert_eq!(y.value().read().unwrap(), vec![2.0 * i as f64; 1000]);
                });
            }
        });
        let milliseconds = gpu.time(|| gpu.scrub()).unwrap();
        assert!(milliseconds > 0.0);
    }

    #[test]
    fn mistakes_are_errors() {
        let Some((gpu, device)) = gpu() else { return };
        let x = Tensor::zeros_on(&device, &[4], Dtype::F32).unwrap();
        let said = |result: Result<()>| result.unwrap_err().chain();
        let wrong = said(gpu.launch("add_f32", Launch::new(1, 256), Args::new().input(&x)));
        assert!(wrong.contains("gpu:0: kernel add_f32: it takes parameters of [8, 8, 8, 8] bytes but was given p"), "{wrong}");
        let wrong = said(gpu.launch("add_f32", Launch::new(1, 256).shared(1 << 20), Args::new()));
        assert!(wrong.contains("1048576 bytes of shared memory but a block has 232448"), "{wrong}");
        let wrong = Tensor::zeros_on(&device, &[1 << 30], Dtype::F32).unwrap_err().chain();
        assert!(wrong.contains("no memory for 4294967296 bytes more") && wrong.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{wrong}");
        for at in 0..KERNELS.len() {
            assert_eq!(gpu.as_real().unwrap().kernel_facts(at).unwrap().registers, 32);
        }
        x.read().unwrap();
    }

    #[test]
    fn nothing_is_left_behind() {
        let Some((gpu, device)) = gpu() else { return };
        let x = Tensor::zeros_on(&device, &[1000], Dtype::F32).unwrap();
        gpu.scrub().unwrap();
        let (graph, _) = gpu.capture(|| Var::constant(x.clone()).add(&Var::constant(x.clone()))).unwrap();
        graph.replay(&Rng::new(0)).unwrap();
        drop((graph, x, device, gpu));
        assert_eq!(stand_in::call("stand_in_held"), 0);
    }

    #[test]
    fn a_device_that_failed_says_so_at_each_call() {
        let Some((gpu, device)) = gpu() else { return };
        let x = Tensor::from_slice(&[4], &[1.0f32; 4]).unwrap().on(&device).unwrap();
        let (graph, _) = gpu.capture(|| Var::constant(x.clone()).add(&Var::constant(x.clone()))).unwrap();
        stand_in::call("stand_in_break");
        let product = || Var::constant(x.reshape(&[2, 2])?).linear(&Var::constant(x.reshape(&[2, 2])?), None).map(drop);
        let calls: [&dyn Fn() -> Result<()>; 8] = [
            &|| gpu.wait(),
            &|| x.read().map(drop),
            &|| x.on(&Device::Cpu).map(drop),
            &|| Tensor::zeros_on(&device, &[12_345], Dtype::F32).map(drop),
            &|| Tensor::from_slice(&[4], &[1.0f32; 4])?.on(&device).map(drop),
            &|| graph.replay(&Rng::new(0)),
            &|| gpu.capture(|| Ok(())).map(drop),
            &product,
        ];
        for (at, call) in calls.iter().enumerate() {
            for _ in 0..2 {
                let said = call().map_err(|error| error.chain()).expect_err(&format!("call {at}"));
                assert!(
                    said.contains("CUDA_ERROR_ILLEGAL_ADDRESS") && said.contains("cannot use the device any more"),
                    "call {at}: {said}"
                );
            }
        }
        assert!(Gpu::cuda(0).is_err());
    }
}
