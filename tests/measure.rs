//! `masque measure kernels`: a row for every op, version and direction, and nothing timed that is wrong.
#![cfg(feature = "emulated")]

mod stand_in;

use masque::device::gpu::Gpu;
use masque::error::Result;
use masque::measure::kernels::bench::{Bench, Work};
use masque::measure::kernels::time::{self, Outcome, Pass, Rounds};
use masque::measure::kernels::tokens::{self, Sizes};
use masque::measure::kernels::updates::{Model, Rule};
use masque::measure::kernels::{names, once};
use masque::ops;
use masque::tape::Var;
use masque::tensor::{Device, Dtype};
use serde_json::Value;
use std::process::{Command, Output};

const ONCE: Rounds = Rounds { counted: 1, before: 0 };

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_masque")).args(["measure", "kernels"]).args(args).output().unwrap()
}

#[track_caller]
fn printed(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The ceilings and the rows.
#[track_caller]
fn objects(args: &[&str]) -> (Value, Vec<Value>) {
    let all = printed(&[args, &["--json"]].concat());
    let mut rows: Vec<Value> = all.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let head = rows.remove(0);
    assert_eq!(head["what"], "ceilings");
    for number in ["copy_gb_s", "product_tflop_s"] {
        assert!(head[number].as_f64().is_some_and(|x| x > 0.0), "{head}");
    }
    for row in &rows {
        for number in ["us", "min_us", "max_us", "bytes", "gb_s", "percent"] {
            assert!(row[number].as_f64().is_some_and(|x| x.is_finite() && x > 0.0), "{number} of {row}");
        }
        assert!(row["flops"].is_u64() && row["tflop_s"].is_number() && row["case"].is_object(), "{row}");
        let limit = if row["limit"] == "flops" { "tflop_s" } else { "gb_s" };
        assert!(row[limit].as_f64() > Some(0.0), "{row}");
    }
    (head, rows)
}

/// Whether there is a row of this op, version and direction.
fn has(rows: &[Value], op: &str, version: Option<&str>, direction: &str) -> bool {
    rows.iter().any(|row| row["op"] == op && row["version"].as_str() == version && row["direction"] == direction)
}

#[test]
fn every_version_has_a_row_for_each_direction() {
    for precision in ["f32", "bf16"] {
        let args = ["--device", "emulated", "--only", "layernorm,attention", "--model", "tiny", "--tokens", "25", "--rounds", "1"];
        let (head, rows) = objects(&[&args[..], &["--precision", precision]].concat());
        assert!(head["device"] == "emulated" && head["dtype"] == precision && head["batch"] == 1, "{head}");
        assert!(rows.iter().all(|row| row["device"] == "emulated" && row["dtype"] == precision && row["runs"] == 1));
        for versions in ops::versions().into_iter().filter(|versions| matches!(versions.op, "layernorm" | "attention")) {
            // Attention in f32 is version 1 alone.
            let these: &[&str] = if versions.op == "attention" && precision == "f32" { &["v1"] } else { versions.all };
            for version in these {
                for direction in ["forward", "backward"] {
                    assert!(has(&rows, versions.op, Some(version), direction), "{} {version} {direction} in {precision}", versions.op);
                }
            }
            let of_the_op = |row: &&Value| row["op"] == versions.op;
            assert!(rows.iter().filter(of_the_op).all(|row| these.contains(&row["version"].as_str().unwrap())));
            let chosen = if these.contains(&versions.chosen) { versions.chosen } else { "v1" };
            assert!(rows.iter().filter(of_the_op).all(|row| row["chosen"] == (row["version"] == chosen)));
        }
        assert!(rows.iter().all(|row| row["vs_v1"].as_f64().is_some_and(|ratio| ratio > 0.0)));
    }
}

#[test]
fn every_op_has_a_row() {
    let (_, rows) = objects(&["--device", "emulated", "--model", "tiny", "--tokens", "25", "--rounds", "1", "--precision", "bf16"]);
    for name in names().unwrap() {
        assert!(rows.iter().any(|row| row["op"] == name), "{name}");
    }
    for versions in ops::versions() {
        for version in versions.all {
            let loss = versions.op.ends_with("_loss") || versions.op.ends_with("_kl");
            assert!(has(&rows, versions.op, Some(version), if loss { "loss+gradient" } else { "forward" }), "{} {version}", versions.op);
        }
    }
}

#[test]
fn rows_of_the_cpu_have_no_versions() {
    let args = ["--only", "gelu,masked_mse,layernorm,adamw", "--model", "tiny", "--tokens", "50", "--batch", "2", "--rounds", "2"];
    let (head, rows) = objects(&args);
    assert!(head["device"] == "cpu" && head["threads"].as_u64() > Some(0));
    assert!(rows.iter().all(|row| row["device"] == "cpu" && row["version"].is_null() && row["vs_v1"].is_null() && row["runs"] == 2));
    for (op, direction) in
        [("gelu", "forward"), ("gelu", "backward"), ("layernorm", "backward"), ("masked_mse", "loss+gradient"), ("adamw", "update")]
    {
        assert!(has(&rows, op, None, direction), "{op} {direction}");
    }
    // 98 patches and the class token; the row says what was moved.
    let gelu = rows.iter().find(|row| row["op"] == "gelu").unwrap();
    assert_eq!((&gelu["case"]["b"], &gelu["case"]["n"], &gelu["bytes"]), (&2.into(), &99.into(), &(2.0 * 4.0 * 2.0 * 99.0 * 768.0).into()));
}

#[test]
fn text_says_what_its_rows_are_worth() {
    let text = printed(&["--device", "emulated", "--only", "softmax", "--model", "tiny", "--tokens", "5", "--rounds", "1"]);
    assert!(
        text.contains("say nothing about a GPU") && text.contains("ceilings, measured now: copy") && text.contains("\ntiny\n"),
        "{text}"
    );
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("softmax ")).collect();
    assert_eq!(rows.len(), 4, "{text}");
    assert!(rows.iter().filter(|row| row.contains(" v2* ")).count() == 2 && rows.iter().all(|row| row.contains("% bytes")), "{text}");
    let text = printed(&["--only", "softmax", "--model", "tiny", "--tokens", "5", "--batch", "1", "--rounds", "1"]);
    assert!(text.starts_with("cpu: the CPU with ") && text.contains("caches are not wiped"), "{text}");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    for flags in [
        &["--only", "sin"][..],
        &["--only", ""],
        &["--model", "giant"],
        &["--model", "tiny,small"],
        &["--tokens", "0"],
        &["--tokens", "101"],
        &["--tokens", "some"],
        &["--tokens", ""],
        &["--batch", "0"],
        &["--batch", "65536"],
        &["--batch", "65535", "--model", "huge"],
        &["--batch", "18446744073709551616"],
        &["--rounds", "0"],
        &["--rounds", "18446744073709551615"],
        &["--precision", "f64"],
        &["--precision", "tf32"],
        &["--precision", "bf16"],
        &["--device", "abacus"],
        &["--device", "emulated", "--only", "gelu", "--batch", "65535", "--model", "huge"],
    ] {
        let output = run(flags);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(said.lines().count() == 1 && said.starts_with("masque: ") && !said.contains("panicked"), "{flags:?}: {said}");
    }
    let said = String::from_utf8(run(&["--only", "sin"]).stderr).unwrap();
    assert!(said.contains("layernorm, ") && said.contains(", ema"), "{said}");
}

