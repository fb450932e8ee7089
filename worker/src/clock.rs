//! [`now`]: the engine thread's time, which a simulation takes into its own hands.
//!
//! Sessions and their scheduler ask here and nowhere else, so that the very code that serves can run through hours of
//! a simulated fleet in minutes. A clock is a thread's own: nothing that serves ever sets one.

use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    static SET: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The machine's time or, on a thread that has [`set`] its clock, that.
pub fn now() -> Instant {
    SET.get().unwrap_or_else(Instant::now)
}

/// Sets this thread's clock, which stands still from then on.
pub fn set(time: Instant) {
    SET.set(Some(time));
}

/// Lets `time` pass on this thread's clock, if it was set.
pub fn advance(time: Duration) {
    SET.set(SET.get().map(|now| now + time));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_clock_moves_when_told_and_on_its_thread_only() {
        let start = now();
        set(start);
        advance(Duration::from_secs(3_600));
        assert_eq!(now() - start, Duration::from_secs(3_600));
        let elsewhere = std::thread::spawn(now).join().unwrap();
        assert!(elsewhere - start < Duration::from_secs(3_600));
    }
}
