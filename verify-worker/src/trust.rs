//! [`Trust`]: how long a session waits for its draft.
//!
//! A draft earns waiting by proposing. While it is live the session waits up to a timeout for the next proposal; when
//! that passes in vain the session goes on alone, waits again only after another proposal, and after k timeouts in a row
//! lets 2^k tokens (at most 64) pass first. So a slow draft, or one that only sends stale proposals, costs a bounded
//! share of the time.

use std::time::{Duration, Instant};

/// Most solo steps between two waits, as a power of two.
const BACKOFF_BITS_MAX: u32 = 6;

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

    /// Until when to wait for a proposal, or `None` to go on alone now.
    pub(crate) fn deadline(&mut self, now: Instant) -> Option<Instant> {
        if !self.proposed || self.solo_first > 0 {
            return None;
        }
        let deadline = *self.waiting_since.get_or_insert(now) + self.timeout;
        if now < deadline {
            return Some(deadline);
        }
        self.proposed = false;
        self.timeouts = (self.timeouts + 1).min(BACKOFF_BITS_MAX);
        self.solo_first = 1 << self.timeouts;
        self.waiting_since = None;
        None
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
        assert_eq!(trust.deadline(now), None);
        trust.proposal_arrived();
        assert_eq!(trust.deadline(now), Some(now + TIMEOUT));
        // Asking again, or a stale proposal, does not lengthen the wait.
        trust.proposal_arrived();
        let later = now + TIMEOUT / 2;
        assert_eq!(trust.deadline(later), Some(now + TIMEOUT));
        // A judged proposal begins a new one.
        trust.judged();
        assert_eq!(trust.deadline(later), Some(later + TIMEOUT));
    }

    #[test]
    fn timeouts_back_off_up_to_sixty_four_steps() {
        let mut trust = Trust::new(TIMEOUT);
        let mut now = Instant::now();
        let mut steps = Vec::new();
        for _ in 0..8 {
            trust.proposal_arrived();
            assert!(trust.deadline(now).is_some());
            now += TIMEOUT;
            assert_eq!(trust.deadline(now), None);
            trust.proposal_arrived();
            let mut alone = 0;
            while trust.deadline(now).is_none() {
                trust.stepped_alone();
                alone += 1;
            }
            steps.push(alone);
            trust.stepped_alone();
        }
        assert_eq!(steps, [2, 4, 8, 16, 32, 64, 64, 64]);
        trust.judged();
        trust.deadline(now);
        assert_eq!(trust.deadline(now + TIMEOUT), None);
        assert_eq!(trust.solo_first, 2);
    }

    #[test]
    fn a_silent_draft_is_not_waited_for_again() {
        let mut trust = Trust::new(TIMEOUT);
        let now = Instant::now();
        trust.proposal_arrived();
        trust.deadline(now);
        assert_eq!(trust.deadline(now + TIMEOUT), None);
        for _ in 0..1_000 {
            trust.stepped_alone();
            assert_eq!(trust.deadline(now + TIMEOUT), None);
        }
    }
}
