//! [`SessionTable`]: the sessions that run now, and the log of each one's committed tokens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use specattn_proto::v1::{Mode, SessionStatus};
use specattn_proto::{Fault, SessionId};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use crate::registry::{WorkerId, millis};

/// When to try again after the table was full.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Running sessions, at most a fixed number.
pub(crate) struct SessionTable {
    entries: Mutex<HashMap<SessionId, Arc<SessionEntry>>>,
    capacity: usize,
}

impl SessionTable {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            entries: Mutex::default(),
            capacity,
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<SessionEntry>>> {
        lock(&self.entries)
    }

    /// Takes a place for a new session, which gets its id; the place is free again when the slot is dropped.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when the table is full.
    pub(crate) fn reserve(self: &Arc<Self>) -> Result<SessionSlot, Fault> {
        let mut entries = self.entries();
        if entries.len() >= self.capacity {
            return Err(Fault::ResourceExhausted {
                message: format!("the gateway holds {} sessions already", self.capacity),
                retry_after: Some(RETRY_AFTER),
            });
        }
        // From a cryptographic generator: who knows the id may cancel the session.
        let id = SessionId::from_bits(rand::random());
        let entry = Arc::new(SessionEntry {
            id,
            cancel: CancellationToken::new(),
            arrival: Instant::now(),
            facts: OnceCell::new(),
            state: Mutex::default(),
        });
        entries.insert(id, Arc::clone(&entry));
        Ok(SessionSlot {
            table: Arc::clone(self),
            entry,
        })
    }

    /// A running session.
    pub(crate) fn get(&self, id: SessionId) -> Option<Arc<SessionEntry>> {
        self.entries().get(&id).cloned()
    }

    /// Every session that was opened, oldest first, for people.
    pub(crate) fn status(&self) -> Vec<SessionStatus> {
        let entries: Vec<_> = self.entries().values().cloned().collect();
        let mut status: Vec<_> = entries.iter().filter_map(|entry| entry.status()).collect();
        status.sort_by_key(|session| std::cmp::Reverse(session.age_ms));
        status
    }
}

/// What is known once a session was opened, and stays.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) mode: Mode,
    pub(crate) verify_worker: WorkerId,
    pub(crate) prompt_tokens: usize,
}

#[derive(Default)]
struct State {
    /// Prompt and committed tokens.
    tokens: Vec<u32>,
    draft_worker: Option<WorkerId>,
}

/// A session as others see it while it runs.
pub(crate) struct SessionEntry {
    pub(crate) id: SessionId,
    /// Cancelled by the client's wish.
    pub(crate) cancel: CancellationToken,
    pub(crate) arrival: Instant,
    facts: OnceCell<Facts>,
    state: Mutex<State>,
}

impl SessionEntry {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The session was opened with this prompt.
    pub(crate) fn opened(&self, mode: Mode, verify_worker: WorkerId, prompt: Vec<u32>) {
        let facts = Facts {
            mode,
            verify_worker,
            prompt_tokens: prompt.len(),
        };
        self.state().tokens = prompt;
        let set = self.facts.set(facts);
        debug_assert!(set.is_ok(), "a session is opened once");
    }

    /// Tokens so far, prompt and committed.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.state().tokens.clone()
    }

    /// How many tokens there are so far.
    pub(crate) fn len(&self) -> usize {
        self.state().tokens.len()
    }

    /// Adds committed tokens to the log.
    pub(crate) fn commit(&self, tokens: &[u32]) {
        self.state().tokens.extend_from_slice(tokens);
    }

    /// Notes which draft worker is attached.
    pub(crate) fn set_draft_worker(&self, worker: Option<WorkerId>) {
        self.state().draft_worker = worker;
    }

    fn status(&self) -> Option<SessionStatus> {
        let facts = self.facts.get()?;
        let state = self.state();
        let completion = state.tokens.len() - facts.prompt_tokens;
        Some(SessionStatus {
            session_id: self.id.to_string(),
            mode: facts.mode.into(),
            verify_worker_id: facts.verify_worker.to_string(),
            draft_worker_id: state
                .draft_worker
                .map_or_else(String::new, |id| id.to_string()),
            // Prompts are bounded far below 2^32 tokens by the message size.
            prompt_tokens: facts.prompt_tokens as u32,
            completion_tokens: completion as u64,
            age_ms: millis(self.arrival),
        })
    }
}

/// A place in the table.
pub(crate) struct SessionSlot {
    table: Arc<SessionTable>,
    pub(crate) entry: Arc<SessionEntry>,
}

impl Drop for SessionSlot {
    fn drop(&mut self) {
        self.table.entries().remove(&self.entry.id);
    }
}

/// Locks; no code panics while it holds one of these locks halfway through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_come_free() {
        let table = Arc::new(SessionTable::new(1));
        let slot = table.reserve().unwrap();
        assert!(table.get(slot.entry.id).is_some());
        let refused = table.reserve().map(|_| ()).unwrap_err();
        assert_eq!(refused.label(), "resource_exhausted");
        let id = slot.entry.id;
        drop(slot);
        assert!(table.get(id).is_none());
        assert_ne!(table.reserve().unwrap().entry.id, id);
    }
}
