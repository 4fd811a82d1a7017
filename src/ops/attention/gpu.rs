//! The launches: which kernel, how many blocks of how many threads, how much shared memory.
//!
//! f32 runs v1. bf16 runs the chosen version; v2 and v3 keep a head in shared memory and leave it to the long kernels where that is not enough, or where
//! there are more than [`MOST_RESIDENT`] tokens.

use super::{Done, MOST_WIDTH, Sizes, VERSIONS};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// Most tokens of a head in shared memory, until a GPU says otherwise: the 257 of patches of 14 pixels are among them.
pub const MOST_RESIDENT: usize = 272;

/// Rows of a block of v1 and of the long kernels.
const PLAIN_ROWS: usize = 32;
const LONG_ROWS: usize = 64;

/// A width that kernels are compiled for; any head runs in the next larger one. The warps are the most that a block of the resident kernels may have
/// (`__launch_bounds__` in kernels/attention.cu), forward and backward; 0 where there is no such kernel.
struct Width {
    padded: usize,
    v2: [usize; 2],
    v3: [usize; 2],
}

const fn width(padded: usize, v2: [usize; 2], v3: [usize; 2]) -> Width {
    Width { padded, v2, v3 }
}

const WIDTHS: [Width; 6] = [
    width(16, [8, 8], [4, 4]),
    width(32, [8, 8], [4, 4]),
    width(48, [6, 6], [0, 0]),
    width(64, [8, 6], [4, 0]),
    width(80, [4, 8], [0, 0]),
    width(MOST_WIDTH, [4, 8], [0, 0]),
];

#[derive(Clone, Copy)]
enum Pass {
    Forward,
    Backward,
}

/// How a pass is run, by the name that stands in its kernels.
enum Form {
    V1,
    Long,
    Resident { version: &'static str, group: usize, warps: usize, shared: usize },
}

/// As many warps as share the strips evenly, at most `most`.
fn even(strips: usize, most: usize) -> usize {
    strips.div_ceil(strips.div_ceil(most))
}

impl Sizes {
    fn padded_width(&self) -> &'static Width {
        WIDTHS.iter().find(|width| width.padded >= self.width).expect("heads wider than the widest are refused at the entry")
    }

    /// Each [`Form::Resident`] with strips of `rows` rows: heads of a block, warps, bytes of shared memory.
    fn resident(&self, pass: Pass, rows: usize, most_warps: usize, room: usize) -> (usize, usize, usize) {
        let width = self.padded_width().padded;
        let (queries, keys) = (self.n.div_ceil(rows), self.keys.div_ceil(rows));
        if let Pass::Backward = pass {
            let warps = even(queries + keys, most_warps);
            return (1, warps, 2 * (queries + keys) * rows * width * 2 + 2 * queries * rows * 4 + warps * 8 * width * 2);
        }
        // A row's piece of narrow heads fills a line of 128 bytes only together with its neighbours'.
        let wanted = (64 / width).clamp(if self.n < 33 { 2 } else { 1 }, 4).min(self.heads);
        let forward = |group: usize| {
            let warps = even(group * queries, most_warps);
            (group, warps, group * 2 * self.keys.next_multiple_of(16) * width * 2 + warps * rows * width * 2)
        };
        (1..=wanted).rev().map(forward).find(|(_, _, shared)| 2 * shared <= room).unwrap_or(forward(1))
    }

    fn form(&self, gpu: &Gpu, dtype: Dtype, pass: Pass) -> Form {
        let (version, width) = (gpu.version(&VERSIONS), self.padded_width());
        if dtype == Dtype::F32 || version == "v1" {
            return Form::V1;
        }
        let wide = width.v3[pass as usize];
        let (version, rows, most) = match version {
            "long" => return Form::Long,
            "v3" if wide > 0 => ("v3", 32, wide),
            _ => ("v2", 16, width.v2[pass as usize]),
        };
        let (group, warps, shared) = self.resident(pass, rows, most, gpu.most_shared());
        let fits = self.n.max(self.keys) <= MOST_RESIDENT && shared <= gpu.most_shared();
        if fits { Form::Resident { version, group, warps, shared } } else { Form::Long }
    }

    fn kernel(&self, name: &str, dtype: Dtype) -> String {
        format!("{}_d{}", typed(&format!("attention_{name}"), dtype), self.padded_width().padded)
    }

    /// A grid of blocks of 128 threads that own `each` of `rows` rows of one head.
    fn by_rows(&self, rows: usize, each: usize) -> Launch {
        Launch::new(0, 128).grid(rows.div_ceil(each), self.heads, self.batch)
    }

