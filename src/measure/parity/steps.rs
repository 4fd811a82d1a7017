//! What all models share: weights in, one or more steps of forward, backward and update, everything recorded under the file's names.

use super::case::{Case, Fields};
use super::compare::Record;
use crate::error::Result;
use crate::optim::adamw::AdamW;
use crate::optim::groups::{self, Group, LayerDecay, vit_layer};
use crate::optim::lamb::Lamb;
use crate::optim::lars::Lars;
use crate::optim::sgd::Sgd;
use crate::optim::{Optimizer, clip, schedule};
use crate::param::{Params, Role};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::{bail, ensure};
use serde_json::Value as Json;

const MOST_STEPS: usize = 1000;

/// A model under test.
pub trait Subject {
    fn params(&mut self) -> &mut Params;
    /// The loss of one batch; whatever the file may hold of its making is recorded.
    fn loss(&mut self, tape: &Tape, at: &Place, record: &mut Record) -> Result<Var>;
    /// Parameter groups as the engine makes them, best first: one of them must be the file's.
    fn groups(&mut self, optim: &Fields) -> Result<Vec<Vec<Group>>>;
}

/// Where a batch lies in the file.
pub struct Place {
    input: String,
    output: String,
    micro: Option<usize>,
}

impl Place {
    pub fn input(&self, name: &str) -> String {
        let micro = self.micro.map_or(String::new(), |a| format!("/{a}"));
        format!("in/{}{name}{micro}", self.input)
    }

    pub fn output(&self, name: &str) -> String {
        let micro = self.micro.map_or(String::new(), |a| a.to_string());
        format!("out/{}{name}{micro}", self.output)
    }
}

/// Loads the weights that the file holds under `w/`, or `tw/` of a teacher; fixed tables must already have its numbers.
pub fn load(case: &Case, prefix: &str, params: &mut Params) -> Result<()> {
    for id in params.ids().filter(|&id| params.role(id) == Role::Frozen) {
        let name = params.name(id);
        let Ok(stored) = case.file.get(&format!("{prefix}{name}")) else { continue };
        let ours = params.value(id);
        if stored.shape() == ours.shape() {
            let differing = stored.to_f64()?.iter().zip(ours.to_f64()).filter(|(a, b)| **a != *b).count();
            ensure!(differing == 0, "the table {name} differs from the file's in {differing} of {} values", ours.numel());
        }
    }
    params.load(case.weights(prefix))?;
    params.move_to(&case.device, params.dtype())
}

/// Runs all steps of a case, or forward and backward alone where it has no optimiser.
pub fn run(case: &Case, subject: &mut impl Subject, record: &mut Record) -> Result<()> {
    let (optim, options) = (case.part("optim")?, case.part("options")?);
    let steps = if optim.is_empty() { 1 } else { optim.size_or("steps", 1)? };
    ensure!((1..=MOST_STEPS).contains(&steps), "optim.steps is {steps}; it is from 1 to {MOST_STEPS}");
    let rates = if optim.is_empty() { vec![0.0] } else { rates(&optim, steps)? };
    let mut optimizer = if optim.is_empty() { None } else { Some(optimizer(&optim, subject, &rates, record)?) };
    let clip_grad = if optim.has("clip_grad") { &optim } else { &options };
    let clip_grad = clip_grad.has("clip_grad").then(|| clip_grad.number("clip_grad")).transpose()?;
    let accumulated = options.size_or("accum_iter", 1)?;
    ensure!((1..=MOST_STEPS).contains(&accumulated), "options.accum_iter is {accumulated}; it is from 1 to {MOST_STEPS}");
    let params = subject.params();
    record.buffers = params.ids().filter(|&id| params.role(id) == Role::Buffer).map(|id| params.name(id).to_string()).collect();

    for k in 1..=steps {
        subject.params().clear_gradients();
        let step = format!("step{k}/");
        let input = if has(case, &format!("in/{step}")) { step.clone() } else { String::new() };
        let output = if has(case, &format!("out/{step}")) { step.clone() } else { String::new() };
        ensure!(k == 1 || !input.is_empty(), "the file has no inputs in/{step}");
        let mut total = 0.0;
        for micro in micro_batches(case, &input, accumulated)? {
            let place = Place { input: input.clone(), output: output.clone(), micro };
            let tape = Tape::new();
            let loss = subject.loss(&tape, &place, record)?;
            record.tensor(place.output("loss"), loss.value());
            total += loss.value().read()?[0];
            let part = if accumulated > 1 { loss.scale(1.0 / accumulated as f64)? } else { loss };
            tape.backward(&part, &mut [subject.params()])?;
        }
        record.number(format!("out/{output}loss"), total / accumulated as f64);
        let params = subject.params();
        if k == 1 {
            record_gradients(case, params, record)?;
        }
        record.number(format!("out/{output}grad_norm"), clip::gradient_norm(params)?);
        if let Some(most) = clip_grad {
            clip::clip(params, most)?;
        }
        if let Some(optimizer) = &mut optimizer {
            optimizer.step(params, rates[k - 1])?;
            let stored = params.ids().filter(|&id| params.role(id) != Role::Frozen);
            stored.for_each(|id| record.tensor(format!("{step}{}", params.name(id)), params.value(id)));
        }
    }
    Ok(())
}

