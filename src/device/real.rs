//! CUDA.

use super::gpu::{Backend, Recorded, Work};
use crate::error::{Error, Result};
use std::sync::Arc;

pub struct Real {}

impl Real {
    pub fn open(_ordinal: usize) -> Result<Self> {
        Err(Error::new("not there yet"))
    }
}

impl Backend for Arc<Real> {
    fn allocate(&self, _: usize) -> Result<u64> {
        unreachable!()
    }
    fn release(&self, _: u64, _: usize) {}
    fn submit(&self, _: Work) -> Result<()> {
        unreachable!()
    }
    fn upload(&self, _: u64, _: &[u8]) -> Result<()> {
        unreachable!()
    }
    fn download(&self, _: u64, _: &mut [u8]) -> Result<()> {
        unreachable!()
    }
    fn wait(&self) -> Result<()> {
        unreachable!()
    }
    fn begin_recording(&self) -> Result<()> {
        unreachable!()
    }
    fn end_recording(&self) -> Result<Box<dyn Recorded>> {
        unreachable!()
    }
    fn memory(&self) -> u64 {
        0
    }
    fn most_shared(&self) -> usize {
        0
    }
    fn notes_faults(&self) -> bool {
        true
    }
}
