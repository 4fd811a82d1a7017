//! Published sizes by name.

use super::cait::CaitConfig;
use super::decoder::DecoderConfig;
use super::vit::{DropPath, Position, VitConfig};
use crate::error::{Error, Result};

/// (name, width, blocks, heads, patch side it is published with)
const SIZES: [(&str, usize, usize, usize, usize); 6] = [
    ("tiny", 192, 12, 3, 16),
    ("small", 384, 12, 6, 16),
    ("medium", 512, 12, 8, 16),
    ("base", 768, 12, 12, 16),
    ("large", 1024, 24, 16, 16),
    ("huge", 1280, 32, 16, 14),
];

/// The sizes there are.
pub const NAMES: [&str; 6] = [SIZES[0].0, SIZES[1].0, SIZES[2].0, SIZES[3].0, SIZES[4].0, SIZES[5].0];

/// MAE's encoder of this size.
pub fn mae(size: &str, image: usize) -> Result<VitConfig> {
    let found = SIZES.iter().find(|(name, ..)| *name == size);
    let (_, width, depth, heads, patch) =
        *found.ok_or_else(|| Error::usage(format!("model {size} is unknown; there are {}", NAMES.join(", "))))?;
    Ok(VitConfig::new(image, patch, width, depth, heads))
}

/// The decoder of all published MAE models: 512 wide, 8 blocks, 16 heads.
pub fn mae_decoder() -> DecoderConfig {
    DecoderConfig { width: 512, depth: 8, heads: 16 }
}

/// A ViT or DeiT classifier's encoder: learned positions, stochastic depth growing linearly to `drop_path`.
pub fn vit(size: &str, image: usize, drop_path: f64) -> Result<VitConfig> {
    Ok(VitConfig { position: Position::Learned, drop_path: DropPath::Linear(drop_path), ..mae(size, image)? })
}

/// DeiT with a distillation token.
pub fn deit_distilled(size: &str, image: usize, drop_path: f64) -> Result<VitConfig> {
    Ok(VitConfig { distillation_token: true, ..vit(size, image, drop_path)? })
}

/// DeiT-III: layer scale from 1e-4, positions for patches only, the same stochastic depth in every block.
pub fn deit3(size: &str, image: usize, drop_path: f64) -> Result<VitConfig> {
    let base = mae(size, image)?;
    Ok(VitConfig { position: Position::LearnedPatches, layer_scale: Some(1e-4), drop_path: DropPath::Constant(drop_path), ..base })
}

/// CaiT-S24: 24 blocks that mix heads, then two for the class token; layer scale from 1e-5.
pub fn cait_s24(image: usize, classes: usize) -> CaitConfig {
    let vit = VitConfig { position: Position::LearnedPatches, layer_scale: Some(1e-5), ..VitConfig::new(image, 16, 384, 24, 8) };
    CaitConfig { vit, class_blocks: 2, classes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Start;
    use crate::nn::cait::Cait;
    use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
    use crate::nn::decoder::{Decoder, DecoderTokens};
    use crate::nn::vit::{Tokens, Vit};
    use crate::param::ParamsBuilder;

    fn classifier(vit: VitConfig) -> usize {
        let mut b = ParamsBuilder::default();
        Classifier::new(&mut b, ClassifierConfig { vit, classes: 1000, pool: Pool::ClassToken, probe: false }).unwrap();
        b.count_trained()
    }

    #[test]
    fn classifiers_have_the_published_number_of_parameters() {
        for (size, count) in
            [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656), ("large", 304_326_632), ("huge", 632_045_800)]
        {
            assert_eq!(classifier(vit(size, 224, 0.0).unwrap()), count, "{size}");
        }
        for (size, count) in [("tiny", 5_910_800), ("small", 22_436_432), ("base", 87_338_192)] {
            assert_eq!(classifier(deit_distilled(size, 224, 0.1).unwrap()), count, "{size}");
        }
        for (size, count) in [
            ("tiny", 5_721_832),
            ("small", 22_059_496),
            ("medium", 38_849_512),
            ("base", 86_585_320),
            ("large", 304_374_760),
            ("huge", 632_126_440),
        ] {
            assert_eq!(classifier(deit3(size, 224, 0.1).unwrap()), count, "{size}");
        }
        assert_eq!(classifier(vit("base", 384, 0.0).unwrap()), 86_859_496);
    }

    #[test]
    fn cait_has_the_published_number_of_parameters() {
        let mut b = ParamsBuilder::default();
        Cait::new(&mut b, cait_s24(224, 1000)).unwrap();
        assert_eq!((b.count_trained(), b.count()), (46_916_200, 46_916_200));
    }

    #[test]
    fn pre_training_models_have_the_published_number_of_parameters() {
        for (size, trained, all) in [
            ("tiny", 31_200_000, 31_338_688),
            ("small", 47_401_728, 47_578_240),
            ("base", 111_655_680, 111_907_840),
            ("large", 329_239_296, 329_541_888),
            ("huge", 656_613_964, 657_074_508),
        ] {
            let (config, decoder) = (mae(size, 224).unwrap(), mae_decoder());
            let mut b = ParamsBuilder::default();
            let tokens = Tokens::new(&mut b, &config).unwrap();
            let decoder_tokens = DecoderTokens::new(&mut b, &decoder, &config).unwrap();
            let vit = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
            Decoder::new(&mut b, &decoder, &vit.config, decoder_tokens, Start::Xavier).unwrap();
            assert_eq!((b.count_trained(), b.count()), (trained, all), "{size}");
        }
    }

    #[test]
    fn an_unknown_size_names_the_known_ones() {
        assert!(mae("giant", 224).unwrap_err().to_string().contains("tiny, small"));
    }
}
