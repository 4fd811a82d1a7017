//! Optimisers, groups, clipping and the running average against PyTorch's numbers and against hand-worked values.

use masque::error::{Kind, Result};
use masque::optim::groups::{self, Group, LayerDecay, vit_layer};
use masque::optim::{Optimizer, adamw::AdamW, clip, ema::Ema, lamb::Lamb, lars::Lars, sgd::Sgd};
use masque::param::{Init, ParamId, Params, ParamsBuilder, Role};
use masque::rng::Rng;
use masque::tape::Tape;
use masque::tensor::{Dtype, Tensor};
use safetensors::{Dtype as Stored, SafeTensors};
use serde_json::Value;
use std::collections::HashMap;

/// The f32 tensors of a parity file and what it says about itself.
struct Fixture {
    case: Value,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Fixture {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(format!("{}/tests/fixtures/parity/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = file.iter().filter(|(_, view)| view.dtype() == Stored::F32);
        let tensors = floats.map(|(name, view)| {
            let numbers = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            (name.to_string(), (view.shape().to_vec(), numbers))
        });
        Self { case, tensors: tensors.collect() }
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].0
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        self.tensors[name].1.iter().map(|&x| x as f64).collect()
    }

    fn tensor(&self, name: &str, dtype: Dtype) -> Tensor {
        let (shape, numbers) = &self.tensors[name];
        Tensor::from_slice(shape, numbers).unwrap().cast(dtype).unwrap()
    }

    fn specs(&self) -> Vec<Value> {
        self.case["options"]["specs"].as_array().unwrap().clone()
    }
}

/// Parameters with these names, shapes and roles, all zero.
fn params(dtype: Dtype, entries: &[(&str, &[usize], Role)]) -> Params {
    let mut builder = ParamsBuilder::default();
    for (name, shape, role) in entries {
        builder.add_as(*name, shape, Init::Constant(0.0), *role).unwrap();
    }
    builder.build(dtype, &Rng::new(0)).unwrap()
}

fn one(shape: &[usize], value: &Tensor) -> (Params, ParamId) {
    let mut params = params(value.dtype(), &[("p", shape, Role::Trained)]);
    let id = params.find("p").unwrap();
    params.set_value(id, value).unwrap();
    (params, id)
}

/// Adds a gradient the way training does: by a backward walk.
fn give(params: &mut Params, id: ParamId, gradient: Tensor) {
    let tape = Tape::new();
    let var = params.var(&tape, id);
    tape.backward_from(&var, gradient, &mut [params]).unwrap();
}

fn tensor(shape: &[usize], numbers: &[f64], dtype: Dtype) -> Tensor {
    Tensor::from_slice(shape, numbers).unwrap().cast(dtype).unwrap()
}

fn length(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(|x| x * x).sum::<f64>().sqrt()
}

/// max |a - b| / max |b|
fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().all(|x| x.is_finite()));
    let largest = b.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    if largest < 1e-12 { worst } else { worst / largest }
}

/// ||p - golden|| / ||golden - start||
fn update_error(p: &[f64], golden: &[f64], start: &[f64]) -> f64 {
    assert_eq!(p.len(), golden.len());
    length(p.iter().zip(golden).map(|(p, g)| p - g)) / length(golden.iter().zip(start).map(|(g, s)| g - s))
}

fn optimizer(spec: &Value, params: &Params) -> Result<Box<dyn Optimizer>> {
    let number = |key: &str| spec["kw"][key].as_f64().unwrap();
    let groups = groups::all(params, number("weight_decay"));
    Ok(match spec["opt"].as_str().unwrap() {
        "adamw" => {
            let betas = &spec["kw"]["betas"];
            Box::new(AdamW::new(groups, (betas[0].as_f64().unwrap(), betas[1].as_f64().unwrap()), 1e-8)?)
        }
        "lars" => Box::new(Lars::new(groups, 0.9, 0.001)?),
        "sgd" => Box::new(Sgd::new(groups, number("momentum"))?),
        other => panic!("{other}"),
    })
}

