//! What can keep a gateway from running. Requests fail with [`specattn_proto::Fault`] instead.

use std::path::PathBuf;

use specattn_hub::HubError;
use specattn_service::ServiceError;

/// A failure to start or run the gateway. [`GatewayError::label`] gives a short name for metrics.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The tokenizer's files are not to be had.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The tokenizer cannot be loaded.
    #[error("cannot load the tokenizer {path}: {reason}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The chat template cannot be used.
    #[error("cannot use the chat template {path}: {reason}")]
    ChatTemplate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An argument is out of range.
    #[error("{argument} {reason}")]
    Argument {
        /// The flag.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The session log cannot be opened.
    #[error("cannot keep a session log in {path}: {source}")]
    Log {
        /// Its folder.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// A background task died.
    #[error("a background task died: {0}")]
    Task(String),
    /// Serving failed.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

impl GatewayError {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Hub(error) => error.label(),
            Self::Tokenizer { .. } => "tokenizer",
            Self::ChatTemplate { .. } => "chat_template",
            Self::Argument { .. } => "argument",
            Self::Log { .. } => "log",
            Self::Task(_) => "task",
            Self::Service(error) => error.label(),
        }
    }
}
