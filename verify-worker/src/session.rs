//! [`Session`]: what is committed, what is provisional, and what to run next.
//!
//! A session is a state machine without a model. [`Session::plan`] says what to do: wait, or run a forward over
//! [`Session::input`]; [`Session::settle`] takes the forward's output, adds tokens and tells draft and gateway. The
//! scheduler runs the forwards in between, those of many sessions at once.
//!
//! The *view* is all tokens: the committed c[0..n), then in exact mode the provisional ones. Its last tokens that no
//! dense pass has seen are the [`Run`]. A masked pass lengthens the run; a dense pass begins again at the run's first
//! token, so that it checks the run, rewrites its KV entries and judges a draft's tokens behind it in one.
//!
//! Invariants, between settle and plan: the KV cache holds positions `0..cached` of the view v[0..m); `cached < m`; once
//! the prompt is processed `cached = m - 1`, and v[m-1] is the pending input. In exact mode the committed tokens' entries
//! are a dense pass's own.

use std::sync::Arc;
use std::time::Instant;

use specattn_engine::sampling::{
    Candidate, CounterRng, Distribution, DraftToken, History, Sampler, SamplingParams,
    TokenLogprobs, token_logprobs, verify_round,
};
use specattn_engine::{CHUNK_TOKENS, EngineError, HeadLists, LogitRows, StepOutput};
use specattn_mask::MaskPolicy;
use specattn_proto::validate::CheckedCheckPolicy;
use specattn_proto::{Capability, Fault, SessionId};
use specattn_worker::{Plan, clock};

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
use crate::trust::Patience;

