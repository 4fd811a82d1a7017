//! Recipes of classifiers that learn from a teacher, and DeiT's and DeiT-III's own.

use super::{GLYPHS_LABELLED, Preset, glyphs, preset};

/// DeiT: 300 epochs of 1024 images; MaskedKD trains its students with it.
const DEIT: [(&str, &str); 15] = [
    ("batch-size", "128"),
    ("accum-iter", "8"),
    ("epochs", "300"),
    ("lr", "5e-4"),
    ("warmup-epochs", "5"),
    ("warmup-lr", "1e-6"),
    ("min-lr", "1e-5"),
    ("weight-decay", "0.05"),
    ("smoothing", "0.1"),
    ("drop-path", "0.1"),
    ("mixup", "0.8"),
    ("cutmix", "1.0"),
    ("aa", "rand-m9-mstd0.5-inc1"),
    ("repeated-aug", "true"),
    ("input-size", "224"),
];

/// DeiT-III: 2048 images, LAMB, binary cross-entropy, ThreeAugment.
const DEIT3: [(&str, &str); 18] = [
    ("batch-size", "64"),
    ("accum-iter", "32"),
    ("epochs", "800"),
    ("opt", "lamb"),
    ("unscale-lr", "true"),
    ("warmup-epochs", "5"),
    ("warmup-lr", "1e-6"),
    ("min-lr", "1e-5"),
    ("weight-decay", "0.05"),
    ("smoothing", "0"),
    ("mixup", "0.8"),
    ("cutmix", "1.0"),
    ("bce-loss", "true"),
    ("three-augment", "true"),
    ("color-jitter", "0.3"),
    ("aa", "none"),
    ("reprob", "0"),
    ("eval-crop-ratio", "1"),
];

/// Name's letter, the program's name, what a person calls it, patch.
const SIZES: [(&str, &str, &str, usize); 5] = [
    ("t", "tiny", "Tiny", 16),
    ("s", "small", "Small", 16),
    ("b", "base", "Base", 16),
    ("l", "large", "Large", 16),
    ("h", "huge", "Huge", 14),
];

/// Students and teachers of MaskedKD's Table 1, and the numbers of patches that their teachers see there.
const MASKED: [(&str, &str, &str, &str, &[&str]); 7] = [
    ("maskedkd-deit-t-from-deit-s", "tiny", "deit_small", "DeiT-Small", &["196", "144", "98", "80"]),
    ("maskedkd-deit-t-from-deit3-s", "tiny", "deit3_small", "DeiT-III-Small", &["196", "98", "49"]),
    ("maskedkd-deit-t-from-deit3-b", "tiny", "deit3_base", "DeiT-III-Base", &["196", "98", "49"]),
    ("maskedkd-deit-t-from-cait-s24", "tiny", "caits_24", "CaiT-S24", &["196", "144", "98"]),
    ("maskedkd-deit-s-from-deit-b", "small", "deit_base", "DeiT-Base", &["196", "144", "98"]),
    ("maskedkd-deit-s-from-deit3-b", "small", "deit3_base", "DeiT-III-Base", &["196", "144", "98"]),
    ("maskedkd-deit-b-from-deit3-l", "base", "deit3_large", "DeiT-III-Large", &["196", "144", "98"]),
];

