//! [`Distribution`]: normalised token probabilities, in the form that suits the sampling rule.

use super::cutoff::{Cutoff, gather};
use super::softmax::{scale, sum};
use super::sparse::SparseDistribution;
use crate::error::EngineError;
use crate::floats::Floats;

/// Token probabilities that sum to 1 within f32 rounding. Greedy sampling gives a single token.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    form: Form,
}

#[derive(Debug, Clone, PartialEq)]
enum Form {
    /// One token has it all.
    Single(u32),
    /// Indexed by token id.
    Dense(Floats),
    /// Strictly increasing ids and their probabilities, all positive; not empty.
    Sparse { ids: Vec<u32>, probs: Vec<f32> },
}

/// Probabilities added up at once before the running sum is looked at.
const BLOCK: usize = 256;

impl Distribution {
    /// All probability on one token.
    pub fn single(token: u32) -> Self {
        Self {
            form: Form::Single(token),
        }
    }

    /// From one non-negative weight per token id, which need not be normalised.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] when a weight is negative or not finite, or none is positive.
    pub fn from_weights(weights: Vec<f32>) -> Result<Self, EngineError> {
        let invalid = |reason: String| EngineError::InvalidArgument {
            what: "distribution",
            reason,
        };
        if let Some(weight) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
            return Err(invalid(format!("weight {weight}")));
        }
        let total = sum(&weights);
        if total < f64::from(f32::MIN_POSITIVE) || total > f64::from(f32::MAX) {
            return Err(invalid(format!("weights sum to {total}")));
        }
        Ok(Self::dense(weights.into(), total))
    }

    /// From weights and their positive sum.
    pub(super) fn dense(mut weights: Floats, total: f64) -> Self {
        scale(&mut weights, (1.0 / total) as f32);
        Self {
            form: Form::Dense(weights),
        }
    }

    /// From positive weights of strictly increasing ids; at least one.
    pub(super) fn sparse(ids: Vec<u32>, mut weights: Vec<f32>) -> Self {
        debug_assert!(!ids.is_empty() && ids.len() == weights.len());
        let total = sum(&weights);
        scale(&mut weights, (1.0 / total) as f32);
        Self {
            form: Form::Sparse {
                ids,
                probs: weights,
            },
        }
    }

    /// The probability of `token`; 0 outside the vocabulary.
    pub fn prob(&self, token: u32) -> f32 {
        match &self.form {
            Form::Single(only) => f32::from(*only == token),
            Form::Dense(probs) => probs.get(token as usize).copied().unwrap_or(0.0),
            Form::Sparse { ids, probs } => match ids.binary_search(&token) {
                Ok(index) => probs[index],
                Err(_) => 0.0,
            },
        }
    }

    /// The most probable token, the lowest id among equals.
    pub fn argmax(&self) -> u32 {
        match &self.form {
            Form::Single(token) => *token,
            Form::Dense(probs) => first_largest(probs) as u32,
            Form::Sparse { ids, probs } => ids[first_largest(probs)],
        }
    }

    /// The token at quantile `u` in [0, 1) of the cumulative distribution in order of id.
    pub fn sample(&self, u: f64) -> u32 {
        match &self.form {
            Form::Single(token) => *token,
            Form::Dense(probs) => quantile(probs, u) as u32,
            Form::Sparse { ids, probs } => ids[quantile(probs, u)],
        }
    }

    /// The token at quantile `u` of norm(max(0, self − q)): what replaces a rejected token. `q` gives the probabilities of
    /// ids asked for in increasing order.
    ///
    /// Where nothing remains, which takes rounding in a near-certain acceptance, it is drawn from the distribution itself.
    pub(super) fn sample_residual(&self, q: impl FnMut(u32) -> f64 + Clone, u: f64) -> u32 {
        let recovered = match &self.form {
            Form::Single(token) => Some(*token),
            Form::Dense(probs) => {
                let entries = probs.iter().enumerate();
                draw_residual(entries.map(|(id, &prob)| (id as u32, prob)), q, u)
            }
            Form::Sparse { ids, probs } => {
                let entries = ids.iter().zip(probs);
                draw_residual(entries.map(|(&id, &prob)| (id, prob)), q, u)
            }
        };
        recovered.unwrap_or_else(|| self.sample(u))
    }

    /// Σ min(self, other): the probability that the rule of speculative sampling accepts a token drawn from one of the
    /// two as the other's; one minus their total variation distance.
    pub fn overlap(&self, other: &Self) -> f64 {
        let shared = |id: u32, prob: f32| f64::from(prob.min(other.prob(id)));
        match &self.form {
            Form::Single(token) => shared(*token, 1.0),
            Form::Dense(probs) => match &other.form {
                Form::Dense(others) => {
                    let pairs = probs.iter().zip(others.iter());
                    pairs.map(|(&a, &b)| f64::from(a.min(b))).sum()
                }
                _ => other.overlap(self),
            },
            Form::Sparse { ids, probs } => {
                let entries = ids.iter().zip(probs);
                entries.map(|(&id, &prob)| shared(id, prob)).sum()
            }
        }
    }

    /// The entries that `choose` keeps of the probabilities, in order of id, renormalised in f32.
    pub(super) fn truncated(&self, choose: impl FnOnce(&[f32]) -> Cutoff) -> SparseDistribution {
        let mut kept = SparseDistribution::default();
        match &self.form {
            Form::Single(token) => {
                kept.ids.push(*token);
                kept.probs.push(1.0);
            }
            Form::Dense(probs) => {
                gather(probs, choose(probs), &mut kept.ids, &mut kept.probs);
            }
            Form::Sparse { ids, probs } => {
                gather(probs, choose(probs), &mut kept.ids, &mut kept.probs);
                // So far indices into the entries, which keep the order of ids.
                for id in &mut kept.ids {
                    *id = ids[*id as usize];
                }
            }
        }
        let total = kept.total();
        scale(&mut kept.probs, (1.0 / total) as f32);
        kept
    }
}

