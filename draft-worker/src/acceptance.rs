//! [`Acceptance`]: how often a draft token is accepted. What a round then comes to says [`specattn_worker::expected_tokens`].

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