fn has(case: &Case, prefix: &str) -> bool {
    case.file.names().any(|name| name.starts_with(prefix))
}

/// The numbers of a step's micro-batches, or none where its inputs are one batch.
fn micro_batches(case: &Case, input: &str, accumulated: usize) -> Result<Vec<Option<usize>>> {
    let there = |a: usize| case.file.contains(&format!("in/{input}images/{a}"));
    if accumulated == 1 && !there(0) && !there(1) {
        return Ok(vec![None]);
    }
    let first = if there(0) { 0 } else { 1 };
    let all = first..first + accumulated;
    ensure!(
        all.clone().all(there) && !there(all.end),
        "in/{input}images holds other than the {accumulated} micro-batches that options.accum_iter names"
    );
    Ok(all.map(Some).collect())
}

fn record_gradients(case: &Case, params: &Params, record: &mut Record) -> Result<()> {
    for id in params.trained() {
        let name = format!("grad/{}", params.name(id));
        match params.gradient(id) {
            Some(gradient) => record.tensor(name, gradient),
            None if case.file.contains(&name) => record.tensor(name, &Tensor::zeros(params.value(id).shape(), params.dtype())?),
            None => {}
        }
    }
    Ok(())
}

/// The learning rate of every step; where the file says how they were made, ours must be the same.
fn rates(optim: &Fields, steps: usize) -> Result<Vec<f64>> {
    let rates = if optim.has("lr_per_step") { optim.numbers("lr_per_step")? } else { vec![optim.number("lr")?; steps] };
    ensure!(rates.len() >= steps, "optim.lr_per_step has {} rates for {steps} steps", rates.len());
    if optim.has("schedule") {
        let schedule = optim.object("schedule")?;
        if schedule.text("kind")? == "mae_cosine" {
            let (peak, floor) = (schedule.number("lr")?, schedule.number_or("min_lr", 0.0)?);
            let (warmup, epochs) = (schedule.number("warmup_epochs")?, schedule.number("epochs")?);
            let times = schedule.numbers("epoch_fraction")?;
            ensure!(times.len() >= steps, "optim.schedule.epoch_fraction has {} times for {steps} steps", times.len());
            for (k, (&time, &rate)) in times.iter().zip(&rates).enumerate() {
                let ours = schedule::mae_cosine(time, peak, floor, warmup, epochs);
                let near = (ours - rate).abs() <= 1e-9 * rate.abs();
                ensure!(near, "the learning rate of step {} is {ours:e} but optim.lr_per_step has {rate:e}", k + 1);
            }
        }
    }
    Ok(rates)
}

fn optimizer(optim: &Fields, subject: &mut impl Subject, rates: &[f64], record: &mut Record) -> Result<Box<dyn Optimizer>> {
    let groups = if optim.has("groups") {
        matching_groups(optim, subject)?
    } else {
        groups::all(subject.params(), optim.number_or("weight_decay", 0.0)?)
    };
    let params = subject.params();
    let reach = 2.0 * rates.iter().sum::<f64>();
    for group in &groups {
        let names = group.params.iter().map(|&id| params.name(id).to_string());
        record.reach.extend(names.map(|name| (name, reach * group.lr_scale)));
    }
    make(optim.text("type")?, optim, groups)
}

