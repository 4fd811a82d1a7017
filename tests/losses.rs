//! Losses and products against known values, at extremes, and what they refuse.

use approx::{assert_abs_diff_eq, assert_relative_eq};
use masque::error::Result;
use masque::ops::{self, distill_kl::Reduction, feature_loss::Distance, relation_kl::Relation};
use masque::tape::{Tape, Var};
use masque::tensor::{Dtype, Tensor};

fn tensor(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_slice(shape, values).unwrap()
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, Dtype::F32).unwrap()
}

fn var(shape: &[usize]) -> Var {
    Var::constant(zeros(shape))
}

/// Normal numbers, the same ones each time.
fn normal(name: &str, shape: &[usize]) -> Tensor {
    tensor(shape, &ops::case::numbers(name, 0, shape))
}

/// The loss and its gradient with respect to x.
fn loss_of(x: &Tensor, f: impl Fn(&Var) -> Result<Var>) -> (f64, Vec<f64>) {
    let tape = Tape::new();
    let x = tape.leaf(x.clone());
    let loss = f(&x).unwrap();
    let gradients = tape.backward(&loss, &mut []).unwrap();
    (loss.value().item(), gradients.of(&x).unwrap().to_f64())
}

const STUDENT: [f64; 6] = [1.0, 2.0, 3.0, 0.5, -1.0, 0.0];
const TEACHER: [f64; 6] = [2.0, 1.0, 0.5, 0.0, 0.0, 3.0];

#[test]
fn distillation_has_the_published_values() {
    for dtype in [Dtype::F64, Dtype::F32] {
        let of = |values: &[f64]| tensor(&[2, 3], values).cast(dtype).unwrap();
        let (student, teacher, targets) = (of(&STUDENT), of(&TEACHER), of(&[0.7, 0.2, 0.1, 0.1, 0.8, 0.1]));
        let close = |got: f64, want: f64| assert_abs_diff_eq!(got, want, epsilon = 6e-7);
        close(loss_of(&student, |z| z.cross_entropy_soft(&targets)).0, 1.930868);
        close(loss_of(&student, |z| z.hard_distill(&teacher)).0, 1.755868);
        for (temperature, batch, elements) in [(1.0, 0.875055, 0.291685), (2.0, 1.054474, 0.351491), (3.0, 1.077766, 0.359255)] {
            close(loss_of(&student, |z| z.distill_kl(&teacher, temperature, Reduction::Batch)).0, batch);
            close(loss_of(&student, |z| z.distill_kl(&teacher, temperature, Reduction::Elements)).0, elements);
        }
        let gradients = [
            (1.0, [-0.269251, 0.006752, 0.262498, 0.250635, 0.038337, -0.288972]),
            (2.0, [-0.294701, 0.015440, 0.279261, 0.289933, 0.055551, -0.345484]),
        ];
        for (temperature, want) in gradients {
            let (_, got) = loss_of(&student, |z| z.distill_kl(&teacher, temperature, Reduction::Batch));
            got.into_iter().zip(want).for_each(|(got, want)| close(got, want));
        }
    }
}

#[test]
fn relations_have_the_published_values() {
    let pack = |q: [f64; 6], k: [f64; 6], v: [f64; 6]| {
        let token = |t: usize| [q, k, v].map(|part| [part[2 * t], part[2 * t + 1]]).concat();
        tensor(&[1, 3, 6], &(0..3).flat_map(token).collect::<Vec<_>>())
    };
    let student = pack([1., 0., 0., 1., 1., 1.], [1., 2., 0., 1., -1., 0.], [1., 1., 2., 0., 0., -1.]);
    let teacher = pack([0.5, 1., 1., 0., -1., 1.], [1., 0., 1., 1., 0., 2.], [0., 1., 1., 1., 1., -1.]);
    for dtype in [Dtype::F64, Dtype::F32] {
        let (student, teacher) = (Var::constant(student.cast(dtype).unwrap()), teacher.cast(dtype).unwrap());
        let (total, parts) = student.relation_kl(&teacher, 1, &[Relation::Qk, Relation::Vv]).unwrap();
        let parts = parts.to_f64();
        for (got, want) in [(parts[0], 0.790527), (parts[1], 0.061684), (total.value().item(), 0.852211)] {
            assert_abs_diff_eq!(got, want, epsilon = 6e-7);
        }
    }
}

