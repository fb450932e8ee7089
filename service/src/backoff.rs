//! [`Backoff`]: how long to wait before the next try.

use std::time::Duration;

/// Doubling delays with jitter: each is drawn from the upper half of its step, so that peers that failed together do
/// not return together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// Delays that start at `first` and double up to `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// The delay to wait now.
    pub fn delay(&mut self) -> Duration {
        let step = self.next.min(self.most);
        self.next = step.saturating_mul(2);
        step.mul_f64(rand::random_range(0.5..=1.0))
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
}
