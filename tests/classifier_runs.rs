//! Runs of `masque train` and `masque distill`: with teachers of every kind, resumed, on the emulated device, refused.

#[path = "common/runs.rs"]
mod runs;

use masque::formats::{self, FileTensor};
use masque::nn::cait::{Cait, CaitConfig};
use masque::nn::vit::{Position, VitConfig};
use masque::param::ParamsBuilder;
use masque::rng::Rng;
use masque::tensor::Dtype;
use runs::{checkpoints, fails, folder, last_tensors, masque, rows, said, succeeds};
use std::path::{Path, PathBuf};
use std::process::Command;

const FEW: &str = "--train-images 64 --val-images 16 --batch-size 8 --epochs 2 --warmup-epochs 0 --log-freq 1";

/// A small classifier that has learned a little, in a folder of a test's own.
fn teacher(name: &str) -> (PathBuf, PathBuf) {
    let base = folder(name);
    succeeds(masque(
        "finetune --model glyph_s --cls-token --train-images 64 --val-images 8 --batch-size 16 --epochs 1",
        &base.join("teacher"),
    ));
    let path = base.join("teacher/best.safetensors");
    (base, path)
}

fn taught(arguments: &str, teacher: &Path, output: &Path) -> Command {
    let mut command = masque(arguments, output);
    command.arg("--teacher-path").arg(teacher);
    command
}

#[test]
fn a_student_of_each_command_learns_and_is_evaluated() {
    let (base, teacher) = teacher("kd-chain");
    for (command, seen) in [
        ("distill maskedkd", "the teacher sees 18 of 36 patches, chosen by student"),
        ("distill maskedkd --len_num_keep 9 --distillation-type hard --selection random", "9 of 36 patches, chosen by random"),
        ("distill maskedkd --no-maskedkd --loss-form additive", "sees all 36"),
        ("distill maskedkd --global-pool", "18 of 36"),
        ("distill maskedkd --model deit_glyph_t_distilled_patch8_48 --saliency-query mean --len-num-keep 1", "1 of 36"),
        ("distill maskedkd --model deit_glyph_t_patch8_LS --start normal --drop-path 0.1", "18 of 36"),
        ("distill logit --distillation-tau 3 --opt lamb --clip-grad 1", "sees all 36"),
        ("distill deit", "sees all 36"),
        ("distill deit --distillation-type none", ""),
        ("train", ""),
        ("train --bce-loss --smoothing 0 --mixup 0.8 --cutmix 1 --opt fusedlamb --three-augment --aa none --attn-only", ""),
    ] {
        let output = base.join(command.replace([' ', '.', '-'], "_"));
        let run = format!("{command} {FEW}");
        let text = succeeds(if command.starts_with("train") { masque(&run, &output) } else { taught(&run, &teacher, &output) });
        assert!(text.contains(seen) && text.contains("acc@1"), "{command}: {text}");
        assert_eq!(text.contains("the teacher took"), !seen.is_empty(), "{command}: {text}");
        let log = rows(output.join("log.jsonl"));
        assert_eq!(log.len(), 2);
        if !seen.is_empty() {
            for key in ["teacher_s", "student_s", "teacher_flops_per_image", "student_flops_per_image", "test_acc1", "test_acc5"] {
                assert!(log[1][key].is_number(), "{key} {log:?}");
            }
            let step = &rows(output.join("steps.jsonl"))[0];
            let [base, distilled, loss] = ["loss_base", "loss_distill", "loss"].map(|key| step[key].as_f64().unwrap());
            let sum = if command.contains("additive") { base + distilled } else { 0.5 * (base + distilled) };
            assert!((sum - loss).abs() < 1e-5 * loss, "{command}: {step}");
        }
        // Two heads are evaluated by their mean, without any teacher.
        let student = output.join("best.safetensors");
        let evaluated = Command::new(env!("CARGO_BIN_EXE_masque")).arg("evaluate").arg(&student).args(["--val-images", "16"]).output();
        let evaluated = evaluated.unwrap();
        assert!(evaluated.status.success() && said(&evaluated).contains("* Acc@1"), "{command}: {}", said(&evaluated));
    }
    // Half of the patches are less than half of the teacher's blocks.
    let cost = |name: &str| rows(base.join(name).join("log.jsonl"))[0]["teacher_flops_per_image"].as_f64().unwrap();
    let (half, all) = (cost("distill_maskedkd"), cost("distill_logit___distillation_tau_3___opt_lamb___clip_grad_1"));
    assert!(half < 0.6 * all && half > 0.4 * all, "{half} of {all}");
}

