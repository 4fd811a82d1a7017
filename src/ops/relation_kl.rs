//! Divergence of a student's token relations from a teacher's.
//!
//!   S = softmax(scale_s x y^T),   T = softmax(scale_t x' y'^T)                      x, y two of q, k, v;  scale = D^-1/2, each its own
//!   loss = sum over relations of  mean_{b, head, i} sum_j T_ij (ln T_ij - ln S_ij)
//!   G = scale_s (S - T) / (B H N),   dx += G y,   dy += G^T x                       both onto the same part where x = y
//!
//! Student qkv [B, N, 3 C_s], teacher qkv [B, N, 3 C_t], packed as in attention: [q | k | v], each head-major, H heads in both. Each (image, head)
//! is worked on alone; its two N x N matrices live in scratch memory and are recomputed in the backward. Saved: both qkv.
//!
//! With a = scaled scores minus their row's maximum, a row's divergence is sum_j e^a_t (a_t - a_s) / sum e^a_t - ln sum e^a_t + ln sum e^a_s, the
//! sums in f64: on nearly one-hot rows nothing large cancels.

use super::case::{Case, numbers};
use crate::device::gemm::{self, Finish, Product, View};
use crate::device::parallel::Panel;
use crate::device::simd::{lane_sum, largest, sum_of};
use crate::error::Result;
use crate::tape::Var;
use crate::tensor::{Element, Tensor};
use crate::{by_real, ensure, vectorised};
use rayon::prelude::*;

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
    /// The sum over the relations, and each relation's own divergence.
    pub fn relation_kl(&self, teacher: &Tensor, heads: usize, relations: &[Relation]) -> Result<(Var, Vec<f64>)> {
        let student = self.value().clone();
        let (s, t) = (Side::of("student", &student, heads)?, Side::of("teacher", teacher, heads)?);
        ensure!(
            student.shape()[..2] == teacher.shape()[..2],
            "relation_kl: the student's qkv is {student:?} but the teacher's is {teacher:?}; both need the same images and tokens"
        );
        ensure!(!relations.is_empty(), "relation_kl: no relation is chosen");
        let (teacher, relations) = (teacher.cast(student.dtype())?, relations.to_vec());
        let parts = by_real!("relation_kl", student.dtype(), divergences(&student, &teacher, s, t, &relations))?;
        let loss = Tensor::scalar(parts.iter().sum(), student.dtype())?;
        let var = Var::record("relation_kl", [self], loss, move |dy, need| {
            let mut dqkv = need.out(0)?;
            by_real!("relation_kl", student.dtype(), gradient(&student, &teacher, s, t, &relations, dy.item(), &mut dqkv))?;
            Ok([Some(dqkv)])
        })?;
        Ok((var, parts))
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

pub fn cases() -> Vec<Case> {
    use Relation::*;
    let case = |name: &str, [b, n, heads, ds, dt]: [usize; 5], spread: f64, relations: &'static [Relation]| {
        let shape = [b, n, 3 * heads * dt];
        let teacher: Vec<f64> = numbers("teacher", 0, &shape).into_iter().map(|x| spread * x).collect();
        let teacher = Tensor::from_slice(&shape, &teacher).expect("as many numbers");
        let name = format!("relation_kl: {name}");
        Case::new(&name, &[&[b, n, 3 * heads * ds]], move |x| Ok(x[0].relation_kl(&teacher, heads, relations)?.0))
    };
    vec![
        case("q-k and v-v, 7 tokens, heads of 4 and 6", [2, 7, 3, 4, 6], 1.0, &[Qk, Vv]),
        case("q-q, k-k and v-v", [1, 5, 2, 8, 3], 1.0, &[Qq, Kk, Vv]),
        case("one token", [2, 1, 2, 4, 4], 1.0, &[Qk, Vv]),
        case("one image, one head, 37 tokens", [1, 37, 1, 5, 16], 1.0, &[Qk]),
        case("197 tokens, heads of 16 and 64", [1, 197, 1, 16, 64], 1.0, &[Qk, Vv]),
        case("one-hot teacher", [1, 6, 2, 4, 4], 5.0, &[Qk, Vv]),
    ]
}
