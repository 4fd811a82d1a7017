//! What a teacher answers to views that return is computed once: same losses, fewer passes; damage is mended, what does not belong is refused.

use masque::bail;
use masque::data::loader::{Loader, LoaderOptions, Order};
use masque::data::mixing::Mixing;
use masque::data::transform::Transform;
use masque::data::{Dataset, Picture};
use masque::device::Precision;
use masque::error::{Error, Result};
use masque::methods::maskedkd::{Distillation, Form, LogitArgs, MaskedKd};
use masque::methods::teacher::{Network, Teacher};
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::presets;
use masque::optim::adamw::AdamW;
use masque::optim::groups;
use masque::param::ParamsBuilder;
use masque::rng::Rng;
use masque::tensor::{Device, Dtype};
use masque::train::cache::{Kept, Shown};
use masque::train::feed::{Feed, Labels};
use masque::train::step::{Step, StepOptions};
use masque::train::teacher::TeacherArgs;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SIDE: usize = 24;
const CLASSES: usize = 7;
const IMAGES: usize = 18;
const BATCH: usize = 6;
const BATCHES: u64 = (IMAGES / BATCH) as u64;

/// Noise with a label; one image may be unreadable.
struct Noise {
    bad: Option<usize>,
    seed: u64,
}

impl Dataset for Noise {
    fn len(&self) -> usize {
        IMAGES
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn label(&self, index: usize) -> u32 {
        (index % CLASSES) as u32
    }

    fn name(&self, index: usize) -> String {
        format!("noise {index}")
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        if self.bad == Some(index) {
            bail!("noise {index} is torn");
        }
        let mut draws = Rng::new(self.seed).stream("noise", index as u64);
        Picture::new([32, 32], 3, (0..32 * 32 * 3).map(|_| draws.below(256) as u8).collect())
    }
}

/// A run; each field is what may differ between two.
#[derive(Clone)]
struct Run {
    cache: Option<PathBuf>,
    views: Option<u64>,
    seed: u64,
    teacher: u64,
    transform: Transform,
    mean: f32,
    what: &'static str,
    block: Option<usize>,
    noise: u64,
    bad: Option<usize>,
    epochs: u64,
    device: Device,
    precision: Precision,
}

fn run(cache: Option<&Path>) -> Run {
    Run {
        cache: cache.map(Path::to_path_buf),
        views: Some(2),
        seed: 3,
        teacher: 1,
        transform: Transform::mae_pretrain(SIDE),
        mean: 0.5,
        what: "logits",
        block: None,
        noise: 1,
        bad: None,
        epochs: 4,
        device: Device::Cpu,
        precision: Precision::F32,
    }
}

fn config(name: &str, side: usize) -> Result<ClassifierConfig> {
    Ok(ClassifierConfig { vit: presets::named(name)?.classifier(side, 0.0)?, classes: CLASSES, pool: Pool::Mean, probe: false })
}

/// What was said, the bits of all losses, and how often the teacher was asked.
type Went = (Vec<String>, Vec<u64>, u64);

impl Run {
    fn teacher(&self) -> Result<Teacher> {
        let mut b = ParamsBuilder::default();
        let classifier = Classifier::new(&mut b, config("glyph_s", self.transform.side)?)?;
        let mut params = b.build(Dtype::F32, &Rng::new(self.teacher))?;
        params.move_to(&self.device, self.precision.dtype())?;
        Ok(Teacher::new("a teacher", params, Network::Classifier(classifier)))
    }

    fn images(&self) -> Arc<dyn Dataset> {
        Arc::new(Noise { bad: self.bad, seed: self.noise })
    }

    /// A teacher that remembers.
    fn remembering(&self, say: &mut dyn FnMut(&str)) -> Result<Teacher> {
        let args: TeacherArgs = serde_json::from_value(json!({ "teacher-ema": false, "teacher-cache": self.cache })).unwrap();
        let shown = Shown {
            images: self.images(),
            transform: self.transform.clone(),
            statistics: [vec![self.mean; 3], vec![0.25; 3]],
            seed: self.seed,
            views: self.views,
            precision: self.precision,
            ranks: Default::default(),
        };
        let mut teacher = self.teacher()?;
        let kept = Kept { what: self.what, block: self.block };
        args.remember(&mut teacher, kept, &shown, |teacher, images| teacher.logits(images, None), say)?;
        Ok(teacher)
    }

