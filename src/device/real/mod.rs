//! CUDA: one device, one stream, the embedded kernels, graphs, cuBLASLt; NCCL beside it, for runs on many devices.
//!
//! All work is put on one stream, so it is done in the order in which it was handed over. The context is the device's primary one, shared with whoever
//! else is in the process. Machine code is loaded a file at a time, when one of its kernels is first launched; a file that was built without nvcc is
//! compiled then ([`compile`]).
//!
//! An error of a kernel shows at a later call, and CUDA repeats it at each call from then on: every function here answers with it.

mod blas;
mod compile;
mod facts;
mod nccl;

pub(super) use cudarc::driver::CudaEvent as Mark;
pub use facts::{Facts, KernelFacts};
pub use nccl::{Nccl, Numbers, distinct, machine};

use super::gpu::{Backend, Recorded, Work};
use super::launch::{FILES, KERNELS, Kernel, Launch, find};
use super::libs;
use super::product::Product;
use crate::ensure;
use crate::error::{Context, Error, Result};
use blas::{Blas, Key};
use cudarc::driver::result::{self as driver, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Of};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, PinnedHostSlice};
use cudarc::nvrtc::Ptx;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// The oldest compute capability that kernels are compiled for.
const OLDEST: (i32, i32) = (8, 0);

pub struct Real {
    blas: Blas,
    staging: Mutex<Staging>,
    /// Memory to wipe the cache with.
    scrap: Mutex<Option<(u64, usize)>>,
    functions: Vec<OnceLock<Function>>,
    modules: Vec<Mutex<Option<Arc<CudaModule>>>>,
    most_shared: usize,
    memory: u64,
    capability: (i32, i32),
    tf32: AtomicBool,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

/// A kernel on the device.
struct Function {
    function: CudaFunction,
    /// Bytes of each parameter; none if the driver does not tell.
    parameters: Vec<usize>,
    /// Static shared memory of a block, and how much dynamic one it may have by now.
    fixed: usize,
    allowed: AtomicUsize,
}

/// Dynamic and static shared memory of a block that need no permission.
const USUAL_SHARED: usize = 48 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An error of the driver as a sentence.
fn failed(doing: &str, error: DriverError) -> Error {
    use sys::CUresult as E;
    let lost = matches!(
        error.0,
        E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_ASSERT
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_LAUNCH_FAILED
            | E::CUDA_ERROR_ECC_UNCORRECTABLE
    );
    let hint = if lost { "; work that was handed over before failed, and this process cannot use the device any more" } else { "" };
    Error::new(format!("{doing}: {}{hint}", libs::said(error)))
}

/// Says what was being done.
trait Doing<T> {
    fn doing(self, what: &str) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, DriverError> {
    fn doing(self, what: &str) -> Result<T> {
        self.map_err(|error| failed(what, error))
    }
}

impl Real {
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = libs::devices()?;
        ensure!(
            ordinal < count,
            "there is no device {ordinal}, the driver sees {count}: gpu:0{}",
            if count > 1 { format!(" to gpu:{}", count - 1) } else { String::new() }
        );
        let context = CudaContext::new(ordinal).doing("opening it")?;
        // SAFETY: nothing of the bindings' own memory is used on more than one stream; it is before any stream or memory is made.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().doing("asking for its compute capability")?;
        ensure!(
            capability >= OLDEST,
            "{} has compute capability {}.{} and kernels need 8.0 or newer; use another device, or --device cpu",
            context.name().doing("asking for its name")?,
            capability.0,
            capability.1
        );
        let attribute = |of: Of| context.attribute(of).map(|value| value.max(0) as usize).doing("asking for its limits");
        let most_shared = attribute(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let memory = context.total_mem().doing("asking for its memory")? as u64;
        let stream = context.new_stream().doing("making a stream")?;
        if FILES.iter().any(|file| file.fatbin.is_empty()) {
            compile::target(capability)?;
        }
        Ok(Self {
            blas: Blas::open(&context)?,
            staging: Mutex::default(),
            scrap: Mutex::default(),
            functions: KERNELS.iter().map(|_| OnceLock::new()).collect(),
            modules: FILES.iter().map(|_| Mutex::default()).collect(),
            most_shared,
            memory,
            capability,
            tf32: AtomicBool::new(false),
            stream,
            context,
        })
    }

