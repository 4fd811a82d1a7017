//! Images on their way to a model: `resize` turns bytes into normalised pixels, `mixup` blends a batch with itself, `augment` does both to a batch of
//! bytes on any device.
pub mod augment;
pub mod mixup;
pub mod resize;
