//! masque: learning from images by looking at part of them.
pub mod data;
pub mod error;
pub mod masking;
pub mod nn;
pub mod optim;
pub mod targets;
