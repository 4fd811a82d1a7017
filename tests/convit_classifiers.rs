//! ConViT behind pre-training: which files its classifiers take, the commands that use them and those that refuse them.

#[path = "common/runs.rs"]
mod runs;

use masque::formats::{self, FileTensor, TensorFile, Value, write_pth};
use masque::nn::classifier::{Classifier, ClassifierConfig, Pool};
use masque::nn::contents::Contents;
use masque::nn::decoder::{Decoder, DecoderTokens};
use masque::nn::presets::named;
use masque::nn::stages::StagesConfig;
use masque::nn::vit::{Position, Tokens, Vit};
use masque::nn::weights::{self, Head, Policy};
use masque::nn::{Start, convit, names};
use masque::param::{Init, Params, ParamsBuilder};
use masque::rng::Rng;
use masque::tensor::Dtype;
use runs::{fails, folder, last_tensors, masque, rows, said, succeeds};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The built-in images' ConViT as it is pre-trained, with DMJD's heads for visible patches where `heads`; `ratio`: of both stages' MLPs.
fn pre_trained(heads: bool, ratio: f64) -> Params {
    let (mut b, named) = (ParamsBuilder::default(), named("glyph_conv").unwrap());
    let mut vit = named.encoder(48).unwrap();
    vit.stages = vit.stages.map(|stages| StagesConfig { mlp_ratios: [ratio; 2], ..stages });
    let tokens = Tokens::new(&mut b, &vit).unwrap();
    let decoder_tokens = DecoderTokens::new(&mut b, &named.decoder, &vit).unwrap();
    let vit = Vit::new(&mut b, vit, tokens, true, Start::Xavier).unwrap();
    Decoder::predicting(108, &mut b, &named.decoder, &vit.config, decoder_tokens, Start::Xavier).unwrap();
    if heads {
        for (name, shape) in
            [("proj_embed.0", &[64, 64][..]), ("proj_embed.1", &[64]), ("proj_embed.6", &[64, 64]), ("predictor.0", &[108, 64])]
        {
            b.add(format!("{name}.weight"), shape, Init::Constant(0.5)).unwrap();
            b.add(format!("{name}.bias"), &shape[..1], Init::Constant(0.5)).unwrap();
        }
    }
    b.build(Dtype::F32, &Rng::new(1)).unwrap()
}

fn tensors(params: &Params) -> Vec<(String, FileTensor)> {
    let tensor = |id| {
        let value = params.value(id);
        (params.name(id).to_string(), FileTensor::from_f32(value.data::<f32>(), value.shape()).unwrap())
    };
    params.ids().map(tensor).collect()
}

fn file(params: &Params) -> TensorFile {
    TensorFile::new("memory", tensors(params), BTreeMap::new()).unwrap()
}

/// As the published programs store a run.
fn publish(params: &Params, path: &Path) {
    let model = tensors(params).into_iter().map(|(name, tensor)| (name.as_str().into(), tensor.into())).collect();
    let args = Value::dict([("model", "convmae_convvit_base_patch16".into()), ("norm_pix_loss", true.into())]);
    let root = Value::dict([("model", Value::Dict(model)), ("epoch", 1599i64.into()), ("args", args)]);
    write_pth(path, &root).unwrap();
}

const FEW: &str = "--model glyph_conv --train-images 32 --val-images 16 --batch-size 8 --epochs 2 --warmup-epochs 0 --log-freq 1";

fn with(arguments: &str, flag: &str, path: &Path, output: &Path) -> Command {
    let mut command = masque(&format!("{arguments} {FEW}"), output);
    command.arg(flag).arg(path);
    command
}

/// A command that has no folder for a run.
fn plain(arguments: &str, paths: &[&Path]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    command.args(arguments.split_whitespace()).args(paths).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    command
}

fn published(base: &Path, heads: bool) -> PathBuf {
    let path = base.join("published.pth");
    publish(&pre_trained(heads, 4.0), &path);
    path
}

