//! Reading a packed file: everything that the file says of itself is checked when it is opened, a payload when it is first looked at.

use super::{BLOCK, ENTRY, Entry, Footer, Head, MAGIC, Storage, place, u64_at};
use crate::data::decode::decode;
use crate::data::{Dataset, Picture};
use crate::error::{Context, Error, Result};
use crate::formats::{Bytes, crc32c};
use crate::{bail, ensure};
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// An open packed file.
pub struct Packed {
    path: PathBuf,
    bytes: Bytes,
    storage: Storage,
    sources: usize,
    records: usize,
    classes: Vec<String>,
    /// Where the entries, the ends of the records' names, and these names stand.
    entries: Range<usize>,
    ends: Range<usize>,
    names: Range<usize>,
    /// One bit a record: its payload was compared with its checksum.
    compared: Vec<AtomicU64>,
}

/// What is wrong with the records of a file.
#[derive(Debug)]
pub struct Damage {
    pub records: usize,
    /// The first of them, and what is wrong with it.
    pub first: Error,
}

impl Packed {
    /// Whether a packed file lies at `path`, by its first bytes.
    pub fn is_at(path: &Path) -> bool {
        let mut start = [0; MAGIC.len()];
        path.is_file() && File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && &start == MAGIC
    }

    pub fn open(path: &Path) -> Result<Self> {
        let bytes = Bytes::map(path)?;
        Self::parse(bytes, path).with_context(|| format!("cannot read {}", path.display()))
    }

