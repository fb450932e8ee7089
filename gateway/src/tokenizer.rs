//! [`Tokenizer`]: the target model's tokenizer.json.

use std::collections::HashSet;
use std::path::Path;

use sha2::{Digest, Sha256};
use specattn_proto::Fault;

use crate::error::GatewayError;

/// Text to token ids and back.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    hash: String,
}

impl Tokenizer {
    /// Loads `tokenizer.json` from a checkpoint folder.
    pub(crate) fn load(folder: &Path) -> Result<Self, GatewayError> {
        let path = folder.join("tokenizer.json");
        let failed = |reason: String| GatewayError::Tokenizer {
            path: path.clone(),
            reason,
        };
        let bytes = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
        Self::from_json(&bytes).map_err(failed)
    }

    /// Reads the content of a tokenizer.json.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        // Some files carry the truncation and padding of their training runs: a prompt must arrive whole and alone.
        inner
            .with_truncation(None)
            .map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        let hash = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Self {
            inner,
            special,
            hash,
        })
    }

    /// SHA-256 of tokenizer.json, lower-case hex.
    pub(crate) fn hash(&self) -> &str {
        &self.hash
    }

    /// Tokens that the tokenizer knows, added ones included.
    pub(crate) fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether a token stands for no text: begin and end marks and the like.
    pub(crate) fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// The token ids of a prompt, with the special tokens that the model wants around it.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, Fault> {
        self.ids(text, true)
    }

    /// The token ids of a text that already holds the special tokens it wants.
    pub(crate) fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, Fault> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Fault> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| Fault::InvalidArgument(format!("cannot tokenize text: {error}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of one token by itself, special ones too; bytes that are no UTF-8 become U+FFFD.
    pub(crate) fn token_text(&self, token: u32) -> Result<String, Fault> {
        self.inner
            .decode(&[token], false)
            .map_err(|error| Fault::Internal(format!("cannot decode tokens: {error}")))
    }

    /// The text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD.
    pub(crate) fn decode(&self, tokens: &[u32]) -> Result<String, Fault> {
        self.inner
            .decode(tokens, true)
            .map_err(|error| Fault::Internal(format!("cannot decode tokens: {error}")))
    }
}
