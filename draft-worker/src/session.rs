//! [`Session`]: what the draft knows of one session, and what to run next.
//!
//! A state machine without a model, like the verify worker's: [`Session::plan`] asks for a forward over
//! [`Session::input`], [`Session::settle`] takes its output, [`Session::judge`] takes verdicts.
//!
//! The text is the session's tokens c[0..n), as far as told, then this round's draft tokens d1..dk. In exact mode the last
//! of c may be provisional: a verdict can withdraw them. Invariants: the KV
//! cache holds positions `0..cached` of the text; `cached < n + k`; a draft step feeds all that is missing and draws the
//! next draft token. The last draft token of a round is not fed before its verdict: nobody would use its logits. So after
//! a round that was accepted whole, the next round's first step feeds two tokens.
//!
//! **Running ahead.** While a round waits for its verdict, the draft may guess it and go on; whether it pays is for
//! [`Lookahead`] to find out. Without masks it drafts rounds for all that is likely: [`Prospects`], whose text takes the place
//! of the round's (exploring.rs). A mask is a change to the one before, so where masks are made there is one guess: all
//! accepted, and the token that the draft finds most probable as the bonus. It is then appended to c like a verdict's tokens,
//! and the next round is drafted and sent. What was guessed is kept in [`Session::guesses`]; a verdict that says the same
//! costs no wait, any other cuts c back to where the guess began.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use specattn_engine::sampling::{CounterRng, DraftToken, Sampler};
use specattn_engine::{CHUNK_TOKENS, HeadLists, KvReads, LogitRows, RowSelection, StepOutput};
use specattn_proto::Fault;
use specattn_worker::Plan;
use tokio::sync::mpsc;

use crate::acceptance::Acceptance;
use crate::capturing::Capturing;
use crate::lookahead::{Explorer, Findings, Lookahead, Way};
use crate::prospects::Prospects;
use crate::round_length::RoundLength;

mod conversation;
mod drawing;
mod exploring;
mod messages;

pub(crate) use messages::{Ahead, DraftShape, Proposal, SessionSpec, Verdict, Welcome};

/// Most rounds whose verdicts are guessed at a time. While the target judges one round the next must be there already, and
/// the verdict that lets the draft begin the one after is on its way: two, and the one that is being drafted.
const MOST_GUESSES: usize = 2;

/// Rounds that follow one another among prospects, at most.
const MOST_AHEAD: usize = crate::prospects::MOST_DEPTH + 1;

/// Messages of a round at most: its announcement, its mask, and the rest.
const ROUND_MESSAGES: usize = 3;

/// Most tokens fed by a draft step; what is missing beyond them is caught up first.
const STEP_TOKENS: usize = 32;

/// A round that is out, and what its verdict is guessed to be.
#[derive(Debug)]
struct Guess {
    base: usize,
    /// All guessed to be accepted; the bonus token follows them.
    round: Vec<DraftToken>,
}

/// The forward under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    CatchUp,
    /// A draft step that reads everything.
    Dense,
    /// A draft step that reads what [`OwnReads`] lists.
    Sparse,
}

/// What follows from the verify worker's welcome.
#[derive(Debug)]
struct Joined {
    epoch: u64,
    prompt_tokens: usize,
    draft_length: usize,
    acceptance: Acceptance,
    /// Where shorter rounds may be chosen.
    length: Option<RoundLength>,
    lookahead: Lookahead,
    /// While there are prospects.
    explorer: Option<Explorer>,
    /// When the verdict before came, while rounds follow one another.
    last_verdict: Option<Instant>,
    sampler: Sampler,
    rng: CounterRng,
    capturing: Capturing,
    /// Tokens there were at the welcome: to catch up with them is the draft's prefill.
    prefill: usize,
    /// Messages sent.
    sequence: u64,
    /// Draft tokens of this round sent already.
    sent: usize,
    /// The round's mask was sent already.
    mask_sent: bool,
    /// The whole round was sent and waits for its verdict.
    waiting: bool,
    /// The verify worker goes on alone. It must hear early that a round is coming: each step it takes meanwhile voids
    /// what was drafted, so a round that takes longer than a step would never be finished.
    announces: bool,
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Session {
    spec: SessionSpec,
    shape: DraftShape,
    /// The session's tokens c[0..n), as far as told.
    tokens: Vec<u32>,
    /// The first tokens, all but the last of those that the gateway knew: what others may have processed too.
    prompt_end: usize,
    /// Rounds whose verdicts are guessed, oldest first. The tokens from the first one's base on are not known yet.
    guesses: VecDeque<Guess>,
    /// This round's d1..dk.
    draft: Vec<DraftToken>,
    /// While it runs ahead without masks: what may come, in place of guesses and of this round.
    prospects: Option<Prospects>,
    cached: usize,
    /// What was read since the last proposal.
    kv: KvReads,
    joined: Option<Joined>,
    proposals: mpsc::Sender<Proposal>,
    /// Whether running ahead paid in other sessions.
    findings: Arc<Findings>,
    pass: Pass,
    input: Vec<u32>,
}

impl Session {
    /// A session over a model of this shape that sends its proposals to `proposals`. It catches up with the tokens it
    /// knows before it has joined.
    pub(crate) fn new(
        mut spec: SessionSpec,
        shape: DraftShape,
        proposals: mpsc::Sender<Proposal>,
        findings: Arc<Findings>,
    ) -> Self {
        Self {
            prompt_end: spec.tokens.len() - 1,
            tokens: std::mem::take(&mut spec.tokens),
            spec,
            shape,
            guesses: VecDeque::new(),
            draft: Vec::new(),
            prospects: None,
            cached: 0,
            kv: KvReads::default(),
            joined: None,
            proposals,
            findings,
            pass: Pass::CatchUp,
            input: Vec::new(),
        }
    }

