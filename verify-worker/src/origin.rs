//! [`Origin`]: how a token came about.

use specattn_proto::v1::TokenOrigin;

/// Who chose a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The draft, and the target accepted it.
    Accepted,
    /// The target, in place of one that it rejected.
    Recovered,
    /// The target, after it accepted all it was to judge.
    Bonus,
    /// The target, in a step alone.
    Solo,
}

impl Origin {
    /// That of the token which a pass draws itself, when it accepted so many of the candidates.
    pub(crate) fn of_drawn(accepted: usize, candidates: usize) -> Self {
        match candidates {
            0 => Self::Solo,
            _ if accepted < candidates => Self::Recovered,
            _ => Self::Bonus,
        }
    }
}

impl From<Origin> for TokenOrigin {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::Accepted => Self::Accepted,
            Origin::Recovered => Self::Recovered,
            Origin::Bonus => Self::Bonus,
            Origin::Solo => Self::Solo,
        }
    }
}
