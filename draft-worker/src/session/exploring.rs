//! Running ahead without masks: forwards for the session's [`Prospects`], and what the verify worker's word makes of them.

use std::sync::Arc;

use specattn_engine::StepOutput;
use specattn_proto::{Fault, limits};
use specattn_worker::Plan;

use super::{Ahead, Joined, Pass, Proposal, Session};
use crate::acceptance::{Acceptance, doubt};
use crate::guesses::{Guess, beside, by_noise};
use crate::lookahead::{Explorer, Way};
use crate::prospects::{Advanced, Odds, Prospects};
use crate::service::PROPOSALS;

impl Session {
    /// Plans a forward for what is worth most.
    pub(super) fn plan_ahead(&mut self) -> Plan {
        let Some(mut prospects) = self.prospects.take() else {
            return Plan::Wait(None);
        };
        let before: Vec<u32> = prospects.text().collect();
        let n = self.tokens.len();
        let room = |beyond: usize| self.room(n + beyond);
        let runs = self.may_run(&prospects) && prospects.choose(self.odds(), &room);
        let text: Vec<u32> = prospects.text().collect();
        let drafts = prospects.drafts();
        let (step, length) = prospects.progress();
        self.prospects = Some(prospects);
        if !runs {
            return Plan::Wait(None);
        }
        // KV entries stay for what the text before has in common with this one.
        let common = before.iter().zip(&text).take_while(|(a, b)| a == b).count();
        self.cached = self.cached.min(n + common).min(n + text.len() - 1);
        if self.cached < n {
            self.input.extend_from_slice(&self.tokens[self.cached..]);
        }
        let fed = self.cached.saturating_sub(n);
        self.input.extend_from_slice(&text[fed..]);
        let Some(joined) = &mut self.joined else {
            return Plan::Wait(None);
        };
        if drafts && step == 0 {
            joined.capturing.begin(n + text.len() - 1);
        }
        let only_looks = !drafts && joined.capturing.has_selection();
        self.pass = if only_looks || !joined.capturing.captures(step, length) {
            joined.capturing.fit(self.cached);
            Pass::Sparse
        } else {
            Pass::Dense
        };
        Plan::Run
    }

    /// Takes the output of that forward.
    pub(super) fn settle_ahead(&mut self, output: &StepOutput) -> Result<(), Fault> {
        let odds = self.odds();
        let (Some(joined), Some(prospects)) = (&mut self.joined, &mut self.prospects) else {
            return Err(Fault::Internal("a draft step ahead of nothing".to_owned()));
        };
        let pending: Vec<u32> = prospects.text().collect();
        let distribution = joined.distribution(&self.tokens, &pending, output)?;
        let stepped = joined.capturing.stepped(output);
        stepped.map_err(|error| Fault::Internal(error.to_string()))?;
        let (tail, _) = pending.split_at(pending.len() - prospects.progress().0);
        let before = self.tokens.iter().chain(tail).copied();
        let position = self.tokens.len() + pending.len();
        let entries = prospects.entries(self.spec.drafting.max_q_entries);
        let place = (position, entries);
        let next = joined.draw(&distribution, prospects.epoch(), before, place);
        let (guesses, doubt) = match &next.q {
            Some(_) => {
                let text = self.tokens.iter().chain(&pending).copied();
                let noise = joined.rng.behind(text).noise(position as u64);
                let guesses = by_noise(&distribution, &noise, next.token);
                (guesses, doubt(&next))
            }
            // As often as the draft's tokens are accepted, and what else it may be is not known.
            None if output.logits.is_empty() || joined.sampler.params().adjusts_logits() => {
                let usual = odds.acceptance.probability();
                (vec![Guess::only(next.token, usual)], None)
            }
            None => {
                let (guesses, doubt) = beside(next.token, &output.logits, odds.acceptance)?;
                (guesses, Some(doubt))
            }
        };
        prospects.look(guesses.into_iter());
        if !prospects.drafts() {
            return Ok(());
        }
        let epoch = prospects.epoch();
        // The target is to hear early that a round is coming for which it should wait; it is sent anew when it is whole.
        let announces = joined.announces && prospects.is_awaited() && prospects.progress().0 == 0;
        let announced = next.clone();
        let (tail, round, last) = match prospects.draw(next, doubt) {
            Some((tail, round)) => (tail.to_vec(), round.to_vec(), true),
            None if announces => (Vec::new(), vec![announced], false),
            None => return Ok(()),
        };
        joined.announces = false;
        joined.sequence += 1;
        let known = self.tokens.last().copied().unwrap_or_default();
        let proposal = Proposal {
            epoch,
            base: self.tokens.len() + tail.len(),
            sequence: joined.sequence,
            pending_token: tail.last().copied().unwrap_or(known),
            offset: 0,
            draft: round,
            mask: None,
            last,
            ahead: Some(Ahead {
                assumed: tail,
                unawaited: joined.lookahead.way() == Way::Unawaited,
            }),
            kv: std::mem::take(&mut self.kv),
        };
        self.send(proposal)
    }