    /// Lets products of f32 round their factors to the 11 significant bits of TF32. Off unless asked for.
    pub fn allow_tf32(&self, on: bool) {
        self.tf32.store(on, Ordering::Relaxed);
    }

    /// The products so far that cuBLASLt did not take, which a slow kernel does instead.
    pub fn without_cublas(&self) -> Vec<String> {
        self.blas.refused()
    }

    /// Makes this thread's calls go to the device; reports errors that nothing else could report.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().doing("using the device")
    }

    fn module(&self, file: usize) -> Result<Arc<CudaModule>> {
        let mut module = lock(&self.modules[file]);
        if let Some(module) = &*module {
            return Ok(module.clone());
        }
        let source = &FILES[file];
        let code = match source.fatbin {
            [] => compile::compile(source, &compile::target(self.capability)?)?,
            fatbin => fatbin.to_vec(),
        };
        let loaded = self.context.load_module(Ptx::from_binary(code));
        let loaded = loaded.map_err(|error| failed(&format!("loading the code of kernels/{}.cu", source.name), error))?;
        Ok(module.insert(loaded).clone())
    }

    fn function(&self, at: usize) -> Result<&Function> {
        if let Some(function) = self.functions[at].get() {
            return Ok(function);
        }
        let kernel = &KERNELS[at];
        let function = self.module(kernel.file)?.load_function(kernel.name).doing("finding its code")?;
        // SAFETY: the function belongs to a module that it keeps loaded. What fails here shows at the launch.
        let _ = unsafe { sys::cuFuncLoad(function.cu_function()) };
        let mut parameters = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: as above; two numbers are written, or none where there is no such parameter.
            let there = unsafe { sys::cuFuncGetParamInfo(function.cu_function(), parameters.len(), &mut offset, &mut size) };
            if there != sys::CUresult::CUDA_SUCCESS {
                break;
            }
            parameters.push(size);
        }
        let fixed = function.shared_size_bytes().doing("asking for its shared memory")? as usize;
        let allowed = AtomicUsize::new(USUAL_SHARED.saturating_sub(fixed));
        Ok(self.functions[at].get_or_init(|| Function { function, parameters, fixed, allowed }))
    }

    fn kernel(&self, kernel: &Kernel, launch: &Launch, mut words: Vec<u64>, letters: &str) -> Result<()> {
        let at = find(kernel.name).ok_or_else(|| Error::new("it is not in the table"))?;
        let function = self.function(at)?;
        let sizes = letters.chars().map(|letter| if matches!(letter, 'p' | 'l') { 8 } else { 4 });
        ensure!(
            function.parameters.is_empty() || sizes.eq(function.parameters.iter().copied()),
            "it takes parameters of {:?} bytes but was given {letters}",
            function.parameters
        );
        if launch.shared > function.allowed.load(Ordering::Relaxed) {
            let most = self.most_shared.saturating_sub(function.fixed);
            ensure!(launch.shared <= most, "it needs {} bytes of dynamic shared memory but may have {most}", launch.shared);
            let of = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.function.set_attribute(of, most as i32).doing("allowing it more shared memory")?;
            function.allowed.store(most, Ordering::Relaxed);
        }
        let mut cells: Vec<*mut c_void> = words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let grid = launch.grid.map(|size| size as u32);
        // SAFETY: the number and sizes of the arguments are the kernel's, and are read before the call returns; the launch vouches for what they point to.
        let launched = unsafe {
            driver::launch_kernel(
                function.function.cu_function(),
                grid.into(),
                (launch.block as u32, 1, 1),
                launch.shared as u32,
                self.stream.cu_stream(),
                &mut cells,
            )
        };
        launched.doing("launching")
    }

    fn plain_product(&self, product: &Product) -> Result<()> {
        let (name, launch, args) = blas::plain(product);
        let at = find(&name).ok_or_else(|| Error::new(format!("there is no kernel {name}")))?;
        let launched = args.check().and_then(|()| self.kernel(&KERNELS[at], &launch, args.words(0), &args.letters()));
        launched.with_context(|| format!("kernel {name}"))
    }

