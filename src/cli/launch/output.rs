//! What many processes print, as one stream of whole lines: each with the name of its rank in front, none torn.
//!
//! A line that is drawn again and again (with a carriage return and no end) is passed on as it stands, at most once a second.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Context, Result};

/// Between two states of a line that is drawn again.
const REDRAWN: Duration = Duration::from_secs(1);
/// Nothing was printed for so long: what stands there is a state, and not half of one.
const QUIET: Duration = Duration::from_millis(200);
/// A line that is longer is passed on in pieces.
const LONGEST: usize = 1 << 20;
/// After the last process has ended, so long without a word from a pipe that something else still holds.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// Pieces that are read and not yet printed; then those who print wait, as in front of a terminal that stands still.
const AHEAD: usize = 256;

/// The lines of one pipe.
struct Lines {
    prefix: Vec<u8>,
    /// Since the last end of a line or carriage return.
    held: Vec<u8>,
    /// The last state of this line that a carriage return stands behind.
    state: Vec<u8>,
    redrawn: bool,
    /// The state that was passed on last, and when.
    shown: Vec<u8>,
    at: Option<Instant>,
}

impl Lines {
    fn new(prefix: String) -> Self {
        let empty = Vec::new;
        Self { prefix: prefix.into_bytes(), held: empty(), state: empty(), redrawn: false, shown: empty(), at: None }
    }

    fn take(&mut self, bytes: &[u8], now: Instant, out: &mut Vec<u8>) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(true, out),
                b'\r' => {
                    if !self.held.is_empty() {
                        self.state = std::mem::take(&mut self.held);
                    }
                    self.redrawn = true;
                }
                _ => self.held.push(byte),
            }
            if self.held.len() >= LONGEST {
                self.end_line(false, out);
            }
        }
        if self.redrawn {
            let state = self.state.clone();
            self.show(state, now, out);
        }
    }

    /// Nothing came for a while.
    fn wait(&mut self, now: Instant, out: &mut Vec<u8>) {
        if self.redrawn {
            let state = if self.held.is_empty() { self.state.clone() } else { self.held.clone() };
            self.show(state, now, out);
        }
    }

    /// A state of a line that goes on.
    fn show(&mut self, state: Vec<u8>, now: Instant, out: &mut Vec<u8>) {
        let early = self.at.is_some_and(|at| now.duration_since(at) < REDRAWN);
        if !early && !state.is_empty() && state != self.shown {
            self.print(&state, out);
            (self.shown, self.at) = (state, Some(now));
        }
    }

    /// What stands there is a line now; an empty one is one only where its end was printed.
    fn end_line(&mut self, ended: bool, out: &mut Vec<u8>) {
        let state = std::mem::take(&mut self.state);
        let held = std::mem::take(&mut self.held);
        let line = if held.is_empty() { state } else { held };
        let known = self.redrawn && line == self.shown && !line.is_empty();
        if !known && (ended || !line.is_empty()) {
            self.print(&line, out);
        }
        self.redrawn = false;
        self.shown.clear();
    }

    fn print(&self, line: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(if line.is_empty() { self.prefix.trim_ascii_end() } else { &self.prefix });
        out.extend_from_slice(line);
        out.push(b'\n');
    }
}

/// Where lines go, and whether somebody still takes them.
struct Sink {
    to: Box<dyn Write + Send>,
    gone: Arc<AtomicBool>,
}

impl Sink {
    fn print(&mut self, lines: &[u8]) {
        if !lines.is_empty() && !self.gone.load(Ordering::Relaxed) {
            let failed = self.to.write_all(lines).and_then(|()| self.to.flush()).is_err();
            self.gone.store(failed, Ordering::Relaxed);
        }
    }
}

/// What was read of a pipe; nothing when it has ended.
type Piece = (usize, Option<Vec<u8>>);

