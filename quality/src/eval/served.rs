//! Masks as the services make them: the draft worker's selector and codec, the verify worker's reader.

use std::sync::Arc;

use specattn_draft::RowSelector;
use specattn_engine::{KvReads, StepOutput};
use specattn_mask::{Encoder, LayerMap, MaskPolicy};
use specattn_verify::{MaskReader, Masking};

use crate::error::QualityError;
use crate::eval::method::{Choice, Masker};
use crate::eval::trace::{DraftTrace, RoundRows};

/// Both ends of a session's masks, behind a draft whose rows are recorded.
pub struct Served<'t> {
    rounds: std::slice::Iter<'t, RoundRows>,
    rows: RowSelector,
    encoder: Encoder,
    reader: MaskReader,
    mask_bytes: usize,
    draft_bytes: KvReads,
}

impl<'t> Served<'t> {
    /// Masks by `map` under `policy`, over at most `max_context` positions.
    pub fn new(
        trace: &'t DraftTrace,
        map: &Arc<LayerMap>,
        policy: MaskPolicy,
        max_context: usize,
    ) -> Self {
        Self {
            rounds: trace.rounds().iter(),
            rows: RowSelector::new(policy, map.sources.clone()),
            encoder: Encoder::new(),
            reader: MaskReader::new(Arc::clone(map), policy, max_context),
            mask_bytes: 0,
            draft_bytes: KvReads::default(),
        }
    }
}

impl Masker for Served<'_> {
    fn choose(&mut self, base: usize) -> Result<Choice<'_>, QualityError> {
        let round = self.rounds.next().ok_or_else(|| {
            QualityError::Served("a round that the draft has not drafted".to_owned())
        })?;
        self.rows.begin(base - 1);
        for rows in &round.rows {
            self.rows.add_step(rows)?;
        }
        self.draft_bytes = round.bytes;
        let bytes = self.encoder.encode(self.rows.finish());
        self.mask_bytes = bytes.len();
        match self.reader.read(&bytes, base) {
            Ok(Masking::Ready) => Ok(Choice::Lists(self.reader.lists())),
            Ok(Masking::MissingBase) => Ok(Choice::Dense),
            Err(fault) => Err(QualityError::Served(fault.to_string())),
        }
    }

    fn wants_masses(&self) -> bool {
        self.reader.wants_masses()
    }

    fn settle(&mut self, output: &StepOutput) {
        if let Some(masses) = &output.masses {
            self.reader.observe(masses);
        }
    }

    fn mask_bytes(&self) -> usize {
        self.mask_bytes
    }

    fn draft_bytes(&self) -> KvReads {
        self.draft_bytes
    }
}
