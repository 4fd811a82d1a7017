//! Writing a packed file: images are read and resized by all threads while those before them are written, in the order of the source.

use super::{BLOCK, ENTRY, Entry, Footer, Head, Storage};
use crate::data::decode::decode;
use crate::data::{Dataset, Picture, resize};
use crate::device::parallel;
use crate::error::{Context, Error, Result};
use crate::formats::{crc32c, extend_crc32c};
use crate::{bail, ensure};
use rayon::prelude::*;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

pub struct Options<'a> {
    pub storage: Storage,
    /// Whether an image that cannot be read is an error, and not skipped.
    pub strict: bool,
    /// Whether a file that is there already is replaced.
    pub force: bool,
    /// The folder that is left out of the names of the source's files.
    pub root: &'a Path,
}

/// What happens while a file is written.
#[derive(Debug)]
pub enum Event<'a> {
    /// An earlier attempt is being continued.
    Continued {
        images: usize,
    },
    Skipped {
        name: &'a str,
        why: &'a str,
    },
    /// Images of the source that were dealt with.
    Progress {
        done: usize,
        of: usize,
    },
}

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packing {
    pub images: usize,
    pub skipped: usize,
    /// Images that an earlier attempt had written.
    pub continued: usize,
    pub bytes: u64,
}

/// Where a file is worked on until it is whole.
pub(super) fn partial(output: &Path) -> PathBuf {
    // A separator at the end is no part of the name.
    let mut name = output.components().as_path().as_os_str().to_os_string();
    name.push(".partial");
    name.into()
}

/// Writes the images of `dataset` into one file, or goes on where an earlier attempt was interrupted.
pub fn pack(dataset: &dyn Dataset, output: &Path, options: &Options, tell: &mut dyn FnMut(Event)) -> Result<Packing> {
    let shown = output.display();
    ensure!(!output.is_dir(), "{shown} is a folder; name the file to write");
    ensure!(options.force || !output.exists(), "{shown} is there already; --force replaces it");
    ensure!(!dataset.is_empty(), "there are no images to write into {shown}");
    if options.storage == Storage::Original && matches!(dataset.encoded(0), Ok(None)) {
        return Err(Error::usage(format!("--original: {} has no file of its own; use --size", dataset.name(0))));
    }
    let names: Vec<String> = (0..dataset.len()).map(|index| short_name(dataset, index, options.root)).collect();
    let list = checksum_of_list(dataset, &names)?;
    let head = Head { storage: options.storage, sources: dataset.len() as u64, list };
    let working = partial(output);
    let mut writer = Writer::open(&working, head, options.force)?;
    writer.recover(dataset, tell).with_context(|| format!("cannot read {}", working.display()))?;

    let continued = writer.entries.len();
    let skipped = writer.fill(dataset, &names, options.strict, tell)?;
    if writer.entries.is_empty() {
        let _ = fs::remove_file(&working);
        bail!("none of the {} images could be read, so {shown} was not written", names.len());
    }
    let images = writer.entries.len();
    let names = writer.entries.iter().map(|entry| names[entry.source as usize].as_str());
    let bytes = finish(&mut writer.out, writer.end, &writer.entries, dataset.classes(), names).with_context(|| writer.stopped())?;
    fs::rename(&working, output).with_context(|| format!("cannot rename {} to {shown}", working.display()))?;
    sync_folder(output);
    Ok(Packing { images, skipped, continued, bytes })
}

/// What the file calls an image of the source.
fn short_name(dataset: &dyn Dataset, index: usize, root: &Path) -> String {
    let name = dataset.name(index);
    let short = Path::new(&name).strip_prefix(root).ok().and_then(Path::to_str).filter(|short| !short.is_empty());
    short.map_or(name.clone(), str::to_string)
}

/// Tells a source from another one: its names, labels and classes in their order.
fn checksum_of_list(dataset: &dyn Dataset, names: &[String]) -> Result<u32> {
    let classes = dataset.classes();
    let text = |crc: u32, text: &str| extend_crc32c(extend_crc32c(crc, &(text.len() as u64).to_le_bytes()), text.as_bytes());
    let mut crc = classes.iter().fold(0, |crc, class| text(crc, class));
    for (index, name) in names.iter().enumerate() {
        let label = dataset.label(index);
        ensure!((label as usize) < classes.len(), "{name} has label {label} but there are {} classes", classes.len());
        crc = extend_crc32c(text(crc, name), &label.to_le_bytes());
    }
    Ok(crc)
}

/// An image that is ready to be written.
struct Record {
    /// Without its place in the file.
    entry: Entry,
    payload: Vec<u8>,
}

