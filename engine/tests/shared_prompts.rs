//! What a sequence takes over of another's prompt has the bits that it would have computed, and stays as it is while the other
//! goes on: in every type of KV entry, and on every rank of a split model.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use specattn_engine::{CHUNK_TOKENS, DType, LoadOptions, LogitRows, Model, Sequence, Step};

/// Ends of prompts behind a whole chunk: within a block, at its end, over several.
const TAILS: [usize; 6] = [0, 1, 63, 64, 65, 255];

fn model(kv_dtype: DType, ranks: usize) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/target");
    let options = LoadOptions {
        kv_cache_bytes: 64 << 20,
        threads: 1,
        kv_dtype: Some(kv_dtype),
        tensor_parallel: Some(ranks),
        ..LoadOptions::default()
    };
    Model::load(&folder, &options, &mut |_, _| {}).unwrap()
}

fn text(len: usize, seed: u32) -> Vec<u32> {
    let token = |i: usize| (i as u32 * 7_919 + seed * 104_729 + 13) % 8_192;
    (0..len).map(token).collect()
}

/// Processes what the sequence lacks of its prompt, a chunk at a time, and shares it; how many tokens that took.
fn process(model: &mut Model, sequence: &mut Sequence, prompt: &[u32]) -> usize {
    let held = model.adopt(sequence, prompt).unwrap();
    let (_, missing) = prompt.split_at(held);
    for chunk in missing.chunks(CHUNK_TOKENS) {
        model.forward(&mut [Step::new(sequence, chunk)]).unwrap();
        model.publish(sequence, prompt).unwrap();
    }
    missing.len()
}

/// The logits behind some tokens more, as bits.
fn go_on(model: &mut Model, sequence: &mut Sequence, tokens: &[u32]) -> Vec<u32> {
    let step = Step {
        logits: LogitRows::Verify,
        ..Step::new(sequence, tokens)
    };
    let output = model.forward(&mut [step]).unwrap().remove(0);
    output.logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn what_is_taken_over_has_the_bits_of_what_was_computed() {
    for (kv_dtype, ranks) in [(DType::F32, 1), (DType::Bf16, 1), (DType::F32, 2)] {
        let (mut sharing, mut alone) = (model(kv_dtype, ranks), model(kv_dtype, ranks));
        for (seed, tail) in TAILS.into_iter().enumerate() {
            let length = CHUNK_TOKENS + tail;
            let prompt = text(length, seed as u32);
            let sequence = || sharing.new_sequence(length + 9).unwrap();
            let (mut first, mut second) = (sequence(), sequence());
            assert_eq!(process(&mut sharing, &mut first, &prompt), length);
            // The first goes on before the second comes, and writes behind the prompt.
            go_on(&mut sharing, &mut first, &[5; 9]);
            assert_eq!(process(&mut sharing, &mut second, &prompt), 0);
            let mut own = alone.new_sequence(length + 9).unwrap();
            process(&mut alone, &mut own, &prompt);
            let more = text(9, 77);
            assert!(
                go_on(&mut sharing, &mut second, &more) == go_on(&mut alone, &mut own, &more),
                "{kv_dtype:?} on {ranks} ranks, {tail} tokens behind a chunk"
            );
        }
    }
}

#[test]
fn another_models_sequence_is_refused() {
    let (mut one, other) = (model(DType::F32, 1), model(DType::F32, 1));
    let mut sequence = other.new_sequence(9).unwrap();
    let error = one.adopt(&mut sequence, &[1; 9]).unwrap_err();
    assert_eq!(error.label(), "invalid_argument");
    assert!(one.publish(&mut sequence, &[1; 9]).is_err());
}
