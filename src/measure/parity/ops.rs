//! Cases of single operations.

use super::case::{Case, Fields, check_tokens};
use super::compare::Record;
use super::steps;
use crate::error::{Context, Error, Result};
use crate::masking;
use crate::nn::vit::{DropPath, VitConfig};
use crate::ops::distill_kl::Reduction;
use crate::optim::{clip, groups};
use crate::param::{Init, Params, ParamsBuilder};
use crate::rng::Rng;
use crate::tape::{Tape, Var};
use crate::targets::pixels;
use crate::tensor::{Dtype, Tensor};
use crate::{bail, ensure};

/// Runs the operation; false if there is none of this name.
pub fn run(case: &Case, dtype: Dtype, record: &mut Record) -> Result<bool> {
    let one: fn(&Case, usize, &Fields, Dtype, &mut Record) -> Result<()> = match case.part("options")?.text("op")? {
        "attention" => attention,
        "layer_norm" => layer_norm,
        "gelu_erf" => {
            return activations(case, dtype, record).map(|()| true);
        }
        "drop_path" => {
            drop_path_rates(case)?;
            drop_path
        }
        "gather_unshuffle" => {
            return gather_unshuffle(case, dtype, record).map(|()| true);
        }
        "patchify" => patchify,
        "kl_ce" => kl_ce,
        "clip_grad_norm" => clip_grad_norm,
        "optimizer_update" => optimizer_update,
        _ => return super::tables::run(case, record),
    };
    for (i, spec) in case.specs()?.iter().enumerate() {
        one(case, i, spec, dtype, record).with_context(|| format!("sub-case {i}"))?;
    }
    Ok(true)
}

/// The name of an input of sub-case `i`, or of the one that all sub-cases share.
pub fn input(case: &Case, i: usize, name: &str) -> String {
    let own = format!("in/{i}/{name}");
    if case.file.contains(&own) { own } else { format!("in/{name}") }
}

/// Backward from the upstream gradient, and the gradients of these leaves under `grad/<prefix><name>`.
fn backward(tape: &Tape, y: &Var, upstream: &Tensor, leaves: &[(&str, &Var)], prefix: &str, record: &mut Record) -> Result<()> {
    let gradients = tape.backward_from(y, upstream.clone(), &mut [])?;
    for (name, leaf) in leaves {
        let gradient = gradients.of(leaf).ok_or_else(|| Error::new(format!("no gradient reaches {name}")))?;
        record.tensor(format!("grad/{prefix}{name}"), gradient);
    }
    Ok(())
}

fn attention(case: &Case, i: usize, _: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let [q, k, v, upstream] = ["q", "k", "v", "dout"].map(|name| case.tensor(&input(case, i, name), dtype));
    let (parts, upstream) = ([q?, k?, v?], upstream?);
    let &[b, h, n, d] = parts[0].shape() else { bail!("q is {:?} but [B, H, N, D] is needed", parts[0]) };
    for tensor in parts.iter().chain([&upstream]) {
        ensure!(tensor.shape() == parts[0].shape(), "q is {:?} but another input is {tensor:?}", parts[0]);
    }
    check_tokens(n)?;
    let width = h * d;
    // Where number (b, h, t, e) of a part lies in its packed form, whose rows hold `row` numbers.
    let packed = |at: usize, row: usize| {
        let (e, t, head, image) = (at % d, at / d % n, at / (d * n) % h, at / (d * n * h));
        (image * n + t) * row + head * d + e
    };
    let mut qkv = vec![0.0; b * n * 3 * width];
    for (part, tensor) in parts.iter().enumerate() {
        let numbers = tensor.read()?;
        numbers.iter().enumerate().for_each(|(at, x)| qkv[packed(at, 3 * width) + part * width] = *x);
    }
    let mut dy = vec![0.0; b * n * width];
    upstream.read()?.iter().enumerate().for_each(|(at, x)| dy[packed(at, width)] = *x);

    let tape = Tape::new();
    let qkv = tape.leaf(Tensor::from_slice(&[b, n, 3 * width], &qkv)?.cast(dtype)?.on(&case.device)?);
    // The attention itself keeps no probabilities: the file has room for them, so the operations they are made of may write them out.
    let probs = format!("out/{i}/probs");
    if case.file.contains(&probs) {
        let scores = qkv.detach().take_heads(0, 3, h)?.bmm_nt(&qkv.detach().take_heads(1, 3, h)?)?;
        record.tensor(probs, scores.scale((d as f64).powf(-0.5))?.softmax()?.value());
    }
    let y = qkv.attention(h)?;
    let unpacked = |numbers: &[f64], row: usize, first: usize| (0..b * h * n * d).map(|at| numbers[packed(at, row) + first]).collect();
    record.numbers(format!("out/{i}/y"), &[b, h, n, d], unpacked(&y.value().read()?, width, 0));
    let gradients = tape.backward_from(&y, Tensor::from_slice(y.shape(), &dy)?.cast(dtype)?.on(&case.device)?, &mut [])?;
    let gradient = gradients.of(&qkv).ok_or_else(|| Error::new("no gradient reaches q, k, v"))?.read()?;
    for (part, name) in ["q", "k", "v"].into_iter().enumerate() {
        record.numbers(format!("grad/{i}/{name}"), &[b, h, n, d], unpacked(&gradient, 3 * width, part * width));
    }
    Ok(())
}

