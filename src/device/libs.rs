//! CUDA's libraries, found when the program runs: it starts, and says what is missing, where there are none.
//!
//! A library is looked for in this order, and the first hit is kept:
//!
//! 1. the folders of `MASQUE_CUDA_LIBS` (separated as in PATH);
//! 2. the loader's own path: LD_LIBRARY_PATH, the system's folders;
//! 3. the packages that pip installs, under `$VIRTUAL_ENV` and `$CONDA_PREFIX`;
//! 4. a toolkit: `$CUDA_HOME`, `$CUDA_PATH`, /usr/local/cuda;
//! 5. pip's packages beside each python3 on PATH.
//!
//! A hit is loaded by its full path and stays loaded. The bindings look for libraries by name; the loader then gives them the one that is there
//! already; NCCL, whose file has another name than they look for, by an [`alias`]. They panic where there is none, so nothing of theirs is called before
//! [`find`] has answered. `MASQUE_NO_CUDA=1` finds nothing.

mod alias;

use crate::error::{Error, Result};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;
use libloading::os::unix::{Library as Loaded, RTLD_GLOBAL, RTLD_NOW};
use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    Driver,
    CublasLt,
    Nvrtc,
    Nccl,
}

impl Library {
    pub const ALL: [Library; 4] = [Library::Driver, Library::CublasLt, Library::Nvrtc, Library::Nccl];

    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::CublasLt => "libcublasLt.so.13",
            Library::Nvrtc => "libnvrtc.so.13",
            Library::Nccl => "libnccl.so.2",
        }
    }

    /// Names of its files, the best one first. Each is among the names that the bindings try, but for NCCL's.
    fn files(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1", "libcuda.so"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Library::Nccl => &["libnccl.so.2", "libnccl.so"],
        }
    }

    /// Whether the bindings will find it.
    fn is_bound(self) -> bool {
        // SAFETY: opens and closes libraries by name, which runs their initialisers and no more.
        unsafe {
            match self {
                Library::Driver => sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::Nccl => cudarc::nccl::sys::is_culib_present(),
            }
        }
    }
}

/// Where a library is, which from now on is loaded.
pub fn find(library: Library) -> Option<&'static Path> {
    static FOUND: [OnceLock<Option<PathBuf>>; 4] = [const { OnceLock::new() }; 4];
    FOUND[library as usize].get_or_init(|| if switched_off() { None } else { search(library) }).as_deref()
}

fn switched_off() -> bool {
    env::var_os("MASQUE_NO_CUDA").is_some_and(|value| !value.is_empty() && value != "0")
}

fn search(library: Library) -> Option<PathBuf> {
    let in_folders = |folders: Vec<PathBuf>| {
        let paths = folders.into_iter().flat_map(|folder| library.files().iter().map(move |file| folder.join(file)));
        paths.filter(|path| path.is_file()).find(|path| match library {
            Library::Nvrtc => {
                load_builtins(path);
                load(path)
            }
            _ => load(path),
        })
    };
    let by_name = || library.files().iter().find(|file| load(Path::new(file))).map(|file| loaded_as(file).unwrap_or_else(|| file.into()));
    let found = in_folders(given()).or_else(by_name).or_else(|| in_folders(elsewhere()));
    let found = found?;
    // First the alias: another file of the name that the bindings look for could be on the loader's path.
    let reason = if library == Library::Nccl { alias::load().err() } else { None };
    if library.is_bound() {
        return Some(found);
    }
    if let Some(reason) = reason {
        UNBOUND.get_or_init(|| (found, reason));
    }
    None
}

/// Where NCCL is and why the bindings do not find it there.
static UNBOUND: OnceLock<(PathBuf, String)> = OnceLock::new();

/// Where a library is that is there but cannot be used, and why.
pub fn unbound(library: Library) -> Option<(&'static Path, &'static str)> {
    let _ = find(library);
    UNBOUND.get().filter(|_| library == Library::Nccl).map(|(path, reason)| (path.as_path(), reason.as_str()))
}

