//! Memory of the CPU: blocks that return to a pool when they are dropped, and slabs that are cut into ranges.
//!
//! A training step asks for the same sizes again and again, so after the first steps every request is answered from the pool and the
//! system is not asked for anything. A block holds whatever its last user left (a fresh one holds zeros): it is always initialised
//! memory, never zeroed memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Blocks and ranges start on a cache line, which is also the width of the widest vector register.
pub const ALIGN: usize = 64;

/// Exclusive owner of a piece of memory; shared read access comes from putting it in an `Arc`.
pub struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
    home: Home,
}

enum Home {
    Pool { class: usize },
    Slab { slab: Arc<Slab>, offset: usize },
}

// SAFETY: a Buffer is the only owner of its bytes, like a Box<[u8]>.
unsafe impl Send for Buffer {}
// SAFETY: shared references only allow reading.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// At least `bytes` long; the content is arbitrary.
    pub fn take(bytes: usize) -> Self {
        let class = class_of(bytes);
        let reused = POOL.free[class].lock().expect("the pool's lock is held only for a push or a pop").pop();
        let start = reused.map_or_else(|| Self::fresh(class_bytes(class)), |block| block.0);
        IN_USE.more(class_bytes(class));
        Self { start, bytes, home: Home::Pool { class } }
    }

    /// A block for the pool, which keeps it for good.
    fn fresh(bytes: usize) -> NonNull<u8> {
        let memory = Memory::new(bytes);
        let start = memory.start;
        std::mem::forget(memory);
        start
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the block is at least `bytes` long, initialised, and owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and &mut self makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Home::Pool { class } = self.home {
            let mut free = POOL.free[class].lock().expect("the pool's lock is held only for a push or a pop");
            free.push(Block(self.start));
            IN_USE.less(class_bytes(class));
        }
    }
}

struct Block(NonNull<u8>);
// SAFETY: a Block in the pool is owned by the pool alone.
unsafe impl Send for Block {}

/// Size classes: four between one power of two and the next, from 64 bytes up.
const CLASSES: usize = 4 * 48;

struct Pool {
    free: [Mutex<Vec<Block>>; CLASSES],
    taken: AtomicUsize,
    requests: AtomicUsize,
}

static POOL: Pool = Pool { free: [const { Mutex::new(Vec::new()) }; CLASSES], taken: AtomicUsize::new(0), requests: AtomicUsize::new(0) };

/// What the pool has asked of the system so far: (bytes, requests).
pub fn taken_from_system() -> (usize, usize) {
    (POOL.taken.load(Ordering::Relaxed), POOL.requests.load(Ordering::Relaxed))
}

/// Bytes that somebody holds: now, and at most since they were last looked at from anew.
pub struct InUse {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// Of the CPU: blocks of the pool and slabs.
pub static IN_USE: InUse = InUse::new();
/// Of all GPUs together.
pub static IN_USE_ON_GPUS: InUse = InUse::new();

impl InUse {
    const fn new() -> Self {
        Self { now: AtomicUsize::new(0), most: AtomicUsize::new(0) }
    }

    pub(super) fn more(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.most.fetch_max(now, Ordering::Relaxed);
    }

    pub(super) fn less(&self, bytes: usize) {
        self.now.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Forgets what was held before; answers what is held now.
    pub fn restart(&self) -> usize {
        let now = self.now.load(Ordering::Relaxed);
        self.most.store(now, Ordering::Relaxed);
        now
    }

    /// The most at once since [`InUse::restart`].
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

/// Bytes of memory that the machine has; 2^40 where the system does not say.
pub fn of_the_machine() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kilobytes = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.map_or(1 << 40, |kilobytes| kilobytes * 1024)
}

pub(super) fn class_of(bytes: usize) -> usize {
    let units = bytes.div_ceil(ALIGN).max(1);
    let power = usize::BITS as usize - 1 - units.leading_zeros() as usize;
    let quarter = (units << 2 >> power) - 4;
    let class = 4 * power + quarter;
    if class_bytes(class) < bytes { class + 1 } else { class }
}

pub(super) fn class_bytes(class: usize) -> usize {
    let (power, quarter) = (class / 4, class % 4);
    (((4 + quarter) << power).div_ceil(4)) * ALIGN
}

/// From this size on a block is made of huge pages where the system has them: fewer faults when it is first touched, fewer look-ups later.
const HUGE: usize = 2 << 20;

/// Zeroed memory from the system.
struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    /// Where it comes from, if not from the program's allocator.
    map: Option<memmap2::MmapMut>,
}

impl Memory {
    fn new(bytes: usize) -> Self {
        POOL.taken.fetch_add(bytes, Ordering::Relaxed);
        POOL.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(memory) = (bytes >= HUGE).then(|| Self::huge(bytes)).flatten() {
            return memory;
        }
        // SAFETY: the layout has a size above zero.
        let start = NonNull::new(unsafe { alloc_zeroed(Self::layout(bytes)) });
        Self { start: start.unwrap_or_else(|| handle_alloc_error(Self::layout(bytes))), bytes, map: None }
    }

