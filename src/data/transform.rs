//! What happens to one picture before it is a row of a batch: cut, mirrored, its colours changed, boxes chosen that are erased later.
//!
//! | recipe | crop | colours | erasing |
//! |---|---|---|---|
//! | [`mae_pretrain`](Transform::mae_pretrain) | random resized, area from 0.2 | - | - |
//! | [`finetune`](Transform::finetune) | random resized, area from 0.08 | RandAugment, or jitter | yes |
//! | [`deit`](Transform::deit) | as finetune; up to 32 pixels a window of the padded image | RandAugment, or jitter | yes |
//! | [`three`](Transform::three) | random resized, or the simple one | ThreeAugment, then jitter | - |
//! | [`probe`](Transform::probe) | random resized in one try | - | - |
//! | [`shifted`](Transform::shifted) | shifted by a few pixels | - | - |
//! | [`evaluate`](Transform::evaluate) | centre | - | - |
//!
//! All but the last mirror half of the pictures. With [`clean`](Transform::clean) there are two views of one cut: as it was before its colours changed, for a
//! teacher, and as it is after.

use super::colour::Jitter;
use super::erase::Erasing;
use super::rand_augment::RandAugment;
use super::{Picture, resize, three_augment};
use crate::ensure;
use crate::error::{Error, Result};
use crate::rng::Stream;
use std::fmt;

pub use super::crop::{ASPECTS, Crop};

/// What happens to the colours of a cut picture.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Colours {
    Kept,
    Jitter(Jitter),
    Rand(RandAugment),
    /// ThreeAugment, then a jitter.
    Three(Option<Jitter>),
}

/// From a picture to a square of bytes; all that is drawn comes from the sample's own stream.
#[derive(Clone, PartialEq, Debug)]
pub struct Transform {
    /// Side of the square.
    pub side: usize,
    pub crop: Crop,
    /// Whether half of the pictures are mirrored.
    pub flip: bool,
    pub colours: Colours,
    pub erasing: Option<Erasing>,
    /// Whether the picture comes along as it was before its colours changed and nothing was erased.
    pub clean: bool,
}

/// A picture that is ready for a batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Sample {
    /// [side, side, C]
    pub pixels: Vec<u8>,
    /// The same before its colours changed, where that is asked for.
    pub clean: Option<Vec<u8>>,
    /// Boxes (top, left, height, width) that are to be erased after normalisation.
    pub erased: Vec<[u32; 4]>,
}

impl Transform {
    /// A crop and a flip.
    fn mirrored(side: usize, crop: Crop) -> Self {
        Self { side, crop, flip: true, colours: Colours::Kept, erasing: None, clean: false }
    }

    pub fn mae_pretrain(side: usize) -> Self {
        Self::mirrored(side, Crop::Resized { scale: [0.2, 1.0], ratio: ASPECTS })
    }

    /// MAE's fine-tuning. RandAugment takes the place of jitter, so that to ask for both is an error.
    pub fn finetune(side: usize, aa: Option<RandAugment>, jitter: Option<f64>, erasing: Option<Erasing>) -> Result<Self> {
        let colours = match (aa, jitter) {
            (Some(aa), Some(jitter)) => {
                return Err(Error::usage(format!(
                    "--color-jitter {jitter} has no effect beside --aa {aa}; give one of the two (--aa \"\" for none)"
                )));
            }
            (Some(aa), None) => Colours::Rand(aa),
            (None, Some(strength)) => Colours::Jitter(checked_jitter(strength)?),
            (None, None) => Colours::Kept,
        };
        let crop = Crop::Resized { scale: [0.08, 1.0], ratio: ASPECTS };
        Ok(Self { colours, erasing, ..Self::mirrored(side, crop) })
    }

    /// DeiT's training: as MAE's fine-tuning, but images of up to 32 pixels are not resized.
    pub fn deit(side: usize, aa: Option<RandAugment>, jitter: Option<f64>, erasing: Option<Erasing>) -> Result<Self> {
        let whole = Self::finetune(side, aa, jitter, erasing)?;
        Ok(if side <= 32 { Self { crop: Crop::Padded { padding: 4 }, ..whole } } else { whole })
    }

    /// DeiT-III's training, with the simple random crop (`--src`) or the random resized one.
    pub fn three(side: usize, simple: bool, jitter: Option<f64>) -> Result<Self> {
        let crop = if simple { Crop::Simple } else { Crop::Resized { scale: [0.08, 1.0], ratio: ASPECTS } };
        let jitter = jitter.filter(|&strength| strength != 0.0).map(checked_jitter).transpose()?;
        Ok(Self { colours: Colours::Three(jitter), ..Self::mirrored(side, crop) })
    }

