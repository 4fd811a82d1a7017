//! Ranks that are processes and talk to rank 0 over TCP: the control plane of every run of several processes.
//!
//! Rank 0 listens and waits until every rank has said who it is. From then on each call is a frame from every rank to rank 0, which does the work, and a frame
//! back. A frame is its kind (a byte), the length of its text and of its bytes (8 bytes each, little endian), text and bytes. Frames are read as they come, never
//! into memory of a size that the sender only claims.
//!
//! A rank that ends closes its connection, which rank 0 sees at its next call; a rank that hangs is not waited for longer than the patience. Rank 0 then tells
//! all others who it was, so that all end with one sentence. What connects and is no rank of this run is answered, or left alone, and does no harm.

use super::environment::Launched;
use super::meeting::{Announced, Call, combine, late, piece};
use super::{Collective, named};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// What a connection of this protocol begins with.
const MAGIC: &[u8; 8] = b"masque\x01\n";
/// A connection that has not said who it is by then is a stranger's.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// Connections that are being listened to at once.
const MOST_STRANGERS: usize = 256;
/// Rank 0 may come last of all and then wait for another: so much longer than twice the patience the others wait for what it says.
const MARGIN: Duration = Duration::from_secs(4);
/// Longest text and bytes of a frame, and bytes of one that says who somebody is.
const MOST_TEXT: u64 = 1 << 16;
const MOST_BYTES: u64 = 1 << 36;
const MOST_HELLO: u64 = 1 << 16;

/// So long after a deadline what is there already may still be read.
const LOOK: Duration = Duration::from_secs(1);

pub struct Tcp {
    launched: Launched,
    patience: Duration,
    calls: u64,
    /// Of rank 0: the others in the order of their ranks. Of any other: rank 0.
    peers: Vec<TcpStream>,
    /// Of rank 0: what came of the last call, in memory that is used again.
    whole: Vec<u8>,
    /// Why there are no calls any more.
    failed: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Hello {
    version: String,
    run: String,
    rank: usize,
    world: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Letter {
    Hello,
    Welcome,
    Call,
    Answer,
    Failed,
}

const LETTERS: [Letter; 5] = [Letter::Hello, Letter::Welcome, Letter::Call, Letter::Answer, Letter::Failed];

struct Frame {
    letter: Letter,
    text: String,
    bytes: Vec<u8>,
}

/// Until when reads and writes of a stream may take.
fn limit(stream: &TcpStream, deadline: Instant) -> io::Result<()> {
    let (now, last) = (Instant::now(), deadline + LOOK);
    if now >= last {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // What has come by now is read, however long others were waited for.
    let left = deadline.saturating_duration_since(now).max(Duration::from_millis(5));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}

/// A stream whose every read and write ends at a deadline.
struct Until<'a>(&'a TcpStream, Instant);

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        limit(self.0, self.1)?;
        self.0.read(bytes)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        limit(self.0, self.1)?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn send(stream: &TcpStream, deadline: Instant, letter: Letter, text: &str, bytes: &[u8]) -> io::Result<()> {
    let mut head = Vec::with_capacity(17 + text.len());
    head.push(letter as u8);
    head.extend((text.len() as u64).to_le_bytes());
    head.extend((bytes.len() as u64).to_le_bytes());
    head.extend(text.as_bytes());
    let mut out = Until(stream, deadline);
    out.write_all(&head)?;
    out.write_all(bytes)
}

fn receive(stream: &TcpStream, deadline: Instant) -> io::Result<Frame> {
    receive_at_most(stream, deadline, MOST_BYTES)
}

fn receive_at_most(stream: &TcpStream, deadline: Instant, most: u64) -> io::Result<Frame> {
    let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut from = Until(stream, deadline);
    let mut head = [0; 17];
    from.read_exact(&mut head)?;
    let letter = *LETTERS.get(head[0] as usize).ok_or_else(|| broken("what came is no frame"))?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let (text, bytes) = (number(1), number(9));
    if text > MOST_TEXT || bytes > most {
        return Err(broken("a frame claims to be too long"));
    }
    let mut exactly = |length: u64| {
        let mut read = Vec::new();
        Read::by_ref(&mut from).take(length).read_to_end(&mut read)?;
        if read.len() as u64 == length { Ok(read) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof)) }
    };
    let text = String::from_utf8_lossy(&exactly(text)?).into_owned();
    Ok(Frame { letter, text, bytes: exactly(bytes)? })
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// What to do about a rank that is gone.
const ENDED: &str = "look at its own output; a run goes on from its last checkpoint with --resume auto";

impl Tcp {
    /// Waits for the other processes of a launch.
    pub fn join(launched: &Launched, patience: Duration) -> Result<Self> {
        let mut own = Self { launched: launched.clone(), patience, calls: 0, peers: Vec::new(), whole: Vec::new(), failed: None };
        let deadline = Instant::now() + patience;
        own.peers = if launched.rank == 0 { own.listen(deadline)? } else { vec![own.connect(deadline)?] };
        Ok(own)
    }

