//! SIGINT and SIGTERM ask a run to save and stop; a second one ends it at once.

use crate::error::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[derive(Clone)]
pub struct Signals {
    which: Arc<AtomicUsize>,
}

impl Signals {
    /// From now on both signals are noticed here instead of ending the program.
    pub fn listen() -> Result<Self> {
        let (which, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for signal in [SIGINT, SIGTERM] {
            let attempt = "listening for signals";
            // In this order: the first signal finds nothing asked and asks, the second finds it asked and ends the program.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, asked.clone()).context(attempt)?;
            signal_hook::flag::register(signal, asked.clone()).context(attempt)?;
            signal_hook::flag::register_usize(signal, which.clone(), signal as usize).context(attempt)?;
        }
        Ok(Self { which })
    }

    /// The signal that came: its number and its name.
    pub fn came(&self) -> Option<(u8, &'static str)> {
        named(self.which.load(Ordering::Relaxed) as u8)
    }
}

/// A signal with its name.
pub fn named(number: u8) -> Option<(u8, &'static str)> {
    match i32::from(number) {
        0 => None,
        SIGINT => Some((number, "SIGINT")),
        _ => Some((number, "SIGTERM")),
    }
}

/// What a rank wishes the run to do after an update.
#[derive(Clone, Copy, Default)]
pub struct Wish {
    /// It is to stop: the signal that came.
    pub signal: Option<(u8, &'static str)>,
    /// It is time for a checkpoint, by the clock of rank 0.
    pub save: bool,
}

impl Wish {
    pub fn word(self) -> f64 {
        f64::from(self.signal.map_or(0, |(number, _)| number)) + if self.save { 1000.0 } else { 0.0 }
    }

    /// What is done when each rank has said its word.
    pub fn of_all(told: &[f64]) -> Self {
        let signal = told.iter().map(|word| (word % 1000.0) as u8).find(|&number| number != 0);
        Self { signal: signal.and_then(named), save: told.first().is_some_and(|word| *word >= 1000.0) }
    }
}
