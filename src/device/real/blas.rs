//! Products by cuBLASLt.
//!
//! **Row by row and column by column.** The library counts column by column. A matrix [r, s] that lies row by row, rows `stride` apart, is for it the
//! matrix [s, r] with columns `stride` apart: the transpose, without anything being moved. So c = a b is asked for as c' = b' a', ' being the
//! transpose:
//!
//! | | the library's | lies as | operation |
//! |---|---|---|---|
//! | first factor, wanted b' [n, k] | b | [n, k] | none |
//! | | b turned: what lies there is [n, k] by rows | [k, n] | transpose |
//! | second factor, wanted a' [k, m] | a | [k, m] | none |
//! | | a turned: what lies there is [k, m] by rows | [m, k] | transpose |
//! | result c' [n, m] | c | [n, m] | |
//!
//! The library's bias is one number a row of its result, which is one a column of c.
//!
//! What the library should do for a shape is asked once and kept. Its sums are split only where the parts are added in f32.

use super::super::Dtype;
use super::super::launch::{Args, Cell, Launch};
use super::super::libs::{self, Library};
use super::super::product::{Factor, Product};
use super::{failed, lock};
use crate::error::{Error, Result};
use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as Of, cublasLtMatmulPreferenceAttributes_t as Wish};
use cudarc::driver::{CudaContext, CudaStream, result as driver};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// A matrix as the library sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Matrix {
    dtype: Dtype,
    rows: usize,
    columns: usize,
    lead: usize,
    step: usize,
    turned: bool,
    /// Its address is a multiple of so many bytes.
    align: u32,
}

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key {
    first: Matrix,
    second: Matrix,
    result: Matrix,
    batch: usize,
    bias: bool,
    tf32: bool,
}

/// [rows, columns] of the product's view; None if its rows overlap, which the library does not take.
fn matrix(x: &Factor, rows: usize, columns: usize, batch: usize) -> Option<Matrix> {
    let (lines, length) = if x.turned { (columns, rows) } else { (rows, columns) };
    let step = if batch > 1 { x.step } else { 0 };
    let align = (x.address | (step * x.dtype.size()) as u64 | 256).trailing_zeros();
    let lead = if lines > 1 { x.stride } else { x.stride.max(length) };
    let seen = Matrix { dtype: x.dtype, rows: length, columns: lines, lead, step, turned: x.turned, align: 1 << align };
    (lead >= length).then_some(seen)
}

impl Key {
    /// None if the library cannot be asked for this product.
    pub fn of(p: &Product, tf32: bool) -> Option<Self> {
        let kinds = (p.a.dtype, p.b.dtype, p.c.dtype);
        let known = matches!(kinds, (Dtype::F32, Dtype::F32, Dtype::F32) | (Dtype::Bf16, Dtype::Bf16, Dtype::F32 | Dtype::Bf16));
        let separate = p.batch == 1 || p.c.step > 0;
        if !known || !separate || p.k == 0 || p.c.turned || i32::try_from(p.batch).is_err() {
            return None;
        }
        let (first, second) = (matrix(&p.b, p.k, p.n, p.batch)?, matrix(&p.a, p.m, p.k, p.batch)?);
        Some(Self {
            first,
            second,
            result: matrix(&p.c, p.m, p.n, p.batch)?,
            batch: p.batch,
            bias: p.bias.is_some(),
            tf32: tf32 && kinds.0 == Dtype::F32,
        })
    }
}

/// The kernel that does any product, and what it is launched with.
pub(super) fn plain(p: &Product) -> (String, Launch, Args) {
    let pair = |x: &Factor| if x.turned { [1, x.stride] } else { [x.stride, 1] };
    let mut args = Args::new();
    args.cells.extend([p.c.address, p.a.address, p.b.address, p.bias.unwrap_or(0)].map(Cell::Pointer));
    let args = args.int(p.m).int(p.n).int(p.k).int(p.batch);
    let ([a_row, a_column], [b_row, b_column]) = (pair(&p.a), pair(&p.b));
    let args = args.long(a_row).long(a_column).long(p.a.step).long(b_row).long(b_column).long(p.b.step);
    let args = args.long(p.c.stride).long(p.c.step).flag(p.add);
    (format!("product_{}_{}_{}", p.a.dtype, p.b.dtype, p.c.dtype), Launch::elements(p.m * p.n * p.batch, 1), args)
}

