//! Matrix products of cuBLASLt: what is decided once per shape.

use std::ffi::c_void;
use std::ptr::null_mut;

use burn::tensor::DType;
use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtEpilogue_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as Attribute, cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayout_t, cudaDataType,
};

/// Scratch memory that the library may ask for, bytes: what it wants on the largest GPUs.
pub(super) const WORKSPACE: usize = 32 << 20;

/// An operand as the library sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    /// Stored by columns.
    pub turned: bool,
    /// Elements from a row (a column, if turned) to the next.
    pub pitch: usize,
    /// Bytes that divide the address, a power of two of at most 256.
    pub alignment: u32,
}

/// A product `[m, k] x [k, n]`, packed output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub left: Layout,
    pub right: Layout,
    pub dtype: DType,
    /// One value per column is added.
    pub biased: bool,
}

/// Device addresses of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub left: u64,
    pub right: u64,
    /// 0 for none.
    pub bias: u64,
    pub out: u64,
    /// [`WORKSPACE`] bytes, or 0.
    pub workspace: u64,
}

/// A product that is ready to be enqueued. Kept for the life of the process.
pub(super) struct Plan {
    call: cublasLtMatmulDesc_t,
    left: cublasLtMatrixLayout_t,
    right: cublasLtMatrixLayout_t,
    out: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
    biased: bool,
    /// Bytes of scratch memory that the algorithm uses.
    pub workspace: usize,
}

fn data_type(dtype: DType) -> Option<cudaDataType> {
    match dtype {
        DType::F32 => Some(cudaDataType::CUDA_R_32F),
        DType::BF16 => Some(cudaDataType::CUDA_R_16BF),
        DType::F16 => Some(cudaDataType::CUDA_R_16F),
        _ => None,
    }
}

/// The address and size of an attribute's value.
fn value<T>(value: &T) -> (*const c_void, usize) {
    ((value as *const T).cast(), size_of::<T>())
}

impl Plan {
    /// Asks the library for its best algorithm.
    ///
    /// The library counts rows down columns, so it is given the transposed product: what it calls A is our right operand, and
    /// a packed row-major matrix is a column-major one as it lies. Sums are float32 and, for float32 operands, products too:
    /// `CUBLAS_COMPUTE_32F` never rounds to TF32.
    pub(super) fn new(handle: cublasLtHandle_t, shape: &Shape) -> Result<Self, String> {
        let Shape { m, n, k, left, right, dtype, biased } = *shape;
        let kind = data_type(dtype).ok_or_else(|| format!("no products of {dtype:?}"))?;
        let layout = |rows: usize, columns: usize, layout: Layout| {
            let (rows, columns) = if layout.turned { (rows, columns) } else { (columns, rows) };
            lt::create_matrix_layout(kind, rows as u64, columns as u64, layout.pitch as i64)
        };
        let make = || -> Result<Self, lt::CublasError> {
            let call = lt::create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F)?;
            let set = |attribute, (buffer, size): (*const c_void, usize)| {
                // SAFETY: `call` was made above; `buffer` holds `size` bytes.
                unsafe { lt::set_matmul_desc_attribute(call, attribute, buffer, size) }
            };
            set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, value(&i32::from(right.turned)))?;
            set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, value(&i32::from(left.turned)))?;
            if biased {
                set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, value(&cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS))?;
            }
            let (a, b) = (layout(k, n, right)?, layout(m, k, left)?);
            let out = lt::create_matrix_layout(kind, n as u64, m as u64, n as i64)?;
            let wishes = lt::create_matmul_pref()?;
            let wish = |attribute, (buffer, size): (*const c_void, usize)| {
                // SAFETY: `wishes` was made above; `buffer` holds `size` bytes.
                unsafe { lt::set_matmul_pref_attribute(wishes, attribute, buffer, size) }
            };
            wish(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, value(&(WORKSPACE as u64)))?;
            wish(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, value(&right.alignment))?;
            wish(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, value(&left.alignment))?;
            // SAFETY: all descriptors were made above and are alive.
            let best = unsafe { lt::get_matmul_algo_heuristic(handle, call, a, b, out, out, wishes) };
            // SAFETY: nobody else has it.
            unsafe { lt::destroy_matmul_pref(wishes)? };
            let best = best?;
            Ok(Self { call, left: b, right: a, out, algorithm: best.algo, biased, workspace: best.workspaceSize })
        };
        make().map_err(|error| format!("{error} for {shape:?}"))
    }

    /// Enqueues the product on `stream`.
    ///
    /// # Safety
    /// The addresses hold the operands and the output of the plan's shape, aligned as it says, until the stream is past this
    /// point; nobody else uses the workspace on another stream.
    pub(super) unsafe fn enqueue(&self, handle: cublasLtHandle_t, at: Addresses, stream: usize) -> Result<(), lt::CublasError> {
        let (one, zero) = (1.0f32, 0.0f32);
        if self.biased {
            let (buffer, size) = value(&at.bias);
            // SAFETY: the descriptor lives as long as the plan. Its pointer is read when the call is enqueued, and all calls come
            // from the device's one thread.
            unsafe { lt::set_matmul_desc_attribute(self.call, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, buffer, size)? };
        }
        let workspace = if at.workspace == 0 { (null_mut(), 0) } else { (at.workspace as *mut c_void, WORKSPACE) };
        // SAFETY: descriptors live as long as the plan; addresses are the caller's promise. Without a summand C is not read.
        unsafe {
            lt::matmul(
                handle,
                self.call,
                value(&one).0,
                value(&zero).0,
                at.right as *const c_void,
                self.right,
                at.left as *const c_void,
                self.left,
                at.out as *const c_void,
                self.out,
                at.out as *mut c_void,
                self.out,
                &self.algorithm,
                workspace.0,
                workspace.1,
                stream as _,
            )
        }
    }
}
