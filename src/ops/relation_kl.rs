//! Divergence of a student's token relations from a teacher's.
//!
//!   S = softmax(scale_s x y^T),   T = softmax(scale_t x' y'^T)                      x, y two of q, k, v;  scale = D^-1/2, each its own
//!   loss = sum over relations of  mean_{b, head, i} sum_j T_ij (ln T_ij - ln S_ij)
//!   G = scale_s (S - T) / (B H N),   dx += G y,   dy += G^T x                       both onto the same part where x = y
//!
//! Student qkv [B, N, 3 C_s], teacher qkv [B, N, 3 C_t], packed as in attention: [q | k | v], each head-major, H heads in both. Each (image, head)
//! is worked on alone; its two N x N matrices live in scratch memory and are recomputed in the backward. Saved: both qkv.
//! On a GPU (kernels/relation_kl.cu) no N x N matrix is stored at all, and loss and gradient are made together: bf16 on tensor cores where a head fits into
//! shared memory, anything else in f32 arithmetic, both with G in registers. Saved is the gradient.
//!
//! With a = scaled scores minus their row's maximum, a row's divergence is sum_j e^a_t (a_t - a_s) / sum e^a_t - ln sum e^a_t + ln sum e^a_s, the
//! sums in f64: on nearly one-hot rows nothing large cancels.

use super::case::{Case, numbers, rounded_gradient, rounded_loss};
use super::distill_kl::Reduction;
use super::times_loss_gradient;
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::launch::Versions;
use crate::device::parallel::Panel;
use crate::device::simd::{lane_sum, largest, sum_of};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Device, Element, Tensor};
use crate::{by_real, ensure, vectorised};
use half::bf16;
use rayon::prelude::*;

pub const VERSIONS: Versions = Versions { op: "relation_kl", all: &["v1", "v2"], chosen: "v2" };

/// Which parts of qkv are compared with each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    Qk,
    Qq,
    Kk,
    Vv,
}

impl Relation {
    fn parts(self) -> [usize; 2] {
        match self {
            Relation::Qk => [0, 1],
            Relation::Qq => [0, 0],
            Relation::Kk => [1, 1],
            Relation::Vv => [2, 2],
        }
    }
}

impl Var {
    /// The sum over the relations, and each relation's own divergence, [relations]: f64 on the CPU, f32 on a GPU.
    pub fn relation_kl(&self, teacher: &Tensor, heads: usize, relations: &[Relation]) -> Result<(Var, Tensor)> {
        let student = self.value().clone();
        let (s, t) = (Side::of("student", &student, heads)?, Side::of("teacher", teacher, heads)?);
        ensure!(
            student.shape()[..2] == teacher.shape()[..2],
            "relation_kl: the student's qkv is {student:?} but the teacher's is {teacher:?}; both need the same images and tokens"
        );
        ensure!(!relations.is_empty(), "relation_kl: no relation is chosen");
        if let Some(gpu) = student.gpu() {
            let (loss, parts, gradient) = gpu::forward(gpu, self, teacher, s, t, relations)?;
            let gpu = gpu.clone();
            let var = Var::record("relation_kl", [self], loss, move |dy, _| {
                Ok([gradient.map(|gradient| times_loss_gradient(&gpu, gradient, &dy)).transpose()?])
            })?;
            return Ok((var, parts));
        }
        let (teacher, relations) = (teacher.on(&Device::Cpu)?.cast(student.dtype())?, relations.to_vec());
        let parts = by_real!("relation_kl", student.dtype(), divergences(&student, &teacher, s, t, &relations))?;
        let loss = Tensor::scalar(parts.iter().sum(), student.dtype())?;
        let var = Var::record("relation_kl", [self], loss, move |dy, need| {
            let mut dqkv = need.out(0)?;
            by_real!("relation_kl", student.dtype(), gradient(&student, &teacher, s, t, &relations, dy.item(), &mut dqkv))?;
            Ok([Some(dqkv)])
        })?;
        Ok((var, Tensor::from_slice(&[parts.len()], &parts)?))
    }
}

/// The sizes of one network's qkv.
#[derive(Clone, Copy)]
struct Side {
    batch: usize,
    n: usize,
    heads: usize,
    width: usize,
}

