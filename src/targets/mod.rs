//! What a masked model regresses.
pub mod hog;
pub mod pixels;