    fn product(&self, product: &Product) -> Result<()> {
        if let Some(key) = Key::of(product, self.tf32.load(Ordering::Relaxed)) {
            // c starts as the bias, and the product is added to it: rounded once, as if the library had added it.
            let prepare = || self.plain_product(&Product { k: 0, ..*product });
            if self.blas.product(product, key, &self.stream, prepare)? {
                return Ok(());
            }
        }
        self.plain_product(product)
    }

    /// Two events that may be timed.
    pub(super) fn marks(&self) -> Result<[Mark; 2]> {
        let mark = || self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).doing("making an event");
        Ok([mark()?, mark()?])
    }

    /// The event stands behind the work that was handed over so far.
    pub(super) fn set(&self, mark: &Mark) -> Result<()> {
        mark.record(&self.stream).doing("timing")
    }

    /// Milliseconds between two events; waits for both.
    pub(super) fn between(&self, start: &Mark, end: &Mark) -> Result<f64> {
        Ok(start.elapsed_ms(end).doing("timing")? as f64)
    }

    /// Milliseconds that the device takes for the work that `f` hands over, the host's part not counted unless the device waits for it.
    pub fn elapsed_ms(&self, f: impl FnOnce() -> Result<()>) -> Result<f64> {
        let [start, end] = self.marks()?;
        self.set(&start)?;
        f()?;
        self.set(&end)?;
        self.between(&start, &end)
    }

    /// Writes more than the second-level cache holds, so that what is timed next finds nothing there.
    pub fn scrub(&self) -> Result<()> {
        self.bind()?;
        let mut scrap = lock(&self.scrap);
        let (address, bytes) = match *scrap {
            Some(there) => there,
            None => {
                let cache = self.context.attribute(Of::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).doing("asking for its cache")?;
                let bytes = (2 * cache.max(0) as usize).max(64 << 20);
                // SAFETY: the context is bound; the memory is never read.
                let address = unsafe { driver::malloc_sync(bytes) }.doing("taking memory to wipe the cache with")?;
                *scrap.insert((address, bytes))
            }
        };
        // SAFETY: the whole of an allocation that lives as long as the device.
        unsafe { driver::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) }.doing("wiping the cache")
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        // Nothing is left to report an error to.
        let _ = self.stream.synchronize();
        if let Some((address, _)) = lock(&self.scrap).take() {
            // SAFETY: allocated in `scrub` and freed here only; nothing uses it any more.
            let _ = unsafe { driver::free_sync(address) };
        }
    }
}

impl Backend for Arc<Real> {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: whoever reads the memory has written it before.
        unsafe { driver::malloc_sync(bytes.max(1)) }.doing("allocating")
    }

    fn release(&self, address: u64, _: usize) {
        if self.bind().is_ok() {
            // SAFETY: allocated above, and released once. Nothing is left to report an error to.
            let _ = unsafe { driver::free_sync(address) };
        }
    }

    fn submit(&self, work: Work) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        match work {
            Work::Kernel { kernel, launch, words, letters } => self.kernel(kernel, &launch, words, &letters),
            Work::Product(product) => self.product(&product),
            // SAFETY: both ranges lie in live allocations, as for every work.
            Work::Copy { to, from, bytes } => unsafe { driver::memcpy_dtod_async(to, from, bytes, stream) }.doing("copying"),
            // SAFETY: the range lies in a live allocation, as for every work.
            Work::Set { to, byte, bytes } => unsafe { driver::memset_d8_async(to, byte, bytes, stream) }.doing("filling"),
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        lock(&self.staging).send(self, to, bytes)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the range lies in a live allocation; `bytes` is borrowed until the copy is done, which is waited for whatever happened.
        let copied = unsafe { driver::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) };
        self.wait().and(copied.doing("copying to the host"))
    }

    fn wait(&self) -> Result<()> {
        self.stream.synchronize().doing("waiting for the device")
    }

    fn begin_recording(&self) -> Result<()> {
        // Memory may be allocated and code loaded meanwhile, which only this mode allows.
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).doing("beginning to record")
    }

    fn end_recording(&self) -> Result<Box<dyn Recorded>> {
        self.bind()?;
        // SAFETY: the stream is alive; what is recorded is owned by `Draft` from here on.
        let draft = Draft(unsafe { driver::stream::end_capture(self.stream.cu_stream()) }.doing("ending to record")?);
        ensure!(!draft.0.is_null(), "nothing was recorded");
        // SAFETY: the graph is whole, since its recording ended well.
        let exec = unsafe { driver::graph::instantiate(draft.0, sys::CUgraphInstantiate_flags(0)) }.doing("making recorded work ready")?;
        let replay = Replay { exec: Mutex::new(Exec(exec)), device: self.clone() };
        // SAFETY: graph and stream are alive.
        unsafe { driver::graph::upload(exec, self.stream.cu_stream()) }.doing("sending recorded work to the device")?;
        Ok(Box::new(replay))
    }

    fn memory(&self) -> u64 {
        self.memory
    }

    fn most_shared(&self) -> usize {
        self.most_shared
    }

    fn notes_faults(&self) -> bool {
        true
    }
}

