//! What a masked model regresses.
pub mod pixels;
