//! [`SamplingParams`]: what a request may ask of sampling, and its bounds.

use crate::error::EngineError;

/// Highest temperature.
pub const MAX_TEMPERATURE: f32 = 100.0;
/// Highest repetition penalty.
pub const MAX_REPETITION_PENALTY: f32 = 10.0;
/// Largest magnitude of a presence or frequency penalty.
pub const MAX_ADDITIVE_PENALTY: f32 = 10.0;
/// Largest magnitude of a logit bias.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Most biased tokens.
pub const MAX_LOGIT_BIAS_ENTRIES: usize = 1024;
/// Most alternatives reported beside a token.
pub const MAX_LOGPROBS: u32 = 20;

/// The sampling rule of a session. Order of application: logit bias, repetition, presence and frequency penalties,
/// temperature, top-k, top-p, min-p. The default is greedy with everything else off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 selects the most probable token (greedy); otherwise in (0, 100].
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens whose mass reaches this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this times the most probable one, in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output, in (0, 10]; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token in the output, in [-10, 10].
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once per occurrence in the output, in [-10, 10].
    pub frequency_penalty: f32,
    /// Key of the session's random numbers.
    pub seed: u64,
    /// Added to the logits of single tokens: distinct ids, finite values in [-100, 100], at most 1,024.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report this many alternatives beside each token, at most 20; `None`: no log-probabilities at all.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether the session is greedy: its distributions are single tokens and its proposals carry no q.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether logits change before the temperature: by bias or by a penalty.
    pub fn adjusts_logits(&self) -> bool {
        !self.logit_bias.is_empty() || self.repeats_matter() || self.output_matters()
    }

    /// Whether the repetition penalty is on.
    pub(super) fn repeats_matter(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// Whether the presence or the frequency penalty is on.
    pub(super) fn output_matters(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every field against its bounds, for a vocabulary of `vocab_size` tokens.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] naming the field, or [`EngineError::InvalidToken`] for a biased token outside
    /// the vocabulary.
    pub fn validate(&self, vocab_size: usize) -> Result<(), EngineError> {
        // Written so that NaN fails each check.
        check("temperature", self.temperature, |t| {
            (0.0..=MAX_TEMPERATURE).contains(&t)
        })?;
        check("top_p", self.top_p, |p| p > 0.0 && p <= 1.0)?;
        check("min_p", self.min_p, |p| (0.0..=1.0).contains(&p))?;
        check("repetition_penalty", self.repetition_penalty, |r| {
            r > 0.0 && r <= MAX_REPETITION_PENALTY
        })?;
        let additive = |p: f32| p.abs() <= MAX_ADDITIVE_PENALTY;
        check("presence_penalty", self.presence_penalty, additive)?;
        check("frequency_penalty", self.frequency_penalty, additive)?;
        self.validate_bias(vocab_size)?;
        match self.logprobs {
            Some(n) if n > MAX_LOGPROBS => Err(EngineError::InvalidArgument {
                what: "logprobs",
                reason: format!("{n} is above {MAX_LOGPROBS}"),
            }),
            _ => Ok(()),
        }
    }

    fn validate_bias(&self, vocab_size: usize) -> Result<(), EngineError> {
        let invalid = |reason: String| EngineError::InvalidArgument {
            what: "logit_bias",
            reason,
        };
        if self.logit_bias.len() > MAX_LOGIT_BIAS_ENTRIES {
            return Err(invalid(format!(
                "{} entries, at most {MAX_LOGIT_BIAS_ENTRIES}",
                self.logit_bias.len()
            )));
        }
        let mut ids: Vec<u32> = self.logit_bias.iter().map(|&(id, _)| id).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(invalid(format!("token {} is given twice", pair[0])));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab_size {
                return Err(EngineError::InvalidToken { token, vocab_size });
            }
            check("logit_bias", bias, |b| b.abs() <= MAX_LOGIT_BIAS)?;
        }
        Ok(())
    }
}

fn check(what: &'static str, value: f32, ok: impl Fn(f32) -> bool) -> Result<(), EngineError> {
    if ok(value) {
        return Ok(());
    }
    Err(EngineError::InvalidArgument {
        what,
        reason: format!("{value} is out of range"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_greedy_and_valid() {
        let params = SamplingParams::default();
        assert!(params.is_greedy());
        assert!(!params.adjusts_logits());
        params.validate(10).unwrap();
    }

    #[test]
    fn bounds_and_nan_are_refused() {
        let refuse = |change: fn(&mut SamplingParams), field: &str| {
            let mut params = SamplingParams::default();
            change(&mut params);
            let error = params.validate(10).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        };
        refuse(|p| p.temperature = -1.0, "temperature");
        refuse(|p| p.temperature = f32::NAN, "temperature");
        refuse(|p| p.temperature = 101.0, "temperature");
        refuse(|p| p.top_p = 0.0, "top_p");
        refuse(|p| p.top_p = 1.5, "top_p");
        refuse(|p| p.top_p = f32::NAN, "top_p");
        refuse(|p| p.min_p = f32::NAN, "min_p");
        refuse(|p| p.repetition_penalty = 0.0, "repetition_penalty");
        refuse(
            |p| p.repetition_penalty = f32::INFINITY,
            "repetition_penalty",
        );
        refuse(|p| p.presence_penalty = 11.0, "presence_penalty");
        refuse(|p| p.frequency_penalty = f32::NAN, "frequency_penalty");
        refuse(|p| p.logit_bias = vec![(1, f32::NAN)], "logit_bias");
        refuse(|p| p.logit_bias = vec![(1, 1.0), (1, 2.0)], "twice");
        refuse(|p| p.logit_bias = vec![(10, 1.0)], "vocabulary");
        refuse(|p| p.logit_bias = vec![(1, 0.0); 1025], "entries");
        refuse(|p| p.logprobs = Some(21), "logprobs");
    }
}
