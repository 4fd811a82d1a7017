//! The emulated GPU: the kernels of `kernels/` compiled by the C++ compiler, blocks shared out over the program's threads, memory of the host.
//!
//! A block's threads run in their order and its asynchronous copies land when they are waited for, unless [`Emulated::order`] asks for something else: a
//! kernel must not depend on it. `kernels/emulate/` has the runtime; what it reports (a deadlock, a divergent barrier, a wrong mask, an index out of
//! range) names the block and the thread.

use super::gemm::{self, Finish, View};
use super::gpu::{Backend, Recorded, Work};
use super::launch::{Entry, Kernel, Launch};
use super::memory::Buffer;
use super::parallel::Panel;
use super::product::{Factor, Product};
use super::{Dtype, memory};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};
use half::bf16;
use rayon::prelude::*;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, HashSet};
use std::ffi::{CStr, c_char, c_void};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// When asynchronous copies land: each way hides what another shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Copies {
    /// When they are waited for.
    #[default]
    Late,
    /// When they are issued.
    Early,
    /// One or the other; needs a seed.
    ByChance,
}

/// In which order things happen that CUDA leaves open. Seed 0 is the plain order of threads and blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Order {
    pub seed: u64,
    pub copies: Copies,
}

#[derive(Default)]
pub struct Emulated {
    order: Mutex<Order>,
    recording: Mutex<Option<Vec<Work>>>,
    /// Address and size of everything allocated.
    live: Mutex<BTreeMap<u64, usize>>,
    trace: Mutex<Option<Trace>>,
}

/// Where launches are written down, and which were already.
struct Trace {
    file: BufWriter<File>,
    seen: HashSet<u64>,
}

/// As much as a block of an H100 may have.
const MOST_SHARED: usize = 227 << 10;
const LAYOUT_ALIGN: usize = 256;
const TRACE_MARK: &[u8] = b"masque launches1";

#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    early: i32,
    seed: u64,
}

unsafe extern "C" {
    fn masque_emulated_block(
        entry: Entry,
        args: *const *mut c_void,
        launch: *const RawLaunch,
        index: u64,
        message: *mut c_char,
        room: usize,
    ) -> i32;
}

impl Emulated {
    pub fn order(&self, order: Order) {
        *self.order.lock().expect("no code that holds this lock panics") = order;
    }

    /// Writes down every launch from now on, once for each kernel, size and set of scalars, with the memory it is given: what
    /// `kernels/emulate/replay.cpp` runs again under a sanitizer. Memory should be [`super::gpu::Gpu::exact`] meanwhile.
    pub fn trace(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
        let mut file = BufWriter::new(file);
        file.write_all(TRACE_MARK).with_context(|| path.display().to_string())?;
        *self.trace.lock().expect("no code that holds this lock panics") = Some(Trace { file, seen: HashSet::new() });
        Ok(())
    }

    /// Ends it.
    pub fn end_trace(&self) -> Result<()> {
        let trace = self.trace.lock().expect("no code that holds this lock panics").take();
        trace.map_or(Ok(()), |mut trace| trace.file.flush().context("writing launches down"))
    }

