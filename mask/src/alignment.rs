//! `alignment.json`: a calibrated layer map on disk, beside the target's checkpoint.
//!
//! ```json
//! {
//!   "version": 2,
//!   "target": { "checkpoint_hash": "…", "layers": 8, "heads": 2 },
//!   "draft": { "checkpoint_hash": "…", "layers": 3, "heads": 3 },
//!   "text": { "files": [ { "name": "book.txt", "sha256": "…" } ], "tokens": 65536 },
//!   "metric": "KL(target || source), nats, mean over rows",
//!   "sources": [ { "terms": [ { "layer": 0, "head": 1, "weight": 1.0 } ], "p_offset": -0.5, "spread": 0.5 } ],
//!   "of_head": [ [ 0, 0 ], … ],
//!   "divergences": [ [ 0.31, 0.27 ], … ],
//!   "memory": { "decay": 0.9, "p_offset": [ [ 1.0, 0.5 ], … ] }
//! }
//! ```
//!
//! `heads` are KV heads of the target and query heads of the draft. `of_head`, `divergences` and
//! the memory's `p_offset` are `[target layers][target KV heads]`. `memory` may be absent, and of a source `p_offset`,
//! then 0, and `spread`, then a union. Fields that this version does not know are an error.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::MaskError;
use crate::layer_map::{LayerMap, PairShape, check_shape, invalid};
use crate::memory::MemoryRule;
use crate::source::Source;

/// The file's name beside the target's checkpoint.
pub const FILE_NAME: &str = "alignment.json";

/// Version of the format written here, and the only one read.
pub const VERSION: u64 = 2;

/// Where a layer map comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// The target it was measured on; `heads` counts KV heads.
    pub target: ModelIdentity,
    /// The draft it was measured on; `heads` counts query heads.
    pub draft: ModelIdentity,
    /// The text it was measured on.
    pub text: CalibrationText,
    /// What `divergences` measure, and their unit.
    pub metric: String,
    /// `[target layers][target KV heads]`: divergence of each head from its source.
    pub divergences: Vec<Vec<f32>>,
}

/// A checkpoint, as far as a layer map depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// SHA-256 over config.json and the safetensors headers, lower-case hex.
    pub checkpoint_hash: String,
    /// Transformer layers.
    pub layers: u32,
    /// Heads per layer: KV heads of a target, query heads of a draft.
    pub heads: u32,
}

/// The text a map was calibrated on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationText {
    /// The files, in order.
    pub files: Vec<TextFile>,
    /// Tokens measured.
    pub tokens: u64,
}

/// One file of calibration text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextFile {
    /// The file's name, without folders.
    pub name: String,
    /// SHA-256 of its bytes, lower-case hex.
    pub sha256: String,
}

impl Calibration {
    /// Checks shapes against the pair's.
    pub(crate) fn validate(&self, pair: &PairShape) -> Result<(), MaskError> {
        let target = (self.target.layers, self.target.heads);
        let draft = (self.draft.layers, self.draft.heads);
        if target != (pair.target_layers, pair.target_kv_heads)
            || draft != (pair.draft_layers, pair.draft_heads)
        {
            return invalid(format!(
                "calibrated on a target of {target:?} and a draft of {draft:?} (layers, heads), not on {pair:?}"
            ));
        }
        check_shape("divergences", &self.divergences, pair)?;
        match self.divergences.iter().flatten().find(|d| !d.is_finite()) {
            Some(d) => invalid(format!("divergence {d} is not finite")),
            None => Ok(()),
        }
    }

    /// Checks that the map was calibrated on these checkpoints.
    ///
    /// # Errors
    /// [`MaskError::InvalidMap`] names the one that differs.
    pub fn check_checkpoints(&self, target_hash: &str, draft_hash: &str) -> Result<(), MaskError> {
        let pairs = [
            ("target", &self.target.checkpoint_hash, target_hash),
            ("draft", &self.draft.checkpoint_hash, draft_hash),
        ];
        match pairs.into_iter().find(|(_, ours, given)| ours != given) {
            Some((role, ours, given)) => invalid(format!(
                "calibrated on the {role} checkpoint {ours}, not on {given}"
            )),
            None => Ok(()),
        }
    }
}

/// The file's layout.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u64,
    target: ModelIdentity,
    draft: ModelIdentity,
    text: CalibrationText,
    metric: String,
    sources: Vec<Source>,
    of_head: Vec<Vec<u32>>,
    divergences: Vec<Vec<f32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryRule>,
}

/// What is read first, so that a newer file is called newer and not malformed.
#[derive(Deserialize)]
struct Version {
    version: u64,
}

