//! Results do not depend on the number of threads, nor on the run.

use masque::methods::mae::{Mae, MaeConfig};
use masque::methods::{Batch, Method};
use masque::nn::decoder::DecoderConfig;
use masque::nn::vit::VitConfig;
use masque::ops::{self, case::Case};
use masque::optim::{Optimizer, adamw::AdamW, groups};
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::tensor::{Dtype, Tensor};

const THREADS: [usize; 3] = [1, 2, 4];

fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    tensor.to_f64().into_iter().map(f64::to_bits).collect()
}

/// All parameters after three updates.
fn trained() -> Vec<(String, Vec<u64>)> {
    let rng = Rng::new(3);
    let encoder = VitConfig::new(64, 8, 96, 2, 4);
    let decoder = DecoderConfig { width: 64, depth: 1, heads: 4 };
    let mut mae = Mae::new(MaeConfig { encoder, decoder, mask_ratio: 0.5, norm_pix: Some(1e-6) }, Dtype::F32, &rng).unwrap();
    let mut adamw = AdamW::new(groups::by_decay(&mae.params, 0.05, &[]), (0.9, 0.95), 1e-8).unwrap();
    for step in 0..3 {
        let rng = rng.at(step);
        let images = Tensor::from_slice(&[8, 3, 64, 64], &rng.normal("images", 8 * 3 * 64 * 64)).unwrap();
        let tape = Tape::new();
        let loss = mae.loss(&tape, &Batch::of_images(images), &rng).unwrap();
        mae.params.clear_gradients();
        tape.backward(&loss.total, &mut [&mut mae.params]).unwrap();
        adamw.step(&mut mae.params, 1e-3).unwrap();
    }
    let params = &mae.params;
    params.ids().map(|id| (params.name(id).to_string(), bits(params.value(id)))).collect()
}

#[test]
fn training_is_the_same_bit_for_bit_with_any_number_of_threads_and_in_every_run() {
    let first = with_threads(1, trained);
    for threads in THREADS {
        for ((name, want), (_, got)) in first.iter().zip(with_threads(threads, trained)) {
            assert!(*want == got, "{name} differs with {threads} threads");
        }
    }
}

/// Output and gradients of a case, as bits.
fn results(case: &Case, dtype: Dtype) -> Vec<Vec<u64>> {
    let tape = Tape::new();
    let inputs: Vec<Var> = case.tensors(dtype).unwrap().into_iter().map(|input| tape.leaf(input)).collect();
    let y = (case.run)(&inputs).unwrap();
    let upstream = Tensor::from_slice(y.shape(), &ops::case::numbers("upstream", 0, y.shape())).unwrap();
    let gradients = tape.backward_from(&y, upstream.cast(dtype).unwrap(), &mut []).unwrap();
    let of = |input: &Var| gradients.of(input).map_or_else(Vec::new, bits);
    std::iter::once(bits(y.value())).chain(inputs.iter().map(of)).collect()
}

#[test]
fn every_op_is_the_same_bit_for_bit_with_any_number_of_threads() {
    let all = || -> Vec<(String, Vec<Vec<u64>>)> {
        let cases = ops::cases();
        let of = |case: &Case| [Dtype::F32, Dtype::F64].map(|dtype| results(case, dtype)).concat();
        cases.iter().map(|case| (case.name.clone(), of(case))).collect()
    };
    let first = with_threads(1, all);
    for threads in THREADS {
        for ((name, want), (_, got)) in first.iter().zip(with_threads(threads, all)) {
            assert!(*want == got, "{name} differs with {threads} threads");
        }
    }
}
