//! NCCL: one rank's end of a group of GPUs that exchange numbers.
//!
//! Its work goes on a stream of its own, so that the device computes meanwhile. Events join the two:
//!
//! ```text
//! device   ... gradients ready | more of the backward pass ........... | update
//!                              | fork                        join_back |
//! this               ......... | all_reduce | reduce_scatter ......... |
//! ```
//!
//! Memory that is exchanged has to stay its owner's until [`Nccl::join_back`]: the device hands out again at once what is dropped. Every rank makes the same
//! calls in the same order, with as many numbers of the same kind. Sums of bf16 are rounded on the way, in an order that is NCCL's.
//!
//! Inside a recording ([`Gpu::capture`]) fork, exchanges and join_back are recorded like the device's own work; the recorded work keeps the communicator alive,
//! since NCCL waits at its end for all graphs that use it.
//!
//! **Failure.** A collective waits for all ranks, if need be for ever. [`Nccl::settle`] looks at what is under way instead of waiting for it, and after an
//! error, or when time is up, gives the exchange up: NCCL then stops what runs on the device, so that nothing that is dropped later waits for it. A call whose
//! connections are made when they are first used may wait inside NCCL; another thread keeps time for that, and ends the process (`train/exchange/gpus.rs`).

use super::super::gpu::Gpu;
use super::super::launch::Operand;
use super::super::{Dtype, libs};
use super::{Doing, Mark, Real, lock};
use crate::ensure;
use crate::error::{Context, Error, Result};
use cudarc::driver::{CudaStream, result as driver, sys as cuda};
use cudarc::nccl::sys::{self, ncclDataType_t as Kind, ncclRedOp_t as Op, ncclResult_t as Answer};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long the end of a communicator may take before it is given up.
const AT_THE_END: Duration = Duration::from_secs(10);
/// Between two looks at what is under way.
const PAUSE: Duration = Duration::from_micros(50);

const DEBUG: &str = "run again with NCCL_DEBUG=INFO to see what it did";

/// Numbers on the device that are exchanged in place, lent by their owner.
pub struct Numbers<'a> {
    address: u64,
    len: usize,
    dtype: Dtype,
    owner: PhantomData<&'a mut ()>,
}

impl<'a> Numbers<'a> {
    /// The first `len` numbers of something that has so many.
    pub fn of(owner: &'a mut impl Operand, dtype: Dtype, len: usize) -> Self {
        Self { address: owner.address_mut(), len, dtype, owner: PhantomData }
    }

    /// Some of them.
    pub fn part(&mut self, range: Range<usize>) -> Numbers<'_> {
        assert!(range.start <= range.end && range.end <= self.len, "numbers {range:?} of {}", self.len);
        Numbers { address: self.at(range.start) as u64, len: range.len(), dtype: self.dtype, owner: PhantomData }
    }

    fn at(&self, start: usize) -> *mut c_void {
        (self.address + (start * self.dtype.size()) as u64) as *mut c_void
    }

    fn kind(&self) -> Kind {
        match self.dtype {
            Dtype::F32 => Kind::ncclFloat32,
            Dtype::F64 => Kind::ncclFloat64,
            Dtype::Bf16 => Kind::ncclBfloat16,
            Dtype::U32 => Kind::ncclUint32,
            Dtype::U8 => Kind::ncclUint8,
        }
    }
}

/// The length of all parts, if they have one and lie one behind the other; an error if there is not one for each rank, rising, inside `len` numbers.
fn even(parts: &[Range<usize>], world: usize, len: usize) -> Result<Option<usize>> {
    ensure!(parts.len() == world, "there are {} parts for {world} ranks", parts.len());
    let mut from = 0;
    for part in parts {
        ensure!(from <= part.start && part.start <= part.end && part.end <= len, "part {part:?} of {len} numbers is not behind {from}");
        from = part.end;
    }
    let length = parts[0].len();
    let behind = |pair: &[Range<usize>]| pair[0].end == pair[1].start && pair[1].len() == length;
    Ok(parts.windows(2).all(behind).then_some(length))
}

/// This machine: its name, and what tells it from another of that name.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_string();
    format!("{} {}", read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"))
}

