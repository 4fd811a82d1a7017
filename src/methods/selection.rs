//! Which patches a teacher of logits is shown: MaskedKD's rule, and the rules that it is compared with.
//!
//!   student            the k most attended by the class token in the student's last block
//!   layer:L            the same in block L, from 0
//!   student-lowest     the k least attended
//!   teacher            the k that the teacher's own class token attends to most, which takes a pass of the whole teacher
//!   random             k at random, drawn for each image and step
//!   block              units of 2 x 2 at random
//!   top-plus-random:A,B  the A most attended and B at random from the rest, k = A + B
//!   mask-student       the other way round: k at random for the student, all for the teacher
//!   none               all
//!
//! Kept patches stand in raster order.

use crate::error::{Error, Result};
use crate::masking::{self, Arrangement, Attended, Keys};
use crate::tape::Var;
use crate::tensor::{Dtype, Tensor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Selection {
    #[default]
    Student,
    Layer(usize),
    StudentLowest,
    Teacher,
    Random,
    Block,
    TopPlusRandom(usize, usize),
    MaskStudent,
    None,
}

impl Selection {
    /// Whether the student's attention is asked for.
    pub fn looks(self) -> bool {
        matches!(self, Self::Student | Self::Layer(_) | Self::StudentLowest | Self::TopPlusRandom(..))
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Student => f.write_str("student"),
            Self::Layer(block) => write!(f, "layer:{block}"),
            Self::StudentLowest => f.write_str("student-lowest"),
            Self::Teacher => f.write_str("teacher"),
            Self::Random => f.write_str("random"),
            Self::Block => f.write_str("block"),
            Self::TopPlusRandom(top, rest) => write!(f, "top-plus-random:{top},{rest}"),
            Self::MaskStudent => f.write_str("mask-student"),
            Self::None => f.write_str("none"),
        }
    }
}

impl FromStr for Selection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let name = text.replace('_', "-");
        let number = |text: &str| text.parse::<usize>().ok();
        let parsed = match name.split_once(':') {
            None => match name.as_str() {
                "student" => Some(Self::Student),
                "student-lowest" => Some(Self::StudentLowest),
                "teacher" => Some(Self::Teacher),
                "random" => Some(Self::Random),
                "block" => Some(Self::Block),
                "mask-student" => Some(Self::MaskStudent),
                "none" => Some(Self::None),
                _ => None,
            },
            Some(("layer", block)) => number(block).map(Self::Layer),
            Some(("top-plus-random", counts)) => {
                counts.split_once(',').and_then(|(top, rest)| Some(Self::TopPlusRandom(number(top)?, number(rest)?)))
            }
            Some(_) => None,
        };
        parsed.ok_or_else(|| {
            Error::usage(format!(
                "--selection {text} is unknown; there are student, random, block, student-lowest, teacher, layer:L, top-plus-random:A,B, mask-student and none"
            ))
        })
    }
}

impl Serialize for Selection {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'d> Deserialize<'d> for Selection {
    fn deserialize<D: Deserializer<'d>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The patches [B, K] that a mean over heads of `rows` [B, H, e + N] chooses, in raster order. `noise` [B, N] is asked for where some are at random.
pub fn by_attention(
    selection: Selection,
    rows: &Tensor,
    extra: usize,
    keep: usize,
    keys: Keys,
    noise: impl FnOnce(&[usize]) -> Result<Tensor>,
) -> Result<Tensor> {
    let Attended { kept, saliency } = masking::most_attended(rows, extra, keep, keys, Arrangement::Raster)?;
    match selection {
        Selection::StudentLowest => masking::top(&scaled(&saliency, -1.0)?, keep, Arrangement::Raster),
        Selection::TopPlusRandom(top, _) => {
            // 0 where a patch is among the most attended, else 1: less than any noise when twice that is taken off.
            let others = masking::random(&scaled(&saliency.cast(Dtype::F32)?, -1.0)?, top)?.hidden;
            let noise = noise(saliency.shape())?;
            let score = Var::constant(noise).add(&Var::constant(scaled(&others, -2.0)?))?;
            masking::top(score.value(), keep, Arrangement::Raster)
        }
        _ => Ok(kept),
    }
}

/// The kept patches of a mask in raster order; `hidden` [B, N] is 1 at the others.
pub fn in_raster(hidden: &Tensor, keep: usize) -> Result<Tensor> {
    masking::top(&scaled(hidden, -1.0)?, keep, Arrangement::Raster)
}

fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    Ok(Var::constant(x.clone()).scale(factor)?.value().clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Tensor {
        // One head, one token in front, six patches.
        Tensor::from_slice(&[1, 1, 7], &[0.1f32, 0.05, 0.3, 0.1, 0.2, 0.05, 0.2]).unwrap()
    }

    fn chosen(selection: &str, keep: usize) -> Vec<u32> {
        let noise = |shape: &[usize]| Tensor::from_slice(shape, &[0.1f32, 0.9, 0.2, 0.9, 0.8, 0.3]);
        let kept = by_attention(selection.parse().unwrap(), &rows(), 1, keep, Keys::All, noise).unwrap();
        kept.data::<u32>().to_vec()
    }

    #[test]
    fn the_most_and_the_least_attended_are_chosen_in_raster_order() {
        assert_eq!(chosen("student", 3), [1, 3, 5]);
        assert_eq!(chosen("layer:0", 2), [1, 3]);
        assert_eq!(chosen("student-lowest", 3), [0, 2, 4]);
    }

    #[test]
    fn some_of_the_most_attended_and_some_of_the_rest_at_random() {
        assert_eq!(chosen("top-plus-random:2,1", 3), [1, 3, 4]);
        assert_eq!(chosen("top-plus-random:2,2", 4), [1, 3, 4, 5]);
        assert_eq!(chosen("top-plus-random:0,2", 2), [1, 3]);
        assert_eq!(chosen("top-plus-random:3,0", 3), [1, 3, 5]);
    }

    #[test]
    fn a_mask_is_put_in_raster_order() {
        let mask = masking::random(&Tensor::from_slice(&[1, 5], &[0.5f32, 0.1, 0.9, 0.4, 0.2]).unwrap(), 3).unwrap();
        assert_eq!(mask.kept.data::<u32>(), [1, 4, 3]);
        assert_eq!(in_raster(&mask.hidden, 3).unwrap().data::<u32>(), [1, 3, 4]);
    }

    #[test]
    fn names_are_read_and_written() {
        for name in ["student", "random", "block", "student-lowest", "teacher", "layer:3", "top-plus-random:40,10", "mask-student", "none"]
        {
            assert_eq!(name.parse::<Selection>().unwrap().to_string(), name);
        }
        for name in ["", "layer", "layer:", "layer:-1", "top-plus-random:4", "patch-patch", "random:3"] {
            let said = name.parse::<Selection>().unwrap_err();
            assert!(said.exit_code() == 2 && said.to_string().contains("there are student"), "{name}");
        }
    }
}