    /// Positions the KV cache must hold now; more are to be forgotten.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// Tokens of the forward that [`Session::plan`] asked for.
    pub(crate) fn input(&self) -> &[u32] {
        &self.input
    }

    /// Logits that forward must yield.
    pub(crate) fn logit_rows(&self) -> LogitRows {
        match self.pass {
            Pass::CatchUp => LogitRows::None,
            Pass::Dense | Pass::Sparse => LogitRows::Last,
        }
    }

    /// Index lists of that forward.
    pub(crate) fn lists(&self) -> Option<&HeadLists> {
        match (self.pass, &self.joined) {
            (Pass::Sparse, Some(joined)) => Some(joined.capturing.lists()),
            _ => None,
        }
    }

    /// Layers whose attention rows that forward must hand out.
    pub(crate) fn capture(&self) -> &[usize] {
        match (self.pass, &self.joined) {
            (Pass::Dense, Some(joined)) => joined.capturing.layers(),
            _ => &[],
        }
    }

    /// What that forward's device may select in place of handing out rows.
    pub(crate) fn select(&self) -> Option<&RowSelection> {
        match (self.pass, &self.joined) {
            (Pass::Dense, Some(joined)) => joined.capturing.selection(),
            _ => None,
        }
    }

    /// Whether the most probable token is all that the session looks at of that forward's logits. Ahead of verdicts it looks at others.
    pub(crate) fn needs_argmax_only(&self) -> bool {
        self.joined.as_ref().is_some_and(|Joined { sampler, .. }| {
            let looks_beside = self.prospects.is_some() && !sampler.params().adjusts_logits();
            sampler.needs_argmax_only() && !looks_beside
        })
    }

    /// What is added to logits before the most probable token is looked for.
    pub(crate) fn logit_bias(&self) -> &[(u32, f32)] {
        let joined = self.joined.as_ref();
        joined.map_or(&[], |joined| &joined.sampler.params().logit_bias)
    }

    /// Whether the next forward is a chunk of tokens that the draft has to catch up with. A draft step feeds some tokens that are
    /// missing, but none that others may have processed too.
    pub(crate) fn is_catching_up(&self) -> bool {
        let missing = (self.tokens.len() - 1).saturating_sub(self.cached);
        let may_step = missing < STEP_TOKENS && self.cached >= self.prompt_end && self.drafts();
        missing > 0 && !may_step
    }

    /// Whether a whole round is out.
    fn is_waiting(&self) -> bool {
        self.joined.as_ref().is_some_and(|joined| joined.waiting)
    }

    /// Whether to guess the verdict of the round that is out, and draft on.
    fn may_guess(&self) -> bool {
        let joined = self.joined.as_ref();
        let after = self.tokens.len() + self.draft.len() + 1;
        joined.is_some_and(|joined| joined.lookahead.way() != Way::Waiting)
            && self.guesses.len() < MOST_GUESSES
            && after < self.spec.limit.min(self.spec.capacity)
            && self.proposals.capacity() >= ROUND_MESSAGES
    }

    /// Whether there is a round to draft.
    fn drafts(&self) -> bool {
        self.joined.is_some() && self.round_length() > 0
    }

    /// Positions that must have blocks: all tokens, and those of a round or of what is explored.
    pub(crate) fn reach(&self) -> usize {
        let round = self.spec.draft_length + 1;
        match self.prospects {
            Some(_) => (self.tokens.len() + MOST_AHEAD * round).min(self.spec.capacity),
            None => self.tokens.len() + round,
        }
    }

    /// Tokens that the draft catches up with chunk by chunk.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_end]
    }

    /// The KV cache holds `cached` positions of the text now.
    pub(crate) fn set_cached(&mut self, cached: usize) {
        self.cached = cached;
    }

