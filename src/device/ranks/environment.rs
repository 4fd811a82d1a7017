//! Who started this process: the variables by which launchers tell a process which of how many it is.
//!
//! They are read in this order; the first that is there counts.
//!
//! | variables | set by |
//! |---|---|
//! | RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RUN_ID | torchrun, `masque launch`, a person |
//! | OMPI_COMM_WORLD_RANK, .._SIZE, .._LOCAL_RANK, .._LOCAL_SIZE | Open MPI's mpirun |
//! | SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID, SLURM_STEP_ID | srun |
//!
//! SLURM also leaves variables in batch scripts and shells, where nothing but the script itself was started. Those of a step tell both apart: SLURM_NTASKS says what a
//! job asked for, SLURM_STEP_NUM_TASKS what srun started.
//!
//! The ranks meet at MASTER_ADDR on port MASQUE_PORT, or MASTER_PORT + 1: torchrun itself listens on MASTER_PORT.

use crate::error::{Error, Result};
use crate::{bail, ensure};

/// More processes than this are a mistake.
pub const MOST: usize = 65_536;
/// MASTER_PORT where nobody names one, as in PyTorch.
const MASTER_PORT: u16 = 29_500;
/// Ports that SLURM jobs are spread over: below those that the system gives to outgoing connections.
const SLURM_PORTS: (u64, u64) = (10_000, 20_000);
const HERE: &str = "127.0.0.1";

/// How a launcher started this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    pub rank: usize,
    pub world: usize,
    /// Which of the processes on this machine it is.
    pub local: usize,
    /// How many there are on this machine, where the launcher says it.
    pub local_world: Option<usize>,
    /// Where rank 0 is, and the port at which the others find it.
    pub address: String,
    pub port: u16,
    /// Name of the run, the same on every rank; empty if the launcher gives none.
    pub run: String,
    /// Whose variables these are.
    pub by: &'static str,
}

/// Variables by name.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    /// The text of a variable that is not empty.
    fn said(&self, name: &str) -> Option<String> {
        self.text(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty())
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let number = text.trim().parse().map_err(|_| Error::new(format!("{name} is {text:?} and not a number that it can be")))?;
        Ok(Some(number))
    }

    /// A number that has to be there because another variable is.
    fn needed(&self, name: &str, because: &str) -> Result<usize> {
        let missing = || Error::new(format!("{because} is set but {name} is not; set both, or neither for a run of one process"));
        self.number(name)?.ok_or_else(missing)
    }

    fn port(&self, name: &str) -> Result<Option<u16>> {
        let port = self.number(name)?;
        ensure!(port != Some(0), "{name} is 0; a port is a number from 1 to 65535");
        Ok(port)
    }
}

/// What the variables of one launcher say; how the ranks meet is asked afterwards.
struct Named {
    rank: usize,
    world: usize,
    local: Option<usize>,
    local_world: Option<usize>,
    by: &'static str,
    /// Names of the variables of rank, world and the two local ones, for the sentences.
    names: [&'static str; 4],
}

impl Launched {
    /// None where no launcher says anything, or only that there is one process.
    pub fn from_environment() -> Result<Option<Self>> {
        Self::read(&|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let variables = Variables(get);
        let mut named = plain(&variables)?;
        for launcher in [open_mpi, slurm] {
            named = named.map_or_else(|| launcher(&variables), |named| Ok(Some(named)))?;
        }
        let Some(named) = named else {
            unread(&variables)?;
            return Ok(None);
        };
        let Named { rank, world, local, local_world, by, names } = named;
        ensure!((1..=MOST).contains(&world), "{} is {world}; it has to be from 1 to {MOST}", names[1]);
        ensure!(rank < world, "{} is {rank} but {} is {world}; ranks are counted from 0", names[0], names[1]);
        if let Some(local_world) = local_world {
            ensure!((1..=world).contains(&local_world), "{} is {local_world} but {} is {world}", names[3], names[1]);
            let local = local.unwrap_or(0);
            ensure!(local < local_world, "{} is {local} but {} is {local_world}; they are counted from 0", names[2], names[3]);
        }
        if let Some(all) = variables.number::<usize>("WORLD_SIZE")? {
            ensure!(all == world, "WORLD_SIZE is {all} but {} is {world}; unset WORLD_SIZE, or start {all} processes", names[1]);
        }
        if world == 1 {
            return Ok(None);
        }
        let address = address(&variables, &named)?;
        let local = match (local, local_world) {
            (Some(local), _) => local,
            (None, Some(each)) => rank % each,
            (None, None) if is_here(&address) => rank,
            (None, None) => bail!("{} is not set; set it to the number of this process among those on its machine, from 0", names[2]),
        };
        let (port, run) = (port(&variables, by)?, run(&variables, by));
        Ok(Some(Self { rank, world, local, local_world, address, port, run, by }))
    }

    /// Threads for this process: its share of the machine's cores. SLURM and Open MPI may have given each process cores of its own; then all of those.
    pub fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let own = list_after(&std::fs::read_to_string("/proc/self/status").unwrap_or_default(), "Cpus_allowed_list:");
        let all = list_after(&std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default(), "");
        self.share(cores, own.unwrap_or(cores), all.unwrap_or(cores))
    }