/// NCCL takes one rank a GPU. For each rank, in order, its [`machine`] and its GPU's place there ([`Real::bus`]).
pub fn distinct(places: &[(String, String)]) -> Result<()> {
    let mut seen = BTreeMap::new();
    for (rank, place) in places.iter().enumerate() {
        if let Some(other) = seen.insert(place, rank) {
            let (machine, gpu) = place;
            let name = machine.split(' ').next().unwrap_or_default();
            return Err(Error::new(format!(
                "the GPU {gpu} of {name} is used by ranks {other} and {rank}, and NCCL needs one for each rank; start as many ranks on a machine as it has \
                 GPUs, or give --exchange host"
            )));
        }
    }
    Ok(())
}

/// Text that NCCL owns.
///
/// # Safety
///
/// None or a text that ends in a zero byte and stays while it is read.
unsafe fn text(of: *const c_char) -> String {
    // SAFETY: as above.
    if of.is_null() { String::new() } else { unsafe { CStr::from_ptr(of) }.to_string_lossy().trim().to_string() }
}

/// Says what NCCL was asked for, what it answers, and what it says about the last error.
fn said(what: &str, answer: Answer, comm: sys::ncclComm_t) -> Error {
    // SAFETY: the library is loaded, since it answered; both texts are its own, and the communicator is none or alive.
    let (error, last) = unsafe { (text(sys::ncclGetErrorString(answer)), text(sys::ncclGetLastError(comm))) };
    let last = if last.is_empty() { last } else { format!(" ({last})") };
    Error::new(format!("NCCL, {what}: {error}{last}; {DEBUG}"))
}

fn checked(what: &str, answer: Answer, comm: sys::ncclComm_t) -> Result<()> {
    match answer {
        Answer::ncclSuccess | Answer::ncclInProgress => Ok(()),
        answer => Err(said(what, answer, comm)),
    }
}

