//! [`RowSelector`]: from the attention rows of a round's draft steps to the round's encoded mask.

use specattn_engine::AttentionRows;
use specattn_mask::source::layers_in_use;
use specattn_mask::{Encoder, MaskError, MaskPolicy, RoundSelector, Source};

/// Mixes, selects, unites and encodes for one session.
#[derive(Debug)]
pub(crate) struct RowSelector {
    sources: Vec<Source>,
    layers: Vec<usize>,
    selector: RoundSelector,
    encoder: Encoder,
    /// A source's row: kept between steps.
    mixed: Vec<f32>,
}

impl RowSelector {
    /// A selector for sources that are valid for the draft model.
    pub(crate) fn new(policy: MaskPolicy, sources: Vec<Source>) -> Self {
        Self {
            layers: layers_in_use(&sources),
            selector: RoundSelector::new(policy, sources.len()),
            sources,
            encoder: Encoder::new(),
            mixed: Vec::new(),
        }
    }

    /// The draft layers to capture, increasing.
    pub(crate) fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Starts a round over `context_len` cached positions of the target.
    pub(crate) fn begin(&mut self, context_len: usize) {
        self.selector.begin(context_len);
    }

    /// Adds one draft step's rows.
    ///
    /// # Errors
    /// [`MaskError`] when a row is missing.
    pub(crate) fn add_step(&mut self, rows: &AttentionRows) -> Result<(), MaskError> {
        for (index, source) in self.sources.iter().enumerate() {
            let row = |layer: u32, head: u32| rows.row(layer as usize, head as usize);
            source.mix(row, &mut self.mixed)?;
            self.selector.add_step(index, &self.mixed);
        }
        Ok(())
    }

    /// Ends the round: its mask, encoded against the one before.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        self.encoder.encode(&self.selector.finish())
    }

    /// The next mask is a full one: the verify worker lacks the base.
    pub(crate) fn forget_base(&mut self) {
        self.encoder.reset();
    }
}