#[test]
fn the_gradient_of_relations_stays_in_the_parts_that_are_compared() {
    let (student, teacher) = (normal("student", &[2, 5, 24]), normal("teacher", &[2, 5, 36]));
    for (relation, used) in
        [(Relation::Qk, [true, true, false]), (Relation::Vv, [false, false, true]), (Relation::Kk, [false, true, false])]
    {
        let (_, gradient) = loss_of(&student, |x| Ok(x.relation_kl(&teacher, 2, &[relation])?.0));
        for (i, g) in gradient.iter().enumerate() {
            assert_eq!(*g != 0.0, used[i % 24 / 8], "{relation:?} at {i}");
        }
    }
}

#[test]
fn equal_networks_have_no_divergence() {
    let x = normal("qkv", &[2, 9, 48]);
    let (loss, gradient) = loss_of(&x, |v| Ok(v.relation_kl(&x, 4, &[Relation::Qk, Relation::Vv])?.0));
    assert!(loss.abs() < 1e-14 && gradient.iter().all(|g| *g == 0.0), "{loss}");
    let z = normal("logits", &[3, 10]);
    assert_eq!(loss_of(&z, |v| v.distill_kl(&z, 2.0, Reduction::Batch)).0, 0.0);
}

#[test]
fn nearly_one_hot_rows_keep_their_divergence() {
    // Values of size 4 make v-v rows whose largest probability differs from 1 by little.
    let of = |name: &str| {
        let values: Vec<f64> = normal(name, &[1, 20, 48]).to_f64().iter().map(|x| ((x * 4.0) as f32) as f64).collect();
        tensor(&[1, 20, 48], &values)
    };
    let (student, teacher) = (of("student"), of("teacher"));
    let value = |dtype: Dtype| {
        let student = Var::constant(student.cast(dtype).unwrap());
        student.relation_kl(&teacher.cast(dtype).unwrap(), 1, &[Relation::Vv]).unwrap().1.item()
    };
    let (exact, got) = (value(Dtype::F64), value(Dtype::F32));
    assert!(exact > 0.0 && exact < 1e-3, "{exact}");
    assert_relative_eq!(got, exact, max_relative = 1e-4);

    // Two classes: KL = ln(1 + e^-b) - ln(1 + e^-a) + (b - a) e^-a / (1 + e^-a) for logits (a, 0) of the teacher and (b, 0) of the student.
    let (a, b) = (20.0f64, 18.0f64);
    let exact = (-b).exp().ln_1p() - (-a).exp().ln_1p() + (b - a) * (-a).exp() / (1.0 + (-a).exp());
    let teacher = tensor(&[1, 2], &[a, 0.0]).cast(Dtype::F32).unwrap();
    let (got, _) = loss_of(&tensor(&[1, 2], &[b, 0.0]).cast(Dtype::F32).unwrap(), |z| z.distill_kl(&teacher, 1.0, Reduction::Batch));
    assert_relative_eq!(got, exact, max_relative = 1e-5);
}