fn layer_norm(case: &Case, i: usize, spec: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let tape = Tape::new();
    let x = tape.leaf(case.tensor(&input(case, i, "x"), dtype)?);
    let weight = tape.leaf(case.tensor(&format!("w/{i}/weight"), dtype)?);
    let bias = tape.leaf(case.tensor(&format!("w/{i}/bias"), dtype)?);
    let y = x.layernorm(&weight, &bias, spec.number("eps")?)?;
    record.tensor(format!("out/{i}/y"), y.value());
    let upstream = case.tensor(&input(case, i, "dy"), dtype)?;
    backward(&tape, &y, &upstream, &[("x", &x), ("weight", &weight), ("bias", &bias)], &format!("{i}/"), record)
}

/// GELU of the one tensor there is, or of one a sub-case.
fn activations(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let count = if case.file.contains("in/x") { 1 } else { case.specs()?.len() };
    for i in 0..count {
        let prefix = if case.file.contains("in/x") { String::new() } else { format!("{i}/") };
        let tape = Tape::new();
        let x = tape.leaf(case.tensor(&format!("in/{prefix}x"), dtype)?);
        let y = x.gelu()?;
        record.tensor(format!("out/{prefix}y"), y.value());
        backward(&tape, &y, &case.tensor(&format!("in/{prefix}dy"), dtype)?, &[("x", &x)], &prefix, record)?;
    }
    Ok(())
}

/// The rates of the blocks that the description lists, from 0 to the last of them.
fn drop_path_rates(case: &Case) -> Result<()> {
    let options = case.part("options")?;
    if !options.has("dpr_linspace") {
        return Ok(());
    }
    let wanted = options.numbers("dpr_linspace")?;
    let most = wanted.last().copied().unwrap_or(0.0);
    let config = VitConfig { drop_path: DropPath::Linear(most), ..VitConfig::new(32, 16, 16, wanted.len(), 2) };
    for (i, wanted) in wanted.iter().enumerate() {
        let rate = config.block(i).drop_path;
        let near = (rate - wanted).abs() <= 1e-7;
        ensure!(near, "block {i} drops paths at a rate of {rate} but dpr_linspace has {wanted}");
    }
    Ok(())
}

fn drop_path(case: &Case, i: usize, spec: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let tape = Tape::new();
    let x = tape.leaf(case.tensor(&input(case, i, "x"), dtype)?);
    let u = case.floats(&input(case, i, "u"))?;
    let y = x.drop_path(&Tensor::from_slice(&[u.len()], &u)?, spec.number("drop_prob")?)?;
    record.tensor(format!("out/{i}/y"), y.value());
    backward(&tape, &y, &case.tensor(&input(case, i, "dy"), dtype)?, &[("x", &x)], &format!("{i}/"), record)
}

fn gather_unshuffle(case: &Case, dtype: Dtype, record: &mut Record) -> Result<()> {
    let tape = Tape::new();
    let x = tape.leaf(case.tensor("in/x", dtype)?);
    let mask_token = tape.leaf(case.tensor("in/mask_token", dtype)?);
    let &[b, l, _] = x.shape() else { bail!("in/x is {:?} but [B, N, C] is needed", x.value()) };
    let noise = Tensor::from_slice(&[b, l], &case.floats("in/noise")?)?;
    let mask = masking::random(&noise, case.part("options")?.size("len_keep")?)?;
    let indices = [("ids_shuffle", &mask.shuffle), ("ids_restore", &mask.restore), ("ids_keep", &mask.kept), ("mask", &mask.hidden)];
    indices.into_iter().for_each(|(name, tensor)| record.tensor(format!("out/{name}"), tensor));
    let visible = x.gather(&mask.kept)?;
    record.tensor("out/visible".to_string(), visible.value());
    let y = visible.unshuffle(&mask_token, &mask.restore, 0)?;
    record.tensor("out/unshuffled".to_string(), y.value());
    backward(&tape, &y, &case.tensor("in/dy", dtype)?, &[("x", &x), ("mask_token", &mask_token)], "", record)
}

fn patchify(case: &Case, i: usize, spec: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let (images, patch) = (case.images(&input(case, i, "images"), dtype)?, spec.size("patch")?);
    record.tensor(format!("out/{i}/patches"), &pixels::patchify(&images, patch)?);
    record.tensor(format!("out/{i}/norm_pix"), &pixels::targets(&images, patch, Some(pixels::EPS))?);
    Ok(())
}

