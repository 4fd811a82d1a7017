//! What is drawn when a batch is mixed with its reverse; [`mixup`](super::mixup) has the arithmetic.
//!
//!   with `probability` a draw mixes, else its share is 1; CutMix with probability `switch` where both are asked for
//!   lam ~ Beta(alpha, alpha) of the one chosen;  X / (X + Y) with X, Y ~ Gamma(alpha) (Marsaglia and Tsang 2000)
//!   CutMix    a box of share 1 - lam, its centre uniform; lam is then what the clipped box leaves
//!   minmax    the box's sides are uniform between these parts of the image's instead, and the box lies inside
//!
//! One draw serves the batch (`batch`), the image and its partner (`pair`) or the image alone (`elem`). A batch that is mixed as one is mixed on
//! the device while it is normalised ([`Mix`]); `pair` and `elem` mix f32 images in the host's memory.

use super::augment::Mix;
use super::mixup::{self, CutBox};
use crate::ensure;
use crate::error::{Error, Result};
use crate::rng::Stream;
use crate::tensor::{Dtype, Tensor};
use std::fmt;
use std::str::FromStr;

/// How many draws a batch has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    #[default]
    Batch,
    Pair,
    Elem,
}

/// Settings of Mixup and CutMix; an alpha of 0 leaves that one out.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Mixing {
    pub mixup: f64,
    pub cutmix: f64,
    /// Least and greatest side of CutMix's box, as parts of the image's.
    pub minmax: Option<[f64; 2]>,
    pub probability: f64,
    pub switch: f64,
    pub mode: Mode,
    /// Label smoothing of the targets.
    pub smoothing: f64,
}

impl Default for Mixing {
    /// No mixing.
    fn default() -> Self {
        Self { mixup: 0.0, cutmix: 0.0, minmax: None, probability: 1.0, switch: 0.5, mode: Mode::Batch, smoothing: 0.1 }
    }
}

impl Mixing {
    /// Whether anything is mixed: then targets are soft.
    pub fn is_on(&self) -> bool {
        self.mixup > 0.0 || self.cutmix > 0.0 || self.minmax.is_some()
    }

    /// Refuses what cannot be meant, naming the flag.
    pub fn check(&self, batch: usize) -> Result<()> {
        let parts = [
            ("--mixup-prob", self.probability, "a probability"),
            ("--mixup-switch-prob", self.switch, "a probability"),
            ("--smoothing", self.smoothing, "a fraction"),
        ];
        for (flag, value, what) in parts {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::usage(format!("{flag} is {value}; it is {what} from 0 to 1")));
            }
        }
        for (flag, alpha) in [("--mixup", self.mixup), ("--cutmix", self.cutmix)] {
            if !(alpha >= 0.0 && alpha.is_finite()) {
                return Err(Error::usage(format!("{flag} is {alpha}; it is the alpha of a Beta distribution, or 0 for none")));
            }
        }
        if let Some([least, most]) = self.minmax
            && !(0.0 <= least && least <= most && most <= 1.0)
        {
            return Err(Error::usage(format!(
                "--cutmix-minmax is {least} {most}; it is two parts of a side, from 0 to 1, the lesser first"
            )));
        }
        if self.is_on() && !batch.is_multiple_of(2) {
            return Err(Error::usage(format!(
                "--batch-size is {batch} but mixup and cutmix pair the images of a batch; use an even number"
            )));
        }
        Ok(())
    }

    /// Draws for a batch of images of this height and width.
    pub fn draw(&self, batch: usize, size: [usize; 2], draws: &mut Stream) -> Result<Mixed> {
        self.check(batch)?;
        let ways = match self.mode {
            _ if !self.is_on() => vec![(Mix::None, 1.0)],
            Mode::Batch => vec![self.once(size, draws)?],
            Mode::Elem => (0..batch).map(|_| self.once(size, draws)).collect::<Result<_>>()?,
            Mode::Pair => {
                let half: Vec<_> = (0..batch / 2).map(|_| self.once(size, draws)).collect::<Result<_>>()?;
                half.iter().chain(half.iter().rev()).copied().collect()
            }
        };
        Ok(Mixed { batch, ways, smoothing: self.smoothing })
    }

    /// A way to mix, and the share of an image's own label.
    fn once(&self, size: [usize; 2], draws: &mut Stream) -> Result<(Mix, f64)> {
        let cutmix = if self.minmax.is_some() { 1.0 } else { self.cutmix };
        if !draws.chance(self.probability) {
            return Ok((Mix::None, 1.0));
        }
        let cut = cutmix > 0.0 && (self.mixup == 0.0 || draws.chance(self.switch));
        let lam = beta(if cut { cutmix } else { self.mixup }, draws);
        let [h, w] = size;
        if lam == 1.0 {
            Ok((Mix::None, 1.0))
        } else if !cut {
            Ok((Mix::Mixup(lam), lam))
        } else if let Some(parts) = self.minmax {
            let mut side = |len: usize| {
                let [least, most] = parts.map(|part| (len as f64 * part) as usize);
                let taken = least + draws.below((most - least).max(1));
                let first = draws.below((len - taken).max(1));
                (first, first + taken)
            };
            let ((y0, y1), (x0, x1)) = (side(h), side(w));
            let left = 1.0 - ((y1 - y0) * (x1 - x0)) as f64 / (h * w) as f64;
            Ok((Mix::Cutmix(CutBox { y0, y1, x0, x1 }), left))
        } else {
            let (cut, left) = mixup::cutmix_box(h, w, lam, draws.below(h), draws.below(w))?;
            Ok((Mix::Cutmix(cut), left))
        }
    }
}

