//! Which checkpoint folders to run: the ones given, by path or by name, or the bundled pair.

use std::path::{Path, PathBuf};

use specattn_hub::Wanted;

use crate::args::ModelArgs;
use crate::error::CliError;

/// Where the bundled pair may be: in the source tree this program was built from, or below the current folder.
const BUNDLE_FOLDERS: [&str; 2] = [concat!(env!("CARGO_MANIFEST_DIR"), "/../models"), "models"];

/// The checkpoint folders of one process. Where the target's weights are random, its folder has the tokenizer alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFolders {
    /// The target's.
    pub target: PathBuf,
    /// The draft's; `None`: the target decodes alone.
    pub draft: Option<PathBuf>,
}

impl ModelFolders {
    /// Finds the folders, and fetches what is named and not here. The bundled draft goes with the bundled target only: another target has another tokenizer.
    ///
    /// # Errors
    /// [`CliError::Usage`] when a folder holds no checkpoint, or the bundled pair is wanted and not found; [`CliError::Hub`]
    /// when what is named is not to be had.
    pub fn find(args: &ModelArgs, with_draft: bool) -> Result<Self, CliError> {
        Self::find_in(args, with_draft, &BUNDLE_FOLDERS)
    }

    fn find_in(args: &ModelArgs, with_draft: bool, bundles: &[&str]) -> Result<Self, CliError> {
        let bundled = |role: &str, flag: &'static str| {
            let folders = bundles.iter().map(|bundle| Path::new(bundle).join(role));
            folders
                .filter_map(|folder| folder.canonicalize().ok())
                .find(|folder| is_checkpoint(folder))
                .ok_or_else(|| {
                    CliError::Usage(format!(
                        "the bundled models are neither in {}: name checkpoint folders with {flag}",
                        bundles.join(" nor in ")
                    ))
                })
        };
        let given = |folder: &PathBuf, flag: &str| {
            let folder = specattn_hub::folder(folder, Wanted::Checkpoint)?;
            if is_checkpoint(&folder) {
                return Ok(folder);
            }
            Err(CliError::Usage(format!(
                "{flag} {}: neither a checkpoint folder (with a config.json) nor ORG/NAME of the hub",
                folder.display()
            )))
        };
        let target = match &args.target {
            Some(folder) => given(folder, "--target")?,
            None => bundled("target", "--target and --draft")?,
        };
        let draft = match &args.draft {
            _ if !with_draft || args.random_weights.is_some() => None,
            Some(folder) => Some(given(folder, "--draft")?),
            None if args.target.is_some() => None,
            None => Some(bundled("draft", "--target and --draft")?),
        };
        Ok(Self { target, draft })
    }
}

fn is_checkpoint(folder: &Path) -> bool {
    folder.join("config.json").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(target: Option<&Path>, draft: Option<&Path>) -> ModelArgs {
        ModelArgs {
            target: target.map(Path::to_owned),
            draft: draft.map(Path::to_owned),
            ..ModelArgs::default()
        }
    }

    #[test]
    fn the_bundled_pair_is_found() {
        let folders = ModelFolders::find(&args(None, None), true).unwrap();
        assert!(folders.target.ends_with("models/target"));
        assert!(folders.draft.unwrap().ends_with("models/draft"));
        let alone = ModelFolders::find(&args(None, None), false).unwrap();
        assert_eq!(alone.draft, None);
        let random = ModelArgs {
            random_weights: Some("config.json".into()),
            ..args(None, None)
        };
        let random = ModelFolders::find(&random, true).unwrap();
        assert_eq!((random.target, random.draft), (alone.target, None));
    }

    #[test]
    fn a_given_target_comes_without_the_bundled_draft() {
        let folder = tempfile::tempdir().unwrap();
        let missing = ModelFolders::find(&args(Some(folder.path()), None), true);
        assert!(missing.unwrap_err().to_string().contains("--target"));
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let found = ModelFolders::find(&args(Some(folder.path()), None), true).unwrap();
        assert_eq!(found.draft, None);
    }

    #[test]
    fn a_missing_bundle_names_the_flags() {
        let error = ModelFolders::find_in(&args(None, None), true, &["/nowhere/models"]);
        let error = error.unwrap_err();
        assert_eq!(error.exit_code(), crate::error::EXIT_USAGE);
        assert!(
            error.to_string().contains("--target and --draft"),
            "{error}"
        );
    }
}