impl Side {
    fn of(who: &str, qkv: &Tensor, heads: usize) -> Result<Self> {
        let &[batch, n, triple] = qkv.shape() else { crate::bail!("relation_kl: the {who}'s qkv is {qkv:?} but [B, N, 3 C] is needed") };
        ensure!(
            batch > 0 && n > 0 && heads > 0 && triple > 0 && triple.is_multiple_of(3 * heads),
            "relation_kl: the {who}'s qkv is {qkv:?}, which does not split into q, k and v of {heads} heads"
        );
        Ok(Self { batch, n, heads, width: triple / 3 / heads })
    }

    /// One part of one head, as a view into one image's qkv.
    fn part<'a, T: Product>(&self, qkv: &'a [T], part: usize, head: usize) -> View<'a, T> {
        let c = self.heads * self.width;
        View::rows(&qkv[part * c + head * self.width..], 3 * c)
    }

    fn image<'a, T: Product>(&self, qkv: &'a [T], image: usize) -> &'a [T] {
        let length = self.n * 3 * self.heads * self.width;
        &qkv[image * length..][..length]
    }

    fn scale(&self) -> f64 {
        1.0 / (self.width as f64).sqrt()
    }

    /// The scaled scores of one head, each row relative to its maximum.
    fn scores<T: Product>(&self, qkv: &[T], [x, y]: [usize; 2], head: usize, out: &mut [T]) {
        let (x, y) = (self.part(qkv, x, head), self.part(qkv, y, head));
        gemm::serial(&mut Panel::of(out, self.n), self.width, x, y.transposed(), Finish::replace());
        centre(out, self.n, T::of(self.scale()));
    }
}

vectorised! {
    fn centre<T: Product>(scores: &mut [T], n: usize, scale: T) {
        for row in scores.chunks_exact_mut(n) {
            let most = largest(&row[..n]);
            row.iter_mut().for_each(|a| *a = (*a - most) * scale);
        }
    }
    /// The sum of the rows' divergences; `e` is room for one row.
    fn row_divergences<T: Product>(s: &[T], t: &[T], e: &mut [T]) -> f64 {
        let n = e.len();
        let mut total = 0.0;
        for (s, t) in s.chunks_exact(n).zip(t.chunks_exact(n)) {
            e.iter_mut().zip(s).for_each(|(e, &s)| *e = s.exp());
            let student = sum_of(&e[..n], |x| x.f64());
            e.iter_mut().zip(t).for_each(|(e, &t)| *e = t.exp());
            let teacher = sum_of(&e[..n], |x| x.f64());
            // Where e^t is 0 the term is 0, also where s is minus infinity.
            let weighted = lane_sum(n, |j| if e[j] == T::ZERO { 0.0 } else { (e[j] * (t[j] - s[j])).f64() });
            total += weighted / teacher - teacher.ln() + student.ln();
        }
        total
    }
    /// s becomes factor (S - T).
    fn score_gradients<T: Product>(s: &mut [T], t: &mut [T], n: usize, factor: T) {
        for (s, t) in s.chunks_exact_mut(n).zip(t.chunks_exact_mut(n)) {
            s.iter_mut().for_each(|s| *s = s.exp());
            t.iter_mut().for_each(|t| *t = t.exp());
            let student = T::ONE / sum_of(&s[..n], |x| x);
            let teacher = T::ONE / sum_of(&t[..n], |x| x);
            s.iter_mut().zip(t).for_each(|(s, t)| *s = factor * (*s * student - *t * teacher));
        }
    }
}

fn divergences<T: Product + Element>(student: &Tensor, teacher: &Tensor, s: Side, t: Side, relations: &[Relation]) -> Result<Vec<f64>> {
    let (student, teacher, n) = (student.data::<T>(), teacher.data::<T>(), s.n);
    let one = |i: usize| {
        let (relation, image, head) = (relations[i / (s.batch * s.heads)], i / s.heads % s.batch, i % s.heads);
        let mut scratch = Tensor::empty(&[(2 * n + 1) * n], T::DTYPE)?;
        let (a, rest) = scratch.data_mut::<T>().split_at_mut(n * n);
        let (b, row) = rest.split_at_mut(n * n);
        s.scores(s.image(student, image), relation.parts(), head, a);
        t.scores(t.image(teacher, image), relation.parts(), head, b);
        Ok(row_divergences(a, b, row))
    };
    let all: Vec<f64> = (0..relations.len() * s.batch * s.heads).into_par_iter().map(one).collect::<Result<_>>()?;
    let rows = (s.batch * s.heads * n) as f64;
    Ok(all.chunks_exact(s.batch * s.heads).map(|relation| relation.iter().sum::<f64>() / rows).collect())
}

