//! [`Model`]: a loaded checkpoint on a device, as the services see it.

use std::path::Path;
use std::sync::Arc;

use crate::attention::{AttentionRows, EntryMasses, HeadLists, KvReads};
use crate::backend::{Backend, DType};
use crate::checkpoint::Checkpoint;
use crate::chooser::KeyChooser;
use crate::config::ModelConfig;
use crate::crew::Crew;
use crate::device::{DeviceInfo, cpu_devices};
use crate::error::EngineError;
use crate::floats::Floats;
use crate::kv_cache::{BlockPool, Sequence};
use crate::loading::{self, LoadOptions};
use crate::row_selection::{MAX_REACH, MixedHead, RowSelection, SelectedRows};
use crate::scripted::{Script, Scripted, ScriptedShape};
use crate::transformer::Transformer;
use crate::weights::WeightSource;

/// Which of a step's tokens get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: prompt chunks.
    None,
    /// None, with the bits that one step per token would give: tokens that were once decoded and are processed again.
    Replay,
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
    /// Hand out the most probable token of those rows in place of their logits: from a GPU nothing else crosses to the host.
    pub argmax: bool,
    /// Added to the logits of these tokens before the most probable one is looked for; only with `argmax`, each token once.
    pub bias: &'a [(u32, f32)],
    /// Layers whose attention rows (of the last token) to hand out; empty for none.
    pub capture: &'a [usize],
    /// Hand out selections from the last token's attention rows in place of the captured rows, where the device makes them:
    /// a GPU, in dense steps up to a length. Elsewhere `capture` is what is handed out.
    pub select: Option<&'a RowSelection>,
    /// Hand out what the entries that were read weighed.
    pub masses: bool,
}

impl<'a> Step<'a> {
    /// A dense step that hands out nothing.
    pub fn new(sequence: &'a mut Sequence, tokens: &'a [u32]) -> Self {
        Self {
            sequence,
            tokens,
            lists: None,
            logits: LogitRows::None,
            argmax: false,
            bias: &[],
            capture: &[],
            select: None,
            masses: false,
        }
    }
}

/// What a step yields.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// `[rows, vocab_size]`, rows as asked by [`LogitRows`]; empty where [`Step::argmax`] was asked for.
    pub logits: Floats,
    /// `[rows]`, when asked for: the first of the most probable tokens; `None` where a logit is a NaN or an infinity.
    pub argmax: Vec<Option<u32>>,
    /// Captured attention rows, when asked for.
    pub attention: Option<AttentionRows>,
    /// Selections in their place, when asked for and made by the device.
    pub selected: Option<SelectedRows>,
    /// Masses of the entries read, when asked for.
    pub masses: Option<EntryMasses>,
    /// KV entries read by this step.
    pub kv: KvReads,
}

/// A checkpoint loaded onto a device.
pub struct Model {
    transformer: Box<dyn Forwards>,
    blocks: Arc<BlockPool>,
    kv_dtype: DType,
    devices: Vec<DeviceInfo>,
    crew: Crew,
}

/// A [`Transformer`] on whichever backend, several as ranks, or a script. Lengths of sequences are the caller's to change.
pub(crate) trait Forwards: Send {
    fn config(&self) -> &ModelConfig;
    fn forward(&mut self, steps: &[Step<'_>]) -> Result<Vec<StepOutput>, EngineError>;
    /// Copies KV blocks, each (from, to).
    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), EngineError>;
    fn forward_choosing(
        &mut self,
        step: &Step<'_>,
        chooser: &mut dyn KeyChooser,
    ) -> Result<Option<StepOutput>, EngineError>;
}

impl<B> Forwards for Transformer<B>
where
    B: Backend,
    Self: Send,
{
    fn config(&self) -> &ModelConfig {
        self.config()
    }

    fn forward(&mut self, steps: &[Step<'_>]) -> Result<Vec<StepOutput>, EngineError> {
        let outputs = self.forward(steps)?;
        Ok(outputs.into_iter().map(|output| output.step).collect())
    }

    fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        self.copy_blocks(copies)
    }

    fn forward_choosing(
        &mut self,
        step: &Step<'_>,
        chooser: &mut dyn KeyChooser,
    ) -> Result<Option<StepOutput>, EngineError> {
        self.forward_choosing(step, chooser)
    }
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
    /// [`EngineError::Io`], [`EngineError::Checkpoint`] or [`EngineError::Unsupported`], naming the file at fault; what the
    /// device says when it cannot be used or has no room.
    pub fn load(
        dir: &Path,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let checkpoint = Checkpoint::open(dir)?;
        Self::from_source(&WeightSource::Checkpoint(&checkpoint), options, progress)
    }

    /// A model of the shape that the `config.json` at `path` tells, with random weights; for benchmarks. Those in matrices are the same
    /// bf16 numbers on every device.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn random(path: &Path, options: &LoadOptions) -> Result<Self, EngineError> {
        let bytes = crate::checkpoint::read_bounded(path)?;
        let mut config = ModelConfig::parse(path, &bytes)?;
        let shape = path.file_stem().unwrap_or_default().to_string_lossy();
        config.name = format!("{shape}-random");
        Self::from_source(&WeightSource::Random(&config), options, &mut |_, _| {})
    }

