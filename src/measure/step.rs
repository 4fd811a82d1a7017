//! Time of a whole MAE training step: mask, forward, backward, AdamW.

use super::{Times, timed};
use crate::device::gpu::Gpu;
use crate::device::{Named, Precision, memory, parallel};
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
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::train::step::{Step, StepOptions};
use serde_json::{Value, json};

/// What is trained and how often.
#[derive(Clone, Debug, clap::Args)]
pub struct StepArgs {
    /// Size of the encoder: tiny, small, medium, base, large, huge, glyph_s or glyph_t
    #[arg(long, default_value = "tiny")]
    pub model: String,
    /// Side of the square images in pixels
    #[arg(long, default_value_t = 224)]
    pub image_size: usize,
    /// Side of a patch in pixels [default: 16, 14 for huge, 8 for glyphs]
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
    /// Steps before them that are not; on a GPU at least the three after which a step is recorded
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Seed of the weights, the images and the masks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to compute
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    pub device: Named,
    /// f32; on a GPU also bf16 (products of bf16 numbers, summed in f32) and tf32 (f32 whose products are rounded)
    #[arg(long, default_value = "f32")]
    pub precision: Precision,
}

pub struct Report {
    args: StepArgs,
    parameters: usize,
    patch: usize,
    /// Steps that were taken before those that are measured: more than asked for where a step is recorded only then.
    warmup: usize,
    total: Times,
    /// Forward, backward and update, where they can be told apart: a recorded step is one piece.
    parts: Option<[Times; 3]>,
    losses: Vec<f64>,
    /// Bytes of the memory pool, and how much more it took during the measured steps: requests to the system on the CPU, bytes of a GPU.
    memory: usize,
    more: usize,
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
    let config = MaeConfig { encoder, decoder, mask_ratio: args.mask_ratio, norm_pix: args.norm_pix.then_some(pixels::EPS) };
    let device = args.device.open()?;
    device.compute_in(args.precision)?;
    let mut mae = Mae::new(config, Dtype::F32, &rng)?;
    mae.params.move_to(&device, args.precision.dtype())?;
    let shape = [args.batch, 3, args.image_size, args.image_size];
    let batch = Batch::of_images(Tensor::from_slice(&shape, &rng.normal("images", shape.iter().product()))?);
    let optimizer = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8)?;
    let parameters = mae.params.count_trained();
    let run = Run { args, patch, parameters, rng };
    match device.gpu() {
        None => run.in_parts(mae, optimizer, &batch),
        Some(gpu) => run.recorded(gpu, mae, optimizer, batch),
    }
}

/// What the two ways of measuring share.
struct Run<'a> {
    args: &'a StepArgs,
    patch: usize,
    parameters: usize,
    rng: Rng,
}

const LEARNING_RATE: f64 = 1.5e-4;

