//! [`Stepwise`]: a draft worker without thread, network and time of its own, for simulations.
//!
//! As the verify worker's: the engine loop, its scheduler, the sessions and the checks of the wire are the worker's own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use specattn_engine::Model;
use specattn_proto::Fault;
use specattn_proto::v1::{
    AttachRequest, ModelInfo, SpeculateRequest, SpeculateResponse, WorkerLoad,
};
use specattn_worker::{Limits, LoadGauge, Scheduler, ServedModel, inbox};
use tokio::sync::{mpsc, oneshot};

use crate::args::{Drafting, LookaheadMode};
use crate::engine_loop::{Command, EngineLoop, NewSession, SessionKey};
use crate::outgoing::Outgoing;
use crate::own_reads::OwnPolicy;
use crate::service::PROPOSALS;
use crate::session::Proposal;
use crate::wire::{self, Answer};

/// Something that the worker says.
#[derive(Debug)]
pub enum Said {
    /// To the verify worker of an attachment.
    Proposal(u64, SpeculateRequest),
    /// The worker gave an attachment up, and why.
    Detached(u64, Fault),
}

struct Attachment {
    /// Tokens known when it began.
    known: usize,
    welcomed: bool,
    proposals: mpsc::Receiver<Proposal>,
    outgoing: Outgoing,
    failed: oneshot::Receiver<Fault>,
    abandoned: Arc<AtomicBool>,
}

/// The worker.
pub struct Stepwise {
    engine: EngineLoop,
    /// Keeps the engine's inbox open, which nobody uses.
    _commands: mpsc::Sender<Command>,
    model: ServedModel,
    drafting: Drafting,
    load: Arc<LoadGauge>,
    attachments: BTreeMap<u64, Attachment>,
    last: u64,
}

impl std::fmt::Debug for Stepwise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stepwise").finish_non_exhaustive()
    }
}

impl Stepwise {
    /// A worker without sessions that reads all of its KV cache in every step.
    pub fn new(model: Model, limits: Limits, max_sessions: u32, lookahead: LookaheadMode) -> Self {
        let load = Arc::new(LoadGauge::new(model.block_pool(), max_sessions));
        let served = ServedModel::from(&model);
        let (commands, inbox) = inbox::channel(1);
        let scheduler = Scheduler::new(model, Arc::clone(&load), limits);
        Self {
            engine: EngineLoop::new(scheduler, inbox),
            _commands: commands,
            model: served,
            drafting: Drafting {
                max_q_entries: 64,
                own: OwnPolicy {
                    capture_every: 1,
                    p: 1.0,
                },
                lookahead,
            },
            load,
            attachments: BTreeMap::new(),
            last: 0,
        }
    }

    /// What the draft is.
    pub fn model_info(&self) -> &ModelInfo {
        &self.model.info
    }

    /// What the worker would report.
    pub fn load(&self) -> WorkerLoad {
        self.load.report(false)
    }

    /// `DraftService.Attach`: the attachment's number, and its first message to the verify worker.
    ///
    /// # Errors
    /// As the service's.
    pub fn attach(&mut self, request: AttachRequest) -> Result<(u64, SpeculateRequest), Fault> {
        let attach = wire::attach(request, &self.model.config, self.drafting)?;
        self.last += 1;
        let key = self.last;
        let (sender, proposals) = mpsc::channel(PROPOSALS);
        let (failing, failed) = oneshot::channel();
        let (reply, mut opened) = oneshot::channel();
        let abandoned = Arc::new(AtomicBool::new(false));
        let session = Box::new(NewSession {
            key: SessionKey(key),
            spec: attach.spec,
            proposals: sender,
            failed: failing,
            abandoned: Arc::clone(&abandoned),
        });
        self.engine.handle(Command::Open { session, reply });
        opened
            .try_recv()
            .unwrap_or_else(|_| Err(Fault::Internal("the engine gave no answer".to_owned())))?;
        let attachment = Attachment {
            known: attach.joining.known,
            welcomed: false,
            proposals,
            outgoing: Outgoing::default(),
            failed,
            abandoned,
        };
        let join = wire::join(&attach.joining, self.model.info.clone());
        self.attachments.insert(key, attachment);
        Ok((key, join))
    }

    /// A message of the verify worker to an attachment. One that has ended takes none.
    ///
    /// # Errors
    /// Why the attachment ends: the session is over, or the message makes no sense.
    pub fn answer(&mut self, key: u64, response: SpeculateResponse) -> Result<(), Fault> {
        let Some(attachment) = self.attachments.get_mut(&key) else {
            return Ok(());
        };
        if !attachment.welcomed {
            let welcome = wire::welcome(Some(response), &self.model.config, attachment.known)?;
            attachment.welcomed = true;
            self.engine.handle(Command::Welcome {
                key: SessionKey(key),
                welcome: Box::new(welcome),
            });
            return Ok(());
        }
        match wire::answer(response)? {
            Answer::Verdict(verdict) => {
                self.engine.handle(Command::Verdict {
                    key: SessionKey(key),
                    verdict,
                });
                Ok(())
            }
            Answer::Closed(reason) => Err(Fault::Cancelled(reason.as_str_name().to_owned())),
        }
    }

    /// Nobody wants an attachment any more.
    pub fn detach(&mut self, key: u64) {
        if let Some(attachment) = self.attachments.remove(&key) {
            attachment.abandoned.store(true, Ordering::Release);
            self.engine.handle(Command::Sweep);
        }
    }

    /// Runs one batch of what is ready; without any, `Some` says when to look again, if at any time.
    pub fn step(&mut self) -> Option<Option<Instant>> {
        self.engine.step()
    }

    /// Takes out what the worker has said since the last time.
    pub fn said(&mut self, mut take: impl FnMut(Said)) {
        self.attachments.retain(|&key, attachment| {
            while let Ok(proposal) = attachment.proposals.try_recv() {
                take(Said::Proposal(key, attachment.outgoing.message(proposal)));
            }
            match attachment.failed.try_recv() {
                Ok(fault) => {
                    take(Said::Detached(key, fault));
                    false
                }
                Err(_) => true,
            }
        });
    }
}