/// Calls `destroy` on a handle when it goes.
struct Owned<T: Copy>(T, unsafe fn(T) -> std::result::Result<(), CublasError>);

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: the handle was made by the library and is destroyed here only. Nothing is left to report an error to.
        let _ = unsafe { (self.1)(self.0) };
    }
}

/// What the library does for a key.
pub(super) struct Plan {
    work: Owned<sys::cublasLtMatmulDesc_t>,
    layouts: [Owned<sys::cublasLtMatrixLayout_t>; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Whether it adds the bias, too.
    pub takes_bias: bool,
}

pub(super) struct Blas {
    /// What the library said where it has no algorithm.
    plans: Mutex<HashMap<Key, std::result::Result<Plan, CublasError>>>,
    handle: Owned<sys::cublasLtHandle_t>,
    workspace: u64,
    context: Arc<CudaContext>,
}

// SAFETY: the library's handle may be used by any thread; plans are only touched under their lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// As much as NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

impl Blas {
    pub fn open(context: &Arc<CudaContext>) -> Result<Self> {
        if libs::find(Library::CublasLt).is_none() {
            return Err(Error::new(
                "matrix products need cuBLASLt (libcublasLt.so.13), which was not found; pip install nvidia-cublas and activate that environment, \
                 or name the folder that holds it in MASQUE_CUDA_LIBS",
            ));
        }
        context.bind_to_thread().map_err(|error| failed("opening cuBLASLt", error))?;
        let handle = lt::create_handle().map_err(|error| Error::new(format!("cuBLASLt does not start: {error}")))?;
        let handle = Owned(handle, lt::destroy_handle);
        // SAFETY: the context is bound; the memory is written before it is read, by the library.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE) }.map_err(|error| failed("taking cuBLASLt's workspace", error))?;
        Ok(Self { plans: Mutex::default(), handle, workspace, context: context.clone() })
    }

    /// Does the product, or answers false if the library cannot; `prepare` puts the bias into c where the library does not add it.
    pub fn product(&self, p: &Product, key: Key, stream: &CudaStream, prepare: impl FnOnce() -> Result<()>) -> Result<bool> {
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::hash_map::Entry::Vacant(none) => none.insert(self.plan(&key)?),
        };
        let Ok(plan) = plan else { return Ok(false) };
        let separately = p.bias.is_some() && !plan.takes_bias;
        if separately {
            prepare()?;
        }
        self.call(plan, p, p.add || separately, stream).map_err(|error| self.why(error, stream))?;
        Ok(true)
    }

