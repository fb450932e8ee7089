//! [`Stepwise`]: a verify worker without thread, network and time of its own, for simulations.
//!
//! The engine loop, its scheduler, the sessions and the checks of the wire are the worker's own; messages are handed in,
//! steps are taken when told, by [`specattn_worker::clock`], and what the worker says is taken out.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use specattn_engine::Model;
use specattn_proto::v1::{
    ModelInfo, OpenRequest, OpenResponse, SpeculateRequest, SpeculateResponse, WorkerLoad,
};
use specattn_proto::{Capability, Fault, SessionId, limits, validate};
use specattn_worker::{Limits, LoadGauge, Scheduler, ServedModel, inbox};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::Stream;

use crate::draft_link::{LinkEvent, LinkId};
use crate::draft_reads::ClaimBound;
use crate::engine_loop::{Command, EngineLoop};
use crate::events::{self, Event, Events};
use crate::masks::LayerMaps;
use crate::metrics::Totals;
use crate::service::{LINK_EVENTS, LINK_MESSAGES};
use crate::trace::SessionTrace;
use crate::wire;

/// How a simulated worker is set up.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// What bounds a step.
    pub limits: Limits,
    /// Most sessions at a time.
    pub max_sessions: u32,
    /// How long a session waits for its draft.
    pub draft_timeout: Duration,
}

/// Something that the worker says.
#[derive(Debug)]
pub enum Said {
    /// To the gateway of a session.
    Event(SessionId, OpenResponse),
    /// To the same: the session failed.
    Failed(SessionId, Fault),
    /// To the draft on a link.
    Answer(u64, SpeculateResponse),
    /// A link ended, and why.
    Unlinked(u64, Option<Fault>),
}

struct OpenLink {
    session: SessionId,
    bound: ClaimBound,
    events: mpsc::Receiver<LinkEvent>,
    slots: Arc<Semaphore>,
}

/// The worker.
pub struct Stepwise {
    engine: EngineLoop,
    /// Keeps the engine's inbox open, which nobody uses.
    _commands: mpsc::Sender<Command>,
    model: ServedModel,
    maps: LayerMaps,
    load: Arc<LoadGauge>,
    sessions: BTreeMap<SessionId, Events>,
    links: BTreeMap<u64, OpenLink>,
    last_link: u64,
}

impl std::fmt::Debug for Stepwise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stepwise").finish_non_exhaustive()
    }
}

impl Stepwise {
    /// A worker without sessions.
    pub fn new(model: Model, setup: &Setup) -> Self {
        let load = Arc::new(LoadGauge::new(model.block_pool(), setup.max_sessions));
        let served = ServedModel::from(&model);
        let (commands, inbox) = inbox::channel(1);
        let scheduler = Scheduler::new(model, Arc::clone(&load), setup.limits);
        Self {
            engine: EngineLoop::new(scheduler, inbox, setup.draft_timeout, Totals::default()),
            _commands: commands,
            maps: LayerMaps::proportional(&served.config),
            model: served,
            load,
            sessions: BTreeMap::new(),
            links: BTreeMap::new(),
            last_link: 0,
        }
    }

    /// What the target is.
    pub fn model_info(&self) -> &ModelInfo {
        &self.model.info
    }

    /// What the worker would report.
    pub fn load(&self) -> WorkerLoad {
        self.load.report(false)
    }

    /// `VerifyService.Open`.
    ///
    /// # Errors
    /// As the service's.
    pub fn open(&mut self, request: OpenRequest) -> Result<(), Fault> {
        let spec = wire::session_spec(request, &self.model.config)?;
        let id = spec.id;
        let (outbox, events) = events::channel(spec.tokens.len(), Duration::ZERO, || {});
        self.ask(|reply| Command::Open {
            spec: Box::new(spec),
            trace: SessionTrace::none(),
            outbox,
            reply,
        })?;
        self.sessions.insert(id, events);
        Ok(())
    }

    /// The gateway of a session is gone.
    pub fn abandon(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        self.engine.handle(Command::Sweep);
    }

