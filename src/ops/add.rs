//! Sums: of two tensors, and of tokens with rows of a position table.
//!
//!   add            y = a + b                                     da = db = dy
//!   add_positions  y[b, t] = x[b, t] + table[row of t]           dx = dy, dtable[r] = sum of dy where row r was used
//!
//! x [B, T, C]; table [1, R, C] or [R, C]. The row of token t is t itself for the first e tokens of an image and where there are no ids, otherwise
//! e + ids[b, t - e]; ids [B, T - e] of the other tokens, distinct in a row. GPU: kernels/add.cu.

use super::beside;
use super::case::Case;
use super::gather::{ids_on, warps};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, add};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};

impl Var {
    pub fn add(&self, other: &Var) -> Result<Var> {
        let (a, b) = (self.value(), other.value());
        ensure!(a.shape() == b.shape() && a.dtype() == b.dtype(), "add: {a:?} and {b:?} differ");
        let y = match a.gpu() {
            Some(gpu) => sum_on(gpu, a, b)?,
            None => by_real!("add", a.dtype(), sum(a, b))?,
        };
        Var::record("add", [self, other], y, |dy, _| Ok([Some(dy.clone()), Some(dy)]))
    }

    /// The first `front` tokens have the first rows of the table.
    pub fn add_positions(&self, table: &Var, front: usize, ids: Option<&Tensor>) -> Result<Var> {
        let x = self.value();
        let &[batch, tokens, _] = x.shape() else { crate::bail!("add_positions: x is {x:?} but [B, T, C] is needed") };
        ensure!(front <= tokens, "add_positions: x has {tokens} tokens but {front} are to stand in front");
        let ids = check_table(x, table.value(), tokens, ids.map(|ids| (batch, front, ids)))?;
        let y = match x.gpu() {
            None => by_real!("add_positions", x.dtype(), with_rows(x, table.value(), front, ids.as_ref()))?,
            Some(gpu) => with_rows_on(gpu, x, table.value(), front, ids.as_ref())?,
        };
        let (dtype, gpu) = (x.dtype(), x.gpu().cloned());
        Var::record("add_positions", [self, table], y, move |dy, need| {
            let dtable = need.give(1, |dtable| match gpu {
                None => by_real!("add_positions", dtype, table_gradient(&dy, front, ids.as_ref(), dtable)),
                Some(gpu) => table_gradient_on(&gpu, &dy, front, ids.as_ref(), dtable),
            })?;
            Ok([Some(dy), dtable])
        })
    }
}

/// Whether a table fits x of so many tokens; the ids, which come with the number of images and of tokens in front, on x's device.
pub(super) fn check_table(x: &Tensor, table: &Tensor, tokens: usize, ids: Option<(usize, usize, &Tensor)>) -> Result<Option<Tensor>> {
    let rows = table.rows();
    ensure!(table.last() == x.last() && table.dtype() == beside(x.dtype()), "add_positions: the table is {table:?} but x is {x:?}");
    let Some((batch, front, ids)) = ids else {
        ensure!(rows == tokens, "add_positions: the table has {rows} rows but there are {tokens} tokens");
        return Ok(None);
    };
    ensure!(front <= rows, "add_positions: the table has {rows} rows but {front} tokens stand in front");
    let ids = ids_on(&x.device(), "add_positions", ids, batch, rows - front)?;
    ensure!(front + ids.last() == tokens, "add_positions: ids are {ids:?} but {tokens} tokens have {front} in front");
    Ok(Some(ids))
}

vectorised! {
    fn add_to<T: Real>(a: &[T], b: &[T], y: &mut [T]) {
        y.iter_mut().zip(a).zip(b).for_each(|((y, &a), &b)| *y = a + b);
    }
}

fn sum_on(gpu: &Gpu, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (mut y, n) = (a.alike(a.shape(), a.dtype())?, a.numel());
    gpu.launch(&typed("add", a.dtype()), Launch::elements(n, 8), Args::new().out(&mut y).input(a).input(b).long(n))?;
    Ok(y)
}

fn sum<T: Real + Element>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::empty(a.shape(), a.dtype())?;
    let (a, b) = (a.data::<T>(), b.data::<T>());
    parallel::rows(y.data_mut::<T>(), 1, |first, y| add_to(&a[first..first + y.len()], &b[first..first + y.len()], y));
    Ok(y)
}

