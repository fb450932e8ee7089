//! [`EngineLoop`]: the one thread that owns the target model and every session.
//!
//! It alternates between the inbox and the [`Scheduler`]: first everything that arrived, then one batch of whatever is
//! ready. When no session has work it waits for a message, or for the end of a session's patience with its draft.

use std::sync::Arc;
use std::time::{Duration, Instant};

use specattn_engine::{Sequence, Step, StepOutput};
use specattn_mask::LayerMap;
use specattn_proto::{Capability, Fault, SessionId, limits};
use specattn_worker::scheduler::{self, Exit, Plan, Scheduler, Stepped};
use specattn_worker::{Inbox, Readiness, Received};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::draft_link::{LinkEvent, LinkId, NewLink, ProposalPart};
use crate::events::{Ending, Outbox};
use crate::kept_map::KeptMap;
use crate::metrics::Totals;
use crate::session::{Session, SessionSpec, Shared};
use crate::trace::SessionTrace;

/// Messages that may wait for the engine.
pub(crate) const INBOX_CAPACITY: usize = 256;

/// Messages taken between two batches.
const BURST: usize = 64;

/// Positions that a round may write beyond the session's last token: the most draft tokens, and the pending input.
const ROUND_ROOM: usize = limits::MAX_DRAFT_LENGTH as usize + 1;

/// A message from the gRPC edge.
pub(crate) enum Command {
    /// Opens a session.
    Open {
        spec: Box<SessionSpec>,
        trace: SessionTrace,
        outbox: Outbox,
        reply: oneshot::Sender<Result<(), Fault>>,
    },
    /// A draft joins a session; the answer goes out on `sender`.
    Join {
        session: SessionId,
        link: LinkId,
        /// What the draft shows.
        capability: Option<Capability>,
        known_tokens: u64,
        map: Arc<LayerMap>,
        sender: mpsc::Sender<LinkEvent>,
        slots: Arc<Semaphore>,
        reply: oneshot::Sender<Result<(), Fault>>,
    },
    /// A draft proposes. The permit is one of the link's few.
    Propose {
        session: SessionId,
        link: LinkId,
        part: ProposalPart,
        permit: OwnedSemaphorePermit,
    },
    /// A link ended, by itself or for what it sent.
    Leave {
        session: SessionId,
        link: LinkId,
        fault: Option<Fault>,
    },
    /// Ends a session.
    Close {
        session: SessionId,
        ending: Ending,
        reply: oneshot::Sender<Result<(), Fault>>,
    },
    /// Asks what a session's masks let it read.
    Inspect {
        session: SessionId,
        columns: usize,
        reply: oneshot::Sender<Result<KeptMap, Fault>>,
    },
    /// Some session's gateway is gone.
    Sweep,
}

impl scheduler::Session for Session {
    type Ending = Ending;

    fn is_abandoned(&self) -> bool {
        self.is_abandoned()
    }

    fn reach(&self) -> usize {
        self.reach()
    }

    fn is_prefilling(&self) -> bool {
        self.is_prefilling()
    }

    fn prompt(&self) -> &[u32] {
        self.prompt()
    }

    fn cached(&self) -> usize {
        self.cached()
    }

    fn set_cached(&mut self, cached: usize) {
        self.set_cached(cached);
    }

    fn has_arrivals(&self) -> bool {
        self.has_unread_mask()
    }

    fn prepare(&mut self) {
        self.read_mask();
    }

    fn plan(&mut self, now: Instant) -> Plan {
        self.plan(now)
    }

    fn readiness(&self, now: Instant) -> Readiness {
        self.readiness(now)
    }

    fn step<'a>(&'a self, sequence: &'a mut Sequence) -> Step<'a> {
        Step {
            lists: self.lists(),
            logits: self.logit_rows(),
            argmax: self.needs_argmax_only(),
            bias: self.logit_bias(),
            masses: self.wants_masses(),
            ..Step::new(sequence, self.input())
        }
    }

    fn settle(&mut self, output: &StepOutput) -> Result<Option<Ending>, Fault> {
        self.settle(output)
            .map_err(|error| Fault::Internal(error.to_string()))
    }
}

/// The loop's state.
pub(crate) struct EngineLoop {
    scheduler: Scheduler<Session>,
    inbox: Inbox<Command>,
    draft_timeout: Duration,
    shared: Shared,
}

impl EngineLoop {
    /// A loop without sessions, which add what they cost to `totals`.
    pub(crate) fn new(
        scheduler: Scheduler<Session>,
        inbox: Inbox<Command>,
        draft_timeout: Duration,
        totals: Totals,
    ) -> Self {
        Self {
            scheduler,
            inbox,
            draft_timeout,
            shared: Shared {
                totals,
                ..Shared::default()
            },
        }
    }

