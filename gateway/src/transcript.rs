//! [`Transcript`]: all that a client may come to see of a session, in one place that grows.
//!
//! The session writes, a client's stream reads from whatever token index it asks for. There is no queue between them: a
//! [`Reader`] takes all there is behind its place, so a slow client costs no memory beyond the session's own length, and a
//! client that comes back is sent the rest in the same words: which text belongs to a token is settled when the token
//! is committed, and kept.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{
    Delta, Finished, ProvisionalDelta, TokenLogprobs, TokenOrigin, Withdrawn,
};
use specattn_proto::validate::Invalid;
use tokio::sync::watch;

/// How a session ended, as its client is told.
pub(crate) type End = Result<Finished, Fault>;

/// A session's tokens and text so far.
pub(crate) struct Transcript {
    state: Mutex<State>,
    /// Wakes readers.
    changes: watch::Sender<()>,
}

struct State {
    /// Prompt and committed tokens.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// The completion's text, as far as it is certain.
    text: String,
    /// Bytes of text that are certain with each token of the completion.
    text_ends: Vec<usize>,
    /// How each token of the completion came about.
    origins: Vec<TokenOrigin>,
    /// One per token of the completion when asked for, else empty.
    logprobs: Vec<TokenLogprobs>,
    /// What is provisional, and its text.
    ahead: (Vec<u32>, String),
    end: Option<End>,
}

/// Committed tokens with what belongs to them.
#[derive(Debug, Default, Clone)]
pub(crate) struct Commit {
    pub(crate) tokens: Vec<u32>,
    /// The text that became certain with each token.
    pub(crate) texts: Vec<String>,
    /// How each came about; those that are missing are not known.
    pub(crate) origins: Vec<TokenOrigin>,
    /// One per token, or none.
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

impl Transcript {
    /// A transcript that begins with `prompt`.
    pub(crate) fn new(prompt: Vec<u32>) -> Self {
        Self {
            state: Mutex::new(State {
                prompt_tokens: prompt.len(),
                tokens: prompt,
                text: String::new(),
                text_ends: Vec::new(),
                origins: Vec::new(),
                logprobs: Vec::new(),
                ahead: Default::default(),
                end: None,
            }),
            changes: watch::Sender::new(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changes.send_replace(());
    }

    /// Prompt and committed tokens.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.state().tokens.clone()
    }

    /// How many tokens there are, prompt included.
    pub(crate) fn len(&self) -> usize {
        self.state().tokens.len()
    }

    /// The token at `index` among all tokens, if it is there.
    pub(crate) fn token(&self, index: usize) -> Option<u32> {
        self.state().tokens.get(index).copied()
    }

    /// Tokens of the completion.
    pub(crate) fn committed(&self) -> usize {
        let state = self.state();
        state.tokens.len() - state.prompt_tokens
    }

    /// Adds committed tokens.
    pub(crate) fn commit(&self, commit: Commit) {
        self.change(|state| {
            state.tokens.extend_from_slice(&commit.tokens);
            for text in &commit.texts {
                state.text.push_str(text);
                state.text_ends.push(state.text.len());
            }
            state.origins.extend(commit.origins);
            let count = state.text_ends.len();
            state.origins.resize(count, TokenOrigin::Unspecified);
            state.logprobs.extend(commit.logprobs);
            // What was provisional is committed now, or withdrawn.
            state.ahead = Default::default();
        });
    }

    /// Shows what is provisional now.
    pub(crate) fn look_ahead(&self, tokens: Vec<u32>, text: String) {
        self.change(|state| state.ahead = (tokens, text));
    }

    /// Withdraws what is provisional from completion token `to` on.
    pub(crate) fn withdraw(&self, to: usize) {
        self.change(|state| {
            let committed = state.tokens.len() - state.prompt_tokens;
            state.ahead.0.truncate(to.saturating_sub(committed));
            // Its text is not known any more; the next look ahead brings it.
            state.ahead.1.clear();
        });
    }

    /// The session is over; `tail` is text that was held back until now.
    pub(crate) fn end(&self, tail: &str, end: End) {
        self.change(|state| {
            state.text.push_str(tail);
            state.ahead = Default::default();
            state.end = Some(end);
        });
    }
}

/// One client's place in a transcript.
pub(crate) struct Reader {
    transcript: Arc<Transcript>,
    changes: watch::Receiver<()>,
    /// Completion tokens handed out.
    index: usize,
    /// Bytes of text handed out.
    text: usize,
    /// Provisional tokens that the client was shown and that were not withdrawn since.
    shown: Vec<u32>,
}

/// What a reader finds.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// To be told now.
    Event(Event),
    /// There is no more.
    End(End),
    /// Not yet.
    Nothing,
}

impl Reader {
    /// A reader that has the first `from` tokens of the completion.
    ///
    /// # Errors
    /// [`Invalid`] when there are not so many yet.
    pub(crate) fn new(transcript: Arc<Transcript>, from: u64) -> Result<Self, Invalid> {
        let (text, count) = {
            let state = transcript.state();
            let ends = &state.text_ends;
            let index = usize::try_from(from).unwrap_or(usize::MAX);
            let text = match index.checked_sub(1) {
                None => Some(0),
                Some(last) => ends.get(last).copied(),
            };
            (text, ends.len())
        };
        let text = text.ok_or_else(|| {
            Invalid::new(
                "from_index",
                format!("is {from}; the completion has {count} tokens"),
            )
        })?;
        Ok(Self {
            changes: transcript.changes.subscribe(),
            transcript,
            // It is at most the count, or there were no text.
            index: from as usize,
            text,
            shown: Vec::new(),
        })
    }

