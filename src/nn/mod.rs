//! Parts of a vision transformer.
pub mod position;
