//! [`RepoName`]: `ORG/NAME` with an optional `@REVISION`.

use std::fmt;
use std::str::FromStr;

/// Longest organisation, name or revision, in bytes.
const MAX_PART: usize = 96;

/// The branch that is meant where none is named.
const DEFAULT_REVISION: &str = "main";

/// A model repository of the hub, at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoName {
    repo: String,
    revision: String,
}

impl RepoName {
    /// `ORG/NAME`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// A branch, a tag or a commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

/// Why a text is no repository's name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the form ORG/NAME or ORG/NAME@REVISION")]
pub struct NotAName;

impl FromStr for RepoName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (organisation, name) = repo.split_once('/').ok_or(NotAName)?;
        // A branch may have parts of its own, as refs/pr/1 has.
        let mut parts = [organisation, name].into_iter().chain(revision.split('/'));
        if parts.all(is_plain) {
            Ok(Self {
                repo: repo.to_owned(),
                revision: revision.to_owned(),
            })
        } else {
            Err(NotAName)
        }
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.repo)?;
        if self.revision != DEFAULT_REVISION {
            write!(formatter, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// Whether a part of a name is safe as one part of a path and of a URL.
fn is_plain(part: &str) -> bool {
    let begins_well = part.starts_with(|c: char| c.is_ascii_alphanumeric());
    let of_letters = part
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    begins_well && of_letters && part.len() <= MAX_PART && !part.contains("..")
}

/// Whether this is the hash of a commit.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, repo, revision) in [
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", "main"),
            ("a/b@v1.0", "a/b", "v1.0"),
            ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ] {
            let name: RepoName = text.parse().unwrap();
            assert_eq!((name.repo(), name.revision()), (repo, revision));
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn paths_and_nonsense_are_no_names() {
        let long = format!("a/{}", "b".repeat(97));
        for text in [
            "", "a", "/a/b", "./a", "../a", "a/..", "a/../b", "a/b/c", "a/b@", "a/b@../c",
            "a/b@/c", "a b/c", "a/b?x=1", "~/models", &long,
        ] {
            assert!(text.parse::<RepoName>().is_err(), "{text}");
        }
    }
}
