//! Time of a whole MAE training step: mask, forward, backward, AdamW.

use super::{Times, timed};
use crate::device::{memory, parallel};
use crate::ensure;
use crate::error::{Error, Result};
use crate::masking;
use crate::methods::mae::{Mae, MaeConfig};
use crate::methods::{Batch, Method};
use crate::nn::decoder::DecoderConfig;
use crate::nn::presets;
use crate::nn::vit::VitConfig;
use crate::optim::adamw::AdamW;
use crate::optim::{Optimizer, groups};
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::{Dtype, Tensor};
use serde_json::{Value, json};

/// What is trained and how often.
#[derive(Clone, Debug, clap::Args)]
pub struct StepArgs {
    /// Size of the encoder: tiny, small, medium, base, large or huge
    #[arg(long, default_value = "tiny")]
    pub model: String,
    /// Side of the square images in pixels
    #[arg(long, default_value_t = 224)]
    pub image_size: usize,
    /// Side of a patch in pixels [default: 16, 14 for huge]
    #[arg(long)]
    pub patch_size: Option<usize>,
    /// Images a step
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Part of the patches that is hidden
    #[arg(long, default_value_t = 0.75, allow_negative_numbers = true)]
    pub mask_ratio: f64,
    /// Width of the decoder
    #[arg(long, default_value_t = 512)]
    pub decoder_dim: usize,
    /// Blocks of the decoder
    #[arg(long, default_value_t = 8)]
    pub decoder_depth: usize,
    /// Heads of the decoder
    #[arg(long, default_value_t = 16)]
    pub decoder_heads: usize,
    /// Normalise each target patch by its own mean and deviation
    #[arg(long)]
    pub norm_pix: bool,
    /// Steps that are measured
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Steps before them that are not
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Seed of the weights, the images and the masks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

pub struct Report {
    args: StepArgs,
    parameters: usize,
    patch: usize,
    total: Times,
    forward: Times,
    backward: Times,
    update: Times,
    losses: Vec<f64>,
    /// Bytes of the memory pool, and how often it asked the system during the measured steps.
    memory: usize,
    requests: usize,
}

/// No more steps than this are counted.
const MOST_STEPS: usize = 1_000_000;

/// What cannot be meant, as a sentence.
fn check(args: &StepArgs, encoder: &VitConfig, decoder: &DecoderConfig) -> std::result::Result<(), String> {
    let counted = |flag: &str, value: usize, least: usize| match (least..=MOST_STEPS).contains(&value) {
        true => Ok(()),
        false => Err(format!("{flag} {value} is not from {least} to {MOST_STEPS}")),
    };
    counted("--steps", args.steps, 1)?;
    counted("--warmup", args.warmup, 0)?;
    if args.batch == 0 {
        return Err("--batch 0: at least one image is needed".into());
    }
    encoder.check().map_err(|error| error.chain())?;
    let (width, heads) = (decoder.width, decoder.heads);
    if width == 0 || heads == 0 || !width.is_multiple_of(4) || !width.is_multiple_of(heads) {
        return Err(format!("--decoder-dim {width} has to be a multiple of 4 and of --decoder-heads {heads}"));
    }
    let bytes = least_bytes(args.batch, encoder, decoder);
    let there = u128::from(memory::of_the_machine());
    if bytes > there {
        let giga = |bytes: u128| bytes / 1_000_000_000;
        return Err(format!(
            "a step needs at least {} GB of memory but the machine has {}; make the batch, the images or the model smaller",
            giga(bytes),
            giga(there)
        ));
    }
    let (patches, ratio) = (encoder.patches(), args.mask_ratio);
    let kept = masking::len_keep(patches, ratio).map_err(|error| error.chain())?;
    if kept == 0 || kept == patches {
        return Err(format!("--mask-ratio {ratio} keeps {kept} of {patches} patches; at least one has to be kept and one hidden"));
    }
    Ok(())
}

/// Less than a step needs: four numbers a weight, and for each token of the decoder sixteen times its width in each block.
fn least_bytes(batch: usize, encoder: &VitConfig, decoder: &DecoderConfig) -> u128 {
    let product = |sizes: &[usize]| sizes.iter().fold(1u128, |product, &size| product.saturating_mul(size as u128));
    let side = encoder.image[0];
    let weights = [
        product(&[12, encoder.width, encoder.width, encoder.depth]),
        product(&[12, decoder.width, decoder.width, decoder.depth]),
        product(&[encoder.patch, encoder.patch, 3, encoder.width.saturating_add(decoder.width)]),
    ];
    let activations =
        [product(&[batch, 3, side, side]), product(&[16, batch, side / encoder.patch, side / encoder.patch, decoder.width, decoder.depth])];
    let sum = |sizes: &[u128]| sizes.iter().fold(0u128, |sum, &size| sum.saturating_add(size));
    sum(&weights).saturating_mul(16).saturating_add(sum(&activations).saturating_mul(4))
}

pub fn run(args: &StepArgs) -> Result<Report> {
    let preset = presets::mae(&args.model, args.image_size)?;
    let encoder = VitConfig { patch: args.patch_size.unwrap_or(preset.patch), ..preset };
    let patch = encoder.patch;
    let decoder = DecoderConfig { width: args.decoder_dim, depth: args.decoder_depth, heads: args.decoder_heads };
    check(args, &encoder, &decoder).map_err(Error::usage)?;
    let rng = Rng::new(args.seed);
    let config = MaeConfig { encoder, decoder, mask_ratio: args.mask_ratio, norm_pix: args.norm_pix };
    let mut mae = Mae::new(config, Dtype::F32, &rng)?;
    let shape = [args.batch, 3, args.image_size, args.image_size];
    let batch = Batch { images: Tensor::from_slice(&shape, &rng.normal("images", shape.iter().product()))? };
    let mut optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8)?;

