//! [`RoundTrips`]: how far a verify worker is.

use std::collections::VecDeque;
use std::time::Duration;

/// Measurements that count. What delays one is a host that had other things to do, so the shortest is nearest the truth; old
/// ones are forgotten, since ways change.
const RECENT: usize = 32;

/// The last round trips to one verify worker.
#[derive(Debug, Default)]
pub struct RoundTrips {
    recent: VecDeque<Duration>,
}

impl RoundTrips {
    /// Notes one that was measured now.
    pub fn note(&mut self, measured: Duration) {
        self.recent.truncate(RECENT - 1);
        self.recent.push_front(measured);
    }

    /// The shortest of the recent ones; none when none was measured yet.
    pub fn shortest(&self) -> Option<Duration> {
        self.recent.iter().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_counts_until_it_is_old() {
        let ms = Duration::from_millis;
        let mut trips = RoundTrips::default();
        assert_eq!(trips.shortest(), None);
        for (measured, shortest) in [(30, 30), (2, 2)] {
            trips.note(ms(measured));
            assert_eq!(trips.shortest(), Some(ms(shortest)));
        }
        for _ in 1..RECENT {
            trips.note(ms(20));
            assert_eq!(trips.shortest(), Some(ms(2)));
        }
        trips.note(ms(25));
        assert_eq!(trips.shortest(), Some(ms(20)));
    }
}
