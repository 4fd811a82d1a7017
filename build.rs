//! Compiles kernels/*.cu twice: with nvcc, where there is one, to fatbins that the program embeds; with the C++ compiler for the emulated device.
//!
//! | variable | meaning |
//! |---|---|
//! | `MASQUE_NVCC` | the nvcc to use; else CUDA_HOME, CUDA_PATH, CUDA_ROOT, PATH, a virtual environment with pip's packages, /usr/local/cuda |
//! | `MASQUE_REQUIRE_CUDA=1` | no nvcc is an error and not a warning; so is anything else but nothing and 0 |
//! | `MASQUE_CUDA_ARCHS` | targets, by default `80,90a`; PTX for compute_80 always comes with them |
//!
//! The alias library for NCCL ([`alias`]) is made by the C compiler.
//!
//! Nothing is downloaded and no GPU is asked for anything. What has been made is kept while its source, the headers and the compiler stay the same.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;
use std::{env, fs};

const KERNELS: &str = "kernels";

fn main() {
    for name in
        ["MASQUE_NVCC", "MASQUE_REQUIRE_CUDA", "MASQUE_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "VIRTUAL_ENV", "CONDA_PREFIX"]
    {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-env-changed=PATH");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={KERNELS}");
    println!("cargo:rustc-check-cfg=cfg(masque_fatbins)");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut sources = with_ending(Path::new(KERNELS), "cu");
    sources.sort();
    let headers = newest(
        with_ending(Path::new(KERNELS), "cuh")
            .into_iter()
            .chain(with_ending(&Path::new(KERNELS).join("emulate"), ""))
            .chain(["build.rs".into()]),
    );

    let mut build = cc::Build::new();
    let compiler = build.cpp(true).warnings(false).try_get_compiler();
    let compiler = compiler.unwrap_or_else(|error| fail(&format!("{error}; {NEEDS_CPP}")));
    if !answers(compiler.path()) {
        fail(&format!("the C++ compiler {} does not answer --version; {NEEDS_CPP}", compiler.path().display()));
    }
    forget_unless_made_by(&out, "cpp", &["o", "names"], &format!("{:?} {:?}", compiler.path(), compiler.args()));
    let emulated = env::var_os("CARGO_FEATURE_EMULATED").is_some();
    let runtime = Path::new(KERNELS).join("emulate/runtime.cpp");
    let mut objects: Vec<PathBuf> = sources.iter().map(|source| out.join(stem(source)).with_extension("o")).collect();
    let mut jobs: Vec<Job> = Vec::new();
    for (source, object) in sources.iter().zip(&objects) {
        let names = object.with_extension("names");
        jobs.push(Job { from: source, to: names.clone(), command: preprocess(&compiler, source), what: "the C++ compiler" });
        if emulated {
            jobs.push(Job {
                from: source,
                to: object.clone(),
                command: emulate(&compiler, source, object, true),
                what: "the C++ compiler",
            });
        }
    }
    if emulated {
        let object = out.join("runtime.o");
        jobs.push(Job {
            from: &runtime,
            to: object.clone(),
            command: emulate(&compiler, &runtime, &object, false),
            what: "the C++ compiler",
        });
        objects.push(object);
    }
    let nvcc = find_nvcc();
    let archs = if nvcc.is_some() { archs() } else { Vec::new() };
    match &nvcc {
        Some(nvcc) => {
            forget_unless_made_by(&out, "nvcc", &["fatbin"], &format!("{nvcc:?} {archs:?}"));
            for source in &sources {
                let fatbin = out.join(stem(source)).with_extension("fatbin");
                jobs.push(Job { from: source, to: fatbin.clone(), command: device_code(nvcc, &archs, source, &fatbin), what: "nvcc" });
            }
            println!("cargo:rustc-cfg=masque_fatbins");
        }
        None if env::var_os("MASQUE_REQUIRE_CUDA").is_some_and(|value| !value.is_empty() && value != "0") => {
            fail("MASQUE_REQUIRE_CUDA is set and no nvcc was found; set MASQUE_NVCC to one");
        }
        None => println!(
            "cargo:warning=no nvcc was found (MASQUE_NVCC, CUDA_HOME, CUDA_PATH, CUDA_ROOT, PATH, virtual environment): built without GPU code; \
             a GPU then needs NVRTC when the program runs"
        ),
    }
    run(&jobs, headers);
    if emulated {
        let mut library = cc::Build::new();
        library.cpp(true);
        objects.iter().for_each(|object| {
            library.object(object);
        });
        library.compile("masque_emulated");
    }
    fs::write(out.join("kernels.rs"), table(&sources, &out, emulated, &archs)).expect("OUT_DIR can be written");
    let (bytes, without) = match alias(&out) {
        Ok(file) => (format!("include_bytes!({:?})", file.display().to_string()), String::new()),
        Err(reason) => ("&[]".to_string(), reason),
    };
    let text = format!("static ALIAS: &[u8] = {bytes};\nstatic WITHOUT: &str = {without:?};\n");
    fs::write(out.join("alias.rs"), text).expect("OUT_DIR can be written");
}

/// A library of the name `libnccl.so`, which the bindings look for, that is empty and needs `libnccl.so.2`, the only name that pip installs. Made against a
/// stand-in of that name, since the real one need not be here. Or why there is none.
fn alias(out: &Path) -> Result<PathBuf, String> {
    let target = |what: &str| env::var(format!("CARGO_CFG_TARGET_{what}")).unwrap_or_default();
    if (target("OS").as_str(), target("ENV").as_str()) != ("linux", "gnu") {
        return Err("NCCL is for Linux with glibc".to_string());
    }
    let compiler = cc::Build::new().warnings(false).try_get_compiler().map_err(|error| format!("there was no C compiler ({error})"))?;
    let folder = out.join("alias");
    fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("empty.c"), "")).map_err(|error| error.to_string())?;
    let needs = ["-Wl,--no-as-needed", "-L.", "-l:libnccl.so.2"];
    for (name, needs) in [("libnccl.so.2", &[][..]), ("libnccl.so", &needs)] {
        let mut command = compiler.to_command();
        command.current_dir(&folder).args(["-shared", "-fPIC", "-g0", "-nostdlib", "-s", "-o", name, "empty.c"]);
        let done = command.arg(format!("-Wl,-soname,{name}")).args(needs).output();
        let done = done.map_err(|error| format!("the C compiler did not start ({error})"))?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            return Err(format!("the linker refused it ({})", said.lines().next().unwrap_or("without a word")));
        }
    }
    Ok(folder.join("libnccl.so"))
}

