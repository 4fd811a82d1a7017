//! Weights from other programs and into them: what they compute here, what is refused, what is said.

use masque::formats::{self, FileTensor, TensorFile};
use masque::masking;
use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::{Batch, Method};
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::contents::Contents;
use masque::nn::decoder::DecoderConfig;
use masque::nn::names::{self, Naming};
use masque::nn::vit::{Position, VitConfig};
use masque::nn::weights::{self, Head, LoadReport, Policy, Which};
use masque::nn::{Scope, position};
use masque::optim::adamw::AdamW;
use masque::optim::{Optimizer, groups};
use masque::param::{Params, ParamsBuilder};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Dtype, Tensor};
use masque::train::checkpoint::{self, Header};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> TensorFile {
    formats::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights").join(format!("{name}.safetensors"))).unwrap()
}

/// Models of the fixtures: 32 pixels, patches of 8.
fn vit(position: Position) -> VitConfig {
    VitConfig { position, ..VitConfig::new(32, 8, 16, 2, 4) }
}

fn distilled() -> VitConfig {
    VitConfig { distillation_token: true, ..vit(Position::Learned) }
}

fn deit3() -> VitConfig {
    VitConfig { layer_scale: Some(1e-4), ..vit(Position::LearnedPatches) }
}

fn mae(image: usize, dtype: Dtype) -> Mae {
    let encoder = VitConfig::new(image, 8, 16, 2, 4);
    let config = MaeConfig { encoder, decoder: DecoderConfig { width: 8, depth: 1, heads: 2 }, mask_ratio: 0.75, norm_pix: None };
    Mae::new(config, dtype, &Rng::new(3)).unwrap()
}

fn classifier(vit: &VitConfig, pool: Pool, classes: usize, dtype: Dtype) -> (Classifier, Params) {
    let mut b = ParamsBuilder::default();
    let model = Classifier::new(&mut b, ClassifierConfig { vit: vit.clone(), classes, pool, probe: false }).unwrap();
    (model, b.build(dtype, &Rng::new(3)).unwrap())
}

fn tensor(file: &FileTensor, dtype: Dtype) -> Tensor {
    Tensor::from_slice(file.shape(), &file.to_f32().unwrap()).unwrap().cast(dtype).unwrap()
}

fn file_of(params: &Params, keep: impl Fn(&str) -> bool) -> TensorFile {
    let tensors = params.ids().filter(|&id| keep(params.name(id))).map(|id| {
        let value = params.value(id);
        (params.name(id).to_string(), FileTensor::from_f32(value.data::<f32>(), value.shape()).unwrap())
    });
    TensorFile::new("memory", tensors.collect(), BTreeMap::new()).unwrap()
}

fn bits(params: &Params) -> Vec<u64> {
    params.ids().flat_map(|id| params.value(id).to_f64()).map(f64::to_bits).collect()
}

/// Largest distance between what a model gives here and what it gave in PyTorch, which computed in f32.
fn distance(got: &Tensor, case: &TensorFile) -> f64 {
    let want = case.get("output").unwrap();
    assert_eq!(got.shape(), want.shape());
    got.to_f64().iter().zip(want.to_f64().unwrap()).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max)
}

#[test]
fn hugging_faces_mae_paints_the_same_pictures_here() {
    for dtype in [Dtype::F64, Dtype::F32] {
        let (case, mut mae) = (fixture("hf_vit_mae.case"), mae(32, dtype));
        let config = mae.encoder.config.clone();
        let report = weights::load(&mut mae.params, &config, &fixture("hf_vit_mae"), Policy::Strict).unwrap();
        assert_eq!((report.naming, report.loaded.len()), (Naming::HuggingFace, mae.params.len()));

        let (images, noise) = (tensor(case.get("images").unwrap(), dtype), tensor(case.get("noise").unwrap(), Dtype::F32));
        let mask = masking::random(&noise, masking::len_keep(16, 0.75).unwrap()).unwrap();
        let tape = Tape::off();
        let s = Scope::new(&tape, &mae.params);
        let latent = mae.encoder.forward(&s, &images, Some(&mask.kept)).unwrap();
        let pred = mae.decoder.forward(&s, &latent, &mask.restore).unwrap();
        let distance = distance(pred.value(), &case);
        assert!(distance < 3e-6, "{dtype:?}: {distance:e}");
    }
}

