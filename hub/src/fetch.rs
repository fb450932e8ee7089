//! Fetching a snapshot: every file that a checkpoint needs, whole, in the hub's cache.
//!
//! The branch or tag is looked up once, and all files are those of the commit that it points to. What the cache has already is
//! not fetched again; what broke off goes on where it broke off.

use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;

use crate::error::HubError;
use crate::name::{RepoName, is_commit};
use crate::settings::Settings;
use crate::wanted::{self, INDEX, SINGLE, Wanted};

/// Largest listing of a repository that is read: thousands of files.
const LISTING_BYTES: u64 = 8 << 20;

/// Times that a transfer that breaks off is taken up again.
const RETRIES: usize = 4;

/// Tries to have a file that another process is fetching, some six seconds each.
const PATIENCE: u32 = 600;

/// The folder of `name` with every file of `wanted`.
pub(crate) fn snapshot(
    name: &RepoName,
    wanted: Wanted,
    settings: &Settings,
) -> Result<PathBuf, HubError> {
    if settings.offline {
        return cached(name, wanted, settings);
    }
    // The client takes some things for granted that a server may not do.
    let fetched = catch_unwind(AssertUnwindSafe(|| fetch(name, wanted, settings)));
    let fetched = fetched.unwrap_or_else(|_| {
        Err(HubError::Untrusted {
            what: name.to_string(),
            reason: "it makes no sense".to_owned(),
        })
    });
    match fetched {
        Err(error @ HubError::Unavailable { .. }) => match cached(name, wanted, settings) {
            Ok(folder) => {
                tracing::warn!(%error, "the cache's copy serves instead");
                Ok(folder)
            }
            Err(_) => Err(error),
        },
        fetched => fetched,
    }
}

/// The same of what the cache has.
pub(crate) fn cached(
    name: &RepoName,
    wanted: Wanted,
    settings: &Settings,
) -> Result<PathBuf, HubError> {
    let missing = |what: &str| HubError::Offline {
        what: format!("{what} of {name}"),
    };
    let repo = repo(name, name.revision());
    let commit = if is_commit(name.revision()) {
        name.revision().to_owned()
    } else {
        let folder = settings.cache().path().join(repo.folder_name());
        let pointer = folder.join("refs").join(name.revision());
        let text = fs::read_to_string(pointer).map_err(|_| missing("snapshot"))?;
        text.trim().to_owned()
    };
    if !is_commit(&commit) {
        return Err(missing("readable pointer to a snapshot"));
    }
    let folder = settings.cache().repo(repo).pointer_path(&commit);
    let mut needed: Vec<String> = wanted.needed().iter().map(|f| (*f).to_owned()).collect();
    if wanted == Wanted::Checkpoint {
        match fs::read(folder.join(INDEX)) {
            Ok(index) => {
                needed.extend(wanted::shards(&index).map_err(|reason| unfit(name, reason))?)
            }
            Err(_) => needed.push(SINGLE.to_owned()),
        }
    }
    match needed.iter().find(|file| !folder.join(file).is_file()) {
        Some(file) => Err(missing(file)),
        None => Ok(folder),
    }
}

fn fetch(name: &RepoName, wanted: Wanted, settings: &Settings) -> Result<PathBuf, HubError> {
    let hub = Hub::look_up(name, settings)?;
    if let Some(file) = wanted.needed().iter().find(|file| !hub.has(file)) {
        return Err(unfit(name, format!("it has no {file}")));
    }
    for file in wanted.small().iter().filter(|file| hub.has(file)) {
        hub.bring(file)?;
    }
    if wanted == Wanted::Checkpoint {
        for file in hub.weights()? {
            hub.bring(&file)?;
        }
    }
    // Only now does the branch or tag point here: what it points to is whole.
    let pointing = settings.cache().repo(repo(name, name.revision()));
    pointing
        .create_ref(&hub.commit)
        .map_err(io_error(&hub.folder))?;
    Ok(hub.folder)
}

