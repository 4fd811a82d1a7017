//! Runs of DMJD, MaskFeat and ConvMAE: what they say and record, resumed, taught, shown and judged, on the emulated device, refused.

#[path = "common/runs.rs"]
mod runs;

use runs::{checkpoints, fails, folder, last_tensors, masque, rows, said, succeeds};
use std::path::Path;
use std::process::Command;

const FEW: &str = "--train-images 64 --val-images 16 --batch-size 8 --epochs 2 --warmup-epochs 0.5 --log-freq 1";

/// Every method, and the model that its classifier is.
const METHODS: [(&str, &str); 5] = [
    ("pretrain dmjd", "glyph_conv"),
    ("pretrain dmjd --preset glyphs-dmjd-maskfeat --num-views 3", "glyph_s"),
    ("pretrain dmjd --baseline mae --model glyph_s --pred-type norm-rgb --mask-type block", "glyph_s"),
    ("pretrain maskfeat", "glyph_s"),
    ("pretrain convmae", "glyph_conv"),
];

/// The program without a run folder.
#[track_caller]
fn program(arguments: &str, base: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_masque")).args(arguments.split(' ')).current_dir(base).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", said(&output));
    said(&output)
}

#[test]
fn every_method_is_trained_judged_shown_and_fine_tuned() {
    let base = folder("dmjd-methods");
    for (number, (method, model)) in METHODS.into_iter().enumerate() {
        let run = base.join(format!("{number}"));
        succeeds(masque(&format!("{method} {FEW}"), &run));
        let log = rows(run.join("log.jsonl"));
        let [first, last] = [&log[0], &log[1]].map(|row| row["test_loss"].as_f64().unwrap_or(f64::INFINITY));
        assert!(log.len() == 2 && last.is_finite() && (last < first || first.is_infinite()), "{method}: {log:?}");
        assert!(run.join("pictures/reconstruction.png").exists(), "{method}");
        let best = format!("{number}/best.safetensors");
        let shown = log[1]["test_loss"].as_f64().unwrap();
        let judged = program(&format!("evaluate {best} --batch-size 8 --val-images 16"), &base);
        assert!(judged.contains(&format!("loss {shown:.4} (16 images)")), "{method}: {judged} is not {shown}");
        program(&format!("visualize {best} --output {number}.png"), &base);
        let knn = program(&format!("probe --knn --model {model} --finetune {best} --train-images 64 --val-images 16"), &base);
        assert!(knn.contains("acc@1"), "{method}: {knn}");
        for command in ["finetune --global-pool=false", "finetune", "probe"] {
            let to = base.join(format!("{number}-{}", command.replace(' ', "")));
            let text = succeeds(masque(&format!("{command} --model {model} --finetune {}/{best} {FEW}", base.display()), &to));
            assert!(text.contains("of no use here: ") && text.contains("mask_token"), "{method}, {command}: {text}");
            assert!(!text.contains("as they start: cls_token") && !text.contains(" blocks"), "{method}, {command}: {text}");
        }
    }
}

