//! `masque launch`: this program as many ranks on one machine.

mod output;
pub mod supervise;

use super::parallel;
use crate::device::ranks::environment::Launched;
use crate::error::{Context, Error, Result};
use clap::Args;
use rustix::process::getppid;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use supervise::{Group, PARENT};

const MOST: usize = 1024;
/// From SIGTERM to SIGKILL.
const PATIENCE: Duration = Duration::from_secs(5);
/// Ports that nobody named are chosen from these: below those that the system gives to outgoing connections, of which a rank's own could be one.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

#[derive(Args)]
pub struct LaunchArgs {
    /// Processes to start
    #[arg(long, value_name = "N")]
    nproc: usize,
    /// Port at which they meet on this machine [default: one that is free]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// When a process has failed: how long the others may take to end by themselves
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    grace: u64,
    /// What each of them does: a command of this program with its flags
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command on all ranks; `threads` is handed on to them.
pub fn run(args: LaunchArgs, threads: Option<usize>) -> Result<ExitCode> {
    let LaunchArgs { nproc, port, grace, command } = args;
    if !(1..=MOST).contains(&nproc) {
        return Err(Error::usage(format!("--nproc {nproc}: from 1 to {MOST} processes can be started")));
    }
    let example = format!("masque launch --nproc {nproc} -- pretrain mae");
    match word(&command) {
        None => return Err(Error::usage(format!("masque launch needs a command to run: {example}"))),
        Some("launch") => return Err(Error::usage(format!("masque launch cannot launch itself; name what the ranks do: {example}"))),
        Some(flag) if flag.starts_with('-') => {
            return Err(Error::usage(format!("{flag} is no flag of masque launch; those of the command stand behind its name: {example}")));
        }
        Some(_) => {}
    }
    let already = match Launched::from_environment()? {
        Some(launched) => Some(format!("{} has started this process as rank {} of {}", launched.by, launched.rank, launched.world)),
        None => std::env::var("RANK").ok().map(|rank| format!("RANK is set to {rank}")),
    };
    if let Some(already) = already {
        let next = "run the command itself in its place, or unset the launcher's variables";
        return Err(Error::usage(format!("masque launch: {already}; {next}")));
    }
    if let Some(threads) = threads {
        parallel::check(threads)?;
    }
    let own = command.iter().any(|word| word == "--threads" || word.starts_with("--threads="));
    let threads = threads.filter(|_| !own).map(|threads| format!("--threads={threads}"));
    let group = Group {
        program: std::env::current_exe().context("finding this program's file")?,
        arguments: threads.into_iter().chain(command).map(Into::into).collect(),
        ranks: nproc,
        port: port.map_or_else(free_port, taken_port)?,
        run: format!("{:016x}", random()),
        grace: Duration::from_secs(grace),
        patience: PATIENCE,
    };
    let mut signals = listen()?;
    let ended = group.run(&mut signals, Box::new(std::io::stdout()), Box::new(std::io::stderr()))?;
    if let Some(sentence) = ended.sentence {
        // Whoever read it may have gone away.
        let _ = writeln!(std::io::stderr(), "masque: {sentence}");
    }
    Ok(ExitCode::from(ended.code))
}

/// The word that names the command; a flag that is none of those that stand in front of every command.
fn word(command: &[String]) -> Option<&str> {
    let mut words = command.iter().map(String::as_str);
    while let Some(word) = words.next() {
        match word {
            "--threads" => _ = words.next(),
            word if word.starts_with("--threads=") => {}
            word => return Some(word),
        }
    }
    None
}

fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// A port that nobody listens on.
fn free_port() -> Result<u16> {
    let range = u64::from(PORTS.end - PORTS.start);
    let port = (0..100).map(|_| PORTS.start + (random() % range) as u16).find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    port.ok_or_else(|| Error::new("no free port was found on 127.0.0.1; name one with --port"))
}

/// The port that was asked for, if it can be listened on.
fn taken_port(port: u16) -> Result<u16> {
    let bound = TcpListener::bind(("127.0.0.1", port));
    bound.with_context(|| format!("--port {port} cannot be had on 127.0.0.1; choose another, or leave the flag out for a free one"))?;
    Ok(port)
}

/// Tells once of each SIGINT and SIGTERM from now on.
fn listen() -> Result<impl FnMut() -> Option<i32>> {
    let came = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_usize(signal, Arc::clone(&came), signal as usize).context("listening for signals")?;
    }
    // Where whoever started the launcher ignores this one, the system would not say how a rank ended.
    signal_hook::flag::register(SIGCHLD, Arc::new(AtomicBool::new(false))).context("listening for the ends of ranks")?;
    Ok(move || Some(came.swap(0, Ordering::Relaxed) as i32).filter(|&signal| signal != 0))
}

/// A rank ends with its launcher, even if that has no time to end it: from now on this process gets SIGTERM then.
pub fn end_with_launcher() -> Result<()> {
    let Some(parent) = std::env::var_os(PARENT) else { return Ok(()) };
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM)).context("binding this rank to its launcher")?;
    let now = getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if parent.to_string_lossy() != now.to_string() {
        let parent = parent.to_string_lossy();
        return Err(Error::new(format!(
            "{PARENT} is {parent} but process {now} started this one: the launcher is gone; start the run again"
        )));
    }
    Ok(())
}
