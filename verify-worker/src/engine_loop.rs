//! [`EngineLoop`]: the one thread that owns the target model and every session.
//!
//! It alternates between the inbox and the sessions: first everything that arrived, then one unit of work (a prompt
//! chunk, a round or a step alone) of the next session that has any, in turn. When no session has work it waits for
//! a message, or for the end of a session's patience with its draft. Sessions only plan and settle; which of them runs
//! next, and how many at once, is decided here and nowhere else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use specattn_engine::{EngineError, Model, Sequence, Step};
use specattn_mask::LayerMap;
use specattn_proto::{Fault, SessionId, limits};
use specattn_worker::{Inbox, LoadGauge, Received};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::draft_link::{LinkEvent, LinkId, NewLink, ProposalPart};
use crate::events::{Ending, Outbox};
use crate::payoff::Findings;
use crate::session::{Plan, Session, SessionSpec};

/// Messages that may wait for the engine.
pub(crate) const INBOX_CAPACITY: usize = 256;

/// Messages taken between two units of work.
const BURST: usize = 64;

/// Positions that a round may write beyond the session's last token: the most draft tokens, and the pending input.
const ROUND_ROOM: usize = limits::MAX_DRAFT_LENGTH as usize + 1;

/// A message from the gRPC edge.
pub(crate) enum Command {
    /// Opens a session.
    Open {
        spec: Box<SessionSpec>,
        outbox: Outbox,
        reply: oneshot::Sender<Result<(), Fault>>,
    },
    /// A draft joins a session; the answer goes out on `sender`.
    Join {
        session: SessionId,
        link: LinkId,
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
    /// Some session's gateway is gone.
    Sweep,
}

/// A session and its KV cache.
struct Slot {
    session: Session,
    sequence: Sequence,
}

/// What the sessions had to do.
enum Work {
    Done,
    /// Nothing before then, or at all.
    Idle(Option<Instant>),
}

/// The loop's state.
pub(crate) struct EngineLoop {
    model: Model,
    inbox: Inbox<Command>,
    load: Arc<LoadGauge>,
    draft_timeout: Duration,
    /// Whether drafts paid so far.
    findings: Arc<Findings>,
    slots: Vec<Slot>,
    /// The slot whose turn it is.
    turn: usize,
}

impl EngineLoop {
    /// A loop without sessions.
    pub(crate) fn new(
        model: Model,
        inbox: Inbox<Command>,
        load: Arc<LoadGauge>,
        draft_timeout: Duration,
    ) -> Self {
        Self {
            model,
            inbox,
            load,
            draft_timeout,
            findings: Arc::default(),
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
            let Work::Idle(deadline) = self.work() else {
                continue;
            };
            match self.inbox.wait(deadline) {
                Received::Message(command) => self.handle(command),
                Received::TimedOut => {}
                Received::Closed => return,
            }
        }
    }

    fn handle(&mut self, command: Command) {
        // A caller that no longer waits for its reply needs none.
        match command {
            Command::Open {
                spec,
                outbox,
                reply,
            } => {
                let _ = reply.send(self.open(*spec, outbox));
            }
            Command::Join {
                session,
                link,
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
                let joined = self
                    .find(session)
                    .and_then(|at| self.slots[at].session.join(new, known_tokens, map));
                let _ = reply.send(joined);
            }
            Command::Propose {
                session,
                link,
                part,
                permit,
            } => {
                if let Ok(at) = self.find(session) {
                    self.slots[at].session.receive(link, part);
                }
                drop(permit);
            }
            Command::Leave {
                session,
                link,
                fault,
            } => {
                if let Ok(at) = self.find(session) {
                    self.slots[at].session.leave(link, fault);
                }
            }
            Command::Close {
                session,
                ending,
                reply,
            } => {
                let closed = self.find(session).map(|at| self.end(at, ending, None));
                let _ = reply.send(closed);
            }
            Command::Sweep => {
                for at in (0..self.slots.len()).rev() {
                    if self.slots[at].session.is_abandoned() {
                        self.end(at, Ending::Cancelled, None);
                    }
                }
            }
        }
    }

