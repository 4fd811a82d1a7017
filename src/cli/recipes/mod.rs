//! The recipes: what was published for each method, and one of each kind for the built-in images.

mod convit;
mod distill;
mod dmae;
mod dmjd;
mod mae;
mod tinymim;

pub struct Preset {
    pub name: String,
    /// The command that it is for.
    pub command: &'static str,
    pub about: String,
    pub flags: Vec<(&'static str, String)>,
}

fn preset(name: impl Into<String>, command: &'static str, about: impl Into<String>, flags: &[(&'static str, &str)]) -> Preset {
    let flags = flags.iter().map(|(flag, value)| (*flag, value.to_string())).collect();
    Preset { name: name.into(), command, about: about.into(), flags }
}

/// How a pre-trained encoder is fine-tuned: MAE's recipe for Base, 100 epochs of batch 1024.
fn finetuning<'a>(model: &'a str, warmup: &'a str, layer_decay: &'a str, drop_path: &'a str) -> [(&'static str, &'a str); 16] {
    [
        ("model", model),
        ("batch-size", "32"),
        ("accum-iter", "32"),
        ("epochs", "100"),
        ("warmup-epochs", warmup),
        ("blr", "5e-4"),
        ("min-lr", "1e-6"),
        ("weight-decay", "0.05"),
        ("layer-decay", layer_decay),
        ("drop-path", drop_path),
        ("mixup", "0.8"),
        ("cutmix", "1.0"),
        ("reprob", "0.25"),
        ("smoothing", "0.1"),
        ("aa", "rand-m9-mstd0.5-inc1"),
        ("input-size", "224"),
    ]
}

/// What all recipes for the built-in images share.
const GLYPHS: [(&str, &str); 7] = [
    ("model", "glyph_s"),
    ("data-path", "synthetic"),
    ("input-size", "48"),
    ("eval-crop-ratio", "1"),
    ("batch-size", "64"),
    ("eval-freq", "1"),
    ("save-freq", "1"),
];

fn glyphs(name: &'static str, command: &'static str, about: &'static str, more: &[(&'static str, &str)]) -> Preset {
    preset(name, command, about, &[&GLYPHS, more].concat())
}

/// Every recipe there is.
pub fn all() -> Vec<Preset> {
    [mae::all(), dmae::all(), tinymim::all(), dmjd::all(), convit::all(), distill::all()].into_iter().flatten().collect()
}

/// Fine-tuning on the built-in images, without what depends on the encoder.
const GLYPHS_LABELLED: [(&str, &str); 14] = [
    ("train-images", "2000"),
    ("epochs", "10"),
    ("warmup-epochs", "1"),
    ("lr", "4e-3"),
    ("min-lr", "0"),
    ("weight-decay", "0.05"),
    ("head-lr-scale", "8"),
    ("drop-path", "0"),
    ("smoothing", "0.1"),
    ("aa", "none"),
    ("reprob", "0"),
    ("crop", "shift"),
    ("shift", "3"),
    ("global-pool", "true"),
];

/// Linear probing on the built-in images.
const GLYPHS_PROBE: [(&str, &str); 9] = [
    ("train-images", "2000"),
    ("epochs", "60"),
    ("warmup-epochs", "6"),
    ("lr", "15"),
    ("weight-decay", "0"),
    ("global-pool", "true"),
    ("crop", "whole"),
    ("eval-freq", "20"),
    ("save-freq", "20"),
];
