//! Augmentations against what Pillow 11.3 made of the same images; tests/reference/generate_augment.py recorded it.

use masque::data::crop::{Border, window};
use masque::data::rand_augment::Op;
use masque::data::resize::{self, Crop};
use masque::data::{affine, colour, filter};
use masque::formats::{TensorFile, open};
use std::collections::BTreeSet;

/// Calls `apply(operation, argument, pixels, size)` on the image of each recorded result and compares; gives the operations that were met.
fn check(file: &str, apply: impl Fn(&str, &str, &mut Vec<u8>, [usize; 2])) -> BTreeSet<String> {
    let file: TensorFile = open(format!("{}/tests/fixtures/augment/{file}.safetensors", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let mut met = BTreeSet::new();
    for name in file.names().filter(|name| !name.ends_with("/in")) {
        let [image, op, argument] = name.split('/').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let input = file.get(&format!("{image}/in")).unwrap();
        let &[h, w, 3] = input.shape() else { panic!("{name}: {input:?}") };
        let mut pixels = input.bytes().to_vec();
        apply(op, argument, &mut pixels, [h, w]);
        let expected = file.get(name).unwrap().bytes();
        let wrong = pixels.iter().zip(expected).filter(|(own, theirs)| own != theirs).count();
        assert!(pixels.len() == expected.len() && wrong == 0, "{name}: {wrong} of {} bytes differ", expected.len());
        met.insert(op.to_string());
    }
    met
}

#[test]
fn colours_and_filters_have_pillows_bytes() {
    let met = check("colour", |op, argument, pixels, size| {
        let number: f64 = argument.parse().unwrap_or(f64::NAN);
        match op {
            "autocontrast" => colour::autocontrast(pixels),
            "equalise" => colour::equalise(pixels),
            "invert" => colour::invert(pixels),
            "grey" => colour::grey(pixels),
            "posterise" => colour::posterise(pixels, number as u32),
            "solarise" => colour::solarise(pixels, number as u32),
            "solarise_add" => colour::solarise_add(pixels, number as u32),
            "saturation" => colour::saturation(pixels, number as f32),
            "contrast" => colour::contrast(pixels, number as f32),
            "brightness" => colour::brightness(pixels, number as f32),
            "sharpness" => filter::sharpness(pixels, size, number as f32),
            "blur" => filter::blur(pixels, size, number as f32),
            other => panic!("{other} is not known"),
        }
    });
    assert_eq!(met.len(), 12);
}

#[test]
fn affine_maps_have_pillows_bytes() {
    let met = check("affine", |op, argument, pixels, size| {
        let number: f64 = argument.parse().unwrap();
        let map = match op {
            "rotate" => affine::rotate(size, number),
            "shear_x" => affine::shear_x(number),
            "shear_y" => affine::shear_y(number),
            "translate_x" => affine::translate_x(number * size[1] as f64),
            "translate_y" => affine::translate_y(number * size[0] as f64),
            other => panic!("{other} is not known"),
        };
        *pixels = affine::transform(pixels, size, &map, affine::FILL);
    });
    assert_eq!(met.len(), 5);
}

#[test]
fn operations_of_rand_augment_have_pillows_bytes_at_every_magnitude() {
    let met = check("rand_augment", |op, argument, pixels, size| {
        let op = Op::ALL.into_iter().find(|known| format!("{known:?}") == op).unwrap();
        let [magnitude, sign, increasing] = argument.split(',').map(|x| x.parse::<f64>().unwrap()).collect::<Vec<_>>()[..] else {
            panic!()
        };
        op.apply(pixels, size, magnitude, sign, increasing == 1.0);
    });
    assert_eq!(met.len(), 15);
}

#[test]
fn crops_have_pillows_bytes_at_given_boxes_and_corners() {
    let met = check("crop", |op, argument, pixels, size| {
        let numbers: Vec<isize> = argument.split(',').map(|x| x.parse().unwrap()).collect();
        let border = match op {
            "resized" => {
                let [top, left, height, width, side, flip] = numbers[..].iter().map(|&x| x as usize).collect::<Vec<_>>()[..] else {
                    panic!()
                };
                *pixels = resize::crop_resize(pixels, size, 3, Crop { top, left, height, width }, [side, side]).unwrap();
                if flip == 1 {
                    resize::hflip(pixels, [side, side], 3).unwrap();
                }
                return;
            }
            "zero" => Border::Zero,
            "reflect" => Border::Reflect,
            "replicate" => Border::Replicate,
            other => panic!("{other} is not known"),
        };
        *pixels = window(pixels, size, 3, [numbers[0], numbers[1]], numbers[2] as usize, border);
    });
    assert_eq!(met.len(), 4);
}