fn gradient<T: Product + Element>(
    student: &Tensor,
    teacher: &Tensor,
    s: Side,
    t: Side,
    relations: &[Relation],
    dy: f64,
    dqkv: &mut Tensor,
) -> Result<()> {
    let (student, teacher, n) = (student.data::<T>(), teacher.data::<T>(), s.n);
    let factor = T::of(dy * s.scale() / (s.batch * s.heads * n) as f64);
    let dqkv = dqkv.data_mut::<T>();
    dqkv.fill(T::ZERO);
    // Panels come image by image, in each the q parts of all heads, then the k parts, then the v parts.
    let mut panels: Vec<Option<Panel<T>>> = Panel::split(dqkv, n, 3 * s.heads * s.width, s.width).into_iter().map(Some).collect();
    let mut take =
        |i: usize, part: usize| panels[(i / s.heads * 3 + part) * s.heads + i % s.heads].take().expect("each panel is taken once");
    let heads: Vec<[Panel<T>; 3]> = (0..s.batch * s.heads).map(|i| [take(i, 0), take(i, 1), take(i, 2)]).collect();
    heads.into_par_iter().enumerate().try_for_each(|(i, mut parts)| {
        let (image, head) = (i / s.heads, i % s.heads);
        let (student, teacher) = (s.image(student, image), t.image(teacher, image));
        let mut scratch = Tensor::empty(&[2, n, n], T::DTYPE)?;
        let (g, b) = scratch.data_mut::<T>().split_at_mut(n * n);
        for relation in relations {
            let [x, y] = relation.parts();
            s.scores(student, [x, y], head, g);
            t.scores(teacher, [x, y], head, b);
            score_gradients(g, b, n, factor);
            let g = View::rows(&*g, n);
            gemm::serial(&mut parts[x], n, g, s.part(student, y, head), Finish::add());
            gemm::serial(&mut parts[y], n, g.transposed(), s.part(student, x, head), Finish::add());
        }
        Ok(())
    })
}

mod gpu {
    use super::{Relation, Side, VERSIONS};
    use crate::device::gpu::Gpu;
    use crate::device::launch::{Args, Launch, typed};
    use crate::error::Result;
    use crate::ops::{loss_of, sum_of_parts};
    use crate::tape::Var;
    use crate::tensor::{Dtype, Tensor};

    /// Pairs of widths (student, teacher) that v2 is compiled for, cheapest first, and the most warps of a block.
    const PAIRS: [([usize; 2], usize); 6] = [([16, 32], 7), ([16, 64], 7), ([32, 48], 7), ([32, 64], 7), ([48, 64], 7), ([64, 64], 6)];

