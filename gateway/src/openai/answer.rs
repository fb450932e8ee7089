//! How answers are worded: whole ones here, pieces for [`super::stream`].

use std::sync::Arc;

use futures_util::future::try_join_all;
use serde_json::{Value, json};
use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{Delta, FinishReason, Finished, SessionStats, Started};
use tokio_stream::StreamExt;

use super::error::ApiError;
use super::request::{Generation, StreamUsage};
use super::{logprobs, now};
use crate::listener::ClientStream;
use crate::tokenizer::Tokenizer;

/// Which API the answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Completion,
    Chat,
}

/// What every piece of an answer says.
#[derive(Debug)]
pub(super) struct Wording {
    kind: Kind,
    model: String,
    created: u64,
    logprobs: bool,
    pub(super) stream_usage: StreamUsage,
    choices_per_prompt: usize,
}

impl Wording {
    pub(super) fn completion(model: String, generation: &Generation) -> Self {
        Self::new(Kind::Completion, model, generation)
    }

    pub(super) fn chat(model: String, generation: &Generation) -> Self {
        Self::new(Kind::Chat, model, generation)
    }

    fn new(kind: Kind, model: String, generation: &Generation) -> Self {
        Self {
            kind,
            model,
            created: now(),
            logprobs: generation.logprobs,
            stream_usage: generation.stream_usage,
            choices_per_prompt: generation.choices_per_prompt,
        }
    }

    fn envelope(&self, session: &str, is_chunk: bool, choices: Vec<Value>) -> Value {
        let (prefix, object) = match (self.kind, is_chunk) {
            (Kind::Completion, _) => ("cmpl", "text_completion"),
            (Kind::Chat, false) => ("chatcmpl", "chat.completion"),
            (Kind::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
        };
        json!({
            "id": format!("{prefix}-{session}"),
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    /// A piece of a stream; `session` is that of the first choice.
    pub(super) fn chunk(&self, session: &str, choices: Vec<Value>) -> Value {
        self.envelope(session, true, choices)
    }

    /// What a stream says of a choice before its first token: chat names the speaker, an echo repeats the prompt.
    pub(super) fn beginning(&self, index: usize, echo: &str) -> Option<Value> {
        match self.kind {
            Kind::Chat => Some(json!({
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": null,
                "finish_reason": null,
            })),
            Kind::Completion if echo.is_empty() => None,
            Kind::Completion => Some(json!({
                "index": index, "text": echo, "logprobs": null, "finish_reason": null,
            })),
        }
    }

    /// A choice's next tokens in a stream.
    pub(super) fn piece(&self, index: usize, text: &str, logprobs: Value) -> Value {
        match self.kind {
            Kind::Completion => json!({
                "index": index, "text": text, "logprobs": logprobs, "finish_reason": null,
            }),
            Kind::Chat => json!({
                "index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null,
            }),
        }
    }

    /// A choice's last word in a stream.
    pub(super) fn end(&self, index: usize, finished: &Finished) -> Value {
        let reason = finish_reason(finished);
        match self.kind {
            Kind::Completion => json!({
                "index": index, "text": "", "logprobs": null, "finish_reason": reason,
            }),
            Kind::Chat => json!({
                "index": index, "delta": {}, "logprobs": null, "finish_reason": reason,
            }),
        }
    }

    /// Log-probabilities of a delta; null where none were asked for.
    pub(super) fn logprobs(
        &self,
        delta: &Delta,
        offset: &mut usize,
        tokenizer: &Tokenizer,
    ) -> Result<Value, Fault> {
        match self.kind {
            _ if !self.logprobs => Ok(Value::Null),
            Kind::Completion => logprobs::of_completion(delta, offset, tokenizer),
            Kind::Chat => logprobs::of_chat(delta, tokenizer),
        }
    }

    /// What has been used while choices are on their way, each having come so far.
    pub(super) fn usage_so_far<'a>(
        &self,
        choices: impl Iterator<Item = (&'a Started, u64)> + Clone,
    ) -> Value {
        let prompt_tokens = self.prompt_tokens(choices.clone().map(|(started, _)| started));
        let completion_tokens: u64 = choices.map(|(_, tokens)| tokens).sum();
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        })
    }

    /// Tokens of the prompts of all choices; a prompt counts once however many choices it has.
    fn prompt_tokens<'a>(&self, choices: impl Iterator<Item = &'a Started>) -> u64 {
        choices
            .step_by(self.choices_per_prompt)
            .map(|started| u64::from(started.prompt_tokens))
            .sum()
    }

    /// Tokens of those prompts that were not processed for this answer: of the choices of a prompt, one at least had the rest to do.
    fn cached_tokens(&self, ends: &[(Started, Finished)]) -> u64 {
        let cached = |(_, finished): &(_, Finished)| {
            let stats = finished.stats.unwrap_or_default();
            stats.cached_prompt_tokens
        };
        ends.chunks(self.choices_per_prompt)
            .filter_map(|choices| choices.iter().map(cached).min())
            .sum()
    }

    /// The usage of an answer whose choices ended so.
    pub(super) fn usage(&self, ends: &[(Started, Finished)]) -> Value {
        let prompt_tokens = self.prompt_tokens(ends.iter().map(|(started, _)| started));
        let mut total = SessionStats::default();
        let (mut ttft, mut elapsed) = (0.0_f64, 0.0_f64);
        for (_, finished) in ends {
            let stats = finished.stats.unwrap_or_default();
            total.completion_tokens += stats.completion_tokens;
            total.target_forwards += stats.target_forwards;
            total.proposed_tokens += stats.proposed_tokens;
            total.accepted_tokens += stats.accepted_tokens;
            total.rollbacks += stats.rollbacks;
            total.kv_entries_read += stats.kv_entries_read;
            total.kv_entries_dense += stats.kv_entries_dense;
            total.mask_bytes += stats.mask_bytes;
            ttft = ttft.max(finished.ttft_seconds);
            elapsed = elapsed.max(finished.elapsed_seconds);
        }
        let kept = (total.kv_entries_dense > 0)
            .then(|| total.kv_entries_read as f64 / total.kv_entries_dense as f64);
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "total_tokens": prompt_tokens + total.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens(ends) },
            "specattn": {
                "target_forwards": total.target_forwards,
                "proposed_tokens": total.proposed_tokens,
                "accepted_tokens": total.accepted_tokens,
                "rollbacks": total.rollbacks,
                "kv_entries_read": total.kv_entries_read,
                "kv_entries_dense": total.kv_entries_dense,
                "kv_kept_fraction": kept,
                "mask_bytes": total.mask_bytes,
                "ttft_seconds": ttft,
                "elapsed_seconds": elapsed,
            },
        })
    }
}

