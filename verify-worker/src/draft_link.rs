//! [`DraftLink`]: one draft worker's link to one session, as the engine thread sees it.
//!
//! The link puts split proposals together, drops re-sends, keeps what waits for judgement, and knows how far the
//! draft has been told. Invariant: `told` never exceeds the session's tokens, and every message to the draft
//! continues where the last one ended, or below, where provisional tokens were withdrawn. Proposals are a stranger's word: whether they fit the session's epoch, base and
//! pending token is for the session to say when it comes to judge them.

use std::sync::Arc;
use std::time::Duration;

use specattn_engine::sampling::{DraftToken, SparseDistribution};
use specattn_proto::Fault;
use tokio::sync::{Semaphore, mpsc};

use crate::draft_reads::DraftReads;
use crate::events::Ending;
use crate::masks::{MaskReader, Masking};
use crate::trust::Trust;
use crate::waiting::{Pacing, Standing, Waiting};

/// Names a link among all of the worker's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkId(pub(crate) u64);

/// One message to a draft worker.
#[derive(Debug, PartialEq)]
pub(crate) enum LinkEvent {
    /// The link stands.
    Welcome(Box<Welcome>),
    /// An answer, or progress made alone.
    Verdict(Verdict),
    /// The session is over; the stream ends.
    Closed(Ending),
    /// The stream ends with this status; the session goes on.
    Failed(Fault),
}

/// What a draft must know of a session.
#[derive(Debug, PartialEq)]
pub(crate) struct Welcome {
    pub(crate) epoch: u64,
    /// Index of the first of `tokens`.
    pub(crate) start: usize,
    /// Committed tokens the draft lacked.
    pub(crate) tokens: Vec<u32>,
    /// Attention sources in use; empty when the session takes no masks.
    pub(crate) sources: Vec<specattn_mask::Source>,
    pub(crate) draft_length: usize,
    /// Rounds may be shorter.
    pub(crate) may_shorten: bool,
    pub(crate) policy: specattn_mask::MaskPolicy,
    /// The session's rule, with the draft's seed.
    pub(crate) sampling: specattn_engine::sampling::SamplingParams,
    pub(crate) prompt_tokens: usize,
}

/// See the .proto file's `Verdict`.
#[derive(Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) epoch: u64,
    pub(crate) base: usize,
    pub(crate) accepted: usize,
    pub(crate) next_tokens: Vec<u32>,
    pub(crate) judged: bool,
    pub(crate) need_full_mask: bool,
    pub(crate) mask_p: Option<f32>,
}

/// One proposal message, checked against the wire's limits only.
#[derive(Debug)]
pub(crate) struct ProposalPart {
    pub(crate) epoch: u64,
    pub(crate) base: u64,
    pub(crate) sequence: u64,
    pub(crate) pending_token: u32,
    pub(crate) offset: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) q: Vec<SparseDistribution>,
    pub(crate) mask: Vec<u8>,
    pub(crate) last: bool,
    pub(crate) pacing: Pacing,
    pub(crate) assumed: Vec<u32>,
    /// What the draft says it read, as far as it counts.
    pub(crate) reads: DraftReads,
}

/// A proposal, put together.
#[derive(Debug, PartialEq)]
pub(crate) struct Proposal {
    pub(crate) epoch: u64,
    pub(crate) base: u64,
    pub(crate) pending_token: u32,
    /// Tokens before its base that the draft assumed.
    pub(crate) assumed: Vec<u32>,
    pub(crate) draft: Vec<DraftToken>,
    pub(crate) mask: Vec<u8>,
}

/// What a proposal's mask came to; `None`: it has none.
pub(crate) type MaskRead = Option<Result<Masking, Fault>>;

/// What a session allows its draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Most tokens per round.
    pub(crate) draft_length: usize,
    /// Tokens come without q.
    pub(crate) greedy: bool,
}

