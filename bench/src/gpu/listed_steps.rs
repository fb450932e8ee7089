//! What lists cost the host: steps in which every KV head reads a list of its own, as the draft's own reads and a target with a
//! memory do, beside dense ones.

use std::path::Path;

use anyhow::Result;
use specattn_engine::{DeviceChoice, HeadLists, LoadOptions, LogitRows, Model, Sequence};

use super::forwards::{self, Asked, ForwardCase, Kind, prefill};
use super::numbers::Numbers;

/// Shares of the context that lists keep: a trained model's, and what random weights come to.
const KEPT: [f32; 2] = [0.2, 0.8];

/// A list for each of `heads`, keeping about `kept` of the context.
fn lists(context: usize, heads: usize, kept: f32, numbers: &mut Numbers) -> HeadLists {
    let mut list = || (0..context).filter(|_| numbers.uniform() < kept).collect();
    HeadLists {
        lists: (0..heads).map(|_| list()).collect(),
        of_head: (0..heads as u32).collect(),
    }
}

/// Prints a table for the model that `config` describes: batches of one and eight sequences, one token each.
///
/// # Errors
/// When the device fails or has no room.
pub fn table(config: &Path, device: &DeviceChoice, contexts: &[usize]) -> Result<()> {
    let options = LoadOptions {
        device: device.clone(),
        gpu_memory_utilization: Some(0.9),
        ..LoadOptions::default()
    };
    let mut model = Model::random(config, &options)?;
    let heads = model.config().num_layers * model.config().num_kv_heads;
    let name = config.file_stem().unwrap_or_default().to_string_lossy();
    println!(
        "Steps of {name}, random weights, one token, its most probable successor handed out; {heads} lists per sequence, one for each KV head.\n"
    );
    println!("| context | batch | dense ms | kept | by lists ms | ÷ dense |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut numbers = Numbers(19);
    for &context in contexts {
        for batch in [1, 8] {
            let sequences = (0..batch).map(|_| model.new_sequence(context + 1));
            let mut sequences = sequences.collect::<Result<Vec<Sequence>, _>>()?;
            for sequence in &mut sequences {
                prefill(&mut model, sequence, context)?;
            }
            let case = ForwardCase {
                batch,
                context,
                tokens: 1,
            };
            let mut time = |kind, lists: &[HeadLists]| {
                let asked = Asked {
                    kind,
                    logits: LogitRows::Last,
                    argmax: true,
                };
                forwards::time(&mut model, &mut sequences, case, asked, lists)
            };
            let none = vec![HeadLists::default(); batch];
            let dense = time(Kind::Dense, &none)?;
            for kept in KEPT {
                let of_sequence = |_| lists(context, heads, kept, &mut numbers);
                let lists: Vec<HeadLists> = (0..batch).map(of_sequence).collect();
                let listed = time(Kind::Sparse, &lists)?;
                println!(
                    "| {context} | {batch} | {dense:.2} | {kept} | {listed:.2} | {:.2} |",
                    listed / dense
                );
            }
        }
    }
    println!();
    Ok(())
}
