//! Packed files: what goes in comes out, an interrupted attempt is continued, no damage goes unseen.

use masque::data::packed::{Event, Options, Packed, Packing, Storage, export, pack};
use masque::data::{Dataset, Picture, decode::decode, resize};
use masque::error::{Error, Result};
use masque::formats::crc32c;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Images in memory, as JPEG and PNG files; some cannot be read.
struct Made {
    classes: Vec<String>,
    files: Vec<Vec<u8>>,
    unreadable: Vec<usize>,
    /// How many images were read.
    read: AtomicUsize,
}

impl Made {
    fn new(images: usize, unreadable: &[usize]) -> Self {
        let files = (0..images).map(|i| file(i, [9 + i % 5 * 7, 11 + i % 3 * 8])).collect();
        let classes = ["n01", "n02", "n03"].map(String::from).to_vec();
        Self { classes, files, unreadable: unreadable.to_vec(), read: AtomicUsize::new(0) }
    }
}

/// A JPEG or, every third time, a PNG.
fn file(seed: usize, [h, w]: [usize; 2]) -> Vec<u8> {
    let pixels = (0..h * w * 3).map(|i| ((i / 3 % w * 5 + i / 3 / w * 3 + i % 3 * 40 + seed * 17) % 256) as u8).collect();
    let image = image::RgbImage::from_raw(w as u32, h as u32, pixels).unwrap();
    let mut bytes = std::io::Cursor::new(Vec::new());
    let format = if seed % 3 == 2 { image::ImageFormat::Png } else { image::ImageFormat::Jpeg };
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

impl Dataset for Made {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        (index * 3 / self.files.len()) as u32
    }

    fn name(&self, index: usize) -> String {
        let ending = if index % 3 == 2 { "png" } else { "JPEG" };
        format!("/data/set/train/{}/{index}.{ending}", self.classes[self.label(index) as usize])
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        decode(&self.encoded(index)?.unwrap())
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        self.read.fetch_add(1, Ordering::Relaxed);
        if self.unreadable.contains(&index) {
            return Err(Error::new(format!("cannot read {}: no such file", self.name(index))));
        }
        Ok(Some(self.files[index].clone()))
    }
}

/// A folder of its own for a test, empty.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("packed_{test}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

const PIXELS: Storage = Storage::Pixels { short: 16 };

fn options(storage: Storage) -> Options<'static> {
    Options { storage, strict: false, force: false, root: Path::new("/data/set") }
}

fn packed(set: &Made, output: &Path, storage: Storage) -> Packing {
    pack(set, output, &options(storage), &mut |_| {}).unwrap()
}

fn partial(output: &Path) -> PathBuf {
    output.with_extension("masque.partial")
}

fn refusal<T>(result: Result<T>) -> String {
    result.err().expect("this has to be refused").chain()
}

#[test]
fn original_bytes_and_their_pictures_come_back() {
    let (set, output) = (Made::new(40, &[0, 7, 39]), folder("original").join("a.masque"));
    let mut skipped = Vec::new();
    let packing = pack(&set, &output, &options(Storage::Original), &mut |event| {
        if let Event::Skipped { name, why } = event {
            skipped.push(format!("{name}: {why}"));
        }
    });
    let packing = packing.unwrap();
    assert_eq!((packing.images, packing.skipped, packing.continued), (37, 3, 0));
    assert_eq!(packing.bytes, output.metadata().unwrap().len());
    assert_eq!(skipped.len(), 3);
    assert!(skipped[1].starts_with("train/n01/7.JPEG: ") && skipped[1].contains("no such file"), "{skipped:?}");
    assert!(!partial(&output).exists());

    let back = Packed::open(&output).unwrap();
    let kept: Vec<usize> = (0..40).filter(|index| !set.unreadable.contains(index)).collect();
    assert_eq!((back.len(), back.skipped(), back.storage()), (37, 3, Storage::Original));
    assert_eq!(back.classes(), set.classes());
    for (index, source) in kept.into_iter().enumerate().rev() {
        assert_eq!(back.label(index), set.label(source));
        assert_eq!(back.source(index), set.name(source).strip_prefix("/data/set/").unwrap());
        assert_eq!(back.name(index), format!("{}/{}", output.display(), back.source(index)));
        assert_eq!(back.encoded(index).unwrap().unwrap(), set.files[source]);
        assert_eq!(back.picture(index).unwrap(), set.picture(source).unwrap());
        assert_eq!(back.size(index).unwrap(), set.picture(source).unwrap().size);
    }
    assert!(back.picture(37).is_err());
    assert!(back.check(true, &mut |_| {}).is_none());
}

