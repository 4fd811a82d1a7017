//! What ConViT's stages cost when they are computed for visible patches alone, beside the dense ones: time of whole pre-training steps.
//!
//! Both forms take turns, one step each a round, and see the same images and masks; before that their latents are compared. The ratio is that of the two
//! steps of a round; shown are the median over the rounds and the range. FLOPs say what it would be if every operation took as long.

use super::{Times, timed};
use crate::device::{Named, Precision, memory};
use crate::ensure;
use crate::error::{Error, Result};
use crate::methods::mae::{Mae, MaeConfig};
use crate::methods::{Batch, Method};
use crate::nn::stages::StagesConfig;
use crate::nn::vit::VitConfig;
use crate::nn::{Scope, flops, presets};
use crate::optim::adamw::AdamW;
use crate::optim::{Optimizer, groups};
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::{Dtype, Tensor};
use serde_json::{Value, json};

/// What is trained and how often.
#[derive(Clone, Debug, clap::Args)]
pub struct StagesArgs {
    /// A ConViT by its name
    #[arg(long, default_value = "convmae_convvit_base_patch16")]
    pub model: String,
    /// Side of the square images in pixels
    #[arg(long, default_value_t = 224)]
    pub image_size: usize,
    /// Images a step
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Part of the patches that is hidden
    #[arg(long, default_value_t = 0.75, allow_negative_numbers = true)]
    pub mask_ratio: f64,
    /// Rounds that are measured
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Rounds before them that are not
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Seed of the weights, the images and the masks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to compute; steps are not recorded
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    pub device: Named,
    /// f32, bf16 (products of bf16 numbers, summed in f32; on a CPU that has it, and on a GPU); on a GPU also tf32
    #[arg(long, default_value = "f32")]
    pub precision: Precision,
}

pub struct Report {
    args: StagesArgs,
    dense: Times,
    visible: Times,
    ratio: Times,
    /// Visible to dense, by multiply-accumulates.
    flops: f64,
    /// How far the latents of both are apart, for the largest number in them.
    apart: f64,
}

const MOST_ROUNDS: usize = 1_000_000;
const LEARNING_RATE: f64 = 1e-4;

fn check(args: &StagesArgs, encoder: &VitConfig) -> Result<StagesConfig> {
    let usage = |text: String| Err(Error::usage(text));
    let Some(stages) = &encoder.stages else {
        return usage(format!("--model {} has no convolution stages; take convmae_convvit_base_patch16 or another ConViT", args.model));
    };
    encoder.check().map_err(|error| Error::usage(format!("--image-size {}: {}", args.image_size, error.chain())))?;
    for (flag, value, least) in [("--rounds", args.rounds, 1), ("--warmup", args.warmup, 0), ("--batch", args.batch, 1)] {
        if !(least..=MOST_ROUNDS).contains(&value) {
            return usage(format!("{flag} {value} is not from {least} to {MOST_ROUNDS}"));
        }
    }
    // What the first stage keeps for its backward, dense.
    let tokens = (encoder.patches() * stages.layout(0).tokens()) as u128;
    let each = (4.0 + 2.0 * stages.mlp_ratios[0]) * (stages.widths[0] * stages.depths[0]) as f64;
    let (least, there) = (4 * args.batch as u128 * tokens * each as u128, u128::from(memory::of_the_machine()));
    if least > there {
        let giga = |bytes: u128| bytes / 1_000_000_000;
        return usage(format!(
            "a dense step needs at least {} GB of memory but the machine has {}; make --batch or --image-size smaller",
            giga(least),
            giga(there)
        ));
    }
    Ok(stages.clone())
}

