//! Floor 8: what was typed, turned into objects. Below this file nobody sees a string flag.

mod convert;
mod data;
pub mod launch;
mod presets;
mod recipes;
mod visualize;

use crate::device::ranks::Ranks;
use crate::device::ranks::environment::Launched;
use crate::device::{self, Named, parallel};
use crate::error::{Error, Result};
use crate::measure::{self, info, kernels, loading, ops, parity, step};
use crate::tensor::Dtype;
use crate::train::args::RunArgs;
use crate::train::evaluate::EvaluateArgs;
use crate::train::run::Ended;
use crate::train::{classify, convmae, distill, dmae, dmjd, maskfeat, pretrain, tinymim};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Learning from images by looking at part of them: masked autoencoding and masked distillation of vision transformers.
#[derive(Parser)]
#[command(name = "masque", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to use [default: one a core; where a launcher starts several processes on a machine, they share its cores]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Subcommand)]
enum Command {
    /// Learn from images alone
    #[command(subcommand)]
    Pretrain(Pretrain),
    /// Train a classifier: from a pre-trained encoder, or from scratch
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Finetune(Box<classify::FinetuneArgs>),
    /// Train a classifier by DeiT's recipe
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Train(Box<distill::TrainArgs>),
    /// Train a classifier that learns from a teacher's answers too
    #[command(subcommand)]
    Distill(Distill),
    /// Judge an encoder's features: a linear head on frozen features, or nearest neighbours
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Probe(Box<classify::ProbeArgs>),
    /// Loss and accuracy of a checkpoint on validation images
    Evaluate(EvaluateArgs),
    /// What a model sees in images: masked, reconstructed, and where its class token looks, as one PNG
    Visualize(visualize::VisualizeArgs),
    /// List the recipes, or print one whole
    Presets {
        /// The recipe to print
        name: Option<String>,
    },
    /// Time single ops, kernels, a whole training step or the loading of images
    #[command(subcommand)]
    Measure(Measure),
    /// Pack a set of images into one file, check it, unpack it, or look at a set
    #[command(subcommand)]
    Data(data::Data),
    /// Check this program's numbers against PyTorch's: operations, models, optimiser steps, checkpoint files
    Parity(ParityArgs),
    /// Convert a checkpoint's weights between PyTorch's .pth, .safetensors and masque's own, and between the names that programs give them
    Convert(convert::Convert),
    /// Run a command as several processes on this machine, one a GPU, that train one model
    Launch(launch::LaunchArgs),
    /// What this program and this machine offer: devices, CUDA's libraries, kernels, models
    Info {
        /// Each kernel, and where there is a GPU its registers, memory and occupancy
        #[arg(long)]
        kernels: bool,
    },
}

#[derive(Subcommand)]
enum Pretrain {
    /// MAE: hide most patches of an image, reconstruct their pixels
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Mae(Box<pretrain::PretrainArgs>),
    /// DMAE: MAE whose features follow those of a larger MAE that sees the same few patches
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Dmae(Box<dmae::DmaePretrainArgs>),
    /// TinyMIM: relate tokens as one block of a teacher does, or follow its features or its class token
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Tinymim(Box<tinymim::TinymimPretrainArgs>),
    /// DMJD: several views of an image, each hiding what those before it showed; what is hidden and what is seen is predicted
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Dmjd(Box<dmjd::DmjdPretrainArgs>),
    /// MaskFeat: hide patches behind a token, predict their oriented gradients
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Maskfeat(Box<maskfeat::MaskFeatPretrainArgs>),
    /// ConvMAE: MAE with convolution stages in front of the encoder
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Convmae(Box<convmae::ConvMaePretrainArgs>),
}

#[derive(Subcommand)]
enum Distill {
    /// MaskedKD: the teacher sees the patches alone that the student looks at
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Maskedkd(Box<distill::MaskedKdArgs>),
    /// The teacher sees everything; one loss for its answers and one for the labels
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Logit(Box<distill::LogitDistillArgs>),
    /// DeiT's: a second token of the student follows the teacher
    #[command(args_override_self = true, allow_negative_numbers = true)]
    Deit(Box<distill::LogitDistillArgs>),
}