#[test]
fn optimisers_make_the_updates_of_the_official_code() {
    let fixture = Fixture::read("op_optimizers");
    for dtype in [Dtype::F32, Dtype::F64] {
        for (i, spec) in fixture.specs().iter().enumerate() {
            let start = format!("w/{i}/p");
            let (mut params, id) = one(fixture.shape(&start), &fixture.tensor(&start, dtype));
            let mut optimizer = optimizer(spec, &params).unwrap();
            let steps = spec["steps"].as_u64().unwrap();
            for k in 1..=steps {
                params.clear_gradients();
                give(&mut params, id, fixture.tensor(&format!("in/{i}/step{k}/g"), dtype));
                optimizer.step(&mut params, spec["kw"]["lr"].as_f64().unwrap()).unwrap();
                let golden = fixture.numbers(&format!("step{k}/{i}/p"));
                let p = params.value(id).to_f64();
                let error = update_error(&p, &golden, &fixture.numbers(&start));
                match dtype {
                    Dtype::F32 => assert!(error <= 1e-3, "{spec} step {k}: {error}"),
                    _ => assert!(relative(&p, &golden) <= 6e-8, "{spec} step {k}: {}", relative(&p, &golden)),
                }
            }
            let limit = if dtype == Dtype::F32 { 2e-5 } else { 6e-8 };
            let memory = optimizer.state().memories().next().unwrap();
            assert_eq!(memory.steps, steps);
            for (name, state) in memory.tensors {
                let error = relative(&state.to_f64(), &fixture.numbers(&format!("out/{i}/state_{name}")));
                assert!(error <= limit, "{spec} {name}: {error}");
            }
        }
    }
}

#[test]
fn clipping_is_that_of_the_official_code() {
    let fixture = Fixture::read("op_clip_grad_norm");
    for (dtype, limit) in [(Dtype::F32, 2e-5), (Dtype::F64, 6e-8)] {
        for (i, spec) in fixture.specs().iter().enumerate() {
            let names = [format!("in/{i}/g0"), format!("in/{i}/g1")];
            let entries: Vec<_> = names.iter().map(|name| (name.as_str(), fixture.shape(name), Role::Trained)).collect();
            let mut params = params(dtype, &entries);
            for name in &names {
                let id = params.find(name).unwrap();
                give(&mut params, id, fixture.tensor(name, dtype));
            }
            let norm = clip::clip(&mut params, spec["max_norm"].as_f64().unwrap()).unwrap();
            assert!(relative(&[norm], &fixture.numbers(&format!("out/{i}/norm"))) <= limit, "{norm}");
            for (j, name) in names.iter().enumerate() {
                let gradient = params.gradient(params.find(name).unwrap()).unwrap();
                assert!(relative(&gradient.to_f64(), &fixture.numbers(&format!("out/{i}/g{j}"))) <= limit);
            }
        }
    }
}

#[test]
fn adamw_gives_the_published_check_values() {
    let (mut params, id) = one(&[1], &tensor(&[1], &[1.0], Dtype::F64));
    let mut adamw = AdamW::new(groups::all(&params, 0.1), (0.9, 0.95), 1e-8).unwrap();
    for (gradient, wanted) in [(0.5, 0.989_000_000_2), (-0.25, 0.985_327_305_79)] {
        params.clear_gradients();
        give(&mut params, id, tensor(&[1], &[gradient], Dtype::F64));
        adamw.step(&mut params, 0.01).unwrap();
        assert!((params.value(id).item() - wanted).abs() < 1e-11, "{}", params.value(id).item());
    }
}

#[test]
fn lars_gives_the_published_check_values() {
    let (mut params, id) = one(&[1, 2], &tensor(&[1, 2], &[3.0, 4.0], Dtype::F64));
    let mut lars = Lars::new(groups::all(&params, 0.1), 0.9, 0.001).unwrap();
    for wanted in [[2.995, 4.0], [2.985_502_998, 4.0]] {
        params.clear_gradients();
        give(&mut params, id, tensor(&[1, 2], &[0.3, -0.4], Dtype::F64));
        lars.step(&mut params, 1.0).unwrap();
        assert!(relative(&params.value(id).to_f64(), &wanted) < 2e-10, "{:?}", params.value(id).to_f64());
    }
}

#[test]
fn lars_takes_a_ratio_of_one_where_a_norm_is_zero() {
    let (mut params, id) = one(&[1, 2], &tensor(&[1, 2], &[0.0, 0.0], Dtype::F64));
    let mut lars = Lars::new(groups::all(&params, 0.1), 0.9, 0.001).unwrap();
    give(&mut params, id, tensor(&[1, 2], &[0.5, -1.0], Dtype::F64));
    lars.step(&mut params, 1.0).unwrap();
    assert_eq!(params.value(id).to_f64(), [-0.5, 1.0]);
}

