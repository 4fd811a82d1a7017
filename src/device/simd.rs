//! Vector instructions, chosen when the program runs, and the real numbers they work on.
//!
//! [`vectorised!`](crate::vectorised) compiles a loop three times (AVX-512, AVX2 with FMA, whatever the target has) and picks at the call. The loops are
//! plain Rust over slices; lanes are written out only where a sum would otherwise have to stay in order.

use bytemuck::Pod;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

/// Lanes of a reduction: one AVX-512 register of f32. Sums are over these lanes first on every machine, so they do not depend on it.
pub const LANES: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Plain,
    Avx2,
    Avx512,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Plain => "no vector instructions beyond the target's own",
            Level::Avx2 => "AVX2",
            Level::Avx512 => "AVX-512",
        }
    }
}

/// What this processor can do.
#[inline]
pub fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("fma") {
            return Level::Avx512;
        }
        if has!("avx2") && has!("fma") {
            return Level::Avx2;
        }
    }
    Level::Plain
}

/// Defines functions whose loops use the widest vectors of the machine that runs them.
#[macro_export]
macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($generic:ident : $bound:path),+>)? ($($arg:ident : $type:ty),* $(,)?) $(-> $out:ty)? $body:block)+) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn plain $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $out)? { plain($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($generic: $bound),+>)? ($($arg: $type),*) $(-> $out)? { plain($($arg),*) }
                match $crate::device::simd::level() {
                    // SAFETY: the processor has these instructions.
                    $crate::device::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the processor has these instructions.
                    $crate::device::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::device::simd::Level::Plain => {}
                }
            }
            plain($($arg),*)
        }
    )+};
}

/// f32, and f64 for checking: every CPU op is written once for both.
pub trait Real:
    Pod
    + Send
    + Sync
    + PartialOrd
    + Default
    + std::fmt::Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + 'static
{
    const ZERO: Self;
    const ONE: Self;
    const MIN: Self;
    fn of(value: f64) -> Self;
    fn f64(self) -> f64;
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    fn ln(self) -> Self;
    fn exp(self) -> Self;
    /// Standard normal distribution function and density, (Phi(x), phi(x)).
    fn normal(self) -> (Self, Self);
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        if self < other { self } else { other }
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const MIN: f32 = f32::MIN;
    #[inline(always)]
    fn of(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    /// e^x to a relative error below 1.5e-7: x = n ln 2 + r, a polynomial in r, n put into the exponent. NaN stays NaN.
    #[inline(always)]
    fn exp(self) -> f32 {
        // Below -87.3 the result would be denormal and is given as 0; above 88.7 it is infinite.
        let x = if self > 89.0 { 89.0 } else { self };
        let x = if x < -104.0 { -104.0 } else { x };
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
        const MAGIC: f32 = 12_582_912.0;
        let shifted = f32::mul_add(x, std::f32::consts::LOG2_E, MAGIC);
        let n = shifted - MAGIC;
        let r = f32::mul_add(n, -0.693_359_4, x);
        let r = f32::mul_add(n, 2.121_944_4e-4, r);
        let p = 1.987_569_1e-4;
        let p = f32::mul_add(p, r, 1.398_199_9e-3);
        let p = f32::mul_add(p, r, 8.333_452e-3);
        let p = f32::mul_add(p, r, 4.166_579_6e-2);
        let p = f32::mul_add(p, r, 1.666_666_5e-1);
        let p = f32::mul_add(p, r, 0.5);
        let p = f32::mul_add(p, r * r, r) + 1.0;
        // Two factors, so that neither exponent leaves the normal range: 2^n = 2^(n/2) * 2^(n - n/2).
        let n = shifted.to_bits() as i32 - MAGIC.to_bits() as i32;
        let half = n >> 1;
        let a = f32::from_bits(((half + 127) << 23) as u32);
        let b = f32::from_bits(((n - half + 127) << 23) as u32);
        let y = p * a * b;
        if self < -87.336_55 { 0.0 } else { y }
    }

    /// Phi(-a) = phi(a) M(a) with Mills' ratio M(a) = t polynomial(t), t = 1 / (1 + 0.35 a), fitted to a relative error of 2e-8: one exponential
    /// serves both results, and the tail keeps its relative accuracy.
    #[inline(always)]
    fn normal(self) -> (f32, f32) {
        const INV_SQRT_2PI: f32 = 0.398_942_3;
        let density = INV_SQRT_2PI * Real::exp(-0.5 * self * self);
        let t = 1.0 / f32::mul_add(0.35, f32::abs(self), 1.0);
        let p = 0.010_474_79;
        let p = f32::mul_add(p, t, -0.127_999_11);
        let p = f32::mul_add(p, t, 0.485_013_28);
        let p = f32::mul_add(p, t, -0.799_063_27);
        let p = f32::mul_add(p, t, 0.523_650_65);
        let p = f32::mul_add(p, t, -0.120_841_22);
        let p = f32::mul_add(p, t, 0.284_721_2);
        let p = f32::mul_add(p, t, 0.296_379_63);
        let p = f32::mul_add(p, t, 0.351_019_35);
        let p = f32::mul_add(p, t, 0.349_958_75);
        let tail = density * (p * t);
        (if self > 0.0 { 1.0 - tail } else { tail }, density)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const MIN: f64 = f64::MIN;
    #[inline(always)]
    fn of(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: f64, b: f64) -> f64 {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> f64 {
        f64::abs(self)
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }

    /// Series near zero, continued fraction in the tails: slow and exact to about 1e-15, for checks.
    fn normal(self) -> (f64, f64) {
        let x = self;
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x.is_nan() {
            return (x, x);
        }
        let a = x.abs();
        let beyond = if a < 4.0 {
            // Phi(a) - 1/2 = phi(a) (a + a^3/3 + a^5/15 + ...)
            let (mut term, mut sum, mut odd) = (a, a, 1.0);
            while term > sum * 1e-17 {
                odd += 2.0;
                term *= a * a / odd;
                sum += term;
            }
            0.5 - density * sum
        } else {
            let fraction = (1..=80).rev().fold(a, |below, i| a + i as f64 / below);
            density / fraction
        };
        (if x > 0.0 { 1.0 - beyond } else { beyond }, density)
    }
}

/// Sum of f(i) over 0..n in a fixed order: 16 lanes, then the lanes pairwise.
#[inline(always)]
pub fn lane_sum<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    fold(lanes, |a, b| a + b)
}

/// Sum of f over a slice: the same order as [`lane_sum`], without a bounds check an element.
#[inline(always)]
pub fn sum_of<T: Real, S: Real>(x: &[T], f: impl Fn(T) -> S) -> S {
    let mut lanes = [S::ZERO; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] += f(chunk[l]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    fold(lanes, |a, b| a + b)
}

/// Sum of f over two slices of one length.
#[inline(always)]
pub fn sum_of2<T: Real>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for l in 0..LANES {
            lanes[l] += f(x[l], y[l]);
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += f(x, y);
    }
    fold(lanes, |a, b| a + b)
}

/// Largest number of a slice; the smallest there is for an empty one.
#[inline(always)]
pub fn largest<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::MIN; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] = chunk[l].max(lanes[l]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = x.max(*lane);
    }
    fold(lanes, |a, b| a.max(b))
}