impl Record {
    fn read(dataset: &dyn Dataset, source: usize, storage: Storage) -> Result<Self> {
        let (size, channels, payload) = match storage {
            Storage::Original => {
                let bytes =
                    dataset.encoded(source)?.ok_or_else(|| Error::new(format!("{} has no file of its own", dataset.name(source))))?;
                let picture = decode(&bytes).with_context(|| format!("cannot read {}", dataset.name(source)))?;
                (picture.size, picture.channels, bytes)
            }
            Storage::Pixels { short } => {
                let picture =
                    smaller(dataset.picture(source)?, short as usize).with_context(|| format!("cannot resize {}", dataset.name(source)))?;
                (picture.size, picture.channels, picture.pixels)
            }
        };
        let small = |number: usize| u32::try_from(number).map_err(|_| Error::new(format!("{} is too large", dataset.name(source))));
        let entry = Entry {
            offset: 0,
            length: payload.len() as u64,
            source: source as u64,
            height: small(size[0])?,
            width: small(size[1])?,
            channels: small(channels)?,
            label: dataset.label(source),
            checksum: crc32c(&payload),
        };
        Ok(Self { entry, payload })
    }
}

/// A picture with its short side resized to `short`; one that is already smaller stays as it is.
fn smaller(picture: Picture, short: usize) -> Result<Picture> {
    if picture.size[0].min(picture.size[1]) <= short {
        return Ok(picture);
    }
    let to = resize::short_side_size(picture.size, short)?;
    Picture::new(to, picture.channels, resize::resize(&picture.pixels, picture.size, picture.channels, to)?)
}

/// The file while it is worked on.
struct Writer {
    path: PathBuf,
    out: BufWriter<File>,
    /// Where the next record begins.
    end: u64,
    entries: Vec<Entry>,
    sources: u64,
    storage: Storage,
}

impl Writer {
    /// Makes the file, or opens that of an earlier attempt; one with another head is begun anew if `force` is set.
    fn open(path: &Path, head: Head, force: bool) -> Result<Self> {
        let shown = path.display();
        let context = || format!("cannot write {shown}");
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).with_context(context)?;
        // Where files cannot be locked, nothing is known of others.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            bail!("{shown} is being written by another process; wait for it, or name another file");
        }
        let wanted = head.to_bytes();
        let mut found = Vec::new();
        (&mut file).take(BLOCK as u64).read_to_end(&mut found).with_context(context)?;
        if !wanted.starts_with(&found) {
            let other = match found.first_chunk().map(Head::from_bytes) {
                Some(Ok(other)) if other.storage != head.storage => format!("holds {}, not {}", other.storage, head.storage),
                Some(Ok(_)) => "was begun with another list of images".to_string(),
                _ => "is not the beginning of a packed file".to_string(),
            };
            ensure!(force, "{shown} is there already and {other}; remove it, or use --force to begin anew");
            found.clear();
        }
        if found.len() < BLOCK {
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&wanted)).with_context(context)?;
        }
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { path: path.to_path_buf(), out, end: BLOCK as u64, entries: Vec::new(), sources: head.sources, storage: head.storage })
    }

    /// Keeps the whole records of an earlier attempt and cuts off what stands behind them.
    fn recover(&mut self, dataset: &dyn Dataset, tell: &mut dyn FnMut(Event)) -> io::Result<()> {
        let length = self.out.get_ref().metadata()?.len();
        let mut from = BufReader::with_capacity(1 << 20, self.out.get_ref());
        from.seek(SeekFrom::Start(BLOCK as u64))?;
        let mut next = 0;
        while let Some((entry, end)) = record(&mut from, self.end, length)? {
            let known = entry.source >= next && entry.source < self.sources && entry.fits(self.storage);
            if !known || dataset.label(entry.source as usize) != entry.label {
                break;
            }
            next = entry.source + 1;
            self.end = end;
            self.entries.push(entry);
            if next.is_multiple_of(4096) {
                tell(Event::Progress { done: next as usize, of: self.sources as usize });
            }
        }
        self.out.get_ref().set_len(self.end)?;
        self.out.seek(SeekFrom::Start(self.end))?;
        Ok(())
    }

    /// Writes the images of the source that are behind those that are there; how many of all were skipped.
    fn fill(&mut self, dataset: &dyn Dataset, names: &[String], strict: bool, tell: &mut dyn FnMut(Event)) -> Result<usize> {
        let mut next = self.entries.last().map_or(0, |entry| entry.source as usize + 1);
        let mut skipped = next - self.entries.len();
        ensure!(
            !strict || skipped == 0,
            "{}: {skipped} images that could not be read were left out of it; remove it, or continue without --strict-data",
            self.path.display()
        );
        if next > 0 {
            tell(Event::Continued { images: self.entries.len() });
        }
        let mut kept = self.entries.iter().map(|entry| entry.source as usize).peekable();
        for (source, name) in names[..next].iter().enumerate() {
            if kept.next_if_eq(&source).is_none() {
                tell(Event::Skipped { name, why: "the earlier attempt could not read it" });
            }
        }

        let (storage, at_a_time) = (self.storage, 16 * parallel::threads());
        let mut ready: Vec<Record> = Vec::new();
        while next < names.len() || !ready.is_empty() {
            let sources = next..(next + at_a_time).min(names.len());
            let read = || sources.clone().into_par_iter().map(|source| Record::read(dataset, source, storage)).collect();
            let (written, records): (io::Result<()>, Vec<Result<Record>>) = rayon::join(|| self.append(&ready), read);
            written.with_context(|| self.stopped())?;
            ready.clear();
            for (source, record) in sources.clone().zip(records) {
                match record {
                    Ok(record) => ready.push(record),
                    Err(error) if strict => {
                        self.append(&ready).with_context(|| self.stopped())?;
                        return Err(error).context("--strict-data");
                    }
                    Err(error) => {
                        skipped += 1;
                        tell(Event::Skipped { name: &names[source], why: &error.chain() });
                    }
                }
            }
            next = sources.end;
            tell(Event::Progress { done: next, of: names.len() });
        }
        Ok(skipped)
    }

    /// Writes records behind those that are there, down to the operating system.
    fn append(&mut self, records: &[Record]) -> io::Result<()> {
        for Record { entry, payload } in records {
            let entry = Entry { offset: self.end + BLOCK as u64, ..*entry };
            let end = entry.end(self.end).ok_or(ErrorKind::FileTooLarge)?;
            self.out.write_all(&entry.block())?;
            self.out.write_all(payload)?;
            self.out.write_all(&[0; BLOCK][..(end - entry.offset - entry.length) as usize])?;
            self.end = end;
            self.entries.push(entry);
        }
        self.out.flush()
    }

    /// What to say when writing failed.
    fn stopped(&self) -> String {
        format!("cannot write {}; what is there stays, and the same command continues with it", self.path.display())
    }
}