#[test]
fn lamb_gives_the_values_worked_out_by_hand() {
    // The first step: m / (1 - b1) = g and v / (1 - b2) = g^2, so u = sign(g) + wd p = (1.3, -0.6); q = 5 / |u|.
    let (mut params, id) = one(&[1, 2], &tensor(&[1, 2], &[3.0, 4.0], Dtype::F64));
    let mut lamb = Lamb::new(groups::all(&params, 0.1), (0.9, 0.999), 1e-300, 1.0).unwrap();
    give(&mut params, id, tensor(&[1, 2], &[0.3, -0.4], Dtype::F64));
    lamb.step(&mut params, 0.01).unwrap();
    let q = 5.0 / (1.3f64 * 1.3 + 0.6 * 0.6).sqrt();
    assert!(relative(&params.value(id).to_f64(), &[3.0 - 0.01 * q * 1.3, 4.0 + 0.01 * q * 0.6]) < 1e-15);
    // Without decay the ratio is 1, and a parameter of zeros has none.
    for (decay, start) in [(0.0, [3.0, 4.0]), (0.1, [0.0, 0.0])] {
        let (mut params, id) = one(&[1, 2], &tensor(&[1, 2], &start, Dtype::F64));
        let mut lamb = Lamb::new(groups::all(&params, decay), (0.9, 0.999), 1e-300, 1.0).unwrap();
        give(&mut params, id, tensor(&[1, 2], &[0.3, -0.4], Dtype::F64));
        lamb.step(&mut params, 0.01).unwrap();
        let wanted = [start[0] - 0.01, start[1] + 0.01];
        assert!(relative(&params.value(id).to_f64(), &wanted) < 1e-15, "{:?}", params.value(id).to_f64());
    }
}

/// A parameter as FusedLAMB would move it: values, moments, decay.
struct ByHand {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    decay: f64,
}

impl ByHand {
    /// `g` is divided by the length of all gradients where that is more than 1.
    fn step(&mut self, g: &[f64], divisor: f64, t: i32, lr: f64) {
        let (b1, b2) = (0.9, 0.95);
        let u: Vec<f64> = (0..g.len())
            .map(|i| {
                let g = g[i] / divisor;
                self.m[i] = b1 * self.m[i] + (1.0 - b1) * g;
                self.v[i] = b2 * self.v[i] + (1.0 - b2) * g * g;
                let (m, v) = (self.m[i] / (1.0 - f64::powi(b1, t)), self.v[i] / (1.0 - f64::powi(b2, t)));
                m / (v.sqrt() + 1e-8) + self.decay * self.p[i]
            })
            .collect();
        let q = if self.decay > 0.0 { length(self.p.iter().copied()) / length(u.iter().copied()) } else { 1.0 };
        self.p.iter_mut().zip(u).for_each(|(p, u)| *p -= lr * q * u);
    }
}

#[test]
fn lamb_moves_a_model_as_a_plain_loop_does() {
    for (dtype, limit) in [(Dtype::F64, 1e-12), (Dtype::F32, 1e-5)] {
        let mut params = three(dtype);
        let mut lamb = Lamb::new(groups::by_decay(&params, 0.1, &[]), (0.9, 0.95), 1e-8, 1.0).unwrap();
        let decay = |params: &Params, id: ParamId| if params.value(id).shape().len() > 1 { 0.1 } else { 0.0 };
        let start = |id| (params.value(id).to_f64(), vec![0.0; params.value(id).numel()]);
        let by_hand = |id| (start(id), decay(&params, id));
        let mut own: Vec<ByHand> =
            params.ids().map(by_hand).map(|((p, zeros), decay)| ByHand { p, m: zeros.clone(), v: zeros, decay }).collect();
        // Gradients are long, short, long: those of the second step stay as they are.
        for (t, size) in [(1, 1.0), (2, 1e-4), (3, 1.0)] {
            gradients(&mut params, &["large", "vector", "small"], t as u64);
            let given: Vec<Vec<f64>> =
                params.ids().map(|id| params.gradient(id).unwrap().to_f64().iter().map(|g| g * size).collect()).collect();
            params.clear_gradients();
            for (id, g) in params.ids().collect::<Vec<_>>().into_iter().zip(&given) {
                let shape = params.value(id).shape().to_vec();
                give(&mut params, id, tensor(&shape, g, dtype));
            }
            let divisor = length(given.iter().flatten().copied()).max(1.0);
            assert_eq!(divisor > 1.0, t != 2);
            own.iter_mut().zip(&given).for_each(|(own, g)| own.step(g, divisor, t, 0.02));
            lamb.step(&mut params, 0.02).unwrap();
            for (id, own) in params.ids().zip(&own) {
                let error = relative(&params.value(id).to_f64(), &own.p);
                assert!(error <= limit, "{} {dtype} step {t}: {error:e}", params.name(id));
            }
        }
        for (memory, own) in lamb.state().memories().zip(&own) {
            assert_eq!((memory.steps, memory.tensors[0].0, memory.tensors[1].0), (3, "exp_avg", "exp_avg_sq"));
            assert!(relative(&memory.tensors[0].1.to_f64(), &own.m) <= limit && relative(&memory.tensors[1].1.to_f64(), &own.v) <= limit);
        }
    }
}

