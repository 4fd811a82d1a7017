//! How much room a file system has: what the standard library does not say.

use std::path::Path;

/// Bytes that this process may still write where `path` lies; None where the system does not tell.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub fn room(path: &Path) -> Option<u64> {
    use std::ffi::{CString, c_char, c_int, c_ulong};
    use std::os::unix::ffi::OsStrExt;

    /// `struct statvfs` has 14 words on 64-bit Linux; the words behind them are room for another C library's.
    const WORDS: usize = 32;
    /// Where `f_frsize` and `f_bavail` stand in it, by words.
    const UNIT: usize = 1;
    const FREE: usize = 4;

    unsafe extern "C" {
        fn statvfs(path: *const c_char, about: *mut [c_ulong; WORDS]) -> c_int;
    }
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut about = [0; WORDS];
    // SAFETY: the path ends with a zero and lives as long as the call, which writes less than the array holds.
    let failed = unsafe { statvfs(path.as_ptr(), &mut about) };
    (failed == 0).then(|| about[UNIT].saturating_mul(about[FREE]))
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
pub fn room(_path: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_is_that_of_the_path_and_a_path_that_is_not_there_has_none() {
        let there = room(&std::env::temp_dir());
        assert!(cfg!(not(all(target_os = "linux", target_pointer_width = "64"))) || there.is_some_and(|bytes| bytes > 0), "{there:?}");
        assert_eq!(room(Path::new("/nothing/of/this/name")), None);
    }
}