pub fn all() -> Vec<Preset> {
    let mut all = built_in();
    for (letter, size, called, patch) in SIZES {
        if matches!(letter, "t" | "s" | "b") {
            let model = format!("deit_{size}_patch{patch}_224");
            let own = [("model", model.as_str()), ("reprob", "0.25"), ("model-ema-decay", "0.99996")];
            let about = format!("ImageNet: DeiT-{called} from labels, 300 epochs, batch 1024");
            all.push(preset(format!("deit-{letter}"), "train", about, &[&own[..], &DEIT].concat()));
            let model = format!("deit_{size}_distilled_patch{patch}_224");
            let own = [("model", model.as_str()), ("reprob", "0.25"), ("distillation-type", "hard"), ("model-ema-decay", "0.99996")];
            let about = format!(
                "ImageNet: distilled DeiT-{called}, hard labels of a teacher; give it by --teacher-path (DeiT's own was a RegNet, which is not built)"
            );
            all.push(preset(format!("deit-{letter}-distilled"), "distill deit", about, &[&own[..], &DEIT].concat()));
        }
        let (lr, side, drop) = match letter {
            "t" | "s" => ("4e-3", "224", "0.05"),
            "b" => ("3e-3", "192", "0.2"),
            "l" => ("3e-3", "192", "0.45"),
            _ => ("3e-3", "160", "0.6"),
        };
        let model = format!("deit_{size}_patch{patch}_LS");
        let side = if letter == "h" { "154" } else { side };
        let own = [("model", model.as_str()), ("lr", lr), ("input-size", side), ("drop-path", drop)];
        let unpublished = match letter {
            "t" => " (the recipe of Small)",
            "h" => " (154 pixels, as patches of 14 do not divide the published 160)",
            _ => "",
        };
        let about = format!("ImageNet: DeiT-III-{called} from labels, 800 epochs at {side} pixels, batch 2048{unpublished}");
        all.push(preset(format!("deit3-{letter}"), "train", about, &[&own[..], &DEIT3].concat()));
        for (side, drop) in finetuned(letter) {
            let own = [("model", model.as_str()), ("input-size", *side), ("drop-path", *drop)];
            let common = [
                ("batch-size", "32"),
                ("accum-iter", "16"),
                ("epochs", "20"),
                ("lr", "1e-5"),
                ("unscale-lr", "true"),
                ("warmup-epochs", "5"),
                ("weight-decay", "0.1"),
                ("smoothing", "0.1"),
                ("mixup", "0.8"),
                ("cutmix", "1.0"),
                ("aa", "rand-m9-mstd0.5-inc1"),
                ("reprob", "0"),
                ("repeated-aug", "false"),
                ("eval-crop-ratio", "1"),
            ];
            let about = format!("ImageNet: DeiT-III-{called} fine-tuned at {side} pixels, 20 epochs, batch 512; give it by --finetune");
            all.push(preset(format!("deit3-{letter}-finetune-{side}"), "train", about, &[&own[..], &common].concat()));
        }
        if let Some((epochs, drop, after)) = large_set(letter) {
            let own = [
                ("model", model.as_str()),
                ("epochs", epochs),
                ("drop-path", drop),
                ("input-size", if letter == "h" { "126" } else { "224" }),
                ("lr", "1e-3"),
                ("weight-decay", "0.02"),
                ("smoothing", "0.1"),
                ("mixup", "0"),
                ("bce-loss", "false"),
                ("repeated-aug", "false"),
                ("crop", "simple"),
            ];
            let rest: Vec<_> = DEIT3.iter().filter(|(flag, _)| own.iter().all(|(other, _)| other != flag)).copied().collect();
            let side = if letter == "h" { " (126 pixels, as patches of 14 do not divide the published 128)" } else { "" };
            let about = format!("ImageNet-21k: DeiT-III-{called} from labels, {epochs} epochs, batch 2048{side}");
            all.push(preset(format!("deit3-{letter}-21k"), "train", about, &[&own[..], &rest].concat()));
            let own = own.map(|(flag, value)| match flag {
                "epochs" => (flag, "50"),
                "lr" => (flag, "3e-4"),
                "drop-path" => (flag, after),
                "input-size" => (flag, "224"),
                _ => (flag, value),
            });
            let about = format!("ImageNet: DeiT-III-{called} after ImageNet-21k, 50 epochs, batch 2048; give it by --finetune");
            all.push(preset(format!("deit3-{letter}-21k-finetune"), "train", about, &[&own[..], &rest].concat()));
        }
    }
    let own = [
        ("model", "deit_base_patch16_384"),
        ("batch-size", "32"),
        ("accum-iter", "16"),
        ("epochs", "30"),
        ("lr", "5e-6"),
        ("min-lr", "5e-6"),
        ("weight-decay", "1e-8"),
        ("reprob", "0.25"),
        ("eval-crop-ratio", "0.875"),
        ("input-size", "384"),
        ("train-mode", "false"),
    ];
    let rest: Vec<_> = DEIT.iter().filter(|(flag, _)| own.iter().all(|(other, _)| other != flag)).copied().collect();
    let about = "ImageNet: DeiT-Base fine-tuned at 384 pixels, 30 epochs, batch 512; give it by --finetune";
    all.push(preset("deit-b-finetune-384", "train", about, &[&own[..], &rest].concat()));
    for (name, size, teacher, called, keeps) in MASKED {
        for keep in keeps {
            let model = format!("deit_{size}_patch16_224");
            let own = [
                ("model", model.as_str()),
                ("teacher-model", teacher),
                ("len-num-keep", *keep),
                ("distillation-type", "soft"),
                ("distillation-alpha", "0.5"),
                ("distillation-tau", "1"),
                // The first release erases nothing, later ones do; the published logs came with the first.
                ("reprob", "0"),
            ];
            let about =
                format!("ImageNet: MaskedKD of DeiT-{size} from {called}, which sees {keep} of 196 patches; give it by --teacher-path");
            all.push(preset(format!("{name}-{keep}"), "distill maskedkd", about, &[&own[..], &DEIT].concat()));
        }
    }
    all
}