/// What was drawn for a batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Mixed {
    batch: usize,
    /// One for the batch, or one an image.
    ways: Vec<(Mix, f64)>,
    smoothing: f64,
}

impl Mixed {
    /// How the whole batch is mixed while it is normalised, for [`Augment::mix`](super::augment::Augment::mix); none where each image has a way of its own.
    pub fn whole(&self) -> Mix {
        if let [(mix, _)] = self.ways[..] { mix } else { Mix::None }
    }

    /// Mixes normalised images [B, C, H, W] where each has a way of its own; [`whole`](Self::whole) has done the rest.
    pub fn finish(&self, images: &mut Tensor) -> Result<()> {
        if self.ways.len() == 1 {
            return Ok(());
        }
        ensure!(
            images.gpu().is_none() && images.dtype() == Dtype::F32,
            "images are {images:?} but --mixup-mode pair and elem mix f32 images on the CPU; use --mixup-mode batch"
        );
        let &[batch, channels, h, w] = images.shape() else { crate::bail!("images are {images:?} but [B, C, H, W] is mixed") };
        let mixes: Vec<Mix> = self.ways.iter().map(|(mix, _)| *mix).collect();
        mixup::mix_each(images.data_mut(), [batch, channels, h, w], &mixes)
    }

    /// The share of its own label that each image keeps, [B].
    pub fn shares(&self) -> Vec<f64> {
        if let [(_, share)] = self.ways[..] { vec![share; self.batch] } else { self.ways.iter().map(|(_, share)| *share).collect() }
    }

    /// Smoothed targets, f32 [B, classes].
    pub fn targets(&self, labels: &[u32], classes: usize) -> Result<Vec<f32>> {
        mixup::mix_each_target(labels, classes, &self.shares(), self.smoothing)
    }
}

/// ln of a number of Gamma(alpha, 1).
fn ln_gamma(alpha: f64, draws: &mut Stream) -> f64 {
    if alpha < 1.0 {
        // G(alpha) = G(alpha + 1) U^(1 / alpha)
        return ln_gamma(alpha + 1.0, draws) + (1.0 - draws.unit()).ln() / alpha;
    }
    let d = alpha - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = draws.normal();
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && (1.0 - draws.unit()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d.ln() + v.ln();
        }
    }
}

