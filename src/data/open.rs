//! Which set lies at a path.

use super::Dataset;
use super::packed::Packed;
use crate::error::Result;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    Train,
    Val,
}

/// Opens the set at `path`.
pub fn open(path: &Path, _split: Split) -> Result<Arc<dyn Dataset>> {
    Ok(Arc::new(Packed::open(path)?))
}
