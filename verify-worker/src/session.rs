//! [`Session`]: what is committed, what is provisional, and what to run next.
//!
//! A session is a state machine without a model. [`Session::plan`] says what to do: wait, or run a forward over
//! [`Session::input`]; [`Session::settle`] (settling.rs) takes the forward's output, adds tokens and tells draft and gateway.
//! The scheduler runs the forwards in between, those of many sessions at once.
//!
//! The *view* is all tokens: the committed c[0..n), then in exact mode the provisional ones. Its last tokens that no
//! dense pass has seen are the [`Run`]. A masked pass lengthens the run; a dense pass begins again at the run's first
//! token, so that it checks the run, rewrites its KV entries and judges a draft's tokens behind it in one.
//!
//! Invariants, between settle and plan: the KV cache holds positions `0..cached` of the view v[0..m); `cached < m`; once
//! the prompt is processed `cached = m - 1`, and v[m-1] is the pending input. In exact mode the committed tokens' entries
//! are a dense pass's own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use specattn_engine::sampling::{CounterRng, DraftToken, Sampler, SamplingParams};
use specattn_engine::{CHUNK_TOKENS, EngineError, HeadLists, LogitRows};
use specattn_mask::MaskPolicy;
use specattn_proto::validate::CheckedCheckPolicy;
use specattn_proto::{Capability, Fault, SessionId};
use specattn_worker::{Plan, Readiness};
use tracing::Span;

use crate::draft_link::{DraftLink, LinkEvent};
use crate::events::{Ending, Outbox};
use crate::kept_map::KeptMap;
use crate::masks::MaskReader;
use crate::metrics::Totals;
use crate::origin::Origin;
use crate::oversight::{Mode, Oversight};
use crate::payoff::{Findings, Payoff};
use crate::run::Run;
use crate::stats::Stats;
use crate::trace::SessionTrace;
use crate::trust::Patience;
use crate::waiting::{Pacing, Standing};

mod conversation;
mod settling;

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
    /// How masks are made; where the session chooses p itself, that of the first ones.
    pub(crate) policy: MaskPolicy,
    /// The mass that was asked for; `None` leaves the choice to the session.
    pub(crate) mask_p: Option<f32>,
    pub(crate) mode: Mode,
    pub(crate) check: CheckedCheckPolicy,
    /// The gateway wants to hear of provisional tokens.
    pub(crate) provisional: bool,
    /// Most draft tokens per round.
    pub(crate) draft_length: usize,
    /// In dense mode: drafts are used only while that is faster than steps alone.
    pub(crate) draft_while_it_pays: bool,
    /// What a draft must show to join; `None`: no draft joins.
    pub(crate) capability: Option<Capability>,
}

/// What the sessions of a worker have in common.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shared {
    /// Whether drafts paid so far.
    pub(crate) findings: Arc<Findings>,
    /// What they have cost together.
    pub(crate) totals: Totals,
}

