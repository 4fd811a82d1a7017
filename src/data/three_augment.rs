//! ThreeAugment of DeiT-III: each image is made grey, or solarised, or blurred, each with probability 1/3.
//!
//!   grey      three equal channels of luma
//!   solarise  255 - v where v >= 128
//!   blur      a Gaussian of deviation U(0.1, 2)

use super::{colour, filter};
use crate::rng::Stream;

/// Changes RGB bytes [H, W, 3] by one of the three.
pub fn apply(pixels: &mut Vec<u8>, size: [usize; 2], draws: &mut Stream) {
    match draws.below(3) {
        0 => colour::grey(pixels),
        1 => colour::solarise(pixels, 128),
        _ => filter::blur(pixels, size, draws.between(0.1, 2.0) as f32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn each_of_the_three_is_as_likely() {
        let image: Vec<u8> = (0..6 * 6 * 3).map(|i| (i * 41 % 256) as u8).collect();
        let (mut grey, mut solarised) = (image.clone(), image.clone());
        colour::grey(&mut grey);
        colour::solarise(&mut solarised, 128);
        let mut counts = [0usize; 3];
        for number in 0..1500 {
            let mut pixels = image.clone();
            apply(&mut pixels, [6, 6], &mut Rng::new(0).stream("three", number));
            counts[if pixels == grey {
                0
            } else if pixels == solarised {
                1
            } else {
                2
            }] += 1;
        }
        assert!(counts.iter().all(|count| (430..570).contains(count)), "{counts:?}");
    }
}