pub fn run(args: &StagesArgs) -> Result<Report> {
    let named = presets::named(&args.model)?;
    let encoder = named.encoder(args.image_size)?;
    let stages = check(args, &encoder)?;
    let config = || MaeConfig { encoder: encoder.clone(), decoder: named.decoder.clone(), mask_ratio: args.mask_ratio, norm_pix: None };
    let device = args.device.open()?;
    device.compute_in(args.precision)?;
    let (rng, dtype) = (Rng::new(args.seed), args.precision.dtype());
    let shape = [args.batch, encoder.channels, args.image_size, args.image_size];
    let images = Tensor::from_slice(&shape, &rng.normal("images", shape.iter().product()))?.on(&device)?;

    let kept = crate::masking::len_keep(encoder.patches(), args.mask_ratio).map_err(|error| Error::usage(error.chain()))?;
    if kept == 0 || kept == encoder.patches() {
        return Err(Error::usage(format!(
            "--mask-ratio {} keeps {kept} of {} patches; at least one has to be kept and one hidden",
            args.mask_ratio,
            encoder.patches()
        )));
    }
    let hidden = (encoder.patches() - kept) as u64;
    let visible_macs = flops::vit_macs(&encoder, kept) + flops::decoder_macs(&named.decoder, &encoder, kept);
    let flops = visible_macs as f64 / (visible_macs + hidden * flops::stages_macs(&encoder, &stages)) as f64;

    let mut mae = Mae::new(config(), Dtype::F32, &rng)?;
    mae.params.move_to(&device, dtype)?;
    let mut optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8)?;
    let mask = mae.mask(args.batch, &rng)?;
    let mut latents = Vec::new();
    for dense in [true, false] {
        mae = mae.with_dense_stages(dense);
        let off = Tape::off();
        latents.push(mae.latent(&Scope::new(&off, &mae.params), &images, &mask)?.value().read()?);
    }
    let largest = latents[0].iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let apart = latents[0].iter().zip(&latents[1]).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs())) / largest;
    let allowed = if dtype == Dtype::Bf16 { 0.1 } else { 1e-3 };
    let agrees = apart.is_finite() && apart <= allowed;
    ensure!(agrees, "visible and dense stages are {apart:e} apart, more than {allowed:e}: what is timed does not agree");

    let batch = Batch::of_images(images);
    let mut times: [Vec<f64>; 2] = Default::default();
    for round in 0..args.warmup + args.rounds {
        for (dense, times) in [true, false].into_iter().zip(&mut times) {
            mae = mae.with_dense_stages(dense);
            let (ms, done) = timed(|| -> Result<()> {
                let tape = Tape::new();
                let loss = mae.loss(&tape, &batch, &rng.at(round as u64))?.total;
                tape.backward(&loss, &mut [&mut mae.params])?;
                drop(loss);
                optimizer.step(&mut mae.params, LEARNING_RATE)?;
                mae.params.clear_gradients();
                device.gpu().map_or(Ok(()), |gpu| gpu.wait())
            });
            done?;
            if round >= args.warmup {
                times.push(ms);
            }
        }
    }
    let ratio = Times::of(times[0].iter().zip(&times[1]).map(|(dense, visible)| visible / dense).collect());
    let [dense, visible] = times.map(Times::of);
    Ok(Report { args: args.clone(), dense, visible, ratio, flops, apart })
}

impl Report {
    pub fn text(&self) -> String {
        let StagesArgs { model, image_size, batch, mask_ratio, .. } = &self.args;
        let row = |what: &str, times: &Times| format!("{what:<26} {:>9.1} ms a step ({:.1} to {:.1})", times.median, times.min, times.max);
        [
            format!(
                "{model}, {image_size} x {image_size} pixels, batch {batch}, {:.0} % hidden, {} {}; median of {} rounds",
                100.0 * mask_ratio,
                self.args.device,
                self.args.precision,
                self.ratio.runs
            ),
            row("stages everywhere", &self.dense),
            row("stages where visible", &self.visible),
            format!(
                "ratio                      {:>9.3} ({:.3} to {:.3}); FLOPs {:.3}; latents {:.0e} apart",
                self.ratio.median, self.ratio.min, self.ratio.max, self.flops, self.apart
            ),
        ]
        .join("\n")
    }

    pub fn json(&self) -> Value {
        let times = |times: &Times| json!({"median": times.median, "min": times.min, "max": times.max});
        json!({
            "model": self.args.model,
            "image_size": self.args.image_size,
            "batch": self.args.batch,
            "mask_ratio": self.args.mask_ratio,
            "device": self.args.device.to_string(),
            "precision": self.args.precision.to_string(),
            "rounds": self.ratio.runs,
            "dense_ms": times(&self.dense),
            "visible_ms": times(&self.visible),
            "ratio": times(&self.ratio),
            "flops_ratio": self.flops,
            "apart": self.apart,
        })
    }
}
