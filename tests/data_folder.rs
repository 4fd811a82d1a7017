//! Images in folders: every kind reads as Pillow reads it, what is damaged is named, and labels never shift.

mod common;

use common::Scratch;
use masque::data::folder::ImageFolder;
use masque::data::{Dataset, decode};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// Remembers the largest single allocation of each thread.
struct Watching;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images")
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

impl Scratch {
    fn refusal(&self) -> String {
        ImageFolder::open(&self.0).err().expect("the folder opens").chain()
    }
}

/// What tests/reference/make_images.py printed: the size and the pixels at the start, at a third of the middle row and at the end.
type Row = (&'static str, [usize; 2], [[u8; 3]; 3]);
const PILLOW: [Row; 22] = [
    ("alpha.png", [20, 36], [[218, 192, 209], [102, 28, 56], [173, 127, 127]]),
    ("bits.png", [20, 36], [[255, 255, 255], [0, 0, 0], [0, 0, 0]]),
    ("cmyk.jpg", [20, 36], [[48, 34, 35], [174, 135, 161], [105, 108, 75]]),
    ("exact.webp", [20, 36], [[218, 192, 209], [102, 28, 56], [173, 127, 127]]),
    ("full.jpg", [20, 36], [[219, 192, 207], [103, 27, 55], [172, 128, 129]]),
    ("grey.jpg", [20, 36], [[195, 195, 195], [52, 52, 52], [111, 111, 111]]),
    ("grey16.png", [20, 36], [[255, 255, 255], [255, 255, 255], [255, 255, 255]]),
    ("grey2.png", [20, 36], [[255, 255, 255], [0, 0, 0], [85, 85, 85]]),
    ("grey_alpha.png", [20, 36], [[195, 195, 195], [53, 53, 53], [112, 112, 112]]),
    ("half.jpg", [20, 36], [[229, 188, 206], [101, 28, 55], [164, 128, 142]]),
    ("lossy.webp", [20, 36], [[233, 190, 202], [95, 27, 54], [172, 129, 130]]),
    ("one.png", [1, 1], [[9, 200, 77], [9, 200, 77], [9, 200, 77]]),
    ("palette.bmp", [20, 36], [[214, 169, 199], [101, 27, 53], [196, 117, 147]]),
    ("palette.png", [20, 36], [[214, 169, 199], [101, 27, 53], [196, 117, 147]]),
    ("plain.bmp", [20, 36], [[218, 192, 209], [102, 28, 56], [173, 127, 127]]),
    ("plain.png", [20, 36], [[218, 192, 209], [102, 28, 56], [173, 127, 127]]),
    ("progressive.jpg", [20, 36], [[229, 188, 206], [101, 28, 55], [164, 128, 142]]),
    ("restart.jpg", [20, 36], [[220, 192, 204], [102, 27, 57], [168, 127, 131]]),
    ("rgb.jpg", [20, 36], [[218, 192, 209], [102, 28, 55], [173, 126, 127]]),
    ("rgb16.png", [20, 36], [[218, 192, 209], [102, 28, 56], [173, 127, 127]]),
    ("rotated.jpg", [20, 36], [[219, 192, 207], [103, 27, 55], [172, 128, 129]]),
    ("ycck.jpg", [20, 36], [[84, 38, 92], [0, 97, 27], [0, 39, 0]]),
];

#[test]
fn images_of_every_kind_read_as_pillow_reads_them() {
    for (name, size, pixels) in PILLOW {
        let bytes = fixture(name);
        let picture = decode::decode(&bytes).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        assert_eq!((picture.size, picture.channels), (size, 3), "{name}");
        assert_eq!(decode::probe_size(&bytes).unwrap(), size, "{name}");
        let [h, w] = size;
        for (at, expected) in [(0, 0), (h / 2, w / 3), (h - 1, w - 1)].into_iter().zip(pixels) {
            let found = &picture.pixels[3 * (at.0 * w + at.1)..][..3];
            let off = found.iter().zip(expected).map(|(&a, b)| a.abs_diff(b)).max().unwrap();
            let allowed = if name.ends_with(".jpg") { 4 } else { 0 };
            assert!(off <= allowed, "{name} at {at:?}: {found:?}, and Pillow reads {expected:?}");
        }
    }
    assert_eq!(fs::read_dir(fixtures()).unwrap().count(), PILLOW.len());
}

#[test]
fn dark_grey_of_16_bits_keeps_its_value_and_the_rest_is_white() {
    let mut file = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut file);
    let words: Vec<u8> = [0u16, 7, 255, 256, 40_000].into_iter().flat_map(u16::to_ne_bytes).collect();
    image::ImageEncoder::write_image(encoder, &words, 5, 1, image::ExtendedColorType::L16).unwrap();
    let reds: Vec<u8> = decode::decode(&file).unwrap().pixels.into_iter().step_by(3).collect();
    assert_eq!(reds, [0, 7, 255, 255, 255]);
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    for (name, ..) in PILLOW {
        let bytes = fixture(name);
        // A PNG's last chunks hold nothing of the picture: twelve bytes, and the sum over the chunk before them.
        let needed = if name.ends_with(".png") { bytes.len() - 16 } else { bytes.len() };
        for end in 0..needed {
            assert!(decode::decode(&bytes[..end]).is_err(), "{name} reads from its first {end} bytes of {}", bytes.len());
        }
    }
}