/// Every loss that the file has of this sub-case; its name says which.
fn kl_ce(case: &Case, i: usize, _: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let student = case.tensor(&input(case, i, "student"), dtype)?;
    let prefix = format!("out/{i}/");
    for name in case.file.names().filter_map(|name| name.strip_prefix(&prefix)) {
        let number = |text: &str| text.parse::<f64>().with_context(|| format!("the loss {name} names no number"));
        let teacher = || case.tensor(&input(case, i, "teacher"), dtype);
        let labels = || case.labels(&input(case, i, "labels"));
        let tape = Tape::new();
        let z = tape.leaf(student.clone());
        let loss = match name {
            "hard_ce" => z.hard_distill(&teacher()?)?,
            "ce" => z.cross_entropy(&labels()?, 0.0)?,
            "soft_ce" => z.cross_entropy_soft(&case.tensor(&input(case, i, "targets"), dtype)?)?,
            _ => {
                if let Some(t) = name.strip_prefix("kl_batchmean_T") {
                    z.distill_kl(&teacher()?, number(t)?, Reduction::Batch)?
                } else if let Some(t) = name.strip_prefix("kl_deit_T") {
                    z.distill_kl(&teacher()?, number(t)?, Reduction::Elements)?
                } else if let Some(s) = name.strip_prefix("ls_ce_") {
                    z.cross_entropy(&labels()?, number(s)?)?
                } else {
                    bail!("there is no loss {name:?}")
                }
            }
        };
        record.tensor(format!("{prefix}{name}"), loss.value());
        let gradients = tape.backward(&loss, &mut [])?;
        let gradient = gradients.of(&z).ok_or_else(|| Error::new("no gradient reaches the student"))?;
        record.tensor(format!("grad/{i}/{name}/student"), gradient);
    }
    Ok(())
}

/// Parameters that only have shapes, for an optimiser to move.
fn bare_params(case: &Case, shapes: &[(String, &[usize])], dtype: Dtype) -> Result<Params> {
    let mut builder = ParamsBuilder::default();
    for (name, shape) in shapes {
        builder.add(name.clone(), shape, Init::Constant(0.0))?;
    }
    let mut params = builder.build(dtype, &Rng::new(0))?;
    params.move_to(&case.device, dtype)?;
    Ok(params)
}

fn give_gradient(params: &mut Params, name: &str, gradient: Tensor) -> Result<()> {
    let id = params.find(name)?;
    let shape = params.value(id).shape();
    ensure!(gradient.shape() == shape, "the gradient of {name} is {gradient:?} but the parameter is {shape:?}");
    params.accept(id, gradient)
}

fn clip_grad_norm(case: &Case, i: usize, spec: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let inputs = (0..).map(|j| format!("in/{i}/g{j}")).take_while(|name| case.file.contains(name));
    let gradients = inputs.map(|name| case.tensor(&name, dtype)).collect::<Result<Vec<_>>>()?;
    let shapes: Vec<_> = gradients.iter().enumerate().map(|(j, gradient)| (format!("g{j}"), gradient.shape())).collect();
    let mut params = bare_params(case, &shapes, dtype)?;
    for (j, gradient) in gradients.iter().enumerate() {
        give_gradient(&mut params, &format!("g{j}"), gradient.copy()?)?;
    }
    record.number(format!("out/{i}/norm"), clip::clip(&mut params, spec.number("max_norm")?)?);
    for id in params.ids() {
        let gradient = params.gradient(id).ok_or_else(|| Error::new("a gradient was lost"))?;
        record.tensor(format!("out/{i}/{}", params.name(id)), gradient);
    }
    Ok(())
}

fn optimizer_update(case: &Case, i: usize, spec: &Fields, dtype: Dtype, record: &mut Record) -> Result<()> {
    let start = case.tensor(&format!("w/{i}/p"), dtype)?;
    let mut params = bare_params(case, &[("p".to_string(), start.shape())], dtype)?;
    let id = params.find("p")?;
    params.set_value(id, &start)?;
    let numbers = spec.object("kw")?;
    let groups = groups::all(&params, numbers.number_or("weight_decay", 0.0)?);
    let mut optimizer = steps::make(spec.text("opt")?, &numbers, groups)?;
    for k in 1..=spec.size("steps")? {
        params.clear_gradients();
        give_gradient(&mut params, "p", case.tensor(&format!("in/{i}/step{k}/g"), dtype)?)?;
        optimizer.step(&mut params, numbers.number("lr")?)?;
        record.tensor(format!("step{k}/{i}/p"), params.value(id));
    }
    for memory in optimizer.state().memories() {
        record.number(format!("out/{i}/state_step"), memory.steps as f64);
        memory.tensors.iter().for_each(|(name, tensor)| record.tensor(format!("out/{i}/state_{name}"), tensor));
    }
    Ok(())
}