#[test]
fn a_student_may_start_from_a_pretrained_encoder() {
    let (base, teacher) = teacher("kd-start");
    let few = "--train-images 64 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0";
    succeeds(masque(&format!("pretrain mae --model glyph_t {few}"), &base.join("mae")));
    let encoder = base.join("mae/best.safetensors");
    for command in ["distill maskedkd", "distill logit", "train"] {
        let run = format!("{command} {FEW} --finetune {}", encoder.display());
        let output = base.join(command.replace(' ', "-"));
        let text = succeeds(if command == "train" { masque(&run, &output) } else { taught(&run, &teacher, &output) });
        assert!(text.contains("as they start: head.weight, head.bias") || text.contains("head.weight"), "{text}");
    }
    let two = format!("distill deit {FEW} --finetune {}", encoder.display());
    let (code, text) = fails(taught(&two, &teacher, &base.join("two")));
    assert!(code == Some(1) && text.contains("dist_token is missing"), "{text}");
    // A classifier goes on: its head is kept where it fits, and dropped where the classes are others.
    let run = |more: &str| format!("train {FEW} {more} --finetune {}", base.join("distill-logit/best.safetensors").display());
    assert!(!succeeds(masque(&run("--lr 1e-5"), &base.join("on"))).contains("dropped"));
    assert!(succeeds(masque(&run("--nb-classes 30"), &base.join("more"))).contains("dropped: head.weight is [20, 32]"));
}

#[test]
fn a_run_that_is_stopped_ends_with_the_bits_of_an_unbroken_one() {
    let (base, teacher) = teacher("kd-resumed");
    let run = format!(
        "distill maskedkd {FEW} --mixup 0.8 --cutmix 1 --drop-path 0.2 --selection top-plus-random:9,4 --len-num-keep 13 --save-updates 3 --keep 9 \
         --sched cosine --warmup-epochs 1 --model-ema-decay 0.9"
    );
    succeeds(taught(&run, &teacher, &base.join("whole")));
    succeeds(taught(&run, &teacher, &base.join("broken")));
    for update in checkpoints(&base.join("broken")).into_iter().filter(|&update| update > 9) {
        std::fs::remove_file(base.join(format!("broken/checkpoint-{update:08}.safetensors"))).unwrap();
    }
    let mut command = masque("distill maskedkd", &base.join("broken"));
    command.args(["--resume", "auto"]);
    let text = succeeds(command);
    assert!(text.contains("update 9"), "{text}");
    let (whole, broken) = (last_tensors(&base.join("whole")), last_tensors(&base.join("broken")));
    assert!(whole == broken);
    // A teacher is no part of what is saved.
    assert!(whole.iter().all(|(name, _)| !name.contains("teacher")));
    let student = whole.iter().filter(|(name, _)| name.starts_with("model.")).map(|(_, bytes)| bytes.len() / 4).sum::<usize>();
    assert_eq!(student, 46228);
}

#[test]
fn rates_are_scaled_and_move_as_timm_moves_them() {
    let base = folder("kd-rates");
    let few = "train --train-images 64 --val-images 8 --batch-size 16 --epochs 4 --log-freq 1";
    let rates = |more: &str, name: &str| -> Vec<f64> {
        succeeds(masque(&format!("{few} {more}"), &base.join(name)));
        rows(base.join(name).join("log.jsonl")).iter().map(|row| row["train_lr"].as_f64().unwrap()).collect()
    };
    let near = |got: &[f64], want: [f64; 4]| {
        got.iter().zip(want).for_each(|(got, want)| assert!((got - want).abs() < 1e-12, "{got} is not {want}"));
    };
    let peak = 0.512 * 32.0 / 512.0;
    let cosine = |t: f64| 1e-3 + 0.5 * (peak - 1e-3) * (1.0 + (std::f64::consts::PI * t / 4.0).cos());
    let timm = "--sched cosine --accum-iter 2 --unscale-lr=false --lr 0.512 --warmup-epochs 1 --warmup-lr 0.002 --min-lr 1e-3";
    near(&rates(timm, "timm"), [0.002, 0.002, cosine(1.0), cosine(2.0)]);
    let fixed = rates("--sched cosine --lr 0.01 --warmup-epochs 0 --min-lr 0.01", "fixed");
    near(&fixed, [0.01; 4]);
}