    /// How v2 is launched for one head.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(super) struct Resident {
        pub widths: [usize; 2],
        pub warps: usize,
        pub shared: usize,
    }

    /// None where no pair is wide enough or a head does not fit into `most` bytes of shared memory.
    pub(super) fn resident(n: usize, [ds, dt]: [usize; 2], twice: bool, most: usize) -> Option<Resident> {
        let (widths, warps) = PAIRS.into_iter().find(|([s, t], _)| ds <= *s && dt <= *t)?;
        let rows = n.div_ceil(16) * 16;
        let warps = warps.min(rows / 16);
        let sides = if twice { 1 } else { 2 };
        let shared = sides * rows * (widths[0] + widths[1]) * 2 + 12 * rows + warps * 8 * widths[0] * 2;
        (shared <= most).then_some(Resident { widths, warps, shared })
    }

    struct Launcher<'a> {
        gpu: &'a Gpu,
        student: &'a Tensor,
        teacher: Tensor,
        s: Side,
        t: Side,
        relations: usize,
        /// 1 / (B H N).
        share: f64,
        /// Which parts of the gradient an earlier relation has written.
        touched: [bool; 3],
        gradient: Option<Tensor>,
    }

    /// Loss, each relation's divergence, and the gradient of the loss if the student's is wanted.
    pub(super) fn forward(
        gpu: &Gpu,
        x: &Var,
        teacher: &Tensor,
        s: Side,
        t: Side,
        relations: &[Relation],
    ) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let student = x.value();
        let teacher = teacher.cast(student.dtype())?.on(&student.device())?;
        let mut gradient = if x.tracked() { Some(student.alike(student.shape(), student.dtype())?) } else { None };
        let all = (0..3).all(|part| relations.iter().any(|relation| relation.parts().contains(&part)));
        if let (Some(gradient), false) = (&mut gradient, all) {
            gradient.clear()?;
        }
        let share = 1.0 / (s.batch * s.heads * s.n) as f64;
        let mut launcher = Launcher { gpu, student, teacher, s, t, relations: relations.len(), share, touched: [false; 3], gradient };
        let most = gpu.most_shared();
        let plan = |relation: &Relation| {
            let [x, y] = relation.parts();
            if gpu.version(&VERSIONS) == "v2" && student.dtype() == Dtype::Bf16 {
                return resident(s.n, [s.width, t.width], x == y, most);
            }
            None
        };
        // One form for all relations, so that their shares lie in one tensor.
        let plans: Option<Vec<Resident>> = relations.iter().map(plan).collect();
        let heads = s.batch * s.heads;
        let blocks = if plans.is_some() { heads } else { heads * s.n.div_ceil(32) };
        let mut partial = student.alike(&[blocks, relations.len()], Dtype::F32)?;
        match plans {
            Some(plans) => {
                for (i, (relation, plan)) in relations.iter().zip(plans).enumerate() {
                    launcher.resident(i, *relation, plan, &mut partial)?;
                }
            }
            None => {
                let mut stats = student.alike(&[heads, s.n, 4], Dtype::F32)?;
                for (i, relation) in relations.iter().enumerate() {
                    launcher.plain(i, *relation, &mut stats, &mut partial)?;
                }
            }
        }
        let mut parts = student.alike(&[relations.len()], Dtype::F32)?;
        sum_of_parts(gpu, &partial, &mut parts)?;
        Ok((loss_of(gpu, &parts, 1.0)?, parts, launcher.gradient))
    }

    impl Launcher<'_> {
        /// Whether part x is to be added to; it is touched from now on.
        fn touch(&mut self, x: usize) -> bool {
            std::mem::replace(&mut self.touched[x], true)
        }

        fn sizes(&self, args: Args) -> Args {
            args.int(self.s.n).int(self.s.heads).int(self.s.width).int(self.t.width)
        }

        /// v2: everything in one launch.
        fn resident(&mut self, i: usize, relation: Relation, plan: Resident, partial: &mut Tensor) -> Result<()> {
            let [x, y] = relation.parts();
            let add = [self.touch(x), if x == y { false } else { self.touch(y) }];
            let args = Args::new().maybe_out(self.gradient.as_mut()).out(partial).input(self.student).input(&self.teacher);
            let args = self.sizes(args).int(x).int(i).int(self.relations).flag(add[0]).flag(add[1]);
            let args = args.float(self.s.scale()).float(self.t.scale()).float(self.share);
            let ([s, t], kind) = (plan.widths, if x == y { "self" } else { "cross" });
            let launch = Launch::new(0, 32 * plan.warps).grid(self.s.heads, self.s.batch, 1).shared(plan.shared);
            self.gpu.launch(&format!("relation_kl_{kind}_v2_s{s}_t{t}_bf16"), launch, args)
        }

        /// v1: statistics and divergence, then the gradient of each of the parts.
        fn plain(&mut self, i: usize, relation: Relation, stats: &mut Tensor, partial: &mut Tensor) -> Result<()> {
            let ([x, y], dtype) = (relation.parts(), self.student.dtype());
            let launch = Launch::new(self.s.batch * self.s.heads * self.s.n.div_ceil(32), 256);
            let args = self.sizes(Args::new().out(stats).out(partial).input(self.student).input(&self.teacher));
            let args = args.int(x).int(y).int(i).int(self.relations).float(self.s.scale()).float(self.t.scale()).float(self.share);
            self.gpu.launch(&typed("relation_kl_stats_v1", dtype), launch, args)?;
            if self.gradient.is_none() {
                return Ok(());
            }
            let groups = self.s.width.div_ceil(128);
            let roles = if x == y { &[(x, x, true, true)][..] } else { &[(x, y, true, false), (y, x, false, true)] };
            for &(own, other, by_rows, by_columns) in roles {
                let add = self.touch(own);
                let args = Args::new().maybe_out(self.gradient.as_mut()).input(self.student).input(&self.teacher).input(stats);
                let args = self.sizes(args).int(own).int(other).flag(by_rows).flag(by_columns).flag(add);
                let args = args.float(self.s.scale()).float(self.t.scale()).float(self.s.scale() * self.share);
                self.gpu.launch(&typed("relation_kl_bwd_v1", dtype), launch.grid(launch.grid[0], groups, 1), args)?;
            }
            Ok(())
        }
    }
}

