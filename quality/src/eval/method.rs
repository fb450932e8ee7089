//! [`Masker`]: a way of choosing what the target reads.

use specattn_engine::{HeadLists, KeyChooser, StepOutput};

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
    ///
    /// # Errors
    /// When a model or a mask fails.
    fn start(&mut self, tokens: &[u32], cached: usize) -> Result<(), QualityError>;

    /// Chooses for the round that builds on `base` tokens of `tokens` and proposes the `draft` after them.
    ///
    /// # Errors
    /// As for `start`.
    fn choose(
        &mut self,
        tokens: &[u32],
        base: usize,
        draft: usize,
    ) -> Result<Choice<'_>, QualityError>;

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
}