#[test]
fn pixels_are_those_of_the_resize_and_small_images_stay() {
    let (set, output) = (Made::new(30, &[]), folder("pixels").join("a.masque"));
    packed(&set, &output, PIXELS);
    let back = Packed::open(&output).unwrap();
    let mut stayed = 0;
    for index in 0..set.len() {
        let whole = set.picture(index).unwrap();
        let picture = back.picture(index).unwrap();
        if whole.size.iter().any(|&side| side <= 16) {
            stayed += 1;
            assert_eq!(picture, whole);
        } else {
            let to = resize::short_side_size(whole.size, 16).unwrap();
            assert_eq!(picture.size.iter().min(), Some(&16));
            assert_eq!(picture, Picture::new(to, 3, resize::resize(&whole.pixels, whole.size, 3, to).unwrap()).unwrap());
        }
        assert!(back.encoded(index).unwrap().is_none());
    }
    assert!((5..25).contains(&stayed), "{stayed}");
    // Packing the packed file gives the records again.
    let again = output.with_file_name("b.masque");
    let options = Options { root: &output, ..options(PIXELS) };
    pack(&back, &again, &options, &mut |_| {}).unwrap();
    assert_eq!(fs::read(&again).unwrap(), fs::read(&output).unwrap());
}

#[test]
fn an_attempt_cut_short_anywhere_is_continued_to_the_same_bytes() {
    for (storage, name) in [(Storage::Original, "original"), (PIXELS, "pixels")] {
        let (set, output) = (Made::new(12, &[3, 4]), folder(&format!("cut_{name}")).join("a.masque"));
        packed(&set, &output, storage);
        let whole = fs::read(&output).unwrap();
        let mut rng = masque::rng::Rng::new(4).stream("cuts", 0);
        let mut cuts: Vec<usize> = (0..60).map(|_| rng.below(whole.len())).collect();
        cuts.extend([0, 1, 63, 64, 65, 127, 128, whole.len() - 1, whole.len()]);
        let mut continued = Vec::new();
        for cut in cuts {
            fs::remove_file(&output).unwrap();
            fs::write(partial(&output), &whole[..cut]).unwrap();
            set.read.store(0, Ordering::Relaxed);
            let packing = packed(&set, &output, storage);
            assert!(fs::read(&output).unwrap() == whole, "{name} cut at {cut}");
            assert_eq!((packing.images, packing.skipped), (10, 2));
            // Nothing that was whole is read again; the first image may be asked whether it has a file.
            let reads = set.read.load(Ordering::Relaxed);
            assert!(reads <= 12 - packing.continued + 1, "{name} cut at {cut}: {reads} reads, {} were there", packing.continued);
            continued.push(packing.continued);
        }
        assert!(continued.contains(&0) && continued.contains(&10) && continued.iter().any(|&n| (3..8).contains(&n)), "{continued:?}");
    }
}

#[test]
fn a_damaged_record_of_an_earlier_attempt_is_written_again() {
    let (set, output) = (Made::new(9, &[]), folder("damaged_partial").join("a.masque"));
    packed(&set, &output, Storage::Original);
    let whole = fs::read(&output).unwrap();
    let mut rng = masque::rng::Rng::new(5).stream("bits", 0);
    for _ in 0..40 {
        fs::remove_file(&output).unwrap();
        let mut bytes = whole.clone();
        bytes[64 + rng.below(whole.len() - 64)] ^= 1 << rng.below(8);
        fs::write(partial(&output), &bytes).unwrap();
        packed(&set, &output, Storage::Original);
        assert!(fs::read(&output).unwrap() == whole);
    }
}

