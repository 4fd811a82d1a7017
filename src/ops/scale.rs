//! Products with something smaller than the tensor, and how a branch joins a residual stream.
//!
//!   scale           y = f x                              dx = f dy
//!   scale_channels  y[.., c] = x[.., c] g[c]             dx = dy g,  dg = sum_rows(dy x)       layer scale
//!   drop_path       y[b] = x[b] d[b],  d[b] = 1 / (1 - p) if u[b] >= p, else 0                 the same factor for dx
//!   add_branch      y = x + branch g d                   dx = dy,  dbranch = dy g d,  dg = sum_rows(dy branch d)
//!
//! u is one uniform number in [0, 1) an image. GPU: kernels/scale.cu, where the last three are one kernel.

use super::case::{Case, rounded};
use super::linear::column_sums;
use super::{beside, sum_of_parts};
use crate::device::gpu::Gpu;
use crate::device::launch::{Args, Launch, typed};
use crate::device::{parallel, simd::Real};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Dtype, Element, Tensor};
use crate::{by_real, ensure, vectorised};

/// What joins a residual stream: a value, times the gains of layer scale, times the factors of stochastic depth.
pub struct Branch {
    pub value: Var,
    /// [C]
    pub gains: Option<Var>,
    /// One uniform number an image, [B], and the rate.
    pub drop: Option<(Tensor, f64)>,
}

impl Var {
    pub fn scale(&self, factor: f64) -> Result<Var> {
        let times = move |x: Tensor| match x.gpu() {
            None => by_real!("scale", x.dtype(), times_number(x, factor)),
            Some(gpu) => times_number_on(gpu, &x, factor),
        };
        Var::record("scale", [self], times(self.value().clone())?, move |dy, _| Ok([Some(times(dy)?)]))
    }

    pub fn scale_channels(&self, g: &Var) -> Result<Var> {
        let (x, gains) = (self.value().clone(), g.value().clone());
        check_gains("scale_channels", &gains, &x)?;
        if let Some(gpu) = x.gpu().cloned() {
            let factors = Factors::new(&x, Some(gains), None)?;
            let y = factors.times(&gpu, &x, None)?;
            return Var::record("scale_channels", [self, g], y, move |dy, need| {
                let mut dx = if need.wants(0) { Some(dy.alike(dy.shape(), dy.dtype())?) } else { None };
                let mut dg = if need.wants(1) { Some(need.out(1)?) } else { None };
                factors.gradients(&gpu, &dy, Some(&x), dx.as_mut(), dg.as_mut())?;
                Ok([dx, dg])
            });
        }
        let y = by_real!("scale_channels", x.dtype(), times_channels(&x, &gains))?;
        Var::record("scale_channels", [self, g], y, move |dy, need| {
            let dg = need.give(1, |dg| by_real!("scale_channels", x.dtype(), gain_gradient(&dy, &x, dg)))?;
            let wants = need.wants(0);
            let dx = if wants { Some(by_real!("scale_channels", x.dtype(), times_channels(&dy, &gains))?) } else { None };
            Ok([dx, dg])
        })
    }

    /// Stochastic depth on the first axis: images with u < p are dropped, the others grow by 1 / (1 - p).
    pub fn drop_path(&self, u: &Tensor, p: f64) -> Result<Var> {
        let x = self.value();
        check_drop("drop_path", u, p, x)?;
        if let Some(gpu) = x.gpu().cloned() {
            let factors = Factors::new(x, None, Some((u, p)))?;
            let y = factors.times(&gpu, x, None)?;
            return Var::record("drop_path", [self], y, move |dy, _| Ok([Some(factors.times(&gpu, &dy, None)?)]));
        }
        // The rule is floor(keep + u) = 1, taken in f32 as PyTorch takes it.
        let (keep, u) = ((1.0 - p) as f32, u.on(&Device::Cpu)?);
        let factors: Vec<f64> = u.data::<f32>().iter().map(|&u| if (keep + u).floor() >= 1.0 { 1.0 / (1.0 - p) } else { 0.0 }).collect();
        let dtype = self.dtype();
        let y = by_real!("drop_path", dtype, times_images(x.clone(), &factors))?;
        Var::record("drop_path", [self], y, move |dy, _| Ok([Some(by_real!("drop_path", dtype, times_images(dy, &factors))?)]))
    }

