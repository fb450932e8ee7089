//! Records masks: a draft model reads a book and selects as it would while drafting.
//!
//! Teacher-forced: the book's own tokens stand in for accepted ones. A round at base n runs one draft step for each of
//! the tokens c[n-1] to c[n+2] and unites their selections over positions 0 to n-2; the next round's base is n + 4.
//! Sources are the means of the heads of each layer.

use std::path::Path;

use anyhow::{Context, Result};
use specattn_engine::{Model, Sequence, Step};
use specattn_mask::{MaskPolicy, RoundSelector, Source};

use super::recording::Recording;
use crate::book;

/// Draft steps per round.
pub const STEPS: usize = 4;

/// Positions before the first round.
const PROMPT: usize = 1_024;

/// Prompt tokens per forward.
const CHUNK: usize = 512;

/// Adds the masks of one session over the book at `text` to `recording`, once for each p.
///
/// # Errors
/// When the book or the tokenizer cannot be read, the book is too short, or the model fails.
pub fn record(
    model: &mut Model,
    tokenizer: &Path,
    text: &Path,
    thousandths: &[u32],
    session: u32,
    recording: &mut Recording,
) -> Result<()> {
    let config = model.config().clone();
    let tokens = book::tokens(tokenizer, text, config.max_context)?;
    let layers: Vec<usize> = (0..config.num_layers).collect();
    let sources: Vec<Source> = (0..config.num_layers)
        .map(|l| Source::layer_mean(l as u32, config.num_heads as u32))
        .collect();
    let mut selectors: Vec<RoundSelector> = thousandths
        .iter()
        .map(|&p| {
            let policy = MaskPolicy {
                p: p as f32 / 1e3,
                ..MaskPolicy::default()
            };
            RoundSelector::new(policy, &sources)
        })
        .collect();
    let mut sequence = model.new_sequence(tokens.len())?;
    for chunk in tokens[..PROMPT].chunks(CHUNK) {
        forward(model, &mut sequence, chunk, &[])?;
    }
    let mut row = Vec::new();
    for round in tokens[PROMPT..].chunks_exact(STEPS) {
        for selector in &mut selectors {
            selector.begin(sequence.len());
        }
        for token in round {
            let step = forward(model, &mut sequence, std::slice::from_ref(token), &layers)?;
            let rows = step.attention.context("a captured step has rows")?;
            for (index, source) in sources.iter().enumerate() {
                source.mix(
                    |layer, head| rows.row(layer as usize, head as usize),
                    &mut row,
                )?;
                for selector in &mut selectors {
                    selector.add_step(index, &row);
                }
            }
        }
        for (selector, &p) in selectors.iter_mut().zip(thousandths) {
            recording.push(p, session, selector.finish());
        }
    }
    Ok(())
}

fn forward(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    capture: &[usize],
) -> Result<specattn_engine::StepOutput> {
    let step = Step {
        capture,
        ..Step::new(sequence, tokens)
    };
    let mut outputs = model.forward(&mut [step])?;
    outputs.pop().context("a step has an output")
}
