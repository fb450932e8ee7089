//! [`Sampler`]: the processors between a row of logits and a [`Distribution`], in their order.

use super::cutoff::{Cutoff, Goal, cutoff, gather};
use super::distribution::Distribution;
use super::params::SamplingParams;
use super::softmax::{finite_max, first_index_of, sum, weights_into};
use crate::error::EngineError;
use crate::floats::Floats;

/// The tokens before the row being sampled, as the penalties see them. Ids outside the vocabulary are ignored.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    /// The prompt: counts for the repetition penalty only.
    pub prompt: &'a [u32],
    /// Committed tokens after the prompt.
    pub output: &'a [u32],
    /// This round's draft tokens before the row: output, if they are accepted.
    pub pending: &'a [u32],
}

/// Applies one session's [`SamplingParams`]; keeps its buffers between calls.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    vocab_size: usize,
    /// Logits after bias and penalties; empty until a call needs it.
    adjusted: Vec<f32>,
    /// Weights before truncation; empty until a call needs it.
    weights: Vec<f32>,
    seen: SeenTokens,
}

impl Sampler {
    /// A sampler for rows of `vocab_size` logits.
    ///
    /// # Errors
    /// Those of [`SamplingParams::validate`].
    pub fn new(params: SamplingParams, vocab_size: usize) -> Result<Self, EngineError> {
        params.validate(vocab_size)?;
        Ok(Self {
            params,
            vocab_size,
            adjusted: Vec::new(),
            weights: Vec::new(),
            seen: SeenTokens::default(),
        })
    }

    /// The rule in force.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Whether a row's most probable token, once [`SamplingParams::logit_bias`] is added, is all that [`Sampler::greedy`] needs to
    /// know of it.
    pub fn needs_argmax_only(&self) -> bool {
        self.params.is_greedy() && !self.params.repeats_matter() && !self.params.output_matters()
    }

    /// The distribution of a row whose most probable token is known, where [`Sampler::needs_argmax_only`].
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] for `None`: the row held a NaN or an infinity.
    pub fn greedy(&self, most_probable: Option<u32>) -> Result<Distribution, EngineError> {
        let token = most_probable.ok_or_else(|| EngineError::InvalidArgument {
            what: "logits",
            reason: "a row holds a non-finite value".to_owned(),
        })?;
        Ok(Distribution::single(token))
    }

    /// The distribution to sample the next token from, given a row of `[vocab_size]` logits.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] when the row has another length or holds a NaN or an infinity: a model that yields
    /// these has failed, and no token drawn from them would mean anything.
    pub fn distribution(
        &mut self,
        logits: &[f32],
        history: History<'_>,
    ) -> Result<Distribution, EngineError> {
        if logits.len() != self.vocab_size {
            return Err(EngineError::InvalidArgument {
                what: "logits",
                reason: format!("{} values, wanted {}", logits.len(), self.vocab_size),
            });
        }
        let mut max = finite_max(logits)?;
        let mut row = logits;
        if self.params.adjusts_logits() {
            self.adjust(logits, history);
            row = &self.adjusted;
            max = finite_max(row)?;
        }
        if self.params.is_greedy() {
            let token = first_index_of(row, max).expect("a row holds its own maximum");
            return Ok(Distribution::single(token as u32));
        }
        // Bounded, so that the maximum's own zero stays a zero at temperatures whose inverse overflows.
        let inverse_temperature = (1.0 / self.params.temperature).min(f32::MAX);
        if truncates(&self.params, self.vocab_size) {
            self.weights.resize(self.vocab_size, 0.0);
            weights_into(row, max, inverse_temperature, &mut self.weights);
            Ok(truncated(&self.params, &self.weights))
        } else {
            let mut weights = Floats::of_len(self.vocab_size);
            let total = weights_into(row, max, inverse_temperature, &mut weights);
            Ok(Distribution::dense(weights, total))
        }
    }

    /// Fills `adjusted`: logit bias, then the repetition, presence and frequency penalties.
    fn adjust(&mut self, logits: &[f32], history: History<'_>) {
        let Self {
            params,
            adjusted,
            seen,
            ..
        } = self;
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        for &(token, bias) in &params.logit_bias {
            adjusted[token as usize] += bias;
        }
        let output = || history.output.iter().chain(history.pending).copied();
        if params.repeats_matter() {
            let penalty = params.repetition_penalty;
            seen.clear(adjusted.len());
            for token in history.prompt.iter().copied().chain(output()) {
                if seen.insert(token) {
                    let logit = &mut adjusted[token as usize];
                    *logit = if *logit > 0.0 {
                        *logit / penalty
                    } else {
                        *logit * penalty
                    };
                }
            }
        }
        if params.output_matters() {
            seen.clear(adjusted.len());
            for token in output() {
                if seen.insert(token) {
                    adjusted[token as usize] -= params.presence_penalty;
                }
                if let Some(logit) = adjusted.get_mut(token as usize) {
                    *logit -= params.frequency_penalty;
                }
            }
        }
        // Only logits near f32::MAX overflow here. They are pinned, so that extreme but finite rows stay rows.
        for logit in adjusted {
            *logit = logit.clamp(f32::MIN, f32::MAX);
        }
    }
}

