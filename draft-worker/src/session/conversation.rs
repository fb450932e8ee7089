//! What the verify worker says and what a session makes of it: the welcome, verdicts, progress made alone.

use std::sync::Arc;

use specattn_engine::sampling::{CounterRng, DraftToken, Sampler};
use specattn_proto::Fault;
use specattn_worker::{Readiness, clock};

use super::{Joined, Session, Verdict, Welcome};
use crate::acceptance::{Acceptance, doubt};
use crate::args::LookaheadMode;
use crate::capturing::Capturing;
use crate::lookahead::{Lookahead, Way};
use crate::prospects::Prospects;
use crate::round_length::RoundLength;

impl Session {
    /// The verify worker welcomed the draft.
    ///
    /// # Errors
    /// [`Fault::FailedPrecondition`] for a welcome that makes no sense: the draft must leave.
    pub(crate) fn join(&mut self, welcome: Welcome) -> Result<(), Fault> {
        let tokens = self.tokens.len() + welcome.tokens.len();
        if self.joined.is_some() || !(1..=tokens).contains(&welcome.prompt_tokens) {
            return Err(broken("welcome"));
        }
        self.learn(self.tokens.len(), &welcome.tokens)?;
        let rng = CounterRng::for_draft(welcome.sampling.seed);
        let draft_length = welcome.draft_length.min(self.spec.draft_length);
        let own = self.spec.drafting.own;
        let capturing = Capturing::new(own, welcome.policy, welcome.sources, self.shape);
        let ways: &[Way] = if capturing.makes_masks() {
            &[Way::Waiting, Way::Ahead]
        } else {
            &[Way::Waiting, Way::Ahead, Way::Unawaited]
        };
        self.joined = Some(Joined {
            epoch: welcome.epoch,
            prompt_tokens: welcome.prompt_tokens,
            draft_length,
            acceptance: Acceptance::default(),
            length: welcome.may_shorten.then(|| RoundLength::new(draft_length)),
            lookahead: match self.spec.drafting.lookahead {
                LookaheadMode::Auto => Lookahead::measured(Arc::clone(&self.findings), ways),
                LookaheadMode::On => Lookahead::fixed(Way::Ahead),
                LookaheadMode::Unawaited => Lookahead::fixed(Way::Unawaited),
                LookaheadMode::Off => Lookahead::fixed(Way::Waiting),
            },
            explorer: None,
            last_verdict: None,
            sampler: Sampler::new(welcome.sampling, self.shape.vocab_size)
                .map_err(|error| Fault::FailedPrecondition(error.to_string()))?,
            rng,
            capturing,
            prefill: self.tokens.len(),
            sequence: 0,
            sent: 0,
            mask_sent: false,
            waiting: false,
            announces: true,
        });
        self.take_way();
        Ok(())
    }

    /// Takes a verdict: rolls back what was not accepted and appends what was committed.
    ///
    /// # Errors
    /// [`Fault::FailedPrecondition`] for a verdict that answers nothing: the draft must leave.
    pub(crate) fn judge(&mut self, verdict: Verdict) -> Result<(), Fault> {
        let joined = self.joined.as_mut().ok_or_else(|| broken("verdict"))?;
        if verdict.need_full_mask {
            joined.capturing.forget_base();
        }
        if let Some(p) = verdict.mask_p {
            joined.capturing.set_mass(p);
        }
        if verdict.judged {
            self.judged(verdict)
        } else {
            self.told(&verdict)
        }
    }

    /// The answer to the oldest round that is out or, where rounds for several outcomes are, to the one that came true.
    fn judged(&mut self, verdict: Verdict) -> Result<(), Fault> {
        let n = self.tokens.len();
        let joined = self.joined.as_mut().ok_or_else(|| broken("verdict"))?;
        let (base, round): (usize, &[DraftToken]) = match (&self.prospects, self.guesses.front()) {
            (Some(prospects), _) => (n, prospects.judged()),
            (None, Some(guess)) => (guess.base, &guess.round),
            (None, None) if joined.waiting => (n, &self.draft),
            (None, None) => (n, &[]),
        };
        let (proposed, accepted) = (round.len(), verdict.accepted);
        let tells_all = verdict.next_tokens.len() == accepted + 1
            && (accepted > 0 || proposed == 0 || self.prospects.is_some());
        let held = round.get(..accepted).filter(|_| proposed > 0);
        let mut own = held.map(|held| held.iter().map(|d| d.token).collect::<Vec<u32>>());
        let new = if tells_all {
            // A round that was given up here may have come true all the same.
            own.take_if(|own| !verdict.next_tokens.starts_with(own));
            verdict.next_tokens
        } else {
            let own = own.clone().ok_or_else(|| broken("verdict"))?;
            [own, verdict.next_tokens].concat()
        };
        if verdict.base != base as u64 {
            return Err(broken("verdict"));
        }
        if own.is_some() {
            let now = clock::now();
            match &self.prospects {
                Some(prospects) => joined.acceptance.count(prospects.judged_doubts(), accepted),
                None => {
                    let doubts: Vec<Option<f64>> = round.iter().map(doubt).collect();
                    joined.acceptance.count(&doubts, accepted);
                }
            }
            let acceptance = joined.acceptance.probability();
            let way = joined.lookahead.way();
            let last = joined.last_verdict.replace(now);
            if let Some(length) = &mut joined.length {
                let took = last.map(|last| now.saturating_duration_since(last));
                length.judged(way, proposed, took, acceptance);
            }
            joined.lookahead.judged(proposed, acceptance, now);
            // The next verdict may answer a round of before.
            joined
                .last_verdict
                .take_if(|_| joined.lookahead.way() != way);
        } else {
            joined.lookahead.interrupted();
            joined.last_verdict = None;
        }
        if self.prospects.is_some() {
            self.advance(n, &new, verdict.epoch)?;
            self.take_way();
            return Ok(());
        }
        let as_guessed = !self.guesses.is_empty()
            && verdict.epoch == joined.epoch
            && self.tokens[base..].get(..=proposed) == Some(&new[..]);
        if as_guessed {
            self.guesses.pop_front();
            return Ok(());
        }
        joined.settle(verdict.epoch, false);
        self.learn(base, &new)?;
        self.take_way();
        Ok(())
    }

