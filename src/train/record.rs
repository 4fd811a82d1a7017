//! A run folder: the command, what happened, and what can be drawn from it.
//!
//! | file | what it holds |
//! |---|---|
//! | `command.txt` | the whole command with every setting, enough to repeat the run |
//! | `log.jsonl` | a row an epoch, under the official names: train_lr, train_loss, test_loss, test_acc1, test_acc5, epoch, n_parameters |
//! | `steps.jsonl` | a row every so many updates: update, epoch (with its fraction), loss, lr, grad_norm, images_per_s |
//! | `notes.jsonl` | what a person should know: steps that were skipped, files that could not be read |
//! | `pictures.jsonl`, `pictures/` | pictures, each with a caption |
//! | `events.out.tfevents.*` | the same curves for TensorBoard, made from the rows |
//!
//! Every row also says its `update` and `time` (seconds since 1970). Rows are only appended, a whole line at a time; a number that is not finite is null. When
//! a run goes on from a checkpoint, the rows behind it are dropped: the steps they tell of are taken again.
//!
//! For TensorBoard, x = int(1000 epoch) for the rows of steps, and x = epoch for perf/test_acc1, perf/test_acc5 and perf/test_loss. The loss is called
//! train_loss where the command is `masque pretrain`, and loss elsewhere.

use super::events::{Events, Scalar};
use crate::error::{Context, Error, Result};
use crate::{ensure, formats};
use serde_json::Value;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// One line of a file of rows.
pub type Row = serde_json::Map<String, Value>;

pub const COMMAND: &str = "command.txt";
pub const EPOCHS: &str = "log.jsonl";
pub const STEPS: &str = "steps.jsonl";
pub const NOTES: &str = "notes.jsonl";
pub const PICTURES: &str = "pictures.jsonl";

/// The files whose rows are appended.
const FILES: [&str; 4] = [EPOCHS, STEPS, NOTES, PICTURES];

/// A file that grows by whole pieces: one that does not fit on the disk leaves no half of itself behind.
pub(super) struct Appender {
    path: PathBuf,
    file: File,
}

impl Appender {
    /// An empty file, whatever was there.
    pub fn create(path: PathBuf) -> Result<Self> {
        let attempt = || format!("cannot write {}", path.display());
        File::create(&path).with_context(attempt)?;
        Self::open(path)
    }

    /// The file as it is, or an empty one.
    pub fn open(path: PathBuf) -> Result<Self> {
        let attempt = || format!("cannot write {}", path.display());
        let file = File::options().append(true).create(true).open(&path).with_context(attempt)?;
        Ok(Self { path, file })
    }

    pub fn append(&mut self, piece: &[u8]) -> Result<()> {
        let attempt = || format!("cannot write {}", self.path.display());
        let before = self.file.metadata().with_context(attempt)?.len();
        let written = self.file.write_all(piece);
        if written.is_err() {
            let _ = self.file.set_len(before);
        }
        written.with_context(attempt)
    }
}

/// Time that updates took, the teacher's apart.
#[derive(Clone, Copy, Default)]
pub struct Spent {
    pub updates: u64,
    pub student: f64,
    pub teacher: f64,
}

impl Spent {
    pub fn add(&mut self, all: f64, teacher: f64) {
        self.updates += 1;
        self.teacher += teacher;
        self.student += all - teacher;
    }

    pub fn text(&self) -> String {
        let [teacher, all] = [self.teacher, self.teacher + self.student].map(|seconds| 1e3 * seconds / self.updates as f64);
        format!("the teacher took {teacher:.2} of {all:.2} ms an update, {:.0} %", 100.0 * teacher / all)
    }
}

pub struct Record {
    folder: PathBuf,
    /// None where another rank writes.
    open: Option<Open>,
    loss: &'static str,
}

struct Open {
    /// In the order of `FILES`.
    files: [Appender; 4],
    events: Events,
}

/// Makes the folder, and sure that no other process writes into it for as long as the answer is held.
pub fn lock(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let attempt = || format!("cannot write into {}", folder.display());
    let file = File::options().create(true).truncate(false).write(true).open(folder.join(".lock")).with_context(attempt)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(format!(
            "{} is being written by another process; wait for it, or choose another --output-dir",
            folder.display()
        ))),
        Err(TryLockError::Error(error)) => Err(error).with_context(attempt),
    }
}

