//! What a session and its draft say to each other: joining, proposals, verdicts, and parting.

use std::sync::Arc;

use specattn_engine::sampling::{DraftToken, SamplingParams, check_draft};
use specattn_mask::LayerMap;
use specattn_proto::{Capability, Fault};

use super::Session;
use crate::draft_link::{
    DraftLink, LinkEvent, LinkId, MaskRead, NewLink, Proposal, ProposalPart, Terms, Welcome,
};
use crate::events::Ending;
use crate::masks::{MaskReader, Masking};
use crate::oversight::Mode;
use crate::payoff::Payoff;
use crate::waiting::{MOST_IN_ORDER, Pacing, Standing};

impl Session {
    /// Lets a draft in that shows what the gateway gave to this session's drafts.
    ///
    /// # Errors
    /// [`Fault::PermissionDenied`].
    pub(crate) fn admit(&self, shown: Option<&Capability>) -> Result<(), Fault> {
        Capability::check(self.spec.capability.as_ref(), shown)
    }

    /// Takes up a draft worker; an earlier one is let go.
    ///
    /// # Errors
    /// The session takes no drafts, or the draft claims to know tokens that do not exist.
    pub(crate) fn join(
        &mut self,
        new: NewLink,
        known_tokens: u64,
        map: Arc<LayerMap>,
    ) -> Result<(), Fault> {
        if self.spec.draft_length == 0 {
            return Err(Fault::FailedPrecondition(
                "the session takes no drafts".to_owned(),
            ));
        }
        let known = usize::try_from(known_tokens)
            .ok()
            .filter(|&n| n <= self.committed());
        let Some(known) = known else {
            return Err(Fault::InvalidArgument(format!(
                "known_tokens is {known_tokens} of {}",
                self.committed()
            )));
        };
        self.part(Fault::FailedPrecondition("another draft joined".to_owned()));
        let masks = (self.spec.mode != Mode::Dense)
            .then(|| MaskReader::new(map, self.spec.policy, self.spec.limit));
        self.oversight.new_draft();
        let terms = Terms {
            draft_length: self.spec.draft_length,
            greedy: self.spec.sampling.is_greedy(),
        };
        let welcome = Welcome {
            epoch: self.epoch,
            start: known,
            tokens: self.tokens[known..].to_vec(),
            sources: masks
                .as_ref()
                .map_or_else(Vec::new, |m| m.map().sources.clone()),
            draft_length: self.spec.draft_length,
            may_shorten: self.payoff.is_some(),
            policy: self.spec.policy,
            sampling: SamplingParams {
                seed: self.rng.draft_seed(),
                ..self.spec.sampling.clone()
            },
            prompt_tokens: self.spec.prompt_tokens,
        };
        let link = DraftLink::new(new, terms, masks, self.tokens.len());
        link.send(LinkEvent::Welcome(Box::new(welcome)))?;
        self.link = Some(link);
        Ok(())
    }

    /// Takes a proposal message of link `id`; one of an earlier link is dropped.
    pub(crate) fn receive(&mut self, id: LinkId, part: ProposalPart) {
        self.drop_stale();
        if let Some(link) = self.link.as_mut().filter(|link| link.id() == id) {
            match link.receive(part) {
                Ok(reads) => self.stats.draft.add(reads),
                Err(fault) => self.drop_link(fault),
            }
        }
    }

    /// Link `id` is gone, or closed for what it sent.
    pub(crate) fn leave(&mut self, id: LinkId, fault: Option<Fault>) {
        if self.link.as_ref().is_some_and(|link| link.id() == id) {
            match fault {
                Some(fault) => self.drop_link(fault),
                None => self.link = None,
            }
        }
    }

    /// How the draft paces its rounds.
    pub(super) fn pacing(&self) -> Pacing {
        let link = self.link.as_ref();
        link.map_or(Pacing::InOrder, |link| link.waiting().pacing())
    }

    /// The waiting proposal that is to be judged now, and whether its masks can be used.
    pub(super) fn next_round(&mut self) -> Option<(Vec<DraftToken>, bool)> {
        if self.pacing() != Pacing::InOrder {
            let link = self.link.as_mut()?;
            if !link.knows_all(self.tokens.len())
                && let Err(fault) = link.catch_up(self.epoch, &self.tokens)
            {
                self.drop_link(fault);
                return None;
            }
            let link = self.link.as_mut()?;
            let proposal = link.take_fitting(Standing::of(self.epoch, &self.tokens))?;
            return self.round(proposal, None).unwrap_or_else(|fault| {
                self.drop_link(fault);
                None
            });
        }
        loop {
            if let Some(round) = self.take_proposal()? {
                return Some(round);
            }
        }
    }

    /// Answers what can no longer be judged, or never could (a later epoch, another last token, farther ahead than rounds may
    /// wait), so that only what can takes up room. What was sent ahead is no such thing: its turn may come, unless its draft
    /// has begun again before it. No more a step than may wait: a flood ends the link. Rounds ahead need no answer.
    fn drop_stale(&mut self) {
        if self.pacing() != Pacing::InOrder {
            let standing = Standing::of(self.epoch, &self.tokens);
            if let Some(link) = &mut self.link {
                link.forget_passed(standing);
            }
            return;
        }
        let next = self.tokens.len() as u64;
        let reach = next..=next + (MOST_IN_ORDER * (self.spec.draft_length + 1)) as u64;
        while self.stale_answers < MOST_IN_ORDER {
            let pending = self.tokens.last();
            let hopeless = |first: &Proposal| {
                let follows_another = first.base == next && Some(&first.pending_token) != pending;
                first.epoch != self.epoch || !reach.contains(&first.base) || follows_another
            };
            let stale = self.link.as_ref().is_some_and(|link| {
                let waiting = link.waiting();
                waiting.first().is_some_and(hopeless) || waiting.first_is_superseded()
            });
            if !stale || self.take_proposal().is_none() {
                return;
            }
            self.stale_answers += 1;
        }
    }

