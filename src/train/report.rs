//! The page of a run: one file with everything in it, made from the files of the run folder, so that it can be made again at any time.
//!
//! Curves are inline SVG, pictures data URLs, the style stands in the page; there is no script and nothing is fetched. Everything that comes from a file is
//! escaped. What is missing or unreadable is left out, and said.

use super::chart::{Chart, Series, short};
use super::progress::{clock, three_digits};
use super::record::{COMMAND, EPOCHS, NOTES, PICTURES, Row, Rows, STEPS, is_plain, number, read_text, rows, words};
use crate::error::{Context, Result};
use crate::formats;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

/// Notes that are listed; the file has them all.
const MOST_NOTES: usize = 100;
/// Pictures from before the last ones.
const MOST_EARLIER: usize = 5;
/// A file of a picture that is larger is no picture of ours.
const MOST_BYTES: u64 = 16 << 20;

/// Writes `report.html` into a run folder.
pub fn write(folder: &Path) -> Result<()> {
    let page = Facts::read(folder)?.page();
    formats::write_atomically(&folder.join("report.html"), |out| out.write_all(page.as_bytes()).context("writing the page"))
}

/// Fit to stand in a page, between tags and within quotes.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

struct Shown {
    update: u64,
    caption: String,
    png: Vec<u8>,
}

struct Facts {
    name: String,
    command: String,
    settings: Vec<(String, String)>,
    epochs: Vec<Row>,
    steps: Vec<Row>,
    notes: Vec<Row>,
    pictures: Vec<Shown>,
    /// What could not be read.
    troubles: Vec<String>,
}

impl Facts {
    fn read(folder: &Path) -> Result<Self> {
        let mut troubles = Vec::new();
        let mut read = |name: &str| -> Result<Vec<Row>> {
            let Rows { rows, unreadable } = rows(&folder.join(name))?;
            if unreadable > 0 {
                troubles.push(format!("{unreadable} of the lines of {name} cannot be read and are left out"));
            }
            Ok(rows)
        };
        let (epochs, steps, notes, listed) = (read(EPOCHS)?, read(STEPS)?, read(NOTES)?, read(PICTURES)?);
        let command = read_text(&folder.join(COMMAND))?.unwrap_or_default().trim().to_string();
        let pictures = pictures(folder, &listed, &mut troubles);
        let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
        let name = whole.file_name().map_or_else(|| "run".to_string(), |name| name.to_string_lossy().into_owned());
        Ok(Self { name, settings: settings(&command), command, epochs, steps, notes, pictures, troubles })
    }