    /// In 64-bit words unless said otherwise: lengths and bytes of name and letters, grid, threads, shared memory; number of allocations, length and
    /// bytes of each; then for each argument the allocation (all ones: none) and the offset in it, or the value.
    ///
    /// It is taken down before the launch, and written once that went well: then None is answered for its like.
    fn taken_down(&self, name: &str, launch: &Launch, words: &[u64], letters: &str) -> Result<Option<(u64, Vec<u8>)>> {
        let trace = self.trace.lock().expect("no code that holds this lock panics");
        let Some(trace) = &*trace else { return Ok(None) };
        let is_pointer = |i: usize| letters.as_bytes()[i] == b'p';
        let mut hash = DefaultHasher::new();
        (name, launch.grid, launch.block, launch.shared).hash(&mut hash);
        (0..words.len()).for_each(|i| if is_pointer(i) { (words[i] != 0).hash(&mut hash) } else { words[i].hash(&mut hash) });
        if trace.seen.contains(&hash.finish()) {
            return Ok(None);
        }
        let live = self.live.lock().expect("no code that holds this lock panics");
        let mut held: Vec<(u64, usize)> = Vec::new();
        let mut args = Vec::new();
        for (i, &word) in words.iter().enumerate() {
            if !is_pointer(i) || word == 0 {
                args.push((u64::MAX, word));
                continue;
            }
            let (&start, &size) = live.range(..=word).next_back().ok_or_else(|| Error::new(format!("argument {i} is no memory")))?;
            let at = held.iter().position(|(held, _)| *held == start).unwrap_or_else(|| {
                held.push((start, size));
                held.len() - 1
            });
            args.push((at as u64, word - start));
        }
        let mut out: Vec<u8> = Vec::new();
        let mut put = |word: u64| out.extend(word.to_le_bytes());
        put(name.len() as u64);
        put(letters.len() as u64);
        launch.grid.iter().for_each(|&size| put(size as u64));
        put(launch.block as u64);
        put(launch.shared as u64);
        put(held.len() as u64);
        held.iter().for_each(|(_, size)| put(*size as u64));
        args.iter().for_each(|(at, value)| {
            put(*at);
            put(*value);
        });
        out.extend(name.bytes().chain(letters.bytes()));
        for (start, size) in held {
            // SAFETY: a live allocation, which was filled when it was handed out; the lock keeps it alive.
            out.extend(unsafe { std::slice::from_raw_parts(start as *const u8, size) });
        }
        Ok(Some((hash.finish(), out)))
    }

    fn write_down(&self, (hash, launch): (u64, Vec<u8>)) -> Result<()> {
        let mut trace = self.trace.lock().expect("no code that holds this lock panics");
        let Some(trace) = &mut *trace else { return Ok(()) };
        trace.seen.insert(hash);
        trace.file.write_all(&launch).context("writing a launch down")
    }

    fn run(&self, work: &Work) -> Result<()> {
        match work {
            Work::Kernel { kernel, launch, words, letters } => self.kernel(kernel, launch, words, letters),
            Work::Product(product) => product_of(product),
            &Work::Copy { to, from, bytes } => {
                self.check(to, bytes)?;
                self.check(from, bytes)?;
                // SAFETY: both ranges lie in live allocations; `copy` allows them to overlap.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
                Ok(())
            }
            &Work::Set { to, byte, bytes } => {
                self.check(to, bytes)?;
                // SAFETY: the range lies in a live allocation.
                unsafe { std::ptr::write_bytes(to as *mut u8, byte, bytes) };
                Ok(())
            }
        }
    }

    /// Refuses what is not a range of one allocation.
    fn check(&self, address: u64, bytes: usize) -> Result<()> {
        let live = self.live.lock().expect("no code that holds this lock panics");
        let inside = live.range(..=address).next_back().is_some_and(|(start, size)| address + bytes as u64 <= start + *size as u64);
        ensure!(inside, "address {address:#x} with {bytes} bytes is no memory of the emulated device");
        Ok(())
    }

