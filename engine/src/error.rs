//! Everything that can go wrong in the engine.

use std::path::PathBuf;

/// The label of the failure of a rank that others of its model have left.
pub(crate) const RANK_LEFT: &str = "rank_left";

/// An engine failure. [`EngineError::label`] gives a short name for metrics.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A checkpoint file could not be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// A checkpoint file does not hold what it must.
    #[error("{path}: {reason}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The checkpoint is of a kind the engine does not run.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// No free KV blocks.
    #[error("KV cache full: {wanted} blocks wanted, {free} of {total} free")]
    KvExhausted {
        /// Blocks asked for.
        wanted: usize,
        /// Blocks free.
        free: usize,
        /// Blocks in the pool.
        total: usize,
    },
    /// More tokens than the model's context.
    #[error("context too long: {len} tokens, the model takes {max}")]
    ContextTooLong {
        /// Tokens asked for.
        len: usize,
        /// The model's limit.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is not below the vocabulary size {vocab_size}")]
    InvalidToken {
        /// The id.
        token: u32,
        /// The limit.
        vocab_size: usize,
    },
    /// A caller's argument is out of range.
    #[error("invalid {what}: {reason}")]
    InvalidArgument {
        /// The argument.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The GPU, or what it needs, failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(Box<crate::cuda::CudaError>),
}

#[cfg(feature = "cuda")]
impl From<crate::cuda::CudaError> for EngineError {
    fn from(error: crate::cuda::CudaError) -> Self {
        Self::Cuda(Box::new(error))
    }
}

impl EngineError {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Unsupported(_) => "unsupported",
            Self::KvExhausted { .. } => "kv_exhausted",
            Self::ContextTooLong { .. } => "context_too_long",
            Self::InvalidToken { .. } => "invalid_token",
            Self::InvalidArgument { .. } => "invalid_argument",
            #[cfg(feature = "cuda")]
            Self::Cuda(error) => error.label(),
        }
    }
}
