//! Optimisation: how parameters move. `schedule` says how fast.
pub mod schedule;
