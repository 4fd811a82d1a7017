//! `masque measure step`: a step of each of the five systems, in parts on the CPU, recorded on a GPU.

use clap::Parser;
use masque::measure::subject::{Point, SubjectArgs};
use serde_json::Value;
use std::process::Command;

const SYSTEMS: [&str; 5] = ["mae", "dmae", "maskedkd", "dmjd", "tinymim"];

/// What the program prints, and its exit code.
fn step(flags: &str) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    let output = command.args(["measure", "step"]).args(flags.split_whitespace()).output().unwrap();
    (output.status.code(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

#[track_caller]
fn measured(flags: &str) -> Value {
    let (code, text) = step(&format!("{flags} --json"));
    assert_eq!(code, Some(0), "{flags}: {text}");
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("{flags}: {text}"))
}

/// A step of milliseconds: 16 patches of 192 numbers, a student of 3 blocks 32 wide, a teacher of 4 blocks 64 wide.
fn small(system: &str) -> String {
    let more = match system {
        "mae" | "dmjd" => "--decoder-dim 32 --decoder-depth 1 --decoder-heads 2",
        "dmae" => "--decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --teacher glyph_s",
        "maskedkd" => "--classes 10 --teacher glyph_s",
        _ => "--teacher glyph_s",
    };
    format!("--method {system} --model glyph_t --image-size 32 --batch 3 {more}")
}

fn number(report: &Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or_else(|| panic!("{key} of {report}"))
}

#[test]
fn the_parts_of_a_step_on_the_cpu_add_up_to_it() {
    for system in SYSTEMS {
        let report = measured(&format!("{} --steps 1 --warmup 1", small(system)));
        let taught = !["mae", "dmjd"].contains(&system);
        assert!(report["method"] == system && report["device"] == "cpu" && report["dtype"] == "f32", "{report}");
        assert_eq!(report["teacher"].as_str(), taught.then_some("glyph_s"), "{report}");
        assert_eq!(report["teacher_parameters"].as_u64().is_some(), taught, "{report}");
        let parts = report["parts"].as_object().unwrap();
        assert_eq!(parts.contains_key("teacher"), taught, "{report}");
        assert!(parts.len() == 3 + usize::from(taught) && parts.values().all(|ms| ms.as_f64() > Some(0.0)), "{report}");
        let sum: f64 = parts.values().filter_map(Value::as_f64).sum();
        let ms = number(&report, "ms_per_step");
        assert!((sum - ms).abs() < 1e-9 * ms, "{report}");
        assert!((number(&report, "images_per_s") - 3e3 / ms).abs() < 1e-6 * 3e3 / ms, "{report}");
        assert!((number(&report, "gflop_per_s") - number(&report, "gflop_per_step") * 1e3 / ms).abs() < 1e-9, "{report}");
        assert_eq!(report["losses"].as_array().map(Vec::len), Some(2));
    }
}

#[test]
fn the_work_of_a_step_is_what_is_multiplied() {
    let block = |n: f64, width: f64| 12.0 * n * width * width + 2.0 * n * n * width;
    let (patch, t, s) = (192.0, 32.0, 64.0);
    // Four of sixteen patches are kept, and the decoder is as wide as the student.
    let mae = 4.0 * patch * t + 3.0 * block(5.0, t) + 5.0 * t * t + block(17.0, t) + 17.0 * t * patch;
    let seen = 4.0 * (3.0 * t * t + t * patch);
    let classify = 16.0 * patch * t + 3.0 * block(17.0, t) + 10.0 * t;
    let relate = 16.0 * patch * t + 2.0 * block(17.0, t) + 3.0 * 17.0 * t * t + 2.0 * 17.0 * 17.0 * t;
    let all = [
        ("mae", "", mae, 0.0),
        // Three of the teacher's four blocks, and a projection.
        ("dmae", "", mae + 5.0 * t * s, 4.0 * patch * s + 3.0 * block(5.0, s)),
        ("dmae", "--teacher-block 1", mae + 5.0 * t * s, 4.0 * patch * s + block(5.0, s)),
        ("maskedkd", "", classify, 16.0 * patch * s + 4.0 * block(9.0, s) + 10.0 * s),
        ("maskedkd", "--keep 16", classify, 16.0 * patch * s + 4.0 * block(17.0, s) + 10.0 * s),
        ("dmjd", "", 2.0 * (mae + seen), 0.0),
        ("dmjd", "--views 3", 3.0 * (mae + seen), 0.0),
        // Two blocks of the teacher, and what its third asks with.
        ("tinymim", "", relate, 16.0 * patch * s + 2.0 * block(17.0, s) + 3.0 * 17.0 * s * s),
    ];
    for (system, flags, own, teacher) in all {
        let report = measured(&format!("{} {flags} --steps 1 --warmup 0", small(system)));
        // Three images; a multiplication and an addition; three passes.
        let giga = |macs: f64| 3.0 * 2.0 * macs / 1e9;
        let expected = giga(3.0 * own + teacher);
        assert!((number(&report, "gflop_per_step") - expected).abs() < 1e-12, "{system} {flags}: {expected} {report}");
        assert!((number(&report, "gflop_of_the_teacher") - giga(teacher)).abs() < 1e-12, "{system} {flags}: {report}");
    }
}

#[cfg(feature = "emulated")]
#[test]
fn a_step_on_a_gpu_is_recorded_and_learns_the_same() {
    for system in SYSTEMS {
        let flags = format!("{} --steps 2 --warmup 3", small(system));
        let (cpu, gpu) = (measured(&flags), measured(&format!("{flags} --device emulated")));
        assert!(gpu["device"] == "emulated" && gpu["parts"].is_null() && gpu["bytes_taken_in_steady_state"] == 0, "{gpu}");
        assert_eq!(gpu["gflop_per_step"], cpu["gflop_per_step"]);
        let losses = |report: &Value| report["losses"].as_array().unwrap().iter().filter_map(Value::as_f64).collect::<Vec<_>>();
        let (cpu, gpu) = (losses(&cpu), losses(&gpu));
        assert!(cpu.len() == 5 && gpu.len() == 5, "{system}");
        for (a, b) in cpu.iter().zip(&gpu) {
            assert!((a - b).abs() < 1e-4 * a.abs(), "{system}: {cpu:?} {gpu:?}");
        }
        let text = step(&format!("{} --device emulated --precision bf16 --steps 1", small(system))).1;
        assert!(text.contains("recorded once and replayed") && text.contains(", bf16, device emulated"), "{text}");
    }
}

#[derive(Parser)]
struct Typed {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    point: Point,
}

#[test]
fn a_step_takes_no_less_memory_than_is_said_before_it_is_built() {
    for flags in [
        "--method mae --decoder-depth 2",
        "--method dmae --teacher tiny --decoder-depth 2",
        "--method maskedkd --teacher tiny",
        "--method dmjd --decoder-depth 2",
        "--method dmjd --baseline maskfeat",
        "--method dmjd --baseline convmae --model dmjd_convit_base_patch16_dec8_hog --batch 1 --decoder-depth 1",
        "--method tinymim --teacher tiny",
    ] {
        let flags = if flags.contains("--batch") { flags.to_string() } else { format!("{flags} --batch 8") };
        let flags = format!("{flags} --image-size 64 {}", if flags.contains("--baseline") { "--mask-ratio 0.5" } else { "" });
        let Typed { subject, point } = Typed::parse_from(["step"].into_iter().chain(flags.split_whitespace()));
        let least = subject.least_bytes(&point).unwrap() as f64;
        let pool = number(&measured(&format!("{flags} --steps 1 --warmup 0")), "pool_bytes");
        assert!(least <= pool && pool <= 3.0 * least, "{flags}: {least} of {pool}");
    }
}

#[test]
fn all_systems_are_measured_one_after_the_other() {
    let small = "--all --image-size 32 --batch 1 --steps 1 --warmup 0 --decoder-depth 1 --json";
    let (code, text) = step(small);
    assert_eq!(code, Some(0), "{text}");
    let methods: Vec<Value> = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["method"].clone()).collect();
    assert_eq!(methods, SYSTEMS);
}

