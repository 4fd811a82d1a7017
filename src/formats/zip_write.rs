//! Writes a zip of stored entries the way PyTorch lays it out: data aligned to 64 bytes by an extra field, zip64 where needed.

use std::io::{self, Write};

use super::zip::{CENTRAL, CENTRAL_LEN, END, END_LEN, END64, END64_LEN, LOCAL_LEN, LOCATOR64, LOCATOR64_LEN, MAGIC};

const ALIGNMENT: u64 = 64;
/// The id of the extra field with which PyTorch pads ("FB").
const PADDING_ID: u16 = 0x4246;
const ZIP64_ID: u16 = 1;
const UTF8_NAMES: u16 = 1 << 11;
/// 1 January 1980, the first day that zip knows.
const DATE: u16 = 1 << 5 | 1;

pub(super) struct ZipWriter<W> {
    out: W,
    at: u64,
    directory: Vec<u8>,
    count: u64,
    /// Numbers from here on go into zip64 fields.
    wide_from: u64,
}

impl<W: Write> ZipWriter<W> {
    pub fn new(out: W) -> Self {
        Self::with_limit(out, u32::MAX.into())
    }

    fn with_limit(out: W, wide_from: u64) -> Self {
        Self { out, at: 0, directory: Vec::new(), count: 0, wide_from }
    }

    pub fn entry(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        let name_len = u16::try_from(name.len()).map_err(io::Error::other)?;
        let (offset, size, crc) = (self.at, data.len() as u64, crc32(data));
        let wide_size = size >= self.wide_from;
        let mut extra = Vec::new();
        if wide_size {
            put(&mut extra, &[&ZIP64_ID.to_le_bytes(), &16u16.to_le_bytes(), &size.to_le_bytes(), &size.to_le_bytes()]);
        }
        let unpadded = offset + (LOCAL_LEN + name.len() + extra.len() + 4) as u64;
        let padding = (unpadded.next_multiple_of(ALIGNMENT) - unpadded) as u16;
        put(&mut extra, &[&PADDING_ID.to_le_bytes(), &padding.to_le_bytes(), &vec![0; padding.into()]]);

        let mut local = MAGIC.to_vec();
        self.put_common(&mut local, crc, size);
        put(&mut local, &[&name_len.to_le_bytes(), &(extra.len() as u16).to_le_bytes(), name.as_bytes(), &extra]);
        self.write(&local)?;
        self.write(data)?;

        let mut wide = Vec::new();
        if wide_size {
            put(&mut wide, &[&size.to_le_bytes(), &size.to_le_bytes()]);
        }
        if offset >= self.wide_from {
            put(&mut wide, &[&offset.to_le_bytes()]);
        }
        if !wide.is_empty() {
            let field: Vec<u8> = [&ZIP64_ID.to_le_bytes()[..], &(wide.len() as u16).to_le_bytes(), &wide].concat();
            wide = field;
        }
        let mut record = CENTRAL.to_vec();
        put(&mut record, &[&45u16.to_le_bytes()]);
        self.put_common(&mut record, crc, size);
        put(&mut record, &[&name_len.to_le_bytes(), &(wide.len() as u16).to_le_bytes(), &[0; 10], &self.narrow(offset)]);
        debug_assert_eq!(record.len(), CENTRAL_LEN);
        put(&mut record, &[name.as_bytes(), &wide]);
        self.directory.extend(record);
        self.count += 1;
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<()> {
        let directory = std::mem::take(&mut self.directory);
        let (start, size, count) = (self.at, directory.len() as u64, self.count);
        self.write(&directory)?;
        if start >= self.wide_from || size >= self.wide_from || count >= u64::from(u16::MAX) {
            let end64_at = self.at;
            let mut end64 = END64.to_vec();
            put(&mut end64, &[&(END64_LEN as u64 - 12).to_le_bytes(), &[45, 0, 45, 0], &[0; 8], &count.to_le_bytes()]);
            put(&mut end64, &[&count.to_le_bytes(), &size.to_le_bytes(), &start.to_le_bytes()]);
            put(&mut end64, &[LOCATOR64, &[0; 4], &end64_at.to_le_bytes(), &1u32.to_le_bytes()]);
            debug_assert_eq!(end64.len(), END64_LEN + LOCATOR64_LEN);
            self.write(&end64)?;
        }
        let short_count = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        let mut end = END.to_vec();
        put(&mut end, &[&[0; 4], &short_count, &short_count, &self.narrow(size), &self.narrow(start), &[0; 2]]);
        debug_assert_eq!(end.len(), END_LEN);
        self.write(&end)
    }

    /// The fields that local headers and directory records share, from the version needed to the two sizes.
    fn put_common(&self, out: &mut Vec<u8>, crc: u32, size: u64) {
        let version: u16 = if size >= self.wide_from { 45 } else { 20 };
        put(out, &[&version.to_le_bytes(), &UTF8_NAMES.to_le_bytes(), &[0; 4], &DATE.to_le_bytes(), &crc.to_le_bytes()]);
        put(out, &[&self.narrow(size), &self.narrow(size)]);
    }

    /// A number of 4 bytes, all ones where it stands in a zip64 field.
    fn narrow(&self, number: u64) -> [u8; 4] {
        if number >= self.wide_from { [0xff; 4] } else { (number as u32).to_le_bytes() }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// The checksum of zip, eight bytes at a time.
fn crc32(data: &[u8]) -> u32 {
    let (words, rest) = data.as_chunks::<8>();
    let mut crc = !0u32;
    for word in words {
        let word = u64::from_le_bytes(*word) ^ u64::from(crc);
        crc = (0..8).fold(0, |sum, i| sum ^ CRC_TABLES[7 - i][(word >> (8 * i)) as usize & 0xff]);
    }
    for &byte in rest {
        crc = CRC_TABLES[0][(crc ^ u32::from(byte)) as usize & 0xff] ^ crc >> 8;
    }
    !crc
}

/// `CRC_TABLES[k][b]` is the checksum of byte b followed by k zero bytes.
static CRC_TABLES: [[u32; 256]; 8] = {
    let mut tables = [[0u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut k = 1;
    while k < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[k - 1][byte];
            tables[k][byte] = before >> 8 ^ tables[0][before as usize & 0xff];
            byte += 1;
        }
        k += 1;
    }
    tables
};

#[cfg(test)]
mod tests {
    use super::super::zip;
    use super::*;

    #[test]
    fn crc32_has_the_published_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn entries_beyond_the_limit_go_through_zip64_fields_and_come_back() {
        let (small, large) = (vec![7u8; 10], vec![9u8; 3000]);
        for limit in [0, 5, 100, 2000, 1 << 20] {
            let mut file = Vec::new();
            let mut writer = ZipWriter::with_limit(&mut file, limit);
            let entries = [("a/small", &small), ("a/large", &large), ("a/after", &small)];
            for (name, data) in entries {
                writer.entry(name, data).unwrap();
            }
            writer.finish().unwrap();
            let read = zip::entries(&file).unwrap();
            assert_eq!(read.len(), 3);
            for (name, data) in entries {
                let range = read[name].clone();
                assert_eq!(range.start % 64, 0);
                assert_eq!(&file[range], &data[..], "{name} with limit {limit}");
            }
        }
    }
}
