//! A file that is either the old one or the whole new one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Context, Error, Result};

/// Removes the temporary file unless it was renamed.
struct Temporary {
    path: PathBuf,
    renamed: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes a temporary file beside `path`, then renames it.
pub(crate) fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let attempt = || format!("cannot write {}", path.display());
    let name = path.file_name().ok_or_else(|| Error::new("the path names no file")).with_context(attempt)?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));

    let temporary_path = path.with_file_name(hidden);
    let file = File::create_new(&temporary_path).with_context(attempt)?;
    let mut temporary = Temporary { path: temporary_path, renamed: false };
    let mut out = BufWriter::with_capacity(1 << 20, file);
    fill(&mut out).with_context(attempt)?;
    finish(out, &temporary.path, path).with_context(attempt)?;
    temporary.renamed = true;
    Ok(())
}

fn finish(mut out: BufWriter<File>, from: &Path, to: &Path) -> io::Result<()> {
    out.flush()?;
    out.get_ref().sync_all()?;
    fs::rename(from, to)
}
