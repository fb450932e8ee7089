//! [`Waiting`]: a draft's whole rounds that wait for judgement.
//!
//! Rounds come in one of two kinds. In order, each is for the session as the draft knew it, and the first one is judged or
//! answered before the next. Ahead, each is for something that the session may come to: the one that fits is taken, and what
//! the session has passed is dropped. A draft changes from one kind to the other; what it sent before is worth nothing then.

use std::collections::VecDeque;

use specattn_proto::{Fault, limits};

use crate::draft_link::Proposal;

/// Rounds in order that may wait: a draft that runs ahead has up to three out.
pub(crate) const MOST_IN_ORDER: usize = 4;

/// Rounds ahead that may wait: beyond them the oldest is dropped. A draft holds 24, and has just given some up.
const MOST_AHEAD: usize = 32;

/// Entries of their tokens' distributions: what rounds in order may come to.
const MOST_ENTRIES: usize =
    MOST_IN_ORDER * limits::MAX_DRAFT_LENGTH as usize * limits::MAX_Q_ENTRIES;

/// Whom a round is for: see the .proto file's `Pacing`.
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

impl Standing<'_> {
    /// Whether a round builds on exactly this.
    pub(crate) fn fits(&self, round: &Proposal) -> bool {
        round.epoch == self.epoch
            && round.base == self.tokens.len() as u64
            && self.tokens.last() == Some(&round.pending_token)
            && self.tokens.ends_with(&round.assumed)
    }

    /// Whether it may come to what a round builds on.
    fn may_fit(&self, round: &Proposal) -> bool {
        round.base > self.tokens.len() as u64 || self.fits(round)
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
            let mut entries: usize = self.rounds.iter().map(entries).sum();
            entries += self::entries(&round);
            while self.rounds.len() >= MOST_AHEAD || entries > MOST_ENTRIES {
                let Some(oldest) = self.rounds.pop_front() else {
                    break;
                };
                entries -= self::entries(&oldest);
            }
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

    /// Takes the one that fits, and drops what the session has passed.
    pub(crate) fn take_fitting(&mut self, standing: Standing<'_>) -> Option<Proposal> {
        self.rounds.retain(|round| standing.may_fit(round));
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
    fn a_flood_of_rounds_takes_the_place_of_the_oldest() {
        let waiting = ahead((0..100).map(|last| round(0, &[1, last], 1)));
        assert_eq!(waiting.rounds.len(), MOST_AHEAD);
        assert_eq!(waiting.rounds[0].pending_token, 100 - MOST_AHEAD as u32);
        // Nor do large ones hold more than rounds in order may.
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
        assert_eq!(ahead((0..10).map(large)).rounds.len(), MOST_IN_ORDER);
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
