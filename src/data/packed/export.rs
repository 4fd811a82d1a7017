//! A packed file back to a folder of images, one folder a class.

use super::write::partial;
use super::{Packed, Storage};
use crate::data::Dataset;
use crate::error::{Context, Result};
use crate::{bail, ensure};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// Writes the files' own bytes as they were, or pixels as PNG, to FOLDER/CLASS/NAME; `tell` is given how many were written.
///
/// The work is done in `FOLDER.partial`, which is renamed at the end.
pub fn export(packed: &Packed, folder: &Path, tell: &mut dyn FnMut(usize)) -> Result<()> {
    let shown = folder.display();
    let empty = || folder.is_dir() && fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    ensure!(!folder.exists() || empty(), "{shown} is there already; name a folder that is to be made");
    for class in packed.classes() {
        ensure!(is_one_name(class), "the class {class:?} cannot be the name of a folder");
    }
    let mut taken = HashSet::new();
    let files: Vec<PathBuf> = (0..packed.len()).map(|index| file_of(packed, index, &mut taken)).collect();
    drop(taken);

    let working = partial(folder);
    let wrong = || format!("cannot make the folder {}", working.display());
    ensure!(!working.exists(), "{} is there already, of an export that was interrupted; remove it", working.display());
    fs::create_dir(&working).with_context(wrong)?;
    for class in packed.classes() {
        fs::create_dir(working.join(class)).with_context(wrong)?;
    }
    for start in (0..files.len()).step_by(1024) {
        let end = (start + 1024).min(files.len());
        (start..end).into_par_iter().try_for_each(|index| {
            let path = working.join(&files[index]);
            write(&path, &content(packed, index)?).with_context(|| format!("cannot write {}", path.display()))
        })?;
        tell(end);
    }
    fs::rename(&working, folder).with_context(|| format!("cannot rename {} to {shown}", working.display()))
}

/// The bytes of a record's file.
fn content(packed: &Packed, index: usize) -> Result<Cow<'_, [u8]>> {
    if packed.storage() == Storage::Original {
        return packed.payload(index).map(Cow::Borrowed);
    }
    let picture = packed.picture(index)?;
    let colour = match picture.channels {
        1 => ExtendedColorType::L8,
        2 => ExtendedColorType::La8,
        3 => ExtendedColorType::Rgb8,
        4 => ExtendedColorType::Rgba8,
        channels => bail!("{} has {channels} channels but a PNG has 1 to 4", packed.name(index)),
    };
    let [h, w] = picture.size.map(|side| side as u32);
    let mut png = Vec::new();
    let written = PngEncoder::new(&mut png).write_image(&picture.pixels, w, h, colour);
    written.with_context(|| format!("cannot encode {}", packed.name(index)))?;
    Ok(png.into())
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    File::create_new(path)?.write_all(bytes)
}

/// CLASS/NAME of a record: what its source's name has behind the folder of the class, or its number.
fn file_of(packed: &Packed, index: usize, taken: &mut HashSet<PathBuf>) -> PathBuf {
    let class = &packed.classes()[packed.label(index) as usize];
    let source = packed.source(index);
    let mut parts = Path::new(&source).components();
    let found = parts.any(|part| part == Component::Normal(class.as_ref()));
    let rest = parts.as_path();
    let usable = found && rest.components().next().is_some() && rest.components().all(|part| matches!(part, Component::Normal(_)));
    let mut file = Path::new(class).join(if usable { rest.to_path_buf() } else { format!("{index:08}").into() });
    if packed.storage() != Storage::Original {
        file.set_extension("png");
    } else if !usable {
        let format = packed.payload(index).ok().and_then(|bytes| image::guess_format(bytes).ok());
        file.set_extension(format.map_or("bin", |format| format.extensions_str()[0]));
    }
    // Files that differed in their endings alone may now have one name.
    if !taken.insert(file.clone()) {
        let mut name = file.file_stem().unwrap_or_default().to_os_string();
        name.push(format!(".{index:08}"));
        if let Some(ending) = file.extension() {
            name.push(".");
            name.push(ending);
        }
        file.set_file_name(name);
        taken.insert(file.clone());
    }
    file
}

/// Whether a class's name is that of one folder, and of none that means another place.
fn is_one_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}