    /// Whether there is something to do ahead of the verify worker's next word.
    pub(super) fn has_work_ahead(&self) -> bool {
        let n = self.tokens.len();
        let prospects = self.prospects.as_ref();
        prospects.is_some_and(|prospects| {
            self.may_run(prospects)
                && prospects.has_work(self.odds(), &|beyond| self.room(n + beyond))
        })
    }

    /// Whether what comes of a forward could be sent. What is explored leaves room for the round that the target may be
    /// waiting for.
    fn may_run(&self, prospects: &Prospects) -> bool {
        let free = self.proposals.capacity();
        free > PROPOSALS / 2 || (free > 0 && prospects.is_awaited())
    }

    /// The text from index `from` on is `new`, and the session at `epoch`: what was drafted for that stays.
    pub(super) fn advance(&mut self, from: usize, new: &[u32], epoch: u64) -> Result<(), Fault> {
        let (held, cached) = (self.tokens.len(), self.cached);
        self.learn(from, new)?;
        let unawaited = self.joined.as_ref().is_some_and(Joined::is_unawaited);
        if let Some(joined) = &mut self.joined {
            joined.epoch = epoch;
        }
        let prospects = self.prospects.as_mut().filter(|_| from == held);
        match prospects.map(|prospects| prospects.advance(new, epoch, unawaited)) {
            Some(Advanced::Kept) => self.cached = cached,
            Some(Advanced::Moved) => {}
            Some(Advanced::Lost) | None => {
                let length = self.round_length();
                self.prospects = Some(Prospects::new(epoch, length, unawaited));
            }
        }
        Ok(())
    }

    /// Begins or ends running ahead without masks, where that was decided. No round is begun or out that is not among prospects.
    pub(super) fn take_way(&mut self) {
        let length = self.round_length();
        let Some(joined) = self.joined.as_mut().filter(|j| !j.capturing.makes_masks()) else {
            return;
        };
        match (self.prospects.take(), joined.lookahead.way()) {
            (None, Way::Waiting) => {}
            (Some(prospects), Way::Waiting) => {
                // What was fed may be another prospect's.
                self.cached = self.cached.min(self.tokens.len() - 1);
                joined.explorer = None;
                self.draft = prospects.into_judged();
                joined.begin_round();
                joined.sent = self.draft.len();
                joined.waiting = !self.draft.is_empty();
            }
            (None, Way::Ahead | Way::Unawaited) => {
                joined.explorer = Some(Explorer::new(Arc::clone(&self.findings)));
                let unawaited = joined.is_unawaited();
                self.prospects = Some(Prospects::new(joined.epoch, length, unawaited));
            }
            (held, Way::Ahead | Way::Unawaited) => self.prospects = held,
        }
    }

    /// What guesses are judged by.
    fn odds(&self) -> Odds {
        let joined = self.joined.as_ref();
        let explorer = joined.and_then(|joined| joined.explorer.as_ref());
        Odds {
            acceptance: joined.map_or(Acceptance::default(), |joined| joined.acceptance),
            explorers: explorer.map_or(1, Explorer::all),
            most_tokens: match joined {
                Some(joined) if joined.sampler.params().is_greedy() => usize::MAX,
                _ => limits::MAX_ENTRIES_AHEAD / self.spec.drafting.max_q_entries.max(1),
            },
        }
    }
}

impl Joined {
    /// Whether the target is not to wait for rounds.
    pub(super) fn is_unawaited(&self) -> bool {
        self.lookahead.way() == Way::Unawaited
    }
}
