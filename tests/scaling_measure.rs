//! `masque measure scaling`: the model against cases by hand, a command that writes what it says, and refusals that are sentences.

mod common;

use common::Scratch;
use masque::device::ranks::Wire;
use masque::measure::scaling::model::{Bucket, Fit, Form, Network, Ring, Road, Work, cost};
use serde_json::Value;
use std::process::Command;

const SMALL: &str = "--model glyph_t --image-size 32 --batch 2 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --steps 2 --warmup 1";

const NETWORK: Network = Network { per_node: 8, link: 400e6, network: 50e6, latency: 0.01 };
const FORM: Form = Form { overlap: true, sharded: false, wire: Wire::F32 };
const RANKS: [usize; 8] = [1, 2, 4, 8, 16, 64, 512, 4096];

/// Three buckets, of 4, 8 and 12 MB in f32.
fn work() -> Work {
    let buckets = [(0.25, 1_000_000), (0.5, 2_000_000), (1.0, 3_000_000)].map(|(ready, numbers)| Bucket { ready, numbers });
    Work { forward: 20.0, backward: 40.0, update: 5.0, buckets: buckets.to_vec() }
}

fn ring(ranks: usize) -> Ring {
    Ring { network: NETWORK, ranks }
}

#[track_caller]
fn near(found: f64, wanted: f64) {
    assert!((found - wanted).abs() < 1e-9 * wanted.abs().max(1.0), "{found} is not {wanted}");
}

#[test]
fn an_exchange_takes_what_it_takes_by_hand() {
    // 2 * 7/8 * 8e6 / 400e6 s and 2 * 7 steps of 10 us.
    near(ring(8).all_reduce(8e6), 1e3 * (2.0 * 7.0 / 8.0 * 8e6 / 400e9) + 0.14);
    // Four machines: the same inside, and 2 * 3/4 of 1e6 bytes over the network in 2 * 3 steps.
    near(ring(32).all_reduce(8e6), 0.035 + 0.14 + 1e3 * (2.0 * 0.75 * 1e6 / 50e9) + 0.06);
    // Machines of one GPU are a ring over the network.
    let flat = Ring { network: Network { per_node: 1, ..NETWORK }, ranks: 4 };
    near(flat.all_reduce(8e6), 1e3 * (2.0 * 0.75 * 8e6 / 50e9) + 0.06);
    for ranks in RANKS {
        near(ring(ranks).reduce_scatter(7e6) + ring(ranks).all_gather(7e6), ring(ranks).all_reduce(7e6));
    }
}

#[test]
fn buckets_go_one_after_the_other_and_what_is_left_is_exposed() {
    // A road of 1 ms a megabyte, whoever is on it.
    struct Slow;
    impl Road for Slow {
        fn all_reduce(&self, bytes: f64) -> f64 {
            2.0 * self.all_gather(bytes)
        }
        fn reduce_scatter(&self, bytes: f64) -> f64 {
            self.all_gather(bytes)
        }
        fn all_gather(&self, bytes: f64) -> f64 {
            0.5e-6 * bytes
        }
    }
    // Complete at 10, 20 and 40; gone at 14, 28 and 52: 12 ms behind the pass.
    let found = cost(&work(), &Slow, FORM, 1.0);
    near(found.exchange, 24.0);
    near(found.exposed, 12.0);
    near(found.step, 77.0);
    let found = cost(&work(), &Slow, Form { overlap: false, ..FORM }, 1.0);
    near(found.exposed, 24.0);
    near(found.step, 65.0 + 24.0);
    // Half of it while gradients come, 6 ms of which are behind; a quarter of the update; then 24 MB of values.
    let found = cost(&work(), &Slow, Form { sharded: true, ..FORM }, 0.25);
    near(found.exchange, 12.0 + 12.0);
    near(found.exposed, 6.0 + 12.0);
    near(found.step, 20.0 + 40.0 + 6.0 + 1.25 + 12.0);
    // Gradients of half as many bytes, and values as before.
    let found = cost(&work(), &Slow, Form { sharded: true, wire: Wire::Bf16, ..FORM }, 0.25);
    near(found.exchange, 6.0 + 12.0);
    // One that is complete late keeps the others waiting: they go in order.
    let late = Work { buckets: work().buckets.into_iter().map(|bucket| Bucket { ready: 1.0, ..bucket }).collect(), ..work() };
    near(cost(&late, &Slow, FORM, 1.0).exposed, 24.0);
}

