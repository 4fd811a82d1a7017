//! The rules of the house: who may name whom, where `unsafe` may stand, one name for an op, sizes of files.

use masque::device::launch::KERNELS;
use std::path::{Path, PathBuf};

/// Module, floor, highest floor that it may name, and modules it may name or not name all the same.
struct Rule {
    module: &'static str,
    floor: usize,
    up_to: usize,
    also: &'static [&'static str],
    never: &'static [&'static str],
}

const fn rule(module: &'static str, floor: usize, up_to: usize) -> Rule {
    Rule { module, floor, up_to, also: &[], never: &[] }
}

const RULES: [Rule; 19] = [
    Rule { also: &["rng"], ..rule("error", 0, 0) },
    Rule { also: &["error"], ..rule("rng", 0, 0) },
    rule("trace", 0, 0),
    rule("device", 1, 0),
    rule("tensor", 2, 1),
    rule("formats", 2, 1),
    // A recorded parameter is a place on a tape, and a tape hands gradients to parameters.
    Rule { also: &["param"], ..rule("tape", 3, 2) },
    Rule { also: &["tape"], ..rule("param", 3, 2) },
    rule("targets", 3, 2),
    rule("ops", 4, 3),
    rule("nn", 5, 4),
    rule("masking", 5, 2),
    rule("data", 5, 2),
    rule("optim", 5, 3),
    Rule { never: &["optim", "data"], ..rule("methods", 6, 5) },
    // What is measured of a training step is the one that training takes.
    Rule { also: &["train"], ..rule("measure", 7, 6) },
    rule("train", 7, 6),
    rule("cli", 8, 7),
    Rule { also: &["cli"], ..rule("main", 8, 7) },
];

/// Macros stand at the root of the crate; what they expand to belongs to these modules.
const MACROS: [(&str, &str); 4] = [("bail", "error"), ("ensure", "error"), ("vectorised", "device"), ("by_real", "tensor")];

/// Files over 600 lines, and why.
const LONG: [(&str, &str); 2] = [
    ("src/device/gemm/mod.rs", "the product and its tiles for three instruction sets share one set of types"),
    ("tests/optim.rs", "every update rule is checked against the same hand-written ones"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut open = vec![root().join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "{folder} has no {ending} files");
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// The code of a file without its tests and without comments; lines keep their numbers.
fn code(text: &str) -> String {
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..tests].lines().map(|line| format!("{}\n", line.split("//").next().unwrap())).collect()
}

/// What stands directly under the root in each path of the code that starts with `prefix`, groups in braces taken apart.
fn named_after(code: &str, prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let first = |text: &str| text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        let Some(group) = rest.strip_prefix('{') else {
            names.push(first(rest));
            continue;
        };
        let (mut depth, mut start) = (0usize, 0);
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    names.push(first(&group[start..i]));
                    start = i + 1;
                    if c == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
    }
    names.retain(|name| !name.is_empty() && name != "super");
    names
}

/// The modules that a file names, by whatever path.
fn named(path: &str, code: &str) -> Vec<String> {
    let depth = path.split('/').count() - 1 - usize::from(path.ends_with("/mod.rs"));
    let from_root = ["crate::".to_string(), "super::".repeat(depth), "masque::".to_string()];
    from_root.iter().flat_map(|prefix| named_after(code, prefix)).collect()
}

fn rule_of(module: &str) -> &'static Rule {
    RULES.iter().find(|rule| rule.module == module).unwrap_or_else(|| panic!("module {module} has no floor"))
}

fn allowed(own: &Rule, other: &Rule) -> bool {
    own.module == other.module || own.also.contains(&other.module) || (other.floor <= own.up_to && !own.never.contains(&other.module))
}

