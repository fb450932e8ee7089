//! [`SessionTable`]: the sessions that run now.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use specattn_proto::v1::SessionStatus;
use specattn_proto::{Fault, SessionId};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use crate::clients::KnownClient;
use crate::generation_service::unknown;
use crate::listener::Audience;
use crate::recipe::Recipe;
use crate::registry::{WorkerId, millis};
use crate::transcript::Transcript;

/// Ended sessions that can still be watched.
const ENDED: usize = 8;

/// Running sessions. How many there may be is for `admission` to say.
#[derive(Default)]
pub(crate) struct SessionTable {
    entries: Mutex<HashMap<SessionId, Arc<SessionEntry>>>,
    /// Those that ended last, the latest at the end.
    ended: Mutex<VecDeque<Arc<SessionEntry>>>,
}

impl SessionTable {
    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<SessionEntry>>> {
        lock(&self.entries)
    }

    /// Takes a place for a new session, which gets its id; the place is free again when the slot is dropped.
    pub(crate) fn reserve(self: &Arc<Self>, linger: Duration) -> SessionSlot {
        loop {
            // From a cryptographic generator: who knows the id may cancel the session.
            let id = SessionId::from_bits(rand::random());
            if let Some(slot) = self.claim(id, linger) {
                return slot;
            }
        }
    }

    /// Takes the place of the session `id`; `None` when it has one.
    pub(crate) fn claim(self: &Arc<Self>, id: SessionId, linger: Duration) -> Option<SessionSlot> {
        match self.entries().entry(id) {
            Entry::Occupied(_) => None,
            Entry::Vacant(vacant) => {
                let entry = vacant.insert(Arc::new(SessionEntry::new(id, linger)));
                Some(SessionSlot {
                    table: Arc::clone(self),
                    entry: Arc::clone(entry),
                })
            }
        }
    }

    /// A session that has a place.
    pub(crate) fn get(&self, id: SessionId) -> Option<Arc<SessionEntry>> {
        self.entries().get(&id).cloned()
    }

    /// A session that has a place, or was among the last to leave theirs.
    pub(crate) fn recent(&self, id: SessionId) -> Option<Arc<SessionEntry>> {
        let ended = || {
            lock(&self.ended)
                .iter()
                .find(|entry| entry.id == id)
                .cloned()
        };
        self.get(id).or_else(ended)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.entries().len()
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
pub(crate) struct Facts {
    pub(crate) recipe: Recipe,
    pub(crate) transcript: Arc<Transcript>,
}

/// Where a session runs now.
#[derive(Default)]
struct Place {
    verify_worker: Option<WorkerId>,
    draft_worker: Option<WorkerId>,
    reopenings: u32,
}

/// A session as others see it while it runs.
pub(crate) struct SessionEntry {
    pub(crate) id: SessionId,
    /// Cancelled by the client's wish.
    pub(crate) cancel: CancellationToken,
    pub(crate) audience: Arc<Audience>,
    /// How long the session goes on without one.
    linger: Duration,
    /// When the request arrived, or came back.
    since: Instant,
    facts: OnceCell<Facts>,
    place: Mutex<Place>,
}

impl SessionEntry {
    fn new(id: SessionId, linger: Duration) -> Self {
        Self {
            id,
            cancel: CancellationToken::new(),
            audience: Arc::default(),
            linger,
            since: Instant::now(),
            facts: OnceCell::new(),
            place: Mutex::default(),
        }
    }

    /// The session was opened.
    pub(crate) fn opened(&self, recipe: Recipe, transcript: Arc<Transcript>) {
        let set = self.facts.set(Facts { recipe, transcript });
        debug_assert!(set.is_ok(), "a session is opened once");
    }

    /// Completes when nobody has listened for too long.
    pub(crate) async fn abandoned(&self) {
        self.audience.absent(self.linger).await;
    }

    /// What is known of it, once it was opened.
    pub(crate) fn facts(&self) -> Option<&Facts> {
        self.facts.get()
    }

    /// Lets only its owner and operators reach it; to others it does not exist.
    ///
    /// # Errors
    /// [`Fault::NotFound`]; [`Fault::Unavailable`] while it is not known whose it is.
    pub(crate) fn check_owner(&self, client: &KnownClient) -> Result<(), Fault> {
        let Some(facts) = self.facts() else {
            return Err(Fault::Unavailable("the session is being opened".to_owned()));
        };
        if client.may_reach(facts.recipe.owner()) {
            return Ok(());
        }
        Err(unknown(self.id))
    }

    /// Notes at which verify worker it runs.
    pub(crate) fn set_verify_worker(&self, worker: WorkerId) {
        let mut place = lock(&self.place);
        place.reopenings += u32::from(place.verify_worker.is_some());
        place.verify_worker = Some(worker);
    }

    /// At which verify worker it runs.
    pub(crate) fn verify_worker(&self) -> Option<WorkerId> {
        lock(&self.place).verify_worker
    }

    /// Notes which draft worker is attached.
    pub(crate) fn set_draft_worker(&self, worker: Option<WorkerId>) {
        lock(&self.place).draft_worker = worker;
    }

    fn status(&self) -> Option<SessionStatus> {
        let facts = self.facts.get()?;
        let place = lock(&self.place);
        let name = |worker: Option<WorkerId>| worker.map_or_else(String::new, |id| id.to_string());
        Some(SessionStatus {
            session_id: self.id.to_string(),
            mode: facts.recipe.mode().into(),
            verify_worker_id: name(place.verify_worker),
            draft_worker_id: name(place.draft_worker),
            // Prompts are bounded far below 2^32 tokens by the message size.
            prompt_tokens: facts.recipe.prompt().len() as u32,
            completion_tokens: facts.transcript.committed() as u64,
            age_ms: millis(self.since),
            reopenings: place.reopenings,
            listening: self.audience.is_present(),
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
        if self.entry.facts().is_some() {
            let mut ended = lock(&self.table.ended);
            if ended.len() == ENDED {
                ended.pop_front();
            }
            ended.push_back(Arc::clone(&self.entry));
        }
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
    fn an_id_has_one_place_which_comes_free() {
        let table = Arc::new(SessionTable::default());
        let slot = table.reserve(Duration::ZERO);
        let id = slot.entry.id;
        assert!(table.get(id).is_some() && table.claim(id, Duration::ZERO).is_none());
        drop(slot);
        assert!(table.get(id).is_none());
        assert!(table.claim(id, Duration::ZERO).is_some());
    }
}