/// One choice, read to its end.
struct Collected {
    started: Started,
    all: Delta,
    finished: Finished,
}

impl Collected {
    async fn read(mut stream: ClientStream) -> Result<Self, Fault> {
        let (mut begin, mut all) = (Started::default(), Delta::default());
        while let Some(response) = stream.next().await {
            let response = response.map_err(|status| Fault::from_status(&status))?;
            match response.event {
                Some(Event::Started(started)) => begin = started,
                Some(Event::Delta(delta)) => {
                    all.text.push_str(&delta.text);
                    all.token_ids.extend(delta.token_ids);
                    all.logprobs.extend(delta.logprobs);
                }
                Some(Event::Finished(finished)) => {
                    return Ok(Self {
                        started: begin,
                        all,
                        finished,
                    });
                }
                Some(Event::Provisional(_) | Event::Withdrawn(_)) | None => {}
            }
        }
        Err(Fault::Internal(
            "the session ended without a word".to_owned(),
        ))
    }
}

/// The whole answer. The first session that fails fails it.
pub(super) async fn collect(
    wording: Wording,
    streams: Vec<ClientStream>,
    echoes: Vec<String>,
    tokenizer: Arc<Tokenizer>,
) -> Result<Value, ApiError> {
    let choices = try_join_all(streams.into_iter().map(Collected::read)).await?;
    let (mut worded, mut ends) = (Vec::new(), Vec::new());
    for (index, (choice, echo)) in choices.into_iter().zip(echoes).enumerate() {
        let mut offset = echo.chars().count();
        let logprobs = wording.logprobs(&choice.all, &mut offset, &tokenizer)?;
        let text = echo + &choice.all.text;
        let reason = finish_reason(&choice.finished);
        worded.push(match wording.kind {
            Kind::Completion => json!({
                "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason,
            }),
            Kind::Chat => json!({
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": logprobs,
                "finish_reason": reason,
            }),
        });
        ends.push((choice.started, choice.finished));
    }
    let session = ends
        .first()
        .map_or("", |(started, _)| started.session_id.as_str());
    let mut answer = wording.envelope(session, false, worded);
    answer["usage"] = wording.usage(&ends);
    Ok(answer)
}

fn finish_reason(finished: &Finished) -> &'static str {
    match finished.reason() {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Deadline => "deadline",
        FinishReason::Error | FinishReason::Unspecified => "error",
    }
}
