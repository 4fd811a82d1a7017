//! Whole runs of the program: killed and resumed, stopped, refused.

#[path = "common/runs.rs"]
mod runs;

use runs::{checkpoints, fails, folder, last_tensors, masque, rows, said, succeeds};
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// 96 updates in two epochs, a checkpoint after each.
const TINY: &str = "pretrain mae --model glyph_t --train-images 388 --val-images 8 --batch-size 4 --accum-iter 2 --epochs 2 --crop shift \
                    --save-updates 1 --model-ema-decay 0.9 --clip-grad 0.5 --keep 2 --warmup-epochs 0.5";

#[test]
fn a_run_killed_at_20_moments_ends_with_the_bits_of_an_unbroken_one() {
    let (whole, broken) = (folder("whole"), folder("broken"));
    succeeds(masque(TINY, &whole));
    assert_eq!(checkpoints(&whole), [95, 96]);
    let mut draws = masque::rng::Rng::new(20).stream("moments", 0);
    let mut killed = 0;
    while killed < 20 {
        let before = checkpoints(&broken).pop().unwrap_or(0);
        let mut child: Child = masque(TINY, &broken).args(["--resume", "auto"]).spawn().unwrap();
        // A few updates further, and then at any moment of the next.
        let (further, moment) = (draws.below(4) as u64, Duration::from_micros(draws.below(20_000) as u64));
        let started = Instant::now();
        while checkpoints(&broken).pop().unwrap_or(0) < before + further && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120), "the run does not move");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(moment);
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success() && output.stderr.is_empty(), "the run ended by itself: {}", said(&output));
        killed += 1;
    }
    assert!(checkpoints(&broken).pop().unwrap_or(0) < 96);
    let text = succeeds({
        let mut command = masque(TINY, &broken);
        command.args(["--resume", "auto"]);
        command
    });
    assert!(text.contains("going on from") && text.contains("weights: ") && text.contains("report.html"), "{text}");
    let (whole_tensors, broken_tensors) = (last_tensors(&whole), last_tensors(&broken));
    assert!(whole_tensors.iter().any(|(name, _)| name.starts_with("optimizer.exp_avg_sq.")));
    assert!(whole_tensors.iter().any(|(name, _)| name.starts_with("ema.")));
    assert!(whole_tensors == broken_tensors);
    // The rows are those of one run, without gaps or repetitions, but for what the clock says.
    let told = |folder: &Path, name: &str| -> Vec<Value> {
        let mut rows = rows(folder.join(name));
        for row in &mut rows {
            let row = row.as_object_mut().unwrap();
            row.retain(|key, _| key != "time" && key != "images_per_s");
        }
        rows
    };
    for name in ["log.jsonl", "steps.jsonl"] {
        assert_eq!(told(&whole, name), told(&broken, name));
    }
    let leftovers = std::fs::read_dir(&broken).unwrap().flatten().filter(|file| file.file_name().to_string_lossy().ends_with(".tmp"));
    assert_eq!(leftovers.count(), 0);
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_stops() {
    let (whole, stopped) = (folder("unstopped"), folder("stopped"));
    let run = TINY.replace("--save-updates 1", "--save-updates 1000");
    succeeds(masque(&run, &whole));
    for (signal, code, name) in [("-TERM", 143, "SIGTERM"), ("-INT", 130, "SIGINT")] {
        let before = checkpoints(&stopped);
        let child = masque(&run, &stopped).args(["--resume", "auto", "--log-freq", "1"]).spawn().unwrap();
        let steps = || std::fs::read_to_string(stopped.join("steps.jsonl")).map_or(0, |text| text.lines().count());
        let (rows, started) = (steps(), Instant::now());
        while steps() < rows + 3 {
            assert!(started.elapsed() < Duration::from_secs(120), "the run does not move");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(&format!("stopped by {name} after update")), "{}", said(&output));
        assert_ne!(checkpoints(&stopped), before);
    }
    succeeds({
        let mut command = masque(&run, &stopped);
        command.args(["--resume", "auto"]);
        command
    });
    assert!(last_tensors(&whole) == last_tensors(&stopped));
}