impl Record {
    /// Of a rank that does not write: what it is given goes nowhere.
    pub fn silent(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf(), open: None, loss: "" }
    }

    /// Begins a run folder with the full resolved command; rows of an earlier run are gone.
    pub fn create(folder: &Path, command: &str) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        write_text(&folder.join(COMMAND), &format!("{}\n", command.trim_end()))?;
        for name in FILES {
            Appender::create(folder.join(name))?;
        }
        Self::open(folder, command)
    }

    /// Goes on with a run folder from a checkpoint at this update.
    pub fn resume(folder: &Path, update: u64, command: &str) -> Result<Self> {
        write_text(&folder.join(COMMAND), &format!("{}\n", command.trim_end()))?;
        for name in FILES {
            let path = folder.join(name);
            let Some(text) = read_text(&path)? else { continue };
            let keep = |line: &&str| parse(line).is_some_and(|row| row.get("update").and_then(Value::as_u64).unwrap_or(0) <= update);
            let kept: String = text.lines().filter(keep).flat_map(|line| [line, "\n"]).collect();
            if kept != text {
                write_text(&path, &kept)?;
            }
        }
        Self::open(folder, command)
    }

    /// Whether a folder holds the rows of a run.
    pub fn holds_run(folder: &Path) -> bool {
        [EPOCHS, STEPS].iter().any(|name| fs::metadata(folder.join(name)).is_ok_and(|file| file.len() > 0))
    }

    fn open(folder: &Path, command: &str) -> Result<Self> {
        let loss = if words(command).get(1).is_some_and(|word| word == "pretrain") { "train_loss" } else { "loss" };
        let steps = rows(&folder.join(STEPS))?.rows.into_iter().flat_map(|row| scalars_of_step(&row, loss));
        let epochs = rows(&folder.join(EPOCHS))?.rows.into_iter().flat_map(|row| scalars_of_epoch(&row));
        let scalars: Vec<Scalar> = steps.chain(epochs).collect();
        let [a, b, c, d] = FILES.map(|name| Appender::open(folder.join(name)));
        let open = Open { files: [a?, b?, c?, d?], events: Events::create(folder, now(), &scalars)? };
        Ok(Self { folder: folder.to_path_buf(), open: Some(open), loss })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether what it is given is written.
    pub fn writes(&self) -> bool {
        self.open.is_some()
    }

    /// A row of `log.jsonl`; it must say "epoch" and "update".
    pub fn epoch(&mut self, row: &Row) -> Result<()> {
        let row = self.append(0, row, &["epoch", "update"])?;
        self.events(&scalars_of_epoch(&row))
    }

    /// A row of `steps.jsonl`; it must say "epoch" and "update".
    pub fn step(&mut self, row: &Row) -> Result<()> {
        let row = self.append(1, row, &["epoch", "update"])?;
        self.events(&scalars_of_step(&row, self.loss))
    }

    fn events(&mut self, scalars: &[Scalar]) -> Result<()> {
        self.open.as_mut().map_or(Ok(()), |open| open.events.write(scalars))
    }

    /// A sentence for the report: a step that was skipped, a file that was not read.
    pub fn note(&mut self, update: u64, text: &str) -> Result<()> {
        let row = Row::from_iter([("update".to_string(), update.into()), ("note".to_string(), text.into())]);
        self.append(2, &row, &[]).map(|_| ())
    }

    /// A PNG for the report: `pictures/NAME.png` with a caption.
    pub fn picture(&mut self, update: u64, name: &str, caption: &str, png: &[u8]) -> Result<()> {
        ensure!(is_plain(name), "a picture of a run is named with letters, digits, - and _, not {name:?}");
        if self.open.is_none() {
            return Ok(());
        }
        let folder = self.folder.join("pictures");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let file = format!("pictures/{name}.png");
        formats::write_atomically(&self.folder.join(&file), |out| out.write_all(png).context("writing the picture"))?;
        let row = [("update".to_string(), update.into()), ("file".to_string(), file.into()), ("caption".to_string(), caption.into())];
        self.append(3, &Row::from_iter(row), &[]).map(|_| ())
    }

    fn append(&mut self, file: usize, row: &Row, wanted: &[&str]) -> Result<Row> {
        for &key in wanted {
            ensure!(row.get(key).is_some_and(Value::is_number), "a row of {} must say its {key}", FILES[file]);
        }
        let mut row = row.clone();
        row.entry("time").or_insert_with(|| ((now() * 1000.0).round() / 1000.0).into());
        let line = serde_json::to_string(&row).context("a row that is no JSON")? + "\n";
        if let Some(open) = &mut self.open {
            open.files[file].append(line.as_bytes())?;
        }
        Ok(row)
    }
}

pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    formats::write_atomically(path, |out| out.write_all(text.as_bytes()).context("writing its text"))
}