    /// A model whose forwards `script` answers.
    pub fn scripted(shape: &ScriptedShape, script: Box<dyn Script>) -> Self {
        let config = shape.config();
        Self {
            transformer: Box::new(Scripted { config, script }),
            blocks: BlockPool::new(shape.kv_blocks),
            kv_dtype: DType::F32,
            devices: cpu_devices(1),
            crew: Crew::alone(),
        }
    }

    fn from_source(
        source: &WeightSource<'_>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, EngineError> {
        let loaded = loading::load(source, options, progress)?;
        Ok(Self {
            transformer: loaded.forwards,
            blocks: BlockPool::new(loaded.num_blocks),
            kv_dtype: loaded.kv_dtype,
            devices: loaded.devices,
            crew: Crew::new(options.threads),
        })
    }

    /// What the model runs on: a device per rank, so more than one where it is split.
    pub fn devices(&self) -> &[DeviceInfo] {
        &self.devices
    }

    /// The threads for what the host does between forwards; of a model by a script the caller's alone.
    pub fn crew(&self) -> Crew {
        self.crew.clone()
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
        let mut sequence = self.empty_sequence(max_tokens)?;
        sequence.reserve(max_tokens)?;
        Ok(sequence)
    }

    /// Opens an empty sequence that may grow to `max_tokens` and holds no KV block yet: see [`Sequence::reserve`].
    ///
    /// # Errors
    /// [`EngineError::ContextTooLong`].
    pub fn empty_sequence(&self, max_tokens: usize) -> Result<Sequence, EngineError> {
        let max = self.config().max_context;
        if max_tokens > max {
            return Err(EngineError::ContextTooLong {
                len: max_tokens,
                max,
            });
        }
        Ok(self.blocks.sequence(max_tokens))
    }

    /// (used, total) KV blocks; reserved blocks count as used, those of prefixes that nobody uses do not.
    pub fn kv_blocks(&self) -> (usize, usize) {
        (self.blocks.used(), self.blocks.total())
    }

    /// A handle that answers [`Model::kv_blocks`] from other threads.
    pub fn block_pool(&self) -> Arc<BlockPool> {
        Arc::clone(&self.blocks)
    }

    /// Takes over what others have left of `prompt` behind what the sequence holds, if it ends with a chunk: whole chunks of
    /// [`crate::CHUNK_TOKENS`], in place of blocks reserved for them; then, if that makes them all and the sequence has blocks for
    /// it, what the prompt has beyond them. Gives the new length.
    ///
    /// `prompt`: tokens from the beginning of the sequence on.
    ///
    /// # Errors
    /// When the sequence is another model's, or the device cannot copy; the sequence is as good as before.
    pub fn adopt(&mut self, sequence: &mut Sequence, prompt: &[u32]) -> Result<usize, EngineError> {
        self.check_owner(sequence)?;
        sequence.adopt(prompt, |copies| self.transformer.copy_blocks(copies))
    }

    /// Leaves to others what the sequence holds of `prompt`: whole chunks of [`crate::CHUNK_TOKENS`] and, if it holds exactly the
    /// prompt, what that has beyond them. The caller vouches that each was computed by a dense pass of its own over exactly
    /// these tokens.
    ///
    /// `prompt`: tokens from the beginning of the sequence on.
    ///
    /// # Errors
    /// When the sequence is another model's, or the device cannot copy.
    pub fn publish(&mut self, sequence: &mut Sequence, prompt: &[u32]) -> Result<(), EngineError> {
        self.check_owner(sequence)?;
        sequence.publish(prompt, |copies| self.transformer.copy_blocks(copies))
    }

