//! What forwards hand out instead of logits and attention rows, against what follows from those: the most probable
//! tokens, and selections from mixed rows.

use std::path::Path;

use anyhow::{Context, Result};
use specattn_engine::{
    AttentionRows, DeviceChoice, LoadOptions, LogitRows, MixedHead, MixedRow, Model, Round,
    RowSelection, Sequence, Spread, Step, StepOutput,
};
use specattn_mask::spread::{REACH, spread};

use super::numbers::Numbers;

/// Contexts of a batch's sequences.
const CONTEXTS: [&[usize]; 4] = [&[1], &[63, 5], &[700, 64, 131], &[1500, 3000]];
/// What sequences add to logits, as many of them as their length leaves over after threes.
const BIAS: [(u32, f32); 2] = [(3, 0.25), (77, 4.0)];
/// How far rounding may move entries, relatively, and masses: mixing rounds once per head.
const MARGIN: f64 = 1e-5;
/// The unit of a mass.
const UNIT: f64 = 1.0 / 2_147_483_648.0;

/// Prints what was checked; true when all is right.
///
/// # Errors
/// When a model cannot be made or the device fails.
pub fn check(root: &Path, device: &DeviceChoice) -> Result<bool> {
    let options = LoadOptions {
        device: device.clone(),
        ..LoadOptions::default()
    };
    let draft = Model::load(&root.join("models/draft"), &options, &mut |_, _| {})?;
    let shape = root.join("bench/gpu/configs/tinyllama-1.1b.json");
    let random = Model::random(&shape, &options)?;
    let mut fine = true;
    for (name, mut model) in [("bundled draft", draft), ("tinyllama-1.1b", random)] {
        let mut right = true;
        for contexts in CONTEXTS {
            right &= check_batch(&mut model, contexts)?;
            right &= check_means(&mut model, contexts)?;
        }
        println!(
            "hand-outs, {name}: {}\n",
            if right { "all right" } else { "WRONG" }
        );
        fine &= right;
    }
    Ok(fine)
}

/// Sequences of the given lengths with random tokens.
fn sequences(
    model: &mut Model,
    contexts: &[usize],
    numbers: &mut Numbers,
) -> Result<Vec<Sequence>> {
    let vocab = model.config().vocab_size;
    let mut sequences = Vec::new();
    for &context in contexts {
        let mut sequence = model.new_sequence(context + 8)?;
        let tokens = tokens(context, vocab, numbers);
        for chunk in tokens.chunks(512) {
            model.forward(&mut [Step::new(&mut sequence, chunk)])?;
        }
        sequences.push(sequence);
    }
    Ok(sequences)
}

fn tokens(count: usize, vocab: usize, numbers: &mut Numbers) -> Vec<u32> {
    let token = |_| ((numbers.uniform() * vocab as f32) as u32).min(vocab as u32 - 1);
    (0..count).map(token).collect()
}

/// A mean of one layer's heads, a mixture over all layers, and every head of the last layer.
fn selection(model: &Model, p: f32) -> RowSelection {
    let c = model.config();
    let head = |layer: usize, head: usize, weight: f32| MixedHead {
        layer: layer as u32,
        head: head as u32,
        weight,
    };
    let mean = 1.0 / c.num_heads as f32;
    let mut rows = vec![
        (0..c.num_heads).map(|h| head(0, h, mean)).collect(),
        // Not in order of layers.
        (0..c.num_layers)
            .rev()
            .map(|l| head(l, l % c.num_heads, 1.0 / c.num_layers as f32))
            .collect(),
    ];
    rows.extend((0..c.num_heads).map(|h| vec![head(c.num_layers - 1, h, 1.0)]));
    let row = |(index, terms): (usize, Vec<MixedHead>)| MixedRow {
        terms,
        p: if index % 2 == 0 { p } else { 0.5 },
        spread: None,
    };
    RowSelection {
        rows: rows.into_iter().enumerate().map(row).collect(),
        round: Round::default(),
    }
}