    /// Runs until nothing can reach the inbox any more.
    pub(crate) fn run(mut self) {
        loop {
            for _ in 0..BURST {
                match self.inbox.look() {
                    Received::Message(command) => self.handle(command),
                    Received::TimedOut => break,
                    Received::Closed => return,
                }
            }
            let Some(deadline) = self.step() else {
                continue;
            };
            match self.inbox.wait(deadline) {
                Received::Message(command) => self.handle(command),
                Received::TimedOut => {}
                Received::Closed => return,
            }
        }
    }

    /// Runs one batch of what is ready; without any, says when to look again, if at any time.
    pub(crate) fn step(&mut self) -> Option<Option<Instant>> {
        match self.scheduler.step() {
            Stepped::Ran(gone) => {
                gone.into_iter().for_each(part);
                None
            }
            Stepped::Idle(deadline) => Some(deadline),
        }
    }

    /// Takes a message.
    pub(crate) fn handle(&mut self, command: Command) {
        // A caller that no longer waits for its reply needs none.
        match command {
            Command::Open {
                spec,
                trace,
                outbox,
                reply,
            } => {
                let _ = reply.send(self.open(*spec, trace, outbox));
            }
            Command::Join {
                session,
                link,
                capability,
                known_tokens,
                map,
                sender,
                slots,
                reply,
            } => {
                let new = NewLink {
                    id: link,
                    sender,
                    slots,
                    timeout: self.draft_timeout,
                };
                let joined = self.find(session).ok_or_else(unknown).and_then(|found| {
                    found.admit(capability.as_ref())?;
                    found.join(new, known_tokens, map)
                });
                let _ = reply.send(joined);
            }
            Command::Propose {
                session,
                link,
                part,
                permit,
            } => {
                if let Some(found) = self.find(session) {
                    found.receive(link, part);
                }
                drop(permit);
            }
            Command::Leave {
                session,
                link,
                fault,
            } => {
                if let Some(found) = self.find(session) {
                    found.leave(link, fault);
                }
            }
            Command::Close {
                session,
                ending,
                reply,
            } => {
                let closed = self.scheduler.remove(|open| open.id() == session);
                let closed = closed.map(|open| part((open, Exit::Ended(ending))));
                let _ = reply.send(closed.ok_or_else(unknown));
            }
            Command::Inspect {
                session,
                columns,
                reply,
            } => {
                let found = self.find(session).ok_or_else(unknown);
                let _ = reply.send(found.map(|found| found.kept_map(columns)));
            }
            Command::Sweep => self.scheduler.sweep().into_iter().for_each(part),
        }
    }

    fn find(&mut self, session: SessionId) -> Option<&mut Session> {
        self.scheduler.find(|open| open.id() == session)
    }

    fn open(
        &mut self,
        spec: SessionSpec,
        trace: SessionTrace,
        outbox: Outbox,
    ) -> Result<(), Fault> {
        if self.find(spec.id).is_some() {
            return Err(Fault::AlreadyExists("the session id is in use".to_owned()));
        }
        let config = self.scheduler.model().config();
        let room = (spec.limit + ROUND_ROOM).min(config.max_context);
        let session = Session::new(spec, config.vocab_size, outbox, &self.shared)
            .map_err(|error| Fault::InvalidArgument(error.to_string()))?
            .traced(trace);
        let (id, is_over) = (session.id(), session.is_over());
        let tokens = session.len();
        session
            .span()
            .in_scope(|| tracing::info!(tokens, "session opened"));
        self.scheduler.open(session, room)?;
        if is_over && let Some(session) = self.scheduler.remove(|open| open.id() == id) {
            part((session, Exit::Ended(Ending::Length)));
        }
        Ok(())
    }
}

/// Tells of the end of a session whose KV blocks are free.
fn part((session, exit): (Session, Exit<Ending>)) {
    let (ending, failure) = match exit {
        Exit::Ended(ending) => (ending, None),
        Exit::Abandoned => (Ending::Cancelled, None),
        Exit::Failed(fault) => (Ending::Error, Some(fault)),
    };
    let entered = session.span().clone().entered();
    if let Some(fault) = &failure {
        tracing::error!(%fault, "session failed");
    }
    tracing::info!(?ending, tokens = session.len(), "session ended");
    drop(entered);
    session.finish(ending, failure);
}

fn unknown() -> Fault {
    Fault::NotFound("no such session".to_owned())
}
