//! Raw messages in, plain checked values out.
//!
//! Every service calls these at its edge, so that a field means the same everywhere and nothing behind the edge needs
//! to ask again. Ranges are those of the .proto comments; whatever is out of range is an [`Invalid`], which becomes
//! INVALID_ARGUMENT.

use crate::limits;
use crate::v1;

#[cfg(test)]
mod tests;

/// A field that may not be what it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {reason}")]
pub struct Invalid {
    /// The field, by its name in the .proto files.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl Invalid {
    /// Says that `field` is wrong because of `reason`, phrased to follow the field's name.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
        }
    }
}

fn check(ok: bool, field: &'static str, reason: impl FnOnce() -> String) -> Result<(), Invalid> {
    if ok {
        Ok(())
    } else {
        Err(Invalid::new(field, reason()))
    }
}

/// A finite number within a closed range; NaN is in no range.
fn number(field: &'static str, value: f32, low: f32, high: f32) -> Result<f32, Invalid> {
    check((low..=high).contains(&value), field, || {
        format!("must be between {low} and {high}, not {value}")
    })?;
    Ok(value)
}

/// A finite number that is above zero and at most `high`.
fn positive(field: &'static str, value: f32, high: f32) -> Result<f32, Invalid> {
    check(value > 0.0 && value <= high, field, || {
        format!("must be above 0 and at most {high}, not {value}")
    })?;
    Ok(value)
}

/// [`v1::Sampling`] with every field in range and every default filled in; the default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedSampling {
    /// 0 is greedy; else in (0, 100].
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// In (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// In [0, 1].
    pub min_p: f32,
    /// In (0, 10]; 1 is off.
    pub repetition_penalty: f32,
    /// In [-10, 10].
    pub presence_penalty: f32,
    /// In [-10, 10].
    pub frequency_penalty: f32,
    /// Absent only in what clients send.
    pub seed: Option<u64>,
    /// By token id, ascending, each below the vocabulary size; values in [-100, 100].
    pub logit_bias: Vec<(u32, f32)>,
    /// Alternatives to report, at most [`limits::MAX_LOGPROBS`].
    pub logprobs: Option<u32>,
}

impl Default for CheckedSampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

impl CheckedSampling {
    /// True when the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

impl From<&CheckedSampling> for v1::Sampling {
    fn from(checked: &CheckedSampling) -> Self {
        Self {
            temperature: checked.temperature,
            top_k: checked.top_k,
            top_p: Some(checked.top_p),
            min_p: checked.min_p,
            repetition_penalty: Some(checked.repetition_penalty),
            presence_penalty: checked.presence_penalty,
            frequency_penalty: checked.frequency_penalty,
            seed: checked.seed,
            logit_bias: checked.logit_bias.iter().copied().collect(),
            logprobs: checked.logprobs,
        }
    }
}

/// Checks a sampling rule against a vocabulary; an absent one is greedy.
///
/// # Errors
/// A field out of its range.
pub fn sampling(raw: Option<&v1::Sampling>, vocab_size: usize) -> Result<CheckedSampling, Invalid> {
    let Some(raw) = raw else {
        return Ok(CheckedSampling::default());
    };
    check(
        raw.logit_bias.len() <= limits::MAX_LOGIT_BIAS_ENTRIES,
        "logit_bias",
        || format!("holds more than {} entries", limits::MAX_LOGIT_BIAS_ENTRIES),
    )?;
    for (&token, &bias) in &raw.logit_bias {
        token_id("logit_bias", token, vocab_size)?;
        number("logit_bias", bias, -100.0, 100.0)?;
    }
    check(
        raw.logprobs.is_none_or(|n| n <= limits::MAX_LOGPROBS),
        "logprobs",
        || format!("must be at most {}", limits::MAX_LOGPROBS),
    )?;
    Ok(CheckedSampling {
        temperature: number("temperature", raw.temperature, 0.0, 100.0)?,
        top_k: raw.top_k,
        top_p: positive("top_p", raw.top_p.unwrap_or(1.0), 1.0)?,
        min_p: number("min_p", raw.min_p, 0.0, 1.0)?,
        repetition_penalty: positive(
            "repetition_penalty",
            raw.repetition_penalty.unwrap_or(1.0),
            10.0,
        )?,
        presence_penalty: number("presence_penalty", raw.presence_penalty, -10.0, 10.0)?,
        frequency_penalty: number("frequency_penalty", raw.frequency_penalty, -10.0, 10.0)?,
        seed: raw.seed,
        logit_bias: raw.logit_bias.iter().map(|(&t, &b)| (t, b)).collect(),
        logprobs: raw.logprobs,
    })
}

/// [`v1::Limits`], checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckedLimits {
    /// At least 1; `None`: until the context is full.
    pub max_tokens: Option<u32>,
    /// Ascending and distinct, each below the vocabulary size.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's own end-of-text tokens.
    pub ignore_eos: bool,
}

