//! Who started this process.

use crate::error::Result;

/// How a launcher started this process.
#[derive(Clone, Debug)]
pub struct Launched {
    pub rank: usize,
    pub world: usize,
    /// The number of this rank among those of its machine, and how many they are.
    pub local: usize,
    pub local_world: Option<usize>,
    pub address: String,
    pub port: u16,
    /// The name of the run; empty if the launcher gives none.
    pub run: String,
    /// Whose variables these are.
    pub by: &'static str,
}

impl Launched {
    pub fn from_environment() -> Result<Option<Self>> {
        Ok(None)
    }
}
