//! Everything that can go wrong with masks.

use std::path::PathBuf;

/// A mask failure. [`MaskError::label`] gives a short name for metrics.
#[derive(Debug, thiserror::Error)]
pub enum MaskError {
    /// A policy field is out of range.
    #[error("mask policy: {field} must be {expected}")]
    InvalidPolicy {
        /// The field.
        field: &'static str,
        /// Its range, in words.
        expected: &'static str,
    },
    /// A source is not a mixture of the draft's heads.
    #[error("attention source: {0}")]
    InvalidSource(String),
    /// A row that a source mixes was not handed in.
    #[error("no attention row of draft layer {layer}, head {head}")]
    MissingRow {
        /// Draft layer.
        layer: u32,
        /// Draft query head.
        head: u32,
    },
    /// A layer map does not fit the models.
    #[error("layer map: {0}")]
    InvalidMap(String),
    /// A layer map's file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// A layer map's text is not of the known format.
    #[error("alignment file: {0}")]
    Json(#[from] serde_json::Error),
    /// An encoded mask or an alignment file is of a version this build does not know.
    #[error("unknown {what} version {found}")]
    UnknownVersion {
        /// What carries the version.
        what: &'static str,
        /// The version.
        found: u64,
    },
    /// An encoded mask breaks the format.
    #[error("malformed mask: {0}")]
    Malformed(&'static str),
    /// An encoded mask asks for more than the decoder's limits.
    #[error("mask {what} {value} exceeds the limit of {limit}")]
    LimitExceeded {
        /// The quantity.
        what: &'static str,
        /// The value in the mask.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The mask is a delta against one the decoder does not hold: ask for a full one.
    #[error("the mask is a delta against one that is not held")]
    MissingBase,
    /// The decoded mask is not the one that was encoded.
    #[error("mask checksum mismatch")]
    Checksum,
}

impl MaskError {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::InvalidPolicy { .. } => "invalid_policy",
            Self::InvalidSource(_) => "invalid_source",
            Self::MissingRow { .. } => "missing_row",
            Self::InvalidMap(_) => "invalid_map",
            Self::Io { .. } => "io",
            Self::Json(_) => "json",
            Self::UnknownVersion { .. } => "unknown_version",
            Self::Malformed(_) => "malformed",
            Self::LimitExceeded { .. } => "limit_exceeded",
            Self::MissingBase => "missing_base",
            Self::Checksum => "checksum",
        }
    }
}
