//! `config.json`: the shape of a model, checked before anything is allocated by it.

use std::path::Path;

use serde_json::Value;

use crate::error::EngineError;

/// How rotary frequencies are stretched for contexts longer than the training's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor (position interpolation, Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth transition between.
    Llama3 {
        /// The factor of the low frequencies.
        factor: f32,
        /// Wavelengths longer than original context ÷ this are divided.
        low_freq_factor: f32,
        /// Wavelengths shorter than original context ÷ this are kept.
        high_freq_factor: f32,
        /// The training's context.
        original_context: f32,
    },
}

/// Shape and identity of a model.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// The checkpoint folder's name.
    pub name: String,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Longest context in tokens. A sliding window (Mistral 0.1) caps it: within the window attention is exact.
    pub max_context: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The attention output projection has a bias.
    pub output_bias: bool,
    /// The MLP projections have biases.
    pub mlp_bias: bool,
    /// q and k are normed per head (Qwen3).
    pub qk_norm: bool,
    /// The output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text (config.json and generation_config.json).
    pub eos_token_ids: Vec<u32>,
    /// SHA-256 of tokenizer.json, lower-case hex; empty where there is none.
    pub tokenizer_hash: String,
    /// SHA-256 over config.json and the safetensors headers, lower-case hex.
    pub checkpoint_hash: String,
}

/// Reads fields of a JSON object with errors that name the file and the field.
struct Fields<'a> {
    path: &'a Path,
    object: &'a Value,
    /// Where the object sits in the file, for messages: empty, or a key with a dot.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    /// The fields of `object`, which must be a JSON object.
    fn new(path: &'a Path, object: &'a Value, prefix: &'static str) -> Result<Self, EngineError> {
        let fields = Self {
            path,
            object,
            prefix,
        };
        if object.is_object() {
            Ok(fields)
        } else {
            let name = prefix.trim_end_matches('.');
            Err(fields.fail(format!(
                "{} must be a JSON object",
                if name.is_empty() { "the file" } else { name }
            )))
        }
    }

    fn fail(&self, reason: String) -> EngineError {
        EngineError::Checkpoint {
            path: self.path.to_owned(),
            reason,
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// A whole number in `1..=limit`.
    fn size(&self, key: &str, limit: u64) -> Result<Option<usize>, EngineError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(n) if (1..=limit).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.fail(format!(
                "{}{key} must be a whole number from 1 to {limit}, not {value}",
                self.prefix
            ))),
        }
    }

    fn required(&self, key: &str, limit: u64) -> Result<usize, EngineError> {
        self.size(key, limit)?
            .ok_or_else(|| self.fail(format!("{key} is missing")))
    }

    /// A finite positive number.
    fn positive(&self, key: &str) -> Result<Option<f64>, EngineError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(self.fail(format!(
                "{}{key} must be a positive number, not {value}",
                self.prefix
            ))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, EngineError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => Err(self.fail(format!("{key} must be true or false, not {value}"))),
        }
    }

    /// One token id or a list of them.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>, EngineError> {
        let fail = || self.fail(format!("{key} must be a token id or a list of them"));
        let id = |v: &Value| {
            v.as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(fail)
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }
}

