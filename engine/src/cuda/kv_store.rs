//! The GPU's KV memory: `[block][kv_head][position in block][K | V][head_dim]`, one allocation per layer.
//!
//! The CPU's layout: K and V of an entry are one run of `4 * head_dim` bytes, which a sparse read gathers with one or two
//! instructions of a warp, and a block of a head is one run of 64 entries, which a dense read streams.

use std::sync::Arc;

use super::device::Device;
use super::error::CudaError;
use super::memory::DeviceMemory;
use crate::backend::{DType, KvShape};
use crate::kv_cache::BLOCK_TOKENS;

/// KV memory of all layers.
pub struct KvStore {
    shape: KvShape,
    layers: Vec<DeviceMemory>,
}

/// Bytes of one block in one layer.
fn block_bytes(shape: &KvShape) -> usize {
    shape.num_kv_heads * BLOCK_TOKENS * 2 * shape.head_dim * shape.dtype.bytes()
}

impl KvStore {
    /// Zeroed memory for `shape`.
    pub(super) fn new(device: &Arc<Device>, shape: KvShape) -> Result<Self, CudaError> {
        let bytes = shape.num_blocks * block_bytes(&shape);
        let layers = (0..shape.num_layers)
            .map(|_| DeviceMemory::zeroed(device, bytes))
            .collect::<Result<_, _>>()?;
        Ok(Self { shape, layers })
    }

    /// Copies all layers' entries of blocks, each (from, to), one after another, in the stream's order: behind the passes before
    /// and ahead of those that follow.
    pub(super) fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), CudaError> {
        let block = block_bytes(&self.shape);
        for layer in &mut self.layers {
            for &(from, to) in copies {
                layer.copy_within(from as usize * block, to as usize * block, block)?;
            }
        }
        Ok(())
    }

    /// Where a layer's entries begin.
    pub(super) fn layer(&self, layer: usize) -> u64 {
        self.layers[layer].address()
    }

    /// Layers.
    pub(super) fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Entries of one layer: a key and a value of one KV head each.
    pub(super) fn entries(&self) -> usize {
        self.shape.num_blocks * self.shape.num_kv_heads * BLOCK_TOKENS
    }

    /// Numbers in one layer.
    pub(super) fn layer_elements(&self) -> usize {
        self.shape.num_blocks * block_bytes(&self.shape) / self.shape.dtype.bytes()
    }

    /// The entries' type, as the kernels' option.
    pub(super) fn half_is_f16(&self) -> u32 {
        u32::from(self.shape.dtype == DType::F16)
    }
}