    fn call(&self, plan: &Plan, p: &Product, add: bool, stream: &CudaStream) -> std::result::Result<(), CublasError> {
        if let (Some(bias), true) = (p.bias, plan.takes_bias) {
            set(plan.work.0, Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0f32 });
        let [first, second, result] = &plan.layouts;
        // SAFETY: whoever asked for the product vouches for its matrices, as for the arguments of a kernel; the library reads the two factors now.
        unsafe {
            lt::matmul(
                self.handle.0,
                plan.work.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                p.b.address as *const _,
                first.0,
                p.a.address as *const _,
                second.0,
                p.c.address as *const _,
                result.0,
                p.c.address as *mut _,
                result.0,
                &plan.algorithm,
                self.workspace as *mut _,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        }
    }

    /// A device that failed before is the reason for whatever the library says.
    fn why(&self, error: CublasError, stream: &CudaStream) -> Error {
        // SAFETY: the stream is alive, and asking changes nothing.
        let state = unsafe { cudarc::driver::sys::cuStreamQuery(stream.cu_stream()) }.result();
        match state {
            Err(cause) if cause.0 != cudarc::driver::sys::CUresult::CUDA_ERROR_NOT_READY => failed("cuBLASLt", cause),
            _ => Error::new(format!("cuBLASLt: {error}")),
        }
    }

    /// The products that it was asked for and has no algorithm for.
    pub fn refused(&self) -> Vec<String> {
        let plans = lock(&self.plans);
        let refused = plans.iter().filter_map(|(key, plan)| plan.as_ref().err().map(|error| format!("{error} for {key:?}")));
        refused.collect()
    }

    /// With the bias if the library takes it, else without, else what it said.
    fn plan(&self, key: &Key) -> Result<std::result::Result<Plan, CublasError>> {
        use sys::cublasStatus_t::{CUBLAS_STATUS_INVALID_VALUE as INVALID, CUBLAS_STATUS_NOT_SUPPORTED as NOT_SUPPORTED};
        // A bias of another type than the result's is not among those that the library documents.
        let mut plan = if key.bias && key.result.dtype == key.first.dtype { self.try_plan(key, true) } else { self.try_plan(key, false) };
        if key.bias && plan.is_err() {
            plan = self.try_plan(key, false);
        }
        match plan {
            Err(error) if !matches!(error.0, INVALID | NOT_SUPPORTED) => Err(Error::new(format!("cuBLASLt finds no algorithm: {error}"))),
            plan => Ok(plan),
        }
    }

    fn try_plan(&self, key: &Key, bias: bool) -> std::result::Result<Plan, CublasError> {
        use sys::cublasComputeType_t as Compute;
        use sys::cublasLtEpilogue_t as Epilogue;
        let compute = if key.tf32 { Compute::CUBLAS_COMPUTE_32F_FAST_TF32 } else { Compute::CUBLAS_COMPUTE_32F };
        let work = Owned(lt::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?, lt::destroy_matmul_desc);
        set(work.0, Of::CUBLASLT_MATMUL_DESC_TRANSA, &(key.first.turned as i32))?;
        set(work.0, Of::CUBLASLT_MATMUL_DESC_TRANSB, &(key.second.turned as i32))?;
        let epilogue = if bias { Epilogue::CUBLASLT_EPILOGUE_BIAS } else { Epilogue::CUBLASLT_EPILOGUE_DEFAULT };
        set(work.0, Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if bias {
            set(work.0, Of::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &kind(key.result.dtype))?;
        }
        let layouts = [layout(&key.first, key.batch)?, layout(&key.second, key.batch)?, layout(&key.result, key.batch)?];
        let wishes = Owned(lt::create_matmul_pref()?, lt::destroy_matmul_pref);
        wish(wishes.0, Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64))?;
        let in_f32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        wish(wishes.0, Wish::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &in_f32)?;
        wish(wishes.0, Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &key.first.align)?;
        wish(wishes.0, Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &key.second.align)?;
        wish(wishes.0, Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &key.result.align)?;
        wish(wishes.0, Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &key.result.align)?;
        let [first, second, result] = &layouts;
        // SAFETY: all handles are alive.
        let found = unsafe { lt::get_matmul_algo_heuristic(self.handle.0, work.0, first.0, second.0, result.0, result.0, wishes.0) }?;
        Ok(Plan { work, layouts, algorithm: found.algo, takes_bias: bias })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated in `open` and freed here only; freeing waits for the work that uses it. Nothing is left to report an error to.
            let _ = unsafe { driver::free_sync(self.workspace) };
        }
    }
}

