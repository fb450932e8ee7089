//! Whether a token's logits have the same bits in a pass of its own and beside others: what makes speculation give the
//! target's own greedy text.
//!
//! The contexts lie around the ends of key tiles (16) and of chunks of decode attention (256 keys, later more), where a pass over
//! several tokens has keys that its first tokens must not see, and chunks that they have none in; behind 250 and 255 tokens the first chunk ends.

use std::path::Path;

use anyhow::Result;
use specattn_engine::{DeviceChoice, LoadOptions, LogitRows, Model, Step};

use super::numbers::Numbers;

const CONTEXTS: [usize; 13] = [
    1, 13, 250, 255, 300, 509, 1019, 1021, 1500, 2044, 3070, 6142, 7166,
];
/// Tokens of a pass beside one another.
const TOGETHER: [usize; 3] = [2, 5, 9];

/// Prints what was checked; true when all bits are equal.
///
/// # Errors
/// When the model cannot be loaded or the device fails.
pub fn check(root: &Path, device: &DeviceChoice) -> Result<bool> {
    let options = LoadOptions {
        device: device.clone(),
        ..LoadOptions::default()
    };
    let mut fine = true;
    for name in ["target", "draft"] {
        let mut model = Model::load(&root.join("models").join(name), &options, &mut |_, _| {})?;
        let (mut rows, mut wrong) = (0, 0);
        for context in CONTEXTS {
            let (seen, differ) = compare(&mut model, context)?;
            rows += seen;
            wrong += differ;
        }
        println!("logits of {name} alone and in company: {wrong} of {rows} rows have other bits\n");
        fine &= wrong == 0;
    }
    Ok(fine)
}

/// (rows compared, rows that differ) behind `context` random tokens.
fn compare(model: &mut Model, context: usize) -> Result<(usize, usize)> {
    let mut numbers = Numbers(11);
    let vocab = model.config().vocab_size;
    let most = TOGETHER.into_iter().max().unwrap_or(0);
    let random = |_| ((numbers.uniform() * vocab as f32) as u32).min(vocab as u32 - 1);
    let tokens: Vec<u32> = (0..context + most).map(random).collect();
    let (past, next) = tokens.split_at(context);
    let mut sequence = model.new_sequence(tokens.len())?;
    for chunk in past.chunks(256) {
        model.forward(&mut [Step::new(&mut sequence, chunk)])?;
    }
    let mut pass = |from: usize, tokens: &[u32]| -> Result<Vec<f32>> {
        sequence.truncate(from);
        let step = Step {
            logits: LogitRows::Verify,
            ..Step::new(&mut sequence, tokens)
        };
        let outputs = model.forward(&mut [step])?;
        Ok(outputs[0].logits.to_vec())
    };
    let mut alone = Vec::new();
    for (index, token) in next.iter().enumerate() {
        alone.extend(pass(context + index, std::slice::from_ref(token))?);
    }
    let (mut rows, mut differ) = (0, 0);
    for count in TOGETHER {
        let together = pass(context, &next[..count])?;
        for (a, b) in together.chunks_exact(vocab).zip(alone.chunks_exact(vocab)) {
            rows += 1;
            differ += usize::from(a.iter().zip(b).any(|(a, b)| a.to_bits() != b.to_bits()));
        }
    }
    Ok((rows, differ))
}