#[test]
fn text_says_who_is_trained_by_whom_on_what() {
    for (system, parts) in [
        ("mae", &["mae training step, glyph_t", "decoder 32 x 1", "75 % hidden"][..]),
        ("dmae", &["teacher glyph_s", "its block 3", "  teacher "]),
        ("maskedkd", &["the teacher sees 8 of 16 patches", "of the teacher; "]),
        ("dmjd", &["baseline mae", "2 views, 75 % of each hidden"]),
        ("tinymim", &["its block 3", "nothing hidden"]),
    ] {
        let (code, text) = step(&format!("{} --steps 2 --warmup 0", small(system)));
        assert_eq!(code, Some(0), "{text}");
        for part in parts.iter().chain(&["  forward ", "  backward ", "  update ", "images/s", "GFLOP/s", "memory of the pool"]) {
            assert!(text.contains(part), "{system}: {part} is not in {text}");
        }
    }
}

#[test]
fn what_cannot_be_meant_is_refused_in_one_sentence() {
    for (flags, part) in [
        ("--method beit", "beit"),
        ("--method mae --teacher base", "mae has no teacher"),
        ("--method mae --keep 3", "--keep is for --method maskedkd"),
        ("--method maskedkd --mask-ratio 0.5", "--mask-ratio is for"),
        ("--method maskedkd --decoder-dim 64", "maskedkd has no decoder"),
        ("--method dmjd --baseline maskfeat --decoder-depth 1", "maskfeat has no decoder"),
        ("--method tinymim --classes 10", "--classes 10 is for --method maskedkd"),
        ("--method tinymim --norm-pix", "--norm-pix"),
        ("--method mae --views 3", "--views"),
        ("--method maskedkd --teacher-block 3", "--teacher-block"),
        ("--method maskedkd --keep 0", "1 to 196"),
        ("--method maskedkd --keep 197", "1 to 196"),
        ("--method maskedkd --teacher huge --batch 1", "share the grid"),
        ("--method dmae --teacher-block 13", "blocks 1 to 12"),
        ("--method dmae --teacher giant", "giant"),
        ("--method tinymim --teacher-block 0", "blocks 1 to 12"),
        ("--method tinymim --mask-ratio 1", "keeps 0 of 196"),
        ("--method tinymim --mask-ratio -0.5", "-0.5"),
        ("--method dmae --mask-ratio 0", "keeps 196 of 196"),
        ("--method dmjd --mask-ratio 0.999", "keeps 0 of 196"),
        ("--method dmjd --views 1", "--views 1"),
        ("--method maskedkd --image-size 100", "--image-size and --patch-size"),
        ("--method tinymim --patch-size 15", "--patch-size"),
        ("--method maskedkd --batch 10000000", "GB of memory"),
        ("--method tinymim --batch 10000000", "GB of memory"),
        ("--method dmae --batch 10000000", "GB of memory"),
        ("--method dmjd --views 1000000000 --batch 1000000000", "GB of memory"),
        ("--method dmae --batch 0", "--batch 0"),
        ("--all --method mae", "--method"),
        ("--all --keep 3", "--keep is for"),
        ("--all --mask-ratio 0.5", "maskedkd"),
        ("--all --steps 0", "--steps 0"),
    ] {
        let (code, text) = step(flags);
        assert!(
            code == Some(2) && text.contains(part) && text.lines().count() == 1 && !text.contains("panicked"),
            "{flags}: {code:?} {text}"
        );
    }
}