#[test]
fn the_number_of_workers_and_threads_changes_nothing() {
    let run = "pretrain mae --model glyph_t --train-images 64 --val-images 8 --batch-size 16 --epochs 1 --crop resized";
    let folders = [0, 1, 4].map(|workers| {
        let folder = folder(&format!("workers-{workers}"));
        let mut command = masque(run, &folder);
        command.args(["--num-workers", &workers.to_string()]);
        if workers == 4 {
            command.args(["--threads", "1"]);
        }
        succeeds(command);
        folder
    });
    assert!(last_tensors(&folders[0]) == last_tensors(&folders[1]));
    assert!(last_tensors(&folders[0]) == last_tensors(&folders[2]));
}

#[cfg(feature = "emulated")]
#[test]
fn training_on_the_emulated_device_gives_the_losses_of_the_cpu() {
    let losses = |device: &str, command: &str| -> Vec<f64> {
        let folder = folder(&format!("{device}-{}", command.split(' ').next().unwrap()));
        let run = format!(
            "{command} --train-images 24 --val-images 8 --batch-size 4 --log-freq 1 --epochs 1 --warmup-epochs 0 --device {device}"
        );
        succeeds(masque(&run, &folder));
        let mut losses: Vec<f64> = rows(folder.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect();
        losses.push(rows(folder.join("log.jsonl"))[0]["test_loss"].as_f64().unwrap());
        losses
    };
    for command in [
        "pretrain mae --model glyph_t --lr 1e-3",
        "finetune --model glyph_t --lr 1e-3 --mixup 0.8 --cutmix 1 --drop-path 0.2 --model-ema-decay 0.9",
        "probe --model glyph_t --lr 1 --accum-iter 1",
        "finetune --model glyph_t --lr 1e-3 --accum-iter 2 --aa rand-m9-mstd0.5-inc1 --reprob 0.5",
    ] {
        let (cpu, emulated) = (losses("cpu", command), losses("emulated", command));
        assert!(cpu.len() >= 4, "{command}: {cpu:?}");
        for (cpu, emulated) in cpu.iter().zip(&emulated) {
            assert!((cpu - emulated).abs() <= 2e-4 * cpu, "{command}: {emulated} is not {cpu}");
        }
    }
}

#[test]
fn an_encoder_is_pretrained_finetuned_probed_and_evaluated() {
    let base = folder("chain");
    let at = |name: &str| base.join(name);
    succeeds(masque("pretrain mae --model glyph_t --train-images 128 --val-images 32 --batch-size 32 --epochs 1 --lr 1e-3", &at("mae")));
    let encoder = at("mae").join("best.safetensors");
    let few = "--model glyph_t --train-images 128 --val-images 64 --batch-size 32 --epochs 2 --warmup-epochs 0";
    let from = format!("--finetune {}", encoder.display());
    let text = succeeds(masque(&format!("finetune {few} {from} --lr 1e-3"), &at("fine")));
    assert!(text.contains("tensors loaded") && text.contains("acc@1"), "{text}");
    let log = rows(at("fine").join("log.jsonl"));
    assert_eq!(log.len(), 2);
    for key in ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"] {
        assert!(log[1][key].is_number(), "{key} {log:?}");
    }
    // A checkpoint is evaluated as its run was.
    let last = at("fine").join("checkpoint-00000008.safetensors");
    let evaluated =
        Command::new(env!("CARGO_BIN_EXE_masque")).arg("evaluate").arg(&last).args(["--val-images", "64", "--batch-size", "32"]).output();
    let evaluated = evaluated.unwrap();
    let line = said(&evaluated);
    assert!(evaluated.status.success(), "{line}");
    let [first, five] = ["test_acc1", "test_acc5"].map(|key| log[1][key].as_f64().unwrap());
    let close = &format!("* Acc@1 {first:.3} Acc@5 {five:.3}");
    assert!(line.contains(close.as_str()), "{line} has no {close}");
    let eval = succeeds(masque(&format!("finetune {few} --eval --resume {}", last.display()), &at("eval")));
    assert!(eval.contains(close.as_str()), "{eval}");
    assert!(!at("eval").exists() || checkpoints(&at("eval")).is_empty());
    let text = succeeds(masque(&format!("probe {few} {from} --lr 1"), &at("probe")));
    assert!(text.contains("acc@1"), "{text}");
    let probe = last_tensors(&at("probe"));
    let steps = probe.iter().find(|(name, _)| name == "model.head.0.num_batches_tracked").unwrap();
    assert_eq!(f32::from_le_bytes(steps.1[..4].try_into().unwrap()), 8.0);
    let knn = Command::new(env!("CARGO_BIN_EXE_masque")).args(format!("probe {few} {from} --knn 5").split(' ')).output().unwrap();
    let text = said(&knn);
    assert!(knn.status.success(), "{text}");
    assert!(text.contains("5 nearest of 128 training images"), "{text}");
    // A classifier cannot be pre-trained further, and an encoder alone has nothing to be evaluated with.
    let (code, text) = fails(masque(&format!("finetune {few} --finetune {}", base.join("nothing.pth").display()), &at("none")));
    assert!(code == Some(1) && text.contains("nothing.pth"), "{text}");
}