/// One file to be made from another.
struct Job<'a> {
    from: &'a Path,
    to: PathBuf,
    command: Invocation,
    what: &'a str,
}

/// A program and its arguments, to be started on any thread.
struct Invocation {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    /// Keep the names of the kernels that the output declares instead of the output.
    names: bool,
}

fn fail(message: &str) -> ! {
    println!("cargo:warning={message}");
    eprintln!("{message}");
    std::process::exit(1);
}

const NEEDS_CPP: &str = "the kernels in kernels/ need one: install g++, or set CXX to one";

/// Removes what another tool, or this one with other options, has made.
fn forget_unless_made_by(out: &Path, tool: &str, endings: &[&str], how: &str) {
    let stamp = out.join(tool);
    if fs::read_to_string(&stamp).unwrap_or_default() != how {
        let old = endings.iter().flat_map(|ending| with_ending(out, ending));
        old.for_each(|old| fs::remove_file(old).expect("OUT_DIR can be written"));
        fs::write(&stamp, how).expect("OUT_DIR can be written");
    }
}

fn answers(program: &Path) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|done| done.status.success())
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have plain names")
}

/// Files of a folder whose names end so; all of them if the ending is empty.
fn with_ending(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| fail(&format!("{}: {error}", folder.display())));
    let files = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file());
    files.filter(|path| ending.is_empty() || path.extension().is_some_and(|found| found == ending)).collect()
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|file| file.modified()).ok()
}

