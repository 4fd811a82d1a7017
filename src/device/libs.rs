//! Finding CUDA libraries.
