//! A GPU: real, or emulated by the same kernels on the CPU.
//!
//! Work is handed over in order and done in that order: kernels, products, copies. The memory of a tensor that is dropped goes back to a pool and may be
//! handed out again at once, since whatever uses it next comes later. Nothing is ever given back to the system before the device itself goes.
//!
//! **Recorded work.** [`Gpu::capture`] records what its closure hands over instead of doing it; [`Graph::replay`] does it, as often as wanted. Memory that was
//! handed out meanwhile belongs to the graph. Numbers that differ from replay to replay are drawn by name ([`Gpu::drawn`]) or lie in memory that is
//! written between replays ([`Gpu::upload`]); an upload inside a recording is refused.

mod recording;
mod timing;

use super::launch::{Args, KERNELS, Kernel, Launch, Versions, find};
use super::memory::{ALIGN, IN_USE_ON_GPUS, class_bytes, class_of};
use super::product::Product;
use super::real;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::rng::Rng;
pub use recording::{Draw, Graph};
use recording::{Drawn, Notes, Recording};
use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use timing::Timing;

/// One thing for the device to do.
#[derive(Clone)]
pub(super) enum Work {
    Kernel {
        kernel: &'static Kernel,
        launch: Launch,
        words: Vec<u64>,
        letters: String,
    },
    Product(Product),
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    /// Every byte becomes this one.
    Set {
        to: u64,
        byte: u8,
        bytes: usize,
    },
}

/// What a real and an emulated device have to offer. Addresses come from `allocate`; work on them is done in the order of submission.
pub(super) trait Backend: Send + Sync {
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// Once nothing that was submitted uses it any more.
    fn release(&self, address: u64, bytes: usize);
    fn submit(&self, work: Work) -> Result<()>;
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()>;
    /// Waits for everything submitted before.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
    fn wait(&self) -> Result<()>;
    fn begin_recording(&self) -> Result<()>;
    fn end_recording(&self) -> Result<Box<dyn Recorded>>;
    /// Bytes of the device's memory.
    fn memory(&self) -> u64;
    /// Most bytes of shared memory of a block.
    fn most_shared(&self) -> usize;
    /// Whether an error of a kernel (an index out of range) is noted in the fault cells rather than answered by `submit`.
    fn notes_faults(&self) -> bool;
}

/// Recorded work.
pub(super) trait Recorded: Send + Sync {
    fn replay(&self) -> Result<()>;
}

/// A handle; clones are the same device.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    name: String,
    backend: Box<dyn Backend>,
    #[cfg(feature = "emulated")]
    emulated: Option<Arc<super::emulated::Emulated>>,
    real: Option<Arc<real::Real>>,
    state: Mutex<State>,
    timing: Timing,
    /// A cell for each of [`KERNELS`].
    faults: u64,
}

struct State {
    arena: Arc<Arena>,
    chosen: HashMap<&'static str, &'static str>,
    /// Present while recording.
    notes: Option<Notes>,
    /// Whether fresh memory is filled with what is no number.
    poison: bool,
    /// Whether each piece of memory is an allocation of just its size, given back when it is dropped.
    exact: bool,
    allocated: Vec<(u64, usize)>,
}

type Free = Mutex<HashMap<usize, Vec<u64>>>;

/// Free blocks by size class.
#[derive(Default)]
struct Arena {
    free: Free,
    /// Those that no recorded work uses so far; empty outside of recordings.
    untouched: Free,
    /// Who gets them all back in the end, if this is the arena of a recording.
    outer: Option<Arc<Arena>>,
}

impl Arena {
    fn pop(&self, class: usize, untouched: bool) -> Option<u64> {
        let pop = |blocks: &Free| lock(blocks).get_mut(&class).and_then(Vec::pop);
        if untouched { pop(&self.untouched) } else { pop(&self.free).or_else(|| pop(&self.untouched)) }
    }

