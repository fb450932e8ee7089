//! [`RoundLength`]: how many tokens to draft per round, from what rounds cost and come to.
//!
//! What a round of k tokens comes to follows from the [`Acceptance`](crate::acceptance::Acceptance). What it takes, from one
//! verdict to the next, is fitted as a line in k: draft steps, the target's forward and the way there and back, as far as they
//! do not hide behind each other. Both are measured, and fade; the k with the most tokens per second is taken. To keep the line
//! fitted, one round in a few is a token shorter or longer. Each [`Way`] has a line of its own: where verdicts are waited for long
//! rounds make up for the wait, and where they are guessed each further token is one more that may be rejected, and
//! another verdict to guess.

use std::time::Duration;

use specattn_worker::expected_tokens;

use crate::lookahead::{WAYS, Way};

/// What is left of a measurement after the next.
const FADE: f64 = 0.97;
/// Rounds from one odd length to the next, and how many come before the first.
const ODD_EVERY: u32 = 8;
const ODD_FIRST: u32 = 3;
/// Rounds before anything is chosen.
const WARM_UP: u32 = 6;
/// Rounds whose verdicts are guessed are no longer than comes to this share of the tokens of a round without end.
const MOST_OF_IT: f64 = 0.9;

/// The state of one session.
#[derive(Debug)]
pub(crate) struct RoundLength {
    most: usize,
    /// By [`Way`].
    fits: [Fit; WAYS],
}

/// What is known of rounds in one way.
#[derive(Debug, Clone, Copy, Default)]
struct Fit {
    chosen: Option<usize>,
    rounds: u32,
    /// Sums over timed rounds: 1, k, k², seconds, k · seconds.
    sums: [f64; 5],
}

impl RoundLength {
    /// Rounds of up to `most` tokens, at least 1.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            fits: Default::default(),
        }
    }

    /// Tokens of the round that begins now, from 1 to the most; a draft token is accepted with this probability.
    pub(crate) fn next(&self, way: Way, acceptance: f64) -> usize {
        let most = match way {
            Way::Waiting => self.most,
            Way::Ahead | Way::Unawaited => self.most_of_it(acceptance),
        };
        self.fits[way as usize].next(most)
    }

    /// A round of `proposed` tokens was judged, where rounds followed one another so long after the one before.
    pub(crate) fn judged(
        &mut self,
        way: Way,
        proposed: usize,
        took: Option<Duration>,
        acceptance: f64,
    ) {
        self.fits[way as usize].judged(proposed, took, (acceptance, self.most));
    }

    /// See [`MOST_OF_IT`].
    fn most_of_it(&self, acceptance: f64) -> usize {
        let enough = MOST_OF_IT / (1.0 - acceptance);
        (1..self.most)
            .find(|&length| expected_tokens(acceptance, length) >= enough)
            .unwrap_or(self.most)
    }
}

impl Fit {
    fn next(&self, most: usize) -> usize {
        let chosen = self.chosen.unwrap_or(most).min(most);
        let odd = self.rounds % ODD_EVERY == ODD_FIRST;
        match (odd, chosen < most) {
            (false, _) => chosen,
            (true, true) if self.rounds % (2 * ODD_EVERY) < ODD_EVERY => chosen + 1,
            (true, _) => chosen.saturating_sub(1).max(1),
        }
    }

    fn judged(
        &mut self,
        proposed: usize,
        took: Option<Duration>,
        (acceptance, most): (f64, usize),
    ) {
        if let Some(took) = took {
            let (k, seconds) = (proposed as f64, took.as_secs_f64());
            let terms = [1.0, k, k * k, seconds, k * seconds];
            for (sum, term) in self.sums.iter_mut().zip(terms) {
                *sum = FADE * *sum + term;
            }
        }
        self.rounds = self.rounds.wrapping_add(1);
        if self.rounds >= WARM_UP && self.sums[0] > 0.0 {
            self.chosen = Some(self.best(acceptance, most));
        }
    }

    /// The length with the most tokens per second by what is known.
    fn best(&self, acceptance: f64, most: usize) -> usize {
        let [n, k, kk, s, ks] = self.sums;
        let spread = kk - k * k / n;
        // Rounds of one length only tell nothing of the slope.
        let slope = if spread > 1e-3 * n {
            ((ks - k * s / n) / spread).max(0.0)
        } else {
            0.0
        };
        let fixed = ((s - slope * k) / n).max(1e-6);
        let rate = |k: usize| expected_tokens(acceptance, k) / (fixed + slope * k as f64);
        (1..=most)
            .max_by(|&x, &y| rate(x).total_cmp(&rate(y)))
            .unwrap_or(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acceptance::Acceptance;

    /// The length after rounds of which each token is accepted with probability `a`, at these costs in ms.
    fn settled(a: f64, step: f64, fixed: f64, slope: f64) -> usize {
        let ms = |x: f64| Duration::from_secs_f64(x / 1e3);
        let (mut length, mut acceptance) = (RoundLength::new(16), Acceptance::default());
        let mut state = 1u64;
        for _ in 0..400 {
            let proposed = length.next(Way::Waiting, acceptance.probability());
            let accepted = (0..proposed)
                .take_while(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    ((state >> 33) as f64 / (1u64 << 31) as f64) < a
                })
                .count();
            let took = ms(fixed + (step + slope) * proposed as f64);
            acceptance.count(&vec![None; proposed], accepted);
            let probability = acceptance.probability();
            length.judged(Way::Waiting, proposed, Some(took), probability);
        }
        length.fits[Way::Waiting as usize].chosen.unwrap()
    }

    #[test]
    fn dear_rounds_are_long_and_cheap_ones_short() {
        // The best lengths of the formula: found by hand.
        assert!(settled(0.9, 0.1, 40.0, 0.0) >= 14);
        assert!((1..=2).contains(&settled(0.6, 1.0, 1.0, 0.5)));
        assert!((3..=6).contains(&settled(0.7, 0.5, 5.0, 0.1)));
        assert_eq!(settled(0.05, 1.0, 2.0, 0.5), 1);
    }
    #[test]
    fn rounds_whose_verdicts_are_guessed_are_no_longer_than_is_worth_guessing() {
        let mut length = RoundLength::new(16);
        // One more token after four of which six in ten are accepted adds 0.08 to 2.3.
        assert_eq!(length.next(Way::Waiting, 0.6), 16);
        assert_eq!(length.next(Way::Ahead, 0.6), 4);
        assert_eq!(length.next(Way::Unawaited, 0.95), 16);
        // Ahead, a round takes the longer the more tokens it has; where it is waited for they make no difference.
        for _ in 0..40 {
            for (way, fixed, slope) in [(Way::Waiting, 90, 0), (Way::Ahead, 10, 10)] {
                let proposed = length.next(way, 0.6);
                let took = Duration::from_millis(fixed + slope * proposed as u64);
                length.judged(way, proposed, Some(took), 0.6);
            }
        }
        let chosen = |way: Way| length.fits[way as usize].chosen;
        assert_eq!(chosen(Way::Waiting), Some(16));
        assert_eq!(chosen(Way::Ahead), Some(1));
    }
}
