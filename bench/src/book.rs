//! Prompts from books.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tokenizers::Tokenizer;

/// Where in the book to start: past title pages and contents.
const SKIPPED_SHARE: usize = 5;

/// `count` tokens from the inside of the book at `text`.
///
/// # Errors
/// When book or tokenizer cannot be read, or the book is too short.
pub fn tokens(tokenizer: &Path, text: &Path, count: usize) -> Result<Vec<u32>> {
    let tokenizer = Tokenizer::from_file(tokenizer).map_err(|error| anyhow::anyhow!("{error}"))?;
    let book = std::fs::read_to_string(text).with_context(|| text.display().to_string())?;
    let start = book.floor_char_boundary(book.len() / SKIPPED_SHARE);
    let end = book.floor_char_boundary(start + 16 * count);
    let encoding = tokenizer
        .encode(&book[start..end], true)
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    ensure!(
        encoding.len() >= count,
        "{} is shorter than {count} tokens",
        text.display()
    );
    Ok(encoding.get_ids()[..count].to_vec())
}