    /// Two views of one cut: a teacher's, and a student's whose colours are jittered.
    pub fn two_views(self, strength: f64) -> Result<Self> {
        Ok(Self { colours: Colours::Jitter(checked_jitter(strength)?), clean: true, ..self })
    }

    /// What is done to the picture that a teacher sees.
    pub fn for_teacher(&self) -> Self {
        if self.clean { Self { colours: Colours::Kept, erasing: None, clean: false, ..self.clone() } } else { self.clone() }
    }

    pub fn probe(side: usize) -> Self {
        Self::mirrored(side, Crop::Once { scale: [0.08, 1.0], ratio: ASPECTS })
    }

    /// The built-in presets' fine-tuning.
    pub fn shifted(side: usize, most: usize) -> Self {
        Self::mirrored(side, Crop::Shift { most })
    }

    /// Evaluation at MAE's ratio of the crop.
    pub fn evaluate(side: usize) -> Self {
        Self::evaluate_at(side, resize::mae_crop_ratio(side))
    }

    /// Evaluation where the crop takes this part of the resized image's short side.
    pub fn evaluate_at(side: usize, ratio: f64) -> Self {
        Self { flip: false, ..Self::mirrored(side, Crop::Centre { ratio }) }
    }

    pub fn apply(&self, picture: Picture, draws: &mut Stream) -> Result<Sample> {
        Ok(self.change(self.cut(picture, draws)?, draws))
    }

    /// The picture cut and mirrored, [side, side, C].
    pub fn cut(&self, picture: Picture, draws: &mut Stream) -> Result<Vec<u8>> {
        let channels = picture.channels;
        ensure!(channels == 3 || self.colours == Colours::Kept, "colours are changed of images with 3 channels, not {channels}");
        let mut pixels = self.crop.cut(picture, self.side, draws)?;
        if self.flip && draws.chance(0.5) {
            resize::hflip(&mut pixels, [self.side, self.side], channels)?;
        }
        Ok(pixels)
    }

    /// What becomes of a cut picture: its colours changed, boxes chosen.
    pub fn change(&self, mut pixels: Vec<u8>, draws: &mut Stream) -> Sample {
        let to = [self.side, self.side];
        let clean = self.clean.then(|| pixels.clone());
        match self.colours {
            Colours::Kept => {}
            Colours::Jitter(jitter) => jitter.apply(&mut pixels, draws),
            Colours::Rand(policy) => policy.apply(&mut pixels, to, draws),
            Colours::Three(jitter) => {
                three_augment::apply(&mut pixels, to, draws);
                if let Some(jitter) = jitter {
                    jitter.apply(&mut pixels, draws);
                }
            }
        }
        let erased = self.erasing.map(|erasing| erasing.draw(self.side, draws)).unwrap_or_default();
        Sample { pixels, clean, erased }
    }
}

