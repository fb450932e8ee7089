//! [`DraftTrace`]: what the draft captures over a window.
//!
//! Teacher-forced, the draft's attention depends on the text and on what the draft itself reads, not on the target's
//! masks. So it is recorded once and serves every layer map and every mass. Rows are kept as they are: rounds · captured
//! steps · layers · heads · context floats, some 360 MB for the bundled pair and 2,048 judged tokens of 8,192.

use specattn_draft::{OwnPolicy, OwnReads};
use specattn_engine::{AttentionRows, KvReads, Model, Step};
use specattn_mask::MaskPolicy;

use crate::error::QualityError;
use crate::eval::rounds::{ROUND_DRAFT, Window};

/// Prompt tokens per forward, as the draft worker catches up.
const CHUNK: usize = 512;

/// One round's captured rows.
#[derive(Debug, Clone, Default)]
pub struct RoundRows {
    /// Of the captured steps, in order.
    pub rows: Vec<AttentionRows>,
    /// KV bytes that all of the round's draft steps read.
    pub bytes: KvReads,
}

/// The captured rows of a window's rounds.
#[derive(Debug, Clone)]
pub struct DraftTrace {
    rounds: Vec<RoundRows>,
}

impl DraftTrace {
    /// Reads the window with a draft that reads its own entries by `own` and hands out `layers` (all of them where it
    /// reads sparsely). Of `masks` only what the draft's own selections share with them matters: sinks, window and
    /// granularity.
    ///
    /// # Errors
    /// [`QualityError::Engine`] when the model fails.
    pub fn record(
        draft: &mut Model,
        window: &Window<'_>,
        own: OwnPolicy,
        masks: &MaskPolicy,
        layers: &[usize],
    ) -> Result<Self, QualityError> {
        let mut own = OwnReads::new(own, masks, draft.config().num_kv_heads);
        let all: Vec<usize> = (0..draft.config().num_layers).collect();
        let layers = if own.is_sparse() { &all[..] } else { layers };
        let entry = draft.kv_entry_bytes() as u64;
        let tokens = window.tokens;
        let mut sequence = draft.new_sequence(tokens.len())?;
        let mut step = Step::new(&mut sequence, &[]);
        for chunk in tokens[..window.prompt - 1].chunks(CHUNK) {
            step.tokens = chunk;
            draft.forward(std::slice::from_mut(&mut step))?;
        }
        let mut rounds = Vec::new();
        let mut base = window.prompt;
        while base + ROUND_DRAFT < tokens.len() {
            let mut round = RoundRows::default();
            for index in 0..ROUND_DRAFT {
                // The first step also feeds what the last round left unfed.
                let past = sequence.len();
                let captured = own.captures(index, ROUND_DRAFT);
                let (lists, capture) = if captured {
                    (None, layers)
                } else {
                    own.fit(past);
                    (Some(own.lists()), &[][..])
                };
                let step = Step {
                    lists,
                    capture,
                    ..Step::new(&mut sequence, &tokens[past..base + index])
                };
                let output = draft.forward(&mut [step])?.remove(0);
                round.bytes.read += output.kv.read * entry;
                round.bytes.dense += output.kv.dense * entry;
                match output.attention {
                    Some(rows) => {
                        own.captured(&rows);
                        round.rows.push(rows);
                    }
                    None => own.passed(),
                }
            }
            rounds.push(round);
            base += ROUND_DRAFT + 1;
        }
        Ok(Self { rounds })
    }

    /// The rounds, in order.
    pub fn rounds(&self) -> &[RoundRows] {
        &self.rounds
    }
}
