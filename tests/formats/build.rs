//! Hand-made zips and pickles, right and wrong.

use std::path::PathBuf;

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/pth")
}

pub struct Entry {
    pub name: &'static str,
    pub data: Vec<u8>,
    pub flags: u16,
    pub method: u16,
    /// What the directory says, if not the truth.
    pub size: Option<u32>,
    pub offset: Option<u32>,
    pub extra: Vec<u8>,
}

pub fn entry(name: &'static str, data: &[u8]) -> Entry {
    Entry { name, data: data.to_vec(), flags: 0, method: 0, size: None, offset: None, extra: Vec::new() }
}

pub fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for e in entries {
        let at = file.len() as u32;
        let common = |out: &mut Vec<u8>, size: u32| {
            for number in [20, e.flags, e.method, 0, 0] {
                out.extend(u16::to_le_bytes(number));
            }
            for number in [0, size, size] {
                out.extend(u32::to_le_bytes(number));
            }
            out.extend((e.name.len() as u16).to_le_bytes());
        };
        file.extend(b"PK\x03\x04");
        common(&mut file, e.data.len() as u32);
        file.extend([0, 0]);
        file.extend(e.name.as_bytes());
        file.extend(&e.data);
        directory.extend(b"PK\x01\x02\x14\x00");
        common(&mut directory, e.size.unwrap_or(e.data.len() as u32));
        directory.extend((e.extra.len() as u16).to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(e.offset.unwrap_or(at).to_le_bytes());
        directory.extend(e.name.as_bytes());
        directory.extend(&e.extra);
    }
    let (start, count) = (file.len() as u32, entries.len() as u16);
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}

/// A `.pth` around this pickle with one storage "0" of 12 floats.
pub fn pth(pickle: &[u8]) -> Vec<u8> {
    let storage: Vec<u8> = (0..12u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    zip(&[entry("a/data.pkl", pickle), entry("a/byteorder", b"little"), entry("a/data/0", &storage)])
}

pub fn cat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub fn text(s: &str) -> Vec<u8> {
    cat(&[b"X", &(s.len() as u32).to_le_bytes(), s.as_bytes()])
}

pub fn int(i: i64) -> Vec<u8> {
    cat(&[b"\x8a\x08", &i.to_le_bytes()])
}

pub fn ints(list: &[i64]) -> Vec<u8> {
    cat(&[b"(", &list.iter().flat_map(|&i| int(i)).collect::<Vec<_>>(), b"t"])
}

pub fn storage(class: &str, key: &str, count: i64) -> Vec<u8> {
    cat(&[b"(", &text("storage"), b"ctorch\n", class.as_bytes(), b"\n", &text(key), &text("cpu"), &int(count), b"tQ"])
}

/// A view of storage "0".
pub fn view(offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    view_of(&storage("FloatStorage", "0", 12), offset, shape, strides)
}

pub fn view_of(storage: &[u8], offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let head = b"ctorch._utils\n_rebuild_tensor_v2\n(";
    cat(&[head, storage, &int(offset), &ints(shape), &ints(strides), b"\x89ccollections\nOrderedDict\n)RtR"])
}

/// A pickle of `{"w": value}`.
pub fn with_w(value: &[u8]) -> Vec<u8> {
    cat(&[b"\x80\x02}", &text("w"), value, b"s."])
}