    /// The residual sum: self + what the branch comes to.
    pub fn add_branch(&self, branch: &Branch) -> Result<Var> {
        let x = self.value();
        if let Some(gpu) = x.gpu() {
            let sum = branch.factors(x)?.times(gpu, branch.value.value(), Some(x))?;
            return branch.recorded(self, sum);
        }
        let scaled = branch.gains.as_ref().map(|gains| branch.value.scale_channels(gains)).transpose()?;
        let scaled = scaled.unwrap_or_else(|| branch.value.clone());
        match &branch.drop {
            Some((u, p)) => self.add(&scaled.drop_path(u, *p)?),
            None => self.add(&scaled),
        }
    }
}

impl Branch {
    /// What kernels need to know of it, once it fits x.
    pub(super) fn factors(&self, x: &Tensor) -> Result<Factors> {
        let value = self.value.value();
        ensure!(value.shape() == x.shape() && value.dtype() == x.dtype(), "add_branch: the branch is {value:?} but x is {x:?}");
        let gains = self.gains.as_ref().map(|gains| gains.value().clone());
        if let Some(gains) = &gains {
            check_gains("add_branch", gains, x)?;
        }
        let drop = self.drop.as_ref().map(|(u, p)| (u, *p));
        if let Some((u, p)) = drop {
            check_drop("add_branch", u, p, x)?;
        }
        Factors::new(x, gains, drop)
    }

    /// Records x + branch, whose value a kernel has computed.
    pub(super) fn recorded(&self, x: &Var, sum: Tensor) -> Result<Var> {
        let factors = self.factors(x.value())?;
        let value = self.gains.as_ref().map(|_| self.value.value().clone());
        let none = Var::constant(sum.clone());
        Var::record("add_branch", [x, &self.value, self.gains.as_ref().unwrap_or(&none)], sum, move |dy, need| {
            if factors.are_one() {
                return Ok([Some(dy.clone()), Some(dy), None]);
            }
            let gpu = dy.gpu().cloned().expect("this is recorded on a GPU only");
            let mut dbranch = if need.wants(1) { Some(dy.alike(dy.shape(), dy.dtype())?) } else { None };
            let mut dg = if need.wants(2) { Some(need.out(2)?) } else { None };
            factors.gradients(&gpu, &dy, value.as_ref(), dbranch.as_mut(), dg.as_mut())?;
            Ok([Some(dy), dbranch, dg])
        })
    }
}

fn check_gains(op: &str, gains: &Tensor, x: &Tensor) -> Result<()> {
    ensure!(gains.shape() == [x.last()] && gains.dtype() == beside(x.dtype()), "{op}: the gains are {gains:?} but x is {x:?}");
    Ok(())
}

fn check_drop(op: &str, u: &Tensor, p: f64, x: &Tensor) -> Result<()> {
    let batch = x.shape().first().copied().unwrap_or(0);
    ensure!(u.shape() == [batch] && u.dtype() == Dtype::F32, "{op}: the numbers are {u:?} but f32 [{batch}] are needed, one an image");
    ensure!((0.0..1.0).contains(&p), "{op}: a rate of {p} is not in [0, 1)");
    Ok(())
}

/// What kernels multiply rows by.
pub(super) struct Factors {
    gains: Option<Tensor>,
    u: Option<Tensor>,
    rows: usize,
    columns: usize,
    /// Rows of an image.
    tokens: usize,
    keep: f64,
    grow: f64,
}