    fn setting(&self, name: &str) -> Option<&str> {
        self.settings.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The words of the command before its flags.
    fn title(&self) -> String {
        let words = words(&self.command);
        let title: Vec<_> = words.iter().take_while(|word| !word.starts_with('-')).take(4).cloned().collect();
        if title.is_empty() { "masque".to_string() } else { title.join(" ") }
    }

    /// Of one key over the epochs passed: rows of steps say them with a fraction, rows of epochs are counted from 0 and stand at their end.
    fn of_steps(&self, key: &str) -> Vec<(f64, Option<f64>)> {
        let has = self.steps.iter().filter(|row| row.contains_key(key));
        has.filter_map(|row| Some((number(row, "epoch")?, number(row, key)))).collect()
    }

    fn of_epochs(&self, key: &str) -> Vec<(f64, Option<f64>)> {
        let has = self.epochs.iter().filter(|row| row.contains_key(key));
        has.filter_map(|row| Some((number(row, "epoch")? + 1.0, number(row, key)))).collect()
    }

    fn last(&self, key: &str) -> Option<f64> {
        self.of_epochs(key).into_iter().rev().find_map(|point| point.1)
    }

    /// The best value and after how many epochs it was.
    fn best(&self, key: &str, better: fn(f64, f64) -> bool) -> Option<(f64, f64)> {
        let known = self.of_epochs(key).into_iter().filter_map(|(epoch, value)| Some((value?, epoch)));
        known.reduce(|best, other| if better(other.0, best.0) { other } else { best })
    }

    /// Seconds from row to row, and as much again for the updates before the first row. A gap that is much longer than the others (the run stood still) does
    /// not count.
    fn seconds(&self) -> Option<f64> {
        let mut times: Vec<f64> = self.steps.iter().chain(&self.epochs).filter_map(|row| number(row, "time")).collect();
        times.sort_by(f64::total_cmp);
        let mut gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_by(f64::total_cmp);
        let longest = 600f64.max(20.0 * gaps.get(gaps.len() / 2)?);
        let seconds: f64 = gaps.into_iter().filter(|gap| *gap <= longest).sum();
        let mut updates: Vec<f64> = self.steps.iter().chain(&self.epochs).filter_map(|row| number(row, "update")).collect();
        updates.sort_by(f64::total_cmp);
        updates.dedup();
        match updates[..] {
            // The rows of a run that began at a checkpoint of another folder begin late.
            [first, second, .., last] if first <= 2.0 * (second - first) => Some(seconds * last / (last - first)),
            _ => Some(seconds),
        }
    }

    fn rate(&self) -> Option<f64> {
        let mut rates: Vec<f64> = self.steps.iter().filter_map(|row| number(row, "images_per_s")).collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied()
    }

    fn updates(&self) -> Option<u64> {
        let update = |row: &Row| row.get("update").and_then(Value::as_u64);
        self.steps.iter().chain(&self.epochs).filter_map(update).max()
    }

    /// The run in one sentence.
    fn sentence(&self) -> String {
        let Some(updates) = self.updates() else { return "Nothing is recorded yet.".to_string() };
        let done = self.steps.iter().filter_map(|row| number(row, "epoch"));
        let done = done.chain(self.epochs.iter().filter_map(|row| Some(number(row, "epoch")? + 1.0))).fold(0.0, f64::max);
        let planned = self.setting("epochs").map(|epochs| format!(" of {epochs}")).unwrap_or_default();
        let mut text = format!("{}{planned} epochs, {updates} updates", short(done));
        let count = |name: &str| self.setting(name)?.parse::<u64>().ok();
        if let Some(images) = count("batch-size") {
            let ranks = self.epochs.last().and_then(|row| row.get("ranks")?.as_u64());
            let _ =
                write!(text, " of {} images", images.saturating_mul(count("accum-iter").unwrap_or(1)).saturating_mul(ranks.unwrap_or(1)));
            let _ = ranks.map_or(Ok(()), |ranks| write!(text, " by {ranks} ranks"));
        }
        if let Some(data) = self.setting("data-path") {
            let _ = write!(text, ", data: {data}");
        }
        if let Some(device) = self.setting("device") {
            let precision = self.setting("precision").map(|precision| format!(" in {precision}")).unwrap_or_default();
            let _ = write!(text, ", computed on {device}{precision}");
        }
        text + "."
    }

    fn tiles(&self) -> Vec<[String; 3]> {
        let mut tiles = Vec::new();
        let mut tile = |name: &str, value: String, more: String| tiles.push([name.to_string(), value, more]);
        let after = |epoch: f64| format!("after {} epochs", short(epoch));
        for (key, name) in [("test_acc1", "Accuracy"), ("test_acc1_ema", "Accuracy, averaged weights")] {
            if let (Some((best, at)), Some(last)) = (self.best(key, |a, b| a > b), self.last(key)) {
                let more = if best > last { format!("best, {}; last {last:.2} %", after(at)) } else { after(at) };
                tile(name, format!("{best:.2} %"), more);
            }
        }
        if let (Some((best, at)), Some(last)) = (self.best("test_loss", |a, b| a < b), self.last("test_loss")) {
            let more = if best < last { format!("best {}, {}", short(best), after(at)) } else { "the best so far".to_string() };
            tile("Validation loss", short(last), more);
        }
        let step = self.of_steps("loss").into_iter().rev().find_map(|point| point.1);
        if let Some(loss) = self.last("train_loss").or(step) {
            let first = self.of_steps("loss").into_iter().find_map(|point| point.1);
            tile("Training loss", short(loss), first.map(|first| format!("from {}", short(first))).unwrap_or_default());
        }
        if let Some(rate) = self.rate() {
            tile("Images per second", three_digits(rate), "median while training".to_string());
        }
        if let Some(seconds) = self.seconds() {
            tile("Time", clock(seconds), if seconds < 3600.0 { "minutes : seconds" } else { "hours : minutes : seconds" }.to_string());
        }
        let share = |what: &str| {
            let sum = |who: &str| {
                Some(self.epochs.iter().filter_map(|row| number(row, &format!("{who}_{what}"))).sum::<f64>()).filter(|sum| *sum > 0.0)
            };
            Some(100.0 * sum("teacher")? / (sum("teacher")? + sum("student")?))
        };
        if let (Some(time), Some(flops)) = (share("s"), share("flops_per_image")) {
            tile("Teacher", format!("{time:.0} %"), format!("of a step's time; {flops:.0} % of its FLOPs"));
        }
        if let (Some(views), Some(hidden), Some(predicted)) =
            (self.last("views_of_an_image"), self.last("corruption_rate"), self.last("prediction_rate"))
        {
            let asked = self.setting("pred-ratio").and_then(|ratio| ratio.parse::<f64>().ok());
            let asked = asked.map_or(String::new(), |ratio| format!(", asked for {} %", short(100.0 * ratio)));
            tile(
                "Hidden in each view",
                format!("{:.1} %", 100.0 * hidden),
                format!("{views} views predict {:.1} %{asked}", 100.0 * predicted),
            );
        }
        if let Some(count) = self.epochs.iter().rev().find_map(|row| number(row, "n_parameters")) {
            let (scale, unit) = if count >= 1e9 {
                (1e9, " G")
            } else if count >= 1e6 {
                (1e6, " M")
            } else {
                (1e3, " k")
            };
            tile("Parameters", format!("{}{unit}", three_digits(count / scale)), "trained".to_string());
        }
        tiles
    }

    fn charts(&self) -> Vec<String> {
        let series = |name: &str, points, dots| Series { name: name.to_string(), points, dots };
        let chart =
            |title: &str, series: Vec<Series>, from_zero| Chart { title: title.into(), x: "epoch".into(), series, from_zero }.figure();
        let mut training = self.of_steps("loss");
        if training.is_empty() {
            training = self.of_epochs("train_loss");
        }
        let parts: BTreeSet<&String> = self.steps.iter().flat_map(|row| row.keys()).filter(|key| key.starts_with("loss_")).collect();
        let parts = if parts.len() > 1 { parts } else { BTreeSet::new() };
        let part = |key: &&String| series(&key["loss_".len()..].replace('_', " "), self.of_steps(key), false);
        let validation = series("validation", self.of_epochs("test_loss"), true);
        let averaged = series("validation, averaged weights", self.of_epochs("test_loss_ema"), true);
        let accuracy =
            [("test_acc1", "first guess"), ("test_acc5", "among five guesses"), ("test_acc1_ema", "first guess, averaged weights")];
        let accuracy = accuracy.iter().map(|(key, name)| series(name, self.of_epochs(key), true)).collect();
        let all = [
            chart("Accuracy, %", accuracy, false),
            chart("Loss", vec![series("training", training, false), validation, averaged], false),
            chart("Parts of the loss", parts.iter().map(part).collect(), false),
            chart("Learning rate", vec![series("learning rate", self.of_steps("lr"), false)], true),
            chart("Images per second", vec![series("images/s", self.of_steps("images_per_s"), false)], true),
            chart(
                "Milliseconds of an update",
                vec![series("student", self.of_steps("student_ms"), false), series("teacher", self.of_steps("teacher_ms"), false)],
                true,
            ),
            chart("Length of the gradient", vec![series("gradient", self.of_steps("grad_norm"), false)], true),
        ];
        all.into_iter().flatten().collect()
    }

    fn page(&self) -> String {
        let title = self.title();
        let mut out = String::from(include_str!("report_head.html"));
        let _ = writeln!(out, "<title>{} - {}</title>", escaped(&self.name), escaped(&title));
        let _ = writeln!(out, "<style>\n{}</style>\n</head>\n<body>\n<main>", include_str!("report.css"));
        let _ = writeln!(
            out,
            "<h1>{}</h1>\n<p class=\"lead\">{} {}</p>",
            escaped(&self.name),
            escaped(&format!("{title}.")),
            escaped(&self.sentence())
        );
        self.add_tiles(&mut out);
        let charts = self.charts();
        if !charts.is_empty() {
            out.push_str("<div class=\"charts\">\n");
            for (i, chart) in charts.iter().enumerate() {
                let _ = write!(out, "<figure{}>\n{chart}</figure>\n", if i < wide(charts.len()) { " class=\"half\"" } else { "" });
            }
            out.push_str("</div>\n");
        }
        self.add_pictures(&mut out);
        self.add_notes(&mut out);
        if !self.settings.is_empty() {
            out.push_str("<h2>Settings</h2>\n<div class=\"box\"><dl class=\"settings\">\n");
            for (name, value) in &self.settings {
                let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escaped(name), escaped(value));
            }
            out.push_str("</dl></div>\n");
        }
        if !self.command.is_empty() {
            let _ = writeln!(out, "<h2>To repeat this run</h2>\n<pre class=\"box\">{}</pre>", escaped(&self.command));
        }
        let version = env!("CARGO_PKG_VERSION");
        let _ = writeln!(out, "<footer>Written by masque {version} from the files of the run folder.</footer>\n</main>\n</body>\n</html>");
        out
    }

