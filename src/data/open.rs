//! A set by its path; what lies there tells what it is.
//!
//! | path | what it is |
//! |---|---|
//! | a folder with `train/` and `val/` (or `test/`) | class folders in each: [`ImageFolder`] |
//! | a folder of class folders | the same, for training alone |
//! | `cifar-10-batches-bin`, `cifar-100-binary`, or the folder that holds one | [`Cifar`] |
//! | a folder with `train.masque` and `val.masque`, or one such file | a packed set |

use super::Dataset;
use super::cifar::{Cifar, Version};
use super::folder::ImageFolder;
use super::packed::Packed;
use crate::error::{Context, Result};
use crate::{bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    Train,
    Val,
}

impl Split {
    /// Names that the split's folder or packed file goes by, the preferred one first.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Train => &["train"],
            Self::Val => &["val", "test"],
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Train => Self::Val,
            Self::Val => Self::Train,
        }
    }

    fn purpose(self) -> &'static str {
        match self {
            Self::Train => "training",
            Self::Val => "validation",
        }
    }
}

/// Images of the set at `path`, for training or for validation.
pub fn open(path: &Path, split: Split) -> Result<Arc<dyn Dataset>> {
    let shown = path.display();
    let about = fs::metadata(path).with_context(|| format!("cannot open the data at {shown}"))?;
    if !about.is_dir() {
        return open_file(path, split);
    }
    let places = |split: Split| split.names().iter().map(|name| path.join(name));
    let packed = |split| places(split).map(|place| place.with_extension("masque")).find(|place| place.is_file());
    let folder = |split| places(split).find(|place| place.is_dir());
    let cifar = ["", "cifar-10-batches-bin", "cifar-100-binary"].iter().map(|name| path.join(name));
    let cifar: Vec<(PathBuf, Version)> = cifar.filter_map(|place| Version::of(&place).map(|version| (place, version))).collect();
    let both = packed(split).is_some() && folder(split).is_some();
    ensure!(!both, "{shown} holds {0}.masque and {0}/ both; name the one that is meant", split.names()[0]);

    if let Some(place) = packed(split) {
        return open_packed(&place);
    }
    if let Some(place) = folder(split) {
        return Ok(Arc::new(ImageFolder::open(&place)?));
    }
    if let Some((place, version)) = cifar.first() {
        ensure!(cifar.len() == 1, "{shown} holds CIFAR-10 and CIFAR-100 both; name the one that is meant");
        return Ok(Arc::new(Cifar::open(place, *version, split)?));
    }
    let python = ["cifar-10-batches-py", "cifar-100-python"].iter().find(|name| path.ends_with(name) || path.join(name).is_dir());
    if let Some(name) = python {
        bail!("{shown} is the Python version of CIFAR ({name}); download the binary version");
    }
    let name = split.names()[0];
    if let Some(other) = packed(split.other()).or_else(|| folder(split.other())) {
        bail!("{shown} has no images for {}: there is {} but no {name}/ and no {name}.masque beside it", split.purpose(), other.display());
    }
    let folders = || fs::read_dir(path).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|entry| entry.path().is_dir())));
    if split == Split::Train && folders() {
        return Ok(Arc::new(ImageFolder::open(path)?));
    }
    ensure!(!folders(), "{shown} has no {name}/ (or test/), so there are no images for {}; put class folders there", split.purpose());
    bail!("{shown} holds nothing that is known here; {UNDERSTOOD}")
}

/// Whether `path` is a folder of images for training that has none for validation.
pub fn lacks_validation(path: &Path) -> bool {
    let there = |split: Split| {
        let mut names = split.names().iter().map(|name| path.join(name));
        names.any(|place| place.is_dir() || place.with_extension("masque").is_file())
    };
    let cifar = ["", "cifar-10-batches-bin", "cifar-100-binary"].iter().any(|name| Version::of(&path.join(name)).is_some());
    path.is_dir() && !there(Split::Val) && !cifar && open(path, Split::Train).is_ok()
}

const UNDERSTOOD: &str =
    "a folder with train/ and val/ of class folders, the binary CIFAR-10 or CIFAR-100, or train.masque and val.masque are understood";

/// A packed file goes by the name of its split; the other split is its neighbour.
fn open_file(path: &Path, split: Split) -> Result<Arc<dyn Dataset>> {
    let shown = path.display();
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    ensure!(path.extension().is_some_and(|ending| ending == "masque"), "{shown} is a file and not a packed one; {UNDERSTOOD}");
    if split.other().names().contains(&stem) {
        let mut beside = split.names().iter().map(|name| path.with_file_name(format!("{name}.masque")));
        let Some(beside) = beside.find(|place| place.is_file()) else {
            bail!("{shown} is not for {} and there is no {}.masque beside it", split.purpose(), split.names()[0]);
        };
        return open_packed(&beside);
    }
    let named = split == Split::Train || split.names().contains(&stem);
    ensure!(named, "{shown} holds images for training; a packed file for validation is called val.masque");
    open_packed(path)
}

fn open_packed(path: &Path) -> Result<Arc<dyn Dataset>> {
    Ok(Arc::new(Packed::open(path)?))
}

/// Fails unless a label means the same class in both sets.
pub fn same_classes(train: &dyn Dataset, val: &dyn Dataset) -> Result<()> {
    let (train, val) = (train.classes(), val.classes());
    let counts = format!("training has {} classes and validation has {}", train.len(), val.len());
    let differs = (0..train.len().max(val.len())).find(|&class| train.get(class) != val.get(class));
    let Some(class) = differs else { return Ok(()) };
    match (train.get(class), val.get(class)) {
        (Some(train), Some(val)) => {
            bail!("class {class} is {train:?} in training and {val:?} in validation ({counts}); both need the same class folders")
        }
        (Some(train), None) => bail!("class {class}, {train:?}, is missing in validation ({counts}); both need the same class folders"),
        (_, val) => {
            bail!("class {class}, {:?}, is missing in training ({counts}); both need the same class folders", val.map_or("", |val| val))
        }
    }
}