#[test]
fn another_list_or_other_settings_are_not_continued() {
    let (set, output) = (Made::new(9, &[]), folder("other").join("a.masque"));
    packed(&set, &output, Storage::Original);
    let whole = fs::read(&output).unwrap();
    fs::rename(&output, partial(&output)).unwrap();
    let attempt = |set: &Made, storage| pack(set, &output, &options(storage), &mut |_| {});
    let said = refusal(attempt(&set, PIXELS));
    assert!(said.contains("holds the files' own bytes, not pixels with a short side of up to 16; remove it"), "{said}");
    let mut renamed = Made::new(9, &[]);
    renamed.classes[1] = "n022".into();
    assert!(refusal(attempt(&renamed, Storage::Original)).contains("begun with another list of images"));
    assert!(refusal(attempt(&Made::new(10, &[]), Storage::Original)).contains("another list"));
    assert!(fs::read(partial(&output)).unwrap() == whole && !output.exists());
    let forced = Options { force: true, ..options(PIXELS) };
    assert_eq!(pack(&set, &output, &forced, &mut |_| {}).unwrap().continued, 0);
    assert_eq!(Packed::open(&output).unwrap().storage(), PIXELS);
    // A file of somebody else's is not overwritten unasked.
    fs::remove_file(&output).unwrap();
    fs::write(partial(&output), b"my diary").unwrap();
    assert!(refusal(attempt(&set, PIXELS)).contains("not the beginning of a packed file"));
    assert_eq!(fs::read(partial(&output)).unwrap(), b"my diary");
}

#[test]
fn a_finished_file_is_replaced_only_by_force() {
    let (set, output) = (Made::new(9, &[]), folder("force").join("a.masque"));
    packed(&set, &output, PIXELS);
    let said = refusal(pack(&set, &output, &options(Storage::Original), &mut |_| {}));
    assert!(said.contains("a.masque is there already; --force replaces it"), "{said}");
    assert_eq!(Packed::open(&output).unwrap().storage(), PIXELS);
    pack(&set, &output, &Options { force: true, ..options(Storage::Original) }, &mut |_| {}).unwrap();
    assert_eq!(Packed::open(&output).unwrap().storage(), Storage::Original);
}

#[test]
fn strict_data_names_the_first_image_that_cannot_be_read() {
    let (set, output) = (Made::new(40, &[20, 30]), folder("strict").join("a.masque"));
    let strict = Options { strict: true, ..options(Storage::Original) };
    let said = refusal(pack(&set, &output, &strict, &mut |_| {}));
    assert!(said.contains("n02/20.png") && !output.exists(), "{said}");
    // Once it can be read, the same command goes on.
    let packing = pack(&Made::new(40, &[]), &output, &strict, &mut |_| {}).unwrap();
    assert_eq!((packing.images, packing.skipped, packing.continued), (40, 0, 20));
    // What was left out is not forgiven.
    let (set, left_out) = (Made::new(9, &[2]), output.with_file_name("b.masque"));
    packed(&set, &left_out, Storage::Original);
    fs::rename(&left_out, partial(&left_out)).unwrap();
    assert!(refusal(pack(&set, &left_out, &strict, &mut |_| {})).contains("continue without --strict-data"));
}

#[test]
fn nothing_readable_leaves_nothing() {
    let output = folder("nothing").join("a.masque");
    let none: Vec<usize> = (0..9).collect();
    let said = refusal(pack(&Made::new(9, &none), &output, &options(PIXELS), &mut |_| {}));
    assert!(said.contains("none of the 9 images could be read"), "{said}");
    assert!(fs::read_dir(output.parent().unwrap()).unwrap().next().is_none());
    assert!(pack(&Made::new(0, &[]), &output, &options(PIXELS), &mut |_| {}).is_err());
}