    /// Hands blocks over to the outer arena.
    fn give_back(&self, blocks: &Free) {
        let Some(outer) = &self.outer else { return };
        let mut free = lock(&outer.free);
        lock(blocks).drain().for_each(|(class, blocks)| free.entry(class).or_default().extend(blocks));
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.give_back(&self.free);
        self.give_back(&self.untouched);
    }
}

/// A piece of the device's memory, exclusively owned; shared by putting it in an `Arc`.
pub struct Block {
    gpu: Gpu,
    address: u64,
    bytes: usize,
    home: Home,
}

enum Home {
    /// Allocated for itself.
    Alone,
    Arena {
        arena: Arc<Arena>,
        class: usize,
    },
    Slab {
        slab: Arc<Block>,
        offset: usize,
    },
}

impl Block {
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match &self.home {
            Home::Arena { arena, class } => {
                IN_USE_ON_GPUS.less(class_bytes(*class));
                lock(&arena.free).entry(*class).or_default().push(self.address);
            }
            Home::Alone => {
                let inner = &self.gpu.0;
                IN_USE_ON_GPUS.less(self.bytes);
                lock(&inner.state).allocated.retain(|(address, _)| *address != self.address);
                // What fails here shows at the next call.
                let _ = inner.backend.wait();
                inner.backend.release(self.address, self.bytes);
            }
            Home::Slab { .. } => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no code that holds this lock panics")
}

impl Gpu {
    /// Where `MASQUE_LAUNCHES` names a folder, all its launches are written down there, with exact memory: see `scripts/sanitize`.
    #[cfg(feature = "emulated")]
    pub fn emulated() -> Result<Self> {
        let emulated = Arc::new(super::emulated::Emulated::default());
        let launches = std::env::var_os("MASQUE_LAUNCHES").map(std::path::PathBuf::from);
        if let Some(folder) = &launches {
            static DEVICES: Mutex<usize> = Mutex::new(0);
            let mut devices = lock(&DEVICES);
            *devices += 1;
            let name = format!("{}-{devices}.launches", std::process::id());
            emulated.trace(&folder.join(name))?;
        }
        let inner = |faults| Inner {
            name: "emulated".to_string(),
            backend: Box::new(emulated.clone()),
            emulated: Some(emulated.clone()),
            real: None,
            state: Mutex::new(State::new(true)),
            timing: Timing::default(),
            faults,
        };
        let gpu = Self::with_faults(inner)?;
        gpu.exact(launches.is_some());
        Ok(gpu)
    }

    /// The CUDA device of this number.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let real = Arc::new(real::Real::open(ordinal).with_context(|| format!("device gpu:{ordinal}"))?);
        let inner = |faults| Inner {
            name: format!("gpu:{ordinal}"),
            backend: Box::new(real.clone()),
            #[cfg(feature = "emulated")]
            emulated: None,
            real: Some(real.clone()),
            state: Mutex::new(State::new(false)),
            timing: Timing::default(),
            faults,
        };
        Self::with_faults(inner)
    }