mod conversation;

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
    epoch: u64,
    vocab_size: usize,
    sampler: Sampler,
    rng: CounterRng,
    link: Option<DraftLink>,
    /// Where the use of drafts is left to the worker.
    payoff: Option<Payoff>,
    outbox: Outbox,
    stats: Stats,
    /// The statistics as far as they are in the totals.
    counted: Stats,
    totals: Totals,
    pass: Pass,
    input: Vec<u32>,
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
            counted: stats,
            totals: shared.totals.clone(),
            stats,
            pass: Pass::Prefill,
            input: Vec::new(),
            stale_answers: 0,
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
        self.cached = cached;
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
        // The last token needs no draft: a round could add no more than a dense pass does. Behind a stop token nothing
        // is worth a round before it stands.
        let worth = self.payoff.as_ref().is_none_or(Payoff::wants_drafts);
        if worth && self.spec.limit - self.tokens.len() > 1 && !self.run.is_stopped() {
            if let Some((draft, masked)) = self.next_round() {
                self.begin(draft, masked);
                return Plan::Run;
            }
            let most = self.payoff.as_ref().and_then(Payoff::patience);
            let trust = self.link.as_mut().map(|link| &mut link.trust);
            match trust.map(|trust| trust.patience(now, most)) {
                Some(Patience::Until(deadline)) => return Plan::Wait(Some(deadline)),
                Some(Patience::Over) => {
                    if let Some(payoff) = &mut self.payoff {
                        payoff.waited_in_vain();
                    }
                }
                Some(Patience::Unwarranted) | None => {}
            }
        }
        self.begin(Vec::new(), false);
        Plan::Run
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
    fn begin(&mut self, draft: Vec<DraftToken>, masked: bool) {
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
        let listed = |&list: &u32| lists.lists[list as usize].len();
        let read: usize = lists.of_head.iter().map(listed).sum();
        read as f64 / (lists.of_head.len() * self.tokens.len()).max(1) as f64
    }

    /// Takes the output of the planned forward. Says how the session ended, if it did.
    ///
    /// # Errors
    /// [`EngineError`] when the output cannot be sampled from: the model failed, and so does the session.
    pub(crate) fn settle(&mut self, output: &StepOutput) -> Result<Option<Ending>, EngineError> {
        let pass = std::mem::replace(&mut self.pass, Pass::Prefill);
        match pass {
            Pass::Prefill => {
                self.cached += self.input.len();
                Ok(None)
            }
            Pass::Masked(draft) => self.settle_masked(&draft, output),
            Pass::Dense(draft) => self.settle_dense(&draft, output),
        }
    }

    /// A masked round: what it lets through is provisional in exact mode, committed in sparse mode.
    fn settle_masked(
        &mut self,
        draft: &[DraftToken],
        output: &StepOutput,
    ) -> Result<Option<Ending>, EngineError> {
        self.stats.add_forward(output.kv);
        if let (Some(masses), Some(masks)) = (&output.masses, self.masks()) {
            masks.observe(masses);
        }
        let m = self.tokens.len();
        let provisional = self.oversight.is_provisional();
        let q = self.distributions(output, m, 0)?;
        let candidates: Vec<Candidate<'_>> = draft.iter().map(Candidate::from).collect();
        let rng = if provisional {
            self.rng.provisional(self.epoch)
        } else {
            self.rng
        };
        let outcome = verify_round(&q, &candidates, &rng, m as u64);
        let accepted = outcome.accepted;
        let before = self.origins.len();
        self.tokens.extend_from_slice(&self.input[1..=accepted]);
        self.tokens.push(outcome.next_token);
        let ending = self.cut(m);
        self.origins.resize(before + accepted, Origin::Accepted);
        self.origins.push(Origin::of_drawn(accepted, draft.len()));
        self.origins.truncate(before + self.tokens.len() - m);
        for (index, drawn) in q.iter().enumerate().take(self.tokens.len() - m) {
            let row = index * self.vocab_size..(index + 1) * self.vocab_size;
            let row = output.logits.get(row).unwrap_or_default();
            if let Some(record) = self.oversight.record(drawn, row) {
                self.run.push(record);
            }
        }
        let kept = output.kv.read as f64 / output.kv.dense.max(1) as f64;
        self.oversight.round(kept, accepted + 1);
        self.count_draft(draft.len(), accepted);
        // A round that ended the text is answered by what becomes of the end.
        if ending.is_none() {
            self.tell_verdict(accepted, accepted < draft.len(), outcome.next_token);
        }
        if !provisional {
            self.commit(m, &output.logits)?;
            return Ok(ending);
        }
        if ending == Some(Ending::Stop) {
            self.run.stop();
        }
        self.cached = self.tokens.len() - 1;
        if self.spec.provisional {
            let tokens = &self.tokens[self.committed()..];
            self.outbox.provisional(tokens);
        }
        Ok(None)
    }

    /// A dense pass: it checks the run, confirms or withdraws what is provisional, and judges the draft's tokens.
    fn settle_dense(
        &mut self,
        draft: &[DraftToken],
        output: &StepOutput,
    ) -> Result<Option<Ending>, EngineError> {
        self.stats.add_forward(output.kv);
        if let (Some(masses), Some(masks)) = (&output.masses, self.masks()) {
            masks.observe_dense(masses);
        }
        let (first, n) = (self.dense_until(), self.committed());
        let run = std::mem::take(&mut self.run);
        // Rows before the first uncommitted token have nothing to decide.
        let known = n - first;
        let p = self.distributions(output, first, known)?;
        let mut candidates: Vec<Candidate<'_>> = run.candidates(&self.tokens[n..]).collect();
        let provisional = candidates.len();
        candidates.extend(draft.iter().map(Candidate::from));
        let outcome = verify_round(&p, &candidates, &self.rng, n as u64);
        let accepted = outcome.accepted;
        if !run.is_empty() {
            self.oversight.checked(&run, &p, &output.logits)?;
            self.stats.add_check(output.kv, provisional, accepted);
        }
        self.tokens.truncate(n);
        let proposed = &self.input[1 + known..];
        self.tokens.extend_from_slice(&proposed[..accepted]);
        self.tokens.push(outcome.next_token);
        let ending = self.cut(n);
        // Confirmed ones keep theirs.
        self.origins.truncate(accepted);
        self.origins.resize(accepted, Origin::Accepted);
        self.origins
            .push(Origin::of_drawn(accepted, provisional + draft.len()));
        self.origins.truncate(self.tokens.len() - n);
        self.choose_mask_p();
        if accepted < provisional {
            self.outbox.withdraw(n + accepted);
            self.tell_withdrawn(n + accepted, !draft.is_empty(), ending);
        } else if draft.is_empty() {
            self.stats.solo_forwards += u64::from(run.is_empty());
            self.weigh_drafts(self.tokens.len() - n, false);
            self.tell_of_step(ending);
        } else {
            let accepted = accepted - provisional;
            self.count_draft(draft.len(), accepted);
            self.weigh_drafts(self.tokens.len() - n, true);
            if ending.is_none() {
                self.tell_verdict(accepted, accepted < draft.len(), outcome.next_token);
            }
        }
        let logits = output.logits.get(known * self.vocab_size..);
        self.commit(n, logits.unwrap_or_default())?;
        Ok(ending)
    }

    fn masks(&mut self) -> Option<&mut MaskReader> {
        self.link.as_mut()?.masks.as_mut()
    }

    /// The tokens from index `from` on are committed; `logits` are the rows they were drawn from, where those are asked for.
    fn commit(&mut self, from: usize, logits: &[f32]) -> Result<(), EngineError> {
        self.cached = self.tokens.len() - 1;
        self.stats.completion_tokens += (self.tokens.len() - from) as u64;
        let logprobs = self.logprobs(from, logits)?;
        self.count();
        self.outbox.progress(self.stats);
        let origins = std::mem::take(&mut self.origins);
        self.outbox.commit(&self.tokens[from..], origins, logprobs);
        Ok(())
    }

    /// Adds what is new in the statistics to the totals.
    fn count(&mut self) {
        self.totals.add(&self.counted, &self.stats);
        self.counted = self.stats;
    }

    /// One distribution for each row of a forward from row `skip` on. Row 0 follows the view's first `history` tokens.
    fn distributions(
        &mut self,
        output: &StepOutput,
        history: usize,
        skip: usize,
    ) -> Result<Vec<Distribution>, EngineError> {
        if !output.argmax.is_empty() {
            let rows = output.argmax.iter().skip(skip);
            return rows.map(|&token| self.sampler.greedy(token)).collect();
        }
        let rows = output.logits.chunks_exact(self.vocab_size);
        let rows = rows.enumerate().skip(skip);
        let (prompt, output) = self.tokens[..history].split_at(self.spec.prompt_tokens);
        rows.map(|(row, logits)| {
            let history = History {
                prompt,
                output,
                pending: &self.input[1..=row],
            };
            self.sampler.distribution(logits, history)
        })
        .collect()
    }

    /// A dense forward, a round or a step alone, has committed `tokens` tokens: are drafts worth it?
    fn weigh_drafts(&mut self, tokens: usize, is_round: bool) {
        if let Some(payoff) = &mut self.payoff {
            payoff.committed(tokens, is_round, clock::now());
        }
    }

    fn count_draft(&mut self, proposed: usize, accepted: usize) {
        self.stats.proposed_tokens += proposed as u64;
        self.stats.accepted_tokens += accepted as u64;
    }

    /// Cuts what was added from index `from` on at a stop token or at the limit; says whether the text ends there.
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
        self.outbox.finish(ending, self.stats, failure);
    }
}

#[cfg(test)]
mod distribution_tests;
#[cfg(test)]
mod tests;
