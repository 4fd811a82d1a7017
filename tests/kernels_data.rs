//! The kernels that are no ops, histogram targets and batches of bytes: on the emulated device they give the CPU's numbers, bit for bit, in any order of
//! threads and blocks; on a CUDA device too where there is one.
#![cfg(feature = "emulated")]

use masque::data::augment::{Augment, Erase, Fill, Mix, levels, prepare};
use masque::data::mixup::{CutBox, cutmix_box};
use masque::data::resize::{IMAGENET_MEAN, IMAGENET_STD};
use masque::device::emulated::{Copies, Order};
use masque::device::gpu::Gpu;
use masque::masking::blockwise::{self, Blocks};
use masque::rng::Rng;
use masque::targets::hog::{self, Options};
use masque::tensor::{Device, Dtype, Tensor};

fn bytes(name: &str, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    let bytes: Vec<u8> = Rng::new(1).uniform(name, n).unwrap().into_iter().map(|x| (x * 256.0) as u8).collect();
    Tensor::from_slice(shape, &bytes).unwrap()
}

fn normal(name: &str, shape: &[usize]) -> Tensor {
    Tensor::from_slice(shape, &Rng::new(2).normal(name, shape.iter().product())).unwrap()
}

/// What `f` gives on the CPU must be what it gives on every other device.
fn the_same_everywhere(what: &str, f: impl Fn(&Device) -> Vec<Tensor>) {
    let want = f(&Device::Cpu);
    let compare = |device: &Device, order: &str| {
        for (i, (want, got)) in want.iter().zip(f(device)).enumerate() {
            let got = got.on(&Device::Cpu).unwrap();
            assert_eq!((want.shape(), want.dtype()), (got.shape(), got.dtype()), "{what}: tensor {i}");
            let differ = want.to_f64().iter().zip(got.to_f64()).position(|(a, b)| a.to_bits() != b.to_bits());
            let shown = differ.map(|at| (at, want.to_f64()[at], got.to_f64()[at]));
            assert_eq!(shown, None, "{what}: tensor {i} {order}: (place, CPU, {device})");
        }
    };
    let gpu = Gpu::emulated().unwrap();
    for (seed, copies) in [(0, Copies::Late), (0, Copies::Early), (1, Copies::ByChance), (2, Copies::ByChance), (3, Copies::ByChance)] {
        gpu.as_emulated().unwrap().order(Order { seed, copies });
        compare(&Device::Gpu(gpu.clone()), &format!("seed {seed}"));
    }
    match Gpu::cuda(0) {
        Ok(gpu) => compare(&Device::Gpu(gpu), ""),
        Err(error) => println!("skipped: no CUDA device: {}", error.chain()),
    }
}

#[test]
fn histogram_targets_are_the_cpus() {
    let images = [bytes("wide", &[2, 32, 48, 3]), bytes("one patch", &[1, 16, 16, 3]), bytes("grey", &[3, 48, 16, 1])];
    let planes = [normal("colour", &[2, 3, 32, 16]), normal("five channels", &[1, 5, 16, 48]), bytes("whole", &[1, 3, 16, 32])];
    let planes = planes.map(|planes| planes.cast(Dtype::F32).unwrap());
    let small = [Options::dmjd(), Options::maskfeat()].map(|options| Options { cell: 4, ..options });
    for options in [Options::dmjd(), Options::maskfeat()].into_iter().chain(small) {
        for images in images.iter().chain(&planes) {
            the_same_everywhere(&format!("{:?} in cells of {} of {images:?}", options.variant, options.cell), |device| {
                let images = images.on(device).unwrap();
                let features = hog::features(&images, &options).unwrap();
                vec![features.histograms, features.normalised, features.target, hog::target(&images, &options).unwrap()]
            });
        }
    }
}

#[test]
fn keys_of_blocks_of_random_sizes_are_the_cpus() {
    for (grid, hide, batch) in [([14, 14], 78, 35), ([6, 6], 14, 3), ([4, 9], 35, 2), ([1, 5], 2, 1)] {
        let blocks = Blocks { grid, hide, least: blockwise::least_block(hide) };
        let width = blockwise::noise_each(grid);
        let noise = Tensor::from_slice(&[batch, width], &Rng::new(4).uniform("mask", batch * width).unwrap()).unwrap();
        the_same_everywhere(&format!("{hide} patches of {grid:?}"), |device| {
            vec![blockwise::keys(&noise.on(device).unwrap(), blocks).unwrap()]
        });
    }
}

#[test]
fn a_gpu_says_which_histograms_it_has_not() {
    let device = Device::Gpu(Gpu::emulated().unwrap());
    let images = Tensor::zeros_on(&device, &[1, 3, 16, 16], Dtype::F32).unwrap();
    let error = hog::target(&images, &Options { bins: 12, ..Options::dmjd() }).unwrap_err().chain();
    assert!(error.contains("12 in cells of 8"), "{error}");
    let images = Tensor::zeros_on(&device, &[1, 3, 16, 16], Dtype::Bf16).unwrap();
    assert!(hog::target(&images, &Options::dmjd()).unwrap_err().chain().contains("f32 or u8"));
}