    /// `cores` may be used, `own` is how many this process is bound to, `all` the machine has.
    fn share(&self, cores: usize, own: usize, all: usize) -> usize {
        let each = self.local_world.unwrap_or(1);
        let binds = matches!(self.by, SLURM | OPEN_MPI);
        if binds && own < all && own * each <= all { cores.max(1) } else { (cores / each).max(1) }
    }
}

const SLURM: &str = "SLURM";
const OPEN_MPI: &str = "Open MPI";

fn plain(variables: &Variables) -> Result<Option<Named>> {
    let Some(rank) = variables.number("RANK")? else { return Ok(None) };
    let world = variables.needed("WORLD_SIZE", "RANK")?;
    let by = match (variables.said("MASQUE_PARENT"), variables.said("TORCHELASTIC_RUN_ID")) {
        (Some(_), _) => "masque launch",
        (None, Some(_)) => "torchrun",
        (None, None) => "whoever set RANK",
    };
    let (local, local_world) = (variables.number("LOCAL_RANK")?, variables.number("LOCAL_WORLD_SIZE")?);
    Ok(Some(Named { rank, world, local, local_world, by, names: ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] }))
}

fn open_mpi(variables: &Variables) -> Result<Option<Named>> {
    let names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
    let Some(rank) = variables.number(names[0])? else { return Ok(None) };
    let world = variables.needed(names[1], names[0])?;
    let (local, local_world) = (variables.number(names[2])?, variables.number(names[3])?);
    Ok(Some(Named { rank, world, local, local_world, by: OPEN_MPI, names }))
}

fn slurm(variables: &Variables) -> Result<Option<Named>> {
    let names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"];
    let world = variables.number(names[1])?.filter(|&tasks| tasks > 1);
    let (Some(world), Some(rank)) = (world, variables.number(names[0])?) else { return Ok(None) };
    let node = variables.number("SLURM_NODEID")?.unwrap_or(0);
    let local_world = variables.said(names[3]).and_then(|list| tasks_of(&list, node));
    Ok(Some(Named { rank, world, local: variables.number(names[2])?, local_world, by: SLURM, names }))
}

/// An MPI whose variables are not read must not lead to as many runs that know nothing of each other.
fn unread(variables: &Variables) -> Result<()> {
    if let Some(size) = variables.number::<usize>("WORLD_SIZE")? {
        ensure!(size == 1, "WORLD_SIZE is {size} but RANK is not set; set both, or neither for a run of one process");
    }
    if let Ok(Some(size)) = variables.number::<usize>("PMI_SIZE") {
        let next = "start it with Open MPI, srun, torchrun or masque launch, or set RANK and WORLD_SIZE";
        ensure!(size <= 1, "PMI_SIZE is {size}: an MPI that is not known here started {size} processes; {next}");
    }
    Ok(())
}

/// Where rank 0 is.
fn address(variables: &Variables, named: &Named) -> Result<String> {
    if let Some(address) = variables.text("MASTER_ADDR") {
        let address = address.trim().to_string();
        ensure!(!address.is_empty(), "MASTER_ADDR is empty; set it to the name or the address of the machine that rank 0 is on");
        return Ok(address);
    }
    let here = named.local_world.is_none_or(|local_world| local_world == named.world);
    let found = match named.by {
        SLURM if named.local_world == Some(named.world) => Some(HERE.into()),
        SLURM => variables
            .said("SLURM_STEP_NODELIST")
            .map(|list| first_host(&list))
            .filter(|host| !host.is_empty())
            .or_else(|| variables.said("SLURM_LAUNCH_NODE_IPADDR")),
        OPEN_MPI => (named.local_world == Some(named.world)).then(|| HERE.into()),
        _ => here.then(|| HERE.into()),
    };
    let sentence = || {
        let next = "set it to the name or the address of the machine that rank 0 is on";
        Error::new(format!("MASTER_ADDR is not set, and the {} processes are not known to be on one machine; {next}", named.world))
    };
    found.ok_or_else(sentence)
}

