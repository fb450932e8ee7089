//! Everything that can go wrong while measuring.

use std::path::PathBuf;

use specattn_engine::EngineError;
use specattn_mask::MaskError;

/// A failure of calibration or evaluation.
#[derive(Debug, thiserror::Error)]
pub enum QualityError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The tokenizer could not be loaded, or took no text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A text is too short for what was asked of it.
    #[error("{path} has {found} tokens, {wanted} are needed")]
    ShortText {
        /// The file.
        path: PathBuf,
        /// Tokens in it.
        found: usize,
        /// Tokens needed.
        wanted: usize,
    },
    /// An option is out of range.
    #[error("{what}: {reason}")]
    InvalidOption {
        /// The option.
        what: &'static str,
        /// Why it cannot be.
        reason: String,
    },
    /// What a service makes of masks failed.
    #[error("masks as served: {0}")]
    Served(String),
    /// A model failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A mask or a layer map failed.
    #[error(transparent)]
    Mask(#[from] MaskError),
}

impl QualityError {
    /// A short stable name.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::Tokenizer(_) => "tokenizer",
            Self::ShortText { .. } => "short_text",
            Self::InvalidOption { .. } => "invalid_option",
            Self::Served(_) => "served",
            Self::Engine(error) => error.label(),
            Self::Mask(error) => error.label(),
        }
    }
}
