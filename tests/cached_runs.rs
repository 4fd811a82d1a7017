//! Runs whose teacher remembers: the weights of runs whose teacher does not, also after one was killed.

#[path = "common/runs.rs"]
mod runs;

use runs::{fails, folder, last_tensors, masque, rows, succeeds};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A small MAE that has learned a little, in a folder of a test's own.
fn teacher(name: &str) -> (PathBuf, PathBuf) {
    let base = folder(name);
    let few = "pretrain mae --train-images 64 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0";
    succeeds(masque(few, &base.join("teacher")));
    let path = base.join("teacher/best.safetensors");
    (base, path)
}

fn run(arguments: &str, base: &Path, name: &str, cache: Option<&str>) -> Command {
    let mut command = masque(arguments, &base.join(name));
    command.arg("--teacher-path").arg(base.join("teacher/best.safetensors"));
    if let Some(cache) = cache {
        command.arg("--teacher-cache").arg(base.join(cache));
    }
    command
}

const FEW: &str = "pretrain tinymim --train-images 48 --val-images 8 --batch-size 8 --epochs 4 --warmup-epochs 0.5 --log-freq 1 --views 2";

/// Milliseconds of the teacher in each update.
fn asked(folder: &Path) -> Vec<f64> {
    rows(folder.join("steps.jsonl")).iter().map(|row| row["teacher_ms"].as_f64().unwrap()).collect()
}

#[test]
fn a_run_with_a_cache_ends_with_the_weights_of_one_without() {
    let (base, _) = teacher("cached");
    for (number, options) in
        ["--color-jitter 0.4", "--color-jitter 0 --target features --feature ffn", "--target class-token"].into_iter().enumerate()
    {
        let names = ["plain", "first", "again"].map(|name| format!("{name}-{number}"));
        let cache = format!("cache-{number}");
        let line = format!("{FEW} {options}");
        succeeds(run(&line, &base, &names[0], None));
        let text = succeeds(run(&line, &base, &names[1], Some(&cache)));
        assert!(text.contains("96 answers of") && text.contains("begun now"), "{text}");
        let text = succeeds(run(&line, &base, &names[2], Some(&cache)));
        assert!(text.contains("answers that are there are used"), "{text}");
        let [plain, first, again] = names.map(|name| base.join(name));
        assert!(last_tensors(&plain) == last_tensors(&first) && last_tensors(&plain) == last_tensors(&again), "{options}");
        // What is not computed has no FLOPs: two of four epochs, and all of the second run.
        let flops = |folder: &Path| -> Vec<bool> {
            rows(folder.join("log.jsonl")).iter().map(|row| row["teacher_flops_per_image"].as_f64().unwrap() > 0.0).collect()
        };
        assert_eq!([&plain, &first, &again].map(|folder| flops(folder)), [vec![true; 4], vec![true, true, false, false], vec![false; 4]]);
        let [plain, first, again] = [plain, first, again].map(|folder| asked(&folder));
        assert_eq!([plain.len(), first.len(), again.len()], [24; 3]);
        assert!(plain.iter().chain(&first[..12]).all(|&ms| ms > 0.0), "{first:?}");
        assert!(first[12..].iter().chain(&again).all(|&ms| ms == 0.0), "{first:?} {again:?}");
    }
}

/// A classifier that has learned a little.
fn classifier(name: &str) -> PathBuf {
    let base = folder(name);
    succeeds(masque(
        "train --model glyph_s --train-images 64 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0",
        &base.join("teacher"),
    ));
    base
}

const LOGITS: &str =
    "--train-images 48 --val-images 8 --batch-size 8 --epochs 4 --warmup-epochs 1 --log-freq 1 --views 2 --repeated-aug=false";

