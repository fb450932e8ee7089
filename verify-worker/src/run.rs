//! [`Run`]: the tokens at a session's end that masked passes let through and no dense pass has seen yet.
//!
//! In exact mode they are provisional. In sparse mode under oversight they are committed, and a dense pass will only
//! measure what reading sparsely cost and rewrite their KV entries. Either way the run is what the next dense pass
//! feeds again, from the token before it on.

use specattn_engine::sampling::{Candidate, Distribution, Origin};

/// What is kept of a token for the pass that checks it.
#[derive(Debug)]
pub(crate) enum Record {
    /// Nothing: its entries will be refreshed, no more.
    Nothing,
    /// The distribution it was drawn from, which the confirming rule needs whole.
    Drawn(Distribution),
    /// The `[vocab_size]` logits it came from.
    Logits(Vec<f32>),
}

/// Unchecked tokens, in order. [`specattn_proto::limits::MAX_CHECK_LENGTH`] and a round's tokens bound them.
#[derive(Debug, Default)]
pub(crate) struct Run {
    records: Vec<Record>,
    stopped: bool,
}

impl Run {
    /// Tokens in it.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether a dense pass would have nothing to check.
    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Adds a token's record.
    pub(crate) fn push(&mut self, record: Record) {
        self.records.push(record);
    }

    /// Whether it ends in a stop token: nothing may follow before that is confirmed.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Its last token is a stop token.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    /// What is kept of its tokens.
    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    /// Its tokens, which the caller holds, as candidates for confirmation; of a provisional run.
    pub(crate) fn candidates<'a>(
        &'a self,
        tokens: &'a [u32],
    ) -> impl Iterator<Item = Candidate<'a>> {
        let pairs = tokens.iter().zip(&self.records);
        pairs.filter_map(|(&token, record)| match record {
            Record::Drawn(q) => Some(Candidate {
                token,
                origin: Origin::Target(q),
            }),
            Record::Nothing | Record::Logits(_) => None,
        })
    }
}
