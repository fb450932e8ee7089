//! The rule that joins draft and target (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
//! ICML 2023; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023).
//!
//! A draft token d drawn from q is accepted with probability min(1, p(d) / q(d)); after a rejection the *recovered* token
//! is drawn from norm(max(0, p − q)); after γ accepted tokens the *bonus* token is drawn from p. Whatever q is, what comes
//! out has the distribution p, provided that d was drawn from q. The draft therefore truncates q first, draws from exactly
//! the f32 values that it sends, and [`check_draft`] replays the draw.

use super::cutoff::{Goal, cutoff};
use super::distribution::Distribution;
use super::rng::{CounterRng, Purpose};
use super::sparse::{MAX_DRAFT_ENTRIES, SparseDistribution};
use crate::error::EngineError;

/// A proposed token.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftToken {
    /// The token.
    pub token: u32,
    /// What it was drawn from; `None` in greedy sessions, where it counts as certain.
    pub q: Option<SparseDistribution>,
}

/// What a round came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundOutcome {
    /// Draft tokens accepted, 0 to γ.
    pub accepted: usize,
    /// The token after them: recovered when a draft token was rejected, else bonus.
    pub next_token: u32,
}

/// Draws the draft token at token index `position`: from the `max_entries` (1 to 1,024, else the nearest bound) most
/// probable tokens of `distribution`, renormalised. Gives the token and what it was drawn from.
pub fn draft_token(
    distribution: &Distribution,
    max_entries: usize,
    rng: &CounterRng,
    position: u64,
) -> (u32, SparseDistribution) {
    let entries = max_entries.clamp(1, MAX_DRAFT_ENTRIES);
    let q = distribution.truncated(|probs| cutoff(probs, Goal::Count(entries)));
    let token = q.sample(rng.uniform(position, Purpose::Draft));
    (token, q)
}

/// Checks a proposal whose first token has index `position`: every q well-formed, every token the one that q and the
/// session's random numbers give. In a greedy session: no q, tokens below `vocab_size`.
///
/// A draft so checked cannot pair a token of its choice with a q of its choice.
///
/// # Errors
/// [`EngineError::InvalidArgument`] or [`EngineError::InvalidToken`].
pub fn check_draft(
    draft: &[DraftToken],
    greedy: bool,
    vocab_size: usize,
    rng: &CounterRng,
    position: u64,
) -> Result<(), EngineError> {
    let invalid = |index: usize, reason: &str| EngineError::InvalidArgument {
        what: "draft",
        reason: format!("token {index} of the round {reason}"),
    };
    for (index, DraftToken { token, q }) in draft.iter().enumerate() {
        if *token as usize >= vocab_size {
            return Err(EngineError::InvalidToken {
                token: *token,
                vocab_size,
            });
        }
        match (q, greedy) {
            (None, true) => {}
            (Some(_), true) => {
                return Err(invalid(index, "has a distribution in a greedy session"));
            }
            (None, false) => return Err(invalid(index, "lacks its distribution")),
            (Some(q), false) => {
                q.validate(vocab_size)?;
                let u = rng.uniform(position.wrapping_add(index as u64), Purpose::Draft);
                if q.sample(u) != *token {
                    return Err(invalid(index, "is not what its distribution gives"));
                }
            }
        }
    }
    Ok(())
}

/// Judges a round: `target` holds p after the committed tokens and after each draft token, γ + 1 in all; `position` is the
/// index of the first draft token. The draft has passed [`check_draft`].
///
/// With γ = 0 it samples the next token of a step without a draft.
///
/// # Panics
/// When `target` is not one longer than `draft`: both are the caller's own.
pub fn verify_round(
    target: &[Distribution],
    draft: &[DraftToken],
    rng: &CounterRng,
    position: u64,
) -> RoundOutcome {
    assert_eq!(
        target.len(),
        draft.len() + 1,
        "γ + 1 distributions judge γ tokens"
    );
    for (index, (p, draft)) in target.iter().zip(draft).enumerate() {
        let position = position + index as u64;
        let q_prob = match &draft.q {
            Some(q) => q.prob(draft.token),
            None => 1.0,
        };
        // u < p / q without the division; a token that q cannot give is never accepted.
        let u = rng.uniform(position, Purpose::Accept);
        if q_prob > 0.0 && u * q_prob < f64::from(p.prob(draft.token)) {
            continue;
        }
        let u = rng.uniform(position, Purpose::Recover);
        let next_token = match &draft.q {
            Some(q) => p.sample_residual(q, u),
            None => p.sample_residual(&certain(draft.token), u),
        };
        return RoundOutcome {
            accepted: index,
            next_token,
        };
    }
    let u = rng.uniform(position + draft.len() as u64, Purpose::Bonus);
    RoundOutcome {
        accepted: draft.len(),
        next_token: target[draft.len()].sample(u),
    }
}

/// All probability on one token: what a draft token without q was drawn from.
fn certain(token: u32) -> SparseDistribution {
    SparseDistribution {
        ids: vec![token],
        probs: vec![1.0],
    }
}

#[cfg(test)]
mod tests;
