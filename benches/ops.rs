//! Times of single ops: `cargo bench --bench ops`. The same as `masque measure ops --rounds 5`.

/// Runs of each case that count.
const ROUNDS: usize = 5;

fn main() {
    let rows = || masque::measure::ops::run(&[], ROUNDS, masque::device::Precision::F32, |row| println!("{}", row.text()));
    if let Err(error) = masque::device::parallel::with_threads(0, rows).and_then(|done| done) {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
}
