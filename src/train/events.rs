//! Event files of TensorBoard: scalars, and nothing else of that format.
//!
//!   record = length (u64) | masked(crc(length)) | data | masked(crc(data)),     masked(c) = (c >> 15 | c << 17) + 0xa282ead8
//!   data   = Event { 1: wall_time (double), 2: step (int64), 3: file_version | 5: Summary { 1: Value { 1: tag, 2: simple_value (float) } } | 7: SessionLog }
//!
//! crc is CRC-32C, numbers are little-endian, the data is a protocol buffer. It is written by hand because no crate for it is kept up: tensorboard-rs had its
//! last release in March 2022 and brings rust-protobuf and an old image crate, tfrecord and tboard bring prost and its build step, and a scalar is thirty bytes.

use super::record::Appender;
use crate::error::{Context, Result};
use crate::formats;
use std::path::{Path, PathBuf};

fn masked_crc(bytes: &[u8]) -> u32 {
    formats::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 128 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field that is bytes: a string or a message.
fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// An event whose content is one field that is bytes.
fn event(time: f64, step: i64, number: u8, content: &[u8]) -> Vec<u8> {
    let mut data = vec![1 << 3 | 1];
    data.extend_from_slice(&time.to_le_bytes());
    data.push(2 << 3);
    varint(&mut data, step as u64);
    field(&mut data, number, content);
    frame(&data)
}

fn scalar(time: f64, step: i64, tag: &str, value: f32) -> Vec<u8> {
    let mut content = Vec::new();
    field(&mut content, 1, tag.as_bytes());
    content.push(2 << 3 | 5);
    content.extend_from_slice(&value.to_le_bytes());
    let mut summary = Vec::new();
    field(&mut summary, 1, &content);
    event(time, step, 5, &summary)
}

/// One number of one curve.
pub struct Scalar {
    pub time: f64,
    pub step: i64,
    pub tag: String,
    pub value: f32,
}

/// An event file that grows.
pub struct Events(Appender);

impl Events {
    /// A file `events.out.tfevents.<time>.<host>.masque` that begins with these numbers, in place of those that are there.
    pub fn create(folder: &Path, time: f64, scalars: &[Scalar]) -> Result<Self> {
        for old in files(folder)? {
            std::fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host: String = host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect();
        let host = if host.is_empty() { "localhost" } else { &host };
        let path = folder.join(format!("events.out.tfevents.{:010}.{host}.masque", time as u64));
        let mut begin = event(time, 0, 3, b"brain.Event:2");
        // SessionLog { status: START } makes a TensorBoard that watches the folder forget what it read of the files before.
        begin.extend(event(time, 0, 7, &[1 << 3, 1]));
        begin.extend(bytes_of(scalars));
        let mut file = Appender::create(path)?;
        file.append(&begin)?;
        Ok(Self(file))
    }

    pub fn write(&mut self, scalars: &[Scalar]) -> Result<()> {
        if scalars.is_empty() { Ok(()) } else { self.0.append(&bytes_of(scalars)) }
    }
}

fn bytes_of(scalars: &[Scalar]) -> Vec<u8> {
    scalars.iter().flat_map(|s| scalar(s.time, s.step, &s.tag, s.value)).collect()
}

/// The event files of this program in a folder.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("events.out.tfevents.") && name.ends_with(".masque")
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(ours).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_has_its_published_values() {
        // RFC 3720, B.4: 32 zero bytes, 32 bytes of ones, 0..32.
        let unmasked = |bytes: &[u8]| masked_crc(bytes).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!(unmasked(&[0; 32]), 0x8a91_36aa);
        assert_eq!(unmasked(&[255; 32]), 0x62a8_ab43);
        assert_eq!(unmasked(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(unmasked(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_scalar_is_the_bytes_that_tensorboard_writes() {
        // Event(wall_time=1.5, step=300, summary=Summary(value=[Summary.Value(tag="lr", simple_value=0.5)])) through TensorBoard's own classes.
        let data =
            [0x09, 0, 0, 0, 0, 0, 0, 0xf8, 0x3f, 0x10, 0xac, 0x02, 0x2a, 0x0b, 0x0a, 0x09, 0x0a, 0x02, b'l', b'r', 0x15, 0, 0, 0, 0x3f];
        let framed = scalar(1.5, 300, "lr", 0.5);
        assert_eq!(framed[12..framed.len() - 4], data);
        assert_eq!(framed[..8], (data.len() as u64).to_le_bytes());
        assert_eq!(framed[framed.len() - 4..], masked_crc(&data).to_le_bytes());
    }
}
