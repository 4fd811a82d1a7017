//! The part of zip that a `.pth` file uses: stored entries, found through the central directory.
//!
//! PyTorch leaves sizes and checksums out of the local headers, so only the central directory is believed; the local header gives
//! where the data starts. Files and entries beyond 4 GB use the zip64 fields. Checksums are not verified: PyTorch can be told not to
//! compute them.

use std::collections::HashMap;
use std::ops::Range;

use super::quoted;
use crate::error::{Error, Result};
use crate::{bail, ensure};

/// How a zip file that holds anything starts.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";
pub(super) const CENTRAL: &[u8; 4] = b"PK\x01\x02";
pub(super) const END: &[u8; 4] = b"PK\x05\x06";
pub(super) const END64: &[u8; 4] = b"PK\x06\x06";
pub(super) const LOCATOR64: &[u8; 4] = b"PK\x06\x07";
pub(super) const LOCAL_LEN: usize = 30;
pub(super) const CENTRAL_LEN: usize = 46;
pub(super) const END_LEN: usize = 22;
pub(super) const END64_LEN: usize = 56;
pub(super) const LOCATOR64_LEN: usize = 20;
const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;

/// Where the data of each entry lies, by name.
pub(super) fn entries(bytes: &[u8]) -> Result<HashMap<String, Range<usize>>> {
    let directory = find_directory(bytes)?;
    let mut entries = HashMap::new();
    let mut occupied = Vec::new();
    let mut at = directory.range.start;
    for _ in 0..directory.count {
        let record = Record { bytes: &bytes[..directory.range.end], start: at };
        let (name, whole, data, next) = entry(bytes, &record, directory.range.start)?;
        ensure!(!entries.contains_key(&name), "the zip directory names {} twice", quoted(&name));
        occupied.push((whole, name.clone()));
        entries.insert(name, data);
        at = next;
    }
    ensure!(at == directory.range.end, "the zip directory holds more than its {} entries", directory.count);

    occupied.sort_by_key(|(range, _)| range.start);
    for pair in occupied.windows(2) {
        ensure!(pair[0].0.end <= pair[1].0.start, "the zip entries {} and {} overlap", quoted(&pair[0].1), quoted(&pair[1].1));
    }
    Ok(entries)
}

struct Directory {
    range: Range<usize>,
    count: u64,
}

/// Reads little-endian numbers at an offset from `start`, never outside `bytes`.
struct Record<'a> {
    bytes: &'a [u8],
    start: usize,
}