fn kind(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

fn set<T>(work: sys::cublasLtMatmulDesc_t, of: Of, value: &T) -> std::result::Result<(), CublasError> {
    // SAFETY: the descriptor is alive, and the value is read now with the size it has.
    unsafe { lt::set_matmul_desc_attribute(work, of, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn wish<T>(wishes: sys::cublasLtMatmulPreference_t, of: Wish, value: &T) -> std::result::Result<(), CublasError> {
    // SAFETY: as in `set`.
    unsafe { lt::set_matmul_pref_attribute(wishes, of, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn layout(x: &Matrix, batch: usize) -> std::result::Result<Owned<sys::cublasLtMatrixLayout_t>, CublasError> {
    use sys::cublasLtMatrixLayoutAttribute_t as Its;
    let made = lt::create_matrix_layout(kind(x.dtype), x.rows as u64, x.columns as u64, x.lead as i64)?;
    let made = Owned(made, lt::destroy_matrix_layout);
    if batch > 1 {
        let (count, step) = (batch as i32, x.step as i64);
        // SAFETY: the layout is alive, and the values are read now with the sizes they have.
        unsafe {
            lt::set_matrix_layout_attribute(made.0, Its::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
            lt::set_matrix_layout_attribute(made.0, Its::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const step).cast(), 8)?;
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the library does with a key: c (+)= op(first) op(second) + bias, column by column.
    fn library(key: &Key, first: &[f64], second: &[f64], bias: Option<&[f64]>, add: bool, out: &mut [f64]) {
        let at = |x: &Matrix, image: usize, row: usize, column: usize| {
            let (row, column) = if x.turned { (column, row) } else { (row, column) };
            assert!(row < x.rows && column < x.columns && x.lead >= x.rows, "[{row}, {column}] of {x:?}");
            image * x.step + column * x.lead + row
        };
        let inner = if key.first.turned { key.first.rows } else { key.first.columns };
        for image in 0..key.batch {
            for column in 0..key.result.columns {
                for row in 0..key.result.rows {
                    let terms = (0..inner).map(|l| first[at(&key.first, image, row, l)] * second[at(&key.second, image, l, column)]);
                    let to = &mut out[at(&key.result, image, row, column)];
                    *to = terms.sum::<f64>() + bias.map_or(0.0, |bias| bias[row]) + if add { *to } else { 0.0 };
                }
            }
        }
    }

    fn factor(turned: bool, rows: usize, columns: usize, gap: usize, apart: usize) -> (Factor, usize) {
        let (lines, length) = if turned { (columns, rows) } else { (rows, columns) };
        let stride = length + gap;
        (Factor { address: 0, dtype: Dtype::F32, stride, step: lines * stride + apart, turned }, lines * stride + apart)
    }

    fn numbers(n: usize, seed: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 7 + seed * 13) % 11) as f64 - 5.0).collect()
    }

    #[test]
    fn the_library_is_asked_for_the_product_that_is_meant() {
        for case in 0..64usize {
            let bit = |i: usize| case >> i & 1 == 1;
            let (turn_a, turn_b, add, with_bias) = (bit(0), bit(1), bit(2), bit(3));
            let (gap, batch) = (if bit(4) { 3 } else { 0 }, if bit(5) { 3 } else { 1 });
            for [m, n, k] in [[2, 3, 4], [1, 5, 1], [3, 1, 2], [4, 4, 4]] {
                let ((a, a_size), (b, b_size)) = (factor(turn_a, m, k, gap, 2), factor(turn_b, k, n, gap, 1));
                let (c, c_size) = factor(false, m, n, gap, 0);
                let bias = numbers(n, 3);
                let p = Product { m, n, k, batch, a, b, c, bias: with_bias.then_some(64), add };
                let (x, y, z) = (numbers(a_size * batch, 1), numbers(b_size * batch, 2), numbers(c_size * batch, 4));
                let mut want = z.clone();
                let at = |x: &Factor, image: usize, i: usize, j: usize| {
                    image * x.step + if x.turned { j * x.stride + i } else { i * x.stride + j }
                };
                for (image, i, j) in (0..batch * m * n).map(|all| (all / (m * n), all / n % m, all % n)) {
                    let sum: f64 = (0..k).map(|l| x[at(&a, image, i, l)] * y[at(&b, image, l, j)]).sum();
                    let to = &mut want[at(&c, image, i, j)];
                    *to = sum + if with_bias { bias[j] } else { 0.0 } + if add { *to } else { 0.0 };
                }
                let key = Key::of(&p, false).unwrap();
                let mut got = z;
                library(&key, &y, &x, with_bias.then_some(&bias[..]), add, &mut got);
                assert_eq!(got, want, "{p:?}");
            }
        }
    }

    #[test]
    fn what_the_library_does_not_take_is_not_asked_of_it() {
        let (a, b, c) = (factor(false, 2, 4, 0, 0).0, factor(false, 4, 3, 0, 0).0, factor(false, 2, 3, 0, 0).0);
        let p = Product { m: 2, n: 3, k: 4, batch: 1, a, b, c, bias: None, add: false };
        let half = |x: Factor| Factor { dtype: Dtype::Bf16, ..x };
        assert!(Key::of(&p, false).is_some());
        assert!(Key::of(&Product { a: half(a), b: half(b), ..p }, false).is_some());
        assert!(Key::of(&Product { a: half(a), b: half(b), c: half(c), ..p }, false).is_some());
        assert!(Key::of(&Product { c: half(c), ..p }, false).is_none());
        assert!(Key::of(&Product { a: half(a), ..p }, false).is_none());
        assert!(Key::of(&Product { k: 0, ..p }, false).is_none());
        assert!(Key::of(&Product { a: Factor { stride: 0, ..a }, ..p }, false).is_none());
        assert!(Key::of(&Product { m: 1, a: Factor { stride: 0, ..a }, ..p }, false).is_some());
        assert_ne!(Key::of(&Product { a: a.from(1), ..p }, false), Key::of(&p, false));
        assert_ne!(Key::of(&p, true), Key::of(&p, false));
        let all_half = Product { a: half(a), b: half(b), c: half(c), ..p };
        assert_eq!(Key::of(&all_half, true), Key::of(&all_half, false));
    }

    #[test]
    #[cfg(feature = "emulated")]
    fn the_plain_kernel_does_every_product() {
        use super::super::super::gpu::Gpu;
        use super::super::super::product::Target;
        use crate::tensor::{Device, Tensor};
        let gpu = Gpu::emulated().unwrap();
        let device = Device::Gpu(gpu.clone());
        let (m, n) = (3, 37);
        let tensor = |count: usize, seed: usize, dtype: Dtype| {
            let numbers: Vec<f32> = numbers(count, seed).into_iter().map(|x| x as f32).collect();
            Tensor::from_slice(&[count], &numbers).unwrap().cast(dtype).unwrap().on(&device).unwrap()
        };
        let kinds = [Dtype::F32, Dtype::Bf16];
        for case in 0..128usize {
            let bit = |i: usize| case >> i & 1;
            let (a_kind, b_kind, c_kind) = (kinds[bit(0)], kinds[bit(1)], kinds[bit(2)]);
            let (batch, k) = (1 + 2 * bit(5), 5 * (1 - bit(6)));
            let layout = |turned: bool, rows, columns| factor(turned, rows, columns, 2, 1);
            let ((a_shape, a_size), (b_shape, b_size)) = (layout(bit(3) == 1, m, k), layout(bit(4) == 1, k, n));
            let (c_shape, c_size) = layout(false, m, n);
            let (a, b) = (tensor(a_size * batch, 1, a_kind), tensor(b_size * batch, 2, b_kind));
            let bias = tensor(n, 3, a_kind);
            let mut outputs = [tensor(c_size * batch, 4, c_kind), tensor(c_size * batch, 4, c_kind)];
            for (i, out) in outputs.iter_mut().enumerate() {
                let as_factor = |x: &Tensor, dtype, shape: Factor| Factor {
                    turned: shape.turned,
                    step: shape.step,
                    ..Factor::rows(x, dtype, shape.stride)
                };
                let c = Target::rows(out, c_kind, c_shape.stride).step(c_shape.step);
                let product = Product::new([m, n, k], as_factor(&a, a_kind, a_shape), as_factor(&b, b_kind, b_shape), c);
                let product = product.batch(batch).bias((bit(3) == bit(4)).then_some(&bias));
                let product = if bit(4) == 1 { product.add() } else { product };
                if i == 0 {
                    gpu.product(product).unwrap();
                } else {
                    let (name, launch, args) = plain(&product);
                    gpu.launch(&name, launch, args).unwrap();
                }
            }
            let [want, got] = outputs.map(|x| x.read().unwrap().into_iter().filter(|x| !x.is_nan()).collect::<Vec<_>>());
            assert_eq!(got, want, "case {case}");
        }
    }
}
