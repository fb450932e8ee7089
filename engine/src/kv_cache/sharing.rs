//! How sequences share prompts: what one leaves in the pool's tree, others take from there.
//!
//! Whole chunks are shared in place: their blocks move from the sequence to the tree, and everyone's block table names them.
//! A prompt's tail is copied to the tree and from it, since sequences go on writing in its last block. Copying is the
//! memory's owner's: see [`crate::Model::adopt`] and [`crate::Model::publish`].
//!
//! A tail begins where the whole chunks end and was computed by one pass, like they; so whoever takes it over has the bits
//! that it would have computed.

use super::{BLOCK_TOKENS, Sequence, State};
use crate::error::EngineError;
use crate::prefix::{CHUNK_BLOCKS, CHUNK_TOKENS, ChunkBlocks, NodeId};

impl Sequence {
    /// Takes over what others have left of `prompt` behind what the sequence holds, if it ends with a chunk: whole chunks,
    /// in place of blocks reserved for them, then the tail, if there are blocks for it. Gives the new length.
    ///
    /// `prompt`: tokens from the beginning of the sequence on. `copy` copies blocks' entries, each (from, to).
    ///
    /// # Errors
    /// `copy`'s; the sequence is as good as before.
    pub(crate) fn adopt(
        &mut self,
        prompt: &[u32],
        copy: impl FnOnce(&[(u32, u32)]) -> Result<(), EngineError>,
    ) -> Result<usize, EngineError> {
        if self.len == self.shared.len() * CHUNK_TOKENS {
            self.adopt_chunks(prompt);
            self.adopt_tail(prompt, copy)?;
        }
        Ok(self.len)
    }

    /// Leaves to others what the sequence holds of `prompt`: whole chunks and, if it holds exactly the prompt, a copy of the
    /// tail, where there are blocks for one. The caller vouches that each was computed by a dense pass of its own over exactly
    /// these tokens.
    ///
    /// `prompt`: tokens from the beginning of the sequence on. `copy` copies blocks' entries, each (from, to).
    ///
    /// # Errors
    /// `copy`'s; the tail is not shared then.
    pub(crate) fn publish(
        &mut self,
        prompt: &[u32],
        copy: impl FnOnce(&[(u32, u32)]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        self.publish_chunks(prompt);
        if self.len == prompt.len() {
            self.publish_tail(prompt, copy)?;
        }
        Ok(())
    }

    fn adopt_chunks(&mut self, prompt: &[u32]) {
        let prompt = &prompt[..prompt.len().min(self.capacity)];
        let mut state = self.pool.state();
        for chunk in prompt.chunks_exact(CHUNK_TOKENS).skip(self.shared.len()) {
            let found = state.prefixes.find(self.shared.last().copied(), chunk);
            let Some(id) = found else { break };
            if !state.enter(&mut self.blocks, self.shared.len(), id) {
                break;
            }
            state.sharing.adopted_tokens += CHUNK_TOKENS as u64;
            self.shared.push(id);
            self.len += CHUNK_TOKENS;
        }
    }

    fn adopt_tail(
        &mut self,
        prompt: &[u32],
        copy: impl FnOnce(&[(u32, u32)]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let Some(tail) = self.tail(prompt) else {
            return Ok(());
        };
        if prompt.len() > self.room() {
            return Ok(());
        }
        let left = {
            let mut state = self.pool.state();
            state.prefixes.tail(self.shared.last().copied(), tail)
        };
        let Some(left) = left else {
            return Ok(());
        };
        copy(&pairs(&left, self.own_blocks()))?;
        self.len = prompt.len();
        self.pool.state().sharing.adopted_tokens += tail.len() as u64;
        Ok(())
    }

    fn publish_chunks(&mut self, prompt: &[u32]) {
        let held = &prompt[..prompt.len().min(self.len)];
        let mut state = self.pool.state();
        for chunk in held.chunks_exact(CHUNK_TOKENS).skip(self.shared.len()) {
            let (parent, index) = (self.shared.last().copied(), self.shared.len());
            let id = match state.prefixes.find(parent, chunk) {
                // Another sequence was first: one copy is enough.
                Some(id) if state.enter(&mut self.blocks, index, id) => id,
                Some(_) => return,
                None => {
                    let mut blocks = ChunkBlocks::default();
                    blocks.copy_from_slice(&self.blocks[index * CHUNK_BLOCKS..][..CHUNK_BLOCKS]);
                    state.prefixes.insert(parent, chunk, blocks)
                }
            };
            self.shared.push(id);
        }
    }

    fn publish_tail(
        &mut self,
        prompt: &[u32],
        copy: impl FnOnce(&[(u32, u32)]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let Some(tail) = self.tail(prompt) else {
            return Ok(());
        };
        let parent = self.shared.last().copied();
        let mut blocks = Vec::new();
        {
            let mut state = self.pool.state();
            let is_there = state.prefixes.find(parent, tail).is_some();
            if is_there || !state.take(tail.len().div_ceil(BLOCK_TOKENS), &mut blocks) {
                return Ok(());
            }
        }
        // Nobody finds the tail before its entries are there.
        let copied = copy(&pairs(self.own_blocks(), &blocks));
        let mut state = self.pool.state();
        match copied {
            Ok(()) => state.prefixes.insert_tail(parent, tail, blocks.into()),
            Err(_) => state.free.extend(blocks),
        }
        copied
    }

    /// What `prompt` has beyond its whole chunks, if it has anything and the sequence shares all of those.
    fn tail<'a>(&self, prompt: &'a [u32]) -> Option<&'a [u32]> {
        let (chunks, tail) = prompt.as_chunks::<CHUNK_TOKENS>();
        (chunks.len() == self.shared.len() && !tail.is_empty()).then_some(tail)
    }

    /// The blocks behind those of shared chunks.
    fn own_blocks(&self) -> &[u32] {
        &self.blocks[self.shared.len() * CHUNK_BLOCKS..]
    }
}

/// (from, to) of blocks to copy, as many as both have.
fn pairs(from: &[u32], to: &[u32]) -> Vec<(u32, u32)> {
    from.iter().copied().zip(to.iter().copied()).collect()
}

impl State {
    /// Uses a chunk of the tree as chunk number `index` of a block table: its blocks take the place of those that were reserved there,
    /// which are free again. False when it is not there.
    fn enter(&mut self, table: &mut Vec<u32>, index: usize, id: NodeId) -> bool {
        let Some(blocks) = self.prefixes.enter(id) else {
            return false;
        };
        let first = index * CHUNK_BLOCKS;
        let end = table.len().min(first + CHUNK_BLOCKS);
        self.free.extend(table.splice(first..end, blocks));
        true
    }
}
