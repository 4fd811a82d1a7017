//! Kernels by name, and what they are called with.
//!
//! An argument list is the same for a real and an emulated GPU: each argument takes a cell of eight bytes, and the kernel is handed pointers to the
//! cells, which is what cuLaunchKernel wants. In the order outputs, inputs, saved, sizes, scalars, as kernels declare them.

use super::Dtype;
use std::ffi::{c_char, c_void};

/// The emulated form of a kernel: runs it with these arguments, or answers the letters of its parameters if there are none.
pub type Entry = unsafe extern "C" fn(args: *const *mut c_void) -> *const c_char;

/// A kernel of `kernels/*.cu`.
pub struct Kernel {
    pub name: &'static str,
    /// Which of [`FILES`] it is in.
    pub file: usize,
    pub entry: Option<Entry>,
}

/// A file of `kernels/`: device code if nvcc was there when the program was built, and the source for NVRTC.
pub struct File {
    pub name: &'static str,
    pub fatbin: &'static [u8],
    pub source: &'static str,
    /// What the device code is for, as sm_90a (machine code) and compute_80 (PTX).
    pub archs: &'static [&'static str],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Position of a kernel in [`KERNELS`].
pub(super) fn find(name: &str) -> Option<usize> {
    KERNELS.binary_search_by(|kernel| kernel.name.cmp(name)).ok()
}

/// The versions of an op's kernels; which one runs is asked of [`super::gpu::Gpu::version`].
pub struct Versions {
    pub op: &'static str,
    pub all: &'static [&'static str],
    pub chosen: &'static str,
}

/// Something that lives on a GPU at an address. Implemented by tensors.
pub trait Operand {
    /// To be read.
    fn address(&self) -> u64;
    /// To be written: the caller must be the only owner.
    fn address_mut(&mut self) -> u64;
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Cell {
    Pointer(u64),
    Int(i32),
    Float(f32),
    Long(i64),
    /// The kernel's own cell for an index out of range.
    Fault,
}

/// An argument list.
#[derive(Clone, Default, Debug)]
pub struct Args {
    pub(super) cells: Vec<Cell>,
    /// A size that does not fit into its cell.
    pub(super) too_large: Option<usize>,
}

impl Args {
    pub fn new() -> Self {
        Self::default()
    }

    fn with(mut self, cell: Cell) -> Self {
        self.cells.push(cell);
        self
    }

    pub fn out(self, x: &mut impl Operand) -> Self {
        let address = x.address_mut();
        self.with(Cell::Pointer(address))
    }

    /// Null if there is none.
    pub fn maybe_out(self, x: Option<&mut impl Operand>) -> Self {
        let address = x.map_or(0, Operand::address_mut);
        self.with(Cell::Pointer(address))
    }

    pub fn input(self, x: &impl Operand) -> Self {
        self.with(Cell::Pointer(x.address()))
    }

    pub fn maybe(self, x: Option<&impl Operand>) -> Self {
        self.with(Cell::Pointer(x.map_or(0, Operand::address)))
    }

    /// A size. Kernels count in 32 bits: a larger one is refused by the launch.
    pub fn int(mut self, x: usize) -> Self {
        let fits = i32::try_from(x);
        self.too_large = self.too_large.or(fits.err().map(|_| x));
        self.with(Cell::Int(fits.unwrap_or(i32::MAX)))
    }

    pub fn flag(self, x: bool) -> Self {
        self.int(x as usize)
    }

    /// Four bytes as they are.
    pub fn bits(self, x: u32) -> Self {
        self.with(Cell::Int(x as i32))
    }

    /// A size or an offset of 64 bits (`long long`).
    pub fn long(self, x: usize) -> Self {
        self.with(Cell::Long(x as i64))
    }

    pub fn float(self, x: f64) -> Self {
        self.with(Cell::Float(x as f32))
    }

    /// Where the kernel notes an index out of range (`unsigned* fault`).
    pub fn fault(self) -> Self {
        self.with(Cell::Fault)
    }

    /// The letter of each argument: p pointer, i and f four bytes, l eight.
    pub(super) fn letters(&self) -> String {
        let letter = |cell: &Cell| match cell {
            Cell::Pointer(_) | Cell::Fault => 'p',
            Cell::Int(_) => 'i',
            Cell::Float(_) => 'f',
            Cell::Long(_) => 'l',
        };
        self.cells.iter().map(letter).collect()
    }

    /// The cells as a kernel reads them; little-endian, so the low bytes come first.
    pub(super) fn words(&self, fault: u64) -> Vec<u64> {
        let word = |cell: &Cell| match *cell {
            Cell::Pointer(address) => address,
            Cell::Fault => fault,
            Cell::Int(x) => x as u32 as u64,
            Cell::Float(x) => x.to_bits() as u64,
            Cell::Long(x) => x as u64,
        };
        self.cells.iter().map(word).collect()
    }
}

/// Blocks, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    pub grid: [usize; 3],
    pub block: usize,
    pub shared: usize,
}

impl Launch {
    /// A grid of one axis, without dynamic shared memory.
    pub fn new(blocks: usize, block: usize) -> Self {
        Self { grid: [blocks, 1, 1], block, shared: 0 }
    }

    /// One thread for every `each` of `n` elements, in blocks of 256.
    pub fn elements(n: usize, each: usize) -> Self {
        Self::new(n.div_ceil(256 * each), 256)
    }

    pub fn grid(self, x: usize, y: usize, z: usize) -> Self {
        Self { grid: [x, y, z], ..self }
    }

    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes, ..self }
    }
}

/// `{kernel}_{dtype}`.
pub fn typed(kernel: &str, dtype: Dtype) -> String {
    format!("{kernel}_{dtype}")
}
