//! Images in folders, a folder a class: the layout of ImageNet.
//!
//!   root/n01440764/n01440764_18.JPEG        class 0: the folders in the order of their names' bytes
//!   root/n01443537/more/1.png               class 1: folders within a class are walked too
//!
//! Files are ordered by the folder that holds them, then by name. An empty class folder stays a class, so that no label shifts; a note says so. Names
//! that begin with a dot are no part of the set. Links to folders are followed, but not into a folder that holds them.
//!
//! The names lie in one buffer: some 40 MB for the 1.28 million of ImageNet.

use super::{Dataset, Picture, decode};
use crate::error::{Context, Result};
use crate::{bail, ensure};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirEntry};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Endings of the files that are images, in any case.
pub const ENDINGS: [&str; 5] = ["jpg", "jpeg", "png", "bmp", "webp"];
/// Endings of images that others read and this program does not.
const UNREAD: [&str; 7] = ["ppm", "pgm", "tif", "tiff", "gif", "avif", "heic"];

pub struct ImageFolder {
    root: PathBuf,
    classes: Vec<String>,
    names: Names,
    /// Number of the first image of each class, and the number of all.
    firsts: Vec<usize>,
    notes: Vec<String>,
}

impl ImageFolder {
    pub fn open(root: &Path) -> Result<Self> {
        let shown = root.display();
        let about = fs::metadata(root).with_context(|| format!("cannot open the folder {shown}"))?;
        ensure!(about.is_dir(), "{shown} is not a folder of class folders");
        let mut folders = Vec::new();
        let mut stray = 0;
        for entry in entries(root)? {
            match class_of_entry(&entry)? {
                Entry::Folder => folders.push(entry.file_name()),
                Entry::Image => stray += 1,
                Entry::Unread | Entry::Other => {}
            }
        }
        folders.sort_unstable();
        let example = format!("each class is a folder of images, as in {shown}/cat/1.jpg");
        ensure!(!folders.is_empty() || stray == 0, "{shown} holds {stray} images but no folders; {example}");
        ensure!(!folders.is_empty(), "{shown} holds no class folders; {example}");
        let classes = folders.iter().map(|name| match name.to_str() {
            Some(name) => Ok(name.to_string()),
            None => bail!("the class folder {} has a name that is not UTF-8; rename it", root.join(name).display()),
        });
        let classes = classes.collect::<Result<Vec<String>>>()?;

        let identity = (about.dev(), about.ino());
        let found = classes.par_iter().map(|class| Found::walk(&root.join(class), identity)).collect::<Result<Vec<Found>>>()?;
        let mut set = Self { root: root.to_path_buf(), classes, names: Names::default(), firsts: vec![0], notes: Vec::new() };
        let mut unread = Unread::default();
        set.names.reserve(found.iter().map(|found| &found.names));
        for found in &found {
            set.names.append(&found.names);
            set.firsts.push(set.names.len());
            unread.add(&found.unread);
        }
        let unread = unread.sentence();
        if set.names.len() == 0 {
            let why = unread.unwrap_or_else(|| format!("files that end in .{} are looked for", ENDINGS.join(", .")));
            bail!("the {} class folders of {shown} hold no images; {why}", set.classes.len());
        }
        set.notes.extend(set.empty_classes());
        set.notes.extend(unread);
        if stray > 0 {
            set.notes.push(format!("{stray} images that lie in {shown} itself, in no class folder, are left out"));
        }
        Ok(set)
    }

    pub fn path(&self, index: usize) -> PathBuf {
        let class = &self.classes[self.label(index) as usize];
        self.root.join(class).join(OsStr::from_bytes(self.names.get(index)))
    }

    fn empty_classes(&self) -> Option<String> {
        let empty = (0..self.classes.len()).filter(|&class| self.firsts[class] == self.firsts[class + 1]);
        let empty: Vec<&str> = empty.map(|class| self.classes[class].as_str()).collect();
        let (first, count) = (empty.first()?, empty.len());
        let others = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
        Some(format!("no images lie in the class folder {}{others}; it stays a class", self.root.join(first).display()))
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> usize {
        self.names.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        (self.firsts.partition_point(|&first| first <= index) - 1) as u32
    }

    fn name(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        decode::open(&self.path(index))
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        decode::read_file(&self.path(index)).map(Some)
    }
}

/// Names one after another in one buffer.
#[derive(Default)]
struct Names {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Names {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..self.ends[index]]
    }

