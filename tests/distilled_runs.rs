//! Runs with a teacher: chained, resumed, on the emulated device, refused.

#[path = "common/runs.rs"]
mod runs;

use runs::{checkpoints, fails, folder, last_tensors, masque, rows, said, succeeds};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small MAE that has learned a little, in a folder of a test's own.
fn teacher(name: &str) -> (PathBuf, PathBuf) {
    let base = folder(name);
    let few = "pretrain mae --train-images 64 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0";
    succeeds(masque(few, &base.join("teacher")));
    let path = base.join("teacher/best.safetensors");
    (base, path)
}

fn with_teacher(arguments: &str, teacher: &Path, output: &Path) -> Command {
    let mut command = masque(arguments, output);
    command.arg("--teacher-path").arg(teacher);
    command
}

const FEW: &str = "--train-images 64 --val-images 16 --batch-size 8 --epochs 2 --warmup-epochs 0.5 --log-freq 1";

#[test]
fn a_student_of_dmae_is_distilled_finetuned_and_shown() {
    let (base, teacher) = teacher("dmae-chain");
    let text = succeeds(with_teacher(&format!("pretrain dmae {FEW}"), &teacher, &base.join("dmae")));
    assert!(text.contains("aligned, from 0: 1 with 2") && text.contains("the teacher took"), "{text}");
    let log = rows(base.join("dmae/log.jsonl"));
    for key in ["teacher_s", "student_s", "teacher_flops_per_image", "student_flops_per_image", "train_loss", "test_loss"] {
        assert!(log[1][key].as_f64().unwrap() > 0.0, "{key} {log:?}");
    }
    let steps = rows(base.join("dmae/steps.jsonl"));
    for key in ["loss_pixels", "loss_align_block1", "teacher_ms", "student_ms"] {
        assert!(steps[0][key].as_f64().unwrap() > 0.0, "{key} {steps:?}");
    }
    let sum = ["loss_pixels", "loss_align_block1"].map(|key| steps[0][key].as_f64().unwrap()).iter().sum::<f64>();
    assert!((sum - steps[0]["loss"].as_f64().unwrap()).abs() < 1e-5 * sum);
    let student = base.join("dmae/best.safetensors");
    let report = std::fs::read_to_string(base.join("dmae/report.html")).unwrap();
    assert!(report.contains("of its FLOPs") && report.contains("Milliseconds of an update"));
    let text = succeeds({
        let mut command = masque(&format!("finetune --model glyph_t {FEW}"), &base.join("fine"));
        command.arg("--finetune").arg(&student);
        command
    });
    assert!(text.contains("of no use here: "), "{text}");
    let mut shown = Command::new(env!("CARGO_BIN_EXE_masque"));
    let shown = shown.arg("visualize").arg(&student).arg("--output").arg(base.join("shown.png")).output().unwrap();
    assert!(shown.status.success(), "{}", said(&shown));
    // The student of one run is the teacher of the next, of any size.
    let text = succeeds(with_teacher(
        &format!("pretrain dmae {FEW} --model glyph_s --teacher-aligned-blks-indices 0"),
        &student,
        &base.join("next"),
    ));
    assert!(text.contains("2 with 0"), "{text}");
}

