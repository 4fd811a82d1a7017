//! The page of a measurement: one file with everything in it, in the style of a run's page. No script, and nothing is fetched.
//!
//! A page is made from top to bottom: what is measured and where, then headings, sentences, tables and figures. Drawings come from
//! [`figure`](super::figure) and [`Chart`](crate::train::chart::Chart): what stands in a `<figure>`, its caption included.

use super::info;
use crate::device::{Named, Precision, parallel};
use crate::error::{Context, Error, Result};
use crate::formats;
use crate::train::record::command_line;
use crate::train::report::escaped;
use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

pub struct Page {
    title: String,
    lead: String,
    facts: Vec<(String, String)>,
    body: String,
}

/// Rows of texts under one head. The first column names its row; the others are numbers and stand to the right.
pub struct Table {
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// The same for a terminal.
    pub fn text(&self) -> String {
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let columns = lines().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| lines().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |cells: &Vec<String>| {
            let cells = cells.iter().zip(&widths).enumerate();
            let padded = cells.map(|(at, (cell, width))| if at == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") });
            format!("{}\n", padded.collect::<String>().trim_end())
        };
        lines().map(line).collect()
    }
}

/// One row a line under the names of the first one's fields, which all have.
pub fn csv(rows: &[Map<String, Value>]) -> String {
    let cell = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains([',', '"', '\n']) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    let head = rows.first().map(|row| row.keys().cloned().collect::<Vec<_>>().join(",")).unwrap_or_default();
    let lines = rows.iter().map(|row| row.values().map(cell).collect::<Vec<_>>().join(","));
    std::iter::once(head).chain(lines).map(|line| line + "\n").collect()
}

/// The command as it was typed, fit to be typed again.
pub fn command() -> String {
    let typed: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    command_line(std::iter::once("masque").chain(typed.iter().map(String::as_str)))
}

/// What was computed on: name and value of each fact, for a page and, as they are, for other records.
pub fn machine(named: Named, device: &str, precision: Precision) -> Vec<(&'static str, String)> {
    let mut facts = vec![("Command", command()), ("Processor", info::processor()), ("Threads", parallel::threads().to_string())];
    let what = if named == Named::Cpu { "the CPU".to_string() } else { format!("{named}: {device}") };
    facts.push(("Device", what));
    if named == Named::Emulated {
        facts.push(("Not a GPU", "the emulated device runs kernels on the CPU; its times say nothing about a GPU".to_string()));
    }
    facts.push(("Precision", precision.to_string()));
    facts.push(("Memory", format!("{:.1} GB", crate::device::memory::of_the_machine() as f64 / 1e9)));
    facts.push(("Program", format!("masque {}", env!("CARGO_PKG_VERSION"))));
    facts.push(("Date", info::utc()));
    facts
}

impl Page {
    /// `lead` says in a sentence or two what stands below.
    pub fn new(title: impl Into<String>, lead: impl Into<String>) -> Self {
        Self { title: title.into(), lead: lead.into(), facts: Vec::new(), body: String::new() }
    }

    pub fn fact(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.facts.push((name.into(), value.into()));
    }

    /// Tiles with a number each: what it is, its value, and what more is to be said.
    pub fn tiles(&mut self, tiles: &[[String; 3]]) {
        self.body.push_str("<div class=\"tiles\">\n");
        for [name, value, more] in tiles.iter().map(|tile| tile.each_ref().map(|text| escaped(text))) {
            let _ = writeln!(self.body, "<div class=\"tile\"><span>{name}</span><b>{value}</b><small>{more}</small></div>");
        }
        self.body.push_str("</div>\n");
    }

