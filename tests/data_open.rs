//! A set by its path: what lies there tells what it is, and both splits mean the same classes.

mod common;

use common::Scratch;
use masque::data::Dataset;
use masque::data::open::{Split, open, same_classes};
use masque::data::packed::{Options, Storage, pack};
use std::fs;
use std::path::Path;
use std::sync::Arc;

impl Scratch {
    fn image(&self, path: &str) {
        let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images/one.png");
        self.write(path, fs::read(image).unwrap());
    }

    fn open(&self, split: Split) -> Arc<dyn Dataset> {
        open(&self.0, split).unwrap_or_else(|error| panic!("{}", error.chain()))
    }

    fn refusal(&self, split: Split) -> String {
        open(&self.0, split).err().expect("it opens").chain()
    }

    /// CIFAR with rows whose bytes follow from the file's and the row's number.
    fn cifar(&self, files: &[&str], labels: usize, rows: usize) {
        for (number, file) in files.iter().enumerate() {
            let row = |row: usize| {
                let label = |at: usize| (if at + 1 == labels { number + row } else { 19 }) as u8;
                let pixels = (0..3072).map(move |at| (at / 1024 * 80 + at % 32 + number + row) as u8);
                (0..labels).map(label).chain(pixels).collect::<Vec<u8>>()
            };
            self.write(file, (0..rows).flat_map(row).collect::<Vec<u8>>());
        }
    }
}

const CIFAR_10: [&str; 5] = ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"];

fn lines(count: usize) -> Vec<u8> {
    (0..count).map(|class| format!("class {class}\n")).chain(["\n".to_string()]).collect::<String>().into_bytes()
}

#[test]
fn train_and_val_are_told_apart_and_test_stands_in_for_val() {
    let folder = Scratch::new("splits");
    for path in ["train/a/1.png", "train/b/1.png", "train/b/2.png", "test/a/1.png", "test/b/1.png"] {
        folder.image(path);
    }
    assert_eq!((folder.open(Split::Train).len(), folder.open(Split::Val).len()), (3, 2));
    folder.image("val/a/1.png");
    assert_eq!(folder.open(Split::Val).len(), 1);
}

#[test]
fn class_folders_alone_are_for_training_alone() {
    let folder = Scratch::new("alone");
    folder.image("a/1.png");
    assert_eq!(folder.open(Split::Train).classes(), ["a"]);
    assert!(folder.refusal(Split::Val).contains("has no val/ (or test/)"), "{}", folder.refusal(Split::Val));
    let folder = Scratch::new("no-val");
    folder.image("train/a/1.png");
    let error = folder.refusal(Split::Val);
    assert!(error.contains("has no images for validation") && error.contains("/train but no val/"), "{error}");
}

#[test]
fn cifar_10_reads_row_by_row() {
    let folder = Scratch::new("cifar10");
    folder.cifar(&CIFAR_10.map(|name| format!("cifar-10-batches-bin/{name}")).each_ref().map(String::as_str), 1, 3);
    folder.cifar(&["cifar-10-batches-bin/test_batch.bin"], 1, 2);
    folder.write("cifar-10-batches-bin/batches.meta.txt", lines(10));
    let (train, val) = (folder.open(Split::Train), folder.open(Split::Val));
    assert_eq!((train.len(), val.len()), (15, 2));
    assert_eq!((train.classes().len(), train.classes()[9].as_str()), (10, "class 9"));
    same_classes(&*train, &*val).unwrap();
    // The second row of the fourth file.
    assert_eq!(train.label(10), 4);
    assert!(train.name(10).ends_with("data_batch_4.bin row 1"), "{}", train.name(10));
    let picture = train.picture(10).unwrap();
    assert_eq!((picture.size, picture.channels), ([32, 32], 3));
    assert_eq!(picture.pixels[..3], [4, 84, 164]);
    assert_eq!(picture.pixels[3 * (32 * 5 + 31)..][..3], [35, 115, 195]);
}

#[test]
fn cifar_100_gives_fine_labels() {
    let folder = Scratch::new("cifar100");
    folder.cifar(&["train.bin", "test.bin"], 2, 4);
    folder.write("fine_label_names.txt", lines(100));
    let (train, val) = (folder.open(Split::Train), folder.open(Split::Val));
    assert_eq!((train.len(), val.len(), train.classes().len()), (4, 4, 100));
    assert_eq!((train.label(3), val.label(3)), (3, 4));
    assert_eq!(val.picture(2).unwrap().pixels[..3], [3, 83, 163]);
}

