//! [`Completion`]: what the client may see of the committed tokens.
//!
//! Tokens go in one by one; out comes text that is certain. When a stop string completes, the token that completed it is
//! the last one that counts, and the text ends before the stop string.

use std::sync::Arc;

use specattn_proto::Fault;

use crate::detokenizer::Detokenizer;
use crate::stop_strings::{Scan, StopStrings};
use crate::tokenizer::Tokenizer;

/// The visible side of a session's output.
pub(crate) struct Completion {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Tokens that end the session and whose text is not shown; ascending.
    stop_tokens: Vec<u32>,
}

impl Completion {
    /// Starts after `prompt`.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        prompt: &[u32],
        stops: Vec<String>,
        mut stop_tokens: Vec<u32>,
    ) -> Result<Self, Fault> {
        stop_tokens.sort_unstable();
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer, prompt)?,
            stops: StopStrings::new(stops),
            stop_tokens,
        })
    }

    /// Takes the next committed token.
    pub(crate) fn push(&mut self, token: u32) -> Result<Scan, Fault> {
        if self.is_stop_token(token) {
            return Ok(Scan::default());
        }
        let text = self.detokenizer.push(token)?;
        Ok(self.stops.push(&text))
    }

    /// Whether `token` ends the session without showing.
    pub(crate) fn is_stop_token(&self, token: u32) -> bool {
        self.stop_tokens.binary_search(&token).is_ok()
    }

    /// The text that `tokens` would add if they were committed, as far as it is certain. Stop strings are not looked for.
    pub(crate) fn preview(&self, tokens: &[u32]) -> Result<String, Fault> {
        let mut detokenizer = self.detokenizer.clone();
        let mut text = String::new();
        for token in tokens {
            if !self.is_stop_token(*token) {
                text.push_str(&detokenizer.push(*token)?);
            }
        }
        Ok(text)
    }

    /// No more tokens come: the text still held back.
    pub(crate) fn finish(&mut self) -> Result<Scan, Fault> {
        let text = self.detokenizer.finish()?;
        let mut scan = self.stops.push(&text);
        if scan.stop.is_none() {
            scan.text.push_str(&self.stops.finish());
        }
        Ok(scan)
    }
}
