//! The one transformer: Llama, Mistral, Qwen2 and Qwen3, for both roles and every backend.
//!
//! Pre-norm blocks: x += Attention(norm(x)); x += MLP(norm(x)) with a gated SiLU MLP, rotary positions, grouped-query
//! attention (Touvron et al. 2023). Families differ in biases and per-head norms, both of which are data here.

use crate::attention::{AttentionRows, EntryMasses, HeadLists, KvReads};
#[cfg(feature = "cuda")]
use crate::backend::DType;
use crate::backend::{AttentionArgs, AttentionShape, Backend, Epilogue, Linear, Pass, RotateArgs};
use crate::checkpoint::Checkpoint;
use crate::chooser::{KeyChooser, LayerKeys};
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::model::{LogitRows, Step, StepOutput};
use crate::pass_layout::{all_masses, hand_out, hand_out_logits, layout};
use crate::row_selection::SelectedRows;

/// A dense step of at least this many tokens runs alone, on the kernels for many rows.
const BULK_TOKENS: usize = 32;

struct Layer<W> {
    input_norm: W,
    /// q, k, v.
    qkv: [Linear<W>; 3],
    /// Norms of q and k heads.
    qk_norm: Option<(W, W)>,
    output: Linear<W>,
    mlp_norm: W,
    gate: Linear<W>,
    up: Linear<W>,
    down: Linear<W>,
}

/// Activations, kept from one pass to the next.
struct Activations<T> {
    hidden: T,
    angles: T,
    normed: T,
    qkv: T,
    q: T,
    attended: T,
    mlp: T,
    selected: T,
    logits: T,
}

/// A model's weights, KV memory and activations on a backend.
pub(crate) struct Transformer<B: Backend> {
    backend: B,
    config: ModelConfig,
    inverse_frequencies: Vec<f32>,
    embedding: Linear<B::Weight>,
    layers: Vec<Layer<B::Weight>>,
    final_norm: B::Weight,
    /// The output projection; `None`: the embedding table.
    head: Option<Linear<B::Weight>>,
    kv: B::Kv,
    activations: Activations<B::Buffer>,
}

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

/// The embedding table's name in checkpoints.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Brings tensors to the backend, counting bytes.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a WeightSource<'a>,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<B: Backend> Loader<'_, B> {
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<B::Weight, EngineError> {
        let WeightSource::Checkpoint(checkpoint) = self.source else {
            self.done += 1;
            return self.backend.random_weight(shape, self.done as u32);
        };
        let tensor = checkpoint.tensor(name, shape)?;
        let bytes = tensor.bytes().len() as u64;
        let weight = self.backend.weight(tensor)?;
        self.done += bytes;
        (self.progress)(self.done, self.total);
        Ok(weight)
    }

    fn linear(
        &mut self,
        name: &str,
        out: usize,
        input: usize,
        bias: bool,
    ) -> Result<Linear<B::Weight>, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[out, input])?;
        let bias = if bias {
            Some(self.weight(&format!("{name}.bias"), &[out])?)
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    fn layer(&mut self, index: usize) -> Result<Layer<B::Weight>, EngineError> {
        let c = self.source.config().clone();
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let qk_norm = if c.qk_norm {
            Some((
                self.weight(&at("self_attn.q_norm.weight"), &[c.head_dim])?,
                self.weight(&at("self_attn.k_norm.weight"), &[c.head_dim])?,
            ))
        } else {
            None
        };
        Ok(Layer {
            input_norm: self.weight(&at("input_layernorm.weight"), &[c.hidden_size])?,
            qkv: [
                self.linear(&at("self_attn.q_proj"), q_width, c.hidden_size, c.qkv_bias)?,
                self.linear(&at("self_attn.k_proj"), kv_width, c.hidden_size, c.qkv_bias)?,
                self.linear(&at("self_attn.v_proj"), kv_width, c.hidden_size, c.qkv_bias)?,
            ],
            qk_norm,
            output: self.linear(
                &at("self_attn.o_proj"),
                c.hidden_size,
                q_width,
                c.output_bias,
            )?,
            mlp_norm: self.weight(&at("post_attention_layernorm.weight"), &[c.hidden_size])?,
            gate: self.linear(
                &at("mlp.gate_proj"),
                c.intermediate_size,
                c.hidden_size,
                c.mlp_bias,
            )?,
            up: self.linear(
                &at("mlp.up_proj"),
                c.intermediate_size,
                c.hidden_size,
                c.mlp_bias,
            )?,
            down: self.linear(
                &at("mlp.down_proj"),
                c.hidden_size,
                c.intermediate_size,
                c.mlp_bias,
            )?,
        })
    }
}

