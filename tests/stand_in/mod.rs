//! A stand-in for CUDA's libraries (`cuda.c`, `nccl.c`), so that the code for a real GPU runs where there is none: built by the C compiler, found by MASQUE_CUDA_LIBS
//! in a process of its own.

#![allow(dead_code)] // each test program uses a part of it

#[cfg(feature = "emulated")]
use masque::device::{
    gpu::Gpu,
    launch::{Entry, KERNELS},
};
#[cfg(feature = "emulated")]
use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const IN_USE: &str = "the stand-in is used";

/// The folder with the libraries.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stand_in_{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand_in/cuda.c");
        library(&folder, "libcuda.so.1", &["-O2", source]);
        std::fs::write(folder.join("empty.c"), "").unwrap();
        // Its symbols are those of the library that it needs.
        for name in ["libcublasLt.so.13", "libnvrtc.so.13", "libnccl.so.2"] {
            library(&folder, name, &["empty.c", "-Wl,--no-as-needed", "-L.", "-l:libcuda.so.1", "-Wl,-rpath,$ORIGIN"]);
        }
        std::fs::write(folder.join("cuda_bf16.h"), "").unwrap();
        folder
    })
}

pub fn library(folder: &Path, name: &str, args: &[&str]) {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut made = Command::new(compiler);
    made.current_dir(folder).args(["-shared", "-fPIC", "-o", name]).arg(format!("-Wl,-soname,{name}")).args(args);
    let made = made.output().unwrap();
    assert!(made.status.success(), "{name}: {}", String::from_utf8_lossy(&made.stderr));
}

/// A program that finds the stand-in; `how` says what it should stand in for.
pub fn with(command: &mut Command, how: &str) -> Output {
    command.env("MASQUE_CUDA_LIBS", folder()).env("MASQUE_STAND_IN", format!("yes {how}")).env_remove("MASQUE_NO_CUDA").output().unwrap()
}

/// Runs one test of this program there; what it printed.
#[track_caller]
pub fn run(test: &str, how: &str, variable: Option<(&str, &str)>) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = with(command.args([test, "--exact", "--nocapture"]).envs(variable), how);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed") && said.contains(IN_USE), "{test} {how}: {said}");
    said
}

#[cfg(feature = "emulated")]
unsafe extern "C" {
    fn masque_emulated_block(
        entry: Entry,
        args: *const *mut c_void,
        launch: *const c_void,
        index: u64,
        message: *mut c_char,
        room: usize,
    ) -> i32;
}

#[cfg(feature = "emulated")]
type RunBlock = unsafe extern "C" fn(Entry, *const *mut c_void, *const c_void, u64, *mut c_char, usize) -> i32;

/// A program without the emulated kernels has no stand-in.
#[cfg(not(feature = "emulated"))]
pub fn enter() -> bool {
    false
}

/// Tells the stand-in the kernels, if this process is to use it.
#[cfg(feature = "emulated")]
pub fn enter() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| {
        let Some(folder) = std::env::var_os("MASQUE_CUDA_LIBS").filter(|_| std::env::var_os("MASQUE_STAND_IN").is_some()) else {
            return false;
        };
        // SAFETY: a library of this repository, and its functions as it declares them.
        unsafe {
            let library = libloading::Library::new(Path::new(&folder).join("libcuda.so.1")).unwrap();
            library.get::<unsafe extern "C" fn(RunBlock)>(b"stand_in_kernels").unwrap()(masque_emulated_block);
            let add = library.get::<unsafe extern "C" fn(*const c_char, Entry)>(b"stand_in_kernel").unwrap();
            for kernel in KERNELS {
                add(CString::new(kernel.name).unwrap().as_ptr(), kernel.entry.unwrap());
            }
            std::mem::forget(library);
        }
        println!("{IN_USE}");
        true
    })
}

/// The emulated device, or in a process that is to use the stand-in the first of CUDA's, which is to be the same in all that tests see.
#[cfg(feature = "emulated")]
pub fn gpu() -> Gpu {
    if !enter() {
        return Gpu::emulated().unwrap();
    }
    let gpu = Gpu::cuda(0).unwrap_or_else(|error| panic!("{}", error.chain()));
    gpu.poison(true);
    gpu
}

/// Calls one of the stand-in's own functions.
pub fn call(name: &str) -> i32 {
    let folder = std::env::var_os("MASQUE_CUDA_LIBS").expect("the process uses the stand-in");
    // SAFETY: as above.
    unsafe {
        let library = libloading::Library::new(Path::new(&folder).join("libcuda.so.1")).unwrap();
        library.get::<unsafe extern "C" fn() -> i32>(name.as_bytes()).unwrap()()
    }
}
