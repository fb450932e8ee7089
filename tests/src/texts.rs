//! Prompts: token ids of real and generated prose, with what the bundled target continues them by.

use serde::Deserialize;

use crate::binaries::workspace;

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