#[test]
fn a_chain_of_tinymim_keeps_the_heads_that_each_stage_was_trained_with() {
    let (base, teacher) = teacher("tinymim-chain");
    let first = format!("pretrain tinymim {FEW} --intermediate 4 --teacher-last-heads 8 --heads 2 --color-jitter 0.4");
    let text = succeeds(with_teacher(&first, &teacher, &base.join("first")));
    assert!(text.contains("queries, keys and values of block 4 in 8 heads, of 4"), "{text}");
    assert!(text.contains("last block has 8 heads, the others 2"), "{text}");
    let student = base.join("first/best.safetensors");
    // What lies behind the relations is in the file as it started.
    let saved = masque::formats::open(&student).unwrap();
    let all = |name: &str, value: f32| saved.get(&format!("model.{name}")).unwrap().to_f32().unwrap().iter().all(|&x| x == value);
    assert!(all("norm.weight", 1.0) && all("norm.bias", 0.0) && all("blocks.2.norm2.weight", 1.0) && all("blocks.2.mlp.fc2.bias", 0.0));
    assert!(!all("blocks.2.norm1.bias", 0.0) && !all("blocks.2.attn.qkv.bias", 0.0) && !all("blocks.1.mlp.fc2.bias", 0.0));
    let text = succeeds(with_teacher(&format!("pretrain tinymim {FEW} --intermediate 3"), &student, &base.join("second")));
    assert!(text.contains("of block 3 in 8 heads, of 3"), "{text}");
    // Another block of it has the heads of the others.
    let text = succeeds(with_teacher(&format!("pretrain tinymim {FEW} --intermediate 2"), &student, &base.join("third")));
    assert!(text.contains("of block 2 in 2 heads, of 3"), "{text}");
    for (command, more) in [("finetune", ""), ("probe", "--lr 1"), ("pretrain dmae", "--model glyph_s --aligned-blks-indices 1")] {
        let mut command = masque(&format!("{command} {FEW} {more}"), &base.join(command.replace(' ', "-")));
        let from = if more.contains("aligned") { "--teacher-path" } else { "--finetune" };
        command.arg(from).arg(&student);
        if from == "--finetune" {
            command.args(["--model", "glyph_t"]);
        }
        succeeds(command);
    }
    let mut shown = Command::new(env!("CARGO_BIN_EXE_masque"));
    let shown = shown.arg("visualize").arg(&student).args(["--attention", "--output"]).arg(base.join("shown.png")).output().unwrap();
    assert!(shown.status.success(), "{}", said(&shown));
    let evaluated = Command::new(env!("CARGO_BIN_EXE_masque")).arg("evaluate").arg(&student).output().unwrap();
    assert!(evaluated.status.code() == Some(2) && said(&evaluated).contains("masque probe"), "{}", said(&evaluated));
}

#[test]
fn a_distilled_run_that_is_stopped_ends_with_the_bits_of_an_unbroken_one() {
    let (base, teacher) = teacher("distilled-resumed");
    for (method, flags) in [
        ("dmae", "--masking block"),
        ("tinymim", "--color-jitter 0.4 --drop-path 0.1 --teacher-drop-path 0.1"),
        ("tinymim", "--target features --feature qkv --masking random --reconstruct"),
    ] {
        let [whole, broken] = ["whole", "broken"].map(|name| base.join(format!("{method}-{}-{name}", flags.len())));
        let run = format!("pretrain {method} {FEW} {flags} --save-updates 3 --keep 9");
        succeeds(with_teacher(&run, &teacher, &whole));
        succeeds(with_teacher(&run, &teacher, &broken));
        for update in checkpoints(&broken).into_iter().filter(|&update| update > 3) {
            std::fs::remove_file(broken.join(format!("checkpoint-{update:08}.safetensors"))).unwrap();
        }
        let mut command = masque(&format!("pretrain {method}"), &broken);
        command.args(["--resume", "auto"]);
        let text = succeeds(command);
        assert!(text.contains("update 3"), "{text}");
        assert!(last_tensors(&whole) == last_tensors(&broken), "{method} {flags}");
    }
    // Another file in the place of the teacher's is none that a run goes on with.
    let run = base.join("dmae-15-broken");
    std::fs::copy(run.join("best.safetensors"), &teacher).unwrap();
    let mut command = masque("pretrain dmae", &run);
    command.args(["--resume", "auto", "--epochs", "3"]);
    let (code, text) = fails(command);
    assert!(code == Some(1) && text.contains("the teacher is not the one that"), "{text}");
}

#[test]
fn a_student_of_tinymim_with_a_decoder_shows_what_it_paints_and_is_converted() {
    let (base, teacher) = teacher("tinymim-decoder");
    let flags = "--target features --masking block --mask-ratio 0.5 --reconstruct --norm-pix-loss";
    succeeds(with_teacher(&format!("pretrain tinymim {FEW} {flags}"), &teacher, &base.join("student")));
    let steps = rows(base.join("student/steps.jsonl"));
    let part = |key: &str| steps[0][key].as_f64().unwrap();
    assert!((part("loss_features") + part("loss_pixels") - part("loss")).abs() < 1e-5 * part("loss"), "{steps:?}");
    let program = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_masque")).args(arguments).current_dir(&base).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        said(&output)
    };
    program(&["visualize", "student/best.safetensors", "--output", "painted.png"]);
    // The file says that pixels were normalised: to say it again changes nothing.
    program(&["visualize", "student/best.safetensors", "--norm-pix-loss", "--mask-ratio", "0.5", "--output", "again.png"]);
    assert!(std::fs::read(base.join("painted.png")).unwrap() == std::fs::read(base.join("again.png")).unwrap());
    program(&["convert", "student/best.safetensors", "student.pth"]);
    let text = succeeds(with_teacher(&format!("pretrain tinymim {FEW}"), &base.join("student.pth"), &base.join("next")));
    assert!(text.contains("queries, keys and values of block 2 in 4 heads, of 3"), "{text}");
}

