//! [`Reference`]: the dense target's distributions over a window, computed once and shared by all methods.

use specattn_engine::{LogitRows, Model, Sequence, Step};

use crate::error::QualityError;
use crate::eval::rounds::Window;

/// Tokens per forward.
const CHUNK: usize = 512;

/// Dense log-probabilities at the positions that rounds are judged at.
#[derive(Debug, Clone)]
pub struct Reference {
    vocab_size: usize,
    /// The first position that has a row.
    first: usize,
    /// `[positions, vocab_size]`.
    log_probs: Vec<f32>,
}

impl Reference {
    /// Reads the window with dense attention into the empty `sequence`, which every method then cuts back to the prompt.
    ///
    /// # Errors
    /// [`QualityError::Engine`] when the model fails.
    pub fn new(
        target: &mut Model,
        sequence: &mut Sequence,
        window: &Window<'_>,
    ) -> Result<Self, QualityError> {
        let vocab_size = target.config().vocab_size;
        let first = window.prompt - 1;
        let mut log_probs = Vec::with_capacity((window.tokens.len() - first) * vocab_size);
        while sequence.len() < window.tokens.len() {
            let past = sequence.len();
            let judged = past >= first;
            let end = if judged { window.tokens.len() } else { first };
            let tokens = &window.tokens[past..end.min(past + CHUNK)];
            let logits = if judged {
                LogitRows::All
            } else {
                LogitRows::None
            };
            let outputs = target.forward(&mut [Step {
                logits,
                ..Step::new(sequence, tokens)
            }])?;
            for row in outputs[0].logits.chunks_exact(vocab_size) {
                let normaliser = log_sum_exp(row);
                log_probs.extend(row.iter().map(|x| x - normaliser));
            }
        }
        Ok(Self {
            vocab_size,
            first,
            log_probs,
        })
    }

    /// Log-probabilities at `position`, of the token after it.
    pub fn row(&self, position: usize) -> &[f32] {
        &self.log_probs[(position - self.first) * self.vocab_size..][..self.vocab_size]
    }
}

/// ln Σ e^x. The sum is f64: over thousands of terms an f32 sum loses as much as a good mask does.
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from((x - top).exp())).sum();
    (f64::from(top) + sum.ln()) as f32
}
