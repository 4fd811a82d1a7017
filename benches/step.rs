//! Time of a training step: `cargo bench --bench step`. The same as `masque measure step --batch 4 --steps 3 --warmup 1`.

use clap::Parser;
use masque::measure::step::{self, StepArgs};
use masque::measure::subject::SubjectArgs;

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    step: StepArgs,
}

fn main() {
    let usual = Defaults::parse_from(["step"]).step;
    let args = StepArgs { subject: SubjectArgs { batch: 4, ..usual.subject.clone() }, steps: 3, warmup: 1, ..usual };
    match masque::device::parallel::with_threads(0, || step::run(&args)).and_then(|report| report) {
        Ok(report) => println!("{}", report.text()),
        Err(error) => {
            eprintln!("{}", error.chain());
            std::process::exit(1);
        }
    }
}
