//! [`Outgoing`]: proposals on their way out. Their masks become bytes here, each built on the one sent before, in the order in
//! which they are sent.
//!
//! To encode a long mask takes as long as a draft step of a small model. It is done beside the engine thread, which steps on
//! meanwhile, and beside those that serve gRPC, which have other sessions' messages to carry.

use specattn_mask::{Encoder, RoundMask};
use specattn_proto::v1::SpeculateRequest;
use tokio::sync::mpsc;
use tokio_stream::Stream;

use crate::metrics::Totals;
use crate::session::Proposal;
use crate::wire;

/// Positions, of all sources together, from which on a mask is long: to encode or to read it takes some 2 ns for each, and a
/// message, or a change of threads, a few hundredths of a millisecond.
const LONG_MASK: usize = 100_000;

/// Whether a mask of so many sources over a context of this length takes long to encode and to read.
pub(crate) fn is_long(sources: usize, context_len: usize) -> bool {
    sources.saturating_mul(context_len) >= LONG_MASK
}

/// A mask that was not encoded yet.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OutgoingMask {
    pub(crate) round: RoundMask,
    /// The verify worker lacks the mask before, on which this one would build.
    pub(crate) is_first: bool,
}

impl OutgoingMask {
    fn encode(&self, encoder: &mut Encoder) -> Vec<u8> {
        if self.is_first {
            encoder.reset();
        }
        encoder.encode(&self.round)
    }

    fn is_long(&self) -> bool {
        is_long(self.round.sources.len(), self.round.context_len)
    }
}

/// The way out of one session's proposals.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    encoder: Encoder,
    totals: Totals,
}

impl Outgoing {
    /// One that adds what is sent to `totals`.
    pub(crate) fn new(totals: Totals) -> Self {
        Self {
            encoder: Encoder::new(),
            totals,
        }
    }

    /// The messages of `proposals`, each once its mask is encoded.
    pub(crate) fn messages(
        self,
        proposals: mpsc::Receiver<Proposal>,
    ) -> impl Stream<Item = SpeculateRequest> + Send + 'static {
        let state = (self, proposals);
        futures_util::stream::unfold(state, async |(mut outgoing, mut proposals)| {
            let proposal = proposals.recv().await?;
            let message = match &proposal.mask {
                Some(mask) if mask.is_long() => {
                    let coding = tokio::task::spawn_blocking(move || {
                        let message = outgoing.message(proposal);
                        (outgoing, message)
                    });
                    let message;
                    // A runtime that shuts down has no use for the rest.
                    (outgoing, message) = coding.await.ok()?;
                    message
                }
                _ => outgoing.message(proposal),
            };
            Some((message, (outgoing, proposals)))
        })
    }

    /// A proposal as a message, encoded by the calling thread.
    pub(crate) fn message(&mut self, mut proposal: Proposal) -> SpeculateRequest {
        let mask = proposal.mask.take();
        let mask = mask.map_or_else(Vec::new, |mask| mask.encode(&mut self.encoder));
        self.totals.count(&proposal, mask.len());
        wire::propose(proposal, mask)
    }
}

#[cfg(test)]
mod tests {
    use specattn_engine::KvReads;
    use specattn_mask::{Decoder, Limits, MaskError, PositionSet};
    use specattn_proto::v1::Propose;
    use specattn_proto::v1::speculate_request::Message;
    use tokio_stream::StreamExt;

    use super::*;

    fn proposal(sequence: u64, mask: Option<(usize, bool)>) -> Proposal {
        let mask = mask.map(|(context_len, is_first)| OutgoingMask {
            round: RoundMask {
                context_len,
                granularity: 1,
                sources: vec![PositionSet::from_positions(
                    context_len,
                    [sequence as usize],
                )],
            },
            is_first,
        });
        Proposal {
            epoch: 0,
            base: 1,
            sequence,
            pending_token: 0,
            offset: 0,
            draft: Vec::new(),
            mask,
            last: true,
            ahead: None,
            kv: KvReads::default(),
        }
    }

    #[tokio::test]
    async fn long_and_short_masks_leave_in_order_each_building_on_the_one_before() {
        let (sender, receiver) = mpsc::channel(8);
        let lengths = [
            Some(50),
            Some(2 * LONG_MASK),
            None,
            Some(60),
            Some(LONG_MASK),
            Some(70),
        ];
        for (sequence, len) in lengths.into_iter().enumerate() {
            let mask = len.map(|len| (len, sequence == 5));
            sender.try_send(proposal(sequence as u64, mask)).unwrap();
        }
        drop(sender);
        let messages: Vec<Propose> = Outgoing::default()
            .messages(receiver)
            .map(|message| match message.message {
                Some(Message::Propose(propose)) => propose,
                other => panic!("{other:?}"),
            })
            .collect()
            .await;
        assert!(messages.iter().map(|m| m.sequence).eq(0..6));
        let limits = Limits {
            max_context: 2 * LONG_MASK,
            max_sources: 1,
        };
        let mut decoder = Decoder::new(limits);
        for (message, len) in messages.iter().zip(lengths) {
            let Some(len) = len else {
                assert!(message.mask.is_empty());
                continue;
            };
            let mask = decoder.decode(&message.mask).unwrap();
            assert_eq!(mask.context_len, len);
            assert!(mask.sources[0].iter().eq([message.sequence as usize]));
        }
        // The last one was to be read by who lacks the others; the one before was not.
        let fresh = || Decoder::new(limits);
        assert!(fresh().decode(&messages[5].mask).is_ok());
        let lost = fresh().decode(&messages[4].mask).unwrap_err();
        assert!(matches!(lost, MaskError::MissingBase));
    }
}
