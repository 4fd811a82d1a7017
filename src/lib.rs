//! masque: learning from images by looking at part of them.
pub mod device;
pub mod error;
pub mod ops;
pub mod optim;
pub mod param;
pub mod rng;
pub mod tape;
pub mod tensor;
