//! Gradients that go from GPU to GPU, by NCCL on a stream of its own. Nothing here waits on the host but [`Gpus::settle`], so all of it may be recorded.
//!
//! A bucket is a range of the buffer in which all gradients lie, with what lies between them. In bf16 it is rounded into memory of its own, summed there, and
//! brought back when the pass is over.

use super::{ExchangeOptions, dealt};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch};
use crate::device::ranks::{Ranks, Wire};
use crate::device::real::{self, Nccl, Numbers};
use crate::ensure;
use crate::error::{Error, Result};
use crate::param::{ParamId, Params};
use crate::tensor::{Device, Dtype, Flat, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub struct Gpus {
    watch: Watch,
    nccl: Nccl,
    gpu: Gpu,
    wire: Wire,
    patience: Duration,
    /// Of each bucket that goes in bf16.
    rounded: BTreeMap<usize, Tensor>,
}

/// The gradients of a bucket, with what lies between them.
fn span(params: &Params, ids: &[ParamId]) -> Result<Flat> {
    let ends = ids.first().zip(ids.last()).and_then(|(&first, &last)| params.gradient_span(first, last));
    ends.ok_or_else(|| Error::new("a bucket of gradients that have no memory"))
}

/// Which numbers of a bucket belong to each rank; what lies between two parameters goes with the first.
pub fn parts(params: &Params, ids: &[ParamId], owners: &HashMap<ParamId, usize>, world: usize) -> Vec<Range<usize>> {
    let starts = |id: ParamId| params.gradient_span(ids[0], id).map_or(0, |span| span.len - params.value(id).numel());
    let end = ids.last().and_then(|&last| params.gradient_span(ids[0], last)).map_or(0, |span| span.len);
    dealt(ids.iter().map(|&id| (owners[&id], starts(id))), end, world)
}

impl Gpus {
    /// Joins the GPUs of all ranks.
    pub fn join(gpu: &Gpu, ranks: &Ranks, options: ExchangeOptions) -> Result<Self> {
        let bus = gpu.as_real().map(|real| real.bus()).transpose()?.unwrap_or_default();
        let place = [real::machine(), bus].join("\n");
        let places = ranks.gather("the GPUs of all ranks", place.as_bytes())?;
        let two = |bytes: Vec<u8>| {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let (machine, bus) = text.split_once('\n').unwrap_or((&text, ""));
            (machine.to_string(), bus.to_string())
        };
        real::distinct(&places.into_iter().map(two).collect::<Vec<_>>())?;
        let id = if ranks.is_first() { Nccl::id()?.to_vec() } else { Vec::new() };
        let id = <[u8; 128]>::try_from(ranks.broadcast("the id of NCCL's group", id)?);
        let id = id.map_err(|id| Error::new(format!("the id of NCCL's group came as {} bytes", id.len())))?;
        let nccl = Nccl::join(gpu, &id, ranks.rank(), ranks.world(), options.patience, &mut || ranks.look())?;
        let watch = Watch::start(ranks.clone(), options.patience);
        Ok(Self { watch, nccl, gpu: gpu.clone(), wire: options.wire, patience: options.patience, rounded: BTreeMap::new() })
    }

    /// Every rank gets the values that rank 0 has.
    pub fn values_of_first(&self, params: &mut Params) -> Result<()> {
        let mut values = params.flat_values()?;
        let len = values.len;
        self.nccl.fork()?;
        self.watch.over(|| self.nccl.broadcast(Numbers::of(&mut values, Dtype::F32, len), 0))?;
        self.nccl.join_back()?;
        params.refresh()
    }

    /// Sums the gradients of a bucket over the ranks, or each rank's part of them.
    pub fn send(&mut self, params: &Params, at: usize, ids: &[ParamId], parts: Option<&[Range<usize>]>) -> Result<()> {
        let mut span = span(params, ids)?;
        let len = span.len;
        if self.wire == Wire::F32 {
            self.nccl.fork()?;
            return self.sum(Numbers::of(&mut span, Dtype::F32, len), parts);
        }
        let mut rounded = match self.rounded.remove(&at) {
            Some(rounded) if rounded.numel() == len => rounded,
            _ => {
                ensure!(!self.gpu.is_recording(), "gradients are sent in bf16 once before that is recorded");
                Tensor::empty_on(&Device::Gpu(self.gpu.clone()), &[len], Dtype::Bf16)?
            }
        };
        self.gpu.launch("cast_f32_bf16", Launch::elements(len, 8), Args::new().out(&mut rounded).input(&span).long(len))?;
        self.nccl.fork()?;
        self.sum(Numbers::of(&mut rounded, Dtype::Bf16, len), parts)?;
        self.rounded.insert(at, rounded);
        Ok(())
    }

    fn sum(&self, numbers: Numbers, parts: Option<&[Range<usize>]>) -> Result<()> {
        self.watch.over(|| match parts {
            Some(parts) => self.nccl.reduce_scatter(numbers, parts),
            None => self.nccl.all_reduce(numbers),
        })
    }

    /// What the device is given from here on comes behind the sums.
    pub fn end_pass<'a>(&mut self, params: &Params, buckets: impl Iterator<Item = &'a [ParamId]>) -> Result<()> {
        self.nccl.join_back()?;
        for (at, ids) in buckets.enumerate() {
            let Some(rounded) = self.rounded.get(&at) else { continue };
            let mut span = span(params, ids)?;
            let len = span.len;
            self.gpu.launch("cast_bf16_f32", Launch::elements(len, 8), Args::new().out(&mut span).input(rounded).long(len))?;
        }
        Ok(())
    }

    /// Everybody gets what each rank has made of its own parameters.
    pub fn share_values(&self, params: &mut Params, owners: &HashMap<ParamId, usize>, world: usize) -> Result<()> {
        let all: Vec<ParamId> = params.ids().collect();
        let starts: Vec<(usize, usize)> = params
            .trained()
            .filter_map(|id| Some((*owners.get(&id)?, params.value_span(all[0], id)?.len - params.value(id).numel())))
            .collect();
        let mut values = params.flat_values()?;
        let len = values.len;
        self.nccl.fork()?;
        let parts = dealt(starts.into_iter(), len, world);
        self.watch.over(|| self.nccl.all_gather(Numbers::of(&mut values, Dtype::F32, len), &parts))?;
        self.nccl.join_back()?;
        params.refresh()
    }

    /// Stops what is under way and refuses everything from now on.
    pub fn give_up(&self, why: &str) {
        self.nccl.give_up(why);
    }

    /// Waits for what is under way, with an eye on the other ranks.
    pub fn settle(&self, ranks: &Ranks) -> Result<()> {
        self.nccl.settle(self.patience, &mut || ranks.look())
    }
}

