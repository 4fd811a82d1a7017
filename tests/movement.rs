//! Masks, selections and token movement on the emulated device against the CPU: the same numbers bit for bit, in any order of blocks and threads.
#![cfg(feature = "emulated")]

use masque::device::emulated::{Copies, Order};
use masque::device::gpu::Gpu;
use masque::device::launch::Versions;
use masque::error::{Error, Result};
use masque::masking::disjoint::{Disjoint, Rates};
use masque::masking::{self, Arrangement, Keys, Mask};
use masque::nn::vit::{Position, Tokens, Vit, VitConfig};
use masque::nn::{Scope, Start};
use masque::ops::gather::{self, gather_patches};
use masque::ops::regions::{Layout, Regions, Seen};
use masque::param::ParamsBuilder;
use masque::rng::Rng;
use masque::tape::{Tape, Var};
use masque::targets::pixels;
use masque::tensor::{Device, Dtype, Tensor};

fn emulated() -> (Gpu, Device) {
    let gpu = Gpu::emulated().unwrap();
    (gpu.clone(), Device::Gpu(gpu))
}

fn here(x: &Tensor) -> Tensor {
    x.on(&Device::Cpu).unwrap()
}

/// Runs `f` in several orders and, where there are any, in every version.
fn in_all_orders(gpu: &Gpu, versions: Option<&Versions>, f: impl Fn(&str)) {
    for &version in versions.map_or(&[""][..], |versions| versions.all) {
        versions.map_or(Ok(()), |versions| gpu.choose(versions, version)).unwrap();
        for seed in 0..4 {
            gpu.as_emulated().unwrap().order(Order { seed, copies: Copies::Late });
            f(&format!("{version}, order {seed}"));
        }
    }
}

fn same(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!((got.shape(), got.dtype()), (want.shape(), want.dtype()), "{what}");
    let (got, want) = (here(got).to_f64(), here(want).to_f64());
    let other = got.iter().zip(&want).position(|(got, want)| got.to_bits() != want.to_bits());
    assert!(other.is_none(), "{what}: number {other:?} is {:?} and not {:?}", other.map(|i| got[i]), other.map(|i| want[i]));
}

fn same_masks(got: &Mask, want: &Mask, what: &str) {
    let pairs = [(&got.shuffle, &want.shuffle), (&got.restore, &want.restore), (&got.kept, &want.kept), (&got.hidden, &want.hidden)];
    pairs.iter().for_each(|(got, want)| same(got, want, what));
    assert_eq!((got.images(), got.kept_each(), got.hidden_each()), (want.images(), want.kept_each(), want.hidden_each()), "{what}");
}

#[test]
fn random_masks_are_those_of_the_cpu() {
    let (gpu, device) = emulated();
    for (b, l, keep) in [(1, 1, 1), (2, 2, 0), (3, 37, 9), (2, 64, 64), (5, 196, 49), (1, 1030, 300)] {
        let noise = Tensor::from_slice(&[b, l], &Rng::new(3).uniform("noise", b * l).unwrap()).unwrap();
        let want = masking::random(&noise, keep).unwrap();
        in_all_orders(&gpu, Some(&masking::VERSIONS), |version| {
            let got = masking::random(&noise.on(&device).unwrap(), keep).unwrap();
            same_masks(&got, &want, &format!("{b} x {l}, {version}"));
        });
    }
}

#[test]
fn thousands_of_patches_are_sorted_too() {
    let (_, device) = emulated();
    let noise: Vec<f32> = (0..4096u32).map(|i| (i.wrapping_mul(2654435761) >> 22) as f32 - 512.0).collect();
    let noise = Tensor::from_slice(&[1, 4096], &noise).unwrap();
    same_masks(&masking::random(&noise.on(&device).unwrap(), 1000).unwrap(), &masking::random(&noise, 1000).unwrap(), "4096 patches");
    let most = Tensor::zeros(&[1, 1 << 16], Dtype::F32).unwrap();
    assert!(refused(masking::random(&most.on(&device).unwrap(), 1)).contains("shared memory"));
}

