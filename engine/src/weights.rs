//! A model's weights on a device, or one rank's part of them: from a checkpoint, or made up.

#[cfg(feature = "cuda")]
use crate::backend::DType;
use crate::backend::{Backend, Linear};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::share::{Cut, Share};

/// The embedding table's name in checkpoints.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Where weights come from.
pub(crate) enum WeightSource<'a> {
    /// A checkpoint folder.
    Checkpoint(&'a Checkpoint),
    /// Nowhere: a model of this shape with random ones.
    Random(&'a ModelConfig),
}

impl WeightSource<'_> {
    /// The model's configuration.
    pub(crate) fn config(&self) -> &ModelConfig {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.config(),
            Self::Random(config) => config,
        }
    }

    /// The 16-bit type for a device that has no other: the embedding table's, bf16 where that is f32.
    #[cfg(feature = "cuda")]
    pub(crate) fn half_type(&self) -> Result<DType, EngineError> {
        let Self::Checkpoint(checkpoint) = self else {
            return Ok(DType::Bf16);
        };
        let c = checkpoint.config();
        let table = checkpoint.tensor(EMBEDDING, &[c.vocab_size, c.hidden_size])?;
        Ok(match table.dtype() {
            DType::F32 => DType::Bf16,
            half => half,
        })
    }
}

/// The weights of one layer.
pub(crate) struct Layer<W> {
    pub(crate) input_norm: W,
    /// q, k, v.
    pub(crate) qkv: [Linear<W>; 3],
    /// Norms of q and k heads.
    pub(crate) qk_norm: Option<(W, W)>,
    pub(crate) output: Linear<W>,
    pub(crate) mlp_norm: W,
    pub(crate) gate: Linear<W>,
    pub(crate) up: Linear<W>,
    pub(crate) down: Linear<W>,
}

/// The weights of a model, or a rank's share of them.
pub(crate) struct Weights<W> {
    pub(crate) embedding: Linear<W>,
    pub(crate) layers: Vec<Layer<W>>,
    pub(crate) final_norm: W,
    /// The output projection; `None`: the embedding table.
    pub(crate) head: Option<Linear<W>>,
}

impl<W> Weights<W> {
    /// Brings the weights of `share` to `backend`. `progress` hears (bytes done, bytes in all).
    ///
    /// # Errors
    /// When a tensor is missing or misshapen, or the device has no room.
    pub(crate) fn load<B: Backend<Weight = W>>(
        backend: &B,
        source: &WeightSource<'_>,
        share: Share,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = source.config();
        let total = match source {
            WeightSource::Checkpoint(checkpoint) => checkpoint.total_bytes(),
            WeightSource::Random(_) => 0,
        };
        let mut loader = Loader {
            backend,
            source,
            config,
            share,
            done: 0,
            total,
            progress,
        };
        let table = [config.vocab_size, config.hidden_size];
        let embedding = Linear {
            weight: loader.weight(EMBEDDING, &table, Cut::Whole)?,
            bias: None,
        };
        let layers = (0..config.num_layers)
            .map(|l| loader.layer(l))
            .collect::<Result<_, _>>()?;
        let final_norm = loader.weight("model.norm.weight", &[config.hidden_size], Cut::Whole)?;
        let head = match (config.tie_word_embeddings, share.is_whole()) {
            (true, true) => None,
            (true, false) => Some(EMBEDDING),
            (false, _) => Some("lm_head.weight"),
        };
        let own_rows = share.rows(config.vocab_size);
        let head = head
            .map(|name| loader.weight(name, &table, own_rows))
            .transpose()?;
        Ok(Self {
            embedding,
            layers,
            final_norm,
            head: head.map(|weight| Linear { weight, bias: None }),
        })
    }
}

/// Brings tensors to the backend, counting bytes.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a WeightSource<'a>,
    config: &'a ModelConfig,
    share: Share,
    /// Of whole tensors, also where a part of one is taken.
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<B: Backend> Loader<'_, B> {
    fn weight(&mut self, name: &str, shape: &[usize], cut: Cut) -> Result<B::Weight, EngineError> {
        let WeightSource::Checkpoint(checkpoint) = self.source else {
            return self.backend.random_weight(shape, &cut, seed_of(name));
        };
        let tensor = checkpoint.tensor(name, shape)?;
        // A tied table is taken twice by ranks.
        self.done = self.total.min(self.done + tensor.bytes().len() as u64);
        let weight = self.backend.weight(tensor.part(&cut))?;
        (self.progress)(self.done, self.total);
        Ok(weight)
    }

    /// A projection whose outputs are cut (column-parallel in Megatron-LM): every rank has the biases of its own.
    fn column_parallel(
        &mut self,
        name: &str,
        (out, input): (usize, usize),
        bias: bool,
    ) -> Result<Linear<B::Weight>, EngineError> {
        let cut = self.share.rows(out);
        let weight = self.weight(&format!("{name}.weight"), &[out, input], cut.clone())?;
        let bias = if bias {
            Some(self.weight(&format!("{name}.bias"), &[out], cut)?)
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    /// A projection whose inputs are cut (row-parallel): its outputs are added up, so one rank has the bias.
    fn row_parallel(
        &mut self,
        name: &str,
        (out, input): (usize, usize),
        bias: bool,
    ) -> Result<Linear<B::Weight>, EngineError> {
        let cut = self.share.columns(input);
        let weight = self.weight(&format!("{name}.weight"), &[out, input], cut)?;
        let bias = if bias && self.share.is_first() {
            Some(self.weight(&format!("{name}.bias"), &[out], Cut::Whole)?)
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<B::Weight, EngineError> {
        self.weight(&format!("{name}.weight"), &[width], Cut::Whole)
    }

    fn layer(&mut self, index: usize) -> Result<Layer<B::Weight>, EngineError> {
        let c = self.config;
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let hidden = c.hidden_size;
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let (q, kv) = ((q_width, hidden), (kv_width, hidden));
        let (wide, narrow) = ((c.intermediate_size, hidden), (hidden, c.intermediate_size));
        let qk_norm = if c.qk_norm {
            Some((
                self.norm(&at("self_attn.q_norm"), c.head_dim)?,
                self.norm(&at("self_attn.k_norm"), c.head_dim)?,
            ))
        } else {
            None
        };
        Ok(Layer {
            input_norm: self.norm(&at("input_layernorm"), hidden)?,
            qkv: [
                self.column_parallel(&at("self_attn.q_proj"), q, c.qkv_bias)?,
                self.column_parallel(&at("self_attn.k_proj"), kv, c.qkv_bias)?,
                self.column_parallel(&at("self_attn.v_proj"), kv, c.qkv_bias)?,
            ],
            qk_norm,
            output: self.row_parallel(&at("self_attn.o_proj"), (hidden, q_width), c.output_bias)?,
            mlp_norm: self.norm(&at("post_attention_layernorm"), hidden)?,
            gate: self.column_parallel(&at("mlp.gate_proj"), wide, c.mlp_bias)?,
            up: self.column_parallel(&at("mlp.up_proj"), wide, c.mlp_bias)?,
            down: self.row_parallel(&at("mlp.down_proj"), narrow, c.mlp_bias)?,
        })
    }
}

/// What a made-up tensor's numbers follow from: its name (FNV-1a), so that ranks agree on them.
fn seed_of(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
