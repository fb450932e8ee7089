//! [`Backoff`]: how long to wait before the next try.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Doubling delays with jitter: each is drawn from the upper half of its step, so that peers that failed together do
/// not return together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
    jitter: SmallRng,
}

impl Backoff {
    /// Delays that start at `first` and double up to `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
            jitter: rand::make_rng(),
        }
    }

    /// The same with jitter that follows from `seed`, for simulations.
    pub fn repeatable(self, seed: u64) -> Self {
        Self {
            jitter: SmallRng::seed_from_u64(seed),
            ..self
        }
    }

    /// The delay to wait now.
    pub fn delay(&mut self) -> Duration {
        let step = self.next.min(self.most);
        self.next = step.saturating_mul(2);
        step.mul_f64(self.jitter.random_range(0.5..=1.0))
    }

    /// Starts over: the last try succeeded.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit_and_start_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(350));
        for step in [100, 200, 350, 350] {
            let delay = backoff.delay();
            assert!(
                delay >= ms(step) / 2 && delay <= ms(step),
                "{delay:?} at {step}"
            );
        }
        backoff.reset();
        assert!(backoff.delay() <= ms(100));
    }

    #[test]
    fn a_seed_repeats_its_jitter() {
        let delays = |seed| {
            let backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
            let mut backoff = backoff.repeatable(seed);
            [backoff.delay(), backoff.delay()]
        };
        assert_eq!(delays(3), delays(3));
        assert_ne!(delays(3), delays(4));
    }
}