/// Looks after calls into NCCL, which makes connections inside the first call of a kind and may wait there for a rank that is gone. Nothing but the end of the
/// process helps then.
struct Watch {
    /// When the call that goes on began.
    inside: Arc<Mutex<Option<Instant>>>,
    over: Arc<AtomicBool>,
}

/// Between two looks, and how long a call may take that another rank's failure should have ended.
const BETWEEN: Duration = Duration::from_millis(200);
const LEFT: Duration = Duration::from_secs(5);

impl Watch {
    fn start(ranks: Ranks, patience: Duration) -> Self {
        let watch = Self { inside: Arc::default(), over: Arc::default() };
        let (inside, over) = (watch.inside.clone(), watch.over.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(BETWEEN);
                let since = *inside.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(waited) = since.map(|since| since.elapsed()).filter(|waited| *waited > LEFT) else { continue };
                let why = match ranks.look() {
                    Err(error) => error.chain(),
                    Ok(()) if waited < patience => continue,
                    Ok(()) => format!("rank {} waited {:.0} s inside NCCL for the others", ranks.rank(), waited.as_secs_f64()),
                };
                ranks.fail(&Error::new(why.clone()));
                eprintln!("masque: {why}");
                // At once: what CUDA and NCCL do at the end of a program would wait for the call.
                signal_hook::low_level::exit(1);
            }
        });
        watch
    }

    fn over<R>(&self, call: impl FnOnce() -> R) -> R {
        let set = |since: Option<Instant>| *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = since;
        set(Some(Instant::now()));
        let done = call();
        set(None);
        done
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
