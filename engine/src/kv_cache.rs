//! Paged KV cache: blocks of positions, a block table per sequence, truncation for rollback, a hard budget.
//!
//! A [`BlockPool`] hands out block numbers; the memory behind them is the backend's. A [`Sequence`] takes blocks as it is
//! told to ([`Sequence::reserve`]) and gives them back when it is dropped or told to. Sequences share prompts through the
//! pool's `PrefixTree` (`sharing.rs`). A block is free, or held by one sequence, or in the tree; what nobody uses there is
//! given up when blocks run out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::EngineError;
pub use crate::prefix::CHUNK_TOKENS;
use crate::prefix::{CHUNK_BLOCKS, NodeId, PrefixTree};

mod sharing;

/// Positions per block.
pub const BLOCK_TOKENS: usize = 64;

/// What sharing came to since the pool was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharingCounters {
    /// Tokens whose entries were adopted instead of computed.
    pub adopted_tokens: u64,
    /// Blocks of unused chunks that were given up for others.
    pub evicted_blocks: u64,
}

/// The blocks of a model's KV memory.
#[derive(Debug)]
pub struct BlockPool {
    state: Mutex<State>,
    total: usize,
}

#[derive(Debug)]
struct State {
    free: Vec<u32>,
    prefixes: PrefixTree,
    sharing: SharingCounters,
}

impl State {
    fn available(&self) -> usize {
        self.free.len() + self.prefixes.unused_blocks()
    }

    /// Takes `count` blocks into `blocks`, or none at all.
    fn take(&mut self, count: usize, blocks: &mut Vec<u32>) -> bool {
        if count > self.available() {
            return false;
        }
        while self.free.len() < count {
            let Some(evicted) = self.prefixes.evict() else {
                return false;
            };
            self.sharing.evicted_blocks += evicted.len() as u64;
            self.free.extend(evicted);
        }
        let at = self.free.len() - count;
        blocks.extend(self.free.drain(at..));
        true
    }
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub(crate) fn new(total: usize) -> Arc<Self> {
        let last = u32::try_from(total).expect("fewer than 2^32 blocks");
        Arc::new(Self {
            state: Mutex::new(State {
                free: (0..last).rev().collect(),
                prefixes: PrefixTree::default(),
                sharing: SharingCounters::default(),
            }),
            total,
        })
    }

    /// Blocks that sequences hold, each counted once however many share it.
    pub fn used(&self) -> usize {
        self.total - self.available()
    }

    /// Blocks of shared chunks that no sequence uses now.
    pub fn cached(&self) -> usize {
        self.state().prefixes.unused_blocks()
    }

    /// Blocks that a sequence could take: free ones, and those of chunks that nobody uses.
    pub fn available(&self) -> usize {
        self.state().available()
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// What sharing came to.
    pub fn sharing(&self) -> SharingCounters {
        self.state().sharing
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while holding the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty sequence that may grow to `max_tokens`; it holds no block yet.
    pub(crate) fn sequence(self: &Arc<Self>, max_tokens: usize) -> Sequence {
        Sequence {
            pool: Arc::clone(self),
            blocks: Vec::new(),
            shared: Vec::new(),
            len: 0,
            capacity: max_tokens,
        }
    }
}

/// A paged KV cache of one sequence. Dropping it gives its blocks back.
#[derive(Debug)]
pub struct Sequence {
    pool: Arc<BlockPool>,
    /// Those of the shared chunks first.
    blocks: Vec<u32>,
    /// The chunks from the beginning on whose blocks are in the pool's tree.
    shared: Vec<NodeId>,
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

    /// Positions there are blocks for.
    pub fn room(&self) -> usize {
        self.capacity.min(self.blocks.len() * BLOCK_TOKENS)
    }

    /// Takes blocks for positions up to `tokens`, at most the capacity.
    ///
    /// # Errors
    /// [`EngineError::KvExhausted`] when there are not enough; none is taken then.
    pub fn reserve(&mut self, tokens: usize) -> Result<(), EngineError> {
        let wanted = tokens.min(self.capacity).div_ceil(BLOCK_TOKENS);
        let missing = wanted.saturating_sub(self.blocks.len());
        if missing == 0 {
            return Ok(());
        }
        let mut state = self.pool.state();
        if state.take(missing, &mut self.blocks) {
            return Ok(());
        }
        Err(EngineError::KvExhausted {
            wanted: missing,
            free: state.available(),
            total: self.pool.total,
        })
    }

    /// Blocks that the sequence would take to hold `tokens` positions beginning with `prompt`: those that are free now or
    /// belong to chunks that nobody uses. What others use already costs nothing.
    pub fn cost(&self, prompt: &[u32], tokens: usize) -> usize {
        let wanted = tokens.min(self.capacity).div_ceil(BLOCK_TOKENS);
        let state = self.pool.state();
        let mut last = self.shared.last().copied();
        let mut found = 0;
        for chunk in prompt.chunks_exact(CHUNK_TOKENS).skip(self.shared.len()) {
            match state.prefixes.find(last, chunk) {
                Some(id) if !state.prefixes.is_unused(id) => last = Some(id),
                _ => break,
            }
            found += CHUNK_BLOCKS;
        }
        wanted.saturating_sub(
            self.blocks
                .len()
                .max(self.shared.len() * CHUNK_BLOCKS + found),
        )
    }

    /// Forgets positions from `len` on (rollback). Longer lengths change nothing. Within shared chunks, which others may
    /// read, forgetting goes back to the last one's beginning.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.len = len;
        let whole = len / CHUNK_TOKENS;
        if whole < self.shared.len() {
            self.len = whole * CHUNK_TOKENS;
            self.give_back(whole);
        }
    }

    /// Gives every block back and holds nothing.
    pub fn clear(&mut self) {
        self.len = 0;
        self.give_back(0);
    }

    /// Gives back all blocks but those of the first `chunks` shared chunks.
    fn give_back(&mut self, chunks: usize) {
        let mut state = self.pool.state();
        let own = self.shared.len() * CHUNK_BLOCKS;
        if own < self.blocks.len() {
            state.free.extend(self.blocks.drain(own..));
        }
        for id in self.shared.drain(chunks..).rev() {
            state.prefixes.leave(id);
        }
        self.blocks.truncate(chunks * CHUNK_BLOCKS);
    }

    /// The block table.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Counts `tokens` more positions as held.
    pub(crate) fn extend(&mut self, tokens: usize) {
        self.len += tokens;
        debug_assert!(self.len <= self.room());
    }

    /// Whether the sequence's blocks come from `pool`.
    pub(crate) fn belongs_to(&self, pool: &Arc<BlockPool>) -> bool {
        Arc::ptr_eq(&self.pool, pool)
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.give_back(0);
    }
}

#[cfg(test)]
mod tests;