impl<'a> Record<'a> {
    fn slice(&self, at: usize, len: usize) -> Result<&'a [u8]> {
        let start = self.start.checked_add(at);
        let slice = start.and_then(|start| self.bytes.get(start..start.checked_add(len)?));
        slice.ok_or_else(|| Error::new("the zip directory is cut short"))
    }

    fn number(&self, at: usize, len: usize) -> Result<u64> {
        Ok(self.slice(at, len)?.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    fn u16(&self, at: usize) -> Result<u16> {
        Ok(self.number(at, 2)? as u16)
    }

    fn expect(&self, magic: &[u8; 4]) -> Result<()> {
        ensure!(self.slice(0, 4)? == magic, "the zip directory is damaged at byte {}", self.start);
        Ok(())
    }
}

fn position(number: u64) -> Result<usize> {
    usize::try_from(number).map_err(|_| Error::new("the zip directory holds an absurd number"))
}

fn find_directory(bytes: &[u8]) -> Result<Directory> {
    let missing = || Error::new("it is a zip file without its central directory, so it was probably cut short");
    let last = bytes.len().checked_sub(END_LEN).ok_or_else(missing)?;
    // The end record is followed by a comment of at most 65535 bytes, whose length it tells.
    let end = (last.saturating_sub(usize::from(u16::MAX))..=last)
        .rev()
        .map(|start| Record { bytes, start })
        .find(|record| {
            record.slice(0, 4).is_ok_and(|magic| magic == END)
                && record.u16(20).is_ok_and(|comment| usize::from(comment) == last - record.start)
        })
        .ok_or_else(missing)?;

    let (mut count, mut size, mut offset) = (end.number(10, 2)?, end.number(12, 4)?, end.number(16, 4)?);
    let mut one_disk = end.u16(4)? == 0 && end.u16(6)? == 0 && end.number(8, 2)? == count;
    let mut directory_end = end.start;
    if let Some(start) = end.start.checked_sub(LOCATOR64_LEN)
        && bytes[start..].starts_with(LOCATOR64)
    {
        let locator = Record { bytes, start };
        let end64 = Record { bytes: &bytes[..start], start: position(locator.number(8, 8)?)? };
        end64.expect(END64)?;
        let whole = end64.number(4, 8)?.checked_add(12 + end64.start as u64);
        ensure!(whole == Some(start as u64), "the zip64 end record has a wrong length");
        (count, size, offset) = (end64.number(32, 8)?, end64.number(40, 8)?, end64.number(48, 8)?);
        one_disk = end64.number(16, 8)? == 0 && end64.number(24, 8)? == count && locator.number(4, 4)? == 0 && locator.number(16, 4)? <= 1;
        directory_end = end64.start;
    }
    ensure!(one_disk, "a zip file in several parts is not supported");
    let (size, offset) = (position(size)?, position(offset)?);
    let fits = offset.checked_add(size) == Some(directory_end);
    ensure!(fits, "the zip directory ({size} bytes at {offset}) does not end where its end record starts ({directory_end})");
    Ok(Directory { range: offset..directory_end, count })
}

/// Name, local header and data together, data, and where the next record starts.
fn entry(bytes: &[u8], record: &Record, directory: usize) -> Result<(String, Range<usize>, Range<usize>, usize)> {
    record.expect(CENTRAL)?;
    let (name_len, extra_len, comment_len) = (record.u16(28)?.into(), record.u16(30)?.into(), record.u16(32)?.into());
    let name = record.slice(CENTRAL_LEN, name_len)?;
    let name = String::from_utf8(name.to_vec()).map_err(|_| Error::new("the zip directory holds a name that is not UTF-8"))?;
    let extra = record.slice(CENTRAL_LEN + name_len, extra_len)?;
    record.slice(CENTRAL_LEN + name_len + extra_len, comment_len)?;
    let next = record.start + CENTRAL_LEN + name_len + extra_len + comment_len;

    let shown = quoted(&name);
    let (flags, method) = (record.u16(8)?, record.u16(10)?);
    ensure!(flags & ENCRYPTED == 0, "the zip entry {shown} is encrypted");
    ensure!(method == 0, "the zip entry {shown} is compressed (method {method}); PyTorch stores entries uncompressed, so save it again");
    let mut size = record.number(24, 4)?;
    let mut packed = record.number(20, 4)?;
    let mut offset = record.number(42, 4)?;
    let mut disk = record.number(34, 2)?;
    let mut wide = zip64_field(extra)?;
    for (number, full) in [(&mut size, 4), (&mut packed, 4), (&mut offset, 4), (&mut disk, 2)] {
        if *number == (1u64 << (8 * full)) - 1 {
            // A number that does not fit stands in the zip64 field; the disk is the only one of 4 bytes there.
            let len = if full == 4 { 8 } else { 4 };
            let Some((head, rest)) = wide.split_at_checked(len) else { bail!("the zip entry {shown} lacks its zip64 field") };
            *number = head.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
            wide = rest;
        }
    }
    ensure!(disk == 0, "a zip file in several parts is not supported");
    ensure!(size == packed, "the zip entry {shown} has two sizes, {packed} and {size}");

    let start = position(offset)?;
    let local = Record { bytes: &bytes[..directory], start };
    let outside = || Error::new(format!("the zip entry {shown} leaves the file"));
    ensure!(local.slice(0, 4).map_err(|_| outside())? == MAGIC, "the zip entry {shown} has no local header");
    ensure!(local.slice(LOCAL_LEN, name_len).is_ok_and(|n| n == name.as_bytes()), "the zip entry {shown} has another local name");
    ensure!(local.u16(26)? as usize == name_len, "the zip entry {shown} has another local name");
    ensure!(local.u16(6)? & ENCRYPTED == 0 && local.u16(8)? == 0, "the zip entry {shown} is encrypted or compressed");
    let head_len = LOCAL_LEN + name_len + usize::from(local.u16(28)?);
    let size = position(size)?;
    local.slice(head_len, size).map_err(|_| outside())?;
    let data = start + head_len..start + head_len + size;
    Ok((name, start..data.end, data, next))
}

/// The body of the zip64 extra field, empty where there is none.
fn zip64_field(mut extra: &[u8]) -> Result<&[u8]> {
    while let [id_low, id_high, len_low, len_high, rest @ ..] = extra {
        let len = u16::from_le_bytes([*len_low, *len_high]).into();
        let Some((body, after)) = rest.split_at_checked(len) else { bail!("a zip entry's extra field is cut short") };
        if u16::from_le_bytes([*id_low, *id_high]) == 1 {
            return Ok(body);
        }
        extra = after;
    }
    Ok(&[])
}