    fn with_faults(inner: impl FnOnce(u64) -> Inner) -> Result<Self> {
        let mut inner = inner(0);
        let bytes = KERNELS.len() * 4;
        inner.faults = inner.backend.allocate(bytes)?;
        inner.backend.submit(Work::Set { to: inner.faults, byte: 0, bytes })?;
        lock(&inner.state).allocated.push((inner.faults, bytes));
        Ok(Self(Arc::new(inner)))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    #[cfg(feature = "emulated")]
    pub fn as_emulated(&self) -> Option<&super::emulated::Emulated> {
        self.0.emulated.as_deref()
    }

    /// The CUDA side, where there is one.
    pub fn as_real(&self) -> Option<&real::Real> {
        self.0.real.as_deref()
    }

    /// Most bytes of shared memory that a block may have.
    pub fn most_shared(&self) -> usize {
        self.0.backend.most_shared()
    }

    /// Bytes of the device's memory, and how many of them have been taken.
    pub fn memory(&self) -> (u64, u64) {
        let taken = lock(&self.0.state).allocated.iter().map(|(_, bytes)| *bytes as u64).sum();
        (self.0.backend.memory(), taken)
    }

    /// Fills all memory handed out from now on with what is no number, or stops doing so. The emulated device always does.
    pub fn poison(&self, on: bool) {
        lock(&self.0.state).poison = on;
    }

    /// Makes every piece of memory an allocation of just its size from now on: slow, and what a check of memory accesses needs.
    pub fn exact(&self, on: bool) {
        lock(&self.0.state).exact = on;
    }

    /// At least this many bytes; the content is arbitrary.
    pub fn take(&self, bytes: usize) -> Result<Block> {
        let poison = lock(&self.0.state).poison;
        let mut block = self.take_as_it_is(bytes, false)?;
        if poison {
            self.set(&mut block, 0xff)?;
        }
        Ok(block)
    }

    /// `untouched`: memory that no work of this recording used before.
    fn take_as_it_is(&self, bytes: usize, untouched: bool) -> Result<Block> {
        let class = class_of(bytes);
        let (arena, exact) = {
            let state = lock(&self.0.state);
            // What a recording hands out belongs to it, and is not given back while it lives.
            (state.arena.clone(), state.exact && state.notes.is_none())
        };
        if exact && bytes > 0 {
            let address = self.allocate(bytes)?;
            IN_USE_ON_GPUS.more(bytes);
            return Ok(Block { gpu: self.clone(), address, bytes, home: Home::Alone });
        }
        let address = match arena.pop(class, untouched) {
            Some(address) => address,
            None => self.allocate(class_bytes(class))?,
        };
        IN_USE_ON_GPUS.more(class_bytes(class));
        Ok(Block { gpu: self.clone(), address, bytes, home: Home::Arena { arena, class } })
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let (there, taken) = self.memory();
        let address = self.0.backend.allocate(bytes).with_context(|| {
            format!(
                "{}: no memory for {bytes} bytes more ({} of {} MB are taken); make the batch or the model smaller",
                self.name(),
                taken >> 20,
                there >> 20
            )
        })?;
        lock(&self.0.state).allocated.push((address, bytes));
        Ok(address)
    }

    /// Zeroed ranges of these lengths in bytes, one behind the other, each starting on a multiple of [`ALIGN`].
    pub fn slab(&self, lengths: &[usize]) -> Result<Vec<Block>> {
        let padded = |bytes: usize| bytes.div_ceil(ALIGN) * ALIGN;
        let bytes = lengths.iter().map(|&length| padded(length)).sum::<usize>().max(ALIGN);
        let mut slab = self.take(bytes)?;
        self.set(&mut slab, 0)?;
        let slab = Arc::new(slab);
        let mut offset = 0;
        let range = |&length: &usize| {
            let range = Block {
                gpu: self.clone(),
                address: slab.address + offset as u64,
                bytes: length,
                home: Home::Slab { slab: slab.clone(), offset },
            };
            offset += padded(length);
            range
        };
        Ok(lengths.iter().map(range).collect())
    }

    /// The first address and the length in bytes of a whole slab, gaps included, if these are all its ranges in order and nobody else holds one.
    pub fn whole<'a>(ranges: impl IntoIterator<Item = &'a mut Arc<Block>>) -> Option<(u64, usize)> {
        let mut whole: Option<Arc<Block>> = None;
        let mut expected = 0;
        for range in ranges {
            let range = Arc::get_mut(range)?;
            let Home::Slab { slab, offset } = &range.home else { return None };
            let first = whole.get_or_insert_with(|| slab.clone());
            if !Arc::ptr_eq(first, slab) || *offset != expected {
                return None;
            }
            expected = offset + range.bytes.div_ceil(ALIGN) * ALIGN;
        }
        whole.filter(|slab| slab.bytes == expected).map(|slab| (slab.address, slab.bytes))
    }

