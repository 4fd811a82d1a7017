//! What happens to one picture before it is a row of a batch.

use super::{Picture, resize};
use crate::ensure;
use crate::error::Result;
use crate::rng::Stream;

/// Which part of a picture is seen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Crop {
    /// The whole picture, resized without regard to its aspect where it has another size.
    Whole,
    /// The short side resized to side / ratio, then the centre: evaluation.
    Centre { ratio: f64 },
}

/// From a picture to a square of bytes; all that is drawn comes from the sample's own stream.
#[derive(Clone, PartialEq, Debug)]
pub struct Transform {
    /// Side of the square.
    pub side: usize,
    pub crop: Crop,
    /// Whether half of the pictures are mirrored.
    pub flip: bool,
}

/// A picture that is ready for a batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Sample {
    /// [side, side, C]
    pub pixels: Vec<u8>,
    /// Boxes (top, left, height, width) that are to be erased after normalisation.
    pub erased: Vec<[u32; 4]>,
}

impl Transform {
    pub fn apply(&self, picture: Picture, draws: &mut Stream) -> Result<Sample> {
        ensure!(picture.channels == 3, "images have 3 channels, not {}", picture.channels);
        let to = [self.side, self.side];
        let mut pixels = match self.crop {
            Crop::Whole if picture.size == to => picture.pixels,
            Crop::Whole => resize::resize(&picture.pixels, picture.size, to)?,
            Crop::Centre { ratio } => {
                let short = resize::eval_short_side(self.side, ratio);
                resize::eval_transform(&picture.pixels, picture.size, short, self.side)?
            }
        };
        if self.flip && draws.chance(0.5) {
            resize::hflip(&mut pixels, to)?;
        }
        Ok(Sample { pixels, erased: Vec::new() })
    }
}
