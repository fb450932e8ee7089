//! [`Waiting`]: a draft's whole rounds that wait for judgement.
//!
//! Rounds come in one of two kinds. In order, each is for the session as the draft knew it, and the first one is judged or
//! answered before the next. Ahead, each is for something that the session may come to: the one that fits is taken, and what
//! can fit no more is dropped. A draft changes from one kind to the other; what it sent before is worth nothing then.

use std::collections::VecDeque;

use specattn_proto::{Fault, limits};

use crate::draft_link::Proposal;

/// Rounds in order that may wait: a draft that runs ahead has up to three out.
pub(crate) const MOST_IN_ORDER: usize = 4;

/// Rounds ahead that may wait: beyond them the farthest ahead is dropped. A draft holds 48, and may have given some up of
/// which that is not known here yet.
const MOST_AHEAD: usize = 64;

/// What a round is for: see the .proto file's `Pacing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Pacing {
    /// The session as it stands.
    #[default]
    InOrder,
    /// What it may come to.
    Ahead,
    /// The same, and the target need not wait for a round that fits.
    Unawaited,
}

/// A session as far as a round must fit it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing<'a> {
    pub(crate) epoch: u64,
    pub(crate) tokens: &'a [u32],
}

impl<'a> Standing<'a> {
    /// That of a session at `epoch` with these tokens.
    pub(crate) fn of(epoch: u64, tokens: &'a [u32]) -> Self {
        Self { epoch, tokens }
    }

    /// Whether a round builds on exactly this.
    pub(crate) fn fits(&self, round: &Proposal) -> bool {
        round.epoch == self.epoch
            && round.base == self.tokens.len() as u64
            && self.tokens.last() == Some(&round.pending_token)
            && self.tokens.ends_with(&round.assumed)
    }

    /// Whether it may come to what a round builds on.
    fn may_fit(&self, round: &Proposal) -> bool {
        let ahead = round.base.checked_sub(self.tokens.len() as u64);
        match ahead.and_then(|ahead| usize::try_from(ahead).ok()) {
            None => false,
            Some(0) => self.fits(round),
            // What it assumes of tokens that stand by now must be so.
            Some(ahead) => {
                let held = round.assumed.len().saturating_sub(ahead);
                round.epoch >= self.epoch && self.tokens.ends_with(&round.assumed[..held])
            }
        }
    }
}

/// The rounds of one draft.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// In the order of arrival.
    rounds: VecDeque<Proposal>,
    pacing: Pacing,
}

impl Waiting {
    /// The kind of those that wait, or come.
    pub(crate) fn pacing(&self) -> Pacing {
        self.pacing
    }

    /// A message of a round of this kind arrived.
    pub(crate) fn heard(&mut self, pacing: Pacing) {
        let in_order = |pacing| pacing == Pacing::InOrder;
        if in_order(pacing) != in_order(self.pacing) {
            self.rounds.clear();
        }
        self.pacing = pacing;
    }

    /// Takes a whole round, of the kind heard of last.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] for too many in order.
    pub(crate) fn push(&mut self, round: Proposal) -> Result<(), Fault> {
        if self.pacing == Pacing::InOrder {
            if self.rounds.len() == MOST_IN_ORDER {
                return Err(Fault::exhausted("too many proposals at a time"));
            }
        } else {
            self.rounds.push_back(round);
            let mut entries: usize = self.rounds.iter().map(entries).sum();
            while self.rounds.len() > MOST_AHEAD || entries > limits::MAX_ENTRIES_AHEAD {
                let rounds = self.rounds.iter().enumerate();
                let Some((farthest, _)) = rounds.max_by_key(|(_, round)| round.base) else {
                    break;
                };
                if let Some(dropped) = self.rounds.remove(farthest) {
                    entries -= self::entries(&dropped);
                }
            }
            return Ok(());
        }
        self.rounds.push_back(round);
        Ok(())
    }

    /// The one that came first.
    pub(crate) fn first(&self) -> Option<&Proposal> {
        self.rounds.front()
    }

    /// Takes that one.
    pub(crate) fn pop(&mut self) -> Option<Proposal> {
        self.rounds.pop_front()
    }

    /// Whether the draft has gone back behind the first one since: it had guessed another verdict.
    pub(crate) fn first_is_superseded(&self) -> bool {
        let mut rounds = self.rounds.iter();
        let first = rounds.next();
        first.is_some_and(|first| rounds.any(|later| later.base <= first.base))
    }

    /// Whether one that came ahead fits the session as it stands.
    pub(crate) fn has_fitting(&self, standing: Standing<'_>) -> bool {
        self.rounds.iter().any(|round| standing.fits(round))
    }

    /// Drops those ahead that can fit no more.
    pub(crate) fn forget_passed(&mut self, standing: Standing<'_>) {
        self.rounds.retain(|round| standing.may_fit(round));
    }