impl<B: Backend> Transformer<B> {
    /// Brings a model's weights to `backend`; `make_kv` then makes memory for its KV cache.
    pub(crate) fn load(
        backend: B,
        source: &WeightSource<'_>,
        make_kv: impl FnOnce(&B) -> Result<B::Kv, EngineError>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let config = source.config().clone();
        let total = match source {
            WeightSource::Checkpoint(checkpoint) => checkpoint.total_bytes(),
            WeightSource::Random(_) => 0,
        };
        let mut loader = Loader {
            backend: &backend,
            source,
            done: 0,
            total,
            progress,
        };
        let table = [config.vocab_size, config.hidden_size];
        let embedding = Linear {
            weight: loader.weight(EMBEDDING, &table)?,
            bias: None,
        };
        let layers = (0..config.num_layers)
            .map(|l| loader.layer(l))
            .collect::<Result<_, _>>()?;
        let final_norm = loader.weight("model.norm.weight", &[config.hidden_size])?;
        let head = if config.tie_word_embeddings {
            None
        } else {
            Some(loader.linear("lm_head", config.vocab_size, config.hidden_size, false)?)
        };
        let kv = make_kv(&backend)?;
        backend.prepare(&AttentionShape {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        })?;
        let buffer = || backend.buffer();
        let activations = Activations {
            hidden: buffer(),
            angles: buffer(),
            normed: buffer(),
            qkv: buffer(),
            q: buffer(),
            attended: buffer(),
            mlp: buffer(),
            selected: buffer(),
            logits: buffer(),
        };
        let inverse_frequencies = config.inverse_frequencies();
        Ok(Self {
            backend,
            inverse_frequencies,
            config,
            embedding,
            layers,
            final_norm,
            head,
            kv,
            activations,
        })
    }

