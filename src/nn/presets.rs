//! Published sizes by name, and the names that the papers' programs give their models.
//!
//!   base   mae_vit_base_patch16   mae_vit_base_patch16_dec512d8b   vit_base_patch16   deit_base_patch16_224
//!   deit_base_distilled_patch16_224   deit_base_patch16_LS (DeiT-III; timm: deit3_base_patch16_224)
//!   deit_small   deit3_small   mae_vit_base (as MaskedKD names its teachers)
//!   convvit_base   convvit_base_patch16   convmae_convvit_base_patch16   convmae_convvit_base_patch16_dec512d8b (ConvMAE)
//!   convit_base   convit_base_patch16   dmjd_convit_base_patch16_dec8_hog   dmjd_convit_large_patch16_dec512d8b_hog (DMJD)
//!
//! The glyph sizes belong to the built-in dataset of that name.

use super::cait::CaitConfig;
use super::convit;
use super::decoder::DecoderConfig;
use super::vit::{DropPath, Position, VitConfig};
use crate::error::{Error, Result};
use crate::formats::nearest;

/// (name, width, blocks, heads, patch side it is published with)
const SIZES: [(&str, usize, usize, usize, usize); 8] = [
    ("tiny", 192, 12, 3, 16),
    ("small", 384, 12, 6, 16),
    ("medium", 512, 12, 8, 16),
    ("base", 768, 12, 12, 16),
    ("large", 1024, 24, 16, 16),
    ("huge", 1280, 32, 16, 14),
    ("glyph_s", 64, 4, 4, 8),
    ("glyph_t", 32, 3, 4, 8),
];

/// The sizes there are.
pub const NAMES: [&str; 8] = [SIZES[0].0, SIZES[1].0, SIZES[2].0, SIZES[3].0, SIZES[4].0, SIZES[5].0, SIZES[6].0, SIZES[7].0];

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

/// The decoder that an encoder of this size is pre-trained with.
pub fn decoder_of(size: &str) -> DecoderConfig {
    if size.starts_with("glyph") { DecoderConfig { width: 64, depth: 1, heads: 4 } } else { mae_decoder() }
}

/// What kind of model a name means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// MAE's encoder and decoder, to be pre-trained.
    Mae,
    /// A plain ViT classifier, as MAE fine-tunes it.
    Vit,
    Deit,
    /// DeiT with a distillation token.
    Distilled,
    Deit3,
    /// ConViT's encoder and a decoder, to be pre-trained.
    ConvMae,
    /// A ConViT classifier.
    ConVit,
}

/// What a model's name says.
#[derive(Clone, Debug)]
pub struct Named {
    pub size: &'static str,
    /// None for a size alone, which can be any of them.
    pub family: Option<Family>,
    pub patch: usize,
    /// Side of the images it is published for.
    pub image: usize,
    /// The name's own, else the one that this size is pre-trained with.
    pub decoder: DecoderConfig,
    /// Heads of the encoder that is pre-trained, where they are not the size's.
    pub heads: Option<usize>,
}

/// Sizes and families of ConViT by what stands in front of a size.
const CONVIT: [(&str, Family); 3] = [("convmae_", Family::ConvMae), ("dmjd_", Family::ConvMae), ("", Family::ConVit)];

impl Named {
    fn plain(size: &str) -> Option<Self> {
        let plain = SIZES.iter().find(|(name, ..)| *name == size).map(|&(name, _, _, _, patch)| (name, patch));
        let convit =
            || convit::NAMES.into_iter().find(|name| *name == size).and_then(|name| Some((name, convit::encoder(name, 224).ok()?.patch)));
        let (size, patch) = plain.or_else(convit)?;
        let image = if size.starts_with("glyph") { 48 } else { 224 };
        Some(Self { size, family: None, patch, image, decoder: decoder_of(size), heads: None })
    }

