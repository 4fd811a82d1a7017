//! The program from outside: exit codes, one line for each mistake, and nothing left behind.

use masque::formats;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/parity");
const IMAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images");
/// A training step of a fraction of a second.
const SMALL: [&str; 14] = [
    "measure",
    "step",
    "--batch",
    "1",
    "--image-size",
    "32",
    "--decoder-dim",
    "32",
    "--decoder-depth",
    "1",
    "--steps",
    "2",
    "--warmup",
    "0",
];

fn masque() -> Command {
    Command::new(env!("CARGO_BIN_EXE_masque"))
}

fn run(args: &[&str]) -> Output {
    masque().args(args).output().unwrap()
}

/// A folder of its own for a test, empty.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli_{test}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// One line on standard error, nothing on standard output, this exit code.
#[track_caller]
fn refused(args: &[&str], code: i32) -> String {
    let output = run(args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
    assert!(said.starts_with("masque: ") && !said.contains("panicked"), "{args:?}: {said}");
    said
}

#[track_caller]
fn accepted(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_command_explains_itself() {
    for command in [
        &[][..],
        &["measure"],
        &["measure", "kernels"],
        &["measure", "loading"],
        &["measure", "ops"],
        &["measure", "step"],
        &["parity"],
        &["convert"],
        &["data", "pack"],
        &["data", "check"],
        &["data", "export"],
        &["data", "show"],
        &["info"],
        &["launch"],
    ] {
        let args = [command, &["--help"]].concat();
        assert!(accepted(&args).contains("Usage: masque"), "{args:?}");
    }
    assert!(accepted(&["--version"]).starts_with("masque "));
    assert!(accepted(&["info"]).contains("tiny"));
}

#[test]
fn a_step_that_cannot_be_meant_is_refused() {
    for flags in [
        &["--model", "giant"][..],
        &["--image-size", "100"],
        &["--image-size", "0"],
        &["--image-size", "160000"],
        &["--image-size", "1000000000"],
        &["--image-size", "1000000000", "--patch-size", "1000000000"],
        &["--patch-size", "0"],
        &["--batch", "0"],
        &["--batch", "10000000"],
        &["--batch", "1000000000000"],
        &["--batch", "18446744073709551616"],
        &["--steps", "0"],
        &["--steps", "18446744073709551615"],
        &["--warmup", "18446744073709551615"],
        &["--decoder-heads", "7"],
        &["--decoder-heads", "0"],
        &["--decoder-dim", "0"],
        &["--decoder-dim", "1000000000000000000"],
        &["--decoder-depth", "1000000000000000000"],
        &["--mask-ratio", "1.5"],
        &["--mask-ratio", "-0.1"],
        &["--mask-ratio", "NaN"],
        &["--mask-ratio", "0"],
        &["--mask-ratio", "1"],
        &["--mask-ratio", "0.9999"],
        &["--threads", "0"],
        &["--threads", "100000"],
        &["--device", "foo"],
        &["--colour", "red"],
    ] {
        refused(&[&["measure", "step"], flags].concat(), 2);
    }
    assert!(refused(&["measure", "step", "--image-size", "100"], 2).contains("100"));
    assert!(refused(&["measure", "step", "--batch", "1000000000000"], 2).contains("GB"));
}

#[test]
fn other_mistakes_in_what_was_typed_are_refused() {
    let empty = folder("empty");
    let empty = empty.to_str().unwrap();
    for args in [
        &[][..],
        &["measure"],
        &["retrain"],
        &["measure", "ops", "--only", "sin"],
        &["measure", "ops", "--only", ""],
        &["measure", "ops", "--rounds", "0"],
        &["measure", "ops", "--only", "gelu", "--rounds", "18446744073709551615"],
        &["parity"],
        &["parity", "/no/such/case.safetensors"],
        &["parity", empty],
        &["parity", FIXTURES, "--device", "emulated", "--precision", "f64"],
        &["parity", FIXTURES, "--precision", "f16"],
        &["measure", "loading", "--rounds", "0"],
        &["measure", "loading", "--image-size", "0"],
        &["measure", "loading", "--workers", "-1"],
        &["measure", "loading", "--folder", empty],
        &["measure", "step", "--precision", "f16"],
        &["measure", "step", "--precision", "tf32", "--image-size", "32"],
        &["measure", "step", "--precision", "tf32", "--device", "emulated", "--image-size", "32"],
        &["convert", "only-one.pth"],
    ] {
        refused(args, 2);
    }
}

#[test]
fn a_conversion_that_fails_leaves_nothing_behind() {
    let folder = folder("failed_conversions");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    fs::write(path("garbage.pth"), "no checkpoint").unwrap();
    fs::write(path("empty.safetensors"), "").unwrap();
    fs::write(path("kept.pth"), "as it was").unwrap();
    fs::create_dir(path("folder.pth")).unwrap();
    let before = names(&folder);

    let good = format!("{FIXTURES}/pth/pth_mae_zip.pth");
    let forbidden = format!("{FIXTURES}/pth/pth_bad_os_system.pth");
    refused(&["convert", &path("garbage.pth"), &path("out.safetensors")], 1);
    refused(&["convert", &path("empty.safetensors"), &path("out.pth")], 1);
    refused(&["convert", &path("missing.pth"), &path("out.safetensors")], 1);
    refused(&["convert", &path("folder.pth"), &path("out.safetensors")], 1);
    refused(&["convert", &forbidden, &path("kept.pth")], 1);
    refused(&["convert", &good, &path("no/such/folder/out.pth")], 1);
    refused(&["convert", &good, &path("folder.pth")], 1);
    refused(&["convert", &good, &path("out.onnx")], 2);
    refused(&["convert", &good, &path("out")], 2);

    assert_eq!(names(&folder), before);
    assert!(names(&folder.join("folder.pth")).is_empty());
    assert_eq!(fs::read_to_string(path("kept.pth")).unwrap(), "as it was");
}

#[test]
fn a_case_that_is_garbage_fails_its_row() {
    let folder = folder("garbage_cases");
    fs::write(folder.join("one.pth"), "no checkpoint").unwrap();
    fs::write(folder.join("two.safetensors"), "no case").unwrap();
    fs::write(folder.join("three.safetensors"), "").unwrap();
    let output = run(&["parity", folder.to_str().unwrap()]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stderr.is_empty() && !said.contains("panicked"), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("FAILED")).count(), 3, "{said}");
    assert_eq!(said.lines().last(), Some("0 passed, 3 failed"));
}

#[test]
fn json_of_a_step_has_its_documented_fields() {
    let report: Value = serde_json::from_str(&accepted(&[&SMALL[..], &["--decoder-heads", "2", "--json"]].concat())).unwrap();
    let texts = ["what", "method", "model", "dtype", "device"];
    let numbers = ["image_size", "patch_size", "batch", "mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads", "threads", "steps"];
    let found = ["parameters", "ms_per_step", "min_ms", "max_ms", "images_per_s", "loss", "pool_bytes", "system_requests_in_steady_state"];
    assert!(texts.iter().all(|field| report[field].is_string()), "{report}");
    assert!(numbers.iter().chain(&found).all(|field| report[field].is_number()), "{report}");
    assert!(["forward", "backward", "update"].iter().all(|part| report["parts"][part].is_number()), "{report}");
    assert!(report["norm_pix"].is_boolean());
    assert_eq!(report["losses"].as_array().map(Vec::len), Some(2));
}

#[test]
fn json_of_ops_is_one_object_a_line() {
    let lines = accepted(&["measure", "ops", "--only", "gelu", "--rounds", "1", "--json"]);
    assert!(lines.lines().count() > 0);
    for line in lines.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert_eq!(row["op"], "gelu");
        assert_eq!(row["runs"], 1);
        assert!(row["case"]["rows"].is_u64() && row["case"]["c"].is_u64(), "{row}");
        assert!(["ms", "min_ms", "max_ms", "threads"].iter().all(|field| row[field].is_number()), "{row}");
    }
}

