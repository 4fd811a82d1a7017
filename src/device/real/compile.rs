//! Kernels compiled when the program runs, by NVRTC, for a binary that was built without nvcc.

use super::super::launch::{File, HEADERS};
use super::super::libs::{self, Library};
use crate::ensure;
use crate::error::{Error, Result};
use cudarc::nvrtc::{result as nvrtc, sys};
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;

/// NVRTC and CUDA's headers, or what is missing.
fn tools() -> Result<PathBuf> {
    let without = "this binary holds no GPU code, since nvcc was not found when it was built, and ";
    let install = "build with nvcc, or pip install nvidia-cuda-nvrtc nvidia-cuda-runtime and activate that environment";
    if libs::find(Library::Nvrtc).is_none() {
        return Err(Error::new(format!("{without}NVRTC (libnvrtc.so.13), which could compile it now, was not found either; {install}")));
    }
    let missing = || Error::new(format!("{without}NVRTC, which could compile it now, needs cuda_bf16.h, which was not found; {install}"));
    libs::headers().ok_or_else(missing)
}

/// Machine code for exactly this compute capability, or PTX for the nearest older one that NVRTC knows.
pub(super) fn target(capability: (i32, i32)) -> Result<String> {
    tools()?;
    let mut count: c_int = 0;
    // SAFETY: the library is loaded, and it writes one number.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(|error| Error::new(format!("NVRTC: {error}")))?;
    let mut known = vec![0; count as usize];
    // SAFETY: as above; there is room for as many numbers as it said.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(|error| Error::new(format!("NVRTC: {error}")))?;
    choose(capability, &known)
}

fn choose((major, minor): (i32, i32), known: &[c_int]) -> Result<String> {
    let own = 10 * major + minor;
    // What only Hopper has is there under its own name.
    let named = |arch: i32| if arch == 90 && own == 90 { "90a".to_string() } else { arch.to_string() };
    if known.contains(&own) {
        return Ok(format!("sm_{}", named(own)));
    }
    let nearest = known.iter().copied().filter(|&arch| arch <= own).max();
    let none = || Error::new(format!("NVRTC knows no architecture up to {major}.{minor}, the device's; install the NVRTC of CUDA 13"));
    nearest.map(|arch| format!("compute_{arch}")).ok_or_else(none)
}

/// A program that NVRTC holds, and the texts it may refer to.
struct Program {
    handle: sys::nvrtcProgram,
    _texts: Vec<CString>,
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `compile` and destroyed here only. Nothing is left to report an error to.
        let _ = unsafe { nvrtc::destroy_program(self.handle) };
    }
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new("a kernel's source has a zero byte"))
}

