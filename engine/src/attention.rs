//! What attention reads and what it hands out: index lists, captured rows, counters.

use std::ops::AddAssign;
use std::sync::OnceLock;

use specattn_positions::PositionSet;

/// Which cached positions each KV head reads in a masked step.
///
/// The step's own tokens (positions from the sequence's length on) are always read, causally, and are not listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeadLists {
    /// Distinct lists, as sets of positions below the sequence's length before the step. Heads of a long context may read
    /// thousands of entries each: a list crosses to a GPU as a bit per position.
    pub lists: Vec<PositionSet>,
    /// `[num_layers * num_kv_heads]`, layer-major: which of `lists` a KV head reads.
    pub of_head: Vec<u32>,
}

/// The lists of one span as a pass reads them: those that the KV heads of the rank that runs it use.
#[derive(Debug)]
pub struct SpanLists<'a> {
    lists: Vec<SpanList<'a>>,
    of_head: Vec<u32>,
}

/// A list of a [`SpanLists`].
#[derive(Debug)]
pub struct SpanList<'a> {
    set: &'a PositionSet,
    len: usize,
    /// Its positions in order, once somebody asked for them.
    positions: OnceLock<Vec<u32>>,
}

impl<'a> SpanList<'a> {
    fn new(set: &'a PositionSet) -> Self {
        Self {
            set,
            len: set.count(),
            positions: OnceLock::new(),
        }
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entries as a set.
    pub fn set(&self) -> &'a PositionSet {
        self.set
    }

    /// The entries' positions in order.
    pub fn positions(&self) -> &[u32] {
        self.positions
            .get_or_init(|| self.set.iter().map(|position| position as u32).collect())
    }
}

impl<'a> From<&'a HeadLists> for SpanLists<'a> {
    fn from(lists: &'a HeadLists) -> Self {
        Self::of_heads(lists, lists.of_head.iter())
    }
}

impl<'a> SpanLists<'a> {
    /// The lists that `heads` name, numbered anew.
    pub(crate) fn of_heads<'b>(lists: &'a HeadLists, heads: impl Iterator<Item = &'b u32>) -> Self {
        const UNSEEN: u32 = u32::MAX;
        let mut numbers = vec![UNSEEN; lists.lists.len()];
        let mut own = Self {
            lists: Vec::new(),
            of_head: Vec::new(),
        };
        for &list in heads {
            let number = &mut numbers[list as usize];
            if *number == UNSEEN {
                *number = own.lists.len() as u32;
                own.lists.push(SpanList::new(&lists.lists[list as usize]));
            }
            own.of_head.push(*number);
        }
        own
    }

    /// What KV head `head` reads, counted through all layers: layer · num_kv_heads + KV head.
    pub fn of(&self, head: usize) -> &SpanList<'a> {
        &self.lists[self.of_head[head] as usize]
    }

    /// Distinct lists.
    pub fn lists(&self) -> &[SpanList<'a>] {
        &self.lists
    }

    /// `[num_layers * num_kv_heads]`, layer-major: which of [`SpanLists::lists`] a KV head reads.
    pub fn of_head(&self) -> &[u32] {
        &self.of_head
    }

    /// Entries of the longest list.
    pub fn longest(&self) -> usize {
        self.lists.iter().map(SpanList::len).max().unwrap_or(0)
    }
}

/// KV entries of one step, summed over layers and KV heads. An entry is one position's K and V of one KV head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvReads {
    /// Entries read.
    pub read: u64,
    /// Entries a dense pass would have read.
    pub dense: u64,
}

impl AddAssign for KvReads {
    fn add_assign(&mut self, other: Self) {
        self.read += other.read;
        self.dense += other.dense;
    }
}

/// Attention probabilities of a step's last token, per captured layer and query head.
#[derive(Debug, Clone, Default)]
pub struct AttentionRows {
    /// Captured layers, in order.
    pub layers: Vec<usize>,
    /// Query heads per layer.
    pub num_heads: usize,
    /// Positions per row: the sequence's length after the step.
    pub kv_len: usize,
    /// `[layers.len(), num_heads, kv_len]`; every row sums to 1.
    pub probs: Vec<f32>,
}

/// What the entries that a step read weighed, per KV head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EntryMasses {
    /// `[num_layers * num_kv_heads]`, layer-major. For each cached position that the head read, in the order of its list
    /// (all positions where it had none), the mean of its probability over the step's tokens and the query heads that
    /// share the KV head. The step's own tokens have the rest.
    pub of_head: Vec<Vec<f32>>,
}

impl AttentionRows {
    /// The row of head `head` of layer `layer`, or `None` where the layer was not captured.
    pub fn row(&self, layer: usize, head: usize) -> Option<&[f32]> {
        let index = self.layers.iter().position(|&l| l == layer)?;
        let start = (index * self.num_heads + head) * self.kv_len;
        self.probs.get(start..start + self.kv_len)
    }
}