#[test]
fn modules_name_only_lower_floors() {
    let mut wrong = Vec::new();
    for path in files("src", ".rs") {
        let shown = shown(&path);
        let module = shown["src/".len()..].split(['/', '.']).next().unwrap().to_string();
        if module == "lib" {
            continue;
        }
        let own = rule_of(&module);
        for name in named(&shown, &code(&read(&path))) {
            let name = MACROS.iter().find(|(of, _)| *of == name).map_or(name.as_str(), |(_, module)| module);
            let other = rule_of(name);
            if !allowed(own, other) {
                wrong.push(format!("{shown} (floor {}) names {} (floor {})", own.floor, other.module, other.floor));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn paths_are_read_in_all_their_forms() {
    let text = "use crate::{bail, ops::{add, gelu}, nn::vit};\nlet x = crate::tape::Tape::new();\n// crate::cli\nuse super::data;\n";
    assert_eq!(named("src/masking.rs", &code(text)), ["bail", "ops", "nn", "tape", "data"]);
    assert_eq!(named("src/nn/vit.rs", "use super::super::cli::x;\nuse super::block;"), ["cli"]);
    assert!(!allowed(rule_of("nn"), rule_of("optim")) && !allowed(rule_of("masking"), rule_of("ops")));
    assert!(!allowed(rule_of("methods"), rule_of("data")) && allowed(rule_of("cli"), rule_of("train")));
}

/// Whether a SAFETY line covers line `at`: on it, or above the statement it belongs to.
fn covered(lines: &[&str], at: usize) -> bool {
    for line in lines[..at].iter().rev() {
        let line = line.trim();
        if line.contains("// SAFETY:") {
            return true;
        }
        let ends_statement =
            line.is_empty() || line.ends_with(';') || line == "}" || line.starts_with("fn ") || line.starts_with("pub fn ");
        if ends_statement && !line.starts_with("//") {
            return false;
        }
    }
    false
}

#[test]
fn unsafe_stands_on_the_lowest_floor_and_says_why_it_is_sound() {
    let mut wrong = Vec::new();
    for path in files("src", ".rs") {
        let (shown, text) = (shown(&path), read(&path));
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let words = line.split("//").next().unwrap();
            let is_word = |word: &str| word == "unsafe";
            if !words.split(|c: char| !c.is_alphanumeric() && c != '_').any(is_word) {
                continue;
            }
            if !shown.starts_with("src/device/") && shown != "src/formats/bytes.rs" {
                wrong.push(format!("{shown}:{}: unsafe stands in device/ and formats/bytes.rs only", at + 1));
            }
            if (words.contains("unsafe {") || words.contains("unsafe impl")) && !covered(&lines, at) {
                wrong.push(format!("{shown}:{}: no SAFETY line covers this unsafe", at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_op_has_one_name_and_lists_its_cases() {
    let list = read(&root().join("src/ops/mod.rs"));
    for entry in std::fs::read_dir(root().join("src/ops")).unwrap() {
        // An op is a file or a folder.
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        if stem == "mod" || stem == "case" {
            continue;
        }
        assert!(list.contains(&format!("pub mod {stem};")), "ops/{stem} is not declared in ops/mod.rs");
        assert!(list.contains(&format!("        {stem}::cases(),")), "the cases of ops/{stem} are not listed in ops/mod.rs");
        let sources = if path.is_dir() { files(&shown(&path), ".rs") } else { vec![path] };
        assert!(sources.iter().any(|path| read(path).contains("pub fn cases() -> Vec<Case>")), "ops/{stem} has no cases");
    }
}

#[test]
fn every_kernel_has_a_row_in_the_table_of_floors() {
    let text = read(&root().join("kernels/README.md"));
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| `")).collect();
    let named: Vec<&str> = rows.iter().flat_map(|row| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2)).collect();
    let is = |kernel: &str, name: &str| kernel.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
    for kernel in KERNELS.iter().map(|kernel| kernel.name) {
        assert!(named.iter().any(|name| is(kernel, name)), "kernel {kernel} is not in the table of kernels/README.md");
    }
    for name in named.into_iter().filter(|name| !name.ends_with(".cuh")) {
        assert!(KERNELS.iter().any(|kernel| is(kernel.name, name)), "kernels/README.md has a row for {name}, which is no kernel");
    }
}

#[test]
fn long_files_have_a_reason() {
    for folder in ["src", "tests"] {
        for path in files(folder, ".rs") {
            let (shown, lines) = (shown(&path), read(&path).lines().count());
            let listed = LONG.iter().any(|(name, _)| *name == shown);
            assert!(lines <= 600 || listed, "{shown} has {lines} lines; split it, or list it with a reason");
            assert!(lines > 600 || !listed, "{shown} has {lines} lines and needs no reason any more");
        }
    }
}

#[test]
fn fixtures_are_small() {
    for path in files("tests/fixtures", "") {
        let bytes = path.metadata().unwrap().len();
        assert!(bytes < 1_200_000, "{} has {bytes} bytes", shown(&path));
    }
}