    /// The first message of a `VerifyService.Speculate` stream; the link's number.
    ///
    /// # Errors
    /// As the service's.
    pub fn join(&mut self, request: SpeculateRequest) -> Result<u64, Fault> {
        let join = wire::join(Some(request))?;
        let session = join.session_id.parse()?;
        let capability = Capability::from_wire(&join.capability)?;
        let draft = validate::model_info(join.draft_model)?;
        wire::check_vocabularies(&draft, &self.model.config)?;
        let map = self.maps.for_draft(&draft)?;
        self.last_link += 1;
        let link = self.last_link;
        let (sender, events) = mpsc::channel(LINK_EVENTS);
        let slots = Arc::new(Semaphore::new(LINK_MESSAGES));
        self.ask(|reply| Command::Join {
            session,
            link: LinkId(link),
            capability,
            known_tokens: join.known_tokens,
            map,
            sender,
            slots: Arc::clone(&slots),
            reply,
        })?;
        let bound = ClaimBound::new(&draft, limits::MAX_SESSION_TOKENS);
        let open = OpenLink {
            session,
            bound,
            events,
            slots,
        };
        self.links.insert(link, open);
        Ok(link)
    }

    /// A later message of that stream. A link that has ended takes none.
    pub fn propose(&mut self, link: u64, request: SpeculateRequest) {
        let Some(open) = self.links.get(&link) else {
            return;
        };
        let Ok(permit) = Arc::clone(&open.slots).try_acquire_owned() else {
            return;
        };
        let session = open.session;
        match wire::proposal_part(request, &open.bound) {
            Ok(part) => self.engine.handle(Command::Propose {
                session,
                link: LinkId(link),
                part,
                permit,
            }),
            Err(fault) => self.leave(link, Some(fault)),
        }
    }

    /// A draft's stream ended.
    pub fn leave(&mut self, link: u64, fault: Option<Fault>) {
        if let Some(open) = self.links.remove(&link) {
            self.engine.handle(Command::Leave {
                session: open.session,
                link: LinkId(link),
                fault,
            });
        }
    }

    /// Runs one batch of what is ready; without any, `Some` says when to look again, if at any time.
    pub fn step(&mut self) -> Option<Option<Instant>> {
        self.engine.step()
    }

    /// Takes out what the worker has said since the last time.
    pub fn said(&mut self, mut take: impl FnMut(Said)) {
        let mut context = Context::from_waker(Waker::noop());
        let entry_bytes = self.model.info.kv_entry_bytes;
        self.sessions.retain(|&id, events| {
            loop {
                match Pin::new(&mut *events).poll_next(&mut context) {
                    Poll::Pending => return true,
                    Poll::Ready(None) => return false,
                    Poll::Ready(Some(event)) => {
                        let progress =
                            matches!(event, Event::Committed { .. }).then(|| events.progress());
                        take(match wire::open_response(event, progress, entry_bytes) {
                            Ok(response) => Said::Event(id, response),
                            Err(fault) => Said::Failed(id, fault),
                        });
                    }
                }
            }
        });
        self.links.retain(|&link, open| {
            loop {
                match open.events.try_recv() {
                    Err(mpsc::error::TryRecvError::Empty) => return true,
                    Err(mpsc::error::TryRecvError::Disconnected) => {
                        take(Said::Unlinked(link, None));
                        return false;
                    }
                    Ok(event) => match wire::speculate_response(event) {
                        Ok(answer) => take(Said::Answer(link, answer)),
                        Err(fault) => {
                            take(Said::Unlinked(link, Some(fault)));
                            return false;
                        }
                    },
                }
            }
        });
    }

    fn ask<T>(
        &mut self,
        command: impl FnOnce(oneshot::Sender<Result<T, Fault>>) -> Command,
    ) -> Result<T, Fault> {
        let (reply, mut answer) = oneshot::channel();
        self.engine.handle(command(reply));
        answer
            .try_recv()
            .unwrap_or_else(|_| Err(Fault::Internal("the engine gave no answer".to_owned())))
    }
}