/// A CaiT under the names of the published files.
fn cait(path: &Path, image: usize, classes: usize) {
    let mut b = ParamsBuilder::default();
    let vit = VitConfig { position: Position::LearnedPatches, layer_scale: Some(1e-5), ..VitConfig::new(image, 8, 48, 3, 6) };
    Cait::new(&mut b, CaitConfig { vit, class_blocks: 2, classes }).unwrap();
    let params = b.build(Dtype::F32, &Rng::new(1)).unwrap();
    let tensor = |id| {
        (format!("module.{}", params.name(id)), FileTensor::from_f32(params.value(id).data::<f32>(), params.value(id).shape()).unwrap())
    };
    let tensors: Vec<_> = params.ids().map(tensor).collect();
    formats::write_safetensors(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &Default::default()).unwrap();
}

#[test]
fn a_cait_is_a_teacher_of_classes_alone() {
    let base = folder("kd-cait");
    let path = base.join("cait.safetensors");
    cait(&path, 48, 20);
    let text = succeeds(taught(&format!("distill maskedkd {FEW} --teacher-model caits_24"), &path, &base.join("run")));
    assert!(text.contains("18 of 36 patches"), "{text}");
    for (arguments, code, part) in [
        (format!("distill maskedkd {FEW} --teacher-model deit_small"), 2, "holds a CaiT"),
        (format!("distill maskedkd {FEW} --selection teacher"), 2, "is a CaiT"),
        (format!("pretrain dmae {FEW}"), 1, "it is a CaiT, whose blocks give no features"),
        (format!("pretrain tinymim {FEW}"), 1, "it is a CaiT, whose blocks give no features"),
    ] {
        let (found, text) = fails(taught(&arguments, &path, &base.join("none")));
        assert!(found == Some(code) && text.contains(part) && !text.contains("panicked"), "{arguments}: {found:?} {text}");
    }
    let evaluated = Command::new(env!("CARGO_BIN_EXE_masque")).arg("evaluate").arg(&path).output().unwrap();
    assert!(evaluated.status.code() == Some(2) && said(&evaluated).contains("is a CaiT, which is a teacher here"), "{}", said(&evaluated));
}

