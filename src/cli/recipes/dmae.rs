//! DMAE's recipes: distillation of a base student from a large teacher, the smaller pairs, high mask ratios, and fine-tuning.

use super::{Preset, finetuning, glyphs, preset};

/// Name, student, teacher, decoder's blocks, aligned blocks, whose recipe.
type Pair = (&'static str, &'static str, &'static str, usize, [&'static str; 2], &'static str);

const PAIRS: [Pair; 4] = [
    ("dmae-vit-b-from-l", "base", "large", 8, ["8", "17"], "the released script"),
    ("dmae-vit-s-from-b", "small", "base", 8, ["8", "8"], "as a user of the released program has reported it"),
    ("dmae-vit-t-from-b", "tiny", "base", 8, ["8", "8"], "by analogy"),
    ("dmae-vit-b-from-l-dec2", "base", "large", 2, ["8", "17"], "with the decoder of 2 blocks, which costs less at high mask ratios"),
];

pub fn all() -> Vec<Preset> {
    let mut all = vec![glyphs(
        "glyphs-dmae",
        "pretrain dmae",
        "built-in images: DMAE of a tiny ViT from the small one that glyphs-pretrain has made",
        &[
            ("model", "glyph_t"),
            ("teacher-path", "runs/pretrain-mae/best.safetensors"),
            ("epochs", "8"),
            ("warmup-epochs", "0.4"),
            ("lr", "3e-3"),
            ("eval-freq", "2"),
            ("weight-decay", "0.05"),
            ("mask-ratio", "0.75"),
            ("norm-pix-loss", "true"),
            ("norm-pix-eps", "0.01"),
            ("crop", "whole"),
            ("aligned-feature-projection-mode", "mlp-1layer"),
            ("distill-normalize", "layer-norm"),
        ],
    )];
    for (name, student, teacher, decoder, [own, theirs], whose) in PAIRS {
        all.push(recipe(name, student, decoder, [own, theirs], "0.75", &format!("DMAE of ViT-{student} from MAE-{teacher}, {whose}")));
    }
    for (ending, ratio, patches) in [("90", "0.9", "19"), ("95", "0.95", "9"), ("98", "0.98", "3")] {
        let about = format!("DMAE of ViT-base from MAE-large on {patches} of 196 patches");
        all.push(recipe(&format!("dmae-vit-b-from-l-mask{ending}"), "base", 8, ["8", "17"], ratio, &about));
    }
    let first =
        recipe("dmae-vit-b-from-l-first", "base", 8, ["8", "17"], "0.75", "DMAE of ViT-base from MAE-large, the first released script");
    let flags = first.flags.into_iter().map(|(flag, value)| match flag {
        "norm-pix-loss" => (flag, "true".to_string()),
        "warmup-epochs" => (flag, "40".to_string()),
        _ => (flag, value),
    });
    all.push(Preset { flags: flags.collect(), ..first });
    for (ending, warmup, decay, drop, about) in
        [("", "20", "0.75", "0.15", "the released script"), ("-first", "5", "0.7", "0.1", "the first released script")]
    {
        all.push(preset(
            format!("dmae-vit-b-finetune{ending}"),
            "finetune",
            format!("ImageNet: fine-tuning ViT-base that DMAE has distilled, batch 1024, {about}"),
            &finetuning("vit_base_patch16", warmup, decay, drop),
        ));
    }
    all
}

fn recipe(name: &str, student: &str, decoder: usize, [own, theirs]: [&str; 2], ratio: &str, about: &str) -> Preset {
    let model = format!("mae_vit_{student}_patch16_dec512d{decoder}b");
    let flags = [
        ("model", model.as_str()),
        ("batch-size", "64"),
        ("accum-iter", "64"),
        ("epochs", "100"),
        ("warmup-epochs", "20"),
        ("blr", "1.5e-4"),
        ("weight-decay", "0.05"),
        ("mask-ratio", ratio),
        ("norm-pix-loss", "false"),
        ("aligned-blks-indices", own),
        ("teacher-aligned-blks-indices", theirs),
        ("embedding-distillation-func", "L1"),
        ("aligned-feature-projection-mode", "fc-1layer"),
        ("student-reconstruction-target", "original_img"),
        ("input-size", "224"),
        ("crop-min", "0.2"),
    ];
    preset(name, "pretrain dmae", format!("ImageNet: {about}, 100 epochs, batch 4096; give the teacher by --teacher-path"), &flags)
}
