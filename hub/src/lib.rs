//! Checkpoints by name: wherever a program takes a checkpoint folder it also takes `ORG/NAME` or `ORG/NAME@REVISION`, a
//! repository of the Hugging Face hub.
//!
//! [`folder`] turns what the command line says into a folder. A repository's files go into the hub's own cache, in its layout,
//! so that other programs find them there; a folder comes back once every file that a checkpoint needs is in it, whole. What
//! the hub answers is not trusted: paths may not leave the snapshot, and a file of another length than announced is no file.
#![forbid(unsafe_code)]

mod error;
mod fetch;
mod name;
mod settings;
mod wanted;

use std::path::{Path, PathBuf};

pub use error::HubError;
pub use name::RepoName;
pub use settings::Settings;
pub use wanted::Wanted;

/// The folder that `given` names: itself where there is such a folder, or a repository's, which is fetched where it is not in
/// the cache.
///
/// # Errors
/// [`HubError`]; something that is neither a folder nor a repository's name is taken for a folder, and whoever opens it says
/// that it is missing.
pub fn folder(given: &Path, wanted: Wanted) -> Result<PathBuf, HubError> {
    folder_with(given, wanted, &Settings::from_env())
}

/// The same with other settings than the environment's.
///
/// # Errors
/// As above.
pub fn folder_with(given: &Path, wanted: Wanted, settings: &Settings) -> Result<PathBuf, HubError> {
    match repository(given) {
        Some(name) => fetch::snapshot(&name, wanted, settings),
        None => Ok(given.to_owned()),
    }
}

/// The repository that `given` names, unless it is a path of this machine.
pub fn repository(given: &Path) -> Option<RepoName> {
    if given.exists() {
        return None;
    }
    given.to_str()?.parse().ok()
}

/// The folder of a repository that is whole in the cache already.
pub fn cached(name: &RepoName, wanted: Wanted, settings: &Settings) -> Option<PathBuf> {
    fetch::cached(name, wanted, settings).ok()
}