fn newest(paths: impl Iterator<Item = PathBuf>) -> Option<SystemTime> {
    paths.filter_map(|path| changed(&path)).max()
}

fn of(compiler: &cc::Tool, args: Vec<OsString>, names: bool) -> Invocation {
    let mut all: Vec<OsString> = compiler.args().to_vec();
    all.extend(args);
    Invocation {
        program: compiler.path().to_path_buf(),
        args: all,
        env: compiler.get_envs().map(|(name, value)| (name.into(), value.into())).collect(),
        names,
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// The flags with which a kernel source becomes C++.
fn as_cpp(source: &Path) -> Vec<OsString> {
    let mut args = words(&[
        "-std=c++20",
        "-xc++",
        "-include",
        "kernels/emulate/cuda.h",
        "-I",
        KERNELS,
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
    ]);
    args.push(source.into());
    args
}

/// Macros expanded, so that each `KERNEL(name)`, also one inside another macro, shows as a symbol.
fn preprocess(compiler: &cc::Tool, source: &Path) -> Invocation {
    let mut args = words(&["-E", "-P"]);
    args.extend(as_cpp(source));
    of(compiler, args, true)
}

/// Optimised whatever the profile: a kernel at -O0 takes minutes where it takes seconds.
fn emulate(compiler: &cc::Tool, source: &Path, object: &Path, kernel: bool) -> Invocation {
    let mut args = words(&["-O2", "-fPIC", "-g0", "-c"]);
    if kernel {
        args.extend(as_cpp(source));
    } else {
        args.extend(words(&["-std=c++20"]));
        args.push(source.into());
    }
    args.push("-o".into());
    args.push(object.into());
    of(compiler, args, false)
}

/// What device code is made for: machine code, and PTX for anything newer.
fn archs() -> Vec<String> {
    let wanted = env::var("MASQUE_CUDA_ARCHS").unwrap_or_else(|_| "80,90a".into());
    let wanted = wanted.split(',').map(str::trim).filter(|arch| !arch.is_empty());
    wanted.map(|arch| format!("sm_{arch}")).chain(["compute_80".to_string()]).collect()
}

fn device_code(nvcc: &Path, archs: &[String], source: &Path, fatbin: &Path) -> Invocation {
    let mut args = words(&["-std=c++17", "-O3", "--fatbin", "-compress-mode=size", "-Xptxas", "-v", "-I", KERNELS]);
    for arch in archs {
        let number = arch.trim_start_matches("sm_").trim_start_matches("compute_");
        args.extend(words(&["-gencode", &format!("arch=compute_{number},code={arch}")]));
    }
    args.extend([source.into(), "-o".into(), fatbin.into()]);
    Invocation { program: nvcc.to_path_buf(), args, env: Vec::new(), names: false }
}

/// Runs the jobs whose output is older than its source or `headers`, as many at once as cargo allows.
fn run(jobs: &[Job], headers: Option<SystemTime>) {
    let stale = |job: &&Job| match (changed(&job.to), changed(job.from)) {
        (Some(made), Some(source)) => made < source || headers.is_some_and(|headers| made < headers),
        _ => true,
    };
    let queue = Mutex::new(jobs.iter().filter(stale));
    let problems = Mutex::new(Vec::new());
    let at_once: usize = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..at_once.clamp(1, 64) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no job panics").next();
                    let Some(job) = next else { return };
                    if let Err(problem) = one(job) {
                        problems.lock().expect("no job panics").push(problem);
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().expect("no job panics");
    if !problems.is_empty() {
        fail(&problems.join("\n"));
    }
}

fn one(job: &Job) -> Result<(), String> {
    let command = &job.command;
    let done = Command::new(&command.program).args(&command.args).envs(command.env.iter().cloned()).output();
    let done = done.map_err(|error| format!("{} does not start ({}): {error}", job.what, command.program.display()))?;
    let log = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        let _ = fs::remove_file(&job.to);
        return Err(format!("{} could not compile {}:\n{log}", job.what, job.from.display()));
    }
    if command.names {
        fs::write(&job.to, names(&String::from_utf8_lossy(&done.stdout)).join("\n")).map_err(|error| error.to_string())?;
    }
    if job.what == "nvcc" {
        // What scripts/kernel-table reads.
        fs::write(job.to.with_extension("ptxas"), log.as_bytes()).map_err(|error| error.to_string())?;
    }
    let kernels = log.lines().filter(|line| line.contains("spill stores") && !line.contains(" 0 bytes spill stores"));
    kernels.for_each(|line| println!("cargo:warning={}: {}", job.from.display(), line.trim()));
    Ok(())
}

/// The kernels that a preprocessed source declares.
fn names(text: &str) -> Vec<String> {
    let mark = "masque_emulated_";
    let mut names: Vec<String> = Vec::new();
    for (at, _) in text.match_indices(mark) {
        let name: String = text[at + mark.len()..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if text[at + mark.len() + name.len()..].starts_with("(void* const* a)") {
            names.push(name);
        }
    }
    names.sort();
    names
}

/// The Rust side of it: names, entries of the emulated device, fatbins, sources.
fn table(sources: &[PathBuf], out: &Path, emulated: bool, archs: &[String]) -> String {
    let mut kernels: BTreeMap<String, usize> = BTreeMap::new();
    for (i, source) in sources.iter().enumerate() {
        let list = fs::read_to_string(out.join(stem(source)).with_extension("names")).expect("written above");
        for name in list.lines() {
            if kernels.insert(name.to_string(), i).is_some() {
                fail(&format!("kernel {name} is defined twice, the second time in {}", source.display()));
            }
        }
    }
    let mut text = String::new();
    if emulated {
        text += "unsafe extern \"C\" {\n";
        kernels.keys().for_each(|name| {
            text += &format!("    fn masque_emulated_{name}(args: *const *mut std::ffi::c_void) -> *const std::ffi::c_char;\n")
        });
        text += "}\n";
    }
    text += "pub static FILES: &[File] = &[\n";
    let root = env::current_dir().expect("cargo starts build scripts in the package");
    for source in sources {
        let (name, path) = (stem(source), root.join(source));
        let fatbin = out.join(name).with_extension("fatbin");
        let fatbin = if archs.is_empty() { "&[]".to_string() } else { format!("include_bytes!({:?})", fatbin.display().to_string()) };
        let path = path.display().to_string();
        text += &format!("    File {{ name: {name:?}, fatbin: {fatbin}, source: include_str!({path:?}), archs: &{archs:?} }},\n");
    }
    text += "];\npub static HEADERS: &[(&str, &str)] = &[\n";
    let mut headers = with_ending(Path::new(KERNELS), "cuh");
    headers.sort();
    for header in headers {
        let name = header.file_name().and_then(|name| name.to_str()).expect("kernel files have plain names");
        text += &format!("    ({name:?}, include_str!({:?})),\n", root.join(&header).display().to_string());
    }
    text += "];\npub static KERNELS: &[Kernel] = &[\n";
    for (name, file) in &kernels {
        let entry = if emulated { format!("Some(masque_emulated_{name} as Entry)") } else { "None".to_string() };
        text += &format!("    Kernel {{ name: {name:?}, file: {file}, entry: {entry} }},\n");
    }
    text + "];\n"
}

fn find_nvcc() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(given) = variable("MASQUE_NVCC") {
        if !answers(&given) {
            fail(&format!("MASQUE_NVCC is {}, which does not answer --version", given.display()));
        }
        return Some(given);
    }
    let mut places: Vec<PathBuf> = Vec::new();
    places.extend(["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(variable).map(|path| path.join("bin/nvcc")));
    if let Some(path) = env::var_os("PATH") {
        places.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
    }
    for root in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable) {
        for version in fs::read_dir(root.join("lib")).into_iter().flatten().flatten() {
            let packages = fs::read_dir(version.path().join("site-packages/nvidia")).into_iter().flatten().flatten();
            places.extend(packages.map(|package| package.path().join("bin/nvcc")));
        }
    }
    places.push("/usr/local/cuda/bin/nvcc".into());
    places.into_iter().find(|path| path.is_file() && answers(path))
}
