//! ConViT's stages where patches are visible beside everywhere, three quarters hidden: `cargo bench --bench stages`. The same as `masque measure stages`.

use clap::Parser;
use masque::measure::stages::{self, StagesArgs};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    stages: StagesArgs,
}

fn main() {
    let args = Defaults::parse_from(["stages"]).stages;
    match masque::device::parallel::with_threads(0, || stages::run(&args)).and_then(|report| report) {
        Ok(report) => println!("{}", report.text()),
        Err(error) => {
            eprintln!("{}", error.chain());
            std::process::exit(1);
        }
    }
}
