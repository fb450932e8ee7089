//! [`Totals`]: what all sessions of this worker have cost together, for `/metrics`.
//!
//! Sessions count for themselves ([`Stats`]) and add what is new whenever they commit, so that a long session shows while it
//! runs and counting costs a few additions a round.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use crate::stats::Stats;

/// Sums of [`Stats`] over sessions, those that ended included.
#[derive(Debug, Clone, Default)]
pub(crate) struct Totals {
    committed: Counter,
    proposed: Counter,
    accepted: Counter,
    provisional: Counter,
    confirmed: Counter,
    forwards: Counter,
    solo_forwards: Counter,
    check_forwards: Counter,
    rollbacks: Counter,
    stale_proposals: Counter,
    kv_read: Counter,
    kv_dense: Counter,
    mask_bytes: Counter,
    mask_rounds: Counter,
    /// Not a session's: counted when it happens.
    pub(crate) drafts_let_go: Counter,
}

impl Totals {
    /// Adds what a session has cost since it stood at `before`.
    pub(crate) fn add(&self, before: &Stats, now: &Stats) {
        let completion = |stats: &Stats| stats.completion_tokens;
        for (counter, before, now) in [
            (&self.committed, completion(before), completion(now)),
            (&self.proposed, before.proposed_tokens, now.proposed_tokens),
            (&self.accepted, before.accepted_tokens, now.accepted_tokens),
            (
                &self.provisional,
                before.provisional_tokens,
                now.provisional_tokens,
            ),
            (
                &self.confirmed,
                before.confirmed_tokens,
                now.confirmed_tokens,
            ),
            (&self.forwards, before.target_forwards, now.target_forwards),
            (&self.solo_forwards, before.solo_forwards, now.solo_forwards),
            (
                &self.check_forwards,
                before.check_forwards,
                now.check_forwards,
            ),
            (&self.rollbacks, before.rollbacks, now.rollbacks),
            (
                &self.stale_proposals,
                before.stale_proposals,
                now.stale_proposals,
            ),
            (&self.kv_read, before.kv.read, now.kv.read),
            (&self.kv_dense, before.kv.dense, now.kv.dense),
            (&self.mask_bytes, before.mask_bytes, now.mask_bytes),
            (&self.mask_rounds, before.mask_rounds, now.mask_rounds),
        ] {
            counter.inc_by(now - before);
        }
    }

    /// Shows the totals.
    pub(crate) fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("tokens_committed", "Tokens committed", &self.committed),
            (
                "tokens_proposed",
                "Draft tokens that were verified",
                &self.proposed,
            ),
            (
                "tokens_accepted",
                "Draft tokens that were accepted",
                &self.accepted,
            ),
            (
                "tokens_provisional",
                "Provisional tokens that confirming passes judged",
                &self.provisional,
            ),
            (
                "tokens_confirmed",
                "Provisional tokens that were committed",
                &self.confirmed,
            ),
            (
                "session_forwards",
                "Target forwards after the prompt, counted for each session of a batch",
                &self.forwards,
            ),
            (
                "session_solo_forwards",
                "Those without a proposal",
                &self.solo_forwards,
            ),
            (
                "session_check_forwards",
                "Those that confirmed provisional tokens or refreshed sparse ones",
                &self.check_forwards,
            ),
            (
                "rollbacks",
                "Verdicts that cut the draft's view back",
                &self.rollbacks,
            ),
            (
                "proposals_stale",
                "Proposals dropped because their epoch or base was stale",
                &self.stale_proposals,
            ),
            (
                "kv_entries_read",
                "KV entries read after prompts",
                &self.kv_read,
            ),
            (
                "kv_entries_dense",
                "KV entries that dense attention would have read in the same forwards",
                &self.kv_dense,
            ),
            (
                "mask_encoded_bytes",
                "Encoded mask bytes received",
                &self.mask_bytes,
            ),
            (
                "mask_rounds",
                "Rounds that carried a mask",
                &self.mask_rounds,
            ),
            (
                "drafts_let_go",
                "Drafts sent away for what they sent, or since they read too slowly",
                &self.drafts_let_go,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_add_what_is_new() {
        let totals = Totals::default();
        let stats = |accepted_tokens| Stats {
            accepted_tokens,
            ..Stats::default()
        };
        totals.add(&stats(0), &stats(3));
        totals.add(&stats(3), &stats(7));
        totals.add(&stats(0), &stats(2));
        assert_eq!(totals.accepted.get(), 9);
        assert_eq!(totals.committed.get(), 0);
    }

    /// A target forward takes 500 µs at the least that was measured: a hundredth of that is 5 µs.
    #[test]
    fn adding_a_round_costs_far_less_than_a_hundredth_of_it() {
        let totals = Totals::default();
        let stats = |tokens| Stats {
            completion_tokens: tokens,
            target_forwards: tokens,
            ..Stats::default()
        };
        let batch = || {
            let start = std::time::Instant::now();
            for tokens in 0..1_000 {
                totals.add(&stats(tokens), &stats(tokens + 1));
            }
            start.elapsed() / 1_000
        };
        // The fastest of many: others use the machine too.
        let each = (0..100).map(|_| batch()).min().unwrap_or_default();
        eprintln!("{} ns a round", each.as_nanos());
        let most = std::time::Duration::from_micros(1);
        assert!(each < most, "{each:?} a round");
    }
}