/// Weight and bias names of a block in registration order.
fn block(prefix: &str) -> Vec<String> {
    let parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"];
    parts.iter().flat_map(|part| ["weight", "bias"].map(|kind| format!("{prefix}.{part}.{kind}"))).collect()
}

fn pair(name: &str) -> [String; 2] {
    ["weight", "bias"].map(|kind| format!("{name}.{kind}"))
}

fn pretraining_names(depth: usize, decoder_depth: usize) -> Vec<String> {
    let mut names: Vec<String> = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"].map(String::from).into();
    names.extend(pair("patch_embed.proj"));
    names.extend((0..depth).flat_map(|i| block(&format!("blocks.{i}"))));
    names.extend(pair("norm").into_iter().chain(pair("decoder_embed")));
    names.extend((0..decoder_depth).flat_map(|i| block(&format!("decoder_blocks.{i}"))));
    names.extend(pair("decoder_norm").into_iter().chain(pair("decoder_pred")));
    names
}

fn classifier_names(depth: usize, global_pool: bool) -> Vec<String> {
    let mut names: Vec<String> = ["cls_token", "pos_embed"].map(String::from).into();
    names.extend(pair("patch_embed.proj"));
    names.extend((0..depth).flat_map(|i| block(&format!("blocks.{i}"))));
    match global_pool {
        true => names.extend(pair("head").into_iter().chain(pair("fc_norm"))),
        false => names.extend(pair("norm").into_iter().chain(pair("head"))),
    }
    names
}

/// Small shapes of the right rank.
fn dummies(names: &[String], frozen: &[&str]) -> Params {
    let shape = |name: &str| -> &[usize] {
        match name {
            "patch_embed.proj.weight" => &[2, 3, 2, 2],
            _ if name.ends_with("_token") || name.ends_with("pos_embed") => &[1, 1, 2],
            _ if name.ends_with(".bias") || name.contains("norm") => &[2],
            _ => &[2, 2],
        }
    };
    let role = |name: &str| if frozen.contains(&name) { Role::Frozen } else { Role::Trained };
    let entries: Vec<_> = names.iter().map(|name| (name.as_str(), shape(name), role(name))).collect();
    params(Dtype::F64, &entries)
}

/// (weight decay, learning-rate scale, names) of every group.
type Plain = Vec<(f64, f64, Vec<String>)>;

fn plain(groups: &[Group], params: &Params) -> Plain {
    let names = |group: &Group| group.params.iter().map(|&id| params.name(id).to_string()).collect();
    groups.iter().map(|group| (group.weight_decay, group.lr_scale, names(group))).collect()
}

fn official(fixture: &Fixture) -> Plain {
    let groups = fixture.case["optim"]["groups"].as_array().unwrap().iter();
    let read = |group: &Value| {
        let names = group["params"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_string()).collect();
        (group["weight_decay"].as_f64().unwrap(), group["lr_scale"].as_f64().unwrap_or(1.0), names)
    };
    groups.map(read).collect()
}

/// Names and decays must be equal; the JSON reader may miss the last bit of a scale.
fn assert_same(ours: &Plain, theirs: &Plain) {
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!((ours.0, &ours.2), (theirs.0, &theirs.2));
        assert!((ours.1 - theirs.1).abs() <= 2.0 * f64::EPSILON * theirs.1, "{} {}", ours.1, theirs.1);
    }
}