fn truncates(params: &SamplingParams, vocab_size: usize) -> bool {
    keeps_top_k(params, vocab_size) || params.top_p < 1.0 || params.min_p > 0.0
}

fn keeps_top_k(params: &SamplingParams, vocab_size: usize) -> bool {
    params.top_k > 0 && (params.top_k as usize) < vocab_size
}

/// Top-k, then top-p of what that kept, then min-p. `weights` are relative to the largest, which is 1.
fn truncated(params: &SamplingParams, weights: &[f32]) -> Distribution {
    let by_mass = |weights: &[f32]| {
        let goal = f64::from(params.top_p) * sum(weights);
        cutoff(weights, Goal::Mass(goal))
    };
    // Min-p compares with the largest weight, which every rule keeps: where it stands alone it is a threshold too.
    let first = if keeps_top_k(params, weights.len()) {
        cutoff(weights, Goal::Count(params.top_k as usize))
    } else if params.top_p < 1.0 {
        by_mass(weights)
    } else {
        Cutoff::at_least(params.min_p)
    };
    let (mut ids, mut kept) = (Vec::new(), Vec::new());
    gather(weights, first, &mut ids, &mut kept);
    if keeps_top_k(params, weights.len()) && params.top_p < 1.0 {
        let second = by_mass(&kept);
        let (mut indices, mut rest) = (Vec::new(), Vec::new());
        gather(&kept, second, &mut indices, &mut rest);
        ids = indices.iter().map(|&index| ids[index as usize]).collect();
        kept = rest;
    }
    if params.min_p > 0.0 {
        let mut keep = kept.iter().map(|&weight| weight >= params.min_p);
        ids.retain(|_| keep.next().unwrap_or(false));
        kept.retain(|&weight| weight >= params.min_p);
    }
    Distribution::sparse(ids, kept)
}

/// A set of token ids that empties in constant time.
#[derive(Debug, Default)]
struct SeenTokens {
    /// The generation in which a token was last inserted.
    generation_of: Vec<u32>,
    generation: u32,
}

impl SeenTokens {
    fn clear(&mut self, vocab_size: usize) {
        self.generation_of.resize(vocab_size, 0);
        self.generation = match self.generation.checked_add(1) {
            Some(next) => next,
            None => {
                self.generation_of.fill(0);
                1
            }
        };
    }

    /// True when `token` is in the vocabulary and was not in the set.
    fn insert(&mut self, token: u32) -> bool {
        match self.generation_of.get_mut(token as usize) {
            Some(generation) if *generation != self.generation => {
                *generation = self.generation;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests;