#[test]
fn classifiers_of_hugging_face_and_timm_give_the_same_logits_here() {
    for (name, config, pool, naming) in [
        ("hf_vit", vit(Position::Learned), Pool::ClassToken, Naming::HuggingFace),
        ("hf_deit", distilled(), Pool::ClassToken, Naming::HuggingFace),
        ("timm_deit3", deit3(), Pool::ClassToken, Naming::Timm),
        ("timm_pooled", vit(Position::Learned), Pool::Mean, Naming::Official),
        ("timm_distilled", distilled(), Pool::ClassToken, Naming::Official),
    ] {
        for dtype in [Dtype::F64, Dtype::F32] {
            let case = fixture(&format!("{name}.case"));
            let (model, mut params) = classifier(&config, pool, 5, dtype);
            let report = weights::load(&mut params, &config, &fixture(name), Policy::Strict).unwrap();
            assert_eq!((report.naming, report.loaded.len()), (naming, params.len()), "{name}");
            assert!(report.has_head());
            let tape = Tape::off();
            let images = tensor(case.get("images").unwrap(), dtype);
            let output = model.forward(&Scope::new(&tape, &params), &images, None, false).unwrap();
            let distance = distance(output.evaluated().unwrap().value(), &case);
            assert!(distance < 3e-6, "{name} {dtype:?}: {distance:e}");
        }
    }
}

#[test]
fn names_of_real_models_come_back_whole() {
    for (name, naming) in [
        ("hf_vit_mae", Naming::HuggingFace),
        ("hf_vit", Naming::HuggingFace),
        ("hf_deit", Naming::HuggingFace),
        ("timm_deit3", Naming::Timm),
        ("timm_distilled", Naming::Timm),
    ] {
        let before = fixture(name);
        let official = names::to_official(&before).unwrap();
        let back = names::from_official(&official.file, naming).unwrap().file;
        assert_eq!(back.tensors().len(), before.tensors().len(), "{name}");
        for (key, tensor) in before.tensors() {
            let same = back.get(key).unwrap();
            assert!(tensor.shape() == same.shape() && tensor.bytes() == same.bytes(), "{name} {key}");
        }
    }
}

/// Loads a file into a new classifier.
fn tune(file: &TensorFile, vit: &VitConfig, pool: Pool, classes: usize, head: Head) -> Result<(LoadReport, Params), String> {
    let (_, mut params) = classifier(vit, pool, classes, Dtype::F32);
    let before = bits(&params);
    match weights::load(&mut params, vit, file, Policy::Encoder(head)) {
        Ok(report) => Ok((report, params)),
        Err(error) => {
            assert_eq!(bits(&params), before, "an error changed the model");
            Err(error.chain())
        }
    }
}