    fn kernel(&self, kernel: &Kernel, launch: &Launch, words: &[u64], letters: &str) -> Result<()> {
        let entry = kernel.entry.ok_or_else(|| Error::new("it has no emulated form"))?;
        // SAFETY: without arguments an entry only answers a constant string.
        let declared = unsafe { CStr::from_ptr(entry(std::ptr::null())) }.to_string_lossy();
        ensure!(declared == letters, "it takes the arguments {declared} but was given {letters}");
        for (&word, _) in words.iter().zip(letters.chars()).filter(|(word, letter)| *letter == 'p' && **word != 0) {
            self.check(word, 1)?;
        }
        let taken_down = self.taken_down(kernel.name, launch, words, letters)?;
        let order = *self.order.lock().expect("no code that holds this lock panics");
        let early = match order.copies {
            Copies::Late => 0,
            Copies::Early => 1,
            Copies::ByChance if order.seed != 0 => 2,
            Copies::ByChance => bail!("copies by chance need a seed"),
        };
        let grid = launch.grid.map(|size| size as u32);
        let raw = RawLaunch { grid, block: [launch.block as u32, 1, 1], shared: launch.shared as u32, early, seed: order.seed };
        let mut cells = words.to_vec();
        let job = Job { entry, args: cells.iter_mut().map(|cell| cell as *mut u64 as *mut c_void).collect(), raw };
        let blocks = launch.grid.iter().map(|&size| size as u64).product::<u64>();
        let turns = mixed(blocks, order.seed);
        let stop = AtomicBool::new(false);
        let run = |turn: u64| {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let done = job.block(turns.as_ref().map_or(turn, |turns| turns[turn as usize]));
            stop.fetch_or(done.is_err(), Ordering::Relaxed);
            done
        };
        if blocks == 1 { run(0) } else { (0..blocks).into_par_iter().try_for_each(run) }?;
        taken_down.map_or(Ok(()), |launch| self.write_down(launch))
    }
}

/// The blocks in an order of chance, or None for their own order.
fn mixed(blocks: u64, seed: u64) -> Option<Vec<u64>> {
    if seed == 0 {
        return None;
    }
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut turns: Vec<u64> = (0..blocks).collect();
    for i in (1..turns.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        turns.swap(i, (random % (i as u64 + 1)) as usize);
    }
    Some(turns)
}

struct Job {
    entry: Entry,
    args: Vec<*mut c_void>,
    raw: RawLaunch,
}

// SAFETY: the arguments are read only; what they point to is shared between blocks as a GPU shares it.
unsafe impl Sync for Job {}

impl Job {
    fn block(&self, index: u64) -> Result<()> {
        let mut message = [0u8; 512];
        let room = message.len();
        // SAFETY: the letters of the arguments were compared with the kernel's own, and the message ends within its room.
        let failed = unsafe { masque_emulated_block(self.entry, self.args.as_ptr(), &self.raw, index, message.as_mut_ptr().cast(), room) };
        if failed == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&message).map(|text| text.to_string_lossy().into_owned());
        Err(Error::new(text.unwrap_or_else(|_| "failed without a message".to_string())))
    }
}

impl Backend for Arc<Emulated> {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        ensure!(bytes as u64 <= memory::of_the_machine(), "the machine has {} bytes", memory::of_the_machine());
        let layout = Layout::from_size_align(bytes.max(1), LAYOUT_ALIGN).map_err(|error| Error::new(error.to_string()))?;
        // SAFETY: the size is above zero.
        let address = unsafe { alloc_zeroed(layout) } as u64;
        ensure!(address != 0, "the system gives no more memory");
        self.live.lock().expect("no code that holds this lock panics").insert(address, bytes);
        Ok(address)
    }

    fn release(&self, address: u64, bytes: usize) {
        self.live.lock().expect("no code that holds this lock panics").remove(&address);
        let layout = Layout::from_size_align(bytes.max(1), LAYOUT_ALIGN).expect("it was a layout when it was allocated");
        // SAFETY: allocated above with this layout, and released once.
        unsafe { dealloc(address as *mut u8, layout) };
    }

    fn submit(&self, work: Work) -> Result<()> {
        if let Some(list) = &mut *self.recording.lock().expect("no code that holds this lock panics") {
            list.push(work);
            return Ok(());
        }
        self.run(&work)
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.check(to, bytes.len())?;
        // SAFETY: the range lies in a live allocation.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.check(from, bytes.len())?;
        // SAFETY: the range lies in a live allocation, which was filled when it was handed out.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn begin_recording(&self) -> Result<()> {
        *self.recording.lock().expect("no code that holds this lock panics") = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<Box<dyn Recorded>> {
        let list = self.recording.lock().expect("no code that holds this lock panics").take();
        Ok(Box::new(List { device: self.clone(), list: list.unwrap_or_default() }))
    }

    fn memory(&self) -> u64 {
        memory::of_the_machine()
    }

    fn most_shared(&self) -> usize {
        MOST_SHARED
    }

    fn notes_faults(&self) -> bool {
        false
    }
}

