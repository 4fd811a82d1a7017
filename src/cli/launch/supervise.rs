//! Processes that belong together: started as ranks, watched, and ended together.
//!
//! Each is a process group of its own. When one fails, the others get a while to end by themselves, then SIGTERM, then SIGKILL. A signal to the launcher is
//! passed on once; a second one kills. Nobody is left behind: what a rank had started goes with it, and a rank ends with its launcher.

use super::output::Printer;
use crate::device::ranks::named;
use crate::error::{Context, Result};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use signal_hook::low_level::signal_name;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// How often signals and clocks are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// The process that a rank ends with.
pub const PARENT: &str = "MASQUE_PARENT";

/// What is started, how many times, and how long it is waited for.
pub struct Group {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub ranks: usize,
    /// Where the ranks meet on this machine, and the name of their run.
    pub port: u16,
    pub run: String,
    /// When a rank has failed: until SIGTERM, and from there until SIGKILL.
    pub grace: Duration,
    pub patience: Duration,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    Code(i32),
    Signal(i32),
    /// The system does not say.
    Unseen,
}

impl Exit {
    /// As a shell counts.
    fn code(self) -> u8 {
        match self {
            Exit::Code(code) => code as u8,
            Exit::Signal(signal) => (128 + signal) as u8,
            Exit::Unseen => 1,
        }
    }

    fn text(self) -> String {
        match self {
            Exit::Code(code) => format!("it ended with code {code}"),
            Exit::Signal(signal) if signal == Signal::KILL.as_raw() => "SIGKILL ended it (for lack of memory, often)".into(),
            Exit::Signal(signal) => format!("{} ended it", name(signal)),
            Exit::Unseen => "the system does not say how it ended".into(),
        }
    }
}

/// How all of them ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    pub code: u8,
    /// What there is to say of it.
    pub sentence: Option<String>,
}

struct Rank {
    child: Child,
    running: bool,
}

/// The processes; those that still run when it is dropped are killed.
struct Ranks(Vec<Rank>);

impl Ranks {
    fn running(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&rank| self.0[rank].running).collect()
    }

    /// To all that run, and to what they have started. A process that is just ending needs none.
    fn send(&self, signal: Signal) {
        self.0.iter().filter(|rank| rank.running).for_each(|rank| to_group(&rank.child, signal));
    }

    /// A rank has ended: what it has started ends too. Its number is its own until it is waited for, so that no stranger is hit.
    fn reap(&mut self, rank: usize) {
        let Rank { child, running } = &mut self.0[rank];
        to_group(child, Signal::KILL);
        let _ = child.wait();
        *running = false;
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in self.running() {
            self.reap(rank);
        }
    }
}

fn pid(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

fn to_group(child: &Child, signal: Signal) {
    if let Some(group) = pid(child) {
        let _ = kill_process_group(group, signal);
    }
}

fn name(signal: i32) -> String {
    signal_name(signal).map_or_else(|| format!("signal {signal}"), String::from)
}

impl Group {
    /// Starts all ranks and waits until none is left. `signal` is asked often whether one has come for the launcher.
    pub fn run(&self, signal: &mut dyn FnMut() -> Option<i32>, out: Box<dyn Write + Send>, errors: Box<dyn Write + Send>) -> Result<Ended> {
        let printer = Printer::start(self.ranks, out, errors)?;
        let (ends, ended) = channel();
        let mut ranks = Ranks(Vec::with_capacity(self.ranks));
        for rank in 0..self.ranks {
            let mut child = self.start(rank)?;
            let pipes = (child.stdout.take(), child.stderr.take());
            let watched = pid(&child);
            ranks.0.push(Rank { child, running: true });
            if let (Some(out), Some(errors)) = pipes {
                printer.read(rank, false, out)?;
                printer.read(rank, true, errors)?;
            }
            watch(rank, watched, ends.clone())?;
        }
        let ended = self.watch_over(&mut ranks, &ended, signal);
        printer.finish(|| signal().is_some());
        Ok(ended)
    }

    fn start(&self, rank: usize) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (rank_text, ranks, port) = (rank.to_string(), self.ranks.to_string(), self.port.to_string());
        let variables = [("RANK", &rank_text), ("WORLD_SIZE", &ranks), ("LOCAL_RANK", &rank_text), ("LOCAL_WORLD_SIZE", &ranks)];
        command.envs(variables).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).env("MASQUE_PORT", &port);
        command.env("MASQUE_RUN", &self.run).env(PARENT, std::process::id().to_string()).env_remove("TORCHELASTIC_RUN_ID");
        command.spawn().with_context(|| format!("starting rank {rank} of {}: {}", self.ranks, self.program.display()))
    }

    fn watch_over(&self, ranks: &mut Ranks, ends: &Receiver<(usize, Exit)>, signal: &mut dyn FnMut() -> Option<i32>) -> Ended {
        let mut story = Story { ranks: self.ranks, grace: self.grace, ..Story::default() };
        // What those that go on are sent next, and when.
        let mut next: Option<(Instant, Signal)> = None;
        while !ranks.running().is_empty() {
            if let Ok((rank, exit)) = ends.recv_timeout(LOOK) {
                ranks.reap(rank);
                if story.first_failure(rank, exit) {
                    next = Some((Instant::now() + self.grace, Signal::TERM));
                }
            }
            if let Some(number) = signal() {
                let passed_on = if number == Signal::INT.as_raw() { Signal::INT } else { Signal::TERM };
                ranks.send(if story.signal.is_some() { Signal::KILL } else { passed_on });
                story.killed |= story.signal.is_some();
                story.signal.get_or_insert(number);
            }
            if let Some((_, what)) = next.filter(|(at, _)| *at <= Instant::now()) {
                ranks.send(what);
                let told = if what == Signal::TERM { &mut story.asked } else { &mut story.forced };
                *told = ranks.running();
                next = (what == Signal::TERM).then(|| (Instant::now() + self.patience, Signal::KILL));
            }
        }
        story.told()
    }
}

