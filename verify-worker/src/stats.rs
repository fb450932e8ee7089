//! [`Stats`]: what one session cost so far.

use specattn_engine::KvReads;
use specattn_proto::v1::SessionStats;

/// Counters of one session, named as in the .proto file, where their meaning is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    pub(crate) target_forwards: u64,
    pub(crate) proposed_tokens: u64,
    pub(crate) accepted_tokens: u64,
    pub(crate) rollbacks: u64,
    pub(crate) kv: KvReads,
    pub(crate) mask_bytes: u64,
    pub(crate) mask_rounds: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) solo_forwards: u64,
    pub(crate) stale_proposals: u64,
}

impl Stats {
    /// Counts one target forward after the prompt.
    pub(crate) fn add_forward(&mut self, kv: KvReads) {
        self.target_forwards += 1;
        self.kv.read += kv.read;
        self.kv.dense += kv.dense;
    }
}

impl From<&Stats> for SessionStats {
    fn from(stats: &Stats) -> Self {
        Self {
            target_forwards: stats.target_forwards,
            proposed_tokens: stats.proposed_tokens,
            accepted_tokens: stats.accepted_tokens,
            rollbacks: stats.rollbacks,
            kv_entries_read: stats.kv.read,
            kv_entries_dense: stats.kv.dense,
            mask_bytes: stats.mask_bytes,
            mask_rounds: stats.mask_rounds,
            completion_tokens: stats.completion_tokens,
            prompt_tokens: stats.prompt_tokens,
            solo_forwards: stats.solo_forwards,
            stale_proposals: stats.stale_proposals,
        }
    }
}