#[inline(always)]
pub fn fold<T: Real>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = join(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

crate::vectorised! {
    /// sum += x, element by element.
    pub fn add<T: Real>(sum: &mut [T], x: &[T]) {
        sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += x);
    }
    /// x *= factors, element by element.
    pub fn multiply<T: Real>(x: &mut [T], factors: &[T]) {
        x.iter_mut().zip(factors).for_each(|(x, &factor)| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = (x as f64).exp();
            worst = worst.max((Real::exp(x) as f64 - exact).abs() / exact);
        }
        assert!(worst < 1.5e-7, "{worst}");
        assert_eq!(Real::exp(-1e30f32), 0.0);
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(100.0f32), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!(Real::exp(0.0f32), 1.0);
    }

    #[test]
    fn normal_distribution_agrees_between_f32_and_f64() {
        let mut worst = 0.0f64;
        for i in -60_000..60_000 {
            let x = i as f32 * 1e-4;
            let (a, p) = x.normal();
            let (b, q) = (x as f64).normal();
            // The argument of the density's exponential is itself rounded, hence the factor of x.
            let scale = 4e-7 + 1.2e-7 * (x * x) as f64;
            assert!((a as f64 - b).abs() <= scale * b && (p as f64 - q).abs() <= scale * q, "{x}: {a} {b} {p} {q}");
            worst = worst.max((a as f64 - b).abs());
        }
        assert!(worst < 2e-7, "{worst}");
        // Known digits of Phi.
        for (x, phi) in [(0.0, 0.5), (1.0, 0.841_344_746_068_543), (-2.0, 0.022_750_131_948_179_2), (-5.0, 2.866_515_718_791_94e-7)] {
            let got = f64::normal(x).0;
            assert!((got - phi).abs() < 1e-14 * phi.max(1e-3), "{x} {got}");
        }
    }

    #[test]
    fn lane_reductions_take_every_element_once() {
        for n in [0, 1, 15, 16, 17, 100] {
            assert_eq!(lane_sum(n, |i| i as f64), (0..n).sum::<usize>() as f64);
            let numbers: Vec<f64> = (0..n).map(|i| i as f64).collect();
            assert_eq!(sum_of(&numbers, |x| x), lane_sum(n, |i| numbers[i]));
            assert_eq!(sum_of2(&numbers, &numbers, |x, y| x * y), lane_sum(n, |i| numbers[i] * numbers[i]));
            assert_eq!(largest(&numbers), if n == 0 { f64::MIN } else { n as f64 - 1.0 });
        }
    }
}