/// A file's code for `sm_..` (machine code) or `compute_..` (PTX, ending in a zero byte).
pub(super) fn compile(file: &File, target: &str) -> Result<Vec<u8>> {
    let headers = tools()?;
    let in_file = |error: nvrtc::NvrtcError| Error::new(format!("NVRTC on kernels/{}.cu: {error}", file.name));
    let (source, name) = (text(file.source)?, text(&format!("{}.cu", file.name))?);
    let names = HEADERS.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>>>()?;
    let contents = HEADERS.iter().map(|(_, content)| text(content)).collect::<Result<Vec<_>>>()?;
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
    let (name_list, content_list) = (pointers(&names), pointers(&contents));
    let mut handle = std::ptr::null_mut();
    let count = HEADERS.len() as c_int;
    // SAFETY: the library is loaded; all texts end in a zero byte and live as long as the program.
    let made = unsafe {
        sys::nvrtcCreateProgram(&mut handle, source.as_ptr(), name.as_ptr(), count, content_list.as_ptr(), name_list.as_ptr()).result()
    };
    made.map_err(in_file)?;
    let mut texts = vec![source, name];
    texts.extend(names);
    texts.extend(contents);
    let program = Program { handle, _texts: texts };
    let folder = headers.to_str().ok_or_else(|| Error::new(format!("{} is no text in UTF-8", headers.display())))?;
    let options = [format!("--gpu-architecture={target}"), "--std=c++17".to_string(), format!("--include-path={folder}")];
    // SAFETY: the program was made above and is alive; the options have no zero bytes, since none of their parts has.
    let done = unsafe { nvrtc::compile_program(program.handle, &options) };
    if let Err(error) = done {
        return Err(Error::new(format!(
            "NVRTC could not compile kernels/{}.cu for {target} ({error}): {}",
            file.name,
            complaint(&program)
        )));
    }
    if target.starts_with("compute_") {
        // SAFETY: the program is compiled.
        let ptx = unsafe { nvrtc::get_ptx(program.handle) }.map_err(in_file)?;
        return Ok(ptx.into_iter().map(|c| c as u8).collect());
    }
    let mut size = 0;
    // SAFETY: the program is compiled.
    unsafe { sys::nvrtcGetCUBINSize(program.handle, &mut size) }.result().map_err(in_file)?;
    ensure!(size > 0, "NVRTC gave no code for {target}");
    let mut code = vec![0u8; size];
    // SAFETY: there is room for as many bytes as it said.
    unsafe { sys::nvrtcGetCUBIN(program.handle, code.as_mut_ptr().cast()) }.result().map_err(in_file)?;
    Ok(code)
}

/// The first error of its log.
fn complaint(program: &Program) -> String {
    // SAFETY: the program is alive.
    let log = unsafe { nvrtc::get_program_log(program.handle) }.unwrap_or_default();
    let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    let log = CStr::from_bytes_until_nul(&bytes).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default();
    let first = log.lines().find(|line| line.contains("error")).or(log.lines().next());
    first.unwrap_or("it left no message").trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::super::super::launch::{FILES, KERNELS};
    use super::*;

    #[test]
    fn a_device_gets_code_for_itself_or_for_the_nearest_older_one() {
        let known = [75, 80, 86, 87, 89, 90, 100, 120];
        assert_eq!(choose((9, 0), &known).unwrap(), "sm_90a");
        assert_eq!(choose((8, 6), &known).unwrap(), "sm_86");
        assert_eq!(choose((8, 8), &known).unwrap(), "compute_87");
        assert_eq!(choose((9, 9), &known).unwrap(), "compute_90");
        assert_eq!(choose((13, 1), &known).unwrap(), "compute_120");
        assert!(choose((7, 0), &known).is_err());
    }

    #[test]
    fn every_file_compiles_when_the_program_runs() {
        if let Err(error) = tools() {
            return println!("skipped: no NVRTC: {}", error.chain());
        }
        for (at, file) in FILES.iter().enumerate() {
            let start = std::time::Instant::now();
            let ptx = String::from_utf8(compile(file, "compute_90a").unwrap_or_else(|error| panic!("{}", error.chain()))).unwrap();
            let kernels: Vec<&str> = KERNELS.iter().filter(|kernel| kernel.file == at).map(|kernel| kernel.name).collect();
            println!("{}: {} kernels, {} ms", file.name, kernels.len(), start.elapsed().as_millis());
            assert!(kernels.iter().all(|name| ptx.contains(&format!(".entry {name}("))), "{}", file.name);
            assert_eq!(ptx.matches(".entry ").count(), kernels.len(), "{}: a kernel without KERNEL(name)", file.name);
        }
        let code = compile(&FILES[0], "sm_80").unwrap();
        assert_eq!(&code[..4], b"\x7fELF");
        let broken = File { name: "broken", source: "extern \"C\" __global__ void f() { nothing }", fatbin: &[], archs: &[] };
        let said = compile(&broken, "compute_80").unwrap_err().chain();
        assert!(said.contains("kernels/broken.cu") && said.contains("nothing"), "{said}");
    }
}
