//! TinyMIM's recipes: the chain from large to tiny in both readings, and fine-tuning.

use super::{Preset, finetuning, glyphs, preset};

/// Ending of the name, student, its teacher, the teacher's block, heads of its last block where they are typed, whose reading.
type Stage = (&'static str, &'static str, &'static str, &'static str, Option<&'static str>, &'static str);

const CHAIN: [Stage; 7] = [
    ("b", "base", "mae_vit_large", "18", None, "the published command"),
    ("s-code", "small", "mae_vit_base", "12", Some("12"), "heads as in the released program"),
    ("t-code", "tiny", "mae_vit_small", "12", Some("12"), "heads as in the released program"),
    ("s-paper", "small", "tinymim_vit_base", "12", Some("16"), "heads as the teacher was trained with"),
    ("t-paper", "tiny", "tinymim_vit_small", "12", Some("16"), "heads as the teacher was trained with"),
    ("s-direct", "small", "mae_vit_base", "12", None, "not sequential: from MAE's base"),
    ("t-direct", "tiny", "mae_vit_base", "12", None, "not sequential: from MAE's base"),
];

pub fn all() -> Vec<Preset> {
    let mut all = vec![glyphs(
        "glyphs-tinymim",
        "pretrain tinymim",
        "built-in images: TinyMIM of a tiny ViT from the small one that glyphs-pretrain has made",
        &[
            ("model", "glyph_t"),
            ("teacher-path", "runs/pretrain-mae/best.safetensors"),
            ("epochs", "8"),
            ("warmup-epochs", "0.4"),
            ("lr", "3e-3"),
            ("eval-freq", "2"),
            ("weight-decay", "0.05"),
            ("crop", "whole"),
            ("color-jitter", "0"),
            ("drop-path", "0"),
        ],
    )];
    for (ending, student, teacher, block, heads, whose) in CHAIN {
        let (model, teacher_model) = (format!("tinymim_vit_{student}_patch16"), format!("{teacher}_patch16"));
        let mut flags = vec![
            ("model", model.as_str()),
            ("teacher-model", teacher_model.as_str()),
            ("batch-size", "64"),
            ("accum-iter", "64"),
            ("epochs", "300"),
            ("warmup-epochs", "15"),
            ("blr", "1.5e-4"),
            ("weight-decay", "0.05"),
            ("target", "relations"),
            ("relations", "qk,vv"),
            ("drop-path", "0.1"),
            ("color-jitter", "0.4"),
            ("input-size", "224"),
            ("crop-min", "0.2"),
            ("intermediate", block),
        ];
        flags.extend(heads.map(|heads| ("teacher-last-heads", heads)));
        let about = format!(
            "ImageNet: TinyMIM of ViT-{student} from {teacher}, 300 epochs, batch 4096, {whose}; give the teacher by --teacher-path"
        );
        all.push(preset(format!("tinymim-vit-{ending}"), "pretrain tinymim", about, &flags));
    }
    for (ending, size, decay, drop, whose) in [
        ("b-finetune", "base", "0.65", "0.2", "the published command"),
        ("b-finetune-first", "base", "0.6", "0.1", "the first published command"),
        ("s-finetune", "small", "0.65", "0.2", "that of Base; its own is not published"),
        ("t-finetune", "tiny", "0.65", "0.2", "that of Base; its own is not published"),
    ] {
        let model = format!("vit_{size}_patch16");
        all.push(preset(
            format!("tinymim-vit-{ending}"),
            "finetune",
            format!("ImageNet: fine-tuning ViT-{size} after TinyMIM, batch 1024, {whose}"),
            &finetuning(&model, "5", decay, drop),
        ));
    }
    all
}