    fn hello(&self) -> Hello {
        let Launched { rank, world, run, .. } = &self.launched;
        Hello { version: env!("CARGO_PKG_VERSION").into(), run: run.clone(), rank: *rank, world: *world }
    }

    /// Of rank 0: the connections of all others.
    fn listen(&self, deadline: Instant) -> Result<Vec<TcpStream>> {
        let Launched { world, address, port, .. } = &self.launched;
        // A name of this machine may stand for an address that others cannot reach.
        let loopback = address == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        let any = if address.parse::<Ipv6Addr>().is_ok() { "::" } else { "0.0.0.0" };
        let host = if loopback { address.as_str() } else { any };
        let listener = TcpListener::bind((host, *port)).with_context(|| {
            format!("rank 0 cannot listen on {host}, port {port}; give every rank another one by MASQUE_PORT, or start with another --port")
        })?;
        listener.set_nonblocking(true).context("listening for the other ranks")?;
        let (heard, hellos) = mpsc::channel();
        let listened = Arc::new(AtomicUsize::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let mut peers: Vec<Option<TcpStream>> = (1..*world).map(|_| None).collect();
        let outcome = loop {
            if peers.iter().all(Option::is_some) {
                break Ok(());
            }
            // Where many are listened to, the next wait until some of them have been heard.
            let crowded = listened.load(Ordering::Relaxed) >= MOST_STRANGERS;
            match if crowded { Err(io::ErrorKind::WouldBlock.into()) } else { listener.accept() } {
                Ok((stream, _)) => self.hear(stream, &heard, &listened, &over),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
                // One that has gone again.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => break Err(error).context("listening for the other ranks"),
            }
            if let Some(fault) = hellos.try_iter().find_map(|(hello, stream)| self.admit(hello, stream, &mut peers)) {
                break Err(Error::new(fault));
            }
            if Instant::now() > deadline {
                let missing: Vec<usize> = (1..*world).filter(|rank| peers[rank - 1].is_none()).collect();
                break Err(Error::new(format!(
                    "{} of {world} did not come to {host}:{port} within {:.0} s; were they started, and can they reach this machine?",
                    named(&missing),
                    self.patience.as_secs_f64()
                )));
            }
        };
        over.store(true, Ordering::Relaxed);
        let peers: Vec<TcpStream> = peers.into_iter().flatten().collect();
        let soon = Instant::now() + HELLO_TIME;
        if let Err(error) = &outcome {
            // Who cannot be told finds the connection closed.
            peers.iter().for_each(|peer| drop(send(peer, soon, Letter::Failed, &error.chain(), &[])));
        }
        outcome?;
        for (peer, rank) in peers.iter().zip(1..) {
            send(peer, soon, Letter::Welcome, "", &[]).with_context(|| format!("rank {rank} has ended before the run began"))?;
        }
        Ok(peers)
    }

    /// Reads what a new connection says, beside the others.
    fn hear(&self, stream: TcpStream, heard: &mpsc::Sender<(Hello, TcpStream)>, listened: &Arc<AtomicUsize>, over: &Arc<AtomicBool>) {
        listened.fetch_add(1, Ordering::Relaxed);
        let (heard, listened, over) = (heard.clone(), listened.clone(), over.clone());
        std::thread::spawn(move || {
            let read = || {
                let deadline = Instant::now() + HELLO_TIME;
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                let mut magic = [0; MAGIC.len()];
                Until(&stream, deadline).read_exact(&mut magic)?;
                let hello = if &magic == MAGIC { Some(receive_at_most(&stream, deadline, MOST_HELLO)?) } else { None };
                io::Result::Ok(hello.filter(|frame| frame.letter == Letter::Hello))
            };
            let frame = read().ok().flatten();
            listened.fetch_sub(1, Ordering::Relaxed);
            let hello = frame.and_then(|frame| serde_json::from_slice(&frame.bytes).ok());
            if let Some(hello) = hello.filter(|_| !over.load(Ordering::Relaxed)) {
                // Nobody listens any more once everybody has come.
                let _ = heard.send((hello, stream));
            }
        });
    }

    /// Takes a rank in, or tells a stranger why not; answers what makes the whole run impossible.
    fn admit(&self, hello: Hello, stream: TcpStream, peers: &mut [Option<TcpStream>]) -> Option<String> {
        let own = self.hello();
        let Hello { version, run, rank, world } = hello;
        let refuse = |text: &str| drop(send(&stream, Instant::now() + HELLO_TIME, Letter::Failed, text, &[]));
        if run != own.run {
            refuse(&format!("rank 0 there is of the run {:?} and not of {run:?}; give each run a port of its own by MASQUE_PORT", own.run));
            return None;
        }
        let fault = if version != own.version {
            format!("rank {rank} is masque {version} and rank 0 is {}: start all ranks with the same program", own.version)
        } else if world != own.world {
            format!(
                "rank {rank} was started as one of {world} and rank 0 as one of {}: start all ranks with the same WORLD_SIZE",
                own.world
            )
        } else if rank == 0 || rank >= own.world || peers[rank - 1].is_some() {
            format!("two processes say that they are rank {rank}: start each with a RANK of its own")
        } else {
            peers[rank - 1] = Some(stream);
            return None;
        };
        refuse(&fault);
        Some(fault)
    }

    /// Of any other rank: the connection to rank 0.
    fn connect(&self, deadline: Instant) -> Result<TcpStream> {
        let Launched { rank, address, port, .. } = &self.launched;
        let place = format!("{address}:{port}");
        let found = || (address.as_str(), *port).to_socket_addrs().map(|found| found.collect::<Vec<_>>());
        let seconds = self.patience.as_secs_f64();
        let mut pause = Duration::from_millis(5);
        let stream = loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(5));
            let tried = found().and_then(|found| {
                let none = Err(io::Error::from(io::ErrorKind::AddrNotAvailable));
                found.iter().fold(none, |done, place| done.or_else(|_| TcpStream::connect_timeout(place, left)))
            });
            let error = match tried {
                Ok(stream) => break stream,
                Err(error) => error,
            };
            if Instant::now() + pause > deadline {
                return Err(error).with_context(|| {
                    format!("rank {rank} could not reach rank 0 at {place} within {seconds:.0} s; was it started, and is MASTER_ADDR its machine?")
                });
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(250));
        };
        let attempt = || format!("rank {rank} reached {place}");
        stream.set_nodelay(true).with_context(attempt)?;
        let hello = serde_json::to_vec(&self.hello()).with_context(attempt)?;
        let answer = Until(&stream, deadline + MARGIN)
            .write_all(MAGIC)
            .and_then(|()| send(&stream, deadline + MARGIN, Letter::Hello, "", &hello))
            .and_then(|()| receive(&stream, deadline + MARGIN));
        match answer {
            Ok(Frame { letter: Letter::Welcome, .. }) => Ok(stream),
            Ok(Frame { letter: Letter::Failed, text, .. }) => Err(Error::new(text)),
            Err(error) if is_late(&error) => Err(Error::new(format!(
                "rank {rank} reached {place}, where nobody answered within {seconds:.0} s; is that rank 0 of this run?"
            ))),
            Ok(_) | Err(_) => Err(Error::new(format!(
                "rank {rank} reached {place}, but what answers there is not rank 0 of a run of masque, or has ended; give every rank a free port by MASQUE_PORT"
            ))),
        }
    }

