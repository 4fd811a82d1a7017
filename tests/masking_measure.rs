//! `masque measure masking`: a row for every point of every system, sentences for what cannot be meant, and files that can be read.

mod common;

use common::Scratch;
use serde_json::Value;
use std::process::Command;

const SMALL: &str = "--model glyph_t --image-size 32 --batch 2 --rounds 2 --warmup 1 --threads 2";
const DECODER: &str = "--decoder-dim 32 --decoder-depth 1 --decoder-heads 2";

/// Exit code, standard output, standard error.
fn masque(arguments: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    let output = command.args(["measure", "masking"]).args(arguments.split_whitespace()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// The objects that are printed.
#[track_caller]
fn measured(arguments: &str) -> Vec<Value> {
    let (code, out, said) = masque(&format!("{arguments} --json"));
    assert!(code == Some(0) && said.is_empty(), "{arguments}: {code:?} {said}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"))
}

/// What every row of every system has to hold.
#[track_caller]
fn check(row: &Value, all: &Value) {
    for key in [
        "step_ms",
        "encoder_ms",
        "backward_ms",
        "update_ms",
        "images_per_s",
        "gflop_per_image",
        "speed_up",
        "predicted_speed_up",
        "efficiency",
        "peak_bytes",
    ] {
        assert!(number(row, key) > 0.0 && number(row, key).is_finite(), "{key} of {row}");
    }
    for key in ["step", "encoder", "decoder", "teacher", "other_forward", "backward", "update"] {
        let [least, median, most] = ["min_ms", "ms", "max_ms"].map(|what| number(row, &format!("{key}_{what}")));
        assert!(least <= median && median <= most && least >= 0.0, "{key} of {row}");
    }
    let predicted = number(all, "gflop_per_image") / number(row, "gflop_per_image");
    assert!((number(row, "predicted_speed_up") - predicted).abs() < 1e-9 * predicted, "{row}");
    assert!((number(row, "efficiency") - number(row, "speed_up") / predicted).abs() < 1e-9, "{row}");
    assert!(row["loss"].as_f64().is_some_and(f64::is_finite), "{row}");
}

#[test]
fn every_system_has_a_row_for_each_point() {
    let all = measured(&format!("--methods all {SMALL} {DECODER} --classes 10 --teacher glyph_s"));
    let methods: Vec<&str> = all.iter().map(|system| system["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["mae", "dmae", "maskedkd", "dmjd", "tinymim"]);
    for system in &all {
        let rows = system["rows"].as_array().unwrap();
        let name = system["method"].as_str().unwrap();
        assert!(rows.len() >= 4 && system["notes"].as_array().unwrap().is_empty(), "{name}: {system}");
        rows.iter().for_each(|row| check(row, &rows[0]));
        assert_eq!(
            [number(&rows[0], "speed_up"), number(&rows[0], "predicted_speed_up"), number(&rows[0], "mask_ratio")],
            [1.0, 1.0, 0.0],
            "{name}"
        );
        let (has_decoder, has_teacher) = (matches!(name, "mae" | "dmae" | "dmjd"), matches!(name, "dmae" | "maskedkd" | "tinymim"));
        for row in rows {
            assert_eq!((number(row, "decoder_ms") > 0.0, number(row, "teacher_ms") > 0.0), (has_decoder, has_teacher), "{row}");
            assert_eq!(row["teacher"].is_string(), has_teacher, "{row}");
        }
        // Where fewer patches are seen there is less to do; DMJD makes that up by its views.
        let fewer = rows.iter().filter(|row| number(row, "mask_ratio") > 0.0 && row["views"].as_u64().is_none_or(|views| views == 1));
        fewer.for_each(|row| assert!(number(row, "predicted_speed_up") > 1.0, "{row}"));
    }
    let of = |name: &str| all.iter().find(|system| system["method"] == name).unwrap()["rows"].as_array().unwrap().clone();
    let column = |name: &str, key: &str| of(name).iter().map(|row| row[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(column("mae", "kept"), [16, 12, 8, 4, 1]);
    assert_eq!(column("maskedkd", "kept"), [16, 12, 8, 4]);
    assert_eq!(column("dmjd", "views"), [1, 1, 2, 3, 2]);
    assert_eq!(column("dmae", "teacher_block"), [3, 3, 3, 1, 2, 4]);
}

#[test]
fn the_speed_up_that_is_predicted_is_the_one_by_hand() {
    // glyph_t at 32 pixels: 16 patches of 192 numbers and a class token.
    let info = masque::nn::presets::mae("glyph_t", 32).unwrap();
    let (d, depth) = (info.width as f64, info.depth as f64);
    let block = |n: f64, d: f64| 12.0 * n * d * d + 2.0 * n * n * d;
    let step = |kept: f64| {
        let encoder = kept * 192.0 * d + depth * block(kept + 1.0, d);
        3.0 * (encoder + (kept + 1.0) * d * 32.0 + block(17.0, 32.0) + 17.0 * 32.0 * 192.0)
    };
    let all = measured(&format!("--method mae {SMALL} {DECODER} --keep 4,1 --norm-pix"));
    let rows = all[0]["rows"].as_array().unwrap();
    for (row, kept) in rows.iter().zip([16.0, 4.0, 1.0]) {
        assert!((number(row, "gflop_per_image") * 1e9 / (2.0 * step(kept)) - 1.0).abs() < 1e-12, "{row}");
        assert!((number(row, "predicted_speed_up") / (step(16.0) / step(kept)) - 1.0).abs() < 1e-12, "{row}");
    }
    assert!(rows.len() == 3 && rows[0]["encoder_efficiency"].is_null() && number(&rows[1], "encoder_efficiency") > 0.0);
    // Less is held where less is seen.
    assert!(
        number(&rows[2], "peak_bytes") < number(&rows[1], "peak_bytes") && number(&rows[1], "peak_bytes") < number(&rows[0], "peak_bytes")
    );
}

#[test]
fn points_that_cannot_be_meant_are_said_and_the_others_are_measured() {
    let (code, out, said) = masque(&format!("--method mae {SMALL} {DECODER} --mask-ratio 0,0.99,2.0,NaN,0.9,1"));
    assert!(code == Some(0) && said.is_empty(), "{code:?} {said}");
    for part in [
        "Not measured: --mask-ratio 0.99 keeps none of 16 patches",
        "Not measured: --mask-ratio 2 is not a part from 0",
        "Not measured: --mask-ratio NaN is not",
        "Not measured: --mask-ratio 1 keeps none",
        "\nnothing hidden ",
        "\n0.9 hidden ",
    ] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let all = measured(&format!("--method dmjd {SMALL} {DECODER} --views 0,1,2,17"));
    assert_eq!((all[0]["rows"].as_array().unwrap().len(), all[0]["notes"].as_array().unwrap().len()), (3, 2), "{}", all[0]);
    let all = measured(&format!("--method maskedkd --teacher glyph_s --classes 10 {SMALL} --keep 1,0,17"));
    assert_eq!((all[0]["rows"].as_array().unwrap().len(), all[0]["notes"].as_array().unwrap().len()), (2, 2), "{}", all[0]);
}

#[test]
fn what_cannot_be_meant_at_all_is_a_sentence() {
    for (arguments, code, part) in [
        ("--mask-ratio 2.0", 2, "--mask-ratio 2 is not a part"),
        ("--keep 0", 2, "--keep 0: the image has 16 patches"),
        ("--keep 197", 2, "1 to 16 can be kept"),
        ("--keep 3 --mask-ratio 0.5", 2, "cannot be used with"),
        ("--mask-ratio half", 2, "half"),
        ("--mask-ratio 0.5 --rounds 0", 2, "--rounds 0 is not from 1"),
        ("--views 2", 2, "--views says something of dmjd, and mae is measured"),
        ("--teacher-blocks 2", 2, "--teacher-blocks says something of dmae, tinymim"),
        ("--method maskedkd --teacher glyph_s --decoder-dim 64", 2, "--decoder-dim says something of mae, dmae, dmjd"),
        ("--method dmjd --baseline maskfeat --decoder-dim 64", 2, "--baseline maskfeat has none"),
        ("--method mae --teacher glyph_s", 2, "--teacher says something of"),
        ("--method dmae --teacher glyph_s --teacher-blocks 9", 2, "--teacher-blocks 9: the teacher has blocks 1 to 4"),
        ("--methods mae,simclr", 2, "there is no system \"simclr\""),
        ("--methods all --method mae", 2, "cannot be used with"),
        ("--batch 0", 2, "--batch 0 is not from 1"),
        ("--batch 1000000 --image-size 65536", 2, "GB of memory"),
        ("--image-size 33", 2, "33"),
        ("--image-size 8", 2, "nothing can be hidden of an image of one patch"),
        ("--model nothing", 2, "is unknown"),
        ("--device emulated --precision tf32", 2, "tf32"),
        ("--device gpu:77", 1, "gpu:77"),
    ] {
        // A flag stands once.
        let small = SMALL.split(" --").map(|flag| format!("--{}", flag.trim_start_matches("--")));
        let small: Vec<String> = small.filter(|flag| !arguments.contains(flag.split(' ').next().unwrap())).collect();
        let (found, out, said) = masque(&format!("{} {arguments}", small.join(" ")));
        assert!(found == Some(code) && said.contains(part) && !said.contains("panicked"), "{arguments}: {found:?} {out}{said}");
        assert!(said.lines().count() == 1, "{arguments}: {said}");
    }
}

#[test]
fn a_system_that_cannot_be_measured_does_not_keep_others_from_it() {
    // MAE has no teacher that could be unknown.
    let (code, out, said) = masque(&format!("--methods mae,tinymim {SMALL} {DECODER} --teacher nothing"));
    assert!(code == Some(1) && out.contains("\nnothing hidden ") && out.contains("tinymim: not measured: "), "{code:?} {out}");
    assert!(said.contains("1 of 2 systems could not be measured: tinymim"), "{said}");
}

#[test]
fn files_hold_what_is_printed() {
    let folder = Scratch::new("masking");
    let at = folder.0.join("deeper").display().to_string();
    let (code, out, said) =
        masque(&format!("--methods mae,dmae {SMALL} {DECODER} --teacher glyph_s --mask-ratio 0,0.5,3 --output-dir {at}"));
    assert!(code == Some(0) && out.contains(&format!("written: {at}/masking.csv")), "{code:?} {out} {said}");
    let read = |name: &str| std::fs::read_to_string(format!("{at}/{name}")).unwrap();
    let (csv, page) = (read("masking.csv"), read("masking.html"));
    let json: Value = serde_json::from_str(&read("masking.json")).unwrap();
    let mut lines = csv.lines();
    let head: Vec<&str> = lines.next().unwrap().split(',').collect();
    let systems = json["systems"].as_array().unwrap();
    let rows: Vec<&Value> = systems.iter().flat_map(|system| system["rows"].as_array().unwrap()).collect();
    assert_eq!((rows.len(), lines.clone().count()), (4, 4), "{csv}");
    for (line, row) in lines.zip(rows) {
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), head.len(), "{line}");
        for (cell, name) in cells.iter().zip(&head) {
            let same = match &row[*name] {
                Value::Null => cell.is_empty(),
                Value::String(text) => cell == text,
                value => cell.parse::<f64>().ok() == value.as_f64(),
            };
            assert!(same, "{name}: {cell} is not {}", row[*name]);
        }
    }
    assert!(json["command"].as_str().unwrap().starts_with("masque measure masking --methods mae,dmae"), "{}", json["command"]);
    for part in [
        "Not measured: --mask-ratio 3",
        "<svg",
        "Masking efficiency",
        "0.5 hidden",
        "How it was measured",
        "masque measure masking --methods",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("<script") && !page.contains("http:") && !page.contains("https:") && !page.contains("NaN"));
    // Nothing is left behind, and a folder that cannot be made is said before anything is measured.
    assert_eq!(std::fs::read_dir(&at).unwrap().count(), 3);
    let (code, out, said) = masque(&format!("--method mae {SMALL} {DECODER} --output-dir {at}/masking.csv/x"));
    assert!(code == Some(2) && out.is_empty() && said.contains("--output-dir"), "{code:?} {out} {said}");
}

#[cfg(feature = "emulated")]
#[test]
fn steps_of_a_device_are_recorded_anew_at_every_point() {
    let size = "--model glyph_t --image-size 32 --batch 1 --rounds 2 --warmup 0 --decoder-dim 16 --decoder-depth 1 --decoder-heads 1";
    for precision in ["f32", "bf16"] {
        let all = measured(&format!("--method mae --device emulated --precision {precision} {size} --mask-ratio 0,0.75"));
        let rows = all[0]["rows"].as_array().unwrap();
        rows.iter().for_each(|row| check(row, &rows[0]));
        assert!(all[0]["device"] == "emulated" && all[0]["step_with_record"].is_null() && rows.len() == 2, "{}", all[0]);
        assert_eq!([&rows[0]["kept"], &rows[1]["kept"]], [16, 4]);
        assert!(number(&rows[1], "peak_bytes") < number(&rows[0], "peak_bytes"));
    }
    let (_, out, _) = masque(&format!("--method mae --device emulated {size} --keep 4"));
    assert!(out.contains("say nothing about a GPU"), "{out}");
}