/// The record that begins at `start`, where `from` stands, and where the next one begins; None where no whole record begins there.
fn record(from: &mut impl Read, start: u64, length: u64) -> io::Result<Option<(Entry, u64)>> {
    let mut block = [0; BLOCK];
    if !filled(from, &mut block)? {
        return Ok(None);
    }
    let entry = block.first_chunk::<ENTRY>().and_then(Entry::from_bytes).filter(|entry| entry.block() == block);
    let Some((entry, end)) = entry.and_then(|entry| Some(entry).zip(entry.end(start).filter(|&end| end <= length))) else {
        return Ok(None);
    };
    let (mut left, mut crc, mut piece) = (entry.length as usize, 0, [0; 1 << 14]);
    while left > 0 {
        let piece = &mut piece[..left.min(1 << 14)];
        if !filled(from, piece)? {
            return Ok(None);
        }
        crc = extend_crc32c(crc, piece);
        left -= piece.len();
    }
    let rest = &mut [0; BLOCK][..(end - entry.offset - entry.length) as usize];
    let whole = filled(from, rest)? && rest.iter().all(|&byte| byte == 0) && crc == entry.checksum;
    Ok(whole.then_some((entry, end)))
}

/// Whether so many bytes were there.
fn filled(from: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes what stands behind the records, down to the disk; the length of the file.
fn finish<'a>(
    out: &mut BufWriter<File>,
    tail: u64,
    entries: &[Entry],
    classes: &'a [String],
    names: impl Iterator<Item = &'a str> + Clone,
) -> io::Result<u64> {
    let (mut checksum, mut end) = (0, tail);
    let mut put = |bytes: &[u8]| {
        checksum = extend_crc32c(checksum, bytes);
        end += bytes.len() as u64;
        out.write_all(bytes)
    };
    for entry in entries {
        put(&entry.to_bytes())?;
    }
    let classes = classes.iter().map(String::as_str);
    let class_bytes = put_ends(&mut put, classes.clone())?;
    let name_bytes = put_ends(&mut put, names.clone())?;
    for name in classes.clone().chain(names) {
        put(name.as_bytes())?;
    }
    let unpadded = tail + (entries.len() * (ENTRY + 8) + classes.len() * 8) as u64 + class_bytes + name_bytes;
    put(&[0; BLOCK][..(unpadded.next_multiple_of(BLOCK as u64) - unpadded) as usize])?;
    let (records, classes) = (entries.len() as u64, classes.len() as u64);
    out.write_all(&Footer { tail, records, classes, class_bytes, name_bytes, checksum }.to_bytes())?;
    out.flush()?;
    out.get_ref().sync_all()?;
    Ok(end + BLOCK as u64)
}

/// Where each of the names ends; the bytes of all.
fn put_ends<'a>(put: &mut impl FnMut(&[u8]) -> io::Result<()>, names: impl Iterator<Item = &'a str>) -> io::Result<u64> {
    let mut end = 0;
    for name in names {
        end += name.len() as u64;
        put(&end.to_le_bytes())?;
    }
    Ok(end)
}

/// Makes a renamed file's name last; where folders cannot be synchronised, nothing is lost but time.
fn sync_folder(path: &Path) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}
