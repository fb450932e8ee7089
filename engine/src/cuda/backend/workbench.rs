//! What tuning, checks and benchmarks ask of a backend beside a model's operations: the choice of kernels, and weights, activations and
//! entries out of nothing.

use super::CudaBackend;
use crate::backend::Cut;
use crate::cuda::attention_prefill::PrefillKernel;
use crate::cuda::chunks::Chunks;
use crate::cuda::elementwise::RandomGrid;
use crate::cuda::kv_store::KvStore;
use crate::cuda::linear::ProductKernel;
use crate::cuda::memory::{Buffer, Elements, Weight};
use crate::error::EngineError;

impl CudaBackend {
    /// Sets the most keys per unit of decode attention; for tuning.
    pub fn set_decode_chunk(&mut self, keys: usize) {
        self.chunks = Some(Chunks::up_to(keys));
    }

    /// Lets all products take one kernel; `None`: the fastest for each. For tuning and for checks.
    pub fn force_product_kernel(&self, kernel: Option<ProductKernel>) {
        self.product_kernel.set(kernel);
    }

    /// Lets attention of all long spans take one kernel; `None`: the fastest. For tuning and for checks.
    pub fn force_prefill_kernel(&self, kernel: Option<PrefillKernel>) {
        self.prefill_kernel.set(kernel);
    }

    /// A weight of pseudo-random numbers in ±spread, made on the device; for benchmarks.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](crate::cuda::CudaError).
    pub fn random_matrix(
        &self,
        shape: (usize, usize),
        spread: f32,
        seed: u32,
    ) -> Result<Weight, EngineError> {
        self.weights().random_part(shape, &Cut::Whole, spread, seed)
    }

    /// A matrix, `[rows, cols]`, rounded to the backend's type; a single row stays f32.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](crate::cuda::CudaError), or [`EngineError::Unsupported`] for a width that the kernels do not take.
    pub fn weight_of(&self, values: &[f32], rows: usize) -> Result<Weight, EngineError> {
        self.weights().of_values(values, rows)
    }

    /// A buffer that holds `values` as f32.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`](crate::cuda::CudaError).
    pub fn buffer_of(&self, values: &[f32]) -> Result<Buffer, EngineError> {
        let mut buffer = Buffer::new(&self.device);
        buffer.resize(Elements::Single, values.len())?;
        buffer.memory_mut().write(0, values)?;
        Ok(buffer)
    }

    /// Fills KV memory with pseudo-random entries; for benchmarks.
    ///
    /// # Errors
    /// [`CudaError`](crate::cuda::CudaError).
    pub fn randomise_kv(&self, kv: &KvStore, seed: u32) -> Result<(), EngineError> {
        for layer in 0..kv.num_layers() {
            self.rows().fill_random(
                kv.layer(layer),
                kv.layer_elements(),
                RandomGrid::row(kv.layer_elements()),
                (1.0, seed + layer as u32),
            )?;
        }
        Ok(())
    }
}
