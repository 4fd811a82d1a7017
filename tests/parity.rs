//! The golden cases in `tests/fixtures/parity`, and what must not pass for one.

use masque::error::{Kind, Result};
use masque::formats::{self, FileTensor, write_safetensors};
use masque::measure::parity::{self, Limits, Options, Outcome, Row, Summary};
use masque::tensor::Dtype;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity")
}

fn run(path: PathBuf, change: impl FnOnce(&mut Options)) -> (Result<Summary>, Vec<String>) {
    let mut options = Options::new(vec![path]);
    change(&mut options);
    let mut lines = Vec::new();
    let summary = parity::run(&options, &mut |line| lines.push(line.to_string()));
    (summary, lines)
}

#[track_caller]
fn all_pass(change: impl FnOnce(&mut Options)) {
    let (summary, lines) = run(fixtures(), change);
    println!("{}", lines.join("\n"));
    let summary = summary.unwrap();
    assert!(summary.failed == 0 && summary.skipped == 0 && summary.passed >= 33, "{}", lines.join("\n"));
    assert_eq!(lines.last().unwrap(), &format!("{} passed, 0 failed", summary.passed));
}

#[test]
fn every_public_case_passes_at_the_strict_limits() {
    all_pass(|options| (options.limits, options.strict) = (Limits::Strict, true));
}

#[test]
fn every_public_case_passes_in_f64_to_half_a_unit_of_the_golden() {
    all_pass(|options| (options.precision, options.strict) = (Dtype::F64, true));
}

/// A file of its own in a folder that goes when the value does.
struct Changed {
    folder: PathBuf,
    file: PathBuf,
}

