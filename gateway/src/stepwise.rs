//! [`Stepwise`]: a gateway without tasks, network and time of its own, for simulations.
//!
//! As the workers': who may have a session (`Admission`), what it is (`Plan`, `Recipe`), where it goes (`Registry`,
//! `VerifySearch`), who drafts for it (`DraftSearch`) and what it has cost (`Tally`) are the gateway's own. Messages and the
//! time are handed in, and what the gateway says is taken out. There is no text, no log and no client's stream: a session is
//! its tokens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use specattn_proto::v1::{
    AttachRequest, GenerateRequest, ModelInfo, OpenRequest, OpenResponse, SessionStats, WorkerLoad,
    WorkerRole,
};
use specattn_proto::{Fault, SessionId};
use tokio::sync::watch;

use crate::admission::{Admission, ClientKey, Entered};
use crate::args::Config;
use crate::plan::Plan;
use crate::registry::{Dialers, Registry};

pub use crate::registry::WorkerId;

mod office;
mod session;

use office::{Office, Timer};
use session::Session;

/// Something that the gateway says.
#[derive(Debug)]
pub enum Said {
    /// To a verify worker.
    Open(WorkerId, Box<OpenRequest>),
    /// To a draft worker, for a session of this verify worker.
    Attach(WorkerId, WorkerId, Box<AttachRequest>),
    /// To a draft worker: nobody wants the session's drafts any more.
    Detach(WorkerId, SessionId),
    /// To the client: more tokens.
    Committed(SessionId, Vec<u32>),
    /// To the client: the end, with what the session has cost and how often it was opened again.
    Finished(SessionId, Box<SessionStats>, u32),
    /// To the client: there is no session, or no more of it.
    Refused(SessionId, Fault),
}

/// The gateway.
pub struct Stepwise {
    office: Office,
    admission: Arc<Admission>,
    changes: watch::Receiver<u64>,
    sessions: BTreeMap<SessionId, Session>,
    /// Sessions in line, in order.
    line: Vec<SessionId>,
    /// Links to workers, which nobody uses, want one.
    runtime: tokio::runtime::Runtime,
}

impl std::fmt::Debug for Stepwise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stepwise").finish_non_exhaustive()
    }
}