    /// Bytes from the start of one range of a slab to that of another behind it.
    pub fn distance(from: &Block, to: &Block) -> Option<usize> {
        match (&from.home, &to.home) {
            (Home::Slab { slab, offset: start }, Home::Slab { slab: other, offset: end }) if Arc::ptr_eq(slab, other) => {
                end.checked_sub(*start)
            }
            _ => None,
        }
    }

    /// Every byte of a block becomes this one.
    pub fn set(&self, block: &mut Block, byte: u8) -> Result<()> {
        if block.bytes == 0 {
            return Ok(());
        }
        self.submit(Work::Set { to: block.address, byte, bytes: block.bytes })
    }

    pub fn copy(&self, to: &mut Block, from: &Block, bytes: usize) -> Result<()> {
        assert!(bytes <= to.bytes && bytes <= from.bytes, "a copy of {bytes} bytes between blocks of {} and {}", from.bytes, to.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.submit(Work::Copy { to: to.address, from: from.address, bytes })
    }

    /// Writes bytes from the host into a block, in the order of the device's other work. Refused while recording.
    pub fn upload(&self, block: &Block, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset + bytes.len() <= block.bytes, "an upload of {} bytes at {offset} into {}", bytes.len(), block.bytes);
        ensure!(!self.is_recording(), "{}: recorded work cannot copy from the host; put the numbers on the device before", self.name());
        if bytes.is_empty() {
            return Ok(());
        }
        let what = self.is_timed().then(|| timing::upload(bytes.len()));
        self.timed(what, || self.0.backend.upload(block.address + offset as u64, bytes))
    }

