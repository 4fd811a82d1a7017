//! Several processes of the program that train one model: what they compute, how they end, and who else comes to their port.
#![cfg(unix)]

#[path = "common/runs.rs"]
mod runs;
#[path = "common/together.rs"]
mod together;

use runs::{checkpoints, folder, last_tensors, rows};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use together::{SYSTEMS, alone, apart, as_threads, few, losses, near, teachers};

/// A port that nobody listens on.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// The program as one of some ranks.
fn rank(command: &str, output: &Path, [rank, world]: [usize; 2], port: u16) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_masque"));
    program.args(command.split_whitespace()).arg("--output-dir").arg(output).args(["--threads", "1"]);
    let (rank, world, master) = (rank.to_string(), world.to_string(), (port - 1).to_string());
    program.envs([("RANK", &rank), ("WORLD_SIZE", &world), ("LOCAL_RANK", &rank), ("MASTER_PORT", &master)]);
    program.env("MASTER_ADDR", "127.0.0.1").stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    program
}

/// Processes, none of which outlives its test.
struct Fleet(Vec<Child>);

impl Drop for Fleet {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How a process ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    out: String,
    errors: String,
}

impl Ended {
    /// The one line that says why it failed.
    #[track_caller]
    fn failed(&self, code: i32) -> &str {
        let lines: Vec<&str> = self.errors.lines().filter(|line| line.starts_with("masque: ")).collect();
        assert!(self.code == Some(code) && lines.len() == 1 && !self.errors.contains("panicked"), "{self:?}");
        lines[0].trim_start_matches("masque: ")
    }
}

impl Fleet {
    fn of(world: usize, command: &str, output: &Path) -> Self {
        let port = free_port();
        Self((0..world).map(|own| rank(command, output, [own, world], port).spawn().unwrap()).collect())
    }

    fn signal(&self, rank: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.0[rank]), signal).unwrap();
    }

    /// Waits for all but some.
    #[track_caller]
    fn wait_but_for(&mut self, without: &[usize], most: Duration) -> Vec<Ended> {
        let end = Instant::now() + most;
        let mut waited = Vec::new();
        for (rank, child) in self.0.iter_mut().enumerate().filter(|(rank, _)| !without.contains(rank)) {
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                assert!(Instant::now() < end, "rank {rank} has not ended within {most:?}; before it: {waited:?}");
                std::thread::sleep(Duration::from_millis(2));
            };
            let (mut out, mut errors) = (String::new(), String::new());
            child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
            child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
            waited.push(Ended { code: status.code(), out, errors });
        }
        waited
    }

    #[track_caller]
    fn wait(&mut self) -> Vec<Ended> {
        self.wait_but_for(&[], Duration::from_secs(120))
    }
}

/// Trains as so many processes, of which rank 0 alone speaks.
#[track_caller]
fn trained(world: usize, command: &str, output: &Path) -> String {
    let ended = Fleet::of(world, command, output).wait();
    for (rank, ended) in ended.iter().enumerate() {
        assert!(ended.code == Some(0) && ended.errors.is_empty() && (rank == 0) != ended.out.is_empty(), "rank {rank}: {ended:?}");
    }
    ended[0].out.clone()
}