#[cfg(feature = "emulated")]
#[test]
fn distillation_on_the_emulated_device_gives_the_losses_of_the_cpu() {
    let (base, teacher) = teacher("distilled-emulated");
    let few = "--train-images 24 --val-images 8 --batch-size 4 --log-freq 1 --epochs 1 --warmup-epochs 0 --lr 1e-3";
    let commands = [
        "pretrain dmae",
        "pretrain dmae --masking saliency --accum-iter 2",
        "pretrain tinymim --color-jitter 0.4 --drop-path 0.1",
        "pretrain tinymim --target features --masking random --reconstruct",
    ];
    for (number, command) in commands.into_iter().enumerate() {
        let losses = |device: &str| -> Vec<f64> {
            let folder = base.join(format!("{device}-{number}"));
            succeeds(with_teacher(&format!("{command} {few} --device {device}"), &teacher, &folder));
            rows(folder.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect()
        };
        let (cpu, emulated) = (losses("cpu"), losses("emulated"));
        assert!(cpu.len() >= 3 && cpu.len() == emulated.len(), "{command}: {cpu:?} {emulated:?}");
        for (cpu, emulated) in cpu.iter().zip(&emulated) {
            assert!((cpu - emulated).abs() <= 2e-4 * cpu, "{command}: {emulated} is not {cpu}");
        }
    }
}

#[test]
fn a_teacher_or_a_flag_that_cannot_be_meant_is_one_sentence() {
    let (base, teacher) = teacher("distilled-refused");
    let refused = |arguments: &str, code: i32, parts: &[&str]| {
        let (found, text) = fails(with_teacher(&format!("{arguments} {FEW}"), &teacher, &base.join("none")));
        let last = text.lines().last().unwrap_or_default();
        assert!(found == Some(code) && last.starts_with("masque: ") && !text.contains("panicked"), "{arguments}: {found:?} {text}");
        parts.iter().for_each(|part| assert!(last.contains(part), "{arguments}: {last} lacks {part}"));
    };
    for (arguments, code, parts) in [
        ("pretrain dmae --input-size 64", 1, &["images of 48 x 48 pixels", "64 x 64", "--input-size 48"][..]),
        ("pretrain dmae --patch-size 16", 1, &["6 x 6 patches of 8", "3 x 3 of 16", "--patch-size 8"]),
        ("pretrain dmae --in-chans 1", 1, &["images of 3 channels", "have 1"]),
        ("pretrain dmae --aligned-blks-indices 3", 2, &["--aligned-blks-indices 3", "blocks 0 to 2"]),
        (
            "pretrain dmae --aligned-blks-indices 1 --teacher-aligned-blks-indices 4",
            2,
            &["--teacher-aligned-blks-indices 4", "blocks 0 to 3"],
        ),
        ("pretrain dmae --aligned-blks-indices 0,1 --teacher-aligned-blks-indices 2", 2, &["names 2 blocks", "1;"]),
        ("pretrain dmae --aligned-blks-indices 1,1 --teacher-aligned-blks-indices 1,2", 2, &["[1, 1]", "named once"]),
        ("pretrain dmae --aligned-feature-projection-mode none", 2, &["32 wide", "64", "fc-1layer"]),
        ("pretrain dmae --aligned-feature-projection-dim 32 48", 2, &["[32, 48]", "32 wide", "64"]),
        ("pretrain dmae --mask-ratio 0.99", 2, &["keeps 0 of 36"]),
        ("pretrain dmae --masking block --mask-ratio 0.9", 2, &["0 of 9 units"]),
        ("pretrain dmae --target-sum-weights 1", 2, &["--target-sum-weights has 1"]),
        ("pretrain dmae --freeze-keywords nothing", 2, &["--freeze-keywords nothing", "0 of"]),
        ("pretrain dmae --load-weights-keywords blocks", 2, &["--student-init-weights and --load-weights-keywords"]),
        ("pretrain dmae --student-reconstruction-target mixed", 2, &["original_img"]),
        ("pretrain tinymim --patch-size 16", 1, &["6 x 6 patches of 8", "3 x 3 of 16"]),
        ("pretrain tinymim --intermediate 5", 2, &["--intermediate 5", "blocks 1 to 4"]),
        ("pretrain tinymim --last-heads 8", 2, &["8 heads", "block 3 4;", "--last-heads"]),
        ("pretrain tinymim --intermediate 4 --teacher-last-heads 64", 2, &["64 heads", "width of 32"]),
        ("pretrain tinymim --teacher-last-heads 5", 2, &["--teacher-last-heads", "5 heads"]),
        (
            "pretrain tinymim --teacher-last-heads 8",
            2,
            &["last block, 4", "block 3 is asked", "--intermediate 4", "--teacher-last-heads 4"],
        ),
        ("pretrain tinymim --target features --last-heads 5", 2, &["--last-heads 5", "width of 32"]),
        ("pretrain tinymim --heads 5", 2, &["--heads", "5 heads"]),
        ("pretrain tinymim --target features --relations qq", 2, &["--relations", "--target relations"]),
        ("pretrain tinymim --target features --relation-softmax=false", 2, &["--relation-softmax=false", "--target relations"]),
        ("pretrain tinymim --feature qkv", 2, &["--feature", "--target features"]),
        ("pretrain tinymim --class-token-norm=false", 2, &["--class-token-norm=false", "--target class-token"]),
        ("pretrain tinymim --mask-ratio 0.5", 2, &["--mask-ratio", "--masking random"]),
        ("pretrain tinymim --keep-rounding round", 2, &["--keep-rounding", "--masking random"]),
        ("pretrain tinymim --reconstruct", 2, &["--reconstruct", "--masking random"]),
        ("pretrain tinymim --norm-pix-loss", 2, &["--norm-pix-loss", "--reconstruct"]),
        ("pretrain tinymim --relations qk,qk", 2, &["--relations names one twice"]),
        ("pretrain tinymim --relations qv", 2, &["qv"]),
        ("pretrain tinymim --masking random --mask-ratio 1", 2, &["keeps 0 of 36"]),
        ("pretrain tinymim --drop-path 1", 2, &["--drop-path 1"]),
        ("pretrain tinymim --in-chans 1", 1, &["images of 3 channels", "have 1"]),
        ("pretrain tinymim --color-jitter -1", 2, &["--color-jitter -1"]),
    ] {
        refused(arguments, code, parts);
    }
    let missing = with_teacher("pretrain dmae", &base.join("nothing.pth"), &base.join("none"));
    let (code, text) = fails(missing);
    assert!(code == Some(1) && text.contains("nothing.pth"), "{text}");
    // A file that lacks one tensor of the encoder teaches nothing.
    let file = masque::formats::open(&teacher).unwrap();
    let kept = file.tensors().iter().filter(|(name, _)| name.starts_with("model.") && !name.ends_with("blocks.1.attn.qkv.bias"));
    let kept: Vec<_> = kept.map(|(name, tensor)| (name.trim_start_matches("model."), tensor)).collect();
    let lacking = base.join("lacking.safetensors");
    masque::formats::write_safetensors(&lacking, kept, &Default::default()).unwrap();
    let (code, text) = fails(with_teacher(&format!("pretrain dmae {FEW}"), &lacking, &base.join("none")));
    assert!(code == Some(1) && text.contains("blocks.1.attn.qkv.bias is missing"), "{text}");
    let (code, text) = fails(masque("pretrain dmae --data-path synthetic --input-size 48 --model glyph_t", &base.join("none")));
    assert!(code == Some(2) || text.contains("runs/pretrain-mae"), "{text}");
}

#[test]
fn a_student_starts_partly_and_learns_partly() {
    let (base, teacher) = teacher("dmae-partly");
    let run = format!("pretrain dmae {FEW} --model glyph_s --load-weights-keywords patch_embed --freeze-keywords patch_embed,cls_token");
    let mut command = with_teacher(&run, &teacher, &base.join("run"));
    command.arg("--student-init-weights").arg(&teacher);
    let text = succeeds(command);
    assert!(text.contains("2 tensors with patch_embed in their names"), "{text}");
    let (own, theirs) = (last_tensors(&base.join("run")), masque::formats::open(&teacher).unwrap());
    let bytes = |name: &str| own.iter().find(|(own, _)| own == name).map(|(_, bytes)| bytes.clone()).unwrap();
    assert!(bytes("model.patch_embed.proj.weight") == theirs.get("model.patch_embed.proj.weight").unwrap().bytes());
    assert!(bytes("model.blocks.0.attn.qkv.weight") != theirs.get("model.blocks.0.attn.qkv.weight").unwrap().bytes());
    assert!(!own.iter().any(|(name, _)| name == "optimizer.exp_avg.cls_token"));
}