#[test]
fn equal_noises_keep_raster_order_and_what_is_no_number_comes_last() {
    let (gpu, device) = emulated();
    let ties = Tensor::from_slice(&[1, 7], &[0.5f32, 0.0, -f32::INFINITY, 0.5, -0.0, f32::INFINITY, -1e-40]).unwrap();
    let broken = Tensor::from_slice(&[1, 5], &[0.5f32, f32::NAN, f32::INFINITY, -f32::NAN, -1.0]).unwrap();
    in_all_orders(&gpu, Some(&masking::VERSIONS), |version| {
        let got = masking::random(&ties.on(&device).unwrap(), 3).unwrap();
        assert_eq!(here(&got.shuffle).data::<u32>(), [2, 6, 1, 4, 0, 3, 5], "{version}");
        same_masks(&got, &masking::random(&ties, 3).unwrap(), version);
        let got = masking::random(&broken.on(&device).unwrap(), 2).unwrap();
        assert_eq!(here(&got.shuffle).data::<u32>(), [4, 0, 2, 1, 3], "{version}");
    });
    assert!(masking::random(&broken, 2).unwrap_err().to_string().contains("patch 1"));
}

#[test]
fn disjoint_views_are_those_of_the_cpu() {
    let (gpu, device) = emulated();
    for (grid, side, corruption, prediction, views) in [
        ([14, 14], 2, 0.6, 1.0, 2),
        ([14, 14], 1, 0.75, 1.0, 4),
        ([4, 10], 2, 0.4, 1.0, 3),
        ([3, 5], 1, 0.3, 0.3, 2),
        ([2, 6], 2, 0.5, 0.9, 1),
        ([24, 24], 1, 0.9, 0.95, 3),
    ] {
        let plan = Disjoint::new(grid, side, Rates { corruption, prediction, views }).unwrap();
        let rng = Rng::new(9);
        let want = plan.draw(3, &Device::Cpu, &rng).unwrap();
        in_all_orders(&gpu, None, |order| {
            let got = plan.draw(3, &device, &rng).unwrap();
            same_masks(&got, &want, &format!("{grid:?}, units of {side}, {views} views{order}"));
        });
    }
}

/// Regions of which some are there, on a device.
fn regions(device: &Device, layout: Layout, seen: bool) -> Regions {
    let kept = Tensor::from_slice(&[2, 3], &[4u32, 0, 5, 2, 1, 3]).unwrap().on(device).unwrap();
    let places = Tensor::from_slice(&[2, 6], &[1u32, 3, 4, 5, 0, 2, 5, 1, 0, 2, 4, 3]).unwrap().on(device).unwrap();
    Regions { grid: [2, 3], layout, seen: if seen { Seen::Only { kept, places } } else { Seen::All } }
}

#[test]
fn tokens_of_regions_are_those_of_the_cpu() {
    let (gpu, device) = emulated();
    for (side, cell) in [(4, 2), (2, 2), (6, 3), (4, 1), (1, 1)] {
        for seen in [false, true] {
            let of = |device: &Device| regions(device, Layout { side, cell }, seen).tokens_of(2, device).unwrap();
            let want = of(&Device::Cpu);
            in_all_orders(&gpu, None, |order| same(&of(&device), &want, &format!("side {side}, cells of {cell}, {seen}{order}")));
        }
    }
}

#[test]
fn the_most_attended_patches_are_those_of_the_cpu() {
    let (gpu, device) = emulated();
    for (b, heads, extra, n, keep) in [(2, 3, 1, 37, 11), (1, 12, 2, 196, 98), (3, 1, 0, 5, 5), (2, 2, 1, 4, 0)] {
        // Few different numbers, so that there are ties.
        let uniform = Rng::new(4).uniform("rows", b * heads * (extra + n)).unwrap();
        let rows: Vec<f32> = uniform.iter().map(|u| (u * 50.0).floor() / (60.0 * (extra + n) as f32)).collect();
        let rows = Tensor::from_slice(&[b, heads, extra + n], &rows).unwrap();
        for keys in [Keys::All, Keys::Patches] {
            for arrangement in [Arrangement::Falling, Arrangement::Raster] {
                let want = masking::most_attended(&rows, extra, keep, keys, arrangement).unwrap();
                in_all_orders(&gpu, None, |order| {
                    let what = format!("{n} patches, {keys:?}, {arrangement:?}{order}");
                    let got = masking::most_attended(&rows.on(&device).unwrap(), extra, keep, keys, arrangement).unwrap();
                    same(&got.kept, &want.kept, &what);
                    same(&got.saliency, &want.saliency, &what);
                    same(&masking::top(&got.saliency, keep, arrangement).unwrap(), &want.kept, &what);
                });
            }
        }
    }
}

