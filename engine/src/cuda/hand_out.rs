//! [`HandOuts`]: what attention hands out besides its output, from scores that the kernels leave on the device.
//!
//! Selections and masses cross once, after the last layer. Attention rows cross layer by layer: they are for calibration and
//! for contexts that selections do not take.

use std::sync::Arc;

use super::attention::ScoreTarget;
use super::batch::DeviceBatch;
use super::bucket::bucket;
use super::device::Device;
use super::elementwise::RowKernels;
use super::error::CudaError;
use super::memory::DeviceMemory;
use super::pinned::PinnedMemory;
use super::row_mixer::{Captured, RowMixer};
use super::selection::ROW_STEP;
use crate::attention::SpanLists;
use crate::backend::{AttentionShape, Capture, HandOut, Masses, Pass};
use crate::crew::Crew;
use crate::row_selection::SelectedRows;

/// Scores of a few layers, and what is made of them.
pub(super) struct HandOuts {
    /// `[layers of a group][capturing span][tokens][num_heads][stride]`.
    scores: DeviceMemory,
    statistics: DeviceMemory,
    /// `[spans that want them][layers][num_kv_heads][stride]`.
    masses: DeviceMemory,
    mixer: RowMixer,
    captured: Captured,
    /// Where all of it arrives.
    host: PinnedMemory,
}

/// The layer at hand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer {
    pub(super) shape: AttentionShape,
    pub(super) index: usize,
    /// How many there are.
    pub(super) count: usize,
}