    /// Waits for all work and reads a block.
    pub fn download(&self, block: &Block, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= block.bytes, "a download of {} bytes from {}", bytes.len(), block.bytes);
        ensure!(!self.is_recording(), "{}: recorded work has no numbers to read yet", self.name());
        if !bytes.is_empty() {
            self.0.backend.download(block.address, bytes)?;
        }
        self.check_faults()
    }

    /// Waits for all work; an index that was out of range is an error here at the latest.
    pub fn wait(&self) -> Result<()> {
        ensure!(!self.is_recording(), "{}: recorded work is not waited for", self.name());
        self.0.backend.wait()?;
        self.check_faults()
    }

    fn check_faults(&self) -> Result<()> {
        if !self.0.backend.notes_faults() {
            return Ok(());
        }
        let mut cells = vec![0u32; KERNELS.len()];
        self.0.backend.download(self.0.faults, bytemuck::cast_slice_mut(&mut cells))?;
        let Some(at) = cells.iter().position(|&cell| cell != 0) else { return Ok(()) };
        self.0.backend.submit(Work::Set { to: self.0.faults, byte: 0, bytes: KERNELS.len() * 4 })?;
        Err(Error::new(format!(
            "{}: kernel {} was given an index out of range; its result is not to be used",
            self.name(),
            KERNELS[at].name
        )))
    }

    /// Numbers uniform in [0, 1) by their name; a replay draws them afresh.
    pub fn drawn(&self, rng: &Rng, draw: Draw) -> Result<Arc<Block>> {
        // A replay draws before it does the recorded work: nothing of it may write here, neither filling it nor work that had this memory before.
        let block = Arc::new(self.take_as_it_is(draw.count * 4, self.is_recording())?);
        if let Some(notes) = &mut lock(&self.0.state).notes {
            notes.draws.push(Drawn { draw, block: block.clone() });
            return Ok(block);
        }
        self.upload(&block, 0, bytemuck::cast_slice(&draw.numbers(rng)?))?;
        Ok(block)
    }

    /// What the work that is being recorded uses: it lives as long as that work.
    pub(super) fn keep(&self, used: Arc<dyn Any + Send + Sync>) {
        if let Some(notes) = &mut lock(&self.0.state).notes {
            notes.used.push(used);
        }
    }

    pub fn is_recording(&self) -> bool {
        lock(&self.0.state).notes.is_some()
    }

    /// Records the work that `f` hands over; nothing of it is done before the graph is replayed. Tensors from before that the work uses are the caller's to
    /// keep for as long as it replays.
    pub fn capture<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        ensure!(!self.is_recording(), "{}: work is being recorded already", self.name());
        self.wait()?;
        // The graph takes over all free memory, so that in the usual case nothing has to be allocated meanwhile.
        let outer = lock(&self.0.state).arena.clone();
        let untouched = Mutex::new(std::mem::take(&mut *lock(&outer.free)));
        let arena = Arc::new(Arena { untouched, outer: Some(outer.clone()), free: Free::default() });
        lock(&self.0.state).arena = arena.clone();
        lock(&self.0.state).notes = Some(Notes::default());
        let recording = Recording { gpu: self, outer: Some(outer) };
        let done = self.0.backend.begin_recording().and_then(|()| f());
        let (recorded, notes) = recording.end();
        arena.give_back(&arena.untouched);
        let graph = recorded.map(|recorded| Graph { recorded, gpu: self.clone(), notes, _arena: arena });
        done.and_then(|result| Ok((graph?, result)))
    }

    /// The version of an op's kernels that runs: the chosen one, unless [`Gpu::choose`] said otherwise.
    pub fn version(&self, versions: &Versions) -> &'static str {
        lock(&self.0.state).chosen.get(versions.op).copied().unwrap_or(versions.chosen)
    }

    /// Makes this version run on this device; for tests and timing.
    pub fn choose(&self, versions: &Versions, version: &str) -> Result<()> {
        let known = versions.all.iter().find(|known| **known == version);
        let known =
            known.ok_or_else(|| Error::new(format!("{} has no version {version}; it has {}", versions.op, versions.all.join(", "))))?;
        lock(&self.0.state).chosen.insert(versions.op, known);
        Ok(())
    }

    /// Launches a kernel. The only way to run one: the arguments are those that the kernel of this name declares, which the emulated device checks.
    pub fn launch(&self, name: &str, launch: Launch, args: Args) -> Result<()> {
        let at = find(name).ok_or_else(|| Error::new(format!("{}: there is no kernel {name}", self.name())))?;
        let Launch { grid, block, shared } = launch;
        if grid.contains(&0) {
            return Ok(());
        }
        ensure!(
            (1..=1024).contains(&block) && grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16,
            "{}: kernel {name} cannot be launched as {grid:?} blocks of {block} threads; make the batch smaller",
            self.name()
        );
        let most = self.most_shared();
        ensure!(shared <= most, "{}: kernel {name} needs {shared} bytes of shared memory but a block has {most}", self.name());
        args.check().with_context(|| format!("{}: kernel {name}", self.name()))?;
        let letters = args.letters();
        let words = args.words(self.0.faults + 4 * at as u64);
        self.submit(Work::Kernel { kernel: &KERNELS[at], launch, words, letters })
            .with_context(|| format!("{}: kernel {name}", self.name()))
    }

    pub fn product(&self, product: Product) -> Result<()> {
        if product.m == 0 || product.n == 0 || product.batch == 0 {
            return Ok(());
        }
        self.submit(Work::Product(product)).with_context(|| {
            let Product { m, n, k, batch, .. } = product;
            format!("{}: product of {batch} x [{m}, {k}] and [{k}, {n}]", self.name())
        })
    }
}

impl State {
    fn new(poison: bool) -> Self {
        Self { arena: Arc::default(), chosen: HashMap::new(), notes: None, poison, exact: false, allocated: Vec::new() }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nothing is left to report an error to.
        let _ = self.backend.wait();
        for (address, bytes) in lock(&self.state).allocated.drain(..) {
            self.backend.release(address, bytes);
        }
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
