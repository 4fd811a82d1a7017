//! ConViT's published sizes: the encoders of ConvMAE and of DMJD, which is wider inside the MLPs of stages 1 and 2.
//!
//!   convvit_base   ConvMAE's       convit_base, convit_large   DMJD's       glyph_conv   for the built-in images

use super::stages::StagesConfig;
use super::vit::{DropPath, Position, VitConfig};
use crate::error::{Error, Result};

struct Size {
    name: &'static str,
    patches: [usize; 3],
    /// Stages 1 and 2: widths, blocks, MLP ratios.
    widths: [usize; 2],
    depths: [usize; 2],
    ratios: [f64; 2],
    /// Stage 3: width, blocks, heads.
    transformer: [usize; 3],
}

/// Of the norms in the stages.
pub const STAGE_EPS: f64 = 1e-5;

const PATCHES: [usize; 3] = [4, 2, 2];

const SIZES: [Size; 4] = [
    Size { name: "convvit_base", patches: PATCHES, widths: [256, 384], depths: [2, 2], ratios: [4.0, 4.0], transformer: [768, 11, 12] },
    Size { name: "convit_base", patches: PATCHES, widths: [256, 384], depths: [2, 2], ratios: [8.0, 8.0], transformer: [768, 11, 12] },
    Size { name: "convit_large", patches: PATCHES, widths: [384, 768], depths: [2, 2], ratios: [8.0, 8.0], transformer: [1024, 23, 16] },
    Size { name: "glyph_conv", patches: [2, 2, 2], widths: [16, 32], depths: [1, 1], ratios: [4.0, 4.0], transformer: [64, 3, 4] },
];

/// The sizes there are.
pub const NAMES: [&str; 4] = [SIZES[0].name, SIZES[1].name, SIZES[2].name, SIZES[3].name];

/// The encoder that is pre-trained: fixed sines, and the ends of its stages added behind the last block.
pub fn encoder(size: &str, image: usize) -> Result<VitConfig> {
    let found = SIZES.iter().find(|known| known.name == size);
    let size = found.ok_or_else(|| Error::usage(format!("ConViT {size} is unknown; there are {}", NAMES.join(", "))))?;
    let [width, depth, heads] = size.transformer;
    let stages = StagesConfig {
        patches: size.patches,
        widths: size.widths,
        depths: size.depths,
        mlp_ratios: size.ratios,
        eps: STAGE_EPS,
        fused: true,
    };
    let patch = stages.patch();
    Ok(VitConfig { class_token: false, stages: Some(stages), ..VitConfig::new(image, patch, width, depth, heads) })
}