    fn check_owner(&self, sequence: &Sequence) -> Result<(), EngineError> {
        if sequence.belongs_to(&self.blocks) {
            return Ok(());
        }
        Err(EngineError::InvalidArgument {
            what: "sequence",
            reason: "it belongs to another model".to_owned(),
        })
    }

    /// Runs one step of every sequence in the batch, in order. Results do not depend on what else is in the batch.
    ///
    /// # Errors
    /// On any error no sequence's length has changed.
    pub fn forward(&mut self, steps: &mut [Step<'_>]) -> Result<Vec<StepOutput>, EngineError> {
        for step in steps.iter() {
            self.check(step)?;
        }
        let outputs = self.transformer.forward(steps)?;
        for step in steps {
            step.sequence.extend(step.tokens.len());
        }
        Ok(outputs)
    }

    /// Runs one step whose reads `chooser` chooses layer by layer; the step's own lists are not looked at.
    ///
    /// # Errors
    /// As [`Model::forward`], and [`EngineError::InvalidArgument`] where no keys are offered.
    ///
    /// # Panics
    /// When the chooser lists positions that are not cached.
    pub fn forward_choosing(
        &mut self,
        step: &mut Step<'_>,
        chooser: &mut dyn KeyChooser,
    ) -> Result<StepOutput, EngineError> {
        step.lists = None;
        self.check(step)?;
        let output = self.transformer.forward_choosing(step, chooser)?;
        let output = output.ok_or_else(|| EngineError::InvalidArgument {
            what: "chooser",
            reason: "neither a GPU nor a split model offers keys".to_owned(),
        })?;
        step.sequence.extend(step.tokens.len());
        Ok(output)
    }

    /// Everything the kernels rely on.
    fn check(&self, step: &Step<'_>) -> Result<(), EngineError> {
        let config = self.config();
        let invalid = |what, reason| Err(EngineError::InvalidArgument { what, reason });
        let past = step.sequence.len();
        self.check_owner(step.sequence)?;
        if step.tokens.is_empty() {
            return invalid("step", "it has no tokens".to_owned());
        }
        if past + step.tokens.len() > step.sequence.capacity() {
            return Err(EngineError::ContextTooLong {
                len: past + step.tokens.len(),
                max: step.sequence.capacity(),
            });
        }
        if past + step.tokens.len() > step.sequence.room() {
            let reason = format!("it has blocks for {} tokens", step.sequence.room());
            return invalid("sequence", reason);
        }
        let vocab_size = config.vocab_size;
        if let Some(&token) = step.tokens.iter().find(|&&t| t as usize >= vocab_size) {
            return Err(EngineError::InvalidToken { token, vocab_size });
        }
        if let Some(layer) = step.capture.iter().find(|&&l| l >= config.num_layers) {
            return invalid("capture", format!("layer {layer} of {}", config.num_layers));
        }
        let is_empty = |select: &&RowSelection| {
            let mut rows = select.rows.iter();
            select.rows.is_empty() || rows.any(|row| row.terms.is_empty())
        };
        if step.select.as_ref().is_some_and(is_empty) {
            return invalid("selection", "it has no rows, or an empty one".to_owned());
        }
        if let Some(select) = step.select {
            let positions = past + step.tokens.len();
            if select.round.context_len > positions {
                let reason = format!("a round of {} of {positions}", select.round.context_len);
                return invalid("selection", reason);
            }
            let mut spreads = select.rows.iter().filter_map(|row| row.spread);
            if let Some(spread) =
                spreads.find(|s| !(0.0..1.0).contains(&s.share) || s.reach > MAX_REACH)
            {
                return invalid("selection", format!("{spread:?} is out of range"));
            }
        }
        let rows = step.select.iter().flat_map(|select| &select.rows);
        let outside = |t: &&MixedHead| {
            t.layer as usize >= config.num_layers || t.head as usize >= config.num_heads
        };
        if let Some(term) = rows.flat_map(|row| &row.terms).find(outside) {
            return invalid("selection", format!("{term:?} names no head"));
        }
        let unknown = |&&(token, _): &&(u32, f32)| token as usize >= config.vocab_size;
        if let Some(&(token, _)) = step.bias.iter().find(unknown) {
            return invalid("bias", format!("token {token} is not in the vocabulary"));
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
            if let Some(list) = lists.lists.iter().find(|list| list.len() > past) {
                let reach = list.len();
                return invalid(
                    "lists",
                    format!("they must lie below {past}, and one reaches {reach}"),
                );
            }
        }
        Ok(())
    }
}