#[test]
fn a_changed_bit_anywhere_is_found() {
    let (set, output) = (Made::new(5, &[]), folder("bits").join("a.masque"));
    packed(&set, &output, PIXELS);
    let whole = fs::read(&output).unwrap();
    let changed = output.with_file_name("b.masque");
    let (mut in_records, mut elsewhere) = (0, 0);
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 1 << (place % 8);
        fs::write(&changed, &bytes).unwrap();
        match Packed::open(&changed) {
            Err(error) => {
                assert!(error.chain().contains("b.masque"), "{}", error.chain());
                elsewhere += 1;
            }
            Ok(packed) => {
                let damage = packed.check(false, &mut |_| {}).unwrap_or_else(|| panic!("byte {place} was changed unseen"));
                assert_eq!(damage.records, 1);
                // No picture is made of damaged bytes.
                for index in 0..packed.len() {
                    assert!(
                        packed.picture(index).is_err()
                            || packed.picture(index).unwrap() == Packed::open(&output).unwrap().picture(index).unwrap()
                    );
                }
                in_records += 1;
            }
        }
    }
    assert!(in_records > 1000 && elsewhere > 500, "{in_records} {elsewhere}");
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let (set, output) = (Made::new(5, &[]), folder("short").join("a.masque"));
    packed(&set, &output, PIXELS);
    let whole = fs::read(&output).unwrap();
    let short = output.with_file_name("b.masque");
    for length in (0..whole.len()).step_by(13).chain(whole.len() - 70..whole.len()) {
        fs::write(&short, &whole[..length]).unwrap();
        assert!(refusal(Packed::open(&short)).contains("b.masque"), "{length}");
    }
    fs::write(&short, [&whole[..], &[0; 64]].concat()).unwrap();
    assert!(Packed::open(&short).is_err());
}

/// Writes `number` at `place` of a part of the file and makes the part's checksum right again.
fn forged(bytes: &mut [u8], part: std::ops::Range<usize>, place: usize, number: &[u8]) {
    let part = &mut bytes[part];
    part[place..place + number.len()].copy_from_slice(number);
    let end = part.len() - 4;
    let crc = crc32c(&part[..end]).to_le_bytes();
    part[end..].copy_from_slice(&crc);
}