impl From<&CheckedLimits> for v1::Limits {
    fn from(checked: &CheckedLimits) -> Self {
        Self {
            max_tokens: checked.max_tokens,
            stop_token_ids: checked.stop_token_ids.clone(),
            ignore_eos: checked.ignore_eos,
        }
    }
}

/// Checks where a session stops; an absent message means no limits of its own.
///
/// # Errors
/// A field out of its range.
pub fn session_limits(
    raw: Option<&v1::Limits>,
    vocab_size: usize,
) -> Result<CheckedLimits, Invalid> {
    let Some(raw) = raw else {
        return Ok(CheckedLimits::default());
    };
    check(raw.max_tokens != Some(0), "max_tokens", || {
        "must be at least 1".to_owned()
    })?;
    check(
        raw.stop_token_ids.len() <= limits::MAX_STOP_TOKENS,
        "stop_token_ids",
        || format!("holds more than {} tokens", limits::MAX_STOP_TOKENS),
    )?;
    let mut stop_token_ids = raw.stop_token_ids.clone();
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    for &token in &stop_token_ids {
        token_id("stop_token_ids", token, vocab_size)?;
    }
    Ok(CheckedLimits {
        max_tokens: raw.max_tokens,
        stop_token_ids,
        ignore_eos: raw.ignore_eos,
    })
}

/// [`v1::MaskPolicy`], checked and complete.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CheckedMaskPolicy {
    /// In (0, 1].
    pub mask_p: f32,
    /// First positions always kept.
    pub sink_tokens: u32,
    /// Last committed positions always kept.
    pub window_tokens: u32,
    /// In [1, [`limits::MAX_MASK_GRANULARITY`]].
    pub granularity: u32,
}

impl Default for CheckedMaskPolicy {
    fn default() -> Self {
        Self {
            mask_p: 0.95,
            sink_tokens: 4,
            window_tokens: 64,
            granularity: 1,
        }
    }
}

impl From<CheckedMaskPolicy> for v1::MaskPolicy {
    fn from(checked: CheckedMaskPolicy) -> Self {
        Self {
            mask_p: Some(checked.mask_p),
            sink_tokens: Some(checked.sink_tokens),
            window_tokens: Some(checked.window_tokens),
            granularity: Some(checked.granularity),
        }
    }
}

/// Checks a mask policy; absent fields take those of `default`.
///
/// # Errors
/// A field out of its range.
pub fn mask_policy(
    raw: Option<&v1::MaskPolicy>,
    default: CheckedMaskPolicy,
) -> Result<CheckedMaskPolicy, Invalid> {
    let raw = raw.copied().unwrap_or_default();
    let edge = |field, value: u32| {
        check(value <= limits::MAX_MASK_EDGE_TOKENS, field, || {
            format!("must be at most {}", limits::MAX_MASK_EDGE_TOKENS)
        })
        .map(|()| value)
    };
    let granularity = raw.granularity.unwrap_or(default.granularity);
    check(
        (1..=limits::MAX_MASK_GRANULARITY).contains(&granularity),
        "granularity",
        || format!("must be between 1 and {}", limits::MAX_MASK_GRANULARITY),
    )?;
    Ok(CheckedMaskPolicy {
        mask_p: mask_p(raw.mask_p.unwrap_or(default.mask_p))?,
        sink_tokens: edge(
            "sink_tokens",
            raw.sink_tokens.unwrap_or(default.sink_tokens),
        )?,
        window_tokens: edge(
            "window_tokens",
            raw.window_tokens.unwrap_or(default.window_tokens),
        )?,
        granularity,
    })
}

