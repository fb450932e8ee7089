//! [`PairReport`]: whether two checkpoints go together, before anything of them is loaded.

use std::fmt;
use std::path::Path;

use specattn_engine::checkpoint::Checkpoint;
use specattn_engine::{EngineError, ModelConfig};

use crate::error::CliError;
use crate::models::ModelFolders;
use crate::table::Table;

/// Characters of a hash that are shown.
const SHOWN: usize = 12;

/// Target and draft beside each other.
#[derive(Debug)]
pub struct PairReport {
    target: ModelConfig,
    draft: ModelConfig,
}

impl PairReport {
    /// Reads what two folders say of themselves.
    ///
    /// # Errors
    /// [`EngineError`] names the file that cannot be read.
    pub fn read(target: &Path, draft: &Path) -> Result<Self, EngineError> {
        Ok(Self {
            target: Checkpoint::open(target)?.config().clone(),
            draft: Checkpoint::open(draft)?.config().clone(),
        })
    }

    /// Whether a draft's tokens are the target's: by the tokenizers, where both have one, and the size of the vocabularies.
    pub fn fits(&self) -> bool {
        self.tokenizers_agree() && self.target.vocab_size == self.draft.vocab_size
    }

    fn tokenizers_agree(&self) -> bool {
        let hashes = [&self.target.tokenizer_hash, &self.draft.tokenizer_hash];
        hashes.iter().any(|hash| hash.is_empty()) || hashes[0] == hashes[1]
    }

    /// Positions that the draft cannot reach, though the target can.
    fn beyond_draft(&self) -> bool {
        self.draft.max_context < self.target.max_context
    }
}

impl fmt::Display for PairReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hash = |config: &ModelConfig| match config.tokenizer_hash.get(..SHOWN) {
            Some(start) => start.to_owned(),
            None => "none".to_owned(),
        };
        let verdict = |equal| if equal { "equal" } else { "DIFFER" };
        let (target, draft) = (&self.target, &self.draft);
        let beyond = format!(
            "beyond {} tokens the target decodes alone",
            draft.max_context
        );
        let contexts = if self.beyond_draft() { &beyond } else { "fit" };
        let mut table = Table::new(["", "target", "draft", ""]);
        let mut row = |cells: [&str; 4]| table.row(cells.map(str::to_owned));
        row(["model", &target.name, &draft.name, ""]);
        row([
            "tokenizer",
            &hash(target),
            &hash(draft),
            verdict(self.tokenizers_agree()),
        ]);
        row([
            "vocabulary",
            &target.vocab_size.to_string(),
            &draft.vocab_size.to_string(),
            verdict(target.vocab_size == draft.vocab_size),
        ]);
        row([
            "context",
            &target.max_context.to_string(),
            &draft.max_context.to_string(),
            contexts,
        ]);
        formatter.write_str(table.render("").trim_end())
    }
}

/// Refuses a pair that cannot work together, and warns of one that can only up to a length.
///
/// # Errors
/// [`CliError::Usage`] with the whole report; [`CliError::Start`] for a checkpoint that cannot be read.
pub fn check(folders: &ModelFolders) -> Result<(), CliError> {
    let Some(draft) = &folders.draft else {
        return Ok(());
    };
    let report = PairReport::read(&folders.target, draft).map_err(|error| CliError::Start {
        service: "pair of models",
        reason: error.to_string(),
    })?;
    if !report.fits() {
        return Err(CliError::Usage(format!(
            "these models do not go together, for their tokens are not the same:\n{report}"
        )));
    }
    if report.beyond_draft() {
        tracing::warn!("the draft's context is the shorter one:\n{report}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures")).join(name)
    }

    #[test]
    fn the_bundled_pair_fits() {
        let models = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models"));
        let report = PairReport::read(&models.join("target"), &models.join("draft")).unwrap();
        assert!(report.fits(), "{report}");
        let text = report.to_string();
        assert!(text.contains("equal") && !text.contains("DIFFER"), "{text}");
    }

    #[test]
    fn another_vocabulary_is_refused_with_a_report() {
        let models = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models"));
        let folders = ModelFolders {
            target: models.join("target"),
            draft: Some(fixture("checkpoints/llama2")),
        };
        let error = check(&folders).unwrap_err();
        assert_eq!(error.exit_code(), crate::error::EXIT_USAGE);
        let text = error.to_string();
        for wanted in ["tokens are not the same", "vocabulary", "DIFFER", "context"] {
            assert!(text.contains(wanted), "{text}");
        }
    }
}