fn is_here(address: &str) -> bool {
    matches!(address, HERE | "localhost" | "::1")
}

fn port(variables: &Variables, by: &str) -> Result<u16> {
    if let Some(port) = variables.port("MASQUE_PORT")? {
        return Ok(port);
    }
    let master = variables.port("MASTER_PORT")?;
    if by == SLURM && master.is_none() && variables.said("SLURM_JOB_ID").is_some() {
        let job: u64 = variables.number("SLURM_JOB_ID")?.unwrap_or(0);
        let step: u64 = variables.number("SLURM_STEP_ID")?.unwrap_or(0);
        let (first, count) = SLURM_PORTS;
        return Ok((first + (job % count + 1009 * (step % count)) % count) as u16);
    }
    let next = |master: u16| master.checked_add(1);
    next(master.unwrap_or(MASTER_PORT)).ok_or_else(|| {
        Error::new(
            "MASTER_PORT is 65535, and the ranks meet on the port after it; choose a lower one, or set MASQUE_PORT to the port to meet on",
        )
    })
}

fn run(variables: &Variables, by: &str) -> String {
    let own = match by {
        SLURM => {
            variables.said("SLURM_JOB_ID").map(|job| variables.said("SLURM_STEP_ID").map_or(job.clone(), |step| format!("{job}.{step}")))
        }
        OPEN_MPI => variables.said("PMIX_NAMESPACE").or_else(|| variables.said("OMPI_MCA_ess_base_jobid")),
        // What torchrun calls a run that was given no name.
        _ => variables.said("TORCHELASTIC_RUN_ID").filter(|run| run != "none"),
    };
    variables.said("MASQUE_RUN").or(own).unwrap_or_default()
}

/// The first host of a list as SLURM writes it: `node[01-04,07],other` begins with node01.
fn first_host(list: &str) -> String {
    let (mut host, mut inside, mut done) = (String::new(), false, false);
    for letter in list.trim().chars() {
        match letter {
            '[' => (inside, done) = (true, false),
            ']' => inside = false,
            ',' if !inside => break,
            ',' | '-' if inside => done = true,
            _ if inside && done => {}
            _ => host.push(letter),
        }
    }
    host
}

/// The tasks of one node in a list as SLURM writes it: `4(x2),3` are nodes of 4, 4 and 3.
fn tasks_of(list: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    for part in list.split(',') {
        let (tasks, times) = match part.trim().split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse::<usize>().ok()?),
            None => (part.trim(), 1),
        };
        before += times.min(MOST);
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

