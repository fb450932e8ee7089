//! [`Admission`]: who may have a session now, who waits, and who is sent away.
//!
//! So many sessions run at once as the gateway allows and its verify workers have places for, and so many of one client.
//! Other requests wait in line, a line per client, and the lines take turns: a client that asks for much delays itself
//! and not the others. The lines are bounded in all, and so is the wait.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use specattn_proto::Fault;
use tokio::sync::oneshot;
use tonic::codegen::http::HeaderMap;

use crate::clients::KnownClient;

/// Bounds of the hint when to try again.
const RETRY_LEAST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(30);

/// Weight of the latest session in the mean time that a session takes.
const LATEST: f64 = 0.1;

/// How much may run and wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Sessions at once.
    pub sessions: usize,
    /// Sessions of one client at once.
    pub sessions_per_client: usize,
    /// Requests that wait.
    pub queued: usize,
    /// How long one waits, in line and for a worker that has room.
    pub queue_timeout: Duration,
}

/// The metadata or header by which a client, or a proxy in front of it, says who it is.
const CLIENT_ID: &str = "x-client-id";
const API_KEY: &str = "authorization";

/// Longest name of a client that is taken as it is.
const MOST_CLIENT_ID_BYTES: usize = 128;

/// Names a client, by whatever it is told apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClientKey(String);

impl ClientKey {
    /// The client with this name.
    pub(crate) fn named(name: &str) -> Self {
        Self(format!("name {name}"))
    }

    /// Who calls: by its API key, where clients have one. Else by the name it gives, else by what it shows as a key, else by
    /// its address.
    pub(crate) fn of(client: &KnownClient, headers: &HeaderMap, address: Option<IpAddr>) -> Self {
        if let Some(name) = &client.name {
            return Self::named(name);
        }
        let name = headers.get(CLIENT_ID).and_then(|name| name.to_str().ok());
        if let Some(name) = name.filter(|name| name.len() <= MOST_CLIENT_ID_BYTES) {
            return Self(format!("id {name}"));
        }
        if let Some(key) = headers.get(API_KEY) {
            // The secret itself is not kept.
            let digest = Sha256::digest(key.as_bytes());
            return Self(format!("key {digest:x}"));
        }
        Self(address.map_or_else(String::new, |address| format!("ip {address}")))
    }
}

/// See the module's text.
pub(crate) struct Admission {
    limits: AdmissionLimits,
    state: Mutex<State>,
}

struct State {
    /// Places at the verify workers.
    places: usize,
    running: usize,
    queued: usize,
    clients: BTreeMap<ClientKey, Client>,
    /// Clients with requests that wait, the next one first.
    turns: VecDeque<ClientKey>,
    /// Mean time that a session takes, in seconds.
    session_seconds: f64,
    last_number: u64,
}

#[derive(Default)]
struct Client {
    running: usize,
    waiting: VecDeque<(u64, oneshot::Sender<Ticket>)>,
}

/// The right to a session; given back when dropped.
pub(crate) struct Ticket {
    admission: Arc<Admission>,
    client: ClientKey,
    since: Instant,
}

