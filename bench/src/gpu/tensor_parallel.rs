//! A model split over several GPUs against the same model on one of them: tokens and times.

use std::path::Path;

use anyhow::Result;
use specattn_engine::{
    DeviceChoice, EngineError, HeadLists, LoadOptions, LogitRows, Model, Sequence,
};

use super::forwards::{self, Asked, ForwardCase, Kind};
use super::numbers::Numbers;
use super::pair::{Reference, decode, lead};
use super::rank_sums;

/// Share of each GPU's memory that a model and its cache may take.
const MEMORY: f32 = 0.85;

/// Prints everything; true when no token differs but at a near tie.
///
/// # Errors
/// When a model cannot be loaded or a device fails.
pub fn report(root: &Path, split: &DeviceChoice) -> Result<bool> {
    let fine = tokens(root, split)? & rank_sums::report(split)?;
    forwards(&root.join("bench/gpu/configs/llama-3-8b.json"), split)?;
    Ok(fine)
}

/// Greedy tokens of the bundled target.
fn tokens(root: &Path, split: &DeviceChoice) -> Result<bool> {
    let reference = Reference::read(&root.join("tests/fixtures/greedy_bundled.json"))?;
    let load = |device: DeviceChoice| {
        let options = LoadOptions {
            device,
            kv_cache_bytes: 512 << 20,
            ..LoadOptions::default()
        };
        Model::load(&root.join("models/target"), &options, &mut |_, _| {})
    };
    let mut several = match load(split.clone()) {
        Err(EngineError::InvalidArgument { reason, .. }) => {
            println!("Tokens of the bundled target were not compared: {reason}\n");
            return Ok(true);
        }
        loaded => loaded?,
    };
    let mut one = load(split.first())?;
    let (mut equal, mut drafted_equal, mut worst_gap) = (0, 0, 0.0f32);
    for entry in &reference.prompts {
        let count = entry.greedy.len();
        let on_one = decode(&mut one, &entry.prompt, count, None)?;
        let plain = decode(&mut several, &entry.prompt, count, None)?;
        let drafted = decode(&mut several, &entry.prompt, count, Some(&plain))?;
        drafted_equal += usize::from(plain == drafted);
        match plain.iter().zip(&on_one).position(|(a, b)| a != b) {
            None => equal += 1,
            Some(at) => {
                let lead = lead(&mut one, &entry.prompt, &on_one[..at])?;
                worst_gap = worst_gap.max(lead);
                println!(
                    "- prompt of {} tokens: first difference at token {at} of {count}, logit gap {lead}",
                    entry.prompt.len(),
                );
            }
        }
    }
    let prompts = reference.prompts.len();
    println!(
        "\ngreedy, dense, {split} against {}: {equal} of {prompts} prompts equal to the end; largest logit gap at a first difference {worst_gap}; with drafts {drafted_equal} of {prompts} equal without\n",
        split.first()
    );
    Ok(drafted_equal == prompts && worst_gap < 0.1)
}

/// Whole forwards of random weights.
fn forwards(config: &Path, split: &DeviceChoice) -> Result<()> {
    let cases: Vec<ForwardCase> = [(1, 4096), (1, 16_384), (1, 32_768), (8, 4096), (8, 32_768)]
        .into_iter()
        .flat_map(|(batch, context)| {
            [1, 5].map(|tokens| ForwardCase {
                batch,
                context,
                tokens,
            })
        })
        .collect();
    let one = times(config, &split.first(), &cases)?;
    let several = times(config, split, &cases)?;
    println!("llama-3-8b, random weights, most probable tokens handed out.\n");
    println!(
        "| batch | context | tokens | attention | {} ms | {split} ms | ÷ |",
        split.first()
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (case, (one, several)) in cases.iter().zip(one.iter().zip(&several)) {
        for (kind, (one, several)) in ["dense", "sparse"].iter().zip(one.iter().zip(several)) {
            println!(
                "| {} | {} | {} | {kind} | {one:.2} | {several:.2} | {:.2} |",
                case.batch,
                case.context,
                case.tokens,
                several / one
            );
        }
    }
    println!();
    Ok(())
}

/// Milliseconds of each case, dense and sparse.
fn times(config: &Path, device: &DeviceChoice, cases: &[ForwardCase]) -> Result<Vec<[f64; 2]>> {
    let options = LoadOptions {
        device: device.clone(),
        gpu_memory_utilization: Some(MEMORY),
        ..LoadOptions::default()
    };
    let mut model = Model::random(config, &options)?;
    let heads = model.config().num_layers * model.config().num_kv_heads;
    let mut numbers = Numbers(31);
    let mut all = Vec::new();
    for &case in cases {
        let room = case.context + case.tokens;
        let sequences: Result<Vec<Sequence>, _> =
            (0..case.batch).map(|_| model.new_sequence(room)).collect();
        let mut sequences = sequences?;
        for sequence in &mut sequences {
            forwards::prefill(&mut model, sequence, case.context)?;
        }
        let lists: Vec<HeadLists> = (0..case.batch)
            .map(|_| forwards::one_list(case.context, heads, &mut numbers))
            .collect();
        let mut both = [0.0; 2];
        for (ms, kind) in both.iter_mut().zip([Kind::Dense, Kind::Sparse]) {
            let asked = Asked {
                kind,
                logits: LogitRows::All,
                argmax: true,
            };
            *ms = forwards::time(&mut model, &mut sequences, case, asked, &lists)?;
        }
        all.push(both);
    }
    Ok(all)
}