#[test]
fn dmjd_says_its_views_its_rates_and_its_learning_rate() {
    let base = folder("dmjd-said");
    let nowhere = base.join("nowhere");
    let begun = |arguments: &str| {
        let mut command = masque(arguments, &base.join("none"));
        command.arg("--data-path").arg(&nowhere);
        fails(command).1
    };
    let text = begun("pretrain dmjd --preset dmjd-convit-b");
    for part in [
        "2 views of each image: each shows 76 of 196 patches (19 of 49 units of 2 x 2) and hides 120 (61.2 %, asked for 60 %)",
        "together they predict 196 (100 %, asked for 100 %)",
        "lr 0.002 (0.0006 x 512 images x (1 / 0.6) / 256)",
        "2 x 512 views, images/s count images",
    ] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    let text = begun("pretrain dmjd --preset dmjd-convit-b --mask_ratio 0.4 --lr 1e-3");
    assert!(text.contains("predict 156 (79.6 %, asked for 100 %); lr 0.001 (--lr says it)"), "{text}");
    let text = begun("pretrain dmjd --preset dmjd-vit-b --pred_ratio 0.8 --num_views 4 --mask_type rand");
    assert!(text.contains("4 views") && text.contains("shows 78 of 196 patches and hides 118 (60.2 %"), "{text}");
    assert!(text.contains("predict 157 (80.1 %, asked for 80 %)") && text.contains("x (0.8 / 0.6) / 256"), "{text}");

    let run = base.join("run");
    let names = "--mask_type block --mask_ratio 0.4 --mim_loss_type smooth_l1 --vis_loss_type smooth_l1 --pred_type hog_maskfeat --vis-align released";
    let few = "--train-images 32 --val-images 8 --batch-size 8 --accum-iter 2 --epochs 1 --warmup-epochs 0 --log-freq 1 --blr 6e-4";
    succeeds(masque(&format!("pretrain dmjd {names} {few}"), &run));
    let steps = rows(run.join("steps.jsonl"));
    let part = |key: &str| steps[0][key].as_f64().unwrap();
    assert_eq!(part("lr"), 6e-4 * (16.0 * (1.0 / 0.4)) / 256.0);
    assert!((part("loss_invisible") + part("loss_visible") - part("loss")).abs() < 1e-5 * part("loss"), "{steps:?}");
    let log = &rows(run.join("log.jsonl"))[0];
    for (key, value) in [("views_of_an_image", 2.0), ("corruption_rate", 16.0 / 36.0), ("prediction_rate", 28.0 / 36.0)] {
        assert_eq!(log[key].as_f64(), Some(value), "{key} {log}");
    }
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("Hidden in each view") && report.contains("2 views predict 77.8 %, asked for 100 %"));
    let command = std::fs::read_to_string(run.join("command.txt")).unwrap();
    for flag in ["--mask-type=block", "--mim-loss-type=smooth-l1", "--pred-type=hog-maskfeat", "--visible-order=released"] {
        assert!(command.contains(flag), "{command}");
    }
    let mut repeated = Command::new(env!("CARGO_BIN_EXE_masque"));
    repeated.args(&masque::train::record::words(&command)[1..]).arg("--output-dir").arg(base.join("again"));
    succeeds(repeated);
    assert!(last_tensors(&run) == last_tensors(&base.join("again")));
}

#[test]
fn a_run_that_is_stopped_ends_with_the_bits_of_an_unbroken_one() {
    let base = folder("dmjd-resumed");
    for (number, (method, _)) in METHODS.into_iter().enumerate() {
        let [whole, broken] = ["whole", "broken"].map(|name| base.join(format!("{number}-{name}")));
        let run = format!("{method} {FEW} --save-updates 3 --keep 9 --accum-iter 2");
        succeeds(masque(&run, &whole));
        succeeds(masque(&run, &broken));
        for update in checkpoints(&broken).into_iter().filter(|&update| update > 3) {
            std::fs::remove_file(broken.join(format!("checkpoint-{update:08}.safetensors"))).unwrap();
        }
        let command = method.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let text = succeeds(masque(&format!("{command} --resume auto"), &broken));
        assert!(text.contains("update 3") && !text.contains("from here on"), "{method}: {text}");
        assert!(last_tensors(&whole) == last_tensors(&broken), "{method}");
    }
    let (code, text) = fails(masque("pretrain convmae --resume auto", &base.join("0-whole")));
    assert!(code == Some(2) && text.contains("is of masque pretrain dmjd"), "{text}");
}

