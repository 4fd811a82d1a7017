//! `masque launch`: real processes, how they end, what they print, and that none is left.

use masque::cli::launch::supervise::{Ended, Group};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What was printed, for a test to read.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Printed {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// The lines of all ranks come in any order.
    fn sorted(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.text().lines().map(String::from).collect();
        lines.sort();
        lines
    }
}

/// Ranks that run a shell script.
struct Shell {
    group: Group,
    out: Printed,
    errors: Printed,
}

impl Shell {
    fn new(ranks: usize, run: &str, script: &str) -> Self {
        let run = format!("{run}-{}", std::process::id());
        let arguments = vec!["-c".into(), script.into()];
        let (grace, patience) = (Duration::from_millis(300), Duration::from_millis(300));
        let group = Group { program: "/bin/sh".into(), arguments, ranks, port: 12_345, run, grace, patience };
        Self { group, out: Printed::default(), errors: Printed::default() }
    }

    /// Runs it, and sees that it left no process of its own behind.
    #[track_caller]
    fn run(&self, mut signal: impl FnMut() -> Option<i32>) -> Ended {
        let ended = self.group.run(&mut signal, Box::new(self.out.clone()), Box::new(self.errors.clone())).unwrap();
        assert_eq!(left(&self.group.run), Vec::<String>::new(), "left behind");
        ended
    }
}

/// Processes, zombies apart, in whose environment this run stands.
fn left(run: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    let of_run = |path: &Path| {
        let variables = fs::read(path.join("environ")).unwrap_or_default();
        variables.split(|&byte| byte == 0).any(|variable| variable == format!("MASQUE_RUN={run}").as_bytes())
    };
    processes.filter(|path| of_run(path)).map(|path| path.display().to_string()).collect()
}

/// Children of a process that have ended and that it has not waited for.
fn zombies_of(parent: u32) -> usize {
    let stat = |path: &Path| fs::read_to_string(path.join("stat")).unwrap_or_default();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(stat(&entry.ok()?.path())));
    processes.filter(|stat| stat.contains(&format!(") Z {parent} "))).count()
}

fn never() -> Option<i32> {
    None
}

#[test]
fn every_rank_is_told_who_it_is_and_its_lines_bear_its_name() {
    let script = "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $MASQUE_PORT; echo bad $RANK >&2; cat";
    let shell = Shell::new(11, "names", script);
    assert_eq!(shell.run(never), Ended { code: 0, sentence: None });
    let wanted = |text: &dyn Fn(usize) -> String| (0..11).map(|rank| format!("[rank {rank:>2}] {}", text(rank))).collect::<Vec<_>>();
    let mut said = wanted(&|rank| format!("{rank}/11 {rank}/11 127.0.0.1:12345 12345"));
    let mut bad = wanted(&|rank| format!("bad {rank}"));
    said.sort();
    bad.sort();
    assert_eq!((shell.out.sorted(), shell.errors.sorted()), (said, bad));
}

#[test]
fn lines_are_never_torn_and_none_is_lost() {
    // Pieces of lines, long lines, and a last line without an end.
    let script = "i=0; while [ $i -lt 200 ]; do printf 'a%s ' $i; printf 'b%s\\n' $i; i=$((i+1)); done
        head -c 300000 /dev/zero | tr '\\0' x; echo; printf '10%%\\r20%%\\r'; printf '30%%\\nlast %s' $RANK";
    let shell = Shell::new(3, "lines", script);
    assert_eq!(shell.run(never).code, 0);
    for rank in 0..3 {
        let prefix = format!("[rank {rank}] ");
        let text = shell.out.text();
        let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        let mut wanted: Vec<String> = (0..200).map(|i| format!("a{i} b{i}")).collect();
        wanted.push("x".repeat(300_000));
        assert!(lines[..201] == wanted, "rank {rank}: {:?}", lines.iter().map(|line| &line[..line.len().min(20)]).collect::<Vec<_>>());
        let bar = &lines[201..];
        assert!(bar.ends_with(&["30%", &format!("last {rank}")]) && bar.len() <= 3, "{bar:?}");
    }
    assert!(shell.out.text().ends_with('\n') && shell.out.text().lines().all(|line| line.starts_with("[rank ")));
}