    fn add_tiles(&self, out: &mut String) {
        let tiles = self.tiles();
        if tiles.is_empty() {
            return;
        }
        out.push_str("<div class=\"tiles\">\n");
        for [name, value, more] in tiles.iter().map(|tile| tile.each_ref().map(|text| escaped(text))) {
            let _ = writeln!(out, "<div class=\"tile\"><span>{name}</span><b>{value}</b><small>{more}</small></div>");
        }
        out.push_str("</div>\n");
    }

    fn add_pictures(&self, out: &mut String) {
        let Some(last) = self.pictures.iter().map(|shown| shown.update).max() else { return };
        let add = |out: &mut String, shown: &[&Shown]| {
            out.push_str("<div class=\"pictures\">\n");
            for shown in shown {
                let caption = escaped(&shown.caption);
                let png = base64(&shown.png);
                let _ = writeln!(
                    out,
                    "<figure><img alt=\"{caption}\" src=\"data:image/png;base64,{png}\"><figcaption>{caption}</figcaption></figure>"
                );
            }
            out.push_str("</div>\n");
        };
        let (now, earlier): (Vec<&Shown>, Vec<&Shown>) = self.pictures.iter().partition(|shown| shown.update == last);
        out.push_str("<h2>Pictures</h2>\n");
        add(out, &now);
        if !earlier.is_empty() {
            out.push_str("<details><summary>Earlier pictures</summary>\n");
            add(out, &earlier);
            out.push_str("</details>\n");
        }
    }