impl Admission {
    pub(crate) fn new(limits: AdmissionLimits) -> Self {
        Self {
            limits,
            state: Mutex::new(State {
                places: usize::MAX,
                running: 0,
                queued: 0,
                clients: BTreeMap::new(),
                turns: VecDeque::new(),
                session_seconds: 0.0,
                last_number: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when a request that came now may wait.
    pub(crate) fn patience(&self) -> tokio::time::Instant {
        tokio::time::Instant::now() + self.limits.queue_timeout
    }

    /// Requests that wait.
    pub(crate) fn queued(&self) -> usize {
        self.state().queued
    }

    /// The verify workers have so many places now.
    pub(crate) fn set_places(self: &Arc<Self>, places: usize) {
        self.state().places = places;
        self.call();
    }

    /// Waits for a place in turn.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when too many wait already, or none came free in time.
    pub(crate) async fn admit(self: &Arc<Self>, client: ClientKey) -> Result<Ticket, Fault> {
        let mut waiting = match self.enter(client)? {
            Entered::Admitted(ticket) => return Ok(ticket),
            Entered::Waiting(waiting) => waiting,
        };
        match tokio::time::timeout(self.limits.queue_timeout, &mut waiting.turn).await {
            Ok(Ok(ticket)) => Ok(ticket),
            Ok(Err(_)) | Err(_) => Err(waiting.refusal()),
        }
    }

    /// Takes a place, or one in line.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when too many wait already.
    pub(crate) fn enter(self: &Arc<Self>, client: ClientKey) -> Result<Entered, Fault> {
        let waiting = {
            let mut state = self.state();
            let fits = state.fits(&client, &self.limits);
            if fits && state.turns.is_empty() {
                state.start(&client);
                return Ok(Entered::Admitted(self.ticket(client)));
            }
            if state.queued >= self.limits.queued {
                return Err(self.refusal(&state, &client));
            }
            let (sender, turn) = oneshot::channel();
            state.last_number += 1;
            let number = state.last_number;
            state.enqueue(&client, number, sender);
            Waiting {
                turn,
                admission: Arc::clone(self),
                client,
                number,
            }
        };
        // A client whose line is full for its own limit must not hold up this one.
        self.call();
        Ok(Entered::Waiting(waiting))
    }

    fn ticket(self: &Arc<Self>, client: ClientKey) -> Ticket {
        Ticket {
            admission: Arc::clone(self),
            client,
            since: Instant::now(),
        }
    }

    /// Gives free places to those whose turn it is.
    fn call(self: &Arc<Self>) {
        let mut called = Vec::new();
        {
            let mut state = self.state();
            let mut passed_over = 0;
            while passed_over < state.turns.len() && state.has_place(&self.limits) {
                let Some(client) = state.turns.pop_front() else {
                    break;
                };
                let next = if state.fits(&client, &self.limits) {
                    passed_over = 0;
                    state.dequeue(&client)
                } else {
                    passed_over += 1;
                    None
                };
                if let Some(sender) = next {
                    state.start(&client);
                    called.push((sender, client.clone()));
                }
                let waits = state
                    .clients
                    .get(&client)
                    .is_some_and(|c| !c.waiting.is_empty());
                if waits {
                    state.turns.push_back(client);
                }
            }
        }
        for (sender, client) in called {
            // One that gave up meanwhile lets its ticket go, which calls the next.
            let _ = sender.send(self.ticket(client));
        }
    }

    fn refusal(&self, state: &State, client: &ClientKey) -> Fault {
        let own = state.clients.get(client).map_or(0, |client| client.running);
        let message = if own >= self.limits.sessions_per_client {
            format!("this client has {own} sessions already")
        } else {
            format!(
                "{} sessions run and {} requests wait",
                state.running, state.queued
            )
        };
        let places = state.capacity(&self.limits).max(1) as f64;
        let wait = state.session_seconds * (state.queued + 1) as f64 / places;
        Fault::ResourceExhausted {
            message,
            retry_after: Some(Duration::from_secs_f64(wait).clamp(RETRY_LEAST, RETRY_MOST)),
        }
    }
}

impl State {
    fn capacity(&self, limits: &AdmissionLimits) -> usize {
        limits.sessions.min(self.places)
    }

    fn has_place(&self, limits: &AdmissionLimits) -> bool {
        self.running < self.capacity(limits)
    }

    fn fits(&self, client: &ClientKey, limits: &AdmissionLimits) -> bool {
        let own = self.clients.get(client).map_or(0, |client| client.running);
        self.has_place(limits) && own < limits.sessions_per_client
    }

    fn start(&mut self, client: &ClientKey) {
        self.running += 1;
        self.clients.entry(client.clone()).or_default().running += 1;
    }

    fn enqueue(&mut self, client: &ClientKey, number: u64, sender: oneshot::Sender<Ticket>) {
        let line = &mut self.clients.entry(client.clone()).or_default().waiting;
        line.push_back((number, sender));
        self.queued += 1;
        if line.len() == 1 {
            self.turns.push_back(client.clone());
        }
    }

    fn dequeue(&mut self, client: &ClientKey) -> Option<oneshot::Sender<Ticket>> {
        let (_, sender) = self.clients.get_mut(client)?.waiting.pop_front()?;
        self.queued -= 1;
        Some(sender)
    }

    /// Forgets a client without sessions and requests.
    fn forget(&mut self, client: &ClientKey) {
        let idle = |client: &Client| client.running == 0 && client.waiting.is_empty();
        if self.clients.get(client).is_some_and(idle) {
            self.clients.remove(client);
        }
    }
}

/// What a request finds.
pub(crate) enum Entered {
    /// A place.
    Admitted(Ticket),
    /// A line.
    Waiting(Waiting),
}

/// A request in line; it leaves the line when dropped.
pub(crate) struct Waiting {
    turn: oneshot::Receiver<Ticket>,
    admission: Arc<Admission>,
    client: ClientKey,
    number: u64,
}

impl Waiting {
    /// The place, once its turn has come.
    pub(crate) fn called(&mut self) -> Option<Ticket> {
        self.turn.try_recv().ok()
    }

    /// What to say when the turn did not come in time.
    pub(crate) fn refusal(&self) -> Fault {
        let admission = &self.admission;
        admission.refusal(&admission.state(), &self.client)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        let Some(client) = state.clients.get_mut(&self.client) else {
            return;
        };
        let line = &mut client.waiting;
        let Some(at) = line.iter().position(|(number, _)| *number == self.number) else {
            return;
        };
        line.remove(at);
        let empty = line.is_empty();
        state.queued -= 1;
        if empty {
            state.turns.retain(|client| *client != self.client);
        }
        state.forget(&self.client);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        {
            let mut state = self.admission.state();
            state.running = state.running.saturating_sub(1);
            if let Some(client) = state.clients.get_mut(&self.client) {
                client.running = client.running.saturating_sub(1);
            }
            state.forget(&self.client);
            let took = self.since.elapsed().as_secs_f64();
            state.session_seconds += LATEST * (took - state.session_seconds);
        }
        self.admission.call();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(sessions: usize, sessions_per_client: usize, queued: usize) -> Arc<Admission> {
        Arc::new(Admission::new(AdmissionLimits {
            sessions,
            sessions_per_client,
            queued,
            queue_timeout: Duration::from_secs(5),
        }))
    }

    fn client(name: &str) -> ClientKey {
        ClientKey(name.to_owned())
    }

    /// Lets every task that can run do so.
    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn lines_take_turns_and_the_queue_is_bounded() {
        let admission = admission(1, 8, 4);
        let running = admission.admit(client("a")).await.unwrap();
        let (order, mut arrivals) = tokio::sync::mpsc::channel(8);
        for name in ["a", "a", "a", "b"] {
            let (admission, order) = (Arc::clone(&admission), order.clone());
            tokio::spawn(async move {
                let ticket = admission.admit(client(name)).await.unwrap();
                order.send((name, ticket)).await.unwrap();
            });
            settle().await;
        }
        assert_eq!(admission.queued(), 4);
        let refused = admission.admit(client("b")).await.map(drop).unwrap_err();
        assert!(matches!(
            refused,
            Fault::ResourceExhausted {
                retry_after: Some(_),
                ..
            }
        ));
        drop(running);
        let mut names = Vec::new();
        for _ in 0..4 {
            let (name, ticket) = arrivals.recv().await.unwrap();
            names.push(name);
            drop(ticket);
        }
        // The other client waits for one of the first's, not for all.
        assert_eq!(names, ["a", "b", "a", "a"]);
        assert!(admission.state().clients.is_empty() && admission.queued() == 0);
    }

    #[tokio::test]
    async fn a_client_at_its_limit_holds_nobody_up() {
        let admission = admission(4, 1, 4);
        let first = admission.admit(client("a")).await.unwrap();
        let waiting = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.admit(client("a")).await }
        });
        settle().await;
        let _other = admission.admit(client("b")).await.unwrap();
        assert_eq!(admission.queued(), 1);
        drop(first);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_leaves_the_line_is_forgotten_and_places_wake_it() {
        let admission = admission(4, 4, 4);
        admission.set_places(0);
        let impatient = admission.admit(client("a"));
        let given_up = tokio::time::timeout(Duration::from_millis(5), impatient).await;
        assert!(given_up.is_err());
        assert!(admission.state().clients.is_empty() && admission.state().turns.is_empty());
        let waiting = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.admit(client("a")).await }
        });
        settle().await;
        admission.set_places(1);
        let ticket = waiting.await.unwrap().unwrap();
        assert_eq!(admission.state().running, 1);
        drop(ticket);
        assert_eq!(admission.state().running, 0);
    }
}