impl ModelConfig {
    /// Parses the bytes of `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] for missing or absurd values, [`EngineError::Unsupported`] for other architectures.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, EngineError> {
        let object: Value = serde_json::from_slice(bytes).map_err(|e| EngineError::Checkpoint {
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
        let fields = Fields::new(path, &object, "")?;
        let family = match fields.get("model_type").and_then(Value::as_str) {
            Some(family) => family.to_owned(),
            None => return Err(fields.fail("model_type is missing".to_owned())),
        };
        if !matches!(family.as_str(), "llama" | "mistral" | "qwen2" | "qwen3") {
            return Err(EngineError::Unsupported(format!(
                "model_type {family:?} (supported: llama, mistral, qwen2, qwen3)"
            )));
        }
        let activation = fields
            .get("hidden_act")
            .and_then(Value::as_str)
            .unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(EngineError::Unsupported(format!(
                "hidden_act {activation:?} (supported: silu)"
            )));
        }
        if fields.get("quantization_config").is_some() {
            return Err(EngineError::Unsupported(
                "quantized checkpoints (quantization_config)".to_owned(),
            ));
        }
        let hidden_size = fields.required("hidden_size", 1 << 20)?;
        let num_heads = fields.required("num_attention_heads", 1 << 14)?;
        let num_kv_heads = fields
            .size("num_key_value_heads", 1 << 14)?
            .unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(fields.fail(format!(
                "{num_heads} query heads cannot share {num_kv_heads} KV heads evenly"
            )));
        }
        let head_dim = match fields.size("head_dim", 1 << 14)? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                return Err(fields.fail(format!(
                    "{num_heads} heads do not divide hidden_size {hidden_size}"
                )));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(fields.fail(format!("head_dim {head_dim} is odd")));
        }
        let mut max_context = fields.required("max_position_embeddings", 1 << 30)?;
        let sliding = fields.flag("use_sliding_window", family == "mistral")?;
        if let (true, Some(window)) = (sliding, fields.size("sliding_window", 1 << 30)?)
            && window < max_context
        {
            tracing::warn!(
                window,
                "sliding-window attention is not run: the context is capped at the window"
            );
            max_context = window;
        }
        let (rope_theta, rope_scaling) = rope(&fields)?;
        let attention_bias = fields.flag("attention_bias", false)?;
        Ok(Self {
            name: String::new(),
            vocab_size: fields.required("vocab_size", 1 << 24)?,
            hidden_size,
            intermediate_size: fields.required("intermediate_size", 1 << 22)?,
            num_layers: fields.required("num_hidden_layers", 1 << 12)?,
            num_heads,
            num_kv_heads,
            head_dim,
            max_context,
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling,
            qkv_bias: family == "qwen2" || attention_bias,
            output_bias: family != "qwen2" && attention_bias,
            mlp_bias: fields.flag("mlp_bias", false)?,
            qk_norm: family == "qwen3",
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            tokenizer_hash: String::new(),
            checkpoint_hash: String::new(),
        })
    }

    /// Adds the end-of-text tokens of `generation_config.json`.
    pub(crate) fn add_generation_config(
        &mut self,
        path: &Path,
        bytes: &[u8],
    ) -> Result<(), EngineError> {
        let object: Value = serde_json::from_slice(bytes).map_err(|e| EngineError::Checkpoint {
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
        for id in Fields::new(path, &object, "")?.token_ids("eos_token_id")? {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }

    /// Inverse rotary frequencies, `[head_dim / 2]`, in the f32 arithmetic of the reference implementation.
    pub(crate) fn inverse_frequencies(&self) -> Vec<f32> {
        let dim = self.head_dim as f32;
        let theta = self.rope_theta as f32;
        let plain = (0..self.head_dim / 2).map(|i| 1.0 / theta.powf((2 * i) as f32 / dim));
        plain
            .map(|f| match self.rope_scaling {
                RopeScaling::None => f,
                RopeScaling::Linear { factor } => f / factor,
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_context,
                } => {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength > original_context / low_freq_factor {
                        f / factor
                    } else if wavelength < original_context / high_freq_factor {
                        f
                    } else {
                        let smooth = (original_context / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                }
            })
            .collect()
    }
}

/// Rotary base and scaling, from the classic fields or from `rope_parameters`.
fn rope(fields: &Fields<'_>) -> Result<(f64, RopeScaling), EngineError> {
    let empty = Value::Object(serde_json::Map::new());
    let inner = match (fields.get("rope_parameters"), fields.get("rope_scaling")) {
        (Some(object), _) => Fields::new(fields.path, object, "rope_parameters.")?,
        (None, Some(object)) => Fields::new(fields.path, object, "rope_scaling.")?,
        (None, None) => Fields::new(fields.path, &empty, "")?,
    };
    let theta = match inner.positive("rope_theta")? {
        Some(theta) => theta,
        None => fields.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    let partial = inner
        .positive("partial_rotary_factor")?
        .or(fields.positive("partial_rotary_factor")?);
    if partial.is_some_and(|p| p != 1.0) {
        return Err(EngineError::Unsupported(
            "partial rotary embedding".to_owned(),
        ));
    }
    let kind = inner
        .get("rope_type")
        .or_else(|| inner.get("type"))
        .and_then(Value::as_str)
        .unwrap_or("default");
    let need = |key: &str| {
        inner
            .positive(key)?
            .map(|x| x as f32)
            .ok_or_else(|| inner.fail(format!("{}{key} is missing", inner.prefix)))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: need("factor")?,
        },
        "llama3" => {
            let scaling = RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: need("original_max_position_embeddings")?,
            };
            if let RopeScaling::Llama3 {
                low_freq_factor,
                high_freq_factor,
                ..
            } = scaling
                && high_freq_factor <= low_freq_factor
            {
                return Err(inner.fail(
                    "rope scaling: high_freq_factor must exceed low_freq_factor".to_owned(),
                ));
            }
            scaling
        }
        other => {
            return Err(EngineError::Unsupported(format!(
                "rope_type {other:?} (supported: default, linear, llama3)"
            )));
        }
    };
    Ok((theta, scaling))
}