/// The classifier's: learned positions, nothing is fused, stochastic depth grows over the blocks of all stages.
pub fn classifier(size: &str, image: usize, drop_path: f64) -> Result<VitConfig> {
    let encoder = encoder(size, image)?;
    let stages = encoder.stages.clone().map(|stages| StagesConfig { fused: false, ..stages });
    Ok(VitConfig { position: Position::LearnedPatches, stages, drop_path: DropPath::Linear(drop_path), ..encoder })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Start;
    use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
    use crate::nn::decoder::{Decoder, DecoderTokens};
    use crate::nn::presets::named;
    use crate::nn::vit::{Tokens, Vit};
    use crate::param::ParamsBuilder;

    fn classifier_of(size: &str, pool: Pool, probe: bool) -> ParamsBuilder {
        let mut b = ParamsBuilder::default();
        let vit = classifier(size, 224, 0.1).unwrap();
        Classifier::new(&mut b, ClassifierConfig { vit, classes: 1000, pool, probe }).unwrap();
        b
    }

    /// The model that is pre-trained, predicting `out` numbers of each patch.
    fn pre_trained(name: &str, out: usize) -> ParamsBuilder {
        let (mut b, named) = (ParamsBuilder::default(), named(name).unwrap());
        let vit = named.encoder(224).unwrap();
        let tokens = Tokens::new(&mut b, &vit).unwrap();
        let decoder_tokens = DecoderTokens::new(&mut b, &named.decoder, &vit).unwrap();
        let vit = Vit::new(&mut b, vit, tokens, true, Start::Xavier).unwrap();
        Decoder::predicting(out, &mut b, &named.decoder, &vit.config, decoder_tokens, Start::Xavier).unwrap();
        b
    }

    #[test]
    fn classifiers_have_the_published_parameters() {
        for (size, count, entries) in
            [("convvit_base", 85_374_824, 207), ("convit_base", 88_787_816, 207), ("convit_large", 322_977_384, 351)]
        {
            for pool in [Pool::Mean, Pool::ClassToken] {
                let b = classifier_of(size, pool, false);
                assert_eq!((b.count_trained(), b.names().count()), (count, entries), "{size} {pool:?}");
            }
        }
    }

    #[test]
    fn pre_trained_models_have_the_published_parameters() {
        let b = pre_trained("convmae_convvit_base_patch16", 768);
        assert_eq!((b.count(), b.count_trained(), b.names().count()), (115_041_408, 114_790_528, 313));
        // DMJD's two heads for visible patches: three linear layers of which two have a norm with weights, and a predictor of 108 numbers.
        let heads = |width: usize| (width * 512 + 512) + 2 * (512 * 512 + 512) + 2 * (512 + 512) + (512 * 108 + 108);
        for (name, width, all, trained, entries) in [
            ("dmjd_convit_base_patch16_dec8_hog", 768, 135_885_912, Some(135_635_032), 325),
            ("dmjd_convit_base_patch16_dec512d8b_hog", 768, 135_885_912, Some(135_635_032), 325),
            ("dmjd_convit_base_patch16_dec2_hog", 768, 104_376_408, None, 253),
            ("dmjd_convit_base_patch16_dec512d2b_hog", 768, 104_376_408, None, 253),
            ("dmjd_convit_large_patch16_dec8_hog", 1024, 375_193_944, Some(374_892_888), 469),
        ] {
            let b = pre_trained(name, 108);
            assert_eq!((b.count() + heads(width), b.names().count() + 12), (all, entries), "{name}");
            assert!(trained.is_none_or(|trained| trained == b.count_trained() + heads(width)), "{name}");
        }
    }

    /// The names' first parts, each once.
    fn parts(b: &ParamsBuilder) -> Vec<String> {
        let mut parts: Vec<String> = b.names().map(|name| name.split('.').next().unwrap().to_string()).collect();
        parts.dedup();
        parts
    }

    #[test]
    fn tensors_stand_in_the_published_order() {
        let embeds = "patch_embed1 patch_embed2 patch_embed3 patch_embed4";
        let of = |b: &ParamsBuilder| parts(b).join(" ");
        let blocks = "blocks1 blocks2 blocks3";
        assert_eq!(of(&classifier_of("convvit_base", Pool::Mean, false)), format!("pos_embed {embeds} {blocks} head fc_norm"));
        assert_eq!(of(&classifier_of("convvit_base", Pool::ClassToken, false)), format!("pos_embed {embeds} {blocks} norm head"));
        assert_eq!(
            of(&pre_trained("convmae_convvit_base_patch16", 768)),
            format!(
                "pos_embed mask_token decoder_pos_embed {embeds} stage1_output_decode stage2_output_decode {blocks} norm decoder_embed decoder_blocks \
                 decoder_norm decoder_pred"
            )
        );
        let b = classifier_of("convvit_base", Pool::Mean, true);
        let inside: Vec<&str> = b.names().filter_map(|name| name.strip_prefix("blocks2.1.")).collect();
        let order = ["norm1", "conv1", "conv2", "attn", "norm2", "mlp.fc1", "mlp.fc2"];
        assert_eq!(inside, order.map(|part| [format!("{part}.weight"), format!("{part}.bias")]).concat());
        let head: Vec<&str> = b.names().filter(|name| name.starts_with("head")).collect();
        assert_eq!(head, ["head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias"]);
    }

    #[test]
    fn stochastic_depth_grows_over_the_blocks_of_all_stages() {
        let vit = classifier("convvit_base", 224, 0.1).unwrap();
        let rates: Vec<f64> = (0..15).map(|i| vit.drop_rate(i)).collect();
        assert!((rates[1] - 0.1 / 14.0).abs() < 1e-15 && rates[0] == 0.0 && (rates[14] - 0.1).abs() < 1e-15, "{rates:?}");
        assert_eq!([vit.block(0).drop_path, vit.block(10).drop_path], [rates[4], rates[14]]);
        assert_eq!(classifier("convit_large", 224, 0.2).unwrap().drop_rate(26), 0.2);
    }
}
