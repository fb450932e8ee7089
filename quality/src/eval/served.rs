//! Masks as the services make them: the draft worker's selector and codec, the verify worker's reader.

use std::sync::Arc;

use specattn_draft::{OwnPolicy, OwnReads, RowSelector};
use specattn_engine::{HeadLists, LogitRows, Model, Sequence, Step, StepOutput};
use specattn_mask::{LayerMap, MaskPolicy};
use specattn_verify::{MaskReader, Masking};

use crate::error::QualityError;
use crate::eval::method::{Choice, Masker};

/// Prompt tokens per forward, as the draft worker catches up.
const CHUNK: usize = 512;

/// Both ends of a session's masks, and the draft model between them.
pub struct Served<'m> {
    draft: &'m mut Model,
    sequence: Option<Sequence>,
    /// Layers to capture, increasing.
    layers: Vec<usize>,
    own: OwnReads,
    rows: RowSelector,
    reader: MaskReader,
    mask_bytes: usize,
}

impl<'m> Served<'m> {
    /// Masks by `map` under `policy`, from a draft that reads its own entries by `own`.
    pub fn new(
        draft: &'m mut Model,
        map: &Arc<LayerMap>,
        policy: MaskPolicy,
        own: OwnPolicy,
    ) -> Self {
        let max_context = draft.config().max_context;
        let own = OwnReads::new(own, &policy, draft.config().num_kv_heads);
        let layers = if own.is_sparse() {
            (0..draft.config().num_layers).collect()
        } else {
            map.draft_layers()
        };
        Self {
            draft,
            sequence: None,
            layers,
            own,
            rows: RowSelector::new(policy, map.sources.clone()),
            reader: MaskReader::new(Arc::clone(map), policy, max_context),
            mask_bytes: 0,
        }
    }
}

/// One forward of the draft; `capture` names the layers whose rows it hands out.
fn feed(
    draft: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    lists: Option<&HeadLists>,
    capture: &[usize],
) -> Result<StepOutput, QualityError> {
    let mut outputs = draft.forward(&mut [Step {
        sequence,
        tokens,
        lists,
        logits: LogitRows::None,
        capture,
        masses: false,
    }])?;
    Ok(outputs.remove(0))
}

impl Masker for Served<'_> {
    fn start(&mut self, tokens: &[u32], cached: usize) -> Result<(), QualityError> {
        let mut sequence = self.draft.new_sequence(tokens.len())?;
        for chunk in tokens[..cached].chunks(CHUNK) {
            feed(self.draft, &mut sequence, chunk, None, &[])?;
        }
        self.sequence = Some(sequence);
        Ok(())
    }

    fn choose(
        &mut self,
        tokens: &[u32],
        base: usize,
        draft: usize,
    ) -> Result<Choice<'_>, QualityError> {
        let sequence = self
            .sequence
            .as_mut()
            .ok_or_else(|| QualityError::Served("a round before the prompt".to_owned()))?;
        self.rows.begin(base - 1);
        for step in 0..draft {
            // The first step also feeds what the last round left unfed.
            let missing = sequence.len()..base + step;
            let captured = self.own.captures(step, draft);
            let (lists, capture) = if captured {
                (None, self.layers.as_slice())
            } else {
                self.own.fit(sequence.len());
                (Some(self.own.lists()), &[][..])
            };
            let output = feed(self.draft, sequence, &tokens[missing], lists, capture)?;
            match &output.attention {
                Some(rows) => {
                    self.own.captured(rows);
                    self.rows.add_step(rows)?;
                }
                None => self.own.passed(),
            }
        }
        let bytes = self.rows.finish();
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
}