impl Drop for Changed {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

type Tensors = Vec<(String, FileTensor)>;

/// The fixture `name`, its tensors and its description changed.
fn changed(test: &str, name: &str, change: impl FnOnce(&mut Tensors, &mut Json)) -> Changed {
    let source = formats::open(fixtures().join(format!("{name}.safetensors"))).unwrap();
    let mut tensors: Tensors = source.tensors().to_vec();
    let mut case: Json = serde_json::from_str(&source.metadata()["case"]).unwrap();
    change(&mut tensors, &mut case);
    let folder = std::env::temp_dir().join(format!("masque-parity-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join(format!("{name}.safetensors"));
    let metadata = BTreeMap::from([("case".to_string(), case.to_string())]);
    write_safetensors(&file, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &metadata).unwrap();
    Changed { folder, file }
}

/// The row of the one case in a file, and why it failed.
#[track_caller]
fn failure(changed: &Changed) -> (Row, String) {
    let (summary, lines) = run(changed.file.clone(), |options| options.limits = Limits::Strict);
    let summary = summary.unwrap();
    assert_eq!((summary.passed, summary.failed, summary.rows.len()), (0, 1, 1), "{}", lines.join("\n"));
    let row = summary.rows[0].clone();
    match row.outcome.clone() {
        Outcome::Failed(reason) => {
            assert!(lines[0].starts_with("FAILED") && lines[1].contains(&reason) && !reason.contains('\n'), "{lines:?}");
            (row, reason)
        }
        other => panic!("{other:?}"),
    }
}

fn at<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut FileTensor {
    &mut tensors.iter_mut().find(|(known, _)| known == name).unwrap().1
}

fn moved(tensor: &FileTensor, by: f32) -> FileTensor {
    let mut values = tensor.to_f32().unwrap();
    values[0] += by;
    FileTensor::from_f32(&values, tensor.shape()).unwrap()
}

#[test]
fn a_perturbed_weight_fails_and_the_first_tensor_behind_it_is_named() {
    let file = changed("weight", "mae_r75_plain", |tensors, _| {
        let weight = at(tensors, "w/blocks.1.mlp.fc1.weight");
        *weight = moved(weight, 0.1);
    });
    let (row, reason) = failure(&file);
    assert!(reason.starts_with("first mismatch: out/enc_block1: "), "{reason}");
    assert!(reason.contains(" is expected at ["), "{reason}");
    assert!(row.worst.unwrap().ratio() > 1.0);
}

#[test]
fn a_wrong_eps_fails_at_the_strict_limits() {
    for name in ["mae_r75_plain", "mae_r75_normpix"] {
        let file = changed(name, name, |_, case| case["model"]["norm_eps"] = json!(1e-5));
        failure(&file);
    }
    for (field, eps) in [("norm_eps", 1e-5), ("stage_norm_eps", 1e-6)] {
        let file = changed(field, "convmae_convvit_classify", |_, case| case["model"][field] = json!(eps));
        failure(&file);
    }
}

#[test]
fn a_result_that_is_off_fails_by_its_name() {
    for (name, result) in [
        ("mae_r75_plain", "out/ids_restore"),
        ("mae_r75_plain", "grad/mask_token"),
        ("mae_adamw_3steps", "step1/norm.weight"),
        ("mae_adamw_3steps", "step3/norm.weight"),
        ("linprobe_lars_2steps", "step2/head.0.running_var"),
        ("linprobe_lars_2steps", "step1/head.0.num_batches_tracked"),
        ("op_optimizers", "step2/4/p"),
        ("op_pil_random_resized_crop", "out/2/crop_u8_hwc"),
    ] {
        let file = changed(&format!("result-{}", result.replace('/', "-")), name, |tensors, _| {
            let tensor = at(tensors, result);
            *tensor = match tensor.to_f32().map(|_| tensor.dtype()) {
                Ok(masque::formats::FileDtype::I64) => {
                    let mut values = tensor.to_i64().unwrap();
                    values[0] += 1;
                    FileTensor::from_i64(&values, tensor.shape()).unwrap()
                }
                Ok(masque::formats::FileDtype::U8) => {
                    let mut bytes = tensor.bytes().to_vec();
                    bytes[0] ^= 1;
                    FileTensor::from_u8(&bytes, tensor.shape()).unwrap()
                }
                _ => moved(tensor, 1e-2),
            };
        });
        let (_, reason) = failure(&file);
        assert!(reason.starts_with(&format!("first mismatch: {result}: ")), "{name}: {reason}");
    }
}

#[test]
fn missing_and_surplus_tensors_fail_by_name() {
    let without = |name: &'static str| move |tensors: &mut Tensors, _: &mut Json| tensors.retain(|(known, _)| known != name);
    let with = |name: &'static str| {
        move |tensors: &mut Tensors, _: &mut Json| tensors.push((name.to_string(), FileTensor::from_f32(&[1.0], &[1]).unwrap()))
    };
    type Change = Box<dyn FnOnce(&mut Tensors, &mut Json)>;
    let changes: [(&str, &str, Change); 9] = [
        ("norm.weight is missing", "mae_r75_plain", Box::new(without("w/norm.weight"))),
        ("the model has no \"norm.gain\"", "mae_r75_plain", Box::new(with("w/norm.gain"))),
        ("out/latent: the file does not hold it", "mae_r75_plain", Box::new(without("out/latent"))),
        ("grad/norm.weight: the file does not hold it", "mae_r75_plain", Box::new(without("grad/norm.weight"))),
        ("step2/norm.weight: the file does not hold it", "mae_adamw_3steps", Box::new(without("step2/norm.weight"))),
        ("out/surplus: the runner gives no such tensor", "mae_r75_plain", Box::new(with("out/surplus"))),
        ("grad/pos_embed: the runner gives no such tensor", "mae_r75_plain", Box::new(with("grad/pos_embed"))),
        ("no tensor named \"in/noise\"", "mae_r75_plain", Box::new(without("in/noise"))),
        ("\"stray\", which is no tensor of a case", "mae_r75_plain", Box::new(with("stray"))),
    ];
    for (i, (message, name, change)) in changes.into_iter().enumerate() {
        let (_, reason) = failure(&changed(&format!("tensor-{i}"), name, change));
        assert!(reason.contains(message), "{reason}");
    }
}

#[test]
fn a_changed_table_group_or_rate_fails() {
    let table = changed("table", "mae_r75_plain", |tensors, _| {
        let table = at(tensors, "w/pos_embed");
        *table = moved(table, 1e-7);
    });
    assert!(failure(&table).1.contains("the table pos_embed differs from the file's in 1 of"));
    let group = changed("group", "mae_adamw_3steps", |_, case| {
        let moved = case["optim"]["groups"][1]["params"].as_array_mut().unwrap().remove(0);
        case["optim"]["groups"][0]["params"].as_array_mut().unwrap().push(moved);
    });
    assert!(failure(&group).1.contains("parameter groups: group 0 has nothing at place"), "{}", failure(&group).1);
    let scale = changed("scale", "vit_layer_decay_adamw", |_, case| case["optim"]["groups"][2]["lr_scale"] = json!(0.3));
    assert!(failure(&scale).1.contains("learning-rate scale of group 2"));
    let rate = changed("rate", "mae_adamw_3steps", |_, case| case["optim"]["lr_per_step"][1] = json!(0.0100001));
    assert!(failure(&rate).1.contains("the learning rate of step 2 is"));
}

#[test]
fn accumulation_over_equal_micro_batches_is_the_single_batch() {
    let file = changed("accumulated", "mae_adamw_3steps", |tensors, case| {
        case["options"]["accum_iter"] = json!(2);
        let mut parts = Vec::new();
        for (name, tensor) in tensors.iter().filter(|(name, _)| name.starts_with("in/step")) {
            parts.extend((0..2).map(|a| (format!("{name}/{a}"), tensor.clone())));
        }
        for (name, tensor) in tensors.iter().filter(|(name, _)| name.starts_with("out/") && name.ends_with("loss")) {
            parts.extend((0..2).map(|a| (format!("{name}{a}"), tensor.clone())));
        }
        tensors.retain(|(name, _)| !name.starts_with("in/step") && !name.ends_with("loss"));
        tensors.extend(parts);
        let outputs = case["outputs"].as_array_mut().unwrap();
        outputs.retain(|name| !name.as_str().unwrap().ends_with("loss"));
    });
    let (summary, lines) = run(file.file.clone(), |options| options.limits = Limits::Strict);
    assert_eq!(summary.unwrap().passed, 1, "{}", lines.join("\n"));
}

#[test]
fn hostile_descriptions_are_refused_in_a_sentence() {
    let huge = json!(1u64 << 40);
    let changes: Vec<(&str, &str, Json)> = vec![
        ("mae_r75_plain", "/schema", json!(2)),
        ("mae_r75_plain", "/method", json!("magic")),
        ("mae_r75_plain", "/model", json!([])),
        ("mae_r75_plain", "/model/embed_dim", json!(-48)),
        ("mae_r75_plain", "/model/embed_dim", json!(1 << 20)),
        ("mae_r75_plain", "/model/embed_dim", huge.clone()),
        ("mae_r75_plain", "/model/embed_dim", json!(0)),
        ("mae_r75_plain", "/model/embed_dim", json!("48")),
        ("mae_r75_plain", "/model/embed_dim", Json::Null),
        ("mae_r75_plain", "/model/depth", json!(1 << 20)),
        ("mae_r75_plain", "/model/depth", json!(0)),
        ("mae_r75_plain", "/model/num_heads", json!(0)),
        ("mae_r75_plain", "/model/num_heads", json!(5)),
        ("mae_r75_plain", "/model/patch_size", json!(0)),
        ("mae_r75_plain", "/model/patch_size", json!([8, 4])),
        ("mae_r75_plain", "/model/image_size", json!(1 << 19)),
        ("mae_r75_plain", "/model/image_size", json!([32, 64])),
        ("mae_r75_plain", "/model/image_size", json!([32, 32, 32])),
        ("mae_r75_plain", "/model/in_chans", json!(0)),
        ("mae_r75_plain", "/model/mlp_ratio", json!(1e300)),
        ("mae_r75_plain", "/model/mlp_ratio", json!(-1)),
        ("mae_r75_plain", "/model/norm_eps", json!(-1)),
        ("mae_r75_plain", "/model/decoder_embed_dim", json!(1 << 20)),
        ("mae_r75_plain", "/model/decoder_embed_dim", json!(30)),
        ("mae_r75_plain", "/model/decoder_depth", json!(1 << 20)),
        ("mae_r75_plain", "/model/decoder_num_heads", json!(0)),
        ("mae_r75_plain", "/options/mask_ratio", json!(-3)),
        ("mae_r75_plain", "/options/mask_ratio", json!(1)),
        ("mae_r75_plain", "/options/len_keep", json!(5)),
        ("mae_r75_plain", "/outputs", json!([7])),
        ("mae_r75_plain", "/outputs", json!(["out/nothing"])),
        ("mae_r75_plain", "/natural_f32/out", json!("much")),
        ("hog_basic", "/options/orientations", json!(0)),
        ("hog_basic", "/options/orientations", json!(1 << 20)),
        ("hog_basic", "/options/pixels_per_cell", json!(0)),
        ("hog_basic", "/options/pixels_per_cell", json!(12)),
        ("hog_basic", "/options/whitening_eps", Json::Null),
        ("hog_basic", "/options/images", json!([1, 2, 3, 4, 5])),
        ("mae_adamw_3steps", "/options/accum_iter", json!(0)),
        ("mae_adamw_3steps", "/options/accum_iter", json!(2)),
        ("mae_adamw_3steps", "/optim/steps", json!(4)),
        ("mae_adamw_3steps", "/optim/steps", json!(0)),
        ("mae_adamw_3steps", "/optim/type", json!("adam")),
        ("mae_adamw_3steps", "/optim/betas", json!([0.9])),
        ("mae_adamw_3steps", "/optim/betas", json!([0.9, 2.0])),
        ("mae_adamw_3steps", "/optim/groups", json!([])),
        ("mae_adamw_3steps", "/optim/groups/0/params", json!([1, 2])),
        ("mae_adamw_3steps", "/optim/lr_per_step", json!([0.0])),
        ("mae_adamw_3steps", "/optim/clip_grad", json!(-1)),
        ("vit_cls_ce", "/model/num_classes", json!(0)),
        ("vit_cls_ce", "/model/num_classes", json!(4)),
        ("vit_cls_ce", "/model/num_classes", json!(1 << 20)),
        ("vit_cls_ce", "/options/loss", json!("hinge")),
        ("vit_cls_ce", "/options/loss", json!("soft_target_ce")),
        ("linprobe_lars_2steps", "/options/bn_eps", json!(1e-5)),
        ("convmae_convvit_classify", "/model/embed_dim", json!(16)),
        ("convmae_convvit_classify", "/model/embed_dim", json!([8, 12])),
        ("convmae_convvit_classify", "/model/embed_dim", json!([8, 1 << 20, 16])),
        ("convmae_convvit_classify", "/model/embed_dim", json!([0, 12, 16])),
        ("convmae_convvit_classify", "/model/depth", json!([1, 1 << 20, 2])),
        ("convmae_convvit_classify", "/model/depth", json!([1, 2, 0])),
        ("convmae_convvit_classify", "/model/patch_size", json!([4, 0, 2])),
        ("convmae_convvit_classify", "/model/patch_size", json!([1 << 20, 1 << 20, 1 << 20])),
        ("convmae_convvit_classify", "/model/image_size", json!([32, 8])),
        ("convmae_convvit_classify", "/model/image_size", json!([32, 8, 5])),
        ("convmae_convvit_classify", "/model/image_size", json!([1 << 19, 1 << 17, 1 << 16])),
        ("convmae_convvit_classify", "/model/mlp_ratio", json!([4, 1e300, 4])),
        ("convmae_convvit_classify", "/model/mlp_ratio", json!([4, 4])),
        ("convmae_convvit_classify", "/model/stage_norm_eps", json!(-1)),
        ("convmae_convvit_classify", "/model/num_classes", json!(1 << 20)),
        ("convmae_convvit_classify", "/optim/layer_decay", json!(0.6)),
        ("dmjd_64_rand", "/options/mask_ratio", json!(1.5)),
        ("dmjd_64_rand", "/options/pred_ratio", json!(0.5)),
        ("dmjd_64_rand", "/options/len_keep", json!(5)),
        ("dmjd_64_rand", "/options/num_extra", json!(3)),
        ("dmjd_64_rand", "/options/mask_type", json!(3)),
        ("dmjd_64_rand", "/options/vis_target_order", json!("odd")),
        ("dmjd_64_rand", "/options/smooth_l1_beta", json!(0)),
        ("dmjd_64_rand", "/model/decoder_pred_dim", json!(768)),
        ("dmjd_64_rand", "/model/decoder_depth", json!(1 << 20)),
        ("dmjd_masks", "/options/specs/0/num_patches", json!(1 << 20)),
        ("dmjd_masks", "/options/specs/0/num_patches", json!(195)),
        ("dmjd_masks", "/options/specs/0/batch", json!(1 << 20)),
        ("convmae_64_normpix", "/options/target_patch", json!(8)),
        ("convmae_64_normpix", "/options/mask_ratio", json!(-1)),
        ("op_attention", "/options/specs", json!({})),
        ("op_layernorm", "/options/specs/1", json!(3)),
        ("op_layernorm", "/options/specs/1/eps", json!("small")),
        ("op_drop_path", "/options/specs/0/drop_prob", json!(1)),
        ("op_drop_path", "/options/dpr_linspace", json!([0.0, 0.2, 0.3])),
        ("op_gather_unshuffle", "/options/len_keep", json!(17)),
        ("op_patchify", "/options/specs/0/patch", json!(0)),
        ("op_sincos_pos_embed", "/options/specs/0/grid_size", json!(1 << 20)),
        ("op_interpolate_pos_embed", "/options/specs/0/new_grid", json!(1 << 20)),
        ("op_interpolate_pos_embed", "/options/specs/0/old_grid", json!(1 << 20)),
        ("op_mixup_cutmix", "/options/specs/1/center", json!([400, 5])),
        ("op_mixup_cutmix", "/options/num_classes", json!(1 << 20)),
        ("op_mixup_cutmix", "/options/specs/0/lam", json!(1.5)),
        ("op_lr_schedules", "/options/timm/0/n", json!(1 << 20)),
        ("op_pil_eval_transform", "/options/resize", json!(1 << 20)),
        ("op_pil_eval_transform", "/options/crop", json!(0)),
        ("op_pil_random_resized_crop", "/options/specs/0/height", json!(1 << 20)),
        ("op_pil_random_resized_crop", "/options/specs/0/out", json!(1 << 20)),
        ("op_optimizers", "/options/specs/0/steps", json!(1 << 20)),
        ("op_clip_grad_norm", "/options/specs/0/max_norm", json!(0)),
    ];
    for (i, (name, pointer, value)) in changes.into_iter().enumerate() {
        let file = changed(&format!("hostile-{i}"), name, |_, case| {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let parent = case.pointer_mut(parent).unwrap();
            match parent.as_array_mut() {
                Some(list) => list[key.parse::<usize>().unwrap()] = value.clone(),
                None => parent[key] = value.clone(),
            }
        });
        let (_, reason) = failure(&file);
        assert!(!reason.contains("assumption of its own"), "{name} {pointer} {value}: {reason}");
        println!("{name} {pointer} {value}: {reason}");
    }
}

#[test]
fn tensors_of_a_wrong_kind_are_refused() {
    for (i, (name, tensor, replacement)) in [
        ("mae_r75_plain", "in/images", FileTensor::from_f32(&[], &[0, 3, 32, 32])),
        ("mae_r75_plain", "in/images", FileTensor::from_f32(&[1.0], &[1])),
        ("mae_r75_plain", "in/noise", FileTensor::from_f32(&[f32::NAN; 32], &[2, 16])),
        ("mae_r75_plain", "in/noise", FileTensor::from_f32(&[0.5], &[1])),
        ("mae_r75_plain", "w/norm.weight", FileTensor::from_i64(&[1], &[1])),
        ("mae_r75_plain", "out/pred", FileTensor::from_f32(&[0.5], &[1])),
        ("vit_cls_ce", "in/labels", FileTensor::from_i64(&[-1, 0], &[2])),
        ("vit_cls_ce", "in/labels", FileTensor::from_i64(&[0, 5], &[2])),
        ("op_attention", "in/0/q", FileTensor::from_f32(&[], &[2, 0, 17, 20])),
        ("op_attention", "in/0/q", FileTensor::from_f32(&[0.0; 4], &[1, 1, 2, 2])),
        ("op_layernorm", "in/0/x", FileTensor::from_f32(&[], &[0, 0])),
        ("op_kl_ce", "in/0/student", FileTensor::from_f32(&[], &[0, 10])),
        ("op_optimizers", "in/0/step1/g", FileTensor::from_f32(&[1.0], &[1])),
        ("op_pil_random_resized_crop", "in/0/image_u8_hwc", FileTensor::from_u8(&[1, 2, 3], &[1, 1, 3])),
    ]
    .into_iter()
    .enumerate()
    {
        let file = changed(&format!("kind-{i}"), name, |tensors, _| *at(tensors, tensor) = replacement.unwrap());
        let (_, reason) = failure(&file);
        assert!(!reason.contains("assumption of its own"), "{name} {tensor}: {reason}");
        println!("{name} {tensor}: {reason}");
    }
}

#[test]
fn what_is_not_supported_is_named_and_fails_only_when_that_is_asked() {
    let kind = changed("kind", "convmae_64_normpix", |_, case| case["model"]["kind"] = json!("segmenter"));
    let op = changed("op", "op_gelu_erf", |_, case| case["options"]["op"] = json!("swish"));
    for (file, named) in
        [(&kind, "models of kind \"segmenter\" are not supported yet"), (&op, "the operation \"swish\" is not supported yet")]
    {
        let (summary, lines) = run(file.file.clone(), |_| ());
        assert_eq!(summary.unwrap().skipped, 1);
        assert!(lines[0].starts_with("unsupported") && lines[1].contains(named), "{lines:?}");
        assert_eq!(lines[2..], ["1 skipped: not supported yet, named above", "0 passed, 0 failed"]);
        let (summary, lines) = run(file.file.clone(), |options| options.strict = true);
        assert_eq!((summary.unwrap().failed, lines[2].as_str()), (1, "0 passed, 1 failed"));
    }
}

#[test]
fn folders_without_a_case_and_paths_to_nothing_are_usage_errors() {
    let file = changed("empty", "op_gelu_erf", |_, _| ());
    std::fs::remove_file(&file.file).unwrap();
    for path in [file.folder.clone(), file.file.clone(), fixtures().join("README.md")] {
        assert_eq!(run(path, |_| ()).0.unwrap_err().kind(), Kind::Usage);
    }
}

#[test]
fn a_broken_file_fails_its_row_and_the_run_goes_on() {
    let file = changed("broken", "op_gelu_erf", |_, _| ());
    std::fs::write(file.folder.join("a.safetensors"), b"not a case").unwrap();
    std::fs::write(file.folder.join("b.pth"), b"not a checkpoint").unwrap();
    std::fs::write(file.folder.join("c.expected.json"), b"{}").unwrap();
    let (summary, lines) = run(file.folder.clone(), |_| ());
    let summary = summary.unwrap();
    assert_eq!((summary.passed, summary.failed), (1, 3), "{}", lines.join("\n"));
    let names: Vec<&str> = summary.rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "op_gelu_erf"]);
}

#[test]
fn checkpoints_that_are_not_as_expected_fail() {
    let source = fixtures().join("pth");
    let file = changed("pth", "op_gelu_erf", |_, _| ());
    std::fs::remove_file(&file.file).unwrap();
    let copy = |from: &str, to: &str| std::fs::copy(source.join(from), file.folder.join(to)).unwrap();
    copy("pth_handmade_ok.pth", "refused.pth");
    copy("pth_bad_os_system.expected.json", "refused.expected.json");
    copy("pth_handmade_ok.pth", "other.pth");
    copy("pth_odd_tensors_zip.expected.safetensors", "other.expected.safetensors");
    copy("pth_bad_os_system.pth", "loaded.pth");
    copy("pth_handmade_ok.expected.safetensors", "loaded.expected.safetensors");
    let (summary, lines) = run(file.folder.clone(), |_| ());
    assert_eq!(summary.unwrap().failed, 3, "{}", lines.join("\n"));
    assert!(lines.iter().any(|line| line.contains("posix.system")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("must be refused")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("it holds no model/")), "{lines:?}");
}