    fn go(&self) -> Result<Went> {
        let mut said = Vec::new();
        let teacher = self.remembering(&mut |text| said.push(text.to_string()))?;
        let student = config("glyph_t", self.transform.side)?;
        let args = LogitArgs {
            distillation_type: Distillation::Soft,
            distillation_alpha: 0.5,
            distillation_tau: 2.0,
            loss_form: Form::Convex,
            kl_reduction: None,
        };
        let distilling = args.config(&student.vit)?.unwrap();
        let mut method = MaskedKd::new(student, Some((teacher, distilling)), false, Dtype::F32, &Rng::new(self.seed))?;
        method.params.move_to(&self.device, self.precision.dtype())?;
        let optimizer = AdamW::new(groups::by_decay(&method.params, 0.05, &[]), (0.9, 0.999), 1e-8)?;
        let mut step = Step::new(Box::new(method), Box::new(optimizer), StepOptions::default());
        let options =
            LoaderOptions { batch: BATCH, order: Order::Shuffled, seed: self.seed, views: self.views, ..LoaderOptions::default() };
        let loader = Loader::new(self.images(), self.transform.clone(), options);
        let labels = Some(Labels { classes: CLASSES, mixing: Mixing::default(), labelled: None });
        let feed = Feed { device: self.device.clone(), mean: vec![self.mean; 3], std: vec![0.25; 3], labels, bytes: false };
        let mut losses = Vec::new();
        for epoch in 0..self.epochs {
            for (micro, loaded) in loader.epoch(epoch, 0).enumerate() {
                let rng = Rng::new(self.seed).at(epoch * BATCHES + micro as u64);
                let mut batch = feed.training(loaded?, &mut rng.stream("mixing", 0))?;
                step.method().prepare(&mut batch, &rng)?;
                losses.push(step.run(&batch, &rng, 1e-3)?.loss.to_bits());
            }
        }
        let passes = step.method().teacher_cost().unwrap().passes;
        Ok((said, losses, passes))
    }
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("teacher-cache").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    folder
}

fn file(folder: &Path) -> PathBuf {
    folder.join("teacher.masque-cache")
}

/// Where the record of a view begins: an answer of f32, its mark.
fn record(bytes: &[u8], key: usize) -> usize {
    let each = (CLASSES * 4 + 8).next_multiple_of(8);
    bytes.len() - 2 * IMAGES * each + key * each
}

#[test]
fn a_run_that_remembers_has_the_losses_of_one_that_does_not_bit_for_bit() {
    let two = Transform::mae_pretrain(SIDE).two_views(0.4).unwrap();
    for (number, transform) in [Transform::mae_pretrain(SIDE), two].into_iter().enumerate() {
        let folder = folder(&format!("same-{number}"));
        let (_, plain, asked) = Run { transform: transform.clone(), ..run(None) }.go().unwrap();
        assert_eq!((plain.len() as u64, asked), (4 * BATCHES, 4 * BATCHES));
        let remembering = Run { transform, ..run(Some(&folder)) };
        let (said, first, asked) = remembering.go().unwrap();
        assert!(first == plain, "run {number}");
        assert_eq!(asked, 2 * BATCHES, "two epochs show all views, and later ones ask nothing");
        assert!(said.len() == 1 && said[0].contains("36 answers of 28 bytes, 5.5 kB in all") && said[0].ends_with("begun now"), "{said:?}");
        let (said, again, asked) = remembering.go().unwrap();
        assert!(again == plain && asked == 0, "{asked}");
        assert!(said[0].ends_with("answers that are there are used"), "{said:?}");
    }
}

#[test]
fn images_that_stand_in_for_others_are_asked_about_each_time() {
    let folder = folder("torn");
    let torn = Run { bad: Some(5), ..run(None) };
    let (_, plain, _) = torn.go().unwrap();
    let (_, first, asked) = Run { cache: Some(folder), ..torn }.go().unwrap();
    assert!(first == plain);
    assert_eq!(asked, 2 * BATCHES + 2, "one batch of each later epoch holds an image that stands in");
}

#[test]
fn answers_that_are_damaged_or_half_written_are_computed_again() {
    let folder = folder("damaged");
    let remembering = run(Some(&folder));
    let (_, plain, _) = remembering.go().unwrap();
    let whole = std::fs::read(file(&folder)).unwrap();
    // A bit of an answer, half an answer, a mark, an answer that belongs elsewhere.
    let damage: [fn(&mut [u8]); 4] = [
        |bytes| bytes[record(bytes, 7) + 3] ^= 4,
        |bytes| {
            let at = record(bytes, 7);
            bytes[at + 12..at + 36].fill(0);
        },
        |bytes| bytes[record(bytes, 7) + CLASSES * 4 + 4] = 9,
        |bytes| {
            let (from, to) = (record(bytes, 8), record(bytes, 7));
            bytes.copy_within(from..from + 36, to);
        },
    ];
    for damage in damage {
        let mut bytes = whole.clone();
        damage(&mut bytes);
        assert!(bytes != whole);
        std::fs::write(file(&folder), &bytes).unwrap();
        let (_, losses, asked) = remembering.go().unwrap();
        assert!(losses == plain && asked == 1, "{asked}");
        assert!(std::fs::read(file(&folder)).unwrap() == whole, "the answer was not mended");
    }
}

#[test]
fn a_file_that_was_left_unfinished_or_is_none_of_ours_is_a_sentence() {
    let folder = folder("unfinished");
    let remembering = run(Some(&folder));
    std::fs::create_dir_all(&folder).unwrap();
    // What a process left that was killed while it made the file.
    std::fs::write(folder.join("teacher.partial"), b"masqueTC").unwrap();
    let (_, plain, _) = remembering.go().unwrap();
    let whole = std::fs::read(file(&folder)).unwrap();
    let refused = |bytes: &[u8], part: &str| {
        std::fs::write(file(&folder), bytes).unwrap();
        let error = remembering.go().unwrap_err().chain();
        assert!(error.contains(part) && error.contains("teacher.masque-cache"), "{error}");
    };
    refused(&whole[..whole.len() - 40], "cut short");
    refused(&whole[..20], "no teacher cache");
    refused(b"", "is empty");
    for at in [0, 8, 12, 15, 16, 40] {
        let mut bytes = whole.clone();
        bytes[at] ^= 128;
        refused(&bytes, "no teacher cache");
    }
    std::fs::write(file(&folder), &whole).unwrap();
    assert!(remembering.go().unwrap().1 == plain);
}

/// What makes a run another one.
type Change = fn(Run) -> Run;

#[test]
fn answers_of_another_run_are_refused_by_what_differs() {
    let folder = folder("others");
    let own = run(Some(&folder));
    own.go().unwrap();
    let before = std::fs::read(file(&folder)).unwrap();
    let changes: [(&str, Change); 9] = [
        ("its teacher is", |run| Run { teacher: 2, ..run }),
        ("its seed is 3, this run's 4", |run| Run { seed: 4, ..run }),
        ("its views are 2, this run's 3", |run| Run { views: Some(3), ..run }),
        ("its transform is random resized crop", |run| Run { transform: Transform::shifted(SIDE, 3), ..run }),
        ("its normalisation is", |run| Run { mean: 0.25, ..run }),
        ("its answers are logits, this run's queries and keys", |run| Run { what: "queries and keys", ..run }),
        ("its block is the last, this run's 3", |run| Run { block: Some(3), ..run }),
        ("its images are 18 with checksum", |run| Run { noise: 2, ..run }),
        // Another grid is another table of positions, and so another teacher.
        ("its teacher is", |run| Run { transform: Transform::mae_pretrain(SIDE + 8), ..run }),
    ];
    for (part, change) in changes {
        let error = change(own.clone()).go().unwrap_err();
        let text = error.chain();
        assert!(text.contains(part) && text.contains("--teacher-cache") && error.exit_code() == 1, "{text}");
    }
    assert!(std::fs::read(file(&folder)).unwrap() == before, "a refused file was changed");
}

#[test]
fn what_cannot_be_remembered_is_refused() {
    let refused = |run: Run| -> Error { run.remembering(&mut |_| ()).map(|_| ()).unwrap_err() };
    let error = refused(Run { views: None, ..run(Some(&folder("no-views"))) });
    assert!(error.exit_code() == 2 && error.chain().contains("--views"), "{}", error.chain());
    let large = folder("large");
    let error = refused(Run { views: Some(1 << 36), ..run(Some(&large)) }).chain();
    assert!(error.contains("GB and the disk has room for") && !file(&large).exists(), "{error}");
    let error = refused(Run { views: Some(1 << 50), ..run(Some(&large)) }).chain();
    assert!(error.contains("do not fit into any file"), "{error}");
    // Two writers at a time.
    let shared = folder("shared");
    let held = run(Some(&shared)).remembering(&mut |_| ()).unwrap();
    let error = refused(run(Some(&shared))).chain();
    assert!(error.contains("another process writes into this folder"), "{error}");
    drop(held);
    run(Some(&shared)).remembering(&mut |_| ()).unwrap();
    // A file where the folder should be.
    std::fs::write(folder("file"), b"").unwrap();
    let error = refused(run(Some(&folder_kept("file")))).chain();
    assert!(error.contains("cannot make the folder"), "{error}");
}

fn folder_kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("teacher-cache").join(name)
}

#[cfg(feature = "emulated")]
#[test]
fn a_run_on_the_emulated_device_remembers_too() {
    let device = || Device::Gpu(masque::device::gpu::Gpu::emulated().unwrap());
    for precision in [Precision::F32, Precision::Bf16] {
        let folder = folder(&format!("emulated-{precision}"));
        let plain = Run { device: device(), precision, epochs: 3, views: Some(1), ..run(None) };
        let (_, losses, _) = plain.go().unwrap();
        let remembering = Run { device: device(), cache: Some(folder), ..plain };
        let (_, first, asked) = remembering.go().unwrap();
        assert!(first == losses && asked == BATCHES, "{precision}: {asked}");
        let (_, again, asked) = Run { device: device(), ..remembering }.go().unwrap();
        assert!(again == losses && asked == 0, "{precision}: {asked}");
    }
}
