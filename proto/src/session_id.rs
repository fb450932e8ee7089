//! [`SessionId`]: 128 random bits, on the wire 32 lower-case hex digits.

use std::fmt;
use std::str::FromStr;

use crate::validate::Invalid;

/// Names a session everywhere: at the gateway that made it, at its verify worker and at its draft worker.
///
/// Where clients have no keys, whoever knows the id may cancel or resume the session, so it must come from a cryptographic
/// generator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(u128);

impl SessionId {
    /// Makes an id of 128 random bits.
    pub const fn from_bits(bits: u128) -> Self {
        Self(bits)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SessionId {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let well_formed =
            text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let bits = well_formed
            .then(|| u128::from_str_radix(text, 16).ok())
            .flatten();
        bits.map(Self)
            .ok_or_else(|| Invalid::new("session_id", "must be 32 lower-case hex digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let id = SessionId::from_bits(0xabc);
        assert_eq!(id.to_string(), "00000000000000000000000000000abc");
        assert_eq!(id.to_string().parse::<SessionId>().unwrap(), id);
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "abc",
            "+0000000000000000000000000000abc",
            "0000000000000000000000000000ABCD",
            "00000000000000000000000000000abc0",
            "00000000000000000000000000000a\u{e9}",
        ] {
            assert!(bad.parse::<SessionId>().is_err(), "{bad:?}");
        }
    }
}