#[test]
fn a_hostile_file_with_right_checksums_is_a_sentence() {
    let (set, output) = (Made::new(5, &[]), folder("hostile").join("a.masque"));
    packed(&set, &output, PIXELS);
    let whole = fs::read(&output).unwrap();
    let end = whole.len();
    let footer = end - 64..end;
    let tail = u64::from_le_bytes(whole[end - 56..end - 48].try_into().unwrap()) as usize;
    let hostile = output.with_file_name("b.masque");
    let check = |bytes: &[u8], what: &str| {
        fs::write(&hostile, bytes).unwrap();
        let said =
            refusal(Packed::open(&hostile).and_then(|packed| (0..packed.len()).try_for_each(|index| packed.picture(index).map(drop))));
        assert!(said.contains("b.masque"), "{what}: {said}");
    };
    for number in [0, 1, 63, 64, 1 << 31, 1 << 40, u64::MAX / 48, u64::MAX / 8 + 1, u64::MAX - 63, u64::MAX] {
        for place in [8, 16, 24, 32, 40] {
            let mut bytes = whole.clone();
            forged(&mut bytes, footer.clone(), place, &number.to_le_bytes());
            if bytes != whole {
                check(&bytes, &format!("footer {place}: {number}"));
            }
        }
    }
    for (place, number) in [(8, 0u32), (8, 2), (12, 0), (12, 3), (16, 0), (24, 0), (24, 4)] {
        let mut bytes = whole.clone();
        forged(&mut bytes, 0..64, place, &number.to_le_bytes());
        check(&bytes, &format!("head {place}: {number}"));
    }
    // The index of a file of which all checksums are right.
    let with_tail = |bytes: &mut [u8]| {
        let crc = crc32c(&bytes[tail..end - 64]).to_le_bytes();
        forged(bytes, footer.clone(), 48, &crc);
    };
    for number in [0u64, 1, 64, 65, 1 << 40, u64::MAX - 1, u64::MAX] {
        for place in [0, 8, 16] {
            for entry in [0, 4] {
                let mut bytes = whole.clone();
                let start = tail + entry * 48;
                forged(&mut bytes, start..start + 48, place, &number.to_le_bytes());
                with_tail(&mut bytes);
                if bytes != whole {
                    check(&bytes, &format!("entry {entry}, {place}: {number}"));
                }
            }
        }
        // Where names end.
        for place in [0, 16, 24, 56] {
            let mut bytes = whole.clone();
            let start = tail + 5 * 48 + place;
            bytes[start..start + 8].copy_from_slice(&(number | 1 << 50).to_le_bytes());
            with_tail(&mut bytes);
            check(&bytes, &format!("end {place}: {number}"));
        }
    }
    for (place, number) in [(24, 0u32), (24, u32::MAX), (28, 7), (32, 0), (32, 4), (36, 3), (36, u32::MAX)] {
        let mut bytes = whole.clone();
        forged(&mut bytes, tail..tail + 48, place, &number.to_le_bytes());
        with_tail(&mut bytes);
        check(&bytes, &format!("entry, {place}: {number}"));
    }
    for bytes in [&b""[..], b"masquePK", &[0; 64], &[0; 200], &[255; 4096]] {
        check(bytes, "no packed file");
    }
}

#[test]
fn export_gives_the_files_back() {
    let home = folder("export");
    let (set, output) = (Made::new(20, &[4]), home.join("a.masque"));
    packed(&set, &output, Storage::Original);
    let out = home.join("out");
    export(&Packed::open(&output).unwrap(), &out, &mut |_| {}).unwrap();
    let mut count = 0;
    for index in (0..set.len()).filter(|&index| index != 4) {
        let name = set.name(index);
        assert!(fs::read(out.join(name.strip_prefix("/data/set/train/").unwrap())).unwrap() == set.files[index], "{name}");
        count += 1;
    }
    let files = |folder: &Path| fs::read_dir(folder).unwrap().count();
    assert_eq!(["n01", "n02", "n03"].map(|class| files(&out.join(class))).iter().sum::<usize>(), count);
    assert_eq!(files(&home), 2);
    assert!(refusal(export(&Packed::open(&output).unwrap(), &out, &mut |_| {})).contains("is there already"));

    let (pixels, out) = (home.join("b.masque"), home.join("pngs"));
    packed(&set, &pixels, PIXELS);
    let back = Packed::open(&pixels).unwrap();
    export(&back, &out, &mut |_| {}).unwrap();
    for index in 0..back.len() {
        let name = Path::new(&back.source(index)).strip_prefix("train").unwrap().with_extension("png");
        assert_eq!(decode(&fs::read(out.join(&name)).unwrap()).unwrap(), back.picture(index).unwrap(), "{name:?}");
    }
}

/// A set whose names of classes and files are given.
struct Named {
    classes: Vec<String>,
    names: Vec<&'static str>,
    channels: usize,
}

impl Dataset for Named {
    fn len(&self) -> usize {
        self.names.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, _index: usize) -> u32 {
        0
    }

    fn name(&self, index: usize) -> String {
        self.names[index].to_string()
    }

    fn picture(&self, index: usize) -> Result<Picture> {
        let side = if self.channels == 3 { 1 } else { 32 };
        Picture::new([side, 2 * side], self.channels, vec![index as u8; 2 * side * side * self.channels])
    }
}