#[test]
fn a_classifier_takes_the_encoder_of_a_pre_trained_model() {
    let whole = mae(32, Dtype::F32).params;
    for (file, norms) in
        [(file_of(&whole, |_| true), 2), (file_of(&whole, |name| name != "mask_token" && !name.starts_with("decoder_")), 2)]
    {
        let config = vit(Position::Learned);
        let (pooled, params) = tune(&file, &config, Pool::Mean, 5, Head::Ask).unwrap();
        assert_eq!(pooled.missing, ["head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"]);
        assert!(pooled.unexpected.iter().all(|name| name == "mask_token" || name.starts_with("decoder_") || name.starts_with("norm.")));
        assert_eq!(pooled.loaded.len() + pooled.unexpected.len(), file.tensors().len());
        assert!(!pooled.has_head() && pooled.dropped.is_empty() && pooled.reshaped.is_empty());
        let id = params.find("blocks.1.attn.qkv.weight").unwrap();
        assert_eq!(params.value(id).to_f64(), whole.value(whole.find("blocks.1.attn.qkv.weight").unwrap()).to_f64());
        assert!(pooled.text().contains("as they start: head.weight, head.bias"), "{}", pooled.text());

        let (token, _) = tune(&file, &config, Pool::ClassToken, 5, Head::Ask).unwrap();
        assert_eq!(token.missing, ["head.weight", "head.bias"]);
        assert_eq!(token.loaded.len(), pooled.loaded.len() + norms);
    }
    let short = file_of(&whole, |name| name != "blocks.1.norm2.bias");
    assert!(tune(&short, &vit(Position::Learned), Pool::Mean, 5, Head::Keep).err().unwrap().contains("blocks.1.norm2.bias is missing"));
}

#[test]
fn a_head_that_fits_is_kept_or_not_as_asked_and_one_that_does_not_fit_is_dropped() {
    let config = vit(Position::Learned);
    let tuned = fixture("timm_pooled");
    let said = tune(&tuned, &config, Pool::Mean, 5, Head::Ask).err().unwrap();
    assert!(said.contains("already has a head that fits") && said.contains("fc_norm.weight"), "{said}");

    let (kept, _) = tune(&tuned, &config, Pool::Mean, 5, Head::Keep).unwrap();
    assert!(kept.has_head() && kept.dropped.is_empty() && kept.missing.is_empty());

    let (fresh, params) = tune(&tuned, &config, Pool::Mean, 5, Head::Fresh).unwrap();
    assert_eq!((fresh.has_head(), fresh.dropped.len()), (false, 4));
    assert_eq!(params.value(params.find("fc_norm.weight").unwrap()).to_f64(), [1.0; 16]);

    let (other, _) = tune(&tuned, &config, Pool::Mean, 7, Head::Keep).unwrap();
    assert!(!other.has_head() && other.loaded.contains(&"fc_norm.weight".to_string()));
    assert!(other.dropped[0].contains("head.weight is [5, 16], the model wants [7, 16]"), "{:?}", other.dropped);
    assert!(other.text().contains("dropped: head.weight"), "{}", other.text());
    // Without the pooled norm there is nothing to classify with.
    assert!(tune(&tuned, &config, Pool::ClassToken, 5, Head::Keep).err().unwrap().contains("norm.weight is missing"));
}

#[test]
fn an_encoder_alone_becomes_a_model_to_pre_train_only_if_asked() {
    let source = mae(32, Dtype::F32).params;
    let encoder = file_of(&source, |name| name != "mask_token" && !name.starts_with("decoder_"));
    let mut model = mae(32, Dtype::F32);
    let config = model.encoder.config.clone();
    let mut load =
        |file: &TensorFile, fresh_decoder| weights::load(&mut model.params, &config, file, Policy::PreTraining { fresh_decoder });
    let said = load(&encoder, false).unwrap_err().to_string();
    assert!(said.contains("mask_token is missing") && said.contains("decoder_embed.weight is missing"), "{said}");
    let report = load(&encoder, true).unwrap();
    assert!(report.missing.iter().all(|name| name == "mask_token" || name.starts_with("decoder_")));
    assert_eq!(report.missing.len() + report.loaded.len(), source.len());
    assert!(load(&file_of(&source, |_| true), false).unwrap().missing.is_empty());
    // A decoder of which half is there is no decoder.
    assert!(load(&file_of(&source, |name| name != "decoder_pred.bias"), false).is_err());
    assert!(load(&fixture("hf_vit"), false).unwrap_err().to_string().contains("the model has no \"head.weight\""));
    assert_eq!(load(&fixture("hf_vit"), true).unwrap().dropped.len(), 2);
}