impl HandOuts {
    /// Without memory yet.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        let memory = || DeviceMemory::new(device);
        Self {
            scores: memory(),
            statistics: memory(),
            masses: memory(),
            mixer: RowMixer::new(device),
            captured: Captured::default(),
            host: device.pinned(),
        }
    }

    /// Looks at what a pass wants.
    pub(super) fn begin(
        &mut self,
        pass: &Pass<'_>,
        batch: &DeviceBatch,
        num_heads: usize,
    ) -> Result<(), CudaError> {
        let tokens = captured_tokens(pass, batch);
        self.captured = Captured {
            tokens,
            num_heads,
            layer_rows: pass.captures.len() * tokens * num_heads,
            stride: stride(pass),
        };
        if pass.selections.is_empty() {
            return Ok(());
        }
        self.mixer.begin(pass, self.captured)
    }

    /// Where the scores of a layer, of so many, go; `None` where nothing is made of them.
    pub(super) fn target(
        &mut self,
        pass: &Pass<'_>,
        (layer, count): (usize, usize),
        wanted: &HandOut<'_>,
    ) -> Result<Option<ScoreTarget>, CudaError> {
        let to_host = !wanted.captures.is_empty() || !wanted.masses.is_empty();
        if !to_host && pass.selections.is_empty() {
            return Ok(None);
        }
        // Without selections a layer's scores are done with when the next one's come.
        let layers = match pass.selections.len() {
            0 => 1,
            _ => self.captured.group_layers().min(count),
        };
        let (rows, stride) = (self.captured.layer_rows, self.captured.stride);
        self.scores.grow(layers * rows * stride * 4)?;
        self.statistics.grow(layers * rows * 8)?;
        let before = layer % layers * rows;
        Ok(Some(ScoreTarget {
            scores: self.scores.address() + (before * stride * 4) as u64,
            statistics: self.statistics.address() + (before * 8) as u64,
            tokens: self.captured.tokens,
            last_only: selects_only(pass),
            stride,
        }))
    }

    /// Makes what is wanted of a layer's scores.
    pub(super) fn take(
        &mut self,
        kernels: RowKernels<'_>,
        pass: &Pass<'_>,
        (target, layer): (&ScoreTarget, Layer),
        wanted: &mut HandOut<'_>,
    ) -> Result<(), CudaError> {
        if !pass.selections.is_empty() {
            let group = (self.scores.address(), self.statistics.address());
            let layer = (layer.index, layer.count);
            self.mixer.mix(self.captured, layer, group)?;
        }
        let heads = layer.shape.num_kv_heads;
        let of_span = layer.count * heads * target.stride * 4;
        self.masses.grow(wanted.masses.len() * of_span)?;
        for (index, wanted) in wanted.masses.iter().enumerate() {
            let tokens = pass.spans[wanted.span].rows.len();
            let first = number_of(pass, wanted.span) * target.tokens * layer.shape.num_heads;
            let offset = index * of_span + layer.index * heads * target.stride * 4;
            let to = self.masses.address() + offset as u64;
            let captured = at_row(target, first);
            kernels.entry_masses(captured, tokens, layer.shape, target.stride, to)?;
        }
        if !wanted.captures.is_empty() {
            // The host waits in every layer: no graph would cover more than one.
            kernels.device.interrupt();
        }
        // In place, and maybe before the group is mixed: a span has selections or rows, never both.
        for wanted in &mut wanted.captures {
            self.rows_to_host(kernels, pass, (target, layer), wanted)?;
        }
        Ok(())
    }

    /// Brings the attention rows of a span's last token to the host.
    fn rows_to_host(
        &mut self,
        kernels: RowKernels<'_>,
        pass: &Pass<'_>,
        (target, layer): (&ScoreTarget, Layer),
        wanted: &mut Capture<'_>,
    ) -> Result<(), CudaError> {
        let (shape, stride) = (layer.shape, target.stride);
        let span = &pass.spans[wanted.span];
        let last = number_of(pass, wanted.span) * target.tokens + span.rows.len() - 1;
        let first = last * shape.num_heads;
        let before = (target.scores - self.scores.address()) as usize;
        kernels.score_probabilities(at_row(target, first), shape.num_heads, (stride, stride))?;
        let elements = shape.num_heads * stride;
        let by_key: &[f32] =
            self.scores
                .read_pinned(before + first * stride * 4, elements, &mut self.host)?;
        let kv_len = wanted.rows.kv_len;
        let to = &mut wanted.rows.probs[wanted.slot * shape.num_heads * kv_len..];
        let heads = by_key.chunks_exact(stride).enumerate();
        for ((head, row), to) in heads.zip(to.chunks_exact_mut(kv_len)) {
            let kv_head = head * shape.num_kv_heads / shape.num_heads;
            let number = layer.index * shape.num_kv_heads + kv_head;
            match &span.lists {
                None => to.copy_from_slice(&row[..kv_len]),
                Some(lists) => {
                    let list = lists.of(number);
                    for (&position, &p) in list.positions().iter().zip(row) {
                        to[position as usize] = p;
                    }
                    to[span.past..].copy_from_slice(&row[list.len()..][..span.rows.len()]);
                }
            }
        }
        Ok(())
    }

    /// After the last layer: the selections of the pass, in order.
    pub(super) fn selected(
        &mut self,
        pass: &Pass<'_>,
        out: &mut [&mut SelectedRows],
        crew: &mut Crew,
    ) -> Result<(), CudaError> {
        self.mixer.select(pass, (out, crew), &mut self.host)
    }

    /// After the last layer: masses of all layers, of the spans that wanted them, in order.
    pub(super) fn masses(
        &mut self,
        pass: &Pass<'_>,
        out: &mut [Masses<'_>],
    ) -> Result<(), CudaError> {
        let stride = self.captured.stride;
        let heads: usize = out.iter().map(|wanted| wanted.of_head.len()).sum();
        let by_key: &[f32] = self.masses.read_pinned(0, heads * stride, &mut self.host)?;
        let mut rows = by_key.chunks_exact(stride);
        for wanted in out {
            let span = &pass.spans[wanted.span];
            let own = wanted.of_head.iter_mut().enumerate();
            for ((number, masses), row) in own.zip(&mut rows) {
                let lists = span.lists.as_ref();
                let cached = lists.map_or(span.past, |lists| lists.of(number).len());
                masses.clear();
                masses.extend_from_slice(&row[..cached]);
            }
        }
        Ok(())
    }
}

/// Where the scores and statistics of a row begin.
fn at_row(target: &ScoreTarget, row: usize) -> (u64, u64) {
    (
        target.scores + (row * target.stride * 4) as u64,
        target.statistics + (row * 8) as u64,
    )
}

/// A span's number among those that hand something out.
fn number_of(pass: &Pass<'_>, span: usize) -> usize {
    let number = pass.captures.iter().position(|&s| s == span);
    number.expect("a span that hands something out is among the pass's captures")
}

/// Keys of the longest span that hands something out, as rows of scores are laid out.
fn stride(pass: &Pass<'_>) -> usize {
    let keys = pass.captures.iter().map(|&span| {
        let span = &pass.spans[span];
        span.lists.as_ref().map_or(span.past, SpanLists::longest) + span.rows.len()
    });
    bucket(keys.max().unwrap_or(0), ROW_STEP)
}

/// Whether selections of last tokens are all that the pass hands out of its attention.
fn selects_only(pass: &Pass<'_>) -> bool {
    pass.selections.len() == pass.captures.len()
}

/// Tokens of each capturing span whose scores are stored.
fn captured_tokens(pass: &Pass<'_>, batch: &DeviceBatch) -> usize {
    if selects_only(pass) {
        1
    } else {
        batch.max_span_rows()
    }
}
