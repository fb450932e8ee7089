//! From steps to the rows of a pass, and from what a pass yields back to the steps.

use std::ops::Range;

use crate::attention::{HeadLists, SpanLists};
use crate::backend::{Backend, Bias, Capture, HandOut, Masses, Pass, Span};
use crate::crew::Crew;
use crate::error::EngineError;
use crate::floats::Floats;
use crate::model::{LogitRows, Step, StepOutput};
use crate::transformer::RankOutput;

/// Rows of logits that a step gets.
fn logit_rows(step: &Step<'_>) -> usize {
    match step.logits {
        LogitRows::None | LogitRows::Replay => 0,
        LogitRows::Last => 1,
        LogitRows::All | LogitRows::Verify => step.tokens.len(),
    }
}

/// Each step with its rows among all rows of logits.
fn logit_ranges<'a, 's>(
    steps: &'a [&'s Step<'s>],
) -> impl Iterator<Item = (&'s Step<'s>, Range<usize>)> + use<'a, 's> {
    steps.iter().scan(0, |next, &step| {
        let rows = *next..*next + logit_rows(step);
        *next = rows.end;
        Some((step, rows))
    })
}

/// Gives every step its rows of `logits`, `[rows, vocab.len()]`, or their most probable tokens; `vocab` is the rank's part of the
/// vocabulary, and `crew` may help to fetch them.
pub(crate) fn hand_out_logits<B: Backend>(
    (backend, crew): (&B, &mut Crew),
    logits: &mut B::Buffer,
    vocab: Range<usize>,
    steps: &[&Step<'_>],
    outputs: &mut [&mut RankOutput],
) -> Result<(), EngineError> {
    let mut most_probable = Vec::new();
    if steps.iter().any(|step| step.argmax && logit_rows(step) > 0) {
        let biases = biases(steps, &vocab);
        backend.argmax(logits, vocab.len(), &biases, &mut most_probable)?;
    }
    let mut parts = Vec::new();
    for ((step, rows), output) in logit_ranges(steps).zip(outputs) {
        if rows.is_empty() {
            continue;
        }
        if step.argmax {
            let peaks = &most_probable[rows];
            let tokens = peaks.iter().map(|peak| peak.map(|peak| peak.column));
            output.step.argmax = tokens.collect();
            let values = peaks
                .iter()
                .map(|peak| peak.map_or(f32::NAN, |peak| peak.value));
            output.peaks = values.collect();
        } else {
            let elements = rows.start * vocab.len()..rows.end * vocab.len();
            output.step.logits = Floats::of_len(elements.len());
            parts.push((elements, &mut *output.step.logits));
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    backend.read_parts(logits, &mut parts, crew)
}

/// The biases of the steps' rows of logits, of the tokens in `vocab`.
fn biases(steps: &[&Step<'_>], vocab: &Range<usize>) -> Vec<Bias> {
    let mut biases = Vec::new();
    for (step, rows) in logit_ranges(steps).filter(|(step, _)| step.argmax) {
        for row in rows {
            let own = step.bias.iter();
            let own = own.filter(|(token, _)| vocab.contains(&(*token as usize)));
            biases.extend(own.map(|&(token, value)| Bias {
                row: row as u32,
                column: token - vocab.start as u32,
                value,
            }));
        }
    }
    biases
}

/// Each step's lists, as far as the rank reads by them: its part is what `own` gives. To count the lists of dozens of sessions takes
/// as long as a small kernel, so `crew` may share them out.
pub(crate) fn span_lists<'a>(
    steps: &[&'a Step<'_>],
    crew: &mut Crew,
    own: impl Fn(&'a HeadLists) -> SpanLists<'a> + Sync,
) -> Vec<Option<SpanLists<'a>>> {
    let mut spans: Vec<_> = steps.iter().map(|step| (step.lists, None)).collect();
    crew.for_each(&mut spans, |(lists, span)| *span = lists.map(&own));
    spans.into_iter().map(|(_, span)| span).collect()
}

/// Lays the steps' tokens out as rows, `lists` being theirs.
pub(crate) fn layout<'a>(
    steps: &[&'a Step<'_>],
    outputs: &[&mut RankOutput],
    bulk: bool,
    lists: Vec<Option<SpanLists<'a>>>,
) -> Pass<'a> {
    let mut pass = Pass {
        tokens: Vec::new(),
        positions: Vec::new(),
        spans: Vec::new(),
        logit_rows: Vec::new(),
        captures: Vec::new(),
        selections: Vec::new(),
        bulk,
    };
    for ((step, output), lists) in steps.iter().zip(outputs).zip(lists) {
        let (start, past) = (pass.tokens.len(), step.sequence.len());
        pass.tokens.extend_from_slice(step.tokens);
        pass.positions
            .extend((past..past + step.tokens.len()).map(|p| p as u32));
        let rows = start..pass.tokens.len();
        pass.logit_rows
            .extend(rows.end - logit_rows(step)..rows.end);
        let selects = output.step.selected.is_some();
        if selects || !step.capture.is_empty() || step.masses {
            pass.captures.push(pass.spans.len());
        }
        if let Some(selection) = step.select.filter(|_| selects) {
            pass.selections.push((pass.spans.len(), selection));
        }
        pass.spans.push(Span {
            rows,
            past,
            blocks: step.sequence.blocks(),
            lists,
        });
    }
    pass
}

/// Where this layer's captured rows and masses go.
pub(crate) fn hand_out<'a>(
    outputs: &'a mut [&mut RankOutput],
    layer: usize,
    kv_heads: usize,
) -> HandOut<'a> {
    let mut wanted = HandOut::default();
    for (span, output) in outputs.iter_mut().enumerate() {
        let StepOutput {
            attention, masses, ..
        } = &mut output.step;
        if let Some(rows) = attention
            && let Some(slot) = rows.layers.iter().position(|&l| l == layer)
        {
            wanted.captures.push(Capture { span, slot, rows });
        }
        if let Some(masses) = masses {
            let of_head = &mut masses.of_head[layer * kv_heads..(layer + 1) * kv_heads];
            wanted.masses.push(Masses { span, of_head });
        }
    }
    wanted
}

/// Where the masses of all layers go.
pub(crate) fn all_masses<'a>(outputs: &'a mut [&mut RankOutput]) -> Vec<Masses<'a>> {
    let spans = outputs.iter_mut().enumerate();
    let wanted = spans.filter_map(|(span, output)| {
        let of_head = &mut output.step.masses.as_mut()?.of_head;
        Some(Masses { span, of_head })
    });
    wanted.collect()
}
