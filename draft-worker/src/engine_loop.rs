//! [`EngineLoop`]: the one thread that owns the draft model and every session.
//!
//! First everything that arrived, then one forward of the next session that has work, in turn; with none, it waits for
//! a message.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use specattn_engine::{EngineError, Model, Sequence, Step};
use specattn_proto::Fault;
use specattn_worker::{Inbox, LoadGauge, Received};
use tokio::sync::{mpsc, oneshot};

use crate::session::{DraftShape, Plan, Proposal, Session, SessionSpec, Verdict, Welcome};

/// Messages that may wait for the engine.
pub(crate) const INBOX_CAPACITY: usize = 256;

/// Messages taken between two forwards.
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

/// A session, its KV cache, and who cares for it.
struct Slot {
    key: SessionKey,
    session: Session,
    sequence: Sequence,
    failed: oneshot::Sender<Fault>,
    abandoned: Arc<AtomicBool>,
}

/// The loop's state.
pub(crate) struct EngineLoop {
    model: Model,
    inbox: Inbox<Command>,
    load: Arc<LoadGauge>,
    slots: Vec<Slot>,
    /// The slot whose turn it is.
    turn: usize,
}

impl EngineLoop {
    /// A loop without sessions.
    pub(crate) fn new(model: Model, inbox: Inbox<Command>, load: Arc<LoadGauge>) -> Self {
        Self {
            model,
            inbox,
            load,
            slots: Vec::new(),
            turn: 0,
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
            if self.work() {
                continue;
            }
            match self.inbox.wait(None) {
                Received::Message(command) => self.handle(command),
                Received::TimedOut => {}
                Received::Closed => return,
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Open { session, reply } => {
                // A caller that no longer waits has abandoned the session as well.
                let _ = reply.send(self.open(*session));
            }
            Command::Welcome { key, welcome } => self.tell(key, |session| session.join(*welcome)),
            Command::Verdict { key, verdict } => self.tell(key, |session| session.judge(verdict)),
            Command::Sweep => {
                for at in (0..self.slots.len()).rev() {
                    if self.slots[at].abandoned.load(Ordering::Acquire) {
                        self.remove(at);
                    }
                }
            }
        }
    }

    /// Hands a session what the verify worker sent; one that is gone already needs it no more.
    fn tell(&mut self, key: SessionKey, told: impl FnOnce(&mut Session) -> Result<(), Fault>) {
        let Some(at) = self.slots.iter().position(|slot| slot.key == key) else {
            return;
        };
        let slot = &mut self.slots[at];
        let result = told(&mut slot.session);
        slot.sequence.truncate(slot.session.cached());
        if let Err(fault) = result {
            self.give_up(at, fault);
        }
    }

    fn open(&mut self, new: NewSession) -> Result<(), Fault> {
        if self.slots.len() >= self.load.sessions_max() {
            return Err(Fault::exhausted("every session slot is taken"));
        }
        let sequence = self
            .model
            .new_sequence(new.spec.capacity)
            .map_err(|error| match error {
                EngineError::KvExhausted { .. } => Fault::exhausted(error.to_string()),
                other => Fault::InvalidArgument(other.to_string()),
            })?;
        let shape = DraftShape::from(self.model.config());
        self.slots.push(Slot {
            key: new.key,
            session: Session::new(new.spec, shape, new.proposals),
            sequence,
            failed: new.failed,
            abandoned: new.abandoned,
        });
        self.load.set_sessions(self.slots.len());
        Ok(())
    }

    /// Runs one forward, of the session whose turn it is or the next one that has work. False when none has.
    fn work(&mut self) -> bool {
        for _ in 0..self.slots.len() {
            if self.turn >= self.slots.len() {
                self.turn = 0;
            }
            let at = self.turn;
            self.turn += 1;
            if self.slots[at].abandoned.load(Ordering::Acquire) {
                self.remove(at);
                return true;
            }
            if self.slots[at].session.plan() == Plan::Run {
                self.run_pass(at);
                return true;
            }
        }
        false
    }

    /// Runs the planned forward of the session in slot `at`.
    fn run_pass(&mut self, at: usize) {
        let Slot {
            session, sequence, ..
        } = &mut self.slots[at];
        let step = Step {
            tokens: session.input(),
            lists: session.lists(),
            logits: session.logit_rows(),
            capture: session.capture(),
            masses: false,
            sequence,
        };
        self.load.add_tokens(step.tokens.len());
        let settled = match self.model.forward(&mut [step]).as_deref() {
            Ok([output]) => session.settle(output),
            Ok(_) => unreachable!("a batch of one step yields one output"),
            Err(error) => Err(Fault::Internal(error.to_string())),
        };
        if let Err(fault) = settled {
            self.give_up(at, fault);
        }
    }

    fn give_up(&mut self, at: usize, fault: Fault) {
        tracing::warn!(%fault, "session given up");
        // Nobody to tell when the link is gone already.
        let _ = self.remove(at).send(fault);
    }

    /// Frees a session's KV blocks and its slot.
    fn remove(&mut self, at: usize) -> oneshot::Sender<Fault> {
        let slot = self.slots.remove(at);
        if at < self.turn {
            self.turn -= 1;
        }
        drop(slot.sequence);
        self.load.set_sessions(self.slots.len());
        slot.failed
    }
}