#[test]
fn the_files_of_a_measurement_hold_what_was_printed() {
    let folder = std::env::temp_dir().join(format!("masque-kernels-{}", std::process::id()));
    let at = folder.join("new").to_str().unwrap().to_string();
    let args = ["--device", "emulated", "--model", "tiny", "--tokens", "25", "--rounds", "2", "--precision", "bf16", "--output-dir", &at];
    let text = printed(&[&args[..], &["--only", "layernorm,attention,linear,adamw,pixel_loss"]].concat());
    let read = |name: &str| std::fs::read_to_string(folder.join("new").join(name)).unwrap();
    let (json, csv, html) = (read("kernels.json"), read("kernels.csv"), read("kernels.html"));
    std::fs::remove_dir_all(&folder).unwrap();

    let json: Value = serde_json::from_str(&json).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert!(json["ceilings"]["copy_gb_s"].as_f64() > Some(0.0) && json["command"].as_str().unwrap().contains("--only layernorm"), "{json}");
    let is_row = |line: &&str| ["layernorm ", "attention ", "linear ", "adamw ", "pixel_loss "].iter().any(|op| line.starts_with(op));
    assert_eq!(text.lines().filter(is_row).count(), rows.len());
    assert!(text.lines().last().unwrap().starts_with("written: ") && text.contains("kernels.html"), "{text}");

    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 1 + rows.len());
    let columns = lines[0].split(',').count();
    assert!(lines[0].starts_with("model,op,shape,direction,") && lines.iter().all(|line| line.split(',').count() == columns), "{csv}");
    let column = |name: &str| lines[0].split(',').position(|column| column == name).unwrap();
    for (line, row) in lines[1..].iter().zip(rows) {
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!((cells[column("op")], cells[column("us")].parse().ok()), (row["op"].as_str().unwrap(), row["us"].as_f64()));
    }

    for part in ["FLOP/byte", "GB/s over MB", "attention, %", "Furthest from the ceiling", "say nothing about a GPU", "All rows: tiny"] {
        assert!(html.contains(part), "{part} is not on the page");
    }
    // A dot or a ring for each row of the version that runs.
    let run = rows.iter().filter(|row| row["version"].is_null() || row["chosen"] == true);
    let backward = run.clone().filter(|row| row["direction"] == "backward").count();
    assert_eq!((html.matches("<circle").count(), html.matches("fill:var(--card)").count()), (run.count(), backward));
    assert!(!html.contains("<script") && !html.contains("http:") && !html.contains("https:") && !html.contains("NaN"));
}