/// Tells how a process ends, from a thread of its own: the order in which they end is seen. The process can still be waited for.
fn watch(rank: usize, pid: Option<Pid>, ends: Sender<(usize, Exit)>) -> Result<()> {
    let watches = move || {
        let exit = loop {
            let Some(pid) = pid else { break Exit::Unseen };
            match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) | Ok(None) => break Exit::Unseen,
                Ok(Some(status)) => {
                    let code = status.exit_status().map(Exit::Code);
                    break code.or(status.terminating_signal().map(Exit::Signal)).unwrap_or(Exit::Unseen);
                }
            }
        };
        // Nobody asks any more where the launcher has failed.
        let _ = ends.send((rank, exit));
    };
    let thread = Builder::new().name("watcher".into()).spawn(watches);
    thread.map(|_| ()).context("starting a thread that watches a rank")
}

/// What has happened so far.
#[derive(Default)]
struct Story {
    ranks: usize,
    grace: Duration,
    /// The first that failed.
    failed: Option<(usize, Exit)>,
    /// Those that went on for longer than the grace, and those that went on even then.
    asked: Vec<usize>,
    forced: Vec<usize>,
    /// What came for the launcher, whether a rank ended of it, and whether a second one came.
    signal: Option<i32>,
    interrupted: bool,
    killed: bool,
}

impl Story {
    /// A rank has ended; whether that is the first failure.
    fn first_failure(&mut self, rank: usize, exit: Exit) -> bool {
        let passed_on = self.signal.is_some_and(|signal| exit == Exit::Signal(signal) || exit == Exit::Code(128 + signal));
        let wanted = passed_on || (self.killed && exit == Exit::Signal(Signal::KILL.as_raw()));
        self.interrupted |= wanted;
        let first = self.failed.is_none() && !wanted && exit != Exit::Code(0);
        if first {
            self.failed = Some((rank, exit));
        }
        first
    }

    fn told(self) -> Ended {
        if let Some((rank, exit)) = self.failed {
            let grace = self.grace.as_secs_f64();
            let others = match (self.asked.as_slice(), self.forced.as_slice()) {
                ([], _) => String::new(),
                (asked, []) => format!("; {} went on for {grace} s and had to be ended", named(asked)),
                (_, forced) => format!("; {} went on for {grace} s and had to be killed", named(forced)),
            };
            let first = if self.ranks > 1 { "was the first to fail" } else { "failed" };
            return Ended { code: exit.code(), sentence: Some(format!("rank {rank} of {} {first}: {}{others}", self.ranks, exit.text())) };
        }
        match self.signal.filter(|_| self.interrupted) {
            Some(signal) => {
                let how = if self.killed { "; a second signal killed those that went on" } else { "" };
                Ended { code: (128 + signal) as u8, sentence: Some(format!("{} was passed on and ended the ranks{how}", name(signal))) }
            }
            None => Ended { code: 0, sentence: None },
        }
    }
}
