//! Floor 3: the whole of automatic differentiation.
//!
//! A [`Var`] is a tensor that may be on a [`Tape`]. Ops put their result there through one door, [`Var::record`], whose argument is the
//! backward; what is not on a tape is a constant. [`Tape::backward`] walks the tape once from the end, consuming it, so memory falls as it goes.
//!
//! Gradients are written once: an op that asks [`Need::out`] for the memory of a parameter's gradient gets that parameter's own range of the
//! flat buffer the first time, and scratch memory that the tape adds afterwards.

use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::param::{ParamId, Params};
use crate::tensor::{Device, Dtype, Shape, Tensor};
use crate::trace::{self, Kind as Traced, Shapes};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// Where ops record themselves; [`Tape::off`] records nothing.
#[derive(Clone)]
pub struct Tape(Option<Rc<RefCell<Recording>>>);

#[derive(Default)]
struct Recording {
    nodes: Vec<Node>,
    /// Where each parameter stands: it is on the tape once, however often it is used.
    parameters: HashMap<(u64, ParamId), usize>,
}

struct Node {
    name: &'static str,
    inputs: Vec<Option<usize>>,
    shape: Shape,
    /// Of its gradient.
    dtype: Dtype,
    kind: Kind,
}

/// Takes the gradient of an op's result and answers for each input.
type Backward = Box<dyn FnOnce(Tensor, &mut Need) -> Result<Vec<Option<Tensor>>>>;

enum Kind {
    Op(Backward),
    /// A parameter of the set with this number.
    Param {
        set: u64,
        id: ParamId,
    },
    /// An input whose gradient the caller wants.
    Leaf,
}

/// A tensor, and its place on a tape if it has one.
#[derive(Clone)]
pub struct Var {
    value: Tensor,
    place: Option<(Tape, usize)>,
}

/// What a backward is asked for: gradients of some of its inputs.
pub struct Need {
    device: Device,
    wanted: Vec<bool>,
    lent: Vec<Option<Tensor>>,
    so_far: Vec<Option<Tensor>>,
    shapes: Vec<Option<(Shape, Dtype)>>,
}

impl Need {
    /// Whether input i wants a gradient; answering None is right only where this is false.
    pub fn wants(&self, i: usize) -> bool {
        self.wanted[i]
    }

    /// Memory for the gradient of input i, which must be wanted. Its content is arbitrary; what is written there must be answered.
    pub fn out(&mut self, i: usize) -> Result<Tensor> {
        if let Some(lent) = self.lent[i].take() {
            return Ok(lent);
        }
        let (shape, dtype) = self.shapes[i].expect("out is asked only for a wanted input");
        Tensor::empty_on(&self.device, &shape, dtype)
    }

    /// Takes the gradient that input i has already, from what used it later. Whoever takes it answers the sum of it and its own; otherwise the tape adds.
    /// None for a parameter, whose gradient has a place of its own.
    pub fn so_far(&mut self, i: usize) -> Option<Tensor> {
        self.so_far[i].take()
    }

    /// The gradient of input i as `f` makes it, or None if it is not wanted.
    pub fn give(&mut self, i: usize, f: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<Option<Tensor>> {
        if !self.wants(i) {
            return Ok(None);
        }
        let mut out = self.out(i)?;
        f(&mut out)?;
        Ok(Some(out))
    }
}

/// Is told of a parameter whose gradient is complete.
pub type Ready<'a> = &'a mut dyn FnMut(&Params, ParamId) -> Result<()>;

/// Gradients of the leaves that a backward walk reached.
pub struct Gradients(Vec<(usize, Tensor)>);

impl Gradients {
    pub fn of(&self, leaf: &Var) -> Option<&Tensor> {
        let (_, place) = leaf.place.as_ref()?;
        self.0.iter().find(|(node, _)| node == place).map(|(_, gradient)| gradient)
    }
}

impl Tape {
    pub fn new() -> Self {
        Self(Some(Rc::default()))
    }

    /// Records nothing: for teachers and evaluation.
    pub fn off() -> Self {
        Self(None)
    }

    /// How many results and parameters it holds; 0 where nothing is recorded.
    pub fn recorded(&self) -> usize {
        self.0.as_ref().map_or(0, |recording| recording.borrow().nodes.len())
    }