/// A graph as it was recorded, until it is made ready.
struct Draft(sys::CUgraph);

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: owned, and destroyed here only. Nothing is left to report an error to.
            let _ = unsafe { driver::graph::destroy(self.0) };
        }
    }
}

struct Exec(sys::CUgraphExec);

// SAFETY: a graph may be used by any thread, by one at a time: it is kept behind a lock.
unsafe impl Send for Exec {}

/// A graph that is ready.
struct Replay {
    exec: Mutex<Exec>,
    device: Arc<Real>,
}

impl Recorded for Replay {
    fn replay(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: graph and stream are alive, and the lock keeps other threads away.
        unsafe { driver::graph::launch(lock(&self.exec).0, self.device.stream.cu_stream()) }.doing("launching")
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        // A graph must not go while it is being done.
        let _ = self.device.stream.synchronize();
        if self.device.bind().is_ok() {
            // SAFETY: owned, and destroyed here only. Nothing is left to report an error to.
            let _ = unsafe { driver::graph::exec_destroy(lock(&self.exec).0) };
        }
    }
}

/// Pinned memory through which everything goes to the device, so that the host need not wait: pieces in a ring, filled one behind the other. A piece is
/// used again once all copies from it are done.
#[derive(Default)]
struct Staging {
    pieces: Vec<Piece>,
    /// The piece that is being filled, and how far it is.
    current: usize,
    used: usize,
}

struct Piece {
    memory: PinnedHostSlice<u8>,
    /// Recorded behind the last copy when the piece was left.
    done: Mark,
}

const PIECES: usize = 8;
const PIECE: usize = 4 << 20;
const STAGING_ALIGN: usize = 64;

impl Staging {
    fn send(&mut self, device: &Real, mut to: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.pieces.is_empty() || self.used == PIECE {
                self.turn(device)?;
            }
            let count = bytes.len().min(PIECE - self.used);
            let (now, later) = bytes.split_at(count);
            let start = self.pieces[self.current].memory.as_mut_ptr().doing("copying to the device")?;
            // SAFETY: the range lies in the piece, and no copy from it is on its way: `turn` waited for those of the round before.
            let copied = unsafe {
                let place = start.add(self.used);
                std::ptr::copy_nonoverlapping(now.as_ptr(), place, count);
                driver::memcpy_htod_async(to, std::slice::from_raw_parts(place, count), device.stream.cu_stream())
            };
            self.used = (self.used + count).next_multiple_of(STAGING_ALIGN);
            copied.doing("copying to the device")?;
            (to, bytes) = (to + count as u64, later);
        }
        Ok(())
    }

    /// Leaves the current piece and enters the next.
    fn turn(&mut self, device: &Real) -> Result<()> {
        if !self.pieces.is_empty() {
            self.pieces[self.current].done.record(&device.stream).doing("copying to the device")?;
        }
        let next = if self.pieces.is_empty() { 0 } else { (self.current + 1) % PIECES };
        if next == self.pieces.len() {
            // SAFETY: bytes are written before they are read.
            let memory = unsafe { device.context.alloc_pinned_with_flags::<u8>(PIECE, sys::CU_MEMHOSTALLOC_PORTABLE) };
            let done = device.context.new_event(None).doing("making an event")?;
            self.pieces.push(Piece { memory: memory.doing("taking pinned memory")?, done });
        } else {
            self.pieces[next].done.synchronize().doing("copying to the device")?;
        }
        (self.current, self.used) = (next, 0);
        Ok(())
    }
}
