//! [`Agenda`]: what happens when, in virtual time.

use std::collections::BTreeMap;
use std::time::Duration;

/// Events in the order of their times; those of one time in the order in which they were noted.
#[derive(Debug)]
pub struct Agenda<E> {
    events: BTreeMap<(Duration, u64), E>,
    noted: u64,
}

impl<E> Default for Agenda<E> {
    fn default() -> Self {
        Self {
            events: BTreeMap::new(),
            noted: 0,
        }
    }
}

impl<E> Agenda<E> {
    /// Notes an event.
    pub fn note(&mut self, at: Duration, event: E) {
        self.events.insert((at, self.noted), event);
        self.noted += 1;
    }

    /// Takes the next event and its time.
    pub fn take(&mut self) -> Option<(Duration, E)> {
        let ((at, _), event) = self.events.pop_first()?;
        Some((at, event))
    }

    /// Events so far.
    pub fn noted(&self) -> u64 {
        self.noted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_in_order() {
        let mut agenda = Agenda::default();
        for (seconds, name) in [(2, 'c'), (1, 'a'), (1, 'b'), (3, 'd')] {
            agenda.note(Duration::from_secs(seconds), name);
        }
        let names: String = std::iter::from_fn(|| agenda.take().map(|(_, name)| name)).collect();
        assert_eq!((names.as_str(), agenda.noted()), ("abcd", 4));
    }
}
