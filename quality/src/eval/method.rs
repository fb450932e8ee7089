//! [`Masker`]: a way of choosing what the target reads.

use specattn_engine::{HeadLists, KeyChooser, KvReads, StepOutput};

use crate::error::QualityError;

/// What a round's forward reads.
pub enum Choice<'a> {
    /// Everything.
    Dense,
    /// The listed entries and the round's own.
    Lists(&'a HeadLists),
    /// What is chosen when queries and keys are known.
    ByKeys(&'a mut dyn KeyChooser),
}

/// One method at one setting, over one window.
pub trait Masker {
    /// The target has read the prompt; `cached` positions lie in its KV cache.
    fn start(&mut self, _cached: usize) {}

    /// Chooses for the round that builds on `base` tokens of the window. Rounds come in order.
    ///
    /// # Errors
    /// When a mask fails.
    fn choose(&mut self, base: usize) -> Result<Choice<'_>, QualityError>;

    /// Whether the masker learns from what the entries weighed.
    fn wants_masses(&self) -> bool {
        false
    }

    /// Takes the output of the round's forward.
    fn settle(&mut self, _output: &StepOutput) {}

    /// Encoded bytes of the last round's mask; 0 where nothing crosses the wire.
    fn mask_bytes(&self) -> usize {
        0
    }

    /// KV bytes that the draft read for the last round's mask.
    fn draft_bytes(&self) -> KvReads {
        KvReads::default()
    }
}
