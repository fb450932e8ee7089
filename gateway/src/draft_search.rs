//! [`DraftSearch`]: which draft worker a session gets next, and when it looks for another.
//!
//! Decisions without waiting and without a network: `attachment` follows them over gRPC, and a simulation in its own way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use specattn_service::Backoff;
use tokio::time::Instant;

use crate::registry::{Assignment, Registry, Worker, WorkerId};

/// First and longest pause after a draft worker refused or left.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// An attachment that held this long is a success: the next pause is short again. It is also when a better one is looked for
/// first: a move costs the new draft a prompt.
pub(crate) const HELD: Duration = Duration::from_secs(1);

/// Pause between two looks for a better draft worker: changes of the registry come with every session that begins or ends.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Pause before an ended attachment counts as lost: the session's own end detaches too, and ends this search.
pub(crate) const SETTLE: Duration = Duration::from_millis(20);

/// The search of one session at one verify worker.
pub(crate) struct DraftSearch {
    backoff: Backoff,
    /// Workers that refused or left, and when to ask them again.
    resting: BTreeMap<WorkerId, Instant>,
}

impl DraftSearch {
    /// A search in which everybody may be asked.
    pub(crate) fn new() -> Self {
        Self {
            backoff: Backoff::new(RETRY_FIRST, RETRY_MOST),
            resting: BTreeMap::new(),
        }
    }

    /// The same with pauses that follow from `seed`.
    pub(crate) fn repeatable(self, seed: u64) -> Self {
        Self {
            backoff: self.backoff.repeatable(seed),
            ..self
        }
    }

    /// The draft worker that suits a session of `verify` best and is not resting.
    pub(crate) fn choose(
        &mut self,
        registry: &Arc<Registry>,
        verify: &Worker,
        now: Instant,
    ) -> Option<(Worker, Assignment)> {
        self.resting.retain(|_, until| *until > now);
        registry.assign_draft(verify, |id| !self.resting.contains_key(&id))
    }

    /// When the next one has rested.
    pub(crate) fn rested(&self) -> Option<Instant> {
        self.resting.values().min().copied()
    }

    /// A worker refused, or left after so long; it rests for the time given back.
    pub(crate) fn left(&mut self, worker: WorkerId, after: Duration, now: Instant) -> Duration {
        if after >= HELD {
            self.backoff.reset();
        }
        let pause = self.backoff.delay();
        self.resting.insert(worker, now + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_stay_holds() {
        let mut search = DraftSearch::new();
        let (now, worker) = (Instant::now(), WorkerId::verify(1));
        let pauses: Vec<Duration> = (0..8)
            .map(|_| search.left(worker, Duration::ZERO, now))
            .collect();
        assert!(pauses[0] <= RETRY_FIRST && pauses[7] >= RETRY_MOST / 2);
        assert_eq!(search.rested(), Some(now + pauses[7]));
        assert!(search.left(worker, HELD, now) <= RETRY_FIRST);
    }
}