#[track_caller]
fn until(what: &str, so: impl Fn() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < Duration::from_secs(100), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Rows of steps.jsonl.
fn updates(folder: &Path) -> usize {
    std::fs::read_to_string(folder.join("steps.jsonl")).map_or(0, |text| text.lines().count())
}

#[test]
fn the_five_systems_as_2_and_4_processes_match_one_process() {
    let base = folder("processes-systems");
    let taught = teachers(&base);
    for (name, command, by) in SYSTEMS {
        let command = format!("{command} {}", taught(by));
        let one = base.join(format!("{name}-1"));
        alone(&few(&command, 1), &one);
        for world in [2, 4] {
            let own = base.join(format!("{name}-{world}"));
            let said = trained(world, &few(&command, world), &own);
            assert!(said.contains(&format!("{world} ranks, {} images an update", if name == "dmjd" { 16 } else { 8 })), "{said}");
            near(&format!("{name} as {world} processes"), &losses(&own), &losses(&one), 1e-5);
            let apart = apart(&own, &one, "model.");
            assert!(apart < 1e-4, "{name} as {world} processes: {apart:e}");
        }
    }
    // Threads and processes sum in the same order.
    let threads = base.join("mae-threads");
    as_threads(4, &few(SYSTEMS[0].1, 4), &threads);
    assert!(last_tensors(&threads) == last_tensors(&base.join("mae-4")));
    // As do the parts of a sharded optimiser.
    let sharded = base.join("finetune-sharded");
    let command = few("finetune --model glyph_t --shard-optimizer --wire bf16 --bucket-mb 0.05", 2);
    trained(2, &command, &sharded);
    as_threads(2, &command, &base.join("finetune-threads"));
    assert!(last_tensors(&sharded) == last_tensors(&base.join("finetune-threads")));
}

/// 48 updates of 8 images in two epochs, a checkpoint after each.
fn long(world: usize) -> String {
    let command = few("pretrain mae --model glyph_t --crop shift --save-updates 1", world);
    command.replace("--train-images 48", "--train-images 192").replace("--epochs 1", "--epochs 2").replace("--keep 9", "--keep 2")
}

#[test]
fn ranks_end_when_one_is_killed_and_half_as_many_go_on_from_there() {
    let base = folder("processes-killed");
    let (whole, broken) = (base.join("whole"), base.join("broken"));
    alone(&long(1), &whole);
    let mut draws = masque::rng::Rng::new(8).stream("moments", 0);
    // Any rank but the first, and the first.
    for victim in [1 + draws.below(3), 0] {
        let before = checkpoints(&broken).pop().unwrap_or(0);
        let mut fleet = Fleet::of(4, &format!("{} --resume auto", long(4)), &broken);
        let further = 1 + draws.below(6) as u64;
        until("the run has moved", || checkpoints(&broken).pop().unwrap_or(0) >= before + further);
        std::thread::sleep(Duration::from_micros(draws.below(20_000) as u64));
        fleet.signal(victim, Signal::KILL);
        for ended in fleet.wait_but_for(&[victim], Duration::from_secs(10)) {
            let said = ended.failed(1);
            assert!(said.contains(&format!("rank {victim} has ended without a word, at ")), "{said}");
        }
    }
    let stopped = checkpoints(&broken).pop().unwrap();
    assert!((2..48).contains(&stopped), "{stopped}");
    let said = trained(2, &format!("{} --resume auto", long(2)), &broken);
    assert!(said.contains(&format!("update {stopped})")) && !said.contains("damaged"), "{said}");
    assert!(!said.contains("seen again"), "{said}");
    near("all updates", &losses(&broken), &losses(&whole), 1e-4);
    assert_eq!(rows(broken.join("log.jsonl")).len(), 2);
    let partial = std::fs::read_dir(&broken).unwrap().flatten().filter(|file| file.file_name().to_string_lossy().ends_with(".tmp"));
    assert_eq!(partial.count(), 0);
}

#[test]
fn a_signal_to_one_rank_saves_once_and_stops_all() {
    let base = folder("processes-stopped");
    let (whole, broken) = (base.join("whole"), base.join("broken"));
    let command = long(2).replace("--save-updates 1", "--save-updates 1000").replace("--keep 2", "--keep 9");
    as_threads(2, &command, &whole);
    let mut fleet = Fleet::of(2, &command, &broken);
    until("the run has moved", || updates(&broken) >= 3);
    fleet.signal(1, Signal::TERM);
    let ended = fleet.wait();
    assert!(ended.iter().all(|ended| ended.code == Some(143) && ended.errors.is_empty()), "{ended:?}");
    assert!(ended[0].out.contains("stopped by SIGTERM after update") && ended[1].out.is_empty(), "{ended:?}");
    let saved = checkpoints(&broken);
    assert!(saved.len() == 2 && saved[0] == 0 && saved[1] >= 3, "{saved:?}");
    let said = trained(2, &format!("{command} --resume auto"), &broken);
    assert!(said.contains(&format!("update {})", saved[1])), "{said}");
    assert!(last_tensors(&broken) == last_tensors(&whole));
}

#[test]
fn a_rank_that_hangs_is_named_when_the_patience_is_over() {
    let base = folder("processes-hanging");
    for (hung, most) in [(1, 8), (0, 12)] {
        let run = base.join(format!("{hung}"));
        let command =
            format!("{} --rank-timeout 3", long(3).replace("--save-updates 1", "--save-updates 1000").replace("--epochs 2", "--epochs 50"));
        let mut fleet = Fleet::of(3, &command, &run);
        until("the run has moved", || updates(&run) >= 2);
        fleet.signal(hung, Signal::STOP);
        for ended in fleet.wait_but_for(&[hung], Duration::from_secs(most)) {
            let said = ended.failed(1);
            // Rank 0 may itself have been waiting.
            let seconds = if hung == 0 { 10 } else { 3 };
            assert!(said.starts_with(&format!("rank {hung} has not come to ")), "{said}");
            assert!(said.contains(&format!(" for {seconds} s; see whether it still runs")), "{said}");
        }
        // When it wakes it finds that it is alone.
        fleet.signal(hung, Signal::CONT);
        fleet.wait_but_for(&[1 - hung, 2], Duration::from_secs(10))[0].failed(1);
        let said = trained(2, &format!("{} --epochs 1 --resume auto", long(2)), &run);
        assert!(said.contains("weights: "), "{said}");
    }
}

#[test]
fn strangers_on_the_port_do_no_harm() {
    let base = folder("processes-strangers");
    let (port, command) = (free_port(), few("pretrain mae --model glyph_t", 2));
    let mut fleet = Fleet(vec![rank(&command, &base.join("run"), [0, 2], port).spawn().unwrap()]);
    until("rank 0 listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let says = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let magic = b"masque\x01\n";
    let frame = |text: u64, bytes: u64| [&magic[..], &[0], &text.to_le_bytes(), &bytes.to_le_bytes()].concat();
    let mut strangers =
        vec![says(&[0xff; 4096]), says(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"), says(&magic[..5]), says(&frame(u64::MAX, u64::MAX))];
    strangers.extend([says(&frame(0, 2)), says(&[&frame(0, 2), &b"{}"[..]].concat())]);
    // One that claims gigabytes, and sends them, is not listened to.
    let mut flood = says(&frame(0, 1 << 34));
    let sent = (0..256).take_while(|_| flood.write_all(&vec![b' '; 1 << 20]).is_ok()).count();
    assert!(sent < 64, "{sent} MB were taken");
    strangers.extend((0..300).map(|_| says(b"")));
    // The ranks come in the middle of them.
    let other = rank(&command, &base.join("other"), [1, 2], port).env("MASQUE_RUN", "another").spawn().unwrap();
    let ended = Fleet(vec![other]).wait();
    let said = ended[0].failed(1);
    assert!(said.contains("\"another\"") && said.contains("MASQUE_PORT"), "{said}");
    fleet.0.push(rank(&command, &base.join("run"), [1, 2], port).spawn().unwrap());
    let ended = fleet.wait();
    assert!(ended.iter().all(|ended| ended.code == Some(0)), "{ended:?}");
    assert_eq!(losses(&base.join("run")).len(), 6);
    assert!(!base.join("other").exists());
}

/// Ranks that were started so; what each says when it ends with this code.
#[track_caller]
fn refused(code: i32, ranks: Vec<Command>) -> Vec<String> {
    let mut fleet = Fleet(ranks.into_iter().map(|mut rank| rank.spawn().unwrap()).collect());
    fleet.wait_but_for(&[], Duration::from_secs(30)).iter().map(|ended| ended.failed(code).to_string()).collect()
}

#[track_caller]
fn all_say(said: &[String], parts: &[&str]) {
    assert!(said.iter().all(|said| parts.iter().all(|part| said.contains(part))), "{said:?} lack {parts:?}");
}

#[test]
fn ranks_that_do_not_fit_together_end_with_a_sentence_each() {
    let base = folder("processes-refused");
    let (command, none) = (few("pretrain mae --model glyph_t --rank-timeout 20", 2), base.join("none"));
    let with = |own: usize, world: usize, port: u16, more: &str| rank(&format!("{command} {more}"), &none, [own, world], port);
    let port = free_port();
    let said = refused(1, vec![with(0, 3, port, ""), with(1, 3, port, ""), with(1, 3, port, "")]);
    all_say(&said, &["two processes say that they are rank 1", "RANK"]);
    let port = free_port();
    let said = refused(1, vec![with(0, 2, port, ""), with(1, 3, port, "")]);
    all_say(&said, &["rank 1 was started as one of 3 and rank 0 as one of 2", "WORLD_SIZE"]);
    let port = free_port();
    let said = refused(2, vec![with(0, 2, port, ""), with(1, 2, port, "--lr 0.5")]);
    all_say(&said, &["--lr is 0.5 on rank 1 and 0.003 on rank 0"]);
    // The same words, where they mean other images.
    let ranks = [40u8, 44].into_iter().enumerate().map(|(own, images)| {
        let here = base.join(format!("machine-{own}"));
        std::fs::create_dir_all(here.join("images")).unwrap();
        let [b, c, d, e] = [2, 3, 4, 5].map(|number| (format!("data_batch_{number}.bin"), 8));
        for (name, images) in [("data_batch_1.bin".to_string(), images - 32), b, c, d, e, ("test_batch.bin".to_string(), 8)] {
            let rows = (0..images).flat_map(|row| (0..3073u32).map(move |at| if at == 0 { row % 10 } else { (at % 251) as u8 ^ row }));
            std::fs::write(here.join("images").join(name), rows.collect::<Vec<u8>>()).unwrap();
        }
        let names: String = (0..10).map(|class| format!("class {class}\n")).collect();
        std::fs::write(here.join("images/batches.meta.txt"), names).unwrap();
        let command = "pretrain mae --model glyph_t --input-size 48 --data-path images --batch-size 4 --epochs 1 --num-workers 0";
        (command, own, here)
    });
    let port = free_port();
    let started = ranks.map(|(command, own, here)| {
        let mut command = rank(command, &none, [own, 2], port);
        command.current_dir(here);
        command
    });
    let said = refused(1, started.collect());
    all_say(&said, &["train images are 44 on rank 1 and 40 on rank 0"]);
    assert!(checkpoints(&none).is_empty());
}

#[test]
fn a_place_where_ranks_cannot_meet_is_named_by_each() {
    let base = folder("processes-places");
    let (command, none) = (few("pretrain mae --model glyph_t --rank-timeout 2", 2), base.join("none"));
    let with = |own: usize, port: u16| vec![rank(&command, &none, [own, 2], port)];
    let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let said = refused(1, with(0, port));
    all_say(&said, &["rank 0 cannot listen on 127.0.0.1", &port.to_string(), "MASQUE_PORT"]);
    // A server that says nothing, and one that says something else.
    let said = refused(1, with(1, port));
    all_say(&said, &["nobody answered within 2 s", &port.to_string()]);
    let answers = std::thread::spawn(move || {
        // The first is the one that was told nothing.
        for _ in 0..2 {
            let (mut stream, _) = server.accept().unwrap();
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let said = refused(1, with(1, port));
    all_say(&said, &["is not rank 0 of a run of masque", &port.to_string()]);
    answers.join().unwrap();
    // Nobody is there.
    let port = free_port();
    let said = refused(1, with(1, port));
    all_say(&said, &["rank 1 could not reach rank 0", &port.to_string(), "within 2 s"]);
    let said = refused(1, with(0, free_port()));
    all_say(&said, &["rank 1 of 2 did not come", "within 2 s"]);
    assert!(!none.exists());
}
