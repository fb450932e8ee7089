//! Prompts: token ids of real and generated prose, with what the bundled target continues them by.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::binaries::workspace;
use crate::process;

/// A prompt and its greedy continuation by an independent implementation in float32.
#[derive(Debug, Clone, Deserialize)]
pub struct Reference {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// 64 tokens.
    pub greedy: Vec<u32>,
}

/// The reference of the bundled target: 20 prompts of 50 to 3,000 tokens, shortest first.
pub fn references() -> Vec<Reference> {
    #[derive(Deserialize)]
    struct File {
        prompts: Vec<Reference>,
    }
    let path = workspace().join("tests/fixtures/greedy_bundled.json");
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file: File = serde_json::from_slice(&text).expect("the fixture is of the known format");
    file.prompts
}

/// The bundled pair's tokenizer.
pub fn tokenizer() -> Tokenizer {
    let path = process::target().join("tokenizer.json");
    Tokenizer::from_file(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The first `tokens` tokens of the middle of a book that the bundled pair was not trained on.
///
/// Books are not part of the tree: they are looked for in `shared/corpus/test` beside it. Where there are none the
/// longest reference prompt serves, which the target wrote itself, and stderr says so.
pub fn book(tokens: usize) -> Vec<u32> {
    let Some(path) = book_files().into_iter().next() else {
        eprintln!("SKIPPED real text: no books beside the repository");
        let longest = references().pop().expect("there are references").prompt;
        return longest[..tokens.min(longest.len())].to_vec();
    };
    middle_of(&path, tokens)
}

/// The books that [`book`] takes the first of, by name; empty where there are none.
pub fn book_files() -> Vec<PathBuf> {
    let folder = workspace().join("../shared/corpus/test");
    let entries = std::fs::read_dir(&folder).into_iter().flatten();
    let mut books: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    books.sort();
    books
}

/// The first `tokens` tokens of the middle of a text.
pub fn middle_of(path: &Path, tokens: usize) -> Vec<u32> {
    let text =
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let middle = (text.len() / 2..).find(|&at| text.is_char_boundary(at));
    let middle = middle.expect("the end is a boundary");
    let start = text[middle..].find("\n\n").map_or(0, |at| middle + at + 2);
    // Four bytes a token, and some to spare.
    let end = text.len().min(start + 8 * tokens);
    let end = (start..=end)
        .rev()
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(start);
    let encoding = tokenizer()
        .encode(&text[start..end], true)
        .expect("prose can be tokenized");
    encoding.get_ids()[..tokens.min(encoding.len())].to_vec()
}