    fn scale(&self) -> f64 {
        1.0 / (self.width as f64).sqrt()
    }

    fn sizes(&self, args: Args) -> Args {
        args.int(self.n).int(self.keys).int(self.heads).int(self.width)
    }
}

/// `saved` is the log-sum-exp of each row [B, H, N]; it is made if a backward may follow.
pub(super) fn forward(gpu: &Gpu, qkv: &Tensor, keys: Option<&Tensor>, s: &Sizes, tracked: bool, class_rows: bool) -> Result<Done> {
    let mut y = qkv.alike(&[s.batch, s.n, s.channels()], qkv.dtype())?;
    let mut saved = if tracked { Some(qkv.alike(&[s.batch, s.heads, s.n], Dtype::F32)?) } else { None };
    let mut rows = if class_rows { Some(qkv.alike(&[s.batch, s.heads, s.keys], Dtype::F32)?) } else { None };
    let args = s.sizes(Args::new().out(&mut y).maybe_out(saved.as_mut()).maybe_out(rows.as_mut()).input(qkv).maybe(keys));
    let width = s.padded_width().padded;
    let (name, launch, args) = match s.form(gpu, qkv.dtype(), Pass::Forward) {
        Form::V1 => ("fwd_v1".to_string(), s.by_rows(s.n, PLAIN_ROWS), args),
        Form::Long => ("fwd_long".to_string(), s.by_rows(s.n, LONG_ROWS).shared(640 * width), args),
        Form::Resident { version, group, warps, shared } => {
            let launch = Launch::new(0, 32 * warps).grid(s.heads.div_ceil(group), s.batch, 1).shared(shared);
            (format!("fwd_{version}"), launch, args.int(group))
        }
    };
    gpu.launch(&s.kernel(&name, qkv.dtype()), launch, args.float(s.scale()).fault())?;
    Ok(Done { y, saved, class_rows: rows })
}

/// What the backward reads.
pub(super) struct Saved {
    pub qkv: Tensor,
    pub keys: Option<Tensor>,
    pub y: Tensor,
    pub lse: Tensor,
}

pub(super) fn backward(gpu: &Gpu, dy: &Tensor, saved: &Saved, s: &Sizes, dqkv: &mut Tensor) -> Result<()> {
    let Saved { qkv, keys, y, lse } = saved;
    if keys.is_some() {
        // The kernels write the rows of dk and dv that are named; the others are zero.
        dqkv.clear()?;
    }
    let dtype = qkv.dtype();
    let form = s.form(gpu, dtype, Pass::Backward);
    let inputs = |dqkv: &mut Tensor| Args::new().out(dqkv).input(dy).input(qkv).maybe(keys.as_ref());
    if let Form::Resident { version, warps, shared, .. } = form {
        let launch = Launch::new(0, 32 * warps).grid(s.heads, s.batch, 1).shared(shared);
        let args = s.sizes(inputs(dqkv).input(y).input(lse)).float(s.scale()).fault();
        return gpu.launch(&s.kernel(&format!("bwd_{version}"), dtype), launch, args);
    }
    let (name, each, shared) = match form {
        Form::Long => ("bwd_long", LONG_ROWS, 768 * s.padded_width().padded + 1024),
        _ => ("bwd_v1", PLAIN_ROWS, 0),
    };
    let mut delta = lse.alike(lse.shape(), Dtype::F32)?;
    let rows = lse.numel();
    let args = Args::new().out(&mut delta).input(dy).input(y).int(s.n).int(s.heads).int(s.width).int(rows);
    gpu.launch(&typed("attention_delta", dtype), Launch::new(rows.div_ceil(16), 128), args)?;
    for (side, rows) in [("dq", s.n), ("dkv", s.keys)] {
        let args = s.sizes(inputs(dqkv).input(lse).input(&delta)).float(s.scale()).fault();
        gpu.launch(&s.kernel(&format!("{name}_{side}"), dtype), s.by_rows(rows, each).shared(shared), args)?;
    }
    Ok(())
}

pub(super) fn mean_over_heads(gpu: &Gpu, class_rows: &Tensor, [batch, heads, keys]: [usize; 3]) -> Result<Tensor> {
    let mut mean = class_rows.alike(&[batch, keys], Dtype::F32)?;
    let args = Args::new().out(&mut mean).input(class_rows).int(batch).int(heads).int(keys).float(1.0 / heads as f64);
    gpu.launch("mean_over_heads_f32", Launch::elements(batch * keys, 1), args)?;
    Ok(mean)
}
