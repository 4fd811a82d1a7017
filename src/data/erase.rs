//! Random erasing (Zhong et al. 2020) as timm defines it: boxes of a normalised image are filled with noise or zero.
//!
//! With the probability, 1 to `count` boxes (uniform), each with up to ten tries until it is smaller than the image both ways:
//!
//!   area = H W U(0.02, 1/3) / boxes,  aspect = exp(U(ln 0.3, ln 1/0.3)),  h = round(sqrt(area aspect)),  w = round(sqrt(area / aspect))
//!
//! then the corner is uniform. A box that fits in none of its tries is left out.

use crate::error::{Error, Result};
use crate::rng::Stream;
use std::fmt;
use std::str::FromStr;

/// What stands in an erased box.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filling {
    /// A number of N(0, 1) for each pixel and channel.
    Pixel,
    /// A number of N(0, 1) for each box and channel.
    Rand,
    /// Zero, the mean colour.
    Const,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Erasing {
    pub probability: f64,
    pub mode: Filling,
    /// The most boxes an image.
    pub count: usize,
}

impl Erasing {
    /// The most boxes an image may be given.
    pub const MOST: usize = 16;

    /// Refuses what cannot be meant, naming the flags `--reprob` and `--recount`.
    pub fn new(probability: f64, mode: Filling, count: usize) -> Result<Self> {
        if !(0.0..=1.0).contains(&probability) {
            return Err(Error::usage(format!("--reprob is {probability}; it is a probability from 0 to 1")));
        }
        if !(1..=Self::MOST).contains(&count) {
            return Err(Error::usage(format!("--recount is {count}; it is a number of boxes from 1 to {}", Self::MOST)));
        }
        Ok(Self { probability, mode, count })
    }

    /// Boxes (top, left, height, width) of a square image of this side.
    pub fn draw(&self, side: usize, draws: &mut Stream) -> Vec<[u32; 4]> {
        if !draws.chance(self.probability) {
            return Vec::new();
        }
        let count = 1 + draws.below(self.count);
        (0..count).filter_map(|_| a_box(side, count, draws)).collect()
    }
}

fn a_box(side: usize, count: usize, draws: &mut Stream) -> Option<[u32; 4]> {
    let tries = std::iter::repeat_with(|| {
        let area = (side * side) as f64 * draws.between(0.02, 1.0 / 3.0) / count as f64;
        let aspect = draws.between(0.3f64.ln(), (1.0 / 0.3f64).ln()).exp();
        [(area * aspect).sqrt(), (area / aspect).sqrt()].map(|len| len.round_ties_even() as usize)
    });
    let [height, width] = tries.take(10).find(|&[height, width]| height < side && width < side)?;
    let top = draws.below(side - height + 1);
    let left = draws.below(side - width + 1);
    Some([top, left, height, width].map(|len| len as u32))
}

impl FromStr for Filling {
    type Err = Error;

    fn from_str(mode: &str) -> Result<Self> {
        match mode {
            "pixel" => Ok(Filling::Pixel),
            "rand" => Ok(Filling::Rand),
            "const" => Ok(Filling::Const),
            other => Err(Error::usage(format!("--remode is {other:?}; it is pixel, rand or const"))),
        }
    }
}

impl fmt::Display for Filling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Filling::Pixel => "pixel",
            Filling::Rand => "rand",
            Filling::Const => "const",
        })
    }
}

impl fmt::Display for Erasing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "erasing with probability {} (up to {} boxes, {})", self.probability, self.count, self.mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn a_quarter_of_the_images_lose_a_box_of_the_asked_size() {
        let erasing = Erasing::new(0.25, Filling::Pixel, 1).unwrap();
        let boxes: Vec<_> = (0..20_000).flat_map(|number| erasing.draw(224, &mut Rng::new(0).stream("sample", number))).collect();
        let n = boxes.len() as f64;
        assert!((n / 20_000.0 - 0.25).abs() < 0.012, "{n}");
        let area = |b: &[u32; 4]| f64::from(b[2] * b[3]) / (224.0 * 224.0);
        assert!(boxes.iter().all(|b| b[0] + b[2] <= 224 && b[1] + b[3] <= 224 && (0.018..0.336).contains(&area(b))));
        let mean = boxes.iter().map(area).sum::<f64>() / n;
        assert!((mean - MEAN_AREA).abs() < 0.006, "{mean}");
        let skew = boxes.iter().map(|b| (f64::from(b[2]) / f64::from(b[3])).ln()).sum::<f64>() / n;
        assert!(skew.abs() < 0.05, "{skew}");
    }
    /// From a simulation of a million draws in Python.
    const MEAN_AREA: f64 = 0.1759;

    #[test]
    fn several_boxes_share_the_area() {
        let erasing = Erasing::new(1.0, Filling::Rand, 3).unwrap();
        let mut counts = [0usize; 3];
        for number in 0..3000 {
            let boxes = erasing.draw(100, &mut Rng::new(0).stream("sample", number));
            counts[boxes.len() - 1] += 1;
            let most = 10_000.0 / 3.0 / boxes.len() as f64;
            assert!(boxes.iter().all(|b| f64::from(b[2] * b[3]) < most * 1.1), "{boxes:?}");
        }
        assert!(counts.iter().all(|count| (880..1120).contains(count)), "{counts:?}");
    }

    #[test]
    fn impossible_images_and_settings_are_no_panic() {
        let always = Erasing::new(1.0, Filling::Const, 1).unwrap();
        assert!(always.draw(0, &mut Rng::new(0).stream("sample", 0)).is_empty());
        assert!((0..50).all(|n| always.draw(1, &mut Rng::new(0).stream("sample", n)).iter().all(|b| b[2] * b[3] == 0)));
        assert!(Erasing::new(0.0, Filling::Const, 1).unwrap().draw(64, &mut Rng::new(0).stream("sample", 0)).is_empty());
        assert_eq!(Erasing::new(f64::NAN, Filling::Const, 1).unwrap_err().exit_code(), 2);
        assert_eq!(Erasing::new(1.5, Filling::Const, 1).unwrap_err().exit_code(), 2);
        assert_eq!(Erasing::new(0.5, Filling::Const, 0).unwrap_err().exit_code(), 2);
        assert_eq!("noise".parse::<Filling>().unwrap_err().exit_code(), 2);
        assert!([Filling::Pixel, Filling::Rand, Filling::Const].iter().all(|mode| mode.to_string().parse::<Filling>().unwrap() == *mode));
    }
}
