//! Greedy decoding of the bundled target with nothing but [`Model::forward`], against transformers in float32.
//!
//! The end-to-end test of the same fixture runs the services; when both fail, look here first.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use specattn_engine::{EngineError, LoadOptions, LogitRows, Model, Step};

/// A logit gap at which float32 sums taken in a different order may choose either token.
const TIE: f32 = 1e-4;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Continuation>,
}

/// See `tests/python/greedy_reference.py`.
#[derive(Deserialize)]
struct Continuation {
    source: String,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    gaps: Vec<f32>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.expect("a row of logits").0 as u32
}

fn decode(model: &mut Model, prompt: &[u32], new_tokens: usize) -> Result<Vec<u32>, EngineError> {
    let mut sequence = model.new_sequence(prompt.len() + new_tokens)?;
    let mut run = |tokens: &[u32], logits| -> Result<Vec<f32>, EngineError> {
        let step = Step {
            logits,
            ..Step::new(&mut sequence, tokens)
        };
        Ok(model.forward(&mut [step])?[0].logits.to_vec())
    };
    let (last, body) = prompt.split_last().expect("a prompt");
    for chunk in body.chunks(512) {
        run(chunk, LogitRows::None)?;
    }
    let mut output = vec![argmax(&run(&[*last], LogitRows::Last)?)];
    while output.len() < new_tokens {
        let token = *output.last().expect("at least one token");
        output.push(argmax(&run(&[token], LogitRows::Last)?));
    }
    Ok(output)
}

#[test]
fn greedy_tokens_equal_transformers() {
    let path = root().join("tests/fixtures/greedy_bundled.json");
    let text = std::fs::read_to_string(path).expect("the fixture is part of the tree");
    let reference: Reference = serde_json::from_str(&text).expect("the fixture's form");
    assert_eq!(reference.prompts.len(), 20);
    let options = LoadOptions {
        kv_cache_bytes: 256 << 20,
        threads: 0,
        ..LoadOptions::default()
    };
    let mut model = Model::load(&root().join("models/target"), &options, &mut |_, _| {})
        .expect("the bundled target");

    let mut wrong = Vec::new();
    for entry in &reference.prompts {
        let tokens = decode(&mut model, &entry.prompt, entry.greedy.len()).expect("a valid prompt");
        if let Some(at) = tokens
            .iter()
            .zip(&entry.greedy)
            .position(|(got, want)| got != want)
        {
            let gap = entry.gaps[at];
            let kind = if gap < TIE { "a tie" } else { "WRONG" };
            wrong.push(format!(
                "{} tokens ({}): token {at}, gap {gap}: {kind}",
                entry.prompt.len(),
                entry.source
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn tokens_that_are_processed_again_leave_the_bits_of_their_decoding() {
    let options = LoadOptions {
        kv_cache_bytes: 64 << 20,
        threads: 0,
        ..LoadOptions::default()
    };
    let mut model = Model::load(&root().join("models/target"), &options, &mut |_, _| {})
        .expect("the bundled target");
    let prompt: Vec<u32> = (0..40).map(|i| 300 + 7 * i).collect();
    let decoded: Vec<u32> = (0..100).map(|i| 500 + 11 * i).collect();
    let mut logits_after = |chunk: usize| -> Vec<f32> {
        let mut sequence = model.new_sequence(200).expect("room");
        let mut run = |tokens: &[u32], logits| {
            let step = Step {
                logits,
                ..Step::new(&mut sequence, tokens)
            };
            model.forward(&mut [step]).expect("a valid step").remove(0)
        };
        run(&prompt, LogitRows::None);
        for tokens in decoded.chunks(chunk) {
            run(tokens, LogitRows::Replay);
        }
        run(&[7], LogitRows::Last).logits.to_vec()
    };
    let bits = |logits: Vec<f32>| -> Vec<u32> { logits.iter().map(|x| x.to_bits()).collect() };
    let one_by_one = bits(logits_after(1));
    for chunk in [7, 64, 100] {
        assert!(bits(logits_after(chunk)) == one_by_one, "chunks of {chunk}");
    }
}
