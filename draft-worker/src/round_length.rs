//! [`RoundLength`]: how many tokens to draft per round, from what rounds cost and come to.
//!
//! With a probability a that a draft token is accepted, a round of k tokens settles (1 − a^(k+1)) / (1 − a) tokens on
//! average (Leviathan et al. 2023). What it takes, from one verdict to the next, is fitted as a line in k: draft steps, the
//! target's forward and the way there and back, as far as they do not hide behind each other. Both are measured, and fade;
//! the k with the most tokens per second is taken. To keep the line fitted, one round in a few is a token shorter or longer.

use std::time::Duration;

/// What is left of a measurement after the next.
const FADE: f64 = 0.97;
/// Rounds from one odd length to the next.
const ODD_EVERY: u32 = 8;
/// Rounds before anything is chosen.
const WARM_UP: u32 = 6;

/// The probability that a draft token is accepted, from how many of those judged were; below 1.
pub(crate) fn acceptance(judged: f64, accepted: f64) -> f64 {
    ((accepted + 0.5) / (judged + 1.0)).min(0.999)
}

/// Tokens that a round of `length` settles on average: see above.
pub(crate) fn expected_tokens(acceptance: f64, length: usize) -> f64 {
    (1.0 - acceptance.powi(length as i32 + 1)) / (1.0 - acceptance)
}

/// The state of one session.
#[derive(Debug)]
pub(crate) struct RoundLength {
    most: usize,
    chosen: usize,
    rounds: u32,
    /// Draft tokens judged and accepted: a judged one was accepted or the first that was not.
    judged: f64,
    accepted: f64,
    /// Sums over timed rounds: 1, k, k², seconds, k · seconds.
    sums: [f64; 5],
}

impl RoundLength {
    /// Rounds of up to `most` tokens, at least 1.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            chosen: most,
            rounds: 0,
            judged: 0.0,
            accepted: 0.0,
            sums: [0.0; 5],
        }
    }

    /// Tokens of the round that begins now, from 1 to the most.
    pub(crate) fn next(&self) -> usize {
        let odd = self.rounds % ODD_EVERY == ODD_EVERY - 1;
        match (odd, self.chosen < self.most) {
            (false, _) => self.chosen,
            (true, true) if self.rounds % (2 * ODD_EVERY) < ODD_EVERY => self.chosen + 1,
            (true, _) => self.chosen.saturating_sub(1).max(1),
        }
    }

    /// A round of `proposed` tokens was judged, where rounds followed one another so long after the one before.
    pub(crate) fn judged(&mut self, proposed: usize, accepted: usize, took: Option<Duration>) {
        self.judged = FADE * self.judged + (accepted + usize::from(accepted < proposed)) as f64;
        self.accepted = FADE * self.accepted + accepted as f64;
        if let Some(took) = took {
            let (k, seconds) = (proposed as f64, took.as_secs_f64());
            let terms = [1.0, k, k * k, seconds, k * seconds];
            for (sum, term) in self.sums.iter_mut().zip(terms) {
                *sum = FADE * *sum + term;
            }
        }
        self.rounds = self.rounds.wrapping_add(1);
        if self.rounds >= WARM_UP && self.sums[0] > 0.0 {
            self.chosen = self.best();
        }
    }

    /// The length with the most tokens per second by what is known.
    fn best(&self) -> usize {
        let [n, k, kk, s, ks] = self.sums;
        let spread = kk - k * k / n;
        // Rounds of one length only tell nothing of the slope.
        let slope = if spread > 1e-3 * n {
            ((ks - k * s / n) / spread).max(0.0)
        } else {
            0.0
        };
        let fixed = ((s - slope * k) / n).max(1e-6);
        let a = acceptance(self.judged, self.accepted);
        let rate = |k: usize| expected_tokens(a, k) / (fixed + slope * k as f64);
        (1..=self.most)
            .max_by(|&x, &y| rate(x).total_cmp(&rate(y)))
            .unwrap_or(self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The length after rounds of which each token is accepted with probability `a`, at these costs in ms.
    fn settled(a: f64, step: f64, fixed: f64, slope: f64) -> usize {
        let ms = |x: f64| Duration::from_secs_f64(x / 1e3);
        let mut length = RoundLength::new(16);
        let mut state = 1u64;
        for _ in 0..400 {
            let proposed = length.next();
            let accepted = (0..proposed)
                .take_while(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    ((state >> 33) as f64 / (1u64 << 31) as f64) < a
                })
                .count();
            let took = ms(fixed + (step + slope) * proposed as f64);
            length.judged(proposed, accepted, Some(took));
        }
        length.chosen
    }

    #[test]
    fn dear_rounds_are_long_and_cheap_ones_short() {
        // The best lengths of the formula: found by hand.
        assert!(settled(0.9, 0.1, 40.0, 0.0) >= 14);
        assert!((1..=2).contains(&settled(0.6, 1.0, 1.0, 0.5)));
        assert!((3..=6).contains(&settled(0.7, 0.5, 5.0, 0.1)));
        assert_eq!(settled(0.05, 1.0, 2.0, 0.5), 1);
    }
}