#[test]
fn the_first_rank_that_fails_is_named_and_the_others_are_ended() {
    let shell = Shell::new(4, "fails", "if [ $RANK = 1 ]; then exit 3; fi; sleep 60; echo not reached");
    let start = Instant::now();
    let ended = shell.run(never);
    let sentence = "rank 1 of 4 was the first to fail: it ended with code 3; ranks 0, 2 and 3 went on for 0.3 s and had to be ended";
    assert_eq!(ended, Ended { code: 3, sentence: Some(sentence.into()) });
    assert!(start.elapsed() < Duration::from_secs(5) && shell.out.text().is_empty(), "{}", shell.out.text());
}

#[test]
fn ranks_that_notice_a_failure_end_by_themselves() {
    let script = "if [ $RANK = 1 ]; then kill -SEGV $$; fi; sleep 0.1; echo saved; exit 1";
    let shell = Shell { group: Group { grace: Duration::from_secs(30), ..Shell::new(2, "notice", script).group }, ..Shell::new(2, "", "") };
    let ended = shell.run(never);
    assert_eq!(ended, Ended { code: 139, sentence: Some("rank 1 of 2 was the first to fail: SIGSEGV ended it".into()) });
    assert_eq!(shell.out.text(), "[rank 0] saved\n");
}