#[test]
fn one_rank_and_an_endless_road_lose_nothing() {
    let endless = Network { link: f64::INFINITY, network: f64::INFINITY, latency: 0.0, ..NETWORK };
    for form in Form::all(Wire::F32).into_iter().chain(Form::all(Wire::Bf16)) {
        near(cost(&work(), &ring(1), form, 1.0).step, 65.0);
        let share = if form.sharded { 1.0 / 512.0 } else { 1.0 };
        let found = cost(&work(), &Ring { network: endless, ranks: 512 }, form, share);
        near(found.step, 60.0 + 5.0 * share);
        near(found.exposed, 0.0);
    }
}

#[test]
fn what_is_exposed_is_part_of_the_exchange_and_grows_with_the_ranks() {
    for form in Form::all(Wire::F32).into_iter().chain(Form::all(Wire::Bf16)) {
        let costs = RANKS.map(|ranks| cost(&work(), &ring(ranks), form, 1.0));
        for found in costs {
            assert!(found.exposed >= 0.0 && found.exposed <= found.exchange, "{form:?}: {found:?}");
            near(found.step, 65.0 + found.exposed);
        }
        for pair in costs.windows(2) {
            assert!(
                pair[0].exchange < pair[1].exchange && pair[0].exposed <= pair[1].exposed && pair[0].step <= pair[1].step,
                "{form:?}: {pair:?}"
            );
        }
        for ranks in RANKS {
            let of = |network: Network| cost(&work(), &Ring { network, ranks }, form, 1.0);
            let usual = of(NETWORK);
            let faster = [
                Network { link: 2.0 * NETWORK.link, ..NETWORK },
                Network { network: 2.0 * NETWORK.network, ..NETWORK },
                Network { latency: 0.0, ..NETWORK },
            ];
            faster
                .map(of)
                .iter()
                .for_each(|found| assert!(found.step <= usual.step && found.exchange <= usual.exchange, "{ranks} {form:?}"));
            let behind = cost(&work(), &ring(ranks), Form { overlap: false, ..form }, 1.0);
            assert!(usual.step <= behind.step && usual.exchange == behind.exchange, "{ranks} {form:?}");
        }
    }
}

#[test]
fn a_line_is_found_where_there_is_one_and_never_falls() {
    let line = Fit::of(&[1e4, 1e5, 1e6, 1e7].map(|bytes| (bytes, 0.02 + 1e-6 * bytes)));
    near(line.start, 0.02);
    near(line.each * 1e6, 1.0);
    assert!(line.error < 1e-9 && (line.rate().unwrap() - 1.0).abs() < 1e-9, "{line:?}");
    for odd in
        [vec![], vec![(1e6, 2.0)], vec![(1e3, 5.0), (1e6, 1.0)], vec![(1e3, 0.0), (1e6, 0.0)], vec![(1e3, 0.001), (1e6, 9.0), (1e7, 200.0)]]
    {
        let fit = Fit::of(&odd);
        assert!(fit.start >= 0.0 && fit.each >= 0.0 && fit.at(1e9).is_finite(), "{odd:?}: {fit:?}");
    }
}