impl Factors {
    fn new(x: &Tensor, gains: Option<Tensor>, drop: Option<(&Tensor, f64)>) -> Result<Self> {
        let rank = x.shape().len();
        ensure!(rank > 1 || gains.is_none() || drop.is_none(), "add_branch: x is {x:?} but channels of images need two axes");
        // Where the images are single numbers, each is a row.
        let columns = if rank < 2 && drop.is_some() { 1 } else { x.last() };
        let (rows, images) = (x.numel() / columns.max(1), x.shape().first().map_or(1, |&images| images.max(1)));
        let u = drop.map(|(u, _)| u.on(&x.device())).transpose()?;
        let keep = drop.map_or(1.0, |(_, p)| 1.0 - p);
        Ok(Self { gains, u, rows, columns, tokens: (rows / images).max(1), keep, grow: 1.0 / keep })
    }

    fn are_one(&self) -> bool {
        self.gains.is_none() && self.u.is_none()
    }

    /// Their arguments, those before the sizes and those after them, as every kernel takes them.
    pub(super) fn pointers(&self, args: Args) -> Args {
        args.maybe(self.gains.as_ref()).maybe(self.u.as_ref())
    }

    pub(super) fn sizes(&self, args: Args) -> Args {
        args.int(self.rows).int(self.columns).int(self.tokens).float(self.keep).float(self.grow)
    }

    /// A block has 256 columns where they are taken eight at a time, else 32.
    fn launch(&self) -> Launch {
        let columns = if self.columns.is_multiple_of(8) { 256 } else { 32 };
        Launch::new(0, 256).grid(self.columns.div_ceil(columns), self.rows.div_ceil(8).clamp(1, SHARES), 1)
    }

    /// base + x times the factors.
    fn times(&self, gpu: &Gpu, x: &Tensor, base: Option<&Tensor>) -> Result<Tensor> {
        let mut y = x.alike(x.shape(), x.dtype())?;
        let args = self.sizes(self.pointers(Args::new().out(&mut y).input(x).maybe(base)));
        gpu.launch(&typed("scale_channels_fwd", x.dtype()), self.launch(), args)?;
        Ok(y)
    }

    /// The gradient of what was multiplied, and that of the gains, which needs x, into dg.
    fn gradients(&self, gpu: &Gpu, dy: &Tensor, x: Option<&Tensor>, dx: Option<&mut Tensor>, dg: Option<&mut Tensor>) -> Result<()> {
        let launch = self.launch();
        let mut partial = if dg.is_some() { Some(dy.alike(&[launch.grid[1], self.columns], Dtype::F32)?) } else { None };
        let args = Args::new().maybe_out(dx).maybe_out(partial.as_mut()).input(dy).maybe(x);
        gpu.launch(&typed("scale_channels_bwd", dy.dtype()), launch, self.sizes(self.pointers(args)))?;
        if let (Some(partial), Some(dg)) = (partial, dg) {
            sum_of_parts(gpu, &partial, dg)?;
        }
        Ok(())
    }
}

/// How many groups of rows the blocks of a grid share.
const SHARES: usize = 256;

fn times_number_on(gpu: &Gpu, x: &Tensor, factor: f64) -> Result<Tensor> {
    let (mut y, n) = (x.alike(x.shape(), x.dtype())?, x.numel());
    gpu.launch(&typed("scale", x.dtype()), Launch::elements(n, 8), Args::new().out(&mut y).input(x).long(n).float(factor))?;
    Ok(y)
}

vectorised! {
    fn multiply<T: Real>(x: &mut [T], factor: T) {
        x.iter_mut().for_each(|x| *x *= factor);
    }
    fn multiply_rows<T: Real>(x: &[T], gains: &[T], y: &mut [T]) {
        for (x, y) in x.chunks_exact(gains.len()).zip(y.chunks_exact_mut(gains.len())) {
            y.iter_mut().zip(x).zip(gains).for_each(|((y, &x), &g)| *y = x * g);
        }
    }
    fn multiply_to<T: Real>(a: &[T], b: &[T], y: &mut [T]) {
        y.iter_mut().zip(a).zip(b).for_each(|((y, &a), &b)| *y = a * b);
    }
}