#[test]
fn pretraining_groups_are_those_of_the_official_code() {
    let fixture = Fixture::read("mae_adamw_3steps");
    let params = dummies(&pretraining_names(2, 1), &["pos_embed", "decoder_pos_embed"]);
    let groups = groups::by_decay(&params, 0.05, &[]);
    assert_same(&plain(&groups, &params), &official(&fixture));
    assert_eq!([&groups[0].name, &groups[1].name], ["no_decay", "decay"]);
}

#[test]
fn names_that_are_listed_do_not_decay() {
    let params = dummies(&classifier_names(1, false), &[]);
    let groups = groups::by_decay(&params, 0.05, &["pos_embed", "cls_token"]);
    let names = plain(&groups, &params);
    assert_eq!(names[0].2[..3], ["cls_token", "pos_embed", "patch_embed.proj.bias"]);
    assert_eq!(names[1].2.len(), 6);
}

fn layer_groups(params: &Params, decay: f64, last: usize) -> Vec<Group> {
    let rule = LayerDecay { weight_decay: 0.05, decay, last, no_decay: &["pos_embed", "cls_token"] };
    rule.groups(params, |name| vit_layer(name, last)).unwrap()
}

#[test]
fn layer_decay_groups_are_those_of_the_official_code() {
    let fixture = Fixture::read("vit_layer_decay_adamw");
    let params = dummies(&classifier_names(3, true), &[]);
    let groups = layer_groups(&params, 0.65, 4);
    assert_same(&plain(&groups, &params), &official(&fixture));
    let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names[..3], ["layer_0_no_decay", "layer_0_decay", "layer_1_no_decay"]);
    assert_eq!(names[8..], ["layer_4_decay", "layer_4_no_decay"]);
    // With a norm before the head, what does not decay comes first.
    let params = dummies(&classifier_names(3, false), &[]);
    let names: Vec<String> = layer_groups(&params, 0.65, 4).into_iter().map(|group| group.name).collect();
    assert_eq!(names[8..], ["layer_4_no_decay", "layer_4_decay"]);
}

#[test]
fn layer_decay_gives_the_published_scales() {
    for (depth, decay, layer, wanted) in [
        (12, 0.65, 0, 0.003_697_205_891),
        (12, 0.65, 1, 0.005_688_009_063),
        (12, 0.65, 12, 0.65),
        (12, 0.65, 13, 1.0),
        (24, 0.75, 0, 7.525_434_581_650_003e-4),
        (24, 0.75, 1, 1.003_391_277_553_333_8e-3),
        (32, 0.75, 0, 7.533_931_929_047_496e-5),
    ] {
        let params = dummies(&classifier_names(depth, true), &[]);
        let groups = layer_groups(&params, decay, depth + 1);
        let group =
            groups.iter().find(|group| group.name == format!("layer_{layer}_no_decay") || group.name == format!("layer_{layer}_decay"));
        let scale = group.unwrap().lr_scale;
        assert!((scale - wanted).abs() <= 2e-10 * wanted, "depth {depth}, layer {layer}: {scale}");
    }
}

#[test]
fn a_layer_beyond_the_last_is_refused() {
    let params = dummies(&classifier_names(3, true), &[]);
    let rule = LayerDecay { weight_decay: 0.05, decay: 0.65, last: 2, no_decay: &[] };
    let error = rule.groups(&params, |name| vit_layer(name, 2)).unwrap_err();
    assert!(error.chain().contains("blocks.2.norm1.weight is in layer 3"), "{}", error.chain());
}

/// Parameters of a fixture with its starting values, and the gradients of its first step.
fn from_fixture(fixture: &Fixture, names: &[String], dtype: Dtype) -> Params {
    let shapes: Vec<String> = names.iter().map(|name| format!("w/{name}")).collect();
    let role = |name: &str| if fixture.tensors.contains_key(&format!("grad/{name}")) { Role::Trained } else { Role::Frozen };
    let entries: Vec<_> = names.iter().zip(&shapes).map(|(name, key)| (name.as_str(), fixture.shape(key), role(name))).collect();
    let mut params = params(dtype, &entries);
    for name in names {
        let id = params.find(name).unwrap();
        params.set_value(id, &fixture.tensor(&format!("w/{name}"), dtype)).unwrap();
        if params.role(id) == Role::Trained {
            give(&mut params, id, fixture.tensor(&format!("grad/{name}"), dtype));
        }
    }
    params
}

