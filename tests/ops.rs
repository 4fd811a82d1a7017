//! Every case of every op: the derivative against finite differences in f64, and f32 against f64.

use masque::error::Result;
use masque::ops::{self, case::Case};
use masque::tape::{Tape, Var};
use masque::tensor::{Dtype, Tensor};
use std::path::PathBuf;

/// Output, an upstream gradient for it (the same numbers each time), and the inputs' gradients.
fn run(case: &Case, inputs: Vec<Tensor>) -> Result<(Tensor, Vec<f64>, Vec<Tensor>)> {
    let tape = Tape::new();
    let inputs: Vec<Var> = inputs.into_iter().map(|input| tape.leaf(input)).collect();
    let y = (case.run)(&inputs)?;
    let weights = ops::case::numbers("upstream", 0, y.shape());
    let upstream = Tensor::from_slice(y.shape(), &weights)?.cast(y.dtype())?;
    let gradients = tape.backward_from(&y, upstream, &mut [])?;
    let of = |input: &Var| gradients.of(input).cloned().map_or_else(|| Tensor::zeros(input.shape(), input.dtype()), Ok);
    let gradients = inputs.iter().map(of).collect::<Result<Vec<_>>>()?;
    Ok((y.value().clone(), weights, gradients))
}

/// The weighted sum of the output when every input moves by `step` along its direction.
fn moved(case: &Case, directions: &[Vec<f64>], step: f64, weights: &[f64]) -> Result<f64> {
    let move_one = |(input, direction): (&ops::case::Input, &Vec<f64>)| {
        let values: Vec<f64> = input.values.iter().zip(direction).map(|(x, d)| x + step * d).collect();
        Ok(Var::constant(Tensor::from_slice(&input.shape, &values)?))
    };
    let inputs = case.inputs.iter().zip(directions).map(move_one).collect::<Result<Vec<_>>>()?;
    let y = (case.run)(&inputs)?;
    Ok(y.value().to_f64().iter().zip(weights).map(|(y, w)| y * w).sum())
}

#[test]
fn every_gradient_is_the_derivative() {
    for case in ops::cases() {
        let (_, weights, gradients) =
            run(&case, case.tensors(Dtype::F64).unwrap()).unwrap_or_else(|e| panic!("{}: {}", case.name, e.chain()));
        // Each input by itself, so that no error hides behind another's size.
        for i in 0..case.inputs.len() {
            let direction = |j: usize, input: &ops::case::Input| {
                let n = ops::case::numbers("direction", j, &input.shape);
                n.into_iter().map(|d| if i == j { d } else { 0.0 }).collect::<Vec<_>>()
            };
            let directions: Vec<_> = case.inputs.iter().enumerate().map(|(j, input)| direction(j, input)).collect();
            let derivative: f64 = gradients[i].to_f64().iter().zip(&directions[i]).map(|(g, d)| g * d).sum();
            let size: f64 = gradients[i].to_f64().iter().zip(&directions[i]).map(|(g, d)| (g * d).abs()).sum();
            // Central differences at two steps; their combination cancels the error of order step^2.
            let difference = |h: f64| {
                let (up, down) = (moved(&case, &directions, h, &weights).unwrap(), moved(&case, &directions, -h, &weights).unwrap());
                (up - down) / (2.0 * h)
            };
            let estimate = (4.0 * difference(1e-4) - difference(2e-4)) / 3.0;
            let error = (derivative - estimate).abs();
            assert!(error <= 1e-7 * size.max(1e-3), "{}: input {i}: {derivative} but differences give {estimate}", case.name);
        }
    }
}

#[test]
fn f32_agrees_with_f64() {
    for case in ops::cases().into_iter().filter(|case| case.conditioned) {
        let (exact, _, exact_gradients) = run(&case, case.tensors(Dtype::F64).unwrap()).unwrap();
        let (y, _, gradients) = run(&case, case.tensors(Dtype::F32).unwrap()).unwrap();
        let pairs = std::iter::once((&y, &exact)).chain(gradients.iter().zip(&exact_gradients));
        for (i, (got, want)) in pairs.enumerate() {
            let (got, want) = (got.to_f64(), want.to_f64());
            let scale = want.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
            let error = got.iter().zip(&want).fold(0.0f64, |most, (a, b)| most.max((a - b).abs()));
            assert!(got.iter().all(|x| x.is_finite()), "{}: tensor {i} has a number that is none", case.name);
            assert!(error <= 1e-5 * scale, "{}: tensor {i}: {error} at a scale of {scale}", case.name);
        }
    }
}

#[test]
fn every_op_has_a_case_with_its_name() {
    let names: Vec<String> = ops::cases().into_iter().map(|case| case.name).collect();
    let mut open = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops"))];
    while let Some(file) = open.pop() {
        if file.is_dir() {
            open.extend(std::fs::read_dir(file).unwrap().map(|file| file.unwrap().path()));
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        for (_, rest) in text.match_indices("Var::record").map(|(at, _)| text.split_at(at)) {
            let op = rest.split('"').nth(1).unwrap();
            // A tool of the cases themselves, whose derivative is not that of its value.
            if op == "rounded" {
                continue;
            }
            assert!(names.iter().any(|name| name.split(':').next() == Some(op)), "{op} in {file:?} has no case");
        }
    }
}