#[test]
fn a_checkpoint_that_cannot_be_written_ends_the_run_and_names_the_last_good_one() {
    let folder = folder("full");
    // Something stands where the third checkpoint is to be.
    std::fs::create_dir_all(folder.join("checkpoint-00000003.safetensors")).unwrap();
    std::fs::write(folder.join("checkpoint-00000003.safetensors/in-the-way"), "").unwrap();
    let run = TINY.replace("--keep 2", "--keep 9");
    let (code, text) = fails({
        let mut command = masque(&run, &folder);
        command.args(["--resume", "auto"]);
        command
    });
    assert_eq!(code, Some(1));
    assert!(text.contains("saving failed; the last good checkpoint is") && text.contains("checkpoint-00000002"), "{text}");
}

#[test]
fn a_run_that_ends_without_numbers_keeps_none_of_them_and_fails() {
    let folder = folder("spoiled");
    let run = "pretrain mae --train-images 128 --val-images 32 --epochs 3 --lr 1e30 --warmup-epochs 0 --max-skips 100";
    let (code, text) = fails(masque(run, &folder));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("the run ended with parameters that give no finite numbers"), "{text}");
    let last = checkpoints(&folder).pop().unwrap();
    let file = masque::formats::open(folder.join(format!("checkpoint-{last:08}.safetensors"))).unwrap();
    assert!(file.tensors().iter().all(|(_, tensor)| tensor.to_f32().unwrap().iter().all(|x| x.abs() < 1e20)));
}

#[test]
fn a_run_goes_on_only_with_its_own_command_images_and_folder() {
    let base = folder("own");
    let few = "--model glyph_t --train-images 64 --val-images 8 --epochs 2";
    succeeds(masque(&format!("pretrain mae {few}"), &base.join("mae")));
    let (code, text) = fails({
        let mut command = masque(&format!("finetune {few}"), &base.join("fine"));
        command.arg("--resume").arg(base.join("mae/best.safetensors"));
        command
    });
    assert!(code == Some(2) && text.contains("is of masque pretrain mae, not of masque finetune"), "{text}");
    // A run that is still going on keeps others out of its folder.
    let busy = base.join("busy");
    let run = "pretrain mae --model glyph_t --train-images 4096 --epochs 50 --save-updates 1 --keep 1000";
    let mut first = masque(run, &busy).spawn().unwrap();
    let started = Instant::now();
    while checkpoints(&busy).len() < 3 {
        assert!(started.elapsed() < Duration::from_secs(120), "the run does not begin");
        std::thread::sleep(Duration::from_millis(2));
    }
    let refusals = ["auto".into(), busy.join("checkpoint-00000000.safetensors")].map(|from| {
        let mut command = masque("pretrain mae", &busy);
        command.arg("--resume").arg(from);
        fails(command)
    });
    first.kill().unwrap();
    first.wait().unwrap();
    for (code, text) in refusals {
        assert!(code == Some(1) && text.contains("is being written by another process"), "{text}");
    }
    // Nor do they touch what lies there.
    let renamed = std::fs::read_dir(&busy).unwrap().flatten().filter(|file| file.file_name().to_string_lossy().ends_with(".old"));
    assert_eq!(renamed.count(), 0);
}