#[test]
fn a_fine_tuning_step_of_a_whole_model_is_that_of_the_official_code() {
    let fixture = Fixture::read("vit_layer_decay_adamw");
    let names = classifier_names(3, true);
    for dtype in [Dtype::F32, Dtype::F64] {
        let mut params = from_fixture(&fixture, &names, dtype);
        let mut adamw = AdamW::new(layer_groups(&params, 0.65, 4), (0.9, 0.999), 1e-8).unwrap();
        adamw.step(&mut params, fixture.case["optim"]["lr_per_step"][0].as_f64().unwrap()).unwrap();
        for name in &names {
            let (p, golden) = (params.value(params.find(name).unwrap()).to_f64(), fixture.numbers(&format!("step1/{name}")));
            let error = update_error(&p, &golden, &fixture.numbers(&format!("w/{name}")));
            match dtype {
                Dtype::F32 => assert!(error <= 1e-3, "{name}: {error}"),
                _ => assert!(relative(&p, &golden) <= 1e-6, "{name}: {}", relative(&p, &golden)),
            }
        }
    }
}

#[test]
fn a_learning_rate_of_zero_changes_no_bit_and_counts_as_an_update() {
    let fixture = Fixture::read("mae_adamw_3steps");
    let names = pretraining_names(2, 1);
    let mut params = from_fixture(&fixture, &names, Dtype::F32);
    let mut adamw = AdamW::new(groups::by_decay(&params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    adamw.step(&mut params, 0.0).unwrap();
    for name in &names {
        let value = params.value(params.find(name).unwrap());
        assert!(
            value.data::<f32>().iter().zip(&fixture.tensors[&format!("w/{name}")].1).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{name}"
        );
    }
    assert_eq!(adamw.state().memories().count(), 48);
    for memory in adamw.state().memories() {
        assert_eq!(memory.steps, 1);
        assert!(memory.tensors.iter().all(|(_, tensor)| tensor.to_f64().iter().any(|&x| x != 0.0)));
    }
}

#[test]
fn a_probing_step_is_that_of_the_official_code() {
    let fixture = Fixture::read("linprobe_lars_2steps");
    let names: Vec<String> = pair("head.1").into();
    let mut params = from_fixture(&fixture, &names, Dtype::F64);
    let mut lars = Lars::new(groups::all(&params, 0.0), 0.9, 0.001).unwrap();
    lars.step(&mut params, 0.8).unwrap();
    for name in &names {
        let error = relative(&params.value(params.find(name).unwrap()).to_f64(), &fixture.numbers(&format!("step1/{name}")));
        assert!(error <= 6e-8, "{name}: {error}");
    }
}

/// Three parameters, one larger than a piece, with made-up values.
fn three(dtype: Dtype) -> Params {
    let mut builder = ParamsBuilder::default();
    for (name, shape) in [("large", &[7, 20_011][..]), ("vector", &[37]), ("small", &[5, 3])] {
        builder.add(name, shape, Init::Normal(0.5)).unwrap();
    }
    builder.build(dtype, &Rng::new(3)).unwrap()
}

/// Made-up gradients for those named.
fn gradients(params: &mut Params, names: &[&str], step: u64) {
    params.clear_gradients();
    for name in names {
        let id = params.find(name).unwrap();
        let shape = params.value(id).shape().to_vec();
        let numbers = Rng::new(100 + step).normal(name, params.value(id).numel());
        give(params, id, Tensor::from_slice(&shape, &numbers).unwrap().cast(params.dtype()).unwrap());
    }
}

fn every_optimizer(params: &Params) -> Vec<Box<dyn Optimizer>> {
    let groups = || groups::by_decay(params, 0.1, &[]);
    vec![
        Box::new(AdamW::new(groups(), (0.9, 0.95), 1e-8).unwrap()),
        Box::new(Lamb::new(groups(), (0.9, 0.95), 1e-8, Lamb::MOST).unwrap()),
        Box::new(Lars::new(groups(), 0.9, 0.001).unwrap()),
        Box::new(Sgd::new(groups(), 0.9).unwrap()),
    ]
}

fn bits(params: &Params) -> Vec<u64> {
    params.ids().flat_map(|id| params.value(id).to_f64()).map(f64::to_bits).collect()
}

#[test]
fn a_parameter_without_a_gradient_is_left_out_completely() {
    for which in 0..4 {
        let mut params = three(Dtype::F32);
        let mut optimizer = every_optimizer(&params).remove(which);
        let small = params.find("small").unwrap();
        let before = params.value(small).to_f64();
        for step in 0..3 {
            gradients(&mut params, &["large", "vector"], step);
            optimizer.step(&mut params, 0.1).unwrap();
        }
        assert_eq!(params.value(small).to_f64(), before);
        assert!(optimizer.state().memories().all(|memory| memory.id != small && memory.steps == 3));
        // Its first update is a first update, whatever the others have had.
        gradients(&mut params, &["small"], 9);
        optimizer.step(&mut params, 0.1).unwrap();
        let mut alone = three(Dtype::F32);
        gradients(&mut alone, &["small"], 9);
        every_optimizer(&alone).remove(which).step(&mut alone, 0.1).unwrap();
        assert_eq!(params.value(small).to_f64(), alone.value(small).to_f64());
        assert_ne!(params.value(small).to_f64(), before);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let run = |threads: usize, which: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut params = three(Dtype::F32);
            let mut optimizer = every_optimizer(&params).remove(which);
            let mut ema = Ema::new(&mut params, 0.9).unwrap();
            let mut norms = Vec::new();
            for step in 0..3 {
                gradients(&mut params, &["large", "vector", "small"], step);
                norms.push(clip::clip(&mut params, 1.0).unwrap().to_bits());
                optimizer.step(&mut params, 0.01).unwrap();
                ema.update(&mut params).unwrap();
            }
            let values = bits(&params);
            ema.swap(&mut params).unwrap();
            (values, bits(&params), norms)
        })
    };
    for which in 0..4 {
        assert!(run(1, which) == run(2, which), "optimiser {which}");
    }
}

