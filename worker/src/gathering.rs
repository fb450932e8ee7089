//! `Gathering`: whether a batch waits for more sessions.
//!
//! A forward costs almost the same for one session as for many. Where drafts and target compute on one device, a forward for the few
//! sessions that are ready keeps that device from all others, and sessions that fell apart stay apart.
//!
//! So a target's batch waits while drafts are at work, no longer than two forwards take; rounds come together from then on, since their
//! sessions got their verdicts together. Those verdicts reach the drafts one after another: a draft's batch that begins rounds
//! waits while they keep coming. Nobody waits once a session is ready that goes on by itself.

use std::time::{Duration, Instant};

/// How a session stands to a batch that is about to be planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It has what it would wait for.
    Ready,
    /// What it waits for is being made.
    Expected,
    /// It goes on by itself, now.
    Alone,
    /// It has nothing to do.
    Idle,
}

/// For whom a batch waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Nobody.
    None,
    /// Sessions whose drafts are at work.
    Drafts,
    /// Sessions whose verdicts are on their way.
    Verdicts,
}

/// Forwards that a batch waits for drafts at most.
const DRAFTS: u32 = 2;
/// Part of a forward that it waits for the next verdict; for all of them it waits a forward at most.
const NEXT_VERDICT: u32 = 8;

/// What a forward usually takes, when it usually took `before` (zero: not known) and the last one `time`.
pub fn usual_time(before: Duration, time: Duration) -> Duration {
    if before.is_zero() {
        time
    } else {
        (before * 3 + time) / 4
    }
}

/// What is known of the waiting.
#[derive(Debug)]
pub(crate) struct Gathering {
    patience: Patience,
    /// Usual time of a forward; zero before the first.
    forward: Duration,
    since: Option<Instant>,
    /// Sessions that were ready at the last look, and when there were more than before.
    ready: usize,
    last_came: Option<Instant>,
}

impl Gathering {
    /// A gathering before the first forward.
    pub(crate) fn new(patience: Patience) -> Self {
        Self {
            patience,
            forward: Duration::ZERO,
            since: None,
            ready: 0,
            last_came: None,
        }
    }

    /// Until when to wait, given how all sessions that generate stand; `None`: no longer.
    pub(crate) fn until(
        &mut self,
        now: Instant,
        sessions: impl Iterator<Item = Readiness>,
    ) -> Option<Instant> {
        if self.patience == Patience::None {
            return None;
        }
        let (mut ready, mut expected) = (0, false);
        for readiness in sessions {
            match readiness {
                Readiness::Ready => ready += 1,
                Readiness::Expected => expected = true,
                Readiness::Alone => return None,
                Readiness::Idle => {}
            }
        }
        if ready == 0 || !expected {
            return None;
        }
        let since = *self.since.get_or_insert(now);
        let until = if self.patience == Patience::Verdicts {
            if std::mem::replace(&mut self.ready, ready) < ready {
                self.last_came = Some(now);
            }
            let next = self.last_came.unwrap_or(since) + self.forward / NEXT_VERDICT;
            next.min(since + self.forward)
        } else {
            since + DRAFTS * self.forward
        };
        (now < until).then_some(until)
    }

    /// A forward of sessions that generate went by.
    pub(crate) fn ran(&mut self, time: Duration) {
        self.forward = usual_time(self.forward, time);
        self.since = None;
        self.ready = 0;
        self.last_came = None;
    }
}

#[cfg(test)]
mod tests {
    use super::Readiness::{Alone, Expected, Idle, Ready};
    use super::*;

    const FORWARD: Duration = Duration::from_millis(8);

    fn after_a_forward(patience: Patience) -> Gathering {
        let mut gathering = Gathering::new(patience);
        gathering.ran(FORWARD);
        gathering
    }

    #[test]
    fn a_batch_waits_for_drafts_at_work_for_two_forwards() {
        let mut gathering = after_a_forward(Patience::Drafts);
        let now = Instant::now();
        let mixed = || [Ready, Expected, Expected].into_iter();
        let until = now + 2 * FORWARD;
        assert_eq!(gathering.until(now, mixed()), Some(until));
        assert_eq!(gathering.until(now + FORWARD, mixed()), Some(until));
        assert_eq!(gathering.until(until, mixed()), None);
        gathering.ran(FORWARD);
        assert_eq!(gathering.until(until, mixed()), Some(until + 2 * FORWARD));
    }

    #[test]
    fn nobody_waits_for_nothing_or_with_a_session_that_goes_alone() {
        let mut gathering = after_a_forward(Patience::Drafts);
        let now = Instant::now();
        let mut holds = |sessions: &[Readiness]| gathering.until(now, sessions.iter().copied());
        assert_eq!(holds(&[Ready, Ready]), None);
        assert_eq!(holds(&[Expected]), None);
        assert_eq!(holds(&[Expected, Idle]), None);
        assert_eq!(holds(&[Ready, Expected, Alone]), None);
        assert_eq!(holds(&[]), None);
    }

    #[test]
    fn a_batch_waits_while_verdicts_keep_coming_for_a_forward_at_most() {
        let mut gathering = after_a_forward(Patience::Verdicts);
        let (start, next) = (Instant::now(), FORWARD / NEXT_VERDICT);
        let mut look = |ready: usize, now| {
            let sessions = (0..20).map(|i| if i < ready { Ready } else { Expected });
            gathering.until(now, sessions.chain([Idle]))
        };
        assert_eq!(look(1, start), Some(start + next));
        assert_eq!(look(1, start + next / 2), Some(start + next));
        assert_eq!(look(2, start + next / 2), Some(start + next / 2 + next));
        assert_eq!(look(2, start + 2 * next), None);
        // One every half of the time, for ever.
        let end = (3..20).find(|&i| look(i, start + next / 2 * i as u32).is_none());
        assert_eq!(end, Some(2 * NEXT_VERDICT as usize));
        gathering.ran(FORWARD);
        let now = start + 9 * FORWARD;
        let sessions = [Ready, Expected].into_iter();
        assert_eq!(gathering.until(now, sessions), Some(now + next));
    }

    #[test]
    fn without_patience_nobody_waits() {
        let mut gathering = after_a_forward(Patience::None);
        let sessions = [Ready, Expected].into_iter();
        assert_eq!(gathering.until(Instant::now(), sessions), None);
    }
}