    /// What goes wrong with another rank, as a sentence.
    fn lost(&self, rank: usize, error: &io::Error, call: &Call) -> String {
        match error.kind() {
            _ if is_late(error) && rank == 0 => late(rank, call.what, 2 * self.patience + MARGIN),
            _ if is_late(error) => late(rank, call.what, self.patience),
            io::ErrorKind::InvalidData => format!("rank {rank} sent what is no frame, at {}: {error}", call.what),
            _ => format!("rank {rank} has ended without a word, at {}; {ENDED}", call.what),
        }
    }

    /// Of rank 0: takes what all give, and gives each what comes of it.
    fn lead(&mut self, call: &Call, announced: &Announced, mine: &[u8]) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        let mut frames = Vec::with_capacity(self.peers.len());
        for (peer, rank) in self.peers.iter().zip(1..) {
            let frame = receive(peer, deadline).map_err(|error| Error::new(self.lost(rank, &error, call)))?;
            match frame.letter {
                Letter::Call => {}
                Letter::Failed => bail!("rank {rank} failed: {}", frame.text),
                other => bail!("rank {rank} sent a frame that is no call but {other:?}"),
            }
            let theirs = serde_json::from_str::<(u64, String)>(&frame.text);
            let (number, text) = theirs.with_context(|| format!("rank {rank} sent a call that cannot be read"))?;
            Announced { number, text }.check(rank, announced)?;
            frames.push(frame.bytes);
        }
        let given: Vec<&[u8]> = std::iter::once(mine).chain(frames.iter().map(Vec::as_slice)).collect();
        let mut whole = std::mem::take(&mut self.whole);
        combine(call.kind, &given, &mut whole)?;
        let deadline = Instant::now() + self.patience;
        for (peer, rank) in self.peers.iter().zip(1..) {
            let sent = send(peer, deadline, Letter::Answer, "", piece(call.kind, rank, &whole));
            sent.map_err(|error| Error::new(self.lost(rank, &error, call)))?;
        }
        self.whole = whole;
        Ok(())
    }

    /// Of any other rank: gives to rank 0.
    fn follow(&self, call: &Call, announced: &Announced, mine: &[u8]) -> Result<()> {
        let hub = &self.peers[0];
        let text = serde_json::to_string(&(announced.number, &announced.text)).context("announcing a call")?;
        let Err(error) = send(hub, self.long_deadline(), Letter::Call, &text, mine) else { return Ok(()) };
        // Rank 0 may have said why before.
        match receive(hub, Instant::now() + LOOK) {
            Ok(Frame { letter: Letter::Failed, text, .. }) => Err(Error::new(text)),
            _ => Err(Error::new(self.lost(0, &error, call))),
        }
    }

    fn long_deadline(&self) -> Instant {
        Instant::now() + 2 * self.patience + MARGIN
    }

    /// Of any other rank: what rank 0 answers.
    fn answer(&self, call: &Call) -> Result<Vec<u8>> {
        let frame = receive(&self.peers[0], self.long_deadline()).map_err(|error| Error::new(self.lost(0, &error, call)))?;
        match frame.letter {
            Letter::Answer => Ok(frame.bytes),
            Letter::Failed => Err(Error::new(frame.text)),
            other => bail!("rank 0 sent a frame that is no answer but {other:?}"),
        }
    }
}

