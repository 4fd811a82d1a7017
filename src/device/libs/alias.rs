//! NCCL under the name that the bindings look for.
//!
//! pip installs it as `libnccl.so.2` and under no other name; the bindings try `libnccl.so` and names like it. An embedded library called `libnccl.so`, empty
//! but needing `libnccl.so.2` (made by build.rs), lies between: once the real one is loaded by its path, the loader gives the bindings the alias for its name,
//! and what is looked up there is found in the library that it needs. It is loaded from memory and leaves no file behind.

include!(concat!(env!("OUT_DIR"), "/alias.rs"));

/// Once NCCL is loaded: makes it what the bindings find. Or why that cannot be.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(super) fn load() -> Result<(), String> {
    use std::ffi::{c_char, c_int, c_uint};
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    unsafe extern "C" {
        fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    }
    /// The file is not handed on to programs that are started.
    const CLOSE_ON_EXEC: c_uint = 1;

    if ALIAS.is_empty() {
        return Err(format!("this binary was built without its alias library, since {WITHOUT}"));
    }
    // SAFETY: the name ends in a zero byte.
    let number = unsafe { memfd_create(c"libnccl.so".as_ptr(), CLOSE_ON_EXEC) };
    if number < 0 {
        return Err(format!("no file in memory for its alias library ({})", std::io::Error::last_os_error()));
    }
    // SAFETY: the number is that of a file which was made just now and belongs to nobody else.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
    file.write_all(ALIAS).map_err(|error| format!("no room in memory for its alias library ({error})"))?;
    let loaded = super::open(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref());
    // The loader knows the library by this number from now on: no other file may get it.
    std::mem::forget(file);
    loaded.map_err(|error| format!("its alias library does not load ({error})"))
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn load() -> Result<(), String> {
    debug_assert!(ALIAS.is_empty());
    Err(WITHOUT.to_string())
}