#[test]
fn logits_of_ten_thousand_are_no_trouble() {
    let logits = [1e4, -1e4, 0.0, -1e4, 1e4, 1e4];
    for dtype in [Dtype::F32, Dtype::F64] {
        let z = tensor(&[2, 3], &logits).cast(dtype).unwrap();
        let flat = tensor(&[2, 3], &[0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
        let finite = |(loss, gradient): (f64, Vec<f64>)| {
            assert!(loss.is_finite() && gradient.iter().all(|g| g.is_finite()), "{loss} {gradient:?}");
            loss
        };
        let ln2 = std::f64::consts::LN_2;
        assert_relative_eq!(finite(loss_of(&z, |z| z.cross_entropy(&[0, 1], 0.0))), ln2 / 2.0, max_relative = 1e-6);
        assert_relative_eq!(finite(loss_of(&z, |z| z.cross_entropy(&[1, 0], 0.0))), 2e4 + ln2 / 2.0, max_relative = 1e-6);
        finite(loss_of(&z, |z| z.cross_entropy(&[0, 1], 0.1)));
        finite(loss_of(&z, |z| z.cross_entropy_soft(&flat)));
        assert_relative_eq!(
            finite(loss_of(&z, |z| z.bce(&tensor(&[2, 3], &[1., 0., 1., 0., 1., 0.]), false))),
            (ln2 + 1e4) / 6.0,
            max_relative = 1e-6
        );
        finite(loss_of(&z, |z| z.distill_kl(&flat, 1.0, Reduction::Batch)));
        finite(loss_of(&flat.cast(dtype).unwrap(), |x| x.distill_kl(&z, 1.0, Reduction::Batch)));
        assert_eq!(loss_of(&z, |x| x.distill_kl(&z, 1.0, Reduction::Batch)).0, 0.0);
        let p = Var::constant(z.clone()).softmax().unwrap().value().to_f64();
        assert_eq!(p, [1.0, 0.0, 0.0, 0.0, 0.5, 0.5]);
        let qkv: Vec<f64> = normal("qkv", &[1, 4, 24]).to_f64().iter().map(|x| 100.0 * x).collect();
        let qkv = tensor(&[1, 4, 24], &qkv).cast(dtype).unwrap();
        let other = normal("other", &[1, 4, 24]);
        finite(loss_of(&qkv, |x| Ok(x.relation_kl(&other, 2, &[Relation::Qk, Relation::Vv])?.0)));
        finite(loss_of(&other.cast(dtype).unwrap(), |x| Ok(x.relation_kl(&qkv, 2, &[Relation::Qk, Relation::Vv])?.0)));
    }
}

#[test]
fn losses_do_not_hide_a_nan() {
    let z = tensor(&[1, 3], &[1.0, f64::NAN, 0.0]);
    let flat = tensor(&[1, 3], &[0.2, 0.3, 0.5]);
    type Criterion<'a> = &'a dyn Fn(&Var) -> Result<Var>;
    let losses: [Criterion; 7] = [
        &|z| z.cross_entropy(&[0], 0.0),
        &|z| z.cross_entropy_soft(&flat),
        &|z| z.bce(&flat, true),
        &|z| z.distill_kl(&flat, 1.0, Reduction::Batch),
        &|z| z.feature_loss(&flat, Distance::L1),
        &|z| z.feature_loss(&flat, Distance::SmoothL1 { beta: 2.0 }),
        &|z| z.reshape(&[1, 1, 3])?.masked_mse(&flat.reshape(&[1, 1, 3])?, &tensor(&[1, 1], &[1.0])),
    ];
    for (i, loss) in losses.iter().enumerate() {
        assert!(loss(&Var::constant(z.clone())).unwrap().value().item().is_nan(), "{i}");
    }
}

#[test]
fn visible_patches_are_not_read() {
    let x = tensor(&[1, 2, 2], &[f64::NAN, f64::INFINITY, 1.0, 2.0]);
    let target = tensor(&[1, 2, 2], &[f64::NAN, 0.0, 0.0, 0.0]);
    let mask = tensor(&[1, 2], &[0.0, 1.0]);
    assert_eq!(loss_of(&x, |x| x.masked_mse(&target, &mask)), (2.5, vec![0.0, 0.0, 1.0, 2.0]));
    let smooth = Distance::SmoothL1 { beta: 2.0 };
    // 0.25 d^2 for d = 1, and d - 1 for d = 2: the branches meet there.
    assert_eq!(loss_of(&x, |x| x.feature_loss_at(&target, smooth, &mask)), (0.625, vec![0.0, 0.0, 0.25, 0.5]));
    let none = tensor(&[1, 2], &[0.0, 0.0]);
    let refused = Var::constant(x).masked_mse(&target, &none).err().unwrap().chain();
    assert!(refused.contains("masked_mse: the mask f64 [1, 2] counts no patch"), "{refused}");
}

#[test]
fn distances_follow_their_formulae() {
    let (x, zero) = (tensor(&[1, 4], &[0.0, -3.0, 1.0, 4.0]), tensor(&[1, 4], &[0.0; 4]));
    assert_eq!(loss_of(&x, |x| x.feature_loss(&zero, Distance::L1)), (2.0, vec![0.0, -0.25, 0.25, 0.25]));
    assert_eq!(loss_of(&x, |x| x.feature_loss(&zero, Distance::L2)), (6.5, vec![0.0, -1.5, 0.5, 2.0]));
    let smooth = Distance::SmoothL1 { beta: 2.0 };
    assert_eq!(loss_of(&x, |x| x.feature_loss(&zero, smooth)), (5.25 / 4.0, vec![0.0, -0.25, 0.125, 0.25]));
}

#[test]
fn classification_losses_follow_their_formulae() {
    let z = tensor(&[1, 2], &[0.0, 3.0f64.ln()]);
    let (nll, mean) = (4.0f64.ln(), (4.0f64.ln() + (4.0f64 / 3.0).ln()) / 2.0);
    assert_relative_eq!(loss_of(&z, |z| z.cross_entropy(&[0], 0.1)).0, 0.9 * nll + 0.1 * mean, max_relative = 1e-14);
    let targets = tensor(&[1, 2], &[0.0, 0.3]);
    let (plain, binary) = (loss_of(&z, |z| z.bce(&targets, false)).0, loss_of(&z, |z| z.bce(&targets, true)).0);
    let (hit, miss, none) = ((4.0f64 / 3.0).ln(), 4.0f64.ln(), 2.0f64.ln());
    assert_relative_eq!(plain, (none + 0.3 * hit + 0.7 * miss) / 2.0, max_relative = 1e-14);
    assert_relative_eq!(binary, (none + hit) / 2.0, max_relative = 1e-14);
    // Of equal teacher logits the first counts.
    let teacher = tensor(&[1, 3], &[1.0, 2.0, 2.0]);
    let z = tensor(&[1, 3], &[0.3, -0.2, 0.5]);
    assert_eq!(loss_of(&z, |z| z.hard_distill(&teacher)), loss_of(&z, |z| z.cross_entropy(&[1], 0.0)));
}

#[test]
fn batchnorm_puts_its_eps_beside_the_variance() {
    let (mean, variance) = (tensor(&[2], &[1.0, 0.0]), tensor(&[2], &[1e-6, 3e-6]));
    let x = Var::constant(tensor(&[1, 2], &[1.001, 0.002]));
    let y = x.batchnorm_given(&mean, &variance, 1e-6).unwrap().value().to_f64();
    assert_relative_eq!(y[0], 0.5f64.sqrt(), max_relative = 1e-9);
    assert_relative_eq!(y[1], 1.0, max_relative = 1e-12);
    let x = Var::constant(tensor(&[4, 1], &[0.0, 0.001, 0.002, 0.003]));
    let (y, batch) = x.batchnorm(1e-6).unwrap();
    assert_relative_eq!(batch.mean.item(), 0.0015, max_relative = 1e-12);
    assert_relative_eq!(batch.variance.item(), 1.25e-6, max_relative = 1e-12);
    assert_relative_eq!(y.value().to_f64()[0], -1.0, max_relative = 1e-12);
}

#[test]
fn rows_are_normalised_as_in_pytorch() {
    let x = Var::constant(tensor(&[3, 2], &[3.0, -4.0, 0.0, 0.0, 1e-13, 0.0]));
    let y = x.l2_normalise(1e-12).unwrap().value().to_f64();
    [0.6, -0.8, 0.0, 0.0, 0.1, 0.0].iter().zip(y).for_each(|(want, got)| assert_relative_eq!(got, *want, max_relative = 1e-14));
}

/// conv2d as the formula says it, one channel group of x for each output channel if `own`.
fn plain_convolution(x: &Tensor, w: &Tensor, bias: &Tensor, stride: usize, padding: usize, own: bool) -> Vec<f64> {
    let (xs, ws) = (x.shape(), w.shape());
    let (xd, wd, bd) = (x.to_f64(), w.to_f64(), bias.to_f64());
    let size = |n: usize, k: usize| (n + 2 * padding - k) / stride + 1;
    let (oh, ow) = (size(xs[2], ws[2]), size(xs[3], ws[3]));
    let mut y = Vec::new();
    for (b, o, i, j) in (0..xs[0]).flat_map(|b| (0..ws[0]).flat_map(move |o| (0..oh).flat_map(move |i| (0..ow).map(move |j| (b, o, i, j)))))
    {
        let mut sum = bd[o];
        for c in 0..ws[1] {
            for (u, v) in (0..ws[2]).flat_map(|u| (0..ws[3]).map(move |v| (u, v))) {
                let (r, s) = ((i * stride + u).wrapping_sub(padding), (j * stride + v).wrapping_sub(padding));
                if r < xs[2] && s < xs[3] {
                    let channel = if own { o } else { c };
                    sum += wd[((o * ws[1] + c) * ws[2] + u) * ws[3] + v] * xd[((b * xs[1] + channel) * xs[2] + r) * xs[3] + s];
                }
            }
        }
        y.push(sum);
    }
    y
}

fn assert_same(got: &Var, want: &[f64]) {
    let got = got.value().to_f64();
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).for_each(|(got, want)| assert_abs_diff_eq!(*got, *want, epsilon = 1e-12));
}

#[test]
fn convolutions_follow_their_formulae() {
    for (x, w, stride, padding) in [([2, 3, 7, 9], [4, 3, 3, 2], 2, 1), ([1, 2, 8, 8], [5, 2, 4, 4], 4, 0)] {
        let (x, w, bias) = (normal("x", &x), normal("w", &w), normal("bias", &[w[0]]));
        let y = Var::constant(x.clone()).conv2d(&Var::constant(w.clone()), Some(&Var::constant(bias.clone())), stride, padding).unwrap();
        assert_same(&y, &plain_convolution(&x, &w, &bias, stride, padding, false));
    }
    for (shape, k) in [([2, 3, 6, 37], 5), ([1, 2, 2, 3], 7), ([1, 1, 4, 16], 1)] {
        let (x, w, bias) = (normal("x", &shape), normal("w", &[shape[1], 1, k, k]), normal("bias", &[shape[1]]));
        let mask: Vec<f64> = (0..shape[0] * shape[2] * shape[3]).map(|i| (i % 4 > 0) as u8 as f64).collect();
        let plane = shape[2] * shape[3];
        let seen: Vec<f64> = x.to_f64().iter().enumerate().map(|(i, x)| x * mask[i / (plane * shape[1]) * plane + i % plane]).collect();
        let mask = tensor(&[shape[0], 1, shape[2], shape[3]], &mask);
        let (wv, bv) = (Var::constant(w.clone()), Var::constant(bias.clone()));
        let y = Var::constant(x.clone()).depthwise(&wv, Some(&bv), Some(&mask)).unwrap();
        assert_same(&y, &plain_convolution(&tensor(&shape, &seen), &w, &bias, 1, k / 2, true));
        let y = Var::constant(x.clone()).depthwise(&wv, Some(&bv), None).unwrap();
        assert_same(&y, &plain_convolution(&x, &w, &bias, 1, k / 2, true));
    }
}

#[test]
fn maps_and_tokens_are_the_same_numbers() {
    let x = Var::constant(normal("x", &[2, 37, 5, 8]));
    let tokens = x.to_tokens().unwrap();
    assert_eq!(tokens.shape(), [2, 40, 37]);
    assert_eq!(tokens.value().data::<f64>()[(40 + 11) * 37 + 3], x.value().data::<f64>()[(37 + 3) * 40 + 11]);
    assert_eq!(tokens.to_map(5, 8).unwrap().value().to_f64(), x.value().to_f64());
}

#[test]
fn heads_that_are_split_and_multiplied_make_attention() {
    let qkv = Var::constant(normal("qkv", &[2, 6, 24]));
    let [q, k, v] = &qkv.split_heads(3, 2).unwrap()[..] else { panic!("three parts") };
    assert_eq!(q.shape(), [2, 2, 6, 4]);
    let p = q.scale(0.5).unwrap().bmm_nt(k).unwrap().softmax().unwrap();
    let y = p.bmm(v).unwrap().merge_heads().unwrap();
    assert_same(&y, &qkv.attention(2).unwrap().value().to_f64());
    let same = Var::constant(tensor(&[2, 2], &[1.0, 0.0, 0.0, 1.0]));
    let mixed = p.mix_heads(&same, &Var::constant(tensor(&[2], &[0.0, 0.0]))).unwrap();
    assert_same(&mixed, &p.value().to_f64());
    let turned = Var::constant(tensor(&[1, 2], &[2.0, -1.0]));
    let mixed = p.mix_heads(&turned, &Var::constant(tensor(&[1], &[0.5]))).unwrap();
    let p = p.value().to_f64();
    let want: Vec<f64> = (0..72).map(|i| 2.0 * p[i / 36 * 72 + i % 36] - p[i / 36 * 72 + 36 + i % 36] + 0.5).collect();
    assert_same(&mixed, &want);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let on = |threads: usize| {
        let run = || {
            let mut bits = Vec::new();
            for case in ops::cases() {
                let tape = Tape::new();
                let inputs: Vec<Var> = case.tensors(Dtype::F32).unwrap().into_iter().map(|input| tape.leaf(input)).collect();
                let y = (case.run)(&inputs).unwrap();
                let gradients = tape.backward_from(&y, y.value().clone(), &mut []).unwrap();
                let all = std::iter::once(y.value()).chain(inputs.iter().filter_map(|input| gradients.of(input)));
                let all: Vec<u32> = all.flat_map(|tensor| tensor.data::<f32>().iter().map(|x| x.to_bits())).collect();
                bits.push((case.name, all));
            }
            bits
        };
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)
    };
    for ((name, one), (_, three)) in on(1).into_iter().zip(on(3)) {
        assert!(one == three, "{name}");
    }
}

