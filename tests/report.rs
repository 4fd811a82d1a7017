//! The page of a run, as a browser gets it.

mod common;

use common::Scratch;
use masque::data::Picture;
use masque::train::picture::{SheetRow, sheet};
use masque::train::record::{Record, Row};
use masque::train::report;
use serde_json::{Value, json};
use std::fs;

impl Scratch {
    fn page(&self) -> String {
        report::write(&self.0).unwrap();
        fs::read_to_string(self.0.join("report.html")).unwrap()
    }
}

fn row(value: Value) -> Row {
    value.as_object().unwrap().clone()
}

fn png(shade: u8) -> Vec<u8> {
    let picture = Picture::new([8, 8], 3, vec![shade; 192]).unwrap();
    sheet(&[SheetRow { label: String::new(), panels: vec![("original".into(), picture)] }]).unwrap().png().unwrap()
}

/// A pre-training run of four epochs with a picture, a skipped update and an odd name.
fn whole(folder: &Scratch) -> Record {
    let mut record =
        Record::create(&folder.0, "masque pretrain mae --epochs=4 --data-path='<i>pictures</i> & more' --batch-size=64").unwrap();
    for update in 1..=40u64 {
        let loss = if update == 7 { f64::NAN } else { 1.0 / update as f64 };
        let values =
            json!({"update": update, "epoch": update as f64 / 10.0, "loss": loss, "lr": 1e-4, "grad_norm": 2.0, "images_per_s": 900.0});
        record.step(&row(values)).unwrap();
    }
    for epoch in 0..4u64 {
        let update = 10 * (epoch + 1);
        let values = json!({"train_loss": 0.5, "test_loss": 0.6, "epoch": epoch, "update": update, "n_parameters": 1_234_567});
        record.epoch(&row(values)).unwrap();
    }
    record.note(7, "update 7 was skipped: the loss is NaN <script>alert(1)</script>").unwrap();
    record.picture(40, "reconstruction", "\"original\", masked <b>&</b> painted", &png(90)).unwrap();
    record
}

