//! Times of single ops: `cargo bench --bench ops`. The same as `masque measure ops --rounds 5`.

/// Runs of each case that count.
const ROUNDS: usize = 5;

fn main() {
    if let Err(error) = masque::measure::ops::run(&[], ROUNDS, |row| println!("{}", row.text())) {
        eprintln!("{}", error.chain());
        std::process::exit(1);
    }
}
