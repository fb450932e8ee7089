//! [`Preview`]: what one client has been told beyond the committed tokens.
//!
//! It is a state, not a queue: a client gets the latest look ahead, and hears of a withdrawal only when it had been told
//! of something that was withdrawn. So a slow client costs no memory.

use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{Delta, ProvisionalDelta, Withdrawn};

/// See the module's text. Indices are among the completion's tokens.
#[derive(Debug, Default)]
pub(crate) struct Preview {
    /// What the client is to hear next.
    next: Option<ProvisionalDelta>,
    withdrawn: Option<u64>,
    /// Tokens, committed and provisional, that the client was told of and that still stand.
    told: u64,
}

impl Preview {
    /// All that is provisional now.
    pub(crate) fn set(&mut self, delta: ProvisionalDelta) {
        self.next = Some(delta);
    }

    /// Provisional tokens from index `to` on are withdrawn.
    pub(crate) fn withdraw(&mut self, to: u64) {
        self.next = None;
        if to < self.told {
            self.told = to;
            self.withdrawn = Some(to);
        }
    }

    /// What was provisional is committed, or withdrawn.
    pub(crate) fn clear(&mut self) {
        self.next = None;
    }

    /// The client is told of committed tokens.
    pub(crate) fn committed(&mut self, delta: &Delta) {
        let end = delta.start + delta.token_ids.len() as u64;
        self.told = self.told.max(end);
    }

    /// Whether the client has something to hear.
    pub(crate) fn is_pending(&self) -> bool {
        self.next.is_some() || self.withdrawn.is_some()
    }

    /// A withdrawal to tell before anything else.
    pub(crate) fn take_withdrawn(&mut self) -> Option<Event> {
        let to = self.withdrawn.take()?;
        Some(Event::Withdrawn(Withdrawn { to }))
    }

    /// The look ahead, to tell after what is committed.
    pub(crate) fn take(&mut self) -> Option<Event> {
        let delta = self.next.take()?;
        let end = delta.start + delta.token_ids.len() as u64;
        self.told = self.told.max(end);
        Some(Event::Provisional(delta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(start: u64, count: usize) -> ProvisionalDelta {
        ProvisionalDelta {
            start,
            token_ids: vec![7; count],
            text: String::new(),
        }
    }

    #[test]
    fn only_what_was_told_is_withdrawn() {
        let mut preview = Preview::default();
        preview.set(ahead(0, 3));
        preview.withdraw(1);
        assert!(!preview.is_pending());
        preview.set(ahead(0, 3));
        assert!(matches!(preview.take(), Some(Event::Provisional(_))));
        preview.withdraw(2);
        preview.set(ahead(4, 1));
        let withdrawn = Some(Event::Withdrawn(Withdrawn { to: 2 }));
        assert_eq!(preview.take_withdrawn(), withdrawn);
        preview.clear();
        assert!(!preview.is_pending());
    }
}