#[test]
fn export_stays_in_its_folder_and_loses_no_file() {
    let home = folder("names");
    let exported = |number: usize, class: &str, names: &[&'static str]| {
        let (file, out) = (home.join(format!("{number}.masque")), home.join(format!("out{number}")));
        pack(&Named { classes: vec![class.into()], names: names.to_vec(), channels: 3 }, &file, &options(PIXELS), &mut |_| {}).unwrap();
        export(&Packed::open(&file).unwrap(), &out, &mut |_| {}).map(|()| out)
    };
    for (number, class) in ["..", ".", "", "a/b", "/tmp", "a/"].into_iter().enumerate() {
        assert!(refusal(exported(number, class, &["x"])).contains("cannot be the name of a folder"), "{class}");
        assert!(!home.join(format!("out{number}")).exists());
    }
    let names = ["cat/x.jpg", "cat/x.bmp", "cat/../../y.jpg", "batch, row 7", "cat/deep/x.jpg", "cat"];
    let out = exported(10, "cat", &names).unwrap().join("cat");
    let files = ["x.png", "x.00000001.png", "00000002.png", "00000003.png", "deep/x.png", "00000005.png"];
    for (index, file) in files.iter().enumerate() {
        assert_eq!(decode(&fs::read(out.join(file)).unwrap()).unwrap().pixels, [index as u8; 6], "{file}");
    }
}

#[test]
fn images_of_other_channel_counts_are_kept_too() {
    for channels in [1, 4] {
        let output = folder(&format!("channels_{channels}")).join("a.masque");
        let set = Named { classes: vec!["cat".into()], names: vec!["row 1", "row 2"], channels };
        pack(&set, &output, &options(PIXELS), &mut |_| {}).unwrap();
        let picture = Packed::open(&output).unwrap().picture(1).unwrap();
        assert_eq!(picture, Picture::new([16, 32], channels, vec![1; 512 * channels]).unwrap());
        let out = output.with_file_name("out");
        export(&Packed::open(&output).unwrap(), &out, &mut |_| {}).unwrap();
        let file = image::open(out.join("cat/00000001.png")).unwrap();
        assert_eq!((usize::from(file.color().channel_count()), file.as_bytes()), (channels, &picture.pixels[..]));
    }
}

#[test]
fn original_bytes_are_asked_of_sets_that_have_them() {
    let output = folder("no_files").join("a.masque");
    let set = Named { classes: vec!["cat".into()], names: vec!["row 1"], channels: 3 };
    let error = pack(&set, &output, &options(Storage::Original), &mut |_| {}).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.chain().contains("row 1 has no file of its own; use --size"), "{}", error.chain());
    assert!(!partial(&output).exists());
}

fn masque(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_masque")).arg("data").args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn commands_pack_show_check_and_export() {
    let home = folder("commands");
    let (a, b) = (home.join("a.masque"), home.join("b.masque"));
    let set = Made::new(30, &[]);
    packed(&set, &a, Storage::Original);
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    let output = masque(&["pack", "--data_path", a, "--output", b, "--size", "16", "--threads", "2"]);
    assert!(output.status.success() && text(&output).contains("30 images of 3 classes"), "{}", text(&output));
    let direct = home.join("c.masque");
    packed(&set, &direct, PIXELS);
    assert!(fs::read(&direct).unwrap() == fs::read(b).unwrap());
    let output = masque(&["show", b]);
    assert!(output.status.success(), "{}", text(&output));
    for part in [
        "30 images of 3 classes, 10 of a class",
        "height 9 to 37, width 11 to 27 (all)",
        "pixels with a short side of up to 16",
        "  n02  10",
    ] {
        assert!(text(&output).contains(part), "{part}: {}", text(&output));
    }
    assert!(masque(&["check", b, "--decode"]).status.success());
    let out = home.join("out");
    assert!(masque(&["export", a, &format!("{}/", out.display())]).status.success());
    assert!(fs::read(out.join("n01/0.JPEG")).unwrap() == set.files[0]);

    let output = masque(&["pack", "--data-path", a, "--output", b]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("--force replaces it"), "{}", text(&output));
    let wrong: [&[&str]; 4] = [
        &["pack", "--data-path", a, "--output", b, "--size", "16", "--original"],
        &["pack", "--data-path", a, "--output", b, "--force", "--size", "0"],
        &["pack", "--data-path", a, "--output", b, "--force", "--split", "val"],
        &["pack", "--data-path", b, "--output", "c.masque", "--original"],
    ];
    for args in wrong {
        let output = masque(args);
        assert_eq!((output.status.code(), text(&output).lines().count()), (Some(2), 1), "{args:?}: {}", text(&output));
    }
    for args in [&["check", "missing.masque"][..], &["show", "missing.masque"], &["export", "missing.masque", "x"]] {
        let output = masque(args);
        assert_eq!((output.status.code(), text(&output).lines().count()), (Some(1), 1), "{args:?}: {}", text(&output));
        assert!(text(&output).contains("missing.masque"), "{}", text(&output));
    }

    let mut bytes = fs::read(b).unwrap();
    let places = [200, bytes.len() / 2];
    places.iter().for_each(|&place| bytes[place] ^= 1);
    fs::write(b, &bytes).unwrap();
    let output = masque(&["check", b]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("2 of 30 images of") && text(&output).contains("n01/0.JPEG is damaged"), "{}", text(&output));
}