#[test]
fn wrong_shapes_are_refused_with_both_of_them() {
    let refusals: Vec<(Result<Var>, [&str; 3])> = vec![
        (var(&[2, 3, 4]).masked_mse(&zeros(&[2, 3, 5]), &zeros(&[2, 3])), ["masked_mse:", "[2, 3, 5]", "[2, 3, 4]"]),
        (var(&[2, 3, 4]).masked_mse(&zeros(&[2, 3, 4]), &zeros(&[3, 2])), ["masked_mse:", "[3, 2]", "[2, 3, 4]"]),
        (var(&[2, 3]).cross_entropy(&[0, 1, 2], 0.0), ["cross_entropy:", "[3]", "[2, 3]"]),
        (var(&[2, 3]).cross_entropy(&[0, 3], 0.0), ["cross_entropy:", "label 3", "3 classes"]),
        (var(&[2, 3]).cross_entropy(&[0, 1], 1.5), ["cross_entropy:", "1.5", "[0, 1]"]),
        (var(&[2, 3]).cross_entropy_soft(&zeros(&[2, 4])), ["cross_entropy:", "[2, 4]", "[2, 3]"]),
        (var(&[2, 3]).bce(&zeros(&[3, 2]), false), ["bce:", "[3, 2]", "[2, 3]"]),
        (var(&[2, 3]).distill_kl(&zeros(&[2, 4]), 1.0, Reduction::Batch), ["distill_kl:", "[2, 4]", "[2, 3]"]),
        (var(&[2, 3]).distill_kl(&zeros(&[2, 3]), 0.0, Reduction::Batch), ["distill_kl:", "temperature is 0", "above 0"]),
        (var(&[2, 3]).hard_distill(&zeros(&[1, 3])), ["hard_distill:", "[1, 3]", "[2, 3]"]),
        (var(&[2, 3]).feature_loss(&zeros(&[2, 4]), Distance::L1), ["feature_loss:", "[2, 4]", "[2, 3]"]),
        (var(&[2, 3]).feature_loss_at(&zeros(&[2, 3]), Distance::L2, &zeros(&[3])), ["feature_loss:", "[3]", "[2, 3]"]),
        (var(&[2, 0]).softmax(), ["softmax:", "[2, 0]", "empty"]),
        (var(&[2, 0]).l2_normalise(1e-12), ["l2_normalise:", "[2, 0]", "empty"]),
        (
            var(&[1, 4, 12]).relation_kl(&zeros(&[1, 5, 12]), 2, &[Relation::Qk]).map(|(loss, _)| loss),
            ["relation_kl:", "[1, 4, 12]", "[1, 5, 12]"],
        ),
        (
            var(&[1, 4, 12]).relation_kl(&zeros(&[1, 4, 18]), 4, &[Relation::Qk]).map(|(loss, _)| loss),
            ["relation_kl:", "[1, 4, 18]", "4 heads"],
        ),
        (var(&[1, 3, 4, 4]).conv2d(&var(&[2, 4, 2, 2]), None, 1, 0), ["conv2d:", "[2, 4, 2, 2]", "[1, 3, 4, 4]"]),
        (var(&[1, 3, 4, 4]).conv2d(&var(&[2, 3, 5, 5]), None, 1, 0), ["conv2d:", "[2, 3, 5, 5]", "[1, 3, 4, 4]"]),
        (var(&[1, 3, 4, 4]).conv2d(&var(&[2, 3, 2, 2]), Some(&var(&[3])), 1, 0), ["conv2d:", "[3]", "[2]"]),
        (var(&[1, 3, 4, 4]).depthwise(&var(&[3, 1, 4, 4]), None, None), ["depthwise:", "[3, 1, 4, 4]", "[1, 3, 4, 4]"]),
        (var(&[1, 3, 4, 4]).depthwise(&var(&[3, 1, 3, 3]), None, Some(&zeros(&[1, 4, 5]))), ["depthwise:", "[1, 4, 5]", "[1, 3, 4, 4]"]),
        (var(&[1, 12, 5]).to_map(3, 5), ["to_map:", "[1, 12, 5]", "[3, 5]"]),
        (var(&[2, 3, 4]).bmm(&var(&[2, 3, 4])), ["bmm:", "a is f32 [2, 3, 4]", "b is f32 [2, 3, 4]"]),
        (var(&[2, 3, 4]).bmm_nt(&var(&[3, 3, 4])), ["bmm_nt:", "[2, 3, 4]", "[3, 3, 4]"]),
        (var(&[2, 3, 10]).take_heads(0, 3, 2), ["take_heads:", "[2, 3, 10]", "2 heads"]),
        (var(&[1, 3, 4, 4]).mix_heads(&var(&[3, 4]), &var(&[3])), ["mix_heads:", "[3, 4]", "[1, 3, 4, 4]"]),
        (var(&[1, 3, 4, 4]).mix_heads(&var(&[4, 3]), &var(&[3])), ["mix_heads:", "[3]", "[4, 3]"]),
        (var(&[1, 3]).batchnorm(1e-6).map(|(y, _)| y), ["batchnorm:", "[1, 3]", "two images"]),
        (var(&[2, 3]).batchnorm_given(&zeros(&[3]), &zeros(&[4]), 1e-6), ["batchnorm_given:", "[4]", "[2, 3]"]),
        (Var::weighted_sum(&[(1.0, &var(&[])), (1.0, &var(&[2]))]), ["weighted_sum:", "f32 [2]", "f32 []"]),
        (Var::weighted_sum(&[]), ["weighted_sum:", "no losses", "add"]),
    ];
    for (i, (result, parts)) in refusals.into_iter().enumerate() {
        let message = result.err().unwrap_or_else(|| panic!("refusal {i}, {parts:?}, was accepted")).chain();
        assert!(parts.iter().all(|part| message.contains(part)), "{i}: {message}, wanted {parts:?}");
    }
}