    /// A tensor whose gradient is wanted.
    pub fn leaf(&self, value: Tensor) -> Var {
        self.push("leaf", Vec::new(), value, Kind::Leaf)
    }

    /// A leaf whose gradient is f32 also where it is bf16, as a parameter's is.
    pub fn weight(&self, value: Tensor) -> Var {
        let gradient = if value.dtype() == Dtype::Bf16 { Dtype::F32 } else { value.dtype() };
        let leaf = self.leaf(value);
        if let (Some(recording), Some((_, place))) = (&self.0, &leaf.place) {
            recording.borrow_mut().nodes[*place].dtype = gradient;
        }
        leaf
    }

    pub(crate) fn param(&self, value: Tensor, set: u64, id: ParamId) -> Var {
        let Some(recording) = &self.0 else { return Var::constant(value) };
        if let Some(&place) = recording.borrow().parameters.get(&(set, id)) {
            return Var { value, place: Some((self.clone(), place)) };
        }
        let next = recording.borrow().nodes.len();
        recording.borrow_mut().parameters.insert((set, id), next);
        self.push("parameter", Vec::new(), value, Kind::Param { set, id })
    }

    fn push(&self, name: &'static str, inputs: Vec<Option<usize>>, value: Tensor, kind: Kind) -> Var {
        let Some(recording) = &self.0 else { return Var::constant(value) };
        let nodes = &mut recording.borrow_mut().nodes;
        let shape = Shape::new(value.shape()).expect("a tensor's shape is a shape");
        // The gradient of a parameter is f32 also where its working copy is bf16.
        let dtype = match (&kind, value.dtype()) {
            (Kind::Param { .. }, Dtype::Bf16) => Dtype::F32,
            (_, dtype) => dtype,
        };
        nodes.push(Node { name, inputs, shape, dtype, kind });
        Var { value, place: Some((self.clone(), nodes.len() - 1)) }
    }

    fn same(&self, other: &Tape) -> bool {
        matches!((&self.0, &other.0), (Some(a), Some(b)) if Rc::ptr_eq(a, b))
    }

    /// Gradients of `loss`, one number, with respect to everything on this tape. Those of `params` are added to what their gradient buffers hold;
    /// where that fails they have none.
    pub fn backward(&self, loss: &Var, params: &mut [&mut Params]) -> Result<Gradients> {
        ensure!(loss.value.numel() == 1, "backward: the loss is {:?}, not one number", loss.value.shape());
        let one = Tensor::full_on(&loss.value.device(), loss.value.shape(), loss.value.dtype(), 1.0)?;
        self.backward_from(loss, one, params)
    }

    /// The same; `ready` is told of each parameter of `params` as soon as its gradient is complete.
    pub fn backward_telling(&self, loss: &Var, params: &mut Params, ready: Ready) -> Result<Gradients> {
        ensure!(loss.value.numel() == 1, "backward: the loss is {:?}, not one number", loss.value.shape());
        let one = Tensor::full_on(&loss.value.device(), loss.value.shape(), loss.value.dtype(), 1.0)?;
        self.begin(loss, one, &mut [params], ready)
    }

    /// The same from a given gradient of `output`.
    pub fn backward_from(&self, output: &Var, gradient: Tensor, params: &mut [&mut Params]) -> Result<Gradients> {
        self.begin(output, gradient, params, &mut |_, _| Ok(()))
    }

    fn begin(&self, output: &Var, gradient: Tensor, params: &mut [&mut Params], ready: Ready) -> Result<Gradients> {
        let place = output.place.as_ref().filter(|(tape, _)| tape.same(self)).map(|(_, place)| *place);
        ensure!(place.is_some(), "backward: the loss is not on this tape, nothing that leads to it was recorded");
        ensure!(
            gradient.shape() == output.value.shape(),
            "backward: the gradient is {:?} but the output is {:?}",
            gradient.shape(),
            output.value.shape()
        );
        let last = place.expect("checked above");
        let walked = self.walk(last, gradient, params, ready);
        if walked.is_err() {
            // Memory that was lent is gone with the walk.
            params.iter_mut().for_each(|params| params.forget_gradients());
        }
        walked
    }

