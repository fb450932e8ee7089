//! [`Stats`]: what one session cost so far.

use specattn_engine::KvReads;
use specattn_proto::v1::SessionStats;

use crate::draft_reads::DraftReads;

/// Counters of one session, named as in the .proto file, where their meaning is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Stats {
    pub(crate) target_forwards: u64,
    pub(crate) proposed_tokens: u64,
    pub(crate) accepted_tokens: u64,
    pub(crate) rollbacks: u64,
    pub(crate) kv: KvReads,
    pub(crate) draft: DraftReads,
    pub(crate) mask_bytes: u64,
    pub(crate) mask_rounds: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) solo_forwards: u64,
    pub(crate) stale_proposals: u64,
    pub(crate) check_forwards: u64,
    pub(crate) kv_entries_checking: u64,
    pub(crate) provisional_tokens: u64,
    pub(crate) confirmed_tokens: u64,
    /// Mean and samples.
    pub(crate) divergence: (f64, u64),
    pub(crate) mask_p: f32,
    pub(crate) confirm_length: usize,
    pub(crate) cached_prompt_tokens: u64,
}

impl Stats {
    /// Counts one target forward after the prompt.
    pub(crate) fn add_forward(&mut self, kv: KvReads) {
        self.target_forwards += 1;
        self.kv += kv;
    }

    /// Says of a counted forward that it checked a run, `provisional` tokens long where it is provisional, of which the
    /// first `accepted` at most were confirmed.
    pub(crate) fn add_check(&mut self, kv: KvReads, provisional: usize, accepted: usize) {
        self.check_forwards += 1;
        self.kv_entries_checking += kv.read;
        self.provisional_tokens += provisional as u64;
        self.confirmed_tokens += accepted.min(provisional) as u64;
    }

    /// The KV cache holds `now` positions after `before` at most; more than these are other sessions' work. Counts while the prompt is
    /// being processed: what a session that was preempted later takes over again is its own.
    pub(crate) fn took_over(&mut self, before: usize, now: usize) {
        if self.target_forwards == 0 {
            let more = now.saturating_sub(before) as u64;
            self.cached_prompt_tokens = (self.cached_prompt_tokens + more).min(self.prompt_tokens);
        }
    }

    /// The counters as they travel, when an entry of the target's KV cache has `kv_entry_bytes` bytes.
    pub(crate) fn report(&self, kv_entry_bytes: u32) -> SessionStats {
        let entry = u64::from(kv_entry_bytes);
        SessionStats {
            target_forwards: self.target_forwards,
            proposed_tokens: self.proposed_tokens,
            accepted_tokens: self.accepted_tokens,
            rollbacks: self.rollbacks,
            kv_entries_read: self.kv.read,
            kv_entries_dense: self.kv.dense,
            mask_bytes: self.mask_bytes,
            mask_rounds: self.mask_rounds,
            completion_tokens: self.completion_tokens,
            prompt_tokens: self.prompt_tokens,
            solo_forwards: self.solo_forwards,
            stale_proposals: self.stale_proposals,
            kv_bytes_read: self.kv.read * entry,
            kv_bytes_dense: self.kv.dense * entry,
            draft_kv_entries_read: self.draft.entries.read,
            draft_kv_entries_dense: self.draft.entries.dense,
            draft_kv_bytes_read: self.draft.bytes.read,
            draft_kv_bytes_dense: self.draft.bytes.dense,
            check_forwards: self.check_forwards,
            kv_entries_checking: self.kv_entries_checking,
            provisional_tokens: self.provisional_tokens,
            confirmed_tokens: self.confirmed_tokens,
            kl_mean: self.divergence.0,
            kl_samples: self.divergence.1,
            mask_p: self.mask_p,
            confirm_length: self.confirm_length as u32,
            cached_prompt_tokens: self.cached_prompt_tokens,
        }
    }
}
