//! Sums: of two tensors, and of tokens with rows of a position table.
//!
//!   add            y = a + b                             da = db = dy
//!   add_positions  y[b, t] = x[b, t] + table[e + t] or table[e + ids[b, t]]        dx = dy, dtable[e + i] = sum of dy where i was used
//!
//! x [B, T, C]; table [1, R, C] or [R, C], its first e rows belonging to other tokens; ids [B, T], distinct in a row.

use super::case::Case;
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::parallel;
use crate::device::simd::{Real, add};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Dtype, Element, Tensor};
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

    pub fn add_positions(&self, table: &Var, skip: usize, ids: Option<&Tensor>) -> Result<Var> {
        let x = self.value();
        let &[batch, tokens, c] = x.shape() else { crate::bail!("add_positions: x is {x:?} but [B, T, C] is needed") };
        let rows = table.value().rows();
        ensure!(table.value().last() == c && table.dtype() == x.dtype(), "add_positions: the table is {:?} but x is {x:?}", table.value());
        match ids {
            None => ensure!(rows == skip + tokens, "add_positions: the table has {rows} rows but x has {skip} + {tokens} tokens"),
            Some(ids) => {
                ensure!(ids.shape() == [batch, tokens] && ids.dtype() == Dtype::U32, "add_positions: ids are {ids:?} but x is {x:?}");
                let most = ids.data::<u32>().iter().max().map_or(0, |&id| id as usize + 1);
                ensure!(skip + most <= rows, "add_positions: token {most} has no row in a table of {rows}");
            }
        }
        let y = by_real!("add_positions", x.dtype(), with_rows(x, table.value(), skip, ids))?;
        let (ids, dtype) = (ids.cloned(), x.dtype());
        Var::record("add_positions", [self, table], y, move |dy, need| {
            let dtable = need.give(1, |dtable| by_real!("add_positions", dtype, table_gradient(&dy, skip, ids.as_ref(), dtable)))?;
            Ok([Some(dy), dtable])
        })
    }
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
fn row_of(i: usize, tokens: usize, skip: usize, ids: Option<&[u32]>) -> usize {
    skip + ids.map_or(i % tokens, |ids| ids[i] as usize)
}

fn with_rows<T: Real + Element>(x: &Tensor, table: &Tensor, skip: usize, ids: Option<&Tensor>) -> Result<Tensor> {
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (tokens, c) = (x.shape()[1], x.last());
    let (x, table, ids) = (x.data::<T>(), table.data::<T>(), ids.map(|ids| ids.data::<u32>()));
    parallel::rows(y.data_mut::<T>(), c, |first, y| {
        for (j, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
            let i = first + j;
            add_to(&x[i * c..][..c], &table[row_of(i, tokens, skip, ids) * c..][..c], y);
        }
    });
    Ok(y)
}

/// Token after token, image after image: a row of the table may be used by several images, so one thread sums.
fn table_gradient<T: Real + Element>(dy: &Tensor, skip: usize, ids: Option<&Tensor>, dtable: &mut Tensor) -> Result<()> {
    let (tokens, c) = (dy.shape()[1], dy.last());
    let (dtable, ids) = (dtable.data_mut::<T>(), ids.map(|ids| ids.data::<u32>()));
    dtable.fill(T::ZERO);
    for (i, dy) in dy.data::<T>().chunks_exact(c.max(1)).enumerate() {
        add(&mut dtable[row_of(i, tokens, skip, ids) * c..][..c], dy);
    }
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let ids = Tensor::from_slice(&[2, 3], &[4u32, 0, 2, 2, 1, 4]).expect("six numbers");
    vec![
        Case::new("add: 3 x 37", &[&[3, 37], &[3, 37]], |x| x[0].add(&x[1])),
        Case::new("add: a tensor and itself", &[&[2, 5]], |x| x[0].add(&x[0])),
        Case::new("add_positions: every token", &[&[2, 5, 8], &[1, 6, 8]], |x| x[0].add_positions(&x[1], 1, None)),
        Case::new("add_positions: kept tokens", &[&[2, 3, 8], &[1, 6, 8]], move |x| x[0].add_positions(&x[1], 1, Some(&ids))),
    ]
}
