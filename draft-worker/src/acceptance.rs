//! [`Acceptance`]: how often a draft token is accepted, and what a round then comes to.
//!
//! With a probability a that a draft token is accepted, a round of k tokens settles (1 − a^(k+1)) / (1 − a) tokens on average
//! (Leviathan et al. 2023).

/// What is left of a round's count after the next.
const FADE: f64 = 0.97;

/// The count of one session.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Acceptance {
    /// Draft tokens judged: those accepted, and the first that was not.
    judged: f64,
    accepted: f64,
}

impl Acceptance {
    /// Of a round of `proposed` tokens `accepted` were accepted.
    pub(crate) fn count(&mut self, proposed: usize, accepted: usize) {
        self.judged = FADE * self.judged + (accepted + usize::from(accepted < proposed)) as f64;
        self.accepted = FADE * self.accepted + accepted as f64;
    }

    /// The probability that a draft token is accepted; below 1.
    pub(crate) fn probability(self) -> f64 {
        ((self.accepted + 0.5) / (self.judged + 1.0)).min(0.999)
    }
}

/// Tokens that a round of `length` settles on average.
pub(crate) fn expected_tokens(probability: f64, length: usize) -> f64 {
    (1.0 - probability.powi(length as i32 + 1)) / (1.0 - probability)
}
