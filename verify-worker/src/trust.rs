//! [`Trust`]: how long a session waits for its draft, and when it leaves its rounds alone.
//!
//! A draft earns waiting by proposing. While it is live the session waits up to a timeout for the next proposal; when
//! that passes in vain the session goes on alone, waits again only after another proposal, and after k timeouts in a row
//! lets 2^k tokens (at most 64) pass first. So a slow draft, or one that only sends stale proposals, costs a bounded
//! share of the time.
//!
//! A draft that runs ahead and asks for no waiting has its rounds there in time or, where its way is about as long as a forward, a little
//! late: it is waited for briefly, and rarely once that was in vain many times in a row.
//!
//! Rounds of which nothing is accepted cost the target, and the sessions beside, more than steps alone. After a dozen of them in
//! a row each further one is followed by steps alone, 2^k of them again.

use std::time::{Duration, Instant};

/// Most solo steps between two waits, as a power of two.
const BACKOFF_BITS_MAX: u32 = 6;

/// Rounds in a row without an accepted token that are borne: where a third of the first tokens is accepted, that many come one time
/// in a hundred.
const FRUITLESS: u32 = 12;

/// Part of a forward's time that a round of a draft which asks for no waiting may be late.
const LATE: u32 = 8;
/// Brief waits in vain in a row after which only one in so many is made.
const LATE_IN_VAIN: u32 = 8;

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
    /// Rounds judged since a token was last accepted.
    fruitless: u32,
    /// Solo steps to take before waiting again.
    solo_first: u32,
    /// When the current wait began.
    waiting_since: Option<Instant>,
    /// Brief waits, made or left out, since a round was last judged.
    late: u32,
}

impl Trust {
    /// A draft that has not proposed yet.
    pub(crate) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            proposed: false,
            timeouts: 0,
            fruitless: 0,
            solo_first: 0,
            waiting_since: None,
            late: 0,
        }
    }

    /// A proposal or the beginning of one arrived, stale or not: worth waiting for what follows.
    pub(crate) fn proposal_arrived(&mut self) {
        self.proposed = true;
    }

    /// A proposal was judged and so many of its tokens accepted: the draft keeps up.
    pub(crate) fn judged(&mut self, accepted: usize) {
        self.answered();
        self.late = 0;
        self.fruitless = if accepted > 0 { 0 } else { self.fruitless + 1 };
        if let Some(beyond) = self.fruitless.checked_sub(FRUITLESS) {
            self.solo_first = 1 << beyond.min(BACKOFF_BITS_MAX);
        }
    }

    /// A proposal was answered without a look at its tokens: the draft keeps up.
    pub(crate) fn answered(&mut self) {
        self.timeouts = 0;
        self.solo_first = 0;
        self.waiting_since = None;
    }

    /// Whether rounds are left alone now, since nothing came of those before.
    pub(crate) fn rests(&self) -> bool {
        self.fruitless >= FRUITLESS && self.solo_first > 0
    }

    /// The session took a step alone.
    pub(crate) fn stepped_alone(&mut self) {
        self.solo_first = self.solo_first.saturating_sub(1);
        self.waiting_since = None;
    }

    /// Whether the next proposal is worth waiting for, and may still come in time.
    pub(crate) fn expects(&self, now: Instant) -> bool {
        let in_time = |since: Instant| now < since + self.timeout;
        self.proposed && self.solo_first == 0 && self.waiting_since.is_none_or(in_time)
    }

    /// Whether a round was judged lately.
    pub(crate) fn keeps_up(&self) -> bool {
        self.late < LATE_IN_VAIN
    }

    /// Until when to wait for a round of a draft that asks for no waiting, where a forward takes so long.
    pub(crate) fn brief_patience(&mut self, now: Instant, forward: Duration) -> Patience {
        let waits = self.keeps_up() || self.late.is_multiple_of(LATE_IN_VAIN);
        let deadline = *self.waiting_since.get_or_insert(now) + forward / LATE;
        if self.solo_first == 0 && waits && now < deadline {
            return Patience::Until(deadline);
        }
        self.late = self.late.wrapping_add(1);
        self.waiting_since = None;
        Patience::Unwarranted
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
        assert!(!trust.expects(now));
        trust.proposal_arrived();
        assert!(trust.expects(now));
        assert_eq!(trust.patience(now, None), Patience::Until(now + TIMEOUT));
        // Asking again, or a stale proposal, does not lengthen the wait.
        trust.proposal_arrived();
        let later = now + TIMEOUT / 2;
        assert_eq!(trust.patience(later, None), Patience::Until(now + TIMEOUT));
        // A judged proposal begins a new one.
        trust.judged(0);
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
            assert!(!trust.expects(now));
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
        trust.judged(1);
        trust.patience(now, None);
        assert_eq!(trust.patience(now + TIMEOUT, None), Patience::Over);
        assert_eq!(trust.solo_first, 2);
    }

    #[test]
    fn a_draft_that_asks_for_no_waiting_is_waited_for_briefly_and_rarely_in_vain() {
        let (mut trust, forward) = (Trust::new(TIMEOUT), Duration::from_millis(40));
        let mut now = Instant::now();
        let mut waits = |trust: &mut Trust, steps: u32| {
            let mut waits = 0;
            for _ in 0..steps {
                if let Patience::Until(deadline) = trust.brief_patience(now, forward) {
                    assert_eq!(deadline, now + forward / LATE);
                    now = deadline;
                    let after = trust.brief_patience(now, forward);
                    assert_eq!(after, Patience::Unwarranted);
                    waits += 1;
                }
                trust.stepped_alone();
                now += forward;
            }
            waits
        };
        assert_eq!(waits(&mut trust, 80), 8 + 9);
        trust.judged(1);
        assert_eq!(waits(&mut trust, 5), 5);
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
    fn rounds_without_fruit_become_rare() {
        let mut trust = Trust::new(TIMEOUT);
        let (mut rounds, mut steps) = (0, 0);
        while rounds + steps < 2_000 {
            if trust.rests() {
                steps += 1;
                trust.stepped_alone();
            } else {
                rounds += 1;
                trust.judged(0);
            }
        }
        assert!(rounds < 60, "{rounds}");
        trust.judged(1);
        assert!(!trust.rests());
        for _ in 1..FRUITLESS {
            trust.judged(0);
            assert!(!trust.rests());
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
        trust.judged(0);
        trust.proposal_arrived();
        let patience = trust.patience(now, Some(2 * TIMEOUT));
        assert_eq!(patience, Patience::Until(now + TIMEOUT));
    }
}
