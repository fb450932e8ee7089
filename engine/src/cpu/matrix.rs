//! Weights in host memory: mapped from the checkpoint, or copied where the file leaves them misaligned.

use super::memory::AlignedBytes;
use crate::backend::DType;
use crate::checkpoint::Tensor;

/// A weight matrix `[rows, cols]` (or a vector: one row), row-major, in its stored type.
pub(crate) struct Matrix {
    data: Data,
    rows: usize,
    cols: usize,
    dtype: DType,
}

enum Data {
    Mapped(Tensor),
    Owned(AlignedBytes),
}

impl Matrix {
    /// Takes a tensor of one or two dimensions.
    pub(super) fn new(tensor: Tensor) -> Self {
        let (rows, cols) = match tensor.shape() {
            [cols] => (1, *cols),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
            [] => (1, 1),
        };
        let dtype = tensor.dtype();
        let bytes = tensor.bytes();
        let data = if bytes.as_ptr().align_offset(dtype.bytes()) == 0 {
            Data::Mapped(tensor)
        } else {
            Data::Owned(copy_of(bytes))
        };
        Self {
            data,
            rows,
            cols,
            dtype,
        }
    }

    /// A copy of little-endian bytes.
    pub(super) fn from_bytes(bytes: &[u8], (rows, cols): (usize, usize), dtype: DType) -> Self {
        debug_assert_eq!(bytes.len(), rows * cols * dtype.bytes());
        Self {
            data: Data::Owned(copy_of(bytes)),
            rows,
            cols,
            dtype,
        }
    }

    /// Output features.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// What elements are stored as.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The first element. `W` must be the stored type.
    pub(super) fn as_ptr<W>(&self) -> *const W {
        assert_eq!(
            size_of::<W>(),
            self.dtype.bytes(),
            "element type of the matrix"
        );
        match &self.data {
            Data::Mapped(tensor) => tensor.bytes().as_ptr().cast(),
            Data::Owned(bytes) => bytes.as_ptr().cast_const().cast(),
        }
    }

    /// One row widened to f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "a row of the matrix"
        );
        for (i, out) in out.iter_mut().enumerate() {
            let index = row * self.cols + i;
            // SAFETY: the index is inside the matrix.
            *out = unsafe {
                match self.dtype {
                    DType::F32 => *self.as_ptr::<f32>().add(index),
                    DType::Bf16 => (*self.as_ptr::<half::bf16>().add(index)).to_f32(),
                    DType::F16 => (*self.as_ptr::<half::f16>().add(index)).to_f32(),
                }
            };
        }
    }
}

fn copy_of(bytes: &[u8]) -> AlignedBytes {
    let owned = AlignedBytes::zeroed(bytes.len());
    // SAFETY: both hold `bytes.len()` bytes and do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), owned.as_ptr(), bytes.len()) };
    owned
}