    pub fn heading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escaped(text));
    }

    pub fn text(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escaped(text));
    }

    /// A table that is moved sideways within its box where it is wider than the page.
    pub fn table(&mut self, table: &Table) {
        let cells = |tag: &str, cells: &[String]| cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell))).collect::<String>();
        let _ = writeln!(self.body, "<div class=\"box table\"><table>\n<thead><tr>{}</tr></thead>\n<tbody>", cells("th", &table.head));
        for row in &table.rows {
            let _ = writeln!(self.body, "<tr>{}</tr>", cells("td", row));
        }
        self.body.push_str("</tbody></table></div>\n");
    }

    /// Figures beside each other where the page is wide enough. Each is what stands in a `<figure>`.
    pub fn figures(&mut self, figures: &[String]) {
        self.body.push_str("<div class=\"charts\">\n");
        let alone = if figures.len() == 1 { "whole" } else { "half" };
        for figure in figures {
            let _ = writeln!(self.body, "<figure class=\"{alone}\">\n{figure}</figure>");
        }
        self.body.push_str("</div>\n");
    }

    pub fn html(&self) -> String {
        let (title, mut out) = (escaped(&self.title), String::from(include_str!("../train/report_head.html")));
        let _ = writeln!(out, "<title>{title}</title>");
        let (of_runs, own) = (include_str!("../train/report.css"), include_str!("page.css"));
        let _ = writeln!(out, "<style>\n{of_runs}{own}</style>\n</head>\n<body>\n<main>");
        let _ = writeln!(out, "<h1>{title}</h1>\n<p class=\"lead\">{}</p>", escaped(&self.lead));
        out.push_str(&self.body);
        if !self.facts.is_empty() {
            out.push_str("<h2>How it was measured</h2>\n<div class=\"box\"><dl class=\"settings facts\">\n");
            for (name, value) in &self.facts {
                let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escaped(name), escaped(value));
            }
            out.push_str("</dl></div>\n");
        }
        let version = env!("CARGO_PKG_VERSION");
        let _ = writeln!(out, "<footer>Written by masque {version}.</footer>\n</main>\n</body>\n</html>");
        out
    }

    /// As a whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let page = self.html();
        formats::write_atomically(path, |out| out.write_all(page.as_bytes()).context("writing the page"))
    }
}

/// Makes a folder for pages, and refuses one into which nothing can be written, before anything is measured.
pub fn try_folder(folder: &Path) -> Result<()> {
    let refused = |what: &str, error: std::io::Error| {
        Err(Error::usage(format!("--output-dir {}: {what}: {error}; name another folder", folder.display())))
    };
    if let Err(error) = std::fs::create_dir_all(folder) {
        return refused("the folder cannot be made", error);
    }
    let probe = folder.join(format!(".masque-{}.tmp", std::process::id()));
    match std::fs::File::create(&probe).and_then(|_| std::fs::remove_file(&probe)) {
        Ok(()) => Ok(()),
        Err(error) => refused("nothing can be written there", error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_stands_in_columns_on_a_terminal() {
        let table = Table { head: ["op", "ms"].map(String::from).to_vec(), rows: vec![["softmax", "12.5"].map(String::from).to_vec()] };
        assert_eq!(table.text(), "op         ms\nsoftmax  12.5\n");
    }

    #[test]
    fn a_page_holds_everything_and_fetches_nothing() {
        let mut page = Page::new("Speed & <more>", "What it is.");
        machine(Named::Emulated, "emulated", Precision::F32).into_iter().for_each(|(name, value)| page.fact(name, value));
        page.tiles(&[["Speed".into(), "2.5".into(), "at 0.75".into()]]);
        page.heading("Table");
        page.text("It's <said>.");
        page.table(&Table { head: vec!["op".into(), "ms".into()], rows: vec![vec!["a<b".into(), "1.5".into()]] });
        page.figures(&["<figcaption>drawn</figcaption><svg></svg>".to_string()]);
        let html = page.html();
        for part in ["Speed &amp; &lt;more&gt;", "a&lt;b</td><td>1.5", "It&#39;s &lt;said&gt;", "<figcaption>drawn", "nothing about a GPU"]
        {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        for never in ["<script", "http:", "https:", "@import", "url("] {
            assert!(!html.contains(never), "{never} is in the page");
        }
        for tag in ["table", "figure", "div", "dl", "main", "style", "body"] {
            let count = |text: &str| html.matches(text).count();
            assert_eq!(count(&format!("<{tag}>")) + count(&format!("<{tag} ")), count(&format!("</{tag}>")), "{tag}");
        }
    }
}
