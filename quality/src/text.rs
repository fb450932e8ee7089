//! [`Book`]: a text as tokens, and windows cut from it.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use specattn_mask::alignment::TextFile;
use tokenizers::Tokenizer;

use crate::error::QualityError;

/// A tokenised text file.
#[derive(Debug, Clone)]
pub struct Book {
    /// Where it came from.
    pub path: PathBuf,
    /// Its tokens, without any that begin a text.
    pub tokens: Vec<u32>,
    /// SHA-256 of the file, lower-case hex.
    pub sha256: String,
}

impl Book {
    /// Reads the text at `path` with the tokenizer of the checkpoint folder `checkpoint`.
    ///
    /// # Errors
    /// [`QualityError::Io`] or [`QualityError::Tokenizer`].
    pub fn read(checkpoint: &Path, path: &Path) -> Result<Self, QualityError> {
        let tokenizer = Tokenizer::from_file(checkpoint.join("tokenizer.json"))
            .map_err(|error| QualityError::Tokenizer(error.to_string()))?;
        let bytes = fs::read(path).map_err(|source| QualityError::Io {
            path: path.to_owned(),
            source,
        })?;
        let text = String::from_utf8_lossy(&bytes);
        let encoding = tokenizer
            .encode(text.as_ref(), false)
            .map_err(|error| QualityError::Tokenizer(error.to_string()))?;
        let sha256 = Sha256::digest(&bytes);
        Ok(Self {
            path: path.to_owned(),
            tokens: encoding.get_ids().to_vec(),
            sha256: sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// `count` windows of `len` tokens, spread evenly over the book without its first twentieth (title page, contents).
    ///
    /// # Errors
    /// [`QualityError::ShortText`] when the rest of the book holds no such window.
    pub fn windows(&self, len: usize, count: usize) -> Result<Vec<&[u32]>, QualityError> {
        let first = self.tokens.len() / 20;
        let last = self
            .tokens
            .len()
            .checked_sub(len)
            .filter(|&l| l >= first)
            .ok_or_else(|| QualityError::ShortText {
                path: self.path.clone(),
                found: self.tokens.len(),
                wanted: len + first,
            })?;
        Ok((0..count)
            .map(|i| first + (last - first) * i / count)
            .map(|start| &self.tokens[start..start + len])
            .collect())
    }

    /// The file, as a layer map names it.
    pub fn text_file(&self) -> TextFile {
        TextFile {
            name: self
                .path
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            sha256: self.sha256.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_and_whole() {
        let book = Book {
            path: "book.txt".into(),
            tokens: (0..100).collect(),
            sha256: String::new(),
        };
        let windows = book.windows(20, 3).unwrap();
        let starts: Vec<u32> = windows.iter().map(|w| w[0]).collect();
        assert_eq!(starts, [5, 30, 55]);
        assert!(windows.iter().all(|w| w.len() == 20));
        assert_eq!(book.windows(96, 1).unwrap_err().label(), "short_text");
    }
}