fn images(shape: [usize; 4]) -> Tensor {
    Tensor::from_slice(&shape, &Rng::new(9).normal("images", shape.iter().product())).unwrap()
}

#[test]
fn patches_come_in_the_wanted_type_in_one_pass() {
    let (gpu, device) = emulated();
    let ids = Tensor::from_slice(&[2, 3], &[5u32, 0, 2, 1, 4, 3]).unwrap();
    let views = Tensor::from_slice(&[4, 2], &[5u32, 0, 2, 1, 4, 3, 0, 5]).unwrap();
    for (channels, h, w, patch) in [(3, 16, 24, (8, 8)), (1, 32, 48, (16, 16)), (3, 28, 42, (14, 14)), (2, 8, 15, (4, 5))] {
        let images = images([2, channels, h, w]);
        for ids in [None, Some(&ids), Some(&views)] {
            let want = gather_patches(&images, patch, ids, Dtype::F32).unwrap();
            let rounded = want.cast(Dtype::Bf16).unwrap();
            in_all_orders(&gpu, Some(&gather::VERSIONS), |version| {
                let (there, what) = (images.on(&device).unwrap(), format!("{patch:?}, {version}"));
                same(&gather_patches(&there, patch, ids, Dtype::F32).unwrap(), &want, &what);
                same(&gather_patches(&there, patch, ids, Dtype::Bf16).unwrap(), &rounded, &what);
                same(&gather_patches(&there.cast(Dtype::Bf16).unwrap(), patch, ids, Dtype::Bf16).unwrap(), &rounded, &what);
            });
        }
    }
    let both = gather_patches(&images([2, 1, 4, 6]), (2, 2), Some(&views), Dtype::F32).unwrap();
    for (view, ids) in views.data::<u32>().chunks_exact(4).enumerate() {
        let ids = Tensor::from_slice(&[2, 2], ids).unwrap();
        let alone = gather_patches(&images([2, 1, 4, 6]), (2, 2), Some(&ids), Dtype::F32).unwrap();
        assert_eq!(both.data::<f32>()[view * 16..(view + 1) * 16], *alone.data::<f32>());
    }
    let bytes = Tensor::from_slice(&[1, 1, 2, 2], &[0u8, 7, 255, 3]).unwrap().on(&device).unwrap();
    assert_eq!(here(&gather_patches(&bytes, (2, 2), None, Dtype::Bf16).unwrap()).to_f64(), [0.0, 7.0, 255.0, 3.0]);
}

#[test]
fn pixel_targets_are_those_of_the_cpu() {
    let (gpu, device) = emulated();
    for (channels, h, w, patch) in [(3, 16, 32, 8), (1, 6, 9, 3)] {
        let images = images([2, channels, h, w]);
        let rounded = images.cast(Dtype::Bf16).unwrap().cast(Dtype::F32).unwrap();
        let (plain, want) =
            (pixels::patchify(&images, patch).unwrap(), pixels::targets(&images, patch, Some(pixels::EPS)).unwrap().to_f64());
        in_all_orders(&gpu, None, |order| {
            let there = images.on(&device).unwrap();
            let patches = pixels::patchify(&there, patch).unwrap();
            same(&patches, &plain, order);
            same(&pixels::patchify(&there.cast(Dtype::Bf16).unwrap(), patch).unwrap(), &pixels::patchify(&rounded, patch).unwrap(), order);
            same(&pixels::unpatchify(&patches, [2, channels, h, w], patch).unwrap(), &images, order);
            let got = here(&pixels::targets(&there, patch, Some(pixels::EPS)).unwrap()).to_f64();
            got.iter().zip(&want).for_each(|(got, want)| assert!((got - want).abs() <= 2e-6, "{got} is not {want}"));
        });
    }
    let one = Tensor::zeros(&[1, 1, 2, 2], Dtype::F32).unwrap().on(&device).unwrap();
    assert!(pixels::targets(&one, 1, Some(pixels::EPS)).unwrap_err().to_string().contains("no variance"));
}

