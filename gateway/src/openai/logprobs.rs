//! Log-probabilities in the two shapes that OpenAI has for them.
//!
//! Tokens are named by their text. A token that holds only a part of a character has no text of its own: it shows as
//! U+FFFD, and its bytes are not told.

use serde_json::{Map, Value, json};
use specattn_proto::Fault;
use specattn_proto::v1::Delta;

use crate::tokenizer::Tokenizer;

/// As completions have them; `offset`, in characters, is where the delta's first token begins, and moves on.
pub(super) fn of_completion(
    delta: &Delta,
    offset: &mut usize,
    tokenizer: &Tokenizer,
) -> Result<Value, Fault> {
    let (mut tokens, mut offsets) = (Vec::new(), Vec::new());
    let (mut chosen, mut alternatives) = (Vec::new(), Vec::new());
    for (&id, logprobs) in delta.token_ids.iter().zip(&delta.logprobs) {
        let text = tokenizer.token_text(id)?;
        offsets.push(*offset);
        *offset += text.chars().count();
        tokens.push(text);
        chosen.push(finite(logprobs.logprob));
        let mut top = Map::new();
        for (&id, &logprob) in logprobs.top_ids.iter().zip(&logprobs.top_logprobs) {
            top.insert(tokenizer.token_text(id)?, finite(logprob));
        }
        alternatives.push(top);
    }
    Ok(json!({
        "tokens": tokens,
        "token_logprobs": chosen,
        "top_logprobs": alternatives,
        "text_offset": offsets,
    }))
}

/// As chat has them.
pub(super) fn of_chat(delta: &Delta, tokenizer: &Tokenizer) -> Result<Value, Fault> {
    let mut content = Vec::new();
    for (&id, logprobs) in delta.token_ids.iter().zip(&delta.logprobs) {
        let mut entry = token(id, logprobs.logprob, tokenizer)?;
        let mut top = Vec::new();
        for (&id, &logprob) in logprobs.top_ids.iter().zip(&logprobs.top_logprobs) {
            top.push(token(id, logprob, tokenizer)?);
        }
        entry["top_logprobs"] = top.into();
        content.push(entry);
    }
    Ok(json!({ "content": content, "refusal": null }))
}

fn token(id: u32, logprob: f32, tokenizer: &Tokenizer) -> Result<Value, Fault> {
    let text = tokenizer.token_text(id)?;
    let bytes = (!text.contains(char::REPLACEMENT_CHARACTER)).then(|| text.as_bytes().to_vec());
    Ok(json!({ "token": text, "logprob": finite(logprob), "bytes": bytes }))
}

/// JSON has no infinities: a token of probability 0 gets OpenAI's -9999.
fn finite(logprob: f32) -> Value {
    json!(if logprob.is_finite() {
        logprob
    } else {
        -9_999.0
    })
}