/// Prints what is read from the pipes of all ranks.
pub struct Printer {
    pieces: Option<SyncSender<Piece>>,
    gone: [Arc<AtomicBool>; 2],
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Printer {
    pub fn start(ranks: usize, out: Box<dyn Write + Send>, errors: Box<dyn Write + Send>) -> Result<Self> {
        let (pieces, read) = sync_channel(AHEAD);
        let (gone, over) = ([Arc::default(), Arc::default()], Arc::<AtomicBool>::default());
        let sinks = [Sink { to: out, gone: Arc::clone(&gone[0]) }, Sink { to: errors, gone: Arc::clone(&gone[1]) }];
        let width = (ranks - 1).to_string().len();
        // Pipes are counted rank by rank: standard output, then errors.
        let lines = (0..2 * ranks).map(|pipe| Lines::new(format!("[rank {:>width$}] ", pipe / 2))).collect();
        let ended = Arc::clone(&over);
        let thread = Builder::new().name("printer".into()).spawn(move || print(&read, lines, sinks, &ended));
        Ok(Self { pieces: Some(pieces), gone, over, thread: thread.context("starting the thread that prints")? })
    }

    /// Reads the pipe of a rank from now on; when nobody takes standard output any more, it is closed, as it would be without a launcher.
    pub fn read(&self, rank: usize, errors: bool, mut from: impl Read + Send + 'static) -> Result<()> {
        let Some(pieces) = self.pieces.clone() else { return Ok(()) };
        let gone = (!errors).then(|| Arc::clone(&self.gone[0]));
        let pipe = 2 * rank + usize::from(errors);
        let reads = move || {
            let mut buffer = vec![0; 1 << 16];
            loop {
                let piece = match from.read(&mut buffer) {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok(0) | Err(_) => None,
                    Ok(count) => Some(buffer[..count].to_vec()),
                };
                let last = piece.is_none() || gone.as_ref().is_some_and(|gone| gone.load(Ordering::Relaxed));
                if pieces.send((pipe, piece)).is_err() || last {
                    return;
                }
            }
        };
        let thread = Builder::new().name("reader".into()).spawn(reads);
        thread.map(|_| ()).context("starting a thread that reads what a rank prints")
    }

    /// No more pipes come, and all processes have ended. What they printed is printed to its end, unless `given_up` says that nobody waits for it.
    pub fn finish(mut self, mut given_up: impl FnMut() -> bool) {
        self.pieces = None;
        self.over.store(true, Ordering::Relaxed);
        while !self.thread.is_finished() && !given_up() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn print(read: &Receiver<Piece>, mut lines: Vec<Lines>, mut sinks: [Sink; 2], over: &AtomicBool) {
    let mut last = Instant::now();
    loop {
        let mut out = Vec::new();
        match read.recv_timeout(QUIET) {
            Ok((pipe, piece)) => {
                last = Instant::now();
                match piece {
                    Some(bytes) => lines[pipe].take(&bytes, last, &mut out),
                    None => lines[pipe].end_line(false, &mut out),
                }
                sinks[pipe % 2].print(&out);
            }
            Err(RecvTimeoutError::Timeout) => {
                for (pipe, lines) in lines.iter_mut().enumerate() {
                    lines.wait(Instant::now(), &mut out);
                    sinks[pipe % 2].print(&out);
                    out.clear();
                }
                if over.load(Ordering::Relaxed) && last.elapsed() >= AFTERWARDS {
                    break;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    for (pipe, lines) in lines.iter_mut().enumerate() {
        let mut out = Vec::new();
        lines.end_line(false, &mut out);
        sinks[pipe % 2].print(&out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is printed of these pieces, each read so many milliseconds after the start; "" is a while without one.
    fn printed(pieces: &[(u64, &str)]) -> String {
        let (start, mut lines, mut out) = (Instant::now(), Lines::new("[1] ".into()), Vec::new());
        for (at, piece) in pieces {
            let now = start + Duration::from_millis(*at);
            if piece.is_empty() {
                lines.wait(now, &mut out);
            } else {
                lines.take(piece.as_bytes(), now, &mut out);
            }
        }
        lines.end_line(false, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_whole_whatever_the_pieces_are() {
        assert_eq!(printed(&[(0, "one\ntw"), (5, "o\n\nthr"), (9, "ee")]), "[1] one\n[1] two\n[1]\n[1] three\n");
        assert_eq!(printed(&[(0, "half"), (500, ""), (9000, ""), (9001, " a line\n")]), "[1] half a line\n");
        assert_eq!(printed(&[(0, "a\r\nb\r"), (1, "\nc\r\n")]), "[1] a\n[1] b\n[1] c\n");
        assert_eq!(printed(&[]), "");
    }

    #[test]
    fn a_line_that_is_drawn_again_is_passed_on_once_a_second() {
        let bar = "10%\r20%\r";
        assert_eq!(printed(&[(0, bar), (300, "30%\r"), (900, "40%\r"), (1100, "50%\r"), (1200, "done\n")]), "[1] 20%\n[1] 50%\n[1] done\n");
        // A carriage return in front: what stands behind it is whole when nothing follows for a while.
        assert_eq!(printed(&[(0, "\r10%"), (200, ""), (400, "\r20%"), (1300, "")]), "[1] 10%\n[1] 20%\n");
        assert_eq!(printed(&[(0, "\r10%"), (200, ""), (400, "\n")]), "[1] 10%\n");
        assert_eq!(printed(&[(0, "10%\r"), (100, "11%\r")]), "[1] 10%\n[1] 11%\n");
    }

    #[test]
    fn a_line_without_an_end_is_passed_on_in_pieces() {
        let (mut lines, mut out) = (Lines::new("[1] ".into()), Vec::new());
        lines.take(&vec![b'x'; 3 * LONGEST], Instant::now(), &mut out);
        assert_eq!((out.len(), lines.held.len()), (3 * (LONGEST + 5), 0));
    }
}
