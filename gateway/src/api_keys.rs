//! [`ApiKeys`]: the clients that a gateway knows, from a file of hashed keys that may be changed while it runs.
//!
//! ```json
//! {"keys": [{"name": "alice", "sha256": "9f86…", "requests_per_minute": 60, "expires": "2027-01-01T00:00:00Z"}]}
//! ```
//!
//! Keys are 256 random bits, so a plain hash of one tells nobody the key. Whoever can read the file cannot call; whoever
//! can write it can.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use specattn_service::{ServiceError, Watched};
use subtle::{ConditionallySelectable, ConstantTimeEq};

/// Most keys of a file: each is compared with every key that is shown.
const MOST_KEYS: usize = 4_096;

/// Longest name of a key, in bytes.
const MOST_NAME_BYTES: usize = 128;

/// What a key begins with, so that one that leaked can be recognised.
const PREFIX: &str = "sk-specattn-";

/// Digits of keys behind the prefix: 256 bits in steps of five.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const LENGTH: usize = 52;

/// What a key may be used for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// Who has it. Sessions belong to a name: a new key of the same name reaches those of the old one.
    pub name: String,
    /// SHA-256 of the key, in hex.
    pub sha256: String,
    /// RFC 3339 time from which on the key is refused; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
    /// May see all sessions and workers, and read metrics.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub operator: bool,
    /// What the key may use.
    #[serde(flatten)]
    pub limits: KeyLimits,
}

/// How much a key may be used; absent: as much as the gateway gives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyLimits {
    /// Requests a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Requests at a time, waiting ones included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrent_requests: Option<u32>,
    /// Tokens a minute, of prompts and completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
}

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFile {
    /// In any order.
    pub keys: Vec<ApiKey>,
}

/// A key as requests are checked against it.
#[derive(Debug)]
pub(crate) struct KnownKey {
    digest: [u8; 32],
    pub(crate) name: Arc<str>,
    pub(crate) operator: bool,
    pub(crate) limits: KeyLimits,
    expires: Option<SystemTime>,
}

/// The keys of a file.
#[derive(Debug, Clone)]
pub(crate) struct ApiKeys(Arc<Watched<Vec<Arc<KnownKey>>>>);

impl KeyFile {
    /// Reads a file's text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let file: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        file.known()?;
        Ok(file)
    }

    fn known(&self) -> Result<Vec<Arc<KnownKey>>, String> {
        if self.keys.len() > MOST_KEYS {
            return Err(format!("holds more than {MOST_KEYS} keys"));
        }
        let digests: BTreeSet<_> = self
            .keys
            .iter()
            .map(|key| key.sha256.to_lowercase())
            .collect();
        if digests.len() < self.keys.len() {
            return Err("holds a key twice".to_owned());
        }
        self.keys
            .iter()
            .map(|key| {
                let known = key.known();
                known
                    .map(Arc::new)
                    .map_err(|reason| format!("key {:?} {reason}", key.name))
            })
            .collect()
    }
}

impl ApiKey {
    /// A new key of this name, and its text, which is kept nowhere.
    ///
    /// # Errors
    /// A name that is empty, too long, or holds anything but letters, digits and `.`, `_`, `-`, `@`.
    pub fn generate(name: &str) -> Result<(Self, String), String> {
        let text: String = (0..LENGTH)
            .map(|_| char::from(DIGITS[usize::from(rand::random::<u8>() % 32)]))
            .collect();
        let text = format!("{PREFIX}{text}");
        let key = Self {
            name: name.to_owned(),
            sha256: hex(&Sha256::digest(text.as_bytes())),
            ..Self::default()
        };
        key.known()?;
        Ok((key, text))
    }