    fn walk(&self, last: usize, gradient: Tensor, params: &mut [&mut Params], ready: Ready) -> Result<Gradients> {
        let device = gradient.device();
        let recording = self.0.as_ref().map(|recording| recording.take()).expect("a tape with a place on it is on");
        let nodes = recording.nodes;
        let facts: Vec<(Shape, Dtype)> = nodes.iter().map(|node| (node.shape, node.dtype)).collect();
        let owners: Vec<Option<(u64, ParamId)>> = nodes
            .iter()
            .map(|node| match node.kind {
                Kind::Param { set, id } => Some((set, id)),
                _ => None,
            })
            .collect();
        let mut gradients: Vec<Option<Tensor>> = vec![None; nodes.len()];
        gradients[last] = Some(gradient);
        let mut leaves = Vec::new();
        for (place, node) in nodes.into_iter().enumerate().rev() {
            let Some(gradient) = gradients[place].take() else { continue };
            match node.kind {
                Kind::Leaf => leaves.push((place, gradient)),
                Kind::Param { set, id } => {
                    let params = owner(params, set)?;
                    params.accept(id, gradient)?;
                    ready(params, id)?;
                }
                Kind::Op(backward) => {
                    let mut need = need(&device, &node.inputs, &facts, &owners, &mut gradients, params)?;
                    let answers = backward(gradient, &mut need).with_context(|| format!("the backward of {}", node.name))?;
                    trace::op(node.name, Traced::Backward, || {
                        let wanted = node.inputs.iter().filter_map(|input| input.map(|input| (facts[input].1, &*facts[input].0)));
                        sizes(std::iter::once((node.dtype, &*node.shape)), wanted)
                    });
                    give_back(need, &node.inputs, &owners, &mut gradients, params)?;
                    for (i, (input, answer)) in node.inputs.iter().zip(answers).enumerate() {
                        let Some(input) = *input else { continue };
                        let Some(answer) = answer else {
                            crate::bail!("the backward of {} gave no gradient for its input {i}", node.name);
                        };
                        let (shape, dtype) = facts[input];
                        ensure!(
                            answer.shape() == &*shape && answer.dtype() == dtype,
                            "the backward of {} gave {answer:?} for its input {i}, which is {dtype} {shape:?}",
                            node.name
                        );
                        gradients[input] = Some(match gradients[input].take() {
                            None => answer,
                            Some(sum) => {
                                let sum = sum.accumulate(&answer)?;
                                trace::op("accumulate", Traced::Backward, || sizes([(dtype, &*shape); 2], [(dtype, &*shape)]));
                                sum
                            }
                        });
                    }
                }
            }
        }
        Ok(Gradients(leaves))
    }
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

fn owner<'a>(params: &'a mut [&mut Params], set: u64) -> Result<&'a mut Params> {
    let found = params.iter_mut().find(|params| params.set() == set);
    found.map(|params| &mut **params).ok_or_else(|| Error::new("backward: a parameter on the tape belongs to a set that was not handed in"))
}

/// Lends each wanted parameter's own gradient range, where nothing has been written to it and this is its first gradient on this walk, and hands over what
/// other inputs have got so far.
fn need(
    device: &Device,
    inputs: &[Option<usize>],
    facts: &[(Shape, Dtype)],
    owners: &[Option<(u64, ParamId)>],
    gradients: &mut [Option<Tensor>],
    params: &mut [&mut Params],
) -> Result<Need> {
    let mut lent = Vec::with_capacity(inputs.len());
    let mut so_far = Vec::with_capacity(inputs.len());
    for input in inputs {
        let free = input.filter(|&place| gradients[place].is_none()).and_then(|place| owners[place]);
        lent.push(match free {
            Some((set, id)) => owner(params, set)?.lend(id)?,
            None => None,
        });
        so_far.push(input.filter(|&place| owners[place].is_none()).and_then(|place| gradients[place].take()));
    }
    let shapes = inputs.iter().map(|input| input.map(|place| facts[place])).collect();
    Ok(Need { device: device.clone(), wanted: inputs.iter().map(Option::is_some).collect(), lent, so_far, shapes })
}

