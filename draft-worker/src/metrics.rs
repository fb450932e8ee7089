//! [`Totals`]: what all sessions of this worker have proposed together, for `/metrics`.
//!
//! Counted at the edge, on proposals as they leave, so that the engine thread does nothing for it.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use crate::session::Proposal;

/// Sums over proposals.
#[derive(Debug, Clone, Default)]
pub(crate) struct Totals {
    rounds: Counter,
    tokens: Counter,
    mask_bytes: Counter,
    kv_read: Counter,
    kv_dense: Counter,
}

impl Totals {
    /// Counts a message that is about to be sent, with so many bytes of mask.
    pub(crate) fn count(&self, proposal: &Proposal, mask_bytes: usize) {
        self.rounds.inc_by(proposal.last.into());
        self.tokens.inc_by(proposal.draft.len() as u64);
        self.mask_bytes.inc_by(mask_bytes as u64);
        self.kv_read.inc_by(proposal.kv.read);
        self.kv_dense.inc_by(proposal.kv.dense);
    }

    /// Shows the totals.
    pub(crate) fn register(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("rounds", "Rounds proposed", &self.rounds),
            ("tokens_proposed", "Draft tokens proposed", &self.tokens),
            (
                "mask_encoded_bytes",
                "Encoded mask bytes sent",
                &self.mask_bytes,
            ),
            (
                "kv_entries_read",
                "KV entries read by draft steps",
                &self.kv_read,
            ),
            (
                "kv_entries_dense",
                "KV entries that dense attention would have read in the same steps",
                &self.kv_dense,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
    }
}