    /// Whether there is something to tell, or the end.
    pub(crate) fn is_ready(&self) -> bool {
        let state = self.transcript.state();
        state.end.is_some()
            || self.index < state.text_ends.len()
            || self.withdrawn(&state).is_some()
            || self.shown.len() < state.ahead.0.len()
    }

    /// What is next.
    pub(crate) fn next(&mut self) -> Next {
        let transcript = Arc::clone(&self.transcript);
        let state = transcript.state();
        if let Some(kept) = self.withdrawn(&state) {
            self.shown.truncate(kept);
            let to = (self.index + kept) as u64;
            return Next::Event(Event::Withdrawn(Withdrawn { to }));
        }
        let count = state.text_ends.len();
        let text_end = match (&state.end, count.checked_sub(1)) {
            (Some(_), _) => state.text.len(),
            (None, Some(last)) => state.text_ends[last],
            (None, None) => 0,
        };
        if self.index < count || self.text < text_end {
            let first = state.prompt_tokens + self.index;
            let delta = Delta {
                start: self.index as u64,
                token_ids: state.tokens[first..].to_vec(),
                text: state.text[self.text..text_end].to_owned(),
                logprobs: state
                    .logprobs
                    .get(self.index..)
                    .map_or_else(Vec::new, <[_]>::to_vec),
                text_start: self.text as u64,
            };
            // What was shown of them stands: the rest was withdrawn above.
            let settled = self.shown.len().min(count - self.index);
            self.shown.drain(..settled);
            (self.index, self.text) = (count, text_end);
            return Next::Event(Event::Delta(delta));
        }
        if self.shown.len() < state.ahead.0.len() {
            self.shown.clone_from(&state.ahead.0);
            return Next::Event(Event::Provisional(ProvisionalDelta {
                start: self.index as u64,
                token_ids: state.ahead.0.clone(),
                text: state.ahead.1.clone(),
            }));
        }
        match &state.end {
            Some(end) => Next::End(end.clone()),
            None => Next::Nothing,
        }
    }

    /// How many of the tokens shown still stand, if not all do.
    fn withdrawn(&self, state: &State) -> Option<usize> {
        let committed = &state.tokens[state.prompt_tokens + self.index..];
        let now = committed.iter().chain(&state.ahead.0);
        let kept = self.shown.iter().zip(now).take_while(|(a, b)| a == b);
        let kept = kept.count();
        (kept < self.shown.len()).then_some(kept)
    }

    /// Waits for a change since the last call.
    pub(crate) async fn changed(&mut self) {
        // The transcript is held: the wait cannot fail.
        let _ = self.changes.changed().await;
    }
}

/// A place in a transcript from which its tokens are read one by one, with how each came about.
pub(crate) struct Watcher {
    transcript: Arc<Transcript>,
    changes: watch::Receiver<()>,
    /// Completion tokens handed out.
    index: usize,
}

/// What a watcher finds.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// The text that became certain with each token, and how the token came about.
    pub(crate) pieces: Vec<(String, TokenOrigin)>,
    /// Set when there is no more.
    pub(crate) end: Option<End>,
}

impl Watcher {
    /// A watcher that has seen nothing.
    pub(crate) fn new(transcript: Arc<Transcript>) -> Self {
        Self {
            changes: transcript.changes.subscribe(),
            transcript,
            index: 0,
        }
    }

    /// Waits for news. There are none after the end.
    pub(crate) async fn next(&mut self) -> News {
        loop {
            let news = self.look();
            if !news.pieces.is_empty() || news.end.is_some() {
                return news;
            }
            // The transcript is held: the wait cannot fail.
            let _ = self.changes.changed().await;
        }
    }

    fn look(&mut self) -> News {
        let state = self.transcript.state();
        let text_end = |tokens: usize| {
            tokens
                .checked_sub(1)
                .map_or(0, |last| state.text_ends[last])
        };
        let count = state.text_ends.len();
        let piece = |index| {
            let text = &state.text[text_end(index)..text_end(index + 1)];
            (text.to_owned(), state.origins[index])
        };
        let mut pieces: Vec<_> = (self.index..count).map(piece).collect();
        let tail = &state.text[text_end(count)..];
        if !tail.is_empty() {
            // It comes with the end, and belongs to the last token.
            let origin = state.origins.last().copied();
            pieces.push((tail.to_owned(), origin.unwrap_or(TokenOrigin::Unspecified)));
        }
        self.index = count;
        News {
            pieces,
            end: state.end.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
