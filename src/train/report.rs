//! The page of a run.
use crate::error::Result;
use std::path::Path;

pub fn write(_folder: &Path) -> Result<()> {
    Ok(())
}
