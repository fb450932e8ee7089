//! [`Detokenizer`]: token ids to text, one token at a time.
//!
//! A token is not a piece of text by itself: it may end within a character, and decoders treat the first token of a text
//! apart (a leading space, for one). So a short window of tokens is decoded as a whole each time, and what is new in it
//! is handed out, save the end that a later token may still turn into something else. The window starts with the end
//! of the prompt and moves along, so that the cost of a token does not grow with the text.
//!
//! The pieces add up to the text that decoding all tokens at once gives. For decoders of the byte-level kind this holds
//! whatever the tokens are; those with byte fallback spoil a whole run of byte tokens for one broken character at its
//! end, and there the characters shown before it stay.

use std::sync::Arc;

use specattn_proto::Fault;

use crate::tokenizer::Tokenizer;

/// Tokens kept before the new ones, so that decoders see a text that goes on.
const CONTEXT_TOKENS: usize = 8;

/// Window length at which it is moved even though its end is still uncertain: bytes that are no UTF-8, one after
/// another. Half of it is kept, many times the length of a character.
const LONGEST_WINDOW: usize = 64;

/// What stands for bytes that are no character, or not yet.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Most replacement characters that an unfinished character can show as: one per byte but its last.
const UNFINISHED: usize = 3;

/// The text of a growing list of tokens.
#[derive(Clone)]
pub(crate) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The last tokens, special ones left out.
    window: Vec<u32>,
    /// The part of the window's text that was handed out (or belongs to the prompt).
    shown: String,
    /// Tokens of the window whose text is all shown.
    settled: usize,
    /// An index at which the window may be cut: everything before it was shown when it was set.
    cut: usize,
}

impl Detokenizer {
    /// Starts after `prompt`.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Result<Self, Fault> {
        let window: Vec<u32> = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..]
            .iter()
            .copied()
            .filter(|&token| !tokenizer.is_special(token))
            .collect();
        let shown = tokenizer.decode(&window)?;
        Ok(Self {
            tokenizer,
            settled: window.len(),
            cut: window.len(),
            window,
            shown,
        })
    }

    /// Takes the next token; returns the text that is certain now.
    pub(crate) fn push(&mut self, token: u32) -> Result<String, Fault> {
        if self.tokenizer.is_special(token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let mut text = self.tokenizer.decode(&self.window)?;
        if !text.starts_with(&self.shown) {
            // Some decoders spoil a whole run of byte tokens while its last character is unfinished.
            let unfinished = text.ends_with(REPLACEMENT);
            if unfinished && self.window.len() - self.settled <= UNFINISHED {
                return Ok(String::new());
            }
            // The new tokens cannot be read together with the old ones: start over with them.
            self.window.drain(..self.settled);
            self.shown.clear();
            self.settled = 0;
            self.cut = 0;
            text = self.tokenizer.decode(&self.window)?;
        }
        let certain = certain_part(&text).len().max(self.shown.len());
        let mut new = text[self.shown.len()..certain].to_owned();
        self.shown.push_str(&new);
        if certain == text.len() {
            self.settled = self.window.len();
            self.move_window()?;
        } else if self.window.len() >= LONGEST_WINDOW {
            new.push_str(&self.halve_window(&text[certain..])?);
        }
        Ok(new)
    }

    /// No more tokens come: the text still held back.
    pub(crate) fn finish(&self) -> Result<String, Fault> {
        let text = self.tokenizer.decode(&self.window)?;
        match text.strip_prefix(&self.shown) {
            Some(rest) => Ok(rest.to_owned()),
            None => self.tokenizer.decode(&self.window[self.settled..]),
        }
    }

    /// Moves the window to its last cut once enough tokens follow it. All of its text is shown, and the cut lies
    /// between characters.
    fn move_window(&mut self) -> Result<(), Fault> {
        if self.window.len() < self.cut + CONTEXT_TOKENS {
            return Ok(());
        }
        self.window.drain(..self.cut);
        self.shown = self.tokenizer.decode(&self.window)?;
        self.settled = self.window.len();
        self.cut = self.window.len();
        Ok(())
    }

    /// Drops the older half of a window whose end, `held`, is uncertain; returns what can no longer be held back.
    fn halve_window(&mut self, held: &str) -> Result<String, Fault> {
        self.window.drain(..LONGEST_WINDOW / 2);
        let text = self.tokenizer.decode(&self.window)?;
        self.cut = 0;
        match text.strip_suffix(held) {
            Some(shown) => {
                self.shown = shown.to_owned();
                self.settled = self.window.len() - UNFINISHED;
                Ok(String::new())
            }
            None => {
                self.shown = text;
                self.settled = self.window.len();
                Ok(held.to_owned())
            }
        }
    }
}

/// The text without the replacement characters at its end that may still become a character.
fn certain_part(text: &str) -> &str {
    let mut certain = text;
    for _ in 0..UNFINISHED {
        match certain.strip_suffix(REPLACEMENT) {
            Some(rest) => certain = rest,
            None => break,
        }
    }
    certain
}

#[cfg(test)]
mod tests;