/// The op of its pieces, with the gradient of the scores rounded to bf16 as a factor of a tensor-core product.
fn pieces(student: &Var, teacher: &Tensor, heads: usize, relations: &[Relation]) -> Result<Var> {
    let scores = |qkv: &Var, relation: &Relation| {
        let (parts, [x, y]) = (qkv.split_heads(3, heads)?, relation.parts());
        let width = parts[0].shape()[3];
        let scores = parts[x].bmm_nt(&parts[y])?.scale(1.0 / (width as f64).sqrt())?;
        let n = scores.shape()[3];
        scores.reshape(&[scores.value().numel() / n, n])
    };
    let teacher = Var::constant(teacher.cast(student.dtype())?);
    let losses = relations.iter().map(|relation| {
        let student = rounded_gradient(&scores(student, relation)?)?;
        student.distill_kl(scores(&teacher, relation)?.value(), 1.0, Reduction::Batch)
    });
    let losses = losses.collect::<Result<Vec<Var>>>()?;
    Var::weighted_sum(&losses.iter().map(|loss| (1.0, loss)).collect::<Vec<_>>())
}

pub fn cases() -> Vec<Case> {
    use Relation::*;
    let case = |name: &str, [b, n, heads, ds, dt]: [usize; 5], spread: f64, relations: &'static [Relation]| {
        let shape = [b, n, 3 * heads * dt];
        // Numbers that bf16 holds, since a teacher's qkv is of the student's type.
        let teacher: Vec<f64> = numbers("teacher", 0, &shape).into_iter().map(|x| bf16::from_f64(spread * x).to_f64()).collect();
        let teacher = Tensor::from_slice(&shape, &teacher).expect("as many numbers");
        let name = format!("relation_kl: {name}");
        let same = teacher.clone();
        let case = Case::new(&name, &[&[b, n, 3 * heads * ds]], move |x| Ok(x[0].relation_kl(&teacher, heads, relations)?.0));
        case.rounded(move |x| rounded_loss(&x[0], |x| pieces(x, &same, heads, relations)))
    };
    vec![
        case("q-k and v-v, 7 tokens, heads of 4 and 6", [2, 7, 3, 4, 6], 1.0, &[Qk, Vv]),
        case("q-q, k-k and v-v", [1, 5, 2, 8, 3], 1.0, &[Qq, Kk, Vv]),
        case("one token", [2, 1, 2, 4, 4], 1.0, &[Qk, Vv]),
        case("one image, one head, 37 tokens", [1, 37, 1, 5, 16], 1.0, &[Qk]),
        case("197 tokens, heads of 16 and 64", [1, 197, 1, 16, 64], 1.0, &[Qk, Vv]),
        case("one-hot teacher", [1, 6, 2, 4, 4], 5.0, &[Qk, Vv]),
        case("50 tokens, heads of 20 and 32, parts in several relations", [1, 50, 2, 20, 32], 1.0, &[Qk, Qq, Kk, Vv]),
        case("65 tokens, heads of 16 and 32", [2, 65, 1, 16, 32], 1.0, &[Vv]),
        case("50 tokens, heads of 32 and 64", [1, 50, 1, 32, 64], 1.0, &[Qk]),
        case("65 tokens, heads of 48 and 64", [1, 65, 1, 48, 64], 1.0, &[Qk, Vv]),
        case("65 tokens, heads of 64, the same relation twice", [1, 65, 1, 64, 64], 1.0, &[Qk, Qk]),
        case("33 tokens, heads of 72 and 80", [1, 33, 1, 72, 80], 1.0, &[Qk, Vv]),
        case("34 tokens, heads of 132 and 36", [1, 34, 1, 132, 36], 1.0, &[Qk]),
    ]
}

#[cfg(test)]
mod tests {
    use super::gpu::{Resident, resident};

    #[test]
    fn a_head_that_does_not_fit_is_left_to_the_plain_kernel() {
        let most = 227 << 10;
        let shared = 2 * 208 * (32 + 64) * 2 + 12 * 208 + 7 * 8 * 32 * 2;
        assert_eq!(resident(197, [32, 64], false, most), Some(Resident { widths: [32, 64], warps: 7, shared }));
        assert_eq!(resident(50, [20, 33], true, most).map(|plan| (plan.widths, plan.warps)), Some(([32, 48], 4)));
        assert_eq!(resident(1000, [48, 64], false, most), None);
        assert!(resident(900, [48, 64], true, most).is_some());
        assert_eq!(resident(50, [72, 64], true, most), None);
        assert_eq!(resident(50, [64, 80], true, most), None);
    }
}
