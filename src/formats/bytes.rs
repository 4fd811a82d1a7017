//! Bytes that are shared, not copied: a slice of a mapped file or of memory.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::ensure;
use crate::error::{Context, Result};

/// A slice of a mapped file or of memory; a clone or a smaller slice shares the same bytes.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Map(Arc<Mmap>),
    Memory(Arc<Vec<u8>>),
}

impl Bytes {
    /// Maps a whole file.
    pub fn map(path: &Path) -> Result<Self> {
        let shown = path.display();
        let about = fs::metadata(path).with_context(|| format!("cannot open {shown}"))?;
        ensure!(about.is_file(), "cannot open {shown}: it is not a regular file");
        ensure!(about.len() > 0, "cannot open {shown}: it is empty");
        let file = File::open(path).with_context(|| format!("cannot open {shown}"))?;
        let map = map_read_only(&file).with_context(|| format!("cannot map {shown} into memory"))?;
        let range = 0..map.len();
        Ok(Self { owner: Owner::Map(Arc::new(map)), range })
    }

    /// The bytes at `range`, or None where it leaves this slice.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self { owner: self.owner.clone(), range: start..start + range.len() })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Owner::Memory(Arc::new(bytes)), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let whole: &[u8] = match &self.owner {
            Owner::Map(map) => map,
            Owner::Memory(memory) => memory,
        };
        &whole[self.range.clone()]
    }
}

fn map_read_only(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only. Files are replaced by renaming, which leaves a mapped one as it was, except for what `MappedFile`
    // writes, while nobody holds a slice of its map, and which nobody else maps while it is locked. Another program that cuts the file short while it is mapped ends this process with a bus error, as it does for every program that maps files.
    unsafe { Mmap::map(file) }
}

/// A file of fixed length that this process reads through a map and changes by writing.
pub struct MappedFile {
    file: File,
    map: Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self> {
        let attempt = || format!("cannot open {}", path.display());
        let file = File::options().read(true).write(true).open(path).with_context(attempt)?;
        ensure!(file.metadata().with_context(attempt)?.len() > 0, "cannot open {}: it is empty", path.display());
        let map = map_read_only(&file).with_context(attempt)?;
        Ok(Self { file, map })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Writes inside the file; whoever looked at its bytes is done, as the borrow says.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.file.seek(SeekFrom::Start(at))?;
        self.file.write_all(bytes)
    }
}
