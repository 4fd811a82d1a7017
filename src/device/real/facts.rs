//! What a device and its kernels are, for `masque info`.

use super::super::launch::KERNELS;
use super::super::libs;
use super::{Doing, Real};
use crate::error::Result;
use cudarc::driver::result::device;
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Of, CUfunction_attribute as OfFunction};
use std::ffi::{c_char, c_int};

/// A device.
pub struct Facts {
    pub name: String,
    pub capability: (i32, i32),
    pub memory: u64,
    pub multiprocessors: usize,
    pub cache: usize,
    pub most_shared: usize,
}

impl Facts {
    /// Of all devices that the driver sees, whether kernels run on them or not.
    pub fn all() -> Result<Vec<Self>> {
        (0..libs::devices()?).map(|ordinal| Self::of(device::get(ordinal as i32).doing("looking at it")?)).collect()
    }

    fn of(it: CUdevice) -> Result<Self> {
        // SAFETY: the driver gave this device.
        let attribute = |of: Of| unsafe { device::get_attribute(it, of) }.map(|value| value.max(0) as usize).doing("asking for its limits");
        let major = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as i32;
        let minor = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as i32;
        Ok(Self {
            name: device::get_name(it).doing("asking for its name")?,
            capability: (major, minor),
            // SAFETY: as above.
            memory: unsafe { device::total_mem(it) }.doing("asking for its memory")? as u64,
            multiprocessors: attribute(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            cache: attribute(Of::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            most_shared: attribute(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    }
}

/// A kernel as it was compiled for a device.
pub struct KernelFacts {
    pub registers: i32,
    pub shared: i32,
    /// Bytes a thread has in local memory: registers that spilled, and arrays.
    pub local: i32,
    /// Threads of a block, at most.
    pub threads: i32,
    /// Blocks a multiprocessor holds at once, at that many threads (256 where more are allowed) and without dynamic shared memory.
    pub blocks: u32,
    /// The architecture of the code, as 90.
    pub arch: i32,
}

impl Real {
    pub fn facts(&self) -> Result<Facts> {
        Facts::of(self.context.cu_device())
    }

    /// Its place on the machine's PCI bus, as 0000:3B:00.0, by which two ranks see that they share it.
    pub fn bus(&self) -> Result<String> {
        const ROOM: usize = 64;
        let mut text: [c_char; ROOM] = [0; ROOM];
        // SAFETY: there is room for as many bytes as it is told, the last of which is zero.
        let asked = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), ROOM as c_int - 1, self.context.cu_device()) };
        asked.result().doing("asking for its place on the bus")?;
        Ok(text.iter().take_while(|&&c| c != 0).map(|&c| char::from(c as u8)).collect())
    }

    /// Of the kernel at this position of [`KERNELS`].
    pub fn kernel_facts(&self, at: usize) -> Result<KernelFacts> {
        assert!(at < KERNELS.len(), "kernel {at} of {}", KERNELS.len());
        self.bind()?;
        let function = &self.function(at)?.function;
        let of = |of: OfFunction| function.get_attribute(of).doing("asking for a kernel's limits");
        let threads = of(OfFunction::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        let most = if threads >= 1024 { 256 } else { threads };
        Ok(KernelFacts {
            registers: of(OfFunction::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            shared: of(OfFunction::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            local: of(OfFunction::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            threads,
            blocks: function.occupancy_max_active_blocks_per_multiprocessor(most as u32, 0, None).doing("asking for its occupancy")?,
            arch: of(OfFunction::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
        })
    }
}