    fn push(&mut self, folder: &[u8], name: &[u8]) {
        if !folder.is_empty() {
            self.bytes.extend_from_slice(folder);
            self.bytes.push(b'/');
        }
        self.bytes.extend_from_slice(name);
        self.ends.push(self.bytes.len());
    }

    fn reserve<'a>(&mut self, others: impl Iterator<Item = &'a Self> + Clone) {
        self.bytes.reserve_exact(others.clone().map(|other| other.bytes.len()).sum());
        self.ends.reserve_exact(others.map(Self::len).sum());
    }

    fn append(&mut self, other: &Self) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&other.bytes);
        self.ends.extend(other.ends.iter().map(|end| start + end));
    }
}

/// Files that are images for others: how many of each ending, and one of them.
#[derive(Default)]
struct Unread {
    endings: BTreeMap<String, usize>,
    example: Option<PathBuf>,
}

impl Unread {
    fn add(&mut self, other: &Self) {
        for (ending, count) in &other.endings {
            *self.endings.entry(ending.clone()).or_default() += count;
        }
        self.example = self.example.take().or_else(|| other.example.clone());
    }

    fn sentence(&self) -> Option<String> {
        let example = self.example.as_ref()?.display();
        let endings: Vec<String> = self.endings.iter().map(|(ending, count)| format!("{count} .{ending}")).collect();
        Some(format!("files of kinds that are not read were left out ({}; {example} is one): convert them to PNG", endings.join(", ")))
    }
}

/// What lies in a class folder.
#[derive(Default)]
struct Found {
    names: Names,
    unread: Unread,
}

impl Found {
    /// `root` tells the folder of the whole set, which a link may lead back to.
    fn walk(class: &Path, root: (u64, u64)) -> Result<Self> {
        // The files of each folder, by the path from the class to it.
        let mut folders = BTreeMap::new();
        let mut unread = Unread::default();
        let mut open = vec![(Vec::new(), vec![root])];
        while let Some((folder, mut above)) = open.pop() {
            let path = class.join(OsStr::from_bytes(&folder));
            let about = fs::metadata(&path).with_context(|| format!("cannot open the folder {}", path.display()))?;
            let identity = (about.dev(), about.ino());
            if above.contains(&identity) {
                continue;
            }
            above.push(identity);
            let mut files = Vec::new();
            for entry in entries(&path)? {
                let name = entry.file_name();
                match class_of_entry(&entry)? {
                    Entry::Folder => {
                        let slash = if folder.is_empty() { &b""[..] } else { b"/" };
                        open.push(([folder.as_slice(), slash, name.as_bytes()].concat(), above.clone()));
                    }
                    Entry::Image => files.push(name),
                    Entry::Unread => {
                        *unread.endings.entry(ending(&name).unwrap_or_default()).or_default() += 1;
                        let path = entry.path();
                        unread.example = Some(unread.example.map_or(path.clone(), |example| example.min(path)));
                    }
                    Entry::Other => {}
                }
            }
            files.sort_unstable();
            folders.insert(folder, files);
        }
        let mut names = Names::default();
        for (folder, files) in folders {
            files.iter().for_each(|name| names.push(&folder, name.as_bytes()));
        }
        Ok(Self { names, unread })
    }
}

enum Entry {
    Folder,
    Image,
    Unread,
    Other,
}

/// All that lies in a folder but for names that begin with a dot.
fn entries(folder: &Path) -> Result<Vec<DirEntry>> {
    let cannot = || format!("cannot list the folder {}", folder.display());
    let entries = fs::read_dir(folder).with_context(cannot)?.collect::<std::io::Result<Vec<DirEntry>>>().with_context(cannot)?;
    Ok(entries.into_iter().filter(|entry| !entry.file_name().as_bytes().starts_with(b".")).collect())
}

fn ending(name: &OsStr) -> Option<String> {
    Some(Path::new(name).extension()?.to_str()?.to_ascii_lowercase())
}

fn class_of_entry(entry: &DirEntry) -> Result<Entry> {
    let kind = entry.file_type().with_context(|| format!("cannot look at {}", entry.path().display()))?;
    // A link that leads nowhere counts as the file that its name says, so that reading it names it.
    let folder = kind.is_dir() || (kind.is_symlink() && fs::metadata(entry.path()).is_ok_and(|about| about.is_dir()));
    let ending = ending(&entry.file_name()).unwrap_or_default();
    Ok(match ending.as_str() {
        _ if folder => Entry::Folder,
        ending if ENDINGS.contains(&ending) => Entry::Image,
        ending if UNREAD.contains(&ending) => Entry::Unread,
        _ => Entry::Other,
    })
}