/// A commit of a repository: what is in it, and how to have it.
struct Hub<'a> {
    name: &'a RepoName,
    api: Api,
    repo: ApiRepo,
    commit: String,
    /// Files and, where the hub tells, their lengths.
    files: BTreeMap<String, Option<u64>>,
    /// Where they go.
    folder: PathBuf,
    settings: &'a Settings,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

impl<'a> Hub<'a> {
    /// Asks the hub what `name` is now.
    fn look_up(name: &'a RepoName, settings: &'a Settings) -> Result<Self, HubError> {
        let mut builder = ApiBuilder::from_cache(settings.cache())
            .with_progress(false)
            .with_retries(RETRIES);
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        if settings.token.is_some() {
            builder = builder.with_token(settings.token.clone());
        }
        let what = name.to_string();
        let explain = |error: ureq::Error| explain(name, &what, Box::new(error).into());
        let api = builder
            .build()
            .map_err(|error| self::explain(name, &what, error))?;
        let asked = api.repo(repo(name, name.revision()));
        let request = asked.info_request().query("blobs", "true");
        let mut response = request.call().map_err(explain)?;
        let body = response.body_mut().with_config().limit(LISTING_BYTES);
        let body = body.read_to_vec().map_err(explain)?;
        let untrusted = |reason: String| HubError::Untrusted {
            what: what.clone(),
            reason,
        };
        let listing: Listing =
            serde_json::from_slice(&body).map_err(|error| untrusted(error.to_string()))?;
        if !is_commit(&listing.sha) {
            return Err(untrusted("it names no commit".to_owned()));
        }
        let mut files = BTreeMap::new();
        for Sibling { rfilename, size } in listing.siblings {
            if !wanted::is_safe(&rfilename) {
                let shown = wanted::shown(&rfilename);
                return Err(untrusted(format!("{shown} is no path within it")));
            }
            files.insert(rfilename, size);
        }
        let at_commit = repo(name, &listing.sha);
        let folder = settings
            .cache()
            .repo(at_commit.clone())
            .pointer_path(&listing.sha);
        Ok(Self {
            name,
            repo: api.repo(at_commit),
            api,
            commit: listing.sha,
            files,
            folder,
            settings,
        })
    }

    fn has(&self, file: &str) -> bool {
        self.files.contains_key(file)
    }

    /// The files with the weights. The index, where there is one, is in the folder.
    fn weights(&self) -> Result<Vec<String>, HubError> {
        let no = |reason: String| unfit(self.name, reason);
        if !self.has(INDEX) {
            return match self.has(SINGLE) {
                true => Ok(vec![SINGLE.to_owned()]),
                false => Err(no("it has no weights as safetensors".to_owned())),
            };
        }
        let path = self.folder.join(INDEX);
        let index = fs::read(&path).map_err(io_error(&path))?;
        let shards = wanted::shards(&index).map_err(no)?;
        match shards.iter().find(|shard| !self.has(shard)) {
            Some(shard) => Err(no(format!("its index names {shard}, which it has not"))),
            None => Ok(shards.into_iter().collect()),
        }
    }

    /// Brings a file of the commit into the folder, unless it is there.
    fn bring(&self, file: &str) -> Result<(), HubError> {
        let path = self.folder.join(file);
        for _ in 0..PATIENCE {
            match self.length_there(&path) {
                Some(there) if self.announced(file).is_none_or(|size| size == there) => {
                    return Ok(());
                }
                Some(_) => self.forget(&path)?,
                None => {}
            }
            match self.transfer(file) {
                // Another process is at it; the try has waited for a while.
                Err(ApiError::LockAcquisition(_)) => {
                    tracing::info!(file, "another process is fetching this");
                }
                Err(error) => return Err(self.explain(file, error)),
                Ok(size) if self.length_there(&path) == Some(size) => return Ok(()),
                Ok(size) => {
                    let there = self.length_there(&path).unwrap_or_default();
                    self.forget(&path)?;
                    return Err(HubError::Untrusted {
                        what: self.what(file),
                        reason: format!("{there} bytes came, {size} were announced"),
                    });
                }
            }
        }
        Err(HubError::Unavailable {
            what: self.what(file),
            reason: "another process keeps it locked".to_owned(),
        })
    }

