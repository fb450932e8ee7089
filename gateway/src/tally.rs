//! [`Tally`]: what a session has cost at all its verify workers.

use specattn_proto::v1::SessionStats;

/// The statistics of a session that may have been opened more than once.
///
/// A worker that is lost leaves the counters that it told of last; what it did since is not known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    before: SessionStats,
    now: SessionStats,
}

impl Tally {
    /// Continues one that stood at `before`.
    pub(crate) fn resumed(before: SessionStats) -> Self {
        Self {
            before,
            now: SessionStats::default(),
        }
    }

    /// The present worker's counters.
    pub(crate) fn told(&mut self, now: SessionStats) {
        self.now = now;
    }

    /// Another worker takes over.
    pub(crate) fn reopened(&mut self) {
        self.before = self.total();
        self.now = SessionStats::default();
    }

    /// The sum.
    pub(crate) fn total(&self) -> SessionStats {
        let (a, b) = (&self.before, &self.now);
        let samples = a.kl_samples + b.kl_samples;
        let kl = a.kl_mean * a.kl_samples as f64 + b.kl_mean * b.kl_samples as f64;
        let told = b.target_forwards > 0;
        SessionStats {
            target_forwards: a.target_forwards + b.target_forwards,
            proposed_tokens: a.proposed_tokens + b.proposed_tokens,
            accepted_tokens: a.accepted_tokens + b.accepted_tokens,
            rollbacks: a.rollbacks + b.rollbacks,
            kv_entries_read: a.kv_entries_read + b.kv_entries_read,
            kv_entries_dense: a.kv_entries_dense + b.kv_entries_dense,
            mask_bytes: a.mask_bytes + b.mask_bytes,
            mask_rounds: a.mask_rounds + b.mask_rounds,
            // These two the gateway knows better.
            completion_tokens: b.completion_tokens,
            prompt_tokens: b.prompt_tokens,
            solo_forwards: a.solo_forwards + b.solo_forwards,
            stale_proposals: a.stale_proposals + b.stale_proposals,
            kv_bytes_read: a.kv_bytes_read + b.kv_bytes_read,
            kv_bytes_dense: a.kv_bytes_dense + b.kv_bytes_dense,
            draft_kv_entries_read: a.draft_kv_entries_read + b.draft_kv_entries_read,
            draft_kv_entries_dense: a.draft_kv_entries_dense + b.draft_kv_entries_dense,
            draft_kv_bytes_read: a.draft_kv_bytes_read + b.draft_kv_bytes_read,
            draft_kv_bytes_dense: a.draft_kv_bytes_dense + b.draft_kv_bytes_dense,
            check_forwards: a.check_forwards + b.check_forwards,
            kv_entries_checking: a.kv_entries_checking + b.kv_entries_checking,
            provisional_tokens: a.provisional_tokens + b.provisional_tokens,
            confirmed_tokens: a.confirmed_tokens + b.confirmed_tokens,
            kl_mean: if samples == 0 {
                0.0
            } else {
                kl / samples as f64
            },
            kl_samples: samples,
            mask_p: if told { b.mask_p } else { a.mask_p },
            confirm_length: if told {
                b.confirm_length
            } else {
                a.confirm_length
            },
            // The first worker's: later ones process again what was processed.
            cached_prompt_tokens: if a.prompt_tokens > 0 {
                a.cached_prompt_tokens
            } else {
                b.cached_prompt_tokens
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up_and_means_are_weighted() {
        let mut tally = Tally::default();
        let stats = |forwards, kl_mean, kl_samples, mask_p| SessionStats {
            target_forwards: forwards,
            kl_mean,
            kl_samples,
            mask_p,
            prompt_tokens: 9,
            cached_prompt_tokens: forwards,
            ..SessionStats::default()
        };
        tally.told(stats(3, 0.5, 1, 0.9));
        tally.told(stats(5, 0.2, 2, 0.8));
        tally.reopened();
        assert_eq!(tally.total().mask_p, 0.8);
        tally.told(stats(7, 0.8, 1, 0.7));
        let total = tally.total();
        assert_eq!((total.target_forwards, total.kl_samples), (12, 3));
        assert!((total.kl_mean - 0.4).abs() < 1e-12);
        assert_eq!(total.mask_p, 0.7);
        assert_eq!(total.cached_prompt_tokens, 5, "the first worker's");
    }
}
