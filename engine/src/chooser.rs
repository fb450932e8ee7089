//! [`KeyChooser`]: what a layer reads, chosen once its queries are known.
//!
//! No served step can do this: the choice needs a copy of the layer's keys. It is how methods that look at queries and
//! keys (page bounds, the target's own attention) are measured beside masks, in the same forward.

use specattn_positions::PositionSet;

/// Queries and keys of one layer in one step.
#[derive(Debug)]
pub struct LayerKeys<'a> {
    /// Rotated queries times 1/√head_dim: `[tokens, num_heads, width]`.
    pub q: &'a [f32],
    /// Rotated keys of the cached positions: `[num_kv_heads, cached, width]`.
    pub keys: &'a [f32],
    /// Floats per head: head_dim, padded with zeros.
    pub width: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
}

/// Chooses the cached positions that a step reads, layer by layer.
pub trait KeyChooser {
    /// One list per KV head of layer `layer`: positions below the number cached.
    fn choose(&mut self, layer: usize, keys: &LayerKeys<'_>) -> Vec<PositionSet>;
}