    /// Takes the one that fits, and drops those that can fit no more.
    pub(crate) fn take_fitting(&mut self, standing: Standing<'_>) -> Option<Proposal> {
        self.forget_passed(standing);
        let at = self.rounds.iter().position(|round| standing.fits(round))?;
        self.rounds.remove(at)
    }
}

/// Entries of a round's distributions.
fn entries(round: &Proposal) -> usize {
    let q = round.draft.iter().filter_map(|token| token.q.as_ref());
    q.map(|q| q.ids.len()).sum()
}

#[cfg(test)]
mod tests {
    use specattn_engine::sampling::{DraftToken, SparseDistribution};

    use super::*;

    /// A round for a session of these tokens, the last `assumed` of them not told.
    fn round(epoch: u64, tokens: &[u32], assumed: usize) -> Proposal {
        Proposal {
            epoch,
            base: tokens.len() as u64,
            pending_token: *tokens.last().unwrap(),
            assumed: tokens[tokens.len() - assumed..].to_vec(),
            draft: Vec::new(),
            mask: Vec::new(),
        }
    }

    fn ahead(rounds: impl IntoIterator<Item = Proposal>) -> Waiting {
        let mut waiting = Waiting::default();
        waiting.heard(Pacing::Unawaited);
        rounds
            .into_iter()
            .for_each(|round| waiting.push(round).unwrap());
        waiting
    }

    #[test]
    fn the_round_that_fits_is_taken_and_what_was_passed_dropped() {
        let mut waiting = ahead([
            round(1, &[1, 2, 9], 1),
            round(1, &[1, 2, 3], 1),
            round(0, &[1, 2, 4], 1),
            round(2, &[1, 2, 3, 4], 2),
        ]);
        let at = |epoch, tokens| Standing { epoch, tokens };
        assert!(!waiting.has_fitting(at(0, &[1, 2])));
        assert!(!waiting.has_fitting(at(1, &[1, 2, 4])));
        assert!(waiting.has_fitting(at(1, &[1, 2, 3])));
        let taken = waiting.take_fitting(at(1, &[1, 2, 3]));
        assert_eq!(taken, Some(round(1, &[1, 2, 3], 1)));
        assert_eq!(waiting.rounds, [round(2, &[1, 2, 3, 4], 2)]);
        assert_eq!(waiting.take_fitting(at(2, &[1, 2, 5, 4])), None);
        assert!(waiting.rounds.is_empty());
    }

    #[test]
    fn of_a_flood_of_rounds_those_that_may_fit_next_stay() {
        let far = (0..90).map(|last| round(0, &[1, 2, last], 1));
        let near = (0..20).map(|last| round(0, &[1, last], 1));
        let waiting = ahead(far.chain(near));
        assert_eq!(waiting.rounds.len(), MOST_AHEAD);
        let stay = waiting.rounds.iter().filter(|round| round.base == 2);
        assert_eq!(stay.count(), 20);
        // Nor is there room for many large ones.
        let large = |last| {
            let q = SparseDistribution {
                ids: vec![0; limits::MAX_Q_ENTRIES],
                probs: vec![0.0; limits::MAX_Q_ENTRIES],
            };
            let token = DraftToken {
                token: 0,
                q: Some(q),
            };
            Proposal {
                draft: vec![token; limits::MAX_DRAFT_LENGTH as usize],
                ..round(0, &[1, last], 1)
            }
        };
        let large_round = limits::MAX_DRAFT_LENGTH as usize * limits::MAX_Q_ENTRIES;
        let stay = ahead((0..20).map(large)).rounds.len();
        assert_eq!(stay, limits::MAX_ENTRIES_AHEAD / large_round);
    }

    #[test]
    fn what_builds_on_something_else_than_what_stands_is_dropped() {
        let mut waiting = ahead([
            round(3, &[1, 2, 3, 4], 3),
            round(3, &[1, 2, 9, 4], 3),
            round(1, &[1, 2, 3, 5], 2),
            round(3, &[1, 7, 3, 4, 5], 1),
        ]);
        waiting.forget_passed(Standing::of(2, &[1, 2, 3]));
        let left: Vec<u64> = waiting.rounds.iter().map(|round| round.base).collect();
        assert_eq!(left, [4, 5]);
    }

    #[test]
    fn a_change_of_kind_forgets_what_came_before() {
        let mut waiting = ahead([round(0, &[1, 2], 1)]);
        waiting.heard(Pacing::Ahead);
        assert!(waiting.first().is_some());
        waiting.heard(Pacing::InOrder);
        assert!(waiting.first().is_none());
        for _ in 0..MOST_IN_ORDER {
            waiting.push(round(0, &[1], 0)).unwrap();
        }
        assert!(waiting.push(round(0, &[1], 0)).is_err());
    }
}