    fn parse(bytes: Bytes, path: &Path) -> Result<Self> {
        let head: Option<&[u8; BLOCK]> = bytes.first_chunk();
        let Some(head) = head else { bail!("it has {} bytes and is no packed file", bytes.len()) };
        let head = Head::from_bytes(head)?;
        let footer = bytes.last_chunk().filter(|_| bytes.len() >= 2 * BLOCK);
        let Some(footer) = footer else { bail!("it ends after {} bytes; a whole packed file is longer", bytes.len()) };
        let footer = Footer::from_bytes(footer)?;
        let parts = footer.parts(bytes.len())?;
        let tail = &bytes[parts.entries.start..bytes.len() - BLOCK];
        ensure!(crc32c(tail) == footer.checksum, "its index is damaged: the checksum is another");

        let mut start = BLOCK as u64;
        let mut next = 0;
        for (number, entry) in bytes[parts.entries.clone()].as_chunks::<ENTRY>().0.iter().enumerate() {
            let entry = Entry::from_bytes(entry).filter(|entry| entry.fits(head.storage) && u64::from(entry.label) < footer.classes);
            let entry = entry.filter(|entry| entry.source >= next && entry.source < head.sources);
            let end = entry.and_then(|entry| entry.end(start).zip(Some(entry.source + 1)));
            let Some(end) = end.filter(|&(end, _)| end <= footer.tail) else {
                bail!("entry {number} of its index does not describe a record of this file");
            };
            (start, next) = end;
        }
        ensure!(start == footer.tail, "its records end at byte {start} but its index begins at byte {}", footer.tail);

        let names = |ends: &Range<usize>, total: usize| {
            let mut start = 0;
            for end in bytes[ends.clone()].as_chunks::<8>().0.iter().map(|end| u64::from_le_bytes(*end)) {
                ensure!(start <= end, "a name in its index ends before it begins");
                start = end;
            }
            ensure!(start == total as u64, "the names in its index have {start} bytes but {total} are there");
            Ok(())
        };
        names(&parts.class_ends, parts.class_names.len())?;
        names(&parts.ends, parts.names.len())?;
        let classes = (0..place(footer.classes)?).map(|class| {
            let name = name_at(&bytes, &parts.class_ends, &parts.class_names, class);
            String::from_utf8(name.to_vec()).map_err(|_| Error::new(format!("the name of class {class} is not UTF-8")))
        });
        let classes = classes.collect::<Result<_>>()?;
        let records = place(footer.records)?;
        Ok(Self {
            path: path.to_path_buf(),
            storage: head.storage,
            sources: place(head.sources)?,
            records,
            classes,
            entries: parts.entries,
            ends: parts.ends,
            names: parts.names,
            compared: (0..records.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            bytes,
        })
    }

    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Images of the source that could not be read and have no record.
    pub fn skipped(&self) -> usize {
        self.sources - self.records
    }

    /// Bytes of the file.
    pub fn file_len(&self) -> usize {
        self.bytes.len()
    }

    /// Height and width of an image, without looking at it.
    pub fn size(&self, index: usize) -> Result<[usize; 2]> {
        let entry = self.entry(index)?;
        Ok([entry.height as usize, entry.width as usize])
    }

    /// What a record holds, compared with its checksum the first time.
    pub fn payload(&self, index: usize) -> Result<&[u8]> {
        let entry = self.entry(index)?;
        let payload = self.unchecked(&entry);
        let (word, bit) = (&self.compared[index / 64], 1 << (index % 64));
        if word.load(Ordering::Relaxed) & bit == 0 {
            ensure!(crc32c(payload) == entry.checksum, "{} is damaged: its checksum is another", self.name(index));
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(payload)
    }

    /// Compares every byte with what it has to be, and decodes every image if asked to. `tell` is given how many records were looked at.
    pub fn check(&self, decoding: bool, tell: &mut dyn FnMut(usize)) -> Option<Damage> {
        const AT_A_TIME: usize = 4096;
        let mut damage: Option<Damage> = None;
        for start in (0..self.records).step_by(AT_A_TIME) {
            let end = (start + AT_A_TIME).min(self.records);
            let wrong: Vec<Error> = (start..end).into_par_iter().filter_map(|index| self.check_record(index, decoding).err()).collect();
            let records = wrong.len();
            if let Some(first) = wrong.into_iter().next() {
                damage = Some(match damage {
                    None => Damage { records, first },
                    Some(damage) => Damage { records: damage.records + records, ..damage },
                });
            }
            tell(end);
        }
        damage
    }

    fn check_record(&self, index: usize, decoding: bool) -> Result<()> {
        let entry = self.entry(index)?;
        let offset = entry.offset as usize;
        let payload = self.unchecked(&entry);
        let end = offset + payload.len();
        let whole = self.bytes[offset - BLOCK..offset] == entry.block() && crc32c(payload) == entry.checksum;
        let rest = &self.bytes[end..end.next_multiple_of(BLOCK)];
        ensure!(whole && rest.iter().all(|&byte| byte == 0), "{} is damaged: its checksum is another", self.name(index));
        if decoding {
            self.picture(index)?;
        }
        Ok(())
    }

    fn entry(&self, index: usize) -> Result<Entry> {
        let entry = self.bytes[self.entries.clone()].as_chunks::<ENTRY>().0.get(index).and_then(Entry::from_bytes);
        entry.ok_or_else(|| Error::new(format!("{} holds {} images; there is no number {index}", self.path.display(), self.records)))
    }

    fn unchecked(&self, entry: &Entry) -> &[u8] {
        &self.bytes[entry.offset as usize..][..entry.length as usize]
    }

    /// The name of the file that a record was made of.
    pub fn source(&self, index: usize) -> String {
        String::from_utf8_lossy(name_at(&self.bytes, &self.ends, &self.names, index)).into_owned()
    }
}

impl Dataset for Packed {
    fn len(&self) -> usize {
        self.records
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        self.entry(index).map_or(0, |entry| entry.label)
    }

    fn name(&self, index: usize) -> String {
        self.path.join(self.source(index)).display().to_string()
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        let (entry, payload) = (self.entry(index)?, self.payload(index)?);
        let size = [entry.height as usize, entry.width as usize];
        if self.storage != Storage::Original {
            return Picture::new(size, entry.channels as usize, payload.to_vec());
        }
        let picture = decode(payload).with_context(|| format!("cannot read {}", self.name(index)))?;
        let [h, w] = picture.size;
        ensure!(picture.size == size, "{} is {h} x {w} but its index says {} x {}", self.name(index), size[0], size[1]);
        Ok(picture)
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        if self.storage == Storage::Original { self.payload(index).map(|bytes| Some(bytes.to_vec())) } else { Ok(None) }
    }
}

/// Where the parts of the tail stand.
struct Parts {
    entries: Range<usize>,
    class_ends: Range<usize>,
    ends: Range<usize>,
    class_names: Range<usize>,
    names: Range<usize>,
}

impl Footer {
    /// The parts of the tail of a file of `length` bytes, which they fill exactly.
    fn parts(&self, length: usize) -> Result<Parts> {
        let (entries, ends) = (self.records.checked_mul(ENTRY as u64), self.records.checked_mul(8));
        let sizes = [entries, self.classes.checked_mul(8), ends, Some(self.class_bytes), Some(self.name_bytes)];
        let mut places = [self.tail; 6];
        for (i, size) in sizes.into_iter().enumerate() {
            places[i + 1] = size.and_then(|size| places[i].checked_add(size)).unwrap_or(u64::MAX);
        }
        let end = (length - BLOCK) as u64;
        ensure!(
            self.tail >= BLOCK as u64 && places[5].checked_next_multiple_of(BLOCK as u64) == Some(end),
            "its index would end at byte {} but the file has {length} bytes: it was cut short or damaged",
            places[5]
        );
        let part = |i: usize| places[i] as usize..places[i + 1] as usize;
        Ok(Parts { entries: part(0), class_ends: part(1), ends: part(2), class_names: part(3), names: part(4) })
    }
}

/// Name `number` of a list of which the ends were checked.
fn name_at<'a>(bytes: &'a [u8], ends: &Range<usize>, names: &Range<usize>, number: usize) -> &'a [u8] {
    let end = |number: usize| u64_at(bytes, ends.start + 8 * number) as usize;
    let start = if number == 0 { 0 } else { end(number - 1) };
    &bytes[names.start + start..names.start + end(number)]
}
