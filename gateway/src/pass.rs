//! [`Pass`]: what a request needs to become a session: a place, and its API key's leave.

use crate::admission::Ticket;
use crate::key_use::KeyRequest;

/// A session's right to run; given back when dropped.
pub(crate) struct Pass {
    _ticket: Ticket,
    /// `None` where clients have no keys.
    key: Option<KeyRequest>,
}

impl Pass {
    pub(crate) fn new(ticket: Ticket, key: Option<KeyRequest>) -> Self {
        Self {
            _ticket: ticket,
            key,
        }
    }

    /// So many tokens were processed for the session: they count against its key.
    pub(crate) fn spend(&self, tokens: usize) {
        if let Some(key) = &self.key {
            key.spend(tokens);
        }
    }
}