/// Loads a library for good.
fn open(path: &Path) -> std::result::Result<(), libloading::Error> {
    // SAFETY: runs the initialisers of a library of CUDA's by name.
    let loaded = unsafe { Loaded::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    loaded.map(std::mem::forget)
}

fn load(path: &Path) -> bool {
    open(path).is_ok()
}

/// NVRTC opens a second library by its name alone, which lies beside it.
fn load_builtins(nvrtc: &Path) {
    let beside = nvrtc.parent().map(entries).unwrap_or_default();
    let is_it = |path: &&PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with("libnvrtc-builtins.so"));
    beside.iter().filter(is_it).for_each(|path| {
        load(path);
    });
}

/// The path that the loader found for a name.
fn loaded_as(name: &str) -> Option<PathBuf> {
    let stem = name.split(".so").next()?;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let is_it = |path: &&Path| path.file_name().and_then(|file| file.to_str()).is_some_and(|file| file.starts_with(&format!("{stem}.so")));
    paths.find(is_it).map(Path::to_path_buf)
}

fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn given() -> Vec<PathBuf> {
    env::var_os("MASQUE_CUDA_LIBS").map(|folders| env::split_paths(&folders).collect()).unwrap_or_default()
}

fn toolkits() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    named.chain([PathBuf::from("/usr/local/cuda")]).collect()
}

fn elsewhere() -> Vec<PathBuf> {
    let environments: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).collect();
    let mut folders: Vec<PathBuf> = environments.iter().flat_map(|root| packages(root)).map(|package| package.join("lib")).collect();
    folders.extend(variable("CONDA_PREFIX").map(|root| root.join("lib")));
    folders.extend(toolkits().into_iter().map(|root| root.join("lib64")));
    folders.extend(pythons().iter().flat_map(|root| packages(root)).map(|package| package.join("lib")));
    folders
}

/// The roots of the Python installations on PATH.
fn pythons() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let with_python = env::split_paths(&path).filter(|folder| folder.join("python3").exists());
    with_python.filter_map(|folder| folder.parent().map(Path::to_path_buf)).collect()
}

/// NVIDIA's packages in a Python installation, those of CUDA 13 first.
fn packages(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in entries(&root.join("lib")) {
        for folder in ["site-packages/nvidia", "dist-packages/nvidia"] {
            found.extend(entries(&python.join(folder)));
        }
    }
    found.sort_by_key(|package| !package.ends_with("cu13"));
    found
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries
}

/// The folder with CUDA's headers, which NVRTC needs.
pub(super) fn headers() -> Option<PathBuf> {
    let beside = |library: &Path| library.parent().and_then(Path::parent).map(|root| root.join("include"));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).chain(pythons());
    let mut folders: Vec<PathBuf> = find(Library::Nvrtc).and_then(beside).into_iter().collect();
    folders.extend(given().iter().filter_map(|folder| folder.parent().map(|root| root.join("include"))));
    folders.extend(given());
    folders.extend(environments.flat_map(|root| packages(&root)).map(|package| package.join("include")));
    folders.extend(toolkits().into_iter().map(|root| root.join("include")));
    folders.into_iter().find(|folder| folder.join("cuda_bf16.h").is_file())
}

/// The name and the text that the driver has for one of its errors. Only for errors that a driver gave.
pub(super) fn said(error: DriverError) -> String {
    let text = |text: std::result::Result<&std::ffi::CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(text)) => format!("{name}: {text}"),
        _ => format!("CUDA error {}", error.0 as u32),
    }
}

/// The CUDA version that the driver is for, as 13000.
pub fn driver_version() -> Option<i32> {
    find(Library::Driver)?;
    let mut version = 0;
    // SAFETY: the driver library is loaded; this call needs no initialisation.
    let answer = unsafe { sys::cuDriverGetVersion(&mut version) };
    answer.result().ok().map(|()| version)
}