#[derive(Subcommand)]
enum Measure {
    /// Products, layer norm, GELU, softmax and attention on the CPU, forward and backward, at the shapes of a ViT
    Ops(OpsArgs),
    /// Every op and every version of its kernels at the shapes of a ViT with masked tokens, beside what the machine copies and multiplies
    Kernels(kernels::KernelsArgs),
    /// What masking saves: steps of the five systems that see more or less of each image, beside what arithmetic promises
    Masking(Box<measure::masking::MaskingArgs>),
    /// What many ranks would cost, from a step measured here and the rates that join them; on CPU ranks beside what is measured
    Scaling(Box<measure::scaling::ScalingArgs>),
    /// Images a core decodes, cuts, augments and normalises, from JPEG files
    Loading {
        #[command(flatten)]
        loading: loading::LoadingArgs,
        /// One JSON object a line instead of text
        #[arg(long)]
        json: bool,
    },
    /// One training step of any of the five systems: teacher, forward, backward, AdamW
    Step {
        #[command(flatten)]
        step: step::StepArgs,
        /// One JSON object a line instead of text
        #[arg(long)]
        json: bool,
    },
    /// ConViT's convolution stages where patches are visible alone, beside everywhere: time of pre-training steps
    Stages {
        #[command(flatten)]
        stages: measure::stages::StagesArgs,
        /// One JSON object a line instead of text
        #[arg(long)]
        json: bool,
    },
    /// What a teacher costs that sees a part of the patches, beside the student: time and memory of steps of MaskedKD
    Teacher {
        #[command(flatten)]
        teacher: measure::teacher::TeacherArgs,
        /// One JSON object a line instead of text
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct OpsArgs {
    /// Only these ops, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Runs of each case that count, after two that do not
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// f32, or bf16 (products round their factors), where the processor has it
    #[arg(long, default_value = "f32")]
    precision: device::Precision,
    /// One JSON object a line instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ParityArgs {
    /// Case files (.safetensors, .pth) or folders of them
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Where to compute
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    device: Named,
    /// f32, or f64 to tell a mistake from rounding
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// How close f32 has to come
    #[arg(long, value_enum, default_value_t = LimitsArg::Suggested)]
    limits: LimitsArg,
    /// Count cases of methods that are not supported yet as failed
    #[arg(long)]
    strict: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    F64,
}

#[derive(Clone, Copy, ValueEnum)]
enum LimitsArg {
    /// 20 times the error of PyTorch's own f32, or 2e-5 for outputs and 5e-5 for gradients
    Suggested,
    /// 5 times, or 3e-6 and 1e-5
    Strict,
}

/// Runs the program; the exit code is 0, 1 (it failed) or 2 (what was typed cannot be meant).
pub fn main() -> ExitCode {
    let arguments = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let failed = |error: Error| {
        eprintln!("masque: {}", error.chain());
        ExitCode::from(error.exit_code())
    };
    if let Err(error) = launch::end_with_launcher() {
        return failed(error);
    }
    let arguments = match presets::expand(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return failed(error),
    };
    match command().try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => run(cli).unwrap_or_else(failed),
        Err(error) => clap_exit(&error),
    }
}

/// Runs a training command, or an evaluation, as one of some ranks that are threads of this program, on the threads for parallel work that there are.
pub fn run_as(arguments: &[&str], ranks: &Ranks) -> Result<ExitCode> {
    let arguments = presets::expand(std::iter::once("masque").chain(arguments.iter().copied()).map(String::from).collect())?;
    let matches = command().try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    execute(matches.map_err(|error| Error::usage(error.to_string()))?.command, Some(ranks))
}

/// The commands, each with the official defaults of its own.
fn command() -> clap::Command {
    let defaults = |command: clap::Command, defaults: &'static [(&'static str, &'static str)]| {
        defaults.iter().fold(command, |command, (flag, value)| command.mut_arg(flag, |arg| arg.default_value(value)))
    };
    let named = |command: clap::Command| {
        let help = "A published recipe, or one for the built-in images, in front of the other flags; masque presets lists them";
        let command = command.after_help(
            "The defaults above are those of the official programs. Without --preset and --data-path the flags of a preset for the built-in images stand in \
             front of yours (glyphs-...: masque presets lists them); with --resume those of the run that is gone on with.",
        );
        command.arg(clap::Arg::new("preset").long("preset").value_name("NAME").help(help))
    };
    Cli::command()
        .mut_subcommand("pretrain", |c| {
            let images = &[("crop_min", "0.2"), ("eval_freq", "20")];
            c.mut_subcommand("mae", |c| named(defaults(c, images)))
                .mut_subcommand("dmae", |c| named(defaults(defaults(c, images), &[("warmup_epochs", "20"), ("save_freq", "5")])))
                .mut_subcommand("tinymim", |c| named(defaults(c, images)))
                .mut_subcommand("dmjd", |c| named(defaults(c, &[("crop_min", "0.5"), ("eval_freq", "20"), ("save_freq", "10")])))
                .mut_subcommand("maskfeat", |c| named(defaults(c, MASKFEAT)))
                .mut_subcommand("convmae", |c| {
                    named(defaults(defaults(c, images), &[("model", "convmae_convvit_base_patch16"), ("save_freq", "40")]))
                })
        })
        .mut_subcommand("measure", |c| c.mut_subcommand("scaling", |c| defaults(c, &[("batch", "8")])))
        .mut_subcommand("finetune", |c| {
            named(defaults(c, &[("epochs", "50"), ("warmup_epochs", "5"), ("min_lr", "1e-6"), ("save_freq", "1")]))
        })
        .mut_subcommand("train", |c| named(defaults(c, DEIT)))
        .mut_subcommand("distill", |c| {
            c.mut_subcommand("maskedkd", |c| named(defaults(c, DEIT)))
                .mut_subcommand("logit", |c| named(defaults(c, DEIT)))
                .mut_subcommand("deit", |c| {
                    named(defaults(defaults(c, DEIT), &[("model", "deit_base_distilled_patch16_224"), ("distillation_type", "hard")]))
                })
        })
        .mut_subcommand("probe", |c| {
            let probe = [("epochs", "90"), ("warmup_epochs", "10"), ("batch_size", "512"), ("blr", "0.1"), ("weight_decay", "0")];
            let model = [("save_freq", "1"), ("global_pool", "false"), ("head_std", "0.01"), ("crop", "once")];
            named(
                [probe.to_vec(), model.to_vec()]
                    .concat()
                    .into_iter()
                    .fold(c, |c, (flag, value)| c.mut_arg(flag, |arg| arg.default_value(value))),
            )
        })
}

