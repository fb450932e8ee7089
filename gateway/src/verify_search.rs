//! [`VerifySearch`]: which verify worker is asked next to take a session, and when all are asked again.
//!
//! Decisions without waiting and without a network: `opening` asks over gRPC, and a simulation in its own way.

use std::time::Duration;

use specattn_proto::Fault;
use specattn_service::Backoff;
use tokio::time::Instant;

use crate::registry::{Prefix, Registry, Worker, WorkerId};

/// First and longest pause between two rounds of asking.
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_MOST: Duration = Duration::from_secs(1);

/// How long to pause after a round in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pause {
    /// However often workers come and go, they are asked at this pace.
    pub(crate) at_least: Duration,
    /// After that, a change in the registry or so much more time ends the pause.
    pub(crate) at_most: Duration,
}

/// The search of one session, until a worker takes it.
pub(crate) struct VerifySearch {
    /// The tokens' first blocks: a worker may know them already.
    prefix: Prefix,
    /// Wait until then for a worker that has room.
    patience: Instant,
    /// Wait as long for a worker to come at all.
    waits_for_workers: bool,
    backoff: Backoff,
    /// Those that this round has yet to ask, the best one last.
    left: Vec<Worker>,
    /// What the last one said.
    refusal: Fault,
}

impl VerifySearch {
    /// A search that is over at `patience`.
    pub(crate) fn new(prefix: Prefix, patience: Instant, waits_for_workers: bool) -> Self {
        Self {
            prefix,
            patience,
            waits_for_workers,
            backoff: Backoff::new(RETRY_FIRST, RETRY_MOST),
            left: Vec::new(),
            refusal: nobody(),
        }
    }

    /// The same with pauses that follow from `seed`.
    pub(crate) fn repeatable(self, seed: u64) -> Self {
        Self {
            backoff: self.backoff.repeatable(seed),
            ..self
        }
    }

    /// Begins a round of asking.
    pub(crate) fn begin_round(&mut self, registry: &Registry) {
        self.left = registry.verify_candidates(&self.prefix);
        self.left.reverse();
        self.refusal = nobody();
    }

    /// The worker to ask now; none when the round was in vain.
    pub(crate) fn next(&mut self) -> Option<Worker> {
        self.left.pop()
    }

    /// A worker cannot take the session and was not asked.
    pub(crate) fn unfit(&mut self, misfit: Fault) {
        self.refusal = misfit;
    }

    /// A worker took it.
    pub(crate) fn opened(&self, registry: &Registry, worker: WorkerId) {
        registry.served(worker, &self.prefix);
    }

    /// A worker did not take it.
    ///
    /// # Errors
    /// What it said, where another one would say the same.
    pub(crate) fn refused(
        &mut self,
        registry: &Registry,
        worker: WorkerId,
        fault: Fault,
    ) -> Result<(), Fault> {
        tracing::info!(worker_id = %worker, %fault, "verify worker did not open the session");
        if matches!(fault, Fault::Unavailable(_)) {
            registry.suspect(worker);
        }
        // A full worker says nothing about the next one; nor does one that is gone.
        match fault {
            Fault::ResourceExhausted { .. }
            | Fault::Unavailable(_)
            | Fault::Internal(_)
            | Fault::AlreadyExists(_) => {
                self.refusal = fault;
                Ok(())
            }
            fault => Err(fault),
        }
    }

    /// How long to pause after a round in vain.
    ///
    /// # Errors
    /// What the last worker said, when another round is not worth it or patience is at its end.
    pub(crate) fn pause(&mut self, now: Instant) -> Result<Pause, Fault> {
        let may_pass = match self.refusal {
            Fault::ResourceExhausted { .. } => true,
            Fault::Unavailable(_) | Fault::Internal(_) | Fault::AlreadyExists(_) => {
                self.waits_for_workers
            }
            _ => false,
        };
        if !may_pass || now >= self.patience {
            return Err(std::mem::replace(&mut self.refusal, nobody()));
        }
        let left = self.patience.saturating_duration_since(now + RETRY_FIRST);
        Ok(Pause {
            at_least: RETRY_FIRST,
            at_most: self.backoff.delay().min(left),
        })
    }
}

fn nobody() -> Fault {
    Fault::Unavailable("no verify worker is there".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Dialers;

    fn search(waits_for_workers: bool, patience: Duration) -> VerifySearch {
        let patience = Instant::now() + patience;
        VerifySearch::new(Prefix::of(&[]), patience, waits_for_workers)
    }

    #[test]
    fn what_may_pass_is_waited_for_until_patience_ends() {
        let registry = Registry::new(String::new(), Dialers::default());
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let full = || Fault::exhausted("full");
        let mut patient = search(false, second);
        patient.begin_round(&registry);
        assert!(patient.next().is_none());
        // Nobody is there, and nobody is waited for.
        assert!(matches!(patient.pause(now), Err(Fault::Unavailable(_))));
        assert!(
            patient
                .refused(&registry, WorkerId::verify(1), full())
                .is_ok()
        );
        let pause = patient.pause(now).unwrap();
        assert!(pause.at_least == RETRY_FIRST && pause.at_most <= RETRY_FIRST);
        let late = now + 2 * second;
        assert!(matches!(
            patient.pause(late),
            Err(Fault::ResourceExhausted { .. })
        ));
        let mut waiting = search(true, second);
        waiting.begin_round(&registry);
        assert!(waiting.pause(now).is_ok());
    }

    #[test]
    fn what_every_worker_would_say_ends_the_search() {
        let registry = Registry::new(String::new(), Dialers::default());
        let mut search = search(true, Duration::from_secs(1));
        let fault = Fault::InvalidArgument("too long".to_owned());
        let refused = search.refused(&registry, WorkerId::verify(1), fault);
        assert!(matches!(refused, Err(Fault::InvalidArgument(_))));
    }
}