fn first_largest(probs: &[f32]) -> usize {
    let mut best = 0;
    for (index, &prob) in probs.iter().enumerate() {
        if prob > probs[best] {
            best = index;
        }
    }
    best
}

/// The index at quantile `u`: by blocks first, then inside the block.
fn quantile(probs: &[f32], u: f64) -> usize {
    let goal = u * probs.chunks(BLOCK).map(sum).sum::<f64>();
    let mut mass = 0.0;
    let mut last_positive = 0;
    for (block, chunk) in probs.chunks(BLOCK).enumerate() {
        let chunk_mass = sum(chunk);
        if goal >= mass + chunk_mass {
            mass += chunk_mass;
            continue;
        }
        for (offset, &prob) in chunk.iter().enumerate() {
            if prob > 0.0 {
                mass += f64::from(prob);
                last_positive = block * BLOCK + offset;
                if goal < mass {
                    break;
                }
            }
        }
        // The block's sum may round higher than its parts: then the block's last token takes the difference.
        break;
    }
    last_positive
}

fn draw_residual(
    entries: impl Iterator<Item = (u32, f32)> + Clone,
    q: impl FnMut(u32) -> f64 + Clone,
    u: f64,
) -> Option<u32> {
    let excess = || {
        let mut q = q.clone();
        let entries = entries.clone();
        entries.map(move |(id, p)| (id, (f64::from(p) - q(id)).max(0.0)))
    };
    let goal = u * excess().map(|(_, mass)| mass).sum::<f64>();
    let mut mass = 0.0;
    for (id, part) in excess() {
        mass += part;
        if goal < mass {
            return Some(id);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::cutoff::{Goal, cutoff};

    #[test]
    fn dense_and_sparse_agree() {
        let weights: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 13) as f32).collect();
        let dense = Distribution::from_weights(weights.clone()).unwrap();
        let ids: Vec<u32> = (0..1000).filter(|&i| weights[i as usize] > 0.0).collect();
        let positive = ids.iter().map(|&i| weights[i as usize]).collect();
        let sparse = Distribution::sparse(ids, positive);
        assert_eq!(dense.argmax(), sparse.argmax());
        for step in 0..1000 {
            // Quantiles between the steps of the cumulative distribution, where rounding cannot decide.
            let u = (f64::from(step) + 0.37) / 1000.0;
            assert_eq!(dense.sample(u), sparse.sample(u), "at {u}");
        }
        for token in 0..1001 {
            assert!((dense.prob(token) - sparse.prob(token)).abs() < 1e-8);
        }
    }

    #[test]
    fn quantiles_never_hit_a_token_without_probability() {
        let mut weights = vec![0.0; 700];
        weights[5] = 1.0;
        weights[300] = 3.0;
        let p = Distribution::from_weights(weights).unwrap();
        for (u, token) in [
            (0.0, 5),
            (0.2499, 5),
            (0.25, 300),
            (1.0 - f64::EPSILON, 300),
        ] {
            assert_eq!(p.sample(u), token);
        }
    }

    #[test]
    fn residual_is_what_q_lacks() {
        let p = Distribution::from_weights(vec![0.5, 0.25, 0.25, 0.0]).unwrap();
        let q = SparseDistribution {
            ids: vec![0, 3],
            probs: vec![0.75, 0.25],
        };
        assert_eq!(p.sample_residual(q.walk(), 0.0), 1);
        assert_eq!(p.sample_residual(q.walk(), 0.49), 1);
        assert_eq!(p.sample_residual(q.walk(), 0.51), 2);
        assert_eq!(p.sample_residual(q.walk(), 0.999), 2);
        // q above p everywhere it matters: nothing remains, so p itself.
        let p = Distribution::from_weights(vec![1.0, 0.0]).unwrap();
        let q = SparseDistribution {
            ids: vec![0],
            probs: vec![1.0],
        };
        assert_eq!(p.sample_residual(q.walk(), 0.5), 0);
    }

    #[test]
    fn overlap_is_the_shared_mass_in_every_form() {
        let weights = [0.5, 0.0, 0.25, 0.25];
        let dense = Distribution::from_weights(weights.to_vec()).unwrap();
        let sparse = Distribution::sparse(vec![0, 2, 3], vec![0.5, 0.25, 0.25]);
        let other = Distribution::from_weights(vec![0.25, 0.5, 0.25, 0.0]).unwrap();
        for one in [&dense, &sparse] {
            assert!((one.overlap(&other) - 0.5).abs() < 1e-7);
            assert!((other.overlap(one) - 0.5).abs() < 1e-7);
            assert!((one.overlap(&dense) - 1.0).abs() < 1e-7);
            assert_eq!(one.overlap(&Distribution::single(2)), 0.25);
            assert_eq!(Distribution::single(1).overlap(one), 0.0);
        }
        assert_eq!(
            Distribution::single(1).overlap(&Distribution::single(1)),
            1.0
        );
    }

    #[test]
    fn truncation_keeps_the_largest_and_renormalises() {
        let p = Distribution::from_weights(vec![1.0, 4.0, 2.0, 4.0, 0.0]).unwrap();
        let kept = p.truncated(|probs| cutoff(probs, Goal::Count(2)));
        assert_eq!((kept.ids, kept.probs), (vec![1, 3], vec![0.5, 0.5]));
        let sparse = Distribution::sparse(vec![10, 20, 30], vec![1.0, 2.0, 2.0]);
        let kept = sparse.truncated(|probs| cutoff(probs, Goal::Count(2)));
        assert_eq!((kept.ids, kept.probs), (vec![20, 30], vec![0.5, 0.5]));
        let kept = Distribution::single(9).truncated(|probs| cutoff(probs, Goal::Count(2)));
        assert_eq!((kept.ids, kept.probs), (vec![9], vec![1.0]));
    }

    #[test]
    fn weights_must_make_a_distribution() {
        for bad in [
            vec![],
            vec![0.0],
            vec![-1.0, 2.0],
            vec![f32::NAN],
            vec![f32::INFINITY],
        ] {
            assert!(Distribution::from_weights(bad).is_err());
        }
    }
}
