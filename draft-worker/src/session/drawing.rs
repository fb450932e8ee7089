//! What follows a text by a draft step's output: the draft's distribution, and the token that it draws.

use specattn_engine::StepOutput;
use specattn_engine::sampling::{Distribution, DraftToken, History, draft_token};
use specattn_proto::Fault;

use super::Joined;

impl Joined {
    /// The draft's distribution after the session's `tokens` and `pending` ones that it was not told.
    pub(super) fn distribution(
        &mut self,
        tokens: &[u32],
        pending: &[u32],
        output: &StepOutput,
    ) -> Result<Distribution, Fault> {
        let (prompt, committed) = tokens.split_at(self.prompt_tokens);
        let history = History {
            prompt,
            output: committed,
            pending,
        };
        match output.argmax.first() {
            Some(&token) => self.sampler.greedy(token),
            None => self.sampler.distribution(&output.logits, history),
        }
        .map_err(|error| Fault::Internal(error.to_string()))
    }

    /// Draws the token at index `position` of a round that was begun behind the text `before` at `epoch`, from at most
    /// `entries` entries.
    pub(super) fn draw(
        &self,
        distribution: &Distribution,
        epoch: u64,
        before: impl DoubleEndedIterator<Item = u32>,
        (position, entries): (usize, usize),
    ) -> DraftToken {
        if self.sampler.params().is_greedy() {
            return DraftToken {
                token: distribution.argmax(),
                q: None,
            };
        }
        let rng = self.rng.attempt(epoch).behind(before);
        let (token, q) = draft_token(distribution, entries, &rng, position as u64);
        DraftToken { token, q: Some(q) }
    }
}
