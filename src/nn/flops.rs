//! How much a forward pass multiplies: multiply-accumulates of one image, twice which is its FLOPs.
//!
//!   block of n tokens   4 n D^2 (qkv, proj) + 2 n D hidden (MLP) + 2 n^2 D (attention); 12 n D^2 + 2 n^2 D for a hidden width of 4 D
//!   encoder             K D P (projection of K kept patches of P numbers) + the blocks on K + extra tokens
//!   ConViT's stages     in the place of the projection, for each kept patch: embeddings, N (2 D^2 + 2 D hidden + 25 D) a block of N tokens, the fused outputs
//!   decoder             (K + extra) D D' + the blocks on L + extra tokens + (L + extra) D' P, or the numbers of another target for P
//!   classifier          encoder on all patches + D classes for each head
//!
//! As the papers count: norms, softmax, GELU and sums are left out, and the decoder's last layer is counted on all of its tokens. A backward
//! pass costs twice the forward of what is trained.

use super::cait::CaitConfig;
use super::decoder::DecoderConfig;
use super::stages::StagesConfig;
use super::vit::VitConfig;

fn block(tokens: u64, width: u64, hidden: u64) -> u64 {
    4 * tokens * width * width + 2 * tokens * width * hidden + 2 * tokens * tokens * width
}

/// A width behind an MLP's first layer.
fn hidden(width: usize, ratio: f64) -> u64 {
    (width as f64 * ratio) as u64
}

/// The encoder on `kept` patches and the tokens in front of them.
pub fn vit_macs(vit: &VitConfig, kept: usize) -> u64 {
    let (width, patches) = (vit.width as u64, kept as u64);
    let embed = patches * vit.stages.as_ref().map_or(width * vit.patch_values() as u64, |stages| stages_macs(vit, stages));
    embed + vit.depth as u64 * block(patches + vit.extra() as u64, width, hidden(vit.width, vit.mlp_ratio))
}

/// ConViT's stages for one patch.
pub fn stages_macs(vit: &VitConfig, stages: &StagesConfig) -> u64 {
    let ([p1, p2, p3], [e1, e2], e3) = (stages.patches, stages.widths, vit.width);
    let tokens = [0, 1].map(|stage| stages.layout(stage).tokens());
    let embeds = tokens[0] * e1 * p1 * p1 * vit.channels + tokens[1] * e2 * p2 * p2 * e1 + e3 * p3 * p3 * e2 + e3 * e3;
    let stage = |i: usize| {
        let width = stages.widths[i] as u64;
        let block = 2 * width * width + 2 * width * hidden(stages.widths[i], stages.mlp_ratios[i]) + 25 * width;
        let output = if stages.fused { tokens[i] as u64 * width * e3 as u64 } else { 0 };
        stages.depths[i] as u64 * tokens[i] as u64 * block + output
    };
    embeds as u64 + stage(0) + stage(1)
}

/// MAE's decoder of this encoder, which saw `kept` patches.
pub fn decoder_macs(decoder: &DecoderConfig, vit: &VitConfig, kept: usize) -> u64 {
    predictor_macs(decoder, vit, vit.patch_values(), kept)
}

/// The same of one that predicts `out` numbers of each patch.
pub fn predictor_macs(decoder: &DecoderConfig, vit: &VitConfig, out: usize, kept: usize) -> u64 {
    let (width, all) = (decoder.width as u64, (vit.patches() + vit.extra()) as u64);
    let embed = (kept + vit.extra()) as u64 * vit.width as u64 * width;
    let blocks = decoder.depth as u64 * block(all, width, hidden(decoder.width, vit.decoder_mlp_ratio()));
    embed + blocks + all * width * out as u64
}

/// A classifier on all patches.
pub fn classifier_macs(vit: &VitConfig, classes: usize) -> u64 {
    masked_classifier_macs(vit, vit.patches(), classes)
}

/// A classifier whose blocks see `kept` patches. As MaskedKD counts, all patches are projected first.
pub fn masked_classifier_macs(vit: &VitConfig, kept: usize, classes: usize) -> u64 {
    let heads = 1 + u64::from(vit.distillation_token);
    vit_macs(vit, kept) + hidden_projections(vit, kept) + heads * vit.width as u64 * classes as u64
}

/// Projections of the patches that are not kept.
fn hidden_projections(vit: &VitConfig, kept: usize) -> u64 {
    vit.patches().saturating_sub(kept) as u64 * vit.width as u64 * vit.patch_values() as u64
}

