//! `--profile`: a file of Chrome's traces that says what a step was made of, written whole or not at all.

mod stand_in;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const TINY: &str =
    "pretrain mae --train-images 24 --val-images 8 --batch-size 4 --epochs 2 --warmup-epochs 0 --num-workers 0 --eval-freq 1 --threads 2";

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("masque-events-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn masque(flags: &str, folder: &Folder) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    command.args(flags.split_whitespace()).arg("--output-dir").arg(folder.0.join("run"));
    command
}

fn profiled(flags: &str, folder: &Folder) -> Command {
    let mut command = masque(flags, folder);
    command.arg("--profile").arg(folder.0.join("p.json"));
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// An event that took time.
#[derive(Debug)]
struct Span {
    name: String,
    track: (u64, u64),
    start: f64,
    end: f64,
    args: Value,
}

fn read(path: &Path) -> (Value, Vec<Span>) {
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let all = file["traceEvents"].as_array().unwrap();
    assert!(all.iter().all(|event| matches!(event["ph"].as_str(), Some("X" | "M"))));
    let span = |event: &Value| {
        let number = |key: &str| event[key].as_f64().unwrap_or_else(|| panic!("{key} of {event}"));
        let track = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        assert!(number("dur") >= 0.0 && number("ts") >= 0.0, "{event}");
        let name = event["name"].as_str().unwrap().to_string();
        Span { name, track, start: number("ts"), end: number("ts") + number("dur"), args: event["args"].clone() }
    };
    let spans = all.iter().filter(|event| event["ph"] == "X").map(span).collect();
    (file, spans)
}

const PHASES: (u64, u64) = (1, 1);
const FORWARD: (u64, u64) = (1, 2);
const BACKWARD: (u64, u64) = (1, 3);
const KERNELS: (u64, u64) = (2, 1);
/// Times are written to the nanosecond.
const ROUNDING: f64 = 2e-3;

/// Refuses two spans of a track of which neither holds the other.
#[track_caller]
fn nest(spans: &[Span], track: (u64, u64)) {
    let mut open: Vec<&Span> = Vec::new();
    for span in spans.iter().filter(|span| span.track == track) {
        open.retain(|other| other.end > span.start + ROUNDING);
        if let Some(outer) = open.last() {
            assert!(span.end <= outer.end + ROUNDING, "{span:?} begins within {outer:?} and ends behind it");
        }
        open.push(span);
    }
}

fn named<'a>(spans: &'a [Span], track: (u64, u64), name: &'a str) -> impl Iterator<Item = &'a Span> {
    spans.iter().filter(move |span| span.track == track && span.name == name)
}

fn time<'a>(spans: impl Iterator<Item = &'a Span>) -> f64 {
    spans.map(|span| span.end - span.start).sum()
}

#[test]
fn a_step_on_the_cpu_is_told_by_its_phases_and_ops() {
    let folder = Folder::new("cpu");
    let output = profiled(TINY, &folder).args(["--clip-grad", "1", "--model-ema-decay", "0.9"]).output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("profile: 3 updates of ") && said.contains("ui.perfetto.dev") && said.contains("\na step: "), "{said}");
    let table: Vec<&str> = said.lines().skip_while(|line| !line.starts_with("op  ")).collect();
    assert!(table[1..].iter().any(|row| row.starts_with("linear ") && row.contains(" backward ")), "{said}");

    let (file, spans) = read(&folder.0.join("p.json"));
    assert!(file["otherData"]["command"].as_str().unwrap().starts_with("masque pretrain mae --"), "{}", file["otherData"]);
    assert_eq!((&file["otherData"]["first_update"], &file["otherData"]["updates"]), (&4.into(), &3.into()));
    let threads: Vec<&str> = file["traceEvents"].as_array().unwrap().iter().filter_map(|event| event["args"]["name"].as_str()).collect();
    assert_eq!(threads, ["masque", "phases", "ops, forward", "ops, backward"]);
    [PHASES, FORWARD, BACKWARD].into_iter().for_each(|track| nest(&spans, track));

    let steps: Vec<&Span> = named(&spans, PHASES, "step").collect();
    assert_eq!(steps.iter().map(|step| step.args["what"].as_str().unwrap()).collect::<Vec<_>>(), ["update 4", "update 5", "update 6"]);
    for name in
        ["data", "feed", "forward", "mask", "encoder", "decoder", "loss", "backward", "read", "update", "clip", "optimizer", "average"]
    {
        assert!(named(&spans, PHASES, name).count() >= 3, "{name}");
    }
    let whole = time(steps.iter().copied());
    let within = |span: &&Span| steps.iter().any(|step| step.start <= span.start && span.end <= step.end + ROUNDING);
    let parts = ["data", "feed", "prepare", "forward", "backward", "read", "update", "average", "log"];
    let covered: f64 = parts.into_iter().map(|name| time(named(&spans, PHASES, name).filter(within))).sum();
    assert!(covered > 0.9 * whole, "phases cover {covered} of {whole} us");
    let ops = time(spans.iter().filter(|span| span.track != PHASES).filter(within));
    let walks: f64 = ["forward", "backward"].into_iter().map(|name| time(named(&spans, PHASES, name))).sum();
    assert!(ops > 0.9 * walks && ops <= walks, "ops cover {ops} of {walks} us");

    let linear = named(&spans, FORWARD, "linear").next().unwrap();
    let sizes = linear.args["sizes"].as_str().unwrap();
    assert!(
        sizes.starts_with("f32 [4, ") && sizes.contains(" -> f32 [4, ") && linear.args["flops"].as_f64() > Some(0.0),
        "{}",
        linear.args
    );
    assert!(spans.iter().filter(|span| span.track == BACKWARD).all(|span| span.args["sizes"].as_str().unwrap().contains(" -> ")));
    // It is no setting of the run.
    assert!(!std::fs::read_to_string(folder.0.join("run/command.txt")).unwrap().contains("profile"));
}

