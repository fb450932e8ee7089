//! [`Argmax`]: the most probable token of each row of logits, biased where a session asks for it, so that no logits cross to the host.

use std::sync::Arc;

use cudarc::driver::DeviceRepr;

use super::batch::NONE;
use super::device::Device;
use super::elementwise::RowKernels;
use super::error::CudaError;
use super::memory::DeviceMemory;
use super::pinned::PinnedMemory;
use crate::backend::{Bias, Peak};

// SAFETY: plain numbers in the layout of `Bias` in elementwise.cu.
unsafe impl DeviceRepr for Bias {}

/// Where the search keeps what it is given and what it finds.
pub(super) struct Argmax {
    biases: DeviceMemory,
    found: DeviceMemory,
    /// Where biases leave and what was found arrives: apart, since the first may still be under way.
    leaving: PinnedMemory,
    arriving: PinnedMemory,
}

impl Argmax {
    /// Without memory yet.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            biases: DeviceMemory::new(device),
            found: DeviceMemory::new(device),
            leaving: device.pinned(),
            arriving: device.pinned(),
        }
    }

    /// Adds `biases` to the f32 rows `x` and gives the first of the largest entries of each; `None` for a row that is not finite.
    pub(super) fn search(
        &mut self,
        kernels: RowKernels<'_>,
        (x, rows): (u64, usize),
        width: usize,
        biases: &[Bias],
    ) -> Result<impl Iterator<Item = Option<Peak>> + use<'_>, CudaError> {
        if !biases.is_empty() {
            // What was recorded so far becomes a list of launches of its own, with a graph: a copy comes between it and the rest.
            kernels.device.flush();
            self.biases.grow(size_of_val(biases))?;
            self.biases.write_pinned(0, biases, &mut self.leaving)?;
            kernels.add_biases(x, width, (self.biases.address(), biases.len()))?;
        }
        self.found.grow(rows * 8)?;
        kernels.argmax((x, rows), width, self.found.address())?;
        let found: &[u64] = self.found.read_pinned(0, rows, &mut self.arriving)?;
        Ok(found.iter().map(|&peak| {
            let (column, value) = (peak as u32, f32::from_bits((peak >> 32) as u32));
            (column != NONE).then_some(Peak { column, value })
        }))
    }
}