/// What MaskFeat's images are known to be trained with: a rate of 1.6e-3 for 2048 of them.
const MASKFEAT: &[(&str, &str)] = &[
    ("epochs", "300"),
    ("warmup_epochs", "30"),
    ("blr", "2e-4"),
    ("min_lr", "1e-6"),
    ("clip_grad", "0.02"),
    ("crop_min", "0.5"),
    ("eval_freq", "20"),
];

/// What DeiT's program starts from.
const DEIT: &[(&str, &str)] = &[
    ("model", "deit_base_patch16_224"),
    ("global_pool", "false"),
    ("head", "keep"),
    ("head_std", "0.02"),
    ("epochs", "300"),
    ("lr", "5e-4"),
    ("min_lr", "1e-5"),
    ("warmup_epochs", "5"),
    ("save_freq", "1"),
    ("mixup", "0.8"),
    ("cutmix", "1"),
    ("repeated_aug", "true"),
];

/// Help and version go to standard output with code 0, mistakes to standard error in one line with code 2.
fn clap_exit(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A closed pipe is no reason to fail.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing".to_string(),
        _ => error.to_string(),
    };
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ").replace(" tip: ", "; ");
    eprintln!("masque: {}; --help lists what can be typed", line.trim_start_matches("error: "));
    ExitCode::from(2)
}

fn run(cli: Cli) -> Result<ExitCode> {
    if cli.threads == Some(0) {
        return Err(Error::usage("--threads 0: at least one thread is needed; leave the flag out to use every core"));
    }
    // The launcher computes nothing, and its ranks end with the thread that starts them: it is the program's first.
    if let Command::Launch(args) = cli.command {
        return launch::run(args, cli.threads);
    }
    parallel::with_threads(cli.threads.unwrap_or_else(own_threads), || execute(cli.command, None))?
}

/// This process's share of the machine where a launcher started several on it; 0, which is every core, otherwise. What is wrong with a launcher's variables, the
/// commands say that need them.
fn own_threads() -> usize {
    match Launched::from_environment() {
        Ok(Some(launched)) if std::env::var_os("RAYON_NUM_THREADS").is_none() => launched.threads(),
        _ => 0,
    }
}