/// [`v1::CheckPolicy`], checked.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CheckedCheckPolicy {
    /// In [1, [`limits::MAX_CHECK_LENGTH`]]; `None`: chosen online.
    pub confirm_length: Option<u32>,
    /// In [1, [`limits::MAX_CHECK_LENGTH`]]; `None`: no dense pass of its own.
    pub refresh_every: Option<u32>,
    /// In (0, [`limits::MAX_KL`]].
    pub max_kl: Option<f32>,
}

impl From<CheckedCheckPolicy> for v1::CheckPolicy {
    fn from(checked: CheckedCheckPolicy) -> Self {
        Self {
            confirm_length: checked.confirm_length,
            refresh_every: checked.refresh_every,
            max_kl: checked.max_kl,
        }
    }
}

/// Checks how dense passes check masked ones; an absent message leaves all to the server.
///
/// # Errors
/// A field out of its range.
pub fn check_policy(raw: Option<&v1::CheckPolicy>) -> Result<CheckedCheckPolicy, Invalid> {
    let raw = raw.copied().unwrap_or_default();
    let length = |field, value: Option<u32>| {
        let fits = value.is_none_or(|n| (1..=limits::MAX_CHECK_LENGTH).contains(&n));
        check(fits, field, || {
            format!("must be between 1 and {}", limits::MAX_CHECK_LENGTH)
        })
        .map(|()| value)
    };
    Ok(CheckedCheckPolicy {
        confirm_length: length("confirm_length", raw.confirm_length)?,
        refresh_every: length("refresh_every", raw.refresh_every)?,
        max_kl: raw
            .max_kl
            .map(|kl| positive("max_kl", kl, limits::MAX_KL))
            .transpose()?,
    })
}

/// Checks a mass that masks must reach.
///
/// # Errors
/// A number outside (0, 1].
pub fn mask_p(raw: f32) -> Result<f32, Invalid> {
    positive("mask_p", raw, 1.0)
}

/// Checks a mode: any known one but `MODE_UNSPECIFIED`.
///
/// # Errors
/// An unknown or unspecified mode.
pub fn mode(raw: i32) -> Result<v1::Mode, Invalid> {
    match v1::Mode::try_from(raw) {
        Ok(v1::Mode::Unspecified) => Err(Invalid::new("mode", "must be given")),
        Ok(mode) => Ok(mode),
        Err(_) => Err(Invalid::new("mode", format!("{raw} is unknown"))),
    }
}

/// Checks a number of draft tokens per round.
///
/// # Errors
/// More than [`limits::MAX_DRAFT_LENGTH`].
pub fn draft_length(raw: u32) -> Result<u32, Invalid> {
    check(raw <= limits::MAX_DRAFT_LENGTH, "draft_length", || {
        format!("must be at most {}, not {raw}", limits::MAX_DRAFT_LENGTH)
    })?;
    Ok(raw)
}

/// Checks what is there of a draft policy; an absent one is empty.
///
/// # Errors
/// Too many draft tokens, no step to capture, a mass outside `(0, 1]`.
pub fn draft_policy(raw: Option<&v1::DraftPolicy>) -> Result<v1::DraftPolicy, Invalid> {
    let policy = raw.copied().unwrap_or_default();
    if let Some(length) = policy.draft_length {
        draft_length(length)?;
    }
    check(policy.capture_every != Some(0), "capture_every", || {
        "must be at least 1".to_owned()
    })?;
    if let Some(p) = policy.own_p {
        check(p > 0.0 && p <= 1.0, "own_p", || {
            format!("must be in (0, 1], not {p}")
        })?;
    }
    Ok(policy)
}