    /// Says what to do now.
    pub(crate) fn plan(&mut self) -> Plan {
        let pending = self.tokens.len() - 1;
        self.input.clear();
        if self.is_catching_up() {
            // The same chunks wherever catching up begins, and one that ends with the prompt: others may have processed them.
            let known = if self.cached < self.prompt_end {
                self.prompt_end
            } else {
                pending
            };
            let end = known.min((self.cached / CHUNK_TOKENS + 1) * CHUNK_TOKENS);
            self.input.extend_from_slice(&self.tokens[self.cached..end]);
            self.pass = Pass::CatchUp;
            return Plan::Run;
        }
        if self.prospects.is_some() {
            return self.plan_ahead();
        }
        let runs = if self.is_waiting() {
            self.may_guess()
        } else {
            self.drafts()
        };
        if !runs {
            return Plan::Wait(None);
        }
        let n = self.tokens.len();
        if self.cached < n {
            self.input.extend_from_slice(&self.tokens[self.cached..]);
        }
        let fed = self.cached.saturating_sub(n);
        self.input.extend(self.draft[fed..].iter().map(|d| d.token));
        let (step, round_length) = (self.draft.len(), self.round_length());
        if let Some(joined) = self.joined.as_mut().filter(|j| step == 0 && !j.waiting) {
            joined.capturing.begin(n - 1);
        }
        self.pass = match &mut self.joined {
            // A guess sends no mask, so it needs no rows.
            Some(joined)
                if !joined.capturing.captures(step, round_length) || joined.guesses_sparsely() =>
            {
                joined.capturing.fit(self.cached);
                Pass::Sparse
            }
            _ => Pass::Dense,
        };
        Plan::Run
    }

    /// Draft tokens worth proposing next.
    fn round_length(&self) -> usize {
        self.room(self.tokens.len())
    }

    /// Draft tokens worth proposing after a text of `n` tokens: a round commits one more than it verifies, and the last one
    /// proposed is not fed.
    fn room(&self, n: usize) -> usize {
        let wanted = self.joined.as_ref().map_or(0, Joined::wanted_length);
        wanted
            .min(self.spec.limit.saturating_sub(n + 1))
            .min((self.spec.capacity + 1).saturating_sub(n))
    }

    /// Goes on as if the round that is out were accepted whole, and `bonus` drawn after it.
    fn guess(&mut self, bonus: u32) {
        let base = self.tokens.len();
        let round = std::mem::take(&mut self.draft);
        self.tokens.extend(round.iter().map(|d| d.token));
        self.tokens.push(bonus);
        self.guesses.push_back(Guess { base, round });
        if let Some(joined) = &mut self.joined {
            joined.begin_round();
        }
    }

    /// Takes the output of the planned forward.
    ///
    /// # Errors
    /// A [`Fault`] when the model failed or the proposal cannot be sent: the draft must leave.
    pub(crate) fn settle(&mut self, output: &StepOutput) -> Result<(), Fault> {
        let prefill = self.joined.as_ref().map_or(usize::MAX, |j| j.prefill);
        if self.pass != Pass::CatchUp || self.cached >= prefill {
            self.kv += output.kv;
        }
        self.cached += self.input.len();
        if self.pass == Pass::CatchUp {
            return Ok(());
        }
        if self.prospects.is_some() {
            return self.settle_ahead(output);
        }
        let round_length = self.round_length();
        let n = self.tokens.len();
        let Some(joined) = &mut self.joined else {
            return Err(Fault::Internal(
                "a draft step before the welcome".to_owned(),
            ));
        };
        let pending: Vec<u32> = self.draft.iter().map(|d| d.token).collect();
        let distribution = joined.distribution(&self.tokens, &pending, output)?;
        if joined.waiting {
            joined.capturing.guessed(output);
            self.guess(distribution.argmax());
            return Ok(());
        }
        let before = self.tokens.iter().copied();
        let place = (n + pending.len(), self.spec.drafting.max_q_entries);
        let next = joined.draw(&distribution, joined.epoch, before, place);
        let stepped = joined.capturing.stepped(output);
        stepped.map_err(|error| Fault::Internal(error.to_string()))?;
        self.draft.push(next);
        let left = round_length.saturating_sub(self.draft.len());
        let last = left == 0;
        let with_mask = !joined.mask_sent && (last || joined.capturing.has_early_mask(left));
        if !last && !with_mask && !std::mem::take(&mut joined.announces) {
            return Ok(());
        }
        joined.announces = false;
        joined.sequence += 1;
        joined.waiting = last;
        let mask = if with_mask {
            joined.mask_sent = true;
            joined.capturing.finish()
        } else {
            None
        };
        let offset = std::mem::replace(&mut joined.sent, self.draft.len());
        let proposal = Proposal {
            epoch: joined.epoch,
            base: n,
            sequence: joined.sequence,
            pending_token: self.tokens[n - 1],
            offset,
            draft: self.draft[offset..].to_vec(),
            mask,
            last,
            ahead: None,
            kv: std::mem::take(&mut self.kv),
        };
        self.send(proposal)
    }

    fn send(&self, proposal: Proposal) -> Result<(), Fault> {
        self.proposals
            .try_send(proposal)
            .map_err(|_| Fault::Unavailable("the verify worker takes no proposals".to_owned()))
    }
}

#[cfg(test)]
mod tests;