fn times_number<T: Real + Element>(x: Tensor, factor: f64) -> Result<Tensor> {
    let mut y = x.into_unique()?;
    parallel::rows(y.data_mut::<T>(), 1, |_, y| multiply(y, T::of(factor)));
    Ok(y)
}

fn times_images<T: Real + Element>(x: Tensor, factors: &[f64]) -> Result<Tensor> {
    let mut y = x.into_unique()?;
    let image = y.numel() / factors.len().max(1);
    parallel::rows(y.data_mut::<T>(), image, |first, y| {
        let images = y.chunks_exact_mut(image.max(1)).enumerate();
        images.for_each(|(i, y)| multiply(y, T::of(factors[first + i])));
    });
    Ok(y)
}

fn times_channels<T: Real + Element>(x: &Tensor, gains: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::empty(x.shape(), x.dtype())?;
    let (c, x, gains) = (x.last(), x.data::<T>(), gains.data::<T>());
    parallel::rows(y.data_mut::<T>(), c, |first, y| multiply_rows(&x[first * c..first * c + y.len()], gains, y));
    Ok(y)
}

fn gain_gradient<T: Real + Element>(dy: &Tensor, x: &Tensor, dg: &mut Tensor) -> Result<()> {
    let mut products = Tensor::empty(x.shape(), x.dtype())?;
    let (dy, c, x) = (dy.data::<T>(), x.last(), x.data::<T>());
    parallel::rows(products.data_mut::<T>(), 1, |first, y| {
        multiply_to(&dy[first..first + y.len()], &x[first..first + y.len()], y);
    });
    column_sums(products.data::<T>(), c, dg.data_mut());
    Ok(())
}

pub fn cases() -> Vec<Case> {
    let numbers = |u: &[f32]| Tensor::from_slice(&[u.len()], u).expect("one axis");
    let u = numbers(&[0.1, 0.9, 0.2, 0.3]);
    let channels = |name: &str, shape: &[usize]| {
        let gains = [shape[shape.len() - 1]];
        Case::new(&format!("scale_channels: {name}"), &[shape, &gains], |x| x[0].scale_channels(&x[1])).vectors(&[1])
    };
    let drop = |name: &str, shape: &[usize]| {
        let u = u.clone();
        Case::new(&format!("drop_path: {name}"), &[shape], move |x| x[0].drop_path(&u, 0.25))
    };
    let branch = |name: &str, shape: &[usize], gains: bool, drop: bool| {
        let (c, u) = ([shape[shape.len() - 1]], u.clone());
        let shapes = [shape, shape, &c];
        let case = Case::new(&format!("add_branch: {name}"), &shapes[..2 + gains as usize], move |x| {
            x[0].add_branch(&Branch { value: x[1].clone(), gains: x.get(2).cloned(), drop: drop.then(|| (u.clone(), 0.25)) })
        });
        if gains { case.vectors(&[2]) } else { case }
    };
    vec![
        Case::new("scale: 3 x 5", &[&[3, 5]], |x| x[0].scale(-0.3)),
        Case::new("scale: twice, eight at a time and a rest", &[&[3, 700]], |x| x[0].scale(0.7)?.scale(3.0))
            .rounded(|x| rounded(&x[0].scale(0.7)?)?.scale(3.0)),
        channels("2 x 3 rows, C = 37", &[2, 3, 37]),
        channels("one row", &[1, 4]),
        channels("rows of vectors, several shares", &[3, 9, 264]),
        drop("two of four images", &[4, 3, 5]),
        drop("rows of vectors", &[4, 5, 16]),
        drop("images of one number", &[4]),
        branch("a plain sum", &[2, 3, 8], false, false),
        branch("gains, C = 37", &[4, 3, 37], true, false),
        branch("two of four images, rows of vectors", &[4, 5, 16], false, true),
        branch("gains and two of four images", &[4, 5, 264], true, true),
    ]
}
