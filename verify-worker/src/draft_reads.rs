//! [`DraftReads`]: what draft models read of their KV caches, as their workers tell it.
//!
//! The draft is not free: its reads stand beside the target's in a session's statistics. They are a stranger's word, which
//! nothing here can check, so nothing depends on them, and a claim counts for no more than [`ClaimBound`] allows.

use specattn_engine::KvReads;
use specattn_proto::v1::ModelInfo;

/// Forwards that one proposal message may account for: its steps, those of rounds given up before it, catching up.
const MOST_FORWARDS: u64 = 1_024;

/// Sums over a session's drafts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct DraftReads {
    /// KV entries.
    pub(crate) entries: KvReads,
    /// Their bytes.
    pub(crate) bytes: KvReads,
}

impl DraftReads {
    /// Adds what a message claims.
    pub(crate) fn add(&mut self, other: Self) {
        let add = |sum: &mut KvReads, other: KvReads| {
            sum.read = sum.read.saturating_add(other.read);
            sum.dense = sum.dense.saturating_add(other.dense);
        };
        add(&mut self.entries, other.entries);
        add(&mut self.bytes, other.bytes);
    }
}

/// How much of a draft's claims is believed, by the shape it gave when it joined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ClaimBound {
    /// Entries of one message.
    entries: u64,
    entry_bytes: u64,
}

impl ClaimBound {
    /// The bound for a draft model in sessions of at most `max_tokens` tokens.
    pub(crate) fn new(draft: &ModelInfo, max_tokens: usize) -> Self {
        let heads = u64::from(draft.num_layers) * u64::from(draft.num_kv_heads);
        Self {
            entries: heads
                .saturating_mul(max_tokens as u64)
                .saturating_mul(MOST_FORWARDS),
            entry_bytes: draft.kv_entry_bytes.into(),
        }
    }

    /// What a claim counts for.
    pub(crate) fn credit(&self, claim: KvReads) -> DraftReads {
        let dense = claim.dense.min(self.entries);
        let read = claim.read.min(dense);
        DraftReads {
            entries: KvReads { read, dense },
            bytes: KvReads {
                read: read.saturating_mul(self.entry_bytes),
                dense: dense.saturating_mul(self.entry_bytes),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft() -> ModelInfo {
        ModelInfo {
            num_layers: 3,
            num_kv_heads: 2,
            kv_entry_bytes: 512,
            ..ModelInfo::default()
        }
    }

    #[test]
    fn honest_claims_count_in_full() {
        let bound = ClaimBound::new(&draft(), 100);
        let mut sum = DraftReads::default();
        let claim = KvReads {
            read: 200,
            dense: 500,
        };
        sum.add(bound.credit(claim));
        sum.add(bound.credit(claim));
        let twice = |read, dense| KvReads { read, dense };
        assert_eq!(sum.entries, twice(400, 1_000));
        assert_eq!(sum.bytes, twice(400 * 512, 1_000 * 512));
    }

    #[test]
    fn absurd_claims_are_cut_and_never_overflow() {
        let most = KvReads {
            read: u64::MAX,
            dense: u64::MAX,
        };
        let credited = ClaimBound::new(&draft(), 100).credit(most);
        assert_eq!(credited.entries.dense, 3 * 2 * 100 * MOST_FORWARDS);
        assert_eq!(credited.entries.read, credited.entries.dense);
        let giant = ModelInfo {
            num_layers: u32::MAX,
            num_kv_heads: u32::MAX,
            kv_entry_bytes: u32::MAX,
            ..ModelInfo::default()
        };
        let mut sum = DraftReads::default();
        for _ in 0..3 {
            sum.add(ClaimBound::new(&giant, usize::MAX).credit(most));
        }
        assert_eq!(sum.bytes, most);
        // More read than a dense pass would have is cut as well.
        let claim = KvReads { read: 9, dense: 5 };
        assert_eq!(ClaimBound::new(&draft(), 100).credit(claim).entries.read, 5);
    }
}
