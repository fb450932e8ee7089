//! [`Network`]: how long messages travel.

use std::time::Duration;

use rand::rngs::StdRng;
use rand_distr::{Distribution, Exp1};

/// One-way delays.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// What every message takes.
    pub delay: Duration,
    /// What one between a draft and a verify worker takes on top: they may be far apart.
    pub between_roles: Duration,
    /// The mean of what any takes on top of that, exponentially distributed.
    pub jitter: Duration,
}

/// One direction of a connection: what was sent first arrives first.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stream {
    last: Duration,
}

impl Stream {
    /// When what is sent at `now` arrives.
    pub fn arrival(
        &mut self,
        network: &Network,
        is_between_roles: bool,
        now: Duration,
        rng: &mut StdRng,
    ) -> Duration {
        let jitter: f64 = Exp1.sample(rng);
        let mut takes = network.delay + network.jitter.mul_f64(jitter);
        if is_between_roles {
            takes += network.between_roles;
        }
        self.last = self.last.max(now + takes);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn nothing_overtakes_and_nothing_is_faster_than_the_delay() {
        let ms = Duration::from_millis;
        let network = Network {
            delay: ms(2),
            between_roles: ms(20),
            jitter: ms(5),
        };
        let mut rng = StdRng::seed_from_u64(1);
        for is_far in [false, true] {
            let (mut stream, mut before, mut sum) = (Stream::default(), ms(0), ms(0));
            for second in 0..1_000 {
                let now = Duration::from_secs(second);
                let arrival = stream.arrival(&network, is_far, now, &mut rng);
                let least = if is_far { ms(22) } else { ms(2) };
                assert!(arrival >= before && arrival >= now + least);
                sum += arrival - now - least;
                before = arrival;
            }
            // The mean of a thousand: within five standard errors.
            assert!(sum / 1_000 > ms(4) && sum / 1_000 < ms(6), "{sum:?}");
        }
        let mut stream = Stream::default();
        let times = (0..1_000).map(Duration::from_micros);
        let arrivals: Vec<Duration> = times
            .map(|now| stream.arrival(&network, true, now, &mut rng))
            .collect();
        assert!(arrivals.is_sorted());
    }
}
