//! [`ServedModel`]: what a worker's edge knows of the model that its engine thread owns.

use specattn_engine::{DeviceInfo, Model, ModelConfig};
use specattn_proto::v1::{Device, ModelInfo};

/// The shape of a loaded model, for checks, and what other services are told of it.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// The checkpoint's configuration.
    pub config: ModelConfig,
    /// The same for the wire.
    pub info: ModelInfo,
}

impl From<&Model> for ServedModel {
    fn from(model: &Model) -> Self {
        Self {
            config: model.config().clone(),
            info: model_info(model),
        }
    }
}

/// What a model is, as far as its partner must know.
pub fn model_info(model: &Model) -> ModelInfo {
    let config = model.config();
    let size = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    ModelInfo {
        name: config.name.clone(),
        vocab_size: size(config.vocab_size),
        max_context: size(config.max_context),
        num_layers: size(config.num_layers),
        num_heads: size(config.num_heads),
        num_kv_heads: size(config.num_kv_heads),
        head_dim: size(config.head_dim),
        tokenizer_hash: config.tokenizer_hash.clone(),
        checkpoint_hash: config.checkpoint_hash.clone(),
        eos_token_ids: config.eos_token_ids.clone(),
        kv_entry_bytes: size(model.kv_entry_bytes()),
        devices: model.devices().iter().map(device).collect(),
    }
}

fn device(info: &DeviceInfo) -> Device {
    Device {
        id: info.id.clone(),
        name: info.name.clone(),
        memory_bytes: info.memory_bytes,
        link: info.link.map(|link| link.to_string()).unwrap_or_default(),
    }
}