/// The text of a file; None if there is none. Bytes that are no text are replaced.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The rows of a file, and how many of its lines are none.
#[derive(Default)]
pub(super) struct Rows {
    pub rows: Vec<Row>,
    pub unreadable: usize,
}

pub(super) fn rows(path: &Path) -> Result<Rows> {
    let mut found = Rows::default();
    for line in read_text(path)?.unwrap_or_default().lines().filter(|line| !line.trim().is_empty()) {
        match parse(line) {
            Some(row) => found.rows.push(row),
            None => found.unreadable += 1,
        }
    }
    Ok(found)
}

/// A row; Python's NaN and Infinity, which are no JSON, count as null.
fn parse(line: &str) -> Option<Row> {
    let strict = serde_json::from_str(line);
    let lenient = || serde_json::from_str(&line.replace("NaN", "null").replace("-Infinity", "null").replace("Infinity", "null"));
    strict.or_else(|_| lenient()).ok()
}

pub(super) fn number(row: &Row, key: &str) -> Option<f64> {
    row.get(key).and_then(Value::as_f64)
}

fn scalars_of_step(row: &Row, loss: &str) -> Vec<Scalar> {
    let (Some(epoch), time) = (number(row, "epoch"), number(row, "time").unwrap_or(0.0)) else { return Vec::new() };
    let shown = row.iter().filter(|(key, _)| !matches!(key.as_str(), "update" | "epoch" | "time"));
    let tag = |key: &str| if key == "loss" { loss.to_string() } else { key.to_string() };
    let scalar = |(key, value): (&String, &Value)| {
        Some(Scalar { time, step: (1000.0 * epoch) as i64, tag: tag(key), value: value.as_f64()? as f32 })
    };
    shown.filter_map(scalar).collect()
}

fn scalars_of_epoch(row: &Row) -> Vec<Scalar> {
    let (Some(epoch), time) = (number(row, "epoch"), number(row, "time").unwrap_or(0.0)) else { return Vec::new() };
    let scalar = |key: &&str| Some(Scalar { time, step: epoch as i64, tag: format!("perf/{key}"), value: number(row, key)? as f32 });
    ["test_acc1", "test_acc5", "test_loss"].iter().filter_map(scalar).collect()
}

