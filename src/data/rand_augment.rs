//! RandAugment (Cubuk et al. 2020) as timm defines it: two of fifteen operations, drawn with replacement, each carried out with probability 1/2.
//!
//! The magnitude M of an operation is drawn from N(m, std^2) each time and clipped to 0 .. 10; a sign is drawn with it. With s = M / 10:
//!
//!   AutoContrast Equalize Invert                     -
//!   Rotate                                           +-30 s degrees
//!   Posterize       4 - int(4 s) bits                int(4 s) bits where severity does not increase
//!   Solarize        from 256 - int(256 s)            from int(256 s)
//!   SolarizeAdd     int(110 s)
//!   Color Contrast Brightness Sharpness              1 +- 0.9 s            1.8 s + 0.1
//!   ShearX ShearY                                    +-0.3 s
//!   TranslateXRel TranslateYRel                      +-0.45 s of the width or height
//!
//! A policy is written `rand-m9-mstd0.5-inc1`: m magnitude, n operations (2), mstd deviation (0), inc severity that increases with the magnitude (for any
//! number behind it, as in timm).

use super::{affine, colour, filter};
use crate::error::{Error, Result};
use crate::rng::Stream;
use std::fmt;
use std::str::FromStr;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateXRel,
    TranslateYRel,
}

impl Op {
    pub const ALL: [Op; 15] = [
        Op::AutoContrast,
        Op::Equalize,
        Op::Invert,
        Op::Rotate,
        Op::Posterize,
        Op::Solarize,
        Op::SolarizeAdd,
        Op::Color,
        Op::Contrast,
        Op::Brightness,
        Op::Sharpness,
        Op::ShearX,
        Op::ShearY,
        Op::TranslateXRel,
        Op::TranslateYRel,
    ];

    /// Carries the operation out on RGB bytes [H, W, 3] with a magnitude from 0 to 10 and a sign of 1 or -1.
    pub fn apply(self, pixels: &mut Vec<u8>, size: [usize; 2], magnitude: f64, sign: f64, increasing: bool) {
        let s = magnitude / 10.0;
        let part = |of: f64| (s * of) as u32;
        let factor = if increasing { 1.0 + sign * (s * 0.9) } else { s * 1.8 + 0.1 } as f32;
        let map = match self {
            Op::AutoContrast => return colour::autocontrast(pixels),
            Op::Equalize => return colour::equalise(pixels),
            Op::Invert => return colour::invert(pixels),
            Op::Posterize => return colour::posterise(pixels, if increasing { 4 - part(4.0) } else { part(4.0) }),
            Op::Solarize => return colour::solarise(pixels, if increasing { 256 - part(256.0) } else { part(256.0) }),
            Op::SolarizeAdd => return colour::solarise_add(pixels, part(110.0)),
            Op::Color => return colour::saturation(pixels, factor),
            Op::Contrast => return colour::contrast(pixels, factor),
            Op::Brightness => return colour::brightness(pixels, factor),
            Op::Sharpness => return filter::sharpness(pixels, size, factor),
            Op::Rotate => affine::rotate(size, sign * (s * 30.0)),
            Op::ShearX => affine::shear_x(sign * (s * 0.3)),
            Op::ShearY => affine::shear_y(sign * (s * 0.3)),
            Op::TranslateXRel => affine::translate_x(sign * (s * 0.45) * size[1] as f64),
            Op::TranslateYRel => affine::translate_y(sign * (s * 0.45) * size[0] as f64),
        };
        *pixels = affine::transform(pixels, size, &map, affine::FILL);
    }
}

/// A policy; [`FromStr`] reads it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RandAugment {
    /// Mean of the magnitude, from 0 to 10.
    pub magnitude: f64,
    /// Its deviation.
    pub deviation: f64,
    /// Operations an image.
    pub count: usize,
    /// Whether a greater magnitude is always a greater change.
    pub increasing: bool,
}

impl RandAugment {
    pub fn apply(&self, pixels: &mut Vec<u8>, size: [usize; 2], draws: &mut Stream) {
        let ops: Vec<Op> = (0..self.count).map(|_| Op::ALL[draws.below(Op::ALL.len())]).collect();
        for op in ops {
            if draws.chance(0.5) {
                let magnitude = (self.magnitude + self.deviation * draws.normal()).clamp(0.0, 10.0);
                let sign = if draws.chance(0.5) { -1.0 } else { 1.0 };
                op.apply(pixels, size, magnitude, sign, self.increasing);
            }
        }
    }
}

