//! Floor 7: training, and what a person sees of it.

pub mod events;
pub mod progress;
pub mod record;
pub mod step;