    /// A mapping, used from its first huge page on.
    fn huge(bytes: usize) -> Option<Self> {
        let mut map = memmap2::MmapMut::map_anon(bytes.checked_add(HUGE)?).ok()?;
        // A system without huge pages gives small ones.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr();
        // SAFETY: the offset is below HUGE, by which the mapping is longer than what is used.
        let start = NonNull::new(unsafe { start.add(start.align_offset(HUGE)) })?;
        Some(Self { start, bytes, map: Some(map) })
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGN).expect("sizes are checked against the address space where shapes are made")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.map.is_none() {
            // SAFETY: allocated with this layout; the owner is gone.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) }
        }
    }
}

/// One contiguous allocation, cut into ranges that are owned one by one.
pub struct Slab(Memory);

// SAFETY: the slab itself is never read or written; its ranges are, each through its one Buffer.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Drop for Slab {
    fn drop(&mut self) {
        IN_USE.less(self.0.bytes);
    }
}

impl Slab {
    /// Zeroed ranges of these lengths in bytes, one behind the other, each starting on a cache line.
    pub fn cut(lengths: &[usize]) -> Vec<Buffer> {
        let padded = |bytes: usize| bytes.div_ceil(ALIGN) * ALIGN;
        let bytes = lengths.iter().map(|&length| padded(length)).sum::<usize>().max(ALIGN);
        let slab = Arc::new(Slab(Memory::new(bytes)));
        IN_USE.more(bytes);
        let mut offset = 0;
        lengths
            .iter()
            .map(|&length| {
                // SAFETY: offset stays below the sum of the padded lengths.
                let start = unsafe { slab.0.start.add(offset) };
                let range = Buffer { start, bytes: length, home: Home::Slab { slab: slab.clone(), offset } };
                offset += padded(length);
                range
            })
            .collect()
    }

    /// The whole slab as one slice, gaps between ranges included, if these are all of its ranges in order and nobody else holds one.
    pub fn whole_mut<'a>(ranges: &'a mut [&'a mut Arc<Buffer>]) -> Option<&'a mut [u8]> {
        let mut expected = 0;
        let mut whole: Option<(NonNull<u8>, usize, *const Slab)> = None;
        for range in ranges.iter_mut() {
            let range = Arc::get_mut(range)?;
            let Home::Slab { slab, offset } = &range.home else { return None };
            let (_, _, first) = *whole.get_or_insert((slab.0.start, slab.0.bytes, Arc::as_ptr(slab)));
            if *offset != expected || Arc::as_ptr(slab) != first {
                return None;
            }
            expected = offset + range.bytes.div_ceil(ALIGN) * ALIGN;
        }
        let (start, bytes, _) = whole?;
        // SAFETY: every range of the slab is exclusively borrowed for 'a (checked above), so nobody reads or writes any part of it.
        (expected == bytes).then(|| unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_what_it_is_asked_for_and_wastes_less_than_a_third() {
        for bytes in (1..5000).chain((1..60).map(|i| i * 123_457)) {
            let class = class_of(bytes);
            assert!(class_bytes(class) >= bytes, "{bytes}");
            assert!(bytes < 256 || class_bytes(class) * 3 <= bytes * 4 + 3 * ALIGN, "{bytes} in {}", class_bytes(class));
            assert!(class == 0 || class_bytes(class - 1) <= class_bytes(class));
        }
    }

    #[test]
    fn what_is_held_is_counted_and_its_most_is_kept() {
        let count = InUse::new();
        count.more(100);
        count.more(50);
        count.less(120);
        assert_eq!((count.restart(), count.most()), (30, 30));
        count.more(10);
        count.less(40);
        assert_eq!((count.most(), count.restart(), count.most()), (40, 0, 0));
    }

    #[test]
    fn a_slab_is_one_slice_only_while_nobody_shares_a_range() {
        let mut ranges: Vec<Arc<Buffer>> = Slab::cut(&[100, 64, 4]).into_iter().map(Arc::new).collect();
        let shared = ranges[1].clone();
        assert!(Slab::whole_mut(&mut ranges.iter_mut().collect::<Vec<_>>()).is_none());
        drop(shared);
        let mut all: Vec<_> = ranges.iter_mut().collect();
        assert_eq!(Slab::whole_mut(&mut all).map(|whole| whole.len()), Some(128 + 64 + 64));
        let mut some: Vec<_> = ranges[..2].iter_mut().collect();
        assert!(Slab::whole_mut(&mut some).is_none());
    }
}
