//! [`TensorMap`]: how a tensor copy (TMA) finds a matrix, and how much of it it takes at a time.

use std::ffi::c_void;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys;

use super::error::CudaError;

/// Inputs of a box: as many as a 128-byte swizzle spans.
const BOX_INPUTS: u32 = 64;

/// A row-major matrix of 16-bit numbers, read in boxes of 64 inputs of some rows: 128-byte swizzled, zeros past the ends. Mirrors
/// `TensorMap` in linear_wgmma.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct TensorMap([u64; 16]);

impl TensorMap {
    /// For the `[rows, inputs]` at `address`, in boxes of at most 256 rows; inputs are a multiple of 8.
    ///
    /// # Errors
    /// The driver's, for shapes that it cannot describe.
    pub(super) fn new(
        address: u64,
        (rows, inputs): (usize, usize),
        box_rows: u32,
        half_is_f16: bool,
    ) -> Result<Self, CudaError> {
        let kind = if half_is_f16 {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        } else {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        };
        let (sizes, stride) = ([inputs as u64, rows as u64], inputs as u64 * 2);
        let (own_box, every) = ([BOX_INPUTS, box_rows], [1, 1]);
        // SAFETY: zeros are a value of this plain C structure.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: all arrays have the two dimensions named; the call only writes down what it is given.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                kind,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                &raw const stride,
                own_box.as_ptr(),
                every.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        let described = encoded.result().map(|()| Self(map.opaque));
        described.map_err(CudaError::driver("describing a matrix to the GPU"))
    }
}
