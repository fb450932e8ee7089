//! The rule that joins draft and target (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
//! ICML 2023; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023).
//!
//! A draft token d drawn from q is accepted with probability min(1, p(d) / q(d)); after a rejection the *recovered* token
//! is drawn from norm(max(0, p − q)); after γ accepted tokens the *bonus* token is drawn from p. Whatever q is, what comes
//! out has the distribution p, provided that d was drawn from q. The draft therefore truncates q first, draws from exactly
//! the f32 values that it sends, and [`check_draft`] replays the draw.

use super::cutoff::{Goal, cutoff};
use super::distribution::Distribution;
use super::rng::{CounterRng, Noise, Purpose};
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

/// What a proposed token was drawn from.
#[derive(Debug, Clone, Copy)]
pub enum Origin<'a> {
    /// The token was certain: a greedy draft's.
    Certain,
    /// A draft's distribution.
    Draft(&'a SparseDistribution),
    /// A distribution of the target's own, read sparsely: a provisional token's.
    Target(&'a Distribution),
}

/// A proposed token, ready to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The token.
    pub token: u32,
    /// What it was drawn from.
    pub origin: Origin<'a>,
}

impl<'a> From<&'a DraftToken> for Candidate<'a> {
    fn from(draft: &'a DraftToken) -> Self {
        Self {
            token: draft.token,
            origin: draft.q.as_ref().map_or(Origin::Certain, Origin::Draft),
        }
    }
}

impl Candidate<'_> {
    /// The probability q with which the token was drawn.
    fn prob(&self) -> f64 {
        match self.origin {
            Origin::Certain => 1.0,
            Origin::Draft(q) => q.prob(self.token),
            Origin::Target(q) => f64::from(q.prob(self.token)),
        }
    }

    /// The recovered token in its place, drawn from norm(max(0, p − q)).
    fn recovered(&self, p: &Distribution, noise: &Noise) -> u32 {
        match self.origin {
            Origin::Certain => p.draw_residual(|id| f64::from(u8::from(id == self.token)), noise),
            Origin::Draft(q) => p.draw_residual(q.walk(), noise),
            Origin::Target(q) => p.draw_residual(|id| f64::from(q.prob(id)), noise),
        }
    }
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

/// Judges a round behind the text `before`: `target` holds p after that and after each proposed token, γ + 1 in all. A draft has
/// passed [`check_draft`].
///
/// With γ = 0 it samples the next token of a step without a draft.
///
/// # Panics
/// When `target` is not one longer than `proposed`: both are the caller's own.
pub fn verify_round(
    target: &[Distribution],
    proposed: &[Candidate<'_>],
    rng: &CounterRng,
    before: &[u32],
) -> RoundOutcome {
    assert_eq!(
        target.len(),
        proposed.len() + 1,
        "γ + 1 distributions judge γ tokens"
    );
    let position = |accepted: usize| (before.len() + accepted) as u64;
    let accepted = target.iter().zip(proposed).enumerate();
    let accepted = accepted.take_while(|&(index, (p, candidate))| {
        let q_prob = candidate.prob();
        // u < p / q without the division; a token that q cannot give is never accepted.
        let u = rng.uniform(position(index), Purpose::Accept);
        q_prob > 0.0 && u * q_prob < f64::from(p.prob(candidate.token))
    });
    let accepted = accepted.count();
    let tokens = proposed[..accepted].iter().map(|candidate| candidate.token);
    let text = before.iter().copied().chain(tokens);
    let noise = rng.behind(text).noise(position(accepted));
    let p = &target[accepted];
    RoundOutcome {
        accepted,
        next_token: match proposed.get(accepted) {
            Some(rejected) => rejected.recovered(p, &noise),
            None => p.draw(&noise),
        },
    }
}

#[cfg(test)]
mod tests;
