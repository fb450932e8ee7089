//! [`TensorMap`]: how a tensor copy (TMA) finds an array, and how much of it it takes at a time.

use std::ffi::c_void;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys;

use super::error::CudaError;

/// Columns of a box: as many as a 128-byte swizzle spans.
const BOX_COLUMNS: u32 = 64;

/// An array of 16-bit numbers in two or three dimensions, read in boxes of 64 columns of some rows: 128-byte swizzled, zeros past the
/// ends. Mirrors `TensorMap` in warpgroup.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct TensorMap([u64; 16]);

impl TensorMap {
    /// For the `[rows, columns]` at `address`, in boxes of at most 256 rows; columns are a multiple of 8.
    ///
    /// # Errors
    /// The driver's, for shapes that it cannot describe.
    pub(super) fn of_matrix(
        address: u64,
        (rows, columns): (usize, usize),
        box_rows: u32,
        half_is_f16: bool,
    ) -> Result<Self, CudaError> {
        let sizes = [columns as u64, rows as u64];
        Self::encode(address, sizes, [BOX_COLUMNS, box_rows], half_is_f16)
    }

    /// For the `[rows, middles, columns]` at `address`, in boxes of at most 256 rows of one middle; columns are a multiple of 8.
    ///
    /// # Errors
    /// The driver's, for shapes that it cannot describe.
    pub(super) fn of_slices(
        address: u64,
        (rows, middles, columns): (usize, usize, usize),
        box_rows: u32,
        half_is_f16: bool,
    ) -> Result<Self, CudaError> {
        let sizes = [columns as u64, middles as u64, rows as u64];
        Self::encode(address, sizes, [BOX_COLUMNS, 1, box_rows], half_is_f16)
    }

    /// Sizes, columns first, and the box; nothing lies between what follows one another.
    fn encode<const DIMENSIONS: usize>(
        address: u64,
        sizes: [u64; DIMENSIONS],
        own_box: [u32; DIMENSIONS],
        half_is_f16: bool,
    ) -> Result<Self, CudaError> {
        let kind = if half_is_f16 {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        } else {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        };
        // From one to the next, in bytes, in each dimension after the first.
        let strides = sizes.map({
            let mut bytes = 2;
            move |size| {
                bytes *= size;
                bytes
            }
        });
        let every = [1; DIMENSIONS];
        // SAFETY: zeros are a value of this plain C structure.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: all arrays have as many dimensions as are named; the call only writes down what it is given.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                kind,
                DIMENSIONS as u32,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                own_box.as_ptr(),
                every.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        let described = encoded.result().map(|()| Self(map.opaque));
        described.map_err(CudaError::driver("describing an array to the GPU"))
    }
}
