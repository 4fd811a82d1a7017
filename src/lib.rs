//! masque: learning from images by looking at part of them.
//!
//! The map of the house, from the ground up. A module names only those above it in this list.
//!
//! | floor | module | what it is |
//! |---|---|---|
//! | 0 | [`error`] | one error: a message, a cause, an exit code |
//! | 0 | [`rng`] | random numbers asked for by name |
//! | 0 | [`trace`] | what is done when, if anybody asks |
//! | 1 | [`device`] | where numbers live and run: memory, vector instructions, matrix product, threads |
//! | 2 | [`tensor`] | shape + dtype + memory, always contiguous |
//! | 2 | [`formats`] | named tensors on disk: safetensors and PyTorch's .pth |
//! | 3 | [`tape`] | automatic differentiation |
//! | 3 | [`param`] | names and ranges in one flat buffer, and its gradient |
//! | 3 | [`targets`] | what is regressed |
//! | 4 | [`ops`] | one file an op: the math, the CPU code, the backward, the cases |
//! | 5 | [`masking`] | which patches are kept |
//! | 5 | [`nn`] | parts of a vision transformer |
//! | 5 | [`data`] | sets of images, what happens to an image, batches read ahead |
//! | 5 | [`optim`] | update rules, schedules, parameter groups |
//! | 6 | [`methods`] | one file a method, reading like its paper's method section |
//! | 7 | [`train`] | the loop, its checkpoints and records, evaluation, pictures and the report |
//! | 7 | [`measure`] | timing, parity with PyTorch, facts of the machine |
//! | 8 | [`cli`] | arguments turned into objects |

pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod formats;
pub mod masking;
pub mod measure;
pub mod methods;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod param;
pub mod rng;
pub mod tape;
pub mod targets;
pub mod tensor;
pub mod trace;
pub mod train;

/// Compiles and runs the example in the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
