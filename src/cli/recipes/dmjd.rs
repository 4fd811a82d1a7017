//! Recipes of pre-training with DMJD, MaskFeat and ConvMAE.

use super::{Preset, glyphs, preset};

/// DMJD's released commands: 512 images, whatever the model.
const DMJD: [(&str, &str); 14] = [
    ("batch-size", "64"),
    ("accum-iter", "8"),
    ("mask-ratio", "0.6"),
    ("pred-ratio", "1"),
    ("mask-type", "block"),
    ("pred-type", "hog"),
    ("mim-loss-type", "l2"),
    ("vis-loss-type", "smooth-l1"),
    ("theta", "1"),
    ("warmup-epochs", "20"),
    ("blr", "6e-4"),
    ("weight-decay", "0.05"),
    ("input-size", "224"),
    ("crop-min", "0.5"),
];

/// MaskFeat for images: 2048 of them, a rate of 1.6e-3.
const MASKFEAT: [(&str, &str); 14] = [
    ("model", "vit_base_patch16"),
    ("batch-size", "64"),
    ("accum-iter", "32"),
    ("mask-ratio", "0.4"),
    ("masking", "block-wise"),
    ("min-block-patches", "15"),
    ("pred-type", "hog-maskfeat"),
    ("warmup-epochs", "30"),
    ("blr", "2e-4"),
    ("min-lr", "1e-6"),
    ("weight-decay", "0.05"),
    ("clip-grad", "0.02"),
    ("input-size", "224"),
    ("crop-min", "0.5"),
];

/// On the built-in images.
const GLYPHS: [(&str, &str); 3] = [("weight-decay", "0.05"), ("eval-freq", "2"), ("crop", "whole")];

/// DMJD there: the rates of the published recipe.
const GLYPHS_DMJD: [(&str, &str); 2] = [("mask-ratio", "0.6"), ("mask-type", "rand")];

pub fn all() -> Vec<Preset> {
    let mut all = vec![
        glyphs(
            "glyphs-dmjd",
            "pretrain dmjd",
            "built-in images: DMJD of a small ConViT, two views of each image, a minute or two on two cores",
            &[
                &GLYPHS[..],
                &GLYPHS_DMJD,
                &[("model", "glyph_conv"), ("baseline", "convmae"), ("epochs", "4"), ("warmup-epochs", "0.2"), ("lr", "3e-3")],
            ]
            .concat(),
        ),
        glyphs(
            "glyphs-dmjd-maskfeat",
            "pretrain dmjd",
            "built-in images: DMJD of a small MaskFeat, two views of each image",
            &[&GLYPHS[..], &GLYPHS_DMJD, &[("baseline", "maskfeat"), ("epochs", "4"), ("warmup-epochs", "0.2"), ("lr", "3e-3")]].concat(),
        ),
        glyphs(
            "glyphs-maskfeat",
            "pretrain maskfeat",
            "built-in images: MaskFeat of a small ViT",
            &[
                &GLYPHS[..],
                &[
                    ("epochs", "8"),
                    ("warmup-epochs", "0.4"),
                    ("lr", "3e-3"),
                    ("clip-grad", "1"),
                    ("pred-type", "hog"),
                    ("mask-ratio", "0.4"),
                ],
            ]
            .concat(),
        ),
        glyphs(
            "glyphs-convmae",
            "pretrain convmae",
            "built-in images: ConvMAE of a small ConViT",
            &[
                &GLYPHS[..],
                &[
                    ("model", "glyph_conv"),
                    ("epochs", "8"),
                    ("warmup-epochs", "0.4"),
                    ("lr", "3e-3"),
                    ("mask-ratio", "0.75"),
                    ("norm-pix-loss", "true"),
                    ("norm-pix-eps", "0.01"),
                ],
            ]
            .concat(),
        ),
    ];
    for (name, baseline, model, epochs, clip, about) in [
        (
            "dmjd-convit-b",
            "convmae",
            "dmjd_convit_base_patch16_dec8_hog",
            "400",
            None,
            "ConViT-base, 400 epochs of two views, the released command",
        ),
        (
            "dmjd-convit-l",
            "convmae",
            "dmjd_convit_large_patch16_dec8_hog",
            "400",
            Some("3"),
            "ConViT-large, 400 epochs of two views, the released command",
        ),
        (
            "dmjd-vit-b",
            "maskfeat",
            "vit_base_patch16",
            "800",
            None,
            "MaskFeat of ViT-base, 800 epochs of two views; what is not published of it as for ConViT",
        ),
    ] {
        let own = [("baseline", baseline), ("model", model), ("epochs", epochs)];
        let clip: Vec<_> = clip.map(|clip| ("clip-grad", clip)).into_iter().collect();
        all.push(preset(name, "pretrain dmjd", format!("ImageNet: DMJD of {about}, batch 512"), &[&own[..], &DMJD, &clip].concat()));
    }
    for epochs in ["300", "1600"] {
        all.push(preset(
            format!("maskfeat-vit-b-{epochs}ep"),
            "pretrain maskfeat",
            format!("ImageNet: MaskFeat of ViT-base, {epochs} epochs, batch 2048"),
            &[&MASKFEAT[..], &[("epochs", epochs)]].concat(),
        ));
    }
    all.push(preset(
        "convmae-b-1600ep",
        "pretrain convmae",
        "ImageNet: ConvMAE of ConViT-base, 1600 epochs, batch 3072, normalised pixels",
        &[
            ("model", "convmae_convvit_base_patch16"),
            ("batch-size", "64"),
            ("accum-iter", "48"),
            ("epochs", "1600"),
            ("warmup-epochs", "40"),
            ("blr", "1.5e-4"),
            ("weight-decay", "0.05"),
            ("mask-ratio", "0.75"),
            ("norm-pix-loss", "true"),
            ("input-size", "224"),
            ("crop-min", "0.2"),
        ],
    ));
    all
}
