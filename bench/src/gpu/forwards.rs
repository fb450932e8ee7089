//! Whole forwards of a model's shape with random weights, against the bytes they must read.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use specattn_engine::cuda::Device;
use specattn_engine::{DeviceChoice, HeadLists, LoadOptions, LogitRows, Model, Sequence, Step};

use super::graphs::{Launching, name_of};
use super::numbers::Numbers;

/// The share of positions that the paper keeps.
const KEPT: f32 = 0.216;
const RUNS: usize = 9;
/// The first sizes memory, the third is captured.
const WARM_UP: usize = 5;
/// Tokens per prompt chunk.
const CHUNK: usize = 2048;

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct ForwardCase {
    /// Sessions.
    pub batch: usize,
    /// Cached positions of each.
    pub context: usize,
    /// Tokens of each in a forward.
    pub tokens: usize,
}

/// What a forward reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Dense,
    Sparse,
}

/// What a timed forward is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) kind: Kind,
    pub(super) logits: LogitRows,
    /// Tokens in place of logits.
    pub(super) argmax: bool,
}

/// Fills a sequence to `context` tokens.
pub(super) fn prefill(model: &mut Model, sequence: &mut Sequence, context: usize) -> Result<()> {
    let vocab = model.config().vocab_size as u32;
    while sequence.len() < context {
        let n = CHUNK.min(context - sequence.len());
        let tokens: Vec<u32> = (0..n)
            .map(|i| ((sequence.len() + i) as u32 * 7919) % vocab)
            .collect();
        let step = Step::new(&mut *sequence, &tokens);
        model.forward(&mut [step])?;
    }
    Ok(())
}

/// One list for all heads that keeps [`KEPT`] of the positions.
pub(super) fn one_list(context: usize, heads: usize, numbers: &mut Numbers) -> HeadLists {
    let kept = (0..context).filter(|_| numbers.uniform() < KEPT);
    HeadLists {
        lists: vec![kept.collect()],
        of_head: vec![0; heads],
    }
}

/// The median time of a forward, in milliseconds.
pub(super) fn time(
    model: &mut Model,
    sequences: &mut [Sequence],
    case: ForwardCase,
    asked: Asked,
    lists: &[HeadLists],
) -> Result<f64> {
    let tokens: Vec<u32> = (0..case.tokens as u32).map(|i| i * 31 + 5).collect();
    let mut times = Vec::new();
    for run in 0..WARM_UP + RUNS {
        let mut steps: Vec<Step<'_>> = sequences
            .iter_mut()
            .zip(lists)
            .map(|(sequence, lists)| {
                sequence.truncate(case.context);
                Step {
                    lists: (asked.kind == Kind::Sparse).then_some(lists),
                    logits: asked.logits,
                    argmax: asked.argmax,
                    ..Step::new(sequence, &tokens)
                }
            })
            .collect();
        let start = Instant::now();
        model.forward(&mut steps)?;
        if run >= WARM_UP {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Prints a table for the model that `config` describes.
///
/// # Errors
/// When the device fails or has no room.
pub fn table(
    config: &Path,
    device: &Device,
    (cases, launching): (&[ForwardCase], Launching),
    bandwidth: f64,
) -> Result<()> {
    let options = LoadOptions {
        device: DeviceChoice::gpu(device.ordinal()),
        gpu_memory_utilization: Some(0.9),
        ..LoadOptions::default()
    };
    let mut model = Model::random(config, &options)?;
    let c = model.config().clone();
    let name = config
        .file_stem()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let projections = c.hidden_size * (c.num_heads + 2 * c.num_kv_heads + c.num_heads) * c.head_dim
        + 3 * c.hidden_size * c.intermediate_size;
    let layers = 2.0 * (c.num_layers * projections) as f64;
    let head = 2.0 * (c.vocab_size * c.hidden_size) as f64;
    println!(
        "{name}, random weights: {:.2} GB in the layers, {:.2} GB in the head, {} KV blocks. Floor: weights and KV entries read once at the copy's rate. Times are the caller's; with logits, those of every token are copied to the host.\n",
        layers / 1e9,
        head / 1e9,
        model.kv_blocks().1
    );
    println!(
        "| batch | context | tokens | attention | launched | layers ms | floor ms | ÷ floor | with logits ms | floor ms | ÷ floor |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let before = device.graph_counts();
    let entry = (4 * c.head_dim) as f64;
    let heads = c.num_layers * c.num_kv_heads;
    let mut numbers = Numbers(31);
    for &case in cases {
        let sequences: Result<Vec<Sequence>, _> = (0..case.batch)
            .map(|_| model.new_sequence(case.context + case.tokens))
            .collect();
        let Ok(mut sequences) = sequences else {
            println!(
                "| {} | {} | {} | | | no room | | |",
                case.batch, case.context, case.tokens
            );
            continue;
        };
        for sequence in &mut sequences {
            prefill(&mut model, sequence, case.context)?;
        }
        let lists: Vec<HeadLists> = (0..case.batch)
            .map(|_| one_list(case.context, heads, &mut numbers))
            .collect();
        for kind in [Kind::Dense, Kind::Sparse] {
            let entries: usize = match kind {
                Kind::Sparse => lists.iter().map(|l| l.lists[0].count() + case.tokens).sum(),
                _ => case.batch * (case.context + case.tokens),
            };
            for graphs in launching.ways() {
                device.use_graphs(graphs);
                let mut cells = Vec::new();
                for (logits, weights) in
                    [(LogitRows::None, layers), (LogitRows::All, layers + head)]
                {
                    let asked = Asked {
                        kind,
                        logits,
                        argmax: false,
                    };
                    let ms = time(&mut model, &mut sequences, case, asked, &lists)?;
                    let floor = (weights + (entries * heads) as f64 * entry) / bandwidth * 1e3;
                    cells.push(format!("{ms:.2} | {floor:.2} | {:.2}", ms / floor));
                }
                println!(
                    "| {} | {} | {} | {} | {} | {} |",
                    case.batch,
                    case.context,
                    case.tokens,
                    format!("{kind:?}").to_lowercase(),
                    name_of(graphs),
                    cells.join(" | ")
                );
            }
        }
    }
    println!("\n{}", device.graph_counts().since(before));
    println!();
    Ok(())
}