/// So many boxes an image: none, some inside and some at an edge, one over the other.
fn boxes(batch: usize, each: usize, [h, w]: [usize; 2]) -> Tensor {
    let one = |i: usize| match i % 3 {
        0 => [0, 0, 0, 0],
        1 => [h / 3, w / 4, h / 2, w / 2],
        _ => [h - 2, 0, 2, w],
    };
    let all: Vec<u32> = (0..batch * each).flat_map(|i| one(i / each + 2 * (i % each))).map(|x| x as u32).collect();
    Tensor::from_slice(&[batch, each, 4], &all).unwrap()
}

/// ImageNet's mean and deviation for three channels, others for others.
fn levels_of(channels: usize) -> Tensor {
    let other = |first: f32| (0..channels).map(|c| first + 0.07 * c as f32).collect::<Vec<f32>>();
    if channels == 3 {
        return levels(&IMAGENET_MEAN, &IMAGENET_STD, &Device::Cpu).unwrap();
    }
    levels(&other(0.1), &other(0.2), &Device::Cpu).unwrap()
}

fn augmented_like_the_cpus(batch: usize, channels: usize, each: usize, [h, w]: [usize; 2], mix: Mix) {
    let (bytes, boxes, levels) = (bytes("batch", &[batch, h, w, channels]), boxes(batch, each, [h, w]), levels_of(channels));
    let (by_channel, by_pixel) = (normal("channels", &[batch, each, channels]), normal("pixels", &[batch, channels, h, w]));
    for (dtype, fill) in [(Dtype::F32, 0), (Dtype::F32, 1), (Dtype::F32, 2), (Dtype::F32, 3), (Dtype::Bf16, 3)] {
        let what = format!("{batch} images of {h} x {w} x {channels}, {mix:?}, {each} boxes, fill {fill}, {dtype}");
        the_same_everywhere(&what, |device| {
            let [boxes, by_channel, by_pixel] = [&boxes, &by_channel, &by_pixel].map(|x| x.on(device).unwrap());
            let fills = [Fill::Zero, Fill::Channels(&by_channel), Fill::Pixels(&by_pixel)];
            let erase = (fill > 0).then(|| Erase { boxes: &boxes, fill: fills[fill - 1] });
            let mut out = Tensor::empty_on(device, &[batch, channels, h, w], dtype).unwrap();
            prepare(&bytes.on(device).unwrap(), &levels.on(device).unwrap(), &Augment { erase, mix }, &mut out).unwrap();
            vec![out]
        });
    }
}

#[test]
fn augmented_batches_are_the_cpus() {
    // Pixels in fours and not, more pixels than a block has, an odd batch.
    for (batch, h, w) in [(4, 10, 14), (2, 7, 9), (6, 36, 40), (3, 6, 6)] {
        let (cut, _) = cutmix_box(h, w, 0.6, h / 2, w - 2).unwrap();
        let mixes = [Mix::None, Mix::Mixup(0.37), Mix::Mixup(1.0), Mix::Cutmix(cut), Mix::Cutmix(CutBox { y0: 1, y1: 1, x0: 0, x1: w })];
        for mix in mixes.into_iter().filter(|mix| batch % 2 == 0 || *mix == Mix::None) {
            augmented_like_the_cpus(batch, 3, 1, [h, w], mix);
        }
    }
}

#[test]
fn any_number_of_channels_and_boxes_gives_the_cpus_batches() {
    let cut = CutBox { y0: 2, y1: 5, x0: 1, x1: 6 };
    for (channels, each) in [(1, 1), (1, 3), (3, 3), (4, 2), (7, 1), (16, 3)] {
        for (size, mix) in [([6, 8], Mix::Mixup(0.37)), ([7, 9], Mix::Cutmix(cut)), ([34, 36], Mix::None)] {
            augmented_like_the_cpus(4, channels, each, size, mix);
        }
    }
}

#[test]
fn batches_that_do_not_fit_are_errors_on_a_gpu() {
    let device = Device::Gpu(Gpu::emulated().unwrap());
    let batch = Tensor::zeros_on(&device, &[3, 4, 4, 3], Dtype::U8).unwrap();
    let beside = levels_of(3).on(&device).unwrap();
    let run_with = |levels: &Tensor, augment: &Augment, device: &Device, dtype| {
        let mut out = Tensor::empty_on(device, &[3, 3, 4, 4], dtype).unwrap();
        prepare(&batch, levels, augment, &mut out).map_err(|error| error.chain())
    };
    let run = |augment: &Augment, device: &Device, dtype| run_with(&beside, augment, device, dtype);
    assert_eq!(run(&Augment::default(), &device, Dtype::F32), Ok(()));
    let odd = run(&Augment { mix: Mix::Mixup(0.5), ..Augment::default() }, &device, Dtype::F32).unwrap_err();
    assert!(odd.contains("a batch of 3 cannot be paired"), "{odd}");
    assert!(run(&Augment { mix: Mix::Mixup(f64::NAN), ..Augment::default() }, &device, Dtype::F32).is_err());
    assert!(run(&Augment::default(), &Device::Cpu, Dtype::F32).is_err());
    assert!(run(&Augment::default(), &device, Dtype::U32).is_err());
    for levels in [levels_of(3), levels_of(4).on(&device).unwrap()] {
        assert!(run_with(&levels, &Augment::default(), &device, Dtype::F32).unwrap_err().contains("f32 [2, C] is needed beside it"));
    }
    let boxes = Tensor::zeros(&[3, 1, 4], Dtype::U32).unwrap();
    assert!(run(&Augment { erase: Some(Erase { boxes: &boxes, fill: Fill::Zero }), mix: Mix::None }, &device, Dtype::F32).is_err());
}