/// Sides and stochastic depth that DeiT-III is fine-tuned with.
fn finetuned(letter: &str) -> &'static [(&'static str, &'static str)] {
    match letter {
        "s" => &[("384", "0")],
        "b" => &[("224", "0.2"), ("384", "0.15")],
        "l" => &[("224", "0.45"), ("384", "0.4")],
        "h" => &[("224", "0.55")],
        _ => &[],
    }
}

/// Epochs and stochastic depth on ImageNet-21k, and stochastic depth on ImageNet after it.
fn large_set(letter: &str) -> Option<(&'static str, &'static str, &'static str)> {
    match letter {
        "s" => Some(("240", "0.05", "0.05")),
        "b" => Some(("240", "0.1", "0.15")),
        "l" => Some(("240", "0.3", "0.4")),
        "h" => Some(("90", "0.5", "0.45")),
        _ => None,
    }
}

/// What all recipes for the built-in images share beyond those of fine-tuning.
const GLYPHS_STUDENT: [(&str, &str); 10] = [
    ("model", "glyph_t"),
    ("start", "xavier"),
    ("unscale-lr", "true"),
    ("warmup-epochs", "0"),
    ("sched", "updates"),
    ("mixup", "0"),
    ("cutmix", "0"),
    ("repeated-aug", "false"),
    ("global-pool", "false"),
    ("head-std", "0.01"),
];
const TEACHER: (&str, &str) = ("teacher-path", "runs/teacher/best.safetensors");

fn built_in() -> Vec<Preset> {
    let own = |flag: &str| GLYPHS_STUDENT.iter().all(|(other, _)| *other != flag);
    let student: Vec<_> = GLYPHS_LABELLED.iter().filter(|(flag, _)| own(flag)).copied().chain(GLYPHS_STUDENT).collect();
    vec![
        glyphs("glyphs-train", "train", "built-in images: a tiny ViT from 2000 labels, ten epochs", &student),
        glyphs(
            "glyphs-logit",
            "distill logit",
            "built-in images: the same with a teacher that sees everything; masque finetune --output-dir runs/teacher makes one",
            &[&student[..], &[TEACHER]].concat(),
        ),
        glyphs(
            "glyphs-maskedkd",
            "distill maskedkd",
            "built-in images: the same with a teacher that sees half of the patches, chosen by the student",
            &[&student[..], &[TEACHER, ("len-num-keep", "18")]].concat(),
        ),
        glyphs(
            "glyphs-deit",
            "distill deit",
            "built-in images: the same with a distillation token that follows the teacher's first answers",
            &[&student[..], &[TEACHER, ("model", "deit_glyph_t_distilled_patch8_48"), ("distillation-type", "hard")]].concat(),
        ),
    ]
}