    fn add_notes(&self, out: &mut String) {
        if self.notes.is_empty() && self.troubles.is_empty() {
            return;
        }
        out.push_str("<h2>Notes</h2>\n<div class=\"box\"><ul class=\"notes\">\n");
        for trouble in &self.troubles {
            let _ = writeln!(out, "<li>{}</li>", escaped(trouble));
        }
        let left_out = self.notes.len().saturating_sub(MOST_NOTES);
        if left_out > 0 {
            let _ = writeln!(out, "<li>{left_out} earlier notes stand in {NOTES}</li>");
        }
        for row in &self.notes[left_out..] {
            let note = row.get("note").and_then(Value::as_str).unwrap_or_default();
            let update = row.get("update").and_then(Value::as_u64).map(|update| format!(" <small>update {update}</small>"));
            let _ = writeln!(out, "<li>{}{}</li>", escaped(note), update.unwrap_or_default());
        }
        out.push_str("</ul></div>\n");
    }
}

/// How many of the charts are wide, two in a row, so that the others fill rows of three.
fn wide(charts: usize) -> usize {
    match charts % 3 {
        0 => 0,
        1 => charts.min(4),
        _ => 2,
    }
}

/// `--name=value` and `--name value`; a flag that stands alone is on.
fn settings(command: &str) -> Vec<(String, String)> {
    let words = words(command);
    let mut settings = Vec::new();
    let mut at = 0;
    while at < words.len() {
        let word = &words[at];
        at += 1;
        let Some(flag) = word.strip_prefix("--").filter(|flag| !flag.is_empty()) else { continue };
        let next = words.get(at).filter(|next| !next.starts_with("--"));
        let (name, value) = match (flag.split_once('='), next) {
            (Some((name, value)), _) => (name, value.to_string()),
            (None, Some(value)) => {
                at += 1;
                (flag, value.clone())
            }
            (None, None) => (flag, "on".to_string()),
        };
        settings.push((name.to_string(), value));
    }
    settings
}

