//! [`PrefixTree`]: KV blocks of prompt chunks that sequences share.
//!
//! A node is a chunk of [`CHUNK_TOKENS`] tokens at the end of one path from the root: its blocks hold the entries that a
//! dense pass over exactly that chunk wrote, behind exactly the tokens of the nodes above. A sequence that uses a node
//! uses those above it too, so nodes that nobody uses form whole branches; they stay, and the leaf that was used least
//! lately goes first when blocks are wanted.
//!
//! Chunks are compared token by token: a hash alone would let one client read what another's tokens collide with.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::kv_cache::BLOCK_TOKENS;

/// Tokens of a chunk. Prompts are processed in whole chunks counted from their beginning, however busy the worker is: a
/// chunk's entries depend on its length, down to the last bit, so that only equal chunks can stand for each other.
pub const CHUNK_TOKENS: usize = 256;

/// Blocks of a chunk.
pub(crate) const CHUNK_BLOCKS: usize = CHUNK_TOKENS / BLOCK_TOKENS;

/// A node's place in the tree.
pub(crate) type NodeId = u32;

/// The blocks of a chunk.
pub(crate) type ChunkBlocks = [u32; CHUNK_BLOCKS];

#[derive(Debug)]
struct Node {
    parent: Option<NodeId>,
    tokens: Arc<[u32]>,
    blocks: ChunkBlocks,
    /// Sequences that use it.
    users: u32,
    children: HashMap<Arc<[u32]>, NodeId>,
    /// When it was last let go.
    let_go: u64,
}

/// All chunks that can be shared.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    nodes: HashMap<NodeId, Node>,
    roots: HashMap<Arc<[u32]>, NodeId>,
    /// Nodes without users and children, by when they were let go.
    leaves: BTreeSet<(u64, NodeId)>,
    unused: usize,
    next_id: NodeId,
    clock: u64,
}

impl PrefixTree {
    /// Blocks of nodes that nobody uses.
    pub(crate) fn unused_blocks(&self) -> usize {
        self.unused * CHUNK_BLOCKS
    }

    /// The node of the chunk `tokens` behind `parent`.
    pub(crate) fn find(&self, parent: Option<NodeId>, tokens: &[u32]) -> Option<NodeId> {
        let children = match parent {
            None => &self.roots,
            Some(parent) => &self.nodes.get(&parent)?.children,
        };
        children.get(tokens).copied()
    }

    /// Whether nobody uses the node.
    pub(crate) fn is_unused(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.users == 0)
    }

    /// Uses a node, all of whose ancestors the caller uses; gives its blocks.
    pub(crate) fn enter(&mut self, id: NodeId) -> Option<ChunkBlocks> {
        let node = self.nodes.get_mut(&id)?;
        if node.users == 0 {
            self.unused -= 1;
            self.leaves.remove(&(node.let_go, id));
        }
        node.users += 1;
        Some(node.blocks)
    }

    /// Lets go of a node, before any of its ancestors.
    pub(crate) fn leave(&mut self, id: NodeId) {
        self.clock += 1;
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.users -= 1;
        node.let_go = self.clock;
        if node.users == 0 {
            self.unused += 1;
            if node.children.is_empty() {
                self.leaves.insert((node.let_go, id));
            }
        }
    }

    /// Adds a chunk behind `parent`, which the caller uses, as it will this one.
    pub(crate) fn insert(
        &mut self,
        parent: Option<NodeId>,
        tokens: &[u32],
        blocks: ChunkBlocks,
    ) -> NodeId {
        let id = self.next_id;
        // Four billion chunks outlast any process: one takes milliseconds.
        self.next_id += 1;
        let tokens: Arc<[u32]> = tokens.into();
        let children = match parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            None => &mut self.roots,
            Some(parent) => &mut parent.children,
        };
        children.insert(Arc::clone(&tokens), id);
        let node = Node {
            parent,
            tokens,
            blocks,
            users: 1,
            children: HashMap::new(),
            let_go: 0,
        };
        self.nodes.insert(id, node);
        id
    }

    /// Forgets the leaf let go first, if nobody uses it; gives its blocks.
    pub(crate) fn evict(&mut self) -> Option<ChunkBlocks> {
        let (_, id) = self.leaves.pop_first()?;
        let node = self.nodes.remove(&id)?;
        self.unused -= 1;
        match node.parent {
            None => {
                self.roots.remove(&node.tokens);
            }
            Some(parent_id) => {
                if let Some(parent) = self.nodes.get_mut(&parent_id) {
                    parent.children.remove(&node.tokens);
                    if parent.children.is_empty() && parent.users == 0 {
                        self.leaves.insert((parent.let_go, parent_id));
                    }
                }
            }
        }
        Some(node.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_go_leaf_by_leaf_the_oldest_first() {
        let mut tree = PrefixTree::default();
        let root = tree.insert(None, &[1], [0; CHUNK_BLOCKS]);
        let left = tree.insert(Some(root), &[2], [1; CHUNK_BLOCKS]);
        assert_eq!(tree.find(None, &[1]), Some(root));
        assert_eq!(tree.find(Some(root), &[2]), Some(left));
        assert_eq!(tree.find(None, &[2]), None);
        assert_eq!(tree.evict(), None);
        tree.leave(left);
        tree.leave(root);
        // Another branch, let go later; the first root is used again meanwhile.
        tree.enter(root);
        let right = tree.insert(Some(root), &[3], [2; CHUNK_BLOCKS]);
        tree.leave(right);
        tree.leave(root);
        assert_eq!(tree.unused_blocks(), 3 * CHUNK_BLOCKS);
        assert_eq!(tree.evict(), Some([1; CHUNK_BLOCKS]));
        assert_eq!(tree.evict(), Some([2; CHUNK_BLOCKS]));
        assert_eq!(tree.evict(), Some([0; CHUNK_BLOCKS]));
        assert_eq!((tree.evict(), tree.unused_blocks()), (None, 0));
        assert!(tree.nodes.is_empty() && tree.roots.is_empty());
    }
}