#[test]
fn damaged_cifar_is_refused_by_name() {
    let folder = Scratch::new("cifar-bad");
    folder.cifar(&CIFAR_10, 1, 2);
    assert!(folder.refusal(Split::Train).contains("batches.meta.txt"), "{}", folder.refusal(Split::Train));
    folder.write("batches.meta.txt", lines(9));
    assert!(folder.refusal(Split::Train).contains("names 9 classes but there are 10"), "{}", folder.refusal(Split::Train));
    folder.write("batches.meta.txt", lines(10));
    assert!(folder.refusal(Split::Val).contains("test_batch.bin"), "{}", folder.refusal(Split::Val));
    folder.write("data_batch_3.bin", [0; 3073 * 2 - 1]);
    let error = folder.refusal(Split::Train);
    assert!(error.contains("data_batch_3.bin has 6145 bytes") && error.contains("rows of 3073"), "{error}");
    folder.write("data_batch_3.bin", [[0; 3073], [10; 3073]].concat());
    assert!(folder.refusal(Split::Train).contains("label 10 in row 1"), "{}", folder.refusal(Split::Train));
    fs::remove_file(folder.0.join("data_batch_3.bin")).unwrap();
    assert!(folder.refusal(Split::Train).contains("data_batch_3.bin"), "{}", folder.refusal(Split::Train));
}

#[test]
fn what_is_not_understood_is_answered_with_what_is() {
    let folder = Scratch::new("nothing");
    assert!(folder.refusal(Split::Train).contains("are understood"), "{}", folder.refusal(Split::Train));
    folder.write("images.tar", b"tar");
    let file = open(&folder.0.join("images.tar"), Split::Train).err().unwrap().chain();
    assert!(file.contains("images.tar is a file and not a packed one"), "{file}");
    let missing = open(&folder.0.join("none"), Split::Train).err().unwrap().chain();
    assert!(missing.contains("cannot open the data at") && missing.contains("none"), "{missing}");
    fs::create_dir_all(folder.0.join("cifar-10-batches-py")).unwrap();
    assert!(folder.refusal(Split::Train).contains("download the binary version"), "{}", folder.refusal(Split::Train));
}

#[test]
fn classes_that_differ_between_the_splits_are_named() {
    let folder = Scratch::new("classes");
    for path in ["train/a/1.png", "train/b/1.png", "train/d/1.png", "val/a/1.png", "val/b/1.png", "val/c/1.png", "val/d/1.png"] {
        folder.image(path);
    }
    let check = || same_classes(&*folder.open(Split::Train), &*folder.open(Split::Val)).map_err(|error| error.chain());
    let error = check().unwrap_err();
    assert!(error.contains(r#"class 2 is "d" in training and "c" in validation (training has 3 classes and validation has 4)"#), "{error}");
    fs::remove_dir_all(folder.0.join("val/c")).unwrap();
    check().unwrap();
    fs::remove_dir_all(folder.0.join("val/d")).unwrap();
    let error = check().unwrap_err();
    assert!(error.contains(r#"class 2, "d", is missing in validation"#), "{error}");
    folder.image("val/d/1.png");
    folder.image("val/e/1.png");
    let error = check().unwrap_err();
    assert!(error.contains(r#"class 3, "e", is missing in training"#), "{error}");
}

#[test]
fn packed_files_are_found_by_the_name_of_their_split() {
    let folder = Scratch::new("packed");
    for path in ["source/train/a/1.png", "source/train/b/1.png", "source/val/a/1.png"] {
        folder.image(path);
    }
    let write = |split: Split, name: &str| {
        let set = open(&folder.0.join("source"), split).unwrap();
        let options = Options { storage: Storage::Original, strict: true, force: true, root: &folder.0 };
        pack(&*set, &folder.0.join(name), &options, &mut |_| {}).unwrap();
    };
    let len = |name: &str, split| open(&folder.0.join(name), split).map(|set| set.len()).map_err(|error| error.chain());
    write(Split::Train, "train.masque");
    write(Split::Train, "mine.masque");
    assert!(len("", Split::Val).unwrap_err().contains("train.masque but no val/ and no val.masque"), "{:?}", len("", Split::Val));
    assert!(len("train.masque", Split::Val).unwrap_err().contains("there is no val.masque beside it"));
    write(Split::Val, "val.masque");
    for (name, split, images) in [
        ("", Split::Train, 2),
        ("", Split::Val, 1),
        ("train.masque", Split::Train, 2),
        ("train.masque", Split::Val, 1),
        ("val.masque", Split::Train, 2),
        ("val.masque", Split::Val, 1),
        ("mine.masque", Split::Train, 2),
    ] {
        assert_eq!(len(name, split), Ok(images), "{name:?} {split:?}");
    }
    // Images for training are never taken for others.
    assert!(len("mine.masque", Split::Val).unwrap_err().contains("is called val.masque"));
    fs::create_dir_all(folder.0.join("train")).unwrap();
    assert!(len("", Split::Train).unwrap_err().contains("holds train.masque and train/ both"));
}