/// The engine's end of a link.
#[derive(Debug)]
pub(crate) struct DraftLink {
    id: LinkId,
    terms: Terms,
    sender: mpsc::Sender<LinkEvent>,
    /// Room for messages under way; closed with the link, which ends its reader.
    slots: Arc<Semaphore>,
    /// Tokens of the session, committed or provisional, the draft has been told of.
    told: usize,
    /// The highest sequence number seen.
    sequence: u64,
    partial: Option<Proposal>,
    waiting: Waiting,
    /// What the mask that is next in turn came to, once it was read: that of the first of them or, without any, of the partial one.
    masking: MaskRead,
    /// How long to wait for the draft.
    pub(crate) trust: Trust,
    /// Decodes masks, in sessions that take any.
    pub(crate) masks: Option<MaskReader>,
    /// A mask could not be decoded since the last verdict.
    pub(crate) need_full_mask: bool,
    /// The mass that masks are to reach, when the draft has yet to hear of it.
    pub(crate) mask_p: Option<f32>,
}

/// What a link is made of.
#[derive(Debug)]
pub(crate) struct NewLink {
    pub(crate) id: LinkId,
    pub(crate) sender: mpsc::Sender<LinkEvent>,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) timeout: Duration,
}

impl DraftLink {
    /// A link whose draft knows the session's first `told` tokens.
    pub(crate) fn new(new: NewLink, terms: Terms, masks: Option<MaskReader>, told: usize) -> Self {
        Self {
            id: new.id,
            terms,
            sender: new.sender,
            slots: new.slots,
            told,
            sequence: 0,
            partial: None,
            waiting: Waiting::default(),
            masking: None,
            trust: Trust::new(new.timeout),
            masks,
            need_full_mask: false,
            mask_p: None,
        }
    }

    /// The link's name.
    pub(crate) fn id(&self) -> LinkId {
        self.id
    }

    /// Whether the draft has been told of all of the session's `tokens` tokens.
    pub(crate) fn knows_all(&self, tokens: usize) -> bool {
        self.told == tokens
    }

    /// Takes a proposal message; gives what it adds to the draft's reads.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] for a malformed one, [`Fault::ResourceExhausted`] for too many at a time: the link must
    /// be closed.
    pub(crate) fn receive(&mut self, part: ProposalPart) -> Result<DraftReads, Fault> {
        if part.sequence <= self.sequence {
            return Ok(DraftReads::default());
        }
        self.sequence = part.sequence;
        let (last, reads) = (part.last, part.reads);
        if part.pacing != Pacing::InOrder && self.masks.is_some() {
            return Err(invalid("a round ahead of its turn, in a mode with masks"));
        }
        self.waiting.heard(part.pacing);
        let proposal = self.assemble(part)?;
        self.trust.proposal_arrived();
        if !last {
            self.partial = Some(proposal);
            return Ok(reads);
        }
        if proposal.draft.is_empty() {
            return Err(invalid("a proposal without tokens"));
        }
        self.waiting.push(proposal)?;
        Ok(reads)
    }

    /// Joins a message to the round it continues, or begins one.
    fn assemble(&mut self, part: ProposalPart) -> Result<Proposal, Fault> {
        let greedy = self.terms.greedy;
        if part.q.len() != if greedy { 0 } else { part.tokens.len() } {
            return Err(invalid(
                "q must be there for every token, or in a greedy session for none",
            ));
        }
        if !part.mask.is_empty() && self.masks.is_none() {
            return Err(invalid("a mask, in a mode that takes none"));
        }
        if part.offset == 0 {
            self.drop_partial();
        }
        let mut proposal = self.partial.take().unwrap_or_else(|| Proposal {
            epoch: part.epoch,
            base: part.base,
            pending_token: part.pending_token,
            assumed: part.assumed,
            draft: Vec::with_capacity(part.tokens.len()),
            mask: Vec::new(),
        });
        let header = (proposal.epoch, proposal.base, proposal.pending_token);
        if header != (part.epoch, part.base, part.pending_token)
            || part.offset != proposal.draft.len()
        {
            return Err(invalid("a proposal's messages must continue each other"));
        }
        if proposal.draft.len() + part.tokens.len() > self.terms.draft_length {
            return Err(invalid(
                "more draft tokens than the session takes in a round",
            ));
        }
        let mut q = part.q.into_iter();
        let tokens = part.tokens.into_iter();
        proposal
            .draft
            .extend(tokens.map(|token| DraftToken { token, q: q.next() }));
        if !part.mask.is_empty() {
            if !proposal.mask.is_empty() {
                return Err(invalid("a round has one mask"));
            }
            proposal.mask = part.mask;
        }
        Ok(proposal)
    }

