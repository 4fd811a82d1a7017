//! Parses, runs, and prints the error chain once; see [`masque::cli`].

fn main() -> std::process::ExitCode {
    masque::cli::main()
}
