//! MAE's recipes: pre-training, fine-tuning, linear probing, training from scratch.

use super::{GLYPHS_LABELLED, GLYPHS_PROBE, Preset, glyphs, preset};

/// Size in names of presets, the program's name, what a person calls it, the patch.
const SIZES: [(&str, &str, &str, usize); 5] = [
    ("t", "tiny", "Tiny", 16),
    ("s", "small", "Small", 16),
    ("b", "base", "Base", 16),
    ("l", "large", "Large", 16),
    ("h", "huge", "Huge", 14),
];

pub fn all() -> Vec<Preset> {
    let mut all = vec![
        glyphs(
            "glyphs-pretrain",
            "pretrain mae",
            "built-in images: MAE of a small ViT, some two minutes on two cores",
            &[
                ("epochs", "24"),
                ("warmup-epochs", "1"),
                ("lr", "3e-3"),
                ("eval-freq", "2"),
                ("weight-decay", "0.05"),
                ("mask-ratio", "0.75"),
                ("norm-pix-loss", "true"),
                ("norm-pix-eps", "0.01"),
                ("crop", "whole"),
            ],
        ),
        glyphs(
            "glyphs-finetune",
            "finetune",
            "built-in images: fine-tuning on 2000 labels, ten epochs; give the encoder by --finetune",
            &[&GLYPHS_LABELLED[..], &[("layer-decay", "0.75"), ("head-std", "0.01")]].concat(),
        ),
        glyphs(
            "glyphs-scratch",
            "finetune",
            "built-in images: the same steps from scratch",
            &[&GLYPHS_LABELLED[..], &[("layer-decay", "1"), ("start", "xavier")]].concat(),
        ),
        glyphs("glyphs-probe", "probe", "built-in images: a linear head on 2000 labels", &GLYPHS_PROBE),
    ];
    for (letter, size, called, patch) in SIZES {
        let pretrained = format!("mae_vit_{size}_patch{patch}");
        for (ending, epochs, target) in [("800ep", "800", true), ("1600ep", "1600", true), ("800ep-pixels", "800", false)] {
            all.push(preset(
                format!("mae-vit-{letter}-{ending}"),
                "pretrain mae",
                format!(
                    "ImageNet: MAE of ViT-{called}, {epochs} epochs, batch 4096, {} pixels{}",
                    if target { "normalised" } else { "raw" },
                    if "tsb".contains(letter) && letter != "b" { " (MAE's recipe for a size it does not publish)" } else { "" }
                ),
                &[
                    ("model", &pretrained),
                    ("batch-size", "64"),
                    ("accum-iter", "64"),
                    ("epochs", epochs),
                    ("warmup-epochs", "40"),
                    ("blr", "1.5e-4"),
                    ("weight-decay", "0.05"),
                    ("mask-ratio", "0.75"),
                    ("norm-pix-loss", if target { "true" } else { "false" }),
                    ("input-size", "224"),
                    ("crop-min", "0.2"),
                ],
            ));
        }
        let model = format!("vit_{size}_patch{patch}");
        let common = |epochs, blr, layer_decay, drop_path| {
            vec![
                ("model", model.as_str()),
                ("batch-size", "32"),
                ("accum-iter", "32"),
                ("epochs", epochs),
                ("warmup-epochs", "5"),
                ("blr", blr),
                ("min-lr", "1e-6"),
                ("weight-decay", "0.05"),
                ("layer-decay", layer_decay),
                ("drop-path", drop_path),
                ("mixup", "0.8"),
                ("cutmix", "1.0"),
                ("smoothing", "0.1"),
                ("aa", "rand-m9-mstd0.5-inc1"),
                ("input-size", "224"),
            ]
        };
        let (epochs, blr, decay, drop) = match letter {
            "t" | "s" | "b" => ("100", "5e-4", "0.65", "0.1"),
            "l" => ("50", "1e-3", "0.75", "0.2"),
            _ => ("50", "1e-3", "0.75", "0.3"),
        };
        let unpublished = if matches!(letter, "t" | "s") { " (the recipe of Base)" } else { "" };
        all.push(preset(
            format!("mae-vit-{letter}-finetune"),
            "finetune",
            format!("ImageNet: fine-tuning ViT-{called} pre-trained on normalised pixels, batch 1024{unpublished}"),
            &[&common(epochs, blr, decay, drop)[..], &[("reprob", "0.25")]].concat(),
        ));
        let drop = if letter == "h" { "0.2" } else { "0.1" };
        let epochs = if matches!(letter, "t" | "s" | "b") { "100" } else { "50" };
        all.push(preset(
            format!("mae-vit-{letter}-finetune-paper"),
            "finetune",
            format!("ImageNet: the paper's Table 9, for ViT-{called} pre-trained on raw pixels, batch 1024{unpublished}"),
            &[&common(epochs, "1e-3", "0.75", drop)[..], &[("reprob", "0")]].concat(),
        ));
        all.push(preset(
            format!("mae-vit-{letter}-linprobe"),
            "probe",
            format!("ImageNet: linear probing of ViT-{called}, LARS, batch 16384{unpublished}"),
            &[
                ("model", &model),
                ("batch-size", "512"),
                ("accum-iter", "32"),
                ("epochs", "90"),
                ("warmup-epochs", "10"),
                ("blr", "0.1"),
                ("weight-decay", "0"),
                ("global-pool", "false"),
                ("input-size", "224"),
                ("crop", "once"),
            ],
        ));
        let (epochs, drop) = if matches!(letter, "l" | "h") { ("200", "0.2") } else { ("300", "0.1") };
        all.push(preset(
            format!("mae-vit-{letter}-scratch"),
            "finetune",
            format!("ImageNet: ViT-{called} from scratch, the paper's Table 11, batch 4096{unpublished}"),
            &[
                ("model", &model),
                ("batch-size", "64"),
                ("accum-iter", "64"),
                ("epochs", epochs),
                ("warmup-epochs", "20"),
                ("blr", "1e-4"),
                ("min-lr", "0"),
                ("weight-decay", "0.3"),
                ("betas", "0.9,0.95"),
                ("layer-decay", "1"),
                ("drop-path", drop),
                ("mixup", "0.8"),
                ("cutmix", "1.0"),
                ("smoothing", "0.1"),
                ("aa", "rand-m9-mstd0.5-inc1"),
                ("reprob", "0"),
                ("model-ema-decay", "0.9999"),
                ("input-size", "224"),
            ],
        ));
    }
    all
}