    fn parse(name: &str) -> Option<Self> {
        if let Some(plain) = Self::plain(name) {
            return Some(plain);
        }
        if let Some(convit) = Self::parse_convit(name) {
            return Some(convit);
        }
        let starts = [
            ("mae_vit_", Family::Mae),
            ("tinymim_vit_", Family::Mae),
            ("vit_", Family::Vit),
            ("deit_", Family::Deit),
            ("deit3_", Family::Deit3),
        ];
        let (mut family, rest) = starts.iter().find_map(|(start, family)| Some((*family, name.strip_prefix(start)?)))?;
        let (mut size, rest) = rest.split_once("_patch").map_or((rest, None), |(size, rest)| (size, Some(rest)));
        if let (Family::Deit, Some(short)) = (family, size.strip_suffix("_distilled")) {
            (family, size) = (Family::Distilled, short);
        }
        let mut named = Self::plain(size)?;
        // TinyMIM's tiny student has heads of 32.
        named.heads = Some(6).filter(|_| name.starts_with("tinymim_vit_tiny"));
        let Some(rest) = rest else {
            // As MaskedKD names its teachers: deit_small, deit3_base, mae_vit_base.
            named.family = Some(family).filter(|family| *family != Family::Vit);
            return named.family.is_some().then_some(named);
        };
        let mut parts = rest.split('_');
        named.patch = number(parts.next()?)?;
        for part in parts {
            match (family, part.strip_prefix("dec")) {
                (Family::Mae, Some(decoder)) => named.decoder = decoder_named(decoder, &named.decoder)?,
                (Family::Deit, None) if part == "LS" => family = Family::Deit3,
                (Family::Mae, _) => return None,
                _ => named.image = number(part)?,
            }
        }
        named.family = Some(family);
        Some(named)
    }

    fn parse_convit(name: &str) -> Option<Self> {
        let (start, family) = CONVIT.into_iter().find(|(start, _)| name.starts_with(start))?;
        let (size, rest) = name.strip_prefix(start)?.split_once("_patch")?;
        let plain = Self::plain(size).filter(Self::is_convit)?;
        let mut parts = rest.split('_');
        if number(parts.next()?)? != plain.patch {
            return None;
        }
        let mut named = Self { family: Some(family), ..plain };
        for part in parts {
            match part.strip_prefix("dec") {
                Some(decoder) if family == Family::ConvMae => {
                    // DMJD's short names say the blocks alone.
                    let blocks = number(decoder).filter(|_| start == "dmjd_");
                    let blocks = blocks.map(|depth| DecoderConfig { depth, ..named.decoder.clone() });
                    named.decoder = blocks.or_else(|| decoder_named(decoder, &named.decoder))?;
                }
                // DMJD's names end in what its decoders predict.
                None if family == Family::ConvMae && start == "dmjd_" && part == "hog" => {}
                None if family == Family::ConVit => named.image = number(part)?,
                _ => return None,
            }
        }
        Some(named)
    }

    /// Whether it has convolution stages, and no class token.
    pub fn is_convit(&self) -> bool {
        convit::NAMES.contains(&self.size)
    }

    /// Refuses a ConViT where a model is needed that projects patches or has a class token.
    pub fn needs_patches(&self, model: &str, command: &str) -> Result<()> {
        if self.is_convit() {
            return Err(Error::usage(format!(
                "--model {model} is a ConViT, which projects no patches and has no class token; {command} takes plain ViTs, such as {}",
                if self.size.starts_with("glyph") { "glyph_s" } else { "base" }
            )));
        }
        Ok(())
    }

    /// The encoder that is pre-trained, for images of this side.
    pub fn encoder(&self, image: usize) -> Result<VitConfig> {
        if self.is_convit() {
            return convit::encoder(self.size, image);
        }
        let size = mae(self.size, image)?;
        Ok(VitConfig { patch: self.patch, heads: self.heads.unwrap_or(size.heads), ..size })
    }

    /// The classifier's encoder: a plain ViT's unless the name says otherwise.
    pub fn classifier(&self, image: usize, drop_path: f64) -> Result<VitConfig> {
        if self.is_convit() {
            return convit::classifier(self.size, image, drop_path);
        }
        let config = match self.family {
            Some(Family::Distilled) => deit_distilled(self.size, image, drop_path),
            Some(Family::Deit3) => deit3(self.size, image, drop_path),
            _ => vit(self.size, image, drop_path),
        };
        Ok(VitConfig { patch: self.patch, ..config? })
    }
}

/// The decoder of which a name says 512d8b; `own` is the size's.
fn decoder_named(text: &str, own: &DecoderConfig) -> Option<DecoderConfig> {
    let (width, depth) = text.strip_suffix('b')?.split_once('d')?;
    let (width, depth) = (number(width)?, number(depth)?);
    // Published decoders have heads of 32.
    let heads = if width == own.width { own.heads } else { Some(width / 32).filter(|heads| heads * 32 == width)? };
    Some(DecoderConfig { width, depth, heads })
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok().filter(|&number| number > 0)
}