#[test]
fn a_published_checkpoint_is_fine_tuned_evaluated_and_converted() {
    let base = folder("convit-chain");
    for heads in [false, true] {
        let path = published(&base, heads);
        let output = base.join(format!("tuned-{heads}"));
        let text = succeeds(with("finetune --drop-path 0.1", "--finetune", &path, &output));
        assert!(text.contains("as they start: head.weight, head.bias, fc_norm.weight, fc_norm.bias"), "{text}");
        assert!(text.contains("of no use here: mask_token, decoder_pos_embed, stage1_output_decode.weight"), "{text}");
        assert!(!text.contains("dropped"), "{text}");
        let log = rows(output.join("log.jsonl"));
        assert!(log.len() == 2 && log[1]["test_acc1"].is_number(), "{log:?}");

        let best = output.join("best.safetensors");
        let text = succeeds(plain("evaluate --val-images 16", &[&best]));
        assert!(text.contains("* Acc@1") && text.contains("(16 images)"), "{text}");
        let tuned = formats::open(&best).unwrap();
        let get = |name: &str| tuned.get(&format!("model.{name}")).unwrap().to_f32().unwrap();
        // The table is fixed in pre-training, and learned from then on.
        let table = masque::nn::position::sincos([6, 6], 64, 0).unwrap();
        assert_eq!(get("pos_embed").len(), table.len());
        let moved = get("pos_embed").iter().zip(&table).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 1e-6 && moved < 0.5, "{moved}");
        assert_eq!(tuned.names().filter(|name| name.starts_with("model.")).count(), 7 * 2 + 1 + 2 * 14 + 3 * 12 + 4);
    }
    let best = base.join("tuned-true/best.safetensors");
    let official = base.join("official.pth");
    succeeds(plain("convert", &[&best, &official]));
    let text = succeeds(plain("evaluate --val-images 16 --data-path synthetic --model glyph_conv", &[&official]));
    assert!(text.contains("* Acc@1"), "{text}");
    for naming in ["timm", "hf"] {
        let (code, text) = fails(plain(&format!("convert --to-names {naming}"), &[&best, &base.join("x.safetensors")]));
        assert!(code == Some(1) && text.contains("is a ConViT, for which there are no"), "{text}");
    }
    let (code, text) = fails(plain("visualize --output", &[&base.join("x.png"), &best]));
    assert!(code == Some(2) && text.contains("is a ConViT, which has no class token"), "{text}");
    let (code, text) = fails(plain("evaluate", &[&base.join("published.pth")]));
    assert!(code == Some(2) && text.contains("predicts other things than pixels"), "{text}");
    // What has been tuned is probed and tuned on, once it is said what becomes of its head.
    let (code, text) = fails(with("finetune", "--finetune", &best, &base.join("again")));
    assert!(code == Some(1) && text.contains("--head keep or --head fresh"), "{text}");
    assert!(succeeds(with("finetune --head keep --layer-decay 0.5", "--finetune", &best, &base.join("again"))).contains("acc@1"));
}

#[test]
fn probes_take_the_pooled_patches_or_the_first() {
    let base = folder("convit-probe");
    let path = published(&base, true);
    for (pool, lacking) in [("true", "head.1.bias, fc_norm.weight, fc_norm.bias"), ("false", "head.1.bias\n")] {
        let output = base.join(format!("probe-{pool}"));
        let text = succeeds(with(&format!("probe --global-pool={pool}"), "--finetune", &path, &output));
        assert!(text.contains(lacking) && text.contains("acc@1"), "{text}");
        let probed: BTreeMap<String, Vec<u8>> = last_tensors(&output).into_iter().collect();
        let before = pre_trained(true, 4.0);
        for id in before.ids().filter(|&id| probed.contains_key(&format!("model.{}", before.name(id)))) {
            let own: Vec<u8> = before.value(id).data::<f32>().iter().flat_map(|x| x.to_le_bytes()).collect();
            assert!(probed[&format!("model.{}", before.name(id))] == own, "{} was trained", before.name(id));
        }
        assert_eq!(probed.contains_key("model.fc_norm.weight"), pool == "true");
        if pool == "true" {
            let ones: Vec<u8> = [1f32; 64].iter().flat_map(|x| x.to_le_bytes()).collect();
            assert!(probed["model.fc_norm.weight"] == ones && probed["model.fc_norm.bias"] == [0; 256]);
        }
        let mut knn = plain(&format!("probe {FEW} --knn 5 --global-pool={pool} --finetune"), &[&path]);
        let output = knn.output().unwrap();
        assert!(output.status.success() && said(&output).contains("nearest of 32 training images"), "{}", said(&output));
    }
}