/// What the forward under way is.
#[derive(Debug)]
enum Pass {
    Prefill,
    /// The pending input and these draft tokens, by the draft's masks.
    Masked(Vec<DraftToken>),
    /// The token before the run, the run, and these draft tokens; dense.
    Dense(Vec<DraftToken>),
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct Session {
    spec: SessionSpec,
    /// The view: committed tokens, then provisional ones.
    tokens: Vec<u32>,
    /// How the provisional ones came about and, during a settle, those about to be committed.
    origins: Vec<Origin>,
    /// The view's last tokens, which no dense pass has seen. Without oversight nothing is kept of them.
    run: Run,
    oversight: Oversight,
    cached: usize,
    /// The most that was cached before it was last [set](Session::set_cached).
    most_cached: usize,
    epoch: u64,
    vocab_size: usize,
    sampler: Sampler,
    rng: CounterRng,
    link: Option<DraftLink>,
    /// Where the use of drafts is left to the worker.
    payoff: Option<Payoff>,
    outbox: Outbox,
    trace: SessionTrace,
    stats: Stats,
    /// The statistics as far as they are in the totals.
    counted: Stats,
    totals: Totals,
    pass: Pass,
    input: Vec<u32>,
    /// When the forward under way began, and what one usually takes.
    began: Option<Instant>,
    forward: Duration,
    /// Stale proposals answered on arrival since the last plan.
    stale_answers: usize,
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
        shared: &Shared,
    ) -> Result<Self, EngineError> {
        let tokens = std::mem::take(&mut spec.tokens);
        let weighs = spec.draft_while_it_pays && spec.mode == Mode::Dense;
        let oversight = Oversight::new(spec.mode, &spec.check, spec.mask_p);
        spec.policy.p = oversight.mask_p().unwrap_or(spec.policy.p);
        let stats = Stats {
            prompt_tokens: spec.prompt_tokens as u64,
            completion_tokens: (tokens.len() - spec.prompt_tokens) as u64,
            ..Stats::default()
        };
        Ok(Self {
            origins: Vec::new(),
            run: Run::default(),
            oversight,
            cached: 0,
            most_cached: 0,
            epoch: 0,
            vocab_size,
            sampler: Sampler::new(spec.sampling.clone(), vocab_size)?,
            rng: CounterRng::new(spec.sampling.seed),
            link: None,
            payoff: weighs.then(|| {
                Payoff::new(
                    Arc::clone(&shared.findings),
                    tokens.len(),
                    spec.draft_length,
                )
            }),
            outbox,
            trace: SessionTrace::none(),
            counted: stats,
            totals: shared.totals.clone(),
            stats,
            pass: Pass::Prefill,
            input: Vec::new(),
            began: None,
            forward: Duration::ZERO,
            stale_answers: 0,
            tokens,
            spec,
        })
    }

    /// The same as a part of its request's trace.
    pub(crate) fn traced(self, trace: SessionTrace) -> Self {
        Self { trace, ..self }
    }

    /// What its log lines belong to.
    pub(crate) fn span(&self) -> &Span {
        self.trace.span()
    }

    /// The session's id.
    pub(crate) fn id(&self) -> SessionId {
        self.spec.id
    }

    /// Committed tokens, prompt included.
    pub(crate) fn len(&self) -> usize {
        self.committed()
    }

    /// Committed tokens n.
    fn committed(&self) -> usize {
        if self.oversight.is_provisional() {
            self.dense_until()
        } else {
            self.tokens.len()
        }
    }

    /// Index of the run's first token: where a dense pass has something to add.
    fn dense_until(&self) -> usize {
        self.tokens.len() - self.run.len()
    }

    /// Whether it is over already: it was opened with all the tokens it may have.
    pub(crate) fn is_over(&self) -> bool {
        self.tokens.len() >= self.spec.limit
    }