#[test]
fn a_changed_byte_gives_a_whole_picture_or_an_error() {
    for (name, ..) in PILLOW {
        let mut bytes = fixture(name);
        for at in 0..bytes.len() {
            for flip in [0xff, 0x01, 0x80] {
                bytes[at] ^= flip;
                if let Ok(picture) = decode::decode(&bytes) {
                    let [h, w] = picture.size;
                    assert!(picture.pixels.len() == 3 * h * w && h * w <= 1 << 22, "{name} with byte {at} changed is {h} x {w}");
                }
                bytes[at] ^= flip;
            }
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |rest: u32, _| if rest & 1 == 1 { rest >> 1 ^ 0xedb8_8320 } else { rest >> 1 };
    !bytes.iter().fold(!0u32, |rest, &byte| (0..8).fold(rest ^ byte as u32, step))
}

/// The fixture with another size in its header.
fn resized(name: &str, [h, w]: [u32; 2]) -> Vec<u8> {
    let mut bytes = fixture(name);
    if name.ends_with(".png") {
        bytes[16..20].copy_from_slice(&w.to_be_bytes());
        bytes[20..24].copy_from_slice(&h.to_be_bytes());
        let sum = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&sum.to_be_bytes());
    } else if name.ends_with(".bmp") {
        bytes[18..22].copy_from_slice(&w.to_le_bytes());
        bytes[22..26].copy_from_slice(&h.to_le_bytes());
    } else {
        let frame = bytes.windows(2).position(|pair| pair == [0xff, 0xc0] || pair == [0xff, 0xc2]).unwrap();
        bytes[frame + 5..frame + 7].copy_from_slice(&(h as u16).to_be_bytes());
        bytes[frame + 7..frame + 9].copy_from_slice(&(w as u16).to_be_bytes());
    }
    bytes
}

#[test]
fn the_size_in_a_header_sizes_no_allocation() {
    let sizes = [[65_535, 65_535], [65_000, 2_500], [3_000, 3_000]];
    for name in ["full.jpg", "progressive.jpg", "cmyk.jpg", "plain.png", "rgb16.png", "plain.bmp", "palette.bmp"] {
        for size in sizes {
            let bytes = resized(name, size);
            LARGEST.set(0);
            let error = decode::decode(&bytes).err().map(|error| error.chain());
            let largest = LARGEST.get();
            let error = error.unwrap_or_else(|| panic!("{name} reads as {size:?}"));
            assert!(largest < 1 << 20, "{name} as {size:?}: {largest} bytes at once, {error}");
            // An own word for it, where the decoder does not stumble first.
            assert!(error.contains("its header"), "{error}");
        }
    }
}

#[test]
fn a_messy_folder_is_read_or_refused_file_by_file_and_keeps_its_labels() {
    let folder = Scratch::new("messy");
    let jpeg = fixture("half.jpg");
    let (cut, huge) = (&jpeg[..jpeg.len() / 2], resized("full.jpg", [65_535, 65_535]));
    // Class, name, bytes, and the reason if it cannot be read.
    let readable = |class, name, file: &str| (class, name, fixture(file), None);
    let files = [
        readable("apple", "a.JPEG", "plain.png"),
        ("apple", "b.jpg", cut.to_vec(), Some("ends early")),
        readable("apple", "c.jpg", "cmyk.jpg"),
        ("apple", "d.jpg", Vec::new(), Some("it is empty")),
        ("bear", "e.jpg", b"<html>404 Not Found</html>".to_vec(), Some("it is no image that is known here")),
        readable("bear", "f.jpg", "grey.jpg"),
        readable("bear", "g.png", "grey16.png"),
        readable("bear", "h.jpg", "rotated.jpg"),
        readable("cat", "i.png", "one.png"),
        readable("cat", "j.PNG", "palette.png"),
        readable("cat", "k.png", "alpha.png"),
        ("cat", "l.jpg", huge, Some("65535 x 65535")),
        ("cat", "m.png", b"II*\0\x08\0\0\0".to_vec(), Some("TIFF")),
        readable("cat", "n.jpg", "ycck.jpg"),
    ];
    for (class, name, bytes, _) in &files {
        folder.write(&format!("{class}/{name}"), bytes);
    }
    folder.write("README.txt", b"no class");
    let set = ImageFolder::open(&folder.0).unwrap();
    assert_eq!(set.classes(), ["apple", "bear", "cat"]);
    assert_eq!(set.len(), files.len());
    for (index, (class, name, bytes, reason)) in files.iter().enumerate() {
        assert_eq!(set.classes()[set.label(index) as usize], *class, "{name}");
        assert!(set.name(index).ends_with(&format!("{class}/{name}")), "{}", set.name(index));
        assert_eq!(set.encoded(index).unwrap().as_ref(), Some(bytes));
        match (set.picture(index), reason) {
            (Ok(picture), None) => assert_eq!(picture, decode::decode(bytes).unwrap(), "{name}"),
            (Err(error), Some(reason)) => {
                let error = error.chain();
                assert!(error.contains(&format!("{class}/{name}")) && error.contains(reason), "{error}");
            }
            (found, _) => panic!("{name}: {:?}", found.map(|picture| picture.size)),
        }
    }
}

#[test]
fn a_pipe_a_lost_link_and_a_lost_file_are_named_and_nothing_waits() {
    let folder = Scratch::new("pipe");
    folder.write("a/gone.png", fixture("one.png"));
    assert!(std::process::Command::new("mkfifo").arg(folder.0.join("a/pipe.jpg")).status().unwrap().success());
    symlink("nowhere.png", folder.0.join("a/link.png")).unwrap();
    let set = ImageFolder::open(&folder.0).unwrap();
    fs::remove_file(folder.0.join("a/gone.png")).unwrap();
    let errors: Vec<String> = (0..set.len()).map(|index| set.picture(index).unwrap_err().chain()).collect();
    assert_eq!(errors.len(), 3);
    for (error, (name, reason)) in
        errors.iter().zip([("gone.png", "No such file"), ("link.png", "No such file"), ("pipe.jpg", "not a regular file")])
    {
        assert!(error.contains(name) && error.contains(reason), "{error}");
    }
}

#[test]
fn files_are_walked_in_order_through_links_and_without_loops() {
    let folder = Scratch::new("order");
    let image = fixture("one.png");
    for path in ["b/2.png", "b/10.png", "b/x/1.png", "b/x-y/1.png", "b/x/y/1.png", "B/1.bmp", "b/.hidden.png", ".git/1.png", "b/note.txt"] {
        folder.write(path, &image);
    }
    let elsewhere = Scratch::new("order-elsewhere");
    elsewhere.write("1.WebP", &image);
    symlink(&elsewhere.0, folder.0.join("linked")).unwrap();
    symlink(&elsewhere.0, folder.0.join("b/also")).unwrap();
    symlink(&folder.0, folder.0.join("b/loop")).unwrap();
    symlink(".", folder.0.join("b/x/self")).unwrap();
    let set = ImageFolder::open(&folder.0).unwrap();
    assert_eq!(set.classes(), ["B", "b", "linked"]);
    let names: Vec<String> = (0..set.len()).map(|index| set.path(index).strip_prefix(&folder.0).unwrap().display().to_string()).collect();
    let expected = ["B/1.bmp", "b/10.png", "b/2.png", "b/also/1.WebP", "b/x/1.png", "b/x-y/1.png", "b/x/y/1.png", "linked/1.WebP"];
    assert_eq!(names, expected);
    assert_eq!((0..set.len()).map(|index| set.label(index)).collect::<Vec<_>>(), [0, 1, 1, 1, 1, 1, 1, 2]);
    assert!(set.notes().is_empty(), "{:?}", set.notes());
}

#[test]
fn what_is_left_out_is_said_and_an_empty_class_shifts_no_label() {
    let folder = Scratch::new("notes");
    folder.write("c/1.png", fixture("one.png"));
    folder.write("c/2.TIF", b"II*\0");
    folder.write("c/3.ppm", b"P6");
    folder.write("stray.png", fixture("one.png"));
    fs::create_dir_all(folder.0.join("a")).unwrap();
    fs::create_dir_all(folder.0.join("b")).unwrap();
    let set = ImageFolder::open(&folder.0).unwrap();
    assert_eq!((set.len(), set.label(0), set.classes().len()), (1, 2, 3));
    let [empty, unread, stray] = set.notes() else { panic!("{:?}", set.notes()) };
    assert!(empty.contains("notes-") && empty.contains("/a and 1 more") && empty.contains("stays a class"), "{empty}");
    assert!(unread.contains("1 .ppm, 1 .tif") && unread.contains("c/2.TIF"), "{unread}");
    assert!(stray.starts_with("1 images that lie in"), "{stray}");
}

#[test]
fn folders_that_are_no_set_are_refused_in_a_sentence() {
    let folder = Scratch::new("refused");
    assert!(folder.refusal().contains("holds no class folders"));
    folder.write("1.png", fixture("one.png"));
    assert!(folder.refusal().contains("holds 1 images but no folders"), "{}", folder.refusal());
    fs::create_dir_all(folder.0.join("a/deep")).unwrap();
    assert!(folder.refusal().contains("the 1 class folders of") && folder.refusal().contains(".jpg, .jpeg"), "{}", folder.refusal());
    folder.write("a/1.pgm", b"P5");
    assert!(folder.refusal().contains("1 .pgm") && folder.refusal().contains("convert them"), "{}", folder.refusal());
    let missing = ImageFolder::open(&folder.0.join("none")).err().unwrap().chain();
    assert!(missing.contains("refused-") && missing.contains("/none: No such file"), "{missing}");
    let file = ImageFolder::open(&folder.0.join("1.png")).err().unwrap().chain();
    assert!(file.contains("1.png is not a folder"), "{file}");
}