/// CaiT whose blocks see `kept` patches, counted alike.
///
///   block of n tokens        that of a ViT + 2 n^2 heads^2 for heads that talk before and behind the softmax
///   block of the class token 2 (n + 1) D^2 (k, v) + 2 D^2 (q, proj) + 2 D hidden + 2 (n + 1) D
pub fn cait_macs(cait: &CaitConfig, kept: usize) -> u64 {
    let (vit, n, width) = (&cait.vit, kept as u64, cait.vit.width as u64);
    let (inside, heads) = (hidden(vit.width, vit.mlp_ratio), vit.heads as u64);
    let embed = vit.patches().max(kept) as u64 * width * vit.patch_values() as u64;
    let blocks = vit.depth as u64 * (block(n, width, inside) + 2 * n * n * heads * heads);
    let class_block = 2 * (n + 1) * width * width + 2 * width * width + 2 * width * inside + 2 * (n + 1) * width;
    embed + blocks + cait.class_blocks as u64 * class_block + width * cait.classes as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::presets;

    /// In units of 10^9 with this many decimals, rounded.
    #[track_caller]
    fn rounds_to(macs: u64, giga: &str) {
        let decimals = giga.split_once('.').map_or(0, |(_, decimals)| decimals.len());
        assert_eq!(format!("{:.decimals$}", macs as f64 / 1e9), giga, "{macs}");
    }

    #[test]
    fn pre_training_costs_what_is_published() {
        for (size, embed, full, masked, decoder, total, one_block) in [
            ("tiny", "0.029", "1.225", "0.277", "5.358", "5.664", "1.048"),
            ("small", "0.058", "4.541", "1.085", "5.363", "6.505", "1.889"),
            ("base", "0.116", "17.447", "4.293", "5.373", "9.781", "5.165"),
            ("large", "0.154", "61.400", "15.222", "5.379", "20.756", "16.140"),
            ("huge", "0.193", "167.101", "41.241", "7.129", "48.562", "42.429"),
        ] {
            let (vit, decoder_config) = (presets::mae(size, 224).unwrap(), presets::mae_decoder());
            let (all, kept) = (vit.patches(), vit.patches() / 4);
            let project = |patches: usize| (patches * vit.width * vit.patch_values()) as u64;
            rounds_to(project(all), embed);
            rounds_to(vit_macs(&vit, all) - project(all), full);
            rounds_to(vit_macs(&vit, kept) - project(kept), masked);
            rounds_to(decoder_macs(&decoder_config, &vit, kept), decoder);
            // The published totals project all patches.
            let sum = |decoder: &DecoderConfig| vit_macs(&vit, kept) + project(all - kept) + decoder_macs(decoder, &vit, kept);
            rounds_to(sum(&decoder_config), total);
            rounds_to(sum(&DecoderConfig { depth: 1, ..decoder_config.clone() }), one_block);
        }
    }

    #[test]
    fn classifiers_cost_what_is_published() {
        for (size, giga) in [("tiny", "1.254"), ("small", "4.599"), ("base", "17.564"), ("large", "61.6"), ("huge", "167.3")] {
            rounds_to(classifier_macs(&presets::vit(size, 224, 0.0).unwrap(), 1000), giga);
        }
        rounds_to(classifier_macs(&presets::vit("base", 384, 0.0).unwrap(), 1000), "55.5");
    }

    #[test]
    fn a_teacher_on_kept_patches_costs_what_is_published() {
        for (kept, sizes) in [
            (196, ["1.254", "4.599", "17.564", "61.555"]),
            (180, ["1.141", "4.203", "16.093", "56.426"]),
            (160, ["1.003", "3.716", "14.269", "50.050"]),
            (147, ["0.916", "3.403", "13.090", "45.926"]),
            (144, ["0.896", "3.331", "12.819", "44.977"]),
            (120, ["0.739", "2.762", "10.663", "37.416"]),
            (98, ["0.600", "2.251", "8.706", "30.534"]),
            (80, ["0.489", "1.839", "7.117", "24.939"]),
            (60, ["0.370", "1.388", "5.366", "18.759"]),
            (49, ["0.306", "1.143", "4.409", "15.378"]),
            (30, ["0.198", "0.725", "2.767", "9.564"]),
            (20, ["0.143", "0.508", "1.908", "6.519"]),
        ] {
            for (size, giga) in ["tiny", "small", "base", "large"].into_iter().zip(sizes) {
                rounds_to(masked_classifier_macs(&presets::vit(size, 224, 0.0).unwrap(), kept, 1000), giga);
            }
        }
        for (kept, giga) in [(256, "167.30"), (192, "124.67"), (128, "82.72"), (64, "41.43")] {
            rounds_to(masked_classifier_macs(&presets::deit3("huge", 224, 0.0).unwrap(), kept, 1000), giga);
        }
        for (kept, giga) in [(196, "9.33"), (144, "6.71"), (98, "4.49")] {
            rounds_to(cait_macs(&presets::cait_s24(224, 1000), kept), giga);
        }
    }

    #[test]
    fn whole_steps_cost_what_the_table_of_floors_says() {
        // GFLOPs of an image: of what is trained forward and backward, thrice the forward pass; of a teacher once. The table projects patches that nobody sees.
        #[track_caller]
        fn step(trained: u64, unprojected: u64, teacher: u64, giga: &str) {
            let all = 3 * (trained + unprojected) + teacher;
            assert_eq!(format!("{:.1}", 2e-9 * all as f64), giga, "{trained} {teacher}");
        }
        let (decoder, shallow) = (presets::mae_decoder(), DecoderConfig { depth: 1, ..presets::mae_decoder() });
        let mae = |vit: &VitConfig, decoder: &DecoderConfig, kept: usize| vit_macs(vit, kept) + decoder_macs(decoder, vit, kept);
        let [tiny, base, large] = ["tiny", "base", "large"].map(|size| presets::mae(size, 224).unwrap());
        for (vit, decoder, kept, giga) in [
            (&base, &decoder, 49, "58.7"),
            (&base, &decoder, 196, "138.0"),
            (&base, &shallow, 49, "31.0"),
            (&large, &decoder, 49, "124.5"),
            (&large, &shallow, 49, "96.8"),
            (&tiny, &decoder, 49, "34.0"),
        ] {
            step(mae(vit, decoder, kept), hidden_projections(vit, kept), 0, giga);
        }
        // MaskedKD, counted as it is published.
        let [tiny, small, base] = ["tiny", "small", "base"].map(|size| presets::vit(size, 224, 0.0).unwrap());
        for (student, teacher, kept, giga) in [
            (&tiny, &small, 196, "16.7"),
            (&tiny, &small, 98, "12.0"),
            (&tiny, &small, 49, "9.8"),
            (&small, &base, 196, "62.7"),
            (&small, &base, 98, "45.0"),
            (&small, &base, 49, "36.4"),
        ] {
            step(classifier_macs(student, 1000), 0, masked_classifier_macs(teacher, kept, 1000), giga);
        }
    }

    #[test]
    fn convit_costs_the_sum_of_its_terms() {
        // ConvMAE's base: tokens of 4 pixels 256 wide, of 8 pixels 384 wide, of 16 pixels 768 wide; two blocks in each convolution stage.
        let (vit, all) = (presets::named("convvit_base_patch16").unwrap().classifier(224, 0.0).unwrap(), 14 * 14);
        let embeds = 56 * 56 * 256 * (4 * 4 * 3) + 28 * 28 * 384 * (2 * 2 * 256) + all * 768 * (2 * 2 * 384) + all * 768 * 768;
        let block = |width: u64| 2 * width * width + 2 * width * 4 * width + 25 * width;
        let stages = 2 * 56 * 56 * block(256) + 2 * 28 * 28 * block(384);
        let blocks = 11 * (12 * all * 768 * 768 + 2 * all * all * 768);
        assert_eq!(vit_macs(&vit, 196), embeds + stages + blocks);
        assert_eq!(classifier_macs(&vit, 1000), embeds + stages + blocks + 768 * 1000);

        // In pre-training a quarter of everything but for attention, and views of what both stages end with; the decoder sees all tokens.
        let named = presets::named("convmae_convvit_base_patch16").unwrap();
        let (vit, kept) = (named.encoder(224).unwrap(), 49);
        let views = kept * 768 * (4 * 4 * 256 + 2 * 2 * 384);
        let seen = (embeds + stages) / 4 + views + 11 * (12 * kept * 768 * 768 + 2 * kept * kept * 768);
        assert_eq!(vit_macs(&vit, 49), seen);
        let decoder = kept * 768 * 512 + 8 * (12 * all * 512 * 512 + 2 * all * all * 512) + all * 512 * 768;
        assert_eq!(decoder_macs(&named.decoder, &vit, 49), decoder);
        // DMJD's has ratios of 8 in both stages and in the decoder.
        let wider = presets::named("dmjd_convit_base_patch16_dec8_hog").unwrap();
        let more = 2 * (16 * kept * 8 * 256 * 256 + 4 * kept * 8 * 384 * 384);
        assert_eq!(vit_macs(&wider.encoder(224).unwrap(), 49), seen + more);
        let more = 8 * 8 * all * 512 * 512;
        assert_eq!(decoder_macs(&wider.decoder, &wider.encoder(224).unwrap(), 49), decoder + more);
    }

    #[test]
    fn a_second_head_and_a_second_token_are_counted() {
        let (one, two) = (presets::vit("base", 224, 0.0).unwrap(), presets::deit_distilled("base", 224, 0.0).unwrap());
        let (n, d) = (197, 768);
        let token = 12 * (12 * d * d + 2 * d * ((n + 1) * (n + 1) - n * n));
        assert_eq!(classifier_macs(&two, 1000) - classifier_macs(&one, 1000), token + d * 1000);
    }
}