/// The row of the table for token `i` of all images' tokens counted through.
fn row_of(i: usize, tokens: usize, front: usize, ids: Option<&[u32]>) -> usize {
    let (image, t) = (i / tokens, i % tokens);
    match ids {
        Some(ids) if t >= front => front + ids[image * (tokens - front) + t - front] as usize,
        _ => t,
    }
}

fn with_rows<T: Real + Element>(x: &Tensor, table: &Tensor, front: usize, ids: Option<&Tensor>) -> Result<Tensor> {
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (tokens, c) = (x.shape()[1], x.last());
    let (x, table, ids) = (x.data::<T>(), table.data::<T>(), ids.map(|ids| ids.data::<u32>()));
    parallel::rows(y.data_mut::<T>(), c, |first, y| {
        for (j, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
            let i = first + j;
            add_to(&x[i * c..][..c], &table[row_of(i, tokens, front, ids) * c..][..c], y);
        }
    });
    Ok(y)
}

/// Token after token, image after image: a row of the table may be used by several images, so one thread sums.
fn table_gradient<T: Real + Element>(dy: &Tensor, front: usize, ids: Option<&Tensor>, dtable: &mut Tensor) -> Result<()> {
    let (tokens, c) = (dy.shape()[1], dy.last());
    let (dtable, ids) = (dtable.data_mut::<T>(), ids.map(|ids| ids.data::<u32>()));
    dtable.fill(T::ZERO);
    for (i, dy) in dy.data::<T>().chunks_exact(c.max(1)).enumerate() {
        add(&mut dtable[row_of(i, tokens, front, ids) * c..][..c], dy);
    }
    Ok(())
}

fn with_rows_on(gpu: &Gpu, x: &Tensor, table: &Tensor, front: usize, ids: Option<&Tensor>) -> Result<Tensor> {
    let (mut y, rows) = (x.alike(x.shape(), x.dtype())?, x.rows());
    let args = Args::new().out(&mut y).input(x).input(table).maybe(ids);
    let args = args.int(rows).int(x.shape()[1]).int(front).int(x.last()).int(table.rows()).fault();
    gpu.launch(&typed("add_positions_fwd", x.dtype()), warps(rows), args)?;
    Ok(y)
}

/// A block goes through the images for each row of the table.
pub(super) fn table_gradient_on(gpu: &Gpu, dy: &Tensor, front: usize, ids: Option<&Tensor>, dtable: &mut Tensor) -> Result<()> {
    let (batch, tokens, c, rows) = (dy.shape()[0], dy.shape()[1], dy.last(), dtable.rows());
    let args = Args::new().out(dtable).input(dy).maybe(ids).int(batch).int(tokens).int(front).int(c);
    gpu.launch(&typed("add_positions_bwd", dy.dtype()), Launch::new(0, 256).grid(c.div_ceil(256), rows, 1), args)
}

pub fn cases() -> Vec<Case> {
    let ids = Tensor::from_slice(&[2, 3], &[4u32, 0, 2, 2, 1, 4]).expect("six numbers");
    let many: Vec<u32> = (0..9 * 35).map(|i| (13 * (i % 35) + i / 35) % 41).collect();
    let (same, many) = (ids.clone(), Tensor::from_slice(&[9, 35], &many).expect("nine rows of 35"));
    vec![
        Case::new("add: 3 x 37", &[&[3, 37], &[3, 37]], |x| x[0].add(&x[1])),
        Case::new("add: a tensor and itself", &[&[2, 5]], |x| x[0].add(&x[0])),
        Case::new("add_positions: every token", &[&[2, 5, 8], &[1, 5, 8]], |x| x[0].add_positions(&x[1], 0, None)).vectors(&[1]),
        Case::new("add_positions: kept tokens", &[&[2, 3, 37], &[5, 37]], move |x| x[0].add_positions(&x[1], 0, Some(&ids))).vectors(&[1]),
        Case::new("add_positions: one token in front of the kept", &[&[2, 4, 264], &[1, 6, 264]], move |x| {
            x[0].add_positions(&x[1], 1, Some(&same))
        })
        .vectors(&[1]),
        Case::new("add_positions: nine images", &[&[9, 37, 3], &[1, 43, 3]], move |x| x[0].add_positions(&x[1], 2, Some(&many)))
            .vectors(&[1]),
    ]
}
