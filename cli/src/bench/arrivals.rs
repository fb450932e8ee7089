//! When requests come: [`Load`], and [`Poisson`] arrivals of an open loop.

use std::fmt;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Exp};

/// A load that is held for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// Requests per second, whether or not earlier ones are done.
    Rate(f64),
    /// Clients, each with one request running at all times.
    Concurrency(u32),
}

impl Load {
    /// The number on a plot's axis.
    pub fn value(self) -> f64 {
        match self {
            Self::Rate(rate) => rate,
            Self::Concurrency(clients) => f64::from(clients),
        }
    }

    /// What that number counts.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Rate(_) => "requests/s",
            Self::Concurrency(_) => "clients",
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.value(), self.unit())
    }
}

/// Arrival times since the start, without end: the gaps are independent and exponential.
#[derive(Debug)]
pub struct Poisson {
    gaps: Exp<f64>,
    rng: StdRng,
    seconds: f64,
}

impl Poisson {
    /// Arrivals at `rate` per second, which must be above zero.
    pub fn new(rate: f64, seed: u64) -> Self {
        Self {
            gaps: Exp::new(rate).expect("rates are above zero"),
            rng: StdRng::seed_from_u64(seed),
            seconds: 0.0,
        }
    }
}

impl Iterator for Poisson {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.seconds += self.gaps.sample(&mut self.rng);
        Duration::try_from_secs_f64(self.seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_poisson_process() {
        const COUNT: usize = 20_000;
        let times: Vec<f64> = Poisson::new(4.0, 1)
            .take(COUNT)
            .map(|t| t.as_secs_f64())
            .collect();
        assert!(times.is_sorted());
        let mean = times[COUNT - 1] / COUNT as f64;
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        let variance = gaps.map(|gap| (gap - mean).powi(2)).sum::<f64>() / COUNT as f64;
        // Five standard errors: 1/√n of the mean, √(8/n) of the variance.
        assert!((mean - 0.25).abs() < 0.25 * 0.036, "{mean}");
        assert!((variance - 0.0625).abs() < 0.0625 * 0.1, "{variance}");
        // Counts of disjoint seconds vary as much as their mean.
        let seconds = times[COUNT - 1] as usize;
        let mut counts = vec![0.0_f64; seconds];
        for time in &times {
            if let Some(count) = counts.get_mut(*time as usize) {
                *count += 1.0;
            }
        }
        let mean = counts.iter().sum::<f64>() / seconds as f64;
        let variance = counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / seconds as f64;
        assert!((variance / mean - 1.0).abs() < 0.1, "{variance} / {mean}");
    }

    #[test]
    fn a_seed_repeats_itself() {
        let some = |seed| Poisson::new(1.0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(some(7), some(7));
        assert_ne!(some(7), some(8));
    }
}
