//! [`Capability`]: 256 random bits that open one session to one kind of caller, its drafts.
//!
//! The gateway makes one whenever it opens a session, tells the verify worker and whichever draft worker it attaches, and
//! nobody else. So a draft worker reaches the sessions that were given to it, and no others. It is never logged.

use std::fmt;

use subtle::ConstantTimeEq;

use crate::Fault;
use crate::validate::Invalid;

/// Bytes of a capability.
const BYTES: usize = 32;

/// The right to draft for a session. Its `Debug` form does not show it.
#[derive(Clone)]
pub struct Capability([u8; BYTES]);

impl Capability {
    /// A capability of these bits, which must come from a cryptographic generator.
    pub const fn from_bits(bits: [u8; BYTES]) -> Self {
        Self(bits)
    }

    /// Reads one as it travels; `None` where none was sent.
    ///
    /// # Errors
    /// Bytes that are none.
    pub fn from_wire(bytes: &[u8]) -> Result<Option<Self>, Invalid> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let bits = bytes.try_into();
        bits.map(|bits| Some(Self(bits)))
            .map_err(|_| Invalid::new("capability", format!("must be {BYTES} bytes")))
    }

    /// As it travels.
    pub fn to_wire(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// Lets those pass who show what is `wanted`, in a time that does not tell how much of it they know. Where nothing is
    /// wanted nobody passes.
    ///
    /// # Errors
    /// [`Fault::PermissionDenied`].
    pub fn check(wanted: Option<&Self>, shown: Option<&Self>) -> Result<(), Fault> {
        let equal = match (wanted, shown) {
            (Some(wanted), Some(shown)) => bool::from(wanted.0.ct_eq(&shown.0)),
            _ => false,
        };
        if equal {
            return Ok(());
        }
        Err(Fault::PermissionDenied(
            "the session was not given to this draft".to_owned(),
        ))
    }
}

impl fmt::Debug for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Capability(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_bits_pass() {
        let right = Capability::from_bits([7; BYTES]);
        let mut almost = [7; BYTES];
        almost[BYTES - 1] = 8;
        let wrong = Capability::from_bits(almost);
        assert!(Capability::check(Some(&right), Some(&right.clone())).is_ok());
        for (wanted, shown) in [
            (Some(&right), Some(&wrong)),
            (Some(&right), None),
            (None, Some(&right)),
            (None, None),
        ] {
            let refused = Capability::check(wanted, shown).unwrap_err();
            assert_eq!(refused.label(), "permission_denied");
        }
    }

    #[test]
    fn the_wire_form_round_trips_and_is_not_shown() {
        let capability = Capability::from_bits([0xab; BYTES]);
        let back = Capability::from_wire(&capability.to_wire()).unwrap();
        assert!(Capability::check(back.as_ref(), Some(&capability)).is_ok());
        assert!(Capability::from_wire(&[]).unwrap().is_none());
        assert!(Capability::from_wire(&[1; BYTES - 1]).is_err());
        assert_eq!(format!("{capability:?}"), "Capability(..)");
    }
}
