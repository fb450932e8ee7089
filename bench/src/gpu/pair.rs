//! Greedy text of a checkpoint on the GPU against the CPU's, token for token.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;
use specattn_engine::cuda::Device;
use specattn_engine::{DeviceChoice, EngineError, LoadOptions, LogitRows, Model, Sequence, Step};

#[derive(Deserialize)]
pub(super) struct Reference {
    pub(super) prompts: Vec<Continuation>,
}

/// See `tests/python/greedy_reference.py`: what transformers in float32 continues with, and the gaps between the two largest logits.
#[derive(Deserialize)]
pub(super) struct Continuation {
    pub(super) prompt: Vec<u32>,
    pub(super) greedy: Vec<u32>,
    pub(super) gaps: Vec<f32>,
}

impl Reference {
    /// Reads the fixture.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        Ok(serde_json::from_str(&text)?)
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map_or(0, |(index, _)| index as u32)
}

fn run(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    logits: LogitRows,
) -> Result<Vec<f32>, EngineError> {
    let step = Step {
        logits,
        ..Step::new(sequence, tokens)
    };
    Ok(model.forward(&mut [step])?[0].logits.to_vec())
}

/// A sequence of all tokens but the last, with room for that and `more`; and the last.
fn begun(model: &mut Model, tokens: &[u32], more: usize) -> Result<(Sequence, u32)> {
    let mut sequence = model.new_sequence(tokens.len() + more)?;
    let (&last, body) = tokens.split_last().context("a prompt")?;
    for chunk in body.chunks(512) {
        run(model, &mut sequence, chunk, LogitRows::None)?;
    }
    Ok((sequence, last))
}

/// Greedy tokens; with `verified`, each forward is given the next tokens of `verified` as a draft would, several at a time.
pub(super) fn decode(
    model: &mut Model,
    prompt: &[u32],
    count: usize,
    verified: Option<&[u32]>,
) -> Result<Vec<u32>> {
    let (mut sequence, last) = begun(model, prompt, count + 8)?;
    let vocab = model.config().vocab_size;
    let mut output: Vec<u32> = Vec::new();
    while output.len() < count {
        let pending = *output.last().unwrap_or(&last);
        let mut tokens = vec![pending];
        // Drafts of 0 to 6 tokens in turn.
        if let Some(drafts) = verified {
            let end = (output.len() + output.len() % 7).min(count);
            tokens.extend_from_slice(&drafts[output.len()..end]);
        }
        let start = sequence.len();
        let logits = run(model, &mut sequence, &tokens, LogitRows::All)?;
        for (i, row) in logits.chunks_exact(vocab).enumerate() {
            let token = argmax(row);
            output.push(token);
            if tokens.get(i + 1) != Some(&token) {
                sequence.truncate(start + i + 1);
                break;
            }
        }
    }
    output.truncate(count);
    Ok(output)
}

/// By how much the most probable token behind `prompt` and `text` leads the next one, in logits.
pub(super) fn lead(model: &mut Model, prompt: &[u32], text: &[u32]) -> Result<f32> {
    let (mut sequence, last) = begun(model, &[prompt, text].concat(), 0)?;
    let mut logits = run(model, &mut sequence, &[last], LogitRows::All)?;
    logits.sort_by(|a, b| b.total_cmp(a));
    Ok(logits[0] - logits[1])
}

/// Prints how many prompts agree; true when every difference is at a small gap, and drafts never change a token.
///
/// # Errors
/// When a model cannot be loaded or the device fails.
pub fn compare(folder: &Path, reference: &Path, gpu: &Device) -> Result<bool> {
    let device = &DeviceChoice::gpu(gpu.ordinal());
    let before = gpu.graph_counts();
    let reference = Reference::read(reference)?;
    let options = |device: &DeviceChoice| LoadOptions {
        device: device.clone(),
        kv_cache_bytes: 512 << 20,
        ..LoadOptions::default()
    };
    let mut model = Model::load(folder, &options(device), &mut |_, _| {})?;
    let mut cpu = Model::load(folder, &options(&DeviceChoice::Cpu), &mut |_, _| {})?;
    let (mut equal, mut drafted_equal, mut worst_gap) = (0, 0, 0.0f32);
    let (mut tokens, mut matched) = (0, 0);
    let mut decoding = Duration::ZERO;
    for entry in &reference.prompts {
        let count = entry.greedy.len();
        let start = Instant::now();
        let plain = decode(&mut model, &entry.prompt, count, None)?;
        decoding += start.elapsed();
        let drafted = decode(&mut model, &entry.prompt, count, Some(&plain))?;
        let on_cpu = decode(&mut cpu, &entry.prompt, count, None)?;
        drafted_equal += usize::from(plain == drafted);
        let first = plain.iter().zip(&on_cpu).position(|(a, b)| a != b);
        tokens += count;
        matched += first.unwrap_or(count);
        match first {
            None => equal += 1,
            Some(at) => {
                worst_gap = worst_gap.max(entry.gaps[at]);
                println!(
                    "prompt of {} tokens: first difference at token {at} of {count}, logit gap {}",
                    entry.prompt.len(),
                    entry.gaps[at]
                );
            }
        }
    }
    let prompts = reference.prompts.len();
    println!(
        "\ngreedy, dense, {}: {equal} of {prompts} prompts equal the CPU's tokens to the end; {matched} of {tokens} tokens before a first difference; largest logit gap at one {worst_gap}; with drafts {drafted_equal} of {prompts} equal without",
        device
    );
    println!(
        "without drafts {:.0} tokens/s, prompts and logits on the host included; {}\n",
        tokens as f64 / decoding.as_secs_f64(),
        gpu.graph_counts().since(before)
    );
    Ok(drafted_equal == prompts && worst_gap < 0.1)
}
