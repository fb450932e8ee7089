//! [`Secrets`]: what the parts of a cluster show each other, from a file that may be changed while they run.
//!
//! The file holds a secret a line. The first is shown to others, all are accepted from them: to change the secret, add the
//! new one below the old everywhere, then put it first everywhere, then take the old one away.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tonic::metadata::{Ascii, MetadataValue};

use crate::error::ServiceError;
use crate::watched::Watched;

/// Shortest secret: 32 hex digits are 128 bits.
const LEAST_CHARACTERS: usize = 32;

/// Longest secret, and longest credential that is looked at.
pub(crate) const MOST_CHARACTERS: usize = 512;

/// Most secrets of a file.
const MOST_SECRETS: usize = 16;

/// Secrets that open the same doors. Its `Debug` form shows none.
#[derive(Debug, Clone)]
pub struct Secrets(Arc<Watched<Parsed>>);

struct Parsed {
    /// `Bearer` and the first secret.
    shown: MetadataValue<Ascii>,
    digests: Vec<[u8; 32]>,
}

impl Secrets {
    /// The secrets in the file at `path`.
    ///
    /// # Errors
    /// [`ServiceError::File`] when there is none, or one that is no secret.
    pub fn load(path: &Path) -> Result<Self, ServiceError> {
        let watched = Watched::load(vec![path.to_owned()], |contents| {
            let text = std::str::from_utf8(&contents[0]).map_err(|_| "is no text".to_owned())?;
            parse(text)
        });
        Ok(Self(Arc::new(watched?)))
    }

    /// A secret that is in no file: an API key, or one that a process makes for itself.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(text: &str) -> Result<Self, String> {
        Ok(Self(Arc::new(Watched::fixed(parse(text)?))))
    }

    /// What to put into the metadata `authorization`.
    pub fn header(&self) -> MetadataValue<Ascii> {
        self.0.current().shown.clone()
    }

    /// Whether `shown` is one of them. How long this takes does not tell how much of a secret is right.
    pub fn accept(&self, shown: &str) -> bool {
        let digest: [u8; 32] = Sha256::digest(shown.as_bytes()).into();
        let digests = &self.0.current().digests;
        let any = digests
            .iter()
            .fold(Choice::from(0), |any, known| any | known.ct_eq(&digest));
        any.into()
    }
}

fn parse(text: &str) -> Result<Parsed, String> {
    let secrets: Vec<&str> = text.split_whitespace().collect();
    let Some(first) = secrets.first() else {
        return Err("holds no secret".to_owned());
    };
    if secrets.len() > MOST_SECRETS {
        return Err(format!("holds more than {MOST_SECRETS} secrets"));
    }
    let sound = |secret: &&str| {
        (LEAST_CHARACTERS..=MOST_CHARACTERS).contains(&secret.len())
            && secret.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if !secrets.iter().all(sound) {
        return Err(format!(
            "a secret must have {LEAST_CHARACTERS} to {MOST_CHARACTERS} ASCII characters"
        ));
    }
    let mut shown: MetadataValue<Ascii> = format!("Bearer {first}")
        .parse()
        .map_err(|_| "holds characters that cannot travel".to_owned())?;
    shown.set_sensitive(true);
    Ok(Parsed {
        shown,
        digests: secrets
            .iter()
            .map(|secret| Sha256::digest(secret.as_bytes()).into())
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "0123456789abcdef0123456789abcdef";
    const NEW: &str = "fedcba9876543210fedcba9876543210";

    #[test]
    fn the_first_is_shown_and_all_are_accepted() {
        let secrets = Secrets::of(&format!("{NEW}\n{OLD}\n")).unwrap();
        assert_eq!(secrets.header(), format!("Bearer {NEW}").as_str());
        assert!(secrets.header().is_sensitive());
        assert!(secrets.accept(OLD) && secrets.accept(NEW));
        assert!(!secrets.accept(&OLD[1..]) && !secrets.accept(""));
        let debug = format!("{secrets:?}");
        assert!(!debug.contains("0123") && !debug.contains("Bearer"));
    }

    #[test]
    fn what_is_no_secret_is_refused() {
        let long = "x".repeat(MOST_CHARACTERS + 1);
        let umlauts = "ä".repeat(32);
        let many = format!("{OLD}\n").repeat(MOST_SECRETS + 1);
        for bad in ["", "  \n", "short", &long, &umlauts, &many] {
            assert!(Secrets::of(bad).is_err(), "{bad:?}");
        }
    }
}
