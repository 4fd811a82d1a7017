//! A set of images in one file: pixels that were resized once, or the bytes of the original files; checksummed, mapped, read in any order.
//!
//! All numbers are little-endian; every part begins at a multiple of 64 bytes; `crc` is CRC-32C of what stands before it in its part.
//!
//! ```text
//! head     64 bytes   magic "masquePK", version u32, storage u32 (1 pixels, 2 original), short side u32, 0 u32,
//!                     images of the source u64, checksum of their names, labels and classes u32, zeros, crc u32
//! record   64 bytes   its entry, zeros
//!          payload    pixels u8 [H, W, C], or the bytes of a file; zeros up to a multiple of 64
//!   ... one record behind the other ...
//! tail     entries    48 bytes a record
//!          ends       u64 a class, then u64 a record: where its name ends among the names of its kind
//!          names      of the classes, then of the records' source files, UTF-8
//! footer   64 bytes   magic "masqueIX", where the tail begins u64, records u64, classes u64, bytes of the classes' names u64,
//!                     bytes of the files' names u64, checksum of the tail u32, zeros, crc u32; the last bytes of the file
//!
//! entry    48 bytes   where the payload begins u64, its bytes u64, number of the image in the source u64,
//!                     height u32, width u32, channels u32, label u32, checksum of the payload u32, crc u32
//! ```
//!
//! A file grows at its end and nothing in it is ever rewritten. [`pack`] therefore works in `FILE.partial`, which is a beginning of the whole
//! file at any moment; a second attempt keeps every whole record of it and goes on, and the bytes are those of an unbroken one. An image of the
//! source that could not be read has no record. [`Packed`] reads the file, [`export`] makes a folder of images of it.

mod export;
mod read;
mod write;

pub use export::export;
pub use read::{Damage, Packed};
pub use write::{Event, Options, Packing, pack};

use crate::error::{Error, Result};
use crate::formats::crc32c;
use crate::{bail, ensure};

const MAGIC: &[u8; 8] = b"masquePK";
const END_MAGIC: &[u8; 8] = b"masqueIX";
const VERSION: u32 = 1;
/// What parts are aligned to, and the bytes of the head, the footer and what stands before a payload.
const BLOCK: usize = 64;
const ENTRY: usize = 48;