#[test]
fn every_step_of_loading_is_measured_on_the_files_given() {
    let lines = accepted(&["measure", "loading", "--folder", IMAGES, "--image-size", "16", "--rounds", "2", "--workers", "2", "--json"]);
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<&str> = rows.iter().map(|row| row["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["decode", "pretrain", "evaluate", "finetune", "loader"]);
    for row in rows {
        assert!(row["images_per_s"].as_f64().is_some_and(|x| x.is_finite() && x > 0.0) && row["runs"] == 2, "{row}");
    }
    assert!(refused(&["measure", "loading", "--folder", "/no/such/folder"], 1).contains("/no/such/folder"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for args in [&["parity", FIXTURES][..], &["info"], &["--help"]] {
        let mut child = masque().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_checkpoint_converted_there_and_back_keeps_every_bit() {
    let folder = folder("round_trip");
    for name in ["pth_mae_zip", "pth_odd_tensors_zip"] {
        let first = PathBuf::from(format!("{FIXTURES}/pth/{name}.pth"));
        let (middle, last) = (folder.join(format!("{name}.safetensors")), folder.join(format!("{name}.pth")));
        for (from, to) in [(&first, &middle), (&middle, &last)] {
            accepted(&["convert", from.to_str().unwrap(), to.to_str().unwrap()]);
        }
        let first = formats::open(&first).unwrap();
        for path in [&middle, &last] {
            let other = formats::open(path).unwrap();
            assert!(first.names().eq(other.names()), "{}", path.display());
            for (name, tensor) in first.tensors() {
                let same = other.get(name).unwrap();
                assert_eq!((tensor.dtype(), tensor.shape()), (same.dtype(), same.shape()), "{name}");
                assert!(tensor.bytes() == same.bytes(), "{name}");
            }
        }
    }
    assert_eq!(names(&folder).len(), 4);
}