#[test]
fn a_restored_optimiser_goes_on_as_if_it_had_not_stopped() {
    for which in 0..4 {
        let mut params = three(Dtype::F32);
        let mut optimizer = every_optimizer(&params).remove(which);
        for step in 0..2 {
            gradients(&mut params, &["large", "vector", "small"][step as usize..], step);
            optimizer.step(&mut params, 0.01).unwrap();
        }
        let mut other = three(Dtype::F32);
        let mut resumed = every_optimizer(&other).remove(which);
        for id in params.ids() {
            other.set_value(id, params.value(id)).unwrap();
        }
        for memory in optimizer.state().memories() {
            resumed.state_mut().restore(&other, memory.id, memory.steps, &memory.tensors).unwrap();
        }
        for (params, optimizer) in [(&mut params, &mut optimizer), (&mut other, &mut resumed)] {
            gradients(params, &["large", "vector", "small"], 5);
            optimizer.step(params, 0.01).unwrap();
        }
        assert!(bits(&params) == bits(&other), "optimiser {which}");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    let params = three(Dtype::F32);
    let id = params.find("small").unwrap();
    let mut adamw = AdamW::new(groups::all(&params, 0.0), (0.9, 0.95), 1e-8).unwrap();
    let (fits, odd) = (Tensor::zeros(&[5, 3], Dtype::F32).unwrap(), Tensor::zeros(&[3, 5], Dtype::F32).unwrap());
    let error = adamw.state_mut().restore(&params, id, 1, &[("exp_avg", &fits), ("exp_avg_sq", &odd)]).unwrap_err();
    assert_eq!(error.chain(), "adamw: exp_avg_sq of small is [3, 5], the model wants [5, 3]");
    let error = adamw.state_mut().restore(&params, id, 1, &[("exp_avg", &fits)]).unwrap_err();
    assert!(error.chain().contains("the state of small holds [\"exp_avg\"]"), "{}", error.chain());
    assert_eq!(adamw.state().memories().count(), 0);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let mut params = three(Dtype::F32);
    gradients(&mut params, &["large", "small"], 0);
    for max_norm in [0.0, -1.0, f64::NAN] {
        let error = clip::clip(&mut params, max_norm).unwrap_err();
        assert!(error.kind() == Kind::Usage && error.chain().contains("leave the flag out to switch clipping off"), "{}", error.chain());
    }
    let before = bits(&params);
    for mut optimizer in every_optimizer(&params) {
        assert!(optimizer.step(&mut params, f64::NAN).is_err());
    }
    let small = params.find("small").unwrap();
    let group = |params: Vec<ParamId>| Group { name: "some".into(), weight_decay: 0.0, lr_scale: 1.0, params };
    assert!(Sgd::new(vec![group(vec![small]), group(vec![small])], 0.9).is_err());
    let error = Sgd::new(vec![group(vec![small])], 0.9).unwrap().step(&mut params, 0.1).unwrap_err();
    assert_eq!(error.chain(), "sgd: large has a gradient but is in no group");
    assert!(AdamW::new(Vec::new(), (0.9, 1.0), 1e-8).is_err());
    assert!(Lars::new(Vec::new(), 0.9, -1.0).is_err());
    assert!(Lamb::new(Vec::new(), (0.9, 0.95), 1e-8, 0.0).is_err() && Lamb::new(Vec::new(), (1.0, 0.9), 1e-8, 1.0).is_err());
    assert!(bits(&params) == before);
}

#[test]
fn gradients_that_are_not_finite_are_reported_and_not_scaled() {
    let (mut params, id) = one(&[2], &tensor(&[2], &[1.0, 2.0], Dtype::F32));
    give(&mut params, id, tensor(&[2], &[3.0, f64::INFINITY], Dtype::F32));
    assert_eq!(clip::clip(&mut params, 1.0).unwrap(), f64::INFINITY);
    assert_eq!(params.gradient(id).unwrap().to_f64(), [3.0, f64::INFINITY]);
}

#[test]
fn clipping_leaves_the_gradients_at_the_length_asked_for() {
    let mut params = three(Dtype::F32);
    gradients(&mut params, &["large", "small"], 0);
    let exact = |params: &Params| length(params.ids().filter_map(|id| params.gradient(id)).flat_map(Tensor::to_f64));
    let before = exact(&params);
    let norm = clip::clip(&mut params, 2.0).unwrap();
    assert!((norm - before).abs() < 1e-9 * before);
    assert!((exact(&params) - 2.0).abs() < 1e-5 && (clip::gradient_norm(&mut params).unwrap() - 2.0).abs() < 1e-5);
}

#[test]
fn the_average_follows_everything_and_gives_the_values_back() {
    let table: Vec<f32> = (0..40).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut builder = ParamsBuilder::default();
    let weight = builder.add("weight", &[3], Init::Constant(1.0)).unwrap();
    let fixed = builder.add_as("pos_embed", &[40], Init::Table(table.clone()), Role::Frozen).unwrap();
    let buffer = builder.add_as("running_mean", &[2], Init::Constant(0.0), Role::Buffer).unwrap();
    let mut params = builder.build(Dtype::F32, &Rng::new(0)).unwrap();
    let mut ema = Ema::new(&mut params, 0.75).unwrap();
    for value in [2.0, 4.0] {
        params.value_mut(weight).unwrap().fill(value as f32);
        params.value_mut(buffer).unwrap().fill(value as f32);
        ema.update(&mut params).unwrap();
    }
    ema.swap(&mut params).unwrap();
    assert_eq!(params.value(weight).to_f64(), [1.9375; 3]);
    assert_eq!(params.value(buffer).to_f64(), [1.375; 2]);
    assert_eq!(params.value(fixed).data::<f32>(), table);
    ema.swap(&mut params).unwrap();
    assert_eq!(params.value(weight).to_f64(), [4.0; 3]);
    let mut other = three(Dtype::F32);
    assert!(ema.update(&mut other).is_err() && Ema::new(&mut other, 1.5).is_err());
}

#[test]
fn flat_gradients_are_zero_where_there_is_none() {
    let mut params = three(Dtype::F64);
    gradients(&mut params, &["large", "vector", "small"], 0);
    gradients(&mut params, &["small"], 1);
    let sum = params.with_flat_gradients(|flat: &mut [f64]| flat.iter().map(|x| x * x).sum::<f64>()).unwrap();
    let small = params.find("small").unwrap();
    assert!((sum.sqrt() - length(params.gradient(small).unwrap().to_f64().into_iter())).abs() < 1e-12);
    assert!(params.gradient(params.find("large").unwrap()).is_none());
    assert!(params.with_flat_gradients(|_: &mut [f32]| ()).is_err());
    // What is trained no longer has no place in the buffer.
    params.train_only(|name| name != "large");
    gradients(&mut params, &["vector"], 2);
    assert_eq!(params.with_flat_gradients(|flat: &mut [f64]| flat.len()).unwrap(), 40 + 16);
    let held = params.value(small).clone();
    assert!(params.with_flat_values(|_: &mut [f64]| ()).is_err());
    drop(held);
    assert_eq!(params.with_flat_values(|flat: &mut [f64]| flat.len()).unwrap(), 140_080 + 40 + 16);
}
