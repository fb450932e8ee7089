//! [`Trust`]: how long a session waits for its draft.
//!
//! A draft earns waiting by proposing. While it is live the session waits up to a timeout for the next proposal; when
//! that passes in vain the session goes on alone, waits again only after another proposal, and after k timeouts in a row
//! lets 2^k tokens (at most 64) pass first. So a slow draft, or one that only sends stale proposals, costs a bounded
//! share of the time.

use std::time::{Duration, Instant};

/// Most solo steps between two waits, as a power of two.
const BACKOFF_BITS_MAX: u32 = 6;

/// What a session does about its draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Wait for a proposal, no longer than until then.
    Until(Instant),
    /// The wait was in vain: go on alone.
    Over,
    /// There is nothing to wait for: go on alone.
    Unwarranted,
}

/// The state of waiting for one draft.
#[derive(Debug, Clone)]
pub(crate) struct Trust {
    timeout: Duration,
    /// A message of a proposal came since the last timeout.
    proposed: bool,
    /// Timeouts since a proposal was last judged.
    timeouts: u32,
    /// Solo steps to take before waiting again.
    solo_first: u32,
    /// When the current wait began.
    waiting_since: Option<Instant>,
}

impl Trust {
    /// A draft that has not proposed yet.
    pub(crate) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            proposed: false,
            timeouts: 0,
            solo_first: 0,
            waiting_since: None,
        }
    }

    /// A proposal or the beginning of one arrived, stale or not: worth waiting for what follows.
    pub(crate) fn proposal_arrived(&mut self) {
        self.proposed = true;
    }

    /// A proposal was judged: the draft keeps up.
    pub(crate) fn judged(&mut self) {
        self.timeouts = 0;
        self.solo_first = 0;
        self.waiting_since = None;
    }

    /// The session took a step alone.
    pub(crate) fn stepped_alone(&mut self) {
        self.solo_first = self.solo_first.saturating_sub(1);
        self.waiting_since = None;
    }

    /// Until when to wait for a proposal; no longer than `most`, where that is known.
    pub(crate) fn patience(&mut self, now: Instant, most: Option<Duration>) -> Patience {
        if !self.proposed || self.solo_first > 0 {
            return Patience::Unwarranted;
        }
        let wait = most.map_or(self.timeout, |most| most.min(self.timeout));
        let deadline = *self.waiting_since.get_or_insert(now) + wait;
        if now < deadline {
            return Patience::Until(deadline);
        }
        self.proposed = false;
        self.timeouts = (self.timeouts + 1).min(BACKOFF_BITS_MAX);
        self.solo_first = 1 << self.timeouts;
        self.waiting_since = None;
        Patience::Over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(10);

    #[test]
    fn only_a_draft_that_proposed_is_waited_for() {
        let mut trust = Trust::new(TIMEOUT);
        let now = Instant::now();
        assert_eq!(trust.patience(now, None), Patience::Unwarranted);
        trust.proposal_arrived();
        assert_eq!(trust.patience(now, None), Patience::Until(now + TIMEOUT));
        // Asking again, or a stale proposal, does not lengthen the wait.
        trust.proposal_arrived();
        let later = now + TIMEOUT / 2;
        assert_eq!(trust.patience(later, None), Patience::Until(now + TIMEOUT));
        // A judged proposal begins a new one.
        trust.judged();
        assert_eq!(
            trust.patience(later, None),
            Patience::Until(later + TIMEOUT)
        );
    }

    #[test]
    fn timeouts_back_off_up_to_sixty_four_steps() {
        let mut trust = Trust::new(TIMEOUT);
        let mut now = Instant::now();
        let mut steps = Vec::new();
        for _ in 0..8 {
            trust.proposal_arrived();
            assert_eq!(trust.patience(now, None), Patience::Until(now + TIMEOUT));
            now += TIMEOUT;
            assert_eq!(trust.patience(now, None), Patience::Over);
            trust.proposal_arrived();
            let mut alone = 0;
            while trust.patience(now, None) == Patience::Unwarranted {
                trust.stepped_alone();
                alone += 1;
            }
            steps.push(alone);
            trust.stepped_alone();
        }
        assert_eq!(steps, [2, 4, 8, 16, 32, 64, 64, 64]);
        trust.judged();
        trust.patience(now, None);
        assert_eq!(trust.patience(now + TIMEOUT, None), Patience::Over);
        assert_eq!(trust.solo_first, 2);
    }

    #[test]
    fn a_silent_draft_is_not_waited_for_again() {
        let mut trust = Trust::new(TIMEOUT);
        let now = Instant::now();
        trust.proposal_arrived();
        trust.patience(now, None);
        assert_eq!(trust.patience(now + TIMEOUT, None), Patience::Over);
        for _ in 0..1_000 {
            trust.stepped_alone();
            let patience = trust.patience(now + TIMEOUT, None);
            assert_eq!(patience, Patience::Unwarranted);
        }
    }

    #[test]
    fn no_wait_is_longer_than_is_worth_it() {
        let mut trust = Trust::new(TIMEOUT);
        let (now, most) = (Instant::now(), TIMEOUT / 5);
        trust.proposal_arrived();
        let patience = trust.patience(now, Some(most));
        assert_eq!(patience, Patience::Until(now + most));
        assert_eq!(trust.patience(now + most, Some(most)), Patience::Over);
        trust.judged();
        trust.proposal_arrived();
        let patience = trust.patience(now, Some(2 * TIMEOUT));
        assert_eq!(patience, Patience::Until(now + TIMEOUT));
    }
}