#[test]
fn flat_and_nearly_flat_bright_patches_keep_their_digits() {
    let (_, device) = emulated();
    let flat = Tensor::full_on(&device, &[1, 3, 16, 16], Dtype::F32, 2.64).unwrap();
    assert!(here(&pixels::targets(&flat, 16, Some(pixels::EPS)).unwrap()).to_f64().iter().all(|&x| x == 0.0));
    let bright: Vec<f32> = (0..768).map(|i| 1000.0 + (i % 2) as f32 * 0.0078125).collect();
    let bright = Tensor::from_slice(&[1, 3, 16, 16], &bright).unwrap();
    let want = pixels::targets(&bright, 16, Some(pixels::EPS)).unwrap().to_f64();
    let got = here(&pixels::targets(&bright.on(&device).unwrap(), 16, Some(pixels::EPS)).unwrap()).to_f64();
    got.iter().zip(&want).for_each(|(got, want)| assert!((got - want).abs() <= 1e-6, "{got} is not {want}"));
}

fn refused<R>(result: Result<R>) -> String {
    result.err().expect("it is refused").chain()
}

#[test]
fn a_bad_id_on_the_device_is_an_error_that_names_the_thread_and_harms_nothing() {
    let (_, device) = emulated();
    let x = Var::constant(Tensor::full_on(&device, &[2, 5, 8], Dtype::F32, 1.0).unwrap());
    let ids = |last: u32| Tensor::from_slice(&[2, 3], &[4u32, 0, 2, 2, 1, last]).unwrap();
    let error = refused(x.gather(&ids(5).on(&device).unwrap()));
    for part in ["gather_fwd_v2_f32", "index 5 is outside 0..5", "block", "thread"] {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
    assert!(x.gather(&ids(u32::MAX).on(&device).unwrap()).is_err());
    assert!(refused(x.gather(&ids(5))).contains("image 1 asks for token 5"));
    let table = Var::constant(Tensor::full_on(&device, &[5, 8], Dtype::F32, 1.0).unwrap());
    let three = x.gather(&ids(3).on(&device).unwrap()).unwrap();
    assert!(refused(three.add_positions(&table, 0, Some(&ids(7).on(&device).unwrap()))).contains("add_positions_fwd_f32"));
    let images = images([2, 1, 2, 10]).on(&device).unwrap();
    assert!(refused(gather_patches(&images, (2, 2), Some(&ids(9).on(&device).unwrap()), Dtype::F32)).contains("gather_patches_v2_f32_f32"));
    let mask = Var::constant(Tensor::full_on(&device, &[1, 1, 8], Dtype::F32, 1.0).unwrap());
    let restore = Tensor::from_slice(&[2, 5], &[0u32, 1, 2, 3, 4, 0, 1, 2, 3, 6]).unwrap().on(&device).unwrap();
    assert!(refused(three.unshuffle(&mask, &restore, 0)).contains("unshuffle_fwd_f32"));
    let kept = Tensor::from_slice(&[2, 3], &[4u32, 0, 6, 2, 1, 3]).unwrap().on(&device).unwrap();
    let bad = |layout: Layout| match regions(&device, layout, true) {
        Regions { grid, layout, seen: Seen::Only { places, .. } } => {
            Regions { grid, layout, seen: Seen::Only { kept: kept.clone(), places } }
        }
        all => all,
    };
    for (side, cell, version) in [(2, 2, "v2_f32_side2"), (2, 1, "v1_f32")] {
        let regions = bad(Layout { side, cell });
        assert!(refused(regions.tokens_of(2, &device)).contains("tokens_of_u32"));
        let [x, w] = [&[2, 12, 8][..], &[8, 1, 5, 5]].map(|shape| Var::constant(Tensor::full_on(&device, shape, Dtype::F32, 1.0).unwrap()));
        let error = refused(x.region_conv(&w, None, &regions));
        assert!(error.contains(&format!("region_conv_fwd_{version}")) && error.contains("index 6 is outside 0..6"), "{error}");
    }
    assert_eq!(here(x.gather(&ids(3).on(&device).unwrap()).unwrap().value()).to_f64(), [1.0; 48]);
}

/// Noise to a mask, the kept tokens, all of them back in place: the sum of both gradients, and the tokens.
fn there_and_back(device: &Device, rng: &Rng) -> Result<(Tensor, Tensor, Tensor)> {
    let mask = masking::random(&Tensor::drawn(device, rng, "mask", &[2, 9])?, 3)?;
    let (x, tape) = (Tensor::drawn(device, rng, "x", &[2, 9, 24])?, Tape::new());
    let token = Tensor::full_on(device, &[1, 1, 24], Dtype::F32, 0.5)?;
    let table = Tensor::drawn(device, rng, "table", &[1, 10, 24])?;
    let (x, token, table) = (tape.leaf(x), tape.leaf(token), tape.leaf(table));
    let y = x.gather(&mask.kept)?.prepend_with_positions(&[&token], &table, Some(&mask.kept))?;
    let y = y.unshuffle_with_positions(&token, &mask.restore, 1, &table)?;
    let gradients = tape.backward_from(&y, y.value().clone(), &mut [])?;
    let of = |x: &Var| gradients.of(x).cloned().ok_or_else(|| Error::new("no gradient"));
    Ok((y.value().clone(), of(&x)?, of(&token)?))
}

#[test]
fn a_recorded_step_draws_another_mask_at_each_replay() {
    let (gpu, device) = emulated();
    let (graph, recorded) = gpu.capture(|| there_and_back(&device, &Rng::new(0))).unwrap();
    for seed in [5, 6, 5] {
        graph.replay(&Rng::new(seed)).unwrap();
        let direct = there_and_back(&device, &Rng::new(seed)).unwrap();
        let cpu = there_and_back(&Device::Cpu, &Rng::new(seed)).unwrap();
        same(&recorded.0, &cpu.0, "tokens");
        same(&recorded.1, &direct.1, "gradient of x");
        same(&recorded.2, &direct.2, "gradient of the token");
        same(&recorded.1, &cpu.1, "gradient of x on the CPU");
        let pairs = here(&recorded.2).to_f64().into_iter().zip(cpu.2.to_f64());
        pairs.for_each(|(got, want)| assert!((got - want).abs() <= 1e-5 * want.abs(), "{got} is not {want}"));
    }
    let ids = Tensor::from_slice(&[1, 1], &[0u32]).unwrap();
    let x = Var::constant(Tensor::zeros_on(&device, &[1, 2, 8], Dtype::F32).unwrap());
    assert!(refused(gpu.capture(|| x.gather(&ids))).contains("put the numbers on the device before"));
}

#[test]
fn a_vit_embeds_on_the_device_what_it_embeds_on_the_cpu() {
    let (_, device) = emulated();
    let kept = Tensor::from_slice(&[2, 5], &[7u32, 0, 15, 3, 9, 1, 2, 14, 8, 5]).unwrap();
    for (position, distillation_token) in [(Position::SinCos, false), (Position::LearnedPatches, false), (Position::Learned, true)] {
        let config = VitConfig { position, distillation_token, ..VitConfig::new(32, 8, 32, 1, 4) };
        let mut b = ParamsBuilder::default();
        let tokens = Tokens::new(&mut b, &config).unwrap();
        let vit = Vit::new(&mut b, config, tokens, true, Start::Xavier).unwrap();
        let mut params = b.build(Dtype::F32, &Rng::new(5)).unwrap();
        let images = images([2, 3, 32, 32]);
        let tape = Tape::off();
        for kept in [None, Some(&kept)] {
            params.move_to(&Device::Cpu, Dtype::F32).unwrap();
            let want = vit.embed(&Scope::new(&tape, &params), &images, kept).unwrap();
            let want = want.value().to_f64();
            let scale = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            for (precision, allowed) in [(Dtype::F32, 1e-6), (Dtype::Bf16, 2e-2)] {
                params.move_to(&device, precision).unwrap();
                let got = vit.embed(&Scope::new(&tape, &params), &images, kept).unwrap();
                assert_eq!(got.dtype(), precision);
                for (got, want) in here(got.value()).to_f64().iter().zip(&want) {
                    assert!((got - want).abs() <= allowed * scale, "{position:?} {precision}: {got} is not {want}");
                }
            }
        }
    }
}
