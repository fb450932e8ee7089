//! [`Session`]: what is committed, and what to run next.
//!
//! A session is a state machine without a model. [`Session::plan`] says what to do: wait, or run a forward over
//! [`Session::input`]; [`Session::settle`] takes the forward's output, commits tokens and tells draft and gateway. The
//! engine loop runs the forwards in between, one at a time or, one day, many at once.
//!
//! Invariants, between settle and plan: the KV cache holds positions `0..cached` of the committed tokens c[0..n);
//! `cached < n`; once the prompt is processed `cached = n - 1`, and c[n-1] is the pending input.

use std::sync::Arc;
use std::time::Instant;

use specattn_engine::sampling::{
    CounterRng, Distribution, DraftToken, History, Sampler, SamplingParams, TokenLogprobs,
    check_draft, token_logprobs, verify_round,
};
use specattn_engine::{EngineError, HeadLists, LogitRows, StepOutput};
use specattn_mask::{LayerMap, MaskPolicy};
use specattn_proto::{Fault, SessionId};

use crate::draft_link::{
    DraftLink, LinkEvent, LinkId, NewLink, Proposal, ProposalPart, Terms, Welcome,
};
use crate::events::{Ending, Outbox};
use crate::masks::{MaskReader, Masking};
use crate::stats::Stats;

/// Tokens of the prompt processed in one forward.
const PREFILL_CHUNK: usize = 512;

/// What a gateway asks of a session, checked.
#[derive(Debug)]
pub(crate) struct SessionSpec {
    pub(crate) id: SessionId,
    /// Prompt and whatever was committed earlier; at least one.
    pub(crate) tokens: Vec<u32>,
    /// How many of `tokens` are prompt.
    pub(crate) prompt_tokens: usize,
    /// Tokens, prompt included, at which the session ends; at most the model's context.
    pub(crate) limit: usize,
    pub(crate) sampling: SamplingParams,
    /// Ascending.
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) policy: MaskPolicy,
    /// Rounds attend by the draft's masks.
    pub(crate) sparse: bool,
    /// Most draft tokens per round.
    pub(crate) draft_length: usize,
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Run a forward over [`Session::input`].
    Run,
    /// Nothing until then, unless a proposal arrives.
    Wait(Instant),
}

/// What the forward under way is.
#[derive(Debug)]
enum Pass {
    Prefill,
    /// One token, alone.
    Solo,
    /// The pending input and these draft tokens.
    Round {
        draft: Vec<DraftToken>,
        masked: bool,
    },
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Session {
    spec: SessionSpec,
    /// Committed tokens c[0..n).
    tokens: Vec<u32>,
    cached: usize,
    epoch: u64,
    vocab_size: usize,
    sampler: Sampler,
    rng: CounterRng,
    link: Option<DraftLink>,
    outbox: Outbox,
    stats: Stats,
    pass: Pass,
    input: Vec<u32>,
    distributions: Vec<Distribution>,
}

impl Session {
    /// A session over a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// [`EngineError`] for a sampling rule out of range.
    pub(crate) fn new(
        mut spec: SessionSpec,
        vocab_size: usize,
        outbox: Outbox,
    ) -> Result<Self, EngineError> {
        let tokens = std::mem::take(&mut spec.tokens);
        Ok(Self {
            cached: 0,
            epoch: 0,
            vocab_size,
            sampler: Sampler::new(spec.sampling.clone(), vocab_size)?,
            rng: CounterRng::new(spec.sampling.seed),
            link: None,
            outbox,
            stats: Stats {
                prompt_tokens: spec.prompt_tokens as u64,
                completion_tokens: (tokens.len() - spec.prompt_tokens) as u64,
                ..Stats::default()
            },
            pass: Pass::Prefill,
            input: Vec::new(),
            distributions: Vec::new(),
            tokens,
            spec,
        })
    }

    /// The session's id.
    pub(crate) fn id(&self) -> SessionId {
        self.spec.id
    }

    /// Committed tokens, prompt included.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it is over already: it was opened with all the tokens it may have.
    pub(crate) fn is_over(&self) -> bool {
        self.tokens.len() >= self.spec.limit
    }

    /// Whether its gateway is gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.outbox.is_abandoned()
    }

    /// Positions the KV cache must hold now; more are to be forgotten.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// Tokens of the forward that [`Session::plan`] asked for.
    pub(crate) fn input(&self) -> &[u32] {
        &self.input
    }

