//! The public checkpoint files.

use std::collections::HashMap;

use masque::formats::{self, Checkpoint, FileTensor, TensorFile};
use serde_json::Value as Json;

use crate::build::fixtures;

fn names(ending: &str) -> Vec<String> {
    let files = std::fs::read_dir(fixtures()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = files.filter_map(|file| file.strip_suffix(ending).map(str::to_string)).collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

fn assert_same(name: &str, got: &FileTensor, want: &FileTensor) {
    assert_eq!(got.dtype(), want.dtype(), "{name}");
    assert_eq!(got.shape(), want.shape(), "{name}");
    if got.bytes() != want.bytes() {
        for (a, b) in got.to_f64().unwrap().iter().zip(want.to_f64().unwrap()) {
            assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{name}: {a} is not {b}");
        }
    }
}

fn case(expected: &TensorFile) -> Json {
    serde_json::from_str(&expected.metadata()["case"]).unwrap()
}

#[test]
fn public_checkpoints_load_exactly() {
    for name in names(".expected.safetensors") {
        let expected = formats::open(fixtures().join(format!("{name}.expected.safetensors"))).unwrap();
        let case = case(&expected);
        let checkpoint = Checkpoint::open(fixtures().join(format!("{name}.pth"))).unwrap();

        let mut got: HashMap<String, FileTensor> = HashMap::new();
        let model = checkpoint.stored_state_dict().unwrap();
        for (key, stored) in &model {
            got.insert(format!("model/{key}"), stored.tensor.clone());
        }
        for (index, fields) in checkpoint.optimizer_state().unwrap() {
            for (field, tensor) in fields {
                got.insert(format!("optimizer/state/{index}/{field}"), tensor);
            }
        }
        assert_eq!(got.len(), expected.tensors().len(), "{name}");
        for (key, tensor) in expected.tensors() {
            assert_same(&format!("{name} {key}"), &got[key], tensor);
        }
        let order: Vec<String> = model.iter().map(|(key, _)| format!("model/{key}")).collect();
        let outputs: Vec<&str> = case["outputs"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        assert_eq!(order, outputs[..order.len()], "{name}");

        if let Some(epoch) = case.get("epoch") {
            assert_eq!(Json::from(checkpoint.epoch().unwrap()), *epoch);
        }
        if let Some(args) = case.get("args") {
            let got = checkpoint.args().unwrap().unwrap();
            assert!(got.keys().eq(args.as_object().unwrap().keys()), "{name}: args in order");
            assert_eq!(Json::from(got), *args);
        }
        if let Some(scaler) = case.get("scaler") {
            assert_eq!(Json::from(checkpoint.scaler().unwrap().unwrap()), *scaler);
        }
        if let Some(groups) = case.get("param_groups") {
            let got = checkpoint.param_groups().unwrap().into_iter().map(Json::from).collect::<Vec<_>>();
            assert_eq!(Json::from(got), *groups);
        }
        if let Some(keys) = case.get("top_level_keys") {
            assert_eq!(Json::from(checkpoint.top_level_keys()), *keys);
        }
        if let Some(tied) = case.get("tied") {
            assert_eq!(Json::from(checkpoint.tied().unwrap()), *tied);
        }
        if let Some(strides) = case.get("strides") {
            let got = model.iter().map(|(key, stored)| (key.clone(), Json::from(stored.strides.clone())));
            assert_eq!(Json::Object(got.collect()), *strides);
        }
    }
}

#[test]
fn public_bad_checkpoints_are_refused_in_a_sentence_that_names_the_file() {
    for name in names(".expected.json") {
        let path = fixtures().join(format!("{name}.pth"));
        let error = Checkpoint::open(&path).unwrap_err().chain();
        assert!(error.contains(&path.display().to_string()), "{error}");
        let reason = match name.as_str() {
            "pth_bad_os_system" => "posix.system",
            "pth_bad_short_storage" => "should hold 12 F32 elements but has 40 bytes",
            "pth_bad_truncated" => "cut short",
            _ => "",
        };
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn every_fixture_opens_by_content_and_a_wrong_name_suggests_the_right_one() {
    let folder = fixtures();
    for entry in std::fs::read_dir(folder.parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = formats::open(&path).unwrap();
            assert!(file.metadata().contains_key("case") && file.names().count() > 0);
        }
    }
    let file = formats::open(folder.join("pth_mae_legacy.pth")).unwrap();
    assert_eq!(file.get("cls_token").unwrap().shape(), [1, 1, 16]);
    let error = file.get("blocks.0.attn.qvk.weight").unwrap_err().chain();
    assert!(error.contains("did you mean \"blocks.0.attn.qkv.weight\""), "{error}");
    let error = file.get("nothing like it").unwrap_err().chain();
    assert!(error.contains("pth_mae_legacy.pth holds no tensor named \"nothing like it\"") && !error.contains("did you mean"), "{error}");
}