/// Resolves a size or a model's published name; hyphens count as underscores.
pub fn named(model: &str) -> Result<Named> {
    let name = model.replace('-', "_");
    Named::parse(&name).ok_or_else(|| {
        let published = NAMES.iter().flat_map(|size| {
            let patch = if *size == "huge" { 14 } else { 16 };
            [
                size.to_string(),
                format!("mae_vit_{size}_patch{patch}"),
                format!("mae_vit_{size}_patch{patch}_dec512d8b"),
                format!("vit_{size}_patch{patch}"),
                format!("deit_{size}_patch{patch}_224"),
                format!("deit_{size}_distilled_patch{patch}_224"),
                format!("deit_{size}_patch{patch}_LS"),
            ]
        });
        let convits = ["base", "large"].into_iter().flat_map(|size| {
            let dmjd = format!("dmjd_convit_{size}_patch16_dec");
            [format!("convit_{size}_patch16"), format!("{dmjd}8_hog"), format!("{dmjd}512d8b_hog")]
        });
        let convmae = ["convvit_base_patch16", "convmae_convvit_base_patch16", "convmae_convvit_base_patch16_dec512d8b"];
        let convits = convits.chain(convit::NAMES.into_iter().chain(convmae).map(String::from));
        let published: Vec<String> = published.chain(convits).collect();
        let near = nearest(&name, published.iter().map(String::as_str));
        let hint = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
        Error::usage(format!(
            "model {model:?} is unknown{hint}; there are {}, {}, and names such as mae_vit_base_patch16, mae_vit_base_patch16_dec512d8b, \
             vit_base_patch16, deit_small_patch16_224, deit_small_distilled_patch16_224, deit_small_patch16_LS, convvit_base_patch16, \
             convmae_convvit_base_patch16 and dmjd_convit_base_patch16_dec8_hog",
            NAMES.join(", "),
            convit::NAMES.join(", ")
        ))
    })
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

    #[test]
    fn published_names_say_size_patch_family_and_image() {
        for (name, size, patch, family, image) in [
            ("base", "base", 16, None, 224),
            ("huge", "huge", 14, None, 224),
            ("glyph-s", "glyph_s", 8, None, 48),
            ("mae_vit_base_patch16", "base", 16, Some(Family::Mae), 224),
            ("mae_vit_glyph_t_patch8", "glyph_t", 8, Some(Family::Mae), 48),
            ("vit_huge_patch14", "huge", 14, Some(Family::Vit), 224),
            ("vit_large_patch16_384", "large", 16, Some(Family::Vit), 384),
            ("deit_small_patch16_224", "small", 16, Some(Family::Deit), 224),
            ("deit_base_distilled_patch16_384", "base", 16, Some(Family::Distilled), 384),
            ("deit_medium_patch16_LS", "medium", 16, Some(Family::Deit3), 224),
            ("deit3_large_patch16_384", "large", 16, Some(Family::Deit3), 384),
            ("deit_small", "small", 16, Some(Family::Deit), 224),
            ("deit_base_distilled", "base", 16, Some(Family::Distilled), 224),
            ("deit3_huge", "huge", 14, Some(Family::Deit3), 224),
            ("mae_vit_base", "base", 16, Some(Family::Mae), 224),
        ] {
            let found = named(name).unwrap();
            assert_eq!((found.size, found.patch, found.family, found.image), (size, patch, family, image), "{name}");
            assert_eq!(found.encoder(found.image).unwrap().patch, patch, "{name}");
        }
        let heads = |name: &str| named(name).unwrap().encoder(224).unwrap().heads;
        assert_eq!(["tinymim_vit_tiny_patch16", "tinymim_vit_small_patch16", "mae_vit_tiny_patch16"].map(heads), [6, 6, 3]);
        assert!(named("deit_tiny_distilled_patch16_224").unwrap().classifier(224, 0.0).unwrap().distillation_token);
        assert_eq!(named("deit_tiny_patch16_LS").unwrap().classifier(224, 0.1).unwrap().position, Position::LearnedPatches);
        assert_eq!(named("tiny").unwrap().classifier(224, 0.1).unwrap().position, Position::Learned);
    }

    #[test]
    fn a_name_that_says_a_decoder_gets_it() {
        let sizes = |name: &str| {
            let decoder = named(name).unwrap().decoder;
            (decoder.width, decoder.depth, decoder.heads)
        };
        assert_eq!(sizes("mae_vit_base_patch16"), (512, 8, 16));
        assert_eq!(sizes("mae_vit_large_patch16_dec512d8b"), (512, 8, 16));
        assert_eq!(sizes("mae_vit_small_patch16_dec512d2b"), (512, 2, 16));
        assert_eq!(sizes("mae_vit_base_patch16_dec256d4b"), (256, 4, 8));
        assert_eq!(sizes("glyph_s"), (64, 1, 4));
        assert_eq!(sizes("mae_vit_glyph_s_patch8_dec64d2b"), (64, 2, 4));
    }

    #[test]
    fn names_of_convit_say_what_they_are() {
        for (name, size, family, ratio, depth) in [
            ("convvit_base", "convvit_base", None, 4.0, 8),
            ("convvit_base_patch16", "convvit_base", Some(Family::ConVit), 4.0, 8),
            ("convmae-convvit-base-patch16", "convvit_base", Some(Family::ConvMae), 4.0, 8),
            ("convmae_convvit_base_patch16_dec512d8b", "convvit_base", Some(Family::ConvMae), 4.0, 8),
            ("convit_base_patch16", "convit_base", Some(Family::ConVit), 8.0, 8),
            ("convit_large_patch16", "convit_large", Some(Family::ConVit), 8.0, 8),
            ("dmjd_convit_base_patch16_dec2_hog", "convit_base", Some(Family::ConvMae), 8.0, 2),
            ("dmjd_convit_large_patch16_dec512d8b_hog", "convit_large", Some(Family::ConvMae), 8.0, 8),
            ("glyph_conv", "glyph_conv", None, 4.0, 1),
        ] {
            let found = named(name).unwrap();
            assert_eq!((found.size, found.family, found.decoder.depth), (size, family, depth), "{name}");
            let (encoder, classifier) = (found.encoder(found.image).unwrap(), found.classifier(found.image, 0.1).unwrap());
            assert!(found.is_convit() && !encoder.class_token && encoder.position == Position::SinCos, "{name}");
            assert_eq!(classifier.position, Position::LearnedPatches);
            let (before, after) = (encoder.stages.unwrap(), classifier.stages.unwrap());
            assert_eq!((before.mlp_ratios, before.fused, after.fused), ([ratio; 2], true, false), "{name}");
            assert!(found.needs_patches(name, "masque distill").unwrap_err().chain().contains("is a ConViT"));
        }
        let glyph = named("glyph_conv").unwrap();
        assert_eq!((glyph.patch, glyph.image, glyph.decoder.width, glyph.encoder(48).unwrap().grid()), (8, 48, 64, [6, 6]));
        assert!(!named("base").unwrap().is_convit() && named("base").unwrap().needs_patches("base", "x").is_ok());
        for name in [
            "convvit_large_patch16",
            "convvit_base_patch8",
            "convvit_base_patch16_dec512d8b",
            "convmae_convvit_base",
            "convmae_convvit_base_patch16_dec8",
            "convmae_convvit_base_patch16_dec8_hog",
            "convmae_convvit_base_patch16_224",
            "dmjd_convit_base_patch16_dec0_hog",
            "dmjd_convit_base_patch16_dec8_rgb",
            "dmjd_vit_base_patch16",
        ] {
            assert!(named(name).unwrap_err().to_string().contains("convmae_convvit_base_patch16"), "{name}");
        }
        let near = named("dmjd_convit_base_patch16_dec8_hg").unwrap_err().to_string();
        assert!(near.contains("did you mean dmjd_convit_base_patch16_dec8_hog?"), "{near}");
    }

    #[test]
    fn a_name_that_means_nothing_is_answered_with_the_nearest_and_the_list() {
        let said = named("mae_vit_bas_patch16").unwrap_err();
        assert_eq!(said.exit_code(), 2);
        let said = said.to_string();
        assert!(said.contains("did you mean mae_vit_base_patch16?") && said.contains("glyph_s"), "{said}");
        for name in [
            "",
            "giant",
            "vit_base",
            "vit_base_patch",
            "vit_base_patch0",
            "vit_base_patch16_x",
            "vit_base_distilled_patch16",
            "mae_vit_base_patch16_224",
            "mae_vit_base_patch16_dec500d8b",
            "mae_vit_base_patch16_dec512d0b",
            "vit_base_patch16_LS",
            "deit_base_patch16_dec512d8b",
        ] {
            assert!(named(name).is_err(), "{name}");
        }
    }
}
