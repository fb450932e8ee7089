//! The fields of requests, and the [`Generation`] that they ask for.
//!
//! Fields that would change the output and are not supported are refused by name; others that are not known are ignored,
//! as OpenAI's clients expect. Ranges are checked where gRPC requests are checked too.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::Value;
use specattn_proto::v1;

use super::error::ApiError;
use super::prompt::{self, Prompt, Prompts};

/// Tokens of a completion that does not say how many: OpenAI's default.
const COMPLETION_TOKENS: u32 = 16;

/// What both kinds of request have in common.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Common {
    pub(super) model: Option<String>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    n: Option<usize>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    stop: Option<OneOrMany>,
    seed: Option<i64>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<HashMap<String, f32>>,
    // What other servers of open models take beside OpenAI's fields.
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    ignore_eos: Option<bool>,
    min_tokens: Option<u32>,
    stop_token_ids: Option<Vec<u32>>,
    specattn: Option<Extension>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    // As vLLM has it: nothing without `include_usage`.
    continuous_usage_stats: Option<bool>,
}

/// Which chunks of a stream tell the usage so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamUsage {
    /// None of them.
    Untold,
    /// One more after all others.
    Last,
    /// That one, and each before it: a chunk may hold several tokens, and only the server knows how many.
    Every,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Fields of this server's own.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Extension {
    mode: Option<Mode>,
    mask_p: Option<f32>,
    draft_length: Option<u32>,
    capture_every: Option<u32>,
    own_p: Option<f32>,
    max_kl: Option<f32>,
    deadline_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Dense,
    Sparse,
    Exact,
}

/// `POST /v1/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct CompletionRequest {
    #[serde(flatten)]
    pub(super) common: Common,
    prompt: Prompts,
    logprobs: Option<u32>,
    echo: Option<bool>,
    best_of: Option<usize>,
    suffix: Option<Value>,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct ChatRequest {
    #[serde(flatten)]
    pub(super) common: Common,
    messages: Vec<prompt::Message>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Value>,
    functions: Option<Value>,
    response_format: Option<Value>,
}

/// What to generate for each prompt.
#[derive(Debug)]
pub(super) struct Generation {
    /// All but the prompt, and the seed of the first choice.
    request: v1::GenerateRequest,
    pub(super) choices_per_prompt: usize,
    pub(super) stream: bool,
    pub(super) stream_usage: StreamUsage,
    /// The prompt's text comes back before the completion's.
    pub(super) echo: bool,
    pub(super) logprobs: bool,
}

impl CompletionRequest {
    /// The prompts and what to make of them.
    pub(super) fn into_parts(self) -> Result<(Vec<Prompt>, Generation), ApiError> {
        refuse("suffix", self.suffix.as_ref())?;
        let n = self.common.n.unwrap_or(1);
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::invalid(
                "best_of",
                "best_of must equal n: choices are not ranked",
            ));
        }
        let echo = self.echo.unwrap_or(false);
        if echo && self.logprobs.is_some() {
            return Err(ApiError::invalid(
                "echo",
                "log-probabilities of the prompt are not computed",
            ));
        }
        let mut generation = self
            .common
            .generation(COMPLETION_TOKENS.into(), self.logprobs)?;
        generation.echo = echo;
        Ok((self.prompt.list(), generation))
    }
}

impl ChatRequest {
    /// The conversation and what to make of it.
    pub(super) fn into_parts(mut self) -> Result<(Vec<prompt::Message>, Generation), ApiError> {
        refuse(
            "tools",
            self.tools
                .as_ref()
                .filter(|tools| **tools != Value::Array(Vec::new())),
        )?;
        refuse("functions", self.functions.as_ref())?;
        let format = self
            .response_format
            .as_ref()
            .and_then(|format| format.get("type"));
        if format.is_some_and(|format| format != "text") {
            return Err(ApiError::invalid(
                "response_format",
                "only text can be answered",
            ));
        }
        if self.messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages is empty"));
        }
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                return Err(ApiError::invalid(
                    "top_logprobs",
                    "top_logprobs needs logprobs: true",
                ));
            }
        };
        self.common.max_tokens = self.max_completion_tokens.or(self.common.max_tokens);
        Ok((self.messages, self.common.generation(None, logprobs)?))
    }
}

fn refuse(param: &'static str, value: Option<&Value>) -> Result<(), ApiError> {
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(ApiError::invalid(
            param,
            format!("{param} is not supported"),
        )),
    }
}

impl StreamOptions {
    fn usage(&self) -> StreamUsage {
        match (self.include_usage, self.continuous_usage_stats) {
            (Some(true), Some(true)) => StreamUsage::Every,
            (Some(true), _) => StreamUsage::Last,
            _ => StreamUsage::Untold,
        }
    }
}

