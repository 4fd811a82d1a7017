//! The emulated device reports mistakes: kernels with a defect put in on purpose (`emulator/defects.cu`), run as they are and under sanitizers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// How the kernels are compiled.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Build {
    Plain,
    Address,
    Thread,
}

/// The program of defects, built once for each way; None where the compiler has no such sanitizer.
fn program(build: Build) -> Option<&'static Path> {
    static PROGRAMS: [OnceLock<Option<PathBuf>>; 3] = [OnceLock::new(), OnceLock::new(), OnceLock::new()];
    PROGRAMS[build as usize].get_or_init(|| compile(build)).as_deref()
}

fn compile(build: Build) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let name = |end: &str| folder.join(format!("defects-{build:?}-{end}"));
    let (kernels, runtime): (&[&str], &[&str]) = match build {
        Build::Plain => (&[], &[]),
        Build::Address => (
            &["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DMASQUE_ONE_WORKER"],
            &["-fsanitize=address,undefined", "-DMASQUE_ASAN"],
        ),
        Build::Thread => (&["-fsanitize=thread", "-DMASQUE_ONE_WORKER"], &["-DMASQUE_TSAN"]),
    };
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
    let run = |args: &[&str], files: &[&Path]| {
        let mut command = Command::new(&compiler);
        command.args(["-std=c++20", "-O1", "-g", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]).args(args).args(files);
        command.current_dir(root).output().unwrap_or_else(|error| panic!("{compiler} does not start: {error}"))
    };
    let (object, other, whole) = (name("kernels.o"), name("runtime.o"), name("program"));
    let header = ["-c", "-x", "c++", "-include", "kernels/emulate/cuda.h", "-I", "kernels"];
    let done = run(&[&header[..], kernels, &["-o", object.to_str()?]].concat(), &[Path::new("tests/emulator/defects.cu")]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let done = run(&[&["-c"], runtime, &["-o", other.to_str()?]].concat(), &[Path::new("kernels/emulate/runtime.cpp")]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let sanitizer = kernels.first().copied().into_iter().collect::<Vec<_>>();
    let done = run(&[&sanitizer[..], &["-pthread", "-o", whole.to_str()?]].concat(), &[&object, &other]);
    if !done.status.success() && build != Build::Plain {
        println!("skipped: {compiler} cannot link {}: {}", kernels[0], String::from_utf8_lossy(&done.stderr));
        return None;
    }
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Some(whole)
}

fn start(build: Build, args: &[&str]) -> Option<Output> {
    Some(Command::new(program(build)?).args(args).output().unwrap())
}

/// What the program says without a sanitizer.
fn says(args: &[&str]) -> String {
    let output = start(Build::Plain, args).expect("the plain program always builds");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

fn wrong_for_most_seeds(kernel: &str) {
    let wrong = (1..=8).filter(|seed| says(&[kernel, "late", &seed.to_string()]) != "right").count();
    assert!(wrong >= 6, "{kernel}: only {wrong} of 8 orders show the defect");
}

#[test]
fn a_correct_kernel_is_right_in_every_order() {
    assert_eq!(says(&["correct", "late"]), "right");
    assert_eq!(says(&["correct", "early"]), "right");
    for seed in 1..=8 {
        assert_eq!(says(&["correct", "late", &seed.to_string()]), "right");
    }
}

#[test]
fn a_removed_barrier_shows() {
    assert_ne!(says(&["no_barrier_after_wait", "late"]), "right");
    wrong_for_most_seeds("no_barrier_after_wait");
    assert_ne!(says(&["no_barrier_at_loop_end", "early"]), "right");
    wrong_for_most_seeds("no_barrier_at_loop_end");
}

#[test]
fn a_removed_wait_shows() {
    assert_ne!(says(&["no_wait", "late"]), "right");
    assert_eq!(
        says(&["never_waited", "late"]),
        "a thread ended before its asynchronous copies were waited for, in block (0, 0, 0), thread (0, 0, 0)"
    );
}

#[test]
fn divergence_deadlocks_and_masks_are_named_with_block_and_thread() {
    let cases = [
        (
            "half_a_warp_at_the_barrier",
            "deadlock: a thread waits at a __syncthreads() that others never reach, in block (0, 0, 0), thread (0, 0, 0)",
        ),
        (
            "lane_outside_its_mask",
            "a lane calls a warp collective whose mask 0xffff does not name it, in block (0, 0, 0), thread (16, 0, 0)",
        ),
        ("lane_ended", "a lane ended while others of its warp wait for it in a warp collective, in block (0, 0, 0), thread (5, 0, 0)"),
        (
            "different_collectives",
            "lanes of one warp meet in different warp collectives, or in masks that differ, in block (0, 0, 0), thread (1, 0, 0)",
        ),
        ("index_out_of_range", "index 99 is outside 0..64, in block (0, 0, 0), thread (7, 0, 0)"),
        ("misaligned_copy", "the address of an asynchronous copy is not a multiple of its 16 bytes, in block (0, 0, 0), thread (0, 0, 0)"),
    ];
    for (kernel, message) in cases {
        assert_eq!(says(&[kernel, "late"]), message, "{kernel}");
    }
}

#[test]
fn address_sanitizer_sees_too_little_shared_memory() {
    let Some(output) = start(Build::Address, &["too_little_shared_memory", "late"]) else { return };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("AddressSanitizer: use-after-poison"), "{text}");
    let correct = start(Build::Address, &["correct", "early"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&correct.stdout).trim(), "right", "{}", String::from_utf8_lossy(&correct.stderr));
}

#[test]
fn thread_sanitizer_sees_a_removed_barrier() {
    let Some(output) = start(Build::Thread, &["no_barrier_at_loop_end", "early"]) else { return };
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("unexpected memory mapping") {
        return println!("skipped: this compiler's ThreadSanitizer does not run on this system: {text}");
    }
    assert!(text.contains("ThreadSanitizer: data race"), "{text}");
    for copies in ["late", "early"] {
        let correct = start(Build::Thread, &["correct", copies]).unwrap();
        let text = String::from_utf8_lossy(&correct.stderr);
        assert!(correct.status.success() && !text.contains("ThreadSanitizer"), "{copies}: {text}");
    }
}