#[test]
fn gradients_that_explode_are_skipped_and_end_in_a_sentence() {
    let folder = folder("explodes");
    let run = "pretrain mae --model glyph_t --train-images 640 --val-images 8 --batch-size 4 --epochs 1 --lr 1e36 --warmup-epochs 0 --max-skips 2 \
               --save-updates 1";
    let (code, text) = fails(masque(run, &folder));
    assert_eq!(code, Some(1));
    assert!(text.contains("was skipped:") && text.contains("the parameters are those of") && text.contains("try a smaller --lr"), "{text}");
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = folder("damaged");
    let run = "pretrain mae --model glyph_t --train-images 64 --val-images 8 --batch-size 16 --epochs 2";
    succeeds(masque(run, &folder));
    let newest = folder.join("checkpoint-00000008.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, &bytes).unwrap();
    let text = succeeds({
        let mut command = masque(run, &folder);
        command.args(["--resume", "auto"]);
        command
    });
    assert!(text.contains("is damaged") && text.contains("going on from") && text.contains("update 4"), "{text}");
    // Where none is whole the run begins anew, and what is damaged is in nobody's way.
    let whole = last_tensors(&folder);
    for update in checkpoints(&folder) {
        std::fs::write(folder.join(format!("checkpoint-{update:08}.safetensors")), "").unwrap();
    }
    let text = succeeds({
        let mut command = masque(run, &folder);
        command.args(["--resume", "auto"]);
        command
    });
    assert!(text.contains("the run begins anew") && !text.contains("going on from"), "{text}");
    assert_eq!(checkpoints(&folder), [0, 4, 8]);
    assert!(whole == last_tensors(&folder));
}

#[test]
fn what_cannot_be_meant_is_one_sentence() {
    let base = folder("refused");
    std::fs::create_dir_all(base.join("empty/train")).unwrap();
    std::fs::write(base.join("file"), "").unwrap();
    let empty = base.join("empty").display().to_string();
    let below_a_file = base.join("file/run");
    for (arguments, code, part) in [
        ("pretrain mae --mask-ratio 1", 2, "--mask-ratio 1 keeps 0 of 36 patches"),
        ("pretrain mae --model nosuch", 2, "nosuch"),
        ("pretrain mae --model vit_base_patch16", 2, "pre-training takes"),
        ("pretrain mae --preset nosuch", 2, "masque presets lists them"),
        ("pretrain mae --batch-size 0", 2, "--batch-size 0"),
        ("pretrain mae --lr -1", 2, "--lr"),
        ("pretrain mae --input-size 50", 2, "50"),
        ("pretrain mae --clip-grad 0", 2, "--clip-grad 0"),
        ("pretrain mae --train-images 8", 2, "an epoch has 0 batches"),
        ("pretrain mae --no-such-flag", 2, "--no-such-flag"),
        ("pretrain mae --precision tf32", 2, "tf32"),
        ("pretrain mae --data-path /no/such/folder", 1, "/no/such/folder"),
        ("finetune --mixup 0.8 --batch-size 3", 2, "--batch-size"),
        ("finetune --aa original", 2, "original"),
        ("finetune --nb-classes 3", 2, "--nb-classes 3"),
        ("finetune --model mae_vit_base_patch16", 2, "vit_base_patch16"),
        ("finetune --eval", 2, "--resume"),
        ("probe --knn 5", 2, "--output-dir has no meaning with --knn"),
        ("finetune --betas 0.9", 2, "--betas"),
        ("finetune --cutmix-minmax 0.2", 2, "--cutmix-minmax"),
        ("finetune --model deit_tiny_distilled_patch16_224", 2, "teacher"),
        ("finetune --finetune-ema", 2, "--finetune-ema"),
        ("pretrain mae --keep 0", 2, "--keep 0"),
        ("--threads 1 finetune --preset nosuch", 2, "nosuch"),
        ("probe --resume /no/such/file", 1, "/no/such/file"),
        ("pretrain mae --world-size 4", 2, "masque launch --nproc 4"),
        ("finetune --in-chans 1 --aa rand-m9-mstd0.5-inc1", 2, "--in-chans"),
    ] {
        let (found, text) = fails(masque(arguments, &base.join("run")));
        assert_eq!(found, Some(code), "{arguments}: {text}");
        let lines = text.lines().filter(|line| line.starts_with("masque: ")).count();
        assert!(lines == 1 && text.contains(part) && !text.contains("panicked"), "{arguments}: {text}");
    }
    let (code, text) = fails(masque(&format!("pretrain mae --data-path {empty}"), &base.join("run")));
    assert!(code == Some(1) && text.contains("empty"), "{text}");
    let (code, text) = fails(masque("pretrain mae --train-images 64 --epochs 1", &below_a_file));
    assert!(code == Some(1) && text.contains("file/run"), "{text}");
    // A folder that holds a run is not written over.
    succeeds(masque("pretrain mae --model glyph_t --train-images 64 --val-images 4 --epochs 1", &base.join("twice")));
    let (code, text) = fails(masque("pretrain mae --model glyph_t --train-images 64 --epochs 1", &base.join("twice")));
    assert!(code == Some(2) && text.contains("--resume auto"), "{text}");
    let (code, text) = fails({
        let mut command = masque("pretrain mae --model glyph_t --train-images 64 --val-images 4 --epochs 1 --seed 5", &base.join("twice"));
        command.args(["--resume", "auto"]);
        command
    });
    assert!(code == Some(2) && text.contains("--seed is 5") && text.contains("was made with 0"), "{text}");
    // What is not typed again is what the run began with; a run that is done says so.
    let text = succeeds({
        let mut command = masque("pretrain mae", &base.join("twice"));
        command.args(["--resume", "auto"]);
        command
    });
    assert!(text.contains("epochs are done already") && !text.contains("from here on"), "{text}");
}

#[test]
fn a_run_that_goes_back_leaves_later_checkpoints_aside() {
    let folder = folder("back");
    let run = "pretrain mae --model glyph_t --train-images 64 --val-images 8 --batch-size 16 --epochs 4 --save-freq 1 --keep 9";
    succeeds(masque(run, &folder));
    assert_eq!(checkpoints(&folder), [0, 4, 8, 12, 16]);
    let whole = last_tensors(&folder);
    let text = succeeds({
        let mut command = masque(run, &folder);
        command.arg("--resume").arg(folder.join("checkpoint-00000008.safetensors"));
        command
    });
    assert!(text.contains("going on from") && text.contains("it has been renamed"), "{text}");
    assert!(folder.join("checkpoint-00000016.safetensors.old").exists());
    assert_eq!(checkpoints(&folder), [0, 4, 8, 12, 16]);
    assert!(whole == last_tensors(&folder));
}

#[test]
fn a_command_that_is_written_down_can_be_repeated() {
    let base = folder("repeat");
    let few = "--model glyph_t --train-images 32 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0";
    for (i, command) in ["pretrain mae", "finetune --cutmix-minmax 0.2,0.8 --betas 0.9,0.95", "probe --lr 1"].into_iter().enumerate() {
        let (first, again) = (base.join(format!("{i}")), base.join(format!("{i}-again")));
        succeeds(masque(&format!("{command} {few}"), &first));
        let line = std::fs::read_to_string(first.join("command.txt")).unwrap();
        let mut repeated = Command::new(env!("CARGO_BIN_EXE_masque"));
        repeated.args(&masque::train::record::words(&line)[1..]).arg("--output-dir").arg(&again);
        succeeds(repeated);
        assert!(last_tensors(&first) == last_tensors(&again), "{command}");
    }
}

#[test]
fn every_preset_is_a_command_that_can_be_typed() {
    let listed = Command::new(env!("CARGO_BIN_EXE_masque")).arg("presets").output().unwrap();
    let listed = said(&listed);
    let names: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.len() > 30, "{listed}");
    let nowhere = folder("presets").join("nowhere");
    for name in names {
        let printed = said(&Command::new(env!("CARGO_BIN_EXE_masque")).args(["presets", name]).output().unwrap());
        let command = printed.lines().find_map(|line| line.strip_prefix("masque ")).unwrap().trim_end_matches('\\').trim().to_string();
        let mut typed = Command::new(env!("CARGO_BIN_EXE_masque"));
        typed.args(command.split(' ')).args(["--preset", name, "--data-path"]).arg(&nowhere);
        let (code, text) = fails(typed);
        // What is missing first is the teacher of some, the images of the others.
        let understood = [(Some(1), "nowhere"), (Some(1), "--teacher-path"), (Some(2), "a teacher is needed")];
        assert!(understood.iter().any(|(known, part)| code == *known && text.contains(part)), "{name}: {text}");
    }
}
