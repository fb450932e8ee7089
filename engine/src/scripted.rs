//! [`Script`]: a model's answers without a model, for simulations of what surrounds models.
//!
//! A model by a script has a vocabulary, a context and KV blocks like any other; only its forwards are somebody else's.

use crate::chooser::KeyChooser;
use crate::config::{ModelConfig, RopeScaling};
use crate::error::EngineError;
use crate::model::{Forwards, Step, StepOutput};
use crate::sampling::most_probable;

/// Answers forwards.
pub trait Script: Send {
    /// The output of every step, in order.
    fn answer(&mut self, steps: &[Step<'_>]) -> Vec<StepOutput>;
}

/// What the surroundings of a scripted model see of it.
#[derive(Debug, Clone, Copy)]
pub struct ScriptedShape {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub max_context: usize,
    /// KV blocks of [`crate::kv_cache::BLOCK_TOKENS`] positions.
    pub kv_blocks: usize,
}

impl ScriptedShape {
    /// A configuration of one layer with one head.
    pub(crate) fn config(&self) -> ModelConfig {
        ModelConfig {
            name: "scripted".to_owned(),
            vocab_size: self.vocab_size,
            hidden_size: 16,
            intermediate_size: 16,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 16,
            max_context: self.max_context,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tie_word_embeddings: true,
            eos_token_ids: Vec::new(),
            tokenizer_hash: String::new(),
            checkpoint_hash: String::new(),
        }
    }
}

/// A script in a model's place.
pub(crate) struct Scripted {
    pub(crate) config: ModelConfig,
    pub(crate) script: Box<dyn Script>,
}

impl Forwards for Scripted {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn forward(&mut self, steps: &[Step<'_>]) -> Result<Vec<StepOutput>, EngineError> {
        let mut outputs = self.script.answer(steps);
        for (step, output) in steps.iter().zip(&mut outputs) {
            if step.argmax {
                let mut logits = std::mem::take(&mut output.logits);
                for row in logits.chunks_exact_mut(self.config.vocab_size) {
                    for &(token, bias) in step.bias {
                        row[token as usize] += bias;
                    }
                }
                let rows = logits.chunks_exact(self.config.vocab_size);
                output.argmax = rows.map(most_probable).collect();
            }
        }
        Ok(outputs)
    }

    /// A script has no entries.
    fn copy_blocks(&mut self, _copies: &[(u32, u32)]) -> Result<(), EngineError> {
        Ok(())
    }

    fn forward_choosing(
        &mut self,
        _step: &Step<'_>,
        _chooser: &mut dyn KeyChooser,
    ) -> Result<Option<StepOutput>, EngineError> {
        Ok(None)
    }
}