    /// Fetches a file; its length by the server's own word.
    fn transfer(&self, file: &str) -> Result<u64, ApiError> {
        let metadata = self.api.metadata(&self.repo.url(file))?;
        let size = metadata.size() as u64;
        // Both become parts of paths.
        if metadata.commit_hash() != self.commit {
            return Err(ApiError::InvalidHeader("x-repo-commit"));
        }
        if !wanted::is_safe(metadata.etag()) {
            return Err(ApiError::InvalidHeader("etag"));
        }
        if self
            .announced(file)
            .is_some_and(|announced| announced != size)
        {
            return Err(ApiError::InvalidHeader("content-range"));
        }
        let cached = self.settings.cache().repo(repo(self.name, &self.commit));
        let mut part = cached.blob_path(metadata.etag());
        part.set_extension("part");
        // Of a whole part there is nothing left to ask for, and the server would refuse.
        if fs::metadata(&part).is_ok_and(|part| part.len() >= size) {
            fs::remove_file(&part)?;
        }
        tracing::info!(repo = %self.name, file, bytes = size, "fetching");
        let bar = Bar::new(file, self.settings.quiet);
        self.repo.download_with_progress(file, bar)?;
        Ok(size)
    }

    /// The length that the listing tells.
    fn announced(&self, file: &str) -> Option<u64> {
        self.files.get(file).copied().flatten()
    }

    fn length_there(&self, path: &Path) -> Option<u64> {
        fs::metadata(path).ok().map(|there| there.len())
    }

    /// Takes a file of the wrong length, and what it points to, out of the cache.
    fn forget(&self, path: &Path) -> Result<(), HubError> {
        let blob = path.canonicalize().map_err(io_error(path))?;
        fs::remove_file(path).map_err(io_error(path))?;
        let within = self.settings.cache().path().canonicalize();
        if blob != path && within.is_ok_and(|cache| blob.starts_with(cache)) {
            // On systems without links the file was all there was.
            let _ = fs::remove_file(blob);
        }
        Ok(())
    }

    fn what(&self, file: &str) -> String {
        format!("{file} of {}", self.name)
    }

    fn explain(&self, file: &str, error: ApiError) -> HubError {
        explain(self.name, &self.what(file), error)
    }
}

/// `name` at a revision, in the client's words.
fn repo(name: &RepoName, revision: &str) -> Repo {
    Repo::with_revision(name.repo().to_owned(), RepoType::Model, revision.to_owned())
}

fn unfit(name: &RepoName, reason: String) -> HubError {
    HubError::NoCheckpoint {
        repo: name.to_string(),
        reason,
    }
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Io { path, source }
}

/// What went wrong with `what`, which belongs to `name`.
fn explain(name: &RepoName, what: &str, error: ApiError) -> HubError {
    let what = what.to_owned();
    match error {
        ApiError::RequestError(error) => match *error {
            ureq::Error::StatusCode(status @ (401 | 403)) => HubError::Refused {
                repo: name.to_string(),
                status,
            },
            ureq::Error::StatusCode(404) => HubError::NotFound { what },
            error => HubError::Unavailable {
                what,
                reason: error.to_string(),
            },
        },
        ApiError::TooManyRetries(error) => explain(name, &what, *error),
        error @ (ApiError::MissingHeader(_)
        | ApiError::InvalidHeader(_)
        | ApiError::ParseIntError(_)
        | ApiError::InvalidResume) => HubError::Untrusted {
            what,
            reason: error.to_string(),
        },
        error => HubError::Unavailable {
            what,
            reason: error.to_string(),
        },
    }
}

/// A bar on standard error, where that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(file: &str, quiet: bool) -> Self {
        if quiet || !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template(
            "{msg} [{bar:32}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left",
        )
        .expect("the template is well-formed");
        let bar = ProgressBar::no_length().with_style(style.progress_chars("=> "));
        Self(bar.with_message(file.to_owned()))
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, _file: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}