#[derive(Clone, Copy)]
struct Comm(sys::ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time: it is kept behind a lock, and handed to the thread that ends it.
unsafe impl Send for Comm {}

impl Comm {
    /// Of a thread that uses the device.
    fn end(self, well: bool) {
        // SAFETY: the communicator is alive, and nobody has it any more. Nothing is left to report an error to.
        let _ = unsafe { if well { sys::ncclCommDestroy(self.0) } else { sys::ncclCommAbort(self.0) } };
    }
}

/// One rank's end of a group of GPUs that exchange numbers. Clones are the same end.
#[derive(Clone)]
pub struct Nccl(Arc<End>);

struct End {
    rank: usize,
    world: usize,
    gpu: Gpu,
    stream: Arc<CudaStream>,
    /// Behind the device's work so far, behind this stream's, and behind both.
    before: Mark,
    after: Mark,
    done: Mark,
    state: Mutex<State>,
}

enum State {
    Open(Comm),
    /// Why it was given up, and the thread that does so.
    GivenUp(String, Option<JoinHandle<()>>),
}

impl Nccl {
    /// What makes a group: rank 0 gets it here, and the other ranks from rank 0.
    pub fn id() -> Result<[u8; 128]> {
        libs::need_nccl()?;
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: the library is loaded, and it writes one id.
        checked("making the id of a group", unsafe { sys::ncclGetUniqueId(&mut id) }, std::ptr::null_mut())?;
        Ok(id.internal.map(|c| c as u8))
    }

    /// Waits for all ranks, each with a GPU of its own ([`distinct`]), for so long. `meanwhile` is called again and again; its error ends the wait.
    pub fn join(
        gpu: &Gpu,
        id: &[u8; 128],
        rank: usize,
        world: usize,
        within: Duration,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        libs::need_nccl()?;
        let real = gpu.as_real().ok_or_else(|| Error::new(format!("NCCL is for GPUs, and the device is {}", gpu.name())))?;
        ensure!(rank < world && i32::try_from(world).is_ok(), "rank {rank} of {world} does not exist");
        ensure!(id.iter().any(|&byte| byte != 0), "the id of NCCL's group is all zeros; it has to come from rank 0, where NCCL makes it");
        ensure!(!gpu.is_recording(), "{}: a group is not joined inside a recording", gpu.name());
        real.bind()?;
        let stream = real.context.new_stream().doing("making a stream")?;
        let mark = || real.context.new_event(None).doing("making an event");
        let (before, after, done) = (mark()?, mark()?, mark()?);
        let comm = enter(gpu.clone(), *id, rank, world, within, meanwhile)?;
        Ok(Self(Arc::new(End { rank, world, gpu: gpu.clone(), stream, before, after, done, state: Mutex::new(State::Open(comm)) })))
    }

    pub fn rank(&self) -> usize {
        self.0.rank
    }

    pub fn world(&self) -> usize {
        self.0.world
    }

    /// Every rank gets the sums over all ranks.
    pub fn all_reduce(&self, data: Numbers) -> Result<()> {
        let (at, len) = (data.at(0), data.len);
        // SAFETY: the numbers are on the device, and stay until `join_back`.
        self.call("all-reduce", len, |comm, stream| unsafe { sys::ncclAllReduce(at, at, len, data.kind(), Op::ncclSum, comm, stream) })
    }

    /// Each rank gets the sums of its part; what the other parts then hold is arbitrary. One part a rank, rising, of whatever lengths.
    pub fn reduce_scatter(&self, data: Numbers, parts: &[Range<usize>]) -> Result<()> {
        let what = "reduce-scatter";
        let kind = data.kind();
        match even(parts, self.0.world, data.len).context(what)? {
            Some(len) => {
                let (from, to) = (data.at(parts[0].start), data.at(parts[self.0.rank].start));
                // SAFETY: as above.
                self.call(what, len, |comm, stream| unsafe { sys::ncclReduceScatter(from, to, len, kind, Op::ncclSum, comm, stream) })
            }
            None => self.each_part(what, &data, parts, |at, len, owner, comm, stream| {
                // SAFETY: as above.
                unsafe { sys::ncclReduce(at, at, len, kind, Op::ncclSum, owner, comm, stream) }
            }),
        }
    }

    /// Each rank gives its part and gets all others. One part a rank, rising, of whatever lengths.
    pub fn all_gather(&self, data: Numbers, parts: &[Range<usize>]) -> Result<()> {
        let what = "all-gather";
        let kind = data.kind();
        match even(parts, self.0.world, data.len).context(what)? {
            Some(len) => {
                let (from, to) = (data.at(parts[self.0.rank].start), data.at(parts[0].start));
                // SAFETY: as above.
                self.call(what, len, |comm, stream| unsafe { sys::ncclAllGather(from, to, len, kind, comm, stream) })
            }
            None => self.each_part(what, &data, parts, |at, len, owner, comm, stream| {
                // SAFETY: as above.
                unsafe { sys::ncclBroadcast(at, at, len, kind, owner, comm, stream) }
            }),
        }
    }

    /// Every rank gets what `root` has.
    pub fn broadcast(&self, data: Numbers, root: usize) -> Result<()> {
        ensure!(root < self.0.world, "broadcast: rank {root} of {} does not exist", self.0.world);
        let (at, len) = (data.at(0), data.len);
        // SAFETY: as above.
        self.call("broadcast", len, |comm, stream| unsafe { sys::ncclBroadcast(at, at, len, data.kind(), root as c_int, comm, stream) })
    }

    /// What is exchanged from now on waits for the work that the device has been given so far.
    pub fn fork(&self) -> Result<()> {
        let real = self.real()?;
        self.0.before.record(&real.stream).doing("marking the device's work")?;
        self.0.stream.wait(&self.0.before).doing("making the exchange wait for the device")
    }

    /// What the device is given from now on waits for what has been exchanged so far.
    pub fn join_back(&self) -> Result<()> {
        let real = self.real()?;
        self.0.after.record(&self.0.stream).doing("marking what is exchanged")?;
        real.stream.wait(&self.0.after).doing("making the device wait for the exchange")
    }

    /// Waits until everything that this stream and the device were given is done, but for no longer than `within`, with an eye on NCCL's errors; `meanwhile` is
    /// called again and again, and its error ends the wait. After an error the exchange is given up.
    pub fn settle(&self, within: Duration, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let End { rank, world, gpu, done, .. } = &*self.0;
        ensure!(!gpu.is_recording(), "{}: recorded work is not waited for", gpu.name());
        self.join_back()?;
        done.record(&self.real()?.stream).doing("marking the device's work")?;
        let start = Instant::now();
        let mut settled = || {
            while !done.try_is_complete().doing("waiting for the other ranks")? {
                self.well()?;
                meanwhile()?;
                ensure!(
                    start.elapsed() < within,
                    "rank {rank} of {world} waited {} s for numbers of the others; one of them has stopped or fallen behind: look at what it says, or {DEBUG}",
                    within.as_secs_f64()
                );
                pause(start);
            }
            self.well()
        };
        settled().inspect_err(|error| self.give_up(&error.chain()))
    }

    /// Stops what is under way on the device and refuses everything from now on. For a rank that hears of another's failure.
    pub fn give_up(&self, why: &str) {
        self.0.give_up(why);
    }

    /// Whether NCCL knows of a failure.
    fn well(&self) -> Result<()> {
        let state = lock(&self.0.state);
        let comm = self.0.open(&state)?;
        let mut found = Answer::ncclSuccess;
        // SAFETY: the communicator is alive, and it writes one number.
        let asked = unsafe { sys::ncclCommGetAsyncError(comm.0, &mut found) };
        checked("asking for errors", asked, comm.0)?;
        checked("exchanging numbers", found, comm.0)
    }

    /// For a thread that is about to use the device.
    fn real(&self) -> Result<&Real> {
        let real = self.0.gpu.as_real().expect("the device that was joined with is real");
        real.bind()?;
        Ok(real)
    }

    /// Calls NCCL, unless there is nothing to exchange; after an error the exchange is given up.
    fn call(&self, what: &str, len: usize, f: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> Answer) -> Result<()> {
        self.real()?;
        if len == 0 {
            return self.0.open(&lock(&self.0.state)).map(drop);
        }
        if self.0.gpu.is_recording() {
            // SAFETY: the stream is alive.
            let status = unsafe { driver::stream::is_capturing(self.0.stream.cu_stream()) }.doing("asking for the recording")?;
            let active = cuda::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
            ensure!(status == active, "{}: {what} inside a recording has to come behind a fork", self.0.gpu.name());
            self.0.gpu.keep(self.0.clone());
        }
        let done = {
            let state = lock(&self.0.state);
            let comm = self.0.open(&state)?.0;
            checked(what, f(comm, self.0.stream.cu_stream().cast()), comm)
        };
        done.inspect_err(|error| self.give_up(&error.chain()))
    }

    /// One call for each part that is not empty, with its address, length and owner, all as one piece of work.
    fn each_part(
        &self,
        what: &str,
        data: &Numbers,
        parts: &[Range<usize>],
        f: impl Fn(*mut c_void, usize, c_int, sys::ncclComm_t, sys::cudaStream_t) -> Answer,
    ) -> Result<()> {
        let all = parts.iter().map(Range::len).sum();
        self.call(what, all, |comm, stream| {
            // SAFETY: the library is loaded; a group that was begun is ended below, whatever happens in between.
            let begun = unsafe { sys::ncclGroupStart() };
            if begun != Answer::ncclSuccess {
                return begun;
            }
            let parts = parts.iter().zip(0..).filter(|(part, _)| !part.is_empty());
            let answers = parts.map(|(part, owner)| f(data.at(part.start), part.len(), owner, comm, stream));
            let first = answers.into_iter().find(|answer| !matches!(answer, Answer::ncclSuccess | Answer::ncclInProgress));
            // SAFETY: as above.
            let ended = unsafe { sys::ncclGroupEnd() };
            first.unwrap_or(ended)
        })
    }
}

/// The first looks follow each other at once, since most waits are short.
fn pause(start: Instant) {
    if start.elapsed() < Duration::from_millis(1) { thread::yield_now() } else { thread::sleep(PAUSE) }
}

/// Enters the group on a thread of its own, which NCCL holds until all ranks are there.
fn enter(gpu: Gpu, id: [u8; 128], rank: usize, world: usize, within: Duration, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<Comm> {
    let (tell, told) = mpsc::channel();
    let entering = move || {
        let made = gpu.as_real().map_or(Ok(()), Real::bind).and_then(|()| {
            let mut comm = std::ptr::null_mut();
            let id = sys::ncclUniqueId { internal: id.map(|byte| byte as c_char) };
            // SAFETY: the library is loaded, the device is this thread's, and it writes one communicator.
            let answer = unsafe { sys::ncclCommInitRank(&mut comm, world as c_int, id, rank as c_int) };
            checked("joining the group", answer, std::ptr::null_mut()).map(|()| Comm(comm))
        });
        // Whoever waited may have given up.
        if let Err(mpsc::SendError(Ok(comm))) = tell.send(made) {
            comm.end(false);
        }
    };
    thread::Builder::new()
        .name("nccl".into())
        .spawn(entering)
        .map_err(|error| Error::new(format!("starting a thread for NCCL: {error}")))?;
    let start = Instant::now();
    loop {
        match told.recv_timeout(Duration::from_millis(5)) {
            Ok(made) => return made.with_context(|| format!("rank {rank} of {world}")),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Error::new(format!("NCCL did not let rank {rank} join; {DEBUG}"))),
            Err(mpsc::RecvTimeoutError::Timeout) => meanwhile()?,
        }
        ensure!(
            start.elapsed() < within,
            "rank {rank} waited {} s for all {world} ranks to join NCCL's group; look at what the others say, or {DEBUG}",
            within.as_secs_f64()
        );
    }
}

impl End {
    fn open<'a>(&self, state: &'a State) -> Result<&'a Comm> {
        match state {
            State::Open(comm) => Ok(comm),
            State::GivenUp(why, _) => Err(Error::new(format!("the exchange between GPUs was given up before: {why}"))),
        }
    }

    /// NCCL may wait at the end for recorded work to go, or for others: a thread does it.
    fn end(&self, comm: Comm, well: bool) -> Option<JoinHandle<()>> {
        let kept = (self.gpu.clone(), self.stream.clone());
        let ending = move || {
            let comm = comm;
            if kept.0.as_real().is_some_and(|real| real.bind().is_ok() || !well) {
                comm.end(well);
            }
        };
        thread::Builder::new().name("nccl end".into()).spawn(ending).ok()
    }

    fn give_up(&self, why: &str) {
        let mut state = lock(&self.state);
        if let State::Open(comm) = *state {
            *state = State::GivenUp(why.to_string(), self.end(comm, false));
        }
    }

    /// Whether all that was given to this stream is done, within a while.
    fn is_idle(&self) -> bool {
        let start = Instant::now();
        self.done.record(&self.stream).is_ok()
            && loop {
                match self.done.try_is_complete() {
                    Ok(false) if start.elapsed() < AT_THE_END => pause(start),
                    other => break other.unwrap_or(false),
                }
            }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let open = matches!(*lock(&self.state), State::Open(_));
        let well = open && self.is_idle();
        let state = std::mem::replace(&mut *lock(&self.state), State::GivenUp(String::new(), None));
        let ending = match state {
            State::Open(comm) => self.end(comm, well),
            State::GivenUp(_, ending) => ending,
        };
        let start = Instant::now();
        while ending.as_ref().is_some_and(|ending| !ending.is_finished()) && start.elapsed() < AT_THE_END {
            pause(start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_where_they_have_one_length_and_no_gaps() {
        let even = |parts: &[Range<usize>], len| even(parts, parts.len().max(1), len).map_err(|error| error.chain());
        assert_eq!(even(&[0..4, 4..8, 8..12], 12), Ok(Some(4)));
        assert_eq!(even(&[2..4, 4..6], 10), Ok(Some(2)));
        assert_eq!(even(std::slice::from_ref(&(3..7)), 7), Ok(Some(4)));
        assert_eq!(even(&[5..5, 5..5], 5), Ok(Some(0)));
        for parts in [[0..4, 4..7], [0..4, 5..9], [0..0, 0..9]] {
            assert_eq!(even(&parts, 9), Ok(None), "{parts:?}");
        }
        for parts in [[0..4, 3..7], [4..8, 0..4], [0..4, 4..10]] {
            assert!(even(&parts, 9).unwrap_err().contains("of 9 numbers is not behind"), "{parts:?}");
        }
        assert!(even(&[], 9).unwrap_err().contains("0 parts for 1 ranks"));
    }

    #[test]
    fn a_gpu_that_two_ranks_use_is_named() {
        let place = |machine: &str, gpu: &str| (machine.to_string(), gpu.to_string());
        let mut places =
            vec![place("a 1", "0000:3B:00.0"), place("a 1", "0000:5E:00.0"), place("b 2", "0000:3B:00.0"), place("a 3", "0000:3B:00.0")];
        distinct(&places).unwrap();
        distinct(&[]).unwrap();
        places.push(place("a 1", "0000:5E:00.0"));
        let said = distinct(&places).unwrap_err().chain();
        assert!(said.starts_with("the GPU 0000:5E:00.0 of a is used by ranks 1 and 4, and NCCL needs one for each rank; "), "{said}");
        assert_eq!(machine(), machine());
        assert!(machine().split(' ').count() >= 2, "{}", machine());
    }

    #[test]
    fn a_part_of_numbers_begins_where_it_should() {
        struct At(u64);
        impl Operand for At {
            fn address(&self) -> u64 {
                self.0
            }
            fn address_mut(&mut self) -> u64 {
                self.0
            }
        }
        let mut owner = At(1000);
        for (dtype, address) in [(Dtype::F32, 1012), (Dtype::F64, 1024), (Dtype::Bf16, 1006), (Dtype::U8, 1003), (Dtype::U32, 1012)] {
            let mut numbers = Numbers::of(&mut owner, dtype, 10);
            let part = numbers.part(3..9);
            assert_eq!((part.at(0) as u64, part.len), (address, 6));
        }
    }
}
