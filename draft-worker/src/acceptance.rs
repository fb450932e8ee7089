//! [`Acceptance`]: how often draft tokens are accepted. What a round then comes to says [`specattn_worker::expected_tokens`].

use specattn_engine::sampling::DraftToken;

/// What is left of a round's count after the next.
const FADE: f64 = 0.97;

/// The count of one session.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Acceptance {
    /// Draft tokens judged: those accepted, and the first that was not.
    judged: f64,
    accepted: f64,
    /// What the draft did not give those of them of which it knows that, and how many of these were rejected.
    doubt: f64,
    rejected: f64,
}

impl Acceptance {
    /// Of a round of tokens of these doubts so many were accepted.
    pub(crate) fn count(&mut self, doubts: &[Option<f64>], accepted: usize) {
        let judged = &doubts[..(accepted + 1).min(doubts.len())];
        self.judged = FADE * self.judged + judged.len() as f64;
        self.accepted = FADE * self.accepted + accepted as f64;
        if judged.iter().any(Option::is_some) {
            let rejected = doubts.get(accepted).copied().flatten();
            self.doubt = FADE * self.doubt + judged.iter().flatten().sum::<f64>();
            self.rejected = FADE * self.rejected + f64::from(u8::from(rejected.is_some()));
        }
    }

    /// The probability that a draft token is accepted; below 1.
    pub(crate) fn probability(self) -> f64 {
        ((self.accepted + 0.5) / (self.judged + 1.0)).min(0.999)
    }

    /// The share of the draft's doubt in a token that comes to its rejection, at most 1. The rule of speculative sampling
    /// rejects a token drawn from q with probability max(0, 1 - p / q); over many tokens that is about in proportion to 1 - q. So are
    /// rejections of the draft's most probable token in greedy sessions.
    pub(crate) fn severity(self) -> f64 {
        ((self.rejected + 0.5) / (self.doubt + 1.0)).min(1.0)
    }

    /// The probability that a token is accepted of which the draft has this [`doubt`].
    pub(crate) fn of(self, doubt: Option<f64>) -> f64 {
        match doubt {
            Some(doubt) => (1.0 - self.severity() * doubt).min(0.999),
            None => self.probability(),
        }
    }
}

/// What the draft did not give a token that it drew; `None` for its most probable one, of which q is not told.
pub(crate) fn doubt(token: &DraftToken) -> Option<f64> {
    let q = token.q.as_ref()?;
    Some((1.0 - q.prob(token.token)).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use specattn_engine::sampling::SparseDistribution;

    use super::*;

    fn drawn(prob: f32) -> DraftToken {
        let q = SparseDistribution {
            ids: vec![0, 1],
            probs: vec![prob, 1.0 - prob],
        };
        DraftToken {
            token: 0,
            q: Some(q),
        }
    }

    #[test]
    fn tokens_of_which_the_draft_is_sure_are_accepted_more_often() {
        let mut acceptance = Acceptance::default();
        // Of tokens with half the mass one in four is rejected: half of the doubt.
        for round in 0..400 {
            acceptance.count(&[doubt(&drawn(0.5))], usize::from(round % 4 > 0));
        }
        assert!((0.7..0.8).contains(&acceptance.probability()));
        assert!((0.45..0.55).contains(&acceptance.severity()));
        assert!(acceptance.of(Some(0.1)) > 0.93);
        assert!((0.5..0.6).contains(&acceptance.of(Some(0.9))));
        assert_eq!(acceptance.of(None), acceptance.probability());
    }
}
