//! ConViT's recipes: fine-tuning and linear probing of ConvMAE's and of DMJD's.

use super::{GLYPHS_LABELLED, GLYPHS_PROBE, Preset, finetuning, glyphs, preset};

/// What a recipe is of, the program's name, what a person calls it.
type Model = (&'static str, &'static str, &'static str);

const CONVMAE: Model = ("convmae-b", "convvit_base_patch16", "ConViT-Base that ConvMAE has pre-trained");
const BASE: Model = ("dmjd-convit-b", "convit_base_patch16", "ConViT-Base that DMJD has pre-trained");
const LARGE: Model = ("dmjd-convit-l", "convit_large_patch16", "ConViT-Large that DMJD has pre-trained");

pub fn all() -> Vec<Preset> {
    let model = ("model", "glyph_conv");
    vec![
        glyphs(
            "glyphs-convit-finetune",
            "finetune",
            "built-in images: fine-tuning a small ConViT on 2000 labels, ten epochs; give the encoder by --finetune",
            &[&[model], &GLYPHS_LABELLED[..], &[("layer-decay", "0.75"), ("head-std", "0.01")]].concat(),
        ),
        glyphs(
            "glyphs-convit-scratch",
            "finetune",
            "built-in images: the same steps from scratch",
            &[&[model], &GLYPHS_LABELLED[..], &[("layer-decay", "1"), ("start", "xavier")]].concat(),
        ),
        glyphs(
            "glyphs-convit-probe",
            "probe",
            "built-in images: a linear head on 2000 labels, on features of a small ConViT",
            &[&[model], &GLYPHS_PROBE[..]].concat(),
        ),
        tuned(CONVMAE, "100", "0.65", "0.1"),
        tuned(BASE, "100", "0.65", "0.1"),
        tuned(LARGE, "50", "0.75", "0.2"),
        probed(CONVMAE, "90", "0.1"),
        probed(BASE, "90", "0.1"),
        probed(LARGE, "50", "0.05"),
    ]
}

fn tuned((name, model, called): Model, epochs: &'static str, layer_decay: &'static str, drop_path: &'static str) -> Preset {
    let flags = finetuning(model, "5", layer_decay, drop_path).map(|(flag, value)| (flag, if flag == "epochs" { epochs } else { value }));
    preset(format!("{name}-finetune"), "finetune", format!("ImageNet: fine-tuning {called}, batch 1024"), &flags)
}

fn probed((name, model, called): Model, epochs: &'static str, rate: &'static str) -> Preset {
    preset(
        format!("{name}-linprobe"),
        "probe",
        format!("ImageNet: linear probing of {called}, pooled, LARS, batch 4096"),
        &[
            ("model", model),
            ("batch-size", "512"),
            ("accum-iter", "8"),
            ("epochs", epochs),
            ("warmup-epochs", "10"),
            ("blr", rate),
            ("min-lr", "0"),
            ("weight-decay", "0"),
            ("global-pool", "true"),
            ("input-size", "224"),
            ("crop", "once"),
        ],
    )
}
