//! The CPU's KV memory: `[block][kv_head][position in block][K | V][padded head_dim]`, one buffer per layer.
//!
//! K and V of one position and head lie side by side, so that a sparse read touches one run of memory per entry and a
//! dense read streams. `head_dim` is padded with zeros to a multiple of 16, so that kernels know no remainder.

use super::memory::AlignedBytes;
use super::simd::Element;
use crate::backend::{DType, KvShape};
use crate::kv_cache::BLOCK_TOKENS;

/// KV memory of all layers.
pub(crate) struct KvStore {
    shape: KvShape,
    padded_dim: usize,
    layers: Vec<AlignedBytes>,
}

/// One layer's KV memory, seen as elements of type `E`.
#[derive(Clone, Copy)]
pub(super) struct LayerKv<E> {
    base: *mut E,
    num_kv_heads: usize,
    num_blocks: usize,
    /// Elements from K to V, and half an entry.
    pub(super) padded_dim: usize,
}

// SAFETY: threads write disjoint entries and read entries nobody writes; the owners of a region see to it.
unsafe impl<E: Send> Send for LayerKv<E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for LayerKv<E> {}

impl<E> LayerKv<E> {
    /// Where K of `position` of `kv_head` begins; V follows `padded_dim` elements later.
    #[inline(always)]
    pub(super) fn entry(&self, blocks: &[u32], position: usize, kv_head: usize) -> *mut E {
        let block = blocks[position / BLOCK_TOKENS] as usize;
        debug_assert!(block < self.num_blocks && kv_head < self.num_kv_heads);
        let index = (block * self.num_kv_heads + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        // SAFETY: block tables only hold blocks of this store (the allocator's invariant), so the entry is inside.
        unsafe { self.base.add(index * 2 * self.padded_dim) }
    }
}

impl KvStore {
    /// Zeroed memory for `shape`.
    pub(super) fn new(shape: KvShape) -> Self {
        let padded_dim = shape.head_dim.next_multiple_of(16);
        let entries = shape.num_blocks * BLOCK_TOKENS * shape.num_kv_heads;
        let bytes = entries * 2 * padded_dim * shape.dtype.bytes();
        Self {
            shape,
            padded_dim,
            layers: (0..shape.num_layers)
                .map(|_| AlignedBytes::zeroed(bytes))
                .collect(),
        }
    }

    /// Copies all layers' entries of blocks, each (from, to), one after another.
    pub(super) fn copy_blocks(&mut self, copies: &[(u32, u32)]) {
        let entry = 2 * self.padded_dim * self.shape.dtype.bytes();
        let block = self.shape.num_kv_heads * BLOCK_TOKENS * entry;
        for layer in &self.layers {
            for &(from, to) in copies {
                let (from, to) = (from as usize, to as usize);
                assert!(
                    from.max(to) < self.shape.num_blocks && from != to,
                    "two blocks of the store"
                );
                // SAFETY: both blocks lie within the layer and apart, as was just checked, and nobody else has the store.
                unsafe {
                    let base = layer.as_ptr();
                    let (from, to) = (base.add(from * block), base.add(to * block));
                    std::ptr::copy_nonoverlapping(from, to, block);
                }
            }
        }
    }

    /// What the entries are stored as.
    pub(super) fn dtype(&self) -> DType {
        self.shape.dtype
    }

    /// `head_dim` rounded up to a multiple of 16.
    pub(super) fn padded_dim(&self) -> usize {
        self.padded_dim
    }

    /// Keys of positions `0..len` of a block table, widened: `[num_kv_heads, len, padded_dim]`.
    pub(super) fn keys<E: Element>(&self, layer: usize, blocks: &[u32], len: usize) -> Vec<f32> {
        let kv = self.layer::<E>(layer);
        let mut keys = Vec::with_capacity(self.shape.num_kv_heads * len * self.padded_dim);
        for kv_head in 0..self.shape.num_kv_heads {
            for position in 0..len {
                let entry = kv.entry(blocks, position, kv_head);
                // SAFETY: an entry holds padded_dim elements of K first, and no forward writes while this borrows.
                let key = unsafe { std::slice::from_raw_parts(entry, self.padded_dim) };
                keys.extend(key.iter().map(|&x| x.to_f32()));
            }
        }
        keys
    }

    /// One layer as elements of `E`, which must be the store's type.
    pub(super) fn layer<E: Element>(&self, layer: usize) -> LayerKv<E> {
        assert_eq!(
            size_of::<E>(),
            self.shape.dtype.bytes(),
            "element type of the store"
        );
        LayerKv {
            base: self.layers[layer].as_ptr().cast(),
            num_kv_heads: self.shape.num_kv_heads,
            num_blocks: self.shape.num_blocks,
            padded_dim: self.padded_dim,
        }
    }
}