#[test]
fn a_run_from_scratch_goes_on_where_it_stopped_and_learns_on_the_emulated_device() {
    let base = folder("convit-resumed");
    let scratch = format!("finetune {FEW} --start xavier --drop-path 0.2 --mixup 0.8 --cutmix 1");
    let whole = base.join("whole");
    succeeds(masque(&format!("{scratch} --save-freq 1"), &whole));
    let half = base.join("half");
    succeeds(masque(&format!("{scratch} --save-freq 1"), &half));
    std::fs::remove_file(half.join("checkpoint-00000008.safetensors")).unwrap();
    succeeds(masque(&format!("{scratch} --resume auto"), &half));
    assert!(last_tensors(&whole) == last_tensors(&half));

    // `--start normal` and the class token's place of the first patch; DeiT's recipe, too.
    assert!(succeeds(masque(&format!("finetune {FEW} --start normal --cls-token"), &base.join("first"))).contains("acc@1"));
    assert!(succeeds(masque(&format!("train {FEW} --attn-only"), &base.join("train"))).contains("acc@1"));
    if cfg!(feature = "emulated") {
        let once = |device: &str, name: &str| {
            let output = base.join(name);
            assert!(succeeds(masque(&format!("{scratch} --epochs 1 {device}"), &output)).contains("acc@1"));
            rows(output.join("log.jsonl"))[0]["train_loss"].as_f64().unwrap()
        };
        let own = once("--device cpu", "cpu");
        for (precision, near) in [("f32", 1e-4), ("bf16", 2e-2)] {
            let loss = once(&format!("--device emulated --precision {precision}"), precision);
            assert!((loss - own).abs() < near, "{precision}: {loss} {own}");
        }
    }
}

#[test]
fn commands_that_need_patches_or_a_class_token_refuse_a_convit_in_a_sentence() {
    let base = folder("convit-refused");
    let path = published(&base, false);
    let refused = |command: Command, part: &str| {
        let (code, text) = fails(command);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(part) && text.lines().filter(|line| line.starts_with("masque: ")).count() == 1, "{text}");
    };
    for command in ["pretrain mae", "distill maskedkd", "distill logit", "distill deit"] {
        refused(masque(&format!("{command} --model glyph_conv"), &base.join("x")), "is a ConViT");
    }
    refused(masque("pretrain mae --model convmae_convvit_base_patch16", &base.join("x")), "is a ConViT");
    refused(masque("finetune --model dmjd_convit_large_patch16_dec8_hog", &base.join("x")), "its classifier is convit_large_patch16");
    refused(masque("finetune --model glyph_conv --patch-size 16", &base.join("x")), "make tokens of 8 pixels");
    refused(masque("finetune --model glyph_conv --input-size 50", &base.join("x")), "50 x 50 does not split into patches of 8");
    for command in ["pretrain dmae", "pretrain tinymim"] {
        let mut taught = masque(command, &base.join("x"));
        taught.arg("--teacher-path").arg(&path);
        let (code, text) = fails(taught);
        assert!(code == Some(1) && text.contains("it is a ConViT") && text.contains("a teacher is a ViT"), "{text}");
    }
    for command in ["pretrain dmae", "pretrain tinymim"] {
        let teacher = base.join("teacher");
        if !teacher.exists() {
            succeeds(masque("pretrain mae --train-images 8 --val-images 8 --batch-size 8 --epochs 1 --warmup-epochs 0", &teacher));
        }
        let mut student = masque(&format!("{command} --model glyph_conv"), &base.join("x"));
        student.arg("--teacher-path").arg(teacher.join("best.safetensors"));
        refused(student, "is a ConViT");
    }
    assert!(!base.join("x/log.jsonl").exists());
}

/// Loads a file into a new classifier of the built-in images' ConViT.
fn tune(file: &TensorFile, side: usize, pool: Pool) -> Result<(weights::LoadReport, Params), String> {
    let vit = convit::classifier("glyph_conv", side, 0.0).unwrap();
    let mut b = ParamsBuilder::default();
    Classifier::new(&mut b, ClassifierConfig { vit: vit.clone(), classes: 5, pool, probe: false }).unwrap();
    let mut params = b.build(Dtype::F32, &Rng::new(2)).unwrap();
    let report = weights::load(&mut params, &vit, file, Policy::Encoder(Head::Ask)).map_err(|error| error.chain())?;
    Ok((report, params))
}

