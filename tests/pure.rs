//! The pure functions against numbers that the reference programs produced: `tests/fixtures/parity/op_*.safetensors`.

use masque::data::{mixup, resize};
use masque::nn::position;
use masque::optim::schedule::{TimmCosine, mae_cosine};
use masque::tensor::Tensor;
use masque::{masking, targets::pixels};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// One file of golden tensors; `options` is the part of its description that says what to compute.
struct Fixture {
    bytes: Vec<u8>,
    options: Value,
}

impl Fixture {
    fn open(name: &str) -> Self {
        let path = format!("{}/tests/fixtures/parity/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let case: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["case"]).unwrap();
        Self { bytes, options: case["options"].clone() }
    }

    fn bytes(&self, name: &str, dtype: Dtype) -> (Vec<u8>, Vec<usize>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), dtype, "{name}");
        (tensor.data().to_vec(), tensor.shape().to_vec())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name, Dtype::F32).0.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn u32(&self, name: &str) -> Vec<u32> {
        let wide = self.bytes(name, Dtype::I64).0;
        wide.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()).try_into().unwrap()).collect()
    }

    fn u8(&self, name: &str) -> Vec<u8> {
        self.bytes(name, Dtype::U8).0
    }

    fn shape<const N: usize>(&self, name: &str) -> [usize; N] {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().shape().try_into().unwrap()
    }

    fn specs(&self) -> impl Iterator<Item = (usize, &Value)> {
        let specs = self.options["specs"].as_array().unwrap();
        assert!(!specs.is_empty());
        specs.iter().enumerate()
    }
}

fn int(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a count")) as usize
}