#[test]
fn a_folder_that_cannot_be_made_is_refused_before_anything_is_measured() {
    let file = std::env::temp_dir().join(format!("masque-kernels-file-{}", std::process::id()));
    std::fs::write(&file, "").unwrap();
    let output = run(&["--only", "gelu", "--model", "tiny", "--output-dir", file.join("x").to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("--output-dir") && said.contains("cannot be made"), "{said}");
    assert!(output.stdout.is_empty());
}

fn halved(wrong: bool, images: usize) -> Bench {
    let times = move |x: &Var| x.scale(if wrong && x.value().gpu().is_some() { 0.51 } else { 0.5 });
    let work = Work::moves(2 * images * 40, 0);
    Bench::new("halved", images, &[("c", 40)], move |x: &[Var]| times(&x[0])).activation(&[images, 40]).forward(work).backward(work)
}

#[test]
fn nothing_wrong_is_timed() {
    let gpu = Gpu::emulated().unwrap();
    let device = Device::Gpu(gpu.clone());
    let timed = |wrong: bool| -> Result<usize> {
        let (one, many) = (halved(wrong, 1), halved(wrong, 5));
        let exact = Outcome::exact(&one, Dtype::F32)?;
        let inputs = many.tensors(&device, Dtype::F32, Dtype::F32)?;
        time::check(&one, None, &device, Dtype::F32, &exact)?;
        Ok(time::on_gpu(&gpu, &many, None, &inputs, ONCE, &exact, Dtype::F32)?.len())
    };
    assert_eq!(timed(false).unwrap(), 2);
    let said = timed(true).unwrap_err().chain();
    assert!(said.starts_with("halved: the result is off by ") && said.contains(" is allowed"), "{said}");
    // The many images are looked at as well.
    let (one, many) = (halved(false, 1), halved(true, 5));
    let inputs = many.tensors(&device, Dtype::F32, Dtype::F32).unwrap();
    let exact = Outcome::exact(&one, Dtype::F32).unwrap();
    let said = time::on_gpu(&gpu, &many, None, &inputs, ONCE, &exact, Dtype::F32).unwrap_err().chain();
    assert!(said.starts_with("halved: the result that was timed is off by "), "{said}");
}

/// The code for a real GPU: recorded by CUDA's calls, timed by events, between which the cache is wiped.
#[test]
fn a_stand_in_for_cuda_is_timed() {
    if !stand_in::enter() {
        stand_in::run("a_stand_in_for_cuda_is_timed", "", None);
        return;
    }
    let gpu = stand_in::gpu();
    let device = Device::Gpu(gpu.clone());
    let of = |images| {
        let s = Sizes::of("tiny", 10, images, Dtype::Bf16).unwrap();
        let all = [tokens::benches(&s).unwrap(), once::of_a_model(&s).unwrap()];
        all.into_iter().flatten().filter(|bench| !bench.case.contains_key("what") || bench.case["what"] != "decoder")
    };
    let mut passes = Vec::new();
    for (one, many) in of(1).zip(of(2)) {
        let exact = Outcome::exact(&one, Dtype::Bf16).unwrap();
        let inputs = many.tensors(&device, Dtype::Bf16, Dtype::Bf16).unwrap();
        time::check(&one, None, &device, Dtype::Bf16, &exact).unwrap();
        let rounds = Rounds { counted: 2, before: 1 };
        for (pass, times) in time::on_gpu(&gpu, &many, None, &inputs, rounds, &exact, Dtype::Bf16).unwrap() {
            assert!(times.min > 0.0 && times.runs == 2, "{}: {times:?}", many.op);
            passes.push(pass);
        }
    }
    assert!([Pass::Forward, Pass::Backward, Pass::Loss].iter().all(|pass| passes.contains(pass)));
    let mut model = Model::small(&device, Dtype::Bf16).unwrap();
    for rule in Rule::ALL {
        time::check_update(rule, &device, Dtype::Bf16).unwrap();
        assert!(time::update(rule, &mut model, ONCE).unwrap().min > 0.0);
    }
}

/// What the program prints, and its exit code.
fn masque(arguments: &str) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_masque"));
    let output = command.args(arguments.split_whitespace()).output().unwrap();
    (output.status.code(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_teacher_on_fewer_patches_takes_less_and_keeps_nothing() {
    let small = "measure teacher --model glyph_s --student glyph_t --image-size 96 --batch 8 --classes 10 --rounds 3 --threads 1";
    let (code, text) = masque(&format!("{small} --json --keep 36"));
    assert_eq!(code, Some(0), "{text}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!([&rows[0]["keep"], &rows[1]["keep"]], [144, 36]);
    let number = |row: usize, key: &str| rows[row][key]["median"].as_f64().unwrap();
    assert_eq!([number(0, "teacher_ratio"), number(0, "step_ratio")], [1.0; 2]);
    assert!(number(1, "teacher_ratio") < 0.7, "{text}");
    for row in 0..2 {
        assert!(number(row, "teacher_ms") > 0.0 && number(row, "student_ms") > 0.0);
    }
    // By hand: blocks of width 64 and an MLP of 4 widths, 4 of them; a token in front; 192 numbers a patch; 10 classes.
    let macs = |kept: f64| 4.0 * (12.0 * (kept + 1.0) * 4096.0 + 2.0 * (kept + 1.0).powi(2) * 64.0) + 144.0 * 192.0 * 64.0 + 640.0;
    assert!((rows[1]["teacher_flops_ratio"].as_f64().unwrap() - macs(36.0) / macs(144.0)).abs() < 1e-12, "{text}");
    let bytes = |key: &str| report["bytes"][key].as_u64().unwrap();
    let (alone, with, on_tape) = (bytes("labels_alone"), bytes("with_teacher"), bytes("teacher_on_tape"));
    assert!(alone > bytes("teacher_weights") && on_tape > with, "{text}");
    // Off a tape it needs room for one block at a time, on a tape for all four of them.
    assert!(
        2 * (with - alone) < on_tape - with,
        "a step grew by {} with a teacher, by {} with one on a tape",
        with - alone,
        on_tape - with
    );
    let (code, text) = masque(small);
    assert!(code == Some(0) && text.contains(" 144 ") && text.contains(" 72 ") && text.contains("if its pass were on a tape"), "{text}");
    for (options, part) in [
        ("--keep 0", "--keep 0"),
        ("--keep 197", "1 to 196"),
        ("--student glyph_t", "share the grid"),
        ("--rounds 0", "--rounds 0"),
        ("--batch 0", "--batch 0"),
        ("--model deit_tiny_distilled_patch16_224", "distillation token"),
        ("--model nothing", "is unknown"),
        ("--image-size 225", "225"),
    ] {
        let (code, text) = masque(&format!("measure teacher {options}"));
        assert!(code == Some(2) && text.contains(part) && !text.contains("panicked"), "{options}: {code:?} {text}");
    }
}
