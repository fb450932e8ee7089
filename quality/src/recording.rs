//! [`Recording`]: attention rows of both models at the same positions of the same text.
//!
//! A target row is the mean over the query heads that share a KV head, since they share what is read; a draft row is one
//! query head's. Rows of a sample have one entry per position, the query's own included, and sum to 1.

use specattn_engine::{Model, Sequence, Step, StepOutput};
use specattn_mask::PairShape;

use crate::error::QualityError;

/// Prompt tokens per forward.
const CHUNK: usize = 512;

/// Tokens before a row that stand for the rounds the target remembers.
const REMEMBERED: usize = 10;

/// Both models' rows at one position.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Positions per row.
    pub len: usize,
    /// `[target_layers * target_kv_heads, len]`.
    pub target: Vec<f32>,
    /// `[draft_layers * draft_heads, len]`.
    pub draft: Vec<f32>,
    /// `[target_layers * target_kv_heads, len]`: what the target's heads attended to over the tokens before, as its
    /// memory would hold it; sums to less than 1 where those tokens attended to themselves.
    pub memory: Vec<f32>,
}

impl Sample {
    /// Row of the target's KV head `head`, counted through all layers.
    pub fn target_row(&self, head: usize) -> &[f32] {
        &self.target[head * self.len..][..self.len]
    }

    /// What the target's KV head `head` remembers.
    pub fn memory_row(&self, head: usize) -> &[f32] {
        &self.memory[head * self.len..][..self.len]
    }

    /// Row of the draft's head `head`, counted through all layers.
    pub fn draft_row(&self, head: usize) -> &[f32] {
        &self.draft[head * self.len..][..self.len]
    }
}

/// Rows of a pair of models on calibration text.
#[derive(Debug, Clone)]
pub struct Recording {
    /// The pair's shape.
    pub pair: PairShape,
    /// Samples, in the order of the text.
    pub samples: Vec<Sample>,
}

impl Recording {
    /// KV heads of the target, over all layers.
    pub fn target_heads(&self) -> usize {
        (self.pair.target_layers * self.pair.target_kv_heads) as usize
    }

    /// Query heads of the draft, over all layers.
    pub fn draft_heads(&self) -> usize {
        (self.pair.draft_layers * self.pair.draft_heads) as usize
    }
}

/// Where rows are taken within a window.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Positions before the first row.
    pub first: usize,
    /// Positions from one row to the next.
    pub stride: usize,
}

/// The shape of a pair.
pub fn pair_shape(target: &Model, draft: &Model) -> PairShape {
    let (target, draft) = (target.config(), draft.config());
    PairShape {
        target_layers: target.num_layers as u32,
        target_kv_heads: target.num_kv_heads as u32,
        draft_layers: draft.num_layers as u32,
        draft_heads: draft.num_heads as u32,
    }
}

/// Reads every window with both models and keeps their rows. `progress` hears (tokens done, tokens in all).
///
/// # Errors
/// [`QualityError::Engine`] when a model fails: a window longer than its context, a token it does not know.
pub fn record(
    target: &mut Model,
    draft: &mut Model,
    windows: &[&[u32]],
    sampling: Sampling,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Recording, QualityError> {
    let total: usize = windows.iter().map(|w| w.len()).sum();
    let mut done = 0;
    let mut samples = Vec::new();
    for window in windows {
        let mut target_sequence = target.new_sequence(window.len())?;
        let mut draft_sequence = draft.new_sequence(window.len())?;
        let ends = (sampling.first.max(1)..=window.len()).step_by(sampling.stride.max(1));
        for end in ends {
            let group = target.config().num_heads / target.config().num_kv_heads;
            let memory = masses_before(target, &mut target_sequence, &window[..end])?;
            let heads = rows_at(target, &mut target_sequence, &window[..end])?;
            let draft_rows = rows_at(draft, &mut draft_sequence, &window[..end])?;
            samples.push(Sample {
                len: end,
                target: group_means(&heads, end, group),
                draft: draft_rows,
                memory,
            });
            progress((done + end) as u64, total as u64);
        }
        done += window.len();
    }
    Ok(Recording {
        pair: pair_shape(target, draft),
        samples,
    })
}

/// Extends `sequence` to hold `text` and returns the rows of its last token: `[layers * heads, text.len()]`.
fn rows_at(
    model: &mut Model,
    sequence: &mut Sequence,
    text: &[u32],
) -> Result<Vec<f32>, QualityError> {
    let layers: Vec<usize> = (0..model.config().num_layers).collect();
    let last = text.len() - 1;
    while sequence.len() < last {
        let end = last.min(sequence.len() + CHUNK);
        forward(model, sequence, &text[sequence.len()..end], &[])?;
    }
    forward(model, sequence, &text[last..], &layers)
}

/// Extends `sequence` to the last token of `text` exclusive, and returns what the [`REMEMBERED`] tokens before it weighed
/// on the average: `[layers * kv heads, text.len()]`.
fn masses_before(
    model: &mut Model,
    sequence: &mut Sequence,
    text: &[u32],
) -> Result<Vec<f32>, QualityError> {
    let last = text.len() - 1;
    let first = last.saturating_sub(REMEMBERED);
    while sequence.len() < first {
        let end = first.min(sequence.len() + CHUNK);
        forward(model, sequence, &text[sequence.len()..end], &[])?;
    }
    let mut memory = Vec::new();
    if sequence.len() < last {
        let tokens = &text[sequence.len()..last];
        let output = step(model, sequence, tokens, &[], true)?;
        for masses in output.masses.unwrap_or_default().of_head {
            let start = memory.len();
            memory.extend(masses);
            memory.resize(start + text.len(), 0.0);
        }
    }
    Ok(memory)
}

fn forward(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    capture: &[usize],
) -> Result<Vec<f32>, QualityError> {
    let rows = step(model, sequence, tokens, capture, false)?.attention;
    Ok(rows.map_or_else(Vec::new, |rows| rows.probs))
}

fn step(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    capture: &[usize],
    masses: bool,
) -> Result<StepOutput, QualityError> {
    let mut outputs = model.forward(&mut [Step {
        capture,
        masses,
        ..Step::new(sequence, tokens)
    }])?;
    Ok(outputs.remove(0))
}

/// Means over groups of `group` consecutive rows of `len` entries.
fn group_means(rows: &[f32], len: usize, group: usize) -> Vec<f32> {
    let mut means = Vec::with_capacity(rows.len() / group);
    for heads in rows.chunks_exact(group * len) {
        let (first, others) = heads.split_at(len);
        let start = means.len();
        means.extend_from_slice(first);
        for head in others.chunks_exact(len) {
            for (mean, &x) in means[start..].iter_mut().zip(head) {
                *mean += x;
            }
        }
        for mean in &mut means[start..] {
            *mean /= group as f32;
        }
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_group_are_averaged() {
        let rows = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.25, 0.75];
        assert_eq!(group_means(&rows, 2, 2), [0.5, 0.5, 0.375, 0.625]);
        assert_eq!(group_means(&rows, 2, 1), rows);
    }
}
