//! [`PrefixTree`]: KV blocks of prompt chunks that sequences share.
//!
//! A node is a chunk at the end of one path from the root: its blocks hold the entries that a dense pass over exactly that
//! chunk wrote, behind exactly the tokens of the nodes above. A sequence that uses a node uses those above it too, so
//! nodes that nobody uses form whole branches; they stay, and the leaf that was used least lately goes first when blocks
//! are wanted.
//!
//! What a prompt has beyond its last whole chunk of [`CHUNK_TOKENS`] is its *tail*: a shorter chunk, and a leaf. Sequences go on
//! writing behind it, within its last block, so nobody uses a tail's blocks: they are a copy, to be copied.
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

/// The blocks of a whole chunk.
pub(crate) type ChunkBlocks = [u32; CHUNK_BLOCKS];

#[derive(Debug)]
struct Node {
    parent: Option<NodeId>,
    tokens: Arc<[u32]>,
    blocks: Box<[u32]>,
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
    /// Blocks of nodes without users.
    unused: usize,
    next_id: NodeId,
    clock: u64,
}

impl PrefixTree {
    /// Blocks of nodes that nobody uses.
    pub(crate) fn unused_blocks(&self) -> usize {
        self.unused
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

    /// Uses a node of a whole chunk, all of whose ancestors the caller uses; gives its blocks.
    pub(crate) fn enter(&mut self, id: NodeId) -> Option<ChunkBlocks> {
        let node = self.nodes.get_mut(&id)?;
        let blocks = ChunkBlocks::try_from(&*node.blocks).ok()?;
        if node.users == 0 {
            self.unused -= blocks.len();
            self.leaves.remove(&(node.let_go, id));
        }
        node.users += 1;
        Some(blocks)
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
            self.unused += node.blocks.len();
            if node.children.is_empty() {
                self.leaves.insert((node.let_go, id));
            }
        }
    }

    /// Adds a whole chunk behind `parent`, which the caller uses, as it will this one.
    pub(crate) fn insert(
        &mut self,
        parent: Option<NodeId>,
        tokens: &[u32],
        blocks: ChunkBlocks,
    ) -> NodeId {
        self.add(parent, tokens, blocks.into())
    }

    /// Adds a tail behind `parent`, which the caller uses; nobody uses the tail.
    pub(crate) fn insert_tail(
        &mut self,
        parent: Option<NodeId>,
        tokens: &[u32],
        blocks: Box<[u32]>,
    ) {
        let id = self.add(parent, tokens, blocks);
        self.leave(id);
    }

    /// The blocks of the tail `tokens` behind `parent`, to be copied from; among those let go it is the last now.
    pub(crate) fn tail(&mut self, parent: Option<NodeId>, tokens: &[u32]) -> Option<Box<[u32]>> {
        let id = self.find(parent, tokens)?;
        self.clock += 1;
        let node = self.nodes.get_mut(&id)?;
        self.leaves.remove(&(node.let_go, id));
        node.let_go = self.clock;
        self.leaves.insert((node.let_go, id));
        Some(node.blocks.clone())
    }

    /// Adds a node with one user.
    fn add(&mut self, parent: Option<NodeId>, tokens: &[u32], blocks: Box<[u32]>) -> NodeId {
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
    pub(crate) fn evict(&mut self) -> Option<Box<[u32]>> {
        let (_, id) = self.leaves.pop_first()?;
        let node = self.nodes.remove(&id)?;
        self.unused -= node.blocks.len();
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
        assert_eq!(tree.evict(), Some([1; CHUNK_BLOCKS].into()));
        assert_eq!(tree.evict(), Some([2; CHUNK_BLOCKS].into()));
        assert_eq!(tree.evict(), Some([0; CHUNK_BLOCKS].into()));
        assert_eq!((tree.evict(), tree.unused_blocks()), (None, 0));
        assert!(tree.nodes.is_empty() && tree.roots.is_empty());
    }

    #[test]
    fn tails_are_nobodys_and_go_by_when_they_were_wanted() {
        let mut tree = PrefixTree::default();
        let root = tree.insert(None, &[1], [0; CHUNK_BLOCKS]);
        tree.insert_tail(Some(root), &[2], [7].into());
        tree.insert_tail(Some(root), &[3], [8, 9].into());
        assert_eq!(tree.unused_blocks(), 3);
        assert_eq!(tree.tail(Some(root), &[2]), Some([7].into()));
        assert_eq!(tree.tail(None, &[2]), None);
        assert_eq!(tree.evict(), Some([8, 9].into()));
        tree.leave(root);
        assert_eq!(tree.evict(), Some([7].into()));
        assert_eq!(tree.evict(), Some([0; CHUNK_BLOCKS].into()));
        assert!(tree.nodes.is_empty() && tree.unused_blocks() == 0);
    }
}