    /// The model's configuration.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs checked steps: long dense ones alone, all others together.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn forward(
        &mut self,
        steps: &mut [Step<'_>],
    ) -> Result<Vec<StepOutput>, EngineError> {
        let is_bulk = |s: &Step<'_>| {
            let exact = matches!(s.logits, LogitRows::Verify | LogitRows::Replay);
            let plain =
                s.lists.is_none() && s.capture.is_empty() && s.select.is_none() && !s.masses;
            plain && !exact && s.tokens.len() >= BULK_TOKENS
        };
        let mut outputs: Vec<StepOutput> = steps.iter().map(|s| self.output_of(s)).collect();
        let (mut small, mut small_outputs) = (Vec::new(), Vec::new());
        for (step, output) in steps.iter_mut().zip(&mut outputs) {
            if is_bulk(step) {
                self.pass(&mut [step], &mut [output], true, None)?;
            } else {
                small.push(step);
                small_outputs.push(output);
            }
        }
        if !small.is_empty() {
            self.pass(&mut small, &mut small_outputs, false, None)?;
        }
        Ok(outputs)
    }

    /// Runs one checked step without lists, whose reads `chooser` chooses; `None` where the device cannot.
    pub(crate) fn forward_choosing(
        &mut self,
        step: &mut Step<'_>,
        chooser: &mut dyn KeyChooser,
    ) -> Result<Option<StepOutput>, EngineError> {
        let keys = self.backend.keys(&self.kv, 0, step.sequence.blocks(), 0);
        if keys.is_none() {
            return Ok(None);
        }
        let mut output = self.output_of(step);
        output.kv.read = 0;
        self.pass(&mut [step], &mut [&mut output], false, Some(chooser))?;
        Ok(Some(output))
    }

    /// An output with room for captured rows, and the step's KV reads.
    fn output_of(&self, step: &Step<'_>) -> StepOutput {
        let c = &self.config;
        let kv_len = step.sequence.len() + step.tokens.len();
        let selects = step.select.is_some()
            && step.lists.is_none()
            && !step.masses
            && self.backend.selects(kv_len);
        let attention = (!selects && !step.capture.is_empty()).then(|| AttentionRows {
            layers: step.capture.to_vec(),
            num_heads: c.num_heads,
            kv_len,
            probs: vec![0.0; step.capture.len() * c.num_heads * kv_len],
        });
        let heads = (c.num_layers * c.num_kv_heads) as u64;
        let dense = heads * kv_len as u64;
        let read = match step.lists {
            None => dense,
            Some(l) => {
                let listed: u64 = l
                    .of_head
                    .iter()
                    .map(|&i| l.lists[i as usize].len() as u64)
                    .sum();
                listed + heads * step.tokens.len() as u64
            }
        };
        StepOutput {
            logits: Vec::new(),
            argmax: Vec::new(),
            attention,
            selected: selects.then(|| SelectedRows {
                kv_len,
                words: Vec::new(),
            }),
            masses: step.masses.then(|| EntryMasses {
                of_head: vec![Vec::new(); c.num_layers * c.num_kv_heads],
            }),
            kv: KvReads { read, dense },
        }
    }

    /// One forward over the rows of `steps`.
    fn pass(
        &mut self,
        steps: &mut [&mut Step<'_>],
        outputs: &mut [&mut StepOutput],
        bulk: bool,
        mut chooser: Option<&mut dyn KeyChooser>,
    ) -> Result<(), EngineError> {
        let pass = layout(steps, outputs, bulk);
        let shape = AttentionShape {
            num_heads: self.config.num_heads,
            num_kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
        };
        let eps = self.config.rms_norm_eps;
        let mut reads = 0;
        let (backend, kv, a) = (&self.backend, &self.kv, &mut self.activations);
        let _turn = backend.begin(&pass, &shape);
        backend.embed(&self.embedding.weight, &pass, &mut a.hidden);
        backend.angles(&pass, &self.inverse_frequencies, &mut a.angles);
        for (index, layer) in self.layers.iter().enumerate() {
            backend.rms_norm(&a.hidden, &layer.input_norm, eps, &mut a.normed);
            let [q, k, v] = &layer.qkv;
            backend.linear(&a.normed, &[q, k, v], Epilogue::Store, bulk, &mut a.qkv);
            let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k, eps));
            let rotate = RotateArgs {
                shape,
                qk_norm,
                angles: &a.angles,
                kv,
                layer: index,
            };
            backend.rotate_and_store(&a.qkv, &pass, &rotate, &mut a.q);
            let mut wanted = hand_out(outputs, index, shape.num_kv_heads);
            let attend = AttentionArgs {
                shape,
                kv,
                layer: index,
            };
            if let Some(chooser) = &mut chooser {
                let lists = chosen_lists(backend, &a.q, &pass, &attend, &mut **chooser)?;
                let tokens = pass.tokens.len() as u64;
                reads += lists
                    .lists
                    .iter()
                    .map(|l| l.len() as u64 + tokens)
                    .sum::<u64>();
                let narrowed = pass.reading(&lists);
                backend.attention(&a.q, &narrowed, &attend, &mut wanted, &mut a.attended);
            } else {
                backend.attention(&a.q, &pass, &attend, &mut wanted, &mut a.attended);
            }
            backend.linear(
                &a.attended,
                &[&layer.output],
                Epilogue::Add,
                bulk,
                &mut a.hidden,
            );
            backend.rms_norm(&a.hidden, &layer.mlp_norm, eps, &mut a.normed);
            backend.linear(
                &a.normed,
                &[&layer.gate, &layer.up],
                Epilogue::SwiGlu,
                bulk,
                &mut a.mlp,
            );
            backend.linear(&a.mlp, &[&layer.down], Epilogue::Add, bulk, &mut a.hidden);
        }
        if !pass.logit_rows.is_empty() {
            let hidden = self.config.hidden_size;
            backend.gather_rows(&a.hidden, hidden, &pass, &mut a.selected);
            backend.rms_norm(&a.selected, &self.final_norm, eps, &mut a.normed);
            let head = self.head.as_ref().unwrap_or(&self.embedding);
            backend.linear(
                &a.normed,
                &[head],
                Epilogue::Store,
                pass.logit_rows.len() >= BULK_TOKENS && bulk,
                &mut a.logits,
            );
        }
        if !pass.selections.is_empty() {
            let selected = outputs
                .iter_mut()
                .filter_map(|output| output.selected.as_mut());
            backend.select(&pass, &mut selected.collect::<Vec<_>>())?;
        }
        let mut masses = all_masses(outputs);
        if !masses.is_empty() {
            backend.masses(&pass, &mut masses)?;
        }
        if !pass.logit_rows.is_empty() {
            let vocab = self.config.vocab_size;
            hand_out_logits(backend, &a.logits, vocab, steps, outputs)?;
        }
        backend.finish()?;
        drop(pass);
        for (step, output) in steps.iter_mut().zip(outputs) {
            let tokens = step.tokens.len();
            step.sequence.extend(tokens);
            output.kv.read += reads;
        }
        Ok(())
    }
}

/// What `chooser` lets the only span of `pass` read in one layer.
fn chosen_lists<B: Backend>(
    backend: &B,
    q: &B::Buffer,
    pass: &Pass<'_>,
    args: &AttentionArgs<'_, B>,
    chooser: &mut dyn KeyChooser,
) -> Result<HeadLists, EngineError> {
    let span = &pass.spans[0];
    let mut queries = Vec::new();
    backend.read(q, &mut queries)?;
    let (keys, width) = backend
        .keys(args.kv, args.layer, span.blocks, span.past)
        .expect("the device was asked before");
    let kv_heads = args.shape.num_kv_heads;
    let view = LayerKeys {
        q: &queries,
        keys: &keys,
        width,
        num_heads: args.shape.num_heads,
        num_kv_heads: kv_heads,
    };
    let lists = chooser.choose(args.layer, &view);
    // The kernels rely on it.
    let sound = |list: &Vec<u32>| {
        list.windows(2).all(|w| w[0] < w[1])
            && list.last().is_none_or(|&p| (p as usize) < span.past)
    };
    assert!(
        lists.len() == kv_heads && lists.iter().all(sound),
        "a chooser lists cached positions for every KV head"
    );
    Ok(HeadLists {
        of_head: (0..=args.layer).flat_map(|_| 0..kv_heads as u32).collect(),
        lists,
    })
}
