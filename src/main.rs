fn main() {
    let args: Vec<String> = std::env::args().collect();
    let only: Vec<String> = args.iter().skip(1).cloned().collect();
    masque::device::parallel::set_threads(2).unwrap();
    masque::measure::ops::run(&only, 10, |row| println!("{}", row.text())).unwrap();
}