    /// Index lists of that forward.
    pub(crate) fn lists(&self) -> Option<&HeadLists> {
        match self.pass {
            Pass::Round { masked: true, .. } => Some(self.link.as_ref()?.masks.as_ref()?.lists()),
            _ => None,
        }
    }

    /// Logits that forward must yield.
    pub(crate) fn logit_rows(&self) -> LogitRows {
        match self.pass {
            Pass::Prefill => LogitRows::None,
            Pass::Solo | Pass::Round { .. } => LogitRows::All,
        }
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
            .filter(|&n| n <= self.tokens.len());
        let Some(known) = known else {
            return Err(Fault::InvalidArgument(format!(
                "known_tokens is {known_tokens} of {}",
                self.tokens.len()
            )));
        };
        let replaced = Fault::FailedPrecondition("another draft joined".to_owned());
        self.drop_link(replaced);
        let masks = self
            .spec
            .sparse
            .then(|| MaskReader::new(map, self.spec.policy, self.spec.limit));
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

    /// Says what to do now.
    pub(crate) fn plan(&mut self, now: Instant) -> Plan {
        let pending = self.tokens.len() - 1;
        self.input.clear();
        if self.cached < pending {
            let end = pending.min(self.cached + PREFILL_CHUNK);
            self.input.extend_from_slice(&self.tokens[self.cached..end]);
            self.pass = Pass::Prefill;
            return Plan::Run;
        }
        self.input.push(self.tokens[pending]);
        // The last token needs no draft: a round could commit no more than a step alone.
        if self.spec.limit - self.tokens.len() > 1 {
            if let Some(round) = self.next_round() {
                self.pass = round;
                return Plan::Run;
            }
            let trust = self.link.as_mut().map(|link| &mut link.trust);
            if let Some(deadline) = trust.and_then(|trust| trust.deadline(now)) {
                return Plan::Wait(deadline);
            }
        }
        self.pass = Pass::Solo;
        Plan::Run
    }

    /// The first waiting proposal that is not stale, put into the input.
    fn next_round(&mut self) -> Option<Pass> {
        loop {
            let proposal = self.link.as_mut()?.next_proposal()?;
            match self.round(proposal) {
                Ok(None) => {
                    self.stats.stale_proposals += 1;
                    let link = self.link.as_mut()?;
                    if let Err(fault) = link.catch_up(self.epoch, &self.tokens) {
                        self.drop_link(fault);
                    }
                }
                Ok(Some(round)) => return Some(round),
                Err(fault) => self.drop_link(fault),
            }
        }
    }

    /// Makes a round of a proposal; `None` when it is stale.
    fn round(&mut self, proposal: Proposal) -> Result<Option<Pass>, Fault> {
        let Some(link) = self.link.as_mut() else {
            return Ok(None);
        };
        let n = self.tokens.len();
        let base = usize::try_from(proposal.base).unwrap_or(usize::MAX);
        // Masks of stale proposals are decoded as well: the next one builds on them.
        let masked = match link.masks.as_mut() {
            Some(masks) if !proposal.mask.is_empty() => {
                self.stats.mask_bytes += proposal.mask.len() as u64;
                self.stats.mask_rounds += 1;
                let masking = masks.read(&proposal.mask, base)?;
                link.need_full_mask |= masking == Masking::MissingBase;
                masking == Masking::Ready
            }
            _ => false,
        };
        let fresh = proposal.epoch == self.epoch
            && base == n
            && proposal.pending_token == self.tokens[n - 1]
            && link.knows_all(n);
        if !fresh {
            return Ok(None);
        }
        let mut draft = proposal.draft;
        let (greedy, vocab) = (self.spec.sampling.is_greedy(), self.vocab_size);
        check_draft(&draft, greedy, vocab, &self.rng, n as u64)
            .map_err(|error| Fault::InvalidArgument(error.to_string()))?;
        // A round commits one token more than it verifies.
        draft.truncate(self.spec.limit - n - 1);
        self.input.extend(draft.iter().map(|d| d.token));
        Ok(Some(Pass::Round { draft, masked }))
    }

    /// Takes the output of the planned forward. Says how the session ended, if it did.
    ///
    /// # Errors
    /// [`EngineError`] when the output cannot be sampled from: the model failed, and so does the session.
    pub(crate) fn settle(&mut self, output: &StepOutput) -> Result<Option<Ending>, EngineError> {
        let draft = match std::mem::replace(&mut self.pass, Pass::Prefill) {
            Pass::Prefill => {
                self.cached += self.input.len();
                return Ok(None);
            }
            Pass::Solo => Vec::new(),
            Pass::Round { draft, .. } => draft,
        };
        self.stats.add_forward(output.kv);
        let n = self.tokens.len();
        self.sample(&output.logits)?;
        let outcome = verify_round(&self.distributions, &draft, &self.rng, n as u64);
        let accepted = outcome.accepted;
        self.tokens.extend_from_slice(&self.input[1..=accepted]);
        self.tokens.push(outcome.next_token);
        let ending = self.cut(n);
        // The draft first: it works while the rest is settled.
        if draft.is_empty() {
            self.stats.solo_forwards += 1;
            self.tell_of_step(ending);
        } else {
            self.stats.proposed_tokens += draft.len() as u64;
            self.stats.accepted_tokens += accepted as u64;
            self.tell_verdict(accepted, accepted < draft.len(), outcome.next_token, ending);
        }
        self.cached = self.tokens.len() - 1;
        self.stats.completion_tokens += (self.tokens.len() - n) as u64;
        let logprobs = self.logprobs(n, &output.logits)?;
        self.outbox.commit(&self.tokens[n..], logprobs);
        Ok(ending)
    }

    /// One distribution for each row of logits.
    fn sample(&mut self, logits: &[f32]) -> Result<(), EngineError> {
        self.distributions.clear();
        let (prompt, output) = self.tokens.split_at(self.spec.prompt_tokens);
        for (row, logits) in logits.chunks_exact(self.vocab_size).enumerate() {
            let history = History {
                prompt,
                output,
                pending: &self.input[1..=row],
            };
            self.distributions
                .push(self.sampler.distribution(logits, history)?);
        }
        Ok(())
    }

    /// Cuts what was committed from index `from` on at a stop token or at the limit.
    fn cut(&mut self, from: usize) -> Option<Ending> {
        let stops = &self.spec.stop_tokens;
        let is_stop = |token: &u32| stops.binary_search(token).is_ok();
        let mut ending = None;
        if let Some(index) = self.tokens[from..].iter().position(is_stop) {
            self.tokens.truncate(from + index + 1);
            ending = Some(Ending::Stop);
        }
        if self.tokens.len() > self.spec.limit {
            self.tokens.truncate(self.spec.limit);
            ending = None;
        }
        if self.tokens.len() == self.spec.limit && ending.is_none() {
            ending = Some(Ending::Length);
        }
        ending
    }

    /// Answers the round's proposal, unless the session ended: then its end is the answer.
    fn tell_verdict(
        &mut self,
        accepted: usize,
        rejected: bool,
        next_token: u32,
        ending: Option<Ending>,
    ) {
        if rejected {
            self.epoch += 1;
            self.stats.rollbacks += 1;
        }
        if ending.is_none()
            && let Some(link) = &mut self.link
            && let Err(fault) = link.judge(self.epoch, accepted, next_token)
        {
            self.drop_link(fault);
        }
    }

    /// Tells of a token committed alone.
    fn tell_of_step(&mut self, ending: Option<Ending>) {
        let Some(link) = &mut self.link else { return };
        self.epoch += 1;
        link.trust.stepped_alone();
        if ending.is_none()
            && let Err(fault) = link.catch_up(self.epoch, &self.tokens)
        {
            self.drop_link(fault);
        }
    }

    /// Log-probabilities of the tokens committed from index `from` on, when the session reports them.
    fn logprobs(&self, from: usize, logits: &[f32]) -> Result<Vec<TokenLogprobs>, EngineError> {
        let Some(count) = self.spec.sampling.logprobs else {
            return Ok(Vec::new());
        };
        let rows = logits.chunks_exact(self.vocab_size);
        let committed = self.tokens[from..].iter();
        committed
            .zip(rows)
            .map(|(&token, row)| token_logprobs(row, token, count))
            .collect()
    }

    /// Lets the draft go; the session goes on without it.
    fn drop_link(&mut self, fault: Fault) {
        if let Some(link) = self.link.take() {
            tracing::debug!(session_id = %self.spec.id, %fault, "draft let go");
            // A draft that is gone, or does not read, cannot be told why.
            let _ = link.send(LinkEvent::Failed(fault));
        }
    }

    /// Ends the session and tells everybody. Its KV blocks must be free by now: who hears of the end may rely on it.
    pub(crate) fn finish(mut self, ending: Ending, failure: Option<Fault>) {
        if let Some(link) = self.link.take() {
            // As above.
            let _ = link.send(LinkEvent::Closed(ending));
        }
        self.outbox.finish(ending, self.stats, failure);
    }
}

#[cfg(test)]
mod distribution_tests;
#[cfg(test)]
mod tests;