#[test]
fn every_tensor_of_a_file_is_taken_or_said_to_be_of_no_use() {
    let whole = file(&pre_trained(true, 4.0));
    for (pool, norm) in [(Pool::Mean, true), (Pool::ClassToken, false)] {
        let (report, params) = tune(&whole, 48, pool).unwrap();
        assert_eq!(report.loaded.len() + report.unexpected.len(), whole.tensors().len());
        assert!(report.dropped.is_empty() && report.reshaped.is_empty());
        assert_eq!(report.unexpected.iter().any(|name| name == "norm.weight"), norm);
        let parts = ["mask_token", "decoder_", "stage1_output_decode.", "stage2_output_decode.", "proj_embed.", "predictor.", "norm."];
        assert!(report.unexpected.iter().all(|name| parts.iter().any(|part| name.starts_with(part))), "{:?}", report.unexpected);
        assert_eq!(report.loaded.len() + report.missing.len(), params.len());
        assert!(params.trained().any(|id| params.name(id) == "pos_embed"));
    }
    let mut less = whole.tensors().to_vec();
    less.retain(|(name, _)| name != "blocks2.0.attn.weight");
    let less = TensorFile::new("memory", less, BTreeMap::new()).unwrap();
    assert!(tune(&less, 48, Pool::Mean).err().unwrap().contains("blocks2.0.attn.weight is missing"));
}

#[test]
fn positions_for_other_images_are_interpolated_as_those_of_a_vit() {
    let (report, params) = tune(&file(&pre_trained(false, 4.0)), 64, Pool::Mean).unwrap();
    assert_eq!(report.reshaped, ["pos_embed: interpolated from 6 x 6 to 8 x 8 patches"]);
    let table = masque::nn::position::sincos([6, 6], 64, 0).unwrap();
    let moved = masque::nn::position::interpolate(&table, 64, 0, [6, 6], [8, 8]).unwrap();
    assert_eq!(params.value(params.find("pos_embed").unwrap()).data::<f32>(), moved);
}

#[test]
fn other_stages_are_refused_in_a_sentence_that_names_both() {
    let said = tune(&file(&pre_trained(true, 8.0)), 48, Pool::Mean).err().unwrap();
    assert!(said.contains("MLP ratios of 8 and 8 as DMJD's, the model's of 4 and 4 as ConvMAE's; give --model glyph_conv"), "{said}");
    let plain = {
        let mut b = ParamsBuilder::default();
        let vit = named("glyph_s").unwrap().classifier(48, 0.0).unwrap();
        Classifier::new(&mut b, ClassifierConfig { vit, classes: 5, pool: Pool::Mean, probe: false }).unwrap();
        b.build(Dtype::F32, &Rng::new(2)).unwrap()
    };
    let said = tune(&file(&plain), 48, Pool::Mean).err().unwrap();
    assert!(said.contains("it is a ViT without convolution stages, the model a ConViT"), "{said}");
    let vit = named("glyph_s").unwrap().classifier(48, 0.0).unwrap();
    let mut params = plain;
    let policy = Policy::Encoder(Head::Fresh);
    let said = weights::load(&mut params, &vit, &file(&pre_trained(false, 4.0)), policy).unwrap_err().chain();
    assert!(said.contains("it is a ConViT, the model a ViT without convolution stages"), "{said}");
}

#[test]
fn the_contents_of_a_file_say_which_convit_it_holds() {
    for ratio in [4.0, 8.0] {
        let file = file(&pre_trained(true, ratio));
        let found = Contents::of(&names::to_official(&file).unwrap().file).unwrap();
        let (vit, decoder) = (found.vit().unwrap(), found.decoder().unwrap().unwrap());
        assert_eq!((found.size(), found.patch, found.grid, found.extra), (Some("glyph_conv"), 8, Some(6), 0));
        assert_eq!((vit.heads, vit.depth, vit.width, vit.position, vit.image), (4, 3, 64, Position::SinCos, [48, 48]));
        let stages = vit.stages.unwrap();
        assert_eq!((stages.mlp_ratios, stages.patches, stages.widths, stages.depths), ([ratio; 2], [2, 2, 2], [16, 32], [1, 1]));
        assert!(stages.fused && !vit.class_token);
        assert_eq!((decoder.width, decoder.depth, decoder.heads), (64, 1, 4));
    }
}
