//! Hostile files cost memory in proportion to their size, whatever numbers they hold.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use masque::formats::{self, Bytes};

#[path = "formats/build.rs"]
mod build;
#[path = "formats/cases.rs"]
mod cases;

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(held, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory held at once while this file is read, beyond what was held before.
fn peak_of(bytes: Bytes) -> usize {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = formats::parse(bytes, "some/file");
    let peak = PEAK.load(Relaxed) - before;
    drop(result);
    peak
}

/// One test, because the counters belong to the whole process.
#[test]
fn reading_a_hostile_file_takes_a_small_multiple_of_its_size() {
    let mut files: Vec<(String, Vec<u8>)> = cases::all().into_iter().map(|(name, bytes, _)| (name.to_string(), bytes)).collect();
    for entry in std::fs::read_dir(build::fixtures()).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("pth_bad") {
            files.push((path.display().to_string(), std::fs::read(path).unwrap()));
        }
    }
    let filler: [(&str, &[u8]); 5] = [
        ("many objects", b"]"),
        ("many Nones", b"N"),
        ("many memo slots", b"\x94"),
        ("many lists of one", b"]Na"),
        ("many tuples", b"\x85"),
    ];
    for (name, piece) in filler {
        files.push((name.to_string(), build::pth(&build::cat(&[b"\x80\x04](N", &piece.repeat(1_000_000 / piece.len()), b"e."]))));
    }
    for (name, bytes) in files {
        let size = bytes.len();
        let peak = peak_of(bytes.into());
        let allowed = 2_000_000 + 128 * size;
        assert!(peak <= allowed, "{name}: {peak} bytes held for a file of {size}");
    }
}
