//! [`Wanted`]: which files of a repository a checkpoint needs.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use serde::Deserialize;

/// The index of a checkpoint in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A checkpoint in one file.
pub(crate) const SINGLE: &str = "model.safetensors";

/// Files that a tokenizer is made of.
const TOKENIZER: [&str; 3] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// The small files of a checkpoint.
const CHECKPOINT: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "alignment.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
];

/// Longest path of a file, in bytes.
const MAX_PATH: usize = 255;

/// What of a checkpoint is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Everything that a worker and a gateway need.
    Checkpoint,
    /// What a gateway needs: tokenizer and chat template.
    Tokenizer,
}

impl Wanted {
    /// Files that must be there, weights left out.
    pub(crate) fn needed(self) -> &'static [&'static str] {
        match self {
            Self::Checkpoint => &["config.json", "tokenizer.json"],
            Self::Tokenizer => &["tokenizer.json"],
        }
    }

    /// Files that are taken where there are such, weights left out.
    pub(crate) fn small(self) -> &'static [&'static str] {
        match self {
            Self::Checkpoint => &CHECKPOINT,
            Self::Tokenizer => &TOKENIZER,
        }
    }
}

/// The names of the files that an index places tensors in.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index =
        serde_json::from_slice(index).map_err(|error| format!("{INDEX}: {error}"))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|shard| !is_plain(shard)) {
        Some(shard) => Err(format!("{INDEX} places tensors in {}", shown(shard))),
        None if shards.is_empty() => Err(format!("{INDEX} places no tensors")),
        None => Ok(shards),
    }
}

/// Whether this names a file of a folder itself.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let alone = matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    );
    alone && is_safe(name)
}

/// Whether a path stays within the folder that it begins in, on every system.
pub(crate) fn is_safe(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    !path.is_empty()
        && path.len() <= MAX_PATH
        && parts.all(|part| matches!(part, Component::Normal(_)))
        && !path.contains(|c: char| c == '\\' || c == ':' || c.is_control())
}

/// A name from elsewhere as a message may show it.
pub(crate) fn shown(name: &str) -> String {
    let start: String = name.chars().take(MAX_PATH).collect();
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_stay_in_their_folder() {
        let of =
            |shard: &str| shards(format!(r#"{{"weight_map": {{"a": {shard:?}}}}}"#).as_bytes());
        assert_eq!(of("model-1.safetensors").unwrap().len(), 1);
        for shard in [
            "../../etc/passwd",
            "/etc/passwd",
            "",
            ".",
            "..",
            "a/b",
            "a\\b",
            "c:x",
        ] {
            assert!(of(shard).is_err(), "{shard}");
        }
        assert!(shards(br#"{"weight_map": {}}"#).is_err());
        assert!(shards(b"[]").is_err());
    }

    #[test]
    fn paths_that_leave_are_not_safe() {
        assert!(is_safe("config.json") && is_safe("onnx/model.onnx"));
        for path in ["", "/a", "../a", "a/../../b", "a\\..\\b", "a\u{0}b", "./a"] {
            assert!(!is_safe(path), "{path:?}");
        }
    }
}