#[test]
fn a_folder_with_broken_files_is_packed_without_them() {
    let home = folder("broken");
    // Ten files, so that the order of their names is that of their numbers.
    let set = Made::new(10, &[]);
    for (index, bytes) in set.files.iter().enumerate() {
        let path = home.join(set.name(index).strip_prefix("/data/").unwrap());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // The first half of a file, nothing of another.
        let length = [(4, bytes.len() / 2), (9, 0)].iter().find(|(broken, _)| *broken == index).map_or(bytes.len(), |&(_, length)| length);
        fs::write(path, &bytes[..length]).unwrap();
    }
    let (from, to) = (home.join("set"), home.join("train.masque"));
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let command = ["pack", "--data-path", from, "--output", to, "--original"];
    let output = masque(&[&command[..], &["--strict-data"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("n02/4.JPEG") && !Path::new(to).exists(), "{}", text(&output));
    let output = masque(&command);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 3 && lines[0].contains("n02/4.JPEG") && lines[1].contains("n03/9.JPEG"), "{said}");
    assert!(lines[2].contains("2 of 10 images were skipped"), "{said}");
    let back = Packed::open(Path::new(to)).unwrap();
    let kept: Vec<usize> = (0..10).filter(|index| ![4, 9].contains(index)).collect();
    assert_eq!(back.len(), kept.len());
    for (index, source) in kept.into_iter().enumerate() {
        assert_eq!((back.label(index), back.encoded(index).unwrap().unwrap()), (set.label(source), set.files[source].clone()));
        assert!(set.name(source).ends_with(&back.source(index)), "{}", back.source(index));
    }
    // It is found under the folder as well.
    assert!(masque(&["show", home.to_str().unwrap(), "--split", "train"]).status.success());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_reported_and_the_beginning_is_continued() {
    let home = folder("full");
    let (a, b) = (home.join("a.masque"), home.join("b.masque"));
    packed(&Made::new(90, &[]), &a, Storage::Original);
    let (from, to) = (a.to_str().unwrap(), b.to_str().unwrap());
    // A limit on the size of files stands for the end of a disk: 32 blocks of 512 or 1024 bytes.
    let script = "trap '' 25; ulimit -f 32; exec \"$@\"";
    let args = ["-c", script, "sh", env!("CARGO_BIN_EXE_masque"), "data", "pack", "--data-path", from, "--output", to, "--original"];
    let output = Command::new("sh").args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("b.masque.partial; what is there stays") && !b.exists(), "{}", text(&output));
    let output = masque(&["pack", "--data-path", from, "--output", to, "--original"]);
    assert!(output.status.success() && text(&output).contains("continuing with the"), "{}", text(&output));
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
}