struct List {
    device: Arc<Emulated>,
    list: Vec<Work>,
}

impl Recorded for List {
    fn replay(&self) -> Result<()> {
        self.list.iter().try_for_each(|work| {
            self.device.run(work).map_err(|error| match work {
                Work::Kernel { kernel, .. } => Error::new(format!("kernel {}: {}", kernel.name, error.chain())),
                _ => error,
            })
        })
    }
}

/// The numbers of one matrix as f32: where they lie, or converted.
fn numbers(x: &Factor, image: usize, rows: usize, columns: usize) -> (Buffer, usize) {
    let (lines, length) = if x.turned { (columns, rows) } else { (rows, columns) };
    let mut buffer = Buffer::take(4 * lines * length);
    let out: &mut [f32] = bytemuck::cast_slice_mut(buffer.bytes_mut());
    let start = x.address + (image * x.step * x.dtype.size()) as u64;
    for (line, out) in out.chunks_exact_mut(length.max(1)).enumerate() {
        let at = start + (line * x.stride * x.dtype.size()) as u64;
        // SAFETY: whoever asked for the product vouches for its matrices, as for the arguments of a kernel.
        unsafe {
            match x.dtype {
                Dtype::Bf16 => {
                    let row = std::slice::from_raw_parts(at as *const bf16, length);
                    out.iter_mut().zip(row).for_each(|(out, x)| *out = x.to_f32());
                }
                _ => out.copy_from_slice(std::slice::from_raw_parts(at as *const f32, length)),
            }
        }
    }
    (buffer, length)
}

fn product_of(p: &Product) -> Result<()> {
    for x in [&p.a, &p.b, &p.c] {
        ensure!(matches!(x.dtype, Dtype::F32 | Dtype::Bf16), "a product is of f32 or bf16, not {}", x.dtype);
    }
    for image in 0..p.batch {
        let (a, a_stride) = numbers(&p.a, image, p.m, p.k);
        let (b, b_stride) = numbers(&p.b, image, p.k, p.n);
        let (mut c, _) = if p.add { numbers(&p.c, image, p.m, p.n) } else { (Buffer::take(4 * p.m * p.n), p.n) };
        let bias = p.bias.map(|address| numbers(&Factor { address, dtype: p.a.dtype, stride: p.n, step: 0, turned: false }, 0, 1, p.n).0);
        let view = |x: &Factor, data, stride| if x.turned { View::rows(data, stride).transposed() } else { View::rows(data, stride) };
        let (left, right) = (bytemuck::cast_slice(a.bytes()), bytemuck::cast_slice(b.bytes()));
        let finish = Finish { add: p.add, bias: bias.as_ref().map(|bias| bytemuck::cast_slice(bias.bytes())), ..Finish::replace() };
        let sum: &mut [f32] = bytemuck::cast_slice_mut(c.bytes_mut());
        if p.k == 0 && !p.add {
            sum.fill(0.0);
        }
        gemm::parallel(&mut Panel::of(sum, p.n), p.k, view(&p.a, left, a_stride), view(&p.b, right, b_stride), finish);
        let start = p.c.address + (image * p.c.step * p.c.dtype.size()) as u64;
        for (line, sum) in sum.chunks_exact(p.n).enumerate() {
            let at = start + (line * p.c.stride * p.c.dtype.size()) as u64;
            // SAFETY: as in `numbers`; the rows of c are written by nobody else meanwhile.
            unsafe {
                match p.c.dtype {
                    Dtype::Bf16 => {
                        let row = std::slice::from_raw_parts_mut(at as *mut bf16, p.n);
                        row.iter_mut().zip(sum).for_each(|(out, &x)| *out = bf16::from_f32(x));
                    }
                    _ => std::slice::from_raw_parts_mut(at as *mut f32, p.n).copy_from_slice(sum),
                }
            }
        }
    }
    Ok(())
}
