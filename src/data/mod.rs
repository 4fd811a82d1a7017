//! Images on their way to a model: `resize` turns bytes into normalised pixels, `mixup` blends a batch with itself.
pub mod mixup;
pub mod resize;