    fn find(&self, session: SessionId) -> Result<usize, Fault> {
        self.slots
            .iter()
            .position(|slot| slot.session.id() == session)
            .ok_or_else(|| Fault::NotFound("no such session".to_owned()))
    }

    fn open(&mut self, spec: SessionSpec, outbox: Outbox) -> Result<(), Fault> {
        if self.find(spec.id).is_ok() {
            return Err(Fault::AlreadyExists("the session id is in use".to_owned()));
        }
        if self.slots.len() >= self.load.sessions_max() {
            return Err(Fault::exhausted("every session slot is taken"));
        }
        let config = self.model.config();
        let room = (spec.limit + ROUND_ROOM).min(config.max_context);
        let session = Session::new(spec, config.vocab_size, outbox, &self.findings)
            .map_err(|error| Fault::InvalidArgument(error.to_string()))?;
        let sequence = self.model.new_sequence(room).map_err(refusal)?;
        tracing::info!(session_id = %session.id(), tokens = session.len(), "session opened");
        self.slots.push(Slot { session, sequence });
        self.load.set_sessions(self.slots.len());
        if self.slots[self.slots.len() - 1].session.is_over() {
            self.end(self.slots.len() - 1, Ending::Length, None);
        }
        Ok(())
    }

    /// Does one unit of work, of the session whose turn it is or the next one that has any.
    fn work(&mut self) -> Work {
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        for _ in 0..self.slots.len() {
            if self.turn >= self.slots.len() {
                self.turn = 0;
            }
            let at = self.turn;
            self.turn += 1;
            if self.slots[at].session.is_abandoned() {
                self.end(at, Ending::Cancelled, None);
                return Work::Done;
            }
            match self.slots[at].session.plan(now) {
                Plan::Run => {
                    self.run_pass(at);
                    return Work::Done;
                }
                Plan::Wait(until) => {
                    earliest = Some(earliest.map_or(until, |earliest| earliest.min(until)));
                }
            }
        }
        Work::Idle(earliest)
    }

    /// Runs the planned forward of the session in slot `at`.
    fn run_pass(&mut self, at: usize) {
        let Slot { session, sequence } = &mut self.slots[at];
        sequence.truncate(session.cached());
        let step = Step {
            tokens: session.input(),
            lists: session.lists(),
            logits: session.logit_rows(),
            capture: &[],
            masses: session.wants_masses(),
            sequence,
        };
        self.load.add_tokens(step.tokens.len());
        let settled =
            self.model
                .forward(&mut [step])
                .and_then(|outputs| match outputs.as_slice() {
                    [output] => session.settle(output),
                    _ => unreachable!("a batch of one step yields one output"),
                });
        match settled {
            Ok(None) => {}
            Ok(Some(ending)) => self.end(at, ending, None),
            Err(error) => {
                tracing::error!(session_id = %self.slots[at].session.id(), %error, "session failed");
                let failure = Fault::Internal(error.to_string());
                self.end(at, Ending::Error, Some(failure));
            }
        }
    }

    /// Frees the session's KV blocks and its slot, then tells of its end.
    fn end(&mut self, at: usize, ending: Ending, failure: Option<Fault>) {
        let Slot { session, sequence } = self.slots.remove(at);
        if at < self.turn {
            self.turn -= 1;
        }
        drop(sequence);
        self.load.set_sessions(self.slots.len());
        tracing::info!(session_id = %session.id(), ?ending, tokens = session.len(), "session ended");
        session.finish(ending, failure);
    }
}

/// Why a session cannot have its KV blocks.
fn refusal(error: EngineError) -> Fault {
    match error {
        EngineError::KvExhausted { .. } => Fault::exhausted(error.to_string()),
        other => Fault::InvalidArgument(other.to_string()),
    }
}