/// Ranges that were lent and not used go back, and so do gradients that were not taken.
fn give_back(
    need: Need,
    inputs: &[Option<usize>],
    owners: &[Option<(u64, ParamId)>],
    gradients: &mut [Option<Tensor>],
    params: &mut [&mut Params],
) -> Result<()> {
    for ((lent, so_far), place) in need.lent.into_iter().zip(need.so_far).zip(inputs) {
        let Some(place) = *place else { continue };
        if let (Some(range), Some((set, id))) = (lent, owners[place]) {
            owner(params, set)?.give_back(id, range);
        }
        if so_far.is_some() {
            gradients[place] = so_far;
        }
    }
    Ok(())
}

/// What goes into an op and comes out of it, as text and as shapes.
fn sizes<'a>(
    from: impl IntoIterator<Item = (Dtype, &'a [usize])>,
    to: impl IntoIterator<Item = (Dtype, &'a [usize])>,
) -> (String, [Shapes; 2]) {
    let [from, to] = [from.into_iter().collect::<Vec<_>>(), to.into_iter().collect()];
    let text = |all: &[(Dtype, &[usize])]| all.iter().map(|(dtype, shape)| format!("{dtype} {shape:?}")).collect::<Vec<_>>().join(", ");
    let shapes = |all: &[(Dtype, &[usize])]| all.iter().map(|(_, shape)| shape.to_vec()).collect();
    (format!("{} -> {}", text(&from), text(&to)), [shapes(&from), shapes(&to)])
}

fn size(tensor: &Tensor) -> (Dtype, &[usize]) {
    (tensor.dtype(), tensor.shape())
}

impl Var {
    /// A tensor that no gradient flows through.
    pub fn constant(value: Tensor) -> Self {
        Self { value, place: None }
    }

    /// The only way to make a tracked Var: no backward, no op. The backward takes the result's gradient and answers for each input.
    pub fn record<const N: usize>(
        name: &'static str,
        inputs: [&Var; N],
        value: Tensor,
        backward: impl FnOnce(Tensor, &mut Need) -> Result<[Option<Tensor>; N]> + 'static,
    ) -> Result<Var> {
        Self::record_many(name, &inputs, value, move |gradient, need| Ok(backward(gradient, need)?.into()))
    }

    /// The same for a weight in another arrangement: its gradient is f32 also where it is bf16.
    pub fn record_weight<const N: usize>(
        name: &'static str,
        inputs: [&Var; N],
        value: Tensor,
        backward: impl FnOnce(Tensor, &mut Need) -> Result<[Option<Tensor>; N]> + 'static,
    ) -> Result<Var> {
        let weight = Self::record(name, inputs, value, backward)?;
        if let Some((Tape(Some(recording)), place)) = &weight.place {
            let node = &mut recording.borrow_mut().nodes[*place];
            node.dtype = if node.dtype == Dtype::Bf16 { Dtype::F32 } else { node.dtype };
        }
        Ok(weight)
    }

    /// The same for a number of inputs known only when the program runs.
    pub fn record_many(
        name: &'static str,
        inputs: &[&Var],
        value: Tensor,
        backward: impl FnOnce(Tensor, &mut Need) -> Result<Vec<Option<Tensor>>> + 'static,
    ) -> Result<Var> {
        trace::op(name, Traced::Forward, || sizes(inputs.iter().map(|input| size(&input.value)), [size(&value)]));
        let Some((tape, _)) = inputs.iter().find_map(|input| input.place.as_ref()) else { return Ok(Var::constant(value)) };
        let one_tape = inputs.iter().filter_map(|input| input.place.as_ref()).all(|(other, _)| other.same(tape));
        ensure!(one_tape, "{name}: its inputs are on different tapes");
        let places = inputs.iter().map(|input| input.place.as_ref().map(|(_, place)| *place)).collect();
        Ok(tape.push(name, places, value, Kind::Op(Box::new(backward))))
    }

    pub fn value(&self) -> &Tensor {
        &self.value
    }

    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    pub fn dtype(&self) -> Dtype {
        self.value.dtype()
    }

    /// Whether a gradient will flow to it.
    pub fn tracked(&self) -> bool {
        self.place.is_some()
    }

    /// The same value as a constant: stops the gradient on purpose.
    pub fn detach(&self) -> Self {
        Self::constant(self.value.clone())
    }

    /// The same numbers under another shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Var> {
        let before = Shape::new(self.shape())?;
        let value = self.value.reshape(shape)?;
        Var::record("reshape", [self], value, move |gradient, _| Ok([Some(gradient.reshape(&before)?)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::{Init, ParamsBuilder};
    use crate::rng::Rng;

    fn numbers(values: &[f64]) -> Tensor {
        Tensor::from_slice(&[values.len()], values).unwrap()
    }

    /// 3 x, whose backward takes what x has got so far if it is told to.
    fn three(x: &Var, takes: bool) -> Var {
        let times = |x: &Tensor| numbers(&x.to_f64().iter().map(|x| 3.0 * x).collect::<Vec<_>>());
        let backward = move |dy: Tensor, need: &mut Need| {
            let dx = times(&dy);
            let so_far = if takes { need.so_far(0) } else { None };
            Ok([Some(so_far.map_or(Ok(dx.clone()), |so_far| dx.accumulate(&so_far))?)])
        };
        Var::record("three", [x], times(x.value()), backward).unwrap()
    }

    #[test]
    fn a_backward_that_fails_leaves_parameters_that_can_be_trained() {
        let mut builder = ParamsBuilder::default();
        let ids = ["a", "b"].map(|name| builder.add(name, &[2], Init::Constant(1.0)).unwrap());
        let mut params = builder.build(Dtype::F64, &Rng::new(0)).unwrap();
        for fails in [true, false] {
            let tape = Tape::new();
            let [a, b] = ids.map(|id| params.var(&tape, id));
            let backward = move |dy: Tensor, need: &mut Need| {
                ensure!(!fails, "it fails");
                let answers = [need.give(0, |da| da.copy_from(&dy))?, need.give(1, |db| db.copy_from(&dy))?];
                Ok(answers)
            };
            let sum = Var::record("sum", [&a, &b], numbers(&[2.0, 2.0]), backward).unwrap();
            drop((a, b));
            let done = tape.backward_from(&sum, numbers(&[3.0, 4.0]), &mut [&mut params]);
            assert_eq!(done.is_err(), fails);
            let flat = params.with_flat_gradients(|flat: &mut [f64]| (flat[0], flat[1], flat[8], flat[9])).unwrap();
            assert_eq!(flat, if fails { (0.0, 0.0, 0.0, 0.0) } else { (3.0, 4.0, 3.0, 4.0) });
        }
    }

    #[test]
    fn gradients_are_the_same_whether_a_backward_takes_what_is_there_or_not() {
        for takes in [false, true] {
            let tape = Tape::new();
            let x = tape.leaf(numbers(&[1.0, -2.0]));
            // On the way back x is given something before, between and after the two that may take it; y has nothing yet.
            let y = x.add(&three(&x, takes)).unwrap();
            let z = three(&y, takes).add(&three(&x, takes)).unwrap().add(&x).unwrap();
            let gradients = tape.backward_from(&z, numbers(&[1.0, 10.0]), &mut []).unwrap();
            assert_eq!(gradients.of(&x).unwrap().to_f64(), [16.0, 160.0], "takes: {takes}");
        }
    }

    #[test]
    fn an_input_that_stands_twice_is_taken_once() {
        let tape = Tape::new();
        let x = tape.leaf(numbers(&[2.0]));
        let both = Var::record("both", [&x, &x], numbers(&[4.0]), |dy, need| {
            let (first, second) = (need.so_far(0), need.so_far(1));
            assert!(first.is_some() && second.is_none());
            Ok([Some(dy.copy()?.accumulate(&first.unwrap())?), Some(dy)])
        });
        let gradients = tape.backward_from(&both.unwrap().add(&x).unwrap(), numbers(&[1.0]), &mut []).unwrap();
        assert_eq!(gradients.of(&x).unwrap().to_f64(), [3.0]);
    }

    #[test]
    fn the_gradient_of_a_parameter_is_not_handed_over() {
        let mut builder = ParamsBuilder::default();
        let id = builder.add("p", &[1], Init::Constant(2.0)).unwrap();
        let mut params = builder.build(Dtype::F64, &Rng::new(0)).unwrap();
        let tape = Tape::new();
        let p = params.var(&tape, id);
        let y = three(&p, true).add(&p).unwrap();
        drop(p);
        tape.backward_from(&y, numbers(&[1.0]), &mut [&mut params]).unwrap();
        assert_eq!(params.gradient(id).unwrap().to_f64(), [4.0]);
    }
}