#[test]
fn what_lies_between_two_updates_is_in_it() {
    let folder = Folder::new("between");
    let output = profiled(TINY, &folder).args(["--profile-updates", "5", "--save-updates", "5"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let (_, spans) = read(&folder.0.join("p.json"));
    nest(&spans, PHASES);
    for name in ["evaluation", "checkpoint", "pictures"] {
        assert!(named(&spans, PHASES, name).count() >= 1, "{name}");
    }
}

#[test]
fn a_run_that_is_stopped_leaves_no_piece_of_a_profile_and_another_may_take_one() {
    let folder = Folder::new("stopped");
    let output = profiled(TINY, &folder).args(["--profile-updates", "100"]).arg("--epochs").arg("1").output().unwrap();
    // Six updates are fewer than were asked for: all of them are in it.
    assert!(output.status.success() && text(&output).contains("profile: 6 updates"), "{}", text(&output));
    std::fs::remove_file(folder.0.join("p.json")).unwrap();

    let mut child = profiled(TINY, &folder)
        .args(["--epochs", "400", "--resume", "auto", "--profile-updates", "100"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begun = || std::fs::read_to_string(folder.0.join("run/log.jsonl")).is_ok_and(|log| log.lines().count() >= 2);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !begun() {
        assert!(std::time::Instant::now() < until && child.try_wait().unwrap().is_none(), "the run did not begin");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(folder.names().iter().all(|name| name == "run"), "{:?}", folder.names());

    // What was typed before is not remembered.
    let output = masque(TINY, &folder).args(["--epochs", "3", "--resume", "auto"]).output().unwrap();
    assert!(output.status.success() && !text(&output).contains("profile"), "{}", text(&output));
    let output = profiled(TINY, &folder).args(["--epochs", "4", "--resume", "auto", "--profile-updates", "1"]).output().unwrap();
    assert!(output.status.success() && !text(&output).contains("--profile is"), "{}", text(&output));
    let (file, spans) = read(&folder.0.join("p.json"));
    assert_eq!((named(&spans, PHASES, "step").count(), &file["otherData"]["first_update"]), (1, &22.into()));

    std::fs::remove_file(folder.0.join("p.json")).unwrap();
    let output = profiled(TINY, &folder).args(["--epochs", "4", "--resume", "auto"]).output().unwrap();
    assert!(output.status.success() && text(&output).contains("no update is left to make a profile of"), "{}", text(&output));
    assert!(folder.names().iter().all(|name| name == "run"), "{:?}", folder.names());
}

#[test]
fn what_cannot_be_written_or_meant_is_refused_before_training() {
    let folder = Folder::new("refused");
    std::fs::write(folder.0.join("file"), "").unwrap();
    std::fs::create_dir(folder.0.join("folder.json")).unwrap();
    for (flags, part) in [
        ("--profile file/p.json", "cannot be made"),
        ("--profile folder.json", "this is a folder"),
        ("--profile /proc/p.json", "nothing can be written into /proc"),
        ("--profile p.txt", "use the ending .json"),
        ("--profile p.json --profile-updates 0", "from 1 to 100"),
        ("--profile p.json --profile-updates 101", "from 1 to 100"),
        ("--profile-updates 2", "--profile <FILE.json>"),
    ] {
        let output = masque(TINY, &folder).args(flags.split(' ')).current_dir(&folder.0).output().unwrap();
        let said = text(&output);
        assert!(output.status.code() == Some(2) && said.contains(part) && said.lines().count() == 1, "{flags}: {said}");
        assert!(!folder.0.join("run").exists(), "{flags}: training began");
    }
    let output = masque("finetune --eval --resume x.safetensors --profile p.json", &folder).current_dir(&folder.0).output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output).contains("--eval makes none"), "{}", text(&output));
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    let output = command.args(["probe", "--knn", "--profile", "p.json"]).current_dir(&folder.0).output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output).contains("--profile has no meaning with --knn"), "{}", text(&output));
}

/// What a file says of a GPU.
#[track_caller]
fn tells_of_kernels(path: &Path) -> (Value, usize) {
    let (file, spans) = read(path);
    [PHASES, FORWARD, BACKWARD].into_iter().for_each(|track| nest(&spans, track));
    let kernels: Vec<&Span> = spans.iter().filter(|span| span.track == KERNELS).collect();
    // One behind the other, as the device does them.
    for pair in kernels.windows(2) {
        assert!(pair[1].start >= pair[0].end - 1.0, "{pair:?}");
    }
    let steps: Vec<&Span> = named(&spans, PHASES, "step").collect();
    let inside = kernels.iter().filter(|kernel| steps.iter().any(|step| step.start <= kernel.start && kernel.end <= step.end)).count();
    assert!(inside * 10 > kernels.len() * 9, "{inside} of {}", kernels.len());
    let launch = |name: &str| kernels.iter().find(|kernel| kernel.name.starts_with(name)).unwrap().args["launch"].as_str().unwrap();
    let norm = launch("layernorm");
    assert!(norm.starts_with("grid ") && norm.contains(", block ") && norm.contains("sizes "), "{norm}");
    assert!(launch("upload").ends_with(" bytes") && launch("adamw").starts_with("grid "));
    let product = kernels.iter().find(|kernel| kernel.name == "product_f32").unwrap();
    assert!(product.args["flops"].as_f64() > Some(0.0) && product.args["launch"].as_str().unwrap().contains("f32 ["), "{product:?}");
    (file, kernels.len())
}

#[cfg(feature = "emulated")]
#[test]
fn a_run_on_an_emulated_gpu_has_times_of_its_kernels() {
    let folder = Folder::new("emulated");
    let output = profiled(&format!("{TINY} --device emulated --epochs 1 --profile-updates 1"), &folder).output().unwrap();
    let said = text(&output);
    assert!(output.status.success() && said.contains("EMULATED") && said.contains("\nkernel  "), "{said}");
    let (file, kernels) = tells_of_kernels(&folder.0.join("p.json"));
    assert!(kernels > 300 && file["otherData"]["notes"][0].as_str().unwrap().starts_with("EMULATED"), "{kernels} {}", file["otherData"]);
}

/// The code for a real GPU, where the process has one to stand in.
#[cfg(feature = "emulated")]
#[test]
fn steps_that_are_written_down_are_the_steps_that_are_recorded_afterwards() {
    use masque::methods::mae::{Mae, MaeConfig};
    use masque::methods::{Batch, Method};
    use masque::nn::{decoder::DecoderConfig, vit::VitConfig};
    use masque::optim::{adamw::AdamW, groups};
    use masque::rng::Rng;
    use masque::tensor::{Device, Dtype, Tensor};
    use masque::train::profile::Profile;
    use masque::train::step::{Step, StepOptions};

    let device = Device::Gpu(stand_in::gpu());
    let real = device.gpu().is_some_and(|gpu| gpu.as_real().is_some());
    let images = Tensor::from_slice(&[3, 3, 32, 32], &Rng::new(2).normal("images", 3 * 3 * 32 * 32)).unwrap();
    let step = || {
        let (encoder, decoder) = (VitConfig::new(32, 8, 32, 2, 2), DecoderConfig { width: 16, depth: 1, heads: 1 });
        let mut mae = Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.75, norm_pix: None }, Dtype::F32, &Rng::new(1)).unwrap();
        mae.params().move_to(&device, Dtype::F32).unwrap();
        let optimizer = AdamW::new(groups::by_decay(mae.params(), 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
        Step::new(Box::new(mae), Box::new(optimizer), StepOptions::default())
    };
    let run = |step: &mut Step, i: u64| step.run(&Batch::of_images(images.clone()), &Rng::new(7).at(i), 1e-3).unwrap().loss;
    let mut plain = step();
    let want: Vec<f64> = (0..8).map(|i| run(&mut plain, i)).collect();

    let folder = Folder::new(if real { "real" } else { "steps" });
    let path = folder.0.join("p.json");
    let mut step = step();
    let mut profile = Profile::new(path.clone(), 2, 2, &device, Default::default());
    step.set_eager(true);
    let mut got = Vec::new();
    for i in 0..4 {
        assert!(!profile.is_over());
        got.push(profile.update(i + 1, || Ok(run(&mut step, i))).unwrap());
    }
    assert!(profile.is_over() && !step.is_recorded() && !path.exists());
    let said = profile.write().unwrap();
    assert!(said.starts_with("profile: 2 updates of ") && said.contains("EMULATED") != real, "{said}");
    step.set_eager(false);
    got.extend((4..8).map(|i| run(&mut step, i)));
    assert!(step.is_recorded());
    assert_eq!(got, want);
    let (file, kernels) = tells_of_kernels(&path);
    assert!(kernels > 200, "{kernels}");
    let notes = file["otherData"]["notes"].to_string();
    assert!(notes.contains("taken as they come") == real && file["otherData"]["first_update"] == 3, "{}", file["otherData"]);
    // Behind it nothing is noted any more.
    masque::trace::start(None);
    run(&mut step, 8);
    assert!(masque::trace::stop().iter().all(|event| event.kind != masque::trace::Kind::Kernel));
}

#[cfg(feature = "emulated")]
#[test]
fn the_code_for_cuda_does_the_same() {
    stand_in::run("steps_that_are_written_down_are_the_steps_that_are_recorded_afterwards", "", None);
}
