//! What masking saves, all five systems at small sizes: `cargo bench --bench masking`. The same as `masque measure masking`.

use clap::Parser;
use masque::measure::masking::{self, MaskingArgs};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    masking: MaskingArgs,
}

fn main() {
    let args = Defaults::parse_from(["masking"]).masking;
    let measured = masque::device::parallel::with_threads(0, || masking::run(&args, &mut |line| println!("{line}")));
    if let Err(error) = measured.and_then(|done| done) {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
}