    /// Progress that the target made alone, tokens that it withdrew, or the answer to a round that was stale.
    fn told(&mut self, verdict: &Verdict) -> Result<(), Fault> {
        let known = self
            .guesses
            .front()
            .map_or(self.tokens.len(), |guess| guess.base);
        let base = usize::try_from(verdict.base).unwrap_or(usize::MAX);
        let held = self.tokens[..known]
            .get(base..)
            .ok_or_else(|| broken("verdict"))?;
        let same = held
            .iter()
            .zip(&verdict.next_tokens)
            .take_while(|(held, told)| held == told)
            .count();
        let joined = self.joined.as_mut().ok_or_else(|| broken("verdict"))?;
        if base + same < joined.prompt_tokens {
            return Err(broken("verdict"));
        }
        let is_news = base + same < known || verdict.next_tokens.len() > same;
        if !is_news && verdict.epoch == joined.epoch {
            // An answer to a proposal that was given up already.
            return Ok(());
        }
        joined.last_verdict = None;
        joined.settle(verdict.epoch, true);
        let (from, new) = (base + same, &verdict.next_tokens[same..]);
        if self.prospects.is_none() {
            joined.lookahead.interrupted();
            return self.learn(from, new);
        }
        if joined.is_unawaited() && from == known && new.len() == 1 {
            // A step alone, as was expected.
            let acceptance = joined.acceptance.probability();
            joined.lookahead.judged(0, acceptance, clock::now());
        } else {
            joined.lookahead.interrupted();
        }
        self.advance(from, new, verdict.epoch)?;
        self.take_way();
        Ok(())
    }

    /// How it stands to a batch that may wait: a round that begins may begin together with those of others, unless the verify worker
    /// goes on alone meanwhile.
    pub(crate) fn readiness(&self) -> Readiness {
        let announces = self.joined.as_ref().is_some_and(|joined| joined.announces);
        if self.prospects.is_some() {
            if self.has_work_ahead() {
                Readiness::Alone
            } else if !self.drafts() {
                Readiness::Idle
            } else {
                Readiness::Expected
            }
        } else if self.is_waiting() {
            if self.may_guess() {
                Readiness::Alone
            } else {
                Readiness::Expected
            }
        } else if !self.drafts() {
            Readiness::Idle
        } else if self.draft.is_empty() && !announces {
            Readiness::Ready
        } else {
            Readiness::Alone
        }
    }

    /// The text from index `from` on: tokens, then this round's draft or that of what is explored.
    pub(super) fn text_from(&self, from: usize) -> impl Iterator<Item = u32> {
        let draft = self.draft.iter().map(|d| d.token);
        let ahead = self.prospects.iter().flat_map(Prospects::text);
        self.tokens[from..]
            .iter()
            .copied()
            .chain(draft)
            .chain(ahead)
    }

    /// Puts what is known in place of the text from index `from` on, and ends the round. KV entries stay for what turned out
    /// right.
    pub(super) fn learn(&mut self, from: usize, new: &[u32]) -> Result<(), Fault> {
        if new
            .iter()
            .any(|&token| token as usize >= self.shape.vocab_size)
        {
            return Err(broken("token"));
        }
        let pairs = self.text_from(from).zip(new);
        let right = pairs.take_while(|(held, token)| held == *token).count();
        self.cached = self.cached.min(from + right);
        self.draft.clear();
        self.guesses.clear();
        self.prompt_end = self.prompt_end.min(from);
        self.tokens.truncate(from);
        self.tokens.extend_from_slice(new);
        // A step needs at least one token to feed: the pending one.
        self.cached = self.cached.min(self.tokens.len() - 1);
        if self.tokens.len() > self.spec.capacity {
            return Err(Fault::exhausted("the session outgrew the draft's context"));
        }
        Ok(())
    }
}

impl Joined {
    /// Draft tokens that a round is to have, as long as the session has room for it.
    pub(super) fn wanted_length(&self) -> usize {
        self.length.as_ref().map_or(self.draft_length, |length| {
            length.next(self.lookahead.way(), self.acceptance.probability())
        })
    }

    /// Whether the step is a guess of a verdict that can read less than everything.
    pub(super) fn guesses_sparsely(&self) -> bool {
        self.waiting && self.capturing.has_selection()
    }

    /// Whatever was drafted is settled. `alone`: the verify worker went on alone.
    fn settle(&mut self, epoch: u64, alone: bool) {
        self.epoch = epoch;
        self.announces = alone;
        self.begin_round();
    }

    /// Nothing of the next round was sent yet.
    pub(super) fn begin_round(&mut self) {
        self.sent = 0;
        self.mask_sent = false;
        self.waiting = false;
    }
}

fn broken(what: &str) -> Fault {
    Fault::FailedPrecondition(format!(
        "the verify worker sent a {what} that makes no sense"
    ))
}