#[test]
fn stages_on_visible_regions_alone_train_as_dense_ones_do() {
    let base = folder("dmjd-stages");
    for method in ["pretrain dmjd", "pretrain convmae"] {
        let losses = |stages: &str| -> Vec<f64> {
            let run = base.join(format!("{}-{stages}", method.replace(' ', "-")));
            succeeds(masque(&format!("{method} {FEW} --stages {stages}"), &run));
            rows(run.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect()
        };
        let (visible, dense) = (losses("visible"), losses("dense"));
        assert_eq!(visible.len(), 16);
        visible.iter().zip(&dense).for_each(|(a, b)| assert!((a - b).abs() < 1e-4 * b, "{method}: {a} is not {b}"));
    }
}

#[test]
fn a_teacher_is_the_target_its_answers_are_kept_and_another_grid_is_refused() {
    let base = folder("dmjd-taught");
    let small = "--train-images 64 --val-images 8 --batch-size 16 --epochs 1 --warmup-epochs 0";
    succeeds(masque(&format!("pretrain mae {small}"), &base.join("teacher")));
    let teacher = base.join("teacher/best.safetensors");
    for (number, method) in ["pretrain dmjd", "pretrain dmjd --preset glyphs-dmjd-maskfeat", "pretrain maskfeat"].into_iter().enumerate() {
        let taught = |name: &str, more: &str| {
            let run = base.join(format!("{number}-{name}"));
            let mut command = masque(&format!("{method} --pred-type teacher {FEW} --views 2 {more}"), &run);
            command.arg("--teacher-path").arg(&teacher);
            let text = succeeds(command);
            assert!(text.contains("the tokens of its last block, 4, each normalised; no pictures are drawn"), "{method}: {text}");
            run
        };
        let (asked, kept) = (taught("asked", ""), taught("kept", &format!("--teacher-cache {}", base.join("cache").display())));
        let again = taught("again", &format!("--teacher-cache {}", base.join("cache").display()));
        assert!(last_tensors(&asked) == last_tensors(&kept) && last_tensors(&kept) == last_tensors(&again), "{method}");
        let flops = |run: &Path| rows(run.join("log.jsonl"))[0]["teacher_flops_per_image"].as_f64().unwrap();
        assert!(flops(&asked) > 0.0 && flops(&again) == 0.0, "{method}: {} {}", flops(&asked), flops(&again));
        assert!(!asked.join("pictures").exists());
        let best = asked.join("best.safetensors");
        program(&format!("evaluate {}", best.display()), &base);
        let shown = Command::new(env!("CARGO_BIN_EXE_masque")).arg("visualize").arg(&best).output().unwrap();
        assert!(shown.status.code() == Some(2) && said(&shown).contains("features of a teacher, which are no picture"), "{}", said(&shown));
    }
    let mut command = masque(&format!("pretrain maskfeat --pred-type teacher --patch-size 16 {FEW}"), &base.join("none"));
    command.arg("--teacher-path").arg(&teacher);
    let (code, text) = fails(command);
    assert!(code == Some(1) && text.contains("6 x 6 patches of 8") && text.contains("3 x 3 of 16"), "{text}");
}

#[test]
fn whole_models_start_others_of_their_kind_and_official_files_are_taken() {
    let base = folder("dmjd-started");
    let first = base.join("first");
    succeeds(masque(&format!("pretrain dmjd {FEW}"), &first));
    program("convert first/best.safetensors model.pth", &base);
    let started = |command: &str, from: &str, name: &str| {
        let mut command = masque(&format!("{command} {FEW}"), &base.join(name));
        command.arg("--init").arg(base.join(from));
        command
    };
    let all = masque::formats::open(base.join("model.pth")).unwrap().names().count();
    for from in ["first/best.safetensors", "model.pth"] {
        let text = succeeds(started("pretrain dmjd", from, &format!("from-{}", from.len())));
        assert!(text.contains(&format!("{all} tensors loaded")) && !text.contains("as they start"), "{text}");
    }
    assert!(last_tensors(&base.join("from-22")) == last_tensors(&base.join("from-9")));
    assert!(last_tensors(&base.join("from-22")) != last_tensors(&first));
    let (code, text) = fails(started("pretrain convmae", "model.pth", "none"));
    assert!(code == Some(1) && text.contains("decoder_pred") && text.contains("proj_embed"), "{text}");
    let (code, text) = fails(masque(&format!("pretrain dmjd --fresh-decoder {FEW}"), &base.join("none")));
    assert!(code == Some(2) && text.contains("--init"), "{text}");
    // A file that does not say what it predicts is no model to be judged, but its encoder is there.
    for command in ["evaluate model.pth --model glyph_conv", "visualize model.pth --model glyph_conv"] {
        let output = Command::new(env!("CARGO_BIN_EXE_masque")).args(command.split(' ')).current_dir(&base).output().unwrap();
        assert!(output.status.code() == Some(2) && said(&output).contains("other things than pixels"), "{}", said(&output));
    }
    let mut command = masque(&format!("finetune --model glyph_conv {FEW}"), &base.join("fine"));
    command.arg("--finetune").arg(base.join("model.pth"));
    succeeds(command);
    // ConvMAE's predict pixels: a file without settings can be shown.
    succeeds(masque(&format!("pretrain convmae {FEW}"), &base.join("convmae")));
    program("convert convmae/best.safetensors convmae.pth", &base);
    program(
        "visualize convmae.pth --model glyph_conv --norm-pix-loss --mask-ratio 0.5,0.75 --output shown.png convmae/pictures/reconstruction.png",
        &base,
    );
}

#[cfg(feature = "emulated")]
#[test]
fn recorded_steps_on_the_emulated_device_give_the_losses_of_the_cpu() {
    let base = folder("dmjd-emulated");
    let few = "--train-images 20 --val-images 4 --batch-size 4 --log-freq 1 --epochs 1 --warmup-epochs 0 --lr 1e-3";
    for (number, (method, _)) in METHODS.into_iter().enumerate() {
        let losses = |device: &str| -> Vec<f64> {
            let run = base.join(format!("{number}-{}", device.replace(' ', "")));
            succeeds(masque(&format!("{method} {few} --device {device}"), &run));
            rows(run.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect()
        };
        let (cpu, emulated) = (losses("cpu"), losses("emulated"));
        assert!(cpu.len() == 5 && cpu.len() == emulated.len(), "{method}: {cpu:?} {emulated:?}");
        cpu.iter().zip(&emulated).for_each(|(a, b)| assert!((a - b).abs() <= 2e-4 * a, "{method}: {b} is not {a}"));
        let narrow = losses("emulated --precision bf16");
        cpu.iter().zip(&narrow).for_each(|(a, b)| assert!((a - b).abs() <= 0.05 * a, "{method}: {b} is not {a}"));
    }
}

#[test]
fn what_cannot_be_meant_is_one_sentence() {
    let base = folder("dmjd-refused");
    let on_vit = "pretrain dmjd --preset glyphs-dmjd-maskfeat";
    for (arguments, parts) in [
        ("pretrain dmjd --num-views 3".to_string(), &["--num-views 3", "ConViT is trained with 2 views"][..]),
        ("pretrain dmjd --num-views 1".to_string(), &["--num-views 1", "masque pretrain mae"]),
        ("pretrain dmjd --input-size 72 --mask-type block".to_string(), &["--mask-type block", "9 x 9 patches", "--mask-type rand"]),
        ("pretrain dmjd --mask-ratio 0.99".to_string(), &["--mask-ratio 0.99", "keeps 0"]),
        ("pretrain dmjd --mask-ratio -0.5".to_string(), &["--mask-ratio -0.5", "between 0 and 1"]),
        ("pretrain dmjd --mask-ratio NaN".to_string(), &["--mask-ratio NaN"]),
        ("pretrain dmjd --mask-ratio 0.95 --mask-type block".to_string(), &["keeps 0", "--mask-type rand"]),
        ("pretrain dmjd --pred-ratio 0.5".to_string(), &["--pred-ratio 0.5", "each view alone hides 0.6"]),
        ("pretrain dmjd --baseline mae".to_string(), &["--model glyph_conv is a ConViT", "--baseline convmae"]),
        ("pretrain dmjd --model glyph_s".to_string(), &["--model glyph_s is a ViT", "--baseline mae or maskfeat"]),
        ("pretrain dmjd --patch-size 16".to_string(), &["--patch-size", "16"]),
        (format!("{on_vit} --decoder-depth 2"), &["--decoder-depth", "has no decoder"]),
        (format!("{on_vit} --stages dense"), &["--stages dense", "no convolution stages"]),
        (format!("{on_vit} --model deit_tiny_patch16_224 --input-size 224"), &["--model deit_tiny_patch16_224", "plain ViT"]),
        ("pretrain dmjd --teacher-path x.pth".to_string(), &["--teacher-path", "--pred-type teacher"]),
        ("pretrain dmjd --teacher-cache x".to_string(), &["--teacher-cache", "--pred-type teacher"]),
        ("pretrain maskfeat --teacher-ema".to_string(), &["--teacher-ema", "--pred-type teacher"]),
        ("pretrain dmjd --pred-type teacher".to_string(), &["a teacher is needed"]),
        ("pretrain dmjd --theta -1".to_string(), &["--theta -1"]),
        ("pretrain dmjd --theta 0 --visible-order released".to_string(), &["--visible-order released", "--theta 0"]),
        ("pretrain dmjd --smooth-l1-beta 1 --vis-loss-type l2".to_string(), &["--smooth-l1-beta 1", "smooth-l1"]),
        ("pretrain dmjd --smooth-l1-beta 0".to_string(), &["--smooth-l1-beta 0"]),
        ("pretrain dmjd --norm-pix-eps 0.1".to_string(), &["--norm-pix-eps 0.1", "norm-rgb"]),
        ("pretrain dmjd --pred-type clip".to_string(), &["hog-maskfeat"]),
        ("pretrain maskfeat --patch-size 3 --input-size 45".to_string(), &["a patch of 3 pixels", "2 x 2 cells"]),
        ("pretrain maskfeat --model glyph_conv".to_string(), &["--model glyph_conv is a ConViT", "masque pretrain convmae"]),
        ("pretrain maskfeat --decoder-dim 32".to_string(), &["--decoder-dim"]),
        ("pretrain maskfeat --masking random --min-block-patches 2".to_string(), &["--min-block-patches 2", "--masking block-wise"]),
        ("pretrain maskfeat --min-block-patches 30".to_string(), &["--min-block-patches 30", "all 14"]),
        ("pretrain maskfeat --mask-ratio 0.999".to_string(), &["keeps 0 of 36"]),
        ("pretrain maskfeat --warmup-start 2".to_string(), &["--warmup-start 2"]),
        ("pretrain convmae --masking saliency".to_string(), &["--masking saliency", "class token"]),
        ("pretrain convmae --model glyph_s".to_string(), &["--model glyph_s", "masque pretrain mae"]),
        ("pretrain convmae --model convvit_base_patch16 --input-size 224".to_string(), &["convvit_base_patch16", "classifier"]),
        ("pretrain mae --model glyph_conv".to_string(), &["--model glyph_conv is a ConViT"]),
    ] {
        let (code, text) = fails(masque(&format!("{arguments} {FEW}"), &base.join("none")));
        let last = text.lines().last().unwrap_or_default();
        assert!(code == Some(2) && last.starts_with("masque: ") && !text.contains("panicked"), "{arguments}: {code:?} {text}");
        parts.iter().for_each(|part| assert!(last.contains(part), "{arguments}: {last} lacks {part}"));
    }
    assert!(!base.join("none").exists());
}
