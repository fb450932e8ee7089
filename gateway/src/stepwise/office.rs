//! [`Office`]: what the sessions of a stepwise gateway have in common: its registry, its timers and what it says.

use std::collections::BTreeSet;
use std::sync::Arc;

use specattn_proto::SessionId;
use tokio::time::Instant;

use super::Said;
use crate::args::Config;
use crate::registry::Registry;

/// What a session waits for by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// Its turn has not come.
    Turn,
    /// From then on a change of the registry counts.
    Listen,
    /// The next round of asking verify workers.
    Ask,
    /// The next draft worker.
    Seek,
}

pub(super) struct Office {
    pub(super) config: Config,
    pub(super) registry: Arc<Registry>,
    pub(super) now: Instant,
    pub(super) timers: BTreeSet<(Instant, SessionId, Timer)>,
    /// Sessions that wait for a change of the registry.
    pub(super) listening: BTreeSet<SessionId>,
    pub(super) said: Vec<Said>,
    seed: u64,
    numbers: u64,
}

impl Office {
    pub(super) fn new(config: Config, registry: Arc<Registry>, seed: u64) -> Self {
        Self {
            config,
            registry,
            now: Instant::now(),
            timers: BTreeSet::new(),
            listening: BTreeSet::new(),
            said: Vec::new(),
            seed,
            numbers: 0,
        }
    }

    /// The next timer that is due.
    pub(super) fn due(&mut self) -> Option<(SessionId, Timer, Instant)> {
        let &(at, id, timer) = self.timers.first().filter(|(at, ..)| *at <= self.now)?;
        self.timers.pop_first();
        Some((id, timer, at))
    }

    /// Another number each time.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Another seed each time.
    pub(super) fn seed(&mut self) -> u64 {
        self.seed ^ self.number()
    }
}