/// One forward of every sequence that hands out rows and logits, and one that hands out selections and tokens.
fn check_batch(model: &mut Model, contexts: &[usize]) -> Result<bool> {
    let mut numbers = Numbers(41);
    let config = model.config().clone();
    let mut sequences = sequences(model, contexts, &mut numbers)?;
    let inputs: Vec<Vec<u32>> = (1..=contexts.len())
        .map(|count| tokens(count, config.vocab_size, &mut numbers))
        .collect();
    let layers: Vec<usize> = (0..config.num_layers).collect();
    let selections: Vec<RowSelection> = [0.95, 0.8, 0.3]
        .iter()
        .map(|&p| selection(model, p))
        .collect();
    let mut run = |selects: bool| -> Result<Vec<StepOutput>> {
        let parts = sequences.iter_mut().zip(&inputs).zip(&selections);
        let mut steps: Vec<Step<'_>> = parts
            .zip(contexts)
            .map(|(((sequence, input), selection), &context)| {
                sequence.truncate(context);
                Step {
                    logits: LogitRows::All,
                    argmax: selects,
                    bias: &BIAS[..sequence.len() % 3],
                    capture: &layers,
                    select: selects.then_some(selection),
                    ..Step::new(sequence, input)
                }
            })
            .collect();
        Ok(model.forward(&mut steps)?)
    };
    let (rows, selected) = (run(false)?, run(true)?);
    let mut right = true;
    let outputs = rows.iter().zip(&selected).zip(contexts);
    for (((rows, handed), context), selection) in outputs.zip(&selections) {
        let largest: Vec<Option<u32>> = rows
            .logits
            .chunks_exact(config.vocab_size)
            .map(|row| {
                let mut row = row.to_vec();
                for &(token, value) in &BIAS[..context % 3] {
                    row[token as usize] += value;
                }
                let best = row.iter().enumerate();
                let best = best.reduce(|best, next| if next.1 > best.1 { next } else { best });
                best.map(|(token, _)| token as u32)
            })
            .collect();
        if handed.argmax != largest || !handed.logits.is_empty() {
            println!("most probable tokens: {:?}, not {largest:?}", handed.argmax);
            right = false;
        }
        let attention = rows.attention.as_ref().context("captured rows")?;
        let selected = handed.selected.as_ref().context("selections")?;
        if handed.attention.is_some() || selected.kv_len != attention.kv_len {
            println!("selections of {} positions", selected.kv_len);
            right = false;
        }
        for (index, row) in selection.rows.iter().enumerate() {
            let mixed = mix(attention, row)?;
            right &= check_row(&mixed, row.p, selected.row(index), index);
        }
    }
    Ok(right)
}

