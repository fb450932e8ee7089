//! Everything that can go wrong between a repository's name and its folder.

use std::path::PathBuf;

/// Why a repository's files are not there.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The hub refuses.
    #[error(
        "the hub refuses {repo} ({status}): it is private, gated or does not exist; HF_TOKEN is shown where it is set"
    )]
    Refused {
        /// The repository.
        repo: String,
        /// HTTP's word: 401 or 403.
        status: u16,
    },
    /// There is no such thing at the hub.
    #[error("the hub has no {what}")]
    NotFound {
        /// A repository, a revision or a file.
        what: String,
    },
    /// The hub cannot be asked, or fails.
    #[error("the hub does not deliver {what}: {reason}")]
    Unavailable {
        /// What was asked for.
        what: String,
        /// Why.
        reason: String,
    },
    /// The hub may not be asked, and the cache is not enough.
    #[error("HF_HUB_OFFLINE is set, and the cache has no {what}")]
    Offline {
        /// What is missing.
        what: String,
    },
    /// The repository is not one that can be run.
    #[error("{repo} is no checkpoint of ours: {reason}")]
    NoCheckpoint {
        /// The repository.
        repo: String,
        /// What is wrong.
        reason: String,
    },
    /// The hub's answers contradict themselves or are dangerous.
    #[error("the hub's answer about {what} is not to be trusted: {reason}")]
    Untrusted {
        /// What was asked for.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The cache cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
}

impl HubError {
    /// A short stable name.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "hub_refused",
            Self::NotFound { .. } => "hub_not_found",
            Self::Unavailable { .. } => "hub_unavailable",
            Self::Offline { .. } => "hub_offline",
            Self::NoCheckpoint { .. } => "hub_no_checkpoint",
            Self::Untrusted { .. } => "hub_untrusted",
            Self::Io { .. } => "hub_io",
        }
    }
}