#[test]
fn logits_of_a_teacher_that_sees_everything_are_cached() {
    let base = classifier("cached-logits");
    for (number, command) in
        ["distill logit", "distill maskedkd --len-num-keep 36 --aa rand-m9-mstd0.5-inc1 --reprob 0.5"].into_iter().enumerate()
    {
        let [plain, first] = ["plain", "first"].map(|name| format!("{name}-{number}"));
        let line = format!("{command} {LOGITS}");
        succeeds(run(&line, &base, &plain, None));
        let text = succeeds(run(&line, &base, &first, Some(&format!("cache-{number}"))));
        assert!(text.contains("96 answers of"), "{text}");
        assert!(last_tensors(&base.join(plain)) == last_tensors(&base.join(&first)), "{command}");
        let asked = asked(&base.join(first));
        assert!(asked[..12].iter().all(|&ms| ms > 0.0) && asked[12..].iter().all(|&ms| ms == 0.0), "{asked:?}");
    }
    for (options, code, part) in [
        ("distill maskedkd --len-num-keep 18", 2, "other patches each time"),
        ("distill logit --mixup 0.8", 2, "--mixup 0"),
        ("distill logit --distillation-type none", 2, "there is no teacher"),
        ("distill logit --repeated-aug", 2, "--repeated-aug"),
        ("distill logit --aa rand-m9-mstd0.5-inc1", 1, "its transform is"),
    ] {
        let line = if options.contains("--repeated-aug") { LOGITS.replace(" --repeated-aug=false", "") } else { LOGITS.to_string() };
        let (found, text) = fails(run(&format!("{options} {line}"), &base, "none", Some("cache-0")));
        let last = text.lines().last().unwrap_or_default();
        assert!(found == Some(code) && last.starts_with("masque: ") && last.contains(part), "{options}: {found:?} {text}");
    }
}

#[test]
fn a_cache_whose_writer_was_killed_is_gone_on_with() {
    let (base, _) = teacher("cache-killed");
    succeeds(run(FEW, &base, "plain", None));
    let mut killed = run(FEW, &base, "killed", Some("cache")).spawn().unwrap();
    let (file, started) = (base.join("cache/teacher.masque-cache"), Instant::now());
    // Until the first answers are there.
    let written = || std::fs::read(&file).is_ok_and(|bytes| bytes.iter().skip(4096).any(|&byte| byte != 0));
    while !written() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    // One of them is only half there, as after a crash of the machine.
    let mut bytes = std::fs::read(&file).unwrap();
    let first = (4096..bytes.len()).find(|&at| bytes[at] != 0).unwrap();
    bytes[first..first + 64].fill(0);
    std::fs::write(&file, bytes).unwrap();
    succeeds(run(FEW, &base, "after", Some("cache")));
    assert!(last_tensors(&base.join("plain")) == last_tensors(&base.join("after")));
}

#[test]
fn caches_that_cannot_be_meant_are_one_sentence() {
    let (base, _) = teacher("cache-refused");
    succeeds(run(FEW, &base, "own", Some("cache")));
    let few = FEW.replace("--views 2", "");
    for (line, code, parts) in [
        (FEW.replace("--views 2", "--views 3"), 1, &["its views are 2, this run's 3"][..]),
        (format!("{FEW} --seed 5"), 1, &["its seed is 0, this run's 5"]),
        (format!("{FEW} --intermediate 2"), 1, &["its block is 3, this run's 2"]),
        (format!("{FEW} --target features"), 1, &["its answers are queries, keys and values, this run's features"]),
        (FEW.replace("48", "40"), 1, &["its images are 48 with checksum", "this run's 40"]),
        (format!("{FEW} --crop resized"), 1, &["its transform is"]),
        (few, 2, &["--views"]),
        (format!("{FEW} --masking random"), 2, &["--teacher-cache", "other patches each time"]),
        (format!("{FEW} --teacher-drop-path 0.1"), 2, &["--teacher-cache", "other patches each time"]),
        (FEW.replace("tinymim", "dmae"), 2, &["--teacher-cache", "DMAE"]),
        (FEW.replace("--views 2", "--views 0"), 2, &["--views 0"]),
    ] {
        let (found, text) = fails(run(&line, &base, "none", Some("cache")));
        let last = text.lines().last().unwrap_or_default();
        assert!(found == Some(code) && last.starts_with("masque: ") && !text.contains("panicked"), "{line}: {found:?} {text}");
        parts.iter().for_each(|part| assert!(last.contains(part), "{line}: {last} lacks {part}"));
    }
    // A run goes on with its views.
    let mut command = masque("pretrain tinymim", &base.join("own"));
    command.args(["--resume", "auto", "--views", "1", "--teacher-cache"]).arg(base.join("another"));
    let (code, text) = fails(command);
    assert!(code == Some(2) && text.contains("--views is 1 but"), "{text}");
}
