//! Floor 7: training.

pub mod step;
