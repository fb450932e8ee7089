//! [`EngineLoop`]: the one thread that owns the draft model and every session.
//!
//! First everything that arrived, then one batch of whatever the [`Scheduler`] finds ready; with none, it waits for a
//! message.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use specattn_engine::{Sequence, Step, StepOutput};
use specattn_proto::Fault;
use specattn_worker::scheduler::{self, Exit, Plan, Scheduler, Stepped};
use specattn_worker::{Inbox, Readiness, Received};
use tokio::sync::{mpsc, oneshot};

use crate::lookahead::Findings;
use crate::session::{DraftShape, Proposal, Session, SessionSpec, Verdict, Welcome};

/// Messages that may wait for the engine.
pub(crate) const INBOX_CAPACITY: usize = 256;

/// Messages taken between two batches.
const BURST: usize = 64;

/// Names a session within this worker. The gateway's id will not do: a session may come back before it has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionKey(pub(crate) u64);

/// A session for the engine to take up.
pub(crate) struct NewSession {
    pub(crate) key: SessionKey,
    pub(crate) spec: SessionSpec,
    pub(crate) proposals: mpsc::Sender<Proposal>,
    /// Told when the engine gives the session up.
    pub(crate) failed: oneshot::Sender<Fault>,
    /// Set when nobody wants the session any more.
    pub(crate) abandoned: Arc<AtomicBool>,
}

/// A message from the gRPC edge.
pub(crate) enum Command {
    /// Takes up a session.
    Open {
        session: Box<NewSession>,
        reply: oneshot::Sender<Result<(), Fault>>,
    },
    /// The verify worker welcomed the draft.
    Welcome {
        key: SessionKey,
        welcome: Box<Welcome>,
    },
    /// The verify worker answered.
    Verdict { key: SessionKey, verdict: Verdict },
    /// Some session is not wanted any more.
    Sweep,
}

/// A session, and who cares for it.
pub(crate) struct Attached {
    key: SessionKey,
    session: Session,
    failed: oneshot::Sender<Fault>,
    abandoned: Arc<AtomicBool>,
}

impl scheduler::Session for Attached {
    /// It goes on until somebody else ends it.
    type Ending = Infallible;

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    fn reach(&self) -> usize {
        self.session.reach()
    }

    fn is_prefilling(&self) -> bool {
        self.session.is_catching_up()
    }

    fn prompt(&self) -> &[u32] {
        self.session.prompt()
    }

    fn cached(&self) -> usize {
        self.session.cached()
    }

    fn set_cached(&mut self, cached: usize) {
        self.session.set_cached(cached);
    }

    fn plan(&mut self, _now: Instant) -> Plan {
        self.session.plan()
    }

    fn readiness(&self, _now: Instant) -> Readiness {
        self.session.readiness()
    }

    fn step<'a>(&'a self, sequence: &'a mut Sequence) -> Step<'a> {
        let session = &self.session;
        Step {
            lists: session.lists(),
            logits: session.logit_rows(),
            argmax: session.needs_argmax_only(),
            bias: session.logit_bias(),
            capture: session.capture(),
            select: session.select(),
            ..Step::new(sequence, session.input())
        }
    }

    fn settle(&mut self, output: &StepOutput) -> Result<Option<Infallible>, Fault> {
        self.session.settle(output).map(|()| None)
    }
}

/// The loop's state.
pub(crate) struct EngineLoop {
    scheduler: Scheduler<Attached>,
    inbox: Inbox<Command>,
    /// Whether running ahead of verdicts paid so far.
    findings: Arc<Findings>,
}

impl EngineLoop {
    /// A loop without sessions.
    pub(crate) fn new(scheduler: Scheduler<Attached>, inbox: Inbox<Command>) -> Self {
        Self {
            scheduler,
            inbox,
            findings: Arc::default(),
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
        match command {
            Command::Open { session, reply } => {
                // A caller that no longer waits has abandoned the session as well.
                let _ = reply.send(self.open(*session));
            }
            Command::Welcome { key, welcome } => self.tell(key, |session| session.join(*welcome)),
            Command::Verdict { key, verdict } => self.tell(key, |session| session.judge(verdict)),
            Command::Sweep => self.scheduler.sweep().into_iter().for_each(part),
        }
    }

    /// Hands a session what the verify worker sent; one that is gone already needs it no more.
    fn tell(&mut self, key: SessionKey, told: impl FnOnce(&mut Session) -> Result<(), Fault>) {
        let Some(attached) = self.scheduler.find(|attached| attached.key == key) else {
            return;
        };
        if let Err(fault) = told(&mut attached.session)
            && let Some(attached) = self.scheduler.remove(|attached| attached.key == key)
        {
            part((attached, Exit::Failed(fault)));
        }
    }

    fn open(&mut self, new: NewSession) -> Result<(), Fault> {
        let shape = DraftShape::from(self.scheduler.model().config());
        let room = new.spec.capacity;
        let attached = Attached {
            key: new.key,
            session: Session::new(new.spec, shape, new.proposals, Arc::clone(&self.findings)),
            failed: new.failed,
            abandoned: new.abandoned,
        };
        self.scheduler.open(attached, room)
    }
}

/// Tells why a session was given up, if it was.
fn part((attached, exit): (Attached, Exit<Infallible>)) {
    if let Exit::Failed(fault) = exit {
        tracing::warn!(%fault, "session given up");
        // Nobody to tell when the link is gone already.
        let _ = attached.failed.send(fault);
    }
}
