//! Attention over the paged KV cache.
//!
//! Two kernels, chosen by how many rows a pass has. [`decode`] serves steps of a few tokens, dense or masked, and can
//! capture rows; a row's result has the same bits whatever rows are computed beside it, which is what makes
//! speculative greedy decoding equal to plain decoding. [`prefill`] serves long dense chunks.

pub(super) mod decode;
pub(super) mod prefill;

/// Softmax state of one row over the keys seen so far.
const NO_SCORE: f32 = f32::NEG_INFINITY;