/// Rounds of captured steps, whose means are selected from after each: sequences side by side, each at its own step.
fn check_means(model: &mut Model, contexts: &[usize]) -> Result<bool> {
    let mut numbers = Numbers(43);
    let config = model.config().clone();
    let mut sequences = sequences(model, contexts, &mut numbers)?;
    let layers: Vec<usize> = (0..config.num_layers).collect();
    let mut selections: Vec<RowSelection> = contexts
        .iter()
        .map(|&context_len| {
            let mut selection = selection(model, 0.8);
            for (row, share) in selection.rows.iter_mut().zip([0.5, 0.3, 0.0]) {
                let reach = REACH as u32;
                row.spread = Some(Spread { share, reach });
            }
            selection.round.context_len = context_len;
            selection
        })
        .collect();
    let mut sums: Vec<Vec<Vec<f32>>> = selections
        .iter()
        .zip(contexts)
        .map(|(selection, &context)| vec![vec![0.0; context]; selection.rows.len()])
        .collect();
    let (mut right, mut wide) = (true, Vec::new());
    for round in 0..2 {
        for step in 0..3u32 {
            let input = tokens(1, config.vocab_size, &mut numbers);
            let mut run = |selects: bool| -> Result<Vec<StepOutput>> {
                let parts = sequences.iter_mut().zip(&selections).zip(contexts);
                let mut steps: Vec<Step<'_>> = parts
                    .map(|((sequence, selection), &context)| {
                        sequence.truncate(context + step as usize);
                        Step {
                            capture: &layers,
                            select: selects.then_some(selection),
                            ..Step::new(sequence, &input)
                        }
                    })
                    .collect();
                Ok(model.forward(&mut steps)?)
            };
            let (rows, handed) = (run(false)?, run(true)?);
            let parts = rows.iter().zip(&handed).zip(&selections).zip(&mut sums);
            for (((rows, handed), selection), sums) in parts {
                let attention = rows.attention.as_ref().context("captured rows")?;
                let selected = handed.selected.as_ref().context("selections")?;
                for (index, (row, sum)) in selection.rows.iter().zip(sums).enumerate() {
                    let mut mixed = mix(attention, row)?;
                    if let Some(Spread { share, .. }) = row.spread {
                        for (sum, &x) in sum.iter_mut().zip(&mixed) {
                            *sum = if step == 0 { x } else { *sum + x };
                        }
                        spread(sum, share, &mut wide);
                        // Selections know no scale, but the bounds on rounding below do.
                        let scale = 1.0 / (wide.iter().sum::<f32>().max(f32::MIN_POSITIVE));
                        mixed.fill(0.0);
                        for (x, &w) in mixed.iter_mut().zip(&wide) {
                            *x = w * scale;
                        }
                    }
                    if !check_row(&mixed, row.p, selected.row(index), index) {
                        println!("means, round {round}, step {step}");
                        right = false;
                    }
                }
            }
            for selection in &mut selections {
                selection.round.step = (step + 1) % 3;
            }
        }
    }
    Ok(right)
}

/// The row that a selection is made from, where it is of one step.
fn mix(attention: &AttentionRows, row: &MixedRow) -> Result<Vec<f32>> {
    let mut mixed = vec![0.0f32; attention.kv_len];
    for term in &row.terms {
        let head = attention.row(term.layer as usize, term.head as usize);
        for (sum, x) in mixed.iter_mut().zip(head.context("a captured head")?) {
            *sum += term.weight * x;
        }
    }
    Ok(mixed)
}

/// Whether `words` is a selection of mass `p` from the row.
fn check_row(mixed: &[f32], p: f32, words: &[u64], index: usize) -> bool {
    let (mut kept, mut left_out) = (Vec::new(), Vec::new());
    for (position, &x) in mixed.iter().enumerate() {
        let is_kept = words[position / 64] >> (position % 64) & 1 == 1;
        let side = if is_kept { &mut kept } else { &mut left_out };
        side.push(f64::from(x));
    }
    // The definition, give or take rounding: a threshold divides them, the mass is reached, and would not be above it.
    let least = kept.iter().copied().fold(f64::INFINITY, f64::min);
    let most = left_out.iter().copied().fold(0.0, f64::max);
    let mass: f64 = kept.iter().sum();
    let above: f64 = kept.iter().filter(|&&x| x > least * (1.0 + MARGIN)).sum();
    let wanted = f64::from(p) * (mass + left_out.iter().sum::<f64>());
    let right = least * (1.0 + MARGIN) + UNIT >= most
        && mass + MARGIN >= wanted
        && above - MARGIN <= wanted;
    let used = mixed.len() % 64;
    let past_end = used != 0 && words.last().is_some_and(|last| last >> used != 0);
    if !right || past_end {
        println!(
            "selection {index} of {} positions, p {}: kept {} of mass {mass} from {least} on, left out up to {most}, past the end {past_end}",
            mixed.len(),
            p,
            kept.len()
        );
    }
    right && !past_end
}
