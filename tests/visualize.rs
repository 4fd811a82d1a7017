//! `masque visualize` from the outside: a checkpoint and images in, one PNG or one sentence out.

mod common;

use common::Scratch;
use masque::formats::{FileTensor, write_safetensors};
use masque::methods::mae::{Mae, MaeConfig};
use masque::nn::presets;
use masque::rng::Rng;
use masque::tensor::Dtype;
use std::fs;
use std::path::Path;
use std::process::Command;

impl Scratch {
    /// With a checkpoint of an untrained model, `model.safetensors`, and an image of 70 x 40 pixels, `image.png`.
    fn with_model(name: &str) -> Self {
        let folder = Self::new(&format!("visualize-{name}"));
        let named = presets::named("glyph_s").unwrap();
        let config = MaeConfig { encoder: named.encoder(48).unwrap(), decoder: named.decoder, mask_ratio: 0.75, norm_pix: None };
        let mae = Mae::new(config, Dtype::F32, &Rng::new(1)).unwrap();
        let stored = |id| {
            let value = mae.params.value(id);
            (mae.params.name(id).to_string(), FileTensor::from_f32(value.data(), value.shape()).unwrap())
        };
        let tensors: Vec<(String, FileTensor)> = mae.params.ids().map(stored).collect();
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(folder.0.join("model.safetensors"), tensors, &Default::default()).unwrap();
        let image = image::RgbImage::from_fn(70, 40, |x, y| image::Rgb([3 * x as u8, 6 * y as u8, 90]));
        image.save(folder.0.join("image.png")).unwrap();
        folder
    }

    /// Exit code and standard error.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
        command.current_dir(&self.0).args(["visualize", "model.safetensors", "--model", "glyph_s"]).args(arguments);
        let done = command.output().unwrap();
        (done.status.code().unwrap(), String::from_utf8(done.stderr).unwrap())
    }
}

fn size(path: &Path) -> (u32, u32) {
    image::image_dimensions(path).unwrap()
}

#[test]
fn panels_of_several_ratios_stand_in_rows_and_attention_below() {
    let folder = Scratch::with_model("panels");
    assert_eq!(folder.run(&["image.png"]), (0, String::new()));
    let (width, height) = size(&folder.0.join("visualize.png"));
    assert_eq!(width, 4 * (192 + 8) + 8);
    assert_eq!(folder.run(&["image.png", "image.png", "--mask_ratio", "0.5,0.9", "--output", "two.png"]).0, 0);
    let (_, higher) = size(&folder.0.join("two.png"));
    assert_eq!(higher - height, 3 * (192 + 8));
    assert_eq!(folder.run(&["image.png", "--attention", "--output", "attention.png"]).0, 0);
    assert!(size(&folder.0.join("attention.png")).1 > height + 192);
}

#[test]
fn a_seed_gives_its_masks_again() {
    let folder = Scratch::with_model("seed");
    let picture = |seed: &str, output: &str| {
        assert_eq!(folder.run(&["image.png", "--seed", seed, "--output", output]).0, 0);
        fs::read(folder.0.join(output)).unwrap()
    };
    assert_eq!(picture("2", "a.png"), picture("2", "b.png"));
    assert_ne!(picture("2", "a.png"), picture("3", "c.png"));
    assert_eq!(picture("2", "a.png"), {
        assert_eq!(folder.run(&["image.png"]).0, 0);
        fs::read(folder.0.join("visualize.png")).unwrap()
    });
}

#[test]
fn what_cannot_be_shown_is_one_sentence() {
    let folder = Scratch::with_model("errors");
    folder.write("text.png", "no image");
    let cases: [(&[&str], i32, &str); 7] = [
        (&["missing.png"], 1, "missing.png"),
        (&["text.png"], 1, "text.png"),
        (&["image.png", "--output", "out.jpg"], 2, "use the ending .png"),
        (&["image.png", "--mask-ratio", "1.5"], 2, "--mask-ratio 1.5"),
        (&["image.png", "--mask-ratio", "0.75,1"], 1, "at least one has to be kept and one hidden"),
        (&["image.png", "--output", "missing/out.png"], 1, "cannot write missing/out.png"),
        (&[], 2, "does not say what images it is for"),
    ];
    for (arguments, code, text) in cases {
        let (found, error) = folder.run(arguments);
        assert_eq!(found, code, "{arguments:?}: {error}");
        assert!(error.contains(text) && error.trim_end().lines().count() == 1, "{arguments:?}: {error}");
    }
    assert!(!folder.0.join("visualize.png").exists());
}
