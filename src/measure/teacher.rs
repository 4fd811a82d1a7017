//! What a teacher of logits costs where it sees k of N patches, beside what the student costs: time and memory of whole steps of MaskedKD.
//!
//! The counts take turns: each round steps once at every k, up the list and down again, so that what slows the machine down meets all of them. A ratio is that
//! of two steps of one round; shown are the median over the rounds and the range. FLOPs are counted as MaskedKD does (all patches projected):
//!
//!   teacher F(k) / F(N),   step (F(k) + 3 F_student) / (F(N) + 3 F_student)
//!
//! Memory is what the pool has taken once steps with labels alone, with the teacher, and with a teacher on a tape were made, in this order.

use super::{Times, timed};
use crate::device::{Device, Named, Precision, memory, parallel};
use crate::error::{Error, Result};
use crate::methods::maskedkd::{Distillation, Distilling, Form, LogitArgs, MaskedKd};
use crate::methods::selection::Selection;
use crate::methods::teacher::{Network, Teacher};
use crate::methods::{Batch, Method};
use crate::nn::classifier::{Classifier, ClassifierConfig, Pool};
use crate::nn::vit::VitConfig;
use crate::nn::{Scope, flops, presets};
use crate::optim::adamw::AdamW;
use crate::optim::{Optimizer, groups};
use crate::param::ParamsBuilder;
use crate::rng::Rng;
use crate::tape::Tape;
use crate::tensor::{Dtype, Tensor};
use serde_json::{Value, json};

/// Who teaches whom, and how often.
#[derive(Clone, Debug, clap::Args)]
pub struct TeacherArgs {
    /// Teacher by its name or size: small, base, deit3_small_patch16_224, glyph_s ...
    #[arg(long, default_value = "small")]
    pub model: String,
    /// Student by its name or size
    #[arg(long, default_value = "tiny")]
    pub student: String,
    /// Side of the square images in pixels
    #[arg(long, default_value_t = 224)]
    pub image_size: usize,
    /// Patches that the teacher sees [default: all, 144 of 196, half, a quarter]
    #[arg(long, value_delimiter = ',', action = clap::ArgAction::Set, num_args = 1.., value_name = "K,..")]
    pub keep: Option<Vec<usize>>,
    /// Images a step
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Classes of both
    #[arg(long, default_value_t = 1000)]
    pub classes: usize,
    /// Rounds that are measured
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Rounds before them that are not
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Seed of the weights and the images
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to compute; steps are not recorded
    #[arg(long, default_value = "cpu", value_name = "cpu|emulated|gpu")]
    pub device: Named,
    /// f32, bf16 (products of bf16 numbers, summed in f32; on a CPU that has it, and on a GPU); on a GPU also tf32
    #[arg(long, default_value = "f32")]
    pub precision: Precision,
}

/// One count of patches.
struct Row {
    keep: usize,
    teacher: Times,
    student: Times,
    step: Times,
    /// Against all patches: of the teacher and of the step, and what FLOPs say of both.
    ratios: [Times; 2],
    flops: [f64; 2],
}

/// Bytes of the pool.
struct Memory {
    labels_alone: u64,
    with_teacher: u64,
    on_tape: u64,
    /// The teacher's own.
    weights: u64,
}

pub struct Report {
    args: TeacherArgs,
    patches: usize,
    rows: Vec<Row>,
    memory: Memory,
}

/// No more rounds than this are counted.
const MOST_ROUNDS: usize = 1_000_000;
const LEARNING_RATE: f64 = 1e-4;

impl TeacherArgs {
    fn config(&self, flag: &str, model: &str) -> Result<ClassifierConfig> {
        let named = presets::named(model)?;
        named.needs_patches(model, "masque measure teacher")?;
        let vit = named.classifier(self.image_size, 0.0)?;
        vit.check().map_err(|error| Error::usage(format!("{flag} {model}: {}", error.chain())))?;
        if vit.distillation_token {
            return Err(Error::usage(format!("{flag} {model}: a model with a distillation token is not measured here; take one without")));
        }
        Ok(ClassifierConfig { vit, classes: self.classes, pool: Pool::ClassToken, probe: false })
    }

