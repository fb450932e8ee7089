//! [`Leash`]: refreshes sparse mode's KV entries by dense passes, and keeps what sparsity costs under a bound.
//!
//! Every so many committed tokens a dense pass feeds them again: their KV entries become its own, and KL(dense ‖ sparse)
//! of each is known. So every token is a sample but those after the last such pass, and no sample is taken over entries
//! that are older than one run. With a bound, the mass p that masks must reach follows: divergence is taken as
//! proportional to the mass left out, with a factor followed online, and p is chosen so that the mean over the session
//! so far and the next [`HORIZON`] tokens comes to [`AIM`] of the bound. A session that overdrew repays, down to p = 1.

/// Committed tokens between two dense passes, unless the request says.
const EVERY: u32 = 64;
/// Share of the bound to aim at: divergences have a heavy tail.
const AIM: f64 = 0.6;
/// Tokens over which a surplus or a debt is spread.
const HORIZON: f64 = 192.0;
/// Divergence ÷ mass left out before anything is measured, and the tokens that is worth.
const FIRST_FACTOR: f64 = 0.15;
const FIRST_WEIGHT: f64 = 64.0;
/// What older measurements are worth at each pass.
const KEEP: f64 = 0.9;
/// Most that a session may leave out.
const MOST_LEFT_OUT: f64 = 0.5;
/// A mass so close to 1 is 1.
const LEAST_LEFT_OUT: f64 = 1e-3;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Leash {
    every: usize,
    max_kl: Option<f64>,
    /// 1 − p, in force.
    left_out: f64,
    /// Divergences and masses left out, both with forgetting: their ratio is the factor.
    recent: (f64, f64),
    sum: f64,
    samples: u64,
}

impl Leash {
    /// A leash of `max_kl` nats per token, where given; `mask_p` is where a session begins at most.
    pub(crate) fn new(every: Option<u32>, max_kl: Option<f32>, mask_p: Option<f32>) -> Self {
        let asked = mask_p.map_or(0.05, |p| 1.0 - f64::from(p));
        let max_kl = max_kl.map(f64::from);
        let prudent = max_kl.map_or(asked, |most| AIM * most / FIRST_FACTOR);
        Self {
            every: every.unwrap_or(EVERY) as usize,
            max_kl,
            left_out: asked.min(prudent),
            recent: (FIRST_FACTOR * asked * FIRST_WEIGHT, asked * FIRST_WEIGHT),
            sum: 0.0,
            samples: 0,
        }
    }

    /// Whether `length` tokens since the last dense pass are enough.
    pub(crate) fn is_due(&self, length: usize) -> bool {
        length >= self.every
    }

    /// Whether divergences are wanted.
    pub(crate) fn measures(&self) -> bool {
        self.max_kl.is_some()
    }

    /// The mass that masks are to reach; `None` without a bound.
    pub(crate) fn mask_p(&self) -> Option<f32> {
        self.max_kl?;
        if self.left_out < LEAST_LEFT_OUT {
            return Some(1.0);
        }
        Some((1.0 - self.left_out) as f32)
    }

    /// One token's divergence.
    pub(crate) fn measured(&mut self, kl: f64) {
        self.sum += kl;
        self.samples += 1;
        self.recent.0 += kl;
        self.recent.1 += self.left_out.max(LEAST_LEFT_OUT);
    }

    /// Chooses p for the next run.
    pub(crate) fn adapt(&mut self) {
        let Some(max_kl) = self.max_kl else { return };
        let factor = (self.recent.0 / self.recent.1).max(1e-6);
        self.recent = (KEEP * self.recent.0, KEEP * self.recent.1);
        let samples = self.samples as f64;
        let budget = (AIM * max_kl * (samples + HORIZON) - self.sum) / HORIZON;
        let wanted = (budget / factor).clamp(0.0, MOST_LEFT_OUT);
        // Loosened with care, tightened at once.
        self.left_out = wanted.min(1.5 * self.left_out.max(LEAST_LEFT_OUT));
    }

    /// Mean divergence measured, and the number of tokens it was measured on.
    pub(crate) fn divergence(&self) -> (f64, u64) {
        let mean = if self.samples == 0 {
            0.0
        } else {
            self.sum / self.samples as f64
        };
        (mean, self.samples)
    }
}

#[cfg(test)]
mod tests {
    use specattn_engine::sampling::{CounterRng, Purpose};

    use super::*;

    /// A session of `tokens` tokens whose divergence is exponentially distributed around `factor` · (1 − p)^`power`.
    fn simulate(max_kl: f32, (factor, power): (f64, f64), tokens: u64, seed: u64) -> Leash {
        let rng = CounterRng::new(seed);
        let mut leash = Leash::new(None, Some(max_kl), Some(0.9));
        for token in 0..tokens {
            let left_out = 1.0 - f64::from(leash.mask_p().unwrap());
            let u = rng.uniform(token, Purpose::Accept);
            // One token in ten has it all.
            let heavy = if token % 10 == 0 { 10.0 } else { 0.0 };
            leash.measured(factor * left_out.powf(power) * heavy * -(1.0 - u).ln());
            if token % 64 == 63 {
                leash.adapt();
            }
        }
        leash
    }

    #[test]
    fn the_bound_holds_and_is_made_use_of() {
        for (index, law) in [(0.1, 1.0), (0.3, 1.0), (0.05, 0.7), (0.5, 1.5)]
            .into_iter()
            .enumerate()
        {
            for max_kl in [0.002, 0.01, 0.03] {
                let mut means = 0.0;
                for seed in 0..10 {
                    let (mean, samples) = simulate(max_kl, law, 2_000, seed).divergence();
                    assert_eq!(samples, 2_000);
                    assert!(mean < f64::from(max_kl), "law {index}: {mean} of {max_kl}");
                    means += mean / 10.0;
                }
                println!("law {index}: {means:.4} of {max_kl}");
                let room = law.0 * 0.5_f64.powf(law.1);
                assert!(
                    means > (0.3 * f64::from(max_kl)).min(0.5 * room),
                    "law {index}"
                );
            }
        }
    }

    #[test]
    fn a_bound_out_of_reach_reads_everything() {
        let mut leash = Leash::new(Some(8), Some(1e-4), Some(0.9));
        for _ in 0..20 {
            leash.measured(1.0);
            leash.adapt();
        }
        assert_eq!(leash.mask_p(), Some(1.0));
    }

    #[test]
    fn without_a_bound_nothing_is_measured_and_p_stays() {
        let leash = Leash::new(Some(8), None, Some(0.9));
        assert!(!leash.measures() && leash.mask_p().is_none());
        assert!(leash.is_due(8) && !leash.is_due(7));
        assert_eq!(leash.divergence(), (0.0, 0));
    }
}