    let mut parts: [Vec<f64>; 4] = Default::default();
    let (mut losses, mut requests) = (Vec::new(), 0);
    for step in 0..args.warmup + args.steps {
        if step == args.warmup {
            requests = memory::taken_from_system().1;
        }
        let tape = Tape::new();
        let (forward, loss) = timed(|| mae.loss(&tape, &batch, &rng.at(step as u64)));
        let loss = loss?.total;
        let value = loss.value().item();
        ensure!(value.is_finite(), "step {step}: the loss is {value}");
        let (backward, done) = timed(|| tape.backward(&loss, &mut [&mut mae.params]));
        done?;
        drop(loss);
        let (update, done) = timed(|| -> Result<()> {
            optimizer.step(&mut mae.params, 1.5e-4)?;
            mae.params.clear_gradients();
            Ok(())
        });
        done?;
        losses.push(value);
        if step >= args.warmup {
            for (part, ms) in parts.iter_mut().zip([forward + backward + update, forward, backward, update]) {
                part.push(ms);
            }
        }
    }
    let [total, forward, backward, update] = parts.map(Times::of);
    let (memory, after) = memory::taken_from_system();
    let parameters = mae.params.count_trained();
    Ok(Report { args: args.clone(), parameters, patch, total, forward, backward, update, losses, memory, requests: after - requests })
}

impl Report {
    fn images_per_second(&self) -> f64 {
        self.args.batch as f64 * 1e3 / self.total.median
    }

    pub fn json(&self) -> Value {
        let a = &self.args;
        json!({
            "what": "step", "method": "mae", "model": a.model, "image_size": a.image_size, "patch_size": self.patch, "batch": a.batch,
            "mask_ratio": a.mask_ratio, "decoder_dim": a.decoder_dim, "decoder_depth": a.decoder_depth, "decoder_heads": a.decoder_heads,
            "norm_pix": a.norm_pix, "dtype": "f32", "device": "cpu", "threads": parallel::threads(), "steps": a.steps,
            "parameters": self.parameters, "ms_per_step": self.total.median, "min_ms": self.total.min, "max_ms": self.total.max,
            "images_per_s": self.images_per_second(),
            "parts": { "forward": self.forward.median, "backward": self.backward.median, "update": self.update.median },
            "loss": self.losses.last(), "losses": self.losses, "pool_bytes": self.memory, "system_requests_in_steady_state": self.requests,
        })
    }

    pub fn text(&self) -> String {
        let a = &self.args;
        let losses = self.losses.first().zip(self.losses.last()).map_or(String::new(), |(first, last)| format!("{first:.4} -> {last:.4}"));
        format!(
            "MAE training step, {} encoder ({} trained parameters), decoder {} x {}, images {} x {}, patches of {}, {} % hidden\n\
             batch {} on {} threads, f32, CPU, random images; median of {} steps after {} warm-up steps\n\n\
             step       {:>9.1} ms   ({:.1} to {:.1})   {:.2} images/s\n  \
             forward  {:>9.1} ms\n  backward {:>9.1} ms\n  update   {:>9.1} ms\n\n\
             loss over all steps: {losses}\n\
             memory of the pool: {:.0} MB, requests to the system in the measured steps: {}",
            a.model,
            self.parameters,
            a.decoder_dim,
            a.decoder_depth,
            a.image_size,
            a.image_size,
            self.patch,
            a.mask_ratio * 100.0,
            a.batch,
            parallel::threads(),
            a.steps,
            a.warmup,
            self.total.median,
            self.total.min,
            self.total.max,
            self.images_per_second(),
            self.forward.median,
            self.backward.median,
            self.update.median,
            self.memory as f64 / 1e6,
            self.requests
        )
    }
}