    /// The counts in order, all patches first.
    fn counts(&self, patches: usize) -> Result<Vec<usize>> {
        let usual = || vec![patches, 144 * patches / 196, patches / 2, patches / 4];
        let mut counts = self.keep.clone().unwrap_or_else(usual);
        if let Some(wrong) = counts.iter().find(|&&keep| keep == 0 || keep > patches) {
            return Err(Error::usage(format!("--keep {wrong}: the image has {patches} patches, of which 1 to {patches} can be seen")));
        }
        counts.retain(|&keep| keep != patches);
        counts.insert(0, patches);
        counts.dedup();
        Ok(counts)
    }

    fn check(&self, teacher: &VitConfig, student: &VitConfig) -> Result<()> {
        let usage = |text: String| Err(Error::usage(text));
        for (flag, value, least) in
            [("--rounds", self.rounds, 1), ("--warmup", self.warmup, 0), ("--batch", self.batch, 1), ("--classes", self.classes, 1)]
        {
            if !(least..=MOST_ROUNDS).contains(&value) {
                return usage(format!("{flag} {value} is not from {least} to {MOST_ROUNDS}"));
            }
        }
        if teacher.grid() != student.grid() {
            return usage(format!(
                "--model {} cuts an image into {:?} patches, --student {} into {:?}; both have to share the grid",
                self.model,
                teacher.grid(),
                self.student,
                student.grid()
            ));
        }
        let weights = |vit: &VitConfig| 12 * vit.width as u128 * vit.width as u128 * vit.depth as u128;
        let activations = 16 * self.batch as u128 * student.patches() as u128 * student.width as u128 * student.depth as u128;
        let (least, there) = (4 * (weights(teacher) + 4 * weights(student) + activations), u128::from(memory::of_the_machine()));
        if least > there {
            return usage(format!(
                "a step needs at least {} GB of memory but the machine has {}; make the batch, the images or the models smaller",
                least / 1_000_000_000,
                there / 1_000_000_000
            ));
        }
        Ok(())
    }
}

/// What steps are made with.
struct Bench {
    method: MaskedKd,
    optimizer: AdamW,
    batch: Batch,
    device: Device,
    rng: Rng,
    steps: u64,
}

impl Bench {
    /// A step; it may hold the tape of something else meanwhile. Milliseconds of all of it and of the teacher.
    fn step<R>(&mut self, beside: impl FnOnce(&MaskedKd, &Batch) -> Result<R>) -> Result<[f64; 2]> {
        self.steps += 1;
        let rng = self.rng.at(self.steps);
        let spent = |method: &MaskedKd| method.teacher_cost().map_or(0.0, |cost| cost.seconds);
        let before = spent(&self.method);
        let (ms, done) = timed(|| -> Result<()> {
            let tape = Tape::new();
            let loss = self.method.loss(&tape, &self.batch, &rng)?.total;
            let held = beside(&self.method, &self.batch)?;
            tape.backward(&loss, &mut [&mut self.method.params])?;
            drop((loss, held));
            self.optimizer.step(&mut self.method.params, LEARNING_RATE)?;
            self.method.params.clear_gradients();
            self.device.gpu().map_or(Ok(()), |gpu| gpu.wait())
        });
        done?;
        Ok([ms, 1e3 * (spent(&self.method) - before)])
    }

    fn keep(&mut self, keep: usize) {
        let patches = self.method.student.vit.config.patches();
        if let Some((_, distilling)) = &mut self.method.taught {
            (distilling.keep, distilling.selection) = (keep, if keep < patches { Selection::Student } else { Selection::None });
        }
    }

    fn taken(&self) -> u64 {
        self.device.gpu().map_or_else(|| memory::taken_from_system().0 as u64, |gpu| gpu.memory().1)
    }