#[test]
fn a_learned_position_table_is_interpolated_and_a_fixed_one_is_not() {
    let source = fixture("hf_vit");
    let large = VitConfig { image: [48, 40], ..vit(Position::Learned) };
    let (report, params) = tune(&source, &large, Pool::ClassToken, 7, Head::Fresh).unwrap();
    assert_eq!(report.reshaped, ["pos_embed: interpolated from 4 x 4 to 6 x 5 patches"]);
    let table = source.get("vit.embeddings.position_embeddings").unwrap().to_f32().unwrap();
    let want = position::interpolate(&table, 16, 1, [4, 4], [6, 5]).unwrap();
    assert_eq!(params.value(params.find("pos_embed").unwrap()).data::<f32>(), want);

    let mut model = mae(48, Dtype::F32);
    let (config, id) = (model.encoder.config.clone(), model.params.find("pos_embed").unwrap());
    let sines = model.params.value(id).to_f64();
    let policy = Policy::PreTraining { fresh_decoder: false };
    let report = weights::load(&mut model.params, &config, &fixture("hf_vit_mae"), policy).unwrap();
    assert_eq!(report.reshaped.len(), 2);
    assert!(report.reshaped[0].contains("keeps its own sines for 6 x 6"), "{:?}", report.reshaped);
    assert_eq!(model.params.value(id).to_f64(), sines);

    let (_, mut params) = classifier(&large, Pool::ClassToken, 5, Dtype::F32);
    assert!(weights::load(&mut params, &large, &source, Policy::Strict).unwrap_err().to_string().contains("pos_embed is [1, 17, 16]"));
    assert!(weights::load(&mut params, &large, &source, Policy::OtherGrid).unwrap().has_head());
}

#[test]
fn a_table_with_other_rows_in_front_is_refused_by_its_meaning() {
    let plain = vit(Position::Learned);
    for (file, config, words) in [
        ("timm_deit3", &plain, ["patches alone", "rows for a class token and patches"]),
        ("hf_vit", &deit3(), ["a class token and patches (4 x 4)", "rows for patches alone"]),
        ("timm_distilled", &plain, ["a class and a distillation token", "rows for a class token"]),
        ("hf_vit", &distilled(), ["a class token and patches", "a class and a distillation token"]),
    ] {
        let said = tune(&fixture(file), config, Pool::ClassToken, 5, Head::Keep).err().unwrap();
        assert!(words.iter().all(|words| said.contains(words)), "{file}: {said}");
    }
    let said = tune(&fixture("timm_deit3"), &plain, Pool::ClassToken, 5, Head::Keep).err().unwrap();
    assert!(said.contains("layer scale of DeiT-III"), "{said}");
}

#[test]
fn a_model_of_another_size_is_refused_with_a_few_names_and_a_count() {
    let wide = VitConfig { width: 24, depth: 3, ..vit(Position::Learned) };
    let said = tune(&fixture("hf_vit"), &wide, Pool::ClassToken, 5, Head::Keep).err().unwrap();
    assert!(said.contains("it is 16 wide instead of 24, 2 blocks deep instead of 3"), "{said}");
    assert!(said.contains(" more") && said.matches("the model wants").count() <= 8, "{said}");
    let mut tensors = fixture("hf_vit").tensors().to_vec();
    tensors.push(("vit.mystery".into(), FileTensor::from_f32(&[0.0], &[1]).unwrap()));
    let strange = TensorFile::new("strange", tensors, BTreeMap::new()).unwrap();
    assert!(tune(&strange, &vit(Position::Learned), Pool::ClassToken, 5, Head::Keep).err().unwrap().contains("\"vit.mystery\""));
}

