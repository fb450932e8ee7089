//! Whether a sequence that took over another's prompt goes on with the bits of the one that computed it, whatever that one does
//! meanwhile.

use std::path::Path;

use anyhow::Result;
use specattn_engine::{CHUNK_TOKENS, DeviceChoice, LoadOptions, LogitRows, Model, Sequence, Step};

use super::numbers::Numbers;

/// Ends of prompts behind a whole chunk: within a KV block, at its end, over several.
const TAILS: [usize; 7] = [0, 1, 31, 63, 64, 65, 255];
/// Tokens that a sequence goes on by.
const MORE: usize = 9;

/// Prints what was checked; true when all bits are equal.
///
/// # Errors
/// When a model cannot be made or the device fails.
pub fn check(root: &Path, device: &DeviceChoice) -> Result<bool> {
    let options = LoadOptions {
        device: device.clone(),
        ..LoadOptions::default()
    };
    let target = Model::load(&root.join("models/target"), &options, &mut |_, _| {})?;
    let shape = root.join("bench/gpu/configs/tinyllama-1.1b.json");
    let random = Model::random(&shape, &options)?;
    let mut fine = true;
    for (name, mut model) in [("bundled target", target), ("tinyllama-1.1b", random)] {
        let mut wrong = 0;
        for tail in TAILS {
            wrong += usize::from(!is_shared(&mut model, CHUNK_TOKENS + tail)?);
        }
        println!(
            "shared prompts, {name}: {wrong} of {} lengths go wrong\n",
            TAILS.len()
        );
        fine &= wrong == 0;
    }
    Ok(fine)
}

/// Whether a second sequence takes all of a prompt over from a first that has gone on, and then gives the first's logits.
fn is_shared(model: &mut Model, length: usize) -> Result<bool> {
    let mut numbers = Numbers(length as u64);
    let vocab = model.config().vocab_size;
    let mut tokens = |count| -> Vec<u32> {
        let tokens = std::iter::repeat_with(|| numbers.below(vocab) as u32);
        tokens.take(count).collect()
    };
    let (prompt, more, other) = (tokens(length), tokens(MORE), tokens(MORE));
    let mut first = model.new_sequence(length + MORE)?;
    let mut second = model.new_sequence(length + MORE)?;
    for chunk in prompt.chunks(CHUNK_TOKENS) {
        model.forward(&mut [Step::new(&mut first, chunk)])?;
        model.publish(&mut first, &prompt)?;
    }
    go_on(model, &mut first, &other)?;
    let taken = model.adopt(&mut second, &prompt)?;
    first.truncate(length);
    let expected = go_on(model, &mut first, &more)?;
    Ok(taken == length && go_on(model, &mut second, &more)? == expected)
}

/// The logits behind some tokens more, as bits.
fn go_on(model: &mut Model, sequence: &mut Sequence, tokens: &[u32]) -> Result<Vec<u32>> {
    let step = Step {
        logits: LogitRows::Verify,
        ..Step::new(sequence, tokens)
    };
    let output = model.forward(&mut [step])?.swap_remove(0);
    Ok(output.logits.iter().map(|logit| logit.to_bits()).collect())
}