/// The optimiser of this name with its numbers.
pub fn make(kind: &str, numbers: &Fields, groups: Vec<Group>) -> Result<Box<dyn Optimizer>> {
    for variant in ["amsgrad", "nesterov", "maximize", "dampening"] {
        let off = numbers.get(variant).is_none_or(|value| value == false || value.as_f64() == Some(0.0));
        ensure!(off, "the optimiser's {variant} is not supported yet");
    }
    Ok(match kind {
        "adamw" | "lamb" => {
            let betas = if numbers.has("betas") { numbers.numbers("betas")? } else { vec![0.9, 0.999] };
            let [b1, b2] = betas[..] else { bail!("betas are {betas:?} but two are needed") };
            let eps = numbers.number_or("eps", 1e-8)?;
            match kind {
                "lamb" => Box::new(Lamb::new(groups, (b1, b2), eps, numbers.number_or("max_grad_norm", Lamb::MOST)?)?),
                _ => Box::new(AdamW::new(groups, (b1, b2), eps)?),
            }
        }
        "lars" => Box::new(Lars::new(groups, numbers.number_or("momentum", 0.9)?, numbers.number_or("trust_coefficient", 0.001)?)?),
        "sgd" => Box::new(Sgd::new(groups, numbers.number_or("momentum", 0.0)?)?),
        other => bail!("there is no optimiser {other:?}, only adamw, lamb, lars and sgd"),
    })
}

/// Groups with layer-wise decay, for a vision transformer of this depth.
pub fn layer_groups(params: &Params, decay: f64, weight_decay: f64, depth: usize) -> Result<Vec<Group>> {
    let layers = LayerDecay { weight_decay, decay, last: depth + 1, no_decay: &["pos_embed", "cls_token", "dist_token"] };
    layers.groups(params, |name| vit_layer(name, depth + 1))
}

fn matching_groups(optim: &Fields, subject: &mut impl Subject) -> Result<Vec<Group>> {
    let wanted = optim.objects("groups")?;
    let candidates = subject.groups(optim)?;
    let params = subject.params();
    let mut first = None;
    for mut groups in candidates {
        groups.retain(|group| !group.params.is_empty());
        match difference(params, &groups, &wanted)? {
            None => return Ok(groups),
            Some(difference) => first = first.or(Some(difference)),
        }
    }
    bail!("parameter groups: {}", first.unwrap_or_default())
}

/// The first thing in which groups differ from those of the file.
fn difference(params: &Params, ours: &[Group], wanted: &[Fields]) -> Result<Option<String>> {
    if ours.len() != wanted.len() {
        return Ok(Some(format!("there are {} but optim.groups has {}", ours.len(), wanted.len())));
    }
    for (i, (group, fields)) in ours.iter().zip(wanted).enumerate() {
        let numbers = [
            ("weight decay", group.weight_decay, fields.number("weight_decay")?),
            ("learning-rate scale", group.lr_scale, fields.number_or("lr_scale", 1.0)?),
        ];
        for (what, ours, theirs) in numbers {
            if (ours - theirs).abs() > 1e-12 * theirs.abs() {
                return Ok(Some(format!("the {what} of group {i} is {ours} but optim.groups has {theirs}")));
            }
        }
        let names: Vec<&str> = group.params.iter().map(|&id| params.name(id)).collect();
        let theirs: Vec<&str> = fields.list("params")?.iter().filter_map(Json::as_str).collect();
        if names != theirs {
            let at = (0..).find(|&at| names.get(at) != theirs.get(at)).unwrap_or(0);
            let show = |name: Option<&&str>| name.map_or("nothing".to_string(), |name| format!("{name:?}"));
            let (ours, theirs) = (show(names.get(at)), show(theirs.get(at)));
            return Ok(Some(format!("group {i} has {ours} at place {at} where optim.groups has {theirs}")));
        }
    }
    Ok(None)
}
