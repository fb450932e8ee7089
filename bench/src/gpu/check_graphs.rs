//! Whether passes that are replayed as graphs give the bits of passes launched kernel by kernel.
//!
//! Sequences of different lengths decode side by side, across ends of KV blocks and of units of attention: dense steps with logits,
//! masked ones that hand out masses, and captured ones that select.

use std::path::Path;

use anyhow::Result;
use specattn_engine::cuda::Device;
use specattn_engine::{
    DeviceChoice, HeadLists, LoadOptions, LogitRows, MixedHead, MixedRow, Model, Round,
    RowSelection, Sequence, Spread, Step,
};

use super::numbers::Numbers;

/// Contexts to begin with.
const CONTEXTS: [usize; 3] = [1000, 61, 250];
/// Forwards of each kind.
const ROUNDS: usize = 24;

/// What forwards handed out, as bits.
#[derive(Debug, Default, PartialEq)]
struct HandedOut {
    logits: Vec<u32>,
    masses: Vec<u32>,
    selected: Vec<u64>,
    tokens: Vec<Option<u32>>,
}

/// Prints what was checked; true when all bits are equal and graphs were replayed.
///
/// # Errors
/// When a model cannot be loaded or the device fails.
pub fn check(root: &Path, device: &Device) -> Result<bool> {
    let options = LoadOptions {
        device: DeviceChoice::gpu(device.ordinal()),
        ..LoadOptions::default()
    };
    let mut fine = true;
    for name in ["target", "draft"] {
        let mut model = Model::load(&root.join("models").join(name), &options, &mut |_, _| {})?;
        device.use_graphs(false);
        let singly = run(&mut model)?;
        device.use_graphs(true);
        let before = device.graph_counts();
        let as_graphs = run(&mut model)?;
        let counts = device.graph_counts().since(before);
        let same = singly == as_graphs;
        println!(
            "graphs, {name}: {}; {counts}\n",
            if same { "the same bits" } else { "OTHER BITS" }
        );
        fine &= same && counts.replayed > 0;
    }
    Ok(fine)
}

/// The same forwards each time.
fn run(model: &mut Model) -> Result<HandedOut> {
    let mut numbers = Numbers(43);
    let vocab = model.config().vocab_size;
    let mut tokens = |count: usize| -> Vec<u32> {
        let token = |_| ((numbers.uniform() * vocab as f32) as u32).min(vocab as u32 - 1);
        (0..count).map(token).collect()
    };
    let mut sequences = Vec::new();
    for context in CONTEXTS {
        let mut sequence = model.new_sequence(context + 3 * ROUNDS)?;
        for chunk in tokens(context).chunks(256) {
            model.forward(&mut [Step::new(&mut sequence, chunk)])?;
        }
        sequences.push(sequence);
    }
    let selection = selection(model);
    let mut handed_out = HandedOut::default();
    for _ in 0..ROUNDS {
        for kind in 0..3 {
            let inputs = tokens(CONTEXTS.len());
            let lists: Vec<HeadLists> = sequences.iter().map(|s| lists(model, s)).collect();
            let selections: Vec<RowSelection> = sequences
                .iter()
                .map(|sequence| RowSelection {
                    round: Round {
                        context_len: sequence.len(),
                        ..Round::default()
                    },
                    ..selection.clone()
                })
                .collect();
            let parts = sequences.iter_mut().zip(&inputs);
            let parts = parts.zip(lists.iter().zip(&selections));
            let mut steps: Vec<Step<'_>> = parts
                .map(|((sequence, token), (lists, selection))| Step {
                    lists: (kind == 1).then_some(lists),
                    masses: kind == 1,
                    logits: LogitRows::Last,
                    argmax: kind == 2,
                    select: (kind == 2).then_some(selection),
                    ..Step::new(sequence, std::slice::from_ref(token))
                })
                .collect();
            for output in model.forward(&mut steps)? {
                let bits = output.logits.iter().map(|x| x.to_bits());
                handed_out.logits.extend(bits);
                let masses = output.masses.iter().flat_map(|masses| &masses.of_head);
                let bits = masses.flatten().map(|x| x.to_bits());
                handed_out.masses.extend(bits);
                let selected = output.selected.iter().flat_map(|rows| &rows.words);
                handed_out.selected.extend(selected);
                handed_out.tokens.extend(output.argmax);
            }
        }
    }
    Ok(handed_out)
}

/// Every third position, for all heads.
fn lists(model: &Model, sequence: &Sequence) -> HeadLists {
    let config = model.config();
    HeadLists {
        lists: vec![(0..sequence.len()).step_by(3).collect()],
        of_head: vec![0; config.num_layers * config.num_kv_heads],
    }
}

/// The last layer's heads, as they are and spread over neighbours.
fn selection(model: &Model) -> RowSelection {
    let config = model.config();
    let weight = 1.0 / config.num_heads as f32;
    let terms = (0..config.num_heads).map(|head| MixedHead {
        layer: config.num_layers as u32 - 1,
        head: head as u32,
        weight,
    });
    let terms: Vec<MixedHead> = terms.collect();
    let spread = Spread {
        share: 0.5,
        reach: 8,
    };
    let row = |spread| MixedRow {
        terms: terms.clone(),
        p: 0.9,
        spread,
    };
    RowSelection {
        rows: vec![row(None), row(Some(spread))],
        round: Round::default(),
    }
}