    /// Takes the first waiting proposal, if there is any: a round or, when it is stale, an answer to it.
    fn take_proposal(&mut self) -> Option<Option<(Vec<DraftToken>, bool)>> {
        let (proposal, masking) = self.link.as_mut()?.next_proposal()?;
        let round = self.round(proposal, masking).unwrap_or_else(|fault| {
            self.drop_link(fault);
            None
        });
        if round.is_none()
            && let Some(link) = &mut self.link
        {
            self.stats.stale_proposals += 1;
            if let Err(fault) = link.catch_up(self.epoch, &self.tokens) {
                self.drop_link(fault);
            }
        }
        Some(round)
    }

    /// Checks a proposal whose mask came to `masking`; `None` when it is stale.
    fn round(
        &mut self,
        proposal: Proposal,
        masking: MaskRead,
    ) -> Result<Option<(Vec<DraftToken>, bool)>, Fault> {
        let Some(link) = self.link.as_mut() else {
            return Ok(None);
        };
        let m = self.tokens.len();
        if masking.is_some() {
            self.stats.mask_bytes += proposal.mask.len() as u64;
            self.stats.mask_rounds += 1;
        }
        let masking = masking.transpose()?;
        link.need_full_mask |= masking == Some(Masking::MissingBase);
        let masked = masking == Some(Masking::Ready);
        let standing = Standing::of(self.epoch, &self.tokens);
        if !standing.fits(&proposal) || !link.knows_all(m) {
            return Ok(None);
        }
        let mut draft = proposal.draft;
        let (greedy, vocab) = (self.spec.sampling.is_greedy(), self.vocab_size);
        let rng = self.rng.attempt(self.epoch);
        let rng = rng.behind(self.tokens.iter().copied());
        check_draft(&draft, greedy, vocab, &rng, m as u64)
            .map_err(|error| Fault::InvalidArgument(error.to_string()))?;
        // A round adds one token more than it verifies.
        draft.truncate(self.spec.limit - m - 1);
        Ok(Some((draft, masked)))
    }

    /// Answers the round's proposal.
    pub(super) fn tell_verdict(&mut self, accepted: usize, rejected: bool) {
        // A draft with several rounds out need not find out which of them was judged.
        let from = match self.pacing() {
            Pacing::InOrder => self.tokens.len() - 1,
            Pacing::Ahead | Pacing::Unawaited => self.tokens.len() - 1 - accepted,
        };
        if rejected {
            self.epoch += 1;
            self.stats.rollbacks += 1;
        }
        if let Some(link) = &mut self.link
            && let Err(fault) = link.judge(self.epoch, accepted, &self.tokens[from..])
        {
            self.drop_link(fault);
        }
    }

    /// Tells of a token added alone.
    pub(super) fn tell_of_step(&mut self, ending: Option<Ending>) {
        let Some(link) = &mut self.link else { return };
        self.epoch += 1;
        link.trust.stepped_alone();
        // A draft whose rounds are not wanted is left in peace: it hears of everything when they are again.
        let wanted = self.payoff.as_ref().is_none_or(Payoff::wants_drafts);
        if wanted
            && ending.is_none()
            && let Err(fault) = link.catch_up(self.epoch, &self.tokens)
        {
            self.drop_link(fault);
        }
    }

    /// Tells that provisional tokens from index `to` on were withdrawn, and of the one in their place. `proposed`: a
    /// proposal that built on them waits for its answer.
    pub(super) fn tell_withdrawn(&mut self, to: usize, proposed: bool, ending: Option<Ending>) {
        self.epoch += 1;
        self.stats.rollbacks += 1;
        let Some(link) = &mut self.link else { return };
        link.withdraw(to);
        if proposed {
            link.trust.answered();
        } else {
            link.trust.stepped_alone();
        }
        if ending.is_none()
            && let Err(fault) = link.catch_up(self.epoch, &self.tokens)
        {
            self.drop_link(fault);
        }
    }

    /// Takes the mass that masks are to reach from the oversight; the draft hears of it with its next verdict.
    pub(super) fn choose_mask_p(&mut self) {
        let Some(p) = self.oversight.mask_p() else {
            return;
        };
        if p != self.spec.policy.p {
            self.spec.policy.p = p;
            if let Some(link) = &mut self.link {
                link.mask_p = Some(p);
                if let Some(masks) = &mut link.masks {
                    masks.set_p(p);
                }
            }
        }
    }

    /// Lets the draft go, which is at fault; the session goes on without it.
    pub(super) fn drop_link(&mut self, fault: Fault) {
        if self.link.is_some() {
            tracing::info!(session_id = %self.spec.id, %fault, "draft let go");
            self.totals.drafts_let_go.inc();
        }
        self.part(fault);
    }

    /// Ends the link, if there is one, with this word.
    fn part(&mut self, word: Fault) {
        if let Some(link) = self.link.take() {
            // A draft that is gone, or does not read, cannot be told why.
            let _ = link.send(LinkEvent::Failed(word));
        }
    }
}
