//! [`SparseDistribution`]: the few entries of a draft's q, exactly as sent on the wire.

use crate::error::EngineError;

/// Most entries of a draft distribution.
pub const MAX_DRAFT_ENTRIES: usize = 1024;

/// How far the probabilities' sum may be from 1.
const SUM_TOLERANCE: f64 = 1e-3;

/// A distribution over few tokens: strictly increasing ids, and their probabilities in the same order.
///
/// One that came from outside means nothing until [`SparseDistribution::validate`] has passed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SparseDistribution {
    /// Token ids, strictly increasing.
    pub ids: Vec<u32>,
    /// Their probabilities: positive, finite, summing to 1 within 1e-3; f32 as they travel, so that both sides
    /// calculate with the same numbers.
    pub probs: Vec<f32>,
}

impl SparseDistribution {
    /// Checks the invariants for a vocabulary of `vocab_size` tokens.
    ///
    /// The order of ids is fixed because a draw depends on it: an order of the draft's choice would let it steer the draw.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`], or [`EngineError::InvalidToken`] for an id outside the vocabulary.
    pub fn validate(&self, vocab_size: usize) -> Result<(), EngineError> {
        let invalid = |reason: String| EngineError::InvalidArgument {
            what: "draft distribution",
            reason,
        };
        if self.ids.is_empty() || self.ids.len() > MAX_DRAFT_ENTRIES {
            return Err(invalid(format!(
                "{} entries, wanted 1 to {MAX_DRAFT_ENTRIES}",
                self.ids.len()
            )));
        }
        if self.ids.len() != self.probs.len() {
            return Err(invalid(format!(
                "{} ids and {} probabilities",
                self.ids.len(),
                self.probs.len()
            )));
        }
        if let Some(pair) = self.ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(invalid(format!(
                "ids must increase: {} follows {}",
                pair[1], pair[0]
            )));
        }
        if let Some(&token) = self.ids.last().filter(|&&id| id as usize >= vocab_size) {
            return Err(EngineError::InvalidToken { token, vocab_size });
        }
        if let Some(prob) = self.probs.iter().find(|p| !p.is_finite() || **p <= 0.0) {
            return Err(invalid(format!("probability {prob}")));
        }
        let total = self.total();
        if (total - 1.0).abs() > SUM_TOLERANCE {
            return Err(invalid(format!("probabilities sum to {total}")));
        }
        Ok(())
    }

    /// The probability of `token`, renormalised; 0 for a token without an entry.
    pub fn prob(&self, token: u32) -> f64 {
        match self.ids.binary_search(&token) {
            Ok(index) => f64::from(self.probs[index]) / self.total(),
            Err(_) => 0.0,
        }
    }

    /// The token at quantile `u` in [0, 1) of the cumulative distribution in order of id. An empty distribution, which is
    /// invalid, gives 0.
    pub fn sample(&self, u: f64) -> u32 {
        let goal = u * self.total();
        let mut mass = 0.0;
        for (&id, &prob) in self.ids.iter().zip(&self.probs) {
            mass += f64::from(prob);
            if goal < mass {
                return id;
            }
        }
        // Unreachable for u < 1, since the last partial sum is the total itself.
        self.ids.last().copied().unwrap_or(0)
    }

    /// The probabilities, renormalised, of ids asked for in increasing order.
    pub(super) fn walk(&self) -> impl FnMut(u32) -> f64 + Clone {
        let total = self.total();
        let mut rest = self.ids.iter().zip(&self.probs).peekable();
        move |id| {
            while rest.next_if(|&(&own, _)| own < id).is_some() {}
            rest.next_if(|&(&own, _)| own == id)
                .map_or(0.0, |(_, &prob)| f64::from(prob) / total)
        }
    }

    /// The sum of the probabilities in f64, in order: the same bits on every machine.
    pub(super) fn total(&self) -> f64 {
        self.probs.iter().map(|&prob| f64::from(prob)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(ids: &[u32], probs: &[f32]) -> SparseDistribution {
        SparseDistribution {
            ids: ids.to_vec(),
            probs: probs.to_vec(),
        }
    }

    #[test]
    fn validation_names_what_is_wrong() {
        sparse(&[1, 5], &[0.25, 0.75]).validate(6).unwrap();
        for (bad, word) in [
            (sparse(&[], &[]), "entries"),
            (sparse(&[1, 2], &[1.0]), "ids and"),
            (sparse(&[2, 1], &[0.5, 0.5]), "increase"),
            (sparse(&[1, 1], &[0.5, 0.5]), "increase"),
            (sparse(&[1, 6], &[0.5, 0.5]), "vocabulary"),
            (sparse(&[1, 2], &[f32::NAN, 1.0]), "NaN"),
            (sparse(&[1, 2], &[f32::INFINITY, 1.0]), "inf"),
            (sparse(&[1, 2], &[0.0, 1.0]), "probability 0"),
            (sparse(&[1, 2], &[-0.5, 1.5]), "probability -0.5"),
            (sparse(&[1, 2], &[0.5, 0.4]), "sum"),
            (
                SparseDistribution {
                    ids: (0..1025).collect(),
                    probs: vec![1.0 / 1025.0; 1025],
                },
                "entries",
            ),
        ] {
            let error = bad.validate(6).unwrap_err().to_string();
            assert!(error.contains(word), "{error} lacks {word}");
        }
    }

    #[test]
    fn sampling_follows_the_cumulative_distribution() {
        let q = sparse(&[3, 7, 9], &[0.25, 0.5, 0.25]);
        for (u, token) in [
            (0.0, 3),
            (0.2499, 3),
            (0.25, 7),
            (0.7499, 7),
            (0.75, 9),
            (0.9999999, 9),
        ] {
            assert_eq!(q.sample(u), token);
        }
        assert_eq!(q.prob(7), 0.5);
        assert_eq!(q.prob(8), 0.0);
        // Sums that are a little off 1 are renormalised.
        let loose = sparse(&[3, 7], &[0.5, 0.4995]);
        assert!((loose.prob(3) + loose.prob(7) - 1.0).abs() < 1e-12);
        assert_eq!(loose.sample(1.0 - f64::EPSILON), 7);
    }
}