/// What a record holds of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// Pixels; the short side is at most `short`.
    Pixels { short: u32 },
    /// The bytes of the file.
    Original,
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pixels { short } => write!(f, "pixels with a short side of up to {short}"),
            Self::Original => write!(f, "the files' own bytes"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Head {
    storage: Storage,
    /// Images of the source.
    sources: u64,
    /// Checksum of the source's names, labels and classes.
    list: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    /// Where the payload begins.
    offset: u64,
    length: u64,
    source: u64,
    height: u32,
    width: u32,
    channels: u32,
    label: u32,
    checksum: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Footer {
    tail: u64,
    records: u64,
    classes: u64,
    class_bytes: u64,
    name_bytes: u64,
    checksum: u32,
}

impl Head {
    fn to_bytes(self) -> [u8; BLOCK] {
        let (storage, short) = match self.storage {
            Storage::Pixels { short } => (1, short),
            Storage::Original => (2, 0),
        };
        let mut part = Part::<BLOCK>::new();
        part.bytes(MAGIC).u32(VERSION).u32(storage).u32(short).u32(0).u64(self.sources).u32(self.list);
        part.sealed()
    }

    fn from_bytes(bytes: &[u8; BLOCK]) -> Result<Self> {
        ensure!(bytes.starts_with(MAGIC), "it is not a packed file, which begins with \"masquePK\"");
        let version = u32_at(bytes, 8);
        ensure!(version == VERSION, "it is written in version {version} of the format; this program reads version {VERSION}");
        ensure!(is_sealed(bytes), "its first 64 bytes are damaged: their checksum is another");
        let storage = match (u32_at(bytes, 12), u32_at(bytes, 16)) {
            (1, short) if short > 0 => Storage::Pixels { short },
            (2, 0) => Storage::Original,
            (storage, short) => {
                bail!("its first 64 bytes name storage {storage} with a short side of {short}, which this program does not know")
            }
        };
        Ok(Self { storage, sources: u64_at(bytes, 24), list: u32_at(bytes, 32) })
    }
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY] {
        let mut part = Part::<ENTRY>::new();
        part.u64(self.offset).u64(self.length).u64(self.source);
        part.u32(self.height).u32(self.width).u32(self.channels).u32(self.label).u32(self.checksum);
        part.sealed()
    }

    /// None where the bytes are not those of an entry.
    fn from_bytes(bytes: &[u8; ENTRY]) -> Option<Self> {
        is_sealed(bytes).then(|| Self {
            offset: u64_at(bytes, 0),
            length: u64_at(bytes, 8),
            source: u64_at(bytes, 16),
            height: u32_at(bytes, 24),
            width: u32_at(bytes, 28),
            channels: u32_at(bytes, 32),
            label: u32_at(bytes, 36),
            checksum: u32_at(bytes, 40),
        })
    }

    /// What stands before the payload.
    fn block(self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..ENTRY].copy_from_slice(&self.to_bytes());
        block
    }

    /// Where the next record begins, if this one begins at `start` and can be there at all.
    fn end(&self, start: u64) -> Option<u64> {
        let offset = start.checked_add(BLOCK as u64)?;
        let end = offset.checked_add(self.length)?.checked_next_multiple_of(BLOCK as u64)?;
        (self.offset == offset && self.length > 0).then_some(end)
    }

    /// Whether the size is one that an image of these bytes can have.
    fn fits(&self, storage: Storage) -> bool {
        let pixels = u64::from(self.height).checked_mul(self.width.into()).and_then(|area| area.checked_mul(self.channels.into()));
        pixels.is_some_and(|pixels| pixels > 0 && (storage == Storage::Original || pixels == self.length))
    }
}

impl Footer {
    fn to_bytes(self) -> [u8; BLOCK] {
        let mut part = Part::<BLOCK>::new();
        part.bytes(END_MAGIC).u64(self.tail).u64(self.records).u64(self.classes);
        part.u64(self.class_bytes).u64(self.name_bytes).u32(self.checksum);
        part.sealed()
    }

    fn from_bytes(bytes: &[u8; BLOCK]) -> Result<Self> {
        ensure!(
            bytes.starts_with(END_MAGIC) && is_sealed(bytes),
            "its last 64 bytes are not those of a whole packed file: it was cut short or damaged there"
        );
        let at = |place| u64_at(bytes, place);
        let [tail, records, classes, class_bytes, name_bytes] = [at(8), at(16), at(24), at(32), at(40)];
        Ok(Self { tail, records, classes, class_bytes, name_bytes, checksum: u32_at(bytes, 48) })
    }
}

/// A part of so many bytes that ends with its checksum.
struct Part<const N: usize> {
    bytes: [u8; N],
    used: usize,
}

impl<const N: usize> Part<N> {
    fn new() -> Self {
        Self { bytes: [0; N], used: 0 }
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
        self
    }

    fn u32(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    fn u64(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    fn sealed(mut self) -> [u8; N] {
        let checksum = crc32c(&self.bytes[..N - 4]);
        self.bytes[N - 4..].copy_from_slice(&checksum.to_le_bytes());
        self.bytes
    }
}

fn is_sealed<const N: usize>(bytes: &[u8; N]) -> bool {
    crc32c(&bytes[..N - 4]) == u32_at(bytes, N - 4)
}

fn u32_at(bytes: &[u8], place: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[place + i]))
}

fn u64_at(bytes: &[u8], place: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[place + i]))
}

/// A number from a file as a place in memory.
fn place(number: u64) -> Result<usize> {
    usize::try_from(number).map_err(|_| Error::new(format!("it holds {number} bytes or more, which this machine cannot address")))
}
