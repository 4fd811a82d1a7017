//! Times of every op on the CPU: `cargo bench --bench kernels`. The same as `masque measure kernels --rounds 5`.

use clap::Parser;
use masque::measure::kernels::{self, KernelsArgs};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    kernels: KernelsArgs,
}

fn main() {
    let args = KernelsArgs { rounds: Some(5), ..Defaults::parse_from(["kernels"]).kernels };
    let rows = || kernels::run(&args, &mut |line| println!("{line}"));
    if let Err(error) = masque::device::parallel::with_threads(0, rows).and_then(|done| done) {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
}