impl LayerMap {
    /// Reads the text of an alignment file and checks it against the shapes that it states itself; whether it fits the
    /// models at hand is for [`validate`](Self::validate) and [`Calibration::check_checkpoints`].
    ///
    /// # Errors
    /// [`MaskError::UnknownVersion`], [`MaskError::Json`], or what `validate` finds.
    pub fn from_json(text: &[u8]) -> Result<Self, MaskError> {
        let Version { version } = serde_json::from_slice(text)?;
        if version != VERSION {
            return Err(MaskError::UnknownVersion {
                what: FILE_NAME,
                found: version,
            });
        }
        let file: File = serde_json::from_slice(text)?;
        let shape = PairShape {
            target_layers: file.target.layers,
            target_kv_heads: file.target.heads,
            draft_layers: file.draft.layers,
            draft_heads: file.draft.heads,
        };
        let map = Self {
            sources: file.sources,
            of_head: file.of_head,
            memory: file.memory,
            calibration: Some(Calibration {
                target: file.target,
                draft: file.draft,
                text: file.text,
                metric: file.metric,
                divergences: file.divergences,
            }),
        };
        map.validate(&shape)?;
        Ok(map)
    }

    /// The text of the map's alignment file.
    ///
    /// # Errors
    /// [`MaskError::InvalidMap`] for a map without [`Calibration`]: proportional depth is not stored.
    pub fn to_json(&self) -> Result<String, MaskError> {
        let Some(calibration) = &self.calibration else {
            return invalid("it is not calibrated".into());
        };
        let Calibration {
            target,
            draft,
            text,
            metric,
            divergences,
        } = calibration.clone();
        let file = File {
            version: VERSION,
            target,
            draft,
            text,
            metric,
            sources: self.sources.clone(),
            of_head: self.of_head.clone(),
            divergences,
            memory: self.memory.clone(),
        };
        let mut json = serde_json::to_string_pretty(&file)?;
        json.push('\n');
        Ok(json)
    }

    /// Reads the alignment file at `path`; see [`from_json`](Self::from_json).
    ///
    /// # Errors
    /// [`MaskError::Io`] when it cannot be read, else as `from_json`.
    pub fn load(path: &Path) -> Result<Self, MaskError> {
        Self::from_json(&fs::read(path).map_err(|source| io(path, source))?)
    }

    /// Writes the map's alignment file to `path`, whole or not at all.
    ///
    /// # Errors
    /// [`MaskError::Io`] when it cannot be written, else as [`to_json`](Self::to_json).
    pub fn save(&self, path: &Path) -> Result<(), MaskError> {
        let json = self.to_json()?;
        let partial = path.with_extension("json.partial");
        fs::write(&partial, json).map_err(|source| io(&partial, source))?;
        fs::rename(&partial, path).map_err(|source| io(path, source))
    }
}

fn io(path: &Path, source: std::io::Error) -> MaskError {
    MaskError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calibrated() -> LayerMap {
        LayerMap {
            memory: Some(MemoryRule {
                decay: 0.5,
                p_offset: vec![vec![0.25, -1.0]; 8],
            }),
            calibration: Some(Calibration {
                target: ModelIdentity {
                    checkpoint_hash: "ab".into(),
                    layers: 8,
                    heads: 2,
                },
                draft: ModelIdentity {
                    checkpoint_hash: "cd".into(),
                    layers: 3,
                    heads: 3,
                },
                text: CalibrationText {
                    files: vec![TextFile {
                        name: "book.txt".into(),
                        sha256: "ef".into(),
                    }],
                    tokens: 6_144,
                },
                metric: "KL(target || source), nats".into(),
                divergences: vec![vec![0.25, 0.5]; 8],
            }),
            ..LayerMap::proportional(8, 2, 3, 3)
        }
    }

    #[test]
    fn saves_and_loads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let map = calibrated();
        map.save(&path).unwrap();
        assert_eq!(LayerMap::load(&path).unwrap(), map);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_file_is_an_io_error_that_names_it() {
        let error = LayerMap::load(Path::new("/nonexistent/alignment.json")).unwrap_err();
        assert_eq!(error.label(), "io");
        assert!(error.to_string().contains("alignment.json"));
    }

    #[test]
    fn newer_versions_are_named_even_when_their_fields_differ() {
        let error = LayerMap::from_json(br#"{"version": 3, "novel": true}"#).unwrap_err();
        assert!(matches!(error, MaskError::UnknownVersion { found: 3, .. }));
    }

    #[test]
    fn what_is_no_map_is_refused() {
        for text in ["", "[]", "{}", r#"{"version": 2}"#, r#"{"version": -1}"#] {
            let error = LayerMap::from_json(text.as_bytes()).unwrap_err();
            assert_eq!(error.label(), "json", "{text}");
        }
        let json = calibrated().to_json().unwrap();
        let lying = json.replace("\"layers\": 8", "\"layers\": 4294967295");
        assert_eq!(
            LayerMap::from_json(lying.as_bytes()).unwrap_err().label(),
            "invalid_map"
        );
    }

    #[test]
    fn proportional_maps_are_not_stored() {
        assert!(LayerMap::proportional(8, 2, 3, 3).to_json().is_err());
    }

    #[test]
    fn checkpoints_must_be_the_calibrated_ones() {
        let calibration = calibrated().calibration.unwrap();
        assert!(calibration.check_checkpoints("ab", "cd").is_ok());
        assert!(calibration.check_checkpoints("ab", "xx").is_err());
        assert!(calibration.check_checkpoints("xx", "cd").is_err());
    }
}
