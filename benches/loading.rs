//! Images a core loads: `cargo bench --bench loading`. The same as `masque measure loading`.

use clap::Parser;
use masque::measure::loading::{self, LoadingArgs};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    loading: LoadingArgs,
}

fn main() {
    if let Err(error) = loading::run(&Defaults::parse_from(["loading"]).loading, |row| println!("{}", row.text())) {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
}