    fn known(&self) -> Result<KnownKey, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
        if !(1..=MOST_NAME_BYTES).contains(&self.name.len()) || !self.name.bytes().all(plain) {
            return Err(format!(
                "has no name of 1 to {MOST_NAME_BYTES} letters, digits, '.', '_', '-' and '@'"
            ));
        }
        let digest = unhex(&self.sha256).ok_or("has no SHA-256 of 64 hex digits")?;
        let expires = self
            .expires
            .as_deref()
            .map(humantime::parse_rfc3339)
            .transpose();
        let limits = [
            self.limits.requests_per_minute,
            self.limits.concurrent_requests,
            self.limits.tokens_per_minute,
        ];
        if limits.contains(&Some(0)) {
            return Err("has a limit of 0: take the key away instead".to_owned());
        }
        Ok(KnownKey {
            digest,
            name: self.name.as_str().into(),
            operator: self.operator,
            limits: self.limits,
            expires: expires
                .map_err(|error| format!("has no RFC 3339 time in expires: {error}"))?,
        })
    }
}

impl ApiKeys {
    /// The keys in the file at `path`.
    ///
    /// # Errors
    /// [`ServiceError::File`] when it cannot be read or makes no sense.
    pub(crate) fn load(path: &Path) -> Result<Self, ServiceError> {
        let watched = Watched::load(vec![path.to_owned()], |contents| {
            KeyFile::parse(&contents[0])?.known()
        });
        Ok(Self(Arc::new(watched?)))
    }

    /// The key whose text this is. Every key is compared, so that the time tells nothing of where one was found.
    ///
    /// # Errors
    /// Why it is refused.
    pub(crate) fn find(&self, text: &str, now: SystemTime) -> Result<Arc<KnownKey>, &'static str> {
        let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        let keys = self.0.current();
        // There are far fewer keys than 2^32.
        let found = (0_u32..)
            .zip(keys.iter())
            .fold(u32::MAX, |found, (index, key)| {
                u32::conditional_select(&found, &index, key.digest.ct_eq(&digest))
            });
        let key = keys.get(found as usize).ok_or("the API key is not known")?;
        if key.expires.is_some_and(|expires| expires <= now) {
            return Err("the API key has expired");
        }
        Ok(Arc::clone(key))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_generated_key_is_found_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        let (alice, text) = ApiKey::generate("alice").unwrap();
        let (mut bob, late) = ApiKey::generate("bob").unwrap();
        assert_ne!(text, late);
        assert!(text.starts_with(PREFIX) && text.len() == PREFIX.len() + LENGTH);
        let now = SystemTime::now();
        bob.expires = Some(humantime::format_rfc3339(now + Duration::from_secs(60)).to_string());
        let file = KeyFile {
            keys: vec![alice, bob],
        };
        let written = serde_json::to_string(&file).unwrap();
        assert!(!written.contains(&text));
        std::fs::write(&path, written).unwrap();
        let keys = ApiKeys::load(&path).unwrap();
        assert_eq!(&*keys.find(&text, now).unwrap().name, "alice");
        assert_eq!(&*keys.find(&late, now).unwrap().name, "bob");
        assert!(keys.find(&late, now + Duration::from_secs(61)).is_err());
        for wrong in ["", "sk-specattn-", &text[1..], &text.to_uppercase()] {
            assert!(keys.find(wrong, now).is_err());
        }
    }

    #[test]
    fn files_that_make_no_sense_are_refused() {
        let (key, _) = ApiKey::generate("x").unwrap();
        let with = |change: fn(&mut ApiKey)| {
            let mut key = key.clone();
            change(&mut key);
            serde_json::to_vec(&KeyFile { keys: vec![key] }).unwrap()
        };
        assert!(KeyFile::parse(&with(|_| {})).is_ok());
        let changes: [fn(&mut ApiKey); 5] = [
            |key| key.name = String::new(),
            |key| key.name = "a\nb".to_owned(),
            |key| key.sha256 = "12".to_owned(),
            |key| key.expires = Some("tomorrow".to_owned()),
            |key| key.limits.tokens_per_minute = Some(0),
        ];
        for change in changes {
            assert!(KeyFile::parse(&with(change)).is_err());
        }
        let twice = KeyFile {
            keys: vec![key.clone(), key],
        };
        assert!(KeyFile::parse(&serde_json::to_vec(&twice).unwrap()).is_err());
        for text in [
            "",
            "[]",
            "{}",
            r#"{"keys": [{"name": "x"}]}"#,
            r#"{"keys": [], "more": 1}"#,
        ] {
            assert!(KeyFile::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
