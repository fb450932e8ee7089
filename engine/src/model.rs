//! [`Model`]: a loaded checkpoint on a device, as the services see it.

use std::path::Path;
use std::sync::Arc;

use crate::attention::{AttentionRows, EntryMasses, HeadLists, KvReads};
use crate::backend::{Backend, DType, KvShape};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::cpu::{CpuBackend, Isa as CpuIsa};
use crate::error::EngineError;
use crate::kv_cache::{BLOCK_TOKENS, BlockPool, Sequence};
use crate::transformer::Transformer;

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// KV cache budget in bytes; memory is touched as it is used.
    pub kv_cache_bytes: usize,
    /// Worker threads; 0 takes all cores. Models of one process share one pool.
    pub threads: usize,
    /// What KV entries are stored as. f32 keeps greedy output equal to an f32 reference; the others halve the bytes.
    pub kv_dtype: DType,
    /// Which of [`CpuIsa::available`] to run; `None` takes the best.
    pub cpu_isa: Option<CpuIsa>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            kv_cache_bytes: 1 << 30,
            threads: 0,
            kv_dtype: DType::F32,
            cpu_isa: None,
        }
    }
}

/// Which of a step's tokens get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: prompt chunks.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
    /// Every token's, with the bits that one step per token would give, however many tokens there are: long dense steps
    /// do without the kernels for many rows.
    Verify,
}

/// One sequence's part in a ragged batch: append `tokens`, attend, give logits and attention rows.
#[derive(Debug)]
pub struct Step<'a> {
    /// The KV cache to extend; its length grows by `tokens.len()`.
    pub sequence: &'a mut Sequence,
    /// Tokens at positions `sequence.len()..`; at least one.
    pub tokens: &'a [u32],
    /// `None`: attend to everything. `Some`: only to the listed positions and the step's own tokens.
    pub lists: Option<&'a HeadLists>,
    /// Which tokens get logits.
    pub logits: LogitRows,
    /// Layers whose attention rows (of the last token) to hand out; empty for none.
    pub capture: &'a [usize],
    /// Hand out what the entries that were read weighed.
    pub masses: bool,
}

/// What a step yields.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// `[rows, vocab_size]`, rows as asked by [`LogitRows`].
    pub logits: Vec<f32>,
    /// Captured attention rows, when asked for.
    pub attention: Option<AttentionRows>,
    /// Masses of the entries read, when asked for.
    pub masses: Option<EntryMasses>,
    /// KV entries read by this step.
    pub kv: KvReads,
}

/// A checkpoint loaded onto a device.
pub struct Model {
    transformer: Transformer<CpuBackend>,
    blocks: Arc<BlockPool>,
    kv_dtype: DType,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", self.config())
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Loads the checkpoint folder `dir`. `progress` hears (bytes done, bytes in all).
    ///
    /// # Errors
    /// [`EngineError::Io`], [`EngineError::Checkpoint`] or [`EngineError::Unsupported`], naming the file at fault.
    pub fn load(
        dir: &Path,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let checkpoint = Checkpoint::open(dir)?;
        let config = checkpoint.config();
        let backend = CpuBackend::new(options.threads, options.cpu_isa)?;
        let mut shape = KvShape {
            num_layers: config.num_layers,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            num_blocks: 0,
            dtype: options.kv_dtype,
        };
        shape.num_blocks = options.kv_cache_bytes / block_bytes(&shape);
        if shape.num_blocks == 0 {
            return Err(EngineError::InvalidArgument {
                what: "KV cache budget",
                reason: format!(
                    "{} bytes hold no block of {} bytes",
                    options.kv_cache_bytes,
                    block_bytes(&shape)
                ),
            });
        }
        let kv = backend.kv(shape)?;
        let transformer = Transformer::load(backend, &checkpoint, kv, progress)?;
        Ok(Self {
            transformer,
            blocks: BlockPool::new(shape.num_blocks),
            kv_dtype: shape.dtype,
        })
    }

    /// The model's shape and identity.
    pub fn config(&self) -> &ModelConfig {
        self.transformer.config()
    }

    /// Bytes of one KV entry: K and V of one position and one KV head.
    pub fn kv_entry_bytes(&self) -> usize {
        2 * self.config().head_dim * self.kv_dtype.bytes()
    }

    /// Opens an empty sequence that may grow to `max_tokens`; their KV blocks are reserved now.
    ///
    /// # Errors
    /// [`EngineError::KvExhausted`] or [`EngineError::ContextTooLong`].
    pub fn new_sequence(&self, max_tokens: usize) -> Result<Sequence, EngineError> {
        let max = self.config().max_context;
        if max_tokens > max {
            return Err(EngineError::ContextTooLong {
                len: max_tokens,
                max,
            });
        }
        self.blocks.sequence(max_tokens)
    }

    /// (used, total) KV blocks; reserved blocks count as used.
    pub fn kv_blocks(&self) -> (usize, usize) {
        (self.blocks.used(), self.blocks.total())
    }

    /// A handle that answers [`Model::kv_blocks`] from other threads.
    pub fn block_pool(&self) -> Arc<BlockPool> {
        Arc::clone(&self.blocks)
    }

    /// Runs one step of every sequence in the batch, in order. Results do not depend on what else is in the batch.
    ///
    /// # Errors
    /// On any error no sequence's length has changed.
    pub fn forward(&mut self, steps: &mut [Step<'_>]) -> Result<Vec<StepOutput>, EngineError> {
        for step in steps.iter() {
            self.check(step)?;
        }
        self.transformer.forward(steps)
    }

    /// Everything the kernels rely on.
    fn check(&self, step: &Step<'_>) -> Result<(), EngineError> {
        let config = self.config();
        let invalid = |what, reason| Err(EngineError::InvalidArgument { what, reason });
        let past = step.sequence.len();
        if !step.sequence.belongs_to(&self.blocks) {
            return invalid("sequence", "it belongs to another model".to_owned());
        }
        if step.tokens.is_empty() {
            return invalid("step", "it has no tokens".to_owned());
        }
        if past + step.tokens.len() > step.sequence.capacity() {
            return Err(EngineError::ContextTooLong {
                len: past + step.tokens.len(),
                max: step.sequence.capacity(),
            });
        }
        let vocab_size = config.vocab_size;
        if let Some(&token) = step.tokens.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(EngineError::InvalidToken { token, vocab_size });
        }
        if let Some(layer) = step.capture.iter().find(|&&l| l >= config.num_layers) {
            return invalid("capture", format!("layer {layer} of {}", config.num_layers));
        }
        if let Some(lists) = step.lists {
            let heads = config.num_layers * config.num_kv_heads;
            if lists.of_head.len() != heads
                || lists
                    .of_head
                    .iter()
                    .any(|&i| i as usize >= lists.lists.len())
            {
                return invalid(
                    "lists",
                    format!("they must name one list for each of {heads} KV heads"),
                );
            }
            for list in &lists.lists {
                let ordered = list.windows(2).all(|w| w[0] < w[1]);
                if !ordered || list.last().is_some_and(|&p| p as usize >= past) {
                    return invalid(
                        "lists",
                        format!("positions must increase and lie below {past}"),
                    );
                }
            }
        }
        Ok(())
    }
}

/// Bytes of one KV block over all layers, as the CPU stores it.
fn block_bytes(shape: &KvShape) -> usize {
    let entry = 2 * shape.head_dim.next_multiple_of(16) * shape.dtype.bytes();
    shape.num_layers * shape.num_kv_heads * BLOCK_TOKENS * entry
}