/// A checkpoint as masque keeps it.
fn own(averages: bool) -> TensorFile {
    let file = names::to_official(&fixture("hf_vit")).unwrap().file;
    let mut tensors = Vec::new();
    for (name, tensor) in file.tensors() {
        tensors.push((format!("model.{name}"), tensor.clone()));
        tensors.push((format!("optimizer.exp_avg.{name}"), FileTensor::from_f32(&[0.5], &[1]).unwrap()));
        let twice: Vec<f32> = tensor.to_f32().unwrap().iter().map(|x| 2.0 * x).collect();
        tensors.extend(averages.then(|| (format!("ema.{name}"), FileTensor::from_f32(&twice, tensor.shape()).unwrap())));
    }
    let settings = r#"{"model": "vit_base_patch16", "epochs": 3}"#;
    let metadata = [("masque.format", "1"), ("masque.settings", settings)].map(|(key, value)| (key.to_string(), value.to_string()));
    TensorFile::new("own", tensors, BTreeMap::from(metadata)).unwrap()
}

fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("weights_{test}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn store(file: &TensorFile, path: &Path) {
    formats::write_safetensors(path, file.tensors().iter().map(|(name, tensor)| (name.as_str(), tensor)), file.metadata()).unwrap();
}

#[test]
fn our_own_checkpoints_give_their_weights_or_their_averages() {
    let path = folder("own").join("checkpoint.safetensors");
    store(&own(true), &path);
    let (trained, averages) = (weights::open(&path, Which::Trained).unwrap(), weights::open(&path, Which::Averages).unwrap());
    assert!(trained.names().eq(averages.names()) && trained.names().all(|name| !name.starts_with("optimizer")));
    let first = |file: &TensorFile| file.get("head.bias").unwrap().to_f32().unwrap()[0];
    assert_eq!(first(&averages), 2.0 * first(&trained));

    let config = vit(Position::Learned);
    for file in [&formats::open(&path).unwrap(), &trained] {
        let (_, mut params) = classifier(&config, Pool::ClassToken, 5, Dtype::F32);
        assert_eq!(weights::load(&mut params, &config, file, Policy::Strict).unwrap().loaded.len(), params.len());
    }
    store(&own(false), &path);
    let said = weights::open(&path, Which::Averages).unwrap_err();
    assert!(said.exit_code() == 2 && said.to_string().contains("keeps no averages"), "{said}");
    store(&fixture("hf_vit"), &path);
    assert!(weights::open(&path, Which::Averages).is_err());
}

#[test]
fn a_checkpoint_of_the_papers_program_loads_as_it_is() {
    let file = formats::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/pth/pth_mae_zip.pth")).unwrap();
    let found = Contents::of(&file).unwrap();
    assert_eq!((found.width, found.depth, found.patch, found.grid, found.decoder), (16, 1, 8, Some(2), Some((16, 1))));
    assert_eq!(found.hidden, 32);
    let encoder = VitConfig { mlp_ratio: 2.0, ..VitConfig::new(16, 8, 16, 1, 4) };
    let config = MaeConfig {
        encoder: encoder.clone(),
        decoder: DecoderConfig { width: 16, depth: 1, heads: 4 },
        mask_ratio: 0.5,
        norm_pix: Some(1e-6),
    };
    let mut mae = Mae::new(config, Dtype::F32, &Rng::new(0)).unwrap();
    let report = weights::load(&mut mae.params, &encoder, &file, Policy::Strict).unwrap();
    assert_eq!(report.loaded.len(), mae.params.len());
}

#[test]
fn the_contents_of_a_file_are_read_off_its_shapes() {
    let of = |name: &str| Contents::of(&names::to_official(&fixture(name)).unwrap().file).unwrap();
    let mae = of("hf_vit_mae");
    assert_eq!((mae.decoder, mae.classes, mae.extra, mae.size()), (Some((8, 1)), None, 1, None));
    let deit3 = of("timm_deit3");
    assert_eq!((deit3.extra, deit3.layer_scale, deit3.classes, deit3.grid), (0, true, Some(5), Some(4)));
    assert!(of("hf_deit").distilled && of("timm_pooled").pooled && !of("hf_vit").pooled);
    assert!(mae.vit().unwrap_err().to_string().contains("16 wide"));

    let glyph = masque::nn::presets::mae("glyph_s", 48).unwrap();
    let config = MaeConfig { encoder: glyph, decoder: masque::nn::presets::decoder_of("glyph_s"), mask_ratio: 0.75, norm_pix: Some(1e-6) };
    let glyph = Mae::new(config, Dtype::F32, &Rng::new(0)).unwrap();
    let found = Contents::of(&file_of(&glyph.params, |_| true)).unwrap();
    let (vit, decoder) = (found.vit().unwrap(), found.decoder().unwrap().unwrap());
    assert_eq!((found.size(), vit.image, vit.heads, vit.position), (Some("glyph_s"), [48, 48], 4, Position::SinCos));
    assert_eq!((vit.mlp_ratio, vit.depth), (4.0, 4));
    assert_eq!((decoder.width, decoder.depth, decoder.heads), (64, 1, 4));
    assert!(Contents::of(&fixture("hf_vit.case")).unwrap_err().to_string().contains("no vision transformer"));
}