impl Common {
    /// Whether the model's own end of text is passed over. `min_tokens` can be kept in that way alone: it is taken where it
    /// says no more than that, as load generators have it, and refused where it would have to hold an end back for a while.
    fn ends_at_its_length_only(&self, default_tokens: Option<u32>) -> Result<bool, ApiError> {
        let ignore_eos = self.ignore_eos.unwrap_or(false);
        let min = self.min_tokens.unwrap_or(0);
        if min == 0 {
            return Ok(ignore_eos);
        }
        let max = self.max_tokens.or(default_tokens);
        if max.is_some_and(|max| min > max) {
            return Err(ApiError::invalid(
                "min_tokens",
                format!("min_tokens is {min}, more than max_tokens"),
            ));
        }
        let stops = self.stop.is_some()
            || self
                .stop_token_ids
                .as_ref()
                .is_some_and(|ids| !ids.is_empty());
        if stops || !(ignore_eos || max == Some(min)) {
            return Err(ApiError::invalid(
                "min_tokens",
                "min_tokens is supported without stops, and with ignore_eos or the same max_tokens",
            ));
        }
        Ok(true)
    }

    fn generation(
        self,
        default_tokens: Option<u32>,
        logprobs: Option<u32>,
    ) -> Result<Generation, ApiError> {
        let ignore_eos = self.ends_at_its_length_only(default_tokens)?;
        let mut logit_bias = BTreeMap::new();
        for (token, bias) in self.logit_bias.unwrap_or_default() {
            let id = token.parse().map_err(|_| {
                ApiError::invalid(
                    "logit_bias",
                    format!("{token:?} in logit_bias is no token id"),
                )
            })?;
            logit_bias.insert(id, bias);
        }
        let extension = self.specattn.unwrap_or_default();
        let request = v1::GenerateRequest {
            prompt: None,
            sampling: Some(v1::Sampling {
                temperature: self.temperature.unwrap_or(1.0),
                top_k: self.top_k.unwrap_or(0),
                top_p: self.top_p,
                min_p: self.min_p.unwrap_or(0.0),
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty.unwrap_or(0.0),
                frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
                // Negative seeds are seeds too.
                seed: self.seed.map(i64::cast_unsigned),
                logit_bias,
                logprobs,
            }),
            limits: Some(v1::Limits {
                max_tokens: self.max_tokens.or(default_tokens),
                stop_token_ids: self.stop_token_ids.unwrap_or_default(),
                ignore_eos,
            }),
            mode: match extension.mode {
                Some(Mode::Dense) => v1::Mode::Dense,
                Some(Mode::Sparse) => v1::Mode::Sparse,
                // As the command line has it: nothing is lost.
                Some(Mode::Exact) | None => v1::Mode::Exact,
            }
            .into(),
            draft: Some(v1::DraftPolicy {
                draft_length: extension.draft_length,
                capture_every: extension.capture_every,
                own_p: extension.own_p,
            }),
            mask: extension.mask_p.map(|p| v1::MaskPolicy {
                mask_p: Some(p),
                ..v1::MaskPolicy::default()
            }),
            stop: match self.stop {
                None => Vec::new(),
                Some(OneOrMany::One(stop)) => vec![stop],
                Some(OneOrMany::Many(stops)) => stops,
            },
            deadline_ms: extension.deadline_ms,
            check: extension.max_kl.map(|max_kl| v1::CheckPolicy {
                max_kl: Some(max_kl),
                ..v1::CheckPolicy::default()
            }),
            provisional: false,
        };
        Ok(Generation {
            request,
            choices_per_prompt: self.n.unwrap_or(1),
            stream: self.stream.unwrap_or(false),
            stream_usage: self.stream_options.unwrap_or_default().usage(),
            echo: false,
            logprobs: logprobs.is_some(),
        })
    }
}

