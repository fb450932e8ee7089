//! Paged KV cache: blocks of positions, a block table per sequence, truncation for rollback, a hard budget.
//!
//! A [`BlockPool`] hands out block numbers; the memory behind them is the backend's. A [`Sequence`] reserves every
//! block it may ever need when it is made, so a running session cannot fail for want of memory, and gives them back
//! when it is dropped.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::EngineError;

/// Positions per block.
pub const BLOCK_TOKENS: usize = 64;

/// The free blocks of a model's KV memory.
#[derive(Debug)]
pub struct BlockPool {
    free: Mutex<Vec<u32>>,
    total: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub(crate) fn new(total: usize) -> Arc<Self> {
        let last = u32::try_from(total).expect("fewer than 2^32 blocks");
        Arc::new(Self {
            free: Mutex::new((0..last).rev().collect()),
            total,
        })
    }

    /// Blocks in use.
    pub fn used(&self) -> usize {
        self.total - self.free().len()
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes blocks for `max_tokens` positions.
    pub(crate) fn sequence(self: &Arc<Self>, max_tokens: usize) -> Result<Sequence, EngineError> {
        let wanted = max_tokens.div_ceil(BLOCK_TOKENS);
        let mut free = self.free();
        if wanted > free.len() {
            return Err(EngineError::KvExhausted {
                wanted,
                free: free.len(),
                total: self.total,
            });
        }
        let at = free.len() - wanted;
        let blocks = free.split_off(at);
        Ok(Sequence {
            pool: Arc::clone(self),
            blocks,
            len: 0,
            capacity: max_tokens,
        })
    }
}

/// A paged KV cache of one sequence. Dropping it gives its blocks back.
#[derive(Debug)]
pub struct Sequence {
    pool: Arc<BlockPool>,
    blocks: Vec<u32>,
    len: usize,
    capacity: usize,
}

impl Sequence {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions it may grow to.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets positions from `len` on (rollback). Longer lengths change nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The block table.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Counts `tokens` more positions as held.
    pub(crate) fn extend(&mut self, tokens: usize) {
        self.len += tokens;
        debug_assert!(self.len <= self.capacity);
    }

    /// Whether the sequence's blocks come from `pool`.
    pub(crate) fn belongs_to(&self, pool: &Arc<BlockPool>) -> bool {
        Arc::ptr_eq(&self.pool, pool)
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.pool.free().append(&mut self.blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_is_hard_and_blocks_come_back() {
        let pool = BlockPool::new(4);
        let a = pool.sequence(3 * BLOCK_TOKENS - 1).unwrap();
        assert_eq!((pool.used(), pool.total()), (3, 4));
        assert!(matches!(
            pool.sequence(2 * BLOCK_TOKENS),
            Err(EngineError::KvExhausted {
                wanted: 2,
                free: 1,
                total: 4
            })
        ));
        drop(a);
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.sequence(4 * BLOCK_TOKENS).unwrap().blocks().len(), 4);
    }

    #[test]
    fn truncation_only_shortens() {
        let pool = BlockPool::new(1);
        let mut s = pool.sequence(10).unwrap();
        s.extend(7);
        s.truncate(9);
        assert_eq!(s.len(), 7);
        s.truncate(3);
        assert_eq!(s.len(), 3);
    }
}