/// What the program says and its exit code.
fn convert(args: &[&str]) -> (String, Option<i32>) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_masque")).arg("convert").args(args).output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(!said.contains("panicked"), "{said}");
    (said, output.status.code())
}

#[test]
fn convert_gives_other_names_and_says_what_it_left_out() {
    let folder = folder("convert");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    let original = fixture("hf_vit_mae");
    store(&original, Path::new(&path("hf.safetensors")));

    let (said, code) = convert(&[&path("hf.safetensors"), &path("official.pth"), "--to-names", "official"]);
    assert!(code == Some(0) && said.contains("Hugging Face's names become official"), "{said}");
    assert_eq!(formats::Checkpoint::open(path("official.pth")).unwrap().top_level_keys(), ["model"]);
    let (said, code) = convert(&[&path("official.pth"), &path("back.safetensors"), "--to_names", "hf"]);
    assert!(code == Some(0) && said.contains("layer_norm_eps"), "{said}");
    let back = formats::open(path("back.safetensors")).unwrap();
    assert_eq!(back.metadata()["format"], "pt");
    assert_eq!(back.tensors().len(), original.tensors().len());
    for (name, tensor) in original.tensors() {
        assert!(back.get(name).unwrap().bytes() == tensor.bytes(), "{name}");
    }

    let (said, code) = convert(&[&path("official.pth"), &path("timm.safetensors"), "--to-names", "timm"]);
    assert!(code == Some(0) && said.contains("left out: mask_token, decoder_pos_embed, decoder_embed.weight and"), "{said}");
    assert!(said.lines().count() <= 4, "{said}");
}

#[test]
fn convert_takes_our_own_checkpoints_apart() {
    let folder = folder("convert_own");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    store(&own(true), Path::new(&path("own.safetensors")));
    for (flags, factor) in [(&[][..], 1.0), (&["--ema"], 2.0)] {
        let (said, code) = convert(&[&[path("own.safetensors").as_str(), &path("out.pth")][..], flags].concat());
        assert_eq!(code, Some(0), "{said}");
        let checkpoint = formats::Checkpoint::open(path("out.pth")).unwrap();
        assert_eq!(checkpoint.args().unwrap().unwrap()["epochs"], 3);
        let file = formats::open(path("out.pth")).unwrap();
        let source = names::to_official(&fixture("hf_vit")).unwrap().file;
        assert!(file.names().eq(source.names()));
        let first = |file: &TensorFile| file.get("head.bias").unwrap().to_f32().unwrap()[0];
        assert_eq!(first(&file), factor * first(&source));
    }
}