/// Checks one token id against a vocabulary.
///
/// # Errors
/// An id at or above `vocab_size`.
pub fn token_id(field: &'static str, token: u32, vocab_size: usize) -> Result<(), Invalid> {
    check((token as usize) < vocab_size, field, || {
        format!("holds {token}, which is not below the vocabulary size {vocab_size}")
    })
}

/// Checks the tokens a session starts from: at least one, at most `max_context - 1`, each below `vocab_size`.
///
/// # Errors
/// None, too many, or one outside the vocabulary.
pub fn session_tokens(
    tokens: &[u32],
    vocab_size: usize,
    max_context: usize,
) -> Result<(), Invalid> {
    let most = max_context
        .min(limits::MAX_SESSION_TOKENS)
        .saturating_sub(1);
    check(!tokens.is_empty(), "token_ids", || {
        "must hold at least one token: the prompt is empty".to_owned()
    })?;
    check(tokens.len() <= most, "token_ids", || {
        format!(
            "holds {} tokens; the model's context of {max_context} takes a prompt of at most {most}",
            tokens.len()
        )
    })?;
    tokens
        .iter()
        .try_for_each(|&token| token_id("token_ids", token, vocab_size))
}

/// Checks stop strings: few, short, not empty.
///
/// # Errors
/// Too many, or one empty or too long.
pub fn stop_strings(raw: &[String]) -> Result<(), Invalid> {
    check(raw.len() <= limits::MAX_STOP_STRINGS, "stop", || {
        format!("holds more than {} strings", limits::MAX_STOP_STRINGS)
    })?;
    let fits = |s: &String| (1..=limits::MAX_STOP_STRING_BYTES).contains(&s.len());
    check(raw.iter().all(fits), "stop", || {
        format!(
            "strings must be of 1 to {} bytes",
            limits::MAX_STOP_STRING_BYTES
        )
    })
}

/// Checks an endpoint: an http or https URI with a host.
///
/// # Errors
/// Anything else.
pub fn endpoint(field: &'static str, raw: &str) -> Result<tonic::transport::Uri, Invalid> {
    check(raw.len() <= limits::MAX_NAME_BYTES, field, || {
        format!("is longer than {} bytes", limits::MAX_NAME_BYTES)
    })?;
    let uri: tonic::transport::Uri = raw
        .parse()
        .map_err(|error| Invalid::new(field, format!("is no URI: {error}")))?;
    let usable = matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.host().is_some_and(|host| !host.is_empty());
    check(usable, field, || {
        "must have the form http://host:port".to_owned()
    })?;
    Ok(uri)
}

/// Checks what a peer says of its model: a positive vocabulary and context, names and lists of bounded length.
///
/// # Errors
/// An absent message, or a field out of its range.
pub fn model_info(raw: Option<v1::ModelInfo>) -> Result<v1::ModelInfo, Invalid> {
    let model = raw.ok_or_else(|| Invalid::new("model", "must be given"))?;
    check(model.vocab_size > 0, "vocab_size", || {
        "must be positive".to_owned()
    })?;
    check(model.max_context > 1, "max_context", || {
        "must be at least 2".to_owned()
    })?;
    let texts = [
        ("name", &model.name),
        ("tokenizer_hash", &model.tokenizer_hash),
        ("checkpoint_hash", &model.checkpoint_hash),
    ];
    for (field, text) in texts {
        check(text.len() <= limits::MAX_NAME_BYTES, field, || {
            format!("is longer than {} bytes", limits::MAX_NAME_BYTES)
        })?;
    }
    check(
        model.devices.len() <= limits::MAX_DEVICES,
        "devices",
        || format!("names more than {} devices", limits::MAX_DEVICES),
    )?;
    let texts = model.devices.iter().flat_map(|d| [&d.id, &d.name, &d.link]);
    for text in texts {
        check(text.len() <= limits::MAX_NAME_BYTES, "devices", || {
            format!("hold a text longer than {} bytes", limits::MAX_NAME_BYTES)
        })?;
    }
    check(
        model.eos_token_ids.len() <= limits::MAX_EOS_TOKENS,
        "eos_token_ids",
        || format!("holds more than {} tokens", limits::MAX_EOS_TOKENS),
    )?;
    Ok(model)
}