/// Every opened element is closed, in order; what a browser would have to guess is a defect.
fn check_nesting(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1) {
        let (inside, _) = tag.split_once('>').expect("a tag ends");
        let name = inside.split([' ', '/', '\n']).find(|part| !part.is_empty()).unwrap();
        if let Some(closed) = inside.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed), "{inside}");
        } else if !inside.ends_with('/') && !matches!(name, "!doctype" | "meta" | "link" | "img") {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

fn check_alone(page: &str) {
    for forbidden in ["http://", "https://", "<script", "javascript:", "@import", "url(", "onload", "<iframe", "src=\"/", "href=\"/"] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    for source in ["src=\"", "href=\""] {
        assert!(page.split(source).skip(1).all(|rest| rest.starts_with("data:")), "{source}");
    }
    assert!(!page.contains("NaN\"") && !page.contains("inf\"") && !page.contains("NaN,") && !page.contains(",NaN"));
    check_nesting(page);
}

#[test]
fn a_page_is_whole_in_itself_and_shows_the_run() {
    let folder = Scratch::new("report-whole");
    whole(&folder);
    let page = folder.page();
    check_alone(&page);
    for title in ["Loss", "Learning rate", "Images per second", "Length of the gradient"] {
        assert!(page.contains(&format!("<figcaption>{title}")), "{title}");
    }
    for text in
        ["4 of 4 epochs, 40 updates of 64 images", "<b>1.23 M</b>", "<b>900</b>", "prefers-color-scheme: dark", "width=device-width"]
    {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("<figcaption>Accuracy"));
    assert!(page.contains("data:image/png;base64,iVBORw0KGgo"));
    assert!(page.contains("<dt>batch-size</dt><dd>64</dd>"));
}

#[test]
fn what_comes_from_files_is_escaped() {
    let folder = Scratch::new("report-escaped");
    whole(&folder);
    let page = folder.page();
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;") && page.contains("&lt;i&gt;pictures&lt;/i&gt; &amp; more"));
    assert!(page.contains("&quot;original&quot;, masked &lt;b&gt;&amp;&lt;/b&gt; painted"));
    assert!(!page.contains("<i>") && !page.contains("<script"));
}

#[test]
fn a_value_that_is_not_finite_is_a_gap_in_its_curve() {
    let folder = Scratch::new("report-gap");
    whole(&folder);
    let page = folder.page();
    let loss = page.split("<figcaption>").find(|part| part.starts_with("Loss")).unwrap();
    assert_eq!(loss.split("<g class=\"a\">").nth(1).unwrap().split("</g>").next().unwrap().matches("<polyline").count(), 2);
}

#[test]
fn empty_logs_one_row_and_no_run_at_all_make_pages() {
    let folder = Scratch::new("report-empty");
    let page = folder.page();
    check_alone(&page);
    assert!(page.contains("Nothing is recorded yet."));
    let mut record = Record::create(&folder.0, "masque finetune").unwrap();
    let page = folder.page();
    check_alone(&page);
    assert!(page.contains("masque finetune. Nothing is recorded yet.") && !page.contains("<svg"));
    record.step(&row(json!({"update": 1, "epoch": 0.1, "loss": 2.5, "lr": 0.0}))).unwrap();
    let page = folder.page();
    check_alone(&page);
    assert!(page.contains("<circle"));
    record.epoch(&row(json!({"epoch": 0, "update": 10, "test_acc1": 12.5, "test_acc5": f64::NAN, "train_loss": null}))).unwrap();
    let page = folder.page();
    check_alone(&page);
    assert!(page.contains("<b>12.50 %</b>"));
}

#[test]
fn the_best_and_the_last_accuracy_are_told_apart() {
    let folder = Scratch::new("report-best");
    let mut record = Record::create(&folder.0, "masque finetune --epochs 3").unwrap();
    for (epoch, accuracy) in [50.0, 61.25, 60.5].iter().enumerate() {
        let values = json!({"epoch": epoch, "update": epoch + 1, "test_acc1": accuracy, "test_acc5": 90.0, "test_loss": 1.0});
        record.epoch(&row(values)).unwrap();
    }
    let page = folder.page();
    assert!(page.contains("<b>61.25 %</b><small>best, after 2 epochs; last 60.50 %</small>"));
    assert!(page.contains("<figcaption>Accuracy, %"));
}

#[test]
fn damaged_files_are_left_out_and_said() {
    let folder = Scratch::new("report-damaged");
    drop(whole(&folder));
    let append = |name: &str, text: &str| {
        let path = folder.0.join(name);
        fs::write(&path, fs::read_to_string(&path).unwrap() + text).unwrap();
    };
    append("steps.jsonl", "{\"update\":41,\"lo");
    append("log.jsonl", "{\"epoch\": 4, \"update\": 50, \"train_loss\": NaN, \"test_loss\": Infinity}\n[1, 2]\n");
    folder.write("secret.png", png(1));
    folder.write("pictures/text.png", "no picture");
    for file in ["../secret.png", "secret.png", "pictures/text.png", "pictures/gone.png", "/etc/hostname"] {
        append("pictures.jsonl", &format!("{}\n", json!({"update": 40, "file": file, "caption": "x"})));
    }
    let page = folder.page();
    check_alone(&page);
    assert!(page.contains("1 of the lines of steps.jsonl cannot be read") && page.contains("1 of the lines of log.jsonl cannot be read"));
    assert_eq!(page.matches("data:image/png").count(), 1);
    assert_eq!(page.matches(" is left out: ").count(), 5);
}

#[test]
fn the_last_pictures_are_shown_and_a_few_earlier_ones() {
    let folder = Scratch::new("report-pictures");
    let mut record = Record::create(&folder.0, "masque pretrain mae").unwrap();
    for epoch in 0..30u64 {
        record.picture(epoch, &format!("reconstruction-{epoch:04}"), &format!("after epoch {epoch}"), &png(epoch as u8)).unwrap();
    }
    record.picture(29, "reconstruction-0029", "after the last epoch", &png(77)).unwrap();
    let page = folder.page();
    check_alone(&page);
    assert_eq!(page.matches("data:image/png").count(), 6);
    let (before, after) = page.split_once("<details>").unwrap();
    assert!(before.contains("<figcaption>after the last epoch</figcaption>") && !before.contains("after epoch 29"));
    assert!(after.contains("<figcaption>after epoch 0</figcaption>"));
}

#[test]
fn a_page_that_cannot_be_written_is_one_sentence() {
    let folder = Scratch::new("report-unwritable");
    fs::create_dir(folder.0.join("report.html")).unwrap();
    let error = report::write(&folder.0).unwrap_err().chain();
    assert!(error.starts_with("cannot write ") && error.contains("report.html") && !error.contains('\n'), "{error}");
    assert!(report::write(&folder.0.join("missing")).is_err());
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
}