    /// What the pool takes, one kind of step after the other; the teacher stays.
    fn memory(&mut self, teacher: Teacher, distilling: Distilling) -> Result<Memory> {
        let nothing = |_: &MaskedKd, _: &Batch| Ok(());
        let weights = teacher.params.ids().map(|id| 4 * teacher.params.value(id).numel() as u64).sum();
        (0..2).try_for_each(|_| self.step(nothing).map(drop))?;
        let labels_alone = self.taken();
        // The teacher's weights were there before and are counted on their own.
        self.method.taught = Some((teacher, distilling));
        (0..2).try_for_each(|_| self.step(nothing).map(drop))?;
        let with_teacher = self.taken();
        self.step(|method, batch| {
            let (teacher, _) = method.taught.as_ref().expect("given above");
            let tape = Tape::new();
            let Network::Classifier(classifier) = &teacher.network else { return Ok(None) };
            let output = classifier.forward(&Scope::new(&tape, &teacher.params), &batch.images, None, false)?;
            Ok(Some((tape, output)))
        })?;
        Ok(Memory { labels_alone, with_teacher, on_tape: self.taken(), weights })
    }
}

fn classifier_teacher(config: ClassifierConfig, name: &str, device: &Device, dtype: Dtype, rng: &Rng) -> Result<Teacher> {
    let mut b = ParamsBuilder::default();
    let classifier = Classifier::new(&mut b, config)?;
    let mut params = b.build(Dtype::F32, rng)?;
    params.move_to(device, dtype)?;
    Ok(Teacher::new(name, params, Network::Classifier(classifier)))
}

pub fn run(args: &TeacherArgs) -> Result<Report> {
    let (teacher, student) = (args.config("--model", &args.model)?, args.config("--student", &args.student)?);
    args.check(&teacher.vit, &student.vit)?;
    let patches = student.vit.patches();
    let counts = args.counts(patches)?;
    let macs = |keep: usize| flops::masked_classifier_macs(&teacher.vit, keep, args.classes) as f64;
    let own = 3.0 * flops::classifier_macs(&student.vit, args.classes) as f64;
    let predicted = |keep: usize| [macs(keep) / macs(patches), (macs(keep) + own) / (macs(patches) + own)];
    let flops: Vec<[f64; 2]> = counts.iter().map(|&keep| predicted(keep)).collect();

    let device = args.device.open()?;
    device.compute_in(args.precision)?;
    let (dtype, rng) = (args.precision.dtype(), Rng::new(args.seed));
    let shape = [args.batch, student.vit.channels, args.image_size, args.image_size];
    let images = Tensor::from_slice(&shape, &rng.normal("images", shape.iter().product()))?.on(&device)?;
    let mut targets = vec![0f32; args.batch * args.classes];
    targets.iter_mut().step_by(args.classes).for_each(|first| *first = 1.0);
    let targets = Tensor::from_slice(&[args.batch, args.classes], &targets)?.on(&device)?;

    let teaching = LogitArgs {
        distillation_type: Distillation::Soft,
        distillation_alpha: 0.5,
        distillation_tau: 1.0,
        loss_form: Form::Convex,
        kl_reduction: None,
    };
    let distilling = teaching.config(&student.vit)?.ok_or_else(|| Error::new("there is nothing to distil"))?;
    let teacher = classifier_teacher(teacher, &args.model, &device, dtype, &rng)?;
    let mut method = MaskedKd::new(student, None, false, Dtype::F32, &rng)?;
    method.params.move_to(&device, dtype)?;
    let optimizer = AdamW::new(groups::by_decay(&method.params, 0.05, &[]), (0.9, 0.999), 1e-8)?;
    let batch = Batch { targets: Some(targets), ..Batch::of_images(images) };
    let mut bench = Bench { method, optimizer, batch, device, rng, steps: 0 };
    let memory = bench.memory(teacher, distilling)?;

    // [count][round]: the whole step and the teacher's part.
    let mut times: Vec<Vec<[f64; 2]>> = vec![Vec::new(); counts.len()];
    for round in 0..args.warmup + args.rounds {
        let mut order: Vec<usize> = (0..counts.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            bench.keep(counts[at]);
            let taken = bench.step(|_, _| Ok(()))?;
            if round >= args.warmup {
                times[at].push(taken);
            }
        }
    }
    let rows = counts.into_iter().zip(&times).zip(flops).map(|((keep, taken), flops)| {
        let of = |f: &dyn Fn(&[f64; 2]) -> f64| Times::of(taken.iter().map(f).collect());
        let ratio = |part: usize| Times::of(taken.iter().zip(&times[0]).map(|(own, all)| own[part] / all[part]).collect());
        Row {
            keep,
            teacher: of(&|[_, teacher]| *teacher),
            student: of(&|[all, teacher]| all - teacher),
            step: of(&|[all, _]| *all),
            ratios: [ratio(1), ratio(0)],
            flops,
        }
    });
    Ok(Report { args: args.clone(), patches, rows: rows.collect(), memory })
}