impl Run<'_> {
    /// On the CPU: forward, backward and update each by itself.
    fn in_parts(&self, mut mae: Mae, mut optimizer: AdamW, batch: &Batch) -> Result<Report> {
        let (args, mut parts): (_, [Vec<f64>; 4]) = (self.args, Default::default());
        let (mut losses, mut requests) = (Vec::new(), 0);
        for step in 0..args.warmup + args.steps {
            if step == args.warmup {
                requests = memory::taken_from_system().1;
            }
            let tape = Tape::new();
            let (forward, loss) = timed(|| mae.loss(&tape, batch, &self.rng.at(step as u64)));
            let loss = loss?.total;
            let value = loss.value().item();
            ensure!(value.is_finite(), "step {step}: the loss is {value}");
            let (backward, done) = timed(|| tape.backward(&loss, &mut [&mut mae.params]));
            done?;
            drop(loss);
            let (update, done) = timed(|| -> Result<()> {
                optimizer.step(&mut mae.params, LEARNING_RATE)?;
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
        let requests = after - requests;
        Ok(self.report(args.warmup, total, Some([forward, backward, update]), losses, [memory, requests]))
    }

    /// On a GPU: the step as training takes it, recorded once and replayed, images written to the device each time.
    fn recorded(&self, gpu: &Gpu, mae: Mae, optimizer: AdamW, batch: Batch) -> Result<Report> {
        let mut step = Step::new(Box::new(mae), Box::new(optimizer), StepOptions::default());
        let (mut times, mut losses, mut before) = (Vec::new(), Vec::new(), 0);
        // Steps that are not recorded yet are not what is to be measured.
        let mut warm = 0;
        while warm < self.args.warmup || !step.is_recorded() {
            losses.push(step.run(&batch, &self.rng.at(warm as u64), LEARNING_RATE)?.loss);
            warm += 1;
        }
        for k in 0..self.args.steps {
            before = if k == 0 { gpu.memory().1 } else { before };
            let mut value = f64::NAN;
            times.push(gpu.time(|| {
                value = step.run(&batch, &self.rng.at((warm + k) as u64), LEARNING_RATE)?.loss;
                Ok(())
            })?);
            ensure!(value.is_finite(), "step {}: the loss is {value}", warm + k);
            losses.push(value);
        }
        let memory = gpu.memory().1;
        Ok(self.report(warm, Times::of(times), None, losses, [memory, memory - before].map(|bytes| bytes as usize)))
    }

    fn report(&self, warmup: usize, total: Times, parts: Option<[Times; 3]>, losses: Vec<f64>, [memory, more]: [usize; 2]) -> Report {
        Report { args: self.args.clone(), parameters: self.parameters, patch: self.patch, warmup, total, parts, losses, memory, more }
    }
}

impl Report {
    fn images_per_second(&self) -> f64 {
        self.args.batch as f64 * 1e3 / self.total.median
    }

    pub fn json(&self) -> Value {
        let a = &self.args;
        let more = if self.parts.is_some() { "system_requests_in_steady_state" } else { "bytes_taken_in_steady_state" };
        json!({
            "what": "step", "method": "mae", "model": a.model, "image_size": a.image_size, "patch_size": self.patch, "batch": a.batch,
            "mask_ratio": a.mask_ratio, "decoder_dim": a.decoder_dim, "decoder_depth": a.decoder_depth, "decoder_heads": a.decoder_heads,
            "norm_pix": a.norm_pix, "dtype": a.precision.name(), "device": a.device.to_string(), "threads": parallel::threads(), "steps": a.steps, "warmup": self.warmup,
            "parameters": self.parameters, "ms_per_step": self.total.median, "min_ms": self.total.min, "max_ms": self.total.max,
            "images_per_s": self.images_per_second(),
            "parts": self.parts.map(|[forward, backward, update]| json!({ "forward": forward.median, "backward": backward.median, "update": update.median })),
            "loss": self.losses.last(), "losses": self.losses, "pool_bytes": self.memory, more: self.more,
        })
    }

    pub fn text(&self) -> String {
        let a = &self.args;
        let losses = self.losses.first().zip(self.losses.last()).map_or(String::new(), |(first, last)| format!("{first:.4} -> {last:.4}"));
        let device = if a.device == Named::Cpu { "CPU".to_string() } else { format!("device {}", a.device) };
        let parts = match self.parts {
            Some([forward, backward, update]) => format!(
                "  forward  {:>9.1} ms\n  backward {:>9.1} ms\n  update   {:>9.1} ms\n",
                forward.median, backward.median, update.median
            ),
            None => "  recorded once and replayed: forward, backward and update are one piece\n".to_string(),
        };
        format!(
            "MAE training step, {} encoder ({} trained parameters), decoder {} x {}, images {} x {}, patches of {}, {} % hidden\n\
             batch {} on {} threads, {}, {}, random images; median of {} steps after {} warm-up steps\n\n\
             step       {:>9.1} ms   ({:.1} to {:.1})   {:.2} images/s\n{parts}\n\
             loss over all steps: {losses}\n\
             memory of the pool: {:.0} MB, {} in the measured steps: {}",
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
            a.precision,
            device,
            a.steps,
            self.warmup,
            self.total.median,
            self.total.min,
            self.total.max,
            self.images_per_second(),
            self.memory as f64 / 1e6,
            if self.parts.is_some() { "requests to the system" } else { "bytes taken from the device" },
            self.more
        )
    }
}
