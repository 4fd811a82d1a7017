//! CIFAR-10 and CIFAR-100, the binary versions: images of 32 x 32.
//!
//!   CIFAR-10    data_batch_1.bin .. data_batch_5.bin, test_batch.bin      a row: label, 1024 red, 1024 green, 1024 blue
//!   CIFAR-100   train.bin, test.bin                                       a row: coarse label, fine label, the same; fine labels are used

use super::open::Split;
use super::{Dataset, Picture};
use crate::ensure;
use crate::error::{Context, Result};
use crate::formats::Bytes;
use std::fs;
use std::path::{Path, PathBuf};

const SIDE: usize = 32;
const AREA: usize = SIDE * SIDE;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    Cifar10,
    Cifar100,
}

impl Version {
    /// The version whose files lie in a folder.
    pub fn of(folder: &Path) -> Option<Self> {
        let is_there = |names: &[&str]| names.iter().any(|name| folder.join(name).is_file());
        if is_there(&["data_batch_1.bin", "test_batch.bin"]) {
            Some(Self::Cifar10)
        } else if is_there(&["train.bin", "test.bin"]) && folder.join("fine_label_names.txt").is_file() {
            Some(Self::Cifar100)
        } else {
            None
        }
    }

    fn files(self, split: Split) -> Vec<String> {
        match (self, split) {
            (Self::Cifar10, Split::Train) => (1..=5).map(|batch| format!("data_batch_{batch}.bin")).collect(),
            (Self::Cifar10, Split::Val) => vec!["test_batch.bin".to_string()],
            (Self::Cifar100, Split::Train) => vec!["train.bin".to_string()],
            (Self::Cifar100, Split::Val) => vec!["test.bin".to_string()],
        }
    }

    fn names_file(self) -> &'static str {
        match self {
            Self::Cifar10 => "batches.meta.txt",
            Self::Cifar100 => "fine_label_names.txt",
        }
    }

    fn classes(self) -> usize {
        match self {
            Self::Cifar10 => 10,
            Self::Cifar100 => 100,
        }
    }

    /// Bytes in front of a row's pixels; the last is the label.
    fn labels(self) -> usize {
        match self {
            Self::Cifar10 => 1,
            Self::Cifar100 => 2,
        }
    }

    fn row(self) -> usize {
        self.labels() + 3 * AREA
    }
}

pub struct Cifar {
    version: Version,
    classes: Vec<String>,
    files: Vec<(PathBuf, Bytes)>,
    /// Number of the first image of each file, and the number of all.
    firsts: Vec<usize>,
}

impl Cifar {
    pub fn open(folder: &Path, version: Version, split: Split) -> Result<Self> {
        let names = folder.join(version.names_file());
        let text = fs::read_to_string(&names).with_context(|| format!("cannot read the names of the classes in {}", names.display()))?;
        let classes: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string).collect();
        let wanted = version.classes();
        ensure!(classes.len() == wanted, "{} names {} classes but there are {wanted}", names.display(), classes.len());

        let (mut files, mut firsts, mut images) = (Vec::new(), vec![0], 0);
        for name in version.files(split) {
            let path = folder.join(name);
            let bytes = Bytes::map(&path)?;
            let (shown, row) = (path.display(), version.row());
            ensure!(
                bytes.len() % row == 0,
                "{shown} has {} bytes, which is no whole number of rows of {row}; download it again",
                bytes.len()
            );
            for (number, row) in bytes.chunks_exact(row).enumerate() {
                let label = row[version.labels() - 1] as usize;
                ensure!(label < wanted, "{shown} has label {label} in row {number} but there are {wanted} classes; download it again");
            }
            images += bytes.len() / row;
            firsts.push(images);
            files.push((path, bytes));
        }
        Ok(Self { version, classes, files, firsts })
    }

    /// The file of an image and its row there.
    fn place(&self, index: usize) -> (usize, usize) {
        let file = self.firsts.partition_point(|&first| first <= index) - 1;
        (file, index - self.firsts[file])
    }

    fn row(&self, index: usize) -> &[u8] {
        let ((file, row), length) = (self.place(index), self.version.row());
        &self.files[file].1[row * length..][..length]
    }
}

impl Dataset for Cifar {
    fn len(&self) -> usize {
        self.firsts.last().copied().unwrap_or(0)
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        self.row(index)[self.version.labels() - 1] as u32
    }

    fn name(&self, index: usize) -> String {
        let (file, row) = self.place(index);
        format!("{} row {row}", self.files[file].0.display())
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        let planes = &self.row(index)[self.version.labels()..]; // [3, 32, 32]
        let pixels = (0..AREA).flat_map(|at| [planes[at], planes[AREA + at], planes[2 * AREA + at]]);
        Picture::new([SIDE, SIDE], 3, pixels.collect())
    }
}