/// Words as one command that a shell takes apart into the same words.
pub fn command_line<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    let quoted = |word: &'a str| match word {
        word if !word.is_empty() && word.chars().all(plain) => word.to_string(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// The words of a command, quotes and backslashes taken as a shell takes them.
pub fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut characters = command.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => (quote, word) = (Some(c), Some(word.unwrap_or_default())),
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(characters.next()),
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(value: Value) -> Row {
        value.as_object().unwrap().clone()
    }

    /// A new folder; removed when the test is over.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("masque-record-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }

        fn text(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).unwrap()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn resuming_drops_the_rows_behind_the_checkpoint_and_a_torn_line() {
        let folder = Folder::new("resume");
        let mut record = Record::create(&folder.0, "masque pretrain mae --epochs 3").unwrap();
        for update in 1..=6u64 {
            record.step(&row(json!({"update": update, "epoch": update as f64 / 2.0, "loss": 1.0 / update as f64, "lr": 0.1}))).unwrap();
        }
        record.epoch(&row(json!({"train_loss": 0.5, "epoch": 0, "update": 2}))).unwrap();
        record.epoch(&row(json!({"train_loss": 0.4, "epoch": 1, "update": 4}))).unwrap();
        record.note(5, "a step was skipped").unwrap();
        drop(record);
        let mut torn = File::options().append(true).open(folder.0.join(STEPS)).unwrap();
        torn.write_all(b"{\"update\":3,\"lo").unwrap();

        let mut record = Record::resume(&folder.0, 3, "masque pretrain mae --epochs 4").unwrap();
        assert_eq!(folder.text(COMMAND), "masque pretrain mae --epochs 4\n");
        record.step(&row(json!({"update": 4, "epoch": 2.0, "loss": 7.0, "lr": 0.1}))).unwrap();
        let updates: Vec<u64> = rows(&folder.0.join(STEPS)).unwrap().rows.iter().map(|row| row["update"].as_u64().unwrap()).collect();
        assert_eq!(updates, [1, 2, 3, 4]);
        assert_eq!((folder.text(EPOCHS).lines().count(), folder.text(NOTES).as_str()), (1, ""));
        assert_eq!(super::super::events::files(&folder.0).unwrap().len(), 1);
        let leftovers = fs::read_dir(&folder.0).unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with(".tmp"));
        assert_eq!(leftovers.count(), 0);
    }

    /// Step, tag and value of each scalar; lengths are checked on the way, sums in `events`.
    fn scalars(mut bytes: &[u8]) -> Vec<(u64, String, f32)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let data = &bytes[12..12 + length];
            bytes = &bytes[16 + length..];
            let (mut step, mut at) = (0u64, 10);
            loop {
                step |= (data[at] as u64 & 127) << (7 * (at - 10));
                at += 1;
                if data[at - 1] < 128 {
                    break;
                }
            }
            if data[at] == 0x2a {
                let tag = &data[at + 6..at + 6 + data[at + 5] as usize];
                let value = f32::from_le_bytes(data[length - 4..].try_into().unwrap());
                found.push((step, String::from_utf8(tag.to_vec()).unwrap(), value));
            }
        }
        found
    }

    #[test]
    fn events_have_the_official_tags_and_steps_and_leave_out_what_is_not_finite() {
        let folder = Folder::new("events");
        let events = || fs::read(&super::super::events::files(&folder.0).unwrap()[0]).unwrap();
        let mut record = Record::create(&folder.0, "masque pretrain mae").unwrap();
        record.step(&row(json!({"update": 1, "epoch": 0.3125, "loss": 0.25, "lr": 0.5}))).unwrap();
        record.step(&row(json!({"update": 2, "epoch": 0.625, "loss": f64::NAN, "lr": 0.5}))).unwrap();
        record.epoch(&row(json!({"test_acc1": 61.5, "test_loss": null, "epoch": 4, "update": 2}))).unwrap();
        let named = |step, tag: &str, value| (step, tag.to_string(), value);
        let expected = [named(312, "train_loss", 0.25), named(312, "lr", 0.5), named(625, "lr", 0.5), named(4, "perf/test_acc1", 61.5)];
        assert_eq!(scalars(&events()), expected);
        drop(record);
        let mut record = Record::resume(&folder.0, 1, "masque pretrain mae").unwrap();
        assert_eq!(scalars(&events()), expected[..2]);
        record.epoch(&row(json!({"test_acc5": 90.0, "epoch": 1, "update": 4}))).unwrap();
        assert_eq!(scalars(&events())[2..], [named(1, "perf/test_acc5", 90.0)]);
        drop(record);
        Record::create(&folder.0, "masque finetune").unwrap().step(&row(json!({"update": 1, "epoch": 1, "loss": 2.0}))).unwrap();
        assert_eq!(scalars(&events()), [named(1000, "loss", 2.0)]);
    }

    #[test]
    fn a_folder_is_held_by_one_at_a_time() {
        let folder = Folder::new("held");
        let held = lock(&folder.0).unwrap();
        let error = lock(&folder.0).unwrap_err().chain();
        assert!(error.contains("is being written by another process"), "{error}");
        drop(held);
        lock(&folder.0).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_one_sentence() {
        let folder = Folder::new("unwritable");
        fs::create_dir_all(&folder.0).unwrap();
        fs::write(folder.0.join("file"), "").unwrap();
        let error = Record::create(&folder.0.join("file/run"), "masque pretrain mae").err().unwrap().chain();
        assert!(error.starts_with("cannot make the folder ") && error.contains("file/run"), "{error}");
        assert!(!Record::holds_run(&folder.0));
    }

    #[test]
    fn a_full_disk_is_one_sentence() {
        let full = Path::new("/dev/full");
        if full.exists() {
            let error = Appender::open(full.to_path_buf()).unwrap().append(b"{}\n").unwrap_err().chain();
            assert!(error.starts_with("cannot write /dev/full: ") && error.contains("space"), "{error}");
        }
    }

    #[test]
    fn a_row_without_its_update_is_refused() {
        let folder = Folder::new("row");
        let mut record = Record::create(&folder.0, "masque probe").unwrap();
        let error = record.step(&row(json!({"epoch": 1.0}))).unwrap_err().to_string();
        assert_eq!(error, "a row of steps.jsonl must say its update");
        assert!(record.picture(1, "../x", "", b"").is_err());
    }

    #[test]
    fn a_command_is_taken_apart_into_the_words_it_was_made_of() {
        let typed = ["masque", "pretrain", "--data-path", "/my pictures/it's", "--note", "", "--lr", "1.5e-4", "a\\b", "\"x\" $HOME"];
        let line = command_line(typed);
        assert_eq!(words(&line), typed);
        assert_eq!(words("a  \"b c\\\"d\"\n e\\ f 'g'h"), ["a", "b c\"d", "e f", "gh"]);
    }
}