/// How many numbers are in a list as the kernel writes it, `0-3,8`, behind this word.
fn list_after(text: &str, word: &str) -> Option<usize> {
    let list = text.lines().find_map(|line| line.strip_prefix(word))?.trim();
    list.split(',')
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            Some(last.checked_sub(first)? + 1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "NAME=value NAME=value".
    fn read(variables: &str) -> Result<Option<Launched>> {
        let pairs: Vec<(&str, &str)> = variables.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
        Launched::read(&|name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }

    #[track_caller]
    fn launched(variables: &str) -> Launched {
        read(variables).unwrap().expect(variables)
    }

    #[track_caller]
    fn sentence(variables: &str, parts: &[&str]) {
        let said = read(variables).expect_err(variables).chain();
        assert!(parts.iter().all(|part| said.contains(part)), "{variables}: {said}");
    }

    const TORCHRUN: &str =
        "RANK=5 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node-a MASTER_PORT=4000 TORCHELASTIC_RUN_ID=job7";
    const OMPI: &str =
        "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=ns@1";
    const SRUN: &str = "SLURM_PROCID=6 SLURM_STEP_NUM_TASKS=8 SLURM_LOCALID=2 SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=4(x2) SLURM_JOB_ID=123456 \
                        SLURM_STEP_ID=0 SLURM_STEP_NODELIST=gpu[07-08] SLURM_LAUNCH_NODE_IPADDR=10.0.0.1 SLURM_NTASKS=8";

    #[test]
    fn torchrun_says_everything_and_listens_on_the_port_before_ours() {
        let (address, run) = ("node-a".into(), "job7".into());
        let wanted = Launched { rank: 5, world: 16, local: 1, local_world: Some(4), address, port: 4001, run, by: "torchrun" };
        assert_eq!(launched(TORCHRUN), wanted);
        assert_eq!(launched(&format!("{TORCHRUN} MASQUE_PORT=77 MASQUE_RUN=mine")), Launched { port: 77, run: "mine".into(), ..wanted });
        let unnamed = launched("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a TORCHELASTIC_RUN_ID=none");
        assert_eq!((unnamed.run.as_str(), unnamed.port), ("", 29_501));
        assert_eq!(launched("RANK=0 WORLD_SIZE=2 MASQUE_PARENT=12 TORCHELASTIC_RUN_ID=x").by, "masque launch");
    }

    #[test]
    fn two_variables_are_enough_on_one_machine() {
        let found = launched("RANK=1 WORLD_SIZE=2");
        let (address, run) = ("127.0.0.1".into(), String::new());
        assert_eq!(found, Launched { rank: 1, world: 2, local: 1, local_world: None, address, port: 29_501, run, by: "whoever set RANK" });
        assert_eq!(launched("RANK=5 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 MASTER_ADDR=a").local, 1);
        sentence("RANK=1 WORLD_SIZE=2 MASTER_ADDR=node-a", &["LOCAL_RANK is not set"]);
        sentence("RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", &["MASTER_ADDR is not set", "4 processes"]);
    }

    #[test]
    fn open_mpi_is_on_one_machine_or_needs_an_address() {
        let found = launched(&format!("{OMPI} MASTER_ADDR=node-a MASTER_PORT=5000"));
        let (address, run) = ("node-a".into(), "ns@1".into());
        assert_eq!(found, Launched { rank: 3, world: 4, local: 1, local_world: Some(2), address, port: 5001, run, by: "Open MPI" });
        sentence(OMPI, &["MASTER_ADDR is not set", "rank 0"]);
        let one = launched(
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_MCA_ess_base_jobid=9",
        );
        assert_eq!((one.address.as_str(), one.run.as_str()), ("127.0.0.1", "9"));
        sentence("OMPI_COMM_WORLD_RANK=1", &["OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not"]);
    }

    #[test]
    fn a_step_of_slurm_meets_on_its_first_host_and_a_port_of_its_own() {
        let (address, run) = ("gpu07".into(), "123456.0".into());
        let wanted = Launched { rank: 6, world: 8, local: 2, local_world: Some(4), address, port: 13_456, run, by: "SLURM" };
        assert_eq!(launched(SRUN), wanted);
        let with = |more: &str| launched(&format!("{more} {SRUN}"));
        assert_eq!(with("MASTER_ADDR=a MASTER_PORT=6000"), Launched { address: "a".into(), port: 6001, ..wanted.clone() });
        assert_ne!(with("SLURM_JOB_ID=123457").port, wanted.port);
        assert_ne!(with("SLURM_STEP_ID=1").port, wanted.port);
        assert_eq!(with("SLURM_STEP_NODELIST=").address, "10.0.0.1");
        assert_eq!(with("SLURM_STEP_TASKS_PER_NODE=8 SLURM_NODEID=0").address, "127.0.0.1");
        assert!((10_000..30_000).contains(&with("SLURM_JOB_ID=18446744073709551615 SLURM_STEP_ID=18446744073709551615").port));
        sentence("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2", &["MASTER_ADDR is not set"]);
    }

    #[test]
    fn a_batch_script_is_one_process_however_many_tasks_the_job_has() {
        assert_eq!(read("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=5 SLURM_NODELIST=a").unwrap(), None);
        assert_eq!(read("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=8").unwrap(), None);
        assert_eq!(read("SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=8").unwrap(), None);
    }

    #[test]
    fn the_first_launcher_in_the_list_counts() {
        assert_eq!(launched(&format!("{TORCHRUN} {OMPI} {SRUN}")).by, "torchrun");
        let ours = "MASTER_ADDR=a";
        assert_eq!(launched(&format!("{ours} {OMPI} {SRUN}")).by, "Open MPI");
        // torchrun inside a step of SLURM, one process a machine: it is the inner one that counts.
        assert_eq!(launched(&format!("RANK=0 WORLD_SIZE=2 {SRUN}")).world, 2);
    }

    #[test]
    fn one_process_or_no_launcher_is_nothing() {
        for alone in ["", "RANK=0 WORLD_SIZE=1", "WORLD_SIZE=1", "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1", "PMI_SIZE=1"] {
            assert_eq!(read(alone).unwrap(), None, "{alone}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_a_sentence() {
        for (variables, parts) in [
            ("RANK=one WORLD_SIZE=2", &["RANK is \"one\""][..]),
            ("RANK=-1 WORLD_SIZE=2", &["RANK is \"-1\""]),
            ("RANK= WORLD_SIZE=2", &["RANK is \"\""]),
            ("RANK=0", &["RANK is set but WORLD_SIZE is not"]),
            ("WORLD_SIZE=4", &["WORLD_SIZE is 4 but RANK is not set"]),
            ("RANK=2 WORLD_SIZE=2", &["RANK is 2 but WORLD_SIZE is 2"]),
            ("RANK=0 WORLD_SIZE=0", &["WORLD_SIZE is 0", "from 1 to 65536"]),
            ("RANK=0 WORLD_SIZE=65537", &["WORLD_SIZE is 65537", "from 1 to 65536"]),
            ("RANK=0 WORLD_SIZE=99999999999999999999", &["WORLD_SIZE is \"99999999999999999999\""]),
            ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3", &["LOCAL_WORLD_SIZE is 3 but WORLD_SIZE is 2"]),
            ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0", &["LOCAL_WORLD_SIZE is 0"]),
            ("RANK=0 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", &["LOCAL_RANK is 2 but LOCAL_WORLD_SIZE is 2"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=", &["MASTER_ADDR is empty"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_PORT=65535", &["MASTER_PORT is 65535", "MASQUE_PORT"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_PORT=0", &["MASTER_PORT is 0"]),
            ("RANK=0 WORLD_SIZE=2 MASTER_PORT=70000", &["MASTER_PORT is \"70000\""]),
            ("RANK=0 WORLD_SIZE=2 MASQUE_PORT=0", &["MASQUE_PORT is 0"]),
            ("PMI_SIZE=4 PMI_RANK=0", &["PMI_SIZE is 4", "masque launch"]),
            ("WORLD_SIZE=4 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=8", &["WORLD_SIZE is 4 but SLURM_STEP_NUM_TASKS is 8"]),
            ("SLURM_PROCID=9 SLURM_STEP_NUM_TASKS=8", &["SLURM_PROCID is 9 but SLURM_STEP_NUM_TASKS is 8"]),
        ] {
            sentence(variables, parts);
        }
        assert_eq!(launched("RANK=0 WORLD_SIZE=2 MASTER_PORT=65535 MASQUE_PORT=9").port, 9);
    }

    #[test]
    fn lists_of_slurm_and_of_the_kernel_are_read() {
        for (list, first) in [
            ("node[01-04,07],other", "node01"),
            ("node[7,9]", "node7"),
            ("a,b", "a"),
            ("solo", "solo"),
            ("rack[0-1]n[2-3].site,x", "rack0n2.site"),
            ("gpu-a[3-4]", "gpu-a3"),
        ] {
            assert_eq!(first_host(list), first, "{list}");
        }
        let tasks: Vec<Option<usize>> = (0..4).map(|node| tasks_of("4(x2),3", node)).collect();
        assert_eq!(tasks, [Some(4), Some(4), Some(3), None]);
        assert_eq!((tasks_of("many", 0), tasks_of("2(x", 0)), (None, None));
        assert_eq!(list_after("0-3,8\n", ""), Some(5));
        assert_eq!(list_after("Name: x\nCpus_allowed_list:\t0-1\n", "Cpus_allowed_list:"), Some(2));
        assert_eq!((list_after("", ""), list_after("3-1", ""), list_after("x", "")), (None, None, None));
    }

    #[test]
    fn the_cores_of_a_machine_are_shared_unless_each_process_has_its_own() {
        let torchrun = launched(TORCHRUN);
        assert_eq!((torchrun.share(64, 64, 64), torchrun.share(3, 3, 3), torchrun.share(8, 8, 64)), (16, 1, 2));
        let slurm = launched(SRUN);
        assert_eq!((slurm.share(64, 64, 64), slurm.share(16, 16, 64), slurm.share(32, 32, 64)), (16, 16, 8));
        assert_eq!(launched("RANK=1 WORLD_SIZE=2").share(8, 8, 8), 8);
    }
}
