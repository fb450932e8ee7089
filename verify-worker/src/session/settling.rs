//! What a forward's output comes to: tokens kept, withdrawn and committed, and how the session ends.

use specattn_engine::sampling::{
    Candidate, Distribution, DraftToken, History, TokenLogprobs, token_logprobs, verify_round,
};
use specattn_engine::{EngineError, StepOutput};
use specattn_worker::{clock, usual_time};

use super::{Pass, Session};
use crate::events::Ending;
use crate::masks::MaskReader;
use crate::origin::Origin;
use crate::waiting::Pacing;

impl Session {
    /// Takes the output of the planned forward. Says how the session ended, if it did.
    ///
    /// # Errors
    /// [`EngineError`] when the output cannot be sampled from: the model failed, and so does the session.
    pub(crate) fn settle(&mut self, output: &StepOutput) -> Result<Option<Ending>, EngineError> {
        if let Some(began) = self.began.take() {
            let took = clock::now().saturating_duration_since(began);
            self.forward = usual_time(self.forward, took);
        }
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
        let outcome = verify_round(&q, &candidates, &rng, &self.tokens[..m]);
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
            self.tell_verdict(accepted, accepted < draft.len());
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
        let outcome = verify_round(&p, &candidates, &self.rng, &self.tokens[..n]);
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
            // Where the draft does not ask to be waited for, steps alone are part of decoding with it.
            let keeps_up = self.link.as_ref().is_some_and(|link| link.trust.keeps_up());
            let drafted = self.pacing() == Pacing::Unawaited && keeps_up && self.wants_round();
            self.weigh_drafts(self.tokens.len() - n, drafted);
            self.tell_of_step(ending);
        } else {
            let accepted = accepted - provisional;
            self.count_draft(draft.len(), accepted);
            self.weigh_drafts(self.tokens.len() - n, true);
            if ending.is_none() {
                self.tell_verdict(accepted, accepted < draft.len());
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
        self.trace.committed();
        self.outbox.progress(self.stats);
        let origins = std::mem::take(&mut self.origins);
        self.outbox.commit(&self.tokens[from..], origins, logprobs);
        Ok(())
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
}