#[test]
fn convert_gives_maes_program_what_it_resumes_from() {
    let folder = folder("convert_optimizer");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    let mut model = mae(32, Dtype::F32);
    let mut optimizer = AdamW::new(groups::by_decay(&model.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    for step in 0..2 {
        let (tape, images) = (Tape::new(), Rng::new(step).normal("images", 2 * 3 * 32 * 32));
        let images = Tensor::from_slice(&[2, 3, 32, 32], &images).unwrap();
        let loss = model.loss(&tape, &Batch::of_images(images), &Rng::new(step)).unwrap();
        model.params.clear_gradients();
        tape.backward(&loss.total, &mut [&mut model.params]).unwrap();
        optimizer.step(&mut model.params, 1e-3).unwrap();
    }
    let map = |json: serde_json::Value| json.as_object().unwrap().clone();
    let (settings, progress) = (map(json!({"weight-decay": 0.1, "batch-size": 8})), map(json!({"epoch": 3, "micro": 5})));
    let header = Header { settings, progress, data: Default::default() };
    let remembered = checkpoint::remembered(&model.params, &optimizer).unwrap();
    checkpoint::save(Path::new(&path("own.safetensors")), &header, &model.params, remembered, None).unwrap();

    let (said, code) = convert(&[&path("own.safetensors"), &path("out.pth"), "--with-optimizer"]);
    assert!(code == Some(0) && said.contains("after 3 whole epochs") && said.contains("5 batches"), "{said}");
    let out = formats::Checkpoint::open(path("out.pth")).unwrap();
    assert_eq!(out.top_level_keys(), ["model", "optimizer", "epoch", "args"]);
    assert_eq!((out.epoch().unwrap(), &out.args().unwrap().unwrap()["batch_size"]), (Some(2), &json!(8)));
    let (found, groups) = (out.optimizer_state().unwrap(), out.param_groups().unwrap());
    assert_eq!((&groups[0]["weight_decay"], &groups[1]["weight_decay"]), (&json!(0.0), &json!(0.1)));
    let numbered: Vec<_> = optimizer.groups().iter().flat_map(|group| group.params.iter().copied()).collect();
    assert_eq!(groups.iter().map(|group| group["params"].as_array().unwrap().len()).sum::<usize>(), numbered.len());
    assert_eq!(found.len(), numbered.len());
    for memory in optimizer.state().memories() {
        let index = numbered.iter().position(|&id| id == memory.id).unwrap();
        let (number, entry) = &found[index];
        assert_eq!(*number, index);
        let of = |kind: &str| entry.iter().find(|(name, _)| name == kind).unwrap().1.to_f64().unwrap();
        assert_eq!(of("step"), [2.0]);
        for (kind, tensor) in memory.tensors {
            assert_eq!(of(kind), tensor.to_f64(), "{kind} of {}", model.params.name(memory.id));
        }
    }
    for (args, words) in [
        (&[&path("own.safetensors"), &path("out.safetensors"), "--with-optimizer"][..], ".pth"),
        (&[&path("own.safetensors"), &path("two.pth"), "--with-optimizer", "--ema"], "--ema"),
    ] {
        let (said, code) = convert(args);
        assert!(code == Some(2) && said.contains(words), "{said}");
    }
    store(&fixture("hf_vit"), Path::new(&path("hf.safetensors")));
    assert_eq!(convert(&[&path("hf.safetensors"), &path("two.pth"), "--with-optimizer"]).1, Some(1));
    assert!(!folder.join("two.pth").exists());
}

#[test]
fn convert_refuses_what_it_cannot_say() {
    let folder = folder("convert_refused");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    store(&fixture("timm_pooled"), Path::new(&path("pooled.safetensors")));
    store(&fixture("hf_vit.case"), Path::new(&path("case.safetensors")));
    for (args, code, words) in [
        (&["pooled", "--to-names", "hf"][..], 1, "does not pool"),
        (&["pooled", "--to-names", "keras"], 2, "keras"),
        (&["pooled", "--ema"], 2, "keeps no averages"),
        (&["case", "--to-names", "timm"], 1, "no vision transformer's names"),
    ] {
        let (from, flags) = args.split_first().unwrap();
        let (said, found) = convert(&[&[path(&format!("{from}.safetensors")).as_str(), &path("out.pth")][..], flags].concat());
        assert!(found == Some(code) && said.contains(words) && said.lines().count() == 1, "{args:?}: {said}");
        assert!(!folder.join("out.pth").exists());
    }
}