impl Report {
    pub fn json(&self) -> Value {
        let (a, m) = (&self.args, &self.memory);
        let times = |t: &Times| json!({ "median": t.median, "min": t.min, "max": t.max });
        let row = |row: &Row| {
            json!({
                "keep": row.keep, "teacher_ms": times(&row.teacher), "student_ms": times(&row.student), "step_ms": times(&row.step),
                "teacher_ratio": times(&row.ratios[0]), "step_ratio": times(&row.ratios[1]),
                "teacher_flops_ratio": row.flops[0], "step_flops_ratio": row.flops[1],
            })
        };
        json!({
            "what": "teacher", "teacher": a.model, "student": a.student, "image_size": a.image_size, "patches": self.patches, "batch": a.batch,
            "classes": a.classes, "dtype": a.precision.name(), "device": a.device.to_string(), "threads": parallel::threads(), "rounds": a.rounds,
            "warmup": a.warmup, "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "bytes": { "labels_alone": m.labels_alone, "with_teacher": m.with_teacher, "teacher_on_tape": m.on_tape, "teacher_weights": m.weights },
        })
    }

    pub fn text(&self) -> String {
        let (a, m) = (&self.args, &self.memory);
        let device = if a.device == Named::Cpu { "CPU".to_string() } else { format!("device {}", a.device) };
        let mut text = format!(
            "MaskedKD step, teacher {}, student {}, images {} x {}, {} patches, {} classes; batch {} on {} threads, {}, {device}\n\
             {} rounds that take turns; median (range)\n\n\
             {:>5} {:>26} {:>21} {:>7}   {:>26} {:>26} {:>21} {:>7}\n",
            a.model,
            a.student,
            a.image_size,
            a.image_size,
            self.patches,
            a.classes,
            a.batch,
            parallel::threads(),
            a.precision,
            a.rounds,
            "kept",
            "teacher, ms",
            "of all",
            "FLOPs",
            "student, ms",
            "step, ms",
            "of all",
            "FLOPs"
        );
        let ms = |t: &Times| format!("{:.1} ({:.1} to {:.1})", t.median, t.min, t.max);
        let part = |t: &Times| format!("{:.3} ({:.3} to {:.3})", t.median, t.min, t.max);
        for row in &self.rows {
            text += &format!(
                "{:>5} {:>26} {:>21} {:>7.3}   {:>26} {:>26} {:>21} {:>7.3}\n",
                row.keep,
                ms(&row.teacher),
                part(&row.ratios[0]),
                row.flops[0],
                ms(&row.student),
                ms(&row.step),
                part(&row.ratios[1]),
                row.flops[1]
            );
        }
        let mega = |bytes: u64| bytes as f64 / 1e6;
        text + &format!(
            "\nmemory of the pool, the teacher's weights of {:.1} MB in it: {:.1} MB after steps with labels alone, {:.1} MB with the teacher seeing all patches;\n\
             {:.1} MB if its pass were on a tape",
            mega(m.weights),
            mega(m.labels_alone),
            mega(m.with_teacher),
            mega(m.on_tape)
        )
    }
}
