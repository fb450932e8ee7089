//! What capturing costs a draft step: rows brought to the host, or selections made on the device, beside a plain step.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use specattn_draft::{OwnPolicy, OwnReads, RowSelector};
use specattn_engine::cuda::Device;
use specattn_engine::{
    DeviceChoice, LoadOptions, LogitRows, Model, Round, RowSelection, Sequence, Step, StepOutput,
};
use specattn_mask::{Encoder, LayerMap, MaskPolicy};

use super::forwards::prefill;
use super::graphs::{Launching, name_of};

const RUNS: usize = 15;
const WARM_UP: usize = 5;
/// Layers and KV heads of the target whose masks are made: Llama-2-7B's layers, by proportional depth.
const TARGET: (u32, u32) = (32, 32);

/// What a captured step is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Rows,
    /// Selections for the target's masks.
    Masks,
    /// The same from a round's means, spread.
    Means,
    /// Those, and for the draft's own reads.
    MasksAndOwn,
}

/// Median milliseconds of the forward, and of what the host makes of it: lists and an encoded mask.
fn time(
    model: &mut Model,
    sequence: &mut Sequence,
    context: usize,
    kind: Kind,
) -> Result<(f64, f64)> {
    let config = model.config().clone();
    let layers: Vec<usize> = (0..config.num_layers).collect();
    let (draft_layers, heads) = (config.num_layers as u32, config.num_heads as u32);
    let mut map = LayerMap::proportional(TARGET.0, TARGET.1, draft_layers, heads);
    for source in &mut map.sources {
        source.spread = (kind == Kind::Means).then_some(0.5);
    }
    let policy = MaskPolicy::default();
    let mut masks = RowSelector::new(policy, map.sources);
    let mut encoder = Encoder::new();
    let mut own = OwnReads::new(OwnPolicy::default(), &policy, config.num_kv_heads);
    let mut selection = RowSelection {
        rows: masks.mixed_rows().collect(),
        round: Round {
            context_len: context,
            ..Round::default()
        },
    };
    if kind == Kind::MasksAndOwn {
        let rows = own.mixed_rows(config.num_layers, config.num_heads);
        selection.rows.extend(rows);
    }
    let (mut forwards, mut hosts) = (Vec::new(), Vec::new());
    for run in 0..WARM_UP + RUNS {
        sequence.truncate(context);
        let start = Instant::now();
        let step = Step {
            logits: LogitRows::Last,
            argmax: true,
            capture: if kind == Kind::Plain { &[] } else { &layers },
            select: (!matches!(kind, Kind::Plain | Kind::Rows)).then_some(&selection),
            ..Step::new(sequence, &[17])
        };
        let output = model.forward(&mut [step])?.pop().context("an output")?;
        let forward = start.elapsed();
        let start = Instant::now();
        masks.begin(context);
        use_rows(&output, &mut masks, &mut encoder, &mut own)?;
        if run >= WARM_UP {
            forwards.push(forward.as_secs_f64() * 1e3);
            hosts.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok((median(forwards), median(hosts)))
}

/// Makes a mask, and the draft's own lists where they were asked for.
fn use_rows(
    output: &StepOutput,
    masks: &mut RowSelector,
    encoder: &mut Encoder,
    own: &mut OwnReads,
) -> Result<()> {
    if let Some(selected) = &output.selected {
        masks.add_selected(selected);
        own.selected(selected, masks.num_sources());
    } else if let Some(rows) = &output.attention {
        own.captured(rows);
        masks.add_step(rows)?;
    } else {
        return Ok(());
    }
    std::hint::black_box(encoder.encode(masks.finish()));
    Ok(())
}

/// Prints a table for the model that `config` describes.
///
/// # Errors
/// When the device fails or has no room.
pub fn table(
    config: &Path,
    device: &Device,
    contexts: &[usize],
    launching: Launching,
) -> Result<()> {
    let options = LoadOptions {
        device: DeviceChoice::gpu(device.ordinal()),
        gpu_memory_utilization: Some(0.9),
        ..LoadOptions::default()
    };
    let mut model = Model::random(config, &options)?;
    let name = config.file_stem().unwrap_or_default().to_string_lossy();
    println!(
        "Draft steps of {name}, random weights, batch 1, one token, its most probable successor handed out. Captured steps also hand out attention rows of all layers, or selections from {} sources (p {}), or those and selections of every KV head of the draft (p {}). Random weights attend to far more positions than trained ones, so that the host's part, the draft's own lists and the encoded mask, is larger than in use.\n",
        model.config().num_layers,
        MaskPolicy::default().p,
        OwnPolicy::default().p
    );
    println!("| context | launched | captured step | forward ms | ÷ plain | then on the host ms |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let before = device.graph_counts();
    for &context in contexts {
        let mut sequence = model.new_sequence(context + 1)?;
        prefill(&mut model, &mut sequence, context)?;
        for graphs in launching.ways() {
            device.use_graphs(graphs);
            let way = name_of(graphs);
            let (plain, _) = time(&mut model, &mut sequence, context, Kind::Plain)?;
            println!("| {context} | {way} | none | {plain:.2} | | |");
            for (kind, name) in [
                (Kind::Rows, "rows to the host"),
                (Kind::Masks, "selections for masks"),
                (Kind::Means, "the same, from means"),
                (Kind::MasksAndOwn, "those and the draft's own"),
            ] {
                let (forward, host) = time(&mut model, &mut sequence, context, kind)?;
                println!(
                    "| {context} | {way} | {name} | {forward:.2} | {:.2} | {host:.2} |",
                    forward / plain
                );
            }
        }
    }
    println!("\n{}", device.graph_counts().since(before));
    println!();
    Ok(())
}
