//! [`MaskPolicy`]: what a session asks of its masks.

use crate::error::MaskError;

/// Most positions in the sink, and in the window.
pub const MAX_EDGE_TOKENS: u32 = 65_536;

/// Coarsest granularity.
pub const MAX_GRANULARITY: u32 = 256;

/// How a round's selections are made and what is read beside them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskPolicy {
    /// Share of a row's probability mass that a selection must reach, in `(0, 1]`; 1 keeps every positive entry.
    pub p: f32,
    /// First positions always read.
    pub sink_tokens: u32,
    /// Last committed positions always read, the pending input among them.
    pub window_tokens: u32,
    /// A group of this many consecutive positions is kept when any member is.
    pub granularity: u32,
}

impl Default for MaskPolicy {
    fn default() -> Self {
        Self {
            p: 0.95,
            sink_tokens: 4,
            window_tokens: 64,
            granularity: 1,
        }
    }
}

impl MaskPolicy {
    /// Checks every field's range.
    ///
    /// # Errors
    /// [`MaskError::InvalidPolicy`] names the first field that is out of range.
    pub fn validate(&self) -> Result<(), MaskError> {
        let checks = [
            (self.p > 0.0 && self.p <= 1.0, "p", "in (0, 1]"),
            (
                self.sink_tokens <= MAX_EDGE_TOKENS,
                "sink_tokens",
                "at most 65,536",
            ),
            (
                self.window_tokens <= MAX_EDGE_TOKENS,
                "window_tokens",
                "at most 65,536",
            ),
            (
                (1..=MAX_GRANULARITY).contains(&self.granularity),
                "granularity",
                "in [1, 256]",
            ),
        ];
        match checks.into_iter().find(|(ok, ..)| !ok) {
            None => Ok(()),
            Some((_, field, expected)) => Err(MaskError::InvalidPolicy { field, expected }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid() {
        assert!(MaskPolicy::default().validate().is_ok());
    }

    #[test]
    fn each_field_has_a_range() {
        let ok = MaskPolicy::default();
        let bad = [
            MaskPolicy { p: 0.0, ..ok },
            MaskPolicy { p: 1.01, ..ok },
            MaskPolicy { p: f32::NAN, ..ok },
            MaskPolicy {
                sink_tokens: 65_537,
                ..ok
            },
            MaskPolicy {
                window_tokens: u32::MAX,
                ..ok
            },
            MaskPolicy {
                granularity: 0,
                ..ok
            },
            MaskPolicy {
                granularity: 257,
                ..ok
            },
        ];
        for policy in bad {
            let error = policy.validate().unwrap_err();
            assert_eq!(error.label(), "invalid_policy");
        }
    }
}