impl Collective for Tcp {
    fn give(&mut self, call: &Call, mine: &[u8]) -> Result<()> {
        if let Some(why) = &self.failed {
            bail!("{why}");
        }
        ensure!(mine.len() as u64 <= MOST_BYTES, "{} is {} bytes, more than can be sent at once", call.what, mine.len());
        let announced = Announced::of(self.calls, call, mine.len());
        self.calls += 1;
        let given = if self.launched.rank == 0 { self.lead(call, &announced, mine) } else { self.follow(call, &announced, mine) };
        given.inspect_err(|error| self.end(error))
    }

    fn take(&mut self, call: &Call, to: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if self.launched.rank == 0 {
            return to(piece(call.kind, 0, &self.whole));
        }
        let answer = self.answer(call).inspect_err(|error| self.end(error))?;
        to(&answer)
    }

    fn fail(&mut self, why: &str) {
        if self.failed.is_none() {
            let named = format!("rank {} failed: {why}", self.launched.rank);
            // Rank 0 says whose word it is.
            self.tell(if self.launched.rank == 0 { &named } else { why });
            self.failed = Some(named);
        }
    }

    fn look(&mut self) -> Result<()> {
        if let Some(why) = &self.failed {
            bail!("{why}");
        }
        let first = usize::from(self.launched.rank == 0);
        let found = self.peers.iter().enumerate().find_map(|(at, peer)| ended(peer).map(|why| (at + first, why)));
        let Some((rank, why)) = found else { return Ok(()) };
        let why = match why {
            Some(text) if self.launched.rank == 0 => format!("rank {rank} failed: {text}"),
            Some(text) => text,
            None => format!("rank {rank} has ended without a word; {ENDED}"),
        };
        let error = Error::new(why);
        self.end(&error);
        Err(error)
    }
}

/// Whether the other end of a connection makes no calls any more, and what it said, if it said why.
fn ended(peer: &TcpStream) -> Option<Option<String>> {
    let mut first = [0];
    let looked = peer.set_nonblocking(true).and_then(|()| peer.peek(&mut first));
    let blocks = peer.set_nonblocking(false);
    match looked {
        Err(error) if is_late(&error) => None,
        Ok(1) if first[0] == Letter::Failed as u8 => {
            let frame = blocks.and_then(|()| receive(peer, Instant::now() + HELLO_TIME));
            Some(frame.ok().map(|frame| frame.text))
        }
        Ok(1) => None,
        Ok(_) | Err(_) => Some(None),
    }
}

impl Tcp {
    /// There are no calls any more; rank 0 tells the others why.
    fn end(&mut self, error: &Error) {
        let why = error.chain();
        if self.launched.rank == 0 {
            self.tell(&why);
        }
        self.failed = Some(why);
    }

    /// Tells those at the other end why there are no calls any more; who cannot be told finds the connection closed.
    fn tell(&self, why: &str) {
        let soon = Instant::now() + Duration::from_secs(2);
        let text: String = why.chars().take(MOST_TEXT as usize / 4).collect();
        self.peers.iter().for_each(|peer| drop(send(peer, soon, Letter::Failed, &text, &[])));
    }
}