/// A number of Beta(alpha, alpha), alpha > 0.
pub fn beta(alpha: f64, draws: &mut Stream) -> f64 {
    let (x, y) = (ln_gamma(alpha, draws), ln_gamma(alpha, draws));
    // In logarithms, since for a small alpha both numbers may be too small for f64. Infinite ones meet only where either end is as likely.
    if x == y { 0.5 } else { 1.0 / (1.0 + (y - x).exp()) }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(mode: &str) -> Result<Self> {
        match mode {
            "batch" => Ok(Mode::Batch),
            "pair" => Ok(Mode::Pair),
            "elem" => Ok(Mode::Elem),
            other => Err(Error::usage(format!("--mixup-mode is {other:?}; it is batch, pair or elem"))),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Batch => "batch",
            Mode::Pair => "pair",
            Mode::Elem => "elem",
        })
    }
}

impl fmt::Display for Mixing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_on() {
            return f.write_str("no mixing");
        }
        let mut kinds = Vec::new();
        if self.mixup > 0.0 {
            kinds.push(format!("mixup {}", self.mixup));
        }
        if let Some([least, most]) = self.minmax {
            kinds.push(format!("cutmix with sides of {least} to {most}"));
        } else if self.cutmix > 0.0 {
            kinds.push(format!("cutmix {}", self.cutmix));
        }
        write!(f, "{}, one draw a {}, probability {}", kinds.join(" or "), self.mode, self.probability)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const BOTH: Mixing = Mixing { mixup: 0.8, cutmix: 1.0, minmax: None, probability: 1.0, switch: 0.5, mode: Mode::Batch, smoothing: 0.1 };

    fn stream(number: u64) -> Stream {
        Rng::new(5).stream("mixing", number)
    }

    #[test]
    fn beta_has_its_moments_for_every_alpha() {
        for alpha in [0.05, 0.2, 0.8, 1.0, 2.5, 40.0] {
            let (mut draws, n) = (stream(1), 60_000);
            let values: Vec<f64> = (0..n).map(|_| beta(alpha, &mut draws)).collect();
            assert!(values.iter().all(|x| (0.0..=1.0).contains(x)), "{alpha}");
            let mean = values.iter().sum::<f64>() / n as f64;
            let variance = values.iter().map(|x| (x - 0.5).powi(2)).sum::<f64>() / n as f64;
            let expected = 1.0 / (4.0 * (2.0 * alpha + 1.0));
            assert!((mean - 0.5).abs() < 0.008 && (variance / expected - 1.0).abs() < 0.03, "{alpha}: {mean} {variance} {expected}");
        }
        let mut draws = stream(2);
        assert!((0..1000).all(|_| (0.0..=1.0).contains(&beta(1e-6, &mut draws))));
    }

    #[test]
    fn beta_of_alpha_one_is_uniform_and_of_two_is_not() {
        let share = |alpha: f64| {
            let mut draws = stream(3);
            (0..40_000).filter(|_| beta(alpha, &mut draws) < 0.25).count() as f64 / 40_000.0
        };
        assert!((share(1.0) - 0.25).abs() < 0.008, "{}", share(1.0));
        // The integral of 6 x (1 - x) up to 1/4.
        assert!((share(2.0) - 0.15625).abs() < 0.008, "{}", share(2.0));
    }

    #[test]
    fn half_of_the_batches_are_cut_and_their_shares_fit_their_boxes() {
        let mut cut = 0;
        for number in 0..4000 {
            let mixed = BOTH.draw(8, [20, 30], &mut stream(number)).unwrap();
            let share = mixed.shares()[7];
            match mixed.whole() {
                Mix::Cutmix(CutBox { y0, y1, x0, x1 }) => {
                    cut += 1;
                    assert!((share - (1.0 - ((y1 - y0) * (x1 - x0)) as f64 / 600.0)).abs() < 1e-12);
                }
                Mix::Mixup(lam) => assert_eq!(share, lam),
                Mix::None => panic!("nothing was drawn"),
            }
        }
        assert!((1880..2120).contains(&cut), "{cut}");
        let rare = Mixing { probability: 0.25, ..BOTH };
        let mixed = (0..4000).filter(|&number| rare.draw(2, [9, 9], &mut stream(number)).unwrap().whole() != Mix::None).count();
        assert!((900..1100).contains(&mixed), "{mixed}");
    }

    #[test]
    fn one_alpha_of_zero_leaves_the_other() {
        for number in 0..200 {
            let mixup = Mixing { cutmix: 0.0, ..BOTH }.draw(2, [8, 8], &mut stream(number)).unwrap();
            let cutmix = Mixing { mixup: 0.0, ..BOTH }.draw(2, [8, 8], &mut stream(number)).unwrap();
            assert!(matches!((mixup.whole(), cutmix.whole()), (Mix::Mixup(_), Mix::Cutmix(_))));
        }
        let none = Mixing::default().draw(3, [8, 8], &mut stream(0)).unwrap();
        assert_eq!((none.whole(), none.shares()), (Mix::None, vec![1.0; 3]));
    }

    #[test]
    fn sides_of_a_box_lie_between_those_asked_for() {
        let mixing = Mixing { mixup: 0.0, minmax: Some([0.25, 0.75]), ..BOTH };
        let mut corners = [0, 0];
        for number in 0..2000 {
            let Mix::Cutmix(CutBox { y0, y1, x0, x1 }) = mixing.draw(2, [20, 40], &mut stream(number)).unwrap().whole() else { panic!() };
            assert!((5..15).contains(&(y1 - y0)) && (10..30).contains(&(x1 - x0)) && y1 <= 20 && x1 <= 40);
            corners = [corners[0] + usize::from(y0 == 0), corners[1] + usize::from(x0 == 0)];
        }
        assert!(corners.iter().all(|&count| count > 20), "{corners:?}");
        assert!(Mixing { minmax: Some([1.0, 1.0]), ..BOTH }.draw(2, [4, 4], &mut stream(0)).is_ok());
    }

    #[test]
    fn a_pair_shares_its_draw_and_an_element_does_not() {
        let pair = Mixing { mode: Mode::Pair, ..BOTH }.draw(6, [16, 16], &mut stream(4)).unwrap();
        let shares = pair.shares();
        assert!((0..3).all(|i| pair.ways[i] == pair.ways[5 - i]) && shares[0] != shares[1]);
        let elem = Mixing { mode: Mode::Elem, ..BOTH }.draw(6, [16, 16], &mut stream(4)).unwrap();
        assert!(elem.ways[0] != elem.ways[5] && elem.whole() == Mix::None);
        let original: Vec<f32> = (0..6 * 3 * 16 * 16).map(|i| (i % 101) as f32).collect();
        let mut images = Tensor::from_slice(&[6, 3, 16, 16], &original).unwrap();
        elem.finish(&mut images).unwrap();
        assert_ne!(images.data::<f32>(), original);
        let targets = elem.targets(&[0, 1, 2, 3, 4, 5], 6).unwrap();
        assert!(targets.chunks(6).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-6));
        let mut images = Tensor::zeros(&[6, 3, 16, 16], Dtype::Bf16).unwrap();
        let message = elem.finish(&mut images).unwrap_err().to_string();
        assert!(message.contains("--mixup-mode batch"), "{message}");
    }

    #[test]
    fn settings_that_cannot_be_meant_are_usage_errors() {
        let cases = [
            (Mixing { mixup: -1.0, ..BOTH }, 2, "--mixup "),
            (Mixing { cutmix: f64::INFINITY, ..BOTH }, 2, "--cutmix "),
            (Mixing { probability: 1.5, ..BOTH }, 2, "--mixup-prob "),
            (Mixing { switch: f64::NAN, ..BOTH }, 2, "--mixup-switch-prob"),
            (Mixing { smoothing: 2.0, ..BOTH }, 2, "--smoothing"),
            (Mixing { minmax: Some([0.5, 0.2]), ..BOTH }, 2, "--cutmix-minmax"),
            (BOTH, 7, "--batch-size"),
        ];
        for (mixing, batch, flag) in cases {
            let error = mixing.draw(batch, [8, 8], &mut stream(0)).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(flag), "{error}");
        }
        assert!(Mixing::default().check(7).is_ok());
        assert_eq!("image".parse::<Mode>().unwrap_err().exit_code(), 2);
        assert!([Mode::Batch, Mode::Pair, Mode::Elem].iter().all(|mode| mode.to_string().parse::<Mode>().unwrap() == *mode));
    }
}