#[cfg(feature = "emulated")]
#[test]
fn distillation_of_logits_on_the_emulated_device_gives_the_losses_of_the_cpu() {
    let (base, teacher) = teacher("kd-emulated");
    let few = "--train-images 24 --val-images 8 --batch-size 4 --log-freq 1 --epochs 1 --warmup-epochs 0 --lr 1e-3";
    for (number, command) in [
        "distill maskedkd --drop-path 0.2",
        "distill maskedkd --mixup 0.8 --cutmix 1 --selection random --accum-iter 2",
        "distill deit",
        "train --bce-loss --smoothing 0 --opt lamb --model-ema-decay 0.9",
    ]
    .into_iter()
    .enumerate()
    {
        let losses = |device: &str| -> Vec<f64> {
            let folder = base.join(format!("{device}-{number}"));
            let run = format!("{command} {few} --device {device}");
            succeeds(if command.starts_with("train") { masque(&run, &folder) } else { taught(&run, &teacher, &folder) });
            let mut losses: Vec<f64> = rows(folder.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect();
            losses.push(rows(folder.join("log.jsonl"))[0]["test_loss"].as_f64().unwrap());
            losses
        };
        let (cpu, emulated) = (losses("cpu"), losses("emulated"));
        assert!(cpu.len() >= 4 && cpu.len() == emulated.len(), "{command}: {cpu:?} {emulated:?}");
        for (cpu, emulated) in cpu.iter().zip(&emulated) {
            assert!((cpu - emulated).abs() <= 2e-4 * cpu, "{command}: {emulated} is not {cpu}");
        }
    }
}

#[test]
fn a_teacher_or_a_flag_that_cannot_be_meant_is_one_sentence() {
    let (base, teacher) = teacher("kd-refused");
    let refused = |mut command: Command, arguments: &str, code: i32, parts: &[&str]| {
        let output = command.output().unwrap();
        let text = said(&output);
        let last = text.lines().last().unwrap_or_default();
        assert!(output.status.code() == Some(code) && last.starts_with("masque: ") && !text.contains("panicked"), "{arguments}: {text}");
        parts.iter().for_each(|part| assert!(last.contains(part), "{arguments}: {last} lacks {part}"));
    };
    for (arguments, code, parts) in [
        ("distill maskedkd --input-size 64", 1, &["images of 48 x 48 pixels", "64 x 64"][..]),
        ("distill maskedkd --patch-size 16 --len-num-keep 4", 1, &["6 x 6 patches of 8", "3 x 3 of 16", "--patch-size 8"]),
        ("distill maskedkd --in-chans 1", 1, &["images of 3 channels", "have 1"]),
        ("distill maskedkd --nb-classes 30", 1, &["answers 20 classes, the student 30"]),
        ("distill maskedkd --len-num-keep 0", 2, &["--len-num-keep 0", "36 patches"]),
        ("distill maskedkd --len-num-keep 98", 2, &["--len-num-keep 98", "1 to 36"]),
        ("distill maskedkd --selection attention", 2, &["attention", "student, random"]),
        ("distill maskedkd --saliency-resize bilinear", 2, &["bilinear"]),
        ("distill maskedkd --saliency-query dist", 2, &["--saliency-query", "no distillation token"]),
        ("distill maskedkd --model regnety_160", 2, &["regnety_160"]),
        ("distill maskedkd --teacher-model regnety_160", 2, &["there are no RegNets here"]),
        ("distill maskedkd --teacher-model caits_24", 2, &["caits_24", "no CaiT but a ViT"]),
        ("distill maskedkd --sched step", 2, &["step", "cosine"]),
        ("distill maskedkd --distillation-alpha 2", 2, &["--distillation-alpha 2"]),
        ("distill deit --model glyph_t", 2, &["glyph_t", "distill logit"]),
        ("distill maskedkd --drop 0.1", 2, &["--drop 0.1", "dropout is not built"]),
        ("distill maskedkd --blr 1e-3 --blr 2e-3", 2, &["--blr 0.002"]),
        ("distill maskedkd --bce-loss", 2, &["--bce-loss", "--smoothing 0"]),
        ("distill maskedkd --sched cosine --warmup-epochs 0.5", 2, &["--warmup-epochs 0.5"]),
        ("distill maskedkd --warmup-lr 1e-5", 2, &["--warmup-lr 0.00001", "--sched cosine"]),
        ("distill maskedkd --opt-betas 0.9", 2, &["--opt-betas [0.9]"]),
        ("distill maskedkd --global-pool --model deit_glyph_t_distilled_patch8_48", 2, &["--global-pool=false"]),
        ("distill maskedkd --train-interpolation random", 2, &["--train-interpolation random", "bicubically"]),
        ("distill maskedkd --data-set INAT", 2, &["--data-set INAT"]),
        ("distill maskedkd --teacher-cache cache --views 2", 2, &["--teacher-cache", "other patches"]),
        ("distill maskedkd --world_size 8", 2, &["--world-size 8", "masque launch --nproc 8"]),
        ("distill maskedkd --lr-noise 0.4", 2, &["--lr-noise"]),
    ] {
        let (words, flags) = arguments.split_at(arguments.find(" --").unwrap());
        let run = format!("{words} {FEW} {flags}");
        refused(taught(&run, &teacher, &base.join("none")), arguments, code, parts);
    }
    let run = format!("train {FEW} --model deit_glyph_t_distilled_patch8_48");
    refused(masque(&run, &base.join("none")), &run, 2, &["distill deit"]);
    // A teacher that lacks something, or has no head, or is not there.
    let lacking = base.join("lacking.safetensors");
    let file = formats::open(&teacher).unwrap();
    let kept = file.tensors().iter().filter(|(name, _)| name.starts_with("model.") && !name.ends_with("blocks.2.mlp.fc1.bias"));
    let kept = kept.map(|(name, tensor)| (name.trim_start_matches("model."), tensor));
    formats::write_safetensors(&lacking, kept, &Default::default()).unwrap();
    let run = format!("distill maskedkd {FEW}");
    refused(taught(&run, &lacking, &base.join("none")), "a missing key", 1, &["lacking", "blocks.2.mlp.fc1.bias is missing"]);
    succeeds(masque("pretrain mae --train-images 64 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0", &base.join("mae")));
    refused(taught(&run, &base.join("mae/best.safetensors"), &base.join("none")), "an MAE", 1, &["it has no head", "masque finetune"]);
    refused(taught(&run, &base.join("nothing.pth"), &base.join("none")), "no file", 1, &["nothing.pth"]);
    let published =
        "distill maskedkd --preset maskedkd-deit-t-from-deit3-s-98 --data-path synthetic --model glyph_t --input-size 48 --len-num-keep 9";
    refused(masque(published, &base.join("none")), published, 2, &["a teacher is needed", "deit_3_small_224_1k.pth"]);
}
