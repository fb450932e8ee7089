//! [`Ranks`]: one model run by several transformers, each with its [`Share`], and their outputs put together again.
//!
//! All ranks live in this process, on a thread each that outlives the forward: starting threads would take longer than a sum. They
//! see the same steps, so block tables, positions and tokens need no copy; what each yields is its own heads' and its own part of
//! the vocabulary, and is joined here in the whole model's order. Logits are joined on the host, where they are looked at: devices exchange sums alone.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::attention::{AttentionRows, EntryMasses};
use crate::backend::Backend;
use crate::chooser::KeyChooser;
use crate::config::ModelConfig;
use crate::error::{EngineError, RANK_LEFT};
use crate::floats::Floats;
use crate::model::{Forwards, Step, StepOutput};
use crate::transformer::{RankOutput, Transformer};

/// Held by the split model that runs. Two that share devices could otherwise each hold one and wait for the other's.
static RUNNING: Mutex<()> = Mutex::new(());

/// The ranks of one model, in order.
pub(crate) struct Ranks<B: Backend> {
    ranks: Vec<Transformer<B>>,
    /// One for each rank but the first, which the caller's thread runs: ranks wait for each other, so none may wait for a thread.
    threads: ThreadPool,
}

impl<B: Backend> Ranks<B> {
    /// Ranks whose shares make up a model.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] when the system has no thread for each.
    pub(crate) fn new(ranks: Vec<Transformer<B>>) -> Result<Self, EngineError> {
        let others = ranks.len().saturating_sub(1);
        let threads = ThreadPoolBuilder::new()
            .num_threads(others.max(1))
            .thread_name(|number| format!("rank-{}", number + 1))
            .build()
            .map_err(|error| EngineError::InvalidArgument {
                what: "number of ranks",
                reason: format!("no thread for each: {error}"),
            })?;
        Ok(Self { ranks, threads })
    }
}

/// One rank's forward. When it fails or panics, the others must not wait for it.
fn run<B: Backend>(
    rank: &mut Transformer<B>,
    steps: &[Step<'_>],
) -> Result<Vec<RankOutput>, EngineError> {
    let outputs = catch_unwind(AssertUnwindSafe(|| rank.forward(steps)));
    if !matches!(outputs, Ok(Ok(_))) {
        rank.place().leave();
    }
    outputs.unwrap_or_else(|panic| resume_unwind(panic))
}

impl<B> Forwards for Ranks<B>
where
    B: Backend,
    Transformer<B>: Send,
{
    fn config(&self) -> &ModelConfig {
        self.ranks[0].config()
    }

    fn forward(&mut self, steps: &[Step<'_>]) -> Result<Vec<StepOutput>, EngineError> {
        let turn = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, others) = self.ranks.split_at_mut(1);
        let mut of_others: Vec<_> = others.iter().map(|_| None).collect();
        let of_first = self.threads.in_place_scope(|scope| {
            for (rank, output) in others.iter_mut().zip(&mut of_others) {
                scope.spawn(move |_| *output = Some(run(rank, steps)));
            }
            run(&mut first[0], steps)
        });
        let outputs = std::iter::once(of_first).chain(of_others.into_iter().flatten());
        drop(turn);
        let (outputs, errors): (Vec<_>, Vec<_>) = outputs.partition(Result::is_ok);
        // What made one rank leave says more than that the others were left.
        let mut errors: Vec<EngineError> = errors.into_iter().filter_map(Result::err).collect();
        errors.sort_by_key(|error| error.label() == RANK_LEFT);
        match errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(joined(
                self.config(),
                outputs.into_iter().flatten().collect(),
            )),
        }
    }

    /// Each rank has its own heads' entries of every block.
    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        let mut ranks = self.ranks.iter_mut();
        ranks.try_for_each(|rank| rank.copy_blocks(copies))
    }

    /// A chooser looks at all heads of a layer at once, which no rank has.
    fn forward_choosing(
        &mut self,
        _step: &Step<'_>,
        _chooser: &mut dyn KeyChooser,
    ) -> Result<Option<StepOutput>, EngineError> {
        Ok(None)
    }
}

