//! Several ranks that train one model do what one rank does with all their images.

#[path = "common/runs.rs"]
mod runs;

use masque::device::ranks::Ranks;
use runs::{checkpoints, folder, last_tensors, rows};
use std::path::Path;
use std::time::Duration;

/// Runs a training command as so many threads, each a rank.
fn as_threads(world: usize, command: &str, output: &Path) -> Vec<Result<(), String>> {
    let ranks = if world == 1 { vec![Ranks::alone()] } else { Ranks::threads(world, Duration::from_secs(60)) };
    let run = |ranks: Ranks| {
        let output = output.display().to_string();
        let words: Vec<&str> = command.split_whitespace().chain(["--output-dir", &output]).collect();
        let done = masque::cli::run_as(&words, &ranks);
        done.map(|_| ()).map_err(|error| {
            ranks.fail(&error);
            error.chain()
        })
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|ranks| scope.spawn(|| run(ranks))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn losses(folder: &Path) -> Vec<f64> {
    rows(folder.join("steps.jsonl")).iter().map(|row| row["loss"].as_f64().unwrap()).collect()
}

/// 12 updates of 8 images each, in two epochs, for this many ranks.
fn small(command: &str, world: usize) -> String {
    format!(
        "{command} --train-images 48 --val-images 24 --batch-size {} --epochs 2 --log-freq 1 --warmup-epochs 0.5 --num-workers 0",
        8 / world
    )
}

#[track_caller]
fn close(name: &str, own: &[f64], expected: &[f64], limit: f64) {
    assert_eq!(own.len(), expected.len(), "{name}");
    let worst = own.iter().zip(expected).map(|(a, b)| (a - b).abs() / b.abs().max(1e-3)).fold(0.0, f64::max);
    assert!(worst <= limit, "{name}: {worst:e}\n{own:?}\n{expected:?}");
}

#[test]
fn threads_that_train_mae_match_one_rank() {
    let one = folder("ranks-mae-1");
    let command = "pretrain mae --model glyph_t --crop shift --save-freq 1 --keep 9";
    as_threads(1, &small(command, 1), &one).into_iter().for_each(|done| done.unwrap());
    for world in [2, 4] {
        let own = folder(&format!("ranks-mae-{world}"));
        as_threads(world, &small(command, world), &own).into_iter().for_each(|done| done.unwrap());
        close("losses", &losses(&own), &losses(&one), 1e-5);
        assert_eq!(checkpoints(&own), checkpoints(&one));
        assert_eq!(last_tensors(&own).len(), last_tensors(&one).len());
    }
}