/// Versions of the other libraries, as they count them themselves.
pub fn version(library: Library) -> Option<String> {
    find(library)?;
    match library {
        Library::Driver => driver_version().map(|version| format!("for CUDA {}.{}", version / 1000, version % 1000 / 10)),
        Library::CublasLt => {
            // SAFETY: the library is loaded.
            let version = unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() };
            Some(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
        }
        Library::Nvrtc => {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the library is loaded, and it writes two numbers.
            let answer = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
            answer.result().ok().map(|()| format!("{major}.{minor}"))
        }
        Library::Nccl => nccl_version().map(as_nccl_counts),
    }
}

/// As 22809.
fn nccl_version() -> Option<i32> {
    find(Library::Nccl)?;
    cudarc::nccl::result::get_nccl_version().ok()
}

/// Its version in words. Up to 2.8 it had two digits less.
fn as_nccl_counts(version: i32) -> String {
    let unit = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}

/// The oldest NCCL that has every function that is called; it also knows bf16 and may be recorded.
const OLDEST_NCCL: i32 = 21_400;

/// Whether NCCL can be used, or what is missing.
pub fn need_nccl() -> Result<()> {
    if switched_off() {
        return Err(Error::new("CUDA is switched off by MASQUE_NO_CUDA; unset it to use NCCL"));
    }
    let install =
        "pip install \"nvidia-nccl-cu13==2.28.*\" into the active environment, or name the folder that holds it in MASQUE_CUDA_LIBS";
    if let Some((path, reason)) = unbound(Library::Nccl) {
        return Err(Error::new(format!(
            "NCCL is there ({}) but cannot be used: {reason}; put a link of the name libnccl.so to it into a folder of LD_LIBRARY_PATH",
            path.display()
        )));
    }
    let path = find(Library::Nccl).ok_or_else(|| Error::new(format!("NCCL (libnccl.so.2) was not found; {install}")))?;
    let version = nccl_version().unwrap_or_default();
    if version < OLDEST_NCCL {
        return Err(Error::new(format!(
            "NCCL is of version {} ({}) and this program needs {} or newer; {install}",
            as_nccl_counts(version),
            path.display(),
            as_nccl_counts(OLDEST_NCCL)
        )));
    }
    Ok(())
}

/// The CUDA version that the bindings and the embedded code are made for.
const NEEDED: i32 = 13_000;

/// How many devices there are, or why there is none.
pub fn devices() -> Result<usize> {
    if switched_off() {
        return Err(Error::new("CUDA is switched off by MASQUE_NO_CUDA; unset it to use a GPU"));
    }
    if find(Library::Driver).is_none() {
        return Err(Error::new(
            "no CUDA driver was found (libcuda.so.1); install NVIDIA's driver, or name the folder that holds it in MASQUE_CUDA_LIBS",
        ));
    }
    let version = driver_version().unwrap_or_default();
    if version < NEEDED {
        return Err(Error::new(format!(
            "the CUDA driver is for CUDA {}.{} and this program needs 13.0; install driver 580 or newer",
            version / 1000,
            version % 1000 / 10
        )));
    }
    let none = || Error::new("the CUDA driver is there but sees no device; look at nvidia-smi and at CUDA_VISIBLE_DEVICES");
    match cudarc::driver::CudaContext::device_count() {
        Ok(count) if count > 0 => Ok(count as usize),
        Ok(_) | Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err(none()),
        Err(error) => Err(Error::new(format!(
            "the CUDA driver is there but does not start ({}); look at nvidia-smi, the kernel module and the driver have to be of one version",
            said(error)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_nccl_are_read_as_it_counts_them() {
        for (number, text) in [(22_809, "2.28.9"), (21_400, "2.14.0"), (20_906, "2.9.6"), (2804, "2.8.4"), (30_001, "3.0.1")] {
            assert_eq!(as_nccl_counts(number), text);
        }
    }
}
