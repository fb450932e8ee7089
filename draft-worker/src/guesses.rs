//! [`Guess`]: what the target may add behind a text, by what the draft finds there.
//!
//! A sampling target draws by noise that the draft knows ([`Noise`]), so each token is guessed by when it would arrive in the
//! draft's own race; how early that is tells more than its probability. Of a greedy target the draft knows its own logits.

use specattn_engine::sampling::{Distribution, Noise, token_logprobs};
use specattn_proto::Fault;

use crate::acceptance::Acceptance;

/// Tokens that are guessed to follow a text, at most.
pub(crate) const GUESSES: usize = 32;

/// How often the target's own token is among the guesses of a sampling draft, where it adds one to those that it accepted, and where it
/// rejected one: there its mind is not the draft's. These and what follows were fitted to a thousand verdicts on held-out prose.
const KNOWN_ADDED: f64 = 0.93;
const KNOWN_RECOVERED: f64 = 0.87;

/// How much it tells to arrive early, as a power of the time.
const EARLY_ADDED: f64 = -1.4;
const EARLY_RECOVERED: f64 = -0.75;

/// How often a greedy target that rejects the draft's token takes the one that the draft finds likely besides.
const BESIDE: f64 = 0.5;

/// A token that may follow a text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guess {
    pub(crate) token: u32,
    /// The probability that the target adds it, if it accepted all before.
    pub(crate) added: f64,
    /// The probability that it is recovered, if the target rejects what the draft drew there.
    pub(crate) recovered: f64,
}

impl Guess {
    /// A token of which nothing else is known.
    pub(crate) fn only(token: u32, chance: f64) -> Self {
        Self {
            token,
            added: chance,
            recovered: chance,
        }
    }
}

/// What the draft's distribution gives in the target's race, soonest first; `drawn` is what the draft drew itself.
pub(crate) fn by_noise(distribution: &Distribution, noise: &Noise, drawn: u32) -> Vec<Guess> {
    let contenders = distribution.contenders(noise, GUESSES);
    let early = |time: f64, power: f64| time.max(1e-9).powf(power);
    let (mut added, mut recovered) = (0.0, 0.0);
    for &(token, time) in &contenders {
        added += early(time, EARLY_ADDED);
        if token != drawn {
            recovered += early(time, EARLY_RECOVERED);
        }
    }
    let guess = |(token, time): (u32, f64)| Guess {
        token,
        added: KNOWN_ADDED * early(time, EARLY_ADDED) / added,
        recovered: KNOWN_RECOVERED * early(time, EARLY_RECOVERED)
            / recovered.max(f64::MIN_POSITIVE),
    };
    contenders.into_iter().map(guess).collect()
}

/// What a greedy target may find most probable where the draft finds `token`: that, as often as it accepts one in which the draft
/// has so much doubt, and others where it does not, by what the draft gives them; and the doubt.
///
/// # Errors
/// [`Fault::Internal`] for logits that are not finite.
pub(crate) fn beside(
    token: u32,
    logits: &[f32],
    acceptance: Acceptance,
) -> Result<(Vec<Guess>, f64), Fault> {
    let probs = token_logprobs(logits, token, GUESSES as u32)
        .map_err(|error| Fault::Internal(error.to_string()))?;
    let doubt = 1.0 - f64::from(probs.logprob).exp();
    let mut guesses = vec![Guess::only(token, acceptance.of(Some(doubt)))];
    let others = probs.top.into_iter().filter(|&(other, _)| other != token);
    let share = acceptance.severity() * BESIDE;
    guesses.extend(
        others.map(|(other, logprob)| Guess::only(other, share * f64::from(logprob).exp())),
    );
    Ok((guesses, doubt))
}

#[cfg(test)]
mod tests {
    use specattn_engine::sampling::CounterRng;

    use super::*;

    #[test]
    fn guesses_are_as_likely_as_they_are_early() {
        let weights = (0..100).map(|i| 0.95f32.powi(i)).collect();
        let distribution = Distribution::from_weights(weights).unwrap();
        let noise = CounterRng::new(7).noise(3);
        let first = distribution.draw(&noise);
        let guesses = by_noise(&distribution, &noise, first);
        assert_eq!((guesses.len(), guesses[0].token), (GUESSES, first));
        assert!(guesses.is_sorted_by(|x, y| x.added >= y.added));
        let added: f64 = guesses.iter().map(|guess| guess.added).sum();
        // What was drawn there is not recovered.
        let recovered: f64 = guesses[1..].iter().map(|guess| guess.recovered).sum();
        assert!((added - KNOWN_ADDED).abs() < 1e-9, "{added}");
        assert!((recovered - KNOWN_RECOVERED).abs() < 1e-9, "{recovered}");
        let single = by_noise(&Distribution::single(4), &noise, 4);
        assert_eq!((single.len(), single[0].token), (1, 4));
    }
}
