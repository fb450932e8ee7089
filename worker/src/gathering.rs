//! `Gathering`: whether a batch waits for more sessions.
//!
//! Where drafts compute on the worker's own device, a forward for the few sessions whose rounds are there keeps that device from the
//! drafts of all others, whose rounds then come late and few again: each takes a forward of its own, and a forward costs almost the same
//! for one session as for many. So a batch waits while drafts are at work, no longer than two forwards take; rounds come
//! together from then on, since their sessions got their verdicts together. Nobody waits once a session is ready that goes on by
//! itself.

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
}

/// Forwards that a batch waits for others at most.
const PATIENCE: u32 = 2;

/// What is known of the waiting.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    /// Usual time of a forward; zero before the first.
    forward: Duration,
    since: Option<Instant>,
}

impl Gathering {
    /// Until when to wait, given how all sessions that generate stand; `None`: no longer.
    pub(crate) fn until(
        &mut self,
        now: Instant,
        sessions: impl Iterator<Item = Readiness>,
    ) -> Option<Instant> {
        let (mut ready, mut expected) = (false, false);
        for readiness in sessions {
            match readiness {
                Readiness::Ready => ready = true,
                Readiness::Expected => expected = true,
                Readiness::Alone => return None,
            }
        }
        if !(ready && expected) {
            return None;
        }
        let until = *self.since.get_or_insert(now) + PATIENCE * self.forward;
        (now < until).then_some(until)
    }

    /// A forward of sessions that generate went by.
    pub(crate) fn ran(&mut self, time: Duration) {
        self.forward = if self.forward.is_zero() {
            time
        } else {
            (self.forward * 3 + time) / 4
        };
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::Readiness::{Alone, Expected, Ready};
    use super::*;

    const FORWARD: Duration = Duration::from_millis(8);

    fn after_a_forward() -> Gathering {
        let mut gathering = Gathering::default();
        gathering.ran(FORWARD);
        gathering
    }

    #[test]
    fn a_batch_waits_for_drafts_at_work_for_two_forwards() {
        let mut gathering = after_a_forward();
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
        let mut gathering = after_a_forward();
        let now = Instant::now();
        let mut holds = |sessions: &[Readiness]| gathering.until(now, sessions.iter().copied());
        assert_eq!(holds(&[Ready, Ready]), None);
        assert_eq!(holds(&[Expected]), None);
        assert_eq!(holds(&[Ready, Expected, Alone]), None);
        assert_eq!(holds(&[]), None);
    }
}