/// The pictures of the last update that has some, and a few from before; of several rows for one file the last one counts.
fn pictures(folder: &Path, listed: &[Row], troubles: &mut Vec<String>) -> Vec<Shown> {
    let text = |row: &Row, key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let update = |row: &Row| row.get("update").and_then(Value::as_u64).unwrap_or(0);
    let mut seen = BTreeSet::new();
    let mut rows: Vec<&Row> = listed.iter().rev().filter(|row| seen.insert(text(row, "file"))).collect();
    rows.reverse();
    rows.sort_by_key(|row| update(row));
    let last = rows.last().map_or(0, |row| update(row));
    let earlier = rows.iter().filter(|row| update(row) < last).count();
    let kept = |i: usize| i >= earlier || earlier <= MOST_EARLIER || (i * MOST_EARLIER) % earlier < MOST_EARLIER;
    let mut found = Vec::new();
    for (_, row) in rows.iter().enumerate().filter(|(i, _)| kept(*i)) {
        let file = text(row, "file");
        match png(folder, &file) {
            Ok(png) => found.push(Shown { update: update(row), caption: text(row, "caption"), png }),
            Err(why) => troubles.push(format!("the picture {file} is left out: {why}")),
        }
    }
    found
}

/// A picture that the run wrote: in its own folder, and a PNG.
fn png(folder: &Path, file: &str) -> std::result::Result<Vec<u8>, String> {
    let name = file.strip_prefix("pictures/").and_then(|name| name.strip_suffix(".png"));
    if !name.is_some_and(is_plain) {
        return Err("it is not in the folder pictures".to_string());
    }
    let path = folder.join(file);
    let size = std::fs::metadata(&path).map_err(|error| error.to_string())?.len();
    if size > MOST_BYTES {
        return Err(format!("it has {size} bytes, more than {MOST_BYTES}"));
    }
    let bytes = std::fs::read(&path).map_err(|error| error.to_string())?;
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") { Ok(bytes) } else { Err("it is no PNG".to_string()) }
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0, |bits, i| bits << 8 | group.get(i).copied().unwrap_or(0) as usize);
        (0..4).for_each(|i| out.push(if i <= group.len() { LETTERS[bits >> (18 - 6 * i) & 63] as char } else { '=' }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_the_values_of_its_standard() {
        let expected =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy")];
        expected.iter().for_each(|(text, encoded)| assert_eq!(base64(text.as_bytes()), *encoded));
        assert_eq!(base64(&[255, 254, 253]), "//79");
    }

    #[test]
    fn settings_are_read_in_both_spellings() {
        let found = settings("masque pretrain mae --epochs=40 --data-path 'my pictures' --norm-pix-loss --lr=-1e-3 --seed 2");
        let found: Vec<_> = found.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        assert_eq!(found, ["epochs: 40", "data-path: my pictures", "norm-pix-loss: on", "lr: -1e-3", "seed: 2"]);
    }
}
