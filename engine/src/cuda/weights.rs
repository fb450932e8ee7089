//! [`WeightMaker`]: what a checkpoint's tensors, or pseudo-random numbers, become on a device.

use std::cell::RefCell;
use std::sync::Arc;

use half::{bf16, f16};

use super::device::Device;
use super::elementwise::{RandomGrid, RowKernels};
use super::memory::{DeviceMemory, Weight};
use super::staging::Staging;
use crate::backend::{Cut, DType, random_spread};
use crate::checkpoint::Tensor;
use crate::error::EngineError;

/// Makes weights of one 16-bit type. Matrices have that type, single rows (norms, biases) stay f32.
pub(super) struct WeightMaker<'a> {
    pub(super) device: &'a Arc<Device>,
    pub(super) half: DType,
    pub(super) rows: RowKernels<'a>,
    pub(super) staging: &'a RefCell<Staging>,
}

impl WeightMaker<'_> {
    /// A tensor of a checkpoint.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](super::CudaError::OutOfMemory), or [`EngineError::Unsupported`] for a width that the kernels
    /// do not take.
    pub(super) fn of_tensor(&self, tensor: &Tensor) -> Result<Weight, EngineError> {
        let (shape, bytes) = (tensor.shape(), tensor.bytes());
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            _ => (1, shape.iter().product()),
        };
        if rows > 1 && tensor.dtype() == self.half {
            check_width(cols)?;
            return Ok(Weight::new(self.on_device(bytes)?, rows, cols));
        }
        let pairs = || {
            bytes
                .chunks_exact(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
        };
        let values: Vec<f32> = match tensor.dtype() {
            DType::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            DType::Bf16 => pairs().map(|b| bf16::from_bits(b).to_f32()).collect(),
            DType::F16 => pairs().map(|b| f16::from_bits(b).to_f32()).collect(),
        };
        self.of_values(&values, rows)
    }

    /// A matrix, `[rows, cols]`, rounded to 16 bits; a single row as it is.
    ///
    /// # Errors
    /// As [`WeightMaker::of_tensor`].
    pub(super) fn of_values(&self, values: &[f32], rows: usize) -> Result<Weight, EngineError> {
        let cols = values.len() / rows;
        if rows == 1 {
            let memory = DeviceMemory::from_slice(self.device, values)?;
            return Ok(Weight::new(memory, 1, cols));
        }
        check_width(cols)?;
        let bits: Vec<u16> = match self.half {
            DType::F16 => values.iter().map(|&x| f16::from_f32(x).to_bits()).collect(),
            _ => values
                .iter()
                .map(|&x| bf16::from_f32(x).to_bits())
                .collect(),
        };
        let memory = self.on_device(bytemuck::cast_slice(&bits))?;
        Ok(Weight::new(memory, rows, cols))
    }

    fn on_device(&self, bytes: &[u8]) -> Result<DeviceMemory, EngineError> {
        let mut memory = DeviceMemory::new(self.device);
        memory.reserve(bytes.len())?;
        self.staging.borrow_mut().copy(bytes, &mut memory)?;
        Ok(memory)
    }

    /// The part `cut` of a weight of this shape: a matrix of pseudo-random numbers, or a row of ones.
    ///
    /// # Errors
    /// As [`WeightMaker::of_tensor`].
    pub(super) fn random(
        &self,
        shape: &[usize],
        cut: &Cut,
        seed: u32,
    ) -> Result<Weight, EngineError> {
        match *shape {
            [rows, cols] => {
                check_width(cut.of((rows, cols)).1.len())?;
                self.random_part((rows, cols), cut, random_spread(cols), seed)
            }
            _ => {
                let (own, _) = cut.of((shape.iter().product(), 1));
                self.of_values(&vec![1.0; own.len()], 1)
            }
        }
    }

    /// The part `cut` of a matrix of pseudo-random numbers in ±spread, with the numbers that the whole one has there.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](super::CudaError::OutOfMemory).
    pub(super) fn random_part(
        &self,
        (rows, cols): (usize, usize),
        cut: &Cut,
        spread: f32,
        seed: u32,
    ) -> Result<Weight, EngineError> {
        let (own_rows, own_cols) = cut.of((rows, cols));
        let grid = RandomGrid {
            columns: own_cols.len(),
            stride: cols,
            first: own_rows.start * cols + own_cols.start,
        };
        let (rows, cols) = (own_rows.len(), own_cols.len());
        let mut memory = DeviceMemory::new(self.device);
        memory.reserve(rows * cols * 2)?;
        self.rows
            .fill_random(memory.address(), rows * cols, grid, (spread, seed))?;
        Ok(Weight::new(memory, rows, cols))
    }
}

/// Rows are read 16 bytes at a time.
fn check_width(width: usize) -> Result<(), EngineError> {
    if width.is_multiple_of(8) {
        Ok(())
    } else {
        Err(EngineError::Unsupported(format!(
            "a matrix of width {width} on a GPU: it must be a multiple of 8"
        )))
    }
}
