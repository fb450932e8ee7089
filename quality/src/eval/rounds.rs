//! Rounds over a window: the loop that every method is measured in.

use specattn_engine::{KvReads, LogitRows, Model, Sequence, Step};

use crate::error::QualityError;
use crate::eval::dense::Reference;
use crate::eval::figures::Figures;
use crate::eval::method::{Choice, Masker};

/// Draft tokens per round: the gateway's default.
pub const ROUND_DRAFT: usize = 4;

/// A stretch of text: a prompt, then tokens to be judged on.
#[derive(Debug, Clone, Copy)]
pub struct Window<'a> {
    /// All its tokens.
    pub tokens: &'a [u32],
    /// How many of them are prompt; at least 1.
    pub prompt: usize,
}

/// Runs `masker` over the window. `sequence` holds what a dense target made of the window's prompt, and `reference` its
/// distributions behind it. `progress` hears of tokens done.
///
/// # Errors
/// [`QualityError`] when a model or the masker fails.
pub fn run(
    target: &mut Model,
    sequence: &mut Sequence,
    window: &Window<'_>,
    reference: &Reference,
    masker: &mut dyn Masker,
    progress: &mut dyn FnMut(u64),
) -> Result<Figures, QualityError> {
    let tokens = window.tokens;
    sequence.truncate(window.prompt - 1);
    masker.start(sequence.len());
    let vocab_size = target.config().vocab_size;
    let mut figures = Figures::default();
    let mut base = window.prompt;
    // A whole round commits its draft tokens and one more, all of which must be in the text.
    while base + ROUND_DRAFT < tokens.len() {
        let masses = masker.wants_masses();
        let mut step = Step {
            logits: LogitRows::All,
            masses,
            ..Step::new(&mut *sequence, &tokens[base - 1..base + ROUND_DRAFT])
        };
        let output = match masker.choose(base)? {
            Choice::ByKeys(chooser) => target.forward_choosing(&mut step, chooser)?,
            Choice::Dense => target.forward(&mut [step])?.remove(0),
            Choice::Lists(lists) => {
                step.lists = Some(lists);
                target.forward(&mut [step])?.remove(0)
            }
        };
        masker.settle(&output);
        for (row, logits) in output.logits.chunks_exact(vocab_size).enumerate() {
            let position = base - 1 + row;
            figures.judge(reference.row(position), logits, tokens[position + 1]);
        }
        figures.kv += output.kv;
        let (target_bytes, drafted) = (target.kv_entry_bytes() as u64, masker.draft_bytes());
        figures.system_bytes += KvReads {
            read: output.kv.read * target_bytes + drafted.read,
            dense: output.kv.dense * target_bytes + drafted.dense,
        };
        figures.rounds += 1;
        figures.mask_bytes += masker.mask_bytes() as u64;
        base += ROUND_DRAFT + 1;
        progress(ROUND_DRAFT as u64 + 1);
    }
    Ok(figures)
}