    /// The draft has given a round up that it had begun. A mask of it that was not read yet stays unread: a flood of such rounds
    /// must not take the engine's time. The next one lacks its base then, and the draft will hear that.
    fn drop_partial(&mut self) {
        if self.partial.take().is_some() && self.waiting.first().is_none() {
            self.masking = None;
        }
    }

    /// Rounds that wait.
    pub(crate) fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Drops rounds that came ahead and can fit no more.
    pub(crate) fn forget_passed(&mut self, standing: Standing<'_>) {
        self.waiting.forget_passed(standing);
    }

    /// Of rounds that came ahead, the one that fits.
    pub(crate) fn take_fitting(&mut self, standing: Standing<'_>) -> Option<Proposal> {
        self.waiting.take_fitting(standing)
    }

    /// Whether the proposal that is judged next, be it whole or not, has a mask that was not read yet.
    pub(crate) fn has_unread_mask(&self) -> bool {
        let first = self.waiting.first().or(self.partial.as_ref());
        self.masking.is_none() && first.is_some_and(|first| !first.mask.is_empty())
    }

    /// Reads that mask, if there is one.
    pub(crate) fn read_mask(&mut self) {
        if self.has_unread_mask()
            && let Some(first) = self.waiting.first().or(self.partial.as_ref())
            && let Some(masks) = &mut self.masks
        {
            let base = usize::try_from(first.base).unwrap_or(usize::MAX);
            self.masking = Some(masks.read(&first.mask, base));
        }
    }

    /// The next proposal to judge, in the order of arrival, and what its mask came to. Masks of stale proposals are read as
    /// well: the next one builds on them.
    pub(crate) fn next_proposal(&mut self) -> Option<(Proposal, MaskRead)> {
        self.read_mask();
        let proposal = self.waiting.pop()?;
        Some((proposal, self.masking.take()))
    }

    /// Tokens from index `to` on were withdrawn: the draft must hear what came in their place.
    pub(crate) fn withdraw(&mut self, to: usize) {
        self.told = self.told.min(to);
    }

    /// Answers a proposal that was judged, when `accepted` of its tokens and another were added; `next_tokens` are those to tell.
    ///
    /// # Errors
    /// Gives the link up when the draft does not take the message.
    pub(crate) fn judge(
        &mut self,
        epoch: u64,
        accepted: usize,
        next_tokens: &[u32],
    ) -> Result<(), Fault> {
        let verdict = Verdict {
            epoch,
            base: self.told,
            accepted,
            next_tokens: next_tokens.to_vec(),
            judged: true,
            need_full_mask: std::mem::take(&mut self.need_full_mask),
            mask_p: self.mask_p.take(),
        };
        self.told += accepted + 1;
        self.trust.judged(accepted);
        self.send(LinkEvent::Verdict(verdict))
    }

    /// Answers a stale proposal, or tells of progress made alone or of a withdrawal: every one of the session's
    /// `tokens` the draft has not been told.
    ///
    /// A draft that is busy gets the news with a later message.
    ///
    /// # Errors
    /// Gives the link up when the draft is gone.
    pub(crate) fn catch_up(&mut self, epoch: u64, tokens: &[u32]) -> Result<(), Fault> {
        match self.sender.try_reserve() {
            Ok(room) => room.send(LinkEvent::Verdict(Verdict {
                epoch,
                base: self.told,
                accepted: 0,
                next_tokens: tokens[self.told..].to_vec(),
                judged: false,
                need_full_mask: std::mem::take(&mut self.need_full_mask),
                mask_p: self.mask_p.take(),
            })),
            Err(mpsc::error::TrySendError::Full(())) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(())) => return Err(gone()),
        }
        self.told = tokens.len();
        Ok(())
    }

    /// Sends a message that must not be missed.
    ///
    /// # Errors
    /// Gives the link up when the draft is gone or does not read.
    pub(crate) fn send(&self, event: LinkEvent) -> Result<(), Fault> {
        self.sender.try_send(event).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Fault::exhausted("the draft does not read"),
            mpsc::error::TrySendError::Closed(_) => gone(),
        })
    }
}

impl Drop for DraftLink {
    fn drop(&mut self) {
        self.slots.close();
    }
}

fn invalid(reason: &str) -> Fault {
    Fault::InvalidArgument(reason.to_owned())
}

fn gone() -> Fault {
    Fault::Unavailable("the draft is gone".to_owned())
}

#[cfg(test)]
mod tests;