fn checked_jitter(strength: f64) -> Result<Jitter> {
    if (0.0..=10.0).contains(&strength) {
        Ok(Jitter(strength))
    } else {
        Err(Error::usage(format!("--color-jitter is {strength}; it is a strength from 0 to 10, for example 0.3")))
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} x {}", self.crop, self.side, self.side)?;
        if self.flip {
            write!(f, ", flip")?;
        }
        match self.colours {
            Colours::Kept => {}
            Colours::Jitter(Jitter(strength)) => write!(f, ", colour jitter {strength}")?,
            Colours::Rand(policy) => write!(f, ", {policy}")?,
            Colours::Three(None) => write!(f, ", ThreeAugment")?,
            Colours::Three(Some(Jitter(strength))) => write!(f, ", ThreeAugment, colour jitter {strength}")?,
        }
        if let Some(erasing) = self.erasing {
            write!(f, ", {erasing}")?;
        }
        if self.clean {
            write!(f, ", beside a view without colours and erasing")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::erase::Filling;
    use super::*;
    use crate::rng::Rng;

    fn picture() -> Picture {
        let pixels = (0..41 * 53 * 3).map(|i| (i * i % 251) as u8).collect();
        Picture::new([41, 53], 3, pixels).unwrap()
    }

    fn all() -> Vec<Transform> {
        let policy = Some("rand-m9-mstd0.5-inc1".parse().unwrap());
        let erasing = Some(Erasing::new(0.25, Filling::Pixel, 1).unwrap());
        vec![
            Transform::mae_pretrain(48),
            Transform::finetune(48, policy, None, erasing).unwrap(),
            Transform::finetune(48, None, Some(0.4), None).unwrap(),
            Transform::deit(32, policy, None, erasing).unwrap(),
            Transform::three(48, true, Some(0.3)).unwrap(),
            Transform::three(48, false, None).unwrap(),
            Transform::probe(48),
            Transform::shifted(48, 3),
            Transform::evaluate(48),
            Transform::mae_pretrain(48).two_views(0.4).unwrap(),
        ]
    }

    #[test]
    fn a_sample_depends_on_its_stream_alone() {
        for transform in all() {
            let samples: Vec<_> =
                (0..20).map(|number| transform.apply(picture(), &mut Rng::new(1).stream("sample", number)).unwrap()).collect();
            let side = transform.side;
            assert!(samples.iter().all(|sample| sample.pixels.len() == side * side * 3), "{transform}");
            let again = transform.apply(picture(), &mut Rng::new(1).stream("sample", 7)).unwrap();
            assert_eq!(again, samples[7], "{transform}");
            assert_eq!(samples[1..].iter().all(|sample| *sample == samples[0]), transform == Transform::evaluate(48), "{transform}");
        }
    }

    #[test]
    fn two_views_are_one_cut_before_and_after_the_jitter() {
        let transform = Transform::mae_pretrain(48).two_views(0.4).unwrap();
        let single = Transform { clean: false, ..transform.clone() };
        for number in 0..20 {
            let stream = || Rng::new(1).stream("sample", number);
            let both = transform.apply(picture(), &mut stream()).unwrap();
            let jittered = single.apply(picture(), &mut stream()).unwrap();
            let clean = Transform::mae_pretrain(48).apply(picture(), &mut stream()).unwrap();
            assert_eq!((&both.pixels, both.clean.as_ref()), (&jittered.pixels, Some(&clean.pixels)));
            assert!(both.pixels != clean.pixels && jittered.clean.is_none());
        }
        assert_eq!(Transform::mae_pretrain(48).two_views(-1.0).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn half_of_the_pictures_are_mirrored() {
        let transform = Transform { crop: Crop::Whole, ..Transform::shifted(16, 0) };
        let pixels: Vec<u8> = (0..16 * 16 * 3).map(|i| (i % 256) as u8).collect();
        let mut mirrored = pixels.clone();
        resize::hflip(&mut mirrored, [16, 16], 3).unwrap();
        let count = (0..1000).filter(|&number| {
            let picture = Picture::new([16, 16], 3, pixels.clone()).unwrap();
            let sample = transform.apply(picture, &mut Rng::new(1).stream("sample", number)).unwrap();
            assert!(sample.pixels == pixels || sample.pixels == mirrored);
            sample.pixels == mirrored
        });
        assert!((440..560).contains(&count.count()));
    }

    #[test]
    fn settings_read_as_a_sentence() {
        let said: Vec<String> = all().iter().map(Transform::to_string).collect();
        assert_eq!(said[0], "random resized crop (area 0.2 to 1, aspect 0.75 to 1.33) to 48 x 48, flip");
        assert!(said[1].ends_with("flip, rand-m9-n2-mstd0.5-inc1, erasing with probability 0.25 (up to 1 boxes, pixel)"), "{}", said[1]);
        assert_eq!(said[3].split(" to ").next(), Some("random crop with 4 black pixels around"));
        assert_eq!(said[4], "simple random crop to 48 x 48, flip, ThreeAugment, colour jitter 0.3");
        assert_eq!(said[8], "centre crop of 0.875 to 48 x 48");
        assert!(said[9].ends_with("48 x 48, flip, colour jitter 0.4, beside a view without colours and erasing"), "{}", said[9]);
    }

    #[test]
    fn settings_that_cannot_be_meant_are_usage_errors() {
        let policy: RandAugment = "rand-m9-mstd0.5-inc1".parse().unwrap();
        let error = Transform::finetune(224, Some(policy), Some(0.4), None).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("--color-jitter"), "{error}");
        assert_eq!(Transform::finetune(224, None, Some(f64::NAN), None).unwrap_err().exit_code(), 2);
        assert_eq!(Transform::three(224, false, Some(-0.3)).unwrap_err().exit_code(), 2);
    }
}
