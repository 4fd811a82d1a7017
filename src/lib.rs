//! masque: learning from images by looking at part of them.
pub mod error;
pub mod formats;