impl Generation {
    /// The session of one choice. Choices after the first take the seeds that follow, so that they differ and each can be
    /// had again alone.
    pub(super) fn request(&self, prompt: &Prompt, choice: usize) -> v1::GenerateRequest {
        let mut request = self.request.clone();
        request.prompt = Some(prompt.to_proto());
        if let Some(sampling) = &mut request.sampling {
            sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
        }
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn completion(value: Value) -> Result<(Vec<Prompt>, Generation), ApiError> {
        let request: CompletionRequest = serde_json::from_value(value).unwrap();
        request.into_parts()
    }

    #[test]
    fn defaults_are_those_of_openai() {
        let (prompts, generation) = completion(json!({"model": "m", "prompt": "a"})).unwrap();
        assert_eq!(
            (
                prompts.len(),
                generation.choices_per_prompt,
                generation.stream
            ),
            (1, 1, false)
        );
        let request = generation.request(&prompts[0], 0);
        assert_eq!(request.limits.unwrap().max_tokens, Some(16));
        let sampling = request.sampling.unwrap();
        assert_eq!(
            (sampling.temperature, sampling.top_p, sampling.logprobs),
            (1.0, None, None)
        );
    }

    #[test]
    fn every_field_arrives() {
        let (prompts, generation) = completion(json!({
            "prompt": [[1, 2], [3]], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a", "b"],
            "seed": 7, "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"5": -100}, "logprobs": 3,
            "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": true, "stop_token_ids": [9], "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": null}, "user": "someone",
            "specattn": {
                "mode": "sparse", "mask_p": 0.9, "draft_length": 2, "capture_every": 3, "own_p": 0.5, "max_kl": 0.1, "deadline_ms": 5,
            },
        }))
        .unwrap();
        assert_eq!((prompts.len(), generation.choices_per_prompt), (2, 2));
        assert!(generation.stream && generation.logprobs);
        assert_eq!(generation.stream_usage, StreamUsage::Last);
        let request = generation.request(&prompts[1], 1);
        let sampling = request.sampling.clone().unwrap();
        assert_eq!(
            (sampling.seed, sampling.logit_bias[&5], sampling.logprobs),
            (Some(8), -100.0, Some(3))
        );
        assert_eq!(
            (sampling.top_k, sampling.min_p, sampling.presence_penalty),
            (4, 0.1, 1.0)
        );
        assert_eq!(
            (request.mode(), request.deadline_ms),
            (v1::Mode::Sparse, Some(5))
        );
        assert_eq!(request.mask.unwrap().mask_p, Some(0.9));
        let draft = v1::DraftPolicy {
            draft_length: Some(2),
            capture_every: Some(3),
            own_p: Some(0.5),
        };
        assert_eq!(request.draft, Some(draft));
        assert_eq!(request.check.unwrap().max_kl, Some(0.1));
        assert_eq!(request.limits.unwrap().stop_token_ids, [9]);
        assert_eq!(request.stop, ["a", "b"]);
    }

    #[test]
    fn min_tokens_is_kept_or_refused() {
        for fields in [
            json!({"min_tokens": 9, "max_tokens": 9}),
            json!({"min_tokens": 5, "max_tokens": 9, "ignore_eos": true}),
            json!({"min_tokens": 16}),
        ] {
            let mut request = fields;
            request["prompt"] = json!("a");
            let (prompts, generation) = completion(request).unwrap();
            let limits = generation.request(&prompts[0], 0).limits.unwrap();
            assert!(limits.ignore_eos);
        }
        for fields in [
            json!({"min_tokens": 5, "max_tokens": 9}),
            json!({"min_tokens": 10, "max_tokens": 9, "ignore_eos": true}),
            json!({"min_tokens": 9, "max_tokens": 9, "stop": "x"}),
        ] {
            let mut request = fields;
            request["prompt"] = json!("a");
            let error = completion(request).unwrap_err();
            assert_eq!(error.body()["error"]["param"], "min_tokens");
        }
    }

    #[test]
    fn usage_in_every_chunk_needs_usage_at_all() {
        for (options, usage) in [
            (json!({"continuous_usage_stats": true}), StreamUsage::Untold),
            (json!({"include_usage": true}), StreamUsage::Last),
            (
                json!({"include_usage": true, "continuous_usage_stats": true}),
                StreamUsage::Every,
            ),
        ] {
            let request = json!({"prompt": "a", "stream": true, "stream_options": options});
            assert_eq!(completion(request).unwrap().1.stream_usage, usage);
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (field, value) in [
            ("suffix", json!("x")),
            ("best_of", json!(3)),
            ("logit_bias", json!({"x": 1})),
        ] {
            let error = completion(json!({"prompt": "a", field: value})).unwrap_err();
            assert_eq!(error.body()["error"]["param"], field);
        }
        for (field, value) in [
            ("tools", json!([{"type": "function"}])),
            ("response_format", json!({"type": "json_object"})),
            ("top_logprobs", json!(3)),
            ("messages", json!([])),
        ] {
            let mut request = json!({"messages": [{"role": "user", "content": "a"}]});
            request[field] = value;
            let request: ChatRequest = serde_json::from_value(request).unwrap();
            let error = request.into_parts().unwrap_err();
            assert_eq!(error.body()["error"]["param"], field);
        }
    }
}