/// Exit code, standard output, standard error.
fn masque(arguments: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    let output = command.args(["--threads", "2", "measure", "scaling"]).args(arguments.split_whitespace()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[track_caller]
fn measured(arguments: &str) -> Value {
    let (code, out, said) = masque(&format!("{arguments} --json"));
    assert!(code == Some(0) && said.is_empty(), "{arguments}: {code:?} {said}");
    serde_json::from_str(&out).unwrap()
}

#[track_caller]
fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"))
}

#[test]
fn rows_follow_from_what_is_typed() {
    let flags = "--step-ms 20,40,5 --bucket-mb 0.1 --ranks 1,8,64 --wire f32 --link-gbs 1 --network-gbs 0.1 --latency-us 10";
    let all = measured(&format!("{SMALL} {flags}"));
    let buckets: Vec<Bucket> = all["buckets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bucket| Bucket { ready: number(bucket, "ready"), numbers: number(bucket, "numbers") as usize })
        .collect();
    assert!(buckets.len() > 1 && buckets.iter().all(|bucket| (0.0..=1.0).contains(&bucket.ready)), "{buckets:?}");
    let numbers: usize = buckets.iter().map(|bucket| bucket.numbers).sum();
    assert_eq!(all["parameters"], numbers);
    let work = Work { forward: 20.0, backward: 40.0, update: 5.0, buckets };
    let network = Network { per_node: 8, link: 1e6, network: 0.1e6, latency: 0.01 };
    let rows = all["rows"].as_array().unwrap();
    assert_eq!((rows.len(), all["together"].as_array().unwrap().len()), (3 * 4, 0));
    for row in rows {
        let ranks = number(row, "ranks") as usize;
        let form = Form { overlap: row["overlap"] == true, sharded: row["sharded"] == true, wire: Wire::F32 };
        // The optimiser has two moments of each number; its share is that of the update.
        let share = number(row, "optimizer_bytes") / (8 * numbers) as f64;
        assert!(if form.sharded { share >= 1.0 / ranks as f64 } else { share == 1.0 } && share <= 1.0, "{row}");
        let found = cost(&work, &Ring { network, ranks }, form, share);
        for (key, wanted) in [("exchange_ms", found.exchange), ("exposed_ms", found.exposed), ("step_ms", found.step)] {
            assert!((number(row, key) - wanted).abs() < 1e-4 * wanted.max(1.0), "{key} is not {wanted}: {row}");
        }
        near(number(row, "efficiency"), 65.0 / number(row, "step_ms"));
        near(number(row, "images_per_s"), (2 * ranks) as f64 * 1e3 / number(row, "step_ms"));
        assert_eq!((number(row, "gradients_bytes") as usize, row["measured_ms"].is_null()), (4 * numbers, true));
    }
}

#[test]
fn ranks_of_this_machine_are_predicted_and_measured() {
    let all = measured(&format!("{SMALL} --bucket-mb 0.1 --measure-ranks 1,2 --wire bf16"));
    let groups = all["together"].as_array().unwrap();
    assert_eq!(groups.iter().map(|group| number(group, "ranks") as usize).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(groups.iter().map(|group| number(group, "threads") as usize).collect::<Vec<_>>(), [2, 1]);
    groups.iter().for_each(|group| assert!(number(&group["alone"], "ms") > 0.0 && number(&group["busy"], "ms") > 0.0, "{group}"));
    let rows: Vec<&Value> = all["rows"].as_array().unwrap().iter().filter(|row| row["what"] == "measured").collect();
    assert_eq!(rows.len(), 2 * 3);
    for row in rows {
        let [least, median, most] = ["measured_min_ms", "measured_ms", "measured_max_ms"].map(|key| number(row, key));
        assert!(0.0 < least && least <= median && median <= most, "{row}");
        let ratio = number(row, "measured_over_predicted");
        assert!((ratio - median / number(row, "step_ms")).abs() < 1e-9 * ratio, "{row}");
        assert!(number(row, "exposed_ms") <= number(row, "exchange_ms") && row["efficiency"].is_null(), "{row}");
    }
}

#[test]
fn files_hold_what_is_printed() {
    let folder = Scratch::new("scaling");
    let at = folder.0.join("deeper").display().to_string();
    let (code, out, said) = masque(&format!("{SMALL} --measure-ranks 2 --output-dir {at}"));
    assert!(code == Some(0) && out.contains(&format!("written: {at}/scaling.csv")), "{code:?} {out} {said}");
    for part in ["Computed on a CPU", "Not run on many GPUs", "overlap, ZeRO-1", "gradients in bf16, computed", "all busy"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let read = |name: &str| std::fs::read_to_string(format!("{at}/{name}")).unwrap();
    let (csv, page) = (read("scaling.csv"), read("scaling.html"));
    let json: Value = serde_json::from_str(&read("scaling.json")).unwrap();
    let rows = json["scaling"]["rows"].as_array().unwrap();
    let head: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    assert_eq!((rows.len(), csv.lines().count()), (3 * 4 * 2 + 3, rows.len() + 1), "{csv}");
    for (line, row) in csv.lines().skip(1).zip(rows) {
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), head.len(), "{line}");
        for (cell, name) in cells.iter().zip(&head) {
            let same = match &row[*name] {
                Value::Null => cell.is_empty(),
                Value::String(text) => cell == text,
                Value::Bool(truth) => *cell == truth.to_string(),
                value => cell.parse::<f64>().ok() == value.as_f64(),
            };
            assert!(same, "{name}: {cell} is not {}", row[*name]);
        }
    }
    for part in ["<svg", "Efficiency, gradients in f32", "Computed on a CPU", "512 ranks", "Predicted and measured", "How it was measured"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("<script") && !page.contains("http:") && !page.contains("https:") && !page.contains("NaN"));
    assert_eq!(std::fs::read_dir(&at).unwrap().count(), 3);
    let (code, out, said) = masque(&format!("{SMALL} --output-dir {at}/scaling.csv/x"));
    assert!(code == Some(2) && out.is_empty() && said.contains("--output-dir"), "{code:?} {out} {said}");
}

#[test]
fn what_cannot_be_meant_is_a_sentence() {
    for (arguments, code, part) in [
        ("--ranks 0", 2, "--ranks 0 is not from 1"),
        ("--ranks 12", 2, "--ranks 12: machines of 8 GPUs are not filled"),
        ("--ranks 99999999", 2, "--ranks 99999999 is not from 1"),
        ("--gpus-per-node 0", 2, "--gpus-per-node 0 is not from 1"),
        ("--link-gbs 0", 2, "--link-gbs 0 is not from"),
        ("--network-gbs -1", 2, "--network-gbs -1 is not from"),
        ("--network-gbs NaN", 2, "--network-gbs NaN is not from"),
        ("--latency-us -1", 2, "--latency-us -1 is not from"),
        ("--bucket-mb 0", 2, "--bucket-mb 0 is not from"),
        ("--compute-scale 0", 2, "--compute-scale 0 is not from"),
        ("--step-ms 1,2", 2, "--step-ms 1,2: three times"),
        ("--step-ms 0,0,0", 2, "three times"),
        ("--step-ms 1,-2,3", 2, "three times"),
        ("--step-ms 1,2,3 --compute-scale 2", 2, "cannot be used with"),
        ("--wire f16", 2, "not sent in f16"),
        ("--steps 0", 2, "--steps 0 is not from 1"),
        ("--measure-ranks 0", 2, "--measure-ranks 0 is not from 1"),
        ("--measure-ranks 65", 2, "--measure-ranks 65 is not from 1 to 64"),
        ("--measure-ranks two", 2, "\"two\" is no number of ranks"),
        ("--device emulated --measure-ranks 2", 2, "measured on the CPU alone, not on emulated"),
        ("--keep 3", 2, "--keep is for --method maskedkd"),
        ("--batch 0", 2, "--batch 0"),
        ("--batch 1000000 --image-size 65536", 2, "GB of memory"),
        ("--classes 7", 2, "--classes 7 is for --method maskedkd"),
        ("--method mae --teacher glyph_s", 2, "mae has no teacher"),
        ("--device gpu:77", 1, "gpu:77"),
    ] {
        // A flag stands once.
        let small = SMALL.split(" --").map(|flag| format!("--{}", flag.trim_start_matches("--")));
        let small: Vec<String> = small.filter(|flag| !arguments.contains(flag.split(' ').next().unwrap())).collect();
        let (found, out, said) = masque(&format!("{} {arguments}", small.join(" ")));
        assert!(found == Some(code) && said.contains(part) && !said.contains("panicked"), "{arguments}: {found:?} {out}{said}");
        assert!(said.lines().count() == 1 && out.is_empty(), "{arguments}: {said}");
    }
}

#[cfg(feature = "emulated")]
#[test]
fn a_device_gives_the_parts_of_a_recorded_step() {
    let size = "--model glyph_t --image-size 32 --batch 1 --steps 2 --warmup 1 --decoder-dim 16 --decoder-depth 1 --decoder-heads 1 --bucket-mb 0.05";
    let all = measured(&format!("--device emulated {size}"));
    let parts = ["forward", "backward", "update", "step"].map(|part| number(&all["measured"][part], "ms"));
    let scaled = ["forward_ms", "backward_ms", "update_ms"].map(|part| number(&all["scaled"], part));
    assert!(all["measured"]["recorded"] == true && parts.iter().all(|ms| *ms > 0.0), "{all}");
    assert!((scaled.iter().sum::<f64>() / parts[3] - 1.0).abs() < 1e-9, "{all}");
    assert!(all["notes"][0].as_str().unwrap().contains("nothing about a GPU") && all["together"].as_array().unwrap().is_empty(), "{all}");
}
