//! Runs of the program, each in a folder of its own.
#![allow(dead_code)] // each test program uses a part of it

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// An empty folder of this test's own.
pub fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("runs").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

pub fn masque(arguments: &str, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    command.args(arguments.split_whitespace()).args(["--output-dir".as_ref(), output.as_os_str()]).args(["--threads", "2"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    command
}

pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[track_caller]
pub fn succeeds(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{:?} {}", output.status, said(&output));
    said(&output)
}

/// The exit code and what was said.
pub fn fails(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), said(&output))
}

pub fn rows(path: PathBuf) -> Vec<Value> {
    std::fs::read_to_string(&path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Updates at which there is a checkpoint, in order.
pub fn checkpoints(folder: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.file_name().into_string().unwrap());
    let mut updates: Vec<u64> =
        names.filter_map(|name| name.strip_prefix("checkpoint-")?.strip_suffix(".safetensors")?.parse().ok()).collect();
    updates.sort_unstable();
    updates
}

/// All tensors of a folder's last checkpoint: model, optimiser state, averages.
pub fn last_tensors(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let last = checkpoints(folder).pop().unwrap();
    let file = masque::formats::open(folder.join(format!("checkpoint-{last:08}.safetensors"))).unwrap();
    file.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.bytes().to_vec())).collect()
}
