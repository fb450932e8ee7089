//! [`Distribution`]: normalised token probabilities, in the form that suits the sampling rule.

use super::cutoff::{Cutoff, gather};
use super::race::{LEAST, Race};
use super::rng::Noise;
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

/// Probabilities looked at together: most blocks of a large vocabulary hold none that races by itself.
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

    /// The token that `noise` draws.
    pub fn draw(&self, noise: &Noise) -> u32 {
        match &self.form {
            Form::Single(token) => *token,
            Form::Dense(probs) => {
                let mut race = Race::new(noise);
                for (block, chunk) in probs.chunks(BLOCK).enumerate() {
                    if !races(chunk) {
                        race.enter_rest(sum(chunk));
                        continue;
                    }
                    for (offset, &prob) in chunk.iter().enumerate() {
                        race.enter((block * BLOCK + offset) as u32, f64::from(prob));
                    }
                }
                race.end(dense_entries(probs)).unwrap_or(0)
            }
            Form::Sparse { ids, probs } => {
                draw_from(|| sparse_entries(ids, probs), noise).unwrap_or(ids[0])
            }
        }
    }

    /// The token that `noise` draws from norm(max(0, self − q)): what replaces a rejected token. `q` gives the probabilities
    /// of ids asked for in increasing order.
    ///
    /// Where nothing remains, which takes rounding in a near-certain acceptance, it is drawn from the distribution itself.
    pub(super) fn draw_residual(&self, q: impl FnMut(u32) -> f64 + Clone, noise: &Noise) -> u32 {
        let recovered = match &self.form {
            Form::Single(token) => Some(*token),
            Form::Dense(probs) => draw_from(|| excess(dense_entries(probs), q.clone()), noise),
            Form::Sparse { ids, probs } => {
                draw_from(|| excess(sparse_entries(ids, probs), q.clone()), noise)
            }
        };
        recovered.unwrap_or_else(|| self.draw(noise))
    }

    /// The tokens that `noise` would draw first, at most `most`, and when each arrives: the first one is what
    /// [`draw`](Self::draw) gives, unless that is one of the improbable ones.
    pub fn contenders(&self, noise: &Noise, most: usize) -> Vec<(u32, f64)> {
        let arrives = |(token, prob): (u32, f64)| {
            (prob >= f64::from(LEAST)).then(|| (token, noise.of(token) / prob))
        };
        let mut all: Vec<(u32, f64)> = match &self.form {
            Form::Single(token) => vec![(*token, 0.0)],
            Form::Dense(probs) => {
                let blocks = probs.chunks(BLOCK).enumerate();
                let blocks = blocks.filter(|(_, chunk)| races(chunk));
                let entries = blocks.flat_map(|(block, chunk)| {
                    let first = (block * BLOCK) as u32;
                    dense_entries(chunk).map(move |(id, prob)| (first + id, prob))
                });
                entries.filter_map(arrives).collect()
            }
            Form::Sparse { ids, probs } => sparse_entries(ids, probs).filter_map(arrives).collect(),
        };
        let sooner = |x: &(u32, f64), y: &(u32, f64)| x.1.total_cmp(&y.1);
        if all.len() > most && most > 0 {
            all.select_nth_unstable_by(most - 1, sooner);
        }
        all.truncate(most);
        all.sort_unstable_by(sooner);
        all
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

/// Whether any of these probabilities races by itself.
fn races(probs: &[f32]) -> bool {
    probs.iter().copied().fold(0.0, f32::max) >= LEAST
}

fn dense_entries(probs: &[f32]) -> impl Iterator<Item = (u32, f64)> + Clone {
    let entries = probs.iter().enumerate();
    entries.map(|(id, &prob)| (id as u32, f64::from(prob)))
}

fn sparse_entries(ids: &[u32], probs: &[f32]) -> impl Iterator<Item = (u32, f64)> + Clone {
    let entries = ids.iter().zip(probs);
    entries.map(|(&id, &prob)| (id, f64::from(prob)))
}

/// max(0, p − q).
fn excess(
    entries: impl Iterator<Item = (u32, f64)>,
    mut q: impl FnMut(u32) -> f64,
) -> impl Iterator<Item = (u32, f64)> {
    entries.map(move |(id, p)| (id, (p - q(id)).max(0.0)))
}

/// What `noise` draws from the same entries as often as they are asked for, normalised or not.
fn draw_from<I: Iterator<Item = (u32, f64)>>(
    entries: impl Fn() -> I,
    noise: &Noise,
) -> Option<u32> {
    let mut race = Race::new(noise);
    entries().for_each(|(id, prob)| race.enter(id, prob));
    race.end(entries())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::CounterRng;
    use crate::sampling::cutoff::{Goal, cutoff};

    #[test]
    fn dense_and_sparse_agree() {
        let weights: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 13) as f32).collect();
        let dense = Distribution::from_weights(weights.clone()).unwrap();
        let ids: Vec<u32> = (0..1000).filter(|&i| weights[i as usize] > 0.0).collect();
        let positive = ids.iter().map(|&i| weights[i as usize]).collect();
        let sparse = Distribution::sparse(ids, positive);
        assert_eq!(dense.argmax(), sparse.argmax());
        for position in 0..1000 {
            let noise = CounterRng::new(3).noise(position);
            assert_eq!(dense.draw(&noise), sparse.draw(&noise), "at {position}");
        }
        for token in 0..1001 {
            assert!((dense.prob(token) - sparse.prob(token)).abs() < 1e-8);
        }
    }

    /// How often each of `tokens` is drawn of 40,000 times.
    fn counts(tokens: usize, mut draw: impl FnMut(&Noise) -> u32) -> Vec<f64> {
        let mut counts = vec![0.0; tokens];
        for position in 0..40_000 {
            counts[draw(&CounterRng::new(5).noise(position)) as usize] += 1.0;
        }
        counts
    }

    #[test]
    fn draws_are_as_frequent_as_probable() {
        // Two tokens, and five hundred that race as one.
        let mut weights = vec![0.0; 1700];
        (weights[5], weights[300]) = (1.0, 3.0);
        (700..1200).for_each(|id| weights[id] = 0.0002);
        let total: f32 = weights.iter().sum();
        let p = Distribution::from_weights(weights.clone()).unwrap();
        let counts = counts(1700, |noise| p.draw(noise));
        let share = |ids: std::ops::Range<usize>| counts[ids].iter().sum::<f64>() / 40_000.0;
        let total = f64::from(total);
        assert!((share(5..6) - 1.0 / total).abs() < 0.01);
        assert!((share(300..301) - 3.0 / total).abs() < 0.01);
        assert!((share(700..1200) - 0.1 / total).abs() < 0.004);
        assert!((share(700..950) - 0.05 / total).abs() < 0.003);
        let impossible = counts.iter().zip(&weights).filter(|(_, w)| **w == 0.0);
        assert!(impossible.into_iter().all(|(count, _)| *count == 0.0));
    }

    #[test]
    fn residual_is_what_q_lacks() {
        let p = Distribution::from_weights(vec![0.5, 0.25, 0.25, 0.0]).unwrap();
        let q = SparseDistribution {
            ids: vec![0, 3],
            probs: vec![0.75, 0.25],
        };
        let counts = counts(4, |noise| p.draw_residual(q.walk(), noise));
        assert_eq!((counts[0], counts[3]), (0.0, 0.0));
        assert!((counts[1] / 40_000.0 - 0.5).abs() < 0.01, "{counts:?}");
        // q above p everywhere it matters: nothing remains, so p itself.
        let p = Distribution::from_weights(vec![1.0, 0.0]).unwrap();
        let q = SparseDistribution {
            ids: vec![0],
            probs: vec![1.0],
        };
        let noise = CounterRng::new(5).noise(0);
        assert_eq!(p.draw_residual(q.walk(), &noise), 0);
    }

    #[test]
    fn who_shares_the_noise_finds_what_is_drawn() {
        let p = Distribution::from_weights((0..200).map(|i| 0.97f32.powi(i)).collect()).unwrap();
        let like = |i: i32| 0.97f32.powi(i) * if i % 3 == 0 { 1.5 } else { 0.8 };
        let q = Distribution::from_weights((0..200).map(like).collect()).unwrap();
        let (mut first, mut among) = (0, 0);
        for position in 0..1000 {
            let noise = CounterRng::new(5).noise(position);
            let contenders = q.contenders(&noise, 4);
            let drawn = p.draw(&noise);
            first += u32::from(contenders[0].0 == drawn);
            among += u32::from(contenders.iter().any(|&(token, _)| token == drawn));
            assert!(contenders.is_sorted_by(|x, y| x.1 <= y.1) && contenders.len() == 4);
            assert_eq!(p.contenders(&noise, 1)[0].0, drawn);
        }
        // By probability alone the best guess would be right in 3 of 100.
        assert!(first > 600 && among > 950, "{first} {among}");
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