/// The most operations an image may be given.
const MOST_OPS: usize = 15;

impl FromStr for RandAugment {
    type Err = Error;

    fn from_str(policy: &str) -> Result<Self> {
        let wrong = |why: String| Error::usage(format!("--aa {policy:?}: {why}; write for example rand-m9-mstd0.5-inc1"));
        let mut tokens = policy.split('-');
        let family = tokens.next().unwrap_or_default();
        if family != "rand" {
            return Err(wrong(format!("the policy family {family:?} does not exist here, only rand (RandAugment)")));
        }
        let mut read = Self { magnitude: 10.0, deviation: 0.0, count: 2, increasing: false };
        for token in tokens {
            let digits = token.find(|c: char| c.is_ascii_digit()).unwrap_or(token.len());
            let (key, text) = token.split_at(digits);
            let number: Option<f64> = text.parse().ok().filter(|number: &f64| number.is_finite());
            let (Some(number), whole) = (number, text.parse::<usize>().ok()) else {
                return Err(wrong(format!("{token:?} has no number behind its letters")));
            };
            match (key, whole) {
                ("m", Some(whole)) if whole <= 10 => read.magnitude = whole as f64,
                ("m", _) => return Err(wrong(format!("the magnitude m is {text}; it is a whole number from 0 to 10"))),
                ("n", Some(whole)) if (1..=MOST_OPS).contains(&whole) => read.count = whole,
                ("n", _) => return Err(wrong(format!("the number of operations n is {text}; it is a whole number from 1 to {MOST_OPS}"))),
                ("mstd", _) => read.deviation = number,
                ("inc", _) => read.increasing = true,
                ("w", _) => return Err(wrong("weights of operations (w) are not supported; all are equally likely".into())),
                _ => return Err(wrong(format!("{key:?} is not one of m, n, mstd, inc"))),
            }
        }
        Ok(read)
    }
}

impl fmt::Display for RandAugment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rand-m{}-n{}-mstd{}{}", self.magnitude, self.count, self.deviation, if self.increasing { "-inc1" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn policies_are_read_and_written() {
        let read: RandAugment = "rand-m9-mstd0.5-inc1".parse().unwrap();
        assert_eq!(read, RandAugment { magnitude: 9.0, deviation: 0.5, count: 2, increasing: true });
        assert_eq!(read.to_string().parse::<RandAugment>().unwrap(), read);
        let read: RandAugment = "rand-n3-m7-inc0".parse().unwrap();
        assert_eq!(read, RandAugment { magnitude: 7.0, deviation: 0.0, count: 3, increasing: true });
        let read: RandAugment = "rand".parse().unwrap();
        assert_eq!((read.magnitude, read.increasing), (10.0, false));
        assert_eq!(read.to_string().parse::<RandAugment>().unwrap(), read);
    }

    #[test]
    fn policies_that_are_not_meant_are_usage_errors() {
        let cases = [
            ("v0", "v0"),
            ("augmix-m5", "augmix"),
            ("original-mstd0.5", "original"),
            ("", "family"),
            ("rand-m9-w0", "weights"),
            ("rand-m11", "0 to 10"),
            ("rand-m9.5", "whole number"),
            ("rand-n0", "1 to 15"),
            ("rand-n99999999999999999999", "1 to 15"),
            ("rand-inc", "no number"),
            ("rand-mstdinf", "no number"),
            ("rand-mstd1e999", "no number"),
            ("rand-x3", "\"x\""),
            ("rand--m9", "no number"),
        ];
        for (policy, part) in cases {
            let error = policy.parse::<RandAugment>().unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(part) && error.to_string().contains("--aa"), "{error}");
        }
    }

    #[test]
    fn about_one_operation_in_four_images_leaves_it_alone() {
        let policy: RandAugment = "rand-m9-mstd0.5-inc1".parse().unwrap();
        let image: Vec<u8> = (0..8 * 8 * 3).map(|i| (40 + i * 5 % 170) as u8).collect();
        let same = (0..2000).filter(|&number| {
            let mut pixels = image.clone();
            policy.apply(&mut pixels, [8, 8], &mut Rng::new(2).stream("sample", number));
            pixels == image
        });
        // (1/2)^2 of the images have no operation; inverting twice and equalising 64 pixels change nothing either.
        let expected = 0.25 + 2.0 * 0.25 / 15.0 + 0.25 * 2.0 / 225.0;
        let share = same.count() as f64 / 2000.0;
        assert!((share - expected).abs() < 0.035, "{share} but {expected}");
    }
}