fn real(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

/// Largest difference over largest golden value.
#[track_caller]
fn close(found: &[f32], golden: &[f32], tolerance: f32) {
    assert_eq!(found.len(), golden.len());
    assert!(found.iter().all(|value| value.is_finite()));
    let scale = golden.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let error = found.iter().zip(golden).fold(0.0f32, |largest, (a, b)| largest.max((a - b).abs()));
    assert!(error <= tolerance * scale, "error {:e} of scale {scale}", error / scale);
}

#[test]
fn learning_rates_follow_the_reference_schedules() {
    let fixture = Fixture::open("op_lr_schedules");
    let check = |found: f64, golden: f32| assert!((found - f64::from(golden)).abs() <= 1e-7 * f64::from(golden), "{found:e} {golden:e}");
    for (i, spec) in fixture.options["mae"].as_array().unwrap().iter().enumerate() {
        let stride = spec.get("stride").map_or(1, int);
        for (k, golden) in fixture.f32(&format!("out/mae{i}/lr")).into_iter().enumerate() {
            let epoch = (k * stride) as f64 / real(&spec["iters_per_epoch"]);
            let (warmup, total) = (real(&spec["warmup_epochs"]), real(&spec["epochs"]));
            check(mae_cosine(epoch, real(&spec["lr"]), real(&spec["min_lr"]), warmup, total), golden);
        }
    }
    for (i, spec) in fixture.options["timm"].as_array().unwrap().iter().enumerate() {
        let schedule = TimmCosine {
            base: real(&spec["lr"]),
            t_initial: int(&spec["t_initial"]),
            lr_min: real(&spec["lr_min"]),
            warmup_t: int(&spec["warmup_t"]),
            warmup_lr_init: real(&spec["warmup_lr_init"]),
            cycle_limit: int(&spec["cycle_limit"]),
            decay_rate: 1.0,
        };
        let golden = fixture.f32(&format!("out/timm{i}/lr"));
        assert_eq!(golden.len(), int(&spec["n"]) + 1);
        check(schedule.at_construction(), golden[0]);
        for (t, &golden) in golden[1..].iter().enumerate() {
            check(schedule.at(t), golden);
        }
        for (epoch, &golden) in golden.iter().enumerate() {
            check(schedule.during_epoch(epoch), golden);
        }
    }
}

#[test]
fn evaluation_transform_gives_pillows_bytes() {
    let fixture = Fixture::open("op_pil_eval_transform");
    let (short, side) = (int(&fixture.options["resize"]), int(&fixture.options["crop"]));
    for (i, spec) in fixture.specs() {
        let size = [int(&spec["h"]), int(&spec["w"])];
        let cropped = resize::eval_transform(&fixture.u8(&format!("in/{i}/image_u8_hwc")), size, 3, short, side).unwrap();
        assert!(cropped == fixture.u8(&format!("out/{i}/cropped_u8_hwc")), "image {i}");
        if i == 0 {
            let planes = resize::normalise(&cropped, [side, side], &resize::IMAGENET_MEAN, &resize::IMAGENET_STD).unwrap();
            let rows = planes.chunks_exact(side).step_by(4);
            let found: Vec<f32> = rows.flat_map(|row| row.iter().step_by(4).copied()).collect();
            assert!(found == fixture.f32("out/0/normalized"));
        }
    }
}

#[test]
fn cropped_and_resized_images_have_pillows_bytes() {
    let fixture = Fixture::open("op_pil_random_resized_crop");
    for (i, spec) in fixture.specs() {
        let (size, side) = ([int(&spec["h"]), int(&spec["w"])], int(&spec["out"]));
        let crop =
            resize::Crop { top: int(&spec["top"]), left: int(&spec["left"]), height: int(&spec["height"]), width: int(&spec["width"]) };
        let mut found = resize::crop_resize(&fixture.u8(&format!("in/{i}/image_u8_hwc")), size, 3, crop, [side, side]).unwrap();
        if spec["hflip"].as_bool().unwrap() {
            resize::hflip(&mut found, [side, side], 3).unwrap();
        }
        assert!(found == fixture.u8(&format!("out/{i}/crop_u8_hwc")), "image {i}");
    }
}

#[test]
fn mixed_images_and_targets_are_timms() {
    let fixture = Fixture::open("op_mixup_cutmix");
    let shape = fixture.shape::<4>("in/images");
    let classes = int(&fixture.options["num_classes"]);
    for (i, spec) in fixture.specs() {
        let mut images = fixture.f32("in/images");
        let golden = fixture.f32(&format!("out/{i}/images"));
        let lam = match spec["kind"].as_str().unwrap() {
            "mixup" => {
                mixup::mixup(&mut images, shape[0], real(&spec["lam"])).unwrap();
                close(&images, &golden, 2e-7);
                real(&spec["lam"])
            }
            _ => {
                let centre = &spec["center"];
                let (cut, lam) = mixup::cutmix_box(shape[2], shape[3], real(&spec["lam"]), int(&centre[0]), int(&centre[1])).unwrap();
                let edges = spec["box_yl_yh_xl_xh"].as_array().unwrap().iter().map(int).collect::<Vec<_>>();
                assert_eq!([cut.y0, cut.y1, cut.x0, cut.x1], edges[..]);
                mixup::cutmix(&mut images, shape, cut).unwrap();
                assert_eq!(images, golden);
                lam
            }
        };
        assert_eq!(lam, real(&spec["lam_corrected"]));
        let targets = mixup::mix_targets(&fixture.u32("in/labels"), classes, lam, real(&spec["smoothing"])).unwrap();
        close(&targets, &fixture.f32(&format!("out/{i}/targets")), 1e-7);
    }
}

#[test]
fn position_tables_are_the_reference_ones() {
    let fixture = Fixture::open("op_sincos_pos_embed");
    for (_, spec) in fixture.specs() {
        let (dim, side, class) = (int(&spec["embed_dim"]), int(&spec["grid_size"]), spec["cls_token"].as_bool().unwrap());
        let table = position::sincos([side, side], dim, usize::from(class)).unwrap();
        assert_eq!(table, fixture.f32(&format!("out/dim{dim}_grid{side}_cls{}", u8::from(class))));
    }
}

#[test]
fn frozen_tables_of_a_model_are_bit_equal_to_ours() {
    let fixture = Fixture::open("mae_r75_normpix");
    for name in ["w/pos_embed", "w/decoder_pos_embed"] {
        let [_, rows, dim] = fixture.shape::<3>(name);
        let side = (rows - 1).isqrt();
        assert_eq!(position::sincos([side, side], dim, 1).unwrap(), fixture.f32(name), "{name}");
    }
}

#[test]
fn interpolated_position_tables_are_pytorchs() {
    let fixture = Fixture::open("op_interpolate_pos_embed");
    for (i, spec) in fixture.specs() {
        let (old, new) = (int(&spec["old_grid"]), int(&spec["new_grid"]));
        let table = fixture.f32(&format!("in/pos_embed{i}"));
        let moved = position::interpolate(&table, int(&spec["embed_dim"]), int(&spec["extra_tokens"]), [old, old], [new, new]).unwrap();
        close(&moved, &fixture.f32(&format!("out/pos_embed{i}")), 1e-7);
    }
}

#[test]
fn random_masks_are_the_reference_ones() {
    let fixture = Fixture::open("op_gather_unshuffle");
    let [b, l] = fixture.shape::<2>("in/noise");
    let noise = Tensor::from_slice(&[b, l], &fixture.f32("in/noise")).unwrap();
    let mask = masking::random(&noise, int(&fixture.options["len_keep"])).unwrap();
    assert_eq!(mask.shuffle.data::<u32>(), fixture.u32("out/ids_shuffle"));
    assert_eq!(mask.restore.data::<u32>(), fixture.u32("out/ids_restore"));
    assert_eq!(mask.kept.data::<u32>(), fixture.u32("out/ids_keep"));
    assert_eq!(mask.hidden.data::<f32>(), fixture.f32("out/mask"));
}

#[test]
fn patches_and_normalised_targets_are_the_reference_ones() {
    let fixture = Fixture::open("op_patchify");
    for (i, spec) in fixture.specs() {
        let (images, shape, patch) =
            (fixture.f32(&format!("in/{i}/images")), fixture.shape(&format!("in/{i}/images")), int(&spec["patch"]));
        let tensor = Tensor::from_slice(&shape, &images).unwrap();
        let patches = pixels::patchify(&tensor, patch).unwrap();
        assert_eq!(patches.data::<f32>(), fixture.f32(&format!("out/{i}/patches")));
        assert_eq!(pixels::unpatchify(&patches, shape, patch).unwrap().data::<f32>(), images);
        close(pixels::targets(&tensor, patch, Some(pixels::EPS)).unwrap().data(), &fixture.f32(&format!("out/{i}/norm_pix")), 1e-7);
    }
}