#[test]
fn a_rank_that_ignores_being_asked_is_killed_and_so_is_what_it_started() {
    let script =
        "if [ $RANK = 1 ]; then kill -9 $$; fi; trap '' TERM; (trap '' TERM; sleep 60; sleep 60) & while true; do sleep 0.05; done";
    let shell = Shell::new(2, "ignores", script);
    let ended = shell.run(never);
    let sentence = ended.sentence.unwrap();
    assert!(sentence.starts_with("rank 1 of 2 was the first to fail: SIGKILL ended it") && ended.code == 137, "{sentence}");
    assert!(sentence.ends_with("rank 0 went on for 0.3 s and had to be killed"), "{sentence}");
    // Ranks of other tests are waited for a moment after they have ended.
    let deadline = Instant::now() + Duration::from_secs(5);
    while zombies_of(std::process::id()) > 0 {
        assert!(Instant::now() < deadline, "nobody waits for a rank that has ended");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_signal_is_passed_on_once_and_the_ranks_may_take_their_time() {
    let script = "trap 'echo saving; sleep 1; exit 143' TERM; echo ready; while true; do sleep 0.05; done";
    let shell = Shell::new(2, "signal", script);
    let ended = shell.run(when_ready(&shell, &[15]));
    assert_eq!(ended, Ended { code: 143, sentence: Some("SIGTERM was passed on and ended the ranks".into()) });
    assert_eq!(shell.out.text().matches("saving").count(), 2, "{}", shell.out.text());
    // One that ends well all the same was not interrupted. Not SIGINT: a shell that inherits it ignored cannot trap it.
    let shell = Shell::new(1, "well", "trap 'exit 0' TERM; echo ready; while true; do sleep 0.05; done");
    assert_eq!(shell.run(when_ready(&shell, &[15])), Ended { code: 0, sentence: None });
}

#[test]
fn a_second_signal_kills() {
    let shell = Shell::new(2, "second", "trap '' INT TERM; echo ready; while true; do sleep 0.05; done");
    let ended = shell.run(when_ready(&shell, &[2, 2]));
    assert_eq!(ended.code, 130);
    assert_eq!(ended.sentence.unwrap(), "SIGINT was passed on and ended the ranks; a second signal killed those that went on");
}

/// Signals, one after another, once so many ranks have said that they are ready for them.
fn when_ready(shell: &Shell, signals: &'static [i32]) -> impl FnMut() -> Option<i32> + use<> {
    let (out, ranks) = (shell.out.clone(), shell.group.ranks);
    let (mut signals, mut next) = (signals.iter(), None);
    move || {
        let now = Instant::now();
        if out.text().matches("ready").count() < ranks || next.is_some_and(|next| now < next) {
            return None;
        }
        next = Some(now + Duration::from_millis(300));
        signals.next().copied()
    }
}

#[test]
fn what_a_rank_leaves_running_ends_with_it() {
    let shell = Shell::new(2, "leaves", "sleep 60 & echo done");
    let start = Instant::now();
    assert_eq!(shell.run(never).code, 0);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(shell.out.sorted(), ["[rank 0] done", "[rank 1] done"]);
}

#[test]
fn a_program_that_cannot_be_started_leaves_nothing() {
    let shell = Shell { group: Group { program: "/no/such/program".into(), ..Shell::new(2, "none", "").group }, ..Shell::new(2, "", "") };
    let error = shell.group.run(&mut never, Box::new(io::sink()), Box::new(io::sink())).unwrap_err().chain();
    assert!(error.starts_with("starting rank 0 of 2: /no/such/program: "), "{error}");
}

/// The program, without a launcher's variables of whoever runs the tests.
fn masque(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_masque"));
    command.args(arguments.split_whitespace()).stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MASQUE_RUN", "MASQUE_PORT"] {
        command.env_remove(name);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn commands_run_as_ranks_in_both_forms() {
    let alone = text(&masque("presets glyphs-pretrain").output().unwrap().stdout);
    for form in [
        "launch --nproc 2 -- presets glyphs-pretrain",
        "launch --nproc=2 presets glyphs-pretrain",
        "--threads 1 launch --nproc 2 presets glyphs-pretrain",
    ] {
        let Output { status, stdout, stderr } = masque(form).output().unwrap();
        assert!(status.success() && stderr.is_empty(), "{form}: {}", text(&stderr));
        for rank in 0..2 {
            let prefix = format!("[rank {rank}]");
            let all = text(&stdout);
            let lines = all.lines().filter_map(|line| line.strip_prefix(&prefix));
            let lines = lines.map(|line| line.strip_prefix(' ').unwrap_or(line));
            assert_eq!(lines.collect::<Vec<_>>(), alone.lines().collect::<Vec<_>>(), "{form}");
        }
    }
}

#[test]
fn a_failure_of_the_command_is_the_launchers() {
    let Output { status, stdout, stderr } = masque("launch --nproc 3 --grace 60 -- evaluate missing.safetensors").output().unwrap();
    let said = text(&stderr);
    assert!(status.code() == Some(1) && stdout.is_empty(), "{said}");
    assert!(said.lines().filter(|line| line.starts_with("[rank ")).all(|line| line.contains("missing.safetensors")), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.starts_with("masque: rank ") && last.ends_with(" of 3 was the first to fail: it ended with code 1"), "{said}");
}

#[test]
fn ranks_share_the_cores_of_the_machine() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let threads = |arguments: &str| -> Vec<usize> {
        let Output { status, stdout, stderr } = masque(arguments).env_remove("RAYON_NUM_THREADS").output().unwrap();
        assert!(status.success(), "{}", text(&stderr));
        let text = text(&stdout);
        let lines = text.lines().filter(|line| line.contains("cpu  "));
        lines.map(|line| line.split(" thread").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap()).collect()
    };
    assert_eq!(threads("info"), [cores]);
    assert_eq!(threads("launch --nproc 2 info"), [(cores / 2).max(1); 2]);
    assert_eq!(threads("launch --nproc 1 info"), [cores]);
    assert_eq!(threads("--threads 3 launch --nproc 2 info"), [3; 2]);
    assert_eq!(threads("launch --nproc 2 -- info --threads 3"), [3; 2]);
}

#[test]
fn what_cannot_be_launched_is_refused() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let in_use = format!("launch --nproc 2 --port {} presets", taken.local_addr().unwrap().port());
    for (arguments, code, part) in [
        ("launch --nproc 0 -- presets", 2, "--nproc 0: from 1 to 1024"),
        ("launch --nproc 1025 -- presets", 2, "--nproc 1025: from 1 to 1024"),
        ("launch --nproc 2", 2, "needs a command to run"),
        ("launch --nproc 2 --", 2, "needs a command to run"),
        ("launch presets", 2, "--nproc"),
        ("launch --nproc 2 -- launch --nproc 2 -- presets", 2, "cannot launch itself"),
        ("launch --nproc 2 -- --threads 1 launch --nproc 2 -- presets", 2, "cannot launch itself"),
        ("launch --nproc 2 --epochs 3 pretrain mae", 2, "--epochs is no flag of masque launch"),
        ("launch --nproc 2 --port 0 presets", 2, "--port"),
        ("launch --nproc 2 --grace 100000 presets", 2, "--grace"),
        ("--threads 5000 launch --nproc 2 presets", 2, "--threads 5000"),
        (&in_use, 1, "choose another"),
    ] {
        let Output { status, stdout, stderr } = masque(arguments).output().unwrap();
        let said = text(&stderr);
        assert!(status.code() == Some(code) && said.contains(part), "{arguments}: {said}");
        assert!(stdout.is_empty() && said.lines().count() == 1 && said.starts_with("masque: "), "{arguments}: {said}");
    }
    for (variables, part) in [
        (&[("RANK", "1"), ("WORLD_SIZE", "2")][..], "whoever set RANK has started this process as rank 1 of 2"),
        (&[("RANK", "0"), ("WORLD_SIZE", "1")], "RANK is set to 0"),
    ] {
        let Output { status, stderr, .. } = masque("launch --nproc 2 presets").envs(variables.iter().copied()).output().unwrap();
        let said = text(&stderr);
        assert!(status.code() == Some(2) && said.contains(part) && said.lines().count() == 1, "{said}");
    }
}

/// Processes whose parent this is.
fn children_of(parent: u32) -> Vec<u32> {
    let child = |path: &Path| {
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        (fields.get(1)?.parse() == Ok(parent)).then(|| stat.split(' ').next()?.parse().ok())?
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| child(&entry.ok()?.path())).collect()
}

/// A launcher with two ranks that work for long, and have begun to: they have started their threads.
#[expect(clippy::zombie_processes, reason = "whoever asks for it waits for it")]
fn working() -> (Child, Vec<u32>) {
    let mut command = masque("launch --nproc 2 -- measure ops --only gelu --rounds 1000000 --threads 2");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let ranks = children_of(child.id());
        let threads = |rank: &u32| fs::read_dir(format!("/proc/{rank}/task")).map_or(0, |threads| threads.count());
        if ranks.len() == 2 && ranks.iter().all(|rank| threads(rank) > 2) {
            return (child, ranks);
        }
        assert!(Instant::now() < deadline, "the ranks do not begin: {ranks:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn send(process: u32, signal: Signal) {
    kill_process(Pid::from_raw(process as i32).unwrap(), signal).unwrap();
}

/// Whether a process is there and is more than a number that nobody has asked for yet.
fn alive(process: u32) -> bool {
    fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|words| !words.is_empty())
}

#[test]
fn a_signal_for_the_program_ends_its_ranks() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        let (child, ranks) = working();
        send(child.id(), signal);
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let said = text(&stderr);
        assert_eq!(status.code(), Some(128 + signal.as_raw()), "{said}");
        assert_eq!(said, format!("masque: {name} was passed on and ended the ranks\n"));
        assert!(!ranks.iter().any(|&rank| alive(rank)));
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_run() {
    let (child, ranks) = working();
    send(ranks[0], Signal::KILL);
    send(ranks[1], Signal::TERM);
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let said = text(&stderr);
    assert!(status.code().is_some_and(|code| code == 137 || code == 143) && said.contains("of 2 was the first to fail: SIG"), "{said}");
    assert!(!ranks.iter().any(|&rank| alive(rank)));
}

#[test]
fn ranks_end_with_a_launcher_that_is_killed() {
    let (mut child, ranks) = working();
    send(child.id(), Signal::KILL);
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while ranks.iter().any(|&rank| alive(rank)) {
        assert!(Instant::now() < deadline, "ranks go on without their launcher");
        std::thread::sleep(Duration::from_millis(20));
    }
    // One that is started when its launcher is gone already does not begin.
    let Output { status, stderr, .. } = masque("presets").env("MASQUE_PARENT", child.id().to_string()).output().unwrap();
    assert!(status.code() == Some(1) && text(&stderr).contains("the launcher is gone"), "{}", text(&stderr));
}

#[test]
fn a_reader_that_goes_away_ends_what_prints() {
    let mut child = masque("launch --nproc 2 presets").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert!(status.success() && stderr.is_empty(), "{}", text(&stderr));
}