impl Stepwise {
    /// A gateway without workers whose pauses follow from `seed`.
    ///
    /// # Errors
    /// [`std::io::Error`] when there is no runtime to be had.
    pub fn new(config: Config, seed: u64) -> std::io::Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let registry = Arc::new(Registry::new(String::new(), Dialers::default()));
        Ok(Self {
            admission: Arc::new(Admission::new(config.admission)),
            changes: registry.changes(),
            office: Office::new(config, registry, seed),
            sessions: BTreeMap::new(),
            line: Vec::new(),
            runtime: runtime.enable_all().build()?,
        })
    }

    /// Sessions that have not ended.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Takes out what the gateway has said since the last time.
    pub fn said(&mut self) -> Vec<Said> {
        std::mem::take(&mut self.office.said)
    }

    /// When to [`Stepwise::wake`] it, unless something happens before.
    pub fn next_wake(&self) -> Option<Instant> {
        self.office.timers.first().map(|(at, ..)| (*at).into())
    }

    /// A worker registers.
    ///
    /// # Errors
    /// As the registry's.
    pub fn join(
        &mut self,
        role: WorkerRole,
        endpoint: String,
        model: &ModelInfo,
        load: WorkerLoad,
    ) -> Result<WorkerId, Fault> {
        let _entered = self.runtime.enter();
        let model = Some(model.clone());
        self.office.registry.add(role, endpoint, model, load)
    }

    /// A worker's heartbeat.
    pub fn report(&mut self, worker: WorkerId, load: WorkerLoad, now: Instant) {
        self.office.now = now.into();
        self.office.registry.report(worker, load);
        self.settle();
    }

    /// A worker is gone, and all streams to it.
    pub fn lost(&mut self, worker: WorkerId, now: Instant) {
        self.office.now = now.into();
        self.office.registry.remove(worker, "lost");
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            self.tell(id, |session, office| session.lost(office, worker));
        }
        self.settle();
    }

    /// A client asks for a session.
    pub fn arrive(&mut self, id: SessionId, client: &str, request: GenerateRequest, now: Instant) {
        self.office.now = now.into();
        let entered = self.admission.enter(ClientKey::named(client));
        let vocab_size = self.office.registry.verify_vocab_size();
        let encode = |_: &str| Err(Fault::InvalidArgument("there is no tokenizer".to_owned()));
        let planned = entered.and_then(|entered| {
            let vocab_size = vocab_size.unwrap_or(usize::MAX);
            let plan = Plan::check(request, &encode, vocab_size, &self.office.config)?;
            Ok((entered, plan))
        });
        match planned {
            Err(fault) => self.office.said.push(Said::Refused(id, fault)),
            Ok((entered, plan)) => {
                let mut session = Session::new(id, plan, self.office.registry.changes());
                match entered {
                    Entered::Admitted(ticket) => session.begin(&mut self.office, ticket),
                    Entered::Waiting(waiting) => {
                        self.line.push(id);
                        session.wait(&mut self.office, waiting);
                    }
                }
                self.sessions.insert(id, session);
                self.forget(id);
            }
        }
        self.settle();
    }

    /// A verify worker did not open a session, or gave it up.
    pub fn refused(&mut self, id: SessionId, worker: WorkerId, fault: Fault, now: Instant) {
        self.office.now = now.into();
        self.tell(id, |session, office| session.refused(office, worker, fault));
        self.settle();
    }

    /// An event of a session, from a verify worker.
    pub fn event(&mut self, id: SessionId, worker: WorkerId, response: OpenResponse, now: Instant) {
        self.office.now = now.into();
        if let Some(event) = response.event {
            self.tell(id, |session, office| session.event(office, worker, event));
        }
        self.settle();
    }

    /// A draft is attached, having measured this round trip to its verify worker.
    pub fn attached(
        &mut self,
        id: SessionId,
        draft: WorkerId,
        trip: Option<Duration>,
        now: Instant,
    ) {
        self.office.now = now.into();
        self.tell(id, |session, office| session.attached(office, draft, trip));
    }

    /// A draft is not attached any more, or never was.
    pub fn detached(&mut self, id: SessionId, draft: WorkerId, now: Instant) {
        self.office.now = now.into();
        self.tell(id, |session, office| session.detached(office, draft));
        self.settle();
    }

    /// Does what is due.
    pub fn wake(&mut self, now: Instant) {
        self.office.now = now.into();
        while let Some((id, timer, at)) = self.office.due() {
            if timer == Timer::Turn {
                self.line.retain(|&other| other != id);
            }
            self.tell(id, |session, office| session.due(office, timer, at));
        }
        self.settle();
    }

    /// Lets a session hear of something, if it is there.
    fn tell(&mut self, id: SessionId, hear: impl FnOnce(&mut Session, &mut Office)) {
        if let Some(session) = self.sessions.get_mut(&id) {
            hear(session, &mut self.office);
            self.forget(id);
        }
    }

    /// Forgets a session that is over.
    fn forget(&mut self, id: SessionId) {
        if self.sessions.get(&id).is_some_and(Session::is_over) {
            self.sessions.remove(&id);
            self.office.listening.remove(&id);
        }
    }

    /// Does what follows from changes of the registry and free places.
    fn settle(&mut self) {
        while self.changes.has_changed().unwrap_or(false) {
            self.changes.mark_unchanged();
            let places = self.office.registry.places();
            self.admission.set_places(places);
            for id in std::mem::take(&mut self.office.listening) {
                self.tell(id, Session::listen);
            }
            for id in self.line.clone() {
                self.tell(id, |session, office| session.called(office));
            }
            let sessions = &self.sessions;
            self.line
                .retain(|id| sessions.get(id).is_some_and(Session::is_in_line));
        }
    }
}