/// The outputs of every step, put together from those of every rank.
fn joined(config: &ModelConfig, ranks: Vec<Vec<RankOutput>>) -> Vec<StepOutput> {
    let steps = ranks[0].len();
    let mut ranks: Vec<_> = ranks.into_iter().map(Vec::into_iter).collect();
    let of_step = |_| ranks.iter_mut().filter_map(Iterator::next).collect();
    (0..steps)
        .map(of_step)
        .map(|parts: Vec<RankOutput>| join(config, parts))
        .collect()
}

/// One step's output.
fn join(config: &ModelConfig, mut parts: Vec<RankOutput>) -> StepOutput {
    let vocab = config.vocab_size / parts.len();
    let mut output = StepOutput {
        logits: logits(&parts, vocab),
        argmax: most_probable(&parts, vocab),
        attention: attention(&parts),
        selected: None,
        masses: masses(config, &mut parts),
        ..StepOutput::default()
    };
    for part in &parts {
        output.kv += part.step.kv;
    }
    output
}

/// Rows of the whole vocabulary from rows of `vocab` logits per rank.
fn logits(parts: &[RankOutput], vocab: usize) -> Floats {
    let rows = parts[0].step.logits.len() / vocab;
    let mut logits = Floats::of_len(rows * vocab * parts.len());
    let mut places = logits.chunks_exact_mut(vocab);
    for row in 0..rows {
        for (part, place) in parts.iter().zip(&mut places) {
            place.copy_from_slice(&part.step.logits[row * vocab..(row + 1) * vocab]);
        }
    }
    logits
}

/// The first of the most probable tokens of each row; `None` where any rank met a NaN or an infinity.
fn most_probable(parts: &[RankOutput], vocab: usize) -> Vec<Option<u32>> {
    let of_row = |row: usize| {
        let mut best: Option<(u32, f32)> = None;
        for (rank, part) in parts.iter().enumerate() {
            let token = part.step.argmax[row]? + (rank * vocab) as u32;
            let peak = part.peaks[row];
            if best.is_none_or(|(_, largest)| peak > largest) {
                best = Some((token, peak));
            }
        }
        best.map(|(token, _)| token)
    };
    (0..parts[0].step.argmax.len()).map(of_row).collect()
}

/// Captured rows of all query heads.
fn attention(parts: &[RankOutput]) -> Option<AttentionRows> {
    let first = parts[0].step.attention.as_ref()?;
    let of_rank = first.num_heads * first.kv_len;
    let mut probs = Vec::with_capacity(first.probs.len() * parts.len());
    for slot in 0..first.layers.len() {
        for rows in parts.iter().filter_map(|part| part.step.attention.as_ref()) {
            probs.extend_from_slice(&rows.probs[slot * of_rank..(slot + 1) * of_rank]);
        }
    }
    Some(AttentionRows {
        layers: first.layers.clone(),
        num_heads: first.num_heads * parts.len(),
        kv_len: first.kv_len,
        probs,
    })
}

/// Masses of all KV heads.
fn masses(config: &ModelConfig, parts: &mut [RankOutput]) -> Option<EntryMasses> {
    let heads = config.num_kv_heads / parts.len();
    let taken = parts.iter_mut().map(|part| part.step.masses.take());
    let of_rank: Vec<EntryMasses> = taken.collect::<Option<_>>()?;
    let mut ranks: Vec<_> = of_rank.into_iter().map(|m| m.of_head.into_iter()).collect();
    let mut of_head = Vec::with_capacity(config.num_layers * config.num_kv_heads);
    for _ in 0..config.num_layers {
        for rank in &mut ranks {
            of_head.extend(rank.by_ref().take(heads));
        }
    }
    Some(EntryMasses { of_head })
}