/// `ranks`: those that it is one of; None: those that a launcher started, if one did.
fn execute(command: Command, ranks: Option<&Ranks>) -> Result<ExitCode> {
    match command {
        Command::Pretrain(Pretrain::Mae(args)) => return together(*args, ranks, |args| &mut args.common.run, pretrain::mae),
        Command::Pretrain(Pretrain::Dmae(args)) => return together(*args, ranks, |args| &mut args.common.run, dmae::dmae),
        Command::Pretrain(Pretrain::Tinymim(args)) => return together(*args, ranks, |args| &mut args.common.run, tinymim::tinymim),
        Command::Pretrain(Pretrain::Dmjd(args)) => return together(*args, ranks, |args| &mut args.common.run, dmjd::dmjd),
        Command::Pretrain(Pretrain::Maskfeat(args)) => return together(*args, ranks, |args| &mut args.common.run, maskfeat::maskfeat),
        Command::Pretrain(Pretrain::Convmae(args)) => return together(*args, ranks, |args| &mut args.common.run, convmae::convmae),
        Command::Train(args) => return together(*args, ranks, |args| &mut args.run, distill::train),
        Command::Distill(Distill::Maskedkd(args)) => return together(*args, ranks, |args| &mut args.distill.train.run, distill::maskedkd),
        Command::Distill(Distill::Logit(args)) => {
            return together(*args, ranks, |args| &mut args.train.run, |args, say| distill::logit(args, false, say));
        }
        Command::Distill(Distill::Deit(args)) => {
            return together(*args, ranks, |args| &mut args.train.run, |args, say| distill::logit(args, true, say));
        }
        Command::Finetune(args) => return together(*args, ranks, |args| &mut args.run, classify::finetune),
        Command::Probe(args) => return together(*args, ranks, |args| &mut args.run, classify::probe),
        Command::Evaluate(args) => evaluated(args, ranks)?,
        Command::Visualize(args) => args.run(&mut |line| say(line))?,
        Command::Presets { name: Some(name) } => say(&presets::find(&name)?.text()),
        Command::Presets { name: None } => {
            recipes::all().iter().for_each(|preset| say(&format!("{:<34} {:<17} {}", preset.name, preset.command, preset.about)));
        }
        Command::Measure(Measure::Ops(args)) => {
            ops::run(&args.only, args.rounds, args.precision, |row| say(&if args.json { row.json().to_string() } else { row.text() }))?;
        }
        Command::Measure(Measure::Kernels(args)) => kernels::run(&args, &mut |line| say(line))?,
        Command::Measure(Measure::Masking(args)) => measure::masking::run(&args, &mut |line| say(line))?,
        Command::Measure(Measure::Scaling(args)) => measure::scaling::run(&args, &mut |line| say(line))?,
        Command::Measure(Measure::Loading { loading: args, json }) => {
            loading::run(&args, |row| say(&if json { row.json().to_string() } else { row.text() }))?;
        }
        Command::Measure(Measure::Step { step: args, json }) => {
            step::run_each(&args, |report| say(&if json { report.json().to_string() } else { report.text() }))?;
        }
        Command::Measure(Measure::Stages { stages: args, json }) => {
            let report = measure::stages::run(&args)?;
            say(&if json { report.json().to_string() } else { report.text() });
        }
        Command::Measure(Measure::Teacher { teacher: args, json }) => {
            let report = measure::teacher::run(&args)?;
            say(&if json { report.json().to_string() } else { report.text() });
        }
        Command::Data(command) => return data::run(command),
        Command::Launch(args) => return launch::run(args, None),
        Command::Parity(args) => return check(args),
        Command::Convert(args) => convert::run(&args, say)?,
        Command::Info { kernels } => info::run(kernels, &mut |line| say(line))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Trains as one of the ranks that a launcher started, or alone. Rank 0 speaks; an error of one is told to all.
fn together<A>(
    mut args: A,
    ranks: Option<&Ranks>,
    run: impl Fn(&mut A) -> &mut RunArgs,
    train: impl FnOnce(&A, &mut dyn FnMut(&str)) -> Result<Ended>,
) -> Result<ExitCode> {
    let ranks = match ranks {
        Some(ranks) => ranks.clone(),
        None => run(&mut args).join()?,
    };
    run(&mut args).ranks = ranks.clone();
    let mut speak = |line: &str| {
        if ranks.is_first() {
            say(line)
        }
    };
    let done = train(&args, &mut speak).inspect_err(|error| ranks.fail(error))?;
    Ok(ended(done, &mut speak))
}

fn evaluated(mut args: EvaluateArgs, ranks: Option<&Ranks>) -> Result<()> {
    args.ranks = ranks.map_or_else(|| Ranks::launched(EVALUATION), |ranks| Ok(ranks.clone()))?;
    let ranks = args.ranks.clone();
    args.run(&mut |line| {
        if ranks.is_first() {
            say(line)
        }
    })
    .map(|_| ())
    .inspect_err(|error| ranks.fail(error))
}

/// How long ranks that evaluate wait for each other.
const EVALUATION: Duration = Duration::from_secs(600);

/// How a run ended: 0, or what a shell gives for the signal that stopped it.
fn ended(ended: Ended, speak: &mut dyn FnMut(&str)) -> ExitCode {
    ended.signal.map_or(ExitCode::SUCCESS, |(number, name)| {
        speak(&format!("stopped by {name} after update {}; --resume auto goes on from there", ended.place.update));
        ExitCode::from(128 + number)
    })
}

/// Prints a line; when the reader has gone away there is nobody left to tell.
fn say(line: &str) {
    use std::io::Write;
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

/// Exit code 1 if a case failed.
fn check(args: ParityArgs) -> Result<ExitCode> {
    let options = parity::Options {
        paths: args.paths,
        device: args.device.open()?,
        precision: match args.precision {
            Precision::F32 => Dtype::F32,
            Precision::F64 => Dtype::F64,
        },
        limits: match args.limits {
            LimitsArg::Suggested => parity::Limits::Suggested,
            LimitsArg::Strict => parity::Limits::Strict,
        },
        strict: args.strict,
    };
    let summary = parity::run(&options, &mut |line| say(line))?;
    Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