    /// Whether its gateway is gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.outbox.is_abandoned()
    }

    /// Positions the KV cache must hold before the planned forward; more are to be forgotten.
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
            Pass::Masked(_) => Some(self.link.as_ref()?.masks.as_ref()?.lists()),
            Pass::Prefill | Pass::Dense(_) => None,
        }
    }

    /// Whether that forward must say what the entries that it reads weighed: all of them in a dense pass, which sees
    /// what masks have missed.
    pub(crate) fn wants_masses(&self) -> bool {
        let masks = self.link.as_ref().and_then(|link| link.masks.as_ref());
        !matches!(self.pass, Pass::Prefill) && masks.is_some_and(MaskReader::wants_masses)
    }

    /// Logits that forward must yield.
    pub(crate) fn logit_rows(&self) -> LogitRows {
        match self.pass {
            Pass::Prefill if self.replays() => LogitRows::Replay,
            Pass::Prefill => LogitRows::None,
            Pass::Masked(_) | Pass::Dense(_) => LogitRows::Verify,
        }
    }

    /// Whether the most probable token of each of those rows is all that the session looks at.
    pub(crate) fn needs_argmax_only(&self) -> bool {
        self.sampler.needs_argmax_only()
            && self.spec.sampling.logprobs.is_none()
            && !self.oversight.needs_logits()
    }

    /// What is added to logits before the most probable token is looked for.
    pub(crate) fn logit_bias(&self) -> &[(u32, f32)] {
        &self.spec.sampling.logit_bias
    }

    /// Whether the next forward is a chunk of known tokens.
    pub(crate) fn is_prefilling(&self) -> bool {
        self.cached < self.dense_until() - 1
    }

    /// Positions that must have blocks: all tokens, and those of a round.
    pub(crate) fn reach(&self) -> usize {
        self.tokens.len() + self.spec.draft_length + 1
    }

    /// The prompt tokens that are processed as a prompt, chunk by chunk.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_end()]
    }

    /// The KV cache holds `cached` positions of the view now, all of them a dense pass's own.
    pub(crate) fn set_cached(&mut self, cached: usize) {
        self.most_cached = self.most_cached.max(self.cached);
        self.stats.took_over(self.most_cached, cached);
        self.cached = cached;
    }

    /// Whether the round that comes next is there, with a mask that was not read yet.
    pub(crate) fn has_unread_mask(&self) -> bool {
        let link = self.link.as_ref();
        link.is_some_and(DraftLink::has_unread_mask) && self.wants_round()
    }

    /// Reads that mask.
    pub(crate) fn read_mask(&mut self) {
        if let Some(link) = &mut self.link {
            link.read_mask();
        }
    }

    /// Says what to do now.
    pub(crate) fn plan(&mut self, now: Instant) -> Plan {
        self.input.clear();
        self.stale_answers = 0;
        let first = self.dense_until() - 1;
        if self.is_prefilling() {
            let end = self.prefill_end(first);
            self.input.extend_from_slice(&self.tokens[self.cached..end]);
            self.pass = Pass::Prefill;
            return Plan::Run;
        }
        if self.wants_round() {
            if let Some((draft, masked)) = self.next_round() {
                self.begin(draft, masked, now);
                return Plan::Run;
            }
            match self.patience(now) {
                Some(Patience::Until(deadline)) => return Plan::Wait(Some(deadline)),
                Some(Patience::Over) => {
                    if let Some(payoff) = &mut self.payoff {
                        payoff.waited_in_vain();
                    }
                }
                Some(Patience::Unwarranted) | None => {}
            }
        }
        self.begin(Vec::new(), false, now);
        Plan::Run
    }

    /// How long to wait for a round.
    fn patience(&mut self, now: Instant) -> Option<Patience> {
        let unawaited = self.pacing() == Pacing::Unawaited;
        let trust = &mut self.link.as_mut()?.trust;
        if unawaited {
            return Some(trust.brief_patience(now, self.forward));
        }
        let most = self.payoff.as_ref().and_then(Payoff::patience);
        Some(trust.patience(now, most))
    }

    /// Whether a round is worth having now.
    fn wants_round(&self) -> bool {
        let rests = self.link.as_ref().is_some_and(|link| link.trust.rests());
        let pays = !rests && self.payoff.as_ref().is_none_or(Payoff::wants_drafts);
        // The last token needs no draft: a round could add no more than a dense pass does. Behind a stop token nothing
        // is worth a round before it stands.
        pays && self.spec.limit - self.tokens.len() > 1 && !self.run.is_stopped()
    }

    /// Whether it has a round, waits for one, or goes on alone.
    pub(crate) fn readiness(&self, now: Instant) -> Readiness {
        let Some(link) = self.link.as_ref().filter(|_| self.wants_round()) else {
            return Readiness::Alone;
        };
        let is_there = match self.pacing() {
            Pacing::InOrder => link.waiting().first().is_some(),
            Pacing::Ahead | Pacing::Unawaited => {
                let standing = Standing::of(self.epoch, &self.tokens);
                link.waiting().has_fitting(standing)
            }
        };
        if is_there {
            Readiness::Ready
        } else if self.pacing() != Pacing::Unawaited && link.trust.expects(now) {
            Readiness::Expected
        } else {
            Readiness::Alone
        }
    }

    /// Where the chunk of known tokens that is processed next ends; all of them end at `first`.
    ///
    /// The chunks of a prompt are the same whatever follows it and wherever processing begins, so that a session that was
    /// opened again with tokens it had decoded elsewhere, or found some of its prompt processed, has the bits it had there.
    fn prefill_end(&self, first: usize) -> usize {
        let end = first.min((self.cached / CHUNK_TOKENS + 1) * CHUNK_TOKENS);
        if self.replays() {
            end
        } else {
            end.min(self.prompt_end())
        }
    }

    /// Prompt tokens that are processed as a prompt: the last one is the first forward's input.
    fn prompt_end(&self) -> usize {
        self.spec.prompt_tokens - 1
    }

    /// Whether the known tokens that come next were decoded before.
    fn replays(&self) -> bool {
        self.cached >= self.prompt_end()
    }

    /// Makes a pass of a round, or of no draft tokens at all.
    fn begin(&mut self, draft: Vec<DraftToken>, masked: bool, now: Instant) {
        self.began = Some(now);
        // Masked passes write approximate entries: after the cache was given up, a run has none to go on from.
        let lost = self.cached + 1 < self.tokens.len();
        let due = lost || self.oversight.is_due(self.run.len());
        if masked && due && self.run.is_empty() {
            // No masked pass at all: what it would have read is told all the same.
            self.oversight.round(self.kept(), 0);
        }
        let first = if masked && !due {
            self.tokens.len() - 1
        } else {
            self.dense_until() - 1
        };
        self.cached = first;
        self.input.extend_from_slice(&self.tokens[first..]);
        self.input.extend(draft.iter().map(|d| d.token));
        self.pass = if masked && !due {
            Pass::Masked(draft)
        } else {
            Pass::Dense(draft)
        };
    }

    /// What the last mask lets each layer read, in so many columns.
    pub(crate) fn kept_map(&self, columns: usize) -> KeptMap {
        let tokens = self.tokens.len();
        let masks = self.link.as_ref().and_then(|link| link.masks.as_ref());
        masks.map_or(KeptMap::empty(tokens), |masks| {
            KeptMap::of(masks.lists(), masks.map().of_head.len(), tokens, columns)
        })
    }

    /// Share of the cached positions that the last mask lets the heads read, on average.
    fn kept(&self) -> f64 {
        let masks = self.link.as_ref().and_then(|link| link.masks.as_ref());
        let Some(lists) = masks.map(|masks| masks.lists()) else {
            return 1.0;
        };
        let counts: Vec<usize> = lists.lists.iter().map(|list| list.count()).collect();
        let read: usize = lists
            .of_head
            .iter()
            .map(|&list| counts[list as usize])
            .sum();
        read as f64 / (lists.of_head.len() * self.tokens.len()).max(1) as f64
    }

    /// Adds what is new in the statistics to the totals.
    fn count(&mut self) {
        self.totals.add(&self.counted, &self.stats);
        self.counted = self.stats;
    }

    /// Ends the session and tells everybody. Its KV blocks must be free by now: who hears of the end may rely on it.
    pub(crate) fn finish(mut self, ending: Ending, failure: Option<Fault>) {
        if let Some(link) = self.link.take() {
            // A draft that is gone needs no word.
            let _ = link.send(LinkEvent::Closed(ending));
        }
        self.count();
        self.stats.divergence = self.oversight.divergence();
        self.stats.confirm_length = self.oversight.confirm_length().unwrap_or(0);
        if self.spec.mode != Mode::Dense {
            self.stats.mask_p = self.spec.policy.p;
        }
        self.trace.end(&self.stats);
        self.outbox.finish(ending, self.stats, failure);
    }
}

#[cfg(test)]
mod counter_tests;
#[cfg(test)]
mod distribution_tests;
#[cfg(test)]
mod tests;
