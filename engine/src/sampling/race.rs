//! Draws as races: every token starts with a number of its own and arrives the sooner the more probable it is; the first one is drawn.
//!
//! With exponential numbers E(x) the smallest E(x) / p(x) belongs to x with probability p(x) (the Gumbel-max trick, in other terms). Two
//! distributions that are alike and race with the same numbers mostly have the same winner (Daliri et al., "Coupling without
//! Communication and Drafter-Invariant Speculative Decoding", 2024): so a draft finds what its target is likely to draw.
//!
//! Improbable tokens race as one, since a number for each of a hundred thousand takes long; which of them it was is drawn apart.

use super::rng::Noise;

/// What has less probability races with the rest.
pub(super) const LEAST: f32 = 1.0 / 16_384.0;

/// A race under way.
#[derive(Debug)]
pub(super) struct Race<'a> {
    noise: &'a Noise,
    first: Option<u32>,
    time: f64,
    /// The probability of all that is not told apart.
    rest: f64,
}

impl<'a> Race<'a> {
    pub(super) fn new(noise: &'a Noise) -> Self {
        Self {
            noise,
            first: None,
            time: f64::INFINITY,
            rest: 0.0,
        }
    }

    /// Enters a token of this probability, normalised or not.
    pub(super) fn enter(&mut self, token: u32, prob: f64) {
        if prob < f64::from(LEAST) {
            self.rest += prob;
            return;
        }
        let time = self.noise.of(token) / prob;
        if time < self.time {
            (self.first, self.time) = (Some(token), time);
        }
    }

    /// Enters tokens of less than the least probability, which have so much together.
    pub(super) fn enter_rest(&mut self, prob: f64) {
        self.rest += prob;
    }

    /// The first one, of all `entries` that entered, in the same order; `None` when none had any probability.
    pub(super) fn end(self, entries: impl Iterator<Item = (u32, f64)>) -> Option<u32> {
        if self.rest <= 0.0 || self.noise.of_rest() / self.rest >= self.time {
            return self.first;
        }
        let goal = self.noise.among_rest() * self.rest;
        let (mut mass, mut last) = (0.0, None);
        let rest = entries.filter(|&(_, prob)| prob > 0.0 && prob < f64::from(LEAST));
        for (token, prob) in rest {
            mass += prob;
            last = Some(token);
            if goal < mass {
                break;
            }
        }
        // Where blocks were added up to more than their parts, the last one takes the difference.
        last.or(self.first)
    }
}
